"""Is the rate of a Poisson process recovered from its events, and is its integral exact to tolerance?

Three hundred series of events in [0, 10] of the rate 6 (1 + 0.8 sin 1.3 t), drawn by thinning; a `PoissonODE` of 2 latent dimensions,
5,000 updates of Adam on 30 series each. Series of one rate share one solution, so n of them are merged into one of n times the rate,
and a likelihood costs one adaptive solve. The log-likelihood of 1,000 other series under the learned rate, by dopri5 at 1e-6, is
compared with that under the true one; the bar is 2 % for every seed. The integral that the solve carries is
compared, for the true rate, with its closed form, and for a learned rate with a solve at a tolerance of 1e-12, in float64.
python -m benchmarks poisson
"""

from benchmarks.measure import report

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
from jode import train
from jode.data_series import poisson_process
from jode.models.poisson import PoissonODE, poisson_log_likelihood

SPAN, LEVEL, SWING, SPEED = (0.0, 10.0), 6.0, 0.8, 1.3
BOUND, CAPACITY = LEVEL * (1 + SWING), 171
ITERATIONS, SEEDS, SERIES, BATCH, TEST = 5000, 5, 300, 30, 1000
TRAIN, EXACT = (jode.Adaptive(jode.dopri5, tol, tol, max_steps=512) for tol in (1e-4, 1e-6))
COLUMNS = ["question", "solver", "found", "true", "difference"]


def rate(t):
    return LEVEL * (1 + SWING * jnp.sin(SPEED * t))


def integral(t):
    return LEVEL * (t + SWING / SPEED * (1 - np.cos(SPEED * t)))


def main(quick=False):
    rows = []
    gaps, start = [], time.perf_counter()
    for seed in range(1 if quick else SEEDS):
        model, found, true = recovered(seed, ITERATIONS // (20 if quick else 1))
        gaps.append(100 * abs(found - true) / abs(true))
        rows.append(
            [f"log-likelihood of unseen events, seed {seed}", "dopri5, 1e-06", f"{found:.3f}", f"{true:.3f}", f"{gaps[-1]:.2f} %"]
        )
        print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    rows.append(["log-likelihood of unseen events, mean", "dopri5, 1e-06", "–", "–", f"{np.mean(gaps):.2f} ± {np.std(gaps):.2f} %"])
    with jax.enable_x64(True):
        rows += integrals(jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, model))
    report(
        "poisson",
        f"Poisson process, {SERIES} series, {ITERATIONS:,} updates on {BATCH} of them in float32; integrals in float64",
        COLUMNS,
        rows,
        quick,
    )


def draw(key, n):
    return jax.vmap(lambda k: poisson_process(k, rate, SPAN, BOUND, CAPACITY))(jax.random.split(key, n))


def recovered(seed, iterations):
    """The model, and the mean log-likelihood of unseen series under it and under the true rate."""
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(1e-2, iterations, 0.02)))
    model = PoissonODE(key=c)
    carry = model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)), d
    (model, *_), _ = train.updates(batch_loss, optimizer, iterations)(carry, *draw(a, SERIES))
    ts, mask = draw(b, TEST)
    true = jnp.sum(jnp.where(mask, jnp.log(rate(ts)), 0.0)) / TEST - integral(SPAN[1])
    return model, -float(eqx.filter_jit(loss)(model, ts, mask, EXACT)), float(true)


def batch_loss(model, key, ts, mask):
    chosen = jax.random.choice(key, len(ts), (BATCH,), replace=False)
    return loss(model, ts[chosen], mask[chosen], TRAIN)


def loss(model, ts, mask, solver):
    """Minus the mean log-likelihood of n series, of their union: (Σ log λ(tᵢ) - n ∫ λ dt) / n."""
    n, times = len(ts), jnp.where(mask, ts, jnp.inf).reshape(-1)
    expected = n * integral(SPAN[1])
    order = jnp.argsort(times)[: int(expected + 6 * expected**0.5)]  # more events are seen once in 10⁸
    union = model.log_likelihood(SPAN, times[order], mask.reshape(-1)[order], solver=solver, adjoint=jode.Backprop(None))
    return -(union.value - (n - 1) * union.integral) / n


def integrals(model):
    """The error of the carried integral by tolerance."""
    ts, mask = (x[0] for x in draw(jax.random.key(9), 1))
    still, log_rate = (lambda t, z, a: 0 * z), (lambda t, z, a: jnp.log(rate(t)))
    known = lambda solver: poisson_log_likelihood(still, log_rate, jnp.zeros(1), SPAN, ts, mask, solver=solver).integral
    learned = lambda solver: model.log_likelihood(SPAN, ts, mask, solver=solver).integral
    of = lambda tol: jode.Adaptive(jode.dopri5, tol, tol)
    rows = []
    for name, f, true in (("known", known, integral(SPAN[1])), ("learned", learned, float(learned(of(1e-12))))):
        solve = jax.jit(f)
        for tol in (1e-3, 1e-6, 1e-9):
            found = float(solve(of(tol)))
            rows.append(
                [f"integral of the {name} rate", f"dopri5, {tol:.0e}", f"{found:.9f}", f"{true:.9f}", f"{abs(found - true):.1e}"]
            )
    return rows


if __name__ == "__main__":
    main()
