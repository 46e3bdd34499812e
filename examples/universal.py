"""Half the equation known, half learned: a universal differential equation of predators and prey, from noisy, irregular data.

    python examples/universal.py        # half a minute

Known: prey grow and predators die, at known rates. Unknown: what happens when they meet; a small network learns it from one noisy
series. Multiple shooting fits it in short segments, joined by a penalty that grows. Saves universal.png.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from tqdm import tqdm

import jode
from jode import train
from jode.data_series import Ecology, lotka_volterra, predators_and_prey
from jode.models.universal import Universal, multiple_shooting

SEGMENTS, SPAN, LATER, ROUND, SOLVER = 12, 10.0, 8.0, 100, jode.Fixed(jode.rk4, 2)
BLUE, RED, INK = "#2d6ca2", "#c6553b", "#22303c"
Y0, TRUE = jnp.array([0.9, 1.8]), Ecology()


def known(t, y, rates):
    """Growth and death, without meetings. Were the rates trained as well, network and rates could trade linear terms."""
    return jnp.stack([rates[0] * y[0], -rates[1] * y[1]])


def loss(fit, key, ts, ys, weight):
    """Misfit of logarithms, since noise is relative; a penalty that joins segments."""
    model, starts = fit
    shots = multiple_shooting(Universal.field, starts, ts, model, solver=SOLVER, adjoint=jode.Backprop(None))
    misfit = jnp.mean(jnp.abs(jnp.log(jnp.maximum(shots.ys, 1e-3) / ys)) ** 2)
    return misfit + weight * jnp.mean(shots.gaps**2)


def fitted(noisy, rounds, bar):
    """The model and the states at the starts of segments, the weight of the joints growing from 0.1 to 100."""
    positive = jnp.maximum(noisy.ys, 0.05)
    model = Universal(known, (TRUE.alpha, TRUE.delta), 2, width=12, scale=2.0, key=jax.random.key(1))
    fit = model, positive[: -1 : (len(noisy.ts) - 1) // SEGMENTS]
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, rounds * ROUND, 0.02))
    run = train.updates(loss, optimizer, ROUND)
    carry = fit, optimizer.init(eqx.filter(fit, eqx.is_inexact_array)), jax.random.key(2)
    for weight in jnp.geomspace(0.1, 100.0, rounds):
        carry, losses = run(carry, noisy.ts, positive, weight)
        bar.update(ROUND)
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return carry[0]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--iterations", type=int, default=10_000)
    p.add_argument("--out", default="universal.png")
    args = p.parse_args()
    noisy, _ = lotka_volterra(jax.random.key(0), Y0, points=121, span=SPAN)
    rounds = max(args.iterations // ROUND, 2)
    with tqdm(total=rounds * ROUND, ncols=80, desc="multiple shooting") as bar:
        model, starts = fitted(noisy, rounds, bar)
    fine = jnp.linspace(0.0, SPAN + LATER, 721)
    path = jode.odeint(Universal.field, starts[0], fine, model)
    true = jode.odeint(predators_and_prey, Y0, fine, TRUE)
    gaps = multiple_shooting(Universal.field, starts, noisy.ts, model, solver=SOLVER).gaps
    errors = [float(jnp.sqrt(jnp.mean((path - true)[where] ** 2))) for where in (fine <= SPAN, fine > SPAN)]
    print(f"error within the data {errors[0]:.3f}, later {errors[1]:.3f}; largest gap {jnp.max(jnp.abs(gaps)):.4f}")
    figure(noisy, fine, path, true, model, errors, args.out)
    print(f"figure: {args.out}")


def figure(noisy, fine, path, true, model, errors, out):
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    fig, (a, b) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained", width_ratios=(1.7, 1))
    for k, (name, color) in enumerate((("prey", BLUE), ("predators", RED))):
        a.plot(fine, true[:, k], color=color, lw=5, alpha=0.25)
        a.plot(fine, path[:, k], color=color, lw=1.6, label=name)
        a.plot(noisy.ts, noisy.ys[:, k], "o", color=color, ms=3.5, mec="white", mew=0.4)
    a.axvspan(SPAN, SPAN + LATER, color="#8a8f98", alpha=0.12, lw=0)
    a.text(SPAN + 0.2, 5.3, "later than all data", va="top", color=INK)
    a.set(xlabel="time", ylabel="population", xlim=(0, SPAN + LATER), ylim=(0, 5.5))
    a.set_title(f"One series (dots), fit (lines), truth (wide): error {errors[0]:.2f}, later {errors[1]:.2f}")
    a.legend(loc="upper left", ncols=2)
    learned, meetings = jax.vmap(model.unknown)(true[fine <= SPAN]), jnp.prod(true[fine <= SPAN], 1)
    for k, (rate, name, color) in enumerate(((-TRUE.beta, "prey", BLUE), (TRUE.gamma, "predators", RED))):
        b.plot(meetings, rate * meetings, color=color, lw=5, alpha=0.25, solid_capstyle="round")
        b.plot(meetings, learned[:, k], ".", color=color, ms=3, label=f"to {name}")
    b.axhline(0, color=INK, lw=0.6, zorder=0)
    b.set(xlabel="prey x predators", ylabel="rate of change", title="What meetings do: learned (dots), truth (wide)")
    b.legend(loc="upper left", markerscale=3)
    fig.savefig(out, dpi=160)


if __name__ == "__main__":
    main()
