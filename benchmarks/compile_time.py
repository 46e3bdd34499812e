"""Small programs: how long do users wait for tracing, compiling and importing?

A plain loop is the limit: the same method and step control written by hand, with no save times, statuses or gradients of its own.

python -m benchmarks.compile_time
"""

import subprocess
import sys
import time
from functools import partial

from benchmarks.measure import report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

import jode
from benchmarks.adaptive_gradient import PROBLEMS
from benchmarks.fixed_step import by_hand, tuned
from benchmarks.plain import attempt, start

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
                rows.append([kind, what, peer, f"{trace:.2f}", f"{build:.2f}", ratio, lines])
    jax_alone = importing("jax", quick)
    for package in ("jax", "jode", "equinox", "diffrax"):
        seconds = importing(f"jax, {package}", quick) if package != "jax" else jax_alone
        rows.append(["import", "over import jax", package, f"{seconds - jax_alone:.2f}", "–", "–", "–"])
    columns = ["program", "what", "solver", "trace and lower s", "compile s", "sum / diffrax tuned", "StableHLO lines"]
    report("compile_time", "Cold starts, Lotka-Volterra, float32, batches of 1,000", columns, rows, quick)


def program(solve, what):
    loss = lambda args, y0: jnp.sum(solve(y0, args) ** 2)
    if "batch" in what:
        loss = lambda args, y0: jnp.sum(jax.vmap(solve, (0, None))(y0 * jnp.linspace(0.9, 1.1, 1000)[:, None], args) ** 2)
    return loss if what.startswith("forward") else jax.grad(loss)


def wait(f, y0, args, quick):
    """Medians of seconds to trace and lower, and to compile, from a cold start; and the size of the program."""
    traces, builds, lines = [], [], 0
    for _ in range(1 if quick else 5):
        jax.clear_caches()
        began = time.perf_counter()
        lowered = jax.jit(lambda a, y: f(a, y)).lower(args, y0)
        middle = time.perf_counter()
        lowered.compile()
        traces.append(middle - began)
        builds.append(time.perf_counter() - middle)
        lines = len(lowered.as_text().splitlines())
    return float(np.median(traces)), float(np.median(builds)), lines


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
