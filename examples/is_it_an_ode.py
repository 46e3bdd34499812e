"""Is it an ODE? A model trained with coarse steps, and one trained with steps that adapt (Ott, Katiyar, Hennig & Tiemann 2021).

    python examples/is_it_an_ode.py        # two minutes on two CPU cores

Points on concentric circles are classified by a flow of the plane and one linear layer. A flow cannot separate them without
stretching them far; four Euler steps can, by jumping. Swapping the solver tells the two apart. Saves is_it_an_ode.png.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jode
from jode import data, train
from jode.models.planar import Planar, vector_field
from jode.validity import StepAdaptation, crossings, first_step, swap

OPTIMIZER, BATCH, COLORS = optax.adam(1e-4), 128, ("#2d6ca2", "#c6553b")


@jax.jit
def right(w, x, y, solver):
    return jnp.argmax(w.logits(x, solver), 1) == y


@partial(jax.jit, static_argnums=(0, 4))
def training(adapt, h, x, y, iterations):
    """All of it as one scan, traced once, whatever becomes of the step: weights, and the steps on the way."""
    w = Planar(key=jax.random.key(0))
    chosen = jax.random.randint(jax.random.key(1), (iterations, BATCH), 0, len(x))
    carry = (w, OPTIMIZER.init(w), adapt.init(h))
    (w, *_), (steps, *_) = jax.lax.scan(train.adapted(adapt, Planar.logits, OPTIMIZER), carry, (x[chosen], y[chosen]))
    return w, steps


def panel(ax, w, x, y, solver, title):
    """Where the flow takes the first thousand points, by class; the accuracy is that of all."""
    accuracy, n = 100 * np.mean(right(w, x, y, solver)), solver.steps
    x, y = x[:1000], y[:1000]
    ts, blocks = jnp.linspace(0, 1, n + 1), w.field.prepared()
    march = jax.vmap(lambda p: jode.odeint(vector_field, p, ts, blocks, solver=jode.Fixed(solver.method, 1)))
    paths = march(x)
    for path, label in zip(np.asarray(paths[:40]), y[:40], strict=True):
        ax.plot(*path.T, "-o" if n < 10 else "-", color=COLORS[label], lw=0.7, ms=3, alpha=0.6)
    for label, ring in enumerate(("inner and outer circle", "middle circle")):
        ax.scatter(*paths[y == label, -1].T, color=COLORS[label], s=6, zorder=3, label=f"{ring}, at the end")
    ax.set(xscale="symlog", yscale="symlog", xlabel="$x_1$", ylabel="$x_2$")  # the flow stretches the plane a hundredfold
    crossed = int(jnp.sum(crossings(paths[:40])) // 2)
    ax.set_title(f"{title}\n{accuracy:.1f} % right, {crossed} of 780 pairs of paths cross")


def changes(ax, table, title):
    """The change of accuracy under each finer solver, with its interval."""
    rows = [j for j in range(len(table.test)) if table.counts[0, j]]
    mean, low, high = (100 * x[0, rows] for x in (table.changes, table.low, table.high))
    ax.axvspan(
        -100 * table.tolerance[0], 100 * table.tolerance[0], color="#8a8f98", alpha=0.25, lw=0, label="no change: two points"
    )
    ax.errorbar(mean, range(len(rows)), xerr=(mean - low, high - mean), fmt="o", color="#22303c", capsize=4, label="95 % interval")
    ax.set_yticks(range(len(rows)), [f"{repr(table.test[j].method)[5:]} {table.test[j].steps}" for j in rows])
    ax.set(
        title=title, xlabel="change of accuracy, points", ylabel="under this solver", xlim=(-60, 5), ylim=(len(rows) - 0.5, -0.5)
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--iterations", type=int, default=10_000)
    p.add_argument("--out", default="is_it_an_ode.png")
    args = p.parse_args()
    x, y = data.spheres(jax.random.key(2), 2000)
    test = data.spheres(jax.random.key(3), 4000)
    first = first_step(vector_field, x[:BATCH], Planar(key=jax.random.key(0)).field.prepared())
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(2, 3, figsize=(14, 8), constrained_layout=True)
    never, ending = StepAdaptation(every=args.iterations + 1), StepAdaptation(iterations=args.iterations)
    for row, (name, adapt, h) in zip(axes, [("four steps", never, 1 / 4), ("adapted", ending, first)], strict=True):
        w, steps = training(adapt, h, x, y, args.iterations)
        n = int(steps[-1])
        tests = [(jode.euler, n), (jode.euler, 2 * n), (jode.euler, 8 * n), (jode.midpoint, n), (jode.rk4, n)]
        table = swap(
            partial(right, w, *test),
            [jode.Fixed(method, k) for method, k in tests],
            outputs=partial(w.ends, test[0][:500]),
            reference=jode.Fixed(jode.rk4, 1024),
            better="higher",
        )
        print(f"{name}:\n\n{table}\n")
        panel(row[0], w, *test, table.train[0], f"Trained with {n} Euler steps: under them,")
        panel(row[1], w, *test, jode.Fixed(jode.rk4, max(n, 32)), f"and under RK4 with {max(n, 32)}:")
        changes(row[2], table, f"Verdict: {table.verdicts[0]}")
    entries = [ax.get_legend_handles_labels() for ax in (axes[0, 0], axes[0, 2])]
    fig.legend(*(a + b for a, b in zip(*entries, strict=True)), loc="outside lower center", ncols=4, frameon=False)
    fig.savefig(args.out, dpi=160)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
