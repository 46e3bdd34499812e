"""Training that stays valid: the step, or the tolerance, is as large as the test allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from jode.control import Adaptive, Fixed
from jode.method import Method, dopri5, euler, heun, midpoint


def first_step(f: Callable, y0: Any, args: Any = None, *, order: int = 1, t0: float = 0.0, span: float = 1.0) -> Array:
    """The step to begin with, a fraction of the span and at most 1, for a batch y0 of initial states.

    Hairer, Nørsett & Wanner I, section II.4, with means over the batch:

    d0 = mean ‖y0‖, d1 = mean ‖f(y0)‖, h_a = 0.01 d0 / d1, d2 = mean ‖f(y0 + h_a f) - f(y0)‖ / h_a, h_b = (0.01 / max(d1,
    d2))^(1/(p+1)), and the step is min(100 h_a, h_b): one where a step of the method errs by about 0.01.
    """

    def norms(y: Any) -> Array:
        return jnp.mean(jax.vmap(lambda y: jnp.linalg.norm(ravel_pytree(y)[0]))(y))

    def at(y: Any, t: Array) -> Any:
        return jax.vmap(lambda y: f(t, y, args))(y)

    t = jnp.asarray(t0, jax.tree.leaves(y0)[0].real.dtype)
    k = at(y0, t)
    d0, d1 = norms(y0), norms(k)
    a = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / jnp.where(d1 > 0, d1, 1))
    there = jax.tree.map(lambda y, k: y + a.astype(y.dtype) * k, y0, k)
    d2 = norms(jax.tree.map(jnp.subtract, at(there, t + a), k)) / a
    slope = jnp.maximum(d1, d2)
    b = jnp.where(slope < 1e-15, jnp.maximum(1e-6, 1e-3 * a), (0.01 / jnp.where(slope > 0, slope, 1)) ** (1 / (order + 1)))
    return jnp.minimum(jnp.minimum(100 * a, b) / abs(span), 1.0)


class StepState(NamedTuple):
    """A pytree of arrays: it checkpoints, and resumes bit for bit. `h` is the step, as a fraction of the interval."""

    h: Array
    iteration: Array


class Check(NamedTuple):
    """What an update found: whether it `checked`, and the metric under the test solver and with the larger step.

    What was not measured is -inf.
    """

    checked: Array
    tested: Array
    grown: Array


@dataclass(frozen=True)
class StepAdaptation:
    """The largest step with which a model trains as an ODE: Ott et al. 2021, Algorithm 2, and an end to it.

    Every `every` iterations the batch is evaluated under a `test` method of higher order, with a step of which the nominal
    error is `finer` times smaller, h_test = min(h, (h^p / finer)^(1/q)), p and q the orders. A change of accuracy beyond
    `threshold` halves the step (towards `max_steps`, halfway there); otherwise it grows by a tenth if, so grown, it still
    agrees with the test.

    That is the paper's rule, `StepAdaptation()`. It never ends: steps grow until they are too coarse, and a model that stops
    just then is no ODE. Given how many `iterations` there will be, the last of them, a fraction `settle`, make an end: steps
    grow no more, and halve wherever the change exceeds `settled`. The model then trains on with steps on the fine side.

        adapt = StepAdaptation(iterations=10_000)
        state = adapt.init(first_step(f, y0, args))
        ...                                              # in the training step, which is traced once:
        solver = adapt.solver(state)                     # Fixed, with a step count that is data
        state, check = adapt.update(state, accuracy, metric)

    The interval is cut into ⌈1/h⌉ equal steps: the published code shortens the last one instead.
    """

    method: Method = euler
    test: Method = midpoint
    every: int = 50
    threshold: float = 0.1
    shrink: float = 0.5
    grow: float = 1.1
    finer: float = 50.0
    largest: float = 1.0
    max_steps: int = 500
    iterations: int | None = None
    settle: float = 0.05
    settled: float = 0.02

    def init(self, h: Any) -> StepState:
        """The state that starts with step h, a fraction of the interval; see `first_step`."""
        h = jnp.clip(jnp.asarray(h, jnp.float32), 1 / self.max_steps, self.largest)
        return StepState(jnp.where(jnp.isnan(h), 1 / self.max_steps, h), jnp.zeros((), jnp.int32))

    def steps(self, h: Array) -> Array:
        """⌈1/h⌉, within rounding: 1/50 makes 50 steps."""
        return jnp.clip(jnp.ceil((1 - 1e-5) / h), 1, self.max_steps).astype(jnp.int32)

    def solver(self, state: StepState) -> Fixed:
        """The solver to train with now."""
        return Fixed(self.method, self.steps(state.h), max_steps=self.max_steps)

    def tester(self, state: StepState) -> Fixed:
        """The solver to test it with."""
        p, q = self.method.order, self.test.order
        h = jnp.minimum(state.h, (state.h**p / self.finer) ** (1 / q))
        return Fixed(self.test, self.steps(h), max_steps=self.max_steps)

    def update(self, state: StepState, accuracy: Array, metric: Callable[[Fixed], Array]) -> tuple[StepState, Check]:
        """The next state.

        Args:
            state: that of this iteration.
            accuracy: of the training forward pass of this iteration.
            metric: metric(solver) -> the accuracy of the same batch with the same weights, those before this iteration's update.
        """
        accuracy = jnp.asarray(accuracy, jnp.float32)
        last = state.iteration >= round((1 - self.settle) * self.iterations) if self.iterations else jnp.zeros((), bool)
        threshold = jnp.where(last, self.settled, self.threshold)

        def check(h: Array) -> tuple[Array, Check]:
            tested = jnp.asarray(metric(self.tester(state)), jnp.float32)
            off = ~(jnp.abs(tested - accuracy) <= threshold)
            larger = jnp.minimum(self.grow * h, self.largest)

            def try_larger(_: Any) -> Array:
                return jnp.asarray(metric(self.solver(StepState(larger, state.iteration))), jnp.float32)

            grown = jax.lax.cond(off | last, lambda _: -jnp.float32(jnp.inf), try_larger, None)
            smaller = jnp.where(1 / (self.shrink * h) > self.max_steps, 2 * h / (self.max_steps * h + 1), self.shrink * h)
            agrees = jnp.abs(tested - grown) <= self.threshold
            h = jnp.where(off, jnp.maximum(smaller, 1 / self.max_steps), jnp.where(agrees, larger, h))
            return h, Check(jnp.ones((), bool), tested, grown)

        h, found = _if_due(self.every, state.iteration, check, state.h)
        return StepState(h, state.iteration + 1), found


def _if_due(every: int, iteration: Array, check: Callable, x: Array) -> tuple[Array, Check]:
    """check(x) where another `every` iterations are over, and x as it is elsewhere."""
    nothing = -jnp.float32(jnp.inf)
    unchecked = Check(jnp.zeros((), bool), nothing, nothing)
    return jax.lax.cond((iteration + 1) % every == 0, check, lambda x: (x, unchecked), x)


class ToleranceState(NamedTuple):
    """A pytree of arrays: the tolerance, the iteration, and the evaluations of the last iterations."""

    tol: Array
    iteration: Array
    history: Array


@dataclass(frozen=True)
class ToleranceAdaptation:
    """The largest tolerance with which a model trains as an ODE: Ott et al. 2021, supplement, with its constants as fields.

    As `StepAdaptation`, for adaptive solvers. The test solver's tolerance is `finer` times smaller (5 with another method, 10
    with the same), and again ten times smaller as long as it takes no more evaluations than the training solver. A tolerance
    that grows is refused where it changes accuracy, and where it does not change the evaluations from those of the last
    `patience` iterations.
    """

    method: Method = heun
    test: Method = dopri5
    every: int = 50
    threshold: float = 0.1
    shrink: float = 0.5
    grow: float = 1.1
    finer: float | None = None
    patience: int = 5
    first: float = 1e-6
    smallest: float = 1e-7
    largest: float = 1.0
    max_steps: int = 4096

    def init(self, tol: Any = None) -> ToleranceState:
        """The state that starts with this tolerance, by default `first`."""
        tol = jnp.asarray(self.first if tol is None else tol, jnp.float32)
        return ToleranceState(tol, jnp.zeros((), jnp.int32), jnp.full(self.patience, -1.0, jnp.float32))

    def solver(self, state: ToleranceState) -> Adaptive:
        """The solver to train with now: rtol = atol = the tolerance, which is data."""
        return self._adaptive(self.method, state.tol)

    def _adaptive(self, method: Method, tol: Array) -> Adaptive:
        return Adaptive(method, tol, tol, max_steps=self.max_steps)

    def update(
        self, state: ToleranceState, accuracy: Array, nfe: Array, metric: Callable[[Adaptive], tuple[Array, Array]]
    ) -> tuple[ToleranceState, Check]:
        """The next state.

        Args:
            state: that of this iteration.
            accuracy: of the training forward pass of this iteration.
            nfe: its evaluations of the batch, however they are counted.
            metric: metric(solver) -> (accuracy, nfe) of the same batch with the weights before this iteration's update.
        """
        accuracy, nfe = jnp.asarray(accuracy, jnp.float32), jnp.asarray(nfe, jnp.float32)
        history = jnp.roll(state.history, -1).at[-1].set(nfe)
        finer = (10.0 if self.test == self.method else 5.0) if self.finer is None else self.finer

        def measure(method: Method, tol: Array) -> tuple[Array, Array]:
            found, count = metric(self._adaptive(method, tol))
            return jnp.asarray(found, jnp.float32), jnp.asarray(count, jnp.float32)

        def check(tol: Array) -> tuple[Array, Check]:
            def too_coarse(carry: tuple) -> Array:
                tol_test, _, count = carry
                return (count <= nfe) & (tol_test > self.smallest)

            def tighten(carry: tuple) -> tuple:
                tol_test = carry[0] / 10
                return tol_test, *measure(self.test, tol_test)

            start = tol / finer
            _, tested, _ = jax.lax.while_loop(too_coarse, tighten, (start, *measure(self.test, start)))
            off = ~(jnp.abs(tested - accuracy) <= self.threshold)
            larger = jnp.minimum(self.grow * tol, self.largest)
            nothing = -jnp.float32(jnp.inf)
            grown, count = jax.lax.cond(off, lambda _: (nothing, nothing), lambda _: measure(self.method, larger), None)
            idle = jnp.all(history == count)  # the tolerance may grow for ever where the steps do not change
            agrees = (jnp.abs(tested - grown) <= self.threshold) & ~idle
            tol = jnp.where(off, jnp.maximum(self.shrink * tol, self.smallest), jnp.where(agrees, larger, tol))
            return tol, Check(jnp.ones((), bool), tested, grown)

        tol, found = _if_due(self.every, state.iteration, check, state.tol)
        return ToleranceState(tol, state.iteration + 1, history), found
