"""The derivative rule of every discrete adjoint: cotangents go back over the steps that the solve took, one by one.

The adjoints that use it differ in how the state at the start of a step is recovered: read, computed again, or by the inverse step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jode.adjoint.rule import Adjoint, contained, only_forward_over_reverse
from jode.control import Grid, Status
from jode.march import Cotangents, March, Outcome, Plan, Problem, reverse
from jode.tree import State, where


class Discrete(Adjoint):
    """An adjoint that retraces the steps taken."""

    def keep(self, plan: Plan, rows: int) -> int:
        """The march keeps the states that steps 0, keep, 2 keep … start from; none where 0."""
        raise NotImplementedError

    def again(self, plan: Plan, rows: int, steps: Array) -> Array:
        """Steps that recovering the states of so many steps takes again."""
        raise NotImplementedError

    def recovery(
        self, march: March, problem: Problem, grid: Grid, kept: tuple, ys: State
    ) -> tuple[Any, Callable[[Array, Any], tuple[State, Any]]]:
        """A store, and recover(i, store) -> (the state that step i starts from, store), asked for the last step first."""
        raise NotImplementedError

    def straight(self, plan: Plan, rows: int) -> bool:
        """Whether the way back is made of loops of static length, which JAX can differentiate in reverse."""
        return plan.steps is not None

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

    def record(self, march: March, problem: Problem) -> tuple[Outcome, Any]:
        outcome, kept = march.record(problem, self.keep(march.plan, march.rows.size or 1))
        return outcome, march.recorded_from_layout(kept)

    def pull(self, march: March, problem: Problem, outcome: Outcome, kept: Any, ybar: State) -> tuple:
        rows = march.rows
        grid, *states = march.recorded_to_layout(kept)
        good = rows.column(outcome.good)
        failed = rows.column(outcome.status) != int(Status.success)
        at_start = march.failed_at_start(grid, good, failed)
        unrecoverable = failed & self.unrecoverable(march)

        def pull(problem: Problem, g: State) -> tuple[Cotangents, Array]:
            ys = tuple(rows.to_layout(x, True, 1) for x in outcome.ys)
            store, recover = self.recovery(march, problem, grid, tuple(states), ys)
            c, first = reverse(march, problem, good, grid, g, store, recover)
            c = c._replace(s=where(at_start, tuple(x[0] for x in g), c.s))
            return c, (unrecoverable | self.drifted(march, problem, first, ys)) & ~at_start

        bars = contained(march, problem, good, at_start, ybar, pull)
        return bars if self.straight(march.plan, rows.size or 1) else only_forward_over_reverse(bars)
