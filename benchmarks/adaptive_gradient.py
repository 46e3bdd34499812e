"""Gradients of adaptive solves of small systems: what do they cost beside the solve, and how wrong are they?

jax.experimental.ode is left out: its backward solve diverges on Lorenz, has no step limit, and does not return.

python -m benchmarks.adaptive_gradient
"""

from functools import partial

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import jode

TOL = 1e-6


def main(quick=False):
    rows = []
    for name, (slopes, centre, args, t1) in PROBLEMS.items():
        for batch in (1, 1000):
            y0 = centre * jnp.asarray(np.random.default_rng(0).uniform(0.8, 1.2, (batch, len(centre))), jnp.float32)
            true = reference(slopes, np.asarray(y0, float).T, np.asarray(args, float), t1)
            programs, costs = {}, {}
            for peer, solve in contestants(lambda t, y, a, slopes=slopes: jnp.stack(slopes(y, a)), t1).items():
                run = partial(gradient if "forward" not in peer else loss, solve)
                programs[peer], costs[peer] = compiled(run, args, y0, quick=quick)
            times = race(programs, args, y0, repeats=5 if quick else 11, seconds=0.3 if quick else 2.0)
            for peer, seconds in times.items():
                error = "–"
                if "forward" not in peer:
                    error = f"{np.linalg.norm(programs[peer](args, y0) - true) / np.linalg.norm(true):.1e}"
                ratio = f"{seconds / times['jode, max_steps = 256']:.2f}"
                rows.append([name, batch, peer, f"{seconds * 1e3:.3f}", ratio, error, f"{costs[peer]:.2f}"])
    columns = ["problem", "batch", "solver", "ms", "time / jode (256)", "relative error", "trace + compile s"]
    report("adaptive_gradient", f"Gradient of Σ y(t1)² by the parameters: Tsit5 at {TOL:g}, float32", columns, rows, quick)


PROBLEMS = {
    "Lotka-Volterra": (
        lambda y, a: [a[0] * y[0] - a[1] * y[0] * y[1], -a[2] * y[1] + a[3] * y[0] * y[1]],
        jnp.array([1.0, 1.0]),
        jnp.array([1.5, 1.0, 3.0, 1.0]),
        10.0,
    ),
    "Lorenz": (
        lambda y, a: [a[0] * (y[1] - y[0]), y[0] * (a[1] - y[2]) - y[1], y[0] * y[1] - a[2] * y[2]],
        jnp.array([1.0, 1.0, 20.0]),
        jnp.array([10.0, 28.0, 8 / 3]),
        2.0,
    ),
}


def loss(solve, args, y0):
    run = partial(solve, args=args)
    return jnp.sum((run(y0[0]) if len(y0) == 1 else jax.vmap(run)(y0)) ** 2)


def gradient(solve, args, y0):
    return jax.grad(loss, 1)(solve, args, y0)


def contestants(f, t1):
    """Functions (y0, args) -> y(t1)."""

    def with_jode(y0, args, **options):
        return jode.odeint(f, y0, (0.0, t1), args, solver=jode.Adaptive(jode.tsit5, TOL, TOL, **options))[-1]

    def with_diffrax(y0, args, **options):
        controller = diffrax.PIDController(rtol=TOL, atol=TOL)
        term = diffrax.ODETerm(f)
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, t1, y0=y0, args=args, stepsize_controller=controller, **options).ys[
            -1
        ]

    tuned = {"dt0": 0.01, "throw": False, "max_steps": 256}
    seminorm = diffrax.PIDController(rtol=TOL, atol=TOL, norm=diffrax.adjoint_rms_seminorm)
    back = diffrax.BacksolveAdjoint(solver=diffrax.Tsit5(), stepsize_controller=seminorm)
    return {
        "jode, forward only": partial(with_jode, max_steps=256),
        "jode, max_steps = 256": partial(with_jode, max_steps=256),
        "jode, default": with_jode,
        "diffrax, default": partial(with_diffrax, dt0=None),
        "diffrax, tuned": partial(with_diffrax, **tuned, adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=256)),
        "diffrax, BacksolveAdjoint": partial(with_diffrax, **tuned, adjoint=back),
    }


def reference(slopes, y0, args, t1):
    """The gradient by complex steps through scipy's DOP853 in float64, all rows in one system."""
    found, step = [], 1e-30
    for i in range(len(args)):
        a = args.astype(complex)
        a[i] += 1j * step
        f = lambda t, y, a=a: np.stack(slopes(y.reshape(y0.shape), a)).ravel()
        y = solve_ivp(f, (0, t1), y0.ravel().astype(complex), "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
        found.append(np.sum(y**2).imag / step)
    return np.array(found)


if __name__ == "__main__":
    main()
