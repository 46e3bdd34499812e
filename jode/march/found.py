"""A march that finds its grid."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.grid import Stats
from jode.march.base import Cotangents, March, Outcome, Problem, inner
from jode.method import Stage
from jode.search import Search, depart, ending, reached, travel
from jode.tree import State, add, increment_stacked, nan_unless, where, zeros_like
from jode.turns import FEW, groups, in_groups


class Found(March):
    """A grid found while marching; in reverse it is a known grid of recorded times, and steps have no say in its choice."""

    def _search(self, problem: Problem, keep: int | None) -> tuple[Outcome, Any]:
        """The outcome of a search and the carry it ended with."""
        plan, rows, method = self.plan, self.rows, self.method
        ts, y0, params = problem.ts, problem.y0, problem.params
        F = lambda t, y: self.F(t, y, params)
        slope = F(rows.spread(ts[0]), y0)
        s0 = method.start(y0, lambda: slope)
        s = depart(plan.solver, F, rows, ts, s0, slope, problem.numbers, keep)
        s = self._travel(problem, s, keep)
        arrived, status = ending(method, rows, ts, slope, s)
        end = tuple(nan_unless(arrived, x) for x in method.read(s.s))
        middle = reached(s.saves) if s.saves else tuple(jnp.zeros((0, *x.shape), x.dtype) for x in end)
        ys = tuple(jnp.concatenate([x[None], v, z[None]]) for x, v, z in zip(y0, middle, end, strict=True))
        automatic = 2 if plan.solver.first_step is None else 1
        dense = method.extra * s.saves.dense if s.saves else 0
        nfe = automatic + method.trials * s.attempts + dense
        stats = Stats(nfe, s.attempts, s.accepted, s.attempts - s.accepted, s.accepted * self.nfe_pull)
        return Outcome(ys, self.good(ys), stats, status, s.t), s

    def _travel(self, problem: Problem, s: Search, keep: int | None) -> Search:
        """The end of the search; of many rows those that want far more steps than others, if nothing is recorded, in groups."""
        solver, some = self.plan.solver, groups(self.rows) if keep is None else None

        def onwards(march: Found, problem: Problem, s: Search, few: int = 0) -> Search:
            inside = partial(march.inside, params=problem.params)
            return travel(solver, inside, march.rows, problem.ts, problem.numbers, s, keep, few=few)

        if some is None:
            return onwards(self, problem, s)
        march = Found(self.plan, some, self.mapped)
        leaves, treedef = jax.tree.flatten(problem)
        flags = jax.tree.leaves(self.mapped)

        s = onwards(self, problem, s, s.t.size // FEW)  # those that still run have made as many attempts, `loops`

        def run(row: Search, given: list) -> Search:
            mapped = iter(given)
            mixed = [next(mapped) if m else x for x, m in zip(leaves, flags, strict=True)]
            return onwards(march, jax.tree.unflatten(treedef, mixed), row._replace(loops=s.loops))._replace(loops=None)

        left = (s.h != 0) & (s.loops < solver.max_steps)
        return in_groups(run, left, s._replace(loops=None), [x for x, m in zip(leaves, flags, strict=True) if m])

    def good(self, ys: State) -> Array:
        """Whether each saved state is finite, save time first."""
        every = jnp.ones((self.plan.saves, *self.rows.spread(jnp.zeros(())).shape), bool)
        return every & jax.vmap(self.rows.finite)(ys) if ys else every

    def run(self, problem: Problem) -> Outcome:
        return self._search(problem, None)[0]

    def trace(self, problem: Problem, keep: int) -> tuple[Outcome, Any, tuple]:
        """The outcome, the grid, the last state and those kept."""
        outcome, s = self._search(problem, keep)
        return outcome, (s.record.slots, s.record.times, s.accepted > 0), (s.s, s.record.states)

    def broken(self, grid: Any, good: Array, failed: Array) -> Array:
        """Rows that failed before their first step."""
        return failed & ~grid[2]

    def slots(self, problem: Problem, grid: Any) -> Any:
        return grid[0]

    def _ends(self, problem: Problem, grid: Any, i: Array) -> tuple[Array, Array]:
        times = grid[1]
        start = jnp.where(i == 0, self.rows.spread(problem.ts[0]), times[jnp.maximum(i - 1, 0)])
        return start, times[i]

    def _step(self, problem: Problem, grid: Any, i: Array) -> tuple[Stage, Array]:
        a, b = self._ends(problem, grid, i)
        return self.inside(a, b - a, problem.params), b - a

    def advance(self, problem: Problem, grid: Any, i: Array, s: State) -> State:
        """The state after step i from the state s before it."""
        G, h = self._step(problem, grid, i)
        return where(h == 0, s, self.method.step(G, h, s))

    def retreat(self, problem: Problem, grid: Any, i: Array, s1: State, ys: State) -> State:
        """The state before step i from the state s1 after it."""
        G, h = self._step(problem, grid, i)
        return where(h == 0, s1, self.method.inverse(G, h, s1))

    def start(self, problem: Problem, good: Array, g: State) -> Cotangents:
        c = super().start(problem, good, g)
        return c._replace(next=jnp.sum(good[:-1], axis=0).astype(jnp.int32) - 1) if self.plan.saves > 2 else c

    def pull(
        self, problem: Problem, good: Array, grid: Any, g: State, i: Array, s: State, c: Cotangents, start: State
    ) -> Cotangents:
        """Cotangents before step i from those after it, s being the state at its start; rows that failed take that of the march."""
        a, b = self._ends(problem, grid, i)
        h, rows, method = b - a, self.rows, self.method
        s = s if self.rows.size is None else where(grid[2], s, start)
        dense = self.plan.saves > 2
        K, pull = self.pull_step(a, h, s, problem.params, c.s, dense)
        tsbar, j, kbar = c.ts, c.next, None
        hbar, abar, sbar = jnp.zeros_like(a), jnp.zeros_like(a), zeros_like(c.s)
        if dense:
            assert K is not None
            sign = jnp.where(rows.spread(problem.ts[-1]) >= rows.spread(problem.ts[0]), 1, -1).astype(a.dtype)

            def pending(j: Array) -> Array:
                return (j > 0) & (sign * (rows.pick(problem.ts, jnp.maximum(j, 0)) - a) > 0)

            def dense_state(t: Array, a: Array, h: Array, s: State, K: State) -> State:
                theta = (t - a) / jnp.where(h == 0, 1, h)
                return increment_stacked(method.base(theta, s), h, jnp.stack(method.dense_weights(theta)), K)

            def one(carry: tuple) -> tuple:
                j, mask, hbar, abar, sbar, kbar, tsbar = carry
                at = jnp.maximum(j, 0)
                gj = tuple(jnp.where(mask, rows.pick_state(x, at), 0) for x in g)
                _, dense_back = jax.vjp(dense_state, rows.pick(problem.ts, at) + jnp.zeros_like(a), a, h, s, K)
                tb, ab, hb, sb, kb = dense_back(gj)
                tsbar = rows.add_at(tsbar, at, jnp.where(mask, tb, 0))
                j = j - mask.astype(jnp.int32)
                return j, pending(j), hbar + hb, abar + ab, add(sbar, sb), add(kbar, kb), tsbar

            init = (j, pending(j), hbar, abar, sbar, zeros_like(K), tsbar)
            j, _, hbar, abar, sbar, kbar, tsbar = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), one, init)
        abar_step, hbar_step, sbar_step, (shared, _) = pull(kbar, c.shared, [])
        abar, hbar = abar + abar_step, hbar + hbar_step
        real = h != 0  # a row that took no step in this slot stands still
        sbar_step = where(real, sbar_step, c.s)
        first = jnp.where(real & (a == problem.ts[0]), abar - hbar, 0)
        final = jnp.where(real & (b == problem.ts[-1]), hbar, 0)
        tsbar = tsbar.at[0].add(rows.gather(first, tsbar[0])).at[-1].add(rows.gather(final, tsbar[0]))
        return Cotangents(add(sbar, sbar_step), tsbar, shared, c.layers, j)

    def end(self, problem: Problem, g: State, c: Cotangents) -> Cotangents:
        """Save times at the start itself see y0; if they moved on, the state saved would move along the slope there."""
        if not g:
            return self.finish(problem, g, c)
        ts, rows, y0 = problem.ts, self.rows, problem.y0
        same = ts == ts[:1]
        spread = (lambda x: same) if same.ndim > 1 else (lambda x: same.reshape(-1, *[1] * (x.ndim - 1)))
        at_start = tuple(jnp.where(spread(x), x, 0).astype(x.dtype) for x in g)
        slope = self.F(rows.spread(ts[0]), y0, problem.params)
        moved = jax.vmap(lambda x: rows.gather(inner(rows, slope, x).astype(ts.dtype), ts[0]))(tuple(x[1:] for x in at_start))
        c = c._replace(ts=c.ts.at[1:].add(moved).at[0].add(-jnp.sum(moved, axis=0)))
        return self.finish(problem, tuple(jnp.sum(x[:-1], axis=0) for x in at_start), c)
