"""What each step says of itself, in a table with an entry for every step taken; and the first of these: its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import direction
from jode.observe.base import Bars, Seen, Watch, nothing
from jode.tree import Layout, State, add, stack_full, unstack
from jode.window import Problem


class Filled(NamedTuple):
    """How many entries each row has (a column), and the tables; one more entry takes what is not wanted."""

    count: Array
    entries: State


@dataclass(frozen=True)
class Table(Watch):
    """A table of `capacity` entries, by default as many as there may be steps; the rest of it is NaN.

    A trajectory with more steps ends with `Status.capacity`, and its tables are NaN. Subclasses write `shapes`, `entry` and
    `result`.
    """

    capacity: int | None = None
    g: Any = None  # a user's function, if it looks by one: the march has it for all rows
    out: Layout | None = None  # of what that returns

    by_row = True
    refines: ClassVar[bool] = False  # whether entries need the slopes of the interpolant
    whole: ClassVar[bool] = False  # whether an entry is of the whole solve: NaN where that failed

    def __post_init__(self) -> None:
        c = self.capacity
        if c is not None and (not isinstance(c, int) or isinstance(c, bool) or c < 1):
            raise ValueError(f"{type(self).__name__}: capacity must be a positive int or None, got {c!r}")

    def sized(self, most: int, method: Any) -> Any:
        """With a capacity, given the most steps of the method that there may be (0: not known)."""
        if self.capacity is None and not most:
            raise ValueError(
                f"{type(self).__name__} cannot know how many steps to keep for a traced step count: "
                f"give {type(self).__name__}(capacity=...) or Fixed(..., max_steps=bound)"
            )
        return replace(self, capacity=self.capacity or most)

    def told(self, out: Layout) -> Any:
        """Told what its function returns."""
        if not all(jnp.issubdtype(d, jnp.inexact) for d in out.dtypes):
            raise TypeError(f"the function of an observer must return floating values, got {', '.join(map(str, out.dtypes))}")
        return replace(self, out=out)

    def shapes(self, plan: Any) -> tuple:
        """Shapes and dtypes of an entry's vectors, for one trajectory."""
        raise NotImplementedError

    def entry(self, march: Any, t: Array, h: Array, end: Array, s: State, s1: State, ks: list[State]) -> State:
        """The entry of a step from t to end = t + h and from s to s1 with slopes ks."""
        raise NotImplementedError

    def result(self, entries: State, reached: Array, unflatten: Callable) -> Any:
        """What the user gets, of one trajectory; unflatten(vectors, lead) makes states of packed ones with leading axes."""
        raise NotImplementedError

    def init(self, march: Any, problem: Problem, c: Any) -> Filled:
        assert self.capacity is not None
        like = tuple(march.rows.repeated(jnp.zeros(x.shape, x.dtype)) for x in self.shapes(march.plan))
        count = march.rows.spread(jnp.zeros((), jnp.int32))
        return Filled(count, stack_full(self.capacity + 1, like, jnp.asarray(nothing())))

    def step(self, march: Any, problem: Problem, carry: Filled, seen: Seen) -> Filled:
        assert self.capacity is not None
        window, rows = seen.window, march.rows
        taken = self.enters(carry, window.h) & (True if seen.accept is None else seen.accept)
        end = window.t + window.h if seen.t is None else seen.t
        ks = march.method.refined(window, seen.s, seen.slopes) if self.refines else []
        values = self.entry(march, window.t, window.h, end, seen.s, seen.s1, ks)
        index = rows.spread(jnp.where(taken, jnp.minimum(carry.count, self.capacity), self.capacity))
        entries = tuple(rows.write(table, index, x) for table, x in zip(carry.entries, values, strict=True))
        return Filled(carry.count + taken.astype(jnp.int32), entries)

    def enters(self, carry: Filled, h: Array) -> Array:
        """Whether a step taken has an entry: if it moves."""
        return h != 0

    def leads_with(self, window: Any) -> Array:
        """The time that the entry of a step leads with: its end."""
        return window.t + window.h

    def overflowed(self, carry: Filled) -> Array:
        """Rows with more steps than entries."""
        return carry.count > (self.capacity or 0)

    def read(self, carry: Filled) -> State:
        """The tables; NaN in rows that did not fit."""
        return tuple(jnp.where(self.overflowed(carry), jnp.nan, x[:-1]).astype(x.dtype) for x in carry.entries)

    def ended(self, march: Any, problem: Problem, entries: State, end: Array) -> State:
        """The tables of rows that ended at some time, a column (NaN where they did not). Entries lead with their time."""
        sign, rows = direction(march.save_times(problem)), march.rows
        late = jax.vmap(lambda t: sign * (rows.number(t) - end) > 0)(entries[0])
        return tuple(jnp.where(rows.over_time(late), nothing(), x).astype(x.dtype) for x in entries)

    def spoils(self, rows: Any, entries: State, bars: State) -> Array:
        """Rows with cotangents of what is not there: those without an entry. What lies behind the entries is no number, and
        cotangents of it mean nothing.
        """
        touched = [~rows.all(jnp.all(b == 0, axis=0)) for b in bars]
        return rows.all(~jnp.isfinite(entries[0][0])) & reduce(jnp.logical_or, touched)

    def left(self, march: Any, problem: Problem, entries: State) -> Array:
        """How many entries each row has, given the tables, whose first vector has one component."""
        return march.rows.spread(jnp.sum(march.rows.as_column(jnp.isfinite(entries[0])), axis=0, dtype=jnp.int32))

    def pull(
        self, march: Any, problem: Problem, left: Array, seen: Seen, K: State, g: State, values: State, bars: Bars
    ) -> tuple[Array, Bars]:
        """The transpose: cotangents g of the entries, of which the first `left` were not pulled."""
        rows, window = march.rows, seen.window
        at = jnp.maximum(left - 1, 0)
        # The last steps may have no entry: those after an end, or a failure. An entry is that of the step whose time it leads with.
        ahead = (rows.number(rows.pick_state(values[0], at)) - self.leads_with(window)) * jnp.sign(window.h)
        mask = (window.h != 0) & (left > 0) & (2 * ahead > -jnp.abs(window.h))
        mask = mask | ((window.h == 0) & (left == 1) & (seen.slot == 0))  # of a first step that does not move, if it has an entry
        bar = tuple(jnp.where(mask, rows.pick_state(x, at), 0).astype(x.dtype) for x in g)
        ks = unstack(K, K[0].shape[0]) if self.refines else []
        entry = lambda t, h, s, s1, ks: self.entry(march, t, h, t + h, s, s1, ks)
        _, back = jax.vjp(entry, window.t, window.h, seen.s, seen.s1, ks)
        t, h, s, s1, kbar = back(bar)
        slopes = add(bars.slopes, tuple(jnp.stack(x) for x in zip(*kbar, strict=True))) if self.refines else bars.slopes
        bars = bars._replace(t=bars.t + t, h=bars.h + h, s=add(bars.s, s), end=add(bars.end, s1), slopes=slopes)
        return left - mask.astype(jnp.int32), bars


class StepsTaken(NamedTuple):
    """The ends of the steps taken, in order: their times (capacity,), the states there with the same leading axis, and how many
    there are; NaN from there on.
    """

    ts: Array
    ys: Any
    count: Array


@dataclass(frozen=True)
class Steps(Table):
    """Every step taken: `Solution.observed` is a `StepsTaken`. A state at a jump is that before it. A solve over no time has none.

    Costs capacity × (state + 1) numbers, no evaluation of f. All derivatives are those of the states computed; times that the solve
    found are constants.
    """

    def shapes(self, plan: Any) -> tuple:
        return (jax.ShapeDtypeStruct((1,), plan.time), *plan.layout.packed)

    def entry(self, march: Any, t: Array, h: Array, end: Array, s: State, s1: State, ks: list[State]) -> State:
        return (march.rows.as_vector(end), *march.method.read(s1))

    def result(self, entries: State, reached: Array, unflatten: Callable) -> StepsTaken:
        ts, *ys = entries
        ts = ts[:, 0]
        return StepsTaken(ts, unflatten(tuple(ys), ts.shape), jnp.sum(jnp.isfinite(ts), dtype=jnp.int32))
