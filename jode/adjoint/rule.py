"""What every derivative rule of a march shares: which operands move, and how failures are kept where they happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.batch import only_forward, only_reverse
from jode.march import Cotangents, Found, Known, Outcome, Params, Plan, Problem
from jode.tree import State, magnitude, nan_unless, widest


class Adjoint:
    """A derivative rule for a march."""

    def refusal(self, solver: Any) -> str | None:
        """Why this adjoint cannot serve this solver, if it cannot."""
        return None

    def solve(self, plan: Plan, problem: Problem) -> Outcome:
        """The outcome of the march, differentiable; under `vmap` it runs as one batch, and so does its derivative."""
        raise NotImplementedError


def split(problem: Problem) -> tuple[tuple, tuple]:
    """What carries cotangents, and what does not."""
    p = problem.params
    return (problem.ts, problem.y0, p.shared, p.layers), (p.fixed, p.fixed_layers, problem.numbers)


def only_in_reverse(adjoint: Adjoint, solve: Callable[[tuple, tuple], Outcome]) -> Callable[[Problem], Outcome]:
    """solve(moving, still), which has a rule for reverse mode, of a problem; differentiating it forwards is refused in words."""
    message = (
        f"{type(adjoint).__name__} gives gradients (jax.grad, jax.vjp, jax.jacrev) and their forward derivatives (jax.hessian). "
        "For jax.jvp, jax.jacfwd or jax.linearize of the solve itself use adjoint=jode.ForwardMode()"
    )

    def differentiable(problem: Problem) -> Outcome:
        moving, still = split(problem)
        return solve(only_reverse(moving, message), still)

    return differentiable


def join(moving: tuple, still: tuple) -> Problem:
    """The inverse of `split`."""
    ts, y0, shared, layers = moving
    fixed, fixed_layers, numbers = still
    return Problem(ts, y0, Params(shared, layers, fixed, fixed_layers), numbers)


def contained(
    march: Known | Found,
    problem: Problem,
    good: Array,
    broken: Array,
    ybar: State,
    pull: Callable[[Problem, State], tuple[Cotangents, Array]],
) -> tuple:
    """Cotangents of (ts, y0, shared, layers), given pull(problem, g) -> (those inside the march, which rows went wrong).

    A failed row is contained: with zero cotangents on its NaNs it leaves everything else as it is, and with any other it makes
    what it touches NaN. So does a row that goes wrong in reverse, with any cotangent at all.
    """
    rows = march.rows
    g = tuple(rows.enter(x, True, 1) for x in ybar)
    mask = rows.over_time(good)
    poisoned = jnp.zeros_like(broken)
    touched = jnp.zeros_like(broken)
    for x in g:
        poisoned = poisoned | ~rows.all(jnp.all(mask | (x == 0), axis=0))
        touched = touched | ~rows.all(jnp.all(x == 0, axis=0))
    g = tuple(jnp.where(mask, x, 0) for x in g)
    c, wrong = pull(march.heal(march.enter(problem), broken), g)
    poisoned = poisoned | (wrong & touched)
    ts, y, shared, layers = march.leave_cotangents(c)
    broken, poisoned = rows.flat(broken), rows.flat(poisoned)

    def settle(x: Array, mapped: bool, zero: Array = broken) -> Array:
        if not (mapped or rows.size is None):
            zero, bad = jnp.all(zero), jnp.any(poisoned)
        else:
            shape = (-1,) + (1,) * (x.ndim - 1) if rows.size is not None else ()
            zero, bad = zero.reshape(shape), poisoned.reshape(shape)
        return nan_unless(~bad, jnp.where(zero, 0, x).astype(x.dtype))

    def settle_stack(x: Array, mapped: bool) -> Array:
        """The same; without a failure the stack of all layers stays in the buffer that the march wrote it to."""
        return jax.lax.cond(jnp.any(broken | poisoned), lambda x: settle(x, mapped), lambda x: x, x)

    flags = march.mapped or jax.tree.map(lambda _: False, problem)
    return (
        settle(ts, flags.ts),
        tuple(settle(x, m, jnp.zeros_like(broken)) for x, m in zip(y, flags.y0, strict=True)),
        [settle(x, m) for x, m in zip(shared, flags.params.shared, strict=True)],
        [settle_stack(x, m) for x, m in zip(layers, flags.params.layers, strict=True)],
    )


def drift(march: Known | Found, found: State, true: State, ys: State) -> Array:
    """How far a recovered state is from the true one, against the largest saved state of its row (root mean squares)."""
    rows = march.rows
    gap = size = rows.spread(jnp.zeros((), widest(*(x.dtype for x in true), default=jnp.float32)))
    for x, y, saved in zip(found, true, ys, strict=True):
        gap = gap + rows.sum(magnitude(x - y) ** 2).astype(gap.dtype)
        squares = jnp.stack([rows.sum(magnitude(jnp.where(jnp.isfinite(z), z, 0)) ** 2) for z in (saved[0], saved[-1])])
        size = jnp.maximum(size, jnp.max(squares, axis=0).astype(gap.dtype))
    return jnp.sqrt(gap / jnp.maximum(size, jnp.finfo(gap.dtype).tiny))


def only_forward_over_reverse(bars: Any) -> Any:
    """The cotangents as they are; differentiating them in reverse is refused in words."""
    return only_forward(
        bars,
        "reverse over reverse through this solve is not supported: its steps are data. Take second derivatives forward over "
        "reverse (jax.hessian, or jax.jvp of jax.grad), or use Fixed with a Python int",
    )
