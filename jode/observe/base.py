"""What may be kept while marching: by a user for one trajectory, and inside the loop for all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from jax import Array

from jode.tree import State
from jode.window import Window

if TYPE_CHECKING:
    from jode.march import March, Problem


class Seen(NamedTuple):
    """A step tried: its window, the method's state at its start, the slopes, which rows took it (None: all), the time that each row
    has then reached, and the step's number where that is known beforehand."""

    window: Window
    s: State
    slopes: list[State]
    accept: Any
    t: Any
    slot: Any


class Watch:
    """An observer inside the loop, for all rows at once. Its carry is one more part of the loop's."""

    waits: bool = False  # whether it is served only where `due` says so: the loop then steps on without it

    def init(self, march: March, problem: Problem, s: State, control: Any) -> Any:
        """Its carry at the start, given the method's state and the control's carry there."""
        raise NotImplementedError

    def due(self, march: March, problem: Problem, carry: Any) -> Callable[[Array], Array]:
        """Whether a row that has reached a time must be served before the next step, as a function of that time."""
        raise NotImplementedError

    def step(self, march: March, problem: Problem, carry: Any, seen: Seen) -> Any:
        """Its carry after a step was tried."""
        raise NotImplementedError
