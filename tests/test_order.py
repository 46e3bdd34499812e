"""Observed orders, exactness classes, and where the vector field is evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from tests.problems import rigid_body

METHODS = {m.tableau.name: m for m in vars(jode).values() if isinstance(m, jode.RungeKutta)}
RIGID = {
    "euler": (400, 800, 1600, 3200),
    "midpoint": (200, 400, 800, 1600),
    "heun": (200, 400, 800, 1600),
    "ralston": (200, 400, 800, 1600),
    "bosh3": (100, 200, 400, 800),
    "rk4": (50, 100, 200, 400),
    "dopri5": (100, 200, 400),
    "tsit5": (100, 200, 400),
    "dopri8": (10, 20, 40),
}


def slope(errors, steps):
    return -np.polyfit(np.log2(steps), np.log2(errors), 1)[0]


def observed(method, steps, f, y0, t1, reference):
    run = jax.jit(lambda n: jode.odeint(f, y0, (0.0, t1), solver=jode.Fixed(method, n))[-1])
    return slope([np.abs(np.asarray(run(n)) - reference).max() for n in steps], steps)


@pytest.fixture(scope="module")
def rigid_reference():
    y0 = jnp.array([1.0, 0.0, 0.9])
    return np.asarray(jode.odeint(rigid_body, y0, (0.0, 5.0), solver=jode.Fixed(jode.dopri8, 2000))[-1])


@pytest.mark.parametrize("name", METHODS)
def test_order_on_the_rigid_body(name, rigid_reference):
    y0 = jnp.array([1.0, 0.0, 0.9])
    assert abs(observed(METHODS[name], RIGID[name], rigid_body, y0, 5.0, rigid_reference) - METHODS[name].order) <= 0.1


@pytest.mark.parametrize("name", METHODS)
def test_order_with_a_complex_state(name, rigid_reference):
    y0 = jnp.array([1.0, 0.0, 0.9], complex)
    assert abs(observed(METHODS[name], RIGID[name], rigid_body, y0, 5.0, rigid_reference) - METHODS[name].order) <= 0.1


@pytest.mark.parametrize("name", ["dopri5", "tsit5"])
def test_order_on_a_non_autonomous_problem(name):
    p = observed(METHODS[name], (50, 100, 200), lambda t, y, a: y * jnp.cos(t), jnp.array([1.0]), 6.0, np.exp(np.sin(6.0)))
    assert abs(p - 5) <= 0.1


@pytest.mark.parametrize("name", METHODS)
def test_polynomials_of_degree_below_the_order_are_exact(name):
    p = METHODS[name].order
    y = jode.odeint(
        lambda t, y, a: p * t ** (p - 1) * jnp.ones_like(y), jnp.zeros(1), (0.0, 1.0), solver=jode.Fixed(METHODS[name], 3)
    )
    assert abs(y[-1, 0] - 1) <= 1e-14


@pytest.mark.parametrize("name", METHODS)
def test_linear_invariants_are_kept(name):
    A = jnp.array([[-1.0, 0.4, 0.2], [0.7, -1.0, 0.3], [0.3, 0.6, -0.5]])
    y = jode.odeint(lambda t, y, a: A @ y, jnp.array([1.0, 2.0, 3.0]), (0.0, 1.0), solver=jode.Fixed(METHODS[name], 1))
    assert abs(y[-1].sum() - 6) <= 1e-14


@pytest.mark.parametrize("name", METHODS)
def test_one_step_of_a_linear_problem_is_the_stability_polynomial(name):
    t = METHODS[name].tableau
    A = np.zeros((t.stages, t.stages))
    for i, row in enumerate(t.a):
        A[i, : len(row)] = row
    rng = np.random.default_rng(0)
    z = rng.normal(size=20) + 1j * rng.normal(size=20)
    one = np.ones(t.stages)
    expected = [1 + w * np.array(t.b) @ np.linalg.solve(np.eye(t.stages) - w * A, one) for w in z]
    y = jode.odeint(lambda t, y, a: jnp.asarray(z) * y, jnp.ones(20, complex), (0.0, 1.0), solver=jode.Fixed(METHODS[name], 1))
    np.testing.assert_allclose(y[-1], expected, rtol=0, atol=2e-13 if name == "dopri8" else 2e-14)


def spied(solver, ts):
    """The times at which f is evaluated in one solve, and its counts."""
    times = []

    def f(t, y, args):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return -y

    sol = jode.solve(f, jnp.array([1.0, 2.0]), ts, solver=solver)
    jax.effects_barrier()
    return sorted(times), sol


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [3, np.array(3)], ids=["static", "traced"])
def test_f_is_evaluated_exactly_at_the_nodes(name, steps):
    times, sol = spied(jode.Fixed(METHODS[name], steps if isinstance(steps, int) else jnp.asarray(steps)), (1.0, 4.0))
    expected = sorted(1 + n + c for n in range(3) for c in METHODS[name].tableau.c)
    np.testing.assert_allclose(times, expected, rtol=0, atol=1e-14)
    assert sol.stats.nfe == len(times) == 3 * METHODS[name].tableau.stages


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.tableau.adaptive])
@pytest.mark.parametrize(("saves", "direction"), [(2, -1), (5, 1)])
def test_adaptive_counts_are_those_of_the_calls_and_stay_inside(name, saves, direction):
    ts = np.linspace(0.0, direction * 3.0, saves)
    times, sol = spied(jode.Adaptive(METHODS[name], 1e-4, 1e-4), ts)
    assert sol.stats.nfe == len(times)
    assert sol.stats.steps == sol.stats.accepted + sol.stats.rejected
    assert min(times) >= min(ts) - 1e-15
    assert max(times) <= max(ts) + 1e-15
