"""Save times: what does it cost to save 10, 100 or 1,000 states of an adaptive solve, and how good are they?

python -m benchmarks.save_times
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
from benchmarks.adaptive_small import PROBLEMS, TOL, f_numpy


def main(quick=False):
    rows = []
    for name, (f, centre, t1) in PROBLEMS.items():
        for batch in (1, 1000):
            y0 = centre * jnp.asarray(np.random.default_rng(0).uniform(0.8, 1.2, (batch, len(centre))), jnp.float32)
            base = {}
            for saves in (0, 100) if quick else (0, 10, 100, 1000):
                ts = jnp.linspace(0.0, t1, saves + 2)
                programs, costs = {}, {}
                for peer, solve in contestants(f, t1).items():
                    run = (lambda y, ts, solve=solve: solve(y[0], ts)[None]) if batch == 1 else jax.vmap(solve, (0, None))
                    programs[peer], costs[peer] = compiled(run, y0, ts, quick=quick)
                times = race(programs, y0, ts, repeats=5 if quick else 11, seconds=0.3 if quick else 1.0)
                for peer, seconds in times.items():
                    base.setdefault(peer, seconds)
                    ratios = [f"{seconds / base[peer]:.2f}", f"{seconds / times['jode']:.2f}"]
                    error = f"{worst_error(f, ts, y0, programs[peer](y0, ts)):.1e}"
                    rows.append([name, batch, saves, peer, f"{seconds / batch * 1e6:.2f}", *ratios, error, f"{costs[peer]:.2f}"])
    columns = ["problem", "batch", "save times", "solver", "µs a trajectory", "time / none saved", "time / jode"]
    title = f"Tsit5 (odeint: Dopri5), rtol = atol = {TOL:g}, float32, forward, save times between the ends"
    report("save_times", title, [*columns, "worst relative error at any save time", "trace + compile s"], rows, quick)


def contestants(f, t1):
    """Functions (y0, ts) -> states at ts."""

    def with_diffrax(y0, ts, **options):
        controller, saveat = diffrax.PIDController(rtol=TOL, atol=TOL), diffrax.SaveAt(ts=ts)
        solver = diffrax.Tsit5()
        return diffrax.diffeqsolve(
            diffrax.ODETerm(f), solver, 0.0, t1, y0=y0, saveat=saveat, stepsize_controller=controller, **options
        ).ys

    return {
        "jode": lambda y0, ts: jode.odeint(f, y0, ts, solver=jode.Adaptive(jode.tsit5, TOL, TOL)),
        "diffrax, default": partial(with_diffrax, dt0=None),
        "diffrax, tuned": partial(with_diffrax, dt0=0.01, throw=False, max_steps=256),
        "jax.experimental.ode": lambda y0, ts: odeint(lambda y, t: f(t, y, None), y0, ts, rtol=TOL, atol=TOL),
    }


def worst_error(f, ts, y0, found, rows=5):
    """Against scipy's DOP853 in float64, over the first rows and every save time."""
    worst, times = 0.0, np.asarray(ts, float)
    for y, z in zip(np.asarray(y0[:rows], float), np.asarray(found[:rows], float), strict=True):
        exact = solve_ivp(lambda t, y: f_numpy(f, y), times[[0, -1]], y, "DOP853", t_eval=times, rtol=1e-11, atol=1e-12).y.T
        worst = max(worst, (np.abs(z - exact) / (1 + np.abs(exact).max(1, keepdims=True))).max())
    return worst


if __name__ == "__main__":
    main()
