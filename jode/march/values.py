"""What a march is given, carries and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control import Grid, Solver, Stats
from jode.field import Closed
from jode.native import Promise
from jode.observe import Table
from jode.rows import Rows
from jode.tree import Layout, State
from jode.window import Params, Problem


class Outcome(NamedTuple):
    """States at the save times (save time first) and what observers saw, which have derivatives; which of the states are finite,
    the counts, the status, and the time reached.
    """

    ys: State
    observed: tuple
    good: Array
    stats: Stats
    status: Array
    reached: Array


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a march depends on that is not data."""

    closed: Closed  # the vector field, and other functions of the user
    solver: Solver
    layout: Layout
    saves: int
    time: Any  # dtype
    steps: int | None  # steps between save times; None where that number is data
    weights: int  # how many numbers the parameters with gradients are
    watches: tuple[Table, ...] = ()  # observers inside the loop
    live: int = 1  # rows of the maps around the solve, where it is traced

    @property
    def promise(self) -> Promise:
        """What a march of one trajectory returns: the states, and the rest of an `Outcome`."""
        shape: Any = jax.ShapeDtypeStruct
        ys = tuple(shape((self.saves, *x.shape), x.dtype) for x in self.layout.packed)
        one = shape((), jnp.int32)
        stats = Stats(*[one] * len(Stats._fields))
        observed = tuple(tuple(shape((w.capacity, *x.shape), x.dtype) for x in w.shapes(self)) for w in self.watches)
        rest = shape((self.saves,), bool), stats, one, shape((), self.time)
        size = self.layout.size * self.solver.method.parts
        return Promise((ys, observed), rest, self.closed.effects, size, live=self.live)

    @property
    def degree(self) -> int:
        """Of the layers' weights, a piecewise polynomial of depth."""
        return getattr(self.solver, "degree", 0)

    @property
    def most(self) -> int:
        return self.solver.most_steps(self.saves - 1, self.steps)


class Carry(NamedTuple):
    """What the loop carries: the method's state, the slope its next step uses again, the control's carry, and the observers'."""

    s: State
    slope: Any
    control: Any
    observed: tuple


class Kept(NamedTuple):
    """What the way back needs: the grid, and the states kept, of the last chapter; the last state, and where the chapters start.
    first: of a chapter, its first state. resets: the states before resets. What is not kept is a table without entries, so that
    every batch keeps the same arrays.
    """

    grid: Grid
    last: State
    states: State
    chapters: Any
    first: State = ()
    resets: Any = ()


class Given(NamedTuple):
    """What the way back starts from: cotangents of the states saved and of what observers saw, and what they saw."""

    ys: State
    observed: tuple = ()
    values: tuple = ()


class Cotangents(NamedTuple):
    """What the way back carries: cotangents of the method's state, the save times and the parameters; how many of its steps
    each row has not gone back, and what the observers of the march go back to next. found: of the time that each row stands at,
    where that was found at an event that resets.
    """

    s: State
    ts: Array
    shared: list
    layers: list
    left: Any
    next: Any
    found: Any = ()


def moving_of(problem: Problem) -> tuple[tuple, tuple]:
    """What carries cotangents, and what does not."""
    p = problem.params
    return (problem.ts, problem.y0, p.shared, p.layers), (p.fixed, p.fixed_layers, problem.numbers)


def problem_of(moving: tuple, still: tuple) -> Problem:
    """The inverse of `moving_of`."""
    ts, y0, shared, layers = moving
    fixed, fixed_layers, numbers = still
    return Problem(ts, y0, Params(shared, layers, fixed, fixed_layers), numbers)


def inner(rows: Rows, k: State, g: State) -> Array:
    """<k, g> by row, in JAX's convention for complex cotangents."""
    total = rows.spread(jnp.zeros(()))
    for x, z in zip(k, g, strict=True):
        total = total + jnp.real(rows.sum(x * z)).astype(total.dtype)
    return total
