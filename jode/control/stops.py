"""Steps that end at given times, where f jumps or the state is reset: the two controls, stopping there.

The times are among those of `ts`. `marks` says of each what happens there: -1 nothing, 0 f jumps, k the state is reset by jump
k - 1. f is continuous from the right: at a marked time it is what it is after it, and the stages of the steps that lie before it see
at most the time just before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import Adaptive, direction, reach
from jode.control.base import Grid, Solver
from jode.control.equal import Fixed
from jode.tree import State, where
from jode.window import Problem, Window, just_before


def stopping(solver: Solver, ts: Array, marks: Array) -> Solver:
    """The same control, stopping at the marked times; a `TypeError` for one that cannot."""
    numbers = {f.name: getattr(solver, f.name) for f in fields(solver)}
    if type(solver) is Adaptive:
        return AdaptiveStops(**numbers, marks=marks)
    if type(solver) is Fixed:  # whose steps end at all of ts, and so see f before a jump at each that equals a marked time
        n = marks.shape[0]
        next_ = jax.lax.cummin(jnp.where(marks >= 0, _index(marks), n), reverse=True)
        there = jnp.concatenate([ts, ts[:1] * jnp.nan])[next_] == ts
        return FixedStops(**numbers, marks=jnp.where(there, jnp.maximum(marks, 0), marks))
    raise TypeError(f"stops and jumps need jode.Fixed or jode.Adaptive, got {solver!r}")


def merged(ts: Array, stops: Array | None, jumps: Array | None) -> tuple[Array, Array, Array]:
    """(times, marks, saved): save times, stops and jump times in one order, what happens at each, and where the save times are.

    Of equal times save times come first, then stops, then jumps as they were given. Jumps apply from ts[0] on and before ts[-1], and
    stops matter to what lies below them. The others are moved to the nearest end, where nothing happens.
    """
    t0, t1, sign = ts[0], ts[-1], direction(ts)
    parts, marks = [ts], [jnp.full(ts.shape, -1, jnp.int32)]
    if stops is not None:
        parts.append(stops)
        marks.append(jnp.where((stops > jnp.minimum(t0, t1)) & (stops <= jnp.maximum(t0, t1)), 0, -1).astype(jnp.int32))
    if jumps is not None:
        parts.append(jumps)
        within = (sign * (jumps - t0) >= 0) & (sign * (jumps - t1) < 0)
        marks.append(jnp.where(within, 1 + _index(jumps), -1))
    times, what = jnp.concatenate(parts), jnp.concatenate(marks)
    inside = (what >= 0) | (_index(times) < ts.shape[0])
    times = jnp.where(inside, times, jnp.where(sign * (times - t0) <= 0, t0, t1))
    order = jnp.argsort(jax.lax.stop_gradient(sign * times), stable=True)
    return times[order], what[order], jnp.argsort(order)[: ts.shape[0]]


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
        j = i // self.bound(march, problem)
        later = jnp.where(direction(problem.ts) > 0, j + 1, j)
        return replace(window, limit=latest(march, problem, march.rows.spread(later)))

    def node(self, march: Any, problem: Problem, grid: Grid, i: Array) -> Array:
        bound = self.bound(march, problem)  # rows that take fewer steps stand still up to the last
        return march.rows.spread(jnp.where(i % bound == bound - 1, i // bound + 1, -1))

    def between(self, march: Any, problem: Problem, j: Array, c: Any) -> Any:
        return c._replace(s=march.reset(problem, march.rows.spread(jnp.asarray(j, jnp.int32)), c.s))


class Stopped(NamedTuple):
    """A `Progress`, and in columns: the next time of ts where something happens, or the last; which of ts the row stands at (-1:
    none); whether it wants another step; and whether it waits for what happens here.
    """

    t: Array
    h: Array
    errors: tuple[Array, ...]
    accepted: Array
    tried: Array
    loops: Array
    next: Array
    node: Array
    wanted: Array
    waits: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptiveStops(Adaptive):
    """Steps chosen by their error that end at the marked times, with a new first step after each."""

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
        p = p._replace(h=reach(t1, p.t, p.h))
        return Stopped(*p, next=next_, node=zero, wanted=wanted, waits=jnp.zeros(p.t.shape, bool))

    def window(self, march: Any, problem: Problem, place: None, carry: Stopped) -> Window:
        window = super().window(march, problem, place, carry)
        later = jnp.where(direction(problem.ts) > 0, carry.next, carry.node)
        return replace(window, limit=latest(march, problem, later, window.t))

    def target(self, march: Any, problem: Problem, c: Stopped) -> Array:
        return march.rows.pick(problem.ts, c.next)

    def wants(self, c: Stopped) -> Array:
        return c.wanted

    def judged(self, march: Any, problem: Problem, c: Stopped, accept: Array, t1: Array) -> Stopped:
        there = accept & (c.t == t1)
        waits = there & (c.next < problem.ts.shape[0] - 1)
        node = jnp.where(accept, jnp.where(there, c.next, -1), c.node)
        return c._replace(node=node, wanted=waits | (c.h != 0), waits=waits)

    def serve(self, march: Any, problem: Problem, c: Any) -> Any:
        """Reset rows that wait, evaluate their slope and choose their first step anew, and go on to the next time."""
        p, rows, method = c.control, march.rows, march.method
        s = march.reset(problem, jnp.where(p.waits, p.node, -1), c.s)
        y = method.read(s)
        slope = march.F(march.after(problem, p.t), y, problem.params)
        next_ = jnp.where(p.waits, following(march, problem, p.node), p.next)
        t1 = rows.pick(problem.ts, next_)
        h = reach(t1, p.t, self.first_width(march, problem, p.t, y, slope))
        control = p._replace(
            h=jnp.where(p.waits, h, p.h),
            next=next_,
            wanted=jnp.where(p.waits, (h != 0) | ((t1 == p.t) & rows.finite(slope)), p.wanted),
            waits=jnp.zeros_like(p.waits),
        )
        return c._replace(s=s, slope=where(p.waits, method.reused(slope), c.slope), control=control)

    def running(self, c: Stopped, few: int = 0) -> Array:
        return (c.loops < self.max_steps) & (jnp.sum(c.wanted, dtype=jnp.int32) > few)

    def unfinished(self, carry: Stopped) -> Array:
        return carry.wanted & (carry.loops < self.max_steps)

    def resets(self, march: Any, problem: Problem, carry: Stopped) -> Array:
        marks = problem.numbers["marks"]
        passed = jax.vmap(lambda mark, i: (mark >= 0) & (i < carry.next))(marks, _index(marks))
        return self.nfe_start * jnp.sum(passed, axis=0, dtype=jnp.int32)

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
        p, q = _nodes(grid, i)
        on = direction(problem.ts) > 0
        return replace(window, limit=latest(march, problem, jnp.where(on, q, p), jnp.where(on, window.t + window.h, window.t)))

    def node(self, march: Any, problem: Problem, grid: Grid, i: Array) -> Array:
        p, q = _nodes(grid, i)
        return jnp.where(p == q, -1, q)  # a row that stands still has been served


def _nodes(grid: Grid, i: Array) -> tuple[Array, Array]:
    """Which of ts rows stand at before and after slot i."""
    table, first = grid.nodes
    return jnp.where(i == 0, first, table[jnp.maximum(i - 1, 0)]), table[i]


def latest(march: Any, problem: Problem, j: Array, end: Any = None) -> Array:
    """The latest time for stages of steps whose later end is ts[j], a column; that end itself where nothing happens there.

    end: the later end of rows where j is -1.
    """
    rows, at = march.rows, jnp.maximum(j, 0)
    t = rows.pick(problem.ts, at)
    t = jnp.where(rows.pick(problem.numbers["marks"], at) >= 0, just_before(t), t)
    return t if end is None else jnp.where(j >= 0, t, end)


def following(march: Any, problem: Problem, j: Array) -> Array:
    """The next time of ts after the j-th where something happens, or the last one."""
    marks = problem.numbers["marks"]
    last = marks.shape[0] - 1
    ahead = jax.vmap(lambda mark, i: jnp.where((i > j) & (mark >= 0), i, last))(marks, _index(marks))
    return jnp.min(ahead, axis=0)


def _index(x: Array) -> Array:
    return jnp.arange(x.shape[0], dtype=jnp.int32)
