"""What a user keeps of every step: a fold over the steps taken, marched beside the state: adjoints that store states differentiate
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.method import Method, Step
from jode.tree import State
from jode.window import Window


class Observer:
    """A number, or a pytree of floating arrays, that starts at init(t, y, args) and becomes step(kept, t, y, args) after every step
    taken, (t, y) being where it ends. Both are pure, for one trajectory. Subclasses are hashable values (frozen dataclasses).

    `solve(..., observe=...)` takes one or a pytree of them; `Solution.observed` has what they kept at the end, and it has
    gradients.
    """

    def init(self, t: Array, y: Any, args: Any) -> Any:
        """What is kept at the initial time."""
        raise NotImplementedError

    def step(self, kept: Any, t: Array, y: Any, args: Any) -> Any:
        """What is kept after a step that ends at (t, y)."""
        raise NotImplementedError


def observing(f: Callable, observers: list[Observer]) -> Callable:
    """Of a pair (y, kept): its slope, with none for what is kept, and what is kept at (t, y)."""

    def pair(t: Array, pair: tuple, args: Any) -> tuple:
        y, kept = pair
        after = [o.step(k, t, y, args) for o, k in zip(observers, kept, strict=True)]
        after = jax.tree.map(lambda a, k: jnp.asarray(a, k.dtype), after, kept)
        return (f(t, y, args), jax.tree.map(jnp.zeros_like, kept)), after

    return pair


@dataclass(frozen=True)
class Observed(Method):
    """A method for pairs (y, kept): y takes its step, and what is kept is that of its end. Errors are those of y alone.

    measured: how many components of each packed vector belong to y; they come first. Takes no evaluation of f.
    """

    method: Method
    measured: tuple[int, ...]

    def __post_init__(self) -> None:
        names = (
            "order",
            "embedded_order",
            "evaluations",
            "trials",
            "starts",
            "extra",
            "parts",
            "growth",
            "error",
            "dense",
            "jacobians",
            "stability",
            "solves",
        )
        self.__dict__.update({name: getattr(self.method, name) for name in names})

    def for_steps(self, most: int) -> Observed:
        return replace(self, method=self.method.for_steps(most))

    def start(self, y: State, slope: Callable[[], State]) -> State:
        return self.method.start(y, slope)

    def step(self, window: Window, s: State, slope: Any = ()) -> Step:
        step, rows = self.method.step(window, s, slope), window.rows
        # Methods that mix copies of the state would mix what is kept too: it goes on from the start of the step.
        ends = zip(step.state, s, self.measured, strict=False)
        y1 = tuple(rows.replaced_after(n, x, before) for x, before, n in ends)
        return step._replace(state=(*window.after(y1), *step.state[len(y1) :]))

    def looked_at(self, window: Window, s: State, step: Step) -> Step:
        """By the copies of y alone: what is kept beside it says nothing of them."""
        rows, sizes = window.rows, self.measured * self.method.parts
        cut = lambda xs: tuple(rows.leading(x, n) for x, n in zip(xs, sizes, strict=False))
        alone = step._replace(state=cut(step.state), slopes=[cut(k) for k in step.slopes])
        looked = self.method.looked_at(window, cut(s), alone).state
        rest = (jax.lax.slice_in_dim(x, n, None, axis=rows.component_axis) for x, n in zip(step.state, sizes, strict=True))
        return step._replace(state=tuple(map(lambda *xs: rows.joined(xs), looked, rest)))

    def inverse(self, window: Window, s1: State) -> State:
        raise NotImplementedError(
            "what an observer kept before a step cannot be told from what it keeps after it: use jode.Backprop"
        )

    def reused(self, slope: State) -> Any:
        return self.method.reused(slope)

    def estimated(self, window: Window, s: State, step: Step) -> Step:
        return self.method.estimated(window, s, step)

    def refined(self, window: Window, s: State, K: list[State]) -> list[State]:
        return self.method.refined(window, s, K)

    def pullback_nfe(self, dense: bool) -> int:
        return self.method.pullback_nfe(dense)

    def base(self, theta: Array, s: State) -> State:
        return self.method.base(theta, s)

    def errors(self, h: Array, K: list[State], s: State, s1: State) -> list[State]:
        return self.method.errors(h, K, s, s1)
