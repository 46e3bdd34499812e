"""Does a latent ODE predict spirals and irregular waves better than recurrent networks of its size? (Chen et al. 2018, Table 2)

Spirals: 1,000 Archimedean spirals, half of them clockwise, 500 angles in three turns; a series is 200 consecutive points, each coordinate
with noise 0.3. Of the first 100 points 30, 50 or all are observed, drawn without replacement. Models are trained on the likelihood
of the observed points and of the 100 later ones of 1,000 spirals, and tested on 1,000 others: from the observed points alone, the
root mean square error, by coordinate, against the spiral without noise, at the 100 later points, and at the 100 of the window.
Waves: 1,000 periodic curves of 50 irregular points, of which 5 are observed; 500 passes over 800 curves, on the likelihood of all 50
points, where each update draws the observed ones anew; tested at the points of the other 200 that were not observed. Recurrent
networks know the past alone; a latent ODE reads all observations first. python -m benchmarks spirals
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
from jode.data_series import Series, periodic, spirals, subsample
from jode.models.recurrent import RNN, GRUDecay, of_size, parameters
from jode.models.series import ODERNN, LatentODE, elbo

ITERATIONS, WAVE_EPOCHS, BATCH, SEEDS, RATE, WAVE_NOISE = 6000, 500, 200, 5, 2e-2, 0.2
PAPER = {30: (0.1642, 0.3937), 50: (0.1502, 0.3202), 100: (0.1346, 0.1813)}  # latent ODE, RNN
COLUMNS = ["data", "model", "parameters", "RMSE", "RMSE within the window", "each seed", "ms an update"]


def main(quick=False):
    rows = []
    for count in (30,) if quick else PAPER:
        for kind in ("latent ODE", "RNN"):
            seeds = range(1 if quick else SEEDS)
            rows.append(
                row(f"spirals, {count} points", [spiral(kind, count, s, ITERATIONS // (40 if quick else 1)) for s in seeds], kind)
            )
        for kind, bar in zip(("latent ODE", "RNN"), PAPER[count], strict=True):
            rows.append([f"spirals, {count} points", f"{kind}, Chen et al. 2018", "–", bar, "–", "–", "–"])
    for kind in ("latent ODE", "latent ODE, ODE-RNN", "RNN", "GRU-decay"):
        seeds = range(1 if quick else SEEDS)
        rows.append(row("waves", [wave(kind, s, WAVE_EPOCHS // (10 if quick else 1)) for s in seeds], kind))
    report(
        "spirals",
        f"Spirals, {ITERATIONS:,} updates, and waves, {WAVE_EPOCHS} passes, by {BATCH} series; float32",
        COLUMNS,
        rows,
        quick,
    )


def row(data, found, kind):
    """Mean and standard deviation over seeds."""
    size, errors, within, ms = zip(*found, strict=True)
    spread = f"{np.mean(errors):.4f} ± {np.std(errors):.4f}"
    inside = "–" if within[0] is None else f"{np.mean(within):.4f} ± {np.std(within):.4f}"
    line = [data, kind, size[0], spread, inside, ", ".join(f"{e:.4f}" for e in errors), f"{np.median(ms):.0f}"]
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


def latent_loss(model, key, seen, targets):
    """Minus the bound, by row of the targets."""
    a, b = jax.random.split(key)
    chosen = jax.random.randint(a, (BATCH,), 0, len(seen.ts))
    seen, targets = jax.tree.map(lambda x: x[chosen], (seen, targets))
    bound = jax.vmap(partial(elbo, model))(jax.random.split(b, BATCH), seen, targets).value
    return -jnp.mean(bound) / targets.ts.shape[1]


def recurrent_loss(model, key, series, targets):
    """The mean square error over the same rows: of a Gaussian likelihood, what depends on the model."""
    chosen = jax.random.randint(key, (BATCH,), 0, len(series.ts))
    series, ys = jax.tree.map(lambda x: x[chosen], (series, targets.ys))
    return jnp.mean((jax.vmap(model)(series) - ys) ** 2)


def trained(model, loss, key, data, iterations):
    """The model after so many updates, and milliseconds an update."""
    rates = optax.warmup_cosine_decay_schedule(0.0, RATE, iterations // 20, iterations, RATE / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates))
    carry = (model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)), key)
    run = train.updates(loss, optimizer, iterations // 2)
    carry, _ = run(carry, *data)
    start = time.perf_counter()
    (model, *_), losses = jax.block_until_ready(run(carry, *data))
    return model, 1e3 * (time.perf_counter() - start) / len(losses)


def rmse(found, true):
    return float(jnp.sqrt(jnp.mean((found - true) ** 2)))


def parts(key, n, count):
    """Spirals: what is observed, the targets (observed and later points), those with the observed ones marked, and the truth."""
    a, b = jax.random.split(key)
    noisy, clean = spirals(a, n)
    window, later = (jax.tree.map(lambda x: x[:, part], noisy) for part in (slice(100), slice(100, None)))
    seen = jax.vmap(lambda k, s: subsample(k, s, count))(jax.random.split(b, n), window)
    marked = Series(*(jnp.concatenate(x, 1) for x in zip(seen, later, strict=True)))
    return seen, marked._replace(mask=jnp.ones_like(marked.mask)), marked, clean


def spiral(kind, count, seed, iterations):
    """Parameters, error at the later points and within the window, milliseconds an update."""
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    seen, targets, marked, _ = parts(a, 1000, count)
    test_seen, _, test_marked, clean = parts(b, 1000, count)
    model = models(c, 2, 0.3)[kind]()
    if kind == "RNN":
        model, ms = trained(model, recurrent_loss, d, (marked, targets), iterations)
        later = eqx.filter_jit(lambda s: jax.vmap(model)(s))(test_marked)[:, count:]
        return parameters(model), rmse(later, clean.ys[:, 100:]), None, ms
    model, ms = trained(model, latent_loss, d, (seen, targets), iterations)
    path = eqx.filter_jit(jax.vmap(lambda s: model.predict(s, 0.0, clean.ts[0])))(test_seen)
    return parameters(model), rmse(path[:, 100:], clean.ys[:, 100:]), rmse(path[:, :100], clean.ys[:, :100]), ms


def thinned(key, series):
    """Of a batch of waves: five points of each alone, and all of them with these marked."""
    rank = jnp.argsort(jax.random.uniform(key, series.ts.shape), axis=1)
    marked = series._replace(mask=rank < 5)
    places = jax.vmap(lambda mask: jnp.nonzero(mask, size=5)[0])(marked.mask)
    seen = jax.tree.map(lambda x: jax.vmap(lambda x, i: x[i])(x, places), marked)
    return seen, marked


def wave(kind, seed, epochs):
    """Parameters, error at points that were not observed, milliseconds an update. Each update draws the observed points anew."""
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    noisy, clean = periodic(a, 1000)
    learn, (test, truth) = jax.tree.map(lambda x: x[:800], noisy), jax.tree.map(lambda x: x[800:], (noisy, clean))
    seen, marked = thinned(b, test)
    model = models(c, 1, WAVE_NOISE, latent=6, width=25)[kind]()
    latent = isinstance(model, LatentODE)

    def loss(model, key, series):
        first, then = jax.random.split(key)
        seen, marked = thinned(first, series)
        return latent_loss(model, then, seen, series) if latent else recurrent_loss(model, then, marked, series)

    model, ms = trained(model, loss, d, (learn,), epochs * (800 // BATCH))
    if latent:
        found = eqx.filter_jit(lambda s, ts: jax.vmap(lambda s, ts: model.predict(s, 0.0, ts))(s, ts))(seen, test.ts)
    else:
        found = eqx.filter_jit(lambda s: jax.vmap(model)(s))(marked)
    return parameters(model), rmse(found[~marked.mask], truth.ys[~marked.mask]), None, ms


if __name__ == "__main__":
    main()
