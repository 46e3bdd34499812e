"""To and from the layout of a batch: operands lead with the row axis, a march has rows where it wants them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

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
    return _kept(march, kept, shared, rows.column, lambda x, lead: rows.to_layout(x, True, lead))


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
