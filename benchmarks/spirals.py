"""Does a latent ODE predict spirals better than a recurrent network of its size? (Chen et al. 2018, Table 2)

Spirals: 1,000 Archimedean spirals, half of them clockwise, 500 angles in three turns; a series is 200 consecutive points, each coordinate
with noise 0.3. Of the first 100 points 30, 50 or all are observed, drawn without replacement. Models are trained on the likelihood
of the observed points and of the 100 later ones of 1,000 spirals; each update draws the observed points anew (of all 100 it shows a
random part, at least 70 %, or the noise is learned by heart). The horizon of a latent ODE grows while it trains. They are tested on 1,000 others: from the observed points alone, the
root mean square error, by coordinate, against the spiral without noise, at the 100 later points, and at the 100 of the window.
python -m benchmarks spirals
"""

from benchmarks.measure import report

import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jode import train
from jode.data_series import Series, spirals, subsample
from jode.models.recurrent import RNN, GRUDecay, of_size, parameters
from jode.models.series import ODERNN, LatentODE, elbo

ITERATIONS, BATCH, SEEDS = 6000, 100, 5
LATENT = "latent ODE, ODE-RNN"  # its encoder's state flows between irregular observations
RATES = {LATENT: 1e-2, "RNN": 2e-2}  # Adam's peak rate; of 1e-2 and 2e-2 the better for each
REACHES = {LATENT: (2.0, 4.0, 6.0, 8.0, 8.0), "RNN": (8.0,) * 5}  # the last time that counts, by fifths of training; 8 is all
SHOWN = {30: 1.0, 50: 1.0, 100: 0.7}  # the least part of the observed points that an update shows
PAPER = {30: (0.1642, 0.3937), 50: (0.1502, 0.3202), 100: (0.1346, 0.1813)}  # latent ODE, RNN
COLUMNS = ["data", "model", "parameters", "RMSE", "RMSE within the window", "each seed", "ms an update"]


def main(quick=False):
    rows = []
    for count in (30,) if quick else PAPER:
        for kind in (LATENT, "RNN"):
            seeds = range(1 if quick else SEEDS)
            found = [spiral(kind, count, seed, ITERATIONS // (40 if quick else 1)) for seed in seeds]
            rows.append(row(f"spirals, {count} points", found, kind))
        for kind, bar in zip(("latent ODE", "RNN"), PAPER[count], strict=True):
            rows.append([f"spirals, {count} points", f"{kind}, Chen et al. 2018", "–", bar, "–", "–", "–"])
    title = f"Spirals, {ITERATIONS:,} updates by {BATCH} series, float32"
    report("spirals", title, COLUMNS, rows, quick)


def row(data, found, kind):
    """Mean and standard deviation over seeds."""
    size, errors, within, ms = zip(*found, strict=True)
    spread = lambda x: f"{np.mean(x):.4f} ± {np.std(x):.4f}" if len(x) > 1 else f"{x[0]:.4f}"
    inside = "–" if within[0] is None else spread(within)
    line = [data, kind, size[0], spread(errors), inside, ", ".join(f"{e:.4f}" for e in errors), f"{np.median(ms):.0f}"]
    print(line, flush=True)
    return line


def models(key, channels, noise, **sizes):
    """A latent ODE, and makers of the others with as many parameters as it has."""
    ode = LatentODE(channels, noise=noise, key=key, **sizes)
    count = parameters(ode)

    def rnn_encoded(hidden, key):
        encoder = partial(ODERNN, width=hidden)
        return LatentODE(channels, noise=noise, encoder=encoder, key=key, **{**sizes, "hidden": hidden})

    return {
        "latent ODE": lambda: ode,
        "latent ODE, ODE-RNN": lambda: of_size(rnn_encoded, count, key=key),
        "RNN": lambda: of_size(partial(RNN, channels), count, key=key),
        "GRU-decay": lambda: of_size(partial(GRUDecay, channels), count, key=key),
    }


def trained(model, loss, key, data, iterations, rate, stages=((), ())):
    """The model after so many updates, and milliseconds an update."""
    rates = optax.warmup_cosine_decay_schedule(0.0, rate, iterations // 20, iterations, rate / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates))
    carry = (model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)), key)
    run = train.updates(loss, optimizer, iterations // len(stages))
    for stage in stages:
        start = time.perf_counter()
        carry, losses = jax.block_until_ready(run(carry, *data, *stage))
    return carry[0], 1e3 * (time.perf_counter() - start) / len(losses)


def rmse(found, true):
    return float(jnp.sqrt(jnp.mean((found - true) ** 2)))


def observed(key, noisy, count, least=1.0):
    """Of a batch of spirals: what is observed, the targets (these and the later points), and those with the observed ones marked."""
    a, b, c = jax.random.split(key, 3)
    window, later = (jax.tree.map(lambda x: x[:, part], noisy) for part in (slice(100), slice(100, None)))
    seen = jax.vmap(lambda k, s: subsample(k, s, count))(jax.random.split(a, len(noisy.ts)), window)
    shown = jax.random.uniform(b, seen.mask.shape) < jax.random.uniform(c, (len(noisy.ts), 1), minval=least)
    targets = Series(*(jnp.concatenate(x, 1) for x in zip(seen, later, strict=True)))
    seen = seen._replace(mask=seen.mask & shown)
    marked = targets._replace(mask=jnp.concatenate([seen.mask, later.mask], 1))
    return seen, targets._replace(mask=jnp.ones_like(targets.mask)), marked


def spiral(kind, count, seed, iterations):
    """Parameters, error at the later points and within the window, milliseconds an update."""
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    (noisy, _), (test, clean) = spirals(a, 1000), spirals(jax.random.fold_in(b, 0), 1000)
    model = models(c, 2, 0.3)[kind]()

    def loss(model, key, series, reach):
        first, then, rows = jax.random.split(key, 3)
        chosen = jax.random.randint(rows, (BATCH,), 0, len(series.ts))
        seen, targets, marked = observed(first, jax.tree.map(lambda x: x[chosen], series), count, SHOWN[count])
        targets = targets._replace(mask=targets.ts <= reach)
        if kind == "RNN":
            return jnp.mean((jax.vmap(model)(marked) - targets.ys) ** 2, where=targets.mask[..., None])
        bound = jax.vmap(partial(elbo, model))(jax.random.split(then, BATCH), seen, targets).value
        return -jnp.sum(bound) / jnp.sum(targets.mask)

    stages = [(jnp.asarray(reach),) for reach in REACHES[kind]]
    model, ms = trained(model, loss, d, (noisy,), iterations, RATES[kind], stages)
    seen, _, marked = observed(jax.random.fold_in(b, 1), test, count)
    if kind == "RNN":
        later = eqx.filter_jit(lambda s: jax.vmap(model)(s))(marked)[:, count:]
        return parameters(model), rmse(later, clean.ys[:, 100:]), None, ms
    path = eqx.filter_jit(jax.vmap(lambda s: model.predict(s, 0.0, clean.ts[0])))(seen)
    return parameters(model), rmse(path[:, 100:], clean.ys[:, 100:]), rmse(path[:, :100], clean.ys[:, :100]), ms


if __name__ == "__main__":
    main()
