"""Ott et al. 2021, Table 1, Sphere2: what does step adaptation reach, at how many evaluations, and where is the critical step?

Networks of 3,207 parameters, 10,000 iterations of Adam (rate 1e-4, batches of 128): five with `StepAdaptation`, and one for each fixed step
h = 1 … 1/128, each tested under all finer solvers. python -m benchmarks sphere2
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
from jode.validity import StepAdaptation, StepState, critical_steps, first_step, swap

ITERATIONS, BATCH, SEEDS = 10_000, 128, 5
GRID = (1, 2, 4, 8, 16, 32, 64, 128)
OPTIMIZER = optax.adam(1e-4)


class Frozen(StepAdaptation):
    """A step that stays: the same training loop, without adaptation."""

    def update(self, state, accuracy, metric):
        return StepState(state.h, state.iteration + 1), None


def main(quick=False):
    iterations = ITERATIONS // 20 if quick else ITERATIONS
    rows, paths = [], []
    for seed in range(1 if quick else SEEDS):
        start = time.perf_counter()
        w, test, steps, h0 = train(StepAdaptation(), None, seed, iterations)
        seconds = time.perf_counter() - start
        table = verdict(w, test, int(steps[-1]))
        paths.append(np.asarray(steps))
        rows.append(
            [seed, "StepAdaptation", f"{100 * table.own[0]:.1f}", f"{np.mean(steps):.1f}", steps[-1], f"{h0:.3f}"]
            + ["yes" if table.valid else "no", f"{100 * table.drops[0]:.1f}", f"{1e3 * seconds / iterations:.1f}"]
        )
        print(rows[-1], flush=True)
    accuracy, nfe = (np.array([float(r[i]) for r in rows]) for i in (2, 3))
    spread = f"{accuracy.mean():.2f} ± {accuracy.std():.2f}"
    rows.append(["mean", "StepAdaptation", spread, f"{nfe.mean():.1f}", "–", "–", "–", "–", "–"])
    rows.append(["mean", "Ott et al. 2021", "98.9 ± 0.6", "100.5", "–", "–", "–", "–", "–"])
    metrics = {}
    for n in GRID[::3] if quick else GRID:
        w, test, *_ = train(Frozen(), 1 / n, 0, iterations)
        metrics[jode.Fixed(jode.euler, n)] = partial(accuracy_of, w, *test)
    tests = [jode.Fixed(m, n) for m, counts in ((jode.euler, GRID), (jode.midpoint, GRID), (jode.rk4, GRID[2:6])) for n in counts]
    cross = swap(metrics, tests)
    print(f"\n{cross}\n")
    valid = {int(s.steps): bool(drop <= cross.threshold) for s, drop in zip(cross.train, cross.drops, strict=True)}
    bracket = critical_steps(lambda n: valid[n], most=max(valid)).bracket if not quick else "–"
    rows.append(["0", "fixed steps, critical bracket", f"{bracket}", "–", "–", "–", "–", "–", "–"])
    rows.append(["–", "Ott et al. 2021, critical bracket", "98.7 ± 1.0", "65-129", "–", "–", "–", "–", "–"])
    for s, own, drop in zip(cross.train, cross.own, cross.drops, strict=True):
        rows.append([0, f"fixed, {s.steps}", f"{100 * own:.1f}", s.steps, s.steps, "–", "yes" if drop <= 0.1 else "no", f"{100 * drop:.1f}", "–"])
    columns = ["seed", "solver", "test accuracy %", "NFE an iteration", "steps at the end", "first h", "an ODE", "largest change %", "ms an iteration"]
    report("sphere2", f"Sphere2, Euler, {iterations:,} iterations, float32", columns, rows, quick)
    draw(paths, cross, quick)


def train(adapt, h, seed, iterations):
    """Weights, test data, the step counts on the way, and the first step; the whole training is one scan, traced once."""
    keys = jax.random.split(jax.random.key(seed), 3)
    (x, y), test = data.spheres(keys[0], 2000), data.spheres(keys[1], 1000)
    w = planar.init(keys[2])
    rng = np.random.default_rng(seed)
    per_epoch = 2000 // BATCH
    orders = [rng.permutation(2000)[: per_epoch * BATCH].reshape(per_epoch, BATCH) for _ in range(-(-iterations // per_epoch))]
    batches = jnp.asarray(np.concatenate(orders)[:iterations])
    if h is None:
        h = first_step(planar.vector_field, x[:BATCH], {k: v for k, v in planar.prepared(w).items() if k != "head"})
    (w, *_), steps = run(adapt, (w, OPTIMIZER.init(w), adapt.init(h)), x, y, batches)
    return w, test, np.asarray(steps), float(h)


@partial(jax.jit, static_argnums=0)
def run(adapt, carry, x, y, batches):
    def iteration(carry, batch):
        w, state, steps = carry
        solver = adapt.solver(steps)

        def loss(w):
            scores = planar.logits(w, x[batch], solver, jode.Backprop(None))
            right = jnp.mean(jnp.argmax(scores, 1) == y[batch])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y[batch])), right

        g, right = jax.grad(loss, has_aux=True)(w)
        steps, _ = adapt.update(steps, right, lambda solver: accuracy_of(w, x[batch], y[batch], solver))
        updates, state = OPTIMIZER.update(g, state)
        return (optax.apply_updates(w, updates), state, steps), solver.steps

    return jax.lax.scan(iteration, carry, batches)


@jax.jit
def accuracy_of(w, x, y, solver):
    return jnp.mean(jnp.argmax(planar.logits(w, x, solver), 1) == y)


def verdict(w, test, n):
    """The model under its own solver and finer ones."""
    solvers = [jode.Fixed(jode.euler, n), *(jode.Fixed(jode.euler, k * n) for k in (2, 4)), jode.Fixed(jode.midpoint, n), jode.Fixed(jode.rk4, n)]
    return swap(partial(accuracy_of, w, *test), solvers)


def draw(paths, cross, quick):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.6), layout="constrained", width_ratios=(1, 1.7))
    for seed, path in enumerate(paths):
        left.plot(np.arange(1, len(path) + 1), path, color=plt.get_cmap("viridis")(seed / 5), lw=1.2, label=f"seed {seed}")
    left.axhspan(65, 129, color="#8a8f98", alpha=0.2, lw=0, label="critical bracket of Ott et al.")
    left.set(title="Steps chosen while training", xlabel="iteration", ylabel="Euler steps", yscale="log")
    left.legend(frameon=False, fontsize=8)
    left.spines[["top", "right"]].set_visible(False)
    cross.plot(right)
    right.set_title("Test accuracy, by training and by test solver")
    save(figure, "sphere2", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
