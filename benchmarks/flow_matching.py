"""Tong et al. 2024, Table 2: how well, and how straight, do flow matching with independent and with OT-coupled batches go?

Squared 2-Wasserstein distance to test data and normalised path energy |E∫‖v‖² dt - W₂²| / W₂² over five seeds, batches of 128, σ = 0.1; then
other solvers than the one used: Euler with 1 … 100 steps, midpoint, RK4, dopri5 at four tolerances. python -m benchmarks flow_matching

Scales of the data are ours: N(0, I); eight Gaussians of radius 5; moons of radius 3; an S 8 high.
"""

from benchmarks.measure import report, save

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
from jode import data
from jode.models.density import CNF, Field, Normal, coupling, log_likelihood, matching_loss, path_energy, squared_w2
from jode.validity import agreement, swap

ITERATIONS, BATCH, SIGMA, SEEDS, CHUNK, POINTS = 20_000, 128, 0.1, 5, 100, 1024
DRAWS = {
    "N": lambda key, n: jax.random.normal(key, (n, 2)),
    "8 gaussians": lambda key, n: data.gaussians(key, n, noise=0.1**0.25),
    "moons": lambda key, n: 3 * data.moons(key, n, noise=0.2) - 1,
    "s-curve": lambda key, n: 2 * data.s_curve(key, n),
}
TASKS = (("N", "8 gaussians"), ("moons", "8 gaussians"), ("N", "moons"), ("N", "s-curve"))
PUBLISHED = {  # normalised path energy
    ("OT-CFM", "N", "8 gaussians"): 0.018,
    ("OT-CFM", "moons", "8 gaussians"): 0.053,
    ("OT-CFM", "N", "moons"): 0.087,
    ("I-CFM", "N", "8 gaussians"): 0.222,
    ("I-CFM", "moons", "8 gaussians"): 2.738,
}
METHODS = {"I-CFM": lambda x0, x1: np.arange(len(x0)), "OT-CFM": coupling}
SAMPLER = jode.Fixed(jode.euler, 100)
SOLVERS = [
    *(jode.Fixed(jode.euler, n) for n in (1, 2, 5, 10, 20, 50, 100)),
    *(jode.Fixed(jode.midpoint, n) for n in (5, 10, 50)),
    *(jode.Fixed(jode.rk4, n) for n in (3, 10, 25)),
    *(jode.Adaptive(jode.dopri5, tol, tol) for tol in (1e-2, 1e-3, 1e-4, 1e-5)),
]


def train(method, source, target, seed, iterations):
    """The field; batches are coupled on the host."""
    key = jax.random.key(seed)
    arrays, static = eqx.partition(Field(2, 64, 3, key=key, activation=jax.nn.selu), eqx.is_inexact_array)
    optimizer = optax.adamw(1e-3)

    def step(carry, batch):
        arrays, state = carry
        objective = lambda a: matching_loss(eqx.combine(a, static), *batch, sigma=SIGMA)
        value, gradient = jax.value_and_grad(objective)(arrays)
        updates, state = optimizer.update(gradient, state, arrays)
        return (optax.apply_updates(arrays, updates), state), value

    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    carry = arrays, optimizer.init(arrays)
    for k in range(iterations // CHUNK):
        a, b, c = jax.random.split(jax.random.fold_in(key, k), 3)
        x0, x1 = (np.asarray(DRAWS[name](k, CHUNK * BATCH)).reshape(CHUNK, BATCH, 2) for name, k in ((source, a), (target, b)))
        x1 = np.stack([x[METHODS[method](z, x)] for z, x in zip(x0, x1, strict=True)])
        carry, _ = run(carry, (x0, x1, jax.random.split(c, CHUNK)))
    return eqx.combine(carry[0], static)


def evaluate(field, source, target, seed):
    """Squared W₂ to test data, and the normalised path energy."""
    a, b = jax.random.split(jax.random.key(1000 + seed))
    x0, x1 = DRAWS[source](a, POINTS), DRAWS[target](b, POINTS)
    ends = jax.jit(jax.vmap(lambda x: jode.odeint(field, x, (0.0, 1.0), solver=SAMPLER)[-1]))(x0)
    energy = float(jnp.mean(jax.jit(lambda x: path_energy(field, x))(x0)))
    best = squared_w2(x0, x1)
    return squared_w2(ends, x1), abs(energy - best) / best


def main(quick=False):
    iterations, rows, fields = (ITERATIONS // 20 if quick else ITERATIONS), [], {}
    for source, target in TASKS[:1] if quick else TASKS:
        for method in METHODS:
            found, start = [], time.perf_counter()
            for seed in range(1 if quick else SEEDS):
                field = train(method, source, target, seed, iterations)
                fields.setdefault((method, source, target), field)
                found.append(evaluate(field, source, target, seed))
            (w, e), (ws, es) = np.mean(found, 0), np.std(found, 0)
            published = PUBLISHED.get((method, source, target), "–")
            seconds = f"{time.perf_counter() - start:.0f}"
            rows.append([f"{source} -> {target}", method, f"{w:.3f} ± {ws:.3f}", f"{e:.3f} ± {es:.3f}", published, seconds])
            print(rows[-1], flush=True)
    columns = ["task", "method", "squared W₂ to test data", "normalised path energy", "the paper's", "seconds"]
    report("flow_matching", f"Flow matching, {iterations:,} iterations, float32", columns, rows, quick)
    exchange({k[0]: field for k, field in fields.items() if k[1:] == TASKS[0]}, quick)


def exchange(fields, quick):
    """Other solvers than the sampler's, on samples and on log-likelihoods."""
    x0, x1 = DRAWS["N"](jax.random.key(5), 500), DRAWS["8 gaussians"](jax.random.key(6), 500)
    rows, curves = [], {}
    for method, field in fields.items():
        flow = CNF(field, Normal(2))
        solve = jax.jit(lambda solver, f=field: jax.vmap(lambda x: jode.solve(f, x, (0.0, 1.0), solver=solver))(x0))
        likelihood = jax.jit(lambda solver, m=flow: jax.vmap(lambda x: log_likelihood(m, x, solver=solver).log_prob)(x1))
        solvers = SOLVERS[::4] if quick else SOLVERS
        moved = agreement(lambda solver, s=solve: s(solver).ys[:, -1], [SAMPLER, *solvers])
        changed = swap(likelihood, [SAMPLER, *solvers])
        print(f"{method}, samples:\n\n{moved}\n\n{method}, log-likelihoods:\n\n{changed}\n")
        exact = solve(jode.Adaptive(jode.dopri8, 1e-6, 1e-6)).ys[:, -1]
        for solver in solvers:
            found = solve(solver)
            nfe = float(jnp.mean(found.stats.nfe))
            error = float(jnp.sqrt(jnp.mean(jnp.sum((found.ys[:, -1] - exact) ** 2, 1))))
            kind = solver.method.name if hasattr(solver.method, "name") else str(solver.method)
            setting = solver.steps if isinstance(solver, jode.Fixed) else f"{float(solver.rtol):.0e}"
            w2, mean = squared_w2(found.ys[:, -1], x1), float(jnp.mean(likelihood(solver)))
            rows.append([method, kind, setting, f"{nfe:.1f}", f"{error:.1e}", f"{w2:.3f}", f"{mean:.3f}"])
            curves.setdefault((method, kind), []).append((nfe, error))
    columns = [
        "method",
        "solver",
        "steps or tolerance",
        "NFE",
        "error of samples",
        "squared W₂ to test data",
        "mean log p of test data",
    ]
    report("flow_matching_solvers", "N -> 8 gaussians under other solvers", columns, rows, quick)
    draw(curves, quick)


def draw(curves, quick):
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    kinds = list(dict.fromkeys(kind for _, kind in curves))
    for (method, kind), points in curves.items():
        style = "-o" if method == "OT-CFM" else "--s"
        color = plt.get_cmap("viridis")(kinds.index(kind) / max(1, len(kinds) - 0.5))
        ax.plot(*zip(*points, strict=True), style, color=color, ms=4, label=f"{method}, {kind}")
    ax.set(title="Error of samples against evaluations", xlabel="NFE", ylabel="root mean square error", xscale="log", yscale="log")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, "flow_matching_solvers", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
