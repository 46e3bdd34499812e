"""The solution at any time: the polynomial of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.observe.table import Table
from jode.tree import State, add, combine, real_dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Interpolation:
    """p(t), the solution at a time t, or at an array of times, whose axes then lead. NaN outside of the steps taken.

    In step i it is Σ_k c_ik θ^k with θ = (t - starts[i]) / widths[i]; at a jump it is the state before it. A pytree: it may leave
    `jax.jit`, and be mapped by `jax.vmap`; derivatives by t are those of the polynomials, one order less accurate than p.

    starts, widths: of each step. until: the last time that is known. coefficients: packed, (steps, degree + 1, components) for each
    dtype of the state.
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
        starts, widths = self.starts, self.widths
        sign = jnp.sign(widths[0])
        i = jnp.maximum(jnp.sum(sign * (t - starts) > 0) - 1, 0)
        theta = (t - starts[i]) / widths[i]
        inside = (theta >= 0) & (sign * (t - self.until) <= 0)
        theta = jnp.where(inside, theta, jnp.nan)
        out = []
        for table in self.coefficients:
            x = theta.astype(real_dtype(table.dtype))
            total = table[i, -1].astype(jnp.result_type(x, table.dtype))
            for k in range(table.shape[1] - 2, -1, -1):
                total = total * x + table[i, k]
            out.append(total.astype(table.dtype))
        return self.unflatten(tuple(out), ())


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

    def shapes(self, plan: Any) -> tuple:
        one = jax.ShapeDtypeStruct((1,), plan.time)
        return (one, one, *(jax.ShapeDtypeStruct(((self.degree + 1) * x.shape[0],), x.dtype) for x in plan.layout.packed))

    def entry(self, march: Any, t: Array, h: Array, end: Array, s: State, s1: State, ks: list[State]) -> State:
        method, rows = march.method, march.rows
        first, last = (method.base(jnp.full_like(t, x), s) for x in (0.0, 1.0))
        powers = [first]
        for k in range(self.degree):
            c = combine(h, [row[k] if k < len(row) else 0.0 for row in method.dense], ks)
            drift = tuple(b - a for a, b in zip(first, last, strict=True))
            powers.append(tuple(x.astype(y.dtype) for x, y in zip(add(c, drift) if k == 0 else c, first, strict=True)))
        stacked = tuple(rows.joined(xs) for xs in zip(*powers, strict=True))
        return (rows.as_vector(t), rows.as_vector(h), *stacked)

    def result(self, entries: State, reached: Array, unflatten: Callable) -> Interpolation:
        starts, widths, *tables = entries
        coefficients = tuple(x.reshape(x.shape[0], self.degree + 1, -1) for x in tables)
        return Interpolation(starts[:, 0], widths[:, 0], reached, coefficients, unflatten)
