"""Rates of an ODE from noisy data: Levenberg-Marquardt by a forward Jacobian beside Adam by a gradient, with error bars.

Predators and prey (Lotka-Volterra) are observed at 41 times with noise of 5 %. The unknowns are the logarithms of four rates
and two initial states. Residuals r(p) = log(y / data) / σ, loss ½|r|². The covariance of the estimate is the inverse of the
Hessian of the loss, by `jax.hessian`, exact to rounding.

python examples/levenberg_marquardt.py
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix

import jode

jax.config.update("jax_enable_x64", True)

TS, SIGMA = jnp.linspace(0.0, 12.0, 41), 0.05
TRUE = jnp.log(jnp.array([1.1, 0.4, 0.8, 0.3, 4.0, 2.0]))
START = jnp.log(jnp.array([0.9, 0.5, 1.0, 0.4, 3.0, 3.0]))
NAMES = ("growth", "predation", "death", "breeding", "prey at 0", "predators at 0")


def field(t, y, a):
    return jnp.stack([a[0] * y[0] - a[1] * y[0] * y[1], a[3] * y[0] * y[1] - a[2] * y[1]])


def solution(p, ts=TS):
    a = jnp.exp(p)
    return jode.odeint(field, a[4:], ts, a[:4], solver=jode.Adaptive(jode.tsit5, 1e-8, 1e-8))


DATA = jnp.log(solution(TRUE)) + SIGMA * jax.random.normal(jax.random.key(0), (41, 2))
residual = lambda p: ((jnp.log(solution(p)) - DATA) / SIGMA).ravel()
loss = jax.jit(lambda p: 0.5 * jnp.sum(residual(p) ** 2))


def levenberg_marquardt(iterations=15):
    """Optimistix takes the Jacobian by columns, forward derivatives, of one linearisation."""
    f, solver = lambda p, _: (residual(p), None), optimistix.LevenbergMarquardt(1e-10, 1e-10)
    state = solver.init(f, START, None, {}, jax.eval_shape(lambda: residual(START)), None, frozenset())
    return path(eqx.filter_jit(lambda p, state: solver.step(f, p, None, {}, state, frozenset())[:2]), state, iterations)


def adam(iterations):
    slope, optimiser = jax.grad(loss), optax.adam(0.02)

    def step(p, state):
        updates, state = optimiser.update(slope(p), state)
        return optax.apply_updates(p, updates), state

    return path(jax.jit(step), optimiser.init(START), iterations)


def path(step, state, iterations):
    """The points and the seconds since the start, compilation apart."""
    p, points, seconds = START, [START], [0.0]
    jax.block_until_ready(step(p, state))
    start = time.perf_counter()
    for _ in range(iterations):
        p, state = jax.block_until_ready(step(p, state))
        points.append(p)
        seconds.append(time.perf_counter() - start)
    return points, np.array(seconds)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=1500, help="of Adam")
    parser.add_argument("--out", default="levenberg_marquardt.png")
    given = parser.parse_args()
    paths = {"Levenberg-Marquardt": levenberg_marquardt(), "Adam": adam(given.iterations)}
    best = paths["Levenberg-Marquardt"][0][-1]
    bars = jnp.sqrt(jnp.diag(jnp.linalg.inv(jax.jit(jax.hessian(loss))(best))))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    fine = jnp.linspace(0.0, 12.0, 400)
    for i, (name, colour) in enumerate({"prey": "C0", "predators": "C1"}.items()):
        left.plot(TS, jnp.exp(DATA[:, i]), ".", color=colour, alpha=0.5)
        left.plot(fine, solution(best, fine)[:, i], color=colour, label=name)
    left.set(xlabel="t", title="data and fit")
    left.legend(frameon=False)
    for name, (points, seconds) in paths.items():
        excess = np.array([loss(p) - loss(best) for p in points])
        near = np.flatnonzero(excess < 0.01)
        reached = f"{near[0]} iterations, {seconds[near[0]] * 1e3:.0f} ms" if len(near) else f"not in {len(points) - 1} iterations"
        print(f"{name:20s} to within 0.01 of the least loss {loss(best):.3f}: {reached}")
        middle.loglog(seconds[1:] * 1e3, np.maximum(excess[1:], 1e-9), ".-" if len(points) < 50 else "-", label=name)
    middle.set(xlabel="ms", ylabel="loss above the least", title="the way there")
    middle.legend(frameon=False)
    right.errorbar(100 * np.expm1(best - TRUE), range(6), xerr=200 * bars, fmt="o", capsize=3)
    right.axvline(0, color="k", lw=0.8)
    right.set(yticks=range(6), yticklabels=NAMES, xlabel="%", title="estimate from truth, two standard errors")
    for name, estimate, bar, true in zip(NAMES, best, bars, TRUE, strict=True):
        print(f"{name:15s} {np.exp(estimate):.3f} ± {np.exp(estimate) * bar:.3f}   true {np.exp(true):.3f}")
    figure.savefig(given.out, dpi=150)


if __name__ == "__main__":
    main()
