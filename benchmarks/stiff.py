"""Stiff problems: what does a solve, and a gradient, by implicit methods cost, at what error?

Robertson's kinetics, HIRES, van der Pol's oscillator and POLLU, one trajectory and 1,000 with rates of their own (gradients: 100). Peers: diffrax's
Kvaerno3, 4 and 5 with a first step of 1e-6 (without it they stand still in van der Pol's oscillator), and `max_steps` tuned, and for one trajectory LSODA, BDF and Radau of scipy, whose field is
Python. Errors are those at the end, largest component, against published digits or a tight solve; in units of rtol |y| + atol.

python -m benchmarks.stiff
python -m benchmarks.stiff errors   # of rodas5p and Kvaerno5 at equal tolerances, for all problems; seconds
"""

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

import sys
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import jode
from tests.problems import DIGITS
from tests.stiff import STIFF

PROBLEMS = {"robertson": "robertson 1e11", "hires": "hires", "van der pol": "van der pol", "pollu": "pollu"}
TOL = 1e-6


def main(quick=False):
    with jax.enable_x64(True):
        _main(quick)


def _main(quick):
    rows = []
    for problem, name in PROBLEMS.items():
        if quick and problem != "robertson":
            continue
        p = STIFF[name]
        atol, y0 = p.atol * TOL, jnp.array(p.y0)
        args = jnp.asarray(1.0 if p.args is None else p.args)
        for what, task in {"forward": forward, "gradient": gradient}.items():
            for batch in (1, 20 if quick else 1000 if task is forward else 100):
                x = args * (1 + 0.1 * jax.random.uniform(jax.random.key(0), (batch, *args.shape)) if batch > 1 else 1.0)
                programs, costs, functions = {}, {}, {}
                for peer, solve in contestants(p, y0, atol).items():
                    functions[peer] = task(solve, batch)
                    programs[peer], costs[peer] = compiled(functions[peer], x, quick=True)
                times, found = timed(programs, x, quick)
                if what == "forward" and batch == 1:
                    for peer, (seconds, y) in scipys(p, y0, atol).items():
                        times[peer], found[peer], costs[peer] = seconds, y, float("nan")
                true = reference(p, name, y0, x, task, batch)
                for peer, seconds in times.items():
                    error = apart(found[peer], true, atol if what == "forward" else None)
                    ratio = seconds / times["jode rodas5p"]
                    rows.append(line(problem, batch, what, peer, seconds, ratio, error, costs[peer]))
        table(rows, quick)
    table(rows + mixed(quick), quick)


def line(problem, batch, what, peer, seconds, ratio, error, cost):
    row = [problem, batch, what, peer, f"{seconds / batch * 1e6:.4g}", f"{ratio:.1f}", f"{error:.2g}", f"{cost:.1f}"]
    print(*row, flush=True)
    return row


def table(rows, quick):
    columns = ["problem", "rows", "what", "solver", "µs a row", "time / rodas5p", "error / tolerance", "trace + compile s"]
    title = f"Stiff problems at rtol {TOL:g}, float64; the gradient is that of Σ i y_i(t1) / |y_i(t1)| by the logarithms of the parameters (error: of its largest component, / rtol)"
    report("stiff", title, columns, rows, quick)


def timed(programs, x, quick):
    """Seconds a call, taken in turns; a program that takes more than five seconds is called twice alone."""
    times, found = {}, {}
    for peer, program in programs.items():
        for _ in range(2):
            start = time.perf_counter()
            found[peer] = np.asarray(program(x))
            times[peer] = time.perf_counter() - start
            if times[peer] < 5:
                break
    fast = {peer: program for peer, program in programs.items() if times[peer] < 5}
    return {**times, **race(fast, x, repeats=5, seconds=0.3 if quick else 2.0)}, found


def mixed(quick):
    """Robertson to 40 of which one row in a hundred is a thousand times faster, and one cannot be solved: in lock-step, by `jax.vmap` of a
    loop written by hand, and by jode.
    """
    p, batch = STIFF["robertson 40"], 100 if quick else 1000
    atol, y0 = p.atol * TOL, jnp.array(p.y0)
    scale = jnp.where(jnp.arange(batch) % 100 == 3, 1e3, 1.0) * (1 + 0.1 * jax.random.uniform(jax.random.key(0), (batch,)))
    rates = (scale[:, None] * jnp.array(p.args)).at[7].set(jnp.nan)
    solver = jode.Adaptive(jode.rodas5p, TOL, atol)
    contestants = {
        "jode rodas5p": lambda k: jode.odeint(p.f, y0, (0.0, p.t1), k, solver=solver)[-1],
        "loop by hand under vmap": lambda k: by_hand(p.f, y0, p.t1, k, TOL, atol),
    }
    programs, costs = {}, {}
    for peer, solve in contestants.items():
        programs[peer], costs[peer] = compiled(jax.vmap(solve), rates, quick=True)
    times, found = timed(programs, rates, quick)
    tight = jode.Adaptive(jode.rodas5p, 1e-9, p.atol * 1e-9, max_steps=20_000)
    true = np.asarray(jax.vmap(lambda k: jode.odeint(p.f, y0, (0.0, p.t1), k, solver=tight)[-1])(rates))
    sound = np.arange(batch) != 7
    rows = []
    for peer, seconds in times.items():
        assert np.isnan(found[peer][7]).all()
        error = apart(found[peer][sound], true[sound], atol)
        ratio = seconds / times["jode rodas5p"]
        rows.append(line("1 % stiffer", batch, "forward", peer, seconds, ratio, error, costs[peer]))
    return rows


def by_hand(f, y, t1, k, rtol, atol):
    """Rodas5P as its paper states it, with one LU factorisation a step and the controller of jode, for one trajectory."""
    t = jode.rodas5p.tableau
    norm = lambda e, y: jnp.sqrt(jnp.mean((e / (atol + rtol * jnp.abs(y))) ** 2))

    def step(c):
        now, h, y, n = c
        h = jnp.minimum(h, t1 - now)
        J, T = jax.jacfwd(f, 1)(now, y, k), jax.jacfwd(f, 0)(now, y, k)
        lu = jax.scipy.linalg.lu_factor(jnp.eye(y.shape[0]) / (h * t.gamma) - J)
        us = []
        for c_i, d, a, C in zip(t.c, t.d, t.a, t.C, strict=True):
            r = f(now + c_i * h, y + sum(w * u for w, u in zip(a, us, strict=True)), k) + h * d * T
            us.append(jax.scipy.linalg.lu_solve(lu, r + sum(w / h * u for w, u in zip(C, us, strict=True))))
        y1 = y + sum(b * u for b, u in zip(t.b, us, strict=True))
        e = norm(us[-1], jnp.maximum(jnp.abs(y), jnp.abs(y1)))
        e = jnp.where(jnp.isfinite(e), e, jnp.inf)
        factor = jnp.clip(0.9 * e**-0.2, 0.2, 10.0)
        return jnp.where(e <= 1, now + h, now), h * factor, jnp.where(e <= 1, y1, y), n + 1

    now, _, y, _ = jax.lax.while_loop(lambda c: (c[0] < t1) & (c[3] < 4096) & (c[1] > 1e-14), step, (0.0, 1e-6, y, 0))
    return jnp.where(now >= t1, y, jnp.nan)


def forward(solve, batch):
    return jax.vmap(solve) if batch > 1 else solve


def gradient(solve, batch):
    def loss(log):
        y = solve(jnp.exp(log))
        return jnp.sum(jnp.arange(1.0, y.shape[0] + 1) * y / (jnp.abs(jax.lax.stop_gradient(y)) + 1e-12))

    total = (lambda logs: jnp.sum(jax.vmap(loss)(logs))) if batch > 1 else loss
    return lambda ks: jax.grad(total)(jnp.log(ks))


def field(p):
    """Problems without parameters get a scale of time for one, so that every gradient has something to do."""
    return p.f if p.args is not None else lambda t, y, a: a * p.f(t, y, None)


def errors():
    """Errors at the end in units of the tolerance, and steps tried, of both fifth order methods on every problem."""
    rows = []
    for name, p in STIFF.items():
        y0, k = jnp.array(p.y0), jnp.asarray(1.0 if p.args is None else p.args)
        f, true = field(p), np.array(DIGITS[name])
        for tol in (1e-4, 1e-6, 1e-8):
            atol = 1.7e-24 if p.atol is None else p.atol * tol
            mine = jode.solve(f, y0, (0.0, p.t1), k, solver=jode.Adaptive(jode.rodas5p, tol, atol, max_steps=65_536))
            control = diffrax.PIDController(rtol=tol, atol=atol)
            of = {"stepsize_controller": control, "max_steps": 65_536, "throw": False}
            other = diffrax.diffeqsolve(diffrax.ODETerm(f), diffrax.Kvaerno5(), 0.0, p.t1, 1e-6, y0, k, **of)
            found = {
                "jode rodas5p": (mine.ys[-1], mine.stats.steps),
                "diffrax Kvaerno5": (other.ys[-1], other.stats["num_steps"]),
            }
            for peer, (y, steps) in found.items():
                error = float(np.max(np.abs(np.asarray(y) - true) / (tol * np.abs(true) + atol)))
                rows.append([name, f"{tol:g}", peer, f"{error:.2g}", int(steps)])
                print(*rows[-1], flush=True)
    report("stiff_errors", "Stiff problems, float64", ["problem", "rtol", "solver", "error / tolerance", "steps"], rows)


def contestants(p, y0, atol):
    f, ts = field(p), (0.0, p.t1)
    solver = jode.Adaptive(jode.rodas5p, TOL, atol)
    steps = int(jode.solve(f, y0, ts, jnp.asarray(1.0 if p.args is None else p.args), solver=solver).stats.steps)
    out = {"jode rodas5p": lambda k: jode.odeint(f, y0, ts, k, solver=solver)[-1]}

    def peer(method, max_steps):
        def solve(k):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(f),
                method(),
                0.0,
                p.t1,
                1e-6,
                y0,
                k,
                stepsize_controller=diffrax.PIDController(rtol=TOL, atol=atol),
                max_steps=max_steps,
                throw=False,
            )
            return sol.ys[-1]

        return solve

    for method in (diffrax.Kvaerno3, diffrax.Kvaerno4, diffrax.Kvaerno5):
        out[f"diffrax {method.__name__}"] = peer(method, 16_384)
    out["diffrax Kvaerno5, tuned"] = peer(diffrax.Kvaerno5, max(64, 6 * steps))
    return out


def scipys(p, y0, atol):
    k = jnp.asarray(1.0 if p.args is None else p.args)
    f = jax.jit(lambda t, y: field(p)(t, y, k))
    J = jax.jit(jax.jacfwd(lambda t, y: field(p)(t, y, k), 1))
    out = {}
    for method in ("LSODA", "BDF", "Radau"):
        run = lambda method=method: solve_ivp(
            lambda t, y: np.asarray(f(t, y)),
            (0, p.t1),
            np.asarray(y0),
            method,
            rtol=TOL,
            atol=atol,
            jac=lambda t, y: np.asarray(J(t, y)),
        )
        run()
        start = time.perf_counter()
        y = run().y[:, -1]
        out[f"scipy {method}"] = time.perf_counter() - start, y
    return out


def reference(p, name, y0, x, task, batch):
    if task is forward and batch == 1:
        return np.array(DIGITS[name])
    tight = jode.Adaptive(jode.rodas5p, 1e-9, p.atol * 1e-9, max_steps=20_000)
    return np.asarray(jax.jit(task(lambda k: jode.odeint(field(p), y0, (0.0, p.t1), k, solver=tight)[-1], batch))(x))


def apart(a, b, atol):
    scale = TOL * np.abs(b) + atol if atol is not None else TOL * np.abs(b).max()
    return float(np.max(np.abs(a - b) / scale))


if __name__ == "__main__":
    with jax.enable_x64(True):
        errors() if "errors" in sys.argv else main()
