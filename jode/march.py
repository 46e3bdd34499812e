"""Stepping over a grid, forwards and in reverse.

A march knows how to `run` (values only), how to `trace` (values and the grid they came from), how to take slot i of that
grid again (`advance`), and how to pull cotangents back through slot i given the state it starts from (`pull`). How that
state is recovered is the adjoint's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.batch import SMALL, Batch, Promise, Rows
from jode.grid import Adaptive, Stats, Status, ending, search
from jode.method import RungeKutta
from jode.tree import Layout, State, add, increment_stacked, put, take, where, zeros_like


class Params(NamedTuple):
    """The arrays a vector field reads: with gradients (`shared`, `layers`) and without; `layers` have one slice a step."""

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
    """States at the save times (save time first), which of them are finite, the counts and the status."""

    ys: State
    good: Array
    stats: Stats
    status: Array


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a march depends on that is not data."""

    field: Callable
    solver: Any
    layout: Layout
    saves: int
    steps: int | None  # steps between save times; None when that number is data
    depth: int | None  # layers, or None
    effects: Any  # of evaluating the field

    @property
    def promise(self) -> Promise:
        """What a march of one trajectory returns."""
        shape: Any = jax.ShapeDtypeStruct
        ys = tuple(shape((self.saves, *x.shape), x.dtype) for x in self.layout.packed)
        one = shape((), jnp.int32)
        stats = Stats(*[one] * len(Stats._fields))
        return Promise(Outcome(ys, shape((self.saves,), bool), stats, one), self.effects)

    def march(self, batch: Batch | None, mapped: Any) -> Known | Found:
        kind = Found if isinstance(self.solver, Adaptive) else Known
        return kind(self, Rows.of(batch, self.layout.size), mapped)


class Cotangents(NamedTuple):
    """What the reverse march carries: cotangents of the state, the save times, the parameters, and a save pointer."""

    y: State
    ts: Array
    shared: list
    layers: list
    next: Any


class _March:
    """What both kinds of march share: entering and leaving the place of the rows, and containing failures."""

    def __init__(self, plan: Plan, rows: Rows, mapped: Any) -> None:
        self.plan, self.rows, self.mapped = plan, rows, mapped
        self.method: RungeKutta = plan.solver.method
        params = mapped.params if rows.size else None
        self.F = jax.jit(rows.lift(plan.field, params))  # traced once, however many stages ask for it

    def vjp_slopes(self, t: Array, h: Array, y: State, params: Params, upto: int) -> tuple[State, Callable]:
        """The slopes of one step and their pullback to (t, h, y, (shared, layers))."""

        def F(t: Array, y: State, moving: tuple) -> State:
            return self.F(t, y, params._replace(shared=moving[0], layers=moving[1]))

        return self.method.vjp_slopes(F, t, h, y, (params.shared, params.layers), upto, self.rolled)

    @property
    def rolled(self) -> bool:
        """Whether stages are differentiated in a loop."""
        return self.plan.layout.size <= SMALL and self.rows.size is None

    def nfe_pull(self, upto: int) -> int:
        """Evaluations that pulling back through one step takes."""
        return 2 * upto if self.rolled and upto > 1 else upto

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
        return Outcome(ys, rows.flat(outcome.good), stats, rows.flat(outcome.status))

    def leave_trace(self, grid: Any, states: Any) -> tuple[Any, Any]:
        """Grid and states with a leading row axis."""
        rows = self.rows
        if grid is not None and rows.size is not None:
            slots, times, moved = grid
            grid = (jnp.broadcast_to(slots, (rows.size,)), rows.flat(times), rows.flat(moved))
        return grid, jax.tree.map(lambda x: rows.leave(x, 1), states)

    def leave_cotangents(self, c: Cotangents) -> tuple:
        """Cotangents of (ts, y0, shared, layers), with a leading row axis for what differs by row."""
        rows, mapped = self.rows, self.mapped
        if rows.size is None:
            return c.ts, c.y, c.shared, c.layers
        y = tuple(rows.leave(x) if m else jnp.sum(x, rows.axis) for x, m in zip(c.y, mapped.y0, strict=True))
        shared = [rows.leave(x) if m else x for x, m in zip(c.shared, mapped.params.shared, strict=True)]
        layers = [rows.leave(x, 1) if m else x for x, m in zip(c.layers, mapped.params.layers, strict=True)]
        return rows.flat(c.ts) if mapped.ts else c.ts, y, shared, layers

    def layer(self, params: Params, i: Array) -> Params:
        """The parameters that step i reads."""
        return params._replace(layers=take(params.layers, i), fixed_layers=take(params.fixed_layers, i))

    def good(self, ys: State) -> Array:
        """Whether the state at each save time is finite, save time first."""
        total = jnp.ones((), bool)
        for x in ys:
            total = total & (jax.vmap(lambda v: self.rows.all(jnp.isfinite(v)))(x))
        shape = (self.plan.saves, *self.rows.spread(jnp.zeros(())).shape)
        return jnp.broadcast_to(total, shape)

    def heal(self, problem: Problem, broken: Array) -> Problem:
        """Give rows that failed at their first step the data of a row that did not.

        Their cotangents are zero, but zero times the NaN of their own derivatives would reach parameters shared with
        other rows.
        """
        if self.rows.size is None:
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


class Known(_March):
    """A grid known beforehand: `steps` equal steps between save times, shared or one layer each."""

    def _steps(self, problem: Problem) -> Any:
        return self.plan.steps if self.plan.steps is not None else problem.numbers["steps"]

    def bound(self, problem: Problem) -> Any:
        """Steps between save times; the largest of the rows' where each has its own."""
        return self.plan.steps if self.plan.steps is not None else jnp.max(problem.numbers["steps"])

    def slots(self, problem: Problem, _: Any) -> Any:
        return (self.plan.saves - 1) * self.bound(problem)

    def span(self, problem: Problem, a: Array, b: Array, k: Array) -> tuple[Array, Array]:
        """Time and width of step k of the interval [a, b]; rows that want fewer steps than others then stand still."""
        steps = self._steps(problem)
        count = steps if isinstance(steps, int) else steps.astype(a.dtype)
        h = (b - a) / count
        t = a + k.astype(a.dtype) * h
        if not isinstance(steps, int) and steps.ndim:
            h = jnp.where(k < steps, h, 0)
        return t, h

    def step(self, problem: Problem, a: Array, b: Array, k: Array, y: State, params: Params) -> State:
        """The state after step k of the interval [a, b]."""
        t, h = self.span(problem, a, b, k)
        return self.method.step(self.F, t, h, y, params)

    def march(self, problem: Problem, keep: bool) -> tuple[State, Any]:
        """States at the save times and, with `keep`, at the start of every step."""
        ts, steps = problem.ts, self.plan.steps
        params = problem.params

        def interval(y: State, xs: tuple) -> tuple[State, tuple]:
            a, b, layers = xs
            one = partial(self.step, problem, a, b)
            if steps is None:
                y = jax.lax.fori_loop(0, self.bound(problem), lambda k, y: one(jnp.asarray(k), y, params), y)
                return y, (y, None)

            def body(y: State, x: tuple) -> tuple[State, Any]:
                k, layer = x
                slices = params._replace(layers=layer[0], fixed_layers=layer[1])
                return one(k, y, slices), (y if keep else None)

            y, kept = jax.lax.scan(body, y, (jnp.arange(steps), layers), length=steps)
            return y, (y, kept)

        n = self.plan.saves - 1
        layers = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), (params.layers, params.fixed_layers))
        xs = (ts[:-1], ts[1:], layers)
        if n == 1:
            y, (_, kept) = interval(problem.y0, take(xs, 0))
            ys = tuple(jnp.stack([x, z]) for x, z in zip(problem.y0, y, strict=True))
            return ys, kept
        _, (ys, kept) = jax.lax.scan(interval, problem.y0, xs)
        ys = tuple(jnp.concatenate([x[None], z]) for x, z in zip(problem.y0, ys, strict=True))
        return ys, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)

    def run(self, problem: Problem) -> Outcome:
        return self.outcome(problem, self.march(problem, False)[0])

    def trace(self, problem: Problem, keep: bool) -> tuple[Outcome, Any, Any]:
        """The outcome, the grid (nothing that the problem does not say) and the states at the start of each step."""
        ys, states = self.march(problem, keep and self.plan.steps is not None)
        return self.outcome(problem, ys), None, states

    def outcome(self, problem: Problem, ys: State) -> Outcome:
        good = self.good(ys)
        wrong = jnp.cumsum(~good, axis=0) > 0
        mask = self.rows.over_time(wrong)
        ys = tuple(jnp.where(mask, jnp.nan, x).astype(x.dtype) for x in ys)
        status = jnp.where(wrong[-1], int(Status.nonfinite_state), int(Status.success)).astype(jnp.int32)
        steps = (self.plan.saves - 1) * jnp.asarray(self._steps(problem), jnp.int32)
        nfe = steps * self.method.tableau.stages
        backward = steps * self.nfe_pull(self.method.tableau.stages)
        return Outcome(ys, ~wrong, Stats(nfe, steps, steps, jnp.zeros((), jnp.int32), backward), status)

    def broken(self, grid: Any, good: Array, failed: Array) -> Array:
        """Rows that failed before their first save time: their later states are never looked at."""
        return ~good[1]

    def advance(self, problem: Problem, grid: Any, i: Array, y: State) -> State:
        j, k = i // self.bound(problem), i % self.bound(problem)
        return self.step(problem, problem.ts[j], problem.ts[j + 1], k, y, self.layer(problem.params, i))

    def start(self, problem: Problem, good: Array, g: State) -> Cotangents:
        """The cotangents after the last step, before any is pulled back."""
        y = tuple(x[-1] for x in g)
        return Cotangents(y, jnp.zeros_like(problem.ts), zeros_like(problem.params.shared), zeros_like(problem.params.layers), None)

    def pull(self, problem: Problem, good: Array, grid: Any, g: State, i: Array, y: State, c: Cotangents) -> Cotangents:
        """Cotangents before step i from those after it, y being the state at its start."""
        bound = self.bound(problem)
        j, k = i // bound, i % bound
        ybar = c.y
        if self.plan.saves > 2:
            ybar = where((k == bound - 1) & (j < self.plan.saves - 2), add(ybar, take(g, j + 1)), ybar)
        y = where(good[j + 1], y, problem.y0)
        params = self.layer(problem.params, i)

        upto = self.method.tableau.stages
        (t, h), span_back = jax.vjp(lambda a, b: self.span(problem, a, b, k), problem.ts[j], problem.ts[j + 1])
        K, pull = self.vjp_slopes(t, h, y, params, upto)
        hbar, ybar, kbar = self.method.pull_end(h, y, K, ybar)
        tbar, hbar_k, ybar_k, (shared, layers) = pull(kbar)
        ybar = add(ybar, ybar_k)
        abar, bbar = span_back((tbar, hbar + hbar_k))
        return Cotangents(ybar, c.ts.at[j].add(abar).at[j + 1].add(bbar), add(c.shared, shared), put(c.layers, i, layers), None)

    def finish(self, problem: Problem, g: State, c: Cotangents) -> Cotangents:
        return c._replace(y=add(c.y, tuple(x[0] for x in g)))


class Found(_March):
    """A grid found while marching; in reverse it is a known grid of recorded times, and steps have no say in its choice."""

    def _search(self, problem: Problem, record: bool, keep: bool) -> Any:
        solver, numbers = self.plan.solver, problem.numbers
        return search(solver, self.F, self.rows, problem.ts, problem.y0, problem.params, numbers, record, keep)

    def run(self, problem: Problem) -> Outcome:
        return self.outcome(problem, self._search(problem, False, False))

    def trace(self, problem: Problem, keep: bool) -> tuple[Outcome, Any, Any]:
        s = self._search(problem, True, keep)
        return self.outcome(problem, s), (s.record.slots, s.record.times, s.accepted > 0), s.record.states

    def outcome(self, problem: Problem, s: Any) -> Outcome:
        arrived, status = ending(self.rows, problem.ts, s)
        end = tuple(jnp.where(arrived, x, jnp.nan).astype(x.dtype) for x in s.y)
        middle = s.saves.ys if s.saves else tuple(jnp.zeros((0, *x.shape), x.dtype) for x in end)
        ys = tuple(jnp.concatenate([x[None], v, z[None]]) for x, v, z in zip(problem.y0, middle, end, strict=True))
        stages, extra = self.method.tableau.stages, len(self.method.tableau.extra)
        automatic = 2 if self.plan.solver.first_step is None else 1
        dense = extra * s.saves.dense if s.saves else 0
        backward = s.accepted * self.nfe_pull(stages + (1 + extra if s.saves else 0))
        stats = Stats(automatic + stages * s.attempts + dense, s.attempts, s.accepted, s.attempts - s.accepted, backward)
        return Outcome(ys, self.good(ys), stats, status)

    def broken(self, grid: Any, good: Array, failed: Array) -> Array:
        """Rows that failed before their first step."""
        return failed & ~grid[2]

    def slots(self, problem: Problem, grid: Any) -> Any:
        return grid[0]

    def _ends(self, problem: Problem, grid: Any, i: Array) -> tuple[Array, Array]:
        times = grid[1]
        start = jnp.where(i == 0, self.rows.spread(problem.ts[0]), times[jnp.maximum(i - 1, 0)])
        return start, times[i]

    def advance(self, problem: Problem, grid: Any, i: Array, y: State) -> State:
        a, b = self._ends(problem, grid, i)
        return self.method.step(self.F, a, b - a, y, problem.params)

    def start(self, problem: Problem, good: Array, g: State) -> Cotangents:
        y = tuple(x[-1] for x in g)
        j = jnp.sum(good[:-1], axis=0).astype(jnp.int32) - 1 if self.plan.saves > 2 else None
        params = problem.params
        return Cotangents(y, jnp.zeros_like(problem.ts), zeros_like(params.shared), zeros_like(params.layers), j)

    def pull(self, problem: Problem, good: Array, grid: Any, g: State, i: Array, y: State, c: Cotangents) -> Cotangents:
        a, b = self._ends(problem, grid, i)
        h, rows, params = b - a, self.rows, problem.params
        y = where(grid[2], y, problem.y0)
        dense = self.plan.saves > 2

        tableau = self.method.tableau
        upto = len(tableau.nodes) if dense else tableau.stages

        K, pull = self.vjp_slopes(a, h, y, params, upto)
        hbar, ybar, kbar = self.method.pull_end(h, y, K, c.y)
        tsbar, j, abar_dense = c.ts, c.next, jnp.zeros_like(a)
        if dense:
            sign = jnp.where(rows.spread(problem.ts[-1]) >= rows.spread(problem.ts[0]), 1, -1).astype(a.dtype)

            def pending(j: Array) -> Array:
                return (j > 0) & (sign * (rows.pick(problem.ts, jnp.maximum(j, 0)) - a) > 0)

            def dense_state(t: Array, a: Array, h: Array, y: State, ks: State) -> State:
                weights = self.method.dense_weights((t - a) / jnp.where(h == 0, 1, h))
                return increment_stacked(y, h, jnp.stack(weights), ks)

            def one(s: tuple) -> tuple:
                j, mask, hbar, abar, ybar, kbar, tsbar = s
                at = jnp.maximum(j, 0)
                gj = tuple(jnp.where(mask, rows.pick_state(x, at), 0) for x in g)
                _, dense_back = jax.vjp(
                    dense_state,
                    rows.pick(problem.ts, at) + jnp.zeros_like(a),
                    a,
                    h,
                    y,
                    K,
                )
                tb, ab, hb, yb, kb = dense_back(gj)
                tsbar = rows.add_at(tsbar, at, jnp.where(mask, tb, 0))
                j = j - mask.astype(jnp.int32)
                return j, pending(j), hbar + hb, abar + ab, add(ybar, yb), add(kbar, kb), tsbar

            init = (j, pending(j), hbar, abar_dense, ybar, kbar, tsbar)
            j, _, hbar, abar_dense, ybar, kbar, tsbar = jax.lax.while_loop(lambda s: jnp.any(s[1]), one, init)
        abar, hbar_k, ybar_k, (shared, _) = pull(kbar)
        hbar = hbar + hbar_k
        real = h != 0
        first = jnp.where(real & (a == problem.ts[0]), abar + abar_dense - hbar, 0)
        final = jnp.where(real & (b == problem.ts[-1]), hbar, 0)
        tsbar = tsbar.at[0].add(rows.gather(first, tsbar[0])).at[-1].add(rows.gather(final, tsbar[0]))
        return Cotangents(add(ybar, ybar_k), tsbar, add(c.shared, shared), c.layers, j)

    def finish(self, problem: Problem, g: State, c: Cotangents) -> Cotangents:
        """Save times at the start itself see y0, and its time through the vector field."""
        ts = problem.ts
        same = (ts[:-1] == ts[:1]).at[0].set(True)
        spread = (lambda x: same) if same.ndim > 1 else (lambda x: same.reshape(-1, *[1] * (x.ndim - 1)))
        y = tuple(z + jnp.sum(jnp.where(spread(x), x[:-1], 0), axis=0).astype(z.dtype) for x, z in zip(g, c.y, strict=True))
        return c._replace(y=y)


def reverse(march: Known | Found, problem: Problem, good: Array, grid: Any, g: State, store: Any, recover: Callable) -> Cotangents:
    """Pull the cotangents g of the saved states back over the grid; recover(i, store) -> (state at slot i, store)."""
    n = march.slots(problem, grid)

    def body(k: Array, carry: tuple) -> tuple:
        store, c = carry
        i = jnp.asarray(n - 1 - k, jnp.int32)
        y, store = recover(i, store)
        return store, march.pull(problem, good, grid, g, i, y, c)

    _, c = jax.lax.fori_loop(0, n, body, (store, march.start(problem, good, g)))
    return march.finish(problem, g, c)
