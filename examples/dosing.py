"""When to give how much? Twelve doses that keep a thousand patients in a therapeutic window, found by gradients through jumps.

Two compartments, blood and tissue. A dose is a jump of the amount in the blood. Every patient has rates of their own; all get one
schedule. The loss is the squared violation of the window from the second hour on, and a price for the total dose. Its integral is a
third component of the state: a sum over save times would not notice a dose that moves between them. Saves dosing.png.

python examples/dosing.py
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jode

PATIENTS, DOSES, END, ONSET = 1000, 12, 48.0, 2.0  # hours
LOW, HIGH, PRICE = 4.0, 8.0, 2e-4
HOURS = np.linspace(0.0, END, 961)
RATES = jnp.array([0.12, 0.25, 0.2]) * jnp.exp(0.2 * jax.random.normal(jax.random.key(0), (PATIENTS, 3)))  # out, to tissue, back
START = jnp.arange(DOSES) * END / DOSES, jnp.log(jnp.full(DOSES, 5.0))  # the same dose every four hours
BLUE, RED, GREEN = "#2d6ca2", "#c6553b", "#5b9a68"


def violation(blood):
    return jnp.maximum(jnp.maximum(LOW - blood, blood - HIGH), 0)


def field(t, y, k):
    blood, tissue, _ = y
    harm = jnp.where(t >= ONSET, violation(blood) ** 2, 0)
    return jnp.stack([k[2] * tissue - (k[0] + k[1]) * blood, k[1] * blood - k[2] * tissue, harm])


def dose(t, y, k, amount):
    return y.at[0].add(amount)


def states(schedule, hours):
    """Of each patient: what is in blood and tissue, and the violation so far, (patients, hours, 3)."""
    jumps, solver = (schedule[0], dose, jnp.exp(schedule[1])), jode.Adaptive(jode.tsit5, 1e-5, 1e-5)
    one = lambda k: jode.odeint(field, jnp.zeros(3), hours, k, solver=solver, stops=[ONSET], jumps=jumps)
    return jax.vmap(one)(RATES)


def loss(schedule):
    return jnp.mean(states(schedule, (0.0, END))[:, -1, 2]) / (END - ONSET) + PRICE * jnp.sum(jnp.exp(schedule[1]))


def fitted(schedule, iterations):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, iterations))

    @jax.jit
    def update(schedule, state):
        value, slope = jax.value_and_grad(loss)(schedule)
        updates, state = optimizer.update(slope, state)
        times, logs = optax.apply_updates(schedule, updates)
        return (jnp.clip(times, 0, END - 0.1), logs), state, value  # one that comes before the start would not be given

    state = optimizer.init(schedule)
    for _ in range(iterations):
        schedule, state, value = update(schedule, state)
    print(f"loss {value:.4f} after {iterations} iterations")
    return schedule


def show(axis, name, schedule):
    blood = jax.jit(states)(schedule, HOURS)[:, :, 0]
    inside = violation(blood[:, HOURS >= ONSET]) == 0
    title = f"{name}: {jnp.mean(inside):.0%} of all hours in the window, total dose {jnp.sum(jnp.exp(schedule[1])):.0f}"
    print(f"{title}; {jnp.mean(inside.mean(1) >= 0.9):.0%} of patients are there nine tenths of the time")
    low, quarter, middle, three, high = np.quantile(blood, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    axis.axhspan(LOW, HIGH, color=GREEN, alpha=0.13, lw=0)
    axis.fill_between(HOURS, low, high, color=BLUE, alpha=0.2, lw=0, label="90% of patients")
    axis.fill_between(HOURS, quarter, three, color=BLUE, alpha=0.35, lw=0, label="half of them")
    axis.plot(HOURS, middle, color=BLUE, lw=1.5, label="median")
    axis.vlines(schedule[0], 0, jnp.exp(schedule[1]) / 4, color=RED, lw=2.5)
    axis.set(title=title, xlabel="hours", xlim=(-0.5, END + 0.2), ylim=(0, 15), xticks=np.arange(0, END + 1, 6))
    axis.spines[["top", "right"]].set_visible(False)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--out", default="dosing.png")
    given = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True, layout="constrained")
    show(axes[0], "before", START)
    show(axes[1], "after", fitted(START, given.iterations))
    axes[0].set_ylabel("amount in the blood")
    axes[0].text(END - 0.3, LOW - 0.1, "therapeutic window", color=GREEN, ha="right", va="top", fontsize=9)
    axes[1].text(1.8, 1.6, "doses", color=RED, fontsize=9)
    axes[0].legend(frameon=False, loc="upper left", fontsize=9, ncols=3)
    figure.savefig(given.out, dpi=150)


if __name__ == "__main__":
    main()
