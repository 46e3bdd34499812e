"""Work and precision: which error does a method reach for its time, on eight standard problems, and does jode pay less for it?

The problems are DETEST's (Hull, Enright, Fellen & Sedgwick 1972) A3, B1, B4, C1, D3 and E2, and two from science.

python -m benchmarks.work_precision
"""

from functools import partial

from benchmarks.measure import compiled, race, report, save  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import jode

METHODS = {"tsit5": (jode.tsit5, diffrax.Tsit5), "dopri5": (jode.dopri5, diffrax.Dopri5), "dopri8": (jode.dopri8, diffrax.Dopri8)}


def main(quick=False):
    jax.config.update("jax_enable_x64", True)
    rows, curves = [], {}
    for name, (f, y0, t1) in problems().items():
        start = jnp.asarray(y0, jnp.float64)
        exact = solve_ivp(lambda t, y: np.stack(f(t, y, np)), (0, t1), np.asarray(start), "DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
        for method, pair in list(METHODS.items())[: 1 if quick else None]:
            programs = {
                "jode": (jax.jit(partial(with_jode, f, pair[0], t1))),
                "diffrax, tuned": (jax.jit(partial(with_diffrax, f, pair[1](), t1))),
            }
            for tol in 10.0 ** np.arange(-4, -11, -3 if quick else -2):
                args = start, jnp.asarray(tol)
                compile_once = {peer: compiled(p, *args, quick=True)[0] for peer, p in programs.items()}
                times = race(compile_once, *args, repeats=5, seconds=0.1 if quick else 0.3)
                for peer, seconds in times.items():
                    y, nfe = compile_once[peer](*args)
                    error = float(np.linalg.norm(y - exact) / (1 + np.linalg.norm(exact)))
                    ratio = f"{seconds / times['jode']:.2f}"
                    rows.append([name, method, f"{tol:.0e}", peer, f"{seconds * 1e6:.1f}", ratio, f"{error:.1e}", int(nfe)])
                    curves.setdefault((name, method, peer), []).append((error, seconds))
    columns = ["problem", "method", "rtol = atol", "solver", "µs", "time / jode", "relative error at the end", "NFE"]
    report("work_precision", "One trajectory, float64, forward", columns, rows, quick)
    draw(curves, quick)
    jax.config.update("jax_enable_x64", False)


def with_jode(f, method, t1, y0, tol):
    sol = jode.solve(
        lambda t, y, args: jnp.stack(f(t, y, jnp)), y0, (0.0, t1), solver=jode.Adaptive(method, tol, tol, max_steps=4096)
    )
    return sol.ys[-1], sol.stats.nfe


def with_diffrax(f, solver, t1, y0, tol):
    term = diffrax.ODETerm(lambda t, y, args: jnp.stack(f(t, y, jnp)))
    controller = diffrax.PIDController(rtol=tol, atol=tol)
    sol = diffrax.diffeqsolve(term, solver, 0.0, t1, dt0=1e-3, y0=y0, stepsize_controller=controller, throw=False, max_steps=4096)
    return sol.ys[-1], sol.stats["num_steps"] * (13 if isinstance(solver, diffrax.Dopri8) else 6)


def problems():
    """name: (f(t, y, array module) -> list of slopes, y0, t1)."""
    return {
        "A3, oscillating growth": (lambda t, y, np: [y[0] * np.cos(t)], [1.0], 20.0),
        "B1, predator and prey": (lambda t, y, np: [2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])], [1.0, 3.0], 20.0),
        "B4, torus": (torus, [3.0, 0.0, 0.0], 20.0),
        "C1, radioactive chain": (chain, [1.0] + [0.0] * 9, 20.0),
        "D3, orbit of eccentricity 0.5": (orbit, [0.5, 0.0, 0.0, 3**0.5], 20.0),
        "E2, van der Pol": (lambda t, y, np: [y[1], (1 - y[0] * y[0]) * y[1] - y[0]], [2.0, 0.0], 20.0),
        "Lorenz": (
            lambda t, y, np: [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]],
            [1.0, 1.0, 20.0],
            5.0,
        ),
        "Arenstorf orbit": (arenstorf, [0.994, 0.0, 0.0, -2.00158510637908252], 17.0652165601579625),
    }


def torus(t, y, np):
    r = np.sqrt(y[0] * y[0] + y[1] * y[1])
    return [-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r]


def chain(t, y, np):
    return [-y[0], *[y[i - 1] - y[i] for i in range(1, 9)], y[8]]


def orbit(t, y, np):
    r3 = (y[0] * y[0] + y[1] * y[1]) ** 1.5
    return [y[2], y[3], -y[0] / r3, -y[1] / r3]


def arenstorf(t, y, np):
    m = 0.012277471
    n = 1 - m
    d1, d2 = ((y[0] + m) ** 2 + y[1] ** 2) ** 1.5, ((y[0] - n) ** 2 + y[1] ** 2) ** 1.5
    return [
        y[2],
        y[3],
        y[0] + 2 * y[3] - n * (y[0] + m) / d1 - m * (y[0] - n) / d2,
        y[1] - 2 * y[2] - n * y[1] / d1 - m * y[1] / d2,
    ]


def draw(curves, quick):
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = list(dict.fromkeys(name for name, _, _ in curves))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6.5), layout="constrained")
    colours = {"tsit5": "#4C72B0", "dopri5": "#DD8452", "dopri8": "#55A868"}
    for name, axis in zip(names, axes.flat, strict=True):
        for (problem, method, peer), points in curves.items():
            if problem == name:
                error, seconds = np.array(points).T
                style = "-o" if peer == "jode" else "--s"
                axis.loglog(error, seconds * 1e6, style, color=colours[method], ms=3.5, lw=1.2, label=f"{method}, {peer}")
        axis.set_title(name, fontsize=9)
        axis.invert_xaxis()
        axis.grid(alpha=0.25)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("relative error at the end")
    figure.supylabel("µs a solve")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    save(figure, "work_precision", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
