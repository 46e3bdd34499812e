"""Is it an ODE? A model trained with coarse steps, and one trained with steps that adapt (Ott, Katiyar, Hennig & Tiemann 2021).

    python examples/is_it_an_ode.py        # two minutes

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
from jode.models import planar
from jode.validity import StepAdaptation, crossings, first_step, swap

OPTIMIZER, BATCH, COLORS = optax.adam(1e-4), 128, ("#2d6ca2", "#c6553b")


@jax.jit
def accuracy(w, x, y, solver):
    return jnp.mean(jnp.argmax(planar.logits(w, x, solver), 1) == y)


@partial(jax.jit, static_argnums=(0, 4))
def training(adapt, h, x, y, iterations):
    """All of it as one scan, traced once, whatever becomes of the step: weights, and the steps on the way."""
    w = planar.init(jax.random.key(0))
    chosen = jax.random.randint(jax.random.key(1), (iterations, BATCH), 0, len(x))
    carry = (w, OPTIMIZER.init(w), adapt.init(h))
    (w, *_), (steps, *_) = jax.lax.scan(train.adapted(adapt, planar.logits, OPTIMIZER), carry, (x[chosen], y[chosen]))
    return w, steps


def panel(ax, w, x, y, solver, title):
    """Where the flow takes points, by class, and the line that the last layer draws."""
    blocks = {k: v for k, v in planar.prepared(w).items() if k != "head"}
    n = solver.steps
    march = jax.vmap(
        lambda p: jode.odeint(planar.vector_field, p, jnp.linspace(0, 1, n + 1), blocks, solver=jode.Fixed(solver.method, 1))
    )
    paths = march(x)
    for path, label in zip(np.asarray(paths[:40]), y[:40], strict=True):
        ax.plot(*path.T, "-o" if solver.steps < 10 else "-", color=COLORS[label], lw=0.7, ms=3, alpha=0.6)
    ax.scatter(*paths[:, -1].T, c=np.array(COLORS)[y], s=6, zorder=3)
    ax.set(xscale="symlog", yscale="symlog")  # the flow stretches the plane a hundredfold
    crossed = int(jnp.sum(crossings(paths[:40])) // 2)
    ax.set_title(f"{title}\n{100 * accuracy(w, x, y, solver):.0f} % right, {crossed} of 780 pairs of paths cross")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--iterations", type=int, default=10_000)
    p.add_argument("--out", default="is_it_an_ode.png")
    args = p.parse_args()
    x, y = data.spheres(jax.random.key(2), 2000)
    test = data.spheres(jax.random.key(3), 1000)
    h = first_step(planar.vector_field, x[:BATCH], planar.prepared(planar.init(jax.random.key(0))))
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(2, 3, figsize=(13, 8), constrained_layout=True)
    runs = {"four steps": (StepAdaptation(every=args.iterations + 1), 1 / 4), "adapted": (StepAdaptation(), h)}
    for row, (name, (adapt, h)) in zip(axes, runs.items(), strict=True):
        w, steps = training(adapt, h, x, y, args.iterations)
        n = int(steps[-1])
        tests = [jode.Fixed(jode.euler, n), jode.Fixed(jode.euler, 2 * n), jode.Fixed(jode.midpoint, n), jode.Fixed(jode.rk4, n)]
        table = swap(partial(accuracy, w, *test), tests)
        print(f"{name}:\n\n{table}\n")
        panel(row[0], w, *test, tests[0], f"Trained with {n} Euler steps: under them,")
        panel(row[1], w, *test, jode.Fixed(jode.rk4, max(n, 32)), "and under RK4:")
        row[2].plot(steps, color="#22303c", lw=1.2)
        row[2].set(title="Euler steps while training", xlabel="iteration", ylim=(0, None))
    fig.savefig(args.out, dpi=160)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
