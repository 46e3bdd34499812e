"""Chen et al. 2018, section 4.1: does a planar CNF of M hidden units match a density as well as a planar flow of K = M layers?

KL(q || p) in nats for M, K in {2, 8, 32} and three targets after Rezende & Mohamed 2015, their normalisation by a sum over a grid.
The CNF trains with Adam for 10,000 iterations, the NF with RMSprop for 500,000, as in the paper; rates fall to 0 as a cosine, from 2e-3
and from 1e-2, the better of four settings of RMSprop at K = 8. The times of the CNF's steps are others in each iteration, so that it
cannot learn the errors of one grid; it is tested with tolerances of 1e-5. python -m benchmarks density_matching
"""

from benchmarks.measure import report, save

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
from jode.models.density import CNF, Formula, Normal, PlanarField, PlanarMap, push

SIZES, BATCH, BOX = (2, 8, 32), 128, 12.0
ITERATIONS = {"CNF": 10_000, "NF": 500_000}
TRAIN, TEST = jode.Fixed(jode.rk4, 16), jode.Adaptive(jode.dopri5, 1e-5, 1e-5)
BASE = Normal(2)


def bump(x, width):
    return -0.5 * (x / width) ** 2


def ring(z):
    """Two arcs of a ring of radius 2."""
    left, right = bump(z[0] + 2, 0.6), bump(z[0] - 2, 0.6)
    return bump(jnp.sqrt(jnp.sum(z * z) + 1e-12) - 2, 0.4) + jnp.logaddexp(left, right)


def wave(z):
    """A sine wave; a wide Gaussian in z1 makes it a density."""
    return bump(z[1] - jnp.sin(jnp.pi * z[0] / 2), 0.4) + bump(z[0], 2.0)


def fork(z):
    """A sine wave that splits in two."""
    w1, w2 = jnp.sin(jnp.pi * z[0] / 2), 3 * jnp.exp(bump(z[0] - 1, 0.6))
    return jnp.logaddexp(bump(z[1] - w1, 0.35), bump(z[1] - w1 + w2, 0.35)) + bump(z[0], 2.0)


TARGETS = {"ring": ring, "wave": wave, "fork": fork}
OPTIMIZERS = {
    "CNF": lambda n: optax.adam(optax.cosine_decay_schedule(2e-3, n)),
    "NF": lambda n: optax.rmsprop(optax.cosine_decay_schedule(1e-2, n)),
}


def model(kind, size, key):
    return CNF(PlanarField(2, size, key=key), BASE) if kind == "CNF" else PlanarMap(2, size, key=key)


class Warped(eqx.Module):
    """The field in a time s with t = s + a s (1 - s): the same flow on another grid, for -1 < a < 1."""

    field: PlanarField
    a: jax.Array

    def __call__(self, s, x, args=None):
        return (1 + self.a * (1 - 2 * s)) * self.field(s + self.a * s * (1 - s), x)

    def divergence(self, s, x, args=None):
        return (1 + self.a * (1 - 2 * s)) * self.field.divergence(s + self.a * s * (1 - s), x)


def pushed(model, z, solver, warp=None):
    """(x, log q(x))."""
    if isinstance(model, CNF):
        model = model if warp is None else CNF(Warped(model.field, warp), model.base)
        found = push(model, z, trace=Formula(), solver=solver)
        return found.x, found.log_prob
    x, log_det = model(z)
    return x, BASE.log_prob(z) - log_det


def log_normaliser(target):
    n = 1000
    axis = (jnp.arange(n) + 0.5) / n * 2 * BOX - BOX
    z = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    return jax.nn.logsumexp(jax.vmap(target)(z)) + 2 * jnp.log(2 * BOX / n)


def divergence(model, target, z, solver, warp=None):
    """log q - log p̃ of each row; their mean plus log Z is KL(q || p)."""

    def one(z):
        x, log_q = pushed(model, z, solver, warp)
        return log_q - target(x)

    return jax.vmap(one)(z)


def train(kind, size, target, iterations, key):
    arrays, static = eqx.partition(model(kind, size, key), eqx.is_inexact_array)
    optimizer = OPTIMIZERS[kind](iterations)

    def step(carry, key):
        arrays, state = carry
        z = jax.random.normal(key, (BATCH, 2))
        warp = jax.random.uniform(jax.random.fold_in(key, 1), minval=-0.8, maxval=0.8)
        gradient = jax.grad(lambda a: jnp.mean(divergence(eqx.combine(a, static), target, z, TRAIN, warp)))(arrays)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(arrays, updates), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    carry = run((arrays, optimizer.init(arrays)), jax.random.split(key, iterations))
    return eqx.combine(carry[0], static)


def main(quick=False):
    rows, table, targets = [], {}, TARGETS if not quick else {"ring": ring}
    for size in SIZES if not quick else SIZES[:2]:
        for name, target in targets.items():
            log_z = log_normaliser(target)
            for kind in ("CNF", "NF"):
                start = time.perf_counter()
                iterations = ITERATIONS[kind] // (50 if quick else 1)
                trained = train(kind, size, target, iterations, jax.random.key(size))
                z = jax.random.normal(jax.random.key(1), (2_000 if quick else 20_000, 2))
                gaps = np.asarray(eqx.filter_jit(divergence)(trained, target, z, TEST) + log_z)
                table[name, size, kind] = gaps.mean()
                error = gaps.std() / len(gaps) ** 0.5
                seconds = f"{time.perf_counter() - start:.0f}"
                rows.append([name, size, kind, f"{gaps.mean():.4f} ± {error:.4f}", iterations, seconds])
            won = [v <= table[n, s, "NF"] for (n, s, kind), v in table.items() if kind == "CNF"]
            columns = ["target", "M or K", "model", "KL(q || p), nats", "iterations", "seconds"]
            title = f"Density matching, float32: the CNF is at or below the NF in {sum(won)} of {len(won)} cells"
            report("density_matching", title, columns, rows, quick)
            draw(table, quick)


def draw(table, quick):
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for name, _, _ in table))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        for kind, color in (("CNF", "#2d6ca2"), ("NF", "#c6553b")):
            points = [(s, v) for (n, s, k), v in table.items() if n == name and k == kind]
            ax.plot(*zip(*points, strict=True), "-o", color=color, label=kind)
        ax.set(title=name, xlabel="hidden units M, or layers K", ylabel="KL(q || p), nats", xscale="log", yscale="log")
        ax.set_xticks(SIZES, map(str, SIZES))
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    save(figure, "density_matching", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
