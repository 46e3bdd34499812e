"""Steps that end at given times, where f jumps or the state is reset: the two controls that stop there.

`marks` say what happens at times of `ts`: -1 nothing, 0 f jumps, k the state is reset by jump k - 1, -2 one of these at an equal
time that comes later. At a marked time f is never asked for: stages of the step before it see at most the number just before, those
of the step after it at least the one just after. For equal steps `ts` is one sequence of save times and others, each with a mark;
for steps that are found the others follow the save times, and the last of them is the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import Adaptive, direction, reach
from jode.control.base import Grid, Solver
from jode.control.equal import Fixed
from jode.tree import State, put, stack_zeros, where
from jode.window import Problem, Window, just_after


def stopping(solver: Any, ts: Array, others: Array, stops: Array | None, jumps: Array | None) -> tuple[Solver, Array, Any]:
    """The same control, stopping at stops and jumps: (solver, times, saved), where `saved` are the places of the save times among
    the times if these are saved too, else None. others: times that observers look at; they follow those that are saved.
    """
    numbers = {f.name: getattr(solver, f.name) for f in fields(solver)}
    times, marks = _marked(ts, stops, jumps)
    if type(solver) is Adaptive:
        return AdaptiveStops(**numbers, marks=marks), jnp.concatenate([ts, others, times]), None
    if type(solver) is not Fixed:
        raise TypeError(f"stops and jumps need jode.Fixed or jode.Adaptive, got {solver!r}")
    times = jnp.concatenate([ts, times[:-1]])  # of equal times save times come first: a state is saved before it jumps
    marks = jnp.concatenate([jnp.full(ts.shape, -1, jnp.int32), marks[:-1]])
    order = jnp.argsort(jax.lax.stop_gradient(direction(ts) * times), stable=True)
    times, marks, n = times[order], marks[order], marks.shape[0]
    next_ = jax.lax.cummin(jnp.where(marks >= 0, _index(marks), n), reverse=True)
    there = jnp.concatenate([times, times[:1] * jnp.nan])[next_] == times  # steps that end at an equal save time see f before it
    marks = jnp.where(there & (marks < 0), -2, marks)
    return FixedStops(**numbers, marks=marks), jnp.concatenate([times, others]), jnp.argsort(order)[: ts.shape[0]]


def _marked(ts: Array, stops: Array | None, jumps: Array | None) -> tuple[Array, Array]:
    """Stops and jump times in order, and their marks. Of equal ones stops come first, then jumps as they were given.

    Jumps and stops apply from ts[0] on and before ts[-1]. The others come last, at ts[-1], where nothing happens but that f may
    jump; and so does one more, ts[-1] itself.
    """
    t0, t1, sign = ts[0], ts[-1], direction(ts)
    parts, marks = [], []
    if stops is not None:
        parts.append(stops)
        marks.append(jnp.where((sign * (stops - t0) >= 0) & (sign * (stops - t1) < 0), 0, -1).astype(jnp.int32))
    if jumps is not None:
        parts.append(jumps)
        marks.append(jnp.where((sign * (jumps - t0) >= 0) & (sign * (jumps - t1) < 0), 1 + _index(jumps), -1))
    given, marks = jnp.concatenate([ts[:0], *parts]), jnp.concatenate([*marks, jnp.full(1, -1, jnp.int32)])
    times, rest = jnp.where(marks >= 0, jnp.concatenate([given, t1[None]]), t1), marks < 0
    order = jnp.lexsort((rest, jax.lax.stop_gradient(sign * times)))
    last = jnp.where(jnp.any(given == t1), 0, -1)
    return times[order], jnp.where(rest, last, marks)[order].astype(jnp.int32)


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
        return replace(super().static, marks=None)

    def window(self, march: Any, problem: Problem, place: tuple, carry: Any) -> Window:
        window = super().window(march, problem, place, carry)
        return self.limited(march, problem, Grid((), (), (), (), (), ()), place[-1], window)

    def limited(self, march: Any, problem: Problem, grid: Grid, i: Array, window: Window) -> Window:
        j = i // self.bound(march, problem)
        a, b = (march.rows.pick(problem.ts, k) for k in (j, j + 1))
        return _seeing_between(march, problem, window, a, march.mark(problem, j) >= 0, b, march.mark(problem, j + 1) != -1)

    def node(self, march: Any, problem: Problem, grid: Grid, i: Array) -> Array:
        bound = self.bound(march, problem)  # rows that take fewer steps stand still up to the last
        return march.rows.spread(jnp.where(i % bound == bound - 1, i // bound + 1, -1))

    def init(self, march: Any, problem: Problem, s: State, slope: State | None) -> Any:
        carry = super().init(march, problem, s, slope)
        return carry._replace(before=stack_zeros(march.plan.saves, s)) if march.keeps_resets else carry

    def between(self, march: Any, problem: Problem, j: Array, c: Any) -> Any:
        control = c.control._replace(before=put(c.control.before, j, c.s)) if march.keeps_resets else c.control
        return c._replace(s=march.reset(problem, march.rows.spread(jnp.asarray(j, jnp.int32)), c.s), control=control)

    def reset_states(self, carry: Any) -> Any:
        return carry.before


class Stopped(NamedTuple):
    """A `Progress`, and in columns: how many of the marked times are behind; which of ts the row stands at (-1: none); the next
    time, and what happens there; whether the row wants another step; and whether it waits for what happens where it is. before: the
    states that were reset, where they are kept. Where events reset: at which one the next step aims (-1: none), how often it did,
    how wide it may be, from which side g comes, and how many there were.
    """

    t: Array
    h: Array
    errors: tuple[Array, ...]
    accepted: Array
    tried: Array
    loops: Array
    unsolved: Any
    narrowed: Array
    loose: Array
    behind: Array
    node: Array
    end: Array
    mark: Array
    wanted: Array
    waits: Array
    before: Any
    aim: Any = ()
    tries: Any = ()
    room: Any = ()
    side: Any = ()
    found: Any = ()


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
        zero, no = jnp.zeros(p.t.shape, jnp.int32), jnp.zeros(p.t.shape, bool)
        kept = stack_zeros(problem.numbers["marks"].shape[0], s) if march.keeps_resets else ()
        c = Stopped(*p, behind=zero, node=zero, end=p.t, mark=zero, wanted=no, waits=no, before=kept)
        if march.resetting:
            c = c._replace(aim=zero - 1, tries=zero, room=jnp.zeros_like(p.t), side=zero.astype(jnp.int8), found=zero)
        return self._towards(march, problem, c, p.h, slope or ())

    def _towards(self, march: Any, problem: Problem, c: Stopped, width: Array, slope: State) -> Stopped:
        """The carry of a row that starts with a step so wide towards its next time, which may be the time it is at."""
        end = march.rows.spread(march.rows.pick(problem.ts, _first(problem) + c.behind))
        mark = march.rows.spread(march.rows.pick(problem.numbers["marks"], c.behind))
        h = reach(end, c.t, width)
        wanted = (h != 0) | ((end == c.t) & march.rows.finite(slope))
        return c._replace(h=h, end=end, mark=mark, wanted=wanted, waits=jnp.zeros_like(c.waits))

    def window(self, march: Any, problem: Problem, place: None, carry: Any) -> Window:
        window, c = super().window(march, problem, place, carry), carry
        window = _standing(window, ~c.wanted)
        return _seeing_between(march, problem, window, c.t, c.node >= _first(problem), c.end, c.mark >= 0)

    def target(self, march: Any, problem: Problem, c: Stopped) -> Array:
        return c.end

    def wants(self, c: Stopped) -> Array:
        return c.wanted

    def halted(self, carry: Stopped, rows: Array) -> Stopped:
        c = super().halted(carry, rows)
        return c._replace(wanted=c.wanted & ~rows, waits=c.waits & ~rows)

    def narrowest(self, march: Any, problem: Problem, c: Any) -> Any:
        c = super().narrowest(march, problem, c)
        return c._replace(wanted=c.wanted | (c.h != 0))

    def judged(self, march: Any, problem: Problem, c: Stopped, accept: Array) -> Stopped:
        there = accept & (c.t == c.end)
        waits = there & (c.mark >= 0) & (c.t != march.save_times(problem)[-1])
        node = jnp.where(accept, jnp.where(there, _first(problem) + c.behind, -1), c.node)
        return c._replace(node=node, wanted=waits | (c.h != 0), waits=waits)

    def serve(self, march: Any, problem: Problem, c: Any) -> Any:
        """Reset rows that wait, evaluate their slope and choose their first step anew, and go on to the next time."""
        p, method = c.control, march.method
        known = p.waits & (p.node >= 0)
        s = march.reset_by(problem, jnp.where(known, p.mark, -1), p.t, c.s)
        after = jnp.where(known, march.after(problem, p.t), p.t)
        if march.resetting:
            found = p.waits & (p.node < 0)
            s = march.reset_found(problem, jnp.where(found, p.node, -1), p.t, s)
            p = p._replace(aim=jnp.where(found, -1, p.aim), found=p.found + found.astype(jnp.int32))
        y = method.read(s)
        slope = march.F(after, y, problem.params)
        width = self.first_width(march, problem, after, y, slope)
        on = self._towards(march, problem, p._replace(behind=p.behind + known.astype(jnp.int32)), width, slope)
        if march.keeps_resets:  # of rows at their next time, which may be their end; the last entry takes what is not wanted
            at = jnp.where(p.node == _first(problem) + p.behind, p.behind, problem.numbers["marks"].shape[0] - 1)
            on = on._replace(before=tuple(march.rows.write(table, at, x) for table, x in zip(p.before, c.s, strict=True)))
        on = on._replace(h=jnp.where(p.waits, on.h, p.h), wanted=jnp.where(p.waits, on.wanted, p.wanted))
        return c._replace(s=s, slope=where(p.waits, method.reused(slope), c.slope), control=on)

    def reset_states(self, carry: Stopped) -> Any:
        return carry.before

    def running(self, c: Stopped, few: int = 0) -> Array:
        return (c.loops < self.max_steps) & (jnp.sum(c.wanted, dtype=jnp.int32) > few)

    def unfinished(self, carry: Stopped) -> Array:
        return carry.wanted & (carry.loops < self.max_steps)

    def resets(self, march: Any, problem: Problem, carry: Stopped) -> Array:
        return self.nfe_start * (carry.behind + carry.found if march.resetting else carry.behind)

    def report(self, march: Any, problem: Problem, c: Any, good: Array, slope: State) -> tuple[Array, Array, Array, Array]:
        p = c.control  # a row that still waits has no width, and is not stuck
        return super().report(march, problem, c._replace(control=p._replace(h=jnp.where(p.wanted, 1, p.h))), good, slope)

    def ends(self, march: Any, problem: Problem, grid: Grid, i: Array, left: Any = None) -> tuple[tuple, Callable]:
        if left is None:
            return super().ends(march, problem, grid, i)
        start = jnp.where(i == 0, grid.start, grid.times[jnp.maximum(i - 1, 0)])
        end, (p, q) = grid.times[i], nodes_of(grid, i)
        moved = (end != start) | (p != q)
        first, last = moved & (p >= 0), moved & (q >= 0)
        places = jnp.maximum(p, 0), jnp.maximum(q, 0)
        return places, lambda a, b: (t := jnp.where(first, a, start), jnp.where(last, b, end) - t)

    def limited(self, march: Any, problem: Problem, grid: Grid, i: Array, window: Window) -> Window:
        p, q = nodes_of(grid, i)
        window = _standing(window, (window.h == 0) & (p == q))
        end = jnp.where(q < 0, window.t + window.h, march.rows.pick(problem.ts, jnp.maximum(q, 0)))
        marked = lambda j: march.mark(problem, j) >= 0
        return _seeing_between(march, problem, window, window.t, marked(p), end, marked(q))

    def node(self, march: Any, problem: Problem, grid: Grid, i: Array) -> Array:
        p, q = nodes_of(grid, i)
        return jnp.where(p == q, -1, q)  # a row that stands still has been served


def _standing(window: Window, rows: Array) -> Window:
    """The window with these rows standing still, where any may: not those that step between equal times."""
    return window if window.still is None else replace(window, still=rows)


def _seeing_between(march: Any, problem: Problem, window: Window, a: Array, at_a: Array, b: Array, at_b: Array) -> Window:
    """The window whose stages see times from a to b: not these themselves where something happens there. Between two equal times f
    is what it is after the first if something happens there, and before the second otherwise, but never before ts[0].
    """
    ts = march.save_times(problem)
    sign = direction(ts)
    first, last = jnp.where(at_a, just_after(a, sign), a), jnp.where(at_b, just_after(b, -sign), b)
    apart, after = sign * (last - first) > 0, at_a | (a == ts[0])
    first, last = jnp.where(apart | after, first, last), jnp.where(apart | ~after, last, first)
    return replace(window, limits=(jnp.minimum(first, last), jnp.maximum(first, last)))


def nodes_of(grid: Grid, i: Array) -> tuple[Array, Array]:
    """Which of ts rows stand at before and after slot i."""
    table, first = grid.nodes
    return jnp.where(i == 0, first, table[jnp.maximum(i - 1, 0)]), table[i]


def _first(problem: Problem) -> int:
    """The place of the first marked time of a found grid."""
    return problem.ts.shape[0] - problem.numbers["marks"].shape[0]


def _index(x: Array) -> Array:
    return jnp.arange(x.shape[0], dtype=jnp.int32)
