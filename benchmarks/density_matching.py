"""Chen et al. 2018, section 4.1: does a planar CNF of M hidden units match a density as well as a planar flow of K = M layers?

KL(q || p) in nats for M, K in {2, 8, 32} and three targets after Rezende & Mohamed 2015, their normalisation by a sum over a grid.
The CNF trains with Adam for 10,000 iterations, the NF with RMSprop for 500,000, as in the paper. python -m benchmarks density_matching
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

SIZES, BATCH, BOX = (2, 8, 32), 128, 6.0
ITERATIONS = {"CNF": 10_000, "NF": 500_000}
TRAIN, TEST = jode.Fixed(jode.rk4, 8), jode.Adaptive(jode.dopri5, 1e-5, 1e-5)
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
OPTIMIZERS = {"CNF": optax.adam(1e-3), "NF": optax.rmsprop(1e-4, momentum=0.9)}


def model(kind, size, key):
    return CNF(PlanarField(2, size, key=key), BASE) if kind == "CNF" else PlanarMap(2, size, key=key)


def pushed(model, z, solver):
    """(x, log q(x))."""
    if isinstance(model, CNF):
        found = push(model, z, trace=Formula(), solver=solver)
        return found.x, found.log_prob
    x, log_det = model(z)
    return x, BASE.log_prob(z) - log_det


def log_normaliser(target):
    n = 400
    axis = (jnp.arange(n) + 0.5) / n * 2 * BOX - BOX
    z = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    return jax.nn.logsumexp(jax.vmap(target)(z)) + 2 * jnp.log(2 * BOX / n)


def divergence(model, target, z, solver):
    """log q - log p̃ of each row; their mean plus log Z is KL(q || p)."""

    def one(z):
        x, log_q = pushed(model, z, solver)
        return log_q - target(x)

    return jax.vmap(one)(z)


def train(kind, size, target, iterations, key):
    arrays, static = eqx.partition(model(kind, size, key), eqx.is_inexact_array)
    optimizer = OPTIMIZERS[kind]

    def step(carry, key):
        arrays, state = carry
        z = jax.random.normal(key, (BATCH, 2))
        gradient = jax.grad(lambda a: jnp.mean(divergence(eqx.combine(a, static), target, z, TRAIN)))(arrays)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(arrays, updates), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    carry = run((arrays, optimizer.init(arrays)), jax.random.split(key, iterations))
    return eqx.combine(carry[0], static)


def main(quick=False):
    rows, won, table = [], [], {}
    for name, target in TARGETS.items() if not quick else [("ring", ring)]:
        log_z = log_normaliser(target)
        for size in SIZES if not quick else SIZES[:2]:
            for kind in ("CNF", "NF"):
                start = time.perf_counter()
                iterations = ITERATIONS[kind] // (50 if quick else 1)
                trained = train(kind, size, target, iterations, jax.random.key(size))
                z = jax.random.normal(jax.random.key(1), (2_000 if quick else 20_000, 2))
                gaps = np.asarray(jax.jit(lambda z, m=trained, t=target: divergence(m, t, z, TEST))(z) + log_z)
                table[name, size, kind] = gaps.mean()
                error = gaps.std() / len(gaps) ** 0.5
                rows.append(
                    [name, size, kind, f"{gaps.mean():.3f} ± {error:.3f}", iterations, f"{time.perf_counter() - start:.0f}"]
                )
                print(rows[-1], flush=True)
            won.append(table[name, size, "CNF"] <= table[name, size, "NF"])
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
        ax.set(title=name, xlabel="hidden units M, or layers K", ylabel="KL(q || p), nats", xscale="log")
        ax.set_xticks(SIZES, map(str, SIZES))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    save(figure, "density_matching", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
