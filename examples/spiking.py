"""A hundred neurons fire at their own times, and one learns to fire when it is told to: gradients through every spike.

Leaky integrate-and-fire neurons, τ v' = I(t) - v, that spike at v = 1 and start again from 0: events that reset. The current of the
hundred rises from neuron to neuron. The current of the last one is a sum of bumps whose weights are trained, by the exact gradient
through the resets, until its spikes are at given times.

python examples/spiking.py
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jode

jax.config.update("jax_enable_x64", True)

END, MOST, TAU = 10.0, 24, 1.0
SPIKE = jode.Event(lambda t, v, args: v - 1.0, direction=1, most=MOST, reset=lambda t, v, args: 0.0 * v)
SOLVER = jode.Adaptive(jode.tsit5, 1e-8, 1e-8)
CENTRES = jnp.linspace(0.0, END, 21)
TARGETS = jnp.array([1.2, 2.0, 4.5, 5.0, 5.5, 7.8, 8.8])


def main(steps: int = 400, out: str = "spiking.png") -> None:
    currents = jnp.linspace(0.9, 3.0, 100)
    population = jax.jit(jax.vmap(lambda i: spikes(lambda t, i: i, i)))(currents)
    print(f"{int(population.count.sum())} spikes of {len(currents)} neurons, {int(population.count.max())} at most")

    weights, optimizer = jnp.full(len(CENTRES), 0.8), optax.adam(optax.cosine_decay_schedule(0.03, steps))
    state, first, losses = optimizer.init(weights), spikes(bumps, weights), []
    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(steps):
        value, gradient = step(weights)
        updates, state = optimizer.update(gradient, state)
        weights = optax.apply_updates(weights, updates)
        losses.append(float(value))
    last = spikes(bumps, weights)
    off = np.abs(np.asarray(last.t[: len(TARGETS)] - TARGETS)).max()
    print(f"the trained neuron fires {int(last.count)} times, at most {off:.2g} from its targets")
    draw(population, first, last, weights, losses, out)


def spikes(current, args):
    """The spikes of a neuron with this current."""
    return jode.solve(lambda t, v, args: (current(t, args) - v) / TAU, 0.0, (0.0, END), args, solver=SOLVER, observe=SPIKE).observed


def bumps(t, weights):
    return weights @ jnp.exp(-0.5 * ((t - CENTRES) / 0.35) ** 2)


def loss(weights):
    """How far the first spikes are from their targets, and how long before the end others are."""
    found = spikes(bumps, weights)
    times = jnp.where(jnp.isfinite(found.t), found.t, END)
    n = len(TARGETS)
    return jnp.mean((times[:n] - TARGETS) ** 2) + 0.02 * jnp.sum((END - times[n:]) ** 2) + 1e-5 * jnp.sum(weights**2)


def draw(population, first, last, weights, losses, out):
    fig, (left, right, far) = plt.subplots(1, 3, figsize=(12, 3.4), width_ratios=[1.5, 1.5, 1], layout="constrained")
    for i, t in enumerate(np.asarray(population.t)):
        left.plot(t, np.full(t.shape, i), "|", color="tab:blue", ms=3)
    left.set(xlabel="time", ylabel="neuron", title="A hundred neurons, currents 0.9 to 3")
    t = jnp.linspace(0.0, END, 400)
    right.plot(t, jax.vmap(lambda t: bumps(t, weights))(t), color="tab:blue", lw=2, label="current, trained")
    for found, height, color, label in ((first, -0.5, "0.6", "spikes before"), (last, -1.0, "tab:blue", "spikes after")):
        at = np.asarray(found.t[: int(found.count)])
        right.plot(at, np.full(at.shape, height), "|", ms=14, mew=2, color=color, label=label)
    right.plot(TARGETS, np.full(TARGETS.shape, -1.5), "v", color="tab:red", label="targets")
    right.set(xlabel="time", title="One learns when to fire", ylim=(-2, 4))
    right.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    far.semilogy(losses, color="tab:blue", lw=2)
    far.set(xlabel="iteration", title="Loss")
    for ax in (left, right, far):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="spiking.png")
    main(**vars(parser.parse_args()))
