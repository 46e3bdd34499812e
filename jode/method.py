"""A step and its inverse: explicit Runge-Kutta methods.

A method is a hashable value. It advances a packed state over one step of width h along G(c, y), the vector field a fraction c
of the way into that step; the march says what time that is, and which weights hold there.
"""

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
from jode.tableau import Tableau
from jode.tree import (
    State,
    add,
    combine,
    combine_stacked,
    increment,
    increment_stacked,
    put,
    stack,
    stack_zeros,
    take,
    unstack,
)

Stage = Callable[[Any, State], State]


class Method:
    """What a march asks of a method. Its own state s may be several copies of the shape of y, of which y is the first.

    K is the list of slopes of one step that its error estimates and its interpolant are combinations of: the rows of `error`
    and the polynomials of `dense` (coefficients of θ, θ², …).
    """

    order: int
    embedded_order: int | None  # of the solution that the error estimate compares with; None without one
    evaluations: int  # of the vector field per step,
    trials: int  # a step that estimates its error,
    starts: int = 0  # before the first step,
    extra: int = 0  # and for the interpolant of a step
    parts: int = 1  # copies of the shape of y in s
    growth: float = 1.0  # of a rounding error in s through one inverse step, where that is known
    exact: bool = False  # whether `inverse` inverts `step` up to rounding
    error: tuple[tuple[float, ...], ...]
    dense: tuple[tuple[float, ...], ...]

    def for_steps(self, most: int) -> Method:
        """The method for a solve of at most so many steps; 0 where that is not known."""
        return self

    def start(self, y: State, slope: Callable[[], State]) -> State:
        """The method's own state for y, given the slope there."""
        return y

    def read(self, s: State) -> State:
        """The state y of the method's own state."""
        return s[: len(s) // self.parts]

    def step(self, G: Stage, h: Array, s: State) -> State:
        """The state one step on."""
        raise NotImplementedError

    def inverse(self, G: Stage, h: Array, s1: State) -> State:
        """The state at the start of the step that ends in s1."""
        raise NotImplementedError

    def memo(self, slope: State) -> Any:
        """What a trial step wants to know from the one before, given the slope at the start."""
        return ()

    def trial(self, G: Stage, h: Array, s: State, memo: Any) -> tuple[State, list[State], Any]:
        """The state one step on, the slopes K, and the memo for the next step."""
        raise NotImplementedError

    def refine(self, G: Stage, h: Array, s: State, K: list[State]) -> list[State]:
        """The slopes K and those that only the interpolant needs."""
        return K

    def base(self, theta: Array, s: State) -> State:
        """The state to which the interpolant adds h Σ b_i(θ) k_i."""
        return self.read(s)

    def dense_weights(self, theta: Array) -> list[Array]:
        """b_i(θ) of the interpolant, 0 ≤ θ ≤ 1."""
        return [_horner(row, theta) for row in self.dense]

    def errors(self, h: Array, K: list[State], s: State, s1: State) -> list[State]:
        """The method's estimates of the local error of a step from s to s1."""
        return [combine(h, row, K) for row in self.error]

    def pulled(self, dense: bool) -> int:
        """Evaluations that `vjp` takes, each differentiated too."""
        return self.trials + self.extra if dense else self.evaluations

    def vjp(self, G: Callable, h: Array, s: State, z: Any, dense: bool, rolled: bool) -> tuple[State | None, Callable]:
        """The slopes K, stacked (with `dense`), and the map from cotangents of the next state and K to those of (h, s, z).

        G takes (c, y, z): z is everything else that has a cotangent. The map takes what z has so far, and adds to it.
        """

        def forward(h: Array, s: State, z: Any) -> tuple[State, State | None]:
            def at(c: Any, y: State) -> State:
                return G(c, y, z)

            if not dense:
                return self.step(at, h, s), None
            s1, K, _ = self.trial(at, h, s, self.memo(at(0.0, self.read(s))))
            return s1, stack(self.refine(at, h, s, K))

        (_, K), back = jax.vjp(forward, h, s, z)

        def pull(sbar: State, kbar: State | None, total: Any) -> tuple:
            hbar, ybar, zbar = back((sbar, kbar))
            return hbar, ybar, add(total, zbar)

        return K, pull


@dataclass(frozen=True)
class RungeKutta(Method):
    """y1 = y0 + h Σ b_i k_i, k_i = F(t + c_i h, y0 + h Σ_j a_ij k_j): an explicit method given by its tableau.

    Local error O(h^(p+1)), global O(h^p) for order p; costs one evaluation of F per stage. `jode.RungeKutta(tableau)` makes a
    new method of any `Tableau`.
    """

    tableau: Tableau

    def __post_init__(self) -> None:
        t = self.tableau
        of_t = {"order": t.order, "embedded_order": t.embedded_order if t.adaptive else None, "error": t.error, "dense": t.dense}
        self.__dict__.update(of_t, evaluations=t.stages, trials=t.stages, extra=len(t.extra))

    def __repr__(self) -> str:
        return f"jode.{self.tableau.name}"

    def slopes(self, G: Stage, h: Array, y: State, known: Sequence[State] = (), upto: int | None = None) -> list[State]:
        """The first `upto` slopes (by default the stages k_1 … k_s), of which the first few may be `known`."""
        ks = list(known)
        upto = self.tableau.stages if upto is None else upto
        for c, row in list(zip(self.tableau.nodes, self.tableau.rows, strict=True))[len(ks) : upto]:
            ks.append(G(c, increment(y, h, row, ks)))
        return ks

    def step(self, G: Stage, h: Array, s: State) -> State:
        return increment(s, h, self.tableau.b, self.slopes(G, h, s))

    def inverse(self, G: Stage, h: Array, s1: State) -> State:
        """The same step with its ends swapped: Sander, Ablin & Peyré 2022.

        It inverts `step` up to the local error, O(h^(p+1)), and up to O(h^(p+2)) when p is even.
        """
        return self.step(lambda c, y: G(1 - c, y), -h, s1)

    def memo(self, slope: State) -> State:
        return slope

    def trial(self, G: Stage, h: Array, s: State, memo: State) -> tuple[State, list[State], State]:
        ks = self.slopes(G, h, s, [memo])
        y1 = increment(s, h, self.tableau.b, ks)
        end = G(1.0, y1)
        return y1, [*ks, end], end

    def refine(self, G: Stage, h: Array, s: State, K: list[State]) -> list[State]:
        return self.slopes(G, h, s, K, len(self.tableau.nodes))

    def pulled(self, dense: bool) -> int:
        return len(self.tableau.nodes) if dense else self.tableau.stages

    def vjp(self, G: Callable, h: Array, s: State, z: Any, dense: bool, rolled: bool) -> tuple[State | None, Callable]:
        """As for every method; `rolled` makes one loop of the stages in reverse, and evaluates each again there.

        With x_i = y + h Σ_j a_ij k_j for the stages, x for the next state, whose row of a is b, and x̄ = s̄, the reverse stages are
        κ_i = k̄_i + h Σ_j a_ji x̄_j and x̄_i = (∂G/∂y)ᵀ κ_i; then ȳ = Σ x̄_j, and likewise for the others. Left unrolled, XLA on a
        CPU fuses small stages and recomputes them over and over.
        """
        upto = self.pulled(dense)
        if not rolled or upto == 1:
            return super().vjp(G, h, s, z, dense, rolled)
        ks = self.slopes(lambda c, y: G(c, y, z), h, s, upto=upto)
        rows = [(*row, *[0.0] * (upto - len(row))) for row in (*self.tableau.rows[:upto], self.tableau.b)]
        forth = jnp.asarray(np.array(rows), h.dtype)
        back, nodes = forth.T, jnp.asarray(self.tableau.nodes[:upto], h.dtype)
        K, xs = stack(ks), stack([increment(s, h, row, ks) for row in rows[:-1]])
        batched = any(x.ndim > 1 for x in s)

        def place(i: Array) -> State:
            # For a batch a matrix product beats reading; for one state what is read once more keeps XLA's loop a small one.
            return increment_stacked(s, h, forth[i], K) if batched else take(xs, i)

        def pull(sbar: State, kbar: State | None, total: Any) -> tuple:
            def stage(n: Array, carry: tuple) -> tuple:
                xbar, total = carry
                i = upto - 1 - n
                kappa = combine_stacked(h, back[i], xbar)
                if kbar is not None:
                    kappa = tuple(k + x.astype(k.dtype) for k, x in zip(kappa, take(kbar, i), strict=True))
                _, pull_back = jax.vjp(lambda y, z: G(nodes[i], y, z), place(i), z)
                bar, zbar = pull_back(tuple(k.astype(x.dtype) for k, x in zip(kappa, s, strict=True)))
                return put(xbar, i, bar), add(total, zbar)

            xbar = put(stack_zeros(upto + 1, sbar), upto, sbar)
            xbar, total = jax.lax.fori_loop(0, upto, stage, (xbar, total))
            _, pull_back = jax.vjp(lambda h: stack([increment(s, h, row, ks) for row in rows]), h)
            return *pull_back(xbar), reduce(add, unstack(xbar, upto + 1)), total

        return K if dense else None, pull


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
