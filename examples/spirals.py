"""Where does a spiral go? A latent ODE sees thirty noisy points and draws what came before, between and after (Chen et al. 2018).

    python examples/spirals.py        # three minutes

An encoder reads the points backwards in time; an ODE carries the latent state both ways from there. Saves spirals.png.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from tqdm import tqdm

from jode import train
from jode.data_series import Series, spirals, subsample
from jode.models.series import LatentODE, elbo

SEEN, BATCH, ROUND, RATE, COLORS, INK = 30, 200, 100, 2e-2, ("#2d6ca2", "#c6553b"), "#22303c"


def draw(key, n):
    """What is observed of each spiral, what the likelihood is of (that and the later points), and the truth."""
    a, b = jax.random.split(key)
    noisy, clean = spirals(a, n)
    window = jax.tree.map(lambda x: x[:, :100], noisy)
    seen = jax.vmap(lambda k, s: subsample(k, s, SEEN))(jax.random.split(b, n), window)
    both = Series(*(jnp.concatenate([x, y[:, 100:]], 1) for x, y in zip(seen, noisy, strict=True)))
    return seen, both._replace(mask=jnp.ones_like(both.mask)), clean


def loss(model, key, seen, targets):
    a, b = jax.random.split(key)
    chosen = jax.random.randint(a, (BATCH,), 0, len(seen.ts))
    seen, targets = jax.tree.map(lambda x: x[chosen], (seen, targets))
    bound = jax.vmap(lambda k, s, t: elbo(model, k, s, t).value)(jax.random.split(b, BATCH), seen, targets)
    return -jnp.mean(bound) / targets.ts.shape[1]


def fitted(model, key, data, rounds):
    rates = optax.warmup_cosine_decay_schedule(0.0, RATE, 5 * rounds, rounds * ROUND, RATE / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates))
    carry = model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)), key
    run = train.updates(loss, optimizer, ROUND)
    with tqdm(total=rounds * ROUND, ncols=80, desc="spirals") as bar:
        for _ in range(rounds):
            carry, losses = run(carry, *data)
            bar.update(ROUND)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return carry[0]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--iterations", type=int, default=4000)
    p.add_argument("--out", default="spirals.png")
    args = p.parse_args()
    a, b, c, d = jax.random.split(jax.random.key(0), 4)
    model = fitted(LatentODE(2, key=c), d, draw(a, 1000)[:2], max(args.iterations // ROUND, 1))
    seen, _, clean = draw(b, 1000)
    found = eqx.filter_jit(jax.vmap(lambda s: model.predict(s, 0.0, clean.ts[0])))(seen)
    errors = [float(jnp.sqrt(jnp.mean(part**2))) for part in jnp.split(found - clean.ys, 2, axis=1)]
    print(f"1,000 unseen spirals, {SEEN} points each: RMSE {errors[0]:.3f} within the window, {errors[1]:.3f} at the later points")
    figure(model, seen, clean, errors, args.out)
    print(f"figure: {args.out}")


@eqx.filter_jit
def drawn(model, series, ts, keys):
    mean, std = model.encoder(series, 0.0)
    return jax.vmap(lambda k: model.extrapolate(mean + std * jax.random.normal(k, mean.shape), 0.0, ts))(keys)


def figure(model, seen, clean, errors, out):
    plt.rcParams.update({"font.size": 10, "legend.frameon": False})
    fig, axes = plt.subplots(2, 4, figsize=(13, 7.4), layout="constrained", sharex=True, sharey=True)
    ts = jnp.concatenate([jnp.linspace(-0.6, 0.0, 30)[:-1], clean.ts[0]])  # from a little before the first observation
    keys = jax.random.split(jax.random.key(3), 20)
    for i, ax in enumerate(axes.flat):
        row, color = 40 * i + 500 * (i // 4), COLORS[i // 4]  # the first half of the set is clockwise
        series = jax.tree.map(lambda x, row=row: x[row], seen)
        ax.plot(*drawn(model, series, ts, keys).T, color=color, lw=0.6, alpha=0.35)
        ax.plot(*clean.ys[row, :100].T, color=INK, lw=1.4, label="truth, observed window")
        ax.plot(*clean.ys[row, 100:].T, color=INK, lw=1.4, ls=(0, (2, 1.5)), label="truth, later")
        ax.plot(*series.ys.T, "o", color=INK, ms=3, mec="white", mew=0.4, label=f"{SEEN} noisy observations")
        ax.plot([], [], color=color, lw=1, label="20 samples of the latent ODE (blue, red)")
        ax.set(aspect="equal", xlim=(-5.4, 5.4), ylim=(-5.4, 5.4))
        ax.set_axis_off()
        ax.set_title(("clockwise", "counter-clockwise")[i // 4] if i % 4 == 0 else "", loc="left", color=INK)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    fig.suptitle(
        f"Spirals not learned from: RMSE {errors[0]:.2f} within the window, {errors[1]:.2f} at the later points (noise 0.30)"
    )
    fig.savefig(out, dpi=160)


if __name__ == "__main__":
    main()
