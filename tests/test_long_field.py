"""A long field stands in few places of a program: the stages of a step run in a loop, which changes no number."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode import tuning
from jode.field import length

WEIGHTS, STATE = jnp.linspace(0.5, 1.5, 12), jnp.linspace(0.1, 1.0, tuning.SMALL + 8)
SOLVERS = {
    "euler": jode.Fixed(jode.euler, 5),
    "rk4": jode.Fixed(jode.rk4, 5),
    "reversible": jode.Fixed(jode.Reversible(jode.midpoint), 5),
    "tsit5": jode.Adaptive(jode.tsit5, 1e-6, 1e-6),
    "dopri8": jode.Adaptive(jode.dopri8, 1e-6, 1e-6),
}


def field(t, y, weights):
    for w in weights:
        y = jnp.sin(w * y + t)
    return y - jnp.roll(y, 1)


def solve(solver, y, weights, ts=(0.0, 0.7, 1.5), adjoint=jode.Backprop()):
    return jode.solve(field, y, ts, weights, solver=solver, adjoint=adjoint)


def loss(solver, y, weights, **options):
    return jnp.sum(solve(solver, y, weights, **options).ys[1:] ** 2)


def batched(solver, y, weights, **options):
    rows = y[None] * jnp.linspace(0.9, 1.1, 3)[:, None]
    return jnp.sum(jax.vmap(lambda y: loss(solver, y, weights, **options))(rows))


def both(monkeypatch, f, *x):
    """f(*x) with the stages in a loop, and written out."""
    jax.clear_caches()
    looped = f(*x)
    monkeypatch.setattr(tuning, "LONG", 10**9)
    jax.clear_caches()
    return looped, f(*x)


def close(a, b, rtol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), a, b)


def test_equations_are_counted_in_functions_that_are_called_and_products_count_less():
    nested = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jax.jit(lambda x: jnp.sin(jnp.cos(x)))(x), x)
    flat, loop = (length(jax.make_jaxpr(f)(1.0).jaxpr) for f in (lambda x: jnp.sin(jnp.cos(x)), nested))
    assert flat == 2 < loop
    chain = lambda x: jnp.tanh(x @ jnp.tanh(x @ x))
    assert length(jax.make_jaxpr(chain)(jnp.ones((3, 3))).jaxpr) == 2 - 2 * tuning.PRODUCT
    assert length(jax.make_jaxpr(field)(0.0, STATE, WEIGHTS).jaxpr) > tuning.LONG


@pytest.mark.parametrize(("method", "places"), [("rk4", 1), ("tsit5", 2), ("dopri8", 3)])
def test_a_long_field_is_called_in_few_places(method, places):
    """In the loop over stages, for the start of an adaptive solve, and for the stages of dopri8's interpolant."""
    jax.clear_caches()
    program = jax.jit(partial(loss, SOLVERS[method])).lower(STATE, WEIGHTS).as_text()
    assert len(re.findall(r"call @field\w*\(", program)) == places
    gradient = jax.jit(jax.grad(partial(loss, SOLVERS[method]))).lower(STATE, WEIGHTS).as_text()
    assert len(re.findall(r"call @field\w*\(", gradient)) <= 2 * places + 5


@pytest.mark.parametrize("small", [STATE[: tuning.SMALL], "effect"], ids=["state", "effect"])
def test_a_small_state_or_a_field_with_effects_keeps_its_program(monkeypatch, small):
    def noisy(t, y, w):
        jax.debug.callback(lambda: None)
        return field(t, y, w)

    f, y = (noisy, STATE) if isinstance(small, str) else (field, small)
    solved = lambda y: jode.odeint(f, y, (0.0, 1.0), WEIGHTS, solver=SOLVERS["rk4"])
    one, other = both(monkeypatch, lambda y: jax.jit(solved).lower(y).as_text(), y)
    assert one == other


@pytest.mark.parametrize(
    ("solver", "f"), [*((s, loss) for s in SOLVERS), ("rk4", batched), pytest.param("tsit5", batched, marks=pytest.mark.sweep)]
)
def test_values_and_gradients_are_those_without_the_loop(monkeypatch, solver, f):
    g = jax.jit(jax.value_and_grad(partial(f, SOLVERS[solver]), (0, 1)))
    close(*both(monkeypatch, g, STATE, WEIGHTS))


@pytest.mark.parametrize(
    "adjoint",
    [pytest.param(jode.Backprop(checkpoints=2), marks=pytest.mark.sweep), jode.MemoryFree(), jode.Backsolve()],
    ids=repr,
)
def test_other_adjoints_too(monkeypatch, adjoint):
    g = lambda w: jax.grad(lambda w: loss(jode.Fixed(jode.rk4, 5), STATE, w, adjoint=adjoint))(w)
    close(*both(monkeypatch, g, WEIGHTS))


def test_derivatives_of_derivatives_too(monkeypatch):
    value, v = partial(loss, jode.Fixed(jode.midpoint, 2), STATE, ts=(0.0, 1.0)), jnp.cos(WEIGHTS)
    forwards = jax.jit(lambda w: jax.jvp(jax.grad(value), (w,), (v,))[1])
    backwards = jax.jit(jax.grad(lambda w: jax.grad(value)(w) @ v))
    one, other = both(monkeypatch, lambda w: (forwards(w), backwards(w)), WEIGHTS)
    close(one, other)
    close(*one)


def test_counts_and_steps_too(monkeypatch):
    one, other = both(monkeypatch, partial(solve, SOLVERS["tsit5"], STATE), WEIGHTS)
    assert jax.tree.map(int, one.stats) == jax.tree.map(int, other.stats)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_fails_as_without_the_loop(monkeypatch, bad):
    y = STATE.at[0].set(1e300)
    f = lambda w: jode.solve(lambda t, y, w: field(t, y, w) + jnp.where(t > 0.5, bad, 0.0), y, (0.0, 1.0), w)
    one, other = both(monkeypatch, f, WEIGHTS)
    assert int(one.status) == int(other.status) != int(jode.Status.success)
    assert np.isnan(one.ys[-1]).all()
