"""Small programs: how long do users wait for tracing, compiling and importing?

A plain loop is the limit: the same method and step control written by hand, with no save times, statuses or gradients of its own.
The last programs are training steps of ODE-Net (Chen et al. 2018, 64 channels, images of 28 x 28, batches of 32), a long vector field.

python -m benchmarks.compile_time
"""

import subprocess
import sys
import time
from functools import partial

from benchmarks.measure import race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.ode import odeint

import jode
from benchmarks.adaptive_gradient import PROBLEMS
from benchmarks.fixed_step import by_hand, tuned
from benchmarks.plain import attempt, start
from benchmarks.training import step_of
from jode.models.image import Classifier, vector_field

TOL = 1e-6


def main(quick=False):
    slopes, y0, args, t1 = PROBLEMS["Lotka-Volterra"]
    f = lambda t, y, a: jnp.stack(slopes(y, a))
    rows = []
    for kind, peers in (("adaptive", adaptive(f, t1)), ("fixed", fixed(f))):
        for what in ("forward", "gradient", "forward of a batch", "gradient of a batch"):
            times = {peer: wait(program(solve, what), y0, args, quick) for peer, solve in peers.items()}
            base = times["diffrax, tuned"][0] + times["diffrax, tuned"][1]
            for peer, (trace, build, lines) in times.items():
                ratio = f"{(trace + build) / base:.2f}"
                rows.append([kind, what, peer, f"{trace:.2f}", f"{build:.2f}", ratio, lines, "–"])
    rows += training(quick)
    jax_alone = importing("jax", quick)
    for package in ("jax", "jode", "equinox", "diffrax"):
        seconds = importing(f"jax, {package}", quick) if package != "jax" else jax_alone
        rows.append(["import", "over import jax", package, f"{seconds - jax_alone:.2f}", "–", "–", "–", "–"])
    columns = ["program", "what", "solver", "trace and lower s", "compile s", "sum / diffrax tuned", "StableHLO lines", "ms a call"]
    report("compile_time", "Cold starts, Lotka-Volterra, float32, batches of 1,000", columns, rows, quick)


def program(solve, what):
    loss = lambda args, y0: jnp.sum(solve(y0, args) ** 2)
    if "batch" in what:
        loss = lambda args, y0: jnp.sum(jax.vmap(solve, (0, None))(y0 * jnp.linspace(0.9, 1.1, 1000)[:, None], args) ** 2)
    return loss if what.startswith("forward") else jax.grad(loss)


def wait(f, y0, args, quick):
    """Medians of seconds to trace and lower, and to compile, from a cold start; and the size of the program."""
    starts = [cold(lambda a, y: f(a, y), args, y0)[:3] for _ in range(1 if quick else 5)]
    traces, builds, lines = zip(*starts, strict=True)
    return float(np.median(traces)), float(np.median(builds)), lines[0]


def cold(f, *x):
    """Seconds to trace and lower, and to compile; the size of the program, and the program."""
    jax.clear_caches()
    began = time.perf_counter()
    lowered = jax.jit(lambda *x: f(*x)).lower(*x)
    middle = time.perf_counter()
    program = lowered.compile()
    return middle - began, time.perf_counter() - middle, len(lowered.as_text().splitlines()), program


def training(quick):
    """Training steps of ODE-Net: the peers compile in turns, and their programs run in turns."""
    batch, width = (4, 8) if quick else (32, 64)
    model = Classifier((28, 28, 1), width, key=jax.random.key(0))
    x = model, step_of(None)[1](model), jax.random.uniform(jax.random.key(1), (batch, 28, 28, 1)), jnp.arange(batch) % 10
    rows = []
    for kind, peers in odenet().items():
        steps = {peer: training_step(solve) for peer, solve in peers.items()}
        starts, programs = {peer: [] for peer in steps}, {}
        for _ in range(1 if quick else 3):
            for peer, step in steps.items():
                *seconds, programs[peer] = cold(step, *x)
                starts[peer].append(seconds)
        found = {peer: np.median(s, axis=0) for peer, s in starts.items()}
        times = race(programs, *x, repeats=3 if quick else 7, seconds=1.0 if quick else 10.0)
        for peer, (trace, build, lines) in found.items():
            ratio = f"{(trace + build) / sum(found['diffrax, tuned'][:2]):.2f}"
            row = ["training step", kind, peer, f"{trace:.2f}", f"{build:.2f}", ratio, int(lines), f"{times[peer] * 1e3:.1f}"]
            rows.append(row)
    return rows


def training_step(solve):
    """Of a network whose images are solves of their own."""

    def one(model, image, label):
        x = solve(model.features(image), model.block)
        return optax.softmax_cross_entropy_with_integer_labels(model.logits(x), label)

    return step_of(lambda model, *data: jnp.mean(jax.vmap(partial(one, model))(*data)))[0]


def odenet(tol=1e-3):
    """Functions (x, block) -> x(1): ODE-Net's, Dopri5 at 1e-3, and two equal steps of it."""

    def with_diffrax(x, w, solver=diffrax.Dopri5(), **options):
        if "stepsize_controller" not in options:
            options["stepsize_controller"] = diffrax.PIDController(rtol=tol, atol=tol)
        return diffrax.diffeqsolve(diffrax.ODETerm(vector_field), solver, 0.0, 1.0, y0=x, args=w, **options).ys[-1]

    def with_jode(x, w, solver):
        return jode.odeint(vector_field, x, (0.0, 1.0), w, solver=solver)[-1]

    own = {"dt0": 0.1, "throw": False, "max_steps": 64, "adjoint": diffrax.RecursiveCheckpointAdjoint(checkpoints=64)}
    fixed = {"dt0": 0.5, "stepsize_controller": diffrax.ConstantStepSize()}
    few = {"throw": False, "max_steps": 2, "adjoint": diffrax.RecursiveCheckpointAdjoint(checkpoints=2)}
    return {
        "ODE-Net": {
            "jode": partial(with_jode, solver=jode.Adaptive(jode.dopri5, tol, tol)),
            "jode, first step, max_steps": partial(
                with_jode, solver=jode.Adaptive(jode.dopri5, tol, tol, max_steps=64, first_step=0.1)
            ),
            "diffrax, default": partial(with_diffrax, dt0=None),
            "diffrax, tuned": partial(with_diffrax, **own),
            "diffrax, tuned, stages bounded": partial(with_diffrax, solver=diffrax.Dopri5(scan_kind="bounded"), **own),
        },
        "ODE-Net, two steps": {
            "jode": partial(with_jode, solver=jode.Fixed(jode.dopri5, 2)),
            "diffrax, default": partial(with_diffrax, **fixed),
            "diffrax, tuned": partial(with_diffrax, **fixed, **few),
        },
    }


def importing(modules, quick):
    """Median seconds of a fresh process that imports these modules, less one that imports nothing."""

    def run(code):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    return float(np.median([run(f"import {modules}") - run("pass") for _ in range(3 if quick else 9)]))


def adaptive(f, t1):
    """Functions (y0, args) -> y(t1)."""

    def with_diffrax(y0, args, **options):
        controller = diffrax.PIDController(rtol=TOL, atol=TOL)
        term = diffrax.ODETerm(f)
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, t1, y0=y0, args=args, stepsize_controller=controller, **options).ys[
            -1
        ]

    checkpoints = diffrax.RecursiveCheckpointAdjoint(checkpoints=256)
    return {
        "jode": lambda y0, args: jode.odeint(f, y0, (0.0, t1), args, solver=jode.Adaptive(jode.tsit5, TOL, TOL, max_steps=256))[-1],
        "plain loop": partial(plain_loop, f, t1),
        "diffrax, default": partial(with_diffrax, dt0=None),
        "diffrax, tuned": partial(with_diffrax, dt0=0.01, throw=False, max_steps=256, adjoint=checkpoints),
        "jax.experimental.ode": lambda y0, a: odeint(lambda y, t, a: f(t, y, a), y0, jnp.array([0.0, t1]), a, rtol=TOL, atol=TOL)[
            -1
        ],
    }


def plain_loop(f, t1, y0, args, steps=256):
    """256 attempts by `lax.scan`, so that JAX can differentiate them."""
    step = attempt(f, args, t1, TOL)
    return jax.lax.scan(lambda carry, _: (step(carry), None), start(f, y0, args), None, steps)[0][2]


def fixed(f, steps=100):
    def with_diffrax(y0, args, **options):
        return diffrax.diffeqsolve(diffrax.ODETerm(f), diffrax.Midpoint(), 0.0, 1.0, y0=y0, args=args, **options).ys[-1]

    return {
        "jode": lambda y0, args: jode.odeint(f, y0, (0.0, 1.0), args, solver=jode.Fixed(jode.midpoint, steps))[-1],
        "plain loop": by_hand(f, steps),
        "diffrax, default": partial(with_diffrax, dt0=1 / steps),
        "diffrax, tuned": partial(with_diffrax, **tuned(steps)),
    }


if __name__ == "__main__":
    main()
