"""The continuous adjoint: a second initial value problem, solved backwards in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.adjoint.rule import Adjoint, contained, drift, join, only_forward_over_reverse, only_in_reverse
from jode.batch import Batch, native
from jode.grid import Adaptive, Fixed, Status
from jode.march import Cotangents, Found, Known, Outcome, Plan, Problem, inner, march_of
from jode.method import RungeKutta, Stage
from jode.search import depart, travel
from jode.tree import State, add, increment, real_dtype, stack, take, zeros_like


@dataclass(frozen=True)
class Backsolve(Adjoint):
    """The gradient of the exact flow (Chen et al. 2018), from a solve of y and its adjoint a from t1 back to t0.

        da/dt = -(∂f/∂y)ᵀ a,    θ̄ = -∫ (∂f/∂θ)ᵀ a dt,    t̄0 = -Σ <f(t_i), g_i> - ∫ aᵀ ∂f/∂t dt,    t̄_i = <f(t_i), g_i>,

    where a jumps by the cotangent g_i at save time t_i and y restarts from the state saved there. Memory does not depend on the
    number of steps. The gradient is not that of the numbers computed: it is off by about the tolerance of both solves.

    `solver` is that of the way back (`Fixed` or `Adaptive`, of a Runge-Kutta method), by default the one of the solve. Its steps
    are controlled by y and a alone; the integrals for θ and t0 are quadratures over the steps taken (the seminorm of Kidger,
    Chen & Lyons 2021). Where y cannot be solved backwards (its solutions contract, or are chaotic) the way back strays from the
    states saved: rows off by more than `max_drift` of their size, or whose way back fails, get NaN for a gradient.
    """

    solver: Any = None
    max_drift: float = 0.1

    def __post_init__(self) -> None:
        if not (self.solver is None or isinstance(self.solver, (Fixed, Adaptive))):
            raise TypeError(f"Backsolve: solver must be jode.Fixed, jode.Adaptive or None, got {self.solver!r}")

    def refusal(self, solver: Any) -> str | None:
        back = self.solver or solver
        if not isinstance(back, (Fixed, Adaptive)):
            return (
                "Backsolve solves an ODE backwards, and layers are not one: use MemoryFree or Backprop, or "
                "jode.depth.field, which makes an ODE of them"
            )
        if not isinstance(back.method, RungeKutta):
            return f"Backsolve needs a Runge-Kutta method on the way back, not {back.method!r}: give Backsolve(solver=...)"
        if isinstance(back, Adaptive) and back.method.embedded_order is None:
            return f"Backsolve: Adaptive needs a method that estimates its error, and {back.method!r} does not"
        return None

    def solve(self, plan: Plan, problem: Problem) -> Outcome:
        return native(lambda batch: _differentiable(self, plan, batch), problem, promise=plan.promise)


def _differentiable(adjoint: Backsolve, plan: Plan, batch: Batch | None) -> Callable[[Problem], Outcome]:
    def run(rows: Batch | None) -> Callable[[Problem], Outcome]:
        march = march_of(plan, rows)

        def run(problem: Problem) -> Outcome:
            outcome = march.run(march.enter(problem))
            unknown = jnp.zeros((), jnp.int32)  # the way back chooses its own steps, later
            return march.leave(outcome._replace(stats=outcome.stats._replace(nfe_backward=unknown)))

        return run

    @jax.custom_vjp
    def solve(moving: tuple, still: tuple) -> Outcome:
        return run(batch)(join(moving, still))

    def forward(moving: tuple, still: tuple) -> tuple:
        problem = join(moving, still)
        outcome = native(run, problem, promise=plan.promise) if batch is None else run(batch)(problem)
        return outcome, (problem, outcome)

    def backward(residuals: tuple, bar: Outcome) -> tuple:
        problem, outcome = residuals
        march = march_of(plan, batch)
        rows = march.rows
        good = rows.column(outcome.good)
        failed = rows.column(outcome.status) != int(Status.success)
        ys = tuple(rows.enter(x, True, 1) for x in outcome.ys)
        pull = partial(_solve_back, adjoint, march, good, ys)
        return only_forward_over_reverse(contained(march, problem, good, failed & ~good[1], bar.ys, pull)), None

    solve.defvjp(forward, backward)
    return only_in_reverse(adjoint, solve)


def _solve_back(adjoint: Backsolve, march: Known | Found, good: Array, ys: State, problem: Problem, g: State) -> tuple:
    """Cotangents of the problem, and the rows that went astray."""
    rows, ts, params, F = march.rows, problem.ts, problem.params, march.F
    ys = tuple(jnp.where(rows.over_time(good), x, y[None]) for x, y in zip(ys, problem.y0, strict=True))

    def interval(carry: tuple, i: Array) -> tuple:
        a, shared, t0bar, wrong = carry
        y, gi = take(ys, i), take(g, i)
        start, end = ts[i], ts[i - 1]
        here = inner(rows, F(rows.spread(start), y, params), gi).astype(ts.dtype)
        a = add(a, gi)
        idle = _zero(rows, a)
        span = jnp.stack([jnp.where(idle, end, start), rows.spread(end)])
        (y, a), (shared_i, tbar), lost = _interval(adjoint, march, span, y, a, problem)
        lost = lost | ~(drift(march, y, take(ys, i - 1), ys) <= adjoint.max_drift)
        return (a, add(shared, shared_i), t0bar - here + tbar, wrong | (lost & ~idle)), here

    zero = rows.spread(jnp.zeros((), ts.dtype))
    init = (tuple(jnp.zeros_like(x[0]) for x in g), zeros_like(params.shared), zero, zero > 0)
    order = jnp.arange(march.plan.saves - 1, 0, -1, dtype=jnp.int32)
    (a, shared, t0bar, wrong), heres = jax.lax.scan(interval, init, order)
    tsbar = jnp.concatenate([t0bar[None], heres[::-1]])
    if rows.size is not None and problem.ts.ndim == 1:
        tsbar = jnp.sum(tsbar, axis=(1, 2))
    a = add(a, tuple(x[0] for x in g))
    return Cotangents(a, tsbar.reshape(problem.ts.shape), shared, zeros_like(params.layers), None), wrong


def _zero(rows: Any, a: State) -> Array:
    total = rows.spread(jnp.array(True))
    for x in a:
        total = total & rows.all(x == 0)
    return total


def _interval(adjoint: Backsolve, march: Known | Found, span: Array, y: State, a: State, problem: Problem) -> tuple:
    """Y and a at the end of the span, the integrals for the shared parameters and for t over it, and the rows that failed."""
    solver = adjoint.solver or march.plan.solver
    rows, method, params = march.rows, solver.method, problem.params
    m = len(y)

    def F(t: Array, s: State, shared: list) -> State:
        return march.F(t, s, params._replace(shared=shared))

    def augmented(t: Array, s: State) -> State:
        k, back = jax.vjp(lambda y: F(t, y, params.shared), s[:m])
        return (*k, *(-x for x in back(s[m:])[0]))

    def inside(t: Array, h: Array) -> Stage:
        return lambda c, s: augmented(t + c * h, s)

    def watch(sums: tuple, t: Array, h: Array, s: State, K: list[State], accept: Any) -> tuple:
        """The integrals with one step added: -h Σ b_i (∂f/∂(θ, t))ᵀ a_i over its stages."""
        tableau = method.tableau
        used = [i for i, b in enumerate(tableau.b) if b]
        stages = stack([increment(s, h, tableau.rows[i], K[:i]) for i in used])
        nodes, weights = (jnp.asarray([x[i] for i in used], h.dtype) for x in (tableau.c, tableau.b))

        def stage(sums: tuple, xs: tuple) -> tuple:
            c, b, s = xs
            weight = jnp.where(accept, -b * h, 0)
            _, back = jax.vjp(lambda t, shared: F(t, s[:m], shared), t + c * h, params.shared)
            tbar, shared = back(tuple(weight.astype(real_dtype(x.dtype)).astype(x.dtype) * x for x in s[m:]))
            return (add(sums[0], shared), sums[1] + tbar), None

        return jax.lax.scan(stage, sums, (nodes, weights, stages))[0]

    s, sums = (*y, *a), (zeros_like(params.shared), rows.spread(jnp.zeros((), span.dtype)))
    if isinstance(solver, Adaptive):
        numbers = problem.numbers if adjoint.solver is None else _numbers(solver)
        slope = augmented(rows.spread(span[0]), s)
        found = depart(solver, augmented, rows, span, s, slope, numbers, seen=sums)
        found = travel(solver, inside, rows, span, numbers, found, watch=watch)
        return (found.s[:m], found.s[m:]), found.seen, found.t != span[-1]
    steps = march.count(problem) if adjoint.solver is None and isinstance(march, Known) else solver.steps
    width = (span[1] - span[0]) / (steps if isinstance(steps, int) else steps.astype(span.dtype))

    def step(k: Array, carry: tuple) -> tuple:
        s, sums = carry
        h = jnp.where(k < steps, width, 0)
        t = span[0] + k.astype(h.dtype) * width
        K = method.slopes(inside(t, h), h, s)
        return increment(s, h, method.tableau.b, K), watch(sums, t, h, s, K, True)

    most = steps if isinstance(steps, int) else jnp.max(steps)
    s, sums = jax.lax.fori_loop(0, most, lambda k, carry: step(jnp.asarray(k, jnp.int32), carry), (s, sums))
    return (s[:m], s[m:]), sums, jnp.zeros_like(span[0], bool)


def _numbers(solver: Adaptive) -> dict:
    numbers = {"rtol": solver.rtol, "atol": solver.atol, "first_step": solver.first_step}
    return {k: jnp.asarray(v, jnp.result_type(float)) for k, v in numbers.items() if v is not None}
