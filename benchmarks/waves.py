"""Does a latent ODE fill in irregular waves better than recurrent networks of its size? (the periodic toy of Rubanova et al. 2019)

1,000 sine waves of different frequencies and phases, each at 50 irregular times, of which 5 are observed. Models are trained on 800 of
them, on the likelihood of all 50 points, where each update draws the observed ones anew; tested at the points of the other 200 that
were not observed. Recurrent networks know the past alone; a latent ODE reads all observations first. Beside them, where PyTorch and
torchdiffeq are installed, the latent ODE written for these, with the same sizes, data and updates. python -m benchmarks waves
"""

from benchmarks.measure import report

import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jode
from benchmarks.spirals import COLUMNS, models, rmse, row, trained
from jode.data_series import periodic
from jode.models.recurrent import parameters
from jode.models.series import LatentODE, elbo

try:
    import torch
    import torchdiffeq
except ImportError:
    torch = None

UPDATES, BATCH, SEEDS, SEEN, NOISE = 6000, 50, 5, 5, 0.2
ENCODER = jode.Fixed(jode.midpoint, 6)  # steps of an ODE-RNN between two observations, a period apart
SIZES = {"latent": 6, "hidden": 25, "width": 25}
RATES = {"latent ODE": 1e-2, "latent ODE, ODE-RNN": 1e-2, "RNN": 1e-2, "GRU-decay": 1e-2}  # Adam's peak rate


def main(quick=False):
    updates, seeds = UPDATES // (40 if quick else 1), range(1 if quick else SEEDS)
    rows = [row("waves", [wave(kind, seed, updates) for seed in seeds], kind) for kind in RATES]
    if torch is not None:
        rows.append(row("waves", [torch_wave(seed, updates) for seed in seeds[:1]], "latent ODE in torchdiffeq"))
    report("waves", f"Waves, {SEEN} of 50 points observed, {updates:,} updates by {BATCH} series, float32", COLUMNS, rows, quick)


def data(seed):
    """800 waves to learn from; of 200 others what is observed, all points with these marked, and the truth."""
    a, b = jax.random.split(jax.random.key(seed))
    noisy, clean = periodic(a, 1000)
    test, truth = jax.tree.map(lambda x: x[800:], (noisy, clean))
    return jax.tree.map(lambda x: x[:800], noisy), *thinned(b, test), truth


def thinned(key, series):
    """Of a batch of waves: five points of each alone, and all of them with these marked."""
    rank = jnp.argsort(jax.random.uniform(key, series.ts.shape), axis=1)
    marked = series._replace(mask=rank < SEEN)
    places = jax.vmap(lambda mask: jnp.nonzero(mask, size=SEEN)[0])(marked.mask)
    seen = jax.tree.map(lambda x: jax.vmap(lambda x, i: x[i])(x, places), marked)
    return seen, marked


def wave(kind, seed, updates):
    """Parameters, error at points that were not observed, milliseconds an update."""
    learn, seen, marked, truth = data(seed)
    a, b = jax.random.split(jax.random.key(100 + seed))
    model = models(a, 1, NOISE, **SIZES)[kind]()
    latent = isinstance(model, LatentODE)

    def loss(model, key, series):
        rows, first, then = jax.random.split(key, 3)
        series = jax.tree.map(lambda x: x[jax.random.randint(rows, (BATCH,), 0, len(x))], series)
        seen, marked = thinned(first, series)
        if latent:
            bound = jax.vmap(partial(elbo, model, encoder_solver=ENCODER))(jax.random.split(then, BATCH), seen, series)
            return -jnp.mean(bound.value) / series.ts.shape[1]
        return jnp.mean((jax.vmap(model)(marked) - series.ys) ** 2)

    model, ms = trained(model, loss, b, (learn,), updates, RATES[kind])
    if latent:
        found = eqx.filter_jit(jax.vmap(lambda s, ts: model.predict(s, 0.0, ts, encoder_solver=ENCODER)))(seen, marked.ts)
    else:
        found = eqx.filter_jit(lambda s: jax.vmap(model)(s))(marked)
    return parameters(model), rmse(found[~marked.mask], truth.ys[~marked.mask]), None, ms


def torch_wave(seed, updates):
    """The latent ODE with a GRU encoder in PyTorch, solved by torchdiffeq's midpoint method with a step an interval.

    Times differ by row: each interval is solved over [i, i + 1] of dz/ds = (t_{i+1} - t_i) f(z), the batch as one state.
    """
    torch.manual_seed(seed)
    learn, seen, marked, truth = jax.tree.map(np.asarray, data(seed))
    latent, hidden, width = (SIZES[k] for k in ("latent", "hidden", "width"))
    perceptron = lambda n, m: torch.nn.Sequential(torch.nn.Linear(n, width), torch.nn.Tanh(), torch.nn.Linear(width, m))
    cell, head = torch.nn.GRUCell(2, hidden), torch.nn.Linear(hidden, 2 * latent)
    field, decoder = perceptron(latent, latent), perceptron(latent, 1)
    weights = [p for m in (cell, head, field, decoder) for p in m.parameters()]
    optimizer = torch.optim.Adam(weights, RATES["latent ODE"])
    warm = updates // 20
    decay = lambda k: 0.01 + 0.99 * (1 + np.cos(np.pi * (k - warm) / (updates - warm))) / 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / warm if k < warm else decay(k))
    tensor = lambda x: torch.tensor(np.array(x))

    def encode(ts, ys):
        """From the last observation down to t = 0."""
        h = torch.zeros(len(ts), hidden)
        gaps = torch.cat([ts[:, 1:] - ts[:, :-1], torch.zeros(len(ts), 1)], 1)
        for i in reversed(range(SEEN)):
            h = cell(torch.cat([ys[:, i], gaps[:, i : i + 1]], 1), h)
        mean, log_std = head(cell(torch.cat([torch.zeros(len(ts), 1), ts[:, :1]], 1), h)).chunk(2, 1)
        return mean, log_std

    def decode(z0, ts):
        gaps = torch.diff(ts, prepend=torch.zeros(len(ts), 1), dim=1)
        slope = lambda s, z: gaps[:, min(int(s), gaps.shape[1] - 1), None] * field(z)
        places = torch.arange(gaps.shape[1] + 1.0)
        zs = torchdiffeq.odeint(slope, z0, places, method="midpoint")
        return decoder(zs[1:]).transpose(0, 1)

    rng, start = np.random.default_rng(seed), time.perf_counter()
    for _ in range(updates):
        rows = rng.integers(0, len(learn.ts), BATCH)
        ts, ys = tensor(learn.ts[rows]), tensor(learn.ys[rows])
        places = torch.argsort(torch.rand(ts.shape), 1)[:, :SEEN].sort(1).values
        mean, log_std = encode(ts.gather(1, places), ys.gather(1, places[..., None]))
        path = decode(mean + log_std.exp() * torch.randn(mean.shape), ts)
        misfit = ((ys - path) ** 2).sum((1, 2)) / (2 * NOISE**2)
        kl = (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(1) / 2
        optimizer.zero_grad()
        ((misfit + kl).mean() / ts.shape[1]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    ms = 1e3 * (time.perf_counter() - start) / updates
    with torch.no_grad():
        found = decode(encode(tensor(seen.ts), tensor(seen.ys))[0], tensor(marked.ts)).numpy()
    return sum(p.numel() for p in weights), rmse(found[~marked.mask], truth.ys[~marked.mask]), None, ms


if __name__ == "__main__":
    main()
