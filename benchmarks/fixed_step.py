"""Fixed steps, forward and gradient: what does a solve cost beside the scan one would write by hand?

python -m benchmarks.fixed_step
"""

from functools import partial

from benchmarks.measure import best, compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

import jode
from benchmarks.adaptive_gradient import PROBLEMS


def main(quick=False):
    rows = []
    for name, (f, y0, args, steps, batched) in problems().items():
        if quick and name.startswith(("MLP 512", "MLP 64-128-64, batch", "convolution")):
            continue
        for what, peers in (("forward", forward(f, steps)), ("gradient", gradients(f, steps))):
            print(f"{name}, {what} …", flush=True)
            programs, costs = {}, {}
            for peer, solve in peers.items():
                if what == "gradient" and "odeint" in peer and "512" in name:
                    continue
                run = jax.vmap(solve, (0, None)) if batched else solve
                programs[peer], costs[peer] = compiled(run if what == "forward" else partial(gradient, run), y0, args, quick=quick)
            times = race(programs, y0, args, repeats=5 if quick else 21, seconds=0.3 if quick else 2.0)
            hand = ravel(programs["hand-written scan"](y0, args))
            fair = best(times, "diffrax")
            for peer, seconds in times.items():
                gap = "–" if peer == "bare f" else f"{relative(ravel(programs[peer](y0, args)), hand):.1e}"
                memory = programs[peer].memory_analysis().temp_size_in_bytes / 2**20
                ratios = [f"{seconds / times['hand-written scan']:.3f}", f"{fair / seconds:.2f}"]
                rows.append([name, what, peer, f"{seconds * 1e3:.3f}", *ratios, gap, f"{memory:.2f}", f"{costs[peer]:.2f}"])
    columns = ["problem", "what", "solver", "ms", "time / scan", "times as fast as the best diffrax", "difference from the scan"]
    title = "Midpoint, fixed steps, float32 (odeint: adaptive, rtol = atol = 1e-4)"
    report("fixed_step", title, [*columns, "temporaries MiB", "trace + compile s"], rows, quick)


def ravel(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def relative(found, true):
    return np.linalg.norm(found - true) / np.linalg.norm(true)


def gradient(run, y0, args):
    """Of half the sum of squares of y(1), by the state and by the parameters."""
    return jax.grad(lambda y0, args: 0.5 * jnp.sum(run(y0, args) ** 2), (0, 1))(y0, args)


def problems():
    """name: (f, y0, args, steps, whether y0 is a batch)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1), jnp.float32)

    def oscillator(t, y, a):
        return jnp.stack([y[1], -a[0] * y[0] - a[1] * y[1]])

    def perceptron(t, y, w):
        return jnp.tanh(y @ w[0]) @ w[1]

    def convolution(t, y, w):
        """As a matrix product of patches: XLA's own convolution is as fast, but not its derivative by the kernel on a CPU."""
        y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [y[:, i : i + 14, j : j + 14] for i in range(3) for j in range(3)]
        return jnp.tanh(jnp.concatenate(patches, -1) @ w.reshape(-1, 64))

    state, weights = draw(128, 64), (draw(64, 128), draw(128, 64))
    wide, wide_weights = draw(128, 512), (draw(512, 1024), draw(1024, 512))
    kernel = draw(3, 3, 64, 64) / 3
    slopes, start, rates, _ = PROBLEMS["Lotka-Volterra"]
    return {
        "small state, one": (oscillator, jnp.array([1.0, 0.0]), jnp.array([1.0, 0.1]), 1000, False),
        "Lotka-Volterra, one": (lambda t, y, a: jnp.stack(slopes(y, a)), start, rates, 1000, False),
        "small state, 1,000 rows": (oscillator, draw(1000, 2), jnp.array([1.0, 0.1]), 1000, True),
        "MLP 64-128-64, batch 128": (perceptron, state, weights, 100, False),
        "MLP 64-128-64, vmap of 128": (perceptron, state, weights, 100, True),
        "MLP 512-1024-512, vmap of 128": (perceptron, wide, wide_weights, 5, True),
        "convolution, 64 channels": (convolution, draw(8, 14, 14, 64), kernel, 10, False),
    }


def by_hand(f, steps):
    h = 1.0 / steps

    def scan(y0, args):
        def body(y, i):
            t = i * h
            k = f(t, y, args)
            return y + h * f(t + h / 2, y + h / 2 * k, args), None

        return jax.lax.scan(body, y0, jnp.arange(steps, dtype=jnp.float32))[0]

    return scan


def with_diffrax(f, y0, args, **options):
    return diffrax.diffeqsolve(diffrax.ODETerm(f), diffrax.Midpoint(), 0.0, 1.0, y0=y0, args=args, **options).ys[-1]


def tuned(steps):
    """diffrax as its FAQ advises: the steps given, no error check, a bound that is just enough."""
    return {
        "dt0": None,
        "stepsize_controller": diffrax.StepTo(ts=np.linspace(0, 1, steps + 1)),
        "throw": False,
        "max_steps": steps,
    }


def with_jode(f, steps, **options):
    return lambda y0, args: jode.odeint(f, y0, (0.0, 1.0), args, solver=jode.Fixed(jode.midpoint, steps), **options)[-1]


def adaptive_odeint(f):
    """Another method, with other steps: a mark to go by, left out where its gradient takes minutes."""
    return lambda y0, args: odeint(lambda y, t, a: f(t, y, a), y0, jnp.array([0.0, 1.0]), args, rtol=1e-4, atol=1e-4)[-1]


def forward(f, steps):
    """Functions (y0, args) -> y(1)."""
    return {
        "hand-written scan": by_hand(f, steps),
        "jode": with_jode(f, steps),
        "diffrax, default": lambda y0, args: with_diffrax(f, y0, args, dt0=1.0 / steps),
        "diffrax, tuned": lambda y0, args: with_diffrax(f, y0, args, **tuned(steps)),
        "odeint of jax.experimental (adaptive: fewer, other steps)": adaptive_odeint(f),
        "bare f": lambda y0, args: jax.lax.fori_loop(0, 2 * steps, lambda i, y: y + 1e-9 * f(0.0, y, args), y0),
    }


def gradients(f, steps):
    """Functions (y0, args) -> y(1), by how they are differentiated."""

    def diffrax_with(adjoint):
        return lambda y0, args: with_diffrax(f, y0, args, **tuned(steps), adjoint=adjoint)

    back = diffrax.BacksolveAdjoint(solver=diffrax.Midpoint(), stepsize_controller=diffrax.ConstantStepSize())
    return {
        "hand-written scan": by_hand(f, steps),
        "jode, Backprop()": with_jode(f, steps),
        "jode, MemoryFree()": with_jode(f, steps, adjoint=jode.MemoryFree()),
        "diffrax, default": lambda y0, args: with_diffrax(f, y0, args, dt0=1.0 / steps),
        "diffrax, tuned": diffrax_with(diffrax.RecursiveCheckpointAdjoint()),
        "diffrax, tuned, every step a checkpoint": diffrax_with(diffrax.RecursiveCheckpointAdjoint(checkpoints=steps)),
        "diffrax, DirectAdjoint": diffrax_with(diffrax.DirectAdjoint()),
        "diffrax, BacksolveAdjoint": lambda y0, args: with_diffrax(
            f, y0, args, dt0=1.0 / steps, throw=False, max_steps=steps + 2, adjoint=back
        ),
        "odeint of jax.experimental (adaptive: fewer, other steps)": adaptive_odeint(f),
    }


if __name__ == "__main__":
    main()
