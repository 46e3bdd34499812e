"""Densities that integrate to one, traces and log-dets against Jacobians, couplings, rows that fail alone, training that resumes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jode
from jode import data
from jode.models import density as de

KEY = jax.random.key(0)
TOL = 1e-8
SOLVER = jode.Adaptive(jode.dopri8, TOL, TOL)
X = jax.random.normal(jax.random.key(7), (5, 2))


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Equinox and optax promote dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Linear(eqx.Module):
    """dx/dt = A x: every density is known."""

    A: jax.Array

    def __call__(self, t, x, args=None):
        return self.A @ x


A = jnp.array([[0.3, -0.8], [0.5, -0.1]])
LINEAR = de.CNF(Linear(A), de.Normal(2, 0.7), (0.0, 1.3))


def random_flow(key=KEY, width=16):
    field = de.Field(2, width, key=key)
    return de.CNF(jax.tree.map(lambda w: 1.5 * w if eqx.is_array(w) else w, field), de.Normal(2))


FLOW = random_flow()


def test_a_linear_flow_has_the_normal_density_of_its_covariance():
    found = jax.jit(jax.vmap(lambda x: de.log_likelihood(LINEAR, x, solver=SOLVER)))(X)
    E = jax.scipy.linalg.expm(1.3 * A)
    expected = jax.scipy.stats.multivariate_normal.logpdf(X, jnp.zeros(2), 0.49 * E @ E.T)
    np.testing.assert_allclose(found.log_prob, expected, atol=100 * TOL)
    np.testing.assert_array_equal(found.standard_error, 0)
    np.testing.assert_array_equal(found.x, X)


@pytest.mark.parametrize("solver", [SOLVER, jode.Fixed(jode.rk4, 16)], ids=["adaptive", "fixed"])
def test_a_random_flow_integrates_to_one(solver):
    grid = jax.jit(lambda: de.on_grid(lambda x: de.log_likelihood(FLOW, x, solver=solver).log_prob, [-6, -6], [6, 6], 48))()
    assert abs(grid.mass - 1) < 1e-3
    assert grid.density.shape == (48, 48)
    np.testing.assert_allclose(grid.axes[:, 0], -6 + 12 / 96)


def test_planar_densities_integrate_to_one():
    nf = de.NF(de.PlanarMap(2, 8, key=KEY), de.Normal(2))
    cnf = de.CNF(de.PlanarField(2, 4, 8, key=KEY), de.Normal(2))
    log = lambda x: de.log_likelihood(cnf, x, trace=de.Formula(), solver=jode.Fixed(jode.rk4, 16)).log_prob
    for log_prob in (nf.log_prob, log):
        assert abs(jax.jit(lambda f=log_prob: de.on_grid(f, [-8, -8], [8, 8], 64).mass)() - 1) < 1e-3


def test_hutchinson_agrees_with_the_exact_trace_within_its_own_standard_error():
    keys = jax.random.split(jax.random.key(1), len(X))
    exact = jax.vmap(lambda x: de.log_likelihood(FLOW, x, solver=SOLVER).log_prob)(X)
    trace = de.Hutchinson(200, jax.random.normal)  # random signs take two values in the plane
    found = jax.jit(jax.vmap(lambda x, k: de.log_likelihood(FLOW, x, key=k, trace=trace, solver=jode.Fixed(jode.rk4, 20))))(X, keys)
    z = (found.log_prob - exact) / found.standard_error
    assert np.all(np.abs(z) < 4)
    assert np.all(found.standard_error > 0)
    assert np.mean(z**2) < 3.7  # chi square with 5 degrees of freedom is below 18.4 with probability 0.998


def test_one_probe_cannot_tell_its_error():
    found = de.log_likelihood(FLOW, X[0], key=KEY, trace=de.Hutchinson(), solver=jode.Fixed(jode.rk4, 4))
    assert np.isinf(found.standard_error)
    with pytest.raises(ValueError, match="needs a PRNG key"):
        de.log_likelihood(FLOW, X[0], trace=de.Hutchinson(), solver=jode.Fixed(jode.rk4, 4))


@pytest.mark.parametrize("rank", [2, 8])
def test_hutch_plus_plus_is_exact_on_low_rank_and_unbiased(rank):
    u, v = jax.random.normal(jax.random.key(2), (2, 8, rank))
    f, x = Linear(u @ v.T), jnp.ones(8)

    def estimates(trace, key):
        return jnp.mean(trace.slope(f, jnp.zeros(()), x, None, trace.draw(key, x))[1])

    keys, true = jax.random.split(KEY, 2000), jnp.trace(f.A)
    pp = jax.jit(jax.vmap(lambda k: estimates(de.HutchPlusPlus(2, 2), k)))(keys)
    plain = jax.jit(jax.vmap(lambda k: estimates(de.Hutchinson(6), k)))(keys)  # as many products
    if rank == 2:
        np.testing.assert_allclose(pp, true, rtol=1e-6)
        assert np.std(plain) > 0.1
    else:
        assert abs(np.mean(pp) - true) < 4 * np.std(pp) / np.sqrt(len(keys))
    slope = de.HutchPlusPlus(8, 1).slope(f, jnp.zeros(()), x, None, de.HutchPlusPlus(8, 1).draw(KEY, x))
    np.testing.assert_allclose(slope[1], true, rtol=1e-9)  # a sketch of all dimensions
    np.testing.assert_allclose(slope[0], f.A @ x, rtol=1e-13)


def test_the_planar_formula_is_the_exact_trace():
    f = de.PlanarField(3, 5, 8, key=KEY)
    x, t = jax.random.normal(jax.random.key(3), (3,)), jnp.array(0.4)
    np.testing.assert_allclose(f.divergence(t, x), jnp.trace(jax.jacfwd(lambda x: f(t, x))(x)), rtol=1e-12)
    np.testing.assert_allclose(de.Formula().slope(f, t, x, None, None)[1], de.Exact().slope(f, t, x, None, None)[1], rtol=1e-12)


def test_the_planar_map_has_its_jacobians_log_det_and_an_inverse():
    f = de.PlanarMap(3, 6, key=KEY)
    f = eqx.tree_at(lambda f: f.u, f, -3 * f.w)  # wᵀu far below -1: only û keeps the layers invertible
    x = jax.random.normal(jax.random.key(3), (3,))
    y, log = f(x)
    jacobian = lambda g, x: jnp.linalg.slogdet(jax.jacrev(lambda x: g(x)[0])(x))
    np.testing.assert_allclose(log, jacobian(f, x)[1], rtol=1e-8, atol=1e-8)
    assert jacobian(f, x)[0] == 1
    back, log_back = f.inverse(y)
    np.testing.assert_allclose(back, x, atol=1e-6)
    g = de.PlanarMap(3, 6, key=KEY)
    y, log = g(x)
    back, log_back = g.inverse(y)
    np.testing.assert_allclose(back, x, atol=1e-12)
    np.testing.assert_allclose(log_back, -log, atol=1e-12)
    np.testing.assert_allclose(
        jax.jacrev(lambda y: g.inverse(y)[0])(y), jnp.linalg.inv(jax.jacrev(lambda x: g(x)[0])(x)), atol=1e-10
    )


def test_sampling_then_log_likelihood_round_trips():
    keys = jax.random.split(KEY, 4)
    drawn = jax.jit(jax.vmap(lambda k: de.sample(FLOW, k, trace=de.Exact(), solver=SOLVER)))(keys)
    found = jax.jit(jax.vmap(lambda x: de.log_likelihood(FLOW, x, solver=SOLVER)))(drawn.x)
    np.testing.assert_allclose(found.z, drawn.z, atol=1000 * TOL)
    np.testing.assert_allclose(found.log_prob, drawn.log_prob, atol=1000 * TOL)
    bare = de.sample(FLOW, keys[0], solver=SOLVER)
    np.testing.assert_allclose(bare.x, drawn.x[0], atol=1000 * TOL)
    assert bare.log_prob is None


def test_the_solvers_error_is_measured_by_a_finer_one():
    coarse = jode.Fixed(jode.heun, 4)
    found = jax.jit(jax.vmap(lambda x: de.log_likelihood(FLOW, x, solver=coarse, finer=jode.Fixed(jode.heun, 64))))(X)
    exact = jax.vmap(lambda x: de.log_likelihood(FLOW, x, solver=SOLVER).log_prob)(X)
    np.testing.assert_allclose(found.solver_error, np.abs(found.log_prob - exact), rtol=0.02, atol=1e-6)


def test_a_row_that_fails_is_nan_with_its_status_and_harms_no_other():
    blow = de.CNF(lambda t, x, args: -x * jnp.sum(x * x), de.Normal(2))  # backwards in time it blows up from ‖x‖ > 1/√2
    x = jnp.array([[0.1, 0.2], [2.0, 0.0], [0.3, -0.1]])
    run = lambda x: jax.vmap(lambda x: de.log_likelihood(blow, x, trace=de.Exact(), solver=jode.Adaptive(jode.tsit5, 1e-6, 1e-6)))(
        x
    )
    found, alone = jax.jit(run)(x), jax.jit(run)(x[::2])
    assert found.status.tolist()[::2] == [0, 0]
    assert found.status[1] in (jode.Status.step_underflow, jode.Status.max_steps, jode.Status.nonfinite_state)
    assert np.isnan(found.log_prob).tolist() == [False, True, False]
    assert np.isnan(found.standard_error).tolist() == [False, True, False]
    np.testing.assert_allclose(found.log_prob[::2], alone.log_prob, rtol=1e-12)
    assert found.nfe[0] == alone.nfe[0]


def test_every_row_has_its_own_steps():
    points = X * jnp.array([0.01, 0.1, 1.0, 3.0, 100.0])[:, None]
    nfe = jax.jit(jax.vmap(lambda x: de.log_likelihood(FLOW, x, solver=jode.Adaptive(jode.dopri5, 1e-8, 1e-8)).nfe))(points)
    assert len(set(nfe.tolist())) > 1


@pytest.mark.parametrize("adjoint", [jode.Backprop(), jode.Backsolve()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("trace", [de.Exact(), de.Hutchinson(2)], ids=lambda t: type(t).__name__)
def test_the_likelihoods_gradient_is_a_finite_difference(trace, adjoint):
    def loss(A):
        flow = eqx.tree_at(lambda f: f.field.A, LINEAR, A)
        return de.log_likelihood(flow, X[0], key=KEY, trace=trace, solver=jode.Fixed(jode.rk4, 40), adjoint=adjoint).log_prob

    d, eps = jnp.array([[0.2, 1.0], [-0.5, 0.3]]), 1e-5
    expected = (loss(A + eps * d) - loss(A - eps * d)) / (2 * eps)
    np.testing.assert_allclose(jnp.sum(jax.jit(jax.grad(loss))(A) * d), expected, rtol=1e-5)


# Flow matching.


def test_the_coupling_is_a_permutation_and_no_other_is_cheaper():
    a, b = jax.random.normal(KEY, (2, 6, 2))
    s = de.coupling(a, b)
    assert sorted(s.tolist()) == list(range(6))
    cost = lambda p: float(jnp.mean(jnp.sum((a - b[np.asarray(p)]) ** 2, 1)))
    from itertools import permutations

    assert cost(s) <= min(map(cost, list(permutations(range(6)))[::7])) + 1e-12
    assert de.squared_w2(a, b) == pytest.approx(cost(s))
    assert cost(s) <= cost(range(6))
    assert de.coupling(a, a[::-1]).tolist() == [5, 4, 3, 2, 1, 0]
    assert de.squared_w2(a, a + 3.0) == pytest.approx(18.0)
    with pytest.raises(ValueError, match="one shape"):
        de.coupling(a, b[:3])


def test_the_matching_loss_is_zero_for_the_true_field_and_its_paths_join_the_ends():
    x0 = jax.random.normal(KEY, (32, 2))
    shift = jnp.array([1.0, -2.0])
    assert de.matching_loss(lambda t, x, a: shift, x0, x0 + shift, KEY) == pytest.approx(0, abs=1e-28)
    # scaling by c: x_t = (1 + (c - 1) t) x0, so u = (c - 1) x_t / (1 + (c - 1) t)
    assert de.matching_loss(lambda t, x, a: 2 * x / (1 + 2 * t), x0, 3 * x0, KEY) == pytest.approx(0, abs=1e-24)
    assert de.matching_loss(lambda t, x, a: 2 * x, x0, 3 * x0, KEY) > 0.1
    a, b, e = jnp.array([1.0]), jnp.array([3.0]), jnp.array([2.0])
    np.testing.assert_allclose(de.path(a, b, 0.25, e, 0.1), ([1.7], [2.0]))
    np.testing.assert_allclose(de.path_energy(lambda t, x, a: shift, x0), 5.0)


def test_augmented_fields_lift_and_drop():
    f = de.Augmented(2, 3, 8, key=KEY)
    y = jode.odeint(f, f.lift(X[0]), (0.0, 1.0), solver=jode.Fixed(jode.rk4, 4))[-1]
    assert f.lift(X[0]).tolist() == [*X[0].tolist(), 0, 0, 0]
    assert f.drop(y).shape == (2,)
    assert np.abs(y[2:]).min() > 0


# Training: one trace, and resumed bit for bit.

OPTIMIZER = optax.adam(1e-2)


def test_training_compiles_once_lowers_the_loss_and_resumes_bit_for_bit():
    traces = []
    points = data.moons(jax.random.key(5), 64)
    arrays, static = eqx.partition(random_flow(width=8), eqx.is_inexact_array)
    trace = de.Hutchinson(1)

    @jax.jit
    def step(carry):
        traces.append(1)
        arrays, state, key = carry
        key, batch, probe = jax.random.split(key, 3)
        x = points[jax.random.randint(batch, (16,), 0, 64)]

        def loss(arrays):
            flow = eqx.combine(arrays, static)
            row = lambda x, k: de.log_likelihood(flow, x, key=k, trace=trace, solver=jode.Fixed(jode.rk4, 4)).log_prob
            return -jnp.mean(jax.vmap(row)(x, jax.random.split(probe, 16)))

        value, gradient = jax.value_and_grad(loss)(arrays)
        updates, state = OPTIMIZER.update(gradient, state)
        return (optax.apply_updates(arrays, updates), state, key), value

    carry, losses, kept = (arrays, OPTIMIZER.init(arrays), jax.random.key(9)), [], None
    for k in range(60):
        if k == 41:  # what a checkpoint holds: arrays, and the key's data
            kept = jax.tree.map(np.asarray, (carry[0], carry[1], jax.random.key_data(carry[2])))
        carry, value = step(carry)
        losses.append(float(value))
    assert len(traces) == 1
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.2
    arrays, state, bits = jax.tree.map(jnp.asarray, kept)
    again = (arrays, state, jax.random.wrap_key_data(bits))
    for _ in range(41, 60):
        again, _ = step(again)
    assert len(traces) == 1
    for a, b in zip(jax.tree.leaves(carry[:2]), jax.tree.leaves(again[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(jax.random.key_data(carry[2]), jax.random.key_data(again[2]))


# Data.


@pytest.mark.parametrize(
    "draw", [data.moons, data.circles, data.gaussians, data.checkerboard, data.s_curve], ids=lambda d: d.__name__
)
def test_shapes_are_what_they_say(draw):
    x = np.asarray(jax.jit(draw, static_argnums=1)(KEY, 4000))
    assert x.shape == (4000, 2)
    r = np.linalg.norm(x, axis=1)
    if draw is data.circles:
        assert np.minimum(abs(r - 1), abs(r - 0.5)).max() < 6 * 0.06
    if draw is data.gaussians:
        assert abs(x.mean(0)).max() < 4 * 5 / np.sqrt(2 * 4000)
        assert abs(r.mean() - 5) < 0.05
    if draw is data.checkerboard:
        assert np.all(np.floor(x).sum(1) % 2 == 0)
        counts = np.unique(np.floor(x), axis=0, return_counts=True)[1]
        assert len(counts) == 8
        assert counts.min() > 400
    if draw is data.moons:
        upper, lower = abs(r - 1), abs(np.linalg.norm(x - [1, 0.5], axis=1) - 1)
        assert np.minimum(upper, lower).max() < 0.5
    if draw is data.s_curve:
        assert abs(x.mean(0)).max() < 0.1
        assert 1.9 < x[:, 1].max() < 2.3
