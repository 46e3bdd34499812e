"""Batches: what does a trajectory cost among 1 to 100,000, when all want the same steps and when one in a hundred wants twenty times?

python -m benchmarks.batch_scaling
"""

from functools import partial

from benchmarks.measure import compiled, exponent, race, report, save  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jode
from benchmarks.plain import attempt, start

TOL = 1e-6
SIZES = (1, 10, 100, 1000, 10_000, 100_000)


def main(quick=False):
    rows, curves = [], {}
    for kind in ("equal rows", "1 % of the rows want 20 times the steps"):
        for batch in SIZES[:: 2 if quick else 1] if kind == "equal rows" else SIZES[-2 : -1 if quick else None]:
            y0, rate = ensemble(batch, unequal=kind != "equal rows")
            programs, costs = {}, {}
            for peer, solve in contestants().items():
                if batch < 100_000 or "diffrax" not in peer:
                    programs[peer], costs[peer] = compiled(jax.vmap(solve), y0, rate, quick=True)
            times = race(programs, y0, rate, repeats=5, seconds=0.5 if quick else 2.0)
            exact = np.stack([np.cos(20 * rate) * y0[:, 0] + np.sin(20 * rate) * y0[:, 1]])[0]
            for peer, seconds in times.items():
                error = np.abs(np.asarray(programs[peer](y0, rate))[:, 0] - exact).max()
                ratio = f"{seconds / times['jode']:.2f}"
                rows.append([kind, batch, peer, f"{seconds / batch * 1e6:.2f}", ratio, f"{error:.1e}", f"{costs[peer]:.2f}"])
                curves.setdefault((kind, peer), []).append((batch, seconds))
    for (kind, peer), points in curves.items():
        large = [(b, s) for b, s in points if b >= 100]
        if len(large) > 1:
            rows.append([kind, "exponent, from 100 on", peer, f"{exponent(*zip(*large, strict=True)):.2f}", "–", "–", "–"])
    columns = ["rows", "batch", "solver", "µs a trajectory", "time / jode", "worst error", "trace + compile s"]
    report("batch_scaling", f"Oscillators over t in [0, 20], Tsit5, rtol = atol = {TOL:g}, float32, forward", columns, rows, quick)
    draw(curves, quick)


def ensemble(batch, unequal):
    """Initial states and rates; an oscillator of rate 20 wants twenty times the steps."""
    rng = np.random.default_rng(0)
    rate = np.ones(batch, np.float32)
    if unequal:
        rate[rng.choice(batch, batch // 100, replace=False)] = 20.0
    return jnp.asarray(rng.uniform(0.8, 1.2, (batch, 2)), jnp.float32), jnp.asarray(rate)


def oscillator(t, y, rate):
    return jnp.stack([rate * y[1], -rate * y[0]])


def contestants():
    """Functions (y0, rate) -> y(20)."""

    def with_jode(y0, rate):
        return jode.odeint(oscillator, y0, (0.0, 20.0), rate, solver=jode.Adaptive(jode.tsit5, TOL, TOL))[-1]

    def with_diffrax(y0, rate, **options):
        controller = diffrax.PIDController(rtol=TOL, atol=TOL)
        term, solver = diffrax.ODETerm(oscillator), diffrax.Tsit5()
        return diffrax.diffeqsolve(term, solver, 0.0, 20.0, y0=y0, args=rate, stepsize_controller=controller, **options).ys[-1]

    return {
        "jode": with_jode,
        "lock-step vmap of a plain loop": lock_step,
        "diffrax, default": partial(with_diffrax, dt0=None),
        "diffrax, tuned": partial(with_diffrax, dt0=0.01, throw=False, max_steps=4096),
    }


def lock_step(y0, rate):
    """Under `vmap` all rows run until the slowest is done."""
    step = attempt(oscillator, rate, 20.0, TOL)
    return jax.lax.while_loop(lambda carry: carry[0] < 20.0, step, start(oscillator, y0, rate))[2]


def draw(curves, quick):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = dict(zip(contestants(), ("#C44E52", "#8C8C8C", "#4C72B0", "#55A868"), strict=True))
    for (kind, peer), points in curves.items():
        batch, seconds = np.array(points).T
        style = "-o" if kind == "equal rows" else "--D"
        label = peer if kind == "equal rows" else None
        axis.loglog(batch, seconds / batch * 1e6, style, color=colours[peer], ms=5, lw=1.4, label=label)
    axis.plot([], [], "kD", ms=5, label="where 1 % of the rows want 20 times the steps")
    axis.set(xlabel="trajectories in the batch", ylabel="µs a trajectory")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "batch_scaling", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
