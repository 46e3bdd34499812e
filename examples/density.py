"""Densities in the plane: a continuous normalizing flow, a planar flow of layers, and flow matching, on the same data.

    python examples/density.py        # ten minutes on two cores; --iterations 300 shows the idea in two

The first two are trained by likelihood, the third without any solve, by regression on straight paths between samples coupled by
minibatch optimal transport. All densities are then those of dopri5 at 1e-5. Saves density.png; numbers are -log p of new data.
"""

import argparse
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import jode
from jode import data
from jode.models.density import CNF, NF, Field, Normal, PlanarMap, coupling, log_likelihood, matching_loss, on_grid

BATCH, CHUNK, TEST = 256, 20, jode.Adaptive(jode.dopri5, 1e-5, 1e-5)
SHAPES = {  # each scaled to the box [-3, 3]²
    "two moons": lambda key, n: 1.5 * (data.moons(key, n) - jnp.array([0.5, 0.25])),
    "circles": lambda key, n: 2 * data.circles(key, n),
    "eight gaussians": lambda key, n: 0.4 * data.gaussians(key, n, noise=0.4),
    "checkerboard": data.checkerboard,
}


def log_prob(model, x, solver=TEST):
    return model.log_prob(x) if isinstance(model, NF) else log_likelihood(model, x, solver=solver).log_prob


def likelihood_loss(model, x0, x1, key):
    return -jnp.mean(jax.vmap(partial(log_prob, model, solver=jode.Fixed(jode.midpoint, 10)))(x1))


def flow_loss(model, x0, x1, key):
    return matching_loss(model.field, x0, x1, key)


MODELS = {
    "CNF": (lambda key: CNF(Field(2, 64, 2, key=key), Normal(2)), likelihood_loss),
    "planar NF, 32 layers": (lambda key: NF(PlanarMap(2, 32, key=key), Normal(2)), likelihood_loss),
    "flow matching": (lambda key: CNF(Field(2, 64, 2, key=key), Normal(2)), flow_loss),
}


def train(name, shape, iterations, key):
    """The model, and a bar with the loss."""
    init, loss = MODELS[name]
    arrays, static = eqx.partition(init(key), eqx.is_inexact_array)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, iterations))

    @jax.jit
    def chunk(carry, keys, x0, x1):
        def step(carry, batch):
            arrays, state = carry
            value, gradient = jax.value_and_grad(lambda a: loss(eqx.combine(a, static), batch[1], batch[2], batch[0]))(arrays)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(arrays, updates), state), value

        return jax.lax.scan(step, carry, (keys, x0, x1))

    carry = arrays, optimizer.init(arrays)
    bar = tqdm(range(iterations // CHUNK), desc=f"{shape}, {name}", unit_scale=CHUNK, unit="it")
    for k in bar:
        a, b, c = jax.random.split(jax.random.fold_in(key, k), 3)
        x0 = jax.random.normal(a, (CHUNK, BATCH, 2))
        x1 = SHAPES[shape](b, CHUNK * BATCH).reshape(CHUNK, BATCH, 2)
        if loss is flow_loss:
            x1 = jnp.stack([x[coupling(z, x)] for z, x in zip(x0, x1, strict=True)])
        carry, values = chunk(carry, jax.random.split(c, CHUNK), x0, x1)
        bar.set_postfix(loss=f"{np.mean(values):.3f}")
    return eqx.combine(carry[0], static)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--iterations", type=int, default=2000)
    p.add_argument("--out", default="density.png")
    args = p.parse_args()
    fig, axes = plt.subplots(4, 4, figsize=(10, 10.6), layout="constrained")
    for row, shape in zip(axes, SHAPES, strict=True):
        test = SHAPES[shape](jax.random.key(99), 2000)
        row[0].hist2d(*SHAPES[shape](jax.random.key(98), 200_000).T, 120, [[-3, 3]] * 2, cmap="magma")
        row[0].set(title="samples", ylabel=shape)
        for ax, name in zip(row[1:], MODELS, strict=True):
            model = train(name, shape, args.iterations, jax.random.key(0))
            grid = jax.jit(lambda m=model: on_grid(partial(log_prob, m), [-3, -3], [3, 3], 120))()
            loss = -jnp.mean(jax.jit(jax.vmap(partial(log_prob, model)))(test))
            ax.imshow(grid.density.T, origin="lower", extent=(-3, 3, -3, 3), cmap="magma")
            ax.set_title(f"{name}: {loss:.2f}\nmass in the box {grid.mass:.3f}", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], aspect="equal")
    fig.savefig(args.out, dpi=110)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
