"""Loud, honest, contained: what a solve does when it cannot do what was asked."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode import Status
from jode.method import Momentum

SOLVERS = {"adaptive": jode.Adaptive(jode.tsit5, 1e-6, 1e-6, max_steps=500), "fixed": jode.Fixed(jode.heun, 100)}
ADJOINTS = [jode.Backprop(), jode.Backprop(3)]


def nan_after(sol):
    """The save times that are NaN: all from some time on, and no other."""
    bad = np.isnan(np.asarray(sol.ys)).reshape(len(sol.ts), -1).any(1)
    assert np.all(np.diff(bad.astype(int)) >= 0)
    return np.asarray(sol.ts)[bad]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("component", [0, 1, slice(None)])
def test_dynamics_that_are_not_finite_fail_at_the_first_call(value, component):
    sol = jode.solve(lambda t, y, a: -y.at[component].set(value), jnp.ones(2), (0.0, 1.0))
    assert sol.status == Status.nonfinite_dynamics
    assert sol.stats.nfe <= 10
    assert np.isnan(sol.ys[-1]).all()
    with pytest.raises(jode.SolveError, match=r"nonfinite_dynamics after 0 steps.*domain"):
        jode.check(sol)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_initial_state_that_is_not_finite(solver):
    with pytest.raises(ValueError, match="y0 must be finite"):
        jode.solve(lambda t, y, a: -y, jnp.array([1.0, np.nan]), (0.0, 1.0), solver=SOLVERS[solver])
    sol = jax.jit(lambda y: jode.solve(lambda t, y, a: -y, y, (0.0, 1.0), solver=SOLVERS[solver]))(jnp.array([1.0, np.nan]))
    assert sol.status == Status.nonfinite_state
    assert np.isnan(sol.ys[-1]).any()


@pytest.mark.parametrize("first_step", [None, 2.5])
def test_a_trial_step_may_leave_the_domain(first_step):
    """y' = y + 0 √(20 - y): a solution exists to t = 2.9, though trial steps pass y = 20."""
    f = lambda t, y, a: y + 0 * jnp.sqrt(20 - y)
    solver = jode.Adaptive(jode.dopri5, 1e-6, 1e-6, first_step=first_step)
    sol = jode.check(jode.solve(f, jnp.ones(1), (0.0, 2.9), solver=solver))
    assert abs(sol.ys[-1, 0] / np.exp(2.9) - 1) <= 5e-6
    gradient = jax.grad(lambda y: jode.odeint(f, y, (0.0, 2.9), solver=solver)[-1, 0])(jnp.ones(1))
    assert abs(gradient[0] / np.exp(2.9) - 1) <= 1e-5


def test_a_solution_that_leaves_its_domain_fails_there():
    ts = np.linspace(0.0, 5.0, 11)
    sol = jode.solve(lambda t, y, a: y + 0 * jnp.sqrt(20 - y), jnp.ones(1), ts, solver=SOLVERS["adaptive"])
    assert sol.status == Status.step_underflow
    assert nan_after(sol)[0] == 3.0
    np.testing.assert_allclose(sol.ys[:6, 0], np.exp(ts[:6]), rtol=1e-4)


@pytest.mark.parametrize("y0", [0.5, 1.0, 4.0])
def test_blow_up_is_found_at_its_time(y0):
    """y' = y² ceases to exist at t = 1 / y0."""
    ts = np.concatenate([np.linspace(0, 0.999, 5), [1.001, 3.0]]) / y0
    sol = jode.solve(lambda t, y, a: y * y, jnp.array([y0]), ts, solver=SOLVERS["adaptive"])
    assert sol.status in (Status.step_underflow, Status.nonfinite_state, Status.max_steps)
    assert nan_after(sol)[0] == ts[5]


def test_max_steps_is_reported_and_never_a_number():
    fields = {
        Status.max_steps: (lambda t, y, a: jnp.cos(1e6 * t) + 0 * y, r"max_steps after 500 steps.*raise Adaptive\(max_steps"),
        Status.stiff: (lambda t, y, a: -1e6 * y, r"stiff after 500 steps.*jode.rodas5p"),
    }
    for status, (f, words) in fields.items():
        sol = jode.solve(f, jnp.ones(1), (0.0, 1.0), solver=SOLVERS["adaptive"])
        assert sol.status == status
        assert sol.stats.steps == 500
        assert np.isnan(sol.ys[-1]).all()
        with pytest.raises(jode.SolveError, match=words):
            jode.check(sol)


def test_an_unstable_fixed_step_is_not_a_success():
    sol = jode.solve(lambda t, y, a: -1e6 * y, jnp.ones(1), np.linspace(0.0, 1.0, 6), solver=jode.Fixed(jode.rk4, 100))
    assert sol.status == Status.nonfinite_state
    assert np.isnan(sol.ys[1:]).all()


CARRIED = {
    "leapfrog": (jode.leapfrog, 2000),
    "reversible_heun": (jode.reversible_heun, 2000),
    "momentum": (Momentum(0.9), 200),
}


@pytest.mark.parametrize("adjoint", [jode.Backprop(), jode.MemoryFree()], ids=str)
@pytest.mark.parametrize("method", CARRIED)
def test_copies_that_have_taken_over_are_a_status(method, adjoint):
    """y' = -k y to t = 20 by methods that carry more than y: fast rows are wrong at the end, slow ones are right beside
    them, and so is the gradient of what they share.
    """
    method, steps = CARRIED[method]
    ts = np.array([0.0, 0.5, 20.0])
    rates = jnp.array([1.0, 0.01, 2.0, 0.1])

    def loss(y0, mask):
        one = lambda k: jode.solve(lambda t, y, k: -k * y, y0, ts, k, solver=jode.Fixed(method, steps), adjoint=adjoint)
        sol = jax.vmap(one)(rates)
        return jnp.sum(jnp.where(mask, sol.ys[:, -1], 0.0)), sol

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    slow = jnp.array([False, True, False, True])
    (value, sol), gradient = run(1.0, slow)
    assert list(sol.status) == [Status.unstable, Status.success] * 2
    np.testing.assert_array_equal(np.isnan(sol.ys[:, 1:]), np.array([[False, True], [False, False]] * 2))
    np.testing.assert_array_equal(sol.reached, [0.5, 20.0] * 2)
    exact = np.exp(-20 * 0.01) + np.exp(-20 * 0.1)
    np.testing.assert_allclose([value, gradient], exact, rtol=0.1 if method == Momentum(0.9) else 1e-3)
    assert np.isnan(run(1.0, ~slow)[1])
    with pytest.raises(jode.SolveError, match=r"unstable after .*t = 0.5.*further apart"):
        jode.check(sol)
    layers = jode.resnet(lambda t, y, k: -k * y, 1.0, jnp.ones(20), method=method)  # a network is what it computes
    assert np.isfinite(layers)


@pytest.mark.parametrize("method", [jode.leapfrog, jode.reversible_heun, Momentum(0.5)], ids=str)
@pytest.mark.parametrize("case", ["oscillator", "through zero", "from rest", "touches zero", "flat zero", "decays a little"])
def test_copies_that_follow_are_a_success(method, case):
    """Also where y or its slope is zero, or both."""
    f, y0, t1, steps = {
        "oscillator": (lambda t, y, a: jnp.stack([y[1], -y[0]]), jnp.array([1.0, 0.0]), 100.0, 1000),
        "through zero": (lambda t, y, a: jnp.cos(t), 0.0, 30.0, 120),
        "from rest": (lambda t, y, a: t**3, 0.0, 2.0, 20),
        "touches zero": (lambda t, y, a: 2 * (t - 1), 1.0, 2.0, 21),
        "flat zero": (lambda t, y, a: 3 * (t - 1) ** 2, -1.0, 2.0, 20),
        "decays a little": (lambda t, y, a: -y, 1.0, 3.0, 60),
    }[case]
    jode.check(jode.solve(f, y0, (0.0, t1), solver=jode.Fixed(method, steps)))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("case", ["blow up", "max steps", "fixed"])
def test_an_unmasked_failure_has_no_finite_gradient(case, adjoint):
    f = {"blow up": lambda t, y, a: a * y * y, "max steps": lambda t, y, a: -1e6 * a * y, "fixed": lambda t, y, a: a * y * y}[case]
    solver = SOLVERS["fixed" if case == "fixed" else "adaptive"]
    for g in jax.tree.leaves(
        jax.grad(lambda y, a: jode.odeint(f, y, (0.0, 30.0), a, solver=solver, adjoint=adjoint)[-1, 0], (0, 1))(jnp.ones(1), 1.0)
    ):
        assert np.isnan(g).all()


@pytest.mark.parametrize("method", [jode.leapfrog, jode.reversible_heun], ids=str)
def test_an_observer_beside_the_state_hides_no_status(method):
    """What it keeps is large, and says nothing of the copies."""

    @dataclass(frozen=True)
    class Count(jode.Observer):
        def init(self, t, y, args):
            return 1e6 + 0 * t

        def step(self, kept, t, y, args):
            return kept + 1.0

    solve = lambda observe: jode.solve(
        lambda t, y, a: -y, jnp.ones(2), (0.0, 30.0), solver=jode.Fixed(method, 2000), observe=observe
    )
    for sol in (solve(None), solve(Count())):
        assert sol.status == Status.unstable
        assert np.isnan(sol.ys[-1]).all()


@pytest.mark.parametrize("adjoint", [*ADJOINTS, jode.Backsolve()], ids=str)
@pytest.mark.parametrize("method", [jode.rk4, jode.reversible_heun], ids=str)
def test_a_masked_row_that_was_well_for_a_while_harms_no_other(method, adjoint):
    """y' = k y²: the second row is large at the first save time, and its way back from there leads nowhere."""
    if isinstance(adjoint, jode.Backsolve) and method is jode.reversible_heun:
        pytest.skip("Backsolve needs a method of one copy")

    def loss(k):
        one = lambda y: jode.solve(lambda t, y, k: k * y**2, y, (0.0, 0.5, 1.0), k, solver=jode.Fixed(method, 100), adjoint=adjoint)
        sol = jax.vmap(one)(jnp.array([0.2, 2.0]))
        return jnp.sum(jnp.where(sol.status[:, None] == Status.success, sol.ys, 0.0)[:, -1])

    np.testing.assert_allclose(jax.grad(loss)(1.0), (0.2 / 0.8) ** 2, rtol=1e-4)


def masked(f, solver, adjoint):
    def loss(theta, y0):
        sol = jax.vmap(lambda y: jode.solve(f, y, (0.0, 1.0), theta, solver=solver, adjoint=adjoint))(y0)
        good = sol.status == Status.success
        return jnp.sum(jnp.where(good, sol.ys[:, -1, 0], 0.0)), sol.status

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_that_leaves_its_domain_harms_no_other(solver, adjoint):
    """y' = -θ√y: y(1) = (√y0 - θ/2)², d/dθ Σ = -Σ (√y0 - θ/2); the third row reaches zero at t = 0.2."""
    f = lambda t, y, th: -th * jnp.sqrt(y)
    (value, status), g = masked(f, SOLVERS[solver], adjoint)(1.0, jnp.array([[4.0], [1.0], [0.01]]))
    assert list(status[:2] == Status.success) == [True, True]
    assert status[2] != Status.success
    np.testing.assert_allclose([value, g], [2.5, -2.0], rtol=1e-4)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_that_blows_up_or_never_starts_harms_no_other(solver, adjoint):
    """y' = θ y², y(1) = y0 / (1 - θ y0); the second row explodes, the third begins where f is NaN."""
    f = lambda t, y, th: jnp.where(y < 0, jnp.log(y), th * y * y)
    (value, status), g = masked(f, SOLVERS[solver], adjoint)(1.0, jnp.array([[0.25], [20.0], [-1.0]]))
    assert list(status == Status.success) == [True, False, False]
    np.testing.assert_allclose([value, g], [0.25 / 0.75, (0.25 / 0.75) ** 2], rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_a_failed_batch_have_their_own_gradients(solver):
    f = lambda t, y, th: -th * jnp.sqrt(y)
    y0 = jnp.array([[4.0], [0.01], [1.0]])
    final = lambda th, y: jode.odeint(f, y, (0.0, 1.0), th, solver=SOLVERS[solver])[-1, 0]
    g = jax.vmap(jax.grad(final), (None, 0))(1.0, y0)
    np.testing.assert_allclose(g[jnp.array([0, 2])], [-1.5, -0.5], rtol=1e-4)
    assert np.isnan(g[1])


def test_if_every_row_fails_and_all_are_masked_the_gradient_is_zero():
    (value, _), g = masked(lambda t, y, th: th * jnp.log(y), SOLVERS["adaptive"], jode.Backprop())(1.0, -jnp.ones((3, 1)))
    assert value == g == 0


def test_earlier_save_times_of_a_failed_row_keep_their_gradient():
    f = lambda t, y, th: th * y * y
    early = lambda th: jode.odeint(f, jnp.ones(1), (0.0, 0.5, 2.0), th, solver=SOLVERS["adaptive"])[1, 0]
    np.testing.assert_allclose(jax.grad(early)(1.0), 0.5 / 0.25, rtol=1e-4)


def test_time_too_coarse_for_any_step():
    ts = jnp.array([1e8, 1e8 + 80], jnp.float32)
    sol = jode.solve(lambda t, y, a: -1e3 * y, jnp.ones(1, jnp.float32), ts)
    assert sol.status == Status.step_underflow
    assert sol.stats.steps <= 2  # the narrowest one is tried once more


def test_a_one_ulp_interval():
    sol = jode.solve(lambda t, y, a: -y, jnp.ones(1), np.array([1.0, np.nextafter(1.0, 2.0)]))
    assert sol.status == Status.success
    assert sol.stats.steps <= 2


def test_huge_values_do_not_overflow_the_error_norm():
    sol = jode.solve(lambda t, y, a: 1e300 * jnp.ones_like(y), jnp.ones(1), (0.0, 1.0))
    assert sol.status == Status.success
    np.testing.assert_allclose(sol.ys[-1, 0], 1e300, rtol=1e-12)


@pytest.mark.parametrize("y0", [{}, jnp.zeros((0,)), {"a": jnp.zeros((0, 3)), "b": jnp.ones(1)}], ids=["empty", "no size", "part"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_states_without_components(y0, solver):
    sol = jode.solve(lambda t, y, a: y, y0, (0.0, 1.0), solver=SOLVERS[solver])
    assert sol.status == Status.success
    assert jax.tree.structure(sol.ys) == jax.tree.structure(y0)


def test_valid_solves_are_quiet_under_debug_nans():
    with jax.debug_nans(True):
        for solver in SOLVERS.values():
            f = lambda t, y, a: -a * y
            jax.grad(lambda a: jnp.sum(jode.odeint(f, jnp.array([1.0, 0.0]), (0.0, 0.0, 0.5, 1.0), a, solver=solver)))(1.0)


def test_check_names_the_row_of_a_batch_and_passes_on_success():
    solve = jax.vmap(lambda y: jode.solve(lambda t, y, a: y * y, y, (0.0, 0.5, 2.0), solver=SOLVERS["adaptive"]))
    with pytest.raises(jode.SolveError, match=r"trajectory 1 of 3 \(1 failed\).*last good save time 0.5"):
        jode.check(solve(jnp.array([[0.1], [1.0], [0.2]])))
    good = solve(jnp.array([[0.1], [0.2]]))
    assert jode.check(good) is good
    with pytest.raises(TypeError, match=r"outside jax.jit"):
        jax.jit(lambda: jode.check(jode.solve(lambda t, y, a: -y, 1.0, (0.0, 1.0))))()


def test_pathological_dynamics_end():
    """NaN, infinite, huge, discontinuous and stiff fields: each ends within its steps and obeys the laws."""
    rng = np.random.default_rng(0)
    fields = [
        lambda t, y, a: jnp.where(jnp.sin(50 * a * t) > 0, 1e8, -1e8) * y,
        lambda t, y, a: jnp.where(t > 0.3 * a, jnp.nan, y),
        lambda t, y, a: jnp.where(t > 0.3 * a, jnp.inf, y),
        lambda t, y, a: jnp.exp(a * y),
        lambda t, y, a: -1e9 * a * (y - jnp.cos(t)),
        lambda t, y, a: jnp.sign(jnp.sin(1 / (1e-9 + jnp.abs(y)))) * a,
    ]
    for f in fields:
        run = jax.jit(jax.vmap(lambda y, a, f=f: jode.solve(f, y, (0.0, 0.5, 1.0), a, solver=jode.Adaptive(max_steps=200))))
        sol = run(
            jnp.asarray(rng.normal(size=(80, 2)) * 10.0 ** rng.integers(-3, 4, (80, 1))), jnp.asarray(rng.uniform(0.5, 2, 80))
        )
        success = np.asarray(sol.status) == Status.success
        assert np.isfinite(sol.ys[success]).all()
        assert np.isnan(sol.ys[~success, -1]).any(1).all()
        assert (np.asarray(sol.stats.steps) <= 200).all()
