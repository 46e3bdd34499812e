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

from jode import tableau as tb
from jode.tableau import Tableau
from jode.tree import State, combine, increment, increment_stacked, put, stack, stack_zeros

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

    def stacked_slopes(self, F: Field, t: Array, h: Array, y: State, params: Any, upto: int) -> State:
        """The first `upto` slopes, stacked along a leading axis.

        One loop over the stages: its derivative is a loop too, which XLA compiles and runs many times faster than the
        derivative of the same stages written out.
        """
        if upto == 1:
            return stack(self.slopes(F, t, h, y, params, upto=1))
        table = np.zeros((upto, upto))
        for i, row in enumerate(self.tableau.rows[:upto]):
            table[i, : len(row)] = row

        def stage(K: State, x: tuple) -> tuple[State, None]:
            i, c, row = x
            return put(K, i, F(t + c * h, increment_stacked(y, h, row, K), params)), None

        nodes = jnp.asarray(self.tableau.nodes[:upto], h.dtype)
        K, _ = jax.lax.scan(stage, stack_zeros(upto, y), (jnp.arange(upto), nodes, jnp.asarray(table, h.dtype)))
        return K

    def step(self, F: Field, t: Array, h: Array, y: State, params: Any) -> State:
        """The state at t + h from the state y at t."""
        return increment(y, h, self.tableau.b, self.slopes(F, t, h, y, params))

    def stacked_step(self, F: Field, t: Array, h: Array, y: State, params: Any) -> State:
        """`step`, in the form to differentiate: with three stages or more, the loop of `stacked_slopes`."""
        if self.tableau.stages < 3:
            return self.step(F, t, h, y, params)
        K = self.stacked_slopes(F, t, h, y, params, self.tableau.stages)
        return increment_stacked(y, h, jnp.asarray(self.tableau.b, h.dtype), K)

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
