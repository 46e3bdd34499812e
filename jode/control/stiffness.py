"""Whether a solve by an explicit method ran out of steps because their width was limited by stability, not by their error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.rows import Rows
from jode.tree import State, magnitude
from jode.window import Problem

ITERATIONS, CONFIRMED = 20, 6


def stability_limited(march: Any, problem: Problem, out: Array, t: Array, h: Array, s: State, slope: State) -> Array:
    """Of the rows that are `out` of steps those whose next step from (t, s), of width h, is as wide as stability allows: h λ lies
    beyond half of the method's interval of stability on the negative real axis, λ the dominant eigenvalue of ∂f/∂y.

    λ is found by the power method, with differences of f: fields that have no forward derivative are served too. Noise in f has
    differences, but no derivative: the last `CONFIRMED` products must give the same h λ, to a tenth, each by differences of
    another width. Costs nothing
    where no row is out of steps, and `ITERATIONS` evaluations of f, not counted, where one is. Long fields, which take long to
    compile wherever they stand, are not looked at; nor is a march that is recorded for a gradient, whose status stays `max_steps`:
    where XLA on a CPU makes one function of its loop by itself, one loop more prevented that (70 µs became 190).
    """
    limit, rows = march.method.stability, march.rows
    if limit is None or not slope or march.long or not march.tells_stiff:
        return out & False
    h, t, y, slope, params = jax.lax.stop_gradient((h, t, march.method.read(s), slope, problem.params))
    square = _square(rows, y)
    narrow = float(jnp.finfo(square.dtype).eps) * jnp.where(square > 0, square, 1)  # the square of that of the differences

    def iterate(i: Array, carry: tuple) -> tuple:
        v, low, high = carry
        width = narrow * (1 + i % CONFIRMED).astype(narrow.dtype) ** 2
        scale = jnp.sqrt(width / _square(rows, v))
        v = tuple(x * scale.astype(x.dtype) for x in v)
        ahead = march.F(t, tuple(x + z for x, z in zip(y, v, strict=True)), params)
        Jv = tuple(a - b for a, b in zip(ahead, slope, strict=True))
        vJv = sum(rows.sum(jnp.real(jnp.conj(x) * z)).astype(square.dtype) for x, z in zip(v, Jv, strict=True))
        z = h * (vJv / width).astype(h.dtype)
        first = i <= ITERATIONS - CONFIRMED
        return Jv, jnp.where(first, z, jnp.minimum(low, z)), jnp.where(first, z, jnp.maximum(high, z))

    n, zero = jnp.where(jnp.any(out), ITERATIONS, 0), jnp.zeros_like(square, h.dtype)
    _, low, high = jax.lax.fori_loop(0, n, iterate, (tuple(_some(rows, x) for x in y), zero, zero))
    return out & (-high > limit / 2) & (low >= 1.1 * high)


def _some(rows: Rows, like: Array) -> Array:
    """A state in no direction that a problem would have."""
    axis = rows.component_axis
    shape = [n if i == axis else 1 for i, n in enumerate(like.shape)]
    return jnp.broadcast_to(np.cos(3.0 * np.arange(like.shape[axis])).reshape(shape).astype(like.dtype), like.shape)


def _square(rows: Rows, s: State) -> Array:
    squares = [rows.sum(magnitude(x) ** 2) for x in s]
    return sum(x.astype(squares[0].dtype) for x in squares[1:]) + squares[0] if len(s) > 1 else squares[0]
