"""The derivative rule of every discrete adjoint: cotangents go back over the steps that the solve took, one by one.

The adjoints that use it differ in how the state at the start of a step is recovered: read, computed again, or by the inverse step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.adjoint.rule import Adjoint, contained, join, only_forward_over_reverse, only_in_reverse
from jode.batch import Batch, native
from jode.grid import Status
from jode.march import Cotangents, Found, Known, Outcome, Plan, Problem, march_of, reverse
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
        self, march: Known | Found, problem: Problem, grid: Any, kept: tuple, ys: State
    ) -> tuple[Any, Callable[[Array, Any], tuple[State, Any]]]:
        """A store, and recover(i, store) -> (the state that step i starts from, store), asked for the last step first."""
        raise NotImplementedError

    def straight(self, plan: Plan, rows: int) -> bool:
        """Whether the reverse march is made of loops of static length, which JAX can differentiate in reverse."""
        return plan.steps is not None

    def astray(self, march: Known | Found, problem: Problem, first: State, ys: State) -> Array | bool:
        """Rows whose recovered initial state is not the one that the march started from."""
        return False

    def lost(self, march: Known | Found) -> bool:
        """Whether the states of a row that failed cannot be recovered."""
        return False

    def solve(self, plan: Plan, problem: Problem) -> Outcome:
        return native(lambda batch: _differentiable(self, plan, batch), problem, promise=plan.promise)


def _differentiable(adjoint: Discrete, plan: Plan, batch: Batch | None) -> Callable[[Problem], Outcome]:
    """The march for these rows, with its derivative rule."""
    rows = batch.size if batch else 1

    def count(outcome: Outcome) -> Outcome:
        """The outcome with the steps that the gradient takes again counted."""
        again = jnp.vectorize(lambda steps: adjoint.again(plan, rows, steps))(outcome.stats.accepted)
        backward = outcome.stats.nfe_backward + again * plan.solver.method.evaluations
        return outcome._replace(stats=outcome.stats._replace(nfe_backward=backward))

    @jax.custom_vjp
    def solve(moving: tuple, still: tuple) -> Outcome:
        march = march_of(plan, batch)
        return count(march.leave(march.run(march.enter(join(moving, still)))))

    def forward(moving: tuple, still: tuple) -> tuple:
        problem, keep = join(moving, still), adjoint.keep(plan, rows)
        if batch is not None:
            outcome, kept = _trace(plan, batch, problem, keep)
        else:

            def form(rows: Batch | None) -> Callable:
                return lambda problem: _trace(plan, rows, problem, keep, leave=True)

            outcome, kept = native(form, problem, effects=plan.effects)
        outcome = count(outcome)
        return outcome, (problem, kept, outcome)

    def backward(residuals: tuple, bar: Outcome) -> tuple:
        problem, kept, outcome = residuals
        bars = _pull_back(adjoint, march_of(plan, batch), problem, kept, outcome, bar.ys)
        return bars if adjoint.straight(plan, rows) else only_forward_over_reverse(bars), None

    solve.defvjp(forward, backward)
    return only_in_reverse(adjoint, solve)


def _trace(plan: Plan, batch: Batch | None, problem: Problem, keep: int, leave: bool = False) -> tuple[Outcome, tuple]:
    march = march_of(plan, batch)
    outcome, grid, states = march.trace(march.enter(problem), keep)
    return march.leave(outcome), march.leave_trace(grid, states) if leave else (grid, states)


def _pull_back(adjoint: Discrete, march: Known | Found, problem: Problem, kept: tuple, outcome: Outcome, ybar: tuple) -> tuple:
    """Cotangents of (ts, y0, shared, layers) from those of the saved states."""
    rows = march.rows
    grid, states = kept
    good = rows.column(outcome.good)
    failed = rows.column(outcome.status) != int(Status.success)
    broken = march.broken(grid, good, failed)

    lost = failed & adjoint.lost(march)

    def pull(problem: Problem, g: State) -> tuple[Cotangents, Array]:
        ys = tuple(rows.enter(x, True, 1) for x in outcome.ys)
        store, recover = adjoint.recovery(march, problem, grid, states, ys)
        c, first = reverse(march, problem, good, grid, g, store, recover)
        c = c._replace(s=where(broken, tuple(x[0] for x in g), c.s))
        return c, (lost | adjoint.astray(march, problem, first, ys)) & ~broken

    return contained(march, problem, good, broken, ybar, pull)
