"""What a march asks of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.tree import State, add, combine, increment, stack
from jode.window import Window


class Step(NamedTuple):
    """One step: the method's own state at its end, the slopes on the way, and whether it succeeded.

    ok: None where a step cannot fail but by a NaN, else a column of bools. A step that failed is rejected, as if too wide; where
    steps are known beforehand its row has failed.
    """

    state: State
    slopes: list[State]
    ok: Array | None = None


class Method:
    """A step and its inverse. A method is a hashable value; subclasses set the numbers below, and write `step`.

    Its own state s is a packed state, a tuple of vectors (one for each dtype), or several copies of that shape, of which y is the
    first. Slopes K are what error estimates and the interpolant are combinations of: the rows of `error`, and the polynomials of
    `dense` (coefficients of θ, θ², …).
    """

    order: int
    embedded_order: int | None = None  # of the solution that the error estimate compares with; None without one
    evaluations: int = 1  # of the vector field: nfe of a step,
    trials: int = 1  # of a step that estimates its error,
    starts: int = 0  # of the start,
    extra: int = 0  # and of the interpolant of a step, besides
    jacobians: int = 0  # of the vector field, each factorised once, that a step takes
    stability: float | None = None  # h λ may lie in (-stability, 0); None where that is not known, or unbounded
    jac: Callable | None = None  # ∂f/∂y as the user gave it, a function of (t, y, args)
    parts: int = 1  # copies of the shape of y in s
    solves: bool = False  # systems that it may not have solved: a step that is not ok then says so
    growth: float = 1.0  # of a rounding error in s through one inverse step, where that is known
    measured: tuple[int, ...] | None = None  # components of each vector that errors are measured by, the first ones; None: all
    error: tuple[tuple[float, ...], ...] = ()
    dense: tuple[tuple[float, ...], ...] = ((1.0, -0.5), (0.0, 0.5))  # the quadratic with slopes k_1 and k_2 at its ends

    def for_steps(self, most: int) -> Method:
        """The method for a solve of at most so many steps; 0 where that is not known."""
        return self

    def check(self, y0: Any) -> None:
        """Raise where the method does not know how to solve for such a state, the user's own."""

    def start(self, y: State, slope: Callable[[], State]) -> State:
        """The method's own state for y, given the slope there."""
        return y

    def read(self, s: State) -> State:
        """The state y of the method's own state."""
        return s[: len(s) // self.parts]

    def step(self, window: Window, s: State, slope: Any = ()) -> Step:
        """One step over the window; `slope` is what `reused` gave for the state s, where that is known."""
        raise NotImplementedError

    def looked_at(self, window: Window, s: State, step: Step) -> Step:
        """The step from s, for a control that does not judge its error, with y NaN and the other copies finite in rows whose copies
        show that the steps are unstable, there and from there on.
        """
        return step

    def inverse(self, window: Window, s1: State) -> State:
        """The state at the start of the step over the window that ends in s1."""
        raise NotImplementedError(f"{self!r} has no inverse step: use jode.Backprop")

    def reused(self, slope: State) -> Any:
        """What of the slope at a state the step from there uses again: all of it, or ()."""
        return ()

    def estimated(self, window: Window, s: State, step: Step) -> Step:
        """The step with the slopes that its error estimates need."""
        return step

    def refined(self, window: Window, s: State, K: list[State]) -> list[State]:
        """The slopes K and those that only the interpolant needs."""
        return K

    def whole(self, window: Window, s: State) -> tuple[State, list[State]]:
        """The state after a step, and all its slopes."""
        step = self.estimated(window, s, self.step(window, s))
        return step.state, self.refined(window, s, step.slopes)

    def base(self, theta: Array, s: State) -> State:
        """The state to which the interpolant adds h Σ b_i(θ) k_i."""
        return self.read(s)

    def dense_weights(self, theta: Array) -> list[Array]:
        """b_i(θ) of the interpolant, 0 ≤ θ ≤ 1."""
        return [_horner(row, theta) for row in self.dense]

    def quadrature(self, window: Window, s: State, K: list[State]) -> tuple[Sequence[float], Sequence[float], list[State]]:
        """Nodes c_i, weights b_i and the states there: Σ b_i g(c_i, y_i) is the mean of g over the step from s with slopes K.

        Gauss' three nodes, with states of the interpolant.
        """
        nodes, weights = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5), (5 / 18, 8 / 18, 5 / 18)
        K = self.refined(window, s, K)
        at = lambda theta: increment(self.base(theta, s), window.h, self.dense_weights(theta), K)
        return nodes, weights, [at(jnp.asarray(c, window.h.dtype)) for c in nodes]

    def errors(self, h: Array, K: list[State], s: State, s1: State) -> list[State]:
        """The method's estimates of the local error of a step from s to s1."""
        return [combine(h, row, K) for row in self.error]

    def pullback_nfe(self, dense: bool) -> int:
        """Evaluations that `pullback` takes, each differentiated too."""
        return self.trials + self.extra if dense else self.evaluations

    def pullback(self, window: Window, s: State, dense: bool, rolled: bool) -> tuple[State | None, Callable]:
        """The slopes K, stacked (with `dense`), and the map from cotangents of the next state and K to those of s and the window.

        The map takes (s̄, k̄, total), total like `window.moving`, and returns the cotangent of s, and the total with that of the
        window added. `rolled` asks for stages in a loop, where a method knows how.
        """

        def forward(s: State, moving: tuple) -> tuple[State, State | None]:
            inside = window.at(moving)
            if not dense:
                return self.step(inside, s).state, None
            state, slopes = self.whole(inside, s)
            return state, stack(slopes)

        (_, K), back = jax.vjp(forward, s, window.moving)

        def pull(sbar: State, kbar: State | None, total: tuple) -> tuple[State, tuple]:
            bar, moved = back((sbar, kbar))
            return bar, add(total, moved)

        return K, pull


def _horner(coefficients: tuple[float, ...], theta: Array) -> Array:
    total = coefficients[-1] * theta
    for c in reversed(coefficients[:-1]):
        total = (total + c) * theta
    return total
