"""Ott et al. 2021, Table 1, Sphere2: what does step adaptation reach, at how many evaluations, and where is the critical step?

Networks of 3,207 parameters, 10,000 iterations of Adam (rate 1e-4, batches of 128): five with `StepAdaptation`, and one for each
fixed step h = 1 … 1/128, each tested under all finer solvers. python -m benchmarks sphere2
"""

from benchmarks.measure import report, save

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
from jode import data
from jode.models import planar
from jode.train import adapted
from jode.validity import StepAdaptation, critical_steps, first_step, swap

ITERATIONS, BATCH, SEEDS = 10_000, 128, 5
GRID = (1, 2, 4, 8, 16, 32, 64, 128)
OPTIMIZER = optax.adam(1e-4)
# An Euler step is one evaluation forward and one, differentiated, backward. Only so counted do the paper's figures fit together: its
# grid of 65 and 129 is 2 N + 1 for N = 32 and 64.
EVALUATIONS = 2


def main(quick=False):
    iterations = ITERATIONS // 20 if quick else ITERATIONS
    rows, paths = [], []
    for seed in range(1 if quick else SEEDS):
        start = time.perf_counter()
        w, test, steps = train(StepAdaptation(), None, seed, iterations)
        ms = 1e3 * (time.perf_counter() - start) / iterations
        table = verdict(w, test, int(steps[-1]))
        paths.append(steps)
        rows.append([seed, "StepAdaptation", *line(table.own[0], np.mean(steps), table.drops[0]), int(steps[-1]), f"{ms:.1f}"])
        print(rows[-1], flush=True)
    accuracy, forward, both = (np.array([float(r[i]) for r in rows]) for i in (2, 3, 4))
    spread = f"{accuracy.mean():.2f} ± {accuracy.std():.2f}"
    rows.append(["mean", "StepAdaptation", spread, f"{forward.mean():.1f}", f"{both.mean():.1f}", *["–"] * 4])
    rows.append(["mean", "Ott et al. 2021", "98.9 ± 0.6", "–", "100.5", *["–"] * 4])
    cross = grid(GRID[::3] if quick else GRID, iterations)
    print(f"\n{cross}\n")
    valid = {int(s.steps): bool(drop <= cross.threshold) for s, drop in zip(cross.train, cross.drops, strict=True)}
    if not quick:
        bad, good = critical_steps(lambda n: valid[n], most=max(valid)).bracket
        rows.append(
            [0, "fixed steps, critical bracket", "–", f"{bad}-{good}", f"{EVALUATIONS * bad}-{EVALUATIONS * good}", *["–"] * 4]
        )
        rows.append(["–", "Ott et al. 2021, critical bracket", "98.7 ± 1.0", "–", "65-129", *["–"] * 4])
    for s, own, drop in zip(cross.train, cross.own, cross.drops, strict=True):
        rows.append([0, f"fixed, {s.steps}", *line(own, s.steps, drop), s.steps, "–"])
    columns = ["seed", "solver", "test accuracy %", "NFE forward", "NFE forward and backward", "largest change %", "an ODE"]
    report(
        "sphere2",
        f"Sphere2, Euler, {iterations:,} iterations, float32",
        [*columns, "steps at the end", "ms an iteration"],
        rows,
        quick,
    )
    draw(paths, cross, quick)


def line(own, steps, drop):
    return f"{100 * own:.1f}", f"{steps:.1f}", f"{EVALUATIONS * steps:.1f}", f"{100 * drop:.1f}", "yes" if drop <= 0.1 else "no"


def grid(counts, iterations):
    """Models trained with fixed steps, each tested with every solver."""
    metrics = {}
    for n in counts:
        w, test, _ = train(StepAdaptation(every=iterations + 1), 1 / n, 0, iterations)
        metrics[jode.Fixed(jode.euler, n)] = partial(accuracy_of, w, *test)
    methods = {jode.euler: GRID, jode.midpoint: GRID, jode.rk4: GRID[2:6]}
    return swap(metrics, [jode.Fixed(method, n) for method, counts in methods.items() for n in counts])


def train(adapt, h, seed, iterations):
    """Weights, test data, and the step counts on the way; the whole training is one scan, traced once."""
    keys = jax.random.split(jax.random.key(seed), 3)
    (x, y), test = data.spheres(keys[0], 2000), data.spheres(keys[1], 1000)
    w = planar.init(keys[2])
    rng = np.random.default_rng(seed)
    per_epoch = 2000 // BATCH
    orders = [rng.permutation(2000)[: per_epoch * BATCH].reshape(per_epoch, BATCH) for _ in range(-(-iterations // per_epoch))]
    batches = jnp.asarray(np.concatenate(orders)[:iterations])
    if h is None:
        h = first_step(planar.vector_field, x[:BATCH], planar.prepared(w))
    (w, *_), (steps, *_) = run(adapt, (w, OPTIMIZER.init(w), adapt.init(h)), x, y, batches)
    return w, test, np.asarray(steps)


@partial(jax.jit, static_argnums=0)
def run(adapt, carry, x, y, batches):
    iteration = adapted(adapt, planar.logits, OPTIMIZER)
    return jax.lax.scan(lambda carry, batch: iteration(carry, (x[batch], y[batch])), carry, batches)


@jax.jit
def accuracy_of(w, x, y, solver):
    return jnp.mean(jnp.argmax(planar.logits(w, x, solver), 1) == y)


def verdict(w, test, n):
    """The model under its own solver and finer ones."""
    solvers = [
        jode.Fixed(jode.euler, n),
        *(jode.Fixed(jode.euler, k * n) for k in (2, 4)),
        jode.Fixed(jode.midpoint, n),
        jode.Fixed(jode.rk4, n),
    ]
    return swap(partial(accuracy_of, w, *test), solvers)


def draw(paths, cross, quick):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.6), layout="constrained", width_ratios=(1, 1.7))
    for seed, path in enumerate(paths):
        left.plot(np.arange(1, len(path) + 1), path, color=plt.get_cmap("viridis")(seed / 5), lw=1.2, label=f"seed {seed}")
    left.axhspan(32, 64, color="#8a8f98", alpha=0.2, lw=0, label="critical bracket of Ott et al., 32 to 64")
    left.set(title="Steps chosen while training", xlabel="iteration", ylabel="Euler steps", yscale="log")
    left.legend(frameon=False, fontsize=8)
    left.spines[["top", "right"]].set_visible(False)
    cross.plot(right)
    right.set_title("Test accuracy, by training and by test solver")
    save(figure, "sphere2", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
