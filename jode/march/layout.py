"""To and from the layout of a batch: operands lead with the row axis, a march has rows where it wants them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jode.control import Grid, Stats
from jode.march.forwards import March
from jode.march.values import Cotangents, Kept, Outcome, Problem
from jode.rows import Rows
from jode.window import Params


def to_layout(march: March, problem: Problem) -> Problem:
    """The problem with rows where this march wants them; layers lead, whatever else does."""
    if march.rows.size is None:
        return problem
    rows, mapped = march.rows, march.mapped
    params = Params(
        *(
            [rows.to_layout(x, m, lead) for x, m in zip(leaves, flags, strict=True)]
            for leaves, flags, lead in zip(problem.params, mapped.params, (0, 1, 0, 1), strict=True)
        )
    )
    y0 = tuple(
        rows.to_layout(x if m else jnp.broadcast_to(x, (rows.size, *x.shape)), True)
        for x, m in zip(problem.y0, mapped.y0, strict=True)
    )
    numbers = numbers_to_layout(rows, problem.numbers, mapped.numbers)
    return Problem(rows.column(problem.ts, mapped.ts), y0, params, numbers)


def numbers_to_layout(rows: Rows, numbers: dict, mapped: dict) -> dict:
    """The solver's numbers with rows where they are wanted; a tuple is packed like the state, a number for each component."""
    return {
        k: tuple(map(rows.components, x, mapped[k])) if isinstance(x, tuple) else rows.column(x, mapped[k])
        for k, x in numbers.items()
    }


def from_layout(march: March, outcome: Outcome) -> Outcome:
    rows = march.rows
    ys = tuple(rows.from_layout(x, 1) for x in outcome.ys)
    stats = Stats(*(rows.flat(rows.spread(jnp.asarray(x, jnp.int32))) for x in outcome.stats))
    observed = jax.tree.map(lambda x: rows.from_layout(x, 1), outcome.observed)
    reached = rows.flat(rows.spread(outcome.reached))
    return Outcome(ys, observed, rows.flat(outcome.good), stats, rows.flat(outcome.status), reached)


def kept_from_layout(march: March, kept: Kept) -> Kept:
    """What was kept, each array led by the rows."""
    rows = march.rows
    if rows.size is None:
        return kept
    shared = lambda x: jnp.broadcast_to(x, (rows.size,))
    return _kept(march, kept, shared, rows.flat, rows.from_layout)


def kept_to_layout(march: March, kept: Kept) -> Kept:
    """The inverse of `kept_from_layout`."""
    rows = march.rows
    if rows.size is None:
        return kept
    shared = lambda x: jnp.max(x, initial=0)
    laid = _kept(march, kept, shared, rows.column, lambda x, lead: rows.to_layout(x, True, lead))
    return laid if march.solver.lands else _aligned(march, laid, rows.column(kept.grid.slots), rows.column(kept.grid.loops))


def _aligned(march: March, kept: Kept, slots: Array, loops: Array) -> Kept:
    """What was kept, of rows that did not march together: by a `cond` whose predicate differs by row each has what its own branch
    recorded, in so many slots, of a loop that ran so often. Behind its own last slot, and in chapters behind its own last, a row
    stands still where it ended.
    """
    rows, grid, n = march.rows, kept.grid, kept.grid.times.shape[0]
    if not n:
        return kept
    chapters = kept.chapters[2].t.shape[0]
    own = jnp.maximum(loops - 1, 0) // n if chapters else jnp.zeros_like(loops)
    apart = jnp.any(slots != grid.slots) | jnp.any(loops != grid.loops)

    def align(c: tuple) -> tuple:
        _, times, nodes, states, (s, slope, control) = c
        last, some = jnp.maximum(slots - 1, 0), slots > 0
        begun = rows.pick(control.t, own) if chapters else grid.start
        end = jnp.where(some, rows.pick(times, last), begun)
        behind = (own < jnp.max(own, initial=0))[None] | (_places(n, slots) >= slots[None])
        over = lambda x: (
            jnp.where(_places(x.shape[0], slots) >= slots[None], rows.pick_state(x, last)[None], x) if x.shape[0] else x
        )
        if nodes != ():
            table, first = nodes
            here = jnp.where(some, rows.pick(table, last), rows.pick(control.node, own) if chapters else first)
            nodes = jnp.where(behind, here[None], table), first
        if chapters:
            later = _places(control.t.shape[0], own) > own[None]
            rest = {name: jnp.zeros_like(getattr(control, name)) for name in ("wanted", "waits") if hasattr(control, name)}
            if march.resetting:
                rest["aim"] = jnp.full_like(control.aim, -1)
            if nodes != ():
                rest["node"] = jnp.where(later, here[None], control.node)
            stays = control._replace(
                h=jnp.zeros_like(control.h),
                t=jnp.broadcast_to(end[None], control.t.shape),
                accepted=jnp.broadcast_to(grid.accepted[None], control.accepted.shape),
                **rest,
            )
            control = jax.tree.map(lambda a, b: jnp.where(later, a, b), stays, control)
            s = tuple(jnp.where(later, y[None], x) for x, y in zip(s, kept.last, strict=True))
        return jnp.zeros_like(apart), jnp.where(behind, end[None], times), nodes, tuple(map(over, states)), (s, slope, control)

    # None or one turn: `cond` would copy the tables.
    tables = march.runner.until(lambda c: ~c[0], align, (apart, grid.times, grid.nodes, kept.states, kept.chapters))
    _, times, nodes, states, chapters = tables
    return kept._replace(grid=grid._replace(times=times, nodes=nodes), states=states, chapters=chapters)


def _places(n: int, like: Array) -> Array:
    """The places of a table of numbers by row."""
    return jnp.arange(n, dtype=like.dtype).reshape(-1, *[1] * like.ndim)


def _kept(march: March, kept: Kept, shared: Callable, columns: Callable, states: Callable) -> Kept:
    """The same functions of all that rows share, of their numbers and of their states."""
    grid, last, table, chapters, _, resets = kept
    if not march.solver.lands:
        times, start, accepted, arrived = map(columns, grid[1:5])
        nodes = jax.tree.map(columns, grid.nodes)
        grid = Grid(shared(grid.slots), times, start, accepted, arrived, shared(grid.loops), nodes)
    s, slope, control = chapters
    chapters = (*jax.tree.map(lambda x: states(x, 1), (s, slope)), jax.tree.map(columns, control))
    stacked = lambda table: jax.tree.map(lambda x: states(x, 1), table)
    return Kept(grid, jax.tree.map(lambda x: states(x, 0), last), stacked(table), chapters, (), stacked(resets))


def cotangents_from_layout(march: March, c: Cotangents) -> tuple:
    """Cotangents of (ts, y0, shared, layers), with a leading row axis for what differs by row."""
    rows, mapped = march.rows, march.mapped
    if rows.size is None:
        return c.ts, c.s, c.shared, c.layers
    y = tuple(rows.from_layout(x) if m else jnp.sum(x, rows.axis) for x, m in zip(c.s, mapped.y0, strict=True))
    shared = [rows.from_layout(x) if m else x for x, m in zip(c.shared, mapped.params.shared, strict=True)]
    layers = [rows.from_layout(x, 1) if m else x for x, m in zip(c.layers, mapped.params.layers, strict=True)]
    return rows.flat(c.ts) if mapped.ts else c.ts, y, shared, layers
