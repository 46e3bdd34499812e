"""A function of the state at times of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import direction
from jode.observe.base import Bars, Seen, nothing, slack, within
from jode.observe.table import Filled, Table
from jode.tree import State, add, increment, increment_stacked
from jode.window import Problem


@dataclass(frozen=True, eq=False)
class At:
    """g(t, y, args) at times of its own, without keeping the state: `Solution.observed` is g's pytree, times leading.

    ts: a vector of times, in any order; at those outside of the solve, and beyond a failure, the result is NaN. At a jump it is of
    the state before it. g: pure, for one trajectory, of floating values. States are interpolated as at save times. Gradients flow
    to ts, and to all that g reads.
    """

    ts: Any
    g: Callable

    def __post_init__(self) -> None:
        if not callable(self.g):
            raise TypeError(f"At: g must be a function g(t, y, args), got {self.g!r}")


@dataclass(frozen=True)
class AtTimes(Table):
    """`At` inside the loop, of the times ts[first], … in the order of the solve. An entry leads with a flag: it is there."""

    first: int = 0

    refines = True
    slopes = True

    def times(self, problem: Problem) -> Array:
        return problem.ts[self.first : self.first + (self.capacity or 0)]

    def shapes(self, plan: Any) -> tuple:
        assert self.out is not None
        return (jax.ShapeDtypeStruct((1,), plan.time), *self.out.packed)

    def overflowed(self, carry: Filled) -> Array:
        return carry.count < 0

    def step(self, march: Any, problem: Problem, carry: Filled, seen: Seen) -> Filled:
        rows, window, ts, sign = march.rows, seen.window, self.times(problem), direction(march.save_times(problem))
        n = ts.shape[0]
        reached = rows.spread(window.t + window.h if seen.t is None else seen.t)
        accept = rows.spread(jnp.asarray(True if seen.accept is None else seen.accept))
        behind = slack(march, march.save_times(problem))
        pending = lambda j: accept & (j < n) & (sign * (rows.pick(ts, jnp.minimum(j, n - 1)) - reached) <= behind)
        ks = march.method.refined(window, seen.s, seen.slopes)

        def one(carry: Filled) -> Filled:
            j, entries = carry
            mask, t = pending(j), rows.spread(rows.pick(ts, jnp.minimum(j, n - 1)))
            width = _width(window.h)
            theta = (t - window.t) / width
            y = increment(march.method.base(theta, seen.s), width, march.method.dense_weights(theta), ks)
            inside = jnp.where(theta >= 0, jnp.ones_like(t), jnp.nan)
            values = (rows.as_vector(inside), *march.seen_by(self)(t, y, window.params))
            values = tuple(jnp.where(theta >= 0, x, jnp.nan).astype(x.dtype) for x in values)
            index = jnp.where(mask, j, n)
            return Filled(j + mask.astype(jnp.int32), tuple(rows.write(e, index, v) for e, v in zip(entries, values, strict=True)))

        return march.runner.until(lambda c: ~jnp.any(pending(c.count)), one, carry)

    def spoils(self, rows: Any, entries: State, bars: State) -> Array:
        there = jnp.isfinite(entries[0])
        touched = [~rows.all(jnp.all(there | (b == 0), axis=0)) for b in bars]
        return reduce(jnp.logical_or, touched)

    def left(self, march: Any, problem: Problem, entries: State) -> Array:
        ts, sign = self.times(problem), direction(march.save_times(problem))
        early = jnp.sum(jax.vmap(lambda t: sign * (t - problem.ts[0]) < 0)(ts), axis=0, dtype=jnp.int32)
        return march.rows.spread(early) + super().left(march, problem, entries)

    def pull(
        self, march: Any, problem: Problem, left: Array, seen: Seen, K: State, g: State, values: State, bars: Bars
    ) -> tuple[Array, Bars]:
        method, rows, window, ts = march.method, march.rows, seen.window, self.times(problem)
        t0, sign = problem.ts[0], direction(march.save_times(problem))
        a, h, params = window.t, window.h, window.params
        behind = slack(march, march.save_times(problem))
        first = (a == t0) & (seen.slot == 0)  # a later step may start there too, after a jump

        def pending(n: Array) -> Array:
            t = rows.pick(ts, jnp.maximum(n - 1, 0))
            return (n > 0) & (within(problem, t, a, h, sign, behind) | ((t == t0) & first))

        def value(t: Array, a: Array, h: Array, s: State, K: State, shared: list) -> State:
            width = _width(h)
            theta = (t - a) / width
            y = increment_stacked(method.base(theta, s), width, jnp.stack(method.dense_weights(theta)), K)
            return march.seen_by(self)(t, y, params._replace(shared=shared))

        def one(carry: tuple) -> tuple:
            n, bars = carry
            mask, at = pending(n), jnp.maximum(n - 1, 0)
            bar = tuple(jnp.where(mask, rows.pick_state(x, at), 0).astype(x.dtype) for x in g[1:])
            t = rows.spread(jnp.where(mask, rows.pick(ts, at), a))  # far from the step g might not be finite
            _, back = jax.vjp(value, t, a, h, seen.s, K, params.shared)
            tbar, abar, hbar, sbar, kbar, shared = back(bar)
            tsbar = rows.add_at(bars.ts, self.first + at, jnp.where(mask, tbar, 0))
            moved = {"t": abar, "h": hbar, "s": sbar, "slopes": kbar, "shared": shared}
            bars = bars._replace(ts=tsbar, **{name: add(getattr(bars, name), x) for name, x in moved.items()})
            return n - mask.astype(jnp.int32), bars

        return march.runner.until(lambda c: ~jnp.any(pending(c[0])), one, (left, bars))

    def ended(self, march: Any, problem: Problem, entries: State, end: Array) -> State:
        sign, rows = direction(march.save_times(problem)), march.rows
        late = rows.over_time(jax.vmap(lambda t: rows.spread(sign * (t - end) > 0))(self.times(problem)))
        return tuple(jnp.where(late, nothing(), x).astype(x.dtype) for x in entries)

    def result(self, entries: State, reached: Array, unflatten: Callable) -> Any:
        assert self.out is not None
        return jax.tree.unflatten(self.out.treedef, self.out.unpack(tuple(entries[1:]), (entries[0].shape[0],)))


def _width(h: Array) -> Array:
    """The width that fractions are of; a step without one, at an end or before a jump, is a point on its slope."""
    return jnp.where(h == 0, 1, h)
