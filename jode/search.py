"""Finding a grid: the batch-native loop that chooses steps by their error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.batch import Rows
from jode.grid import Adaptive, Status
from jode.method import Method, Stage
from jode.tree import State, increment, magnitude, nan_unless, stack_full, store, where, widest, zeros_like

Field = Callable[[Array, State], State]


class Search(NamedTuple):
    """The carry of the adaptive loop. Numbers are columns; h is the next step. Rows that are done have h == 0."""

    t: Array
    h: Array
    s: State
    memo: Any
    errors: tuple[Array, ...]
    accepted: Array
    attempts: Array
    loops: Array
    saves: Any
    record: Any
    seen: Any


class Saves(NamedTuple):
    """Which save time comes next (a column) and the interpolated states so far, by save time."""

    next: Array
    dense: Array
    ys: State


class Record(NamedTuple):
    """The accepted steps, common to all rows: the time each ends at, and the state that every so many of them start from."""

    slots: Array
    times: Array
    states: Any


def depart(
    solver: Adaptive,
    F: Field,
    rows: Rows,
    ts: Array,
    s0: State,
    slope: State,
    tol: dict,
    keep: int | None = None,
    seen: Any = None,
) -> Search:
    """The carry at ts[0], where the vector field F(t, y) has the value `slope`.

    With `keep` the accepted times are recorded, and the states that steps 0, keep, 2 keep … start from where it is not 0.
    """
    method = solver.method
    t0, t1, y0 = rows.spread(ts[0]), ts[-1], method.read(s0)
    norm = partial(_norm, rows, tol)
    sign = _sign(ts)
    width = _first_step(method, F, norm, t0, sign, jnp.abs(t1 - t0), y0, slope, tol.get("first_step"))
    width = jnp.maximum(width, 2 * _resolution(t0))  # a state at rest says nothing about the scale of time
    zero = jnp.zeros(t0.shape, jnp.int32)
    saves = None
    if ts.shape[0] > 2:
        same = ts[1:-1] == ts[:1]
        spread = lambda x: same if same.ndim > 1 else same.reshape(-1, *[1] * x.ndim)
        ys = tuple(jnp.where(spread(x), x[None], jnp.zeros_like(x)[None]) for x in y0)
        saves = Saves(1 + rows.spread(jnp.sum(same, axis=0)).astype(jnp.int32), zero, ys)
    record = None
    if keep is not None:
        # Entries never written are never read. Filled with the width, the tables are made after it: more than eight kernels
        # that could run at once make XLA's CPU runtime call in other threads, which costs more than a small solve.
        states = stack_full(-(-solver.max_steps // keep), s0, width) if keep else None
        record = Record(jnp.zeros((), jnp.int32), stack_full(solver.max_steps, t0, width), states)
    memory = (jnp.ones_like(t0),) * (2 if solver.dcoeff else 1 if solver.pcoeff else 0)
    loops = jnp.zeros((), jnp.int32)
    return Search(t0, _reach(t1, t0, sign * width), s0, method.memo(slope), memory, zero, zero, loops, saves, record, seen)


def travel(
    solver: Adaptive,
    inside: Callable,
    rows: Rows,
    ts: Array,
    tol: dict,
    start: Search,
    keep: int | None = None,
    watch: Callable | None = None,
    few: int = 0,
) -> Search:
    """March on to ts[-1] with step control, all rows in one loop, until no more than `few` rows want another step.

    Rows that are done take steps of no width. inside(t, h) is what a method sees of the vector field during a step.
    """
    method = solver.method
    t1, interior = ts[-1], ts.shape[0] > 2
    norm = partial(_norm, rows, tol)

    def running(c: Search) -> Array:
        wanted = jnp.sum(c.h != 0, dtype=jnp.int32) > few if few else jnp.max(jnp.abs(c.h), initial=0) > 0
        return (c.loops < solver.max_steps) & wanted

    def attempt(c: Search) -> Search:
        h, active = c.h, c.h != 0
        t_new = jnp.where(h == t1 - c.t, t1, c.t + h)
        G = inside(c.t, h)
        s_new, K, memo = method.trial(G, h, c.s, c.memo)
        e = jax.lax.stop_gradient(_error(method, norm, h, c.s, s_new, K))
        accept = active & (e <= 1)
        t = jnp.where(accept, t_new, c.t)
        saved = _save(method, G, rows, ts, c, t, K) if interior else None
        kept = c.record
        if keep is not None:
            states = store(kept.states, kept.slots, keep, c.s) if keep else None
            kept = Record(kept.slots + jnp.any(accept).astype(jnp.int32), kept.times.at[kept.slots].set(t), states)
        memory = (jnp.maximum(e, 1e-4).astype(h.dtype), *c.errors)
        return Search(
            t,
            _reach(t1, t, h * _factor(solver, e, c.errors).astype(h.dtype)),
            where(accept, s_new, c.s),
            where(accept, memo, c.memo),
            tuple(jnp.where(accept, a, b) for a, b in zip(memory, c.errors, strict=False)),
            c.accepted + accept.astype(jnp.int32),
            c.attempts + active.astype(jnp.int32),
            c.loops + 1,
            saved,
            kept,
            watch(c.seen, c.t, h, c.s, K, accept) if watch else None,
        )

    return jax.lax.while_loop(running, attempt, start)


def ending(method: Method, rows: Rows, ts: Array, slope: State, s: Search) -> tuple[Array, Array]:
    """Whether each row that a search has left arrived at the end, and its status; `slope` is the one at the start."""
    arrived = s.t == ts[-1]
    unmoved = (s.accepted == 0) & ~rows.finite(slope)
    stuck = jnp.where(unmoved, int(Status.nonfinite_dynamics), int(Status.step_underflow))
    status = jnp.where(arrived, int(Status.success), jnp.where(s.h == 0, stuck, int(Status.max_steps)))
    return arrived, jnp.where(rows.finite(method.read(s.s)), status, int(Status.nonfinite_state)).astype(jnp.int32)


def reached(saves: Saves) -> State:
    """The states at interior save times, NaN at those that the search did not come to."""
    count = jax.tree.leaves(saves.ys)[0].shape[0] if saves.ys else 0
    index = jnp.arange(1, count + 1, dtype=jnp.int32)
    come = jax.vmap(lambda i: i < saves.next)(index)
    return tuple(nan_unless(come.reshape(-1, *[1] * (y.ndim - 1)) if come.ndim == 1 else come, y) for y in saves.ys)


def _reach(t1: Array, t: Array, h: Array) -> Array:
    """The next step from t: cut at t1, and 0 where it is too small to move t or not a number.

    It ends in a representable time, and the choice of that time is not differentiated.
    """
    left, h = t1 - t, jax.lax.stop_gradient(h)
    last = jnp.abs(h) >= jnp.abs(left)
    moves = jnp.abs(h) > _resolution(t)
    return jnp.where(last, left, jnp.where(moves, jax.lax.stop_gradient(t + h) - t, 0))


def _resolution(t: Array) -> Array:
    """Steps must be wider than this: ten times the rounding of t."""
    return 10 * jnp.finfo(t.dtype).eps * jnp.abs(t)


def _sign(ts: Array) -> Array:
    """The direction of time."""
    return jnp.where(ts[-1] >= ts[0], 1, -1).astype(ts.dtype)


def _norm(rows: Rows, tol: dict, estimate: State, a: State, b: State) -> Array:
    """The root mean square over each row of e / (atol + rtol max(|a|, |b|)), as a column."""
    total, count = rows.spread(jnp.zeros((), widest(*(x.dtype for x in a), default=jnp.float32))), 0
    for e, x, z in zip(estimate, a, b, strict=True):
        size = jnp.maximum(magnitude(x), magnitude(z))
        scale = jnp.maximum(tol["atol"].astype(size.dtype) + tol["rtol"].astype(size.dtype) * size, jnp.finfo(size.dtype).tiny)
        ratio = magnitude(e) / scale
        total = total + rows.sum(ratio * ratio).astype(total.dtype)
        count += x.size // (rows.size or 1)
    return jnp.sqrt(total / max(1, count))


def _guard(estimate: State, s: State, slope: State) -> State:
    """The estimate, made NaN where a state or a slope is not finite, whether or not the estimate noticed."""
    parts = [s[i : i + len(slope)] for i in range(0, len(s), len(slope) or 1)]
    return tuple(e + (0 * reduce(jnp.add, xs)).astype(e.dtype) for e, *xs in zip(estimate, slope, *parts, strict=True))


def _error(method: Method, norm: Callable, h: Array, s: State, s1: State, K: list[State]) -> Array:
    """The scaled error of a step from s to s1 with slopes K, NaN if the step left the domain."""
    estimates = [norm(_guard(e, s1, K[-1]), method.read(s), method.read(s1)) for e in method.errors(h, K, s, s1)]
    if len(estimates) == 1:
        return estimates[0]
    fifth, third = estimates  # Hairer, Norsett & Wanner I, section II.10
    return fifth * fifth / jnp.sqrt(jnp.maximum(fifth * fifth + 0.01 * third * third, jnp.finfo(fifth.dtype).tiny))


def _factor(solver: Adaptive, e: Array, memory: tuple[Array, ...]) -> Array:
    """What the next step is multiplied by; a trial that left the domain (NaN) shrinks as far as allowed."""
    order = 1 + (solver.method.embedded_order or 0)
    p, i, d = solver.pcoeff / order, solver.icoeff / order, solver.dcoeff / order
    factor = -(i + p + d) * jnp.log(jnp.maximum(e, jnp.finfo(e.dtype).tiny))
    for power, old in zip((p + 2 * d, -d), memory, strict=False):
        factor = factor + power * jnp.log(old.astype(e.dtype))
    factor = solver.safety * jnp.exp(factor)
    factor = jnp.minimum(factor, jnp.where(e <= 1, solver.factor_max, 1.0))
    return jnp.where(factor > solver.factor_min, factor, solver.factor_min)


def _first_step(
    method: Method, F: Field, norm: Callable, t0: Array, sign: Array, span: Array, y0: State, slope: State, given: Any
) -> Array:
    """The width of the first step, NaN where the state or its slope is not finite.

    Unless given it is that of Hairer, Norsett & Wanner I, section II.4: one whose Euler guess and second derivative look harmless.
    """
    if given is not None:
        return jnp.abs(given).astype(t0.dtype) + norm(_guard(zeros_like(y0), y0, slope), y0, y0).astype(t0.dtype)
    d0, d1 = norm(y0, y0, y0), norm(_guard(slope, y0, slope), y0, y0)
    guess = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / jnp.where(d1 == 0, 1, d1))
    floor = float(jnp.finfo(t0.dtype).tiny) ** 0.5  # slopes so large that their norm overflows still get a first step
    guess = jnp.minimum(jnp.maximum(guess.astype(t0.dtype), floor), span)
    ahead = F(t0 + sign * guess, increment(y0, sign * guess, (1.0,), [slope]))
    bend = tuple(a - b for a, b in zip(ahead, slope, strict=True))
    d2 = norm(bend, y0, y0) / jnp.where(guess == 0, 1, guess).astype(d1.dtype)
    worst = jnp.maximum(d1, d2)
    power = 1 / ((method.embedded_order or 0) + 1)
    bold = jnp.exp(power * jnp.log(0.01 / jnp.where(worst <= 1e-15, 1, worst)))
    bold = jnp.where(worst <= 1e-15, jnp.maximum(1e-6, 1e-3 * guess.astype(worst.dtype)), bold)
    bold = jnp.where(jnp.isfinite(bold), bold, guess.astype(bold.dtype)).astype(t0.dtype)
    return nan_unless(~jnp.isnan(d1), jnp.maximum(jnp.minimum(100 * guess, bold), floor))


def _save(method: Method, G: Stage, rows: Rows, ts: Array, c: Search, t: Array, K: list[State]) -> Saves:
    """Interpolate at every interior save time that the accepted steps, from c.t to t, have passed."""
    inner, sign, h = ts.shape[0] - 1, _sign(ts), c.h

    def pending(j: Array) -> Array:
        return (j < inner) & (sign * (rows.pick(ts, j) - t) <= 0)

    due = pending(c.saves.next)

    def one(carry: tuple) -> tuple:
        j, ys = carry
        mask = pending(j) | (rows.size is None)  # one trajectory is here only while it is pending
        theta = (rows.pick(ts, j) - c.t) / jnp.where(h == 0, 1, h)
        values = increment(method.base(theta, c.s), h, method.dense_weights(theta), slopes)
        index = jnp.where(mask, j - 1, inner)
        ys = tuple(rows.write(table, index, v) for table, v in zip(ys, values, strict=True))
        return j + mask.astype(jnp.int32), ys

    slopes = K
    if method.extra:
        more = jax.lax.cond(
            jnp.any(due),
            lambda: tuple(method.refine(G, h, c.s, K)[len(K) :]),
            lambda: (jax.tree.map(jnp.zeros_like, K[0]),) * method.extra,
        )
        slopes = [*K, *more]
    j, ys = jax.lax.while_loop(lambda carry: jnp.any(pending(carry[0])), one, (c.saves.next, c.saves.ys))
    return Saves(j, c.saves.dense + due.astype(jnp.int32), ys)
