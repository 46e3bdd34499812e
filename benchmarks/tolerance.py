"""Tolerance adaptation on Sphere2: which tolerances does training choose, and where is the critical one?

Adaptive Heun, the batch one state (one step for all points), 10,000 iterations; and models trained with fixed tolerances, swapped to
tighter ones. python -m benchmarks tolerance
"""

from benchmarks.measure import report, save

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
from jode import data
from jode.models.planar import Planar, vector_field
from jode.validity import ToleranceAdaptation, swap

ITERATIONS, BATCH, MAX_STEPS = 10_000, 128, 512
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
OPTIMIZER = optax.adam(1e-4)


def main(quick=False):
    iterations = ITERATIONS // 20 if quick else ITERATIONS
    w, test, (tol, nfe) = train(
        ToleranceAdaptation(max_steps=MAX_STEPS), 1e-3, iterations
    )  # not from 1e-6: it grows by a tenth at a time
    own = float(accuracy_of(w, *test, jode.Adaptive(jode.heun, tol[-1], tol[-1]))[0])
    late = slice(iterations // 2, None)
    spread = f"{np.quantile(tol[late], 0.05):.1e} to {np.quantile(tol[late], 0.95):.1e}"
    rows = [["Sphere2", "ToleranceAdaptation", spread, f"{100 * own:.1f}", f"{np.mean(nfe):.1f}", "–", "–"]]
    metrics, costs = {}, {}
    for t in TOLERANCES:
        w, test, (_, cost) = train(ToleranceAdaptation(every=iterations + 1, max_steps=MAX_STEPS), t, iterations)
        solver = jode.Adaptive(jode.heun, t, t)
        metrics[solver], costs[t] = partial(lambda w, test, s: right(w, *test, s)[0], w, test), np.mean(cost)
    finer = [jode.Adaptive(m, t, t) for m, ts in ((jode.heun, TOLERANCES), (jode.dopri5, (1e-3, 1e-5))) for t in ts]
    cross = swap(metrics, finer)
    print(f"\n{cross}\n")
    for t, a, drop, says in zip(TOLERANCES, cross.own, cross.drops, cross.verdicts, strict=True):
        rows.append(["Sphere2", f"fixed, {t:.0e}", f"{t:.0e}", f"{100 * a:.1f}", f"{costs[t]:.1f}", f"{100 * drop:.1f}", says])
    columns = ["problem", "solver", "tolerance", "test accuracy %", "NFE forward", "largest change %", "verdict at two points"]
    report("tolerance", f"Sphere2, adaptive Heun, {iterations:,} iterations, float32", columns, rows, quick)
    draw(tol, nfe, {t: says == "an ODE" for t, says in zip(TOLERANCES, cross.verdicts, strict=True)}, quick)


def logits(w, x, solver):
    """Class scores and evaluations; the batch is one state, so that all points take the same steps."""
    field = lambda t, x, w: jax.vmap(lambda x: vector_field(t, x, w))(x)
    sol = jode.solve(field, x, (0.0, 1.0), w.field.prepared(), solver=solver, adjoint=jode.Backprop(None))
    return sol.ys[-1] @ w.weight + w.bias, sol.stats.nfe


@jax.jit
def right(w, x, y, solver):
    """Whether each point is classified rightly, and the evaluations of the batch."""
    scores, nfe = logits(w, x, solver)
    return jnp.all(jnp.isfinite(scores), 1) & (jnp.argmax(scores, 1) == y), nfe.astype(jnp.float32)


def accuracy_of(w, x, y, solver):
    found, nfe = right(w, x, y, solver)
    return jnp.mean(found), nfe


def train(adapt, tol, iterations):
    keys = jax.random.split(jax.random.key(0), 4)
    data_train, test = data.spheres(keys[0], 2000), data.spheres(keys[1], 1000)
    w = Planar(key=keys[2])
    batches = jax.random.randint(keys[3], (iterations, BATCH), 0, 2000)
    (w, *_), path = run(adapt, (w, OPTIMIZER.init(w), adapt.init(tol)), *data_train, batches)
    return w, test, [np.asarray(x) for x in path]


@partial(jax.jit, static_argnums=0)
def run(adapt, carry, x, y, batches):
    def iteration(carry, batch):
        w, state, control = carry
        solver = adapt.solver(control)

        def loss(w):
            scores, nfe = logits(w, x[batch], solver)
            right = jnp.mean(jnp.argmax(scores, 1) == y[batch])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y[batch])), (right, nfe)

        g, (right, nfe) = jax.grad(loss, has_aux=True)(w)
        control, _ = adapt.update(control, right, nfe, lambda solver: accuracy_of(w, x[batch], y[batch], solver))
        updates, state = OPTIMIZER.update(g, state)
        return (optax.apply_updates(w, updates), state, control), (solver.rtol, nfe)

    return jax.lax.scan(iteration, carry, batches)


def draw(tol, nfe, valid, quick):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = np.arange(1, len(tol) + 1)
    left.plot(steps, tol, color="#c6553b", lw=1.3)
    bad, good = [t for t, v in valid.items() if not v], [t for t, v in valid.items() if v]
    if bad and good:
        left.axhspan(max(good), min(bad), color="#8a8f98", alpha=0.25, lw=0)
        left.annotate(
            "critical tolerance, by the grid",
            (steps[-1], (max(good) * min(bad)) ** 0.5),
            (-4, 0),
            textcoords="offset points",
            ha="right",
        )
    left.set(title="Tolerance chosen while training", xlabel="iteration", yscale="log")
    right.plot(steps, nfe, color="#2d6ca2", lw=0.5)
    right.set(title="Evaluations forward", xlabel="iteration", ylim=(0, None))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, "tolerance", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
