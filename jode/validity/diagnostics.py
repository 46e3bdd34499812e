"""What else tells an ODE from a discrete map: trajectories that cross, errors that do not converge, steps that err much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from jode.control import Fixed
from jode.ivp import odeint
from jode.method import Method


def crossings(paths: Array, *, tolerance: float = 1e-5) -> Array:
    """Which trajectories cross: an array (B, B) of bools for paths (B, T, d), d = 1 or 2, joined by straight lines.

    Solutions of an autonomous ODE never do: in one dimension they keep their order at all times, in two their orbits have no
    point in common. Paths of a residual network or of coarse steps may, which is how they separate what no flow separates. What
    happens within `tolerance` times the largest coordinate does not count: neither orbits that merely touch, nor parts of one
    orbit, if they are sampled so finely that chords leave it by less. A crossing exactly at a corner of a path may be missed.
    O(B² T) for d = 1, O(B² T²) for d = 2.
    """
    paths = jnp.asarray(paths)
    if paths.ndim != 3 or paths.shape[2] not in (1, 2):
        raise ValueError(
            f"crossings: paths must have shape (B, T, d), d = 1 or 2, got {paths.shape}; in space no curves need cross"
        )
    paths = paths if jnp.issubdtype(paths.dtype, jnp.floating) else paths.astype(jnp.result_type(float))
    near = tolerance * jnp.max(jnp.abs(paths), initial=0.0)
    if paths.shape[2] == 1:
        x = paths[..., 0]
        gap = x[:, None, :] - x[None, :, :]
        return jnp.any(gap > near, axis=-1) & jnp.any(gap < -near, axis=-1)

    def side(a: Array, b: Array, c: Array) -> Array:
        """Which side of the line from a to b the point c lies on; 0 where it is near."""
        u, v = b - a, c - a
        area = u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
        return jnp.where(jnp.abs(area) > near * jnp.hypot(u[..., 0], u[..., 1]), jnp.sign(area), 0)

    def pair(p: Array, q: Array) -> Array:
        a, b = p[:-1, None], p[1:, None]
        c, d = q[None, :-1], q[None, 1:]
        return jnp.any((side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0))

    crossed = jax.lax.map(lambda p: jax.vmap(pair, (None, 0))(p, paths), paths)
    return crossed & ~jnp.eye(len(paths), dtype=bool)


@dataclass(frozen=True)
class Convergence:
    """A model's error against its step counts, coarse to fine.

    `order` is the slope with which errors approach that of the finest steps; `plateau` whether refining beyond the training
    steps leaves the error as it is; `valid` whether both say that the model is an ODE.
    """

    method: Method
    steps: tuple[int, ...]
    errors: np.ndarray
    trained: int
    order: float
    plateau: bool

    @property
    def valid(self) -> bool:
        return self.plateau and self.order >= self.method.order - 0.5

    def __str__(self) -> str:
        lines = ["| steps | error |", "|---:|---:|"]
        for n, e in zip(self.steps, self.errors, strict=True):
            lines.append(f"| {n}{' (trained)' if n == self.trained else ''} | {e:.3e} |")
        settled = "the error stays" if self.plateau else "the error does not stay"
        verdict = "an ODE" if self.valid else "not an ODE"
        return "\n".join(lines) + f"\n\norder {self.order:.2f} of {self.method.order}; refined, {settled}: {verdict}"


def convergence(
    error: Callable[[Fixed], Any], method: Method, steps: Sequence[int], *, trained: int | None = None, tolerance: float = 0.1
) -> Convergence:
    """The convergence test of Krishnapriyan et al. 2022: with ever smaller steps a model's error must settle, at the method's
    order.

    Args:
        error: error(solver) -> the model's error against data, a pure function of the solver, smooth in what the model predicts.
        method: the method the model was trained with.
        steps: at least four step counts, each twice the last.
        trained: the one it was trained with, by default the first.
        tolerance: how far, relative to the error in training, the error of finer steps may be from it.

    A model that is an ODE has e(h) = e(0) + O(h^p): differences of successive errors fall by 2^p, and beyond the training
    step nothing changes. One that is not is at its best at the training step, and worse with finer ones.
    """
    counts = np.asarray(steps)
    if len(counts) < 4 or counts.dtype.kind not in "iu" or counts[0] < 1 or np.any(counts[1:] != 2 * counts[:-1]):
        raise ValueError(f"convergence: steps must be at least four positive ints, each twice the last, got {list(steps)}")
    trained = int(counts[0]) if trained is None else trained
    if trained not in counts[:-1]:
        raise ValueError(f"convergence: trained = {trained} must be among the steps {list(steps)}, with finer ones after it")
    errors = np.array([float(error(Fixed(method, int(n)))) for n in counts])
    beyond = errors[list(counts).index(trained) :]
    plateau = bool(np.all(np.abs(beyond - beyond[0]) <= tolerance * np.abs(beyond[0])))  # not with a NaN
    return Convergence(method, tuple(int(n) for n in counts), errors, trained, _order(errors[-4:]), plateau)


def _order(errors: np.ndarray) -> float:
    """The rate at which differences of successive errors fall: infinite once they are rounding, NaN where there is none."""
    if not np.all(np.isfinite(errors)):
        return float("nan")
    gaps = np.abs(np.diff(errors))
    above = np.flatnonzero(gaps > 8 * np.finfo(np.float32).eps * np.abs(errors).max())
    if len(above) < 2:
        return float("inf") if above.sum() == 0 else float("nan")  # none, or the coarsest alone
    return float(np.polyfit(above, -np.log2(gaps[above]), 1)[0])


def local_errors(f: Callable, y0: Any, span: tuple[float, float], args: Any = None, *, solver: Fixed) -> Array:
    """An estimate of the error of each step of a solve, (steps,): ‖y(h) - y(h/2, h/2)‖ / (1 - 2^-p), p the order.

    One step and two half steps are an embedded pair for any method (Richardson), here started from each state of the training
    solve. Their sum estimates the global error where the flow neither contracts nor expands. Costs three times the solve.
    """
    if isinstance(solver, Fixed):
        solver = solver.checked(y0).over(np.asarray(span, float))
    if not (isinstance(solver, Fixed) and isinstance(solver.steps, int)):
        raise TypeError(f"local_errors: solver must be jode.Fixed with a Python int of steps, got {solver!r}")
    ts = jnp.linspace(*span, solver.steps + 1)
    ys = odeint(f, y0, ts, args, solver=Fixed(solver.method, 1))

    def one(t0: Array, t1: Array, y: Any) -> Array:
        step, halves = (odeint(f, y, jnp.stack([t0, t1]), args, solver=Fixed(solver.method, k)) for k in (1, 2))
        squared = jnp.sum(jnp.abs(ravel_pytree(jax.tree.map(lambda a, b: a[-1] - b[-1], step, halves))[0]) ** 2)
        exact = squared == 0  # where a norm has no derivative: take 0
        return jnp.where(exact, 0, jnp.sqrt(jnp.where(exact, 1, squared)))

    before = jax.tree.map(lambda y: y[:-1], ys)
    return jax.vmap(one)(ts[:-1], ts[1:], before) / (1 - 2.0**-solver.method.order)
