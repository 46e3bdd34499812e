"""Latent ODEs, event rates, universal equations: what is masked changes nothing, and what is computed equals the closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import optax
import pytest

import jode
from jode import train
from jode.data_series import (
    Ecology,
    Series,
    lotka_volterra,
    periodic,
    poisson_process,
    predators_and_prey,
    spirals,
    subsample,
)
from jode.models.flow import states_after, states_around
from jode.models.poisson import PoissonODE, poisson_log_likelihood
from jode.models.recurrent import RNN, GRUDecay, of_size, parameters
from jode.models.series import ODERNN, GRUEncoder, LatentODE, divergence, elbo, log_likelihood, sample
from jode.models.universal import Universal, multiple_shooting

RK4 = jode.Fixed(jode.rk4, 4)
FINE = jode.Fixed(jode.rk4, 150)  # errs by 1e-9 at most on the problems below, and compiles faster than an adaptive solver


@pytest.fixture(autouse=True)
def standard_promotion():
    """Equinox and optax promote dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def series(key, length):
    a, b = jax.random.split(key)
    ts = 0.1 + jnp.cumsum(jax.random.uniform(a, (length,), minval=0.1))
    return Series(ts, jax.random.normal(b, (length, 2)), jnp.ones(length, bool))


def padded(s, where, total):
    """The same observations at the places `where` of a longer series, with NaN and nonsense around them."""
    ts = jnp.full(total, jnp.nan).at[::2].set(-7.0).at[where].set(s.ts)
    ys = jnp.full((total, 2), jnp.nan).at[where].set(s.ys)
    return Series(ts, ys, jnp.zeros(total, bool).at[where].set(True))


def latent(encoder=GRUEncoder):
    return LatentODE(2, latent=3, hidden=5, width=6, encoder=encoder, key=jax.random.key(0))


@eqx.filter_jit
def bound(model, key, series):
    """The bound and its gradient by the parameters, compiled once a shape."""
    return eqx.filter_value_and_grad(lambda m: elbo(m, key, series).value)(model)


# Masks, raggedness, causality.


@pytest.mark.sweep
@pytest.mark.parametrize("encoder", [GRUEncoder, ODERNN])
@pytest.mark.parametrize("where", [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [1, 2, 4, 6, 7]])
def test_what_was_not_observed_changes_nothing(encoder, where):
    model, s = latent(encoder), series(jax.random.key(1), 5)
    # Sums over more zeros may round otherwise: hence not quite bit for bit.
    alone, gradient = bound(model, jax.random.key(2), s)
    other, padding = bound(model, jax.random.key(2), padded(s, jnp.array(where), 8))
    np.testing.assert_allclose(other, alone, rtol=1e-13)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(padding), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-12)


@pytest.mark.sweep
@pytest.mark.parametrize("encoder", [GRUEncoder, ODERNN])
def test_a_ragged_batch_is_each_series_alone(encoder):
    model = latent(encoder)
    ragged = [series(jax.random.key(n), n) for n in (3, 8)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *[padded(s, jnp.arange(len(s.ts)), 8) for s in ragged])
    keys = jax.random.split(jax.random.key(5), 2)
    together = jax.jit(jax.vmap(lambda k, s: elbo(model, k, s).value))(keys, batch)
    apart = [bound(model, k, s)[0] for k, s in zip(keys, ragged, strict=True)]
    np.testing.assert_allclose(together, jnp.stack(apart), rtol=1e-12)


def test_a_series_without_observations_keeps_the_bound_finite():
    model, s = latent(), series(jax.random.key(1), 4)
    nothing = Series(s.ts * jnp.nan, s.ys * jnp.nan, jnp.zeros(4, bool))
    found = jax.jit(lambda s: elbo(model, jax.random.key(0), s))(nothing)
    assert found.likelihood == 0
    assert np.isfinite(found.value)


@pytest.mark.parametrize("encoder", [GRUEncoder, ODERNN])
def test_the_encoder_is_causal_backwards(encoder):
    """The state that has read observations i, i + 1, … depends on no earlier one, and on each of those."""
    module, s = latent(encoder).encoder, series(jax.random.key(1), 5)
    jacobian = jax.jit(jax.jacobian(lambda ys: module.states(s._replace(ys=ys), 0.0)))(s.ys)  # (T + 1, H, T, D)
    depends = np.abs(jacobian).max((1, 3)) > 0
    np.testing.assert_array_equal(depends[1:], np.triu(np.ones((5, 5), bool)))
    assert depends[0].all()


def test_the_encoder_may_have_a_solver_of_its_own():
    """The likelihood is that of a solve by one from the mean and deviation that the encoder finds by the other."""
    model, s, key = latent(ODERNN), series(jax.random.key(1), 4), jax.random.key(2)
    coarse = jode.Fixed(jode.euler, 1)
    mean, std = model.encoder(s, 0.0, RK4)
    true = log_likelihood(model.decode(sample(key, mean, std), 0.0, s.ts, solver=coarse), s, model.noise)
    found = jax.jit(lambda s: elbo(model, key, s, solver=coarse, encoder_solver=RK4))(s)
    np.testing.assert_allclose([found.likelihood, found.kl], [true, divergence(mean, std)], rtol=1e-12)
    np.testing.assert_allclose(
        model.predict(s, 0.0, s.ts, solver=coarse, encoder_solver=RK4), model.decode(mean, 0.0, s.ts, solver=coarse), rtol=1e-12
    )


def test_an_ode_rnn_flows_for_as_long_as_the_gaps_last():
    """The state that has read y_2 is carried down to t_1 by a solve, and then reads y_1."""
    module, s = latent(ODERNN).encoder, series(jax.random.key(1), 4)
    hs = jax.jit(lambda s: module.states(s, 0.0, RK4))(s)
    down = jode.odeint(lambda t, h, f: f(h), hs[3], (s.ts[2], s.ts[1]), module.field, solver=RK4)[-1]
    np.testing.assert_allclose(hs[2], module.cell(s.ys[1], down), rtol=1e-12)


@pytest.mark.parametrize("make", [RNN, GRUDecay])
def test_the_baselines_are_causal_and_read_only_what_was_observed(make):
    model, s = make(2, 6, key=jax.random.key(0)), series(jax.random.key(1), 6)
    s = s._replace(mask=jnp.array([True, True, False, True, True, False]))
    jacobian = jax.jit(jax.jacobian(lambda ys: model(s._replace(ys=ys))))
    depends = np.abs(jacobian(s.ys)).max((1, 3)) > 0
    np.testing.assert_array_equal(depends, np.tril(np.ones((6, 6), bool), -1) & np.asarray(s.mask))
    dirty = s._replace(ys=jnp.where(s.mask[:, None], s.ys, jnp.nan))
    np.testing.assert_array_equal(model(dirty), model(s))
    assert np.isfinite(jacobian(dirty.ys)).all()


@pytest.mark.parametrize("make", [RNN, GRUDecay])
@pytest.mark.parametrize("hidden", [20, 25, 40])
def test_the_baselines_are_of_equal_size(make, hidden):
    wanted = parameters(LatentODE(2, hidden=hidden, key=jax.random.key(0)))
    found = parameters(of_size(lambda h, key: make(2, h, key=key), wanted, key=jax.random.key(1)))
    assert abs(found - wanted) <= 0.05 * wanted
    with pytest.raises(ValueError, match="raise most"):
        of_size(lambda h, key: make(2, h, key=key), wanted, key=jax.random.key(1), most=4)


# The bound.


def test_the_divergence_is_the_integral():
    mean, std = jnp.array([0.3, -1.2, 2.0]), jnp.array([0.5, 1.0, 1.7])
    x, w = np.polynomial.hermite_e.hermegauss(40)  # ∫ exp(-x²/2) p(x) dx, exact for these quadratics
    z = mean[:, None] + std[:, None] * x
    log_ratio = -(x**2) / 2 - jnp.log(std)[:, None] + z**2 / 2
    np.testing.assert_allclose(divergence(mean, std), jnp.sum(log_ratio @ w) / np.sqrt(2 * np.pi), rtol=1e-12)
    model, s = latent(), series(jax.random.key(1), 4)
    found = jax.jit(lambda s: elbo(model, jax.random.key(0), s, beta=0.3))(s)
    np.testing.assert_allclose(found.kl, divergence(*model.encoder(s, 0.0)), rtol=1e-12)
    np.testing.assert_allclose(found.value, found.likelihood - 0.3 * found.kl, rtol=1e-13)


def test_samples_have_the_mean_and_the_variance_and_pass_the_gradient():
    mean, std, n = jnp.array([0.3, -1.2]), jnp.array([0.5, 2.0]), 40_000
    z = jax.vmap(lambda k: sample(k, mean, std))(jax.random.split(jax.random.key(0), n))
    np.testing.assert_array_less(jnp.abs(z.mean(0) - mean), 4 * std / n**0.5)  # four standard errors
    np.testing.assert_array_less(jnp.abs(z.var(0) - std**2), 4 * std**2 * (2 / n) ** 0.5)
    dmean, dstd = jax.jacobian(sample, (1, 2))(jax.random.key(3), mean, std)
    np.testing.assert_allclose(dmean, np.eye(2))
    np.testing.assert_allclose(jnp.diag(dstd), (sample(jax.random.key(3), mean, std) - mean) / std, rtol=1e-12)


def test_the_likelihood_is_that_of_the_observed_rows():
    s = series(jax.random.key(1), 4)._replace(mask=jnp.array([True, False, True, True]))
    path = jnp.ones((4, 2))
    expected = jax.scipy.stats.norm.logpdf(s.ys, path, 0.3)[np.asarray(s.mask)].sum()
    np.testing.assert_allclose(log_likelihood(path, s, 0.3), expected, rtol=1e-12)


# Times.

A = jnp.array([[-0.2, 1.5, 0.0], [-1.5, -0.1, 0.3], [0.0, 0.2, -0.4]])
C = jnp.array([[1.0, 0.5, -1.0], [0.0, 2.0, 1.0]])


def linear_model():
    """A latent ODE whose field and decoder are matrices: y(t) = C exp(A (t - t0)) z0."""
    heads = lambda m: (m.field, m.decoder)
    return eqx.tree_at(heads, latent(), (lambda z: A @ z, lambda z: C @ z), is_leaf=lambda x: isinstance(x, eqx.nn.MLP))


def test_extrapolation_both_ways_is_the_flow():
    model, z0, t0 = linear_model(), jnp.array([1.0, -0.5, 0.3]), 1.0
    ts = jnp.array([-2.0, -0.3, -0.3, 0.999, 1.0, 1.0, 1.5, 4.0, 4.0])
    truth = jnp.stack([C @ jax.scipy.linalg.expm(A * (t - t0)) @ z0 for t in ts])
    both = jax.jit(lambda ts: model.extrapolate(z0, t0, ts, solver=FINE))
    np.testing.assert_allclose(both(ts), truth, atol=1e-8)
    np.testing.assert_allclose(both(ts[4:]), truth[4:], atol=1e-8)  # none before t0
    np.testing.assert_allclose(both(ts[:4]), truth[:4], atol=1e-8)  # none after
    np.testing.assert_allclose(jax.jit(lambda ts: model.decode(z0, t0, ts, solver=FINE))(ts[4:]), truth[4:], atol=1e-8)


def test_the_gradient_goes_through_equal_masked_and_earlier_times():
    f = lambda t, z, a: a @ z
    ts, mask = jnp.array([jnp.nan, 0.0, 0.5, 0.5, -3.0, 2.0, jnp.nan]), jnp.array([0, 1, 1, 1, 0, 1, 0], bool)
    z0 = jnp.array([1.0, -0.5, 0.3])

    def loss(a, t):
        zs = states_after(f, z0, 0.0, ts.at[5].set(t), a, mask=mask, solver=FINE)
        return jnp.sum(jnp.where(mask[:, None], zs, 0.0) ** 2)

    def true(a, t):
        return sum(jnp.sum((jax.scipy.linalg.expm(a * s) @ z0) ** 2) for s in (0.0, 0.5, 0.5, t))

    both = lambda f: jax.jit(jax.grad(f, (0, 1)))(A, 2.0)
    for found, expected in zip(both(loss), both(true), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-7)
    around = lambda a: jnp.sum(states_around(f, z0, 1.0, jnp.array([0.2, 1.0, 1.7]), a, solver=FINE) ** 2)
    flow = lambda a: sum(jnp.sum((jax.scipy.linalg.expm(a * s) @ z0) ** 2) for s in (-0.8, 0.0, 0.7))
    np.testing.assert_allclose(jax.jit(jax.grad(around))(A), jax.jit(jax.grad(flow))(A), atol=1e-7)


# Event times.

EVENTS, SEEN = jnp.array([0.2, 0.9, 1.4, 2.5, jnp.nan]), jnp.array([1, 1, 0, 1, 0], bool)
SPAN = (0.0, 3.0)


def still(t, z, args):
    return 0 * z


def test_a_constant_rate_has_the_closed_form():
    log_rate = lambda t, z, a: a
    found = poisson_log_likelihood(still, log_rate, jnp.zeros(1), SPAN, EVENTS, SEEN, jnp.log(2.5), solver=RK4)
    np.testing.assert_allclose(found.integral, 7.5, rtol=1e-14)  # a linear integral: every Runge-Kutta method has it exactly
    np.testing.assert_allclose(found.value, 3 * np.log(2.5) - 7.5, rtol=1e-13)


def rate(t, a=(1.0, 0.6, 2.0)):
    return a[0] * (1 + a[1] * jnp.sin(a[2] * t))


def integral(t, a=(1.0, 0.6, 2.0)):
    return a[0] * (t + a[1] / a[2] * (1 - jnp.cos(a[2] * t)))


@pytest.mark.parametrize("tol", [1e-5, 1e-9])
def test_a_sinusoidal_rate_has_the_closed_form_and_an_integral_exact_to_tolerance(tol):
    log_rate = lambda t, z, a: jnp.log(rate(t, a))
    a = jnp.array([1.0, 0.6, 2.0])
    solver = jode.Adaptive(jode.dopri5, tol, tol)
    value = lambda a: poisson_log_likelihood(still, log_rate, jnp.zeros(1), SPAN, EVENTS, SEEN, a, solver=solver)
    pulled, found = jax.jit(jax.grad(lambda a: (lambda x: (x.value, x))(value(a)), has_aux=True))(a)
    np.testing.assert_allclose(found.integral, integral(3.0), atol=10 * tol)
    seen = EVENTS[np.asarray(SEEN)]
    closed = lambda a: jnp.sum(jnp.log(rate(seen, a))) - integral(3.0, a)
    np.testing.assert_allclose(found.value, closed(a), atol=10 * tol)
    np.testing.assert_allclose(pulled, jax.grad(closed)(a), atol=50 * tol)


def test_gradients_of_a_latent_rate_agree_with_differences():
    model = PoissonODE(width=5, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    value = jax.jit(lambda x: eqx.combine(unravel(x), static).log_likelihood(SPAN, EVENTS, SEEN, solver=RK4).value)
    direction = jax.random.normal(jax.random.key(1), flat.shape)
    h = 1e-5
    difference = (value(flat + h * direction) - value(flat - h * direction)) / (2 * h)
    np.testing.assert_allclose(jax.grad(value)(flat) @ direction, difference, rtol=1e-7)  # h² f''' and eps / h
    logs = jax.jit(lambda ts: model.log_rates(0.0, ts, solver=RK4))(jnp.linspace(0, 3, 2001))
    found = jax.jit(lambda: model.log_likelihood(SPAN, EVENTS, SEEN, solver=FINE))()
    np.testing.assert_allclose(found.integral, jnp.trapezoid(jnp.exp(logs), dx=3 / 2000), rtol=1e-6)


def test_thinning_draws_the_process():
    """Counts in two halves of the span are Poisson with the rate's integrals: mean and variance within four standard errors."""
    n, bound, span = 4000, 1.6, (0.0, 3.0)
    draw = jax.vmap(lambda k: poisson_process(k, rate, span, bound, 20))
    ts, mask = draw(jax.random.split(jax.random.key(0), n))
    for low, high in ((0.0, 1.5), (1.5, 3.0)):
        counts = np.sum(np.asarray(mask & (ts >= low) & (ts < high)), 1)
        expected = float(integral(high) - integral(low))
        assert abs(counts.mean() - expected) < 4 * (expected / n) ** 0.5
        assert abs(counts.var() - expected) < 4 * ((expected + 2 * expected**2) / n) ** 0.5
    assert bool((jnp.diff(ts, axis=1) > 0).all())


# Universal equations and multiple shooting.

TS = jnp.linspace(0.0, 6.0, 13)
Y0 = jnp.array([1.0, 0.8])


def test_one_segment_is_single_shooting():
    solver = jode.Adaptive(jode.tsit5, 1e-8, 1e-8)
    shots = multiple_shooting(predators_and_prey, Y0[None], TS, Ecology(), solver=solver)
    np.testing.assert_array_equal(shots.ys, jode.odeint(predators_and_prey, Y0, TS, Ecology(), solver=solver))
    assert shots.gaps.shape == (0, 2)


@pytest.mark.parametrize("count", [2, 6])
def test_gaps_vanish_on_the_true_trajectory_and_nowhere_else(count):
    whole = jode.odeint(predators_and_prey, Y0, TS, Ecology(), solver=FINE)
    starts = whole[: -1 : 12 // count]
    shoot = jax.jit(lambda starts: multiple_shooting(predators_and_prey, starts, TS, Ecology(), solver=FINE))
    shots = shoot(starts)
    np.testing.assert_allclose(shots.gaps, 0.0, atol=1e-9)
    np.testing.assert_allclose(shots.ys, whole, atol=1e-9)
    moved = shoot(starts.at[1].add(0.1))
    np.testing.assert_allclose(moved.gaps[0], -0.1, atol=1e-9)


def test_segments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="5 segments do not divide the 12 intervals"):
        multiple_shooting(predators_and_prey, jnp.ones((5, 2)), TS, Ecology())
    with pytest.raises(ValueError, match="same leading axis"):
        multiple_shooting(lambda t, y, a: y, (jnp.ones((3, 2)), jnp.ones((4, 2))), TS)


def test_a_universal_equation_is_the_known_part_and_the_network():
    known = lambda t, y, c: c * y
    model = Universal(known, jnp.array([1.3, -1.8]), 2, scale=(2.0, 3.0), key=jax.random.key(0))
    found = Universal.field(0.0, Y0, model)
    np.testing.assert_allclose(found, model.constants * Y0 + model.network(Y0 / jnp.array([2.0, 3.0])), rtol=1e-14)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: jnp.sum(jode.odeint(Universal.field, Y0, TS[:3], m, solver=RK4))))(model)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


# Data.


def test_spirals_are_archimedes():
    noisy, clean = spirals(jax.random.key(0), 50, points=20, later=10, total=100)
    assert noisy.ys.shape == (50, 30, 2)
    assert noisy.mask.sum() == 50 * 20
    radius = np.linalg.norm(clean.ys, axis=-1)
    step = 6 * np.pi / 99
    np.testing.assert_allclose(np.diff(radius), 0.3 * step, rtol=1e-9)  # r grows by b for a radian
    x, y = np.moveaxis(np.asarray(clean.ys[:, 5:]), -1, 0)
    turning = np.diff(np.unwrap(np.arctan2(y, x)))
    np.testing.assert_allclose(turning[25:], step, rtol=1e-6)
    np.testing.assert_allclose(turning[:25], -step, rtol=1e-6)
    assert abs(np.std(noisy.ys - clean.ys) - 0.3) < 4 * 0.3 / (2 * 3000) ** 0.5
    with pytest.raises(ValueError, match="< total"):
        spirals(jax.random.key(0), 4, points=60, later=40, total=100)


def test_the_other_series_are_what_they_say():
    noisy, clean = periodic(jax.random.key(0), 30)
    assert bool((jnp.diff(noisy.ts, axis=1) > 0).all())
    assert jnp.max(jnp.abs(noisy.ys - clean.ys)) < 0.06  # six standard deviations
    half = subsample(jax.random.key(1), jax.tree.map(lambda x: x[0], noisy), 5)
    assert bool((jnp.diff(half.ts) > 0).all())
    assert np.isin(half.ts, noisy.ts[0]).all()
    with pytest.raises(ValueError, match="between 1 and 50"):
        subsample(jax.random.key(1), jax.tree.map(lambda x: x[0], noisy), 51)
    noisy, clean = lotka_volterra(jax.random.key(0), Y0)
    x, y = clean.ys.T
    conserved = 0.8 * x - 1.8 * jnp.log(x) + 0.9 * y - 1.3 * jnp.log(y)
    np.testing.assert_allclose(conserved, conserved[0], rtol=1e-6)


# Training.

OPTIMIZER = optax.adam(1e-2)
TRACES = []


def loss(model, key, batch):
    TRACES.append(1)
    keys = jax.random.split(key, 3)
    return -jnp.mean(jax.vmap(lambda k, s: elbo(model, k, s).value)(keys, batch))


def test_training_compiles_once_and_resumes_bit_for_bit(tmp_path):
    batch = jax.tree.map(lambda *x: jnp.stack(x), *[padded(series(jax.random.key(n), n), jnp.arange(n), 5) for n in (3, 5, 2)])
    model = latent()
    start = (model, OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array)), jax.random.key(3))
    run = train.updates(loss, OPTIMIZER, 5)
    once, first = run(start, batch)
    model, state, key = once
    eqx.tree_serialise_leaves(tmp_path / "run.eqx", (model, state, jax.random.key_data(key)))
    twice, second = run(once, batch)
    assert len(TRACES) == 1
    assert second[-1] < first[0]
    fresh = latent(), OPTIMIZER.init(eqx.filter(latent(), eqx.is_inexact_array)), jax.random.key_data(jax.random.key(0))
    model, state, bits = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", fresh)
    again, losses = run((model, state, jax.random.wrap_key_data(bits)), batch)
    np.testing.assert_array_equal(losses, second)
    for a, b in zip(*(jax.tree.leaves(eqx.filter(m[0], eqx.is_array)) for m in (twice, again)), strict=True):
        np.testing.assert_array_equal(a, b)
