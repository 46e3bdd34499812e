"""Adaptive solves of small systems, forward: is jode at least as fast as every peer, at the same error?

python -m benchmarks.adaptive_small
"""

from functools import partial

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from scipy.integrate import solve_ivp

import jode
from benchmarks.kernel import kernel

try:
    import torch
    import torchode
except ImportError:
    torchode = None

TOL = 1e-6


def main(quick=False):
    rows = []
    for name, (f, centre, t1) in PROBLEMS.items():
        for batch in (1, 10_000) if quick else (1, 100, 10_000):
            y0 = centre * jnp.asarray(np.random.default_rng(0).uniform(0.8, 1.2, (batch, len(centre))), jnp.float32)
            steps = int(jax.vmap(partial(jode_solve, f, t1))(y0).stats.steps.max())
            programs, costs = {}, {}
            for peer, solve in contestants(f, t1, steps).items():
                run = (lambda y, solve=solve: solve(y[0])[None]) if batch == 1 else jax.vmap(solve)
                programs[peer], costs[peer] = compiled(run, y0, quick=quick)
            programs |= outside(name, f, t1, y0)
            times = race(programs, y0, repeats=5 if quick else 15, seconds=0.3 if quick else 2.0)
            for peer, seconds in times.items():
                error = "–" if peer in ("bare f", "nothing but the call") else f"{worst_error(f, t1, y0, programs[peer](y0)):.1e}"
                ratio = f"{seconds / times['jode']:.2f}"
                rows.append(
                    [
                        name,
                        batch,
                        peer,
                        f"{seconds / batch * 1e6:.2f}",
                        ratio,
                        error,
                        f"{costs[peer]:.2f}" if peer in costs else "–",
                    ]
                )
    columns = ["problem", "batch", "solver", "µs a trajectory", "time / jode", "worst relative error", "trace + compile s"]
    report("adaptive_small", f"Tsit5 (odeint: Dopri5), rtol = atol = {TOL:g}, float32, forward", columns, rows, quick)


def lotka_volterra(t, y, args):
    return jnp.stack([1.5 * y[0] - y[0] * y[1], -3 * y[1] + y[0] * y[1]])


def lorenz(t, y, args):
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


PROBLEMS = {
    "Lotka-Volterra": (lotka_volterra, jnp.array([1.0, 1.0]), 10.0),
    "Lorenz": (lorenz, jnp.array([1.0, 1.0, 20.0]), 2.0),
}


def jode_solve(f, t1, y0, **options):
    return jode.solve(f, y0, (0.0, t1), solver=jode.Adaptive(jode.tsit5, TOL, TOL, **options))


def contestants(f, t1, steps):
    """Functions y0 -> y(t1); `steps` is the most that any row takes, for the tuned diffrax and for the bare cost of f."""

    def diffrax_solve(y0, **options):
        controller = diffrax.PIDController(rtol=TOL, atol=TOL)
        term = diffrax.ODETerm(f)
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, t1, y0=y0, stepsize_controller=controller, **options).ys[-1]

    def bare(y0):
        """The evaluations of f alone, six a step, chained so that none can be skipped."""
        return jax.lax.fori_loop(0, 6 * steps, lambda i, y: y + 1e-9 * f(0.0, y, None), y0)

    return {
        "jode": lambda y0: jode_solve(f, t1, y0).ys[-1],
        "jode, first step given": lambda y0: jode_solve(f, t1, y0, first_step=0.01).ys[-1],
        "diffrax, default": partial(diffrax_solve, dt0=None),
        "diffrax, tuned": partial(diffrax_solve, dt0=0.01, throw=False, max_steps=int(1.2 * steps) + 8),
        "jax.experimental.ode": lambda y0: odeint(lambda y, t: f(t, y, None), y0, jnp.array([0.0, t1]), rtol=TOL, atol=TOL)[-1],
        "bare f": bare,
        "nothing but the call": lambda y0: 2 * y0,
    }


def outside(name, f, t1, y0):
    """The limit, C; and torchode, which solves a batch with steps by row as jode does."""
    lanes = (1,) if len(y0) == 1 else (1, 16, 32)
    peers = {f"C, {n} in lock-step" if n > 1 else "C, one by one": kernel(name, t1, TOL, n) for n in lanes}
    if torchode is not None and len(y0) > 1:
        start = torch.tensor(np.asarray(y0))

        def field(t, y):
            return torch.stack(f_numpy(f, y.unbind(1)), 1)

        term = torchode.ODETerm(field)
        method = torchode.Tsit5(term=term)
        solver = torchode.AutoDiffAdjoint(method, torchode.IntegralController(atol=TOL, rtol=TOL, term=term))
        problem = torchode.InitialValueProblem(y0=start, t_eval=torch.tensor([0.0, t1]).expand(len(start), 2))

        def solve(_):
            with torch.no_grad():
                return solver.solve(problem).ys[:, -1].numpy()

        peers["torchode"] = solve
    return {peer: solve for peer, solve in peers.items() if solve is not None}


def worst_error(f, t1, y0, found, rows=20):
    """Against scipy's DOP853 in float64, over the first rows."""
    worst = 0.0
    for y, z in zip(np.asarray(y0[:rows], float), np.asarray(found[:rows], float), strict=True):
        exact = solve_ivp(lambda t, y: np.asarray(f_numpy(f, y)), (0, t1), y, "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
        worst = max(worst, np.abs(z - exact).max() / (1 + np.abs(exact).max()))
    return worst


def f_numpy(f, y):
    if f is lotka_volterra:
        return [1.5 * y[0] - y[0] * y[1], -3 * y[1] + y[0] * y[1]]
    return [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]]


if __name__ == "__main__":
    main()
