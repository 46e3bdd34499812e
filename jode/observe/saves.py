"""States at save times that steps do not end at: interpolated within the step that passes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import direction
from jode.observe.base import Bars, Seen, Watch, slack, within
from jode.tree import State, add, increment, increment_stacked, nan_unless, real_dtype, work_dtype
from jode.window import Problem


class Saves(NamedTuple):
    """Which save time comes next (a column), how many steps were interpolated, and the states so far, by interior save time."""

    next: Array
    dense: Array
    ys: State


@dataclass(frozen=True)
class Interpolated(Watch):
    """Save times between the ends, looked for after every step."""

    by_row = True
    slopes = True

    def init(self, march: Any, problem: Problem, c: Any) -> Saves:
        ts, y0, rows = march.save_times(problem), problem.y0, march.rows
        same = at_start(ts)[1:-1]
        ys = tuple(jnp.where(beside(same, x[None]), x[None], jnp.zeros_like(x)[None]) for x in y0)
        zero = rows.spread(jnp.zeros((), jnp.int32))
        return Saves(1 + rows.spread(jnp.sum(same, axis=0)).astype(jnp.int32), zero, ys)

    def _pending(self, march: Any, problem: Problem, j: Array, t: Array) -> Array:
        ts = march.save_times(problem)
        return (j < ts.shape[0] - 1) & (direction(ts) * (march.rows.pick(ts, j) - t) <= slack(march, ts))

    def step(self, march: Any, problem: Problem, carry: Saves, seen: Seen) -> Saves:
        """Interpolate at every interior save time that the accepted step has passed."""
        method, rows, ts = march.method, march.rows, march.save_times(problem)
        window, s, inner = seen.window, seen.s, ts.shape[0] - 1
        pending = lambda j: self._pending(march, problem, j, seen.t)
        due = pending(carry.next)

        def one(c: tuple) -> tuple:
            j, ys = c
            mask = pending(j) | (rows.size is None)  # one trajectory is here only while it is pending
            theta = (rows.pick(ts, j) - window.t) / jnp.where(window.h == 0, 1, window.h)
            values = increment(method.base(theta, s), window.h, method.dense_weights(theta), slopes)
            index = jnp.where(mask, j - 1, inner)
            ys = tuple(rows.write(table, index, v) for table, v in zip(ys, values, strict=True))
            return j + mask.astype(jnp.int32), ys

        slopes = seen.slopes
        if method.extra:
            more = jax.lax.cond(
                jnp.any(due),
                lambda: tuple(method.refined(window, s, slopes)[len(slopes) :]),
                lambda: (jax.tree.map(jnp.zeros_like, slopes[0]),) * method.extra,
            )
            slopes = [*slopes, *more]
        j, ys = march.runner.until(lambda c: ~jnp.any(pending(c[0])), one, (carry.next, carry.ys))
        return Saves(j, carry.dense + due.astype(jnp.int32), ys)

    def read(self, carry: Saves) -> State:
        """The states at interior save times, NaN at those that the march did not come to."""
        count = carry.ys[0].shape[0] if carry.ys else 0
        come = jax.vmap(lambda i: i < carry.next)(jnp.arange(1, count + 1, dtype=jnp.int32))
        return tuple(nan_unless(beside(come, y), y) for y in carry.ys)

    def pull(
        self, march: Any, problem: Problem, j: Array, seen: Seen, K: State, g: State, values: State, bars: Bars
    ) -> tuple[Array, Bars]:
        """The transpose: cotangents g of the states saved within a step, given its slopes K, stacked; j is the last save not
        pulled.
        """
        method, rows, ts = march.method, march.rows, march.save_times(problem)
        a, h, s = seen.window.t, seen.window.h, seen.s

        def pending(j: Array) -> Array:
            return (j > 0) & within(problem, rows.pick(ts, jnp.maximum(j, 0)), a, h, direction(ts), slack(march, ts))

        def dense_state(t: Array, a: Array, h: Array, s: State, K: State) -> State:
            theta = (t - a) / jnp.where(h == 0, 1, h)
            return increment_stacked(method.base(theta, s), h, jnp.stack(method.dense_weights(theta)), K)

        def one(carry: tuple) -> tuple:
            j, mask, bars = carry
            at = jnp.maximum(j, 0)
            gj = tuple(jnp.where(mask, rows.pick_state(x, at), 0) for x in g)
            _, back = jax.vjp(dense_state, rows.pick(ts, at) + jnp.zeros_like(a), a, h, s, K)
            tbar, *moved = back(gj)
            tsbar = rows.add_at(bars.ts, at, jnp.where(mask, tbar, 0))
            abar, hbar, sbar, kbar = moved
            j = j - mask.astype(jnp.int32)
            slopes = add(bars.slopes, kbar)
            bars = bars._replace(h=bars.h + hbar, t=bars.t + abar, s=add(bars.s, sbar), slopes=slopes, ts=tsbar)
            return j, pending(j), bars

        moving = bars._replace(end=(), shared=[])  # the loop carries nothing that it leaves as it is
        j, _, moved = march.runner.until(lambda carry: ~jnp.any(carry[1]), one, (j, pending(j), moving))
        return j, moved._replace(end=bars.end, shared=bars.shared)


def at_start(ts: Array) -> Array:
    """Which save times are the initial time itself."""
    return ts == ts[:1]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def moving_at_start(count: int, ys: State, ts: Array, slope: State) -> State:
    """The states saved, of which those at the initial time itself, up to save time `count`, move with their time along the slope
    there: y0 + (t - t0) f. At t = t0 that is y0, so only derivatives see it.
    """
    return ys


@moving_at_start.defjvp
def _moving_at_start(count: int, primals: tuple, tangents: tuple) -> tuple:
    ys, ts, slope = primals
    dots, tdot, _ = tangents
    same = at_start(ts) & (jnp.arange(ts.shape[0]) <= count).reshape(-1, *[1] * (ts.ndim - 1))

    def moved(y: Array, dot: Array, k: Array) -> Array:
        gap = jnp.where(beside(same, y), beside(tdot - tdot[:1], y), 0).astype(real_dtype(k.dtype))
        return (dot.astype(work_dtype(y.dtype)) + gap * k[None].astype(work_dtype(y.dtype))).astype(y.dtype)

    return moving_at_start(count, ys, ts, slope), tuple(moved(*x) for x in zip(ys, dots, slope, strict=True))


def beside(flags: Array, table: Array) -> Array:
    """Flags by save time, of all rows or of each, shaped to broadcast against states by save time."""
    return flags if flags.ndim > 1 else flags.reshape(-1, *[1] * (table.ndim - 1))
