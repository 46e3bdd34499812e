"""Fixed steps, forward: what does a solve cost beside the scan one would write by hand?

python -m benchmarks.fixed_step
"""

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

import jode


def main():
    rows = []
    for name, (f, y0, args, steps, batched) in problems().items():
        programs, costs = {}, {}
        for peer, solve in contestants(f, steps).items():
            run = jax.vmap(solve, (0, None)) if batched else solve
            programs[peer], costs[peer] = compiled(run, y0, args)
        times = race(programs, y0, args, repeats=41, seconds=2.0)
        hand = programs["hand-written scan"](y0, args)
        for peer, seconds in times.items():
            gap = (
                "–"
                if peer == "bare f"
                else f"{float(jnp.max(jnp.abs(programs[peer](y0, args) - hand)) / jnp.max(jnp.abs(hand))):.1e}"
            )
            ratio = f"{seconds / times['hand-written scan']:.3f}"
            rows.append([name, peer, f"{seconds * 1e3:.3f}", ratio, gap, f"{costs[peer]:.2f}"])
    columns = ["problem", "solver", "ms", "time / scan", "relative difference from the scan", "trace + compile s"]
    report("fixed_step", "Midpoint, fixed steps, float32, forward (odeint: adaptive, rtol = atol = 1e-4)", columns, rows)


def problems():
    """name: (f, y0, args, steps, whether y0 is a batch)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1), jnp.float32)

    def oscillator(t, y, a):
        return jnp.stack([y[1], -a[0] * y[0] - a[1] * y[1]])

    def perceptron(t, y, w):
        return jnp.tanh(y @ w[0]) @ w[1]

    def convolution(t, y, w):
        return jnp.tanh(jax.lax.conv_general_dilated(y, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    state, weights = draw(128, 64), (draw(64, 128), draw(128, 64))
    kernel = draw(3, 3, 64, 64) / 3
    return {
        "small state, one": (oscillator, jnp.array([1.0, 0.0]), jnp.array([1.0, 0.1]), 1000, False),
        "small state, 1,000 rows": (oscillator, draw(1000, 2), jnp.array([1.0, 0.1]), 1000, True),
        "MLP 64-128-64, batch 128": (perceptron, state, weights, 100, False),
        "MLP 64-128-64, vmap of 128": (perceptron, state, weights, 100, True),
        "convolution, 64 channels": (convolution, draw(16, 14, 14, 64), kernel, 30, False),
    }


def contestants(f, steps):
    """Functions (y0, args) -> y(1)."""
    h = 1.0 / steps

    def scan(y0, args):
        def body(y, i):
            t = i * h
            k = f(t, y, args)
            return y + h * f(t + h / 2, y + h / 2 * k, args), None

        return jax.lax.scan(body, y0, jnp.arange(steps, dtype=jnp.float32))[0]

    def with_diffrax(y0, args, **options):
        return diffrax.diffeqsolve(diffrax.ODETerm(f), diffrax.Midpoint(), 0.0, 1.0, y0=y0, args=args, **options).ys[-1]

    def tuned(y0, args):
        controller = diffrax.StepTo(ts=np.linspace(0, 1, steps + 1))
        return with_diffrax(y0, args, dt0=None, stepsize_controller=controller, throw=False, max_steps=steps)

    return {
        "hand-written scan": scan,
        "jode": lambda y0, args: jode.odeint(f, y0, (0.0, 1.0), args, solver=jode.Fixed(jode.midpoint, steps))[-1],
        "diffrax, default": lambda y0, args: with_diffrax(y0, args, dt0=h),
        "diffrax, tuned": tuned,
        "jax.experimental.ode (adaptive: fewer, other steps)": lambda y0, args: odeint(
            lambda y, t, a: f(t, y, a), y0, jnp.array([0.0, 1.0]), args, rtol=1e-4, atol=1e-4
        )[-1],
        "bare f": lambda y0, args: jax.lax.fori_loop(0, 2 * steps, lambda i, y: y + 1e-9 * f(0.0, y, args), y0),
    }


if __name__ == "__main__":
    main()
