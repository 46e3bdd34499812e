"""Adaptive solves: work and accuracy on DETEST, tolerances met at the end and at save times, dtypes kept."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from tests.problems import CLASSICS, DETEST, arenstorf, lorenz, lotka_volterra, pleiades, van_der_pol

# Evaluations of f over all 25 problems: 1.1 times the better of scipy 1.17 (RK45, DOP853) and diffrax 0.7.2.
BUDGET = {
    "dopri5": {4: 5510, 6: 10572, 8: 22004, 10: 49878},
    "tsit5": {4: 5838, 6: 11220, 8: 23604, 10: 53352},
    "dopri8": {4: 6710, 6: 10226, 8: 15878, 10: 25646},
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", BUDGET)
def test_detest(name):
    """25 problems to t = 20: errors in units of tol (1 + |y|), and the work they took."""
    errors = {e: [] for e in BUDGET[name]}
    work = dict.fromkeys(BUDGET[name], 0)
    method = getattr(jode, name)
    run = jax.jit(
        lambda f, y0, t1, tol: jode.solve(f, y0, jnp.stack([0.0, t1]), solver=jode.Adaptive(method, tol, tol, max_steps=100_000)),
        static_argnums=0,
    )
    for p in DETEST.values():
        for e, found in errors.items():
            sol = jode.check(run(p.f, jnp.array(p.y0), p.t1, 10.0**-e))
            found.append(np.max(np.abs(sol.ys[-1] - p.y1) / (1 + np.abs(p.y1))) * 10.0**e)
            work[e] += int(sol.stats.nfe)
    fifth = name != "dopri8"
    for e, found in errors.items():
        assert work[e] <= 1.1 * BUDGET[name][e]
        assert np.exp(np.mean(np.log(np.maximum(found, 1e-6)))) <= (10 if fifth else 1)
        assert max(found) <= (5000 if e < 8 else 500 if fifth else 200)


@pytest.mark.parametrize("name", CLASSICS)
def test_twelve_digits(name):
    p = CLASSICS[name]
    bound = {
        "pleiades": 1e-10,
        "lorenz": 5e-11,
        "lotka_volterra": 2e-12,
        "van_der_pol": 5e-12,
        "fitzhugh_nagumo": 5e-12,
        "planets": 5e-12,
    }
    sol = jode.solve(p.f, jnp.array(p.y0), (0.0, p.t1), solver=jode.Adaptive(jode.dopri8, 1e-13, 1e-13))
    assert np.abs(sol.ys[-1] - p.y1).max() <= bound.get(name, 1e-12)


@pytest.mark.parametrize("name", CLASSICS)
@pytest.mark.parametrize("method", [jode.dopri5, jode.tsit5], ids=str)
def test_error_falls_in_proportion_to_the_tolerance(name, method, request):
    if (name, method) == ("planets", jode.tsit5):
        request.applymarker(pytest.mark.xfail(strict=True, reason="slope 1.21: eight steps at 1e-4 are not yet asymptotic"))
    p = CLASSICS[name]
    run = jax.jit(
        lambda tol: jode.odeint(p.f, jnp.array(p.y0), (0.0, p.t1), solver=jode.Adaptive(method, tol, tol, max_steps=50_000))[-1]
    )
    tols = 10.0 ** -np.arange(4, 12)
    errors = [np.abs(run(t) - p.y1).max() for t in tols]
    assert 0.8 <= np.polyfit(np.log(tols), np.log(errors), 1)[0] <= 1.2


ARENSTORF = [0.994, 0.0, 0.0, -2.00158510637908252240537862224]
SAVED = {
    "lotka_volterra": (lotka_volterra, [1.0, 1.0], 10.0),
    "lorenz": (lorenz, [1.0, 1.0, 1.0], 5.0),
    "arenstorf": (arenstorf, ARENSTORF, 17.0652165601579625588917206249),
    "pleiades": (pleiades, CLASSICS["pleiades"].y0, 3.0),
    "van_der_pol": (van_der_pol(5.0), [2.0, 0.0], 10.0),
}


@cache
def saved_truth(name):
    f, y0, t1 = SAVED[name]
    solver = jode.Adaptive(jode.dopri8, 1e-13, 1e-13, max_steps=20_000)
    return jode.odeint(f, jnp.array(y0), jnp.linspace(0.0, t1, 41), solver=solver)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in SAVED for method in ("tsit5", "dopri8")] + [("lotka_volterra", "dopri5"), ("van_der_pol", "bosh3")],
)
def test_save_times_are_as_good_as_the_end(name, method):
    """A state between steps is as accurate as one that a step ends at, and costs no step."""
    f, y0, t1 = SAVED[name]
    tol = 1e-5 if method == "bosh3" else 1e-7
    y0, ts = jnp.array(y0), jnp.linspace(0.0, t1, 41)
    solver = jode.Adaptive(getattr(jode, method), tol, tol, max_steps=20_000)
    sol = jode.check(jode.solve(f, y0, ts, solver=solver))
    ended = jax.vmap(lambda t: jode.solve(f, y0, jnp.stack([0.0, t]), solver=solver))(ts)
    true = saved_truth(name)
    scale = tol * (1 + np.abs(true).max(1))
    between, at_ends = (np.abs(y - true).max(1) / scale for y in (sol.ys, ended.ys[:, -1]))
    assert between.max() <= 3 * at_ends.max() + 1
    assert sol.stats.accepted == ended.stats.accepted[-1]


def test_arenstorf_ends_where_it_began():
    y = jode.odeint(
        arenstorf, jnp.array(ARENSTORF), (0.0, 17.0652165601579625588917206249), solver=jode.Adaptive(jode.dopri8, 1e-12, 1e-12)
    )
    assert np.abs(y[-1, :2] - np.array(ARENSTORF[:2])).max() < 1e-7


def test_backwards_in_time_is_forwards_mirrored():
    solver = jode.Adaptive(jode.tsit5, 1e-8, 1e-8)
    ts = np.linspace(0.0, 2.0, 7)
    back = jode.solve(lotka_volterra, jnp.array([1.0, 2.0]), 5 - ts, solver=solver)
    mirror = jode.solve(lambda t, y, a: -lotka_volterra(t, y, a), jnp.array([1.0, 2.0]), ts, solver=solver)
    np.testing.assert_allclose(back.ys, mirror.ys, rtol=0, atol=1e-13)
    assert back.stats.nfe == mirror.stats.nfe


def test_there_and_back_again():
    solver = jode.Adaptive(jode.dopri5, 1e-9, 1e-9)
    y0 = jnp.array([1.0, 2.0])
    there = jode.odeint(lotka_volterra, y0, (0.0, 2.0), solver=solver)[-1]
    assert np.abs(jode.odeint(lotka_volterra, there, (2.0, 0.0), solver=solver)[-1] - y0).max() < 1e-7


def test_save_times_given_twice_are_equal_and_those_at_the_start_are_y0():
    y0 = jnp.array([1.0, 2.0])
    ys = jode.odeint(lotka_volterra, y0, (0.0, 0.0, 0.7, 0.7, 1.0, 1.0))
    assert np.array_equal(ys[1], y0)
    assert np.array_equal(ys[2], ys[3])
    np.testing.assert_allclose(ys[4], ys[5], rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", [jode.Adaptive(), jode.Fixed(jode.rk4, 3)], ids=["adaptive", "fixed"])
def test_an_interval_of_no_length_returns_y0_bitwise(solver):
    y0 = jnp.array([1.0, 2.0])
    sol = jax.jit(lambda y0: jode.solve(lotka_volterra, y0, (0.3, 0.3), solver=solver))(y0)
    assert np.array_equal(sol.ys, np.stack([y0, y0]))
    assert sol.status == jode.Status.success
    if isinstance(solver, jode.Adaptive):
        assert sol.stats.steps == 0
    jacobian = jax.jit(jax.jacrev(lambda y0: jode.odeint(lotka_volterra, y0, (0.3, 0.3), solver=solver)[-1]))(y0)
    np.testing.assert_array_equal(jacobian, np.eye(2))


def test_a_pytree_state_and_a_complex_state():
    def f(t, y, args):
        return {"a": -y["a"], "b": (1j * y["b"][0], y["a"].sum() * jnp.ones((2, 2)))}

    y0 = {"a": jnp.array([1.0, 2.0]), "b": (jnp.array(1.0 + 0j), jnp.zeros((2, 2)))}
    ts = jnp.linspace(0.0, 2.0, 5)
    y = jode.odeint(f, y0, ts, solver=jode.Adaptive(jode.tsit5, 1e-9, 1e-9))
    np.testing.assert_allclose(y["a"], np.exp(-ts)[:, None] * np.array([[1.0, 2.0]]), atol=1e-7)
    np.testing.assert_allclose(y["b"][0], np.exp(1j * np.asarray(ts)), atol=1e-7)
    np.testing.assert_allclose(y["b"][1][:, 1, 0], 3 * (1 - np.exp(-ts)), atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "x64", "times"),
    [
        *((dtype, x64, times) for dtype in ("bfloat16", "float32") for x64 in (True, False) for times in ("python", "jax")),
        *((dtype, True, "jax") for dtype in ("float16", "float64", "complex64", "complex128")),
        *((dtype, False, "python") for dtype in ("float16", "complex64")),
    ],
)
def test_the_state_keeps_its_dtype(dtype, x64, times):
    error = {"float16": 1e-2, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-9, "complex64": 1e-4, "complex128": 1e-9}[dtype]
    tol = error / 10
    with jax.enable_x64(x64):
        ts = {"python": (0.0, 1.0), "jax": jnp.linspace(0.0, 1.0, 3)}[times]
        y0 = jnp.array([1.0, 0.5], dtype)
        for solver in (jode.Adaptive(jode.tsit5, tol, tol), jode.Fixed(jode.rk4, 40)):
            sol = jode.solve(lambda t, y, a: -y * jnp.cos(t).astype(y.dtype), y0, ts, solver=solver)
            assert sol.ys.dtype == dtype
            exact = np.array([1.0, 0.5]) * np.exp(-np.sin(1.0))
            assert np.abs(np.asarray(sol.ys[-1]).astype(complex) - exact).max() < error


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_gradients_keep_the_dtype_of_the_state(dtype):
    loss = lambda y: jnp.sum(jnp.abs(jode.odeint(lambda t, y, a: -y, y, (0.0, 1.0), solver=jode.Fixed(jode.heun, 8))[-1]))
    assert jax.grad(loss)(jnp.array([1.0, 0.5], dtype)).dtype == dtype


def test_leaves_of_different_dtypes_keep_theirs():
    y0 = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(3, jnp.float32), "double": jnp.ones(())}
    y = jode.odeint(lambda t, y, a: jax.tree.map(lambda x: -x, y), y0, (0.0, 1.0))
    assert jax.tree.map(lambda x: x.dtype, y) == jax.tree.map(lambda x: x.dtype, y0)


@pytest.mark.parametrize("name", CLASSICS)
def test_float32_takes_no_more_than_twice_the_steps_of_float64(name):
    p = CLASSICS[name]
    solver = jode.Adaptive(jode.tsit5, 1e-5, 1e-5)
    single = jode.solve(p.f, jnp.array(p.y0, jnp.float32), jnp.array([0.0, p.t1], jnp.float32), solver=solver)
    double = jode.solve(p.f, jnp.array(p.y0), (0.0, p.t1), solver=solver)
    assert single.status == jode.Status.success
    assert single.stats.steps <= 2 * double.stats.steps


@pytest.mark.parametrize("coefficients", [(0.0, 1.0, 0.0), (0.3, 0.4, 0.0), (0.2, 0.3, 0.05)])
def test_every_controller_meets_the_tolerance(coefficients):
    p, i, d = coefficients
    ivp = CLASSICS["lotka_volterra"]
    solver = jode.Adaptive(jode.dopri5, 1e-7, 1e-7, pcoeff=p, icoeff=i, dcoeff=d)
    sol = jode.solve(ivp.f, jnp.array(ivp.y0), (0.0, 10.0), solver=solver)
    assert np.abs(sol.ys[-1] - ivp.y1).max() < 3e-6
    assert sol.stats.steps < 250


def test_a_long_float32_march_does_not_lose_its_clock():
    """Y' = y cos t to t = 100 in 100,000 steps: adding h up would lose 3.6e-2."""
    y = jode.odeint(
        lambda t, y, a: y * jnp.cos(t),
        jnp.ones(1, jnp.float32),
        jnp.array([0.0, 100.0], jnp.float32),
        solver=jode.Fixed(jode.rk4, 100_000),
    )
    assert abs(float(y[-1, 0]) / np.exp(np.sin(100.0)) - 1) < 1e-4


WAVES = {
    "step": (lambda t: jnp.where(t < 0.37, 1.0, -1.0), [0.37]),
    "square": (lambda t: jnp.where(jnp.floor(2 * t) % 2 == 0, 1.0, -1.0), np.arange(1, 20) / 2),
    "sine": (lambda t: jnp.where(jnp.sin(3 * t) > 0, 1.0, -1.0), np.pi * np.arange(1, 10) / 3),
}


@pytest.mark.parametrize("solver", [jode.tsit5, jode.dopri5, "compat"], ids=str)
@pytest.mark.parametrize("wave", WAVES)
def test_jumps_in_single_precision_cost_rounding(wave, solver):
    """y' = u(t) - 0.3 y, u jumping: narrowest steps err by 100 ulp each, the others by less in all. Across a jump estimates are
    right to a factor of ten.
    """
    u, jumps = WAVES[wave]
    f = lambda t, y, a: u(t).astype(y.dtype) - 0.3 * y
    single, ts = jnp.float32, np.linspace(0.0, 10.0, 6)
    y0 = jnp.array([0.3, 1.0, 10.0])[:, None]
    exact = jax.vmap(lambda y: jode.odeint(f, y, ts, solver=jode.Adaptive(jode.dopri8, 1e-12, 1e-12), stops=jumps))(y0)

    def one(y):
        if solver == "compat":
            return jode.compat.odeint(lambda y, t: f(t, y, None), y, jnp.asarray(ts, single), rtol=5e-7, atol=5e-7, hmax=1.0)
        return jode.odeint(f, y, jnp.asarray(ts, single), solver=jode.Adaptive(solver, 5e-7, 5e-7))

    ys, exact = np.asarray(jax.vmap(one)(y0.astype(single))), np.asarray(exact)
    bound = 1000 * float(jnp.finfo(single).eps) * (1 + len(jumps)) * (1 + np.max(np.abs(exact), axis=1, keepdims=True))
    assert ys.dtype == single
    assert np.isfinite(ys).all()
    assert (np.abs(ys - exact) < bound).all()


@pytest.mark.parametrize("stops", [None, [3.3]], ids=str)
def test_narrowest_steps_are_those_of_every_batch_and_of_the_way_back(stops):
    """The loop runs often enough for several chapters, and rows that finish late go on in groups; e^(-0.3 t) is the derivative."""
    f = lambda t, y, a: WAVES["square"][0](t).astype(y.dtype) - 0.3 * y
    solver, ts = jode.Adaptive(rtol=5e-7, atol=5e-7), jnp.linspace(0, 10, 6, dtype=jnp.float32)
    y0 = jnp.linspace(0.3, 10, 1200, dtype=jnp.float32)[:, None]
    many, few = (jax.vmap(lambda y: jode.solve(f, y, ts, solver=solver, stops=stops))(y) for y in (y0, y0[::100]))
    assert (many.status == jode.Status.success).all()
    assert int(many.stats.steps.min()) > 500
    rounding = 20 * 100 * float(jnp.finfo(jnp.float32).eps)  # of twenty narrowest steps, which may lie elsewhere in another batch
    np.testing.assert_allclose(many.ys[::100], few.ys, rtol=0, atol=rounding * 11)
    slope = jax.vmap(jax.grad(lambda y: jode.odeint(f, y, ts, solver=solver, stops=stops)[-1, 0]))(y0[::100])
    np.testing.assert_allclose(slope, np.exp(-3.0), rtol=1e-5)


def test_a_jump_late_in_time_or_a_blow_up_is_more_than_rounding():
    """In single precision at its tightest tolerance: no number comes of either."""
    t0 = jnp.float32(10_000)
    step = lambda t, y, a: jnp.where(t < t0 + 0.37, 1.0, -1.0).astype(y.dtype) + 0 * y
    pole = lambda t, y, a: y * y
    for f, ts, after in ((step, [10_000.0, 10_001.0], 0.37), (pole, [0.0, 2.0], 1.0)):
        sol = jode.solve(f, jnp.ones(1, jnp.float32), jnp.array(ts, jnp.float32), solver=jode.Adaptive(rtol=5e-7, atol=5e-7))
        assert sol.status == jode.Status.step_underflow
        assert np.isnan(sol.ys[-1]).all()
        width = 10 * float(jnp.finfo(jnp.float32).eps) * ts[-1]
        assert abs(sol.reached - ts[0] - after) < 5 * width
