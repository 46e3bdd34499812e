"""Stepping over a grid, forwards and in reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.batch import Batch, Rows
from jode.grid import Adaptive
from jode.march.base import Cotangents, March, Outcome, Params, Plan, Problem, inner, most_steps
from jode.march.found import Found
from jode.march.known import Known
from jode.tree import State

__all__ = [
    "Cotangents",
    "Found",
    "Known",
    "March",
    "Outcome",
    "Params",
    "Plan",
    "Problem",
    "inner",
    "march_of",
    "most_steps",
    "reverse",
]


def march_of(plan: Plan, batch: Batch | None) -> Known | Found:
    """The march of a plan, for one trajectory or for a batch whose one operand is the problem."""
    kind = Found if isinstance(plan.solver, Adaptive) else Known
    return kind(plan, Rows.of(batch, plan.layout.size), batch.mapped[0] if batch else None)


def reverse(
    march: Known | Found, problem: Problem, good: Array, grid: Any, g: State, store: Any, recover: Callable
) -> tuple[Cotangents, State]:
    """Pull the cotangents g of the saved states back over the grid; recover(i, store) -> (state at slot i, store).

    Returns the cotangents of the problem and the last state recovered, that at the start.
    """
    n, start = march.slots(problem, grid), march.begin(problem)

    def body(k: Array, carry: tuple) -> tuple:
        store, _, c = carry
        i = jnp.asarray(n - 1 - k, jnp.int32)
        s, store = recover(i, store)
        return store, s, march.pull(problem, good, grid, g, i, s, c, start)

    _, first, c = jax.lax.fori_loop(0, n, body, (store, start, march.start(problem, good, g)))
    return march.end(problem, g, c), first
