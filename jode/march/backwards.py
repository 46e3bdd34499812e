"""The transpose of the loop: cotangents go back over the grid, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.control import Grid
from jode.control.adaptive import direction
from jode.control.stops import nodes_of
from jode.march import resets
from jode.march.forwards import Loop, March
from jode.march.values import Carry, Cotangents, Given, Kept, Problem, inner
from jode.observe import Bars, Record, Recorded, Seen
from jode.observe.saves import at_start, beside
from jode.tree import State, add, take, where, zeros_like
from jode.window import Params


def failed_at_start(march: March, grid: Grid, good: Array, failed: Array) -> Array:
    """Rows whose later states are never looked at: they failed before their first step, or before their first save time."""
    if march.solver.lands:
        return failed & ~good[1] if march.may_end else ~good[1]
    return failed & (grid.accepted == 0)


def pull(
    march: March, problem: Problem, good: Array, grid: Grid, g: Given, i: Array, s: State, c: Cotangents, start: State
) -> Cotangents:
    """Cotangents before step i from those after it, s being the state at its start; rows that failed take that of the march."""
    solver, ts = march.solver, problem.ts
    (p, q), span = solver.ends(march, problem, grid, i, c.left)
    (t, h), span_back = jax.vjp(span, _time(march, ts, p), _time(march, ts, q))
    window = solver.limited(march, problem, grid, i, march.window(problem, t, h, i if solver.lands else None))
    sbar, left, slopes_bar = c.s, c.left, None
    s = _sound(march, problem, grid, good[q] if solver.lands else good[0], g, t, s, start)
    if solver.lands and not solver.marked and window.still is not None:
        s = where(window.still, start, s)  # rows of another batch, which had fewer slots, have no state there
    K, pull = march.method.pullback(window, s, march.needs_slopes, march.rolled)
    s1 = march.method.step(window, s).state if solver.marked or march.plan.watches else ()
    node: Any = ()
    if solver.marked:
        node = solver.node(march, problem, grid, i)
        c = _pull_reset(march, problem, node, march.still(window, s, s1), c)
        c = _pull_found(march, problem, node, t + h, s1, c) if march.resetting else c
        sbar = c.s
    if solver.lands and march.plan.saves > 2:
        bound = solver.bound(march, problem)
        landed = (i % bound == bound - 1) & (q < march.plan.saves - 1)
        sbar = where(landed, _saved(march, sbar, take(g.ys, q)), sbar)
    nothing = jnp.zeros_like(h), jnp.zeros_like(t), zeros_like(s), zeros_like(K) if K is not None else ()
    bars = Bars(*nothing, c.ts, zeros_like(s1), c.shared)
    seen, nexts = Seen(window, s, [], None, None, i, node, s1), []
    for w, left_to, bar, values in zip(
        march.watches, c.next, _by_watch(march, g.ys, g.observed), _by_watch(march, (), g.values), strict=True
    ):
        next_, bars = w.pull(march, problem, left_to, seen, K, bar, values, bars)
        nexts.append(next_)
    if march.watches:
        slopes_bar = bars.slopes if K is not None else None
        sbar = add(sbar, bars.end) if march.plan.watches else sbar
    if march.resetting:
        ybar, more = resets.pull_time(march, problem, node, window, s, s1, bars, sbar, c.found)
        sbar, bars = _saved(march, sbar, ybar), bars._replace(shared=add(bars.shared, more))
    size = march.plan.degree + 1
    before = [jax.lax.dynamic_slice_in_dim(x, i, size, 0) for x in c.layers]
    # Rows that stand still take no step: of methods that carry slopes even one of no width depends on time and parameters.
    stepped = march.still(window, zeros_like(sbar), sbar)
    sbar_step, (tbar, hbar, shared, after) = pull(stepped, slopes_bar, (jnp.zeros_like(t), jnp.zeros_like(h), bars.shared, before))
    sbar = march.still(window, sbar, sbar_step)
    if march.watches:
        sbar, tbar, hbar = add(bars.s, sbar), tbar + bars.t, hbar + bars.h
    if not solver.lands:
        left = left - (h != 0).astype(jnp.int32)
    abar, bbar = span_back((tbar, hbar))
    found = where_found(march, problem, grid, i, window, c.found, tbar - hbar) if march.resetting else ()
    layers = [jax.lax.dynamic_update_slice_in_dim(x, u, i, 0) for x, u in zip(c.layers, after, strict=True)]
    tsbar = _add_time(march, _add_time(march, bars.ts, p, abar), q, bbar)
    return Cotangents(sbar, tsbar, shared, layers, left, tuple(nexts), found)


def where_found(march: March, problem: Problem, grid: Grid, i: Array, window: Any, tau: Array, abar: Array) -> Array:
    """The cotangent of the time that rows stand at before step i, if it was found at an event that resets, from that after it."""
    before, after = nodes_of(grid, i)
    moved = (window.h != 0) | (before != after)
    return jnp.where(moved, jnp.where(before <= -2, abar, 0), tau)


def _by_watch(march: March, saved: Any, observed: tuple) -> tuple:
    """What each observer of the march asks for: that of save times comes first."""
    return (*(saved for _ in march.saves), *observed)


def _sound(march: March, problem: Problem, grid: Grid, good: Any, g: Given, t: Array, s: State, start: State) -> State:
    """The state that a step from t starts from; rows that failed, or ended before it, take the first one.

    good: rows whose first saved state is finite and, where steps end at save times, whose next one is.
    """
    if march.solver.lands:
        end = march.end(problem, g.values)
        if end is not None:
            good = good | (direction(march.save_times(problem)) * (end - t) > 0)
        return where(good, s, start)
    return where((grid.accepted > 0) & good, s, start) if march.rows.size is not None else s


def _time(march: March, ts: Array, j: Any) -> Array:
    """ts[j], where j is a number or a column."""
    return march.rows.pick(ts, j) if jnp.ndim(j) else take(ts, j)


def _add_time(march: March, ts: Array, j: Any, bar: Array) -> Array:
    """The transpose of `_time`."""
    return march.rows.add_at(ts, j, bar) if jnp.ndim(j) else ts.at[j].add(bar)


def _pull_reset(march: March, problem: Problem, j: Array, s1: State, c: Cotangents) -> Cotangents:
    """Cotangents before what happens at ts[j], from those after it, s1 being the state before it."""
    rows, ts, params = march.rows, problem.ts, problem.params
    if march.jump is None and march.method.parts == 1:
        return c
    at, mark = jnp.maximum(j, 0), march.mark(problem, j)

    def reset(t: Array, s: State, shared: list) -> State:
        return march.reset_by(problem._replace(params=params._replace(shared=shared)), mark, t, s)

    _, back = jax.vjp(reset, rows.spread(rows.pick(ts, at)), s1, params.shared)
    tbar, sbar, shared = back(c.s)
    return c._replace(s=sbar, ts=rows.add_at(c.ts, at, jnp.where(j >= 0, tbar, 0)), shared=add(c.shared, shared))


def _pull_found(march: March, problem: Problem, node: Array, t: Array, s1: State, c: Cotangents) -> Cotangents:
    """Cotangents before the resets of events at t, from those after them, s1 being the state before them."""
    params = problem.params

    def reset(t: Array, s: State, shared: list) -> State:
        return march.reset_found(problem._replace(params=params._replace(shared=shared)), node, t, s)

    _, back = jax.vjp(reset, t, s1, params.shared)
    tbar, sbar, shared = back(c.s)
    return c._replace(s=sbar, found=c.found + jnp.where(node <= -2, tbar, 0), shared=add(c.shared, shared))


def _saved(march: March, sbar: State, g: State) -> State:
    """The cotangent of the method's state with that of a saved state added."""
    return (*add(march.method.read(sbar), g), *sbar[len(g) :])


def terminal(march: March, problem: Problem, good: Array, grid: Grid, g: Given) -> Cotangents:
    """The terminal cotangents: those after the last step, before any is pulled back."""
    nothing = zeros_like(tuple(x[0] for x in g.ys)) * (march.method.parts - 1)
    last = (jnp.sum(good[:-1], axis=0).astype(jnp.int32) - 1,) if march.saves else ()
    next_ = (*last, *(w.left(march, problem, x) for w, x in zip(march.plan.watches, g.values, strict=True)))
    params = problem.params
    s = (*(x[-1] for x in g.ys), *nothing)
    shared, layers = zeros_like(params.shared), zeros_like(params.layers)
    found = march.rows.spread(jnp.zeros((), problem.ts.dtype)) if march.resetting else ()
    return Cotangents(s, jnp.zeros_like(problem.ts), shared, layers, grid.accepted, next_, found)


def at_initial(march: March, problem: Problem, g: State, c: Cotangents) -> Cotangents:
    """Cotangents of the problem from those at the first step, and from states saved at the initial time itself, which are y0.

    If such a save time moved on, the state saved would move along the slope there.
    """
    ts, rows, params = march.save_times(problem), march.rows, problem.params
    if march.solver.lands or not g:
        ybar = tuple(x[0] for x in g)
    else:
        there = tuple(jnp.where(beside(at_start(ts), x), x, 0).astype(x.dtype) for x in g)
        slope = march.slope(problem)
        moved = jax.vmap(lambda x: rows.total(inner(rows, slope, x).astype(ts.dtype), ts[0]))(tuple(x[1:] for x in there))
        moved = moved.at[-1].set(0) if march.solver.marked else moved  # a step, if one without width, ended at the last of them
        c = c._replace(ts=c.ts.at[1 : ts.shape[0]].add(moved).at[0].add(-jnp.sum(moved, axis=0)))
        ybar = tuple(jnp.sum(x[:-1], axis=0) for x in there)

    def begin(t0: Array, y0: State, shared: list, layers: list) -> State:
        return march.initial(Problem(problem.ts.at[0].set(t0), y0, params._replace(shared=shared, layers=layers), problem.numbers))

    _, back = jax.vjp(begin, ts[0], problem.y0, params.shared, params.layers)
    tbar, sbar, shared, layers = back(c.s)
    c = c._replace(s=add(sbar, ybar), ts=c.ts.at[0].add(tbar), shared=add(c.shared, shared))
    return c._replace(layers=add(c.layers, layers)) if march.method.starts else c


def replace_failed(march: March, problem: Problem, failed: Array) -> Problem:
    """Give rows that failed at their first step the data of a row that did not.

    Their cotangents are zero, but zero times the NaN of their own derivatives would reach parameters shared with
    other rows.
    """
    if not march.rows.size:
        return problem
    column, axis = march.rows.flat(failed), 0 if march.rows.axis == 0 else -1
    other = jnp.argmin(column)

    def replaced(x: Array, m: bool, lead: int = 0) -> Array:
        if not m:
            return x
        at = lead if axis == 0 else -1
        mask = column.reshape([-1 if i == at % x.ndim else 1 for i in range(x.ndim)])
        return jnp.where(mask, jnp.take(x, other[None], axis=at), x)

    params = [
        [replaced(x, m, lead) for x, m in zip(leaves, flags, strict=True)]
        for leaves, flags, lead in zip(problem.params, march.mapped.params, (0, 1, 0, 1), strict=True)
    ]
    return problem._replace(y0=tuple(replaced(x, True) for x in problem.y0), params=Params(*params))


def chapter(march: March, problem: Problem, kept: Kept, by: Record, tables: Recorded, k: Array) -> tuple[Kept, Array]:
    """What was kept of chapter k, and how many steps its rows had accepted at its end.

    That of the last chapter is in the tables; another is found again from where it starts, in their place.
    """
    (s, slope, control), (_, _, next_) = take(kept.chapters, k), take(kept.chapters, k + 1)
    end, last = (k + 1) * by.slots, k == (kept.grid.loops - 1) // by.slots
    tables = tables._replace(slots=jnp.where(last, tables.slots, 0))
    ends = tuple(w for w in march.plan.watches if w.ends or w.resets)  # rows end, and are reset, where they were
    loop = Loop(march, problem, (replace(by, chapters=0), *ends))
    c = Carry(s, slope, march.solver.continued(march, problem, control, jnp.where(last, end, k * by.slots)), ())
    c = c._replace(observed=(tables, *(w.init(march, problem, c) for w in ends)))

    def step(c: Carry) -> Carry:
        c = loop.attempt(None, march.solver.serve(march, problem, c))
        return c._replace(control=march.solver.narrowest(march, problem, c.control))

    c = march.runner.until(lambda c: c.control.loops >= end, step, c)
    found, at = c.observed[0], c.control
    accepted = jnp.where(last | (next_.h != 0), kept.grid.accepted, at.accepted)
    # Rounded otherwise, the last steps land where the next chapter starts.
    land = lambda c: (jnp.ones_like(c[0]), jnp.where(c[1] == at.t[None], next_.t[None], c[1]))
    _, times = march.runner.until(lambda c: c[0], land, (last, found.times))  # none or one turn: `cond` would copy the table
    nodes = (found.nodes, control.node) if march.solver.marked else ()
    grid = Grid(found.slots, times, control.t, accepted, kept.grid.arrived, kept.grid.loops, nodes)
    return Kept(grid, c.s, found.states, kept.chapters, s), jnp.where(last, kept.grid.accepted, at.accepted)


def reverse(
    march: March, problem: Problem, good: Array, kept: Kept, g: Given, by: Any, recovery: Callable
) -> tuple[Cotangents, State]:
    """Pull the cotangents g of the saved states back over the grid; recovery(kept) -> (store, recover), and recover(i, store) ->
    (the state that step i starts from, store), asked for the last step first.

    by: the `Record` of a grid recorded by chapters, else None. Returns the cotangents of the problem and the last state recovered,
    that at the start.
    """
    start = march.initial(problem)

    def back(kept: Kept, c: Cotangents) -> tuple[State, Cotangents]:
        grid, (store, recover), n = kept.grid, recovery(kept), march.slots(problem, kept.grid)

        def body(k: Array, carry: tuple) -> tuple:
            store, _, c = carry
            i = n - 1 - k
            s, store = recover(i, store)
            return (store, s, pull(march, problem, good, grid, g, i, s, c, start)), None

        return march.runner.repeat(n, body, (store, start, c))[0][1:]

    def one(k: Array, carry: tuple) -> tuple:
        tables, _, c = carry
        part, left = chapter(march, problem, kept, by, tables, chapters - 1 - k)
        first, c = back(part, c._replace(left=left))
        return (Recorded(part.grid.slots, part.grid.times, part.states, (), part.grid.nodes and part.grid.nodes[0]), first, c), None

    c = terminal(march, problem, good, kept.grid, g)
    if by is None:
        first, c = back(kept, c)
    else:
        chapters = (kept.grid.loops + by.slots - 1) // by.slots
        tables = Recorded(
            kept.grid.slots, kept.grid.times, kept.states if by.keep else (), (), kept.grid.nodes and kept.grid.nodes[0]
        )
        (_, first, c), _ = march.runner.repeat(chapters, one, (tables, start, c))
    return at_initial(march, problem, g.ys, c), first
