"""Forward-mode derivatives: of few inputs, without any memory of the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jode.adjoint.rule import Adjoint
from jode.batch import Batch, native, only_forward
from jode.march import Outcome, Plan, Problem, march_of


@dataclass(frozen=True)
class ForwardMode(Adjoint):
    """Derivatives along a direction: `jax.jvp`, `jax.jacfwd`, and forward over forward.

    The tangent is marched beside the state, step for step on the grid that the solve takes, so it is the exact derivative of
    the numbers computed and agrees with `Backprop`. It costs about one more evaluation of f per stage and direction, in the
    memory of the solve. Hessian-vector products are forward over reverse: `jax.jvp` of `jax.grad` with `Backprop`.
    """

    def solve(self, plan: Plan, problem: Problem) -> Outcome:
        def form(batch: Batch | None) -> Callable:
            march = march_of(plan, batch)

            def run(problem: Problem) -> Outcome:
                outcome = march.leave(march.run(march.enter(problem)))
                ys = only_forward(
                    outcome.ys, "ForwardMode has no reverse mode: use jode.Backprop() under jax.grad, jax.vjp and jax.jacrev"
                )
                return outcome._replace(ys=ys)

            return run

        return native(form, problem, promise=plan.promise)
