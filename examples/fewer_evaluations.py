"""Fewer evaluations: a flow trained plainly, and with the regularisers of RNODE and TayNODE (Finlay et al., Kelly et al. 2020).

    python examples/fewer_evaluations.py        # four minutes on two cores

A continuous normalizing flow learns two moons by likelihood, with and without ∫‖f‖² + ∫‖εᵀ∂f/∂x‖² or ∫‖d³x/dt³‖² in the loss. How
many evaluations does dopri5 then take, and what does it cost in likelihood? Saves fewer_evaluations.png.
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
from jode.models.density import CNF, Field, Normal, log_likelihood
from jode.regularize import initial, integrate, jacobian, kinetic, taylor

BATCH, CHUNK, SOLVER, TEST = 128, 20, jode.Fixed(jode.rk4, 6), jode.Adaptive(jode.dopri5, 1e-5, 1e-5)
KINDS = {  # the weight of the integrals, and their rates
    "plain": (0.0, lambda f, probe: ()),
    "RNODE": (0.02, lambda f, probe: (kinetic(f), jacobian(f, probe))),
    "TayNODE, K = 3": (0.003, lambda f, probe: (taylor(f, 3),)),
}
COLORS = dict(zip(KINDS, ("#22303c", "#2d6ca2", "#c6553b"), strict=True))


def points(key, n):
    return 1.5 * (data.moons(key, n) - jnp.array([0.5, 0.25]))


def loss(flow, x, key, weight, rates):
    """-log p and the integrals along the way from x to the base, means over the batch."""

    def one(x, key):
        found = log_likelihood(flow, x, solver=SOLVER).log_prob
        extra = rates(flow.field, jax.random.rademacher(key, x.shape, x.dtype))
        if not extra:
            return -found
        state = initial(x, len(extra))
        _, integrals = jode.odeint(integrate(flow.field, *extra), state, flow.span[::-1], solver=SOLVER)
        return -found - weight * sum(i[-1] for i in integrals)  # backwards in time integrals are negative

    return jnp.mean(jax.vmap(one)(x, jax.random.split(key, len(x))))


def train(kind, iterations):
    """The flow, and on the way (iteration, -log p of test points, evaluations by dopri5)."""
    weight, rates = KINDS[kind]
    arrays, static = eqx.partition(CNF(Field(2, 48, 2, key=jax.random.key(0)), Normal(2)), eqx.is_inexact_array)
    optimizer, test = optax.adam(optax.cosine_decay_schedule(1e-2, iterations)), points(jax.random.key(9), 500)

    def step(carry, key):
        arrays, state = carry
        a, b = jax.random.split(key)
        objective = lambda arrays: loss(eqx.combine(arrays, static), points(a, BATCH), b, weight, rates)
        updates, state = optimizer.update(jax.grad(objective)(arrays), state)
        return (optax.apply_updates(arrays, updates), state), None

    chunk = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    flow = lambda arrays: eqx.combine(arrays, static)
    value = jax.jit(lambda arrays: -jnp.mean(jax.vmap(lambda x: log_likelihood(flow(arrays), x, solver=TEST).log_prob)(test)))
    count = jax.jit(lambda arrays: jax.vmap(lambda x: jode.solve(flow(arrays).field, x, (1.0, 0.0), solver=TEST).stats.nfe)(test))
    carry, curve = (arrays, optimizer.init(arrays)), []
    bar = tqdm(range(iterations // CHUNK), desc=f"{kind:>15}")
    for k in bar:
        carry = chunk(carry, jax.random.split(jax.random.fold_in(jax.random.key(1), k), CHUNK))
        curve.append(((k + 1) * CHUNK, float(value(carry[0])), float(jnp.mean(count(carry[0])))))
        bar.set_postfix(loss=f"{curve[-1][1]:.3f}", nfe=f"{curve[-1][2]:.1f}")
    return flow(carry[0]), np.array(curve)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--iterations", type=int, default=1000)
    p.add_argument("--out", default="fewer_evaluations.png")
    args = p.parse_args()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, 5, figsize=(17, 3.6), layout="constrained")
    for kind, ax in zip(KINDS, axes[2:], strict=True):
        flow, curve = train(kind, args.iterations)
        for axis, column, label in ((axes[0], 2, "evaluations by dopri5 at 1e-5"), (axes[1], 1, "-log p of test points")):
            axis.plot(curve[:, 0], curve[:, column], color=COLORS[kind], label=kind)
            axis.set(title=label, xlabel="iteration")
        axes[1].set_ylim(top=3.0)
        z = jax.random.normal(jax.random.key(3), (60, 2))
        paths = jax.vmap(lambda z, f=flow.field: jode.odeint(f, z, jnp.linspace(0, 1, 60), solver=TEST))(z)
        for path in np.asarray(paths):
            ax.plot(*path.T, color=COLORS[kind], lw=0.7, alpha=0.7)
        ax.scatter(*paths[:, -1].T, s=8, color=COLORS[kind])
        ax.set_title(f"{kind}: paths\n{curve[-1, 2]:.1f} evaluations, -log p {curve[-1, 1]:.3f}")
        print(f"{kind}: {curve[-1, 2]:.1f} evaluations, -log p {curve[-1, 1]:.3f}")
    axes[0].legend(frameon=False)
    fig.savefig(args.out, dpi=140)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
