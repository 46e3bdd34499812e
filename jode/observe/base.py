"""What may be kept while marching: by a user for one trajectory, and inside the loop for all rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.tree import State
from jode.window import Problem, Window


def nothing() -> float:
    """What tables hold where nothing is: NaN; infinity while JAX looks for NaNs, for none of these is a mistake."""
    config: Any = jax.config
    return math.inf if config.jax_debug_nans else math.nan


class Seen(NamedTuple):
    """A step tried: its window, the method's state at its start, the slopes, which rows took it (None: all), the time that each row
    has then reached, and the step's number where that is known beforehand, as on the way back. node: which of ts it stands at then,
    where steps end at given times.
    """

    window: Window
    s: State
    slopes: list[State]
    accept: Any
    t: Any
    slot: Any
    node: Any = ()
    s1: Any = ()  # the method's state at its end


class Bars(NamedTuple):
    """Cotangents, as a step goes back, of its width, its start, its state, its slopes (stacked) and its end; of the given times;
    and of shared parameters.
    """

    h: Array
    t: Array
    s: State
    slopes: State
    ts: Array
    end: State
    shared: list


class Watch:
    """An observer inside the loop, for all rows at once. Its carry is one more part of the loop's. It is told of every step tried,
    and if it waits for something the loop stops where that is due and serves it.
    """

    waits: bool = False
    ends: Any = 0  # at which of its entries trajectories end, where it says so in `over` of its carry; 0: at none
    slopes: bool = False  # whether it needs the slopes of a step, at its end too
    resets: bool = False  # whether rows are reset where it says so
    by_row: bool = False  # whether its carry has the rows last, so that some of them may go on without the others

    def init(self, march: Any, problem: Problem, c: Any) -> Any:
        """Its carry at the start, given the loop's, without observers."""
        raise NotImplementedError

    def step(self, march: Any, problem: Problem, carry: Any, seen: Seen) -> Any:
        """Its carry after a step was tried."""
        raise NotImplementedError

    def due(self, march: Any, problem: Problem, carry: Any, c: Any) -> Callable[[Any], Array]:
        """Whether it must be served before the next step, as a function of the control's carry; c is the loop's now."""
        raise NotImplementedError

    def serve(self, march: Any, problem: Problem, carry: Any, due: Array, c: Any) -> Any:
        """Its carry after it was served; where it is not due, another is."""
        raise NotImplementedError

    def pull(
        self, march: Any, problem: Problem, next_: Any, seen: Seen, K: Any, g: Any, values: Any, bars: Bars
    ) -> tuple[Any, Bars]:
        """Its transpose at one step, of slopes K (stacked): cotangents g of what it saw, whose values are given, are added to bars.
        `next_` is what it carries on the way back.
        """
        raise NotImplementedError


ROUNDINGS = 64


def roundings(method: Any) -> float:
    """How many units in the last place a state may be off by rounding after some steps, or on the method's interpolant, whose
    coefficients are larger than their sum.
    """
    return ROUNDINGS + max(abs(c) for row in method.dense for c in row)


def rounding(method: Any, ts: Array) -> Array:
    """Times of a solve that differ by no more than this are the same one."""
    return roundings(method) * jnp.finfo(ts.dtype).eps * jnp.maximum(jnp.abs(ts[0]), jnp.abs(ts[-1]))


def slack(march: Any, ts: Array) -> Any:
    """How far behind the end of a step times are looked for: where an event may end or reset a row, to rounding, what is at its
    time is before it.
    """
    return rounding(march.method, ts) if march.may_end or march.resetting else 0.0


def within(problem: Problem, t: Array, a: Array, h: Array, sign: Array, slack: Any) -> Array:
    """Whether a time that was looked for is of the step from a: behind the end of the one before, or of the first that moves."""
    ahead = sign * (t - a)
    return (ahead > slack) | ((ahead > 0) & (a == problem.ts[0]) & (h != 0))
