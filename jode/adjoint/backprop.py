"""Exact gradients: backpropagation through the steps taken, with the states stored or computed again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.adjoint.discrete import Discrete
from jode.march import Kept, March, Plan, Problem
from jode.observe import Record
from jode.tree import State, put, stack_zeros, take, where
from jode.tuning import BUDGET, LITTLE, PLENTY, RECORD

AUTO = "auto"


@dataclass(frozen=True)
class Backprop(Discrete):
    """The exact gradient of the numbers computed, on the grid of steps that the solve took.

    `checkpoints=None` stores the state at the start of every step (for `Adaptive` a buffer of max_steps states);
    `checkpoints=k` stores k of them and recomputes the others from those, placed by the binomial schedule of Griewank &
    Walther 2000: n ≤ C(k + r, r) steps are each taken again at most r times. The default stores every state where that
    takes less than 64 MiB for the whole batch, and otherwise as many as fit there (16 to 1,000). Where the gradient is traced
    before a `jax.vmap` (in a `jax.jit`, `scan` or `cond` that is mapped) a row counts for the whole batch. The stages of each step
    are computed again and differentiated, so a gradient costs some three to four times the solve.

    All derivatives of all orders are exact in this sense, in every nesting of modes; each order but the first takes the march
    again, on the way of its checkpoints.
    """

    checkpoints: int | str | None = AUTO

    follows_resets = True

    def __post_init__(self) -> None:
        k = self.checkpoints
        if not (k is None or k == AUTO or (isinstance(k, int) and not isinstance(k, bool) and k >= 1)):
            raise ValueError(f"Backprop: checkpoints must be None (store every step) or a positive int, got {k!r}")

    def records(self, plan: Plan, rows: int) -> Record | None:
        keep = int(self.storage(plan, rows) is None)
        if plan.solver.lands:
            return Record(keep, plan.most) if keep else None
        slots = _slots(plan, rows)
        return Record(keep, slots, 0 if slots == plan.most else -(-plan.most // slots))

    def again(self, plan: Plan, rows: int, steps: Array) -> Array:
        checkpoints = None if self.checkpoints is None else self.storage(plan, rows)
        return jnp.zeros_like(steps) if checkpoints is None else jnp.maximum(recomputed(steps, checkpoints), 0)

    def recovery(self, march: March, problem: Problem, kept: Kept, ys: State) -> tuple[Any, Callable]:
        if kept.states and all(x.shape[0] for x in kept.states):
            return kept.states, lambda i, states: (take(states, march.solver.entry(march, problem, i)), states)
        checkpoints = self.storage(march.plan, march.rows.size or 1)
        return _recompute(march, problem, kept, march.plan.most if checkpoints is None else checkpoints)

    def storage(self, plan: Plan, rows: int) -> int | None:
        """How many states to keep; None where every step's is kept by the march itself.

        Rows that take fewer steps between stops than others are reset after they stood still: with states that a march which took
        fewer steps did not keep, so they are computed again.
        """
        kept = self._storage(plan, rows)
        stands = plan.solver.lands and plan.solver.marked and plan.steps is None
        return plan.most if kept is None and stands else kept

    def _storage(self, plan: Plan, rows: int) -> int | None:
        most = plan.most if plan.solver.lands else _slots(plan, rows)
        if self.checkpoints == AUTO:
            checkpoints = max(16, BUDGET // max(1, plan.layout.nbytes * plan.solver.method.parts * rows))
        elif self.checkpoints is not None:
            checkpoints = int(self.checkpoints)
        elif most:
            return None
        else:
            raise ValueError(
                "Backprop(checkpoints=None) with a traced step count cannot know how many states to store: "
                "give Fixed(..., max_steps=bound), or a number of checkpoints"
            )
        if most and checkpoints >= most:
            return None
        return min(checkpoints, PLENTY) if self.checkpoints == AUTO else checkpoints


def _slots(plan: Plan, rows: int) -> int:
    """How many steps of a found grid are recorded at once: all that may be taken, where tables of that length cost little."""
    step = plan.layout.nbytes * plan.solver.method.parts + jnp.dtype(plan.time).itemsize
    if plan.most * step * rows <= LITTLE:
        return plan.most
    return min(plan.most, max(RECORD, math.ceil(plan.most**0.5)))


def _recompute(march: March, problem: Problem, kept: Kept, keep: int) -> tuple[Any, Callable]:
    """Recover the state at the start of step i by marching on from the last of at most `keep` checkpoints before it."""
    grid, first = kept.grid, kept.first or march.initial(problem)
    states = put(stack_zeros(keep, first), 0, first)
    store = (jnp.zeros((), jnp.int32), jnp.zeros(keep, jnp.int32), states)

    def recover(i: Array, store: Any) -> tuple[Any, Any]:
        top, index, states = store
        i = jnp.asarray(i, jnp.int32)
        top = jnp.where(index[top] > i, top - 1, top)

        def short(carry: tuple) -> Array:
            return carry[0] < i

        def onwards(carry: tuple) -> tuple:
            at, y, (top, index, states) = carry
            free = keep - 1 - top
            stop = at + stride(i - at + 1, free)
            y = jax.lax.fori_loop(at, stop, lambda s, y: march.advance(problem, grid, jnp.asarray(s, jnp.int32), y), y)
            push = free > 0
            top = top + push.astype(jnp.int32)
            index = index.at[top].set(jnp.where(push, stop, index[top]))
            states = put(states, top, where(push, y, take(states, top)))
            return stop, y, (top, index, states)

        _, y, store = jax.lax.while_loop(short, onwards, (index[top], take(states, top), (top, index, states)))
        return y, store

    return store, recover


def stride(steps: Array, free: Array) -> Array:
    """How far on to place the next checkpoint, to reverse `steps` ≥ 2 steps with `free` more checkpoints at hand.

    With β(c, r) = C(c + r, r) the largest number of steps that c checkpoints reverse with r repetitions of each, and r the
    least that suffices, max(β(c, r - 2), steps - β(c - 1, r)) is optimal (Griewank & Walther 2000, Algorithm 799).
    """
    c = jnp.minimum(free, PLENTY) + 1
    r, beta = _repetitions(steps, c)
    fewer_repeats = beta * r // (c + r) * (r - 1) // (c + r - 1)
    fewer_checkpoints = beta * c // (c + r)
    length = jnp.maximum(jnp.maximum(fewer_repeats, steps - fewer_checkpoints), 1)
    return jnp.where(free > 0, jnp.minimum(length, steps - 1), steps - 1).astype(jnp.int32)


def recomputed(steps: Array, checkpoints: int) -> Array:
    """How many steps the schedule takes again in all: r n - β(c + 1, r - 1) for n steps and c checkpoints."""
    if checkpoints == 1:
        return steps * (steps - 1) // 2
    c = jnp.asarray(min(checkpoints, PLENTY), jnp.int32)
    r, beta = _repetitions(steps, c)
    return jnp.where(steps <= checkpoints, steps - 1, r * steps - beta * r // (c + 1))


def _repetitions(steps: Array, c: Array) -> tuple[Array, Array]:
    """The least r with β(c, r) ≥ steps, and that β; r = 1 where c is 1 (its schedule needs no such count)."""

    def grow(state: tuple) -> tuple:
        r, beta = state
        return r + 1, beta * (c + r + 1) // (r + 1)

    return jax.lax.while_loop(lambda s: (s[1] < steps) & (c > 1), grow, (jnp.ones_like(c), c + 1))
