"""The derivative rule of every discrete adjoint: cotangents go back over the steps that the solve took, one by one.

The adjoints that use it differ in how the state at the start of a step is recovered: read, computed again, or by the inverse step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jode.adjoint.rule import Adjoint, contained, failed
from jode.march import (
    Cotangents,
    Given,
    Kept,
    March,
    Outcome,
    Plan,
    Problem,
    failed_at_start,
    kept_from_layout,
    kept_to_layout,
    reverse,
)
from jode.observe import Record
from jode.tree import State, where


class Discrete(Adjoint):
    """An adjoint that retraces the steps taken."""

    keeps_resets = False  # whether states that are reset must be kept, for their steps are not taken again

    def records(self, plan: Plan, rows: int) -> Record | None:
        """What is recorded of the march of so many rows, if anything is."""
        raise NotImplementedError

    def again(self, plan: Plan, rows: int, steps: Array) -> Array:
        """Steps that recovering the states of so many steps takes again."""
        raise NotImplementedError

    def recovery(
        self, march: March, problem: Problem, kept: Kept, ys: State
    ) -> tuple[Any, Callable[[Array, Any], tuple[State, Any]]]:
        """A store, and recover(i, store) -> (the state that step i starts from, store), asked for the last step first."""
        raise NotImplementedError

    def drifted(self, march: March, problem: Problem, first: State, ys: State) -> Array | bool:
        """Rows whose recovered initial state is not the one that the march started from."""
        return False

    def unrecoverable(self, march: March) -> bool:
        """Whether the states of a row that failed cannot be recovered."""
        return False

    def counted(self, plan: Plan, rows: int, outcome: Outcome) -> Outcome:
        again = jnp.vectorize(lambda steps: self.again(plan, rows, steps))(outcome.stats.accepted)
        backward = outcome.stats.nfe_backward + again * plan.solver.method.evaluations
        return outcome._replace(stats=outcome.stats._replace(nfe_backward=backward))

    def record(self, march: March, problem: Problem, sized: int) -> tuple[Outcome, Kept]:
        outcome, kept = march.record(problem, self.records(march.plan, sized), self.keeps_resets)
        return outcome, kept_from_layout(march, kept)

    def pull(self, march: March, problem: Problem, outcome: Outcome, kept: Kept, bars: tuple) -> tuple:
        rows, kept = march.rows, kept_to_layout(march, kept)
        good = rows.column(outcome.good)
        lost = failed(march, outcome)
        at_start = failed_at_start(march, kept.grid, good, lost)
        unrecoverable = lost & self.unrecoverable(march)
        record = Record.of(kept)

        def pull(problem: Problem, g: Given, good: Array) -> tuple[Cotangents, Array]:
            ys = tuple(rows.to_layout(x, True, 1) for x in outcome.ys)
            recovery = lambda kept: self.recovery(march, problem, kept, ys)
            c, first = reverse(march, problem, good, kept, g, record if record.chapters else None, recovery)
            c = c._replace(s=where(at_start, tuple(x[0] for x in g.ys), c.s))
            return c, (unrecoverable | self.drifted(march, problem, first, ys)) & ~at_start

        return contained(march, problem, outcome, at_start, bars, pull)
