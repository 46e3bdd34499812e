"""What marches share: their data, and entering and leaving the place of the rows.

A march knows how to `run` (values only), how to `trace` (values and the grid they came from), how to take slot i of that
grid again (`advance`), and how to pull cotangents back through slot i given the state it starts from (`pull`). How that
state is recovered is the adjoint's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.batch import SMALL, Promise, Rows
from jode.grid import Adaptive, Stats
from jode.method import Method, Stage
from jode.tree import Layout, State, add, blend, zeros_like


class Params(NamedTuple):
    """The arrays a vector field reads: with gradients (`shared`, `layers`) and without; `layers` have one slice per step."""

    shared: list
    layers: list
    fixed: list
    fixed_layers: list


class Problem(NamedTuple):
    """Everything a march depends on that is data. `numbers` are the solver's: a step count, or tolerances."""

    ts: Array
    y0: State
    params: Params
    numbers: dict


class Outcome(NamedTuple):
    """States at the save times (save time first), which of them are finite, the counts, the status, and the time reached."""

    ys: State
    good: Array
    stats: Stats
    status: Array
    reached: Array


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a march depends on that is not data."""

    field: Callable
    solver: Any
    layout: Layout
    saves: int
    time: Any  # dtype
    steps: int | None  # steps between save times; None when that number is data
    weights: int  # how many numbers the parameters with gradients are
    depth: int | None  # layers, or None
    degree: int  # of the layers' weights, a piecewise polynomial of depth
    effects: Any  # of evaluating the field

    @property
    def promise(self) -> Promise:
        """What a march of one trajectory returns."""
        shape: Any = jax.ShapeDtypeStruct
        ys = tuple(shape((self.saves, *x.shape), x.dtype) for x in self.layout.packed)
        one = shape((), jnp.int32)
        stats = Stats(*[one] * len(Stats._fields))
        return Promise(Outcome(ys, shape((self.saves,), bool), stats, one, shape((), self.time)), self.effects)

    @property
    def dense(self) -> bool:
        """Whether saved states are interpolated."""
        return isinstance(self.solver, Adaptive) and self.saves > 2

    @property
    def most(self) -> int:
        return most_steps(self.solver, self.saves, self.steps)


def most_steps(solver: Any, saves: int, steps: int | None) -> int:
    """A static bound on the number of steps; zero where none is known."""
    if isinstance(solver, Adaptive):
        return solver.max_steps
    return (saves - 1) * (steps or getattr(solver, "max_steps", None) or 0)


class Cotangents(NamedTuple):
    """What the reverse march carries: cotangents of the method's state, the save times, the parameters, and a save pointer."""

    s: State
    ts: Array
    shared: list
    layers: list
    next: Any


class March:
    """What both kinds of march share: entering and leaving the place of the rows, and containing failures."""

    def __init__(self, plan: Plan, rows: Rows, mapped: Any) -> None:
        self.plan, self.rows, self.mapped = plan, rows, mapped
        self.method: Method = plan.solver.method
        params = mapped.params if rows.size else None
        self.F = jax.jit(rows.lift(plan.field, params))  # traced once, however many stages ask for it

    def inside(self, t: Array, h: Array, params: Params) -> Stage:
        """The vector field as a function of (c, y), a fraction c of the way into a step of width h from t."""
        return lambda c, y: self.F(t + c * h, y, self.weights(params, c))

    def weights(self, params: Params, c: Any) -> Params:
        """The parameters at a fraction c of a step, given those at its nodes."""
        layers, fixed = ([x[0] for x in xs] for xs in (params.layers, params.fixed_layers))
        if self.plan.degree:
            layers = [blend(x[0], x[1], c) for x in params.layers]
        return params._replace(layers=layers, fixed_layers=fixed)

    def nodes(self, params: Params, i: Array) -> Params:
        """The parameters at the nodes of step i: layers i … i + degree."""
        size = self.plan.degree + 1
        layers, fixed = ([jax.lax.dynamic_slice_in_dim(x, i, size, 0) for x in xs] for xs in (params.layers, params.fixed_layers))
        return params._replace(layers=layers, fixed_layers=fixed)

    def begin(self, problem: Problem) -> State:
        """The method's own state at the initial time."""
        t0 = self.rows.spread(problem.ts[0])
        params = self.weights(self.nodes(problem.params, jnp.zeros((), jnp.int32)), 0.0)
        return self.method.start(problem.y0, lambda: self.F(t0, problem.y0, params))

    def pull_step(
        self, t: Array, h: Array, s: State, params: Params, sbar: State, dense: bool = False
    ) -> tuple[State | None, Callable]:
        """The slopes of one step (with `dense`) and the map from cotangents of them to those of (t, h, s, (shared, layers))."""

        def G(c: Any, y: State, z: tuple) -> State:
            t, h, shared, layers = z
            return self.inside(t, h, params._replace(shared=shared, layers=layers))(c, y)

        K, pull = self.method.vjp(G, h, s, (t, h, params.shared, params.layers), dense, self.rolled)

        def back(kbar: State | None, shared: list, layers: list) -> tuple:
            zero = jnp.zeros_like
            hbar, ybar, (tbar, hbar_t, *moving) = pull(sbar, kbar, (zero(t), zero(h), shared, layers))
            return tbar, hbar + hbar_t, ybar, moving

        return K, back

    @property
    def rolled(self) -> bool:
        """Whether stages are differentiated in a loop: where they are so small that what XLA makes of them costs most."""
        small = self.plan.layout.size <= SMALL
        return small and (self.rows.size is None or self.plan.weights <= SMALL)

    @property
    def nfe_pull(self) -> int:
        """Evaluations that pulling back through one step takes."""
        pulled = self.method.pulled(self.plan.dense)
        return 2 * pulled if self.rolled and pulled > 1 else pulled

    def enter(self, problem: Problem) -> Problem:
        """The problem with rows where this march wants them; layers lead, whatever else does."""
        if self.rows.size is None:
            return problem
        rows, mapped = self.rows, self.mapped
        params = Params(
            *(
                [rows.enter(x, m, lead) for x, m in zip(leaves, flags, strict=True)]
                for leaves, flags, lead in zip(problem.params, mapped.params, (0, 1, 0, 1), strict=True)
            )
        )
        y0 = tuple(
            rows.enter(x if m else jnp.broadcast_to(x, (rows.size, *x.shape)), True)
            for x, m in zip(problem.y0, mapped.y0, strict=True)
        )
        numbers = {k: rows.column(x, mapped.numbers[k]) for k, x in problem.numbers.items()}
        return Problem(rows.column(problem.ts, mapped.ts), y0, params, numbers)

    def leave(self, outcome: Outcome) -> Outcome:
        rows = self.rows
        ys = tuple(rows.leave(x, 1) for x in outcome.ys)
        stats = Stats(*(rows.flat(rows.spread(jnp.asarray(x, jnp.int32))) for x in outcome.stats))
        return Outcome(ys, rows.flat(outcome.good), stats, rows.flat(outcome.status), rows.flat(rows.spread(outcome.reached)))

    def leave_trace(self, grid: Any, states: Any) -> tuple[Any, Any]:
        """Grid and states with a leading row axis."""
        rows = self.rows
        if grid is not None and rows.size is not None:
            slots, times, moved = grid
            grid = (jnp.broadcast_to(slots, (rows.size,)), rows.flat(times), rows.flat(moved))
        last, kept = states
        return grid, (jax.tree.map(rows.leave, last), jax.tree.map(lambda x: rows.leave(x, 1), kept))

    def leave_cotangents(self, c: Cotangents) -> tuple:
        """Cotangents of (ts, y0, shared, layers), with a leading row axis for what differs by row."""
        rows, mapped = self.rows, self.mapped
        if rows.size is None:
            return c.ts, c.s, c.shared, c.layers
        y = tuple(rows.leave(x) if m else jnp.sum(x, rows.axis) for x, m in zip(c.s, mapped.y0, strict=True))
        shared = [rows.leave(x) if m else x for x, m in zip(c.shared, mapped.params.shared, strict=True)]
        layers = [rows.leave(x, 1) if m else x for x, m in zip(c.layers, mapped.params.layers, strict=True)]
        return rows.flat(c.ts) if mapped.ts else c.ts, y, shared, layers

    def start(self, problem: Problem, good: Array, g: State) -> Cotangents:
        """The cotangents after the last step, before any is pulled back."""
        nothing = zeros_like(tuple(x[0] for x in g)) * (self.method.parts - 1)
        params = problem.params
        s = (*(x[-1] for x in g), *nothing)
        return Cotangents(s, jnp.zeros_like(problem.ts), zeros_like(params.shared), zeros_like(params.layers), None)

    def saved(self, sbar: State, g: State) -> State:
        """The cotangent of the method's state with that of a saved state added."""
        return (*add(self.method.read(sbar), g), *sbar[len(g) :])

    def finish(self, problem: Problem, g: State, c: Cotangents) -> Cotangents:
        """Cotangents of the problem from those at the first step; saved states at the start see y0 alone."""
        params = problem.params

        def begin(t0: Array, y0: State, shared: list, layers: list) -> State:
            ts = problem.ts.at[0].set(t0)
            return self.begin(problem._replace(ts=ts, y0=y0, params=params._replace(shared=shared, layers=layers)))

        _, back = jax.vjp(begin, problem.ts[0], problem.y0, params.shared, params.layers)
        tbar, ybar, shared, layers = back(c.s)
        c = c._replace(s=add(ybar, g), ts=c.ts.at[0].add(tbar), shared=add(c.shared, shared))
        return c._replace(layers=add(c.layers, layers)) if self.method.starts else c

    def heal(self, problem: Problem, broken: Array) -> Problem:
        """Give rows that failed at their first step the data of a row that did not.

        Their cotangents are zero, but zero times the NaN of their own derivatives would reach parameters shared with
        other rows.
        """
        if not self.rows.size:
            return problem
        donor = jnp.argmin(self.rows.flat(broken))
        column, axis = self.rows.flat(broken), 0 if self.rows.axis == 0 else -1

        def lend(x: Array, m: bool, lead: int = 0) -> Array:
            if not m:
                return x
            at = lead if axis == 0 else -1
            mask = column.reshape([-1 if i == at % x.ndim else 1 for i in range(x.ndim)])
            return jnp.where(mask, jnp.take(x, donor[None], axis=at), x)

        lent = [
            [lend(x, m, lead) for x, m in zip(leaves, flags, strict=True)]
            for leaves, flags, lead in zip(problem.params, self.mapped.params, (0, 1, 0, 1), strict=True)
        ]
        return problem._replace(y0=tuple(lend(x, True) for x in problem.y0), params=Params(*lent))


def inner(rows: Rows, k: State, g: State) -> Array:
    """<k, g> by row, in JAX's convention for complex cotangents."""
    total = rows.spread(jnp.zeros(()))
    for x, z in zip(k, g, strict=True):
        total = total + jnp.real(rows.sum(x * z)).astype(total.dtype)
    return total
