"""Steps chosen by their error: the grid is found while marching."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.control.base import Grid, Solver, Status, concrete
from jode.control.stiffness import stability_limited
from jode.control.tolerance import Norm, absolute_tolerance, checked_number, scaled_norm
from jode.method import Method, Step, tsit5
from jode.runner import Compiled, Runner
from jode.tree import State, increment, nan_unless, real_dtype, where, zeros_like
from jode.window import Problem, Window

_static: Any = partial(field, metadata={"static": True})

ROUNDING = 100  # ulp of the state that the narrowest step may err by


class Progress(NamedTuple):
    """The carry of the control, in columns: the time reached, the width of the next step (0 where a row is done), the scaled
    errors of the last steps; how many steps were accepted and tried, and how often the loop ran; whether the last step that was
    not accepted had a system that was not solved, for a method that says so; the time from which the narrowest step was tried; and
    by how much tolerances are loosened for the next step, of every row that takes one.
    """

    t: Array
    h: Array
    errors: tuple[Array, ...]
    accepted: Array
    tried: Array
    loops: Array
    unsolved: Any
    narrowed: Array
    loose: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adaptive(Solver):
    """Steps chosen so that the estimated local error stays below atol + rtol |y| (root mean square over the state).

    A PID controller sets the next step: h ← h · clip(safety · e^-(i+p+d)/q · e₋₁^(p+2d)/q · e₋₂^-d/q), e the scaled error
    and q the order of the estimate plus one; (p, i, d) = (0, 1, 0) is the classical controller. The first step is
    Hairer's (Hairer, Norsett & Wanner I, section II.4) unless given. Save times never force a step: states there are
    interpolated to the method's own quality. At most `max_steps` steps are tried. Tolerances below 4 ulp of the state's
    dtype are raised to that. A step that cannot shrink, some ten ulp of t wide, is judged as if `rtol` were 100 ulp, and `atol`
    larger by the same factor, where they are less: across a jump of f none errs less. What errs more ends in
    `Status.step_underflow`.

    `max_step` > 0, if given, bounds the width of every step, the first one too, whichever way time runs. A state at rest lets
    steps grow until they pass over a short event whole, and no error estimate sees it: half the width of the shortest event
    that matters is a bound which does. Then at least |ts[-1] - ts[0]| / `max_step` steps are taken.

    `atol` is a number, or a pytree with the structure of y0, or a prefix of that, whose leaves broadcast against those of y0: then
    each component has its own. `Backsolve` weighs a component of the adjoint as it does that component of the state, unless its
    own `solver` says otherwise.

    `norm`, if given, replaces the root mean square: norm(e) -> a scalar that must stay below 1, of the scaled errors of one
    trajectory, |error| / (atol + rtol |y|), real and with the structure of y0. It is static: equal functions share a program, and
    it must not close over traced values.
    """

    method: Method = _static(default=tsit5)
    rtol: Any = 1e-6
    atol: Any = 1e-6
    max_steps: int = _static(default=4096)
    first_step: Any = None
    max_step: Any = None
    pcoeff: float = _static(default=0.0)
    icoeff: float = _static(default=1.0)
    dcoeff: float = _static(default=0.0)
    safety: float = _static(default=0.9)
    factor_min: float = _static(default=0.2)
    factor_max: float = _static(default=10.0)
    norm: Any = _static(default=None)
    runner: Runner = _static(default=Compiled())

    estimates = True
    lands = False

    def refusal(self) -> str | None:
        if self.method.embedded_order is None:
            return (
                f"Adaptive needs a method that estimates its error, and {self.method!r} has no embedded method: "
                "use tsit5 or another of order 2 to 8, rodas5p for stiff problems, or Fixed"
            )
        return None

    def checked(self, y0: Any) -> Adaptive:
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"Adaptive: max_steps must be a positive int, got {self.max_steps!r}")
        dtypes = [real_dtype(x.dtype) for x in jax.tree.leaves(y0)] or [jnp.result_type(float)]
        floor = 4 * max(float(jnp.finfo(d).eps) for d in dtypes)
        numbers = {name: checked_number(name, x) for name, x in self.numbers.items() if name != "atol"}
        numbers["atol"] = atol = absolute_tolerance(self.atol, y0)
        rtol, atols = numbers["rtol"], jax.tree.leaves(atol)
        if all(map(concrete, (rtol, *atols))) and float(rtol) == 0 and any((np.asarray(x) == 0).any() for x in atols):
            raise ValueError("Adaptive: rtol and atol are both zero; no step can meet that: give at least one a positive value")
        if concrete(rtol) and 0 < float(rtol) < floor:
            warnings.warn(
                f"Adaptive: rtol={float(rtol):.1e} is below the resolution of the state's dtype; {floor:.1e} is used", stacklevel=4
            )
        xp = np if concrete(rtol) else jnp
        numbers["rtol"] = xp.where(rtol > 0, xp.maximum(rtol, xp.asarray(floor, rtol.dtype)), rtol)
        return replace(self, **numbers, norm=None if self.norm is None else Norm.of(self.norm, y0))

    def valid(self) -> Array | bool:
        every = lambda x: jnp.all(x) if x.ndim else x
        valid: Any = True
        for x in jax.tree.leaves(self.atol):
            some = every((self.rtol > 0) | (x > 0))
            valid = some if valid is True else valid & some
        for name, given in self.numbers.items():
            for x in jax.tree.leaves(given):
                valid = valid & every(x > 0) if name == "max_step" else valid & every(x >= 0) & every(jnp.isfinite(x))
        return valid

    @property
    def numbers(self) -> dict:
        return {name: x for name in ("rtol", "atol", "first_step", "max_step") if (x := getattr(self, name)) is not None}

    @property
    def static(self) -> Adaptive:
        return replace(self, **dict.fromkeys(self.numbers, 0))

    def most_steps(self, intervals: int, steps: int | None) -> int:
        return self.max_steps

    def started(self, march: Any, problem: Problem) -> tuple[State, Problem]:
        """A long field is evaluated twice in one place: for the slope, and for the width of the first step."""
        if not march.long or self.marked or "first_step" in problem.numbers:
            return march.slope(problem), problem
        ts, t0, y0 = march.save_times(problem), march.rows.spread(problem.ts[0]), problem.y0
        sign, span = direction(ts), jnp.abs(ts[-1] - t0)
        norm = partial(scaled_norm, self.norm, march.rows, march.method.measured, problem.numbers)

        def evaluate(i: Array, carry: tuple) -> tuple:
            t, y, slope, _ = carry
            k = march.F(t, y, problem.params)
            slope = where(i == 0, k, slope)
            guess, *_ = _guess(norm, t0, span, y0, slope)
            return t0 + sign * guess, increment(y0, sign * guess, (1.0,), [slope]), slope, k

        _, _, slope, ahead = jax.lax.fori_loop(0, 2, evaluate, (t0, y0, y0, y0))
        width = _first_step(march.method.embedded_order or 0, lambda t, y: ahead, norm, t0, sign, span, y0, slope, None)
        return slope, problem._replace(numbers={**problem.numbers, "first_step": width})

    def init(self, march: Any, problem: Problem, s: State, slope: State | None) -> Progress:
        assert slope is not None
        t0 = march.rows.spread(problem.ts[0])
        width = self.first_width(march, problem, t0, march.method.read(s), slope)
        zero = jnp.zeros(t0.shape, jnp.int32)
        errors = (jnp.ones_like(t0),) * (2 if self.dcoeff else 1 if self.pcoeff else 0)
        h = reach(march.save_times(problem)[-1], t0, width)
        unsolved = zero > 0 if self.method.solves else ()
        never = jnp.full_like(t0, jnp.inf)
        return Progress(
            t0, h, errors, zero, zero, jnp.zeros((), jnp.int32), unsolved, never, jnp.ones_like(problem.numbers["rtol"])
        )

    def first_width(self, march: Any, problem: Problem, t: Array, y: State, slope: State) -> Array:
        """The width of a first step from t, where no step says how wide it may be."""
        ts = march.save_times(problem)
        sign = direction(ts)
        F = lambda t, y: march.F(t, y, problem.params)
        norm = partial(scaled_norm, self.norm, march.rows, march.method.measured, problem.numbers)
        given = problem.numbers.get("first_step")
        width = _first_step(march.method.embedded_order or 0, F, norm, t, sign, jnp.abs(ts[-1] - t), y, slope, given)
        width = sign * jnp.maximum(width, 2 * _resolution(t))  # a state at rest says nothing about the scale of time
        return _bounded(problem, width)

    def running(self, c: Progress, few: int = 0) -> Array:
        """Whether more than `few` rows want another step."""
        wanted = jnp.sum(c.h != 0, dtype=jnp.int32) > few if few else jnp.max(jnp.abs(c.h), initial=0) > 0
        return (c.loops < self.max_steps) & wanted

    def window(self, march: Any, problem: Problem, place: None, carry: Progress) -> Window:
        return march.window(problem, carry.t, carry.h, None)

    def judge(self, march: Any, problem: Problem, carry: Progress, window: Window, s: State, step: Step) -> tuple[Any, Progress]:
        c, h, t1 = carry, carry.h, self.target(march, problem, carry)
        active = self.wants(carry)
        t_new = jnp.where(h == t1 - c.t, t1, c.t + h)
        loose = {name: jax.tree.map(lambda x: x * c.loose.astype(x.dtype), problem.numbers[name]) for name in ("rtol", "atol")}
        numbers = {**problem.numbers, **loose}
        norm = partial(scaled_norm, self.norm, march.rows, march.method.measured, numbers)
        e = jax.lax.stop_gradient(_error(march.method, norm, h, s, step))
        accept = (active | self._stands(march, problem, c)) & (e <= 1)
        t = jnp.where(accept, t_new, c.t)
        errors = (jnp.maximum(e, 1e-4).astype(h.dtype), *c.errors)
        errors = tuple(jnp.where(accept, a, b) for a, b in zip(errors, c.errors, strict=False))
        # Where an event may end a row, no step ends a rounding before the end: what is seen there is of both.
        near = jnp.where(accept, _resolution(t), 0) if march.may_end else 0.0
        h = reach(t1, t, _bounded(problem, h * self._factor(e, c.errors).astype(h.dtype)), near)
        accepted, tried = c.accepted + (accept & active).astype(jnp.int32), c.tried + active.astype(jnp.int32)
        c = c._replace(t=t, h=h, errors=errors, accepted=accepted, tried=tried, loops=c.loops + 1, loose=jnp.ones_like(c.loose))
        if self.method.solves:
            c = c._replace(unsolved=jnp.where(active & ~accept, ~march.rows.spread(step.ok), c.unsolved))
        return accept, self.judged(march, problem, c, accept)

    def target(self, march: Any, problem: Problem, c: Any) -> Array:
        """The time that the next step must not pass."""
        return march.save_times(problem)[-1]

    def _stands(self, march: Any, problem: Problem, c: Any) -> Any:
        """Rows whose solve goes over no time: to observers they take a first step that does not move. It is not counted."""
        if not march.plan.watches:
            return False
        return (c.loops == 0) & (c.h == 0) & (c.t == march.save_times(problem)[-1])

    def halted(self, carry: Any, rows: Array) -> Any:
        return carry._replace(h=jnp.where(rows, 0, carry.h), narrowed=jnp.where(rows, carry.t, carry.narrowed))

    def loosened(self, march: Any, problem: Problem, narrow: Array) -> Array:
        """How many times the tolerances the next step may err by: if it is the narrowest, up to `ROUNDING` ulp."""
        eps = max((float(jnp.finfo(real_dtype(d)).eps) for d in march.plan.layout.dtypes), default=0.0)
        rtol = problem.numbers["rtol"]
        return jnp.where(narrow & (rtol > 0), jnp.maximum(ROUNDING * eps / rtol, 1), 1).astype(rtol.dtype)

    def narrowest(self, march: Any, problem: Problem, c: Any) -> Any:
        """The carry after no row wants a step: those that want one as narrow as none is take the narrowest, once."""
        t1 = self.target(march, problem, c)
        stuck = ~((c.t == t1) | (c.t == c.narrowed) | jnp.any(self.wants(c)))
        least = 1.2 * _resolution(c.t)
        width = (c.t + jax.lax.clamp(-least, t1 - c.t, least)) - c.t
        loose = self.loosened(march, problem, jnp.any(stuck))
        stuck = stuck & (loose > 1)
        return c._replace(h=jnp.where(stuck, width, c.h), narrowed=jnp.where(stuck, c.t, c.narrowed), loose=loose)

    def continued(self, march: Any, problem: Problem, c: Any, loops: Any) -> Any:
        """The carry of some of the rows, or of all again, with what is common to all of them: how often the loop ran (or None)."""
        narrow = jnp.any((c.h != 0) & (c.t == c.narrowed))
        return c._replace(loops=loops, loose=None if loops is None else self.loosened(march, problem, narrow))

    def wants(self, c: Any) -> Array:
        """Rows that want another step."""
        return c.h != 0

    def judged(self, march: Any, problem: Problem, c: Any, accept: Array) -> Any:
        """The carry after a step was judged."""
        return c

    def drive(self, march: Any, problem: Problem, loop: Any, c: Any) -> tuple[Any, Any]:
        running = partial(self.running, few=march.few)
        wanted = (lambda c: (c.loops == 0) | running(c)) if march.plan.watches else running

        return loop.until_due(wanted, c), None

    def standing(self, march: Any, problem: Problem, i: Any, h: Array) -> Array | None:
        return h == 0 if march.rows.size is not None else None

    def unfinished(self, carry: Progress) -> Array:
        """Rows that want another step and may take one."""
        return (carry.h != 0) & (carry.loops < self.max_steps)

    def arrived(self, ts: Array, carry: Progress) -> Array:
        """Rows that arrived at the last save time."""
        return carry.t == ts[-1]

    @property
    def nfe_start(self) -> int:
        """Evaluations at the start: one for the slope, and one more for the first step's width."""
        return 2 if self.first_step is None else 1

    def rests(self, march: Any, problem: Problem, seen: Any) -> Array:
        return (seen.t == march.save_times(problem)[-1]) | march.interrupted(problem, seen.node)

    def report(self, march: Any, problem: Problem, c: Any, good: Array, slope: State) -> tuple[Array, Array, Array, Array]:
        rows, p = march.rows, c.control
        unmoved = (p.accepted == 0) & ~rows.finite(slope)
        stuck = jnp.where(unmoved, int(Status.nonfinite_dynamics), int(Status.step_underflow))
        status = jnp.where(p.h == 0, stuck, int(Status.max_steps))
        status = jnp.where(p.unsolved, int(Status.linear_solve), status) if self.method.solves else status
        stiff = stability_limited(march, problem, p.h != 0, p.t, p.h, c.s, c.slope)
        status = jnp.where(stiff, int(Status.stiff), status)
        status = jnp.where(self.arrived(march.save_times(problem), p), int(Status.success), status)
        status = jnp.where(rows.finite(march.method.read(c.s)), status, int(Status.nonfinite_state))
        return status.astype(jnp.int32), p.t, p.tried, p.accepted

    def ends(self, march: Any, problem: Problem, grid: Grid, i: Array, left: Any = None) -> tuple[tuple, Callable]:
        """Times found are constants; a row's first step starts at ts[0], and its last one, if it arrived, ends at ts[-1].

        left: how many of its accepted steps a row has taken after this one; for derivatives alone, which ask where times come from.
        """
        start = jnp.where(i == 0, grid.start, grid.times[jnp.maximum(i - 1, 0)])
        end = grid.times[i]
        if left is None:
            return (0, march.plan.saves - 1), lambda a, b: (start, end - start)
        moved = end != start
        first, last = moved & (left == 1), moved & (left == grid.accepted) & grid.arrived
        span = lambda a, b: (t := jnp.where(first, a, start), jnp.where(last, b, end) - t)
        if not march.plan.watches:
            return (0, march.plan.saves - 1), span
        stands = (i == 0) & (grid.accepted == 0)  # where no step moved, what is seen at the start moves with it
        return (0, march.plan.saves - 1), lambda a, b: (jnp.where(stands, a, span(a, b)[0]), span(a, b)[1])

    def _factor(self, e: Array, memory: tuple[Array, ...]) -> Array:
        """What the next step is multiplied by; a trial that left the domain (NaN) shrinks as far as allowed."""
        order = 1 + (self.method.embedded_order or 0)
        p, i, d = self.pcoeff / order, self.icoeff / order, self.dcoeff / order
        factor = -(i + p + d) * jnp.log(jnp.maximum(e, jnp.finfo(e.dtype).tiny))
        for power, old in zip((p + 2 * d, -d), memory, strict=False):
            factor = factor + power * jnp.log(old.astype(e.dtype))
        factor = self.safety * jnp.exp(factor)
        factor = jnp.minimum(factor, jnp.where(e <= 1, self.factor_max, 1.0))
        return jnp.where(factor > self.factor_min, factor, self.factor_min)


def reach(t1: Array, t: Array, h: Array, near: Any = 0.0) -> Array:
    """The next step from t: cut at t1, or ending there where it comes so `near`, and 0 where it is too small to move t or not a
    number.

    It ends in a representable time, and the choice of that time is not differentiated.
    """
    left, h = t1 - t, jax.lax.stop_gradient(h)
    last = jnp.abs(h) >= jnp.abs(left) - near
    moves = jnp.abs(h) > _resolution(t)
    return jnp.where(last, left, jnp.where(moves, jax.lax.stop_gradient(t + h) - t, 0))


def _bounded(problem: Problem, h: Array) -> Array:
    """The step, no wider than `max_step` where that is given."""
    most = problem.numbers.get("max_step")
    return h if most is None else jnp.clip(h, -most.astype(h.dtype), most.astype(h.dtype))


def _resolution(t: Array) -> Array:
    """Steps must be wider than this: ten times the rounding of t."""
    return 10 * jnp.finfo(t.dtype).eps * jnp.abs(t)


def direction(ts: Array) -> Array:
    """The direction of time, 1 or -1."""
    return jnp.where(ts[-1] >= ts[0], 1, -1).astype(ts.dtype)


def _guard(estimate: State, s: State, slope: State) -> State:
    """The estimate, made NaN where a state or a slope is not finite, whether or not the estimate noticed."""
    parts = [s[i : i + len(slope)] for i in range(0, len(s), len(slope) or 1)]
    return tuple(e + (0 * reduce(jnp.add, xs)).astype(e.dtype) for e, *xs in zip(estimate, slope, *parts, strict=True))


def _error(method: Method, norm: Callable, h: Array, s: State, step: Step) -> Array:
    """The scaled error of a step from s, NaN if the step failed or left the domain."""
    s1, K = step.state, step.slopes
    estimates = [norm(_guard(e, s1, K[-1]), method.read(s), method.read(s1)) for e in method.errors(h, K, s, s1)]
    if step.ok is not None:
        estimates[0] = nan_unless(step.ok, estimates[0])
    if len(estimates) == 1:
        return estimates[0]
    fifth, third = estimates  # Hairer, Norsett & Wanner I, section II.10
    return fifth * fifth / jnp.sqrt(jnp.maximum(fifth * fifth + 0.01 * third * third, jnp.finfo(fifth.dtype).tiny))


def _first_step(
    order: int, F: Callable, norm: Callable, t0: Array, sign: Array, span: Array, y0: State, slope: State, given: Any
) -> Array:
    """The width of the first step, NaN where the state or its slope is not finite.

    Unless given it is that of Hairer, Norsett & Wanner I, section II.4: one whose Euler guess and second derivative look harmless.
    """
    if given is not None:
        return jnp.abs(given).astype(t0.dtype) + norm(_guard(zeros_like(y0), y0, slope), y0, y0).astype(t0.dtype)
    guess, d1, floor = _guess(norm, t0, span, y0, slope)
    ahead = F(t0 + sign * guess, increment(y0, sign * guess, (1.0,), [slope]))
    bend = tuple(a - b for a, b in zip(ahead, slope, strict=True))
    d2 = norm(bend, y0, y0) / jnp.where(guess == 0, 1, guess).astype(d1.dtype)
    worst = jnp.maximum(d1, d2)
    power = 1 / (order + 1)
    bold = jnp.exp(power * jnp.log(0.01 / jnp.where(worst <= 1e-15, 1, worst)))
    bold = jnp.where(worst <= 1e-15, jnp.maximum(1e-6, 1e-3 * guess.astype(worst.dtype)), bold)
    bold = jnp.where(jnp.isfinite(bold), bold, guess.astype(bold.dtype)).astype(t0.dtype)
    return nan_unless(~jnp.isnan(d1), jnp.maximum(jnp.minimum(100 * guess, bold), floor))


def _guess(norm: Callable, t0: Array, span: Array, y0: State, slope: State) -> tuple[Array, Array, float]:
    """The width of an Euler step that looks harmless; the size of the slope, and the least width."""
    d0, d1 = norm(y0, y0, y0), norm(_guard(slope, y0, slope), y0, y0)
    guess = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / jnp.where(d1 == 0, 1, d1))
    floor = float(jnp.finfo(t0.dtype).tiny) ** 0.5  # slopes so large that their norm overflows still get a first step
    return jnp.minimum(jnp.maximum(guess.astype(t0.dtype), floor), span), d1, floor
