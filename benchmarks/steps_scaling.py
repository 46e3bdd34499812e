"""Long horizons: does the cost grow in proportion to the number of steps, from 10 to 100,000, forward and gradient?

python -m benchmarks.steps_scaling
"""

from functools import partial

from benchmarks.measure import compiled, exponent, race, report, save  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jode
from benchmarks.adaptive_gradient import PROBLEMS
from benchmarks.fixed_step import tuned, with_diffrax

H = 1e-3


def main(quick=False):
    slopes, y0, args, _ = PROBLEMS["Lotka-Volterra"]
    f = lambda t, y, a: jnp.stack(slopes(y, a))
    rows, curves = [], {}
    for steps in (10, 1000, 100_000) if quick else (10, 100, 1000, 10_000, 100_000):
        programs, memory = {}, {}
        for name, (solve, what) in contestants(f, steps).items():
            if "diffrax" not in name or steps <= 10_000:
                loss = lambda a, y, solve=solve: jnp.sum(solve(y, a) ** 2)
                programs[name], _ = compiled(loss if what == "forward" else jax.grad(loss), args, y0, quick=True)
                memory[name] = programs[name].memory_analysis().temp_size_in_bytes / 2**20
        times = race(programs, args, y0, repeats=5, seconds=0.3 if quick else 1.0)
        for name, seconds in times.items():
            rows.append([steps, name, f"{seconds * 1e3:.3f}", f"{seconds / steps * 1e9:.0f}", f"{memory[name]:.3f}"])
            curves.setdefault(name, []).append((steps, seconds))
    for name, points in curves.items():
        large = [(n, s) for n, s in points if n >= 1000]
        if len(large) > 1:
            rows.append(["exponent, from 1,000 on", name, f"{exponent(*zip(*large, strict=True)):.2f}", "–", "–"])
    columns = ["steps", "solver", "ms", "ns a step", "temporaries MiB"]
    report("steps_scaling", f"Midpoint on Lotka-Volterra, steps of {H:g}, float32", columns, rows, quick)
    draw(curves, quick)


def contestants(f, steps):
    """name: (a function (y0, args) -> y at the end, forward or gradient)."""
    scaled = lambda t, y, a: steps * H * f(t, y, a)

    def solve(y0, args, **options):
        return jode.odeint(f, y0, (0.0, steps * H), args, solver=jode.Fixed(jode.midpoint, steps), **options)[-1]

    stored = diffrax.RecursiveCheckpointAdjoint(checkpoints=steps)
    return {
        "jode, forward": (solve, "forward"),
        "jode, Backprop()": (solve, "gradient"),
        "jode, MemoryFree()": (partial(solve, adjoint=jode.MemoryFree()), "gradient"),
        "diffrax, tuned, forward": (lambda y0, a: with_diffrax(scaled, y0, a, **tuned(steps)), "forward"),
        "diffrax, tuned, gradient": (lambda y0, a: with_diffrax(scaled, y0, a, **tuned(steps), adjoint=stored), "gradient"),
    }


def draw(curves, quick):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        steps, seconds = np.array(points).T
        axis.loglog(steps, seconds / steps * 1e9, "-o" if "jode" in name else "--s", ms=4, lw=1.4, label=name)
    axis.set(xlabel="steps", ylabel="ns a step")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=8, frameon=False)
    save(figure, "steps_scaling", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
