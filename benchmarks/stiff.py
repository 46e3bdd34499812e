"""Stiff problems: what does a solve, and a gradient, by implicit methods cost, at what error?

Robertson's kinetics, HIRES, van der Pol's oscillator and POLLU, one trajectory and 1,000 with rates of their own. Peers: diffrax's
Kvaerno3, 4 and 5, by default and with `max_steps` tuned, and for one trajectory LSODA, BDF and Radau of scipy, whose field is
Python. Errors are those at the end, largest component, against published digits or a tight solve; in units of rtol |y| + atol.

python -m benchmarks.stiff
"""

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

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
        for batch in (1, 20 if quick else 1000):
            p = STIFF[name]
            atol, y0 = p.atol * TOL, jnp.array(p.y0)
            args = jnp.asarray(1.0 if p.args is None else p.args)
            spread = 1 + 0.1 * jax.random.uniform(jax.random.key(0), (batch, *args.shape)) if batch > 1 else 1.0
            x = args * spread
            for what, task in {"forward": forward, "gradient": gradient}.items():
                programs, costs, functions = {}, {}, {}
                for peer, solve in contestants(p, y0, atol).items():
                    functions[peer] = task(solve, batch)
                    programs[peer], costs[peer] = compiled(functions[peer], x, quick=True)
                times = race(programs, x, repeats=5, seconds=0.3 if quick else 2.0)
                found = {peer: np.asarray(program(x)) for peer, program in programs.items()}
                if what == "forward" and batch == 1:
                    for peer, (seconds, y) in scipys(p, y0, atol).items():
                        times[peer], found[peer], costs[peer] = seconds, y, float("nan")
                true = reference(p, name, y0, x, task, batch)
                for peer, seconds in times.items():
                    error = apart(found[peer], true, atol if what == "forward" else None)
                    ratio = seconds / times["jode rodas5p"]
                    row = [
                        problem,
                        batch,
                        what,
                        peer,
                        f"{seconds / batch * 1e6:.4g}",
                        f"{ratio:.1f}",
                        f"{error:.2g}",
                        f"{costs[peer]:.1f}",
                    ]
                    rows.append(row)
                    print(*row, flush=True)
    columns = ["problem", "rows", "what", "solver", "µs a row", "time / rodas5p", "error / tolerance", "trace + compile s"]
    title = f"Stiff problems at rtol {TOL:g}, float64; the gradient is that of Σ i y_i(t1) / |y_i(t1)| by the logarithms of the parameters (error: of its largest component, / rtol)"
    report("stiff", title, columns, rows, quick)


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
                None,
                y0,
                k,
                stepsize_controller=diffrax.PIDController(rtol=TOL, atol=atol),
                max_steps=max_steps,
                throw=False,
            )
            return sol.ys[-1]

        return solve

    for method in (diffrax.Kvaerno3, diffrax.Kvaerno4, diffrax.Kvaerno5):
        out[f"diffrax {method.__name__}"] = peer(method, 4096)
    out["diffrax Kvaerno5, tuned"] = peer(diffrax.Kvaerno5, max(64, 6 * steps))
    return out


def scipys(p, y0, atol):
    k = 1.0 if p.args is None else p.args
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
    main()
