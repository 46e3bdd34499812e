"""Events that reset the state: the step before such an event ends at its crossing, found by taking the step again, narrower.

A row whose step holds a crossing does not take it: it aims at the crossing, with a step as wide as the interpolant says, and again
with Newton's corrections until g is zero to rounding at the end. That step is taken. There the row waits, is reset, and goes on. A
row that does not find the crossing so has failed: nothing is known of it behind.

The time τ of such an end is given by g(τ, Φ(t, τ - t, s)) = 0, Φ the step from (t, s). It moves by

    dτ = -(g_t dt + g_y dy + g_args dargs) / (g_t + g_y Φ_h),

d all but τ. So a cotangent τ̄ of τ is one of s, t and the parameters: that of λ g(τ, Φ), where τ is at rest, with
λ = -τ̄ / (g_t + g_y Φ_h).
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import direction
from jode.observe import Seen
from jode.observe.base import rounding
from jode.observe.event import zero_of
from jode.observe.record import node_of
from jode.tree import State, where
from jode.window import Problem, Window

TRIES = 8  # of a step that aims at a crossing
ORDERS = 3  # of derivatives of its time


def code_of(aim: Array, together: Array, n: int) -> Array:
    """The node, a number below -1, of a crossing: which of n events its time is that of, and which happen there, as bits."""
    return -2 - (aim + n * together)


def decoded(code: Array, n: int) -> tuple[Array, Array]:
    """The inverse: (event, bits), -1 and 0 for other nodes."""
    found = code <= -2
    value = jnp.where(found, -2 - code, 0)
    return jnp.where(found, value % n, -1), jnp.where(found, value // n, 0)


def happens(code: Array, k: int, n: int) -> Array:
    """Whether event k of n happens at a node."""
    return (decoded(code, n)[1] >> k) & 1 == 1


def reset_at(march: Any, problem: Problem, code: Array, t: Array, s: State) -> State:
    """The method's state after the resets of a node at t, from that before it. At the end, to rounding, there is none."""
    n, method, y = len(march.resetting), march.method, march.method.read(s)
    ts = march.save_times(problem)
    before = jnp.abs(t - ts[-1]) > rounding(method, ts)
    for k, _ in enumerate(march.resetting):
        y = where(happens(code, k, n) & before, march.resets[k](t, y, problem.params), y)
    return where((code <= -2) & before, method.start(y, lambda: march.F(t, y, problem.params)), s)


def aims(loop: Any, c: Any, window: Window, step: Any, accept: Array, control: Any) -> tuple[Array, Any]:
    """Which rows take the step after all, and the control's carry: `control` for those, with what waits for a reset."""
    march, problem, old = loop.march, loop.problem, c.control
    t, h, aimed = old.t, old.h, old.aim >= 0
    seen = Seen(window, c.s, step.slopes, accept, control.t, None, node_of(control), step.state)
    taken = accept & (h != 0)
    first, event, side, at_end = jnp.full_like(h, 2), jnp.full_like(old.aim, -1), old.side, []
    for k, w in enumerate(march.resetting):
        carry = c.observed[loop.watches.index(w)]
        there, theta, came, end = w.looks_ahead(march, problem, carry, seen, taken & ~aimed)
        there = there & (theta < first)
        first, event, side = (jnp.where(there, x, y) for x, y in ((theta, first), (k, event), (came, side)))
        at_end.append(end)
    found = event >= 0
    pick = lambda xs: reduce(lambda a, kx: jnp.where(old.aim == kx[0], kx[1], a), enumerate(xs), jnp.zeros_like(xs[0]))
    g, rate, near = (pick([x[i] for x in at_end]) for i in range(3))
    gap = jnp.where(rate == 0, 0, -g / jnp.where(rate == 0, 1, rate)) * h
    ulp = jnp.finfo(t.dtype).eps * jnp.maximum(jnp.abs(t), jnp.abs(h))
    comes = taken & aimed & (old.side.astype(rate.dtype) * rate < 0)
    arrives = comes & ((jnp.abs(gap) <= 4 * ulp) | (near & (old.tries >= TRIES // 2)))
    veto = found | (taken & aimed & ~arrives)
    lost = veto & aimed & (old.tries >= TRIES)
    bits = [jnp.where((old.aim == k) | x[3], 1 << k, 0) for k, x in enumerate(at_end)]
    code = code_of(old.aim, reduce(jnp.add, bits), len(march.resetting)).astype(jnp.int32)
    room = jnp.where(found, h, old.room)
    least = direction(march.save_times(problem)) * 4 * jnp.maximum(jnp.finfo(t.dtype).eps * jnp.abs(t), jnp.finfo(t.dtype).tiny)
    width = jnp.where(found, first * h, h + gap)
    width = jnp.clip(width, jnp.minimum(least, room), jnp.maximum(least, room))
    width = jax.lax.stop_gradient((t + width) - t)
    held = old._replace(
        h=jnp.where(lost, 0, width),
        wanted=old.wanted & ~lost,
        aim=jnp.where(lost, -1, jnp.where(found, event, old.aim)),
        tries=jnp.where(found, 0, old.tries + 1),
        room=room,
        side=side,
        tried=control.tried,
        loops=control.loops,
        loose=control.loose,
    )
    on = control._replace(
        aim=jnp.where(arrives, old.aim, -1),
        node=jnp.where(arrives, code, control.node),
        waits=control.waits | arrives,
        wanted=control.wanted | arrives,
    )
    columns = lambda x: x._replace(loops=(), loose=(), before=())
    merged = jax.tree.map(partial(jnp.where, veto), columns(held), columns(on))
    return accept & ~veto, merged._replace(loops=on.loops, loose=on.loose, before=on.before)


def moving(march: Any, problem: Problem, c: Any) -> Any:
    """The control's carry with widths that move so that g stays zero at the end of steps that aim at a crossing. The width itself
    stays: only derivatives see it.
    """
    p = c.control
    aimed, h = (p.aim >= 0) & (p.h != 0), p.h

    def end(h: Array) -> Array:
        window = march.solver.window(march, problem, None, p._replace(h=h))
        return _value(march, problem, p.aim, p.t + h, march.method.read(march.method.step(window, c.s, c.slope).state))

    start = _value(march, problem, p.aim, p.t, march.method.read(c.s))
    for _ in range(ORDERS):
        g, rate = jax.jvp(end, (h,), (jnp.ones_like(h),))
        h = h + jnp.where(aimed, zero_of(g, jnp.where(aimed, steep(rate, start, h), 1)), 0)
    return p._replace(h=h)


def steep(rate: Array, start: Array, h: Array) -> Array:
    """The derivative of g by time at the end of a step, NaN where, given g at its start, it is rounding: g only touches zero."""
    flat = 8 * jnp.finfo(rate.dtype).eps ** 0.5 * jnp.abs(jax.lax.stop_gradient(start))
    return jnp.where(jnp.abs(rate * h) > flat, rate, jnp.nan)


def _value(march: Any, problem: Problem, event: Array, t: Array, y: State) -> Array:
    """g of the event of each row, a column; that of the first where it has none."""
    values = [w.value(march, t, y, problem.params) for w in march.resetting]
    return reduce(lambda a, kx: jnp.where(event == kx[0], kx[1], a), enumerate(values), values[0])


def pull_time(
    march: Any, problem: Problem, code: Array, window: Window, s: State, s1: State, bars: Any, sbar: State, tau: Array
) -> tuple[State, list]:
    """Cotangents of the step's end and of shared parameters with those of λ g added, given τ̄ of its time.

    bars: cotangents of what observers saw of the step, sbar: of the state at its end.
    """
    method, dense = march.method, march.needs_slopes
    event, _ = decoded(code, len(march.resetting))
    found = event >= 0

    def over(h: Array) -> tuple:
        inside = window.at((window.t, h, window.params.shared, window.params.layers))
        return method.whole(inside, s) if dense else (method.step(inside, s).state, [])

    _, (by_h, K_h) = jax.jvp(over, (window.h,), (jnp.ones_like(window.h),))
    total = march.rows.spread(jnp.zeros((), window.h.dtype))
    pairs = [*zip(by_h, sbar, strict=True)]
    if dense:
        pairs += [(jnp.stack(ks), bar) for ks, bar in zip(zip(*K_h, strict=True), bars.slopes, strict=True)]
    for x, bar in pairs:
        size = x * bar
        size = jnp.sum(size, 0) if x.ndim > by_h[0].ndim else size
        total = total + jnp.real(march.rows.sum(size)).astype(total.dtype)

    def value(t: Array, y: State, shared: list) -> Array:
        return _value(march, problem._replace(params=problem.params._replace(shared=shared)), event, t, y)

    y1 = method.read(s1)
    _, back = jax.vjp(value, window.t + window.h, y1, problem.params.shared)
    start = value(window.t, method.read(s), problem.params.shared)
    _, rate = jax.jvp(
        lambda t, y: value(t, y, problem.params.shared), (window.t + window.h, y1), (jnp.ones_like(tau), method.read(by_h))
    )
    weight = jnp.where(found, -(tau + bars.h + total) / jnp.where(found, steep(rate, start, window.h), 1), 0)
    _, ybar, shared = back(weight)
    return ybar, shared
