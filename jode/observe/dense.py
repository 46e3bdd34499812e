"""The solution at any time: the polynomial of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.observe.table import Filled, Table
from jode.tree import State, combine, nan_unless, real_dtype, work_dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Interpolation:
    """p(t), the solution at a time t, or at an array of times, whose axes then lead. NaN outside of the steps taken.

    In step i it is Σ_k c_ik θ^k with θ = (t - starts[i]) / widths[i]; at a jump it is the state before it. A pytree: it may leave
    `jax.jit`, and be mapped by `jax.vmap`; derivatives by t are those of the polynomials, one order less accurate than p.

    starts, widths: of each step; a first step that does not move, before a jump at ts[0], has width 1. until: the last time that
    is known. coefficients: packed, (steps, degree + 1, components) for each dtype of the state.
    """

    starts: Array
    widths: Array
    until: Array
    coefficients: State
    unflatten: Callable = field(metadata={"static": True})

    def __call__(self, t: Any) -> Any:
        t = jnp.asarray(t, self.starts.dtype)
        if t.ndim:
            return jax.vmap(self)(t)
        sign = jnp.where(self.until >= self.starts[0], 1, -1).astype(t.dtype)
        i = jnp.maximum(jnp.sum(sign * (t - self.starts) > 0) - 1, 0)
        start, width, tables = self.starts[i], self.widths[i], tuple(table[i] for table in self.coefficients)
        inside = (sign * (t - start) >= 0) & (sign * (t - self.until) <= 0)
        inside = reduce(jnp.logical_and, [jnp.all(jnp.isfinite(c)) for c in tables], inside)
        theta = (t - jnp.where(inside, start, 0)) / jnp.where(inside, width, 1)
        out = []
        for c, table in zip(tables, self.coefficients, strict=True):
            dtype = work_dtype(c.dtype)
            x, known = theta.astype(dtype), jnp.where(inside, c, 0).astype(dtype)
            total = known[-1]
            for k in range(c.shape[0] - 2, -1, -1):
                total = total * x + known[k]
            first = jnp.where(inside, 0, table[0, 0] + table[0, 1]).astype(dtype)
            out.append(_nan_and_its_cotangent_unless(inside, total + first).astype(table.dtype))
        return self.unflatten(tuple(out), ())


def _nan_and_its_cotangent_unless(mask: Array, x: Array) -> Array:
    """x where the mask holds, else NaN: with a cotangent that is NaN too, but zero where that of the result is (a loss that masks
    NaNs has the gradient of the rest).
    """
    one, most = jnp.ones((), x.dtype), jnp.asarray(jnp.finfo(x.dtype).max, x.dtype)
    zero, huge = jnp.where(mask, one, 0), jnp.where(mask, one, most)
    return x * zero * huge * huge + nan_unless(mask, jnp.zeros((), real_dtype(x.dtype))).astype(x.dtype)


@dataclass(frozen=True)
class Dense(Table):
    """The solution at any time: `Solution.observed` is an `Interpolation` p, and p(t) the state at t.

    Each step keeps the coefficients of its method's interpolant, as accurate as states at save times; p never calls f. Costs
    capacity × (degree + 1) states, and of `Fixed` one more evaluation of f a step. With all derivatives, by t too.
    """

    degree: int = 0  # of the polynomials

    refines = True
    slopes = True

    def sized(self, most: int, method: Any) -> Dense:
        return replace(super().sized(most, method), degree=max(map(len, method.dense)))

    def enters(self, carry: Filled, h: Array) -> Array:
        """A first step that does not move has one too: it knows the state at ts[0] before a jump there."""
        return (h != 0) | (carry.count == 0)

    def leads_with(self, window: Any) -> Array:
        return window.t

    def shapes(self, plan: Any) -> tuple:
        one = jax.ShapeDtypeStruct((1,), plan.time)
        return (one, one, *(jax.ShapeDtypeStruct(((self.degree + 1) * x.shape[0],), x.dtype) for x in plan.layout.packed))

    def entry(self, march: Any, t: Array, h: Array, end: Array, s: State, s1: State, ks: list[State]) -> State:
        method, rows, h = march.method, march.rows, jnp.where(h == 0, 1, h)
        first, last = (method.base(jnp.full_like(t, x), s) for x in (0.0, 1.0))
        powers = [first]
        for k in range(self.degree):
            c = combine(h, [row[k] if k < len(row) else 0.0 for row in method.dense], ks)
            if k == 0:  # the base may move along the step too
                c = tuple(x + (b - a).astype(x.dtype) for x, a, b in zip(c, first, last, strict=True))
            powers.append(tuple(x.astype(y.dtype) for x, y in zip(c, first, strict=True)))
        stacked = tuple(rows.joined(xs) for xs in zip(*powers, strict=True))
        return (rows.as_vector(t), rows.as_vector(h), *stacked)

    def result(self, entries: State, reached: Array, unflatten: Callable) -> Interpolation:
        starts, widths, *tables = entries
        # What lies behind the entries of a row that has some is finite: JAX looks for NaNs, and there is none in the solution.
        behind = ~jnp.isfinite(starts) & jnp.isfinite(starts[:1])
        starts, widths = jnp.where(behind, reached, starts), jnp.where(behind, 1, widths).astype(widths.dtype)
        tables = [jnp.where(behind, 0, x).astype(x.dtype) for x in tables]
        coefficients = tuple(x.reshape(x.shape[0], self.degree + 1, -1) for x in tables)
        return Interpolation(starts[:, 0], widths[:, 0], reached, coefficients, unflatten)
