"""Steps that end at given times, where f jumps or the state is reset: the two controls, stopping there.

The times are among those of `ts`. `marks` says of each what happens there: -1 nothing, 0 f jumps, k the state is reset by jump
k - 1. Nothing happens at the first and the last of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import Adaptive, reach
from jode.control.base import Grid, Solver
from jode.control.equal import Fixed
from jode.tree import State, where
from jode.window import Problem, Window, just_before


def stopping(solver: Solver, marks: Array) -> Solver:
    """The same control, stopping at the marked times; a `TypeError` for one that cannot."""
    for kind, stops in ((Fixed, FixedStops), (Adaptive, AdaptiveStops)):
        if type(solver) is kind:
            return stops(**{f.name: getattr(solver, f.name) for f in fields(solver)}, marks=marks)
    raise TypeError(f"stops and jumps need jode.Fixed or jode.Adaptive, got {solver!r}")


def merged(ts: Array, stops: Array | None, jumps: Array | None) -> tuple[Array, Array, Array]:
    """(times, marks, saved): save times, stops and jump times in one order, what happens at each, and where the save times are.

    Of equal times save times come first, then stops, then jumps as they were given. Those outside of [ts[0], ts[-1]) are moved to
    the nearest end, where nothing happens.
    """
    t0, t1 = ts[0], ts[-1]
    sign = jnp.where(t1 >= t0, 1, -1).astype(ts.dtype)
    parts, marks = [ts], [jnp.full(ts.shape, -1, jnp.int32)]
    for times, kind in ((stops, jnp.zeros), (jumps, lambda n, d: 1 + jnp.arange(*n, dtype=d))):
        if times is None:
            continue
        early, late = sign * (times - t0) < 0, sign * (times - t1) >= 0
        parts.append(jnp.where(early, t0, jnp.where(late, t1, times)))
        marks.append(jnp.where(early | late, -1, kind(times.shape, jnp.int32)))
    times = jnp.concatenate(parts)
    order = jnp.argsort(jax.lax.stop_gradient(sign * times), stable=True)
    return times[order], jnp.concatenate(marks)[order], jnp.argsort(order)[: ts.shape[0]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FixedStops(Fixed):
    """`steps` equal steps between consecutive times of the merged ones."""

    marks: Any = None

    marked = True

    @property
    def numbers(self) -> dict:
        return {**super().numbers, "marks": self.marks}

    @property
    def static(self) -> Fixed:
        return replace(self, steps=self.steps if isinstance(self.steps, int) else None, marks=None)

    def window(self, march: Any, problem: Problem, place: tuple, carry: tuple) -> Window:
        window = super().window(march, problem, place, carry)
        return self.limited(march, problem, Grid((), (), (), (), (), ()), place[-1], window)

    def limited(self, march: Any, problem: Problem, grid: Grid, i: Array, window: Window) -> Window:
        rows, j = march.rows, i // self.bound(march, problem) + 1
        end = rows.spread(rows.pick(problem.ts, j))
        return replace(window, limit=where(marked(march, problem, j), just_before(end, window.h), end))

    def node(self, march: Any, problem: Problem, grid: Grid, i: Array) -> Array:
        bound = self.bound(march, problem)  # rows that take fewer steps stand still up to the last
        return march.rows.spread(jnp.where(i % bound == bound - 1, i // bound + 1, -1))

    def between(self, march: Any, problem: Problem, j: Array, c: Any) -> Any:
        return c._replace(s=march.reset(problem, march.rows.spread(jnp.asarray(j, jnp.int32)), c.s))


class Stopped(NamedTuple):
    """A `Progress`, and in columns: the next time of ts where something happens, or the last; which of ts the row stands at (-1:
    none); the width of its next step before it was cut; whether it wants another step; and whether it waits for what happens here.
    """

    t: Array
    h: Array
    errors: tuple[Array, ...]
    accepted: Array
    tried: Array
    loops: Array
    next: Array
    node: Array
    width: Array
    wanted: Array
    waits: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptiveStops(Adaptive):
    """Steps chosen by their error that end at the marked times. A step that was cut there does not shorten those after it."""

    marks: Any = None

    marked = True

    @property
    def numbers(self) -> dict:
        return {**super().numbers, "marks": self.marks}

    def init(self, march: Any, problem: Problem, s: State, slope: State | None) -> Stopped:
        p = super().init(march, problem, s, slope)
        zero = jnp.zeros(p.t.shape, jnp.int32)
        next_ = following(march, problem, zero)
        t1 = march.rows.pick(problem.ts, next_)
        wanted = (p.h != 0) | ((t1 == p.t) & march.rows.finite(slope or ()))
        h = reach(t1, p.t, p.h)
        return Stopped(*p._replace(h=h), next=next_, node=zero, width=p.h, wanted=wanted, waits=jnp.zeros(p.t.shape, bool))

    def window(self, march: Any, problem: Problem, place: None, carry: Stopped) -> Window:
        window = super().window(march, problem, place, carry)
        return replace(window, limit=just_before(self.target(march, problem, carry), window.h))

    def target(self, march: Any, problem: Problem, c: Stopped) -> Array:
        return march.rows.pick(problem.ts, c.next)

    def wants(self, c: Stopped) -> Array:
        return c.wanted

    def proposed(self, c: Stopped, accept: Array, wide: Array) -> Array:
        kept = accept & (jnp.abs(c.h) < jnp.abs(c.width)) & (jnp.abs(wide) < jnp.abs(c.width))
        return jnp.where(kept, c.width, wide)

    def judged(self, march: Any, problem: Problem, c: Stopped, accept: Array, t1: Array, wide: Array) -> Stopped:
        there = accept & (c.t == t1)
        waits = there & (c.next < problem.ts.shape[0] - 1)
        node = jnp.where(accept, jnp.where(there, c.next, -1), c.node)
        return c._replace(node=node, width=wide, wanted=waits | (c.h != 0), waits=waits)

    def serve(self, march: Any, problem: Problem, c: Any) -> Any:
        """Reset rows that wait, evaluate their slope anew, and go on to the next time."""
        p, rows = c.control, march.rows
        s = march.reset(problem, jnp.where(p.waits, p.node, -1), c.s)
        fresh = march.method.reused(march.F(p.t, march.method.read(s), problem.params))
        next_ = jnp.where(p.waits, following(march, problem, p.node), p.next)
        t1 = rows.pick(problem.ts, next_)
        h = jnp.where(p.waits, reach(t1, p.t, p.width), p.h)
        wanted = jnp.where(p.waits, (h != 0) | (t1 == p.t), p.wanted)
        control = p._replace(h=h, next=next_, wanted=wanted, waits=jnp.zeros_like(p.waits))
        return c._replace(s=s, slope=where(p.waits, fresh, c.slope), control=control)

    def running(self, c: Stopped, few: int = 0) -> Array:
        return (c.loops < self.max_steps) & (jnp.sum(c.wanted, dtype=jnp.int32) > few)

    def unfinished(self, carry: Stopped) -> Array:
        return carry.wanted & (carry.loops < self.max_steps)

    def resets(self, march: Any, problem: Problem, carry: Stopped) -> Array:
        marks = problem.numbers["marks"]
        index = jnp.arange(marks.shape[0], dtype=jnp.int32).reshape(-1, *[1] * jnp.ndim(carry.next))
        marks = marks if marks.ndim == index.ndim else marks.reshape(index.shape)
        return jnp.sum((marks >= 0) & (index < carry.next), axis=0, dtype=jnp.int32)

    def report(self, march: Any, problem: Problem, c: Any, good: Array, slope: State) -> tuple[Array, Array, Array, Array]:
        p = c.control  # a row that still waits has no width, and is not stuck
        return super().report(march, problem, c._replace(control=p._replace(h=jnp.where(p.wanted, 1, p.h))), good, slope)

    def ends(self, march: Any, problem: Problem, grid: Grid, i: Array, left: Any = None) -> tuple[tuple, Callable]:
        if left is None:
            return super().ends(march, problem, grid, i)
        start = jnp.where(i == 0, grid.start, grid.times[jnp.maximum(i - 1, 0)])
        end, (p, q) = grid.times[i], _nodes(grid, i)
        moved = (end != start) | (p != q)
        first, last = moved & (p >= 0), moved & (q >= 0)
        places = jnp.maximum(p, 0), jnp.maximum(q, 0)
        return places, lambda a, b: (t := jnp.where(first, a, start), jnp.where(last, b, end) - t)

    def limited(self, march: Any, problem: Problem, grid: Grid, i: Array, window: Window) -> Window:
        q = self.node(march, problem, grid, i)
        end = march.rows.pick(problem.ts, jnp.maximum(q, 0))
        return replace(window, limit=jnp.where(q >= 0, just_before(end, window.h), window.t + window.h))

    def node(self, march: Any, problem: Problem, grid: Grid, i: Array) -> Array:
        p, q = _nodes(grid, i)
        return jnp.where(p == q, -1, q)  # a row that stands still has been served


def _nodes(grid: Grid, i: Array) -> tuple[Array, Array]:
    """Which of ts rows stand at before and after slot i."""
    table, first = grid.nodes
    return jnp.where(i == 0, first, table[jnp.maximum(i - 1, 0)]), table[i]


def marked(march: Any, problem: Problem, j: Array) -> Array:
    """Whether something happens at ts[j], as a column."""
    return march.rows.spread(march.rows.pick(problem.numbers["marks"], j) >= 0)


def following(march: Any, problem: Problem, j: Array) -> Array:
    """The next time of ts after the j-th where something happens, or the last one."""
    marks = problem.numbers["marks"]
    n = marks.shape[0]
    index = jnp.arange(n, dtype=jnp.int32).reshape(n, *[1] * (marks.ndim - 1))
    ahead = jnp.where(marks >= 0, index, n - 1)
    if marks.ndim == 1 and jnp.ndim(j):
        ahead, index = (x.reshape(n, *[1] * jnp.ndim(j)) for x in (ahead, index))
    return jnp.min(jnp.where(index > j, ahead, n - 1), axis=0).astype(jnp.int32)
