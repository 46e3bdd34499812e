"""Fewer evaluations: a flow trained plainly, and with the regularisers of RNODE and TayNODE (Finlay et al., Kelly et al. 2020).

    python examples/fewer_evaluations.py        # three minutes on two cores

A continuous normalizing flow over the span (0, 10) learns the pixels of handwritten digits by likelihood, with and without
∫‖f‖² + ∫‖εᵀ∂f/∂x‖² or ∫‖d²x/dt²‖² in the loss. How many evaluations does dopri5 then take? Saves fewer_evaluations.png.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import jode
from jode import data
from jode.models.density import CNF, Field, Hutchinson, Normal, log_likelihood, sample
from jode.regularize import initial, integrate, jacobian, kinetic, taylor

SPAN, BATCH, CHUNK, SOLVER, TEST = (0.0, 10.0), 128, 40, jode.Fixed(jode.rk4, 16), jode.Adaptive(jode.dopri5, 1e-5, 1e-5)
KINDS = {  # a color, the weight of the integrals a pixel, and their rates
    "plain": ("#22303c", 0.0, lambda f, probe: ()),
    "RNODE": ("#2d6ca2", 0.5, lambda f, probe: (kinetic(f), jacobian(f, probe))),
    "TayNODE, K = 2": ("#c6553b", 3.0, lambda f, probe: (taylor(f, 2),)),
}
NATS = 64 * np.log(2)  # of one bit a pixel; in bits, the division by 4 in `noisy` takes 2
TRAINING, UNSEEN = (jnp.asarray(16 * s.images.reshape(-1, 64)) for s in data.digits())


def noisy(levels, key):
    return (levels + jax.random.uniform(key, levels.shape) - 8.5) / 4  # of levels 0 to 16


def loss(flow, x, key, weight, rates):
    """Bits a pixel and the integrals along the way from x to the base, of one image, in one solve."""
    f, probe = flow.field, jax.random.rademacher(key, x.shape, x.dtype)
    trace = lambda t, x, args: jax.vjp(lambda x: f(t, x), x)[1](probe)[0] @ probe
    every = trace, *rates(f, probe)
    z, (change, *extra) = jode.odeint(integrate(f, *every), initial(x, len(every)), SPAN[::-1], solver=SOLVER)
    bits = 2 - (flow.base.log_prob(z[-1]) + change[-1]) / NATS
    return bits - weight * sum(i[-1] for i in extra) / 64  # backwards in time integrals are negative


def train(kind, iterations):
    """The flow, and on the way (iteration, bits a pixel of unseen digits, evaluations by dopri5)."""
    (_, weight, rates), test = KINDS[kind], noisy(UNSEEN, jax.random.key(9))
    arrays, static = eqx.partition(CNF(Field(64, 64, 1, key=jax.random.key(0)), Normal(64), SPAN), eqx.is_inexact_array)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(5e-3, iterations)))

    def step(carry, key):
        (arrays, state), (a, b, c) = carry, jax.random.split(key, 3)
        x, keys = noisy(jax.random.choice(a, TRAINING, (BATCH,)), b), jax.random.split(c, BATCH)
        one = lambda arrays, x, key: loss(eqx.combine(arrays, static), x, key, weight, rates)
        gradient = jax.grad(lambda arrays: jnp.mean(jax.vmap(one, (None, 0, 0))(arrays, x, keys)))(arrays)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(arrays, updates), state), None

    @jax.jit
    def chunk(carry, keys):
        carry = jax.lax.scan(step, carry, keys)[0]
        flow = eqx.combine(carry[0], static)
        count = lambda x: jode.solve(flow.field, x, SPAN[::-1], solver=TEST).stats.nfe
        value = lambda x, key: 2 - log_likelihood(flow, x, key=key, trace=Hutchinson(4), solver=TEST).log_prob / NATS
        return carry, jnp.mean(jax.vmap(value)(test, jax.random.split(keys[0], len(test)))), jnp.mean(jax.vmap(count)(test))

    carry, curve, bar = (arrays, optimizer.init(arrays)), [], tqdm(range(iterations // CHUNK), desc=f"{kind:>15}", ncols=100)
    for k in bar:
        carry, value, nfe = chunk(carry, jax.random.split(jax.random.fold_in(jax.random.key(1), k), CHUNK))
        curve.append(((k + 1) * CHUNK, float(value), float(nfe)))
        bar.set_postfix(bits=f"{value:.3f}", nfe=f"{nfe:.1f}")
    return eqx.combine(carry[0], static), np.array(curve)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--iterations", type=int, default=800)
    p.add_argument("--out", default="fewer_evaluations.png")
    args = p.parse_args()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, 5, figsize=(15, 3.4), layout="constrained")
    for kind, ax in zip(KINDS, axes[2:], strict=True):
        flow, curve = train(kind, args.iterations)
        for axis, column, label in ((axes[0], 2, "evaluations by dopri5 at 1e-5"), (axes[1], 1, "bits a pixel, unseen digits")):
            axis.plot(curve[:, 0], curve[:, column], color=KINDS[kind][0], label=kind)
            axis.set(title=label, xlabel="iteration")
        drawn = jax.vmap(lambda key, flow=flow: sample(flow, key, solver=TEST).x)(jax.random.split(jax.random.key(3), 25))
        ax.imshow(np.asarray(drawn).reshape(5, 5, 8, 8).swapaxes(1, 2).reshape(40, 40), cmap="gray_r", vmin=-2, vmax=2)
        ax.set(title=f"{kind}: samples\n{curve[-1, 2]:.1f} evaluations, {curve[-1, 1]:.3f} bits", xticks=[], yticks=[])
    axes[0].legend(frameon=False)
    fig.savefig(args.out, dpi=110)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
