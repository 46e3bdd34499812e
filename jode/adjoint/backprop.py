"""Exact gradients: backpropagation through the steps taken, with the states stored or recomputed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.batch import Batch, native
from jode.grid import Adaptive, Status
from jode.march import Found, Known, Outcome, Params, Plan, Problem, reverse
from jode.tree import put, stack_zeros, take, where

BUDGET = 2**26  # bytes of states that the default stores
AUTO = "auto"


@dataclass(frozen=True)
class Backprop:
    """The exact gradient of the numbers computed, on the grid of steps that the solve took.

    `checkpoints=None` stores the state at the start of every step (for `Adaptive` a buffer of max_steps states);
    `checkpoints=k` stores k of them and recomputes the others from those, placed by the binomial schedule of Griewank &
    Walther 2000: n ≤ C(k + r, r) steps are each taken again at most r times. The default stores every state where that
    takes less than 64 MiB for the whole batch, and otherwise as many as fit there (at least 16). The stages of each step are
    recomputed and differentiated, so a gradient costs some three to four times the solve.

    Second derivatives: forward over reverse (`jax.hessian`, `jax.jvp` of `jax.grad`) always; reverse over reverse where
    every state of a grid of static length is stored.
    """

    checkpoints: int | str | None = AUTO

    def __post_init__(self) -> None:
        k = self.checkpoints
        if not (k is None or k == AUTO or (isinstance(k, int) and not isinstance(k, bool) and k >= 1)):
            raise ValueError(f"Backprop: checkpoints must be None (store every step) or a positive int, got {k!r}")

    def solve(self, plan: Plan, problem: Problem) -> Outcome:
        """The outcome of the march, differentiable in reverse; under `vmap` both halves run as one batch."""
        return native(lambda batch: _differentiable(self, plan, batch), problem, promise=plan.promise)

    def storage(self, plan: Plan, rows: int) -> tuple[bool, int]:
        """Whether the march stores the state of every step, and how many states to keep if it does not."""
        intervals, solver = plan.saves - 1, plan.solver
        known = isinstance(solver, Adaptive) or plan.steps is not None
        if isinstance(solver, Adaptive):
            most = solver.max_steps
        else:
            most = intervals * (plan.steps or solver.max_steps or 0) or None
        keep: Any
        if self.checkpoints == AUTO:
            keep = max(16, BUDGET // max(1, plan.layout.nbytes * rows))
        else:
            keep = most if self.checkpoints is None else self.checkpoints
        if keep is None:
            raise ValueError(
                "Backprop(checkpoints=None) with a traced step count cannot know how many states to store: "
                "give Fixed(..., max_steps=bound), or a number of checkpoints"
            )
        keep = keep if most is None else min(keep, most)
        return known and keep == most, keep


def _differentiable(adjoint: Backprop, plan: Plan, batch: Batch | None) -> Callable[[Problem], Outcome]:
    """The march for these rows, with its derivative rule."""
    stored, keep = adjoint.storage(plan, batch.size if batch else 1)

    @jax.custom_vjp
    def solve(moving: tuple, still: tuple) -> Outcome:
        march = _march(plan, batch)
        return _count(march.leave(march.run(march.enter(_join(moving, still)))), None if stored else keep, plan)

    def forward(moving: tuple, still: tuple) -> tuple:
        problem = _join(moving, still)
        if batch is not None:
            outcome, kept = _trace(plan, batch, problem, stored)
        else:

            def form(rows: Batch | None) -> Callable:
                return lambda problem: _trace(plan, rows, problem, stored, leave=True)

            outcome, kept = native(form, problem)
        outcome = _count(outcome, None if stored else keep, plan)
        return outcome, (problem, kept, outcome)

    def backward(residuals: tuple, bar: Outcome) -> tuple:
        problem, kept, outcome = residuals
        return _pull_back(_march(plan, batch), problem, kept, outcome, bar.ys, None if stored else keep), None

    solve.defvjp(forward, backward)
    return lambda problem: solve(*_split(problem))


def _count(outcome: Outcome, keep: int | None, plan: Plan) -> Outcome:
    """The outcome with the steps that checkpointing takes again counted."""
    if keep is None:
        return outcome
    count = jnp.vectorize(lambda steps: recomputed(steps, keep))
    again = jnp.maximum(count(outcome.stats.accepted), 0) * plan.solver.method.tableau.stages
    return outcome._replace(stats=outcome.stats._replace(nfe_backward=outcome.stats.nfe_backward + again))


def _march(plan: Plan, batch: Batch | None) -> Known | Found:
    return plan.march(batch, batch.mapped[0] if batch else None)


def _trace(plan: Plan, batch: Batch | None, problem: Problem, keep: bool, leave: bool = False) -> tuple[Outcome, tuple]:
    march = _march(plan, batch)
    outcome, grid, states = march.trace(march.enter(problem), keep)
    return march.leave(outcome), march.leave_trace(grid, states) if leave else (grid, states)


def _pull_back(march: Known | Found, problem: Problem, kept: tuple, outcome: Outcome, ybar: tuple, keep: int | None) -> tuple:
    """Cotangents of (ts, y0, shared, layers) from those of the saved states.

    A failed row is contained: with zero cotangents on its NaNs it leaves everything else as it is, and with any other it
    makes what it touches NaN.
    """
    rows = march.rows
    grid, states = kept
    g = tuple(rows.enter(x, True, 1) for x in ybar)
    good = rows.column(outcome.good)
    failed = rows.column(outcome.status) != int(Status.success)
    poisoned = jnp.zeros_like(failed)
    mask = rows.over_time(good)
    for x in g:
        poisoned = poisoned | ~rows.all(jnp.all(mask | (x == 0), axis=0))
    g = tuple(jnp.where(mask, x, 0) for x in g)
    broken = march.broken(grid, good, failed)
    inner = march.heal(march.enter(problem), broken)
    if keep is None:
        store, recover = states, _read
    else:
        store, recover = _recompute(march, inner, grid, keep)
    c = reverse(march, inner, good, grid, g, store, recover)
    c = c._replace(y=where(broken, tuple(x[0] for x in g), c.y))
    ts, y, shared, layers = march.leave_cotangents(c)

    broken, poisoned = rows.flat(broken), rows.flat(poisoned)

    def settle(x: Array, mapped: bool, zero: Array = broken) -> Array:
        if not (mapped or rows.size is None):
            zero, bad = jnp.all(zero), jnp.any(poisoned)
        else:
            shape = (-1,) + (1,) * (x.ndim - 1) if rows.size is not None else ()
            zero, bad = zero.reshape(shape), poisoned.reshape(shape)
        return jnp.where(bad, jnp.nan, jnp.where(zero, 0, x)).astype(x.dtype)

    flags = march.mapped or jax.tree.map(lambda _: False, problem)
    return (
        settle(ts, flags.ts),
        tuple(settle(x, m, jnp.zeros_like(broken)) for x, m in zip(y, flags.y0, strict=True)),
        [settle(x, m) for x, m in zip(shared, flags.params.shared, strict=True)],
        [settle(x, m) for x, m in zip(layers, flags.params.layers, strict=True)],
    )


def _read(i: Array, states: Any) -> tuple[Any, Any]:
    """Recover the state at the start of step i: it was stored."""
    return take(states, i), states


def _recompute(march: Known | Found, problem: Problem, grid: Any, keep: int) -> tuple[Any, Callable]:
    """Recover the state at the start of step i by marching on from the last of at most `keep` checkpoints before it."""
    states = put(stack_zeros(keep, problem.y0), 0, problem.y0)
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
            y = jax.lax.fori_loop(at, stop, lambda s, y: march.advance(problem, grid, s, y), y)
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
    c = jnp.minimum(free, 1000) + 1
    r, beta = _repetitions(steps, c)
    fewer_repeats = beta * r // (c + r) * (r - 1) // (c + r - 1)
    fewer_checkpoints = beta * c // (c + r)
    length = jnp.maximum(jnp.maximum(fewer_repeats, steps - fewer_checkpoints), 1)
    return jnp.where(free > 0, jnp.minimum(length, steps - 1), steps - 1).astype(jnp.int32)


def recomputed(steps: Array, checkpoints: int) -> Array:
    """How many steps the schedule takes again in all: r n - β(c + 1, r - 1) for n steps and c checkpoints."""
    if checkpoints == 1:
        return steps * (steps - 1) // 2
    c = jnp.asarray(min(checkpoints, 1000), jnp.int32)
    r, beta = _repetitions(steps, c)
    return jnp.where(steps <= checkpoints, steps - 1, r * steps - beta * r // (c + 1))


def _repetitions(steps: Array, c: Array) -> tuple[Array, Array]:
    """The least r with β(c, r) ≥ steps, and that β; r = 1 where c is 1 (its schedule needs no such count)."""

    def grow(state: tuple) -> tuple:
        r, beta = state
        return r + 1, beta * (c + r + 1) // (r + 1)

    return jax.lax.while_loop(lambda s: (s[1] < steps) & (c > 1), grow, (jnp.ones_like(c), c + 1))


def _split(problem: Problem) -> tuple[tuple, tuple]:
    """What carries cotangents, and what does not."""
    p = problem.params
    return (problem.ts, problem.y0, p.shared, p.layers), (p.fixed, p.fixed_layers, problem.numbers)


def _join(moving: tuple, still: tuple) -> Problem:
    ts, y0, shared, layers = moving
    fixed, fixed_layers, numbers = still
    return Problem(ts, y0, Params(shared, layers, fixed, fixed_layers), numbers)
