"""The continuous adjoint: a second initial value problem, solved backwards in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.adjoint.rule import Adjoint, contained, drift, failed
from jode.control import Solver
from jode.march import Cotangents, March, Outcome, Problem, inner, numbers_to_layout
from jode.observe import Seen, Watch
from jode.tree import State, add, real_dtype, stack, take, where, zeros_like
from jode.window import Params


@dataclass(frozen=True)
class Backsolve(Adjoint):
    """The gradient of the exact flow (Chen et al. 2018), from a solve of y and its adjoint a from t1 back to t0.

        da/dt = -(∂f/∂y)ᵀ a,    θ̄ = -∫ (∂f/∂θ)ᵀ a dt,    t̄0 = -Σ <f(t_i), g_i> - ∫ aᵀ ∂f/∂t dt,    t̄_i = <f(t_i), g_i>,

    where a jumps by the cotangent g_i at save time t_i and y restarts from the state saved there. Memory does not depend on the
    number of steps. The gradient is not that of the numbers computed: it is off by about the tolerance of both solves.

    `solver` is that of the way back (`Fixed` or `Adaptive`, of a Runge-Kutta or Rosenbrock method), by default the one of the
    solve. Its steps are controlled by y and a alone, where a component of a has the absolute tolerance of that component of y;
    the integrals for θ and t0 are quadratures over the steps taken (the seminorm of Kidger, Chen & Lyons 2021). Where y cannot be
    solved backwards (its solutions contract, or are chaotic) the way back strays from the states saved: rows off by more than
    `max_drift` of their size, or whose way back fails, get NaN for a gradient.
    """

    solver: Any = None
    max_drift: float = 0.1

    sees_steps = False

    def __post_init__(self) -> None:
        if self.solver is not None and (not isinstance(self.solver, Solver) or self.solver.layered):
            raise TypeError(f"Backsolve: solver must be jode.Fixed, jode.Adaptive or None, got {self.solver!r}")

    def refusal(self, solver: Any) -> str | None:
        back = self.solver or solver
        if back.layered:
            return (
                "Backsolve solves an ODE backwards, and layers are not one: use MemoryFree or Backprop, or "
                "jode.depth.field, which makes an ODE of them"
            )
        if back.method.parts > 1:
            return (
                f"Backsolve needs a Runge-Kutta or Rosenbrock method on the way back, and {back.method!r} carries more than y: "
                "give Backsolve(solver=...)"
            )
        if getattr(back.method, "bands", None) is not None:
            return (
                "Backsolve goes back along the state and its adjoint, whose Jacobian has no bands: "
                "give Backsolve(solver=...) without them, or use Backprop"
            )
        return f"Backsolve: {refusal}" if (refusal := back.refusal()) else None

    def counted(self, plan: Any, rows: int, outcome: Outcome) -> Outcome:
        """The way back chooses its own steps, later."""
        return outcome._replace(stats=outcome.stats._replace(nfe_backward=jnp.zeros_like(outcome.stats.nfe_backward)))

    def record(self, march: March, problem: Problem, sized: int) -> tuple[Outcome, Any]:
        return march.run(problem), ()

    def pull(self, march: March, problem: Problem, outcome: Outcome, kept: Any, bars: tuple) -> tuple:
        rows = march.rows
        lost = failed(march, outcome)
        ys = tuple(rows.to_layout(x, True, 1) for x in outcome.ys)
        back = lambda problem, g, good: _solve_back(self, march, good, ys, problem, g.ys)
        return contained(march, problem, outcome, lost & ~rows.column(outcome.good)[1], bars, back)


@dataclass(frozen=True, eq=False)
class Integrals(Watch):
    """-∫ (∂f/∂(θ, t))ᵀ a dt: each step adds -h Σ b_i (∂f/∂(θ, t))ᵀ a_i, by the quadrature of its method."""

    march: March  # of the solve, whose field is not augmented

    def init(self, march: March, problem: Problem, c: Any) -> tuple:
        return zeros_like(problem.params.shared), march.rows.spread(jnp.zeros((), problem.ts.dtype))

    def step(self, march: March, problem: Problem, carry: tuple, seen: Seen) -> tuple:
        window, s, params = seen.window, seen.s, problem.params
        nodes, weights, states = march.method.quadrature(window, s, seen.slopes)
        accept = jnp.asarray(True if seen.accept is None else seen.accept)
        states = [where(accept, x, s) for x in states]  # a step that was rejected may hold NaN, which no weight of 0 takes away
        t, h, m = window.t, jnp.where(accept, window.h, 0), len(s) // 2
        nodes, weights, stages = jnp.asarray(nodes, h.dtype), jnp.asarray(weights, h.dtype), stack(states)

        def stage(sums: tuple, xs: tuple) -> tuple:
            c, b, s = xs
            weight = -b * h
            F = lambda t, shared: self.march.F(t, s[:m], params._replace(shared=shared))
            _, back = jax.vjp(F, t + c * h, params.shared)
            tbar, shared = back(tuple(weight.astype(real_dtype(x.dtype)).astype(x.dtype) * x for x in s[m:]))
            return (add(sums[0], shared), sums[1] + tbar), None

        return jax.lax.scan(stage, carry, (nodes, weights, stages))[0]


def _solve_back(adjoint: Backsolve, march: March, good: Array, ys: State, problem: Problem, g: State) -> tuple:
    """Cotangents of the problem, and the rows whose way back failed or drifted."""
    rows, ts, params, F = march.rows, problem.ts, problem.params, march.F
    ys = tuple(jnp.where(rows.over_time(good), x, y[None]) for x, y in zip(ys, problem.y0, strict=True))
    m = len(ys)

    def augmented(F: Callable) -> Callable:
        def field(t: Array, s: State, params: Params) -> State:
            k, back = jax.vjp(lambda y: F(t, y, params), s[:m])
            return (*k, *(-x for x in back(s[m:])[0]))

        return field

    solver, numbers, steps = march.solver, problem.numbers, march.plan.steps
    if adjoint.solver is not None:
        given = adjoint.solver.checked(march.plan.layout.like).over(ts)
        solver, steps = given.static, given.steps_between(1, None)
        numbers = jax.tree.map(jnp.asarray, given.numbers)
        numbers = numbers_to_layout(rows, numbers, jax.tree.map(lambda _: False, numbers))
    numbers = {k: (*x, *x) if isinstance(x, tuple) else x for k, x in numbers.items()}  # by component of y, and of a
    plan = replace(march.plan, solver=solver, saves=2, steps=steps)
    back = replace(march, plan=plan, F=augmented(F), alone=augmented(march.alone), jac=None)

    def interval(carry: tuple, i: Array) -> tuple:
        a, shared, t0bar, wrong = carry
        y, gi = take(ys, i), take(g, i)
        start, end = ts[i], ts[i - 1]
        here = inner(rows, F(rows.spread(start), y, params), gi).astype(ts.dtype)
        a = add(a, gi)
        idle = ~take(good, i)  # a row without cotangents from there on; others may have them in a derivative alone
        span = jnp.stack([jnp.where(idle, end, start), rows.spread(end)])
        c, _, _ = back.march(Problem(span, (*y, *a), params, numbers), (Integrals(march),))
        (y, a), (shared_i, tbar) = (c.s[:m], c.s[m:]), c.observed[0]
        lost = ~(drift(march, y, take(ys, i - 1), ys) <= adjoint.max_drift)
        if not solver.lands:
            lost = lost | ~solver.arrived(span, c.control)
        return (a, add(shared, shared_i), t0bar - here + tbar, wrong | (lost & ~idle)), here

    zero = rows.spread(jnp.zeros((), ts.dtype))
    init = (tuple(jnp.zeros_like(x[0]) for x in g), zeros_like(params.shared), zero, zero > 0)
    order = jnp.arange(march.plan.saves - 1, 0, -1, dtype=jnp.int32)
    (a, shared, t0bar, wrong), heres = jax.lax.scan(interval, init, order)
    tsbar = jnp.concatenate([t0bar[None], heres[::-1]])
    if rows.size is not None and problem.ts.ndim == 1:
        tsbar = jnp.sum(tsbar, axis=(1, 2))
    a = add(a, tuple(x[0] for x in g))
    return Cotangents(a, tsbar.reshape(problem.ts.shape), shared, zeros_like(params.layers), None, None), wrong
