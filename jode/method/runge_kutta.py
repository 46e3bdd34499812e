"""Explicit Runge-Kutta methods: a step and its inverse, both of a tableau."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jode.tableau as tb
from jode.method.base import Method, Step
from jode.tableau import Tableau
from jode.tree import (
    State,
    add,
    combine_stacked,
    increment,
    increment_stacked,
    put,
    stack,
    stack_zeros,
    take,
    unstack,
)
from jode.tuning import kept
from jode.window import Window


@dataclass(frozen=True)
class RungeKutta(Method):
    """y1 = y0 + h Σ b_i k_i, k_i = F(t + c_i h, y0 + h Σ_j a_ij k_j): an explicit method given by its tableau.

    Local error O(h^(p+1)), global O(h^p) for order p; costs one evaluation of F per stage. `jode.RungeKutta(tableau)` makes a
    new method of any `Tableau`.
    """

    tableau: Tableau

    def __post_init__(self) -> None:
        t = self.tableau
        if not isinstance(t, Tableau):
            raise TypeError(f"RungeKutta takes a jode.tableau.Tableau, got {t!r}: implicit methods are jode.Rosenbrock(tableau)")
        of_t = {"order": t.order, "embedded_order": t.embedded_order if t.adaptive else None, "error": t.error, "dense": t.dense}
        self.__dict__.update(of_t, evaluations=t.stages, trials=t.stages, extra=len(t.extra), stability=t.stability)

    def __repr__(self) -> str:
        return f"jode.{self.tableau.name}"

    def slopes(self, window: Window, y: State, known: Sequence[State] = (), upto: int | None = None) -> list[State]:
        """The first `upto` slopes (by default the stages k_1 … k_s), of which the first few may be `known`."""
        ks = list(known)
        upto = self.tableau.stages if upto is None else upto
        if window.long and upto > len(ks) + 1:
            return unstack(self._looped(window, y, ks, upto), upto)
        for c, row in list(zip(self.tableau.nodes, self.tableau.rows, strict=True))[len(ks) : upto]:
            ks.append(window(c, increment(y, window.h, row, ks)))
        return ks

    def _looped(self, window: Window, y: State, known: list[State], upto: int) -> State:
        """The slopes stacked, from a loop over the stages that are not known."""
        h, K = window.h, stack_zeros(upto, y)
        rows, nodes = jnp.asarray(self._padded(upto), h.dtype), jnp.asarray(self.tableau.nodes[:upto], h.dtype)
        for i, k in enumerate(known):
            K = put(K, i, k)
        slope = jax.checkpoint(lambda c, y, moving: window.at(moving)(c, y), prevent_cse=False, policy=kept)

        def stage(i: Array, K: State) -> State:
            return put(K, i, slope(nodes[i], increment_stacked(y, h, rows[i], K), window.moving))

        return jax.lax.fori_loop(len(known), upto, stage, K)

    def _padded(self, upto: int) -> np.ndarray:
        """The first rows of the tableau, filled up with zeros."""
        return np.array([(*row, *[0.0] * (upto - len(row))) for row in self.tableau.rows[:upto]])

    def step(self, window: Window, s: State, slope: Any = ()) -> Step:
        """A slope is known where errors are estimated. In a loop the slope at the end is then one stage more."""
        stages = self.tableau.stages
        ks = self.slopes(window, s, [slope] if slope else [], stages + 1 if slope and window.long else stages)
        return Step(increment(s, window.h, self.tableau.b, ks[:stages]), ks)

    def inverse(self, window: Window, s1: State) -> State:
        """The same step with its ends swapped: Sander, Ablin & Peyré 2022.

        It inverts `step` up to the local error, O(h^(p+1)), and up to O(h^(p+2)) when p is even.
        """
        return self.step(window.ends_swapped(), s1).state

    def reused(self, slope: State) -> State:
        return slope

    def estimated(self, window: Window, s: State, step: Step) -> Step:
        """The slope at the end is the last one, and the first of the next step."""
        if len(step.slopes) > self.tableau.stages:
            return step
        return step._replace(slopes=[*step.slopes, window(1.0, step.state)])

    def refined(self, window: Window, s: State, K: list[State]) -> list[State]:
        return self.slopes(window, s, K, len(self.tableau.nodes))

    def whole(self, window: Window, s: State) -> tuple[State, list[State]]:
        if not window.long:
            return super().whole(window, s)
        ks = self.slopes(window, s, upto=len(self.tableau.nodes))
        return increment(s, window.h, self.tableau.b, ks[: self.tableau.stages]), ks

    def quadrature(self, window: Window, s: State, K: list[State]) -> tuple[Sequence[float], Sequence[float], list[State]]:
        """The method's own, over its stages."""
        t = self.tableau
        used = [i for i, b in enumerate(t.b) if b]
        return [t.c[i] for i in used], [t.b[i] for i in used], [increment(s, window.h, t.rows[i], K[:i]) for i in used]

    def pullback_nfe(self, dense: bool) -> int:
        return len(self.tableau.nodes) if dense else self.tableau.stages

    def pullback(self, window: Window, s: State, dense: bool, rolled: bool) -> tuple[State | None, Callable]:
        """As for every method; `rolled` makes one loop of the stages in reverse, and evaluates each again there.

        With x_i = y + h Σ_j a_ij k_j for the stages, x for the next state, whose row of a is b, and x̄ = s̄, the reverse stages are
        κ_i = k̄_i + h Σ_j a_ji x̄_j and x̄_i = (∂f/∂y)ᵀ κ_i; then ȳ = Σ x̄_j, and likewise for the others.
        """
        upto = self.pullback_nfe(dense)
        if not rolled or upto == 1:
            return super().pullback(window, s, dense, rolled)
        h, ks = window.h, self.slopes(window, s, upto=upto)
        rows = [(*row, *[0.0] * (upto - len(row))) for row in (*self.tableau.rows[:upto], self.tableau.b)]
        forth = jnp.asarray(np.array(rows), h.dtype)
        back, nodes = forth.T, jnp.asarray(self.tableau.nodes[:upto], h.dtype)
        K, xs = stack(ks), stack([increment(s, h, row, ks) for row in rows[:-1]])
        batched = any(x.ndim > 1 for x in s)

        def place(i: Array) -> State:
            # For a batch a matrix product beats reading; for one state what is read once more keeps XLA's loop a small one.
            return increment_stacked(s, h, forth[i], K) if batched else take(xs, i)

        def pull(sbar: State, kbar: State | None, total: tuple) -> tuple[State, tuple]:
            def stage(n: Array, carry: tuple) -> tuple:
                xbar, total = carry
                i = upto - 1 - n
                kappa = combine_stacked(h, back[i], xbar)
                if kbar is not None:
                    kappa = tuple(k + x.astype(k.dtype) for k, x in zip(kappa, take(kbar, i), strict=True))
                _, pull_back = jax.vjp(lambda y, moving: window.at(moving)(nodes[i], y), place(i), window.moving)
                bar, moved = pull_back(tuple(k.astype(x.dtype) for k, x in zip(kappa, s, strict=True)))
                return put(xbar, i, bar), add(total, moved)

            xbar = put(stack_zeros(upto + 1, sbar), upto, sbar)
            xbar, (tbar, hbar, *moved) = jax.lax.fori_loop(0, upto, stage, (xbar, total))
            _, pull_back = jax.vjp(lambda h: stack([increment(s, h, row, ks) for row in rows]), h)
            return reduce(add, unstack(xbar, upto + 1)), (tbar, hbar + pull_back(xbar)[0], *moved)

        return K if dense else None, pull


euler = RungeKutta(tb.EULER)
midpoint = RungeKutta(tb.MIDPOINT)
heun = RungeKutta(tb.HEUN)
ralston = RungeKutta(tb.RALSTON)
bosh3 = RungeKutta(tb.BOSH3)
rk4 = RungeKutta(tb.RK4)
dopri5 = RungeKutta(tb.DOPRI5)
tsit5 = RungeKutta(tb.TSIT5)
dopri8 = RungeKutta(tb.DOPRI8)
