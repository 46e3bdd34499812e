"""Dynamics that are cheap to solve: integrals of a vector field's size and of its derivatives, times that jitter, step errors.

Each is a pure function composed onto the vector field or onto the loss. `kinetic`, `jacobian` and `taylor` make rates
r(t, y, args), real numbers; `integrate` carries them along a solve; their integrals, times a weight, join the loss.

    g = integrate(f, kinetic(f), jacobian(f, probe))
    y, (k, j) = jode.odeint(g, initial(y0, 2), (0.0, 1.0), args)     # each with a leading axis for the save times
    loss = data_loss(y[-1]) + 0.01 * (k[-1] + j[-1])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import Array
from jax.experimental.jet import jet
from jax.flatten_util import ravel_pytree

from jode.control import Fixed
from jode.observe import Effort
from jode.tree import real_dtype
from jode.validity import local_errors

__all__ = ["Effort", "derivatives", "initial", "integrate", "jacobian", "kinetic", "solver_effort", "steer", "taylor"]

Rate = Callable[[Array, Any, Any], Array]


def integrate(f: Callable, *rates: Rate) -> Callable:
    """The field of (y, (∫r₁, ∫r₂, …)): g(t, (y, integrals), args) = (f(t, y, args), (r₁(t, y, args), …)).

    Args:
        f: the vector field f(t, y, args).
        *rates: functions r(t, y, args) -> a real scalar.

    Returns:
        The field to solve from `initial(y0, len(rates))`. Under `jit` the evaluations of f that it and its rates have in common
        are one. An adaptive solver controls the error of the integrals too, so count evaluations with f alone.
    """

    def augmented(t: Array, state: tuple[Any, tuple], args: Any) -> tuple[Any, tuple]:
        y, _ = state
        return f(t, y, args), tuple(rate(t, y, args) for rate in rates)

    return augmented


def initial(y0: Any, integrals: int) -> tuple[Any, tuple]:
    """The state (y0, (0, …, 0)) from which `integrate`'s field starts, zeros in the real dtype of y0's first array."""
    zero = jnp.zeros((), real_dtype(jnp.asarray(jax.tree.leaves(y0)[0]).dtype))
    return y0, (zero,) * integrals


def kinetic(f: Callable) -> Rate:
    """The rate ‖f(t, y, args)‖²: its integral is the kinetic energy of a path, least where paths are straight and even.

    Finlay, Jacobsen, Nurbekyan & Oberman 2020 (RNODE). Costs nothing besides f. The sum runs over all entries of y; divide by
    their number to compare dimensions.
    """

    def rate(t: Array, y: Any, args: Any) -> Array:
        return squared_norm(f(t, y, args))

    return rate


def jacobian(f: Callable, probe: Any = None) -> Rate:
    """The rate ‖εᵀ ∂f/∂y‖², whose mean over ε of mean 0 and covariance I is ‖∂f/∂y‖²_F; or, without a probe, that norm itself.

    Finlay, Jacobsen, Nurbekyan & Oberman 2020 (RNODE).

    Args:
        f: the vector field f(t, y, args).
        probe: ε, a pytree like y, such as `jax.random.rademacher(key, y.shape, y.dtype)`; draw it once for a solve, so that the
            integrand is smooth. None takes the exact norm.

    Cost: one vector-Jacobian product an evaluation; the exact norm takes as many as y has entries.
    """

    def rate(t: Array, y: Any, args: Any) -> Array:
        slope, pull = jax.vjp(lambda y: f(t, y, args), y)
        if probe is not None:
            return squared_norm(pull(probe)[0])
        flat, unravel = ravel_pytree(slope)
        rows = jax.vmap(lambda e: ravel_pytree(pull(unravel(e))[0])[0])(jnp.eye(flat.size, dtype=flat.dtype))
        return squared_norm(rows)

    return rate


def taylor(f: Callable, order: int = 2) -> Rate:
    """The rate ‖dᴷy/dtᴷ‖² along solutions of dy/dt = f(t, y, args), K = `order`: what a step of order K - 1 errs by.

    Kelly, Bettencourt, Johnson & Duvenaud 2020 (TayNODE). By Taylor-mode differentiation: the coefficients y⁽¹⁾, …, y⁽ᵏ⁾ of
    the path give those of f along it, and these are y⁽²⁾, …, y⁽ᵏ⁺¹⁾.

    Args:
        f: the vector field f(t, y, args), y one array or a pytree, made of operations that `jax.experimental.jet` knows:
            products, tanh, sin, exp, logistic are among them, relu and softplus are not.
        order: K, at least 1; K = 1 is `kinetic`.

    Cost: O(k²) times that of f for each k < K.

    Raises:
        ValueError: for an order that is not a positive int.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"taylor: order must be a positive int, got {order!r}")

    def rate(t: Array, y: Any, args: Any) -> Array:
        return squared_norm(derivatives(f, t, y, args, order)[-1])

    return rate


def derivatives(f: Callable, t: Array, y: Any, args: Any, order: int) -> list[Array]:
    """The total derivatives y⁽¹⁾, …, y⁽ᴷ⁾ at (t, y) of the solution through it, as flat vectors."""
    flat, unravel = ravel_pytree(y)
    t = jnp.asarray(t)

    def along(t: Array, y: Array) -> Array:
        return ravel_pytree(f(t, unravel(y), args))[0]

    known = [along(t, flat)]
    one, zero = jnp.ones_like(t), jnp.zeros_like(t)
    for k in range(1, order):
        first, rest = jet(along, (t, flat), ([one] + [zero] * (k - 1), known))
        known = [first, *rest]
    return known


def steer(key: Array, ts: Any, width: Any) -> Array:
    """Save times of which the last is drawn anew from the uniform distribution on [t₁ - b, t₁ + b], b = `width`.

    Ghosh, Behl, Dupont, Torr & Namboodiri 2020 (STEER). The mean end time stays t₁. A flow that must be right at all of
    these times is less stiff near t₁. For training only.

    Args:
        key: a PRNG key.
        ts: save times (T,), increasing or decreasing.
        width: b, at least 0 and less than the last interval |t₁ - t₀|, so that times stay in order.

    Returns:
        Times (T,) of the dtype of ts; gradients flow to ts and width.

    Raises:
        ValueError: where ts and width are known and width is out of its range. Where they are traced and the order is lost,
            the solve ends with `Status.invalid_input`.
    """
    ts = jnp.asarray(ts, None if hasattr(ts, "dtype") else jnp.result_type(float))
    last = abs(ts[-1] - ts[-2])
    if not isinstance(width, jax.core.Tracer) and not isinstance(last, jax.core.Tracer) and not 0 <= width < float(last):
        raise ValueError(f"steer: width must be at least 0 and less than the last interval, {float(last)}; got {width}")
    jitter = jax.random.uniform(key, (), ts.dtype, -1, 1) * jnp.asarray(width, ts.dtype)
    return ts.at[-1].add(jitter)


def solver_effort(f: Callable, y0: Any, span: tuple[Any, Any], args: Any = None, *, solver: Fixed) -> Array:
    """Σₙ Eₙ, the sum of the estimated errors of a solve's steps: O(hᵖ) for a method of order p.

    Pal, Ma, Shah & Rackauckas 2021 (ERNODE) penalise Σₙ Eₙ hₙ with the embedded estimates of an adaptive solver; with equal
    steps h that is this sum times h. Here Eₙ is `jode.validity.local_errors`, one step against two halves, which any method
    has. `Effort` observes the estimates of the solve itself, with `Adaptive` too.

    Args:
        f: the vector field f(t, y, args).
        y0: the initial state, any pytree.
        span: (t₀, t₁).
        args: any pytree.
        solver: `Fixed` with a Python int of steps.

    Cost: three solves with as many steps.

    Raises:
        TypeError: for another solver than `Fixed` with a known count.
    """
    return jnp.sum(local_errors(f, y0, span, args, solver=solver))


def squared_norm(y: Any) -> Array:
    """Σ |yᵢ|² over all entries of a pytree."""
    return sum((jnp.sum(jnp.real(x * jnp.conj(x))) for x in jax.tree.leaves(y)), start=0)  # pyright: ignore[reportReturnType]
