"""How often do things happen? The rate of a Poisson process, read off a latent ODE that carries the rate's integral as a state.

    python examples/poisson.py        # a minute

Learns from event times alone: log p = Σ log λ(t_i) - ∫ λ dt (Chen et al. 2018, §5). Compares the learned rate with the true one on
events that were not learned from. Saves poisson.png.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import jode
from jode import train
from jode.data_series import poisson_process
from jode.models.poisson import PoissonODE

SPAN, LEVEL, SWING, SPEED, ROUND = (0.0, 10.0), 6.0, 0.8, 1.3, 50
BOUND, CAPACITY = LEVEL * (1 + SWING), 171  # 108 events before thinning, and six standard deviations
TRAINING, TOLERANT = jode.Fixed(jode.rk4, 1), jode.Adaptive(jode.tsit5, 1e-6, 1e-6)
BLUE, RED, INK = "#2d6ca2", "#c6553b", "#22303c"


def rate(t):
    return LEVEL * (1 + SWING * jnp.sin(SPEED * t))


def integral(t):
    return LEVEL * (t + SWING / SPEED * (1 - jnp.cos(SPEED * t)))


def draw(key, n):
    return jax.vmap(lambda k: poisson_process(k, rate, SPAN, BOUND, CAPACITY))(jax.random.split(key, n))


def loss(model, key, events, seen, solver=TRAINING):
    def one(ts, mask):
        return model.log_likelihood(SPAN, ts, mask, solver=solver, adjoint=jode.Backprop(None)).value

    return -jnp.mean(jax.vmap(one)(events, seen))


def fitted(events, seen, iterations):
    """The model that explains the events best."""
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(1e-2, iterations, 0.02)))
    model = PoissonODE(key=jax.random.key(1))
    carry = model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)), jax.random.key(2)
    run = train.updates(loss, optimizer, ROUND)
    with tqdm(total=iterations // ROUND * ROUND, ncols=80, desc="events") as bar:
        for _ in range(iterations // ROUND):
            carry, losses = run(carry, events, seen)
            bar.update(ROUND)
            bar.set_postfix(loss=f"{losses[-1]:.2f}")
    return carry[0]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--iterations", type=int, default=1000)
    p.add_argument("--out", default="poisson.png")
    args = p.parse_args()
    events, seen = draw(jax.random.key(0), 30)
    model = fitted(events, seen, args.iterations)
    other = draw(jax.random.key(5), 200)
    found = -float(loss(model, None, *other, TOLERANT))  # not by the steps it was trained with: a model can learn their error
    true = float(jnp.sum(jnp.where(other[1], jnp.log(rate(other[0])), 0.0)) / len(other[0]) - integral(SPAN[1]))
    total = float(model.log_likelihood(SPAN, events[0], seen[0], solver=TOLERANT).integral)
    print(f"log-likelihood of unseen events: learned {found:.3f}, true rate {true:.3f}")
    print(f"events expected: learned {total:.2f}, true {integral(SPAN[1]):.2f}, counted {float(jnp.mean(jnp.sum(seen, 1))):.2f}")
    figure(model, np.asarray(events), np.asarray(seen), found, true, args.out)
    print(f"figure: {args.out}")


def figure(model, events, seen, found, true, out):
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    fig, (a, b) = plt.subplots(2, 1, figsize=(9, 6), layout="constrained", sharex=True, height_ratios=(2, 1))
    ts = jnp.linspace(*SPAN, 501)
    a.plot(ts, rate(ts), color=BLUE, lw=6, alpha=0.25, label="true rate")
    counts, edges = np.histogram(events[seen], bins=40, range=SPAN)
    a.stairs(counts / len(events) / np.diff(edges), edges, color=INK, alpha=0.35, label="events counted in 40 bins")
    a.plot(ts, jnp.exp(model.log_rates(SPAN[0], ts, solver=TOLERANT)), color=RED, lw=2, label="learned rate")
    a.set(ylabel="events per unit of time", ylim=(0, None))
    a.set_title(f"Log-likelihood of unseen events: {found:.2f} learned, {true:.2f} by the true rate")
    a.legend(ncols=3, loc="upper right", bbox_to_anchor=(1, 1.02))
    a.set_ylim(0, 1.25 * a.get_ylim()[1])
    b.eventplot([x[m] for x, m in zip(events, seen, strict=True)], colors=INK, lw=0.7, linelengths=0.7)
    b.set(xlabel="time", ylabel="series", xlim=SPAN, title=f"What was learned from: {len(events)} series of event times")
    fig.savefig(out, dpi=160)


if __name__ == "__main__":
    main()
