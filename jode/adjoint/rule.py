"""What every derivative rule of a march shares: its three forms, and how failures are kept where they happened."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.control import Status
from jode.march import (
    Cotangents,
    Given,
    March,
    Outcome,
    Plan,
    Problem,
    cotangents_from_layout,
    from_layout,
    moving_of,
    problem_of,
    replace_failed,
    to_layout,
)
from jode.native import Batch, Rule, native
from jode.tree import State, magnitude, nan_unless, widest


class Adjoint:
    """A derivative rule for a march: what the way back needs, and the way back. Both get the march as a value.

    Forward derivatives are the march's own, whatever the adjoint: exact, of the numbers computed.
    """

    follows_resets = False  # whether its gradient is also that of what resets the state at events
    sees_steps = True  # whether its gradient is that of the steps taken, and so of what observers keep of them

    def refusal(self, solver: Any) -> str | None:
        """Why this adjoint cannot serve this solver, if it cannot."""
        return None

    def record(self, march: March, problem: Problem, sized: int) -> tuple[Outcome, Any]:
        """The outcome, and what the way back needs, each array led by the rows of a batch. What is kept of a row has shapes that
        depend on `sized` alone: of how many rows there are when it is first asked for.
        """
        raise NotImplementedError

    def pull(self, march: March, problem: Problem, outcome: Outcome, kept: Any, bars: tuple) -> tuple:
        """Cotangents of (ts, y0, shared, layers) from those of (the saved states, what observers saw), all as `Outcome` and
        `Problem` have them outside.
        """
        raise NotImplementedError

    def counted(self, plan: Plan, rows: int, outcome: Outcome) -> Outcome:
        """The outcome with the evaluations of the way back counted."""
        return outcome

    def solve(self, plan: Plan, problem: Problem) -> Outcome:
        """The outcome of the march, differentiable; under `vmap` it runs as one batch, and so does its derivative."""

        def run(batch: Batch | None, platform: str | None) -> Callable:
            march = March.of(plan, batch, platform)

            def form(moving: tuple, still: tuple) -> tuple:
                outcome = from_layout(march, march.run(to_layout(march, problem_of(moving, still))))
                return _parts(self.counted(plan, _rows(batch), outcome))

            return form

        def record(batch: Batch | None, platform: str | None, sized: int) -> Callable:
            march = March.of(plan, batch, platform)

            def form(moving: tuple, still: tuple) -> tuple:
                outcome, kept = self.record(march, to_layout(march, problem_of(moving, still)), sized)
                return *_parts(self.counted(plan, _rows(batch), from_layout(march, outcome))), kept

            return form

        def pull(batch: Batch | None, platform: str | None) -> Callable:
            march = March.of(plan, batch, platform)

            def form(moving: tuple, still: tuple, values: tuple, rest: tuple, kept: Any, ybar: tuple) -> tuple:
                return self.pull(march, problem_of(moving, still), Outcome(*values, *rest), kept, ybar)

            return form

        values, rest = native(Rule(run, record, pull), *moving_of(problem), plan.promise)
        return Outcome(*values, *rest)


def _parts(outcome: Outcome) -> tuple:
    """What of an outcome has derivatives, and the rest."""
    return tuple(outcome[:2]), tuple(outcome[2:])


def _rows(batch: Batch | None) -> int:
    return batch.size if batch else 1


def failed(march: March, outcome: Outcome) -> Array:
    """Rows that failed, as a column: an observer that ended a row, or had no room, is no failure of the march."""
    status = march.rows.column(outcome.status)
    lost = status != int(Status.success)
    if march.plan.watches:
        lost = lost & (status != int(Status.event)) & (status != int(Status.capacity))
    return lost


def contained(
    march: March,
    problem: Problem,
    outcome: Outcome,
    broken: Array,
    bars: tuple,
    pull: Callable[[Problem, Given, Array], tuple[Cotangents, Array]],
) -> tuple:
    """Cotangents of (ts, y0, shared, layers), given pull(problem, g, good) -> (those inside the march, which rows went wrong). good
    says which saved states are finite, of rows that did not fail or have cotangents: the way back of others needs none.

    A failed row is contained: with zero cotangents on its NaNs it leaves everything else as it is, and with any other it makes
    what it touches NaN. So does a row that goes wrong in reverse, with any cotangent at all.
    """
    rows = march.rows
    ybar, obar, values = jax.tree.map(lambda x: rows.to_layout(x, True, 1), (*bars, outcome.observed))
    good = rows.over_time(rows.column(outcome.good))
    spoiled = jnp.zeros_like(broken)
    touched = jnp.zeros_like(broken)
    for x in ybar:
        spoiled = spoiled | ~rows.all(jnp.all(good | (x == 0), axis=0))
        touched = touched | ~rows.all(jnp.all(x == 0, axis=0))
    for watch, table, bar in zip(march.plan.watches, values, obar, strict=True):
        spoiled = spoiled | watch.spoils(rows, table, bar)
        touched = reduce(jnp.logical_or, [~rows.all(jnp.all(b == 0, axis=0)) for b in bar], touched)
    obar = jax.tree.map(lambda x, b: jnp.where(jnp.isfinite(x), b, 0), values, obar)
    g = Given(tuple(jnp.where(good, x, 0) for x in ybar), obar, values)
    looked_at = rows.column(outcome.good) & ~(failed(march, outcome) & ~touched)[None]
    c, wrong = pull(replace_failed(march, to_layout(march, problem), broken), g, looked_at)
    spoiled = spoiled | (wrong & touched)
    ts, y, shared, layers = cotangents_from_layout(march, c)
    broken, spoiled = rows.flat(broken), rows.flat(spoiled)

    def settle(x: Array, mapped: bool, zero: Array = broken) -> Array:
        if not (mapped or rows.size is None):
            zero, bad = jnp.all(zero), jnp.any(spoiled)
        else:
            shape = (-1,) + (1,) * (x.ndim - 1) if rows.size is not None else ()
            zero, bad = zero.reshape(shape), spoiled.reshape(shape)
        return nan_unless(~bad, jnp.where(zero, 0, x).astype(x.dtype))

    def settle_stack(x: Array, mapped: bool) -> Array:
        """The same; without a failure the stack of all layers stays in the buffer that the march wrote it to."""
        return jax.lax.cond(jnp.any(broken | spoiled), lambda x: settle(x, mapped), lambda x: x, x)

    flags = march.mapped or jax.tree.map(lambda _: False, problem)
    return (
        settle(ts, flags.ts),
        tuple(settle(x, m, jnp.zeros_like(broken)) for x, m in zip(y, flags.y0, strict=True)),
        [settle(x, m) for x, m in zip(shared, flags.params.shared, strict=True)],
        [settle_stack(x, m) for x, m in zip(layers, flags.params.layers, strict=True)],
    )


def drift(march: March, found: State, true: State, ys: State) -> Array:
    """How far a recovered state is from the true one, against the largest saved state of its row (root mean squares)."""
    rows = march.rows
    gap = size = rows.spread(jnp.zeros((), widest(*(x.dtype for x in true), default=jnp.float32)))
    for x, y, saved in zip(found, true, ys, strict=True):
        gap = gap + rows.sum(magnitude(x - y) ** 2).astype(gap.dtype)
        squares = jnp.stack([rows.sum(magnitude(jnp.where(jnp.isfinite(z), z, 0)) ** 2) for z in (saved[0], saved[-1])])
        size = jnp.maximum(size, jnp.max(squares, axis=0).astype(gap.dtype))
    return jnp.sqrt(gap / jnp.maximum(size, jnp.finfo(gap.dtype).tiny))
