"""Forward-mode derivatives alone: of few inputs, without any memory of the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jode.adjoint.rule import Adjoint
from jode.march import March, Outcome, Problem
from jode.native import only_forward


@dataclass(frozen=True)
class ForwardMode(Adjoint):
    """Derivatives along a direction (`jax.jvp`, `jax.jacfwd`, forward over forward), and none in reverse.

    The tangent is marched beside the state, step for step on the grid that the solve takes, so it is the exact derivative of
    the numbers computed. It costs about one more evaluation of f per stage and direction, in the memory of the solve. All adjoints
    differentiate so in forward mode; this one says in words that reverse mode was not meant.
    """

    def solve(self, plan: Any, problem: Problem) -> Outcome:
        outcome = super().solve(plan, problem)
        ys = only_forward(outcome.ys, "ForwardMode has no reverse mode: use jode.Backprop() under jax.grad, jax.vjp and jax.jacrev")
        return outcome._replace(ys=ys)

    def record(self, march: March, problem: Problem) -> tuple[Outcome, Any]:
        return march.run(problem), ()
