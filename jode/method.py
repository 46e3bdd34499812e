"""A step and its inverse: explicit Runge-Kutta methods.

A method is a hashable value. It advances a packed state along a vector field F(t, y, params) from t to t + h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jode.tableau as tb
from jode.tableau import Tableau
from jode.tree import State, add, combine, increment, increment_stacked, put, stack, stack_zeros, take

Field = Callable[[Array, State, Any], State]


@dataclass(frozen=True)
class RungeKutta:
    """y1 = y0 + h Σ b_i k_i, k_i = F(t + c_i h, y0 + h Σ_j a_ij k_j): an explicit method given by its tableau.

    Local error O(h^(p+1)), global O(h^p) for order p; costs one evaluation of F a stage. `jode.RungeKutta(tableau)` makes a
    new method of any `Tableau`.
    """

    tableau: Tableau

    @property
    def order(self) -> int:
        return self.tableau.order

    def __repr__(self) -> str:
        return f"jode.{self.tableau.name}"

    def slopes(
        self, F: Field, t: Array, h: Array, y: State, params: Any, known: list[State] | None = None, upto: int | None = None
    ) -> list[State]:
        """The first `upto` slopes (by default the stages k_1 … k_s), of which the first few may be `known`."""
        ks = list(known or [])
        upto = self.tableau.stages if upto is None else upto
        for c, row in list(zip(self.tableau.nodes, self.tableau.rows, strict=True))[len(ks) : upto]:
            ks.append(F(t + c * h, increment(y, h, row, ks), params))
        return ks

    def step(self, F: Field, t: Array, h: Array, y: State, params: Any) -> State:
        """The state at t + h from the state y at t."""
        return increment(y, h, self.tableau.b, self.slopes(F, t, h, y, params))

    def vjp_slopes(self, F: Callable, t: Array, h: Array, y: State, shared: Any, upto: int, rolled: bool) -> tuple[State, Callable]:
        """The first `upto` slopes, stacked, and the map from their cotangents to those of (t, h, y, shared).

        F takes (t, y, shared). With κ_i = k̄_i + h Σ_{j>i} a_ji ȳ_j and ȳ_j = (∂F/∂y)ᵀ κ_j at stage j, ȳ = Σ ȳ_j and likewise
        for the others. `rolled` makes one loop of the stages, forwards and in reverse, and evaluates each again in reverse:
        for one small state, where XLA would otherwise fuse the stages and recompute them over and over. Otherwise what each
        stage left is kept.
        """
        if not rolled or upto == 1:
            return jax.vjp(lambda *x: stack(self.slopes(F, *x, upto=upto)), t, h, y, shared)
        table, nodes = self._table(upto, h.dtype)

        def place(i: Array, t: Array, h: Array, y: State, K: State) -> tuple[Array, State]:
            return t + nodes[i] * h, increment_stacked(y, h, table[i], K)

        def evaluate(K: State, i: Array) -> tuple[State, None]:
            return put(K, i, F(*place(i, t, h, y, K), shared)), None

        K, _ = jax.lax.scan(evaluate, stack_zeros(upto, y), jnp.arange(upto))

        def pull(kbar: State) -> tuple:
            def stage(n: Array, carry: tuple) -> tuple:
                kbar, tbar, hbar, ybar, total = carry
                i = upto - 1 - n
                at, place_back = jax.vjp(lambda *x: place(i, *x), t, h, y, K)
                _, F_back = jax.vjp(F, *at, shared)
                *placed, sbar = F_back(take(kbar, i))
                tb, hb, yb, kb = place_back(tuple(placed))
                return add(kbar, kb), tbar + tb, hbar + hb, add(ybar, yb), add(total, sbar)

            zeros = jax.tree.map(jnp.zeros_like, (t, h, y, shared))
            return jax.lax.fori_loop(0, upto, stage, (kbar, *zeros))[1:]

        return K, pull

    def _table(self, upto: int, dtype: Any) -> tuple[Array, Array]:
        table = np.zeros((upto, upto))
        for i, row in enumerate(self.tableau.rows[:upto]):
            table[i, : len(row)] = row
        return jnp.asarray(table, dtype), jnp.asarray(self.tableau.nodes[:upto], dtype)

    def pull_end(self, h: Array, y: State, K: State, ybar: State) -> tuple[Array, State, State]:
        """Cotangents of (h, y, K) from that of y1 = y + h Σ b_i k_i."""
        b = jnp.asarray(np.pad(self.tableau.b, (0, K[0].shape[0] - self.tableau.stages)), h.dtype)
        _, back = jax.vjp(lambda h, y, K: increment_stacked(y, h, b, K), h, y, K)
        return back(ybar)

    def inverse(self, F: Field, t: Array, h: Array, y1: State, params: Any) -> State:
        """The state at t from the state y1 at t + h: the same step with its ends swapped.

        Inverts `step` up to the method's own local error, O(h^(p+1)), and O(h^(p+2)) when p is even.
        """
        return self.step(F, t + h, -h, y1, params)

    def dense_weights(self, theta: Array) -> list[Array]:
        """b_i(θ) of y(t + θh) ≈ y + h Σ b_i(θ) k_i over all slopes, 0 ≤ θ ≤ 1."""
        return [_horner(row, theta) for row in self.tableau.dense]

    def errors(self, h: Array, ks: list[State]) -> list[State]:
        """The method's estimates of its own local error."""
        return [combine(h, row, ks) for row in self.tableau.error]


def _horner(coefficients: tuple[float, ...], theta: Array) -> Array:
    total = coefficients[-1] * theta
    for c in reversed(coefficients[:-1]):
        total = (total + c) * theta
    return total


euler = RungeKutta(tb.EULER)
midpoint = RungeKutta(tb.MIDPOINT)
heun = RungeKutta(tb.HEUN)
ralston = RungeKutta(tb.RALSTON)
bosh3 = RungeKutta(tb.BOSH3)
rk4 = RungeKutta(tb.RK4)
dopri5 = RungeKutta(tb.DOPRI5)
tsit5 = RungeKutta(tb.TSIT5)
dopri8 = RungeKutta(tb.DOPRI8)
