"""What the steps cost in error: a number to make small, so that a solver needs fewer of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.observe.base import Bars, Seen
from jode.observe.table import Filled, Table
from jode.tree import State, add, magnitude, unstack, widest


@dataclass(frozen=True)
class Effort(Table):
    """Σₙ |hₙ| Eₙ over the steps taken, Eₙ the root mean square of the method's own estimate of a step's error (Pal, Ma, Shah &
    Rackauckas 2021, ERNODE): `Solution.observed` is that number.

    For methods that estimate their error. Costs one evaluation of f a step with `Fixed`, none with `Adaptive`. Times that the solve
    found are constants to its derivatives.
    """

    slopes = True
    whole = True

    def sized(self, most: int, method: Any) -> Effort:
        if method.embedded_order is None:
            raise ValueError(f"Effort needs a method that estimates its error, and {method!r} has none: use heun or tsit5")
        return replace(self, capacity=1)

    def shapes(self, plan: Any) -> tuple:
        dtype = widest(*(x.dtype for x in plan.layout.packed), default=jnp.result_type(float))
        return (jax.ShapeDtypeStruct((1,), dtype),)

    def overflowed(self, carry: Filled) -> Array:
        return carry.count < 0

    def of_step(self, march: Any, h: Array, s: State, s1: State, ks: list[State]) -> State:
        """|h| E, a vector of one component."""
        rows, method = march.rows, march.method
        estimate = method.errors(h, ks[: len(method.error[0])], s, s1)[0]
        n = sum(x.size for x in estimate) // (rows.size or 1)
        dtype = self.shapes(march.plan)[0].dtype
        square = sum((rows.sum(magnitude(e) ** 2).astype(dtype) for e in estimate), start=rows.spread(jnp.zeros((), dtype)))
        moves = square > 0  # the root has no derivative at 0
        size = jnp.where(moves, jnp.sqrt(jnp.where(moves, square, 1) / max(n, 1)), 0)
        return (rows.as_vector(jnp.abs(h).astype(dtype) * size),)

    def init(self, march: Any, problem: Any, c: Any) -> Filled:
        filled = super().init(march, problem, c)
        return filled._replace(entries=tuple(jnp.zeros_like(x) for x in filled.entries))

    def step(self, march: Any, problem: Any, carry: Filled, seen: Seen) -> Filled:
        taken = march.rows.spread(jnp.asarray(True if seen.accept is None else seen.accept))
        more = self.of_step(march, seen.window.h, seen.s, seen.s1, seen.slopes)
        entries = tuple(x.at[0].add(jnp.where(taken, m, 0)) for x, m in zip(carry.entries, more, strict=True))
        return Filled(carry.count + taken.astype(jnp.int32), entries)

    def pull(
        self, march: Any, problem: Any, left: Array, seen: Seen, K: State, g: State, values: State, bars: Bars
    ) -> tuple[Array, Bars]:
        h, bar = seen.window.h, tuple(jnp.where(seen.window.h != 0, x[0], 0).astype(x.dtype) for x in g)
        of_step = lambda h, s, s1, K: self.of_step(march, h, s, s1, unstack(K, K[0].shape[0]))
        _, back = jax.vjp(of_step, h, seen.s, seen.s1, K)
        moved = dict(zip(("h", "s", "end", "slopes"), back(bar), strict=True))
        return left, bars._replace(**{name: add(getattr(bars, name), x) for name, x in moved.items()})

    def ended(self, march: Any, problem: Any, entries: State, end: Array) -> State:
        return entries

    def result(self, entries: State, reached: Array, unflatten: Callable) -> Array:
        return entries[0][0, 0]
