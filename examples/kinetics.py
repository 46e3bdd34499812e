"""Rate constants of stiff reactions from noisy data: by Adam, and by Levenberg-Marquardt, in their logarithms.

Two mechanisms: Robertson's, three species and three rates over nine orders of magnitude (Robertson 1966), and air pollution by
twenty species (POLLU, Verwer 1994), five of whose 25 rates are unknown. Data are concentrations at 25 times with noise of 3 %; the
unknowns start off by factors of up to three. Residuals are r = log(y / data) / σ, the loss is ½|r|².

python examples/kinetics.py
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
from jode.models.kinetics import POLLU_RATES, POLLU_START, ROBERTSON_RATES, pollu, robertson

jax.config.update("jax_enable_x64", True)
SIGMA = 0.03


def mechanism(f, y0, rates, unknown, ts, seen, atol):
    """The concentrations seen at ts as a function of the logarithms of the unknown rates, these, and where they start."""
    solver = jode.Adaptive(jode.rodas5p, 1e-6, atol)
    rates, unknown, seen = jnp.array(rates), jnp.array(unknown), jnp.array(seen)

    def concentrations(p):
        return jode.odeint(f, jnp.array(y0), ts, rates.at[unknown].set(jnp.exp(p)), solver=solver)[1:, seen]

    true = jnp.log(rates[unknown])
    return ts[1:], concentrations, true, true + jax.random.uniform(jax.random.key(1), true.shape, minval=-1.1, maxval=1.1)


MECHANISMS = {
    "Robertson": mechanism(
        robertson, (1.0, 0.0, 0.0), ROBERTSON_RATES, [0, 1, 2], jnp.append(0.0, jnp.logspace(-4, 5, 25)), [0, 1, 2], 1e-10
    ),
    "POLLU": mechanism(
        pollu, POLLU_START, POLLU_RATES, [0, 1, 2, 8, 13], jnp.linspace(0.0, 60.0, 26), [0, 1, 2, 3, 4, 5, 10], 1e-12
    ),
}


def problem(concentrations, true):
    data = jnp.log(concentrations(true))
    data = data + SIGMA * jax.random.normal(jax.random.key(0), data.shape)
    residual = lambda p: ((jnp.log(concentrations(p)) - data) / SIGMA).ravel()
    return data, residual, jax.jit(lambda p: 0.5 * jnp.sum(residual(p) ** 2))


def levenberg_marquardt(residual, start, iterations=15):
    f, solver = lambda p, _: (residual(p), None), optimistix.LevenbergMarquardt(1e-10, 1e-10)
    state = solver.init(f, start, None, {}, jax.eval_shape(lambda: residual(start)), None, frozenset())
    return path(eqx.filter_jit(lambda p, state: solver.step(f, p, None, {}, state, frozenset())[:2]), start, state, iterations)


def adam(loss, start, iterations):
    slope, optimiser = jax.grad(loss), optax.adam(0.03)

    def step(p, state):
        updates, state = optimiser.update(slope(p), state)
        return optax.apply_updates(p, updates), state

    return path(jax.jit(step), start, optimiser.init(start), iterations)


def path(step, p, state, iterations):
    """The points and the seconds since the start, compilation apart."""
    points, seconds = [p], [0.0]
    jax.block_until_ready(step(p, state))
    start = time.perf_counter()
    for _ in range(iterations):
        p, state = jax.block_until_ready(step(p, state))
        points.append(p)
        seconds.append(time.perf_counter() - start)
    return points, np.array(seconds)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=500, help="of Adam")
    parser.add_argument("--out", default="kinetics.png")
    given = parser.parse_args()
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for (name, (ts, concentrations, true, start)), row in zip(MECHANISMS.items(), axes, strict=True):
        data, residual, loss = problem(concentrations, true)
        paths = {"Levenberg-Marquardt": levenberg_marquardt(residual, start), "Adam": adam(loss, start, given.iterations)}
        best = paths["Levenberg-Marquardt"][0][-1]
        bars = jnp.sqrt(jnp.diag(jnp.linalg.inv(jax.jit(jax.hessian(loss))(best))))
        draw(name, row, ts, data, concentrations(best), paths, loss, best - true, bars)
    figure.savefig(given.out, dpi=150)


def draw(name, row, ts, data, fit, paths, loss, off, bars):
    for i in range(data.shape[1]):
        row[0].semilogy(ts, jnp.exp(data[:, i]), ".", color=f"C{i}", alpha=0.6)
        row[0].semilogy(ts, fit[:, i], color=f"C{i}")
    row[0].set(xlabel="t", title=f"{name}: data and fit", xscale="log" if ts[-1] > 1e4 * ts[0] else "linear")
    least = loss(paths["Levenberg-Marquardt"][0][-1])
    for how, (points, seconds) in paths.items():
        excess = np.array([loss(p) - least for p in points])
        near = np.flatnonzero(excess < 0.01)
        reached = f"{near[0]} iterations, {seconds[near[0]] * 1e3:.0f} ms" if len(near) else f"not in {len(points) - 1} iterations"
        print(f"{name:10s} {how:20s} to within 0.01 of the least loss {least:.2f}: {reached}")
        row[1].loglog(seconds[1:] * 1e3, np.maximum(excess[1:], 1e-6), ".-" if len(points) < 50 else "-", label=how)
    row[1].set(xlabel="ms", ylabel="loss above the least", title="the way there")
    row[1].legend(frameon=False)
    row[2].errorbar(100 * np.expm1(off), range(len(off)), xerr=200 * bars, fmt="o", capsize=3)
    row[2].axvline(0, color="k", lw=0.8)
    row[2].set(xlabel="%", yticks=range(len(off)), ylabel="unknown rate", title="estimates from truth, two standard errors")


if __name__ == "__main__":
    main()
