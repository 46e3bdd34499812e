"""Tong et al. 2024, Table 2: how well, and how straight, do flow matching with independent and with OT-coupled batches go?

Squared 2-Wasserstein distance to test data and normalised path energy |E∫‖v‖² dt - W₂²| / W₂², W₂ that of source and target, over five
seeds: 20,000 iterations of Adam with a rate that falls from 1e-3 to 0 as a cosine, batches of 256, σ = 0.1, three hidden layers of 64
with SELU, 2,048 test points, 100 Euler steps for samples and energy. Where torchcfm is installed, the authors' own package trains
beside on the same batches, with the same network, optimiser, rates and seeds, and its weights go through the same evaluation.
python -m benchmarks flow_matching

Then other solvers than the one used, Euler with 1 … 100 steps, midpoint, RK4, dopri5 at four tolerances, and the critical step:
from how many Euler steps on is the answer that of the ODE? In samples, in path energy, and in log-likelihoods of test data.

Scales of the data are those of the authors' package; its S, 8 high, is ours: N(0, I); eight Gaussians of radius 5; moons of radius 3.
"""

from benchmarks.measure import report, save

import time
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
from jode import data
from jode.models.density import CNF, Field, Normal, coupling, log_likelihood, matching_loss, path_energy, squared_w2
from jode.validity import agreement, critical_steps, swap

try:
    import torch
    import torchcfm
    from torchcfm.models.models import MLP
except ImportError:
    torchcfm = None

ITERATIONS, BATCH, SIGMA, SEEDS, CHUNK, POINTS = 20_000, 256, 0.1, 5, 100, 2048
DRAWS = {
    "N": lambda key, n: jax.random.normal(key, (n, 2)),
    "8 gaussians": lambda key, n: data.gaussians(key, n, noise=0.1**0.25),
    "moons": lambda key, n: 3 * data.moons(key, n, noise=0.2) - 1,
    "s-curve": lambda key, n: 2 * data.s_curve(key, n),
}
TASKS = (("N", "8 gaussians"), ("N", "moons"), ("moons", "8 gaussians"), ("N", "s-curve"))
PUBLISHED = {  # normalised path energy
    ("OT-CFM", "N", "8 gaussians"): 0.018,
    ("OT-CFM", "moons", "8 gaussians"): 0.053,
    ("OT-CFM", "N", "moons"): 0.087,
    ("I-CFM", "N", "8 gaussians"): 0.222,
    ("I-CFM", "moons", "8 gaussians"): 2.738,
}
METHODS = {"I-CFM": lambda x0, x1: np.arange(len(x0)), "OT-CFM": coupling}
SAMPLER = jode.Fixed(jode.euler, 100)
REFERENCE = jode.Adaptive(jode.dopri8, 1e-6, 1e-6)
SOLVERS = [
    *(jode.Fixed(jode.euler, n) for n in (1, 2, 5, 10, 20, 50, 100)),
    *(jode.Fixed(jode.midpoint, n) for n in (5, 10, 50)),
    *(jode.Fixed(jode.rk4, n) for n in (3, 10, 25)),
    *(jode.Adaptive(jode.dopri5, tol, tol) for tol in (1e-2, 1e-3, 1e-4, 1e-5)),
]


def main(quick=False):
    iterations, seeds, tasks = (ITERATIONS // 20, 1, TASKS[:1]) if quick else (ITERATIONS, SEEDS, TASKS)
    columns = ["task", "method", "package", "squared W₂ to test data", "normalised path energy", "the paper's", "seconds"]
    title = f"Flow matching, {iterations:,} iterations, batches of {BATCH}, {seeds} seeds, float32"
    rows, fields = [], {}
    for package, trainer in {"jode": train, "torchcfm": train_torchcfm}.items():
        if package == "torchcfm" and torchcfm is None:
            continue
        for source, target in tasks:
            for method in METHODS:
                found, start = [], time.perf_counter()
                for seed in range(seeds):
                    field = trainer(method, source, target, seed, iterations)
                    fields.setdefault((package, method, source, target), field)
                    found.append(evaluate(field, source, target, seed))
                (w, e), (ws, es) = np.mean(found, 0), np.std(found, 0)
                published = PUBLISHED.get((method, source, target), "–")
                seconds = f"{time.perf_counter() - start:.0f}"
                measured = [f"{w:.3f} ± {ws:.3f}", f"{e:.3f} ± {es:.3f}"]
                rows.append([f"{source} -> {target}", method, package, *measured, published, seconds])
                report("flow_matching", title, columns, rows, quick)
        if package == "jode":
            exchange({method: fields["jode", method, *TASKS[0]] for method in METHODS}, quick)


def batches(source, target, seed, iterations):
    """x0 and x1 of `CHUNK` iterations at a time, (CHUNK, BATCH, 2), and a key; the same for both packages."""
    for k in range(iterations // CHUNK):
        a, b, c = jax.random.split(jax.random.fold_in(jax.random.key(seed), k), 3)
        x0, x1 = (np.asarray(DRAWS[name](k, CHUNK * BATCH)).reshape(CHUNK, BATCH, 2) for name, k in ((source, a), (target, b)))
        yield x0, x1, c


def train(method, source, target, seed, iterations, activation=jax.nn.selu):
    """The field; batches are coupled on the host."""
    field = Field(2, 64, 3, key=jax.random.key(seed), activation=activation)
    rule = adam(iterations)
    state = rule.init(eqx.filter(field, eqx.is_inexact_array))
    for x0, x1, key in batches(source, target, seed, iterations):
        partners = np.stack([x[METHODS[method](z, x)] for z, x in zip(x0, x1, strict=True)])
        field, state = advance(rule, field, state, (x0, partners, jax.random.split(key, CHUNK)))
    return field


@cache
def adam(iterations):
    return optax.adam(optax.cosine_decay_schedule(1e-3, iterations))


@eqx.filter_jit
def advance(rule, field, state, batches):
    """One iteration a batch."""
    arrays, static = eqx.partition(field, eqx.is_inexact_array)

    def step(carry, batch):
        arrays, state = carry
        gradient = jax.grad(lambda a: matching_loss(eqx.combine(a, static), *batch, sigma=SIGMA))(arrays)
        updates, state = rule.update(gradient, state, arrays)
        return (optax.apply_updates(arrays, updates), state), None

    arrays, state = jax.lax.scan(step, (arrays, state), batches)[0]
    return eqx.combine(arrays, static), state


def train_torchcfm(method, source, target, seed, iterations):
    """The same by torchcfm, as its tutorial in the plane has it; the weights as a `Field`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed)  # torchcfm draws pairs from its plan by numpy's global state
    kinds = {"I-CFM": torchcfm.ConditionalFlowMatcher, "OT-CFM": torchcfm.ExactOptimalTransportConditionalFlowMatcher}
    matcher, net = kinds[method](sigma=SIGMA), MLP(dim=2, w=64, time_varying=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for chunk in batches(source, target, seed, iterations):
        for x0, x1 in zip(*(torch.tensor(x) for x in chunk[:2]), strict=True):
            optimizer.zero_grad()
            t, x, u = matcher.sample_location_and_conditional_flow(x0, x1)
            loss = torch.mean((net(torch.cat([x, t[:, None]], 1)) - u) ** 2)
            loss.backward()
            optimizer.step()
            schedule.step()
    field = Field(2, 64, 3, key=jax.random.key(0), activation=jax.nn.selu)
    layers = [layer for layer in net.net if isinstance(layer, torch.nn.Linear)]
    weights = [jnp.asarray(w.detach().numpy()) for layer in layers for w in (layer.weight, layer.bias)]
    return eqx.tree_at(lambda f: [w for layer in f.mlp.layers for w in (layer.weight, layer.bias)], field, weights)


def evaluate(field, source, target, seed):
    """Squared W₂ to test data, and the normalised path energy."""
    a, b = jax.random.split(jax.random.key(1000 + seed))
    x0, x1 = DRAWS[source](a, POINTS), DRAWS[target](b, POINTS)
    ends = ends_of(field, x0)
    energy, best = float(jnp.mean(energies_of(field, x0))), squared_w2(x0, x1)
    return squared_w2(ends, x1), abs(energy - best) / best


@eqx.filter_jit
def ends_of(field, x0):
    return jax.vmap(lambda x: jode.odeint(field, x, (0.0, 1.0), solver=SAMPLER)[-1])(x0)


@eqx.filter_jit
def energies_of(field, x0):
    return path_energy(field, x0, solver=SAMPLER)


def exchange(fields, quick):
    """Other solvers than the sampler's: W₂, path energy and log-likelihood, the verdicts, and the critical step."""
    n = 500 if quick else 5_000
    x0, x1 = DRAWS["N"](jax.random.key(5), n), DRAWS["8 gaussians"](jax.random.key(6), n)
    rows, curves, critical = [], {}, {}
    for method, field in fields.items():
        flow = CNF(field, Normal(2))
        solve = jax.jit(lambda solver, f=field: jax.vmap(lambda x: jode.solve(f, x, (0.0, 1.0), solver=solver))(x0))
        samples = cache(lambda solver, s=solve: s(solver).ys[:, -1])
        energy = cache(jax.jit(lambda solver, f=field: -path_energy(f, x0, solver=solver)))
        likelihood = cache(jax.jit(lambda solver, m=flow: jax.vmap(lambda x: log_likelihood(m, x, solver=solver).log_prob)(x1)))
        solvers = SOLVERS[::4] if quick else SOLVERS
        tests = {
            "samples": lambda solvers, s=samples: agreement(s, solvers),
            "negative path energy": lambda solvers, s=samples, e=energy: swap(e, solvers, outputs=s),
            "log-likelihood": lambda solvers, s=samples, p=likelihood: swap(p, solvers, outputs=s),
        }
        for question, test in tests.items():
            print(f"{method}, {question}:\n\n{test([SAMPLER, *solvers])}\n", flush=True)
            finer = [jode.Fixed(jode.rk4, 25), jode.Adaptive(jode.dopri5, 1e-5, 1e-5)]
            found = critical_steps(lambda n, t=test, f=finer: t([jode.Fixed(jode.euler, n), *f]).valid, ratio=1.0)
            critical[method, question] = found.bracket[1]
            print(f"{method}, {question}: critical, of Euler's step counts: {found}\n", flush=True)
        exact = samples(REFERENCE)
        for solver in solvers:
            found = solve(solver)
            nfe, ends = float(jnp.mean(found.stats.nfe)), found.ys[:, -1]
            error = float(jnp.sqrt(jnp.mean(jnp.sum((ends - exact) ** 2, 1))))
            setting = solver.steps if isinstance(solver, jode.Fixed) else f"{float(solver.rtol):.0e}"
            w2, cost = squared_w2(ends[:POINTS], x1[:POINTS]), -float(jnp.mean(energy(solver)))
            verdicts = [says(test, solver) for test in tests.values()]
            numbers = [f"{nfe:.1f}", f"{error:.1e}", f"{w2:.3f}", f"{cost:.2f}", f"{float(jnp.mean(likelihood(solver))):.3f}"]
            kind = str(solver.method).removeprefix("jode.")
            rows.append([method, kind, setting, *numbers, *verdicts])
            curves.setdefault((method, kind), []).append((nfe, w2, -cost, error))
    columns = ["method", "solver", "steps or tolerance", "NFE", "error of samples", "squared W₂ to test data", "path energy"]
    columns += ["mean log p of test data", "samples", "path energy is", "log p is"]
    steps = "; ".join(
        f"{method}: {', '.join(f'{critical[method, question]} for {question}' for question in tests)}" for method in fields
    )
    title = f"N -> 8 gaussians under other solvers, {n:,} points. Euler steps from which on the model is an ODE: {steps}"
    report("flow_matching_solvers", title, columns, rows, quick)
    draw(curves, critical, quick)


def says(test, solver):
    """The verdict on a model that is used with this solver, against the reference."""
    found = test([solver, REFERENCE])
    return found.verdicts[0]


def draw(curves, critical, quick):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14.5, 4.2), layout="constrained")
    kinds = list(dict.fromkeys(kind for _, kind in curves))
    shown = ("squared W₂ to test data", "negative path energy", "error of samples, root mean square")
    for i, (ax, what) in enumerate(zip(axes, shown, strict=True)):
        for (method, kind), points in curves.items():
            style = "-o" if method == "OT-CFM" else "--s"
            color = plt.get_cmap("viridis")(kinds.index(kind) / max(1, len(kinds) - 0.5))
            ax.plot(*zip(*((p[0], p[1 + i]) for p in points), strict=True), style, color=color, ms=4, label=f"{method}, {kind}")
        ax.set(xlabel="NFE", ylabel=what, xscale="log")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(yscale="log")
    axes[2].set(yscale="log")
    for method, style in (("OT-CFM", "-"), ("I-CFM", "--")):
        if steps := critical[method, "samples"]:
            axes[2].axvline(steps, color="#999999", lw=1, ls=style, label=f"{method}, critical Euler step")
    axes[2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, "flow_matching_solvers", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
