"""Where a function of time and state crosses zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import direction
from jode.observe.base import Bars, Seen
from jode.observe.table import Table
from jode.tree import Layout, State, add, increment, unstack
from jode.window import Problem


class Crossings(NamedTuple):
    """Times and states where g crossed zero, and how many of them; NaN where there is none. With `most` > 1 times and states lead
    with an axis of that length.
    """

    t: Array
    y: Any
    count: Array


class Looked(NamedTuple):
    """A `Filled`, and whether the row has ended here."""

    count: Array
    entries: State
    over: Array


@dataclass(frozen=True)
class Event:
    """Where g(t, y, args) crosses zero: `Solution.observed` is a `Crossings`.

    A crossing is found where g has different signs at the ends of a step, and located on the method's interpolant to rounding. Two
    within one step are missed: `Adaptive(max_step=...)` makes steps short. A zero of g at the start is none. The derivatives of its
    time and state, up to the third, are those of the implicit function g(t, y(t)) = 0, and NaN where g only touches zero. Costs two
    evaluations of g a step, and some twenty where there is a crossing.

    g: pure, for one trajectory; a real number. direction: 1 for crossings upwards in the order of the solve, -1 downwards, 0 both.
    terminate: whether the trajectory ends at its first crossing, with `Status.event`; states at save times after it are NaN.
    `Fixed` marches on to the end all the same. most: how many crossings are kept.
    """

    g: Callable
    direction: int = 0
    terminate: bool = True
    most: int = 1

    def __post_init__(self) -> None:
        if not callable(self.g):
            raise TypeError(f"Event: g must be a function g(t, y, args), got {self.g!r}")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"Event: direction must be -1, 0 or 1, got {self.direction!r}")
        if not isinstance(self.most, int) or self.most < 1:
            raise ValueError(f"Event: most must be a positive int, got {self.most!r}")

    @property
    def table(self) -> EventTable:
        return EventTable(self.most, self.g, None, self.direction, self.terminate)


@dataclass(frozen=True)
class EventTable(Table):
    """`Event` inside the loop: an entry for each crossing."""

    direction: int = 0
    terminate: bool = True

    refines = True
    slopes = True

    @property
    def ends(self) -> bool:
        return self.terminate

    def told(self, out: Layout) -> EventTable:
        if out.shapes != ((),) or jnp.issubdtype(out.dtypes[0], jnp.complexfloating):
            raise TypeError(f"Event: g(t, y, args) must return one real number, got {out.dtypes} of shapes {out.shapes}")
        return super().told(out)

    def shapes(self, plan: Any) -> tuple:
        return (jax.ShapeDtypeStruct((1,), plan.time), *plan.layout.packed)

    def value(self, march: Any, t: Array, y: State, params: Any) -> Array:
        """g of every row, a column."""
        return march.rows.number(march.seen_by(self)(t, y, params)[0]).astype(t.dtype)

    def init(self, march: Any, problem: Problem, c: Any) -> Looked:
        filled = super().init(march, problem, c)
        return Looked(*filled, over=jnp.zeros(filled.count.shape, bool))

    def overflowed(self, carry: Any) -> Array:
        return carry.count < 0

    def step(self, march: Any, problem: Problem, carry: Looked, seen: Seen) -> Looked:
        assert self.capacity is not None
        rows, window, read = march.rows, seen.window, march.method.read
        t, h = rows.spread(window.t), rows.spread(window.h)
        end = t + h if seen.t is None else seen.t
        g0, g1 = self.value(march, t, read(seen.s), window.params), self.value(march, end, read(seen.s1), window.params)
        up, down = (g0 < 0) & (g1 >= 0), (g0 > 0) & (g1 <= 0)
        taken = (h != 0) & ~carry.over & (True if seen.accept is None else seen.accept)
        crossed = taken & ((up & (self.direction >= 0)) | (down & (self.direction <= 0)))
        step = (t, h, seen.s, march.method.refined(window, seen.s, seen.slopes), window.params)
        along = lambda theta, step=jax.lax.stop_gradient(step): self._along(march, step, theta)
        theta = _root(march.runner, along, g0, g1, crossed)
        there = lambda step: self._crossing(march, step, theta, crossed)
        nowhere = lambda step: tuple(jnp.zeros_like(x[0]) for x in carry.entries)
        values = jax.lax.cond(jnp.any(crossed), there, nowhere, step)
        index = jnp.where(crossed, jnp.minimum(carry.count, self.capacity), self.capacity)
        entries = tuple(rows.write(table, index, x) for table, x in zip(carry.entries, values, strict=True))
        return Looked(carry.count + crossed.astype(jnp.int32), entries, carry.over | (crossed & self.terminate))

    def _along(self, march: Any, step: tuple, theta: Array) -> Array:
        """g on the interpolant, a fraction theta into the step: (t, h, s, slopes, params)."""
        t, h, s, ks, params = step
        y = increment(march.method.base(theta, s), h, march.method.dense_weights(theta), ks)
        return self.value(march, t + theta * h, y, params)

    def _crossing(self, march: Any, step: tuple, theta: Array, wanted: Array) -> State:
        """Time and state of the crossing at theta, which moves so that g stays zero."""
        t, h, s, ks, _ = step
        along = lambda theta: self._along(march, step, theta)
        theta, one = jax.lax.stop_gradient(theta), jnp.ones_like(theta)
        flat = jnp.finfo(theta.dtype).eps ** 0.5 * (jnp.abs(along(0 * one)) + jnp.abs(along(one)))
        for _ in range(3):  # Newton's steps: each makes one more order of derivatives exact
            g, slope = jax.jvp(along, (theta,), (one,))
            slope = jnp.where(wanted, jnp.where(jnp.abs(slope) > flat, slope, jnp.nan), 1)
            theta = theta + zero_of(g, slope)
        y = increment(march.method.base(theta, s), h, march.method.dense_weights(theta), ks)
        return (march.rows.as_vector(t + theta * h), *y)

    def pull(
        self, march: Any, problem: Problem, left: Array, seen: Seen, K: State, g: State, values: State, bars: Bars
    ) -> tuple[Array, Bars]:
        rows, window = march.rows, seen.window
        at, a, h = jnp.maximum(left - 1, 0), rows.spread(window.t), rows.spread(window.h)
        t = rows.number(rows.pick_state(values[0], at))
        mask = (left > 0) & (h != 0) & (direction(march.save_times(problem)) * (t - a) > 0)
        theta = jnp.where(mask, (t - a) / jnp.where(h == 0, 1, h), 0.5)
        bar = tuple(jnp.where(mask, rows.pick_state(x, at), 0).astype(x.dtype) for x in g)

        def entry(t: Array, h: Array, s: State, K: State, shared: list) -> State:
            ks, params = unstack(K, K[0].shape[0]), window.params._replace(shared=shared)
            return self._crossing(march, (rows.spread(t), rows.spread(h), s, ks, params), theta, mask)

        def there(bars: Bars) -> Bars:
            _, back = jax.vjp(entry, window.t, window.h, seen.s, K, window.params.shared)
            moved = dict(zip(("t", "h", "s", "slopes", "shared"), back(bar), strict=True))
            return bars._replace(**{name: add(getattr(bars, name), x) for name, x in moved.items()})

        return left - mask.astype(jnp.int32), jax.lax.cond(jnp.any(mask), there, lambda bars: bars, bars)

    def result(self, entries: State, reached: Array, unflatten: Callable) -> Crossings:
        t, *y = entries
        count = jnp.sum(~jnp.isnan(t[:, 0]), dtype=jnp.int32)
        if self.capacity == 1:
            return Crossings(t[0, 0], unflatten(tuple(x[0] for x in y), ()), count)
        return Crossings(t[:, 0], unflatten(tuple(y), (t.shape[0],)), count)


@jax.custom_jvp
def zero_of(g: Array, slope: Array) -> Array:
    """0, which moves like the zero of a function with this value and slope there: its derivative is -dg / slope."""
    return jnp.zeros_like(g)


@zero_of.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (g, slope), (gdot, _) = primals, tangents
    return zero_of(g, slope), -gdot / slope


def _root(runner: Any, g: Callable, g0: Array, g1: Array, wanted: Array) -> Array:
    """theta in [0, 1] where g is zero, for rows that want it, given its values g0 and g1 of different signs at the ends.

    Newton's iteration, and bisection where that leaves the interval or does not halve its steps.
    """
    g0, g1 = jax.lax.stop_gradient((g0, g1))
    width = 2 * jnp.finfo(g0.dtype).eps

    def turn(c: tuple) -> tuple:
        low, high, x, step = c
        gx, slope = jax.jvp(g, (x,), (jnp.ones_like(x),))
        before = jnp.sign(gx) == jnp.sign(g0)
        low, high = jnp.where(before, x, low), jnp.where(before, high, x)
        newton = x - gx / jnp.where(slope == 0, 1, slope)
        fast = (slope != 0) & (newton >= low) & (newton <= high) & (jnp.abs(newton - x) <= step / 2)
        new = jnp.where(gx == 0, x, jnp.where(fast, newton, (low + high) / 2))
        return low, high, new, jnp.where(wanted, jnp.abs(new - x), 0)

    start = jnp.where(wanted, g0 / jnp.where(wanted, g0 - g1, 1), 0)
    first = (jnp.zeros_like(g0), jnp.ones_like(g0), start, jnp.where(wanted, jnp.ones_like(g0), 0))
    return runner.until(lambda c: ~jnp.any(c[3] > width), turn, first)[2]
