"""Ott et al. 2021, Table 1, Sphere2: what does step adaptation reach, at how many evaluations, and where is the critical step?

Networks of 3,207 parameters, 10,000 iterations of Adam (rate 1e-4, batches of 128): five with the paper's rule, five with the rule
that has an end, and one for each fixed step h = 1 … 1/128, each tested under finer solvers on 4,000 points, with intervals, and with
the error of each solver measured on 500 of them. python -m benchmarks sphere2
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
from jode.models.planar import Planar, vector_field
from jode.train import adapted
from jode.validity import StepAdaptation, critical_steps, first_step, swap

ITERATIONS, BATCH, SEEDS = 10_000, 128, 5
GRID = (1, 2, 4, 8, 16, 32, 64, 128)
OPTIMIZER = optax.adam(1e-4)
# An Euler step is one evaluation forward and one, differentiated, backward. Only so counted do the paper's figures fit together: its
# grid of 65 and 129 is 2 N + 1 for N = 32 and 64.
EVALUATIONS = 2


REFERENCE = jode.Fixed(jode.rk4, 1024)


def main(quick=False):
    iterations = ITERATIONS // 20 if quick else ITERATIONS
    rules = {"the paper's rule": StepAdaptation(), "with an end": StepAdaptation(iterations=iterations)}
    rows, paths = [], []
    for rule, adapt in rules.items():
        found = []
        for seed in range(1 if quick else SEEDS):
            start = time.perf_counter()
            w, test, steps = train(adapt, None, seed, iterations)
            ms = 1e3 * (time.perf_counter() - start) / iterations
            table = verdict(w, test, int(steps[-1]))
            found.append((table.own[0], np.mean(steps)))
            if adapt.iterations:
                paths.append(steps)
                print(f"\nseed {seed}, {rule}\n\n{table}\n", flush=True)
            rows.append([seed, rule, *line(table, 0, np.mean(steps)), int(steps[-1]), f"{ms:.1f}"])
            print(rows[-1], flush=True)
        accuracy, forward = 100 * np.array([f[0] for f in found]), np.array([f[1] for f in found])
        means = [f"{accuracy.mean():.2f} ± {accuracy.std():.2f}", f"{forward.mean():.1f}", f"{EVALUATIONS * forward.mean():.1f}"]
        rows.append(["mean", rule, *means, *["–"] * 5])
    rows.append(["mean", "Ott et al. 2021", "98.9 ± 0.6", "–", "100.5", *["–"] * 5])
    cross = grid(GRID[::3] if quick else GRID, iterations)
    print(f"\n{cross}\n")
    if not quick:
        bad, good = critical_steps(lambda n: cross.drops[GRID.index(n)] <= 0.1, most=max(GRID)).bracket  # the paper's ten points
        both = f"{EVALUATIONS * bad}-{EVALUATIONS * good}"
        rows.append([0, "fixed steps, critical bracket at ten points", "–", f"{bad}-{good}", both, *["–"] * 5])
        rows.append(["–", "Ott et al. 2021, critical bracket", "98.7 ± 1.0", "–", "65-129", *["–"] * 5])
    for i, s in enumerate(cross.train):
        rows.append([0, f"fixed, {s.steps}", *line(cross, i, s.steps), s.steps, "–"])
    columns = ["seed", "solver", "test accuracy %", "NFE forward", "NFE forward and backward", "own error"]
    columns += ["largest change, points", "verdict at two points", "steps at the end", "ms per iteration"]
    report("sphere2", f"Sphere2, Euler, {iterations:,} iterations, float32", columns, rows, quick)
    draw(paths, cross, quick)


def line(table, i, steps):
    """Accuracy, evaluations, the training solver's measured error, the largest change with its interval, and the verdict."""
    j = int(np.argmax(np.where(table.counts[i], np.abs(table.changes[i]), -1)))
    own = [k for k, s in enumerate(table.test) if s == table.train[i]]
    error = f"{table.errors[i, own[0]]:.1e}" if own else "–"
    change = f"{100 * table.changes[i, j]:+.1f} [{100 * table.low[i, j]:+.1f}, {100 * table.high[i, j]:+.1f}]"
    costs = [f"{100 * table.own[i]:.1f}", f"{steps:.1f}", f"{EVALUATIONS * steps:.1f}"]
    return [*costs, error, change, table.verdicts[i]]


def grid(counts, iterations):
    """Models trained with fixed steps, each tested with every solver."""
    metrics, outputs = {}, {}
    for n in counts:
        w, test, _ = train(StepAdaptation(every=iterations + 1), 1 / n, 0, iterations)
        solver = jode.Fixed(jode.euler, n)
        metrics[solver], outputs[solver] = partial(right, w, *test), partial(w.ends, test[0][:500])
    methods = {jode.euler: GRID, jode.midpoint: GRID, jode.rk4: GRID[2:6]}
    solvers = [jode.Fixed(method, n) for method, counts in methods.items() for n in counts]
    return swap(metrics, solvers, outputs=outputs, reference=REFERENCE)


def train(adapt, h, seed, iterations):
    """Weights, test data, and the step counts on the way; the whole training is one scan, traced once."""
    keys = jax.random.split(jax.random.key(seed), 3)
    (x, y), test = data.spheres(keys[0], 2000), data.spheres(keys[1], 4000)
    w = Planar(key=keys[2])
    rng = np.random.default_rng(seed)
    per_epoch = 2000 // BATCH
    orders = [rng.permutation(2000)[: per_epoch * BATCH].reshape(per_epoch, BATCH) for _ in range(-(-iterations // per_epoch))]
    batches = jnp.asarray(np.concatenate(orders)[:iterations])
    if h is None:
        h = first_step(vector_field, x[:BATCH], w.field.prepared())
    (w, *_), (steps, *_) = run(adapt, (w, OPTIMIZER.init(w), adapt.init(h)), x, y, batches)
    return w, test, np.asarray(steps)


@partial(jax.jit, static_argnums=0)
def run(adapt, carry, x, y, batches):
    iteration = adapted(adapt, Planar.logits, OPTIMIZER)
    return jax.lax.scan(lambda carry, batch: iteration(carry, (x[batch], y[batch])), carry, batches)


@jax.jit
def right(w, x, y, solver):
    return jnp.argmax(w.logits(x, solver), 1) == y


def verdict(w, test, n):
    """The model under its own solver and finer ones."""
    tests = [(jode.euler, n), (jode.euler, 2 * n), (jode.euler, 4 * n), (jode.euler, 8 * n), (jode.midpoint, n), (jode.rk4, n)]
    solvers = [jode.Fixed(method, steps) for method, steps in tests]
    outputs = partial(w.ends, test[0][:500])
    return swap(partial(right, w, *test), solvers, outputs=outputs, reference=REFERENCE)


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
