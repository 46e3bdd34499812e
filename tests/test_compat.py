"""The problems that JAX tests its own `odeint` with, through the same signature, with both modes of second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads
from scipy.integrate import odeint as scipy_odeint

import jode
from jode.compat import odeint

RNG = np.random.RandomState(0)
PROBLEMS = {  # func(y, t, *args), y0, t, args
    "pendulum": (
        lambda y, t, m, g: [y[1], -m * y[1] - g * jnp.sin(y[0])],
        [jnp.pi - 0.1, 0.0],
        jnp.linspace(0.0, 1.0, 11),
        (0.25, 9.8),
    ),
    "time": (
        lambda y, t: jnp.array([-t * y[1], -y[1] - 9.8 * jnp.sin(y[0])]),
        jnp.array([3.0, 0.0]),
        jnp.linspace(0.0, 1.0, 11),
        (),
    ),
    "root of time": (
        lambda y, t, a, b: a - y - jnp.sqrt(t) - jnp.mean((y + b) ** 2),
        RNG.randn(3),
        jnp.linspace(0.1, 0.2, 4),
        (RNG.randn(3), RNG.randn(3)),
    ),
    "growth": (
        lambda y, t, a, b: y - jnp.sin(t) - a * jnp.cos(t) + b,
        jnp.linspace(0.1, 0.9, 10),
        jnp.array([0.1, 0.2]),
        (0.1, 0.2),
    ),
    "large": (
        lambda y, t, a, b: y - jnp.sin(t) - a * jnp.cos(t) + b,
        jnp.linspace(1.1, 10.9, 10),
        jnp.array([0.1, 0.2]),
        (0.1, 0.3),
    ),
    "pytree": (lambda y, t: jax.tree.map(jnp.negative, y), (jnp.array(-0.1), jnp.array([[[0.1]]])), jnp.linspace(0.0, 1.0, 11), ()),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_solutions_are_those_of_scipy(name):
    f, y0, t, args = PROBLEMS[name]
    flat, unravel = ravel_pytree(y0)
    slope = lambda y, t: ravel_pytree(f(unravel(jnp.asarray(y)), t, *args))[0]
    found = jax.vmap(lambda y: ravel_pytree(y)[0])(odeint(f, y0, t, *args))
    np.testing.assert_allclose(found, scipy_odeint(slope, flat, t, rtol=1e-9, atol=1e-9), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["root of time", *(pytest.param(n, marks=pytest.mark.sweep) for n in ("pytree", "pendulum", "time", "growth", "large"))]
)
def test_derivatives_to_second_order_in_both_modes(name):
    f, y0, t, args = PROBLEMS[name]
    check_grads(jax.jit(lambda *x: odeint(f, *x)), (y0, t, *args), order=2, modes=["fwd", "rev"], atol=1e-3, rtol=1e-3)


def test_gradient_of_a_batch_of_solves():
    solve = lambda y0: odeint(lambda y, t: 0.1 * y, y0, jnp.array([0.0, 5.0]))[-1].sum()
    batch = jax.jit(jax.grad(lambda x: jax.vmap(solve)(jnp.stack([jnp.stack([x, 0.1]), jnp.stack([x, 0.2])])).sum()))(2.0)
    one = jax.jit(jax.grad(lambda x, b: solve(jnp.stack([x, b]))))
    np.testing.assert_allclose(batch, one(2.0, 0.1) + one(2.0, 0.2), rtol=1e-13)


def test_without_jit_under_vmap():
    with jax.disable_jit():
        ys = jax.vmap(lambda y0: odeint(lambda y, t: y, y0, jnp.array([0.0, 1.0])))(jnp.ones((5, 2)))
    np.testing.assert_allclose(ys[:, -1], np.full((5, 2), np.e), rtol=1e-7)


def test_closures_of_every_kind():
    """Arrays, ints, tracers of grad and of vmap, and a complex state."""
    solve = lambda a, n: odeint(lambda y, t: -a * y / n, jnp.ones(2), jnp.array([0.0, 1.0]))[-1, 0]
    np.testing.assert_allclose(jax.grad(solve)(0.5, 2), -np.exp(-0.25) / 2, rtol=1e-6)
    each = jax.vmap(jax.grad(solve), (0, None))(jnp.array([0.5, 1.0]), 2)
    np.testing.assert_allclose(each, -np.exp(-np.array([0.25, 0.5])) / 2, rtol=1e-6)
    turned = odeint(lambda y, t: 1j * y, jnp.ones(1, complex), jnp.array([0.0, 1.0]))[-1]
    np.testing.assert_allclose(turned, [np.exp(1j)], rtol=1e-7)


@pytest.mark.parametrize("y0", [[3.0, 0.0], jnp.array([3.0, 0.0])], ids=["list", "array"])
def test_slopes_may_have_another_structure_than_the_state(y0):
    """A list for an array, and an array for a list, as in two of JAX's own tests."""
    slopes = [lambda y, t: [y[1], -jnp.sin(y[0]) - t], lambda y, t: jnp.stack([y[1], -jnp.sin(y[0]) - t])]
    a, b = (odeint(f, y0, jnp.array([0.0, 1.0])) for f in slopes)
    assert jax.tree.structure(a) == jax.tree.structure(y0) == jax.tree.structure(b)
    np.testing.assert_array_equal(jax.tree.leaves(a), jax.tree.leaves(b))


def test_bounds_on_steps():
    decay = lambda y, t: -y
    assert np.isnan(odeint(decay, jnp.ones(1), jnp.array([0.0, 10.0]), mxstep=3)[-1]).all()
    pulse = lambda y, t: jnp.exp(-((t - 100) ** 2))
    end = jax.jit(lambda hmax: odeint(pulse, 0.0, jnp.array([0.0, 200.0]), hmax=hmax)[-1])
    for found in (end(1.0), odeint(pulse, 0.0, jnp.array([0.0, 200.0]), hmax=1.0)[-1]):
        np.testing.assert_allclose(found, np.sqrt(np.pi), rtol=1e-6)
    np.testing.assert_allclose(end(np.inf), odeint(pulse, 0.0, jnp.array([0.0, 200.0]))[-1])
    with pytest.raises(ValueError, match="max_step must be a width above zero"):
        odeint(decay, jnp.ones(1), jnp.array([0.0, 1.0]), hmax=0.0)
    assert jode.compat.odeint is odeint
