"""Whether a solve by an explicit method ran out of steps because their width was limited by stability, not by their error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.rows import Rows
from jode.tree import State, magnitude
from jode.window import Problem

ITERATIONS = 20


def stability_limited(march: Any, problem: Problem, out: Array, t: Array, h: Array, s: State, slope: State) -> Array:
    """Of the rows that are `out` of steps those whose next step from (t, s), of width h, is as wide as stability allows: h λ lies
    beyond half of the method's interval of stability on the negative real axis, λ the dominant eigenvalue of ∂f/∂y.

    λ is found by the power method, with differences of f: fields that have no forward derivative are served too. Costs nothing
    where no row is out of steps, and `ITERATIONS` evaluations of f, not counted, where one is.
    """
    limit, rows = march.method.stability, march.rows
    if limit is None or not slope:
        return out & False
    h, t, y, slope, params = jax.lax.stop_gradient((h, t, march.method.read(s), slope, problem.params))
    size = _norm(rows, y)
    width = float(jnp.finfo(size.dtype).eps) ** 0.5 * jnp.where(size > 0, size, 1)

    def iterate(_: Any, carry: tuple) -> tuple:
        v, _ = carry
        scale = width / _norm(rows, v)
        v = tuple(x * scale.astype(x.dtype) for x in v)
        ahead = march.F(t, tuple(x + z for x, z in zip(y, v, strict=True)), params)
        Jv = tuple(a - b for a, b in zip(ahead, slope, strict=True))
        return Jv, sum(rows.sum(jnp.real(jnp.conj(x) * z)).astype(size.dtype) for x, z in zip(v, Jv, strict=True))

    first = tuple(jnp.cos(3.0 * jnp.cumsum(jnp.ones_like(x), axis=1 if rows.size is not None and rows.axis == 0 else 0)) for x in y)
    n = jnp.where(jnp.any(out), ITERATIONS, 0)
    rayleigh = jax.lax.fori_loop(0, n, iterate, (first, jnp.zeros_like(size)))[1] / width**2
    return out & (-rayleigh.astype(h.dtype) * h > limit / 2)


def _norm(rows: Rows, s: State) -> Array:
    squares = [rows.sum(magnitude(x) ** 2) for x in s]
    return jnp.sqrt(sum(x.astype(squares[0].dtype) for x in squares))
