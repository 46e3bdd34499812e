"""A ball is thrown so that its fifth landing is in a cup: gradients through every bounce.

Air slows the ball by its drag, the ground takes a fifth of its upward and a tenth of its forward speed at each bounce: an event,
the height crossing zero, that resets the speed. One solve goes through all bounces, and its gradients are exact, so an optimiser
of first order finds the throw.

python examples/events.py
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jode

jax.config.update("jax_enable_x64", True)

DRAG, GRAVITY, BOUNCES, CUP = 0.03, 9.81, 4, 12.0
SOLVER = jode.Adaptive(jode.dopri5, 1e-9, 1e-9, max_steps=256)
KEPT = jnp.array([1.0, 0.0, 0.9, -0.8])  # at a bounce, of (x, height, their speeds)
GROUND = jode.Event(lambda t, y, args: y[1], direction=-1, most=BOUNCES + 1, reset=lambda t, y, args: KEPT * y)


def main(steps: int = 120, out: str = "events.png") -> None:
    throw = jnp.array([3.0, 5.0])  # forward and upward speed, m/s
    first, optimizer = throw, optax.adam(0.08)
    state, missed = optimizer.init(throw), []
    step = jax.jit(partial(descend, optimizer=optimizer))
    for _ in range(steps):
        throw, state, x = step(throw, state)
        missed.append(abs(float(x) - CUP))
    error = abs(float(landings(throw).y[-1, 0]) - CUP)
    print(f"throw {np.round(throw, 3)} m/s lands {1000 * error:.3f} mm from the cup after {BOUNCES} bounces")
    draw(first, throw, missed, out)


def descend(throw, state, optimizer):
    (_, x), gradient = jax.value_and_grad(loss, has_aux=True)(throw)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(throw, updates), state, x


def loss(throw):
    """Squared distance from the cup at the last landing, and a little for the energy of the throw."""
    x = landings(throw).y[-1, 0]
    return (x - CUP) ** 2 + 1e-5 * jnp.sum(throw**2), x


def landings(throw):
    """The times and states in which each flight ends."""
    return flown(throw, GROUND).observed


def flown(throw, observe):
    return jode.solve(fly, jnp.array([0.0, 0.0, *throw]), (0.0, 5.0), solver=SOLVER, observe=observe)


def fly(t, y, args):
    """(x, height, their speeds), with quadratic drag."""
    v = y[2:]
    return jnp.concatenate([v, -DRAG * jnp.sqrt(v @ v) * v - jnp.array([0.0, GRAVITY])])


def draw(first, last, missed, out):
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[2.4, 1], layout="constrained")
    for throw, color, label in ((first, "0.65", "first throw"), (last, "tab:blue", "after gradient descent")):
        ground, path = flown(throw, (GROUND, jode.Dense(256))).observed
        x, height = np.asarray(path(jnp.linspace(0.0, ground.t[-1], 400)))[:, :2].T
        left.plot(x, height, color=color, lw=2, label=label)
        left.plot(ground.y[-1, 0], 0, "o", color=color, ms=8, zorder=3)
    left.axhline(0, color="k", lw=1)
    left.plot([CUP - 0.25, CUP - 0.2, CUP + 0.2, CUP + 0.25], [0.35, 0, 0, 0.35], color="tab:red", lw=2.5, label="cup")
    left.set(xlabel="distance (m)", ylabel="height (m)", title="The fifth landing belongs in the cup")
    left.legend(frameon=False, loc="upper right")
    right.semilogy(1000 * np.array(missed), color="tab:blue", lw=2)
    right.set(xlabel="iteration", ylabel="distance from the cup (mm)", title="Where it lands")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", default="events.png")
    main(**vars(parser.parse_args()))
