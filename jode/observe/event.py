"""Where a function of time and state crosses zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import direction
from jode.observe.base import Bars, Seen, rounding, roundings
from jode.observe.record import node_of
from jode.observe.table import Table
from jode.tree import Layout, State, add, increment, magnitude, unstack
from jode.window import Problem


class Crossings(NamedTuple):
    """Times and states where g crossed zero, and how many of them; NaN where there is none. With `most` > 1 times and states lead
    with an axis of that length. At a reset the state is that before it, and `count` counts those too that were not kept.
    """

    t: Array
    y: Any
    count: Array


class Looked(NamedTuple):
    """A `Filled`, whether the row has ended here, the sign of g where it was last looked at, and whether that is not known yet:
    at the start, and after a stop or a jump.
    """

    count: Array
    entries: State
    over: Array
    side: Array
    fresh: Array


@dataclass(frozen=True)
class Event:
    """Where g(t, y, args) crosses zero: `Solution.observed` is a `Crossings`.

    Within each step the sign of g is looked at on the method's interpolant, at `looks` places equally far apart, the last of them
    the end of the step. Where it changes a crossing is located to rounding; all of a step are found, but two between the same two
    places are missed: more `looks` or `Adaptive(max_step=...)` bring places closer. g = 0 at the start, to rounding, is none:
    the side that the trajectory leaves to counts. g = 0 at the end, to rounding, is one where the trajectory comes from one side.
    Stops and jumps are such ends and starts. Rounding is that of the times and states that g reads, see `roundings`. The
    derivatives of time and state, up to the third, are those of the implicit function g(t, y(t)) = 0, and NaN where g only touches
    zero. Costs `looks` evaluations of g and of the interpolant a step, and some twenty for each crossing.

    With `reset` y becomes reset(t, y, args) at each crossing, and the solve goes on, as often as it happens. The step before ends
    at the crossing: it is taken again, narrower, until g is zero to rounding at its end, which costs two or three steps; a reset
    costs two evaluations of f. States saved at that time, `Dense` and `At` are before the reset there. Directly after it g may be
    zero, and must leave zero before it counts again. Events that reset and coincide, to rounding, all happen, in the order given.
    Needs `Adaptive` and `Backprop`. Derivatives, up to the third, are those of the implicit function and of the reset (the
    saltation). Resets that pile up end in `Status.max_steps`.

    g: pure, for one trajectory; a real number. direction: 1 for crossings upwards in the order of the solve, -1 downwards, 0 both.
    It may be a boolean, true or false: then it has no derivatives, and no `reset`. terminate: whether the trajectory ends at its
    first crossing, or at which one (a number), with `Status.event`; states at save times after it are NaN.
    `Fixed` marches on to the end all the same; with `reset` it has no meaning. most: how many crossings are kept. looks: how often
    a step is looked at. reset: pure, for one trajectory; the structure and shapes of y.
    """

    g: Callable
    direction: int = 0
    terminate: bool | int = True
    most: int = 1
    looks: int = 8
    reset: Callable | None = None

    def __post_init__(self) -> None:
        if not callable(self.g):
            raise TypeError(f"Event: g must be a function g(t, y, args), got {self.g!r}")
        if not (self.reset is None or callable(self.reset)):
            raise TypeError(f"Event: reset must be a function reset(t, y, args) that returns a state like y, got {self.reset!r}")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"Event: direction must be -1, 0 or 1, got {self.direction!r}")
        if not isinstance(self.terminate, int) or self.terminate < 0:
            raise ValueError(f"Event: terminate must be True, False or a number of crossings, got {self.terminate!r}")
        for name in ("most", "looks"):
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"Event: {name} must be a positive int, got {n!r}")

    @property
    def table(self) -> EventTable:
        if self.reset is not None:
            return ResetTable(self.most, self.g, None, self.direction, 0, self.looks, self.reset)
        return EventTable(max(self.most, int(self.terminate)), self.g, None, self.direction, int(self.terminate), self.looks)


@dataclass(frozen=True)
class EventTable(Table):
    """`Event` inside the loop: an entry for each crossing."""

    direction: int = 0
    terminate: int = 1  # at which crossing the trajectory ends; 0: at none
    looks: int = 8

    refines = True
    slopes = True

    @property
    def ends(self) -> int:
        return self.terminate

    def told(self, out: Layout) -> EventTable:
        one = jax.tree_util.treedef_is_leaf(out.treedef) and out.shapes == ((),)
        kinds = (jnp.floating,) if self.resets else (jnp.floating, jnp.bool_)
        if not (one and any(jnp.issubdtype(out.dtypes[0], kind) for kind in kinds)):
            word = "" if self.resets else ", or a boolean"
            raise TypeError(
                f"Event: g(t, y, args) must return one real number, a floating array of shape () in no container{word}; "
                f"got {out.like}"
            )
        return replace(self, out=out)

    def shapes(self, plan: Any) -> tuple:
        return (jax.ShapeDtypeStruct((1,), plan.time), *plan.layout.packed)

    def value(self, march: Any, t: Array, y: State, params: Any) -> Array:
        """g of every row, a column."""
        g = march.rows.number(march.seen_by(self)(t, y, params)[0])
        return jnp.where(g, 1, -1).astype(t.dtype) if g.dtype == bool else g.astype(t.dtype)

    def init(self, march: Any, problem: Problem, c: Any) -> Looked:
        filled, rows = super().init(march, problem, c), march.rows
        t = t0 = rows.spread(problem.ts[0])
        fresh = t == t0
        if not march.solver.lands:  # found again a grid may start on the way
            t = c.control.t
            fresh = (t == t0) | march.interrupted(problem, node_of(c.control))
        side = sign_of(self.value(march, t, march.method.read(c.s), problem.params))
        return Looked(*filled, jnp.zeros(filled.count.shape, bool), side, fresh)

    def overflowed(self, carry: Any) -> Array:
        return carry.count < 0

    def step(self, march: Any, problem: Problem, carry: Looked, seen: Seen) -> Looked:
        assert self.capacity is not None
        rows, window, n, capacity = march.rows, seen.window, self.looks, self.capacity
        t, h = rows.spread(window.t), rows.spread(window.h)
        taken = (h != 0) & ~carry.over & (True if seen.accept is None else seen.accept)
        step = (t, h, seen.s, march.method.refined(window, seen.s, seen.slopes), window.params)
        still = jax.lax.stop_gradient(step)
        along = lambda theta: self._along(march, still, theta)
        rests = march.solver.rests(march, problem, seen)
        before, signs, _ = self._signs(march, problem, carry, seen, still, taken, rests)
        crossed = taken[None] & self._turned(before, signs)

        def one(c: tuple) -> tuple:
            """The first crossing of a row that is left."""
            count, entries, left = c
            wanted, i = jnp.any(left, axis=0), jnp.argmax(left, axis=0).astype(jnp.int32)
            high = (i + 1).astype(t.dtype) / n
            ends = (i.astype(t.dtype) / n, high, rows.pick(before, i), rows.pick(signs, i))
            theta = _root(march.runner, along, *ends, wanted)
            values = self._crossing(march, step, theta, wanted)
            index = jnp.where(wanted, jnp.minimum(count, capacity), capacity)
            entries = tuple(rows.write(table, index, x) for table, x in zip(entries, values, strict=True))
            there = _places(n, i) == i[None]
            count = count + wanted.astype(jnp.int32)
            return count, entries, left & ~there & ~self._last(count)[None]

        count, entries, _ = march.runner.until(lambda c: ~jnp.any(c[2]), one, (carry.count, carry.entries, crossed))
        over = carry.over | self._last(count)
        return Looked(count, entries, over, jnp.where(taken, signs[-1], carry.side), jnp.where(taken, rests, carry.fresh))

    def _last(self, count: Array) -> Array:
        """Whether the trajectory ends at the last of so many crossings."""
        return (count >= self.terminate) & (self.terminate > 0)

    def _turned(self, before: Array, after: Array) -> Array:
        """Whether g crosses zero in the direction that counts, by its signs before and after."""
        turned = (jnp.abs(before) == 1) & (jnp.abs(after) <= 1) & (after != before)
        return turned & ((before == -self.direction) | (self.direction == 0))

    def _signs(self, march: Any, problem: Problem, carry: Looked, seen: Seen, step: tuple, taken: Array, rests: Array) -> tuple:
        """The signs of g before each part of the step, the first just after its start, and after it, and its values after it;
        rests: see `Solver.rests`.
        """
        (t, h, *_, params), n, read = step, self.looks, march.method.read
        t1 = march.rows.spread(t + h if seen.t is None else seen.t)
        start, end = jax.lax.stop_gradient(((t, read(seen.s)), (t1, read(seen.s1))))
        values = self.value(march, *end, params)[None]
        if n > 1:
            inside = jax.vmap(lambda theta: self._along(march, step, theta))(jnp.arange(1, n, dtype=t.dtype) / n)
            values = jnp.concatenate([inside, values])
        signs = sign_of(values)

        def at_ends() -> tuple:
            first, rate, near = self._nearly_zero(march, problem, step, 0.0, *start)
            last, speed, close = self._nearly_zero(march, problem, step, 1.0, *end)
            return jnp.where(near, sign_of(rate), sign_of(first)), close & (last * speed < 0)

        known = lambda: (carry.side, jnp.zeros(taken.shape, bool))
        side, arrives = jax.lax.cond(jnp.any(taken & (carry.fresh | rests)), at_ends, known)
        side = jnp.where(carry.fresh, side, carry.side)
        signs = signs.at[-1].set(jnp.where(rests & arrives, 0, signs[-1]))
        return jnp.concatenate([side[None], signs[:-1]]), signs, values

    def _along(self, march: Any, step: tuple, theta: Array) -> Array:
        """g on the interpolant, a fraction theta into the step: (t, h, s, slopes, params)."""
        t, h, s, ks, params = step
        y = increment(march.method.base(theta, s), h, march.method.dense_weights(theta), ks)
        return self.value(march, t + theta * h, y, params)

    def _nearly_zero(self, march: Any, problem: Problem, step: tuple, theta: float, at: Array, y: State) -> tuple:
        """g at the time and state theta into the step, its derivative by theta, and whether g is zero there to rounding."""
        t, h, *_, params = step
        g, back = jax.vjp(lambda t, y: self.value(march, t, y, params), at, y)
        place = jnp.asarray(theta, t.dtype)  # the same of all rows: its weights are numbers
        _, rate = jax.jvp(lambda theta: self._along(march, step, theta), (place,), (jnp.ones_like(place),))
        by_t, by_y = back(jnp.ones_like(t))
        size = jnp.finfo(t.dtype).eps * jnp.abs(by_t * at)
        for d, x in zip(by_y, y, strict=True):
            size = size + jnp.finfo(x.dtype).eps * march.rows.sum(magnitude(d) * magnitude(x)).astype(t.dtype)
        lost = rounding(march.method, march.save_times(problem)) * jnp.abs(rate) / jnp.where(h == 0, 1, jnp.abs(h))
        return g, rate, jnp.abs(g) <= roundings(march.method) * size + lost

    def _crossing(self, march: Any, step: tuple, theta: Array, wanted: Array) -> State:
        """Time and state of the crossing at theta, which moves so that g stays zero."""
        t, h, s, ks, _ = step
        along = lambda theta: self._along(march, step, theta)
        theta, n = jax.lax.stop_gradient(theta), self.looks
        one = jnp.ones_like(theta)
        before = jnp.clip(jnp.floor(theta * n), 0, n - 1) / n  # the places around it
        flat = jnp.finfo(theta.dtype).eps ** 0.5 * n * (jnp.abs(along(before)) + jnp.abs(along(before + 1 / n)))
        for _ in range(3):  # Newton's steps: each makes one more order of derivatives exact
            g, slope = jax.jvp(along, (theta,), (one,))
            slope = jnp.where(wanted, jnp.where(jnp.abs(slope) > flat, slope, jnp.nan), 1)
            theta = theta + zero_of(g, slope)
        y = increment(march.method.base(theta, s), h, march.method.dense_weights(theta), ks)
        return (march.rows.as_vector(t + theta * h), *y)

    def pull(
        self, march: Any, problem: Problem, left: Array, seen: Seen, K: State, g: State, values: State, bars: Bars
    ) -> tuple[Array, Bars]:
        rows, window, sign = march.rows, seen.window, direction(march.save_times(problem))
        a, h = rows.spread(window.t), rows.spread(window.h)
        time = lambda n: rows.number(rows.pick_state(values[0], jnp.maximum(n - 1, 0)))

        def pending(n: Array) -> Array:
            """Rows whose last entry not pulled is of this step."""
            return (n > 0) & (h != 0) & ((sign * (time(n) - a) > 0) | (a == problem.ts[0]))

        def one(carry: tuple) -> tuple:
            n, bars = carry
            mask = pending(n)
            theta = jnp.where(mask, (time(n) - a) / jnp.where(h == 0, 1, h), 0.5)
            bar = tuple(jnp.where(mask, rows.pick_state(x, jnp.maximum(n - 1, 0)), 0).astype(x.dtype) for x in g)

            def entry(t: Array, h: Array, s: State, K: State, shared: list) -> State:
                ks, params = unstack(K, K[0].shape[0]), window.params._replace(shared=shared)
                return self._crossing(march, (rows.spread(t), rows.spread(h), s, ks, params), theta, mask)

            _, back = jax.vjp(entry, window.t, window.h, seen.s, K, window.params.shared)
            moved = dict(zip(("t", "h", "s", "slopes", "shared"), back(bar), strict=True))
            return n - mask.astype(jnp.int32), bars._replace(**{name: add(getattr(bars, name), x) for name, x in moved.items()})

        moving = bars._replace(ts=(), end=())  # the loop carries nothing that it leaves as it is
        left, moved = march.runner.until(lambda c: ~jnp.any(pending(c[0])), one, (left, moving))
        return left, moved._replace(ts=bars.ts, end=bars.end)

    def result(self, entries: State, reached: Array, unflatten: Callable) -> Crossings:
        t, *y = entries
        count = jnp.sum(jnp.isfinite(t[:, 0]), dtype=jnp.int32)
        if self.capacity == 1:
            return Crossings(t[0, 0], unflatten(tuple(x[0] for x in y), ()), count)
        return Crossings(t[:, 0], unflatten(tuple(y), (t.shape[0],)), count)


@dataclass(frozen=True)
class ResetTable(EventTable):
    """An `Event` that resets, inside the loop: an entry for each crossing, which is the end of a step: its time, the state before
    the reset, and, in the first entry, how many there are.
    """

    reset: Callable | None = None

    resets = True

    def shapes(self, plan: Any) -> tuple:
        one = jax.ShapeDtypeStruct((1,), plan.time)
        return (one, *plan.layout.packed, one)

    def looks_ahead(self, march: Any, problem: Problem, carry: Looked, seen: Seen, taken: Array) -> tuple:
        """Of rows that would take the step: whether g crosses zero in it, near which fraction it first does, and from which side.
        And at its end: g, its derivative by the fraction, whether it is zero to rounding, and whether it comes there from one side.
        """
        rows, window = march.rows, seen.window
        t, h = rows.spread(window.t), rows.spread(window.h)
        step = (t, h, seen.s, march.method.refined(window, seen.s, seen.slopes), window.params)
        step = jax.lax.stop_gradient(step)
        before, signs, values = self._signs(march, problem, carry, seen, step, taken, jnp.zeros(taken.shape, bool))
        crossed = taken[None] & self._turned(before, signs)
        wanted, i = jnp.any(crossed, axis=0), jnp.argmax(crossed, axis=0).astype(jnp.int32)
        t1, y1 = jax.lax.stop_gradient((rows.spread(t + h), march.method.read(seen.s1)))
        first = self.value(march, t, jax.lax.stop_gradient(march.method.read(seen.s)), seen.window.params)
        came = jnp.sum(jnp.where(_places(self.looks, i) == i[None], before, 0), axis=0, dtype=before.dtype)
        theta = _near_root(jnp.concatenate([first[None], values]), i, came)
        g, rate, near = self._nearly_zero(march, problem, step, 1.0, t1, y1)
        arrives = near & self._turned(carry.side, -carry.side) & (carry.side.astype(rate.dtype) * rate < 0)
        return wanted, theta, came, (g, rate, near, arrives)

    def step(self, march: Any, problem: Problem, carry: Looked, seen: Seen) -> Looked:
        assert self.capacity is not None
        rows = march.rows
        taken = (seen.window.h != 0) & seen.accept
        happens = taken & march.happens(self, seen.node)
        end = jax.lax.stop_gradient((rows.spread(seen.t), march.method.read(seen.s1)))
        count = carry.count + happens.astype(jnp.int32)
        index = jnp.where(happens, jnp.minimum(carry.count, self.capacity), self.capacity)
        values = (rows.as_vector(seen.t), *march.method.read(seen.s1))
        entries = tuple(rows.write(table, index, x) for table, x in zip(carry.entries, values, strict=False))
        total = rows.write(carry.entries[-1], jnp.zeros_like(index), rows.as_vector(count.astype(seen.t.dtype)))
        side = jnp.where(taken, sign_of(self.value(march, *end, seen.window.params)), carry.side)
        rests = march.solver.rests(march, problem, seen)
        return Looked(count, (*entries, total), carry.over, side, jnp.where(taken, rests, carry.fresh))

    def pull(
        self, march: Any, problem: Problem, left: Array, seen: Seen, K: State, g: State, values: State, bars: Bars
    ) -> tuple[Array, Bars]:
        rows, window = march.rows, seen.window
        at = jnp.maximum(left - 1, 0)
        ahead = (rows.number(rows.pick_state(values[0], at)) - (window.t + window.h)) * jnp.sign(window.h)
        # Crossings behind the last one that was kept have no entry.
        mask = march.happens(self, seen.node) & (window.h != 0) & (left > 0) & (2 * ahead > -jnp.abs(window.h))
        tbar, *ybar = (jnp.where(mask, rows.pick_state(x, at), 0).astype(x.dtype) for x in g[:-1])
        tbar = rows.number(tbar)
        end = (*add(march.method.read(bars.end), tuple(ybar)), *bars.end[len(ybar) :])
        return left - mask.astype(jnp.int32), bars._replace(t=bars.t + tbar, h=bars.h + tbar, end=end)

    def result(self, entries: State, reached: Array, unflatten: Callable) -> Crossings:
        total = entries[-1]
        found = super().result(entries[:-1], reached, unflatten)
        count = jax.lax.stop_gradient(jnp.where(jnp.isfinite(total[0, 0]), total[0, 0], 0))
        return found._replace(count=count.astype(jnp.int32))


def sign_of(g: Array) -> Array:
    """1, 0 or -1, and 2 for NaN. In bytes: with a buffer of half a kilobyte XLA on a CPU runs a loop's kernels in several threads,
    and 10 rows take 570 µs instead of 330.
    """
    sign = (g > 0).astype(jnp.int8) - (g < 0).astype(jnp.int8)
    return jnp.where(jnp.isnan(g), 2, sign).astype(jnp.int8)


@jax.custom_jvp
def zero_of(g: Array, slope: Array) -> Array:
    """0, which moves like the zero of a function with this value and slope there: its derivative is -dg / slope."""
    return jnp.zeros_like(g)


@zero_of.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (g, slope), (gdot, _) = primals, tangents
    return zero_of(g, slope), -gdot / slope


def _near_root(values: Array, i: Array, before: Array) -> Array:
    """Where g comes to zero from the side `before`, between places i and i + 1 of n equal parts, by the parabola through its values
    there and at a third place beside: a fraction of the n parts, off by the third power of 1 / n. At the start g may be zero too.
    """
    n, side = values.shape[0] - 1, before.astype(values.dtype)
    at = lambda j: jnp.sum(jnp.where(_places(n + 1, j) == j[None], values, 0), axis=0)
    a, b, first = at(i), at(i + 1), i == 0
    third = at(jnp.where(first, jnp.minimum(i + 2, n), i - 1))
    bend = jnp.where(n > 1, (third - jnp.where(first, 2 * b - a, 2 * a - b)) / 2, 0)
    slope = b - a - bend  # a + slope u + bend u² is zero, and falls from its side: its derivative there is -side · root
    root = jnp.sqrt(jnp.maximum(slope * slope - 4 * a * bend, 0))
    rises = (side * slope > 0) & (bend != 0)
    below = jnp.where(rises, 2 * bend, side * root - slope)
    u = jnp.where(rises, -slope - side * root, 2 * a) / jnp.where(below == 0, 1, below)
    return (i.astype(u.dtype) + jnp.clip(u, 0, 1)) / n


def _places(n: int, like: Array) -> Array:
    return jnp.arange(n, dtype=like.dtype).reshape(-1, *[1] * like.ndim)


def _root(runner: Any, g: Callable, low: Array, high: Array, before: Array, after: Array, wanted: Array) -> Array:
    """theta between low and high where g is zero, for rows that want it, given its signs there, `before` and `after`, which differ.

    Newton's iteration, and bisection where that leaves the interval or does not halve its steps.
    """
    width = 2 * jnp.finfo(low.dtype).eps

    def turn(c: tuple) -> tuple:
        low, high, x, step = c
        gx, slope = jax.jvp(g, (x,), (jnp.ones_like(x),))
        early = sign_of(gx) == before
        low, high = jnp.where(early, x, low), jnp.where(early, high, x)
        newton = x - gx / jnp.where(slope == 0, 1, slope)
        fast = (slope != 0) & (newton >= low) & (newton <= high) & (jnp.abs(newton - x) <= step / 2)
        new = jnp.where(gx == 0, x, jnp.where(fast, newton, (low + high) / 2))
        return low, high, new, jnp.where(wanted, jnp.abs(new - x), 0)

    start = jnp.where(after == 0, high, (low + high) / 2)
    return runner.until(lambda c: ~jnp.any(c[3] > width), turn, (low, high, start, jnp.where(wanted, high - low, 0)))[2]
