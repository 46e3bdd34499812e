"""What a solver is: a method, and a control that says which step comes next."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.method import Method, Step
from jode.runner import Runner
from jode.tree import State
from jode.window import Problem, Window

if TYPE_CHECKING:
    from jaxtyping import Int32


class Status(IntEnum):
    """Why a trajectory ended. Anything but `success` comes with NaN from the time it ended on; `event` is no failure.

    `unstable` is said by methods that carry more than y, under `Fixed`: their copies show that y has one correct digit at most.
    """

    success = 0
    max_steps = 1
    step_underflow = 2
    nonfinite_dynamics = 3
    nonfinite_state = 4
    invalid_input = 5
    capacity = 6
    event = 7
    stiff = 8
    linear_solve = 9
    unstable = 10


class Stats(NamedTuple):
    """What a solve cost, as int32 arrays, one number per trajectory.

    `nfe` counts evaluations of the vector field; `steps` = `accepted` + `rejected`. `nfe_backward` counts the evaluations
    that a gradient by the chosen adjoint takes besides: one per stage, each differentiated too, and those of steps taken again;
    zero where it is not known (`Backsolve`). On a CPU small states (32 components) take one more per stage, not counted. An
    implicit method evaluates `jacobians` besides (each of n + 1 forward derivatives of the field, not in `nfe`), and factorises as
    many matrices.
    """

    nfe: Int32[Array, ""]
    steps: Int32[Array, ""]
    accepted: Int32[Array, ""]
    rejected: Int32[Array, ""]
    nfe_backward: Int32[Array, ""]
    jacobians: Int32[Array, ""]


class Grid(NamedTuple):
    """The steps taken, in slots common to all rows: step i of a row ends at times[i], and starts where the last one ended, or
    at start.

    slots: how many. accepted: the steps of each row; in the other slots a row stands still. arrived: whether the last of them
    ends at the last save time. loops: how often the loop ran. nodes: where steps end at given times, which of ts each row stands at
    after each slot (-1: none), and at the start. All are () where steps follow from the save times.
    """

    slots: Any
    times: Any
    start: Any
    accepted: Any
    arrived: Any
    loops: Any
    nodes: Any = ()


class Solver:
    """A frozen dataclass of a method, the numbers of a control (data: they may be traced) and its bounds (static).

    Subclasses are pytrees (`jax.tree_util.register_dataclass`), and write what is below, where `march` is the `jode.march.March`
    that runs, and `carry` the control's part of what its loop carries. In the loop every row takes the step that `window` gives it,
    and a row that wants no step gets one of width zero.
    """

    method: Method
    runner: Runner
    estimates: ClassVar[bool] = False  # whether steps are judged by their error
    layered: ClassVar[bool] = False  # whether step n reads slice n of the arrays in args
    lands: ClassVar[bool] = True  # whether steps end at every save time; otherwise states there are interpolated
    marked: ClassVar[bool] = False  # whether something happens at some of ts: steps end there, and the state may be reset

    def refusal(self) -> str | None:
        """What is wrong with this solver, if anything is."""
        return None

    def checked(self, y0: Any) -> Any:
        """The solver with its numbers checked and made arrays."""
        return self

    def over(self, ts: Any) -> Any:
        """The checked solver with what follows from the times it goes over."""
        return self

    def valid(self) -> Array | bool:
        """Whether numbers that are traced are in their range."""
        return True

    @property
    def numbers(self) -> dict:
        """The numbers that are data."""
        return {}

    @property
    def static(self) -> Any:
        """The solver without its numbers."""
        return self

    def leading(self, args: Any) -> list[bool]:
        """Which leaves of args lead with depth."""
        return [self.layered and isinstance(x, jax.Array) for x in jax.tree.leaves(args)]

    def layers(self, args: Any, intervals: int) -> int | None:
        """How many layers args stack, for a solver whose steps read one each."""
        return None

    def steps_between(self, intervals: int, layers: int | None) -> int | None:
        """Steps between save times where that is a Python int."""
        return None

    def most_steps(self, intervals: int, steps: int | None) -> int:
        """A static bound on the number of steps; zero where none is known."""
        return 0

    def started(self, march: Any, problem: Problem) -> tuple[State, Problem]:
        """The slope at the initial time, and the problem for `init`, to whose numbers a control may add what it learned there."""
        return march.slope(problem), problem

    def init(self, march: Any, problem: Problem, s: State, slope: State | None) -> Any:
        """The control's own carry at the start, given the method's state and the slope there."""
        raise NotImplementedError

    def window(self, march: Any, problem: Problem, place: Any, carry: Any) -> Window:
        """The step that comes next; `place` is what `drive` says of where it is."""
        raise NotImplementedError

    def judge(self, march: Any, problem: Problem, carry: Any, window: Window, s: State, step: Step) -> tuple[Any, Any]:
        """Which rows take the step from s (a column of bools, or None: all), and the next carry."""
        raise NotImplementedError

    def drive(self, march: Any, problem: Problem, loop: Any, c: Any) -> tuple[Any, Any]:
        """Run the loop to the end; the last carry, and what was saved between intervals, stacked (None where nothing is)."""
        raise NotImplementedError

    def standing(self, march: Any, problem: Problem, i: Any, h: Array) -> Array | None:
        """Rows that stand still in step i, of width h, while others step: a column; None where none may. It is no step."""
        raise NotImplementedError

    def report(self, march: Any, problem: Problem, c: Any, good: Array, slope: Any) -> tuple[Array, Array, Array, Array]:
        """(status, time reached, steps tried, steps accepted) of each row, given the loop's last carry, which saved states are
        finite, and the slope at the start.
        """
        raise NotImplementedError

    def rests(self, march: Any, problem: Problem, seen: Any) -> Array:
        """Rows that come, by the step seen, to a time where nothing smooth goes on: the last save time, a stop or a jump."""
        raise NotImplementedError

    def bound(self, march: Any, problem: Problem) -> Any:
        """Steps between save times, of a solver that lands; the largest of the rows' where each has its own."""
        raise NotImplementedError

    def slots(self, march: Any, problem: Problem) -> Any:
        """Steps in all, of a solver that lands."""
        raise NotImplementedError

    def entry(self, march: Any, problem: Problem, i: Array) -> Array:
        """The place of the state before step i in a table of states."""
        return i

    def between(self, march: Any, problem: Problem, j: Array, c: Any) -> Any:
        """The loop's carry after what happens at ts[j], of a solver that lands."""
        return c

    def halted(self, carry: Any, rows: Array) -> Any:
        """The control's carry where some rows want no more steps; those of a solver that lands march on."""
        return carry

    def serve(self, march: Any, problem: Problem, c: Any) -> Any:
        """The loop's carry after what happens where rows have come to, of one that does not."""
        return c

    def reset_states(self, carry: Any) -> Any:
        """The states before resets that were kept, by the times they are of."""
        return ()

    def resets(self, march: Any, problem: Problem, carry: Any) -> Any:
        """Evaluations of f after resets, of each row."""
        return 0

    def limited(self, march: Any, problem: Problem, grid: Grid, i: Array, window: Window) -> Window:
        """The window of step i with the latest time that its stages may see."""
        return window

    def node(self, march: Any, problem: Problem, grid: Grid, i: Array) -> Array:
        """Which of ts step i of each row ends at, if something happens there; else -1."""
        raise NotImplementedError

    # A solver that does not land carries at least t and h, the time reached and the width of the next step, as columns (h is 0
    # where a row is done), how many steps each row has `accepted`, and how often the loop ran, `loops`. It also says:

    def arrived(self, ts: Array, carry: Any) -> Array:
        """Rows that arrived at the last save time."""
        raise NotImplementedError

    def unfinished(self, carry: Any) -> Array:
        """Rows that want another step and may take one."""
        raise NotImplementedError

    def narrowest(self, march: Any, problem: Problem, c: Any) -> Any:
        """The carry where no row wants a step, with those that are to try once more."""
        return c

    def continued(self, march: Any, problem: Problem, c: Any, loops: Any) -> Any:
        """The carry of some of the rows, or of all again, with what is common to all of them: how often the loop ran (or None)."""
        return c._replace(loops=loops)

    @property
    def nfe_start(self) -> int:
        """Evaluations of f before the first step."""
        return 1

    def ends(self, march: Any, problem: Problem, grid: Grid, i: Array, left: Any = None) -> tuple[tuple, Callable]:
        """How step i depends on given times: the places of two of them in ts, and a function of these that gives (t, h)."""
        raise NotImplementedError


def concrete(x: Any) -> bool:
    """Whether a value is known now, and no tracer."""
    return not isinstance(x, jax.core.Tracer)


def as_known(value: Any, dtype: Any) -> Any:
    """The number as an array, of NumPy where it is known: under a trace only those stay known."""
    return (np if concrete(value) else jnp).asarray(value, dtype)
