"""Steps known beforehand: equal ones between save times, or one a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.control.base import Grid, Solver, Status, as_known, concrete
from jode.method import Method, Step
from jode.runner import Compiled, Runner
from jode.tree import State, depth_of, take
from jode.window import Problem, Window

_static: Any = partial(field, metadata={"static": True})


_MOST = 2**30  # steps in an interval


class Taken(NamedTuple):
    """The carry of the control: whether a step of a row had a system that was not solved, a column, for a method that says so; and
    the states before resets, where they are kept.
    """

    unsolved: Any = ()
    before: Any = ()


class Equal(Solver):
    """As many equal steps in each interval between save times, which all rows take at once."""

    def count(self, march: Any, problem: Problem) -> Any:
        """Steps between save times: an int, or data that may differ by row."""
        return march.plan.steps if march.plan.steps is not None else problem.numbers["steps"]

    def bound(self, march: Any, problem: Problem) -> Any:
        """Steps between save times; the largest of the rows' where each has its own."""
        return march.plan.steps if march.plan.steps is not None else jnp.max(problem.numbers["steps"])

    def slots(self, march: Any, problem: Problem) -> Any:
        return (march.plan.saves - 1) * self.bound(march, problem)

    def entry(self, march: Any, problem: Problem, i: Array) -> Array:
        """The place of the state before step i in a table: the same for every bound, which rows of other batches may not share."""
        if march.plan.steps is not None or not march.plan.most:
            return i
        bound = self.bound(march, problem)
        return i // bound * (march.plan.most // (march.plan.saves - 1)) + i % bound

    def span(self, march: Any, problem: Problem, a: Array, b: Array, k: Array) -> tuple[Array, Array]:
        """Time and width of step k of the interval [a, b]; rows that want fewer steps than others then stand still (`standing`)."""
        steps = self.count(march, problem)
        h = (b - a) / (steps if isinstance(steps, int) else steps.astype(a.dtype))
        t = a + k.astype(a.dtype) * h
        if jnp.ndim(steps) or jnp.ndim(h):
            # Widths by row are made in the loop even where all rows take all steps: XLA on a CPU otherwise keeps them spread over
            # the state, and no longer sees that Backsolve asks for a stage twice (24 ms became 28 for a perceptron).
            h = jnp.where(k < steps, h, 0)
        return t, h

    def init(self, march: Any, problem: Problem, s: State, slope: State | None) -> Taken:
        return Taken(march.rows.spread(jnp.zeros((), bool)) if self.method.solves else ())

    def window(self, march: Any, problem: Problem, place: tuple, carry: Taken) -> Window:
        a, b, k, i = place
        return march.window(problem, *self.span(march, problem, a, b, k), i)

    def judge(self, march: Any, problem: Problem, carry: Taken, window: Window, s: State, step: Step) -> tuple[Any, Taken]:
        if self.method.solves:
            carry = carry._replace(unsolved=carry.unsolved | ~march.rows.spread(step.ok))
        return (None if window.still is None else ~window.still), carry

    def drive(self, march: Any, problem: Problem, loop: Any, c: Any) -> tuple[Any, Any]:
        bound = self.bound(march, problem)

        def interval(j: Array, c: Any) -> tuple[Any, Any]:
            a, b = take(problem.ts, j), take(problem.ts, j + 1)
            c, _ = march.runner.repeat(bound, lambda k, c: (loop.attempt((a, b, k, j * bound + k), c), None), c)
            return self.between(march, problem, j + 1, c), march.saved_as(c.s)

        return march.runner.repeat(march.plan.saves - 1, interval, c)

    def standing(self, march: Any, problem: Problem, i: Any, h: Array) -> Array | None:
        """Rows that take fewer steps than others stand still when theirs are taken. A step between equal times is none of these: it
        has no width, and a derivative by it.
        """
        steps = self.count(march, problem)
        return i % self.bound(march, problem) >= steps if jnp.ndim(steps) else None

    def rests(self, march: Any, problem: Problem, seen: Any) -> Array:
        """At the end of the last step of an interval that ends at a stop or jump, or at the last save time: others, whose steps do
        not move, may come after it at the same time.
        """
        bound, i, ts = self.bound(march, problem), seen.slot, march.save_times(problem)
        j = jnp.asarray(i // bound + 1, jnp.int32)
        last = (march.rows.pick(ts, j) == ts[-1]) | march.interrupted(problem, j)
        return march.rows.spread(last & (i % bound == self.count(march, problem) - 1))

    def report(self, march: Any, problem: Problem, c: Any, good: Array, slope: Any) -> tuple[Array, Array, Array, Array]:
        lost = jnp.full(good[-1].shape, int(Status.nonfinite_state))
        if march.method.solves:
            lost = jnp.where(c.control.unsolved, int(Status.linear_solve), lost)
        if march.method.parts > 1:  # `Method.looked_at` left the other copies finite
            n = len(problem.y0)
            lost = jnp.where(march.rows.finite(c.s[-n:]) & ~march.rows.finite(c.s[:n]), int(Status.unstable), lost)
        status = jnp.where(good[-1], int(Status.success), lost)
        last = jnp.maximum(jnp.sum(good, axis=0, dtype=jnp.int32) - 1, 0)  # what is not finite stays so
        steps = (march.plan.saves - 1) * jnp.asarray(self.count(march, problem), jnp.int32)
        return status.astype(jnp.int32), march.rows.pick(problem.ts, last), steps, steps

    def ends(self, march: Any, problem: Problem, grid: Grid, i: Array, left: Any = None) -> tuple[tuple, Callable]:
        bound = self.bound(march, problem)
        j, k = i // bound, i % bound
        return (j, j + 1), lambda a, b: self.span(march, problem, a, b, k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fixed(Equal):
    """`steps` equal steps of `method` between consecutive save times.

    A Python int makes a pure `lax.scan`; an integer array (or a tracer) makes a loop whose length is data, so that changing
    it does not recompile. Global error O(h^p); cost `steps` × stages evaluations per interval. `max_steps` bounds a traced
    count where an adjoint must store every state. A traced count below 1 or above `max_steps` ends in `Status.invalid_input`.

    `width`, given instead of `steps`, says how wide a step may be, up to the rounding of times: `steps` is then

        max over intervals of ⌈|t_{i+1} - t_i| / width⌉,

    the same in every interval, that of the longest. It is a Python int where ts and `width` are known when traced, and else a
    traced count. Without `steps` and `width` one step is taken in each interval.
    """

    method: Method = _static()
    steps: Any = None
    max_steps: int | None = _static(default=None)
    runner: Runner = _static(default=Compiled())
    width: Any = None

    def checked(self, y0: Any) -> Fixed:
        """`steps` as a Python int, or an int32 array; or `width` as an array."""
        if self.width is not None:
            return self._checked_width()
        steps = 1 if self.steps is None else self.steps
        if isinstance(steps, (int, np.integer)) and not isinstance(steps, bool):
            if steps < 1:
                raise ValueError(f"Fixed: steps must be at least 1, got {steps}")
            return replace(self, steps=int(steps))
        steps = as_known(steps, None)
        if steps.ndim or not jnp.issubdtype(steps.dtype, jnp.integer):
            raise TypeError(f"Fixed: steps must be an int or an integer scalar, got {self.steps!r}")
        if concrete(steps) and not 1 <= int(steps) <= (self.max_steps or int(steps)):
            bound = "" if self.max_steps is None else f" and at most max_steps = {self.max_steps}"
            raise ValueError(f"Fixed: steps must be at least 1{bound}, got {int(steps)}")
        return replace(self, steps=steps.astype(jnp.int32))

    def _checked_width(self) -> Fixed:
        if self.steps is not None:
            raise ValueError(f"Fixed: give steps or width, not both; got steps={self.steps!r} and width={self.width!r}")
        width = as_known(self.width, jnp.result_type(float))
        if width.ndim:
            raise ValueError(f"Fixed: width must be a scalar, got shape {width.shape}")
        if concrete(width) and not float(width) > 0:
            raise ValueError(f"Fixed: width must be above zero, got {float(width)}")
        return replace(self, width=width)

    def over(self, ts: Any) -> Fixed:
        """With the number of steps that `width` makes of the longest interval; 0, which is invalid, where there is none."""
        if self.width is None:
            return self
        known = concrete(ts) and concrete(self.width)
        xp, dtype = (np, np.float64) if known else (jnp, ts.dtype)
        eps, times, width = float(jnp.finfo(ts.dtype).eps), ts.astype(dtype), self.width.astype(dtype)
        # An interval that is a whole number of widths but for rounding takes that number of steps.
        longest = xp.max(xp.abs(times[1:] - times[:-1]), axis=0) - 4 * eps * xp.max(xp.abs(times), axis=0)
        count = xp.maximum(xp.ceil(longest / width * (1 - 4 * eps)), 1)
        if known and not count <= (self.max_steps or _MOST):
            raise ValueError(
                f"Fixed: width={float(width)} makes {count:.0f} steps of an interval, more than {self.max_steps or _MOST}"
            )
        steps = int(count) if known else jnp.where((width > 0) & (count <= _MOST), count, 0).astype(jnp.int32)
        return replace(self, steps=steps, width=None)

    def valid(self) -> Array | bool:
        if isinstance(self.steps, int):
            return True
        return (self.steps >= 1) & (self.steps <= (self.max_steps or jnp.iinfo(jnp.int32).max))

    @property
    def numbers(self) -> dict:
        return {} if isinstance(self.steps, int) else {"steps": self.steps}

    @property
    def static(self) -> Fixed:
        return self if isinstance(self.steps, int) else replace(self, steps=None)

    def steps_between(self, intervals: int, layers: int | None) -> int | None:
        return self.steps if isinstance(self.steps, int) else None

    def most_steps(self, intervals: int, steps: int | None) -> int:
        return intervals * (steps or self.max_steps or 0)


@dataclass(frozen=True)
class Axes:
    """A pytree of 0 and None, as a value that can be hashed."""

    treedef: Any
    axes: tuple

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.treedef, self.axes)

    def __repr__(self) -> str:
        return repr(self.tree)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layers(Equal):
    """One step of `method` for each slice along the leading axis of arrays in `args`: a residual network.

    The N layers are divided evenly among the intervals between save times, so t runs over [ts[0], ts[-1]]: with
    `euler` and ts = (0, N) layer n is x + f(n, x, w_n), with ts = (0, 1) it is x + f(n/N, x, w_n) / N.

    `degree` is that of the weights as a piecewise polynomial of depth: with 0 a step sees one slice, with 1 the slices are the
    weights at the N nodes of N - 1 steps, and a stage sees the line between two of them: with `heun` the network of Sander,
    Ablin & Peyré 2022. Other leaves than floating ones are those of the step's first node.

    `depth_axes` says which arrays have that axis, like `in_axes` of `jax.vmap`: 0 or None, or a pytree of them with the structure
    of args or a prefix of it. An array with None is the same at every step, and its gradient is the sum over steps.
    """

    method: Method = _static()
    degree: int = _static(default=0)
    depth_axes: Any = _static(default=0)
    runner: Runner = _static(default=Compiled())

    layered = True

    def __post_init__(self) -> None:
        if not isinstance(self.depth_axes, (int, Axes)):
            axes, treedef = jax.tree.flatten(self.depth_axes, is_leaf=lambda x: x is None)
            object.__setattr__(self, "depth_axes", Axes(treedef, tuple(axes)))

    def refusal(self) -> str | None:
        axes = self.depth_axes.axes if isinstance(self.depth_axes, Axes) else (self.depth_axes,)
        if not all(a is None or (type(a) is int and a == 0) for a in axes):
            return f"Layers: depth_axes must hold 0 (one slice per step) and None (the same at every step) alone, got {axes}"
        if self.degree not in (0, 1):
            return f"Layers: degree must be 0 (one slice per step) or 1 (slices at the nodes), got {self.degree!r}"
        return None

    def leading(self, args: Any) -> list[bool]:
        axes = self.depth_axes.tree if isinstance(self.depth_axes, Axes) else self.depth_axes
        below = lambda axis, part: [axis == 0 and isinstance(x, jax.Array) for x in jax.tree.leaves(part)]
        try:
            return jax.tree.leaves(jax.tree.map(below, axes, args, is_leaf=lambda x: x is None))
        except ValueError as e:
            raise ValueError(
                f"Layers: depth_axes must have the structure of args, {jax.tree.structure(args)}, or of a prefix of it; got {axes}"
            ) from e

    def depth(self, args: Any, name: str = "args") -> int:
        """How many slices the arrays that have depth lead with."""
        return depth_of([x for x, lead in zip(jax.tree.leaves(args), self.leading(args), strict=True) if lead], name)

    def layers(self, args: Any, intervals: int) -> int:
        depth = self.depth(args)
        steps = depth - self.degree
        if steps < 1 or steps % intervals:
            raise ValueError(
                f"Layers: {depth} layers make {max(steps, 0)} steps, which do not divide evenly among the {intervals} intervals "
                "between save times"
            )
        return depth

    def steps_between(self, intervals: int, layers: int | None) -> int | None:
        return ((layers or 0) - self.degree) // intervals

    def most_steps(self, intervals: int, steps: int | None) -> int:
        return intervals * (steps or 0)
