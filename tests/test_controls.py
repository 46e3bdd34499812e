"""What a user may say of the steps of a solver: how wide they may be, how errors are weighed, which weights are a layer's own."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode import Status
from tests.problems import lotka_volterra

ADJOINTS = [jode.Backprop(), jode.Backprop(2), jode.MemoryFree(), jode.Backsolve()]


@dataclass(frozen=True)
class Widest(jode.Observer):
    """The widest step, and the time it started at."""

    def init(self, t, y, args):
        return {"t": t, "h": jnp.zeros_like(t)}

    def step(self, kept, t, y, args):
        h = jnp.abs(t - kept["t"])
        return {"t": t, "h": jnp.where(h > kept["h"], h, kept["h"])}


# The widest step.

pulse = lambda t, y, a: a * jnp.exp(-((t - 100) ** 2))


@pytest.mark.parametrize("ts", [(0.0, 200.0), (200.0, 0.0), (0.0, 3.0, 99.0, 200.0)], ids=str)
@pytest.mark.parametrize("method", [jode.tsit5, jode.dopri8, jode.bosh3], ids=str)
def test_a_pulse_after_a_long_rest_is_not_stepped_over(method, ts):
    solve = lambda **more: jode.solve(pulse, 0.0, ts, 1.0, solver=jode.Adaptive(method, 1e-6, 1e-6, **more), observe=Widest())
    assert abs(solve().ys[-1]) < 1e-3  # without a bound it is
    for first_step in (None, 50.0):
        sol = jode.check(solve(max_step=1.0, first_step=first_step))
        np.testing.assert_allclose(sol.ys[-1], np.sqrt(np.pi) * np.sign(ts[-1] - ts[0]), rtol=1e-5)
        assert sol.observed["h"] <= 1 + 1e-13  # the end of a step is rounded
        assert sol.stats.accepted >= 200


def test_a_bound_wider_than_all_steps_changes_nothing():
    y0, ts = jnp.array([1.0, 2.0]), np.linspace(0.0, 5.0, 4)
    free = jode.solve(lotka_volterra, y0, ts)
    for most in (100.0, np.inf):
        assert np.array_equal(jode.odeint(lotka_volterra, y0, ts, solver=jode.Adaptive(max_step=most)), free.ys)


def test_each_row_has_its_own_bound():
    solve = lambda most, a: jode.solve(pulse, 0.0, (0.0, 200.0), a, solver=jode.Adaptive(max_step=most))
    most, a = jnp.array([0.5, 1.0, 0.0, 1e9]), jnp.arange(1.0, 5.0)
    sol = jax.jit(jax.vmap(solve))(most, a)
    assert list(sol.status) == [Status.success, Status.success, Status.invalid_input, Status.success]
    np.testing.assert_allclose(sol.ys[:2, -1], np.sqrt(np.pi) * np.array([1.0, 2.0]), rtol=1e-6)
    assert np.isnan(sol.ys[2]).all()
    alone = [solve(*x).stats.steps for x in zip(most[:2], a[:2], strict=True)]
    assert list(sol.stats.steps[:2]) == alone


@pytest.mark.parametrize("most", [0.0, -1.0, np.nan])
def test_a_traced_bound_out_of_range_is_a_status(most):
    run = jax.jit(lambda most: jode.solve(pulse, 0.0, (0.0, 200.0), 1.0, solver=jode.Adaptive(max_step=most)))
    sol = run(most)
    assert sol.status == Status.invalid_input
    with pytest.raises(jode.SolveError, match="max_step be above zero"):
        jode.check(sol)
    assert run(2.0).status == Status.success


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_gradient_through_a_pulse(adjoint):
    """y(200) = a √π and dy/da = √π: the way back must see the pulse too."""
    end = lambda a, most: jode.odeint(pulse, 0.0, (0.0, 200.0), a, solver=jode.Adaptive(max_step=most), adjoint=adjoint)[-1]
    np.testing.assert_allclose(jax.grad(end)(0.7, 1.0), np.sqrt(np.pi), rtol=1e-5)
    rows = jax.vmap(jax.grad(end))(jnp.array([0.7, 1.4]), jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(rows, np.sqrt(np.pi), rtol=1e-5)
