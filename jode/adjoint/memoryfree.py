"""Gradients without stored states: the state at the start of each step is recovered by the inverse step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from jode.adjoint.discrete import Discrete
from jode.adjoint.rule import drift
from jode.march import Kept, March, Plan, Problem
from jode.method import Method
from jode.observe import Record
from jode.tree import State, real_dtype, take, where
from jode.tuning import GROWTH, SEGMENTS

AUTO = "auto"


@dataclass(frozen=True)
class MemoryFree(Discrete):
    """Backpropagation at recovered states: memory independent of the number of steps, at one more (inverse) step each.

    With the reversible methods the inverse is exact, and so is the gradient up to rounding. With Runge-Kutta methods it is
    that of Sander, Ablin & Peyré 2022: the exact formula at states that are off by O(h^p) (O(h^(p+1)) for even p) where the
    dynamics are smooth in depth. Save times of `Fixed` and `Layers` put Runge-Kutta states right again.

    `anchors=k` keeps the state that every k-th step starts from and restarts there; None keeps none. By default none are kept for
    `leapfrog`, `reversible_heun` and Runge-Kutta methods. For `Reversible` and `Momentum`, whose inverse lets rounding errors
    grow, it is 16 states, or more where over those distances they would grow more than a hundredfold in single precision, or
    1e4-fold in double. A row whose recovered initial state is off by more than
    `max_drift` of its size gets NaN for a gradient.
    """

    anchors: int | str | None = AUTO
    max_drift: float = 0.1

    def __post_init__(self) -> None:
        k = self.anchors
        if not (k is None or k == AUTO or (isinstance(k, int) and not isinstance(k, bool) and k >= 1)):
            raise ValueError(f"MemoryFree: anchors must be None or a positive int, got {k!r}")

    def refusal(self, solver: Any) -> str | None:
        if type(solver.method).inverse is not Method.inverse:
            return None
        return f"MemoryFree goes back by inverse steps, and {solver.method!r} has none: use jode.Backprop"

    def records(self, plan: Plan, rows: int) -> Record | None:
        keep = self._anchored(plan)
        return Record(keep, plan.most) if keep or not plan.solver.lands else None

    def _anchored(self, plan: Plan) -> int:
        """States are kept that steps 0, n, 2 n … start from; none where n is 0."""
        if self.anchors != AUTO:
            return int(self.anchors or 0) if plan.most else 0
        growth = math.log(plan.solver.method.growth)
        if not (growth and plan.most):
            return 0
        bits = min((jnp.finfo(real_dtype(d)).bits for d in plan.layout.dtypes), default=64)
        return min(math.ceil(math.log(1e4 if bits == 64 else GROWTH) / growth), math.ceil(plan.most / SEGMENTS))

    keeps_resets = True

    def again(self, plan: Plan, rows: int, steps: Array) -> Array:
        return steps

    def unrecoverable(self, march: March) -> bool:
        return march.solver.lands and march.method.parts > 1

    def recovery(self, march: March, problem: Problem, kept: Kept, ys: State) -> tuple[Any, Callable]:
        keep = self._anchored(march.plan)

        def recover(i: Array, s1: State) -> tuple[State, State]:
            s = march.invert(problem, kept, i, s1, ys)
            if keep:
                at = march.solver.entry(march, problem, i)
                s = where(at % keep == 0, take(kept.states, at // keep), s)
            return s, s

        return kept.last, recover

    def drifted(self, march: March, problem: Problem, first: State, ys: State) -> Array:
        return ~(drift(march, march.method.read(first), problem.y0, ys) <= self.max_drift)
