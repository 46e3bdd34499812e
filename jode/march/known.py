"""A march over a grid known beforehand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.grid import Stats, Status
from jode.march.base import Cotangents, March, Outcome, Problem
from jode.method import Stage
from jode.tree import State, nan_unless, stack_zeros, store, take, where


class Known(March):
    """A grid known beforehand: `steps` equal steps between save times, shared or one layer each."""

    def count(self, problem: Problem) -> Any:
        """Steps between save times."""
        return self.plan.steps if self.plan.steps is not None else problem.numbers["steps"]

    def bound(self, problem: Problem) -> Any:
        """Steps between save times; the largest of the rows' where each has its own."""
        return self.plan.steps if self.plan.steps is not None else jnp.max(problem.numbers["steps"])

    def slots(self, problem: Problem, _: Any) -> Any:
        return (self.plan.saves - 1) * self.bound(problem)

    def span(self, problem: Problem, a: Array, b: Array, k: Array) -> tuple[Array, Array]:
        """Time and width of step k of the interval [a, b]; rows that want fewer steps than others then stand still."""
        steps = self.count(problem)
        count = steps if isinstance(steps, int) else steps.astype(a.dtype)
        h = (b - a) / count
        t = a + k.astype(a.dtype) * h
        if not isinstance(steps, int) and steps.ndim:
            h = jnp.where(k < steps, h, 0)
        return t, h

    def _still(self, problem: Problem, h: Array, s: State, moved: State) -> State:
        """The state moved, or as it is in rows that want fewer steps than others."""
        return where(h == 0, s, moved) if jnp.ndim(self.count(problem)) else moved

    def _window(self, problem: Problem, a: Array, b: Array, k: Array, i: Array) -> tuple[Stage, Array]:
        """Step k of the interval [a, b], the i-th of all: the field inside it, and its width."""
        t, h = self.span(problem, a, b, k)
        return self.inside(t, h, self.nodes(problem.params, i)), h

    def saved_as(self, s: State) -> tuple[State, Array]:
        """The state saved, NaN in rows that are not finite (and stay so: every step adds to the state), and which rows are."""
        y = self.method.read(s)
        good = self.rows.finite(y)
        return tuple(nan_unless(good, x) for x in y), good

    def march(self, problem: Problem, keep: int | None) -> tuple[tuple[State, Array], tuple]:
        """What is saved, save time first; with `keep` also the last state and those that steps 0, keep, 2 keep … start from."""
        ts, bound = problem.ts, self.bound(problem)
        s0 = self.begin(problem)
        states = stack_zeros(-(-self.plan.most // keep), s0) if keep else None

        def interval(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
            a, b, j = xs

            def one(k: Array, carry: tuple) -> tuple:
                s, states = carry
                i = j * bound + k
                if keep:
                    states = store(states, i, keep, s)
                G, h = self._window(problem, a, b, k, i)
                return self._still(problem, h, s, self.method.step(G, h, s)), states

            if isinstance(bound, int):
                carry, _ = jax.lax.scan(lambda carry, k: (one(k, carry), None), carry, jnp.arange(bound, dtype=jnp.int32))
            else:
                carry = jax.lax.fori_loop(0, bound, lambda k, carry: one(jnp.asarray(k, jnp.int32), carry), carry)
            return carry, self.saved_as(carry[0])

        n = self.plan.saves - 1
        first = self.saved_as(s0)
        if n == 1:
            carry, last = interval((s0, states), (ts[0], ts[1], jnp.zeros((), jnp.int32)))
            return jax.tree.map(lambda x, z: jnp.stack([x, z]), first, last), carry
        carry, rest = jax.lax.scan(interval, (s0, states), (ts[:-1], ts[1:], jnp.arange(n, dtype=jnp.int32)))
        return jax.tree.map(lambda x, z: jnp.concatenate([x[None], z]), first, rest), carry

    def run(self, problem: Problem) -> Outcome:
        return self.outcome(problem, *self.march(problem, None)[0])

    def trace(self, problem: Problem, keep: int) -> tuple[Outcome, Any, tuple]:
        """The outcome, the grid (nothing that the problem does not say), the last state and those kept."""
        saved, states = self.march(problem, keep)
        return self.outcome(problem, *saved), None, states

    def outcome(self, problem: Problem, ys: State, good: Array) -> Outcome:
        status = jnp.where(good[-1], int(Status.success), int(Status.nonfinite_state)).astype(jnp.int32)
        steps = (self.plan.saves - 1) * jnp.asarray(self.count(problem), jnp.int32)
        nfe = self.method.starts + steps * self.method.evaluations
        backward = steps * self.nfe_pull
        last = jnp.maximum(jnp.sum(good, axis=0, dtype=jnp.int32) - 1, 0)  # what is not finite stays so
        reached = self.rows.pick(problem.ts, last)
        return Outcome(ys, good, Stats(nfe, steps, steps, jnp.zeros((), jnp.int32), backward), status, reached)

    def broken(self, grid: Any, good: Array, failed: Array) -> Array:
        """Rows that failed before their first save time: their later states are never looked at."""
        return ~good[1]

    def _step(self, problem: Problem, i: Array) -> tuple[Stage, Array]:
        bound = self.bound(problem)
        j, k = i // bound, i % bound
        return self._window(problem, problem.ts[j], problem.ts[j + 1], k, i)

    def advance(self, problem: Problem, grid: Any, i: Array, s: State) -> State:
        """The state after step i from the state s before it."""
        G, h = self._step(problem, i)
        return self._still(problem, h, s, self.method.step(G, h, s))

    def retreat(self, problem: Problem, grid: Any, i: Array, s1: State, ys: State) -> State:
        """The state before step i from the state s1 after it; what was saved there, ys, is exact."""
        bound = self.bound(problem)
        if self.method.parts == 1:
            s1 = where((i + 1) % bound == 0, take(ys, (i + 1) // bound), s1)
        G, h = self._step(problem, i)
        return self._still(problem, h, s1, self.method.inverse(G, h, s1))

    def pull(
        self, problem: Problem, good: Array, grid: Any, g: State, i: Array, s: State, c: Cotangents, start: State
    ) -> Cotangents:
        """Cotangents before step i from those after it, s being the state at its start; rows that failed take that of the march."""
        bound, size = self.bound(problem), self.plan.degree + 1
        j, k = i // bound, i % bound
        sbar = c.s
        if self.plan.saves > 2:
            sbar = where((k == bound - 1) & (j < self.plan.saves - 2), self.saved(sbar, take(g, j + 1)), sbar)
        s = where(good[j + 1], s, start)
        (t, h), span_back = jax.vjp(lambda a, b: self.span(problem, a, b, k), problem.ts[j], problem.ts[j + 1])
        _, pull = self.pull_step(t, h, s, self.nodes(problem.params, i), sbar)
        before = [jax.lax.dynamic_slice_in_dim(x, i, size, 0) for x in c.layers]
        tbar, hbar, sbar_step, (shared, after) = pull(None, c.shared, before)
        sbar = self._still(problem, h, sbar, sbar_step)
        abar, bbar = span_back((tbar, hbar))
        layers = [jax.lax.dynamic_update_slice_in_dim(x, u, i, 0) for x, u in zip(c.layers, after, strict=True)]
        return Cotangents(sbar, c.ts.at[j].add(abar).at[j + 1].add(bbar), shared, layers, None)

    def end(self, problem: Problem, g: State, c: Cotangents) -> Cotangents:
        return self.finish(problem, tuple(x[0] for x in g), c)
