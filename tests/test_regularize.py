"""Integrals that make dynamics cheap, against closed forms; times that jitter; step errors that fall like h^p."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode.regularize import Effort, derivatives, initial, integrate, jacobian, kinetic, solver_effort, steer, taylor

FINE = jode.Adaptive(jode.dopri8, 1e-10, 1e-10)
A = jnp.array([[-0.3, 1.1, 0.0], [-0.9, 0.2, 0.4], [0.1, 0.0, -0.5]])
Y0 = jnp.array([1.0, -2.0, 0.5])


def linear(t, y, A):
    return A @ y


def integrals(f, *rates, y0=Y0, args=A, end=1.5, solver=FINE, adjoint=jode.Backprop()):
    g = integrate(f, *rates)
    return jode.odeint(g, initial(y0, len(rates)), (0.0, end), args, solver=solver, adjoint=adjoint)


def quadratic(B, end=1.5):
    """∫₀ᵀ ‖B e^(tA) y0‖² dt = y0ᵀ S y0, from the exponential of a block matrix (Van Loan 1978)."""
    M = np.block([[-np.asarray(A).T, np.asarray(B.T @ B)], [np.zeros((3, 3)), np.asarray(A)]])
    E = np.asarray(jax.scipy.linalg.expm(jnp.asarray(M * end)))
    return float(Y0 @ (E[3:, 3:].T @ E[:3, 3:]) @ Y0)


def test_integrals_on_a_linear_field_are_the_closed_forms():
    y, (k, j, s) = integrals(linear, kinetic(linear), jacobian(linear), taylor(linear, 3))
    np.testing.assert_allclose(y[-1], jax.scipy.linalg.expm(1.5 * A) @ Y0, rtol=1e-9)
    np.testing.assert_allclose(k[-1], quadratic(A), rtol=1e-8)
    np.testing.assert_allclose(j[-1], 1.5 * jnp.sum(A**2), rtol=1e-8)
    np.testing.assert_allclose(s[-1], quadratic(A @ A @ A), rtol=1e-8)
    assert [float(x[0]) for x in (k, j, s)] == [0, 0, 0]


def test_the_state_is_that_of_the_field_alone():
    alone = jode.odeint(linear, Y0, (0.0, 1.5), A, solver=jode.Fixed(jode.rk4, 8))
    y, _ = integrals(linear, kinetic(linear), taylor(linear), solver=jode.Fixed(jode.rk4, 8))
    np.testing.assert_allclose(y, alone, rtol=1e-14)


def test_the_mean_over_all_sign_probes_is_the_frobenius_norm():
    rates = [jacobian(linear, jnp.array(signs)) for signs in product((-1.0, 1.0), repeat=3)]
    found = [float(rate(0.0, Y0, A)) for rate in rates]
    np.testing.assert_allclose(np.mean(found), np.sum(A**2), rtol=1e-13)
    assert np.std(found) > 0.1


def test_rates_take_pytrees():
    f = lambda t, y, a: {"p": a @ y["q"], "q": -y["p"] * t}
    y = {"p": jnp.array([1.0, 2.0, 3.0]), "q": jnp.array([0.5, 0.1, -1.0])}
    t = jnp.array(0.7)
    np.testing.assert_allclose(kinetic(f)(t, y, A), jnp.sum((A @ y["q"]) ** 2) + jnp.sum((0.7 * y["p"]) ** 2), rtol=1e-13)
    np.testing.assert_allclose(jacobian(f)(t, y, A), jnp.sum(A**2) + 3 * 0.49, rtol=1e-13)
    second = jnp.sum((A @ (-y["p"] * t)) ** 2) + jnp.sum((-y["p"] - t * (A @ y["q"])) ** 2)
    np.testing.assert_allclose(taylor(f, 2)(t, y, A), second, rtol=1e-13)
    assert initial(y, 2)[1] == (0.0, 0.0)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_taylor_is_the_repeated_time_derivative(order):
    f = lambda t, y, a: jnp.tanh(a @ y) * jnp.cos(t) - 0.1 * y**3

    def total(g):  # d/dt along the solution
        return lambda t, y: jax.jvp(g, (t, y), (jnp.ones(()), f(t, y, A)))[1]

    g = lambda t, y: f(t, y, A)
    for _ in range(order - 1):
        g = total(g)
    last = lambda t, y: (derivatives(f, t, y, A, order)[-1], taylor(f, order)(t, y, A), g(t, y))
    derivative, rate, true = jax.jit(last)(jnp.array(0.3), Y0)
    np.testing.assert_allclose(derivative, true, rtol=1e-11)
    np.testing.assert_allclose(rate, np.sum(true**2), rtol=1e-11)


@pytest.mark.parametrize("rate", [kinetic, jacobian, taylor], ids=lambda r: r.__name__)
@pytest.mark.parametrize("adjoint", [jode.Backprop(), jode.MemoryFree(max_drift=1.0)], ids=lambda a: type(a).__name__)
def test_gradients_flow_through_the_integrals(rate, adjoint):
    f = lambda t, y, a: jnp.tanh(a @ y) + t * y
    solver = jode.Fixed(jode.reversible_heun if isinstance(adjoint, jode.MemoryFree) else jode.rk4, 16)
    loss = lambda a: integrals(f, rate(f), args=a, solver=solver, adjoint=adjoint)[1][0][-1]
    direction = jax.random.normal(jax.random.key(0), A.shape)
    found = jnp.sum(jax.jit(jax.grad(loss))(A) * direction)
    eps = 1e-5  # of the central difference: error O(eps²)
    expected = (jax.jit(loss)(A + eps * direction) - loss(A - eps * direction)) / (2 * eps)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_taylor_refuses_orders_below_one():
    with pytest.raises(ValueError, match="order must be a positive int"):
        taylor(linear, 0)


def test_steer_keeps_the_mean_end_time_and_all_other_times():
    ts, b, n = jnp.array([0.0, 0.4, 1.0]), 0.25, 4000
    drawn = jax.vmap(partial(steer, ts=ts, width=b))(jax.random.split(jax.random.key(0), n))
    ends = np.asarray(drawn[:, -1])
    assert np.all(drawn[:, :-1] == ts[None, :-1])
    assert np.all(np.abs(ends - 1) <= b)
    sigma = b / np.sqrt(3)  # of the uniform distribution
    assert abs(ends.mean() - 1) < 4 * sigma / np.sqrt(n)
    assert abs(ends.std() / sigma - 1) < 0.05
    assert steer(jax.random.key(1), (1.0, 0.0), 0.5)[0] == 1.0  # backwards, and times may be Python numbers


def test_steer_keeps_dtype_and_derivatives_and_refuses_widths_that_reorder():
    ts = jnp.array([0.0, 1.0], jnp.float32)
    assert steer(jax.random.key(0), ts, 0.5).dtype == jnp.float32
    assert jax.grad(lambda end: steer(jax.random.key(0), jnp.stack([0.0 * end, end]), 0.1)[-1])(1.0) == 1.0
    for width in (1.0, -0.1):
        with pytest.raises(ValueError, match="less than the last interval"):
            steer(jax.random.key(0), ts, width)


@pytest.mark.parametrize("method", [jode.euler, jode.heun, jode.bosh3, jode.rk4], ids=str)
def test_solver_effort_falls_like_the_methods_order(method):
    f = lambda t, y, a: jnp.tanh(a @ y) + jnp.cos(t)
    effort = [float(solver_effort(f, Y0, (0.0, 1.0), A, solver=jode.Fixed(method, n))) for n in (32, 64)]
    assert np.log2(effort[0] / effort[1]) == pytest.approx(method.order, abs=0.1)


def test_solver_effort_has_a_gradient_also_where_steps_are_exact():
    effort = lambda c: solver_effort(lambda t, y, c: c * y, Y0, (0.0, 1.0), c, solver=jode.Fixed(jode.heun, 4))
    slope = jax.jit(jax.grad(effort))
    assert slope(0.0) == 0.0
    assert slope(1.0) > 0
    with pytest.raises(TypeError, match=r"jode\.Fixed"):
        solver_effort(linear, Y0, (0.0, 1.0), A, solver=FINE)


@pytest.mark.parametrize("solver", [jode.Adaptive(jode.tsit5, 1e-6, 1e-6), jode.Fixed(jode.heun, 20)], ids=["adaptive", "fixed"])
def test_effort_is_the_sum_of_the_solves_own_estimates(solver):
    f = lambda t, y, a: jnp.tanh(a @ y) + jnp.cos(t)
    seen = lambda a: jode.solve(f, Y0, (0.0, 1.0), a, solver=solver, observe={"effort": Effort(), "steps": jode.Steps()}).observed
    out, method = seen(A), solver.method
    n = int(out["steps"].count)
    ts = jnp.concatenate([jnp.zeros(1), out["steps"].ts[:n]])
    ys = jnp.concatenate([Y0[None], out["steps"].ys[:n]])

    def estimate(t, h, y, y1):
        ks = []
        for c, row in zip(method.tableau.c, method.tableau.a, strict=True):
            ks.append(f(t + c * h, y + h * sum((w * k for w, k in zip(row, ks, strict=False)), jnp.zeros_like(y)), A))
        ks.append(f(t + h, y1, A))
        error = h * sum(w * k for w, k in zip(method.error[0], ks, strict=False))
        return h * jnp.sqrt(jnp.mean(error**2))

    total = jnp.sum(jax.jit(jax.vmap(estimate))(ts[:-1], jnp.diff(ts), ys[:-1], ys[1:]))
    np.testing.assert_allclose(out["effort"], total, rtol=1e-8)
    effort = lambda a: seen(a)["effort"]
    np.testing.assert_allclose(*jax.jit(lambda a: (jax.grad(effort)(a), jax.jacfwd(effort)(a)))(A), rtol=1e-9, atol=1e-16)
    rows = jax.jit(jax.vmap(effort))(jnp.stack([A, 2 * A]))
    np.testing.assert_allclose(rows[0], out["effort"], rtol=1e-8)
    with pytest.raises(ValueError, match="estimates its error"):
        jode.solve(f, Y0, (0.0, 1.0), A, solver=jode.Fixed(jode.rk4, 3), observe=Effort())


def test_the_effort_of_a_row_that_failed_is_unknown_and_harms_no_other():
    run = lambda y, a: jode.solve(lambda t, y, a: a * y**2, y, (0.0, 1.0), a, solver=jode.Adaptive(max_steps=60), observe=Effort())
    rows = jnp.array([0.3, 2.0, 0.5])  # the second blows up at 1/2
    sol = jax.vmap(run, (0, None))(rows, 1.0)
    np.testing.assert_array_equal(jnp.isnan(sol.observed), sol.status != jode.Status.success)
    assert sol.status[1] != jode.Status.success
    shared = lambda a, rows: jnp.nansum(jax.vmap(run, (0, None))(rows, a).observed)
    np.testing.assert_allclose(jax.grad(shared)(1.0, rows), jax.grad(shared)(1.0, rows[::2]), rtol=1e-10)
