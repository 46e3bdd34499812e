"""How many evaluations do the regularisers of RNODE, TayNODE, STEER and ERNODE save, and at what loss?

A neural ODE on the digits and a continuous normalizing flow of two moons, each trained plainly and with each regulariser at several
weights. Evaluations are dopri5's at 1e-5, of the field alone, on test data. Of the runs whose test loss is at most 2 % above the plain one's
the fewest evaluations count; the bar is a ratio of 1.8. python -m benchmarks fewer_evaluations
"""

from benchmarks.measure import report, save

import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
from jode import data
from jode.models.density import CNF, Field, Normal, log_likelihood
from jode.regularize import initial, integrate, jacobian, kinetic, solver_effort, steer, taylor

ITERATIONS, BATCH, BAR = 3_000, 128, 1.8
TRAIN, TEST = jode.Fixed(jode.rk4, 6), jode.Adaptive(jode.dopri5, 1e-5, 1e-5)
PLAIN = ("plain", 0.0)
KINDS = {  # the weights tried; for STEER the width
    "RNODE": (0.003, 0.01, 0.03, 0.1),
    "TayNODE, K = 2": (0.001, 0.01, 0.1),
    "TayNODE, K = 3": (1e-5, 1e-4, 1e-3),
    "STEER": (0.2, 0.4),
    "ERNODE": (0.1, 1.0, 10.0),
}


def penalised(kind, weight, f, y, ts, key):
    """The state at the end of a solve, and the weighted integrals."""
    probe = jax.random.rademacher(key, y.shape, y.dtype)
    rates = {"RNODE": (kinetic(f), jacobian(f, probe)), "TayNODE, K = 2": (taylor(f, 2),), "TayNODE, K = 3": (taylor(f, 3),)}.get(
        kind, ()
    )
    if rates:
        end, integrals = jode.odeint(integrate(f, *rates), initial(y, len(rates)), ts, solver=TRAIN)
        return end[-1], weight * sum(jnp.abs(i[-1]) for i in integrals) / y.size
    end = jode.odeint(f, y, ts, solver=TRAIN)[-1]
    if kind == "ERNODE":
        return end, weight * solver_effort(f, y, ts, solver=jode.Fixed(jode.heun, 6))
    return end, jnp.zeros(())


class Digits(eqx.Module):
    """A linear map to 16 dimensions, an ODE there, a linear map to the classes."""

    into: eqx.nn.Linear
    field: Field
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.into, self.field, self.out = (
            eqx.nn.Linear(64, 16, key=a),
            Field(16, 64, 1, key=b),
            eqx.nn.Linear(16, 10, key=c),
        )

    @staticmethod
    def sets():
        train, test = data.digits()
        return [(jnp.asarray(s.images.reshape(-1, 64)), jnp.asarray(s.labels)) for s in (train, test)]

    def loss(self, example, key, kind, weight):
        x, label = example
        ts = steer(key, (0.0, 1.0), weight) if kind == "STEER" else (0.0, 1.0)
        end, penalty = penalised(kind, weight, self.field, self.into(x), ts, key)
        return optax.softmax_cross_entropy_with_integer_labels(self.out(end), label) + penalty

    def test(self, example):
        sol = jode.solve(self.field, self.into(example[0]), (0.0, 1.0), solver=TEST)
        return optax.softmax_cross_entropy_with_integer_labels(self.out(sol.ys[-1]), example[1]), sol.stats.nfe


class Moons(eqx.Module):
    """A continuous normalizing flow; the loss is -log p."""

    flow: CNF

    def __init__(self, key):
        self.flow = CNF(Field(2, 48, 2, key=key), Normal(2))

    @staticmethod
    def sets():
        points = lambda key, n: (1.5 * (data.moons(key, n) - jnp.array([0.5, 0.25])),)
        return [points(jax.random.key(1), 20_000), points(jax.random.key(2), 500)]

    def loss(self, example, key, kind, weight):
        flow = self.flow
        if kind == "STEER":
            start = steer(key, (1.0, 0.0), weight)[-1]  # the base's end jitters
            field = lambda t, x, args, f=flow.field: (1 - start) * f(1 + (t - 1) * (1 - start), x)
            flow = CNF(field, flow.base)
        value = -log_likelihood(flow, example[0], solver=TRAIN).log_prob
        if kind in ("plain", "STEER"):
            return value
        return value + penalised(kind, weight, flow.field, example[0], (1.0, 0.0), key)[1]

    def test(self, example):
        found = log_likelihood(self.flow, example[0], solver=TEST)
        return -found.log_prob, jode.solve(self.flow.field, example[0], (1.0, 0.0), solver=TEST).stats.nfe


def train(kind, weight, model, iterations):
    """Test loss, its standard error, and evaluations."""
    (fit, test), key = model.sets(), jax.random.key(0)
    arrays, static = eqx.partition(model(key), eqx.is_inexact_array)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, iterations))

    def step(carry, key):
        arrays, state = carry
        a, b = jax.random.split(key)
        batch = jax.tree.map(lambda x: x[jax.random.randint(a, (BATCH,), 0, len(x))], fit)
        one = lambda m, example, key: m.loss(example, key, kind, weight)
        objective = lambda arrays: jnp.mean(jax.vmap(partial(one, eqx.combine(arrays, static)))(batch, jax.random.split(b, BATCH)))
        updates, state = optimizer.update(jax.grad(objective)(arrays), state)
        return (optax.apply_updates(arrays, updates), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    carry = run((arrays, optimizer.init(arrays)), jax.random.split(key, iterations))
    losses, nfe = jax.jit(jax.vmap(eqx.combine(carry[0], static).test))(test)
    return float(jnp.mean(losses)), float(jnp.std(losses)) / len(losses) ** 0.5, float(jnp.mean(nfe))


def main(quick=False):
    iterations, rows, points = (100 if quick else ITERATIONS), [], {}
    for name, model in (("digits", Digits), ("two moons", Moons)):
        runs = [PLAIN, *((k, w) for k, weights in KINDS.items() for w in (weights[1:2] if quick else weights))]
        for kind, weight in runs:
            start = time.perf_counter()
            loss, error, nfe = train(kind, weight, model, iterations)
            points[name, kind, weight] = loss, nfe
            plain, count = points[name, *PLAIN]
            within = loss <= plain + 0.02 * abs(plain)
            ratio = f"{count / nfe:.2f}"
            seconds = f"{time.perf_counter() - start:.0f}"
            rows.append([name, kind, weight, f"{loss:.4f} ± {error:.4f}", f"{nfe:.1f}", ratio, "yes" if within else "no", seconds])
            print(rows[-1], flush=True)
        kept = [(count / nfe, k, w) for (n, k, w), (loss, nfe) in points.items() if n == name and loss <= plain + 0.02 * abs(plain)]
        best, kind, weight = max(kept)
        rows.append([name, f"best: {kind}", weight, "–", "–", f"{best:.2f}", "bar met" if best >= BAR else "bar not met", "–"])
    columns = ["data", "regulariser", "weight", "test loss", "NFE", "times fewer", "loss within 2 %", "seconds"]
    report("fewer_evaluations", f"Evaluations by dopri5 at 1e-5, {iterations:,} iterations, float32", columns, rows, quick)
    draw(points, quick)


def draw(points, quick):
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(n for n, _, _ in points))
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4), layout="constrained")
    kinds = ["plain", *KINDS]
    for ax, name in zip(np.atleast_1d(axes), names, strict=True):
        for i, kind in enumerate(kinds):
            found = [p for (n, k, _), p in points.items() if (n, k) == (name, kind)]
            color = "#22303c" if kind == "plain" else plt.get_cmap("viridis")(i / len(kinds))
            ax.plot([p[1] for p in found], [p[0] for p in found], "-o", color=color, label=kind)
        plain = points[name, *PLAIN][0]
        ax.axhspan(plain - 0.02 * abs(plain), plain + 0.02 * abs(plain), color="#8a8f98", alpha=0.2, lw=0)
        ax.set(title=f"{name}: band, within 2 % of plain", xlabel="NFE", ylabel="test loss")
        ax.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].legend(frameon=False, fontsize=8)
    save(figure, "fewer_evaluations", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
