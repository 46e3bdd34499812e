"""Solve an initial value problem: checks once at the door, closes over once, and hands over to the adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.adjoint import Adjoint, Backprop
from jode.asked import Asked, in_order, inside
from jode.control import Adaptive, Solver, Stats, Status
from jode.control.base import concrete
from jode.control.stops import stopping
from jode.dependencies import cached
from jode.field import close, heard, jump_of
from jode.march import Plan, Problem
from jode.method import Method
from jode.native import live
from jode.observe import Observed, observing
from jode.tree import Layout, is_inexact, merge, nan_unless, partition, widest

if TYPE_CHECKING:
    from jaxtyping import ArrayLike, Float, Inexact, Int32, PyTree, Real


class SolveError(RuntimeError):
    """A solve that did not reach its end, raised by `jode.check`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solution:
    """What `solve` returns, a pytree.

    `ys` has the structure of y0 with a leading axis for the save times `ts`. `reached` is the time up to which the solution is
    known: after success the last of ts that is finite, else the end of the last accepted step (`Adaptive`) or the last save time
    with a finite state. `observed` has the structure of `observe`, with what each observer kept. Shapes are those of one
    trajectory.
    """

    ts: Float[Array, " saves"]
    ys: PyTree[Inexact[Array, "saves ..."]]
    stats: Stats
    status: Int32[Array, ""]
    reached: Float[Array, ""]
    observed: Any = None


def solve(
    f: Callable,
    y0: PyTree[Inexact[ArrayLike, " ..."]],
    ts: Real[ArrayLike, " saves"] | Sequence[ArrayLike],
    args: Any = None,
    *,
    solver: Solver = Adaptive(),
    adjoint: Adjoint = Backprop(),
    observe: Any = None,
    stops: Real[ArrayLike, " stops"] | Sequence[ArrayLike] | None = None,
    jumps: Any = None,
) -> Solution:
    """Solve dy/dt = f(t, y, args), y(ts[0]) = y0, and return y at every save time.

    Args:
        f: the vector field, pure, for one trajectory: f(t, y, args) has the structure and shapes of y. It is traced once, and again
            where something that it depends on was bound anew: what it closes over, its defaults, the globals and attributes that
            its code names, the contents of lists and dictionaries among them, and those of arrays of NumPy up to 4 kB. Not seen are
            larger arrays of NumPy that were changed in place, attributes that are asked for by a string, and changes after a
            `jax.jit` of yours around the solve was traced. Arrays it closes over get gradients. The order is time, state, args.
            Where the state is a scalar no check can tell f(y, t) from f(t, y); this one tells:
            `jode.odeint(lambda t, y, args: f(t, y, args) * 0 + t, 0.0, (0.0, 2.0))[-1]` is 2 if t is time.
        y0: the initial state, any pytree of floating (16 bits or more) or complex arrays; its dtypes are kept.
        ts: save times, at least two, increasing or decreasing; ts[0] is the initial time. An array of times keeps its dtype, also
            inside f; times written as Python numbers take the real precision of the state. Infinity (minus infinity, where they
            decrease) pads rows that have fewer: the solve ends at the last time that is finite, and states behind it are NaN. That
            is no failure. `Layers` divides its layers among all times, and takes no such padding.
        args: any pytree. Floating and complex arrays, and Python floats, get gradients; integer arrays and PRNG keys get none.
            Other leaves, Python ints among them, are static: f may use them as a shape or a count, and each new value compiles
            anew. `jnp.asarray(n)` makes data of an int.
        solver: `Fixed`, `Adaptive` or `Layers`; under `Layers` arrays in args lead with depth, but for those that `depth_axes`
            says, and f gets one slice per step.
        adjoint: how gradients are computed, by default exactly (`Backprop`). Forward derivatives are exact whatever it is.
        observe: what to keep or to look for on the way: `Dense`, `Steps`, `At`, `Event`, an `Observer` of your own, or a pytree of
            them.
        stops: times where f jumps, in any order. Steps end there: the last stage before one sees the number just before it, the
            first stage after it the one just after. So `t > T` and `t >= T` are the same f, in both directions of time. Gradients
            flow to them.
        jumps: (times, g), or (times, g, xs): at each of the times y becomes g(t, y, args), or g(t, y, args, x) with x the entry
            of that time in the pytree xs, whose arrays lead with an axis for times. A state saved at a jump is that before it.
            Jumps at ts[0] apply, at ts[-1] they do not; equal ones apply in the order given. Stops and jumps outside of ts are
            ignored, so that infinity pads rows that have fewer. Gradients flow to the times, to xs and to what g reads.

    Returns:
        A `Solution`. A trajectory that failed is NaN from the failing time on and `status` says why; see `jode.check`. What is
        wrong with times or numbers that are traced shows as `Status.invalid_input`, and every state of that trajectory is NaN.
        Batches are `jax.vmap`'s: each trajectory then has its own steps, counts and status.

    Raises:
        TypeError, ValueError: for wrong structures, shapes, dtypes, times or pairings, when traced.
    """
    _check_callables(f, y0, solver, adjoint)
    f = heard(f)
    y0 = _state(y0)
    ts = _times(ts, y0, pads=not solver.layered)
    padded = not solver.layered and not (concrete(ts) and np.isfinite(np.asarray(ts)).all())
    solver = solver.checked(y0).over(_unpadded(ts) if padded else ts)
    asked, looks = Asked.of(observe, partial(_looked_at, ts=ts), solver.layered)
    if asked and not adjoint.sees_steps:
        raise ValueError(
            f"observers see steps, and the gradient of {type(adjoint).__name__} is not that of the steps: use jode.Backprop"
        )
    stops, jumps = _stops(stops, ts), _jumps(jumps, ts)
    if stops is not None or jumps:
        _check_stops(solver, adjoint)
    if asked.resets and not (isinstance(solver, Adaptive) and adjoint.follows_resets):
        raise ValueError(
            "an Event that resets needs steps that end at it, those of jode.Adaptive, and the gradients of jode.Backprop; "
            f"got {solver!r} and {adjoint!r}"
        )
    dynamic, static = partition((f, args, solver, asked, looks, stops, jumps), DATA)
    dynamic = [jnp.asarray(x) for x in dynamic]
    checked = all(concrete(x) for x in (ts, stops, jumps and jumps[0], *jax.tree.leaves(solver)))
    _, _, still, _ = static
    norm = getattr(solver, "norm", None)
    functions = *filter(callable, still), solver.method.jac, norm and norm.norm, *asked.functions, *asked.resets, *asked.beside
    known = Known(checked, padded, live((y0, ts, dynamic)), jax.config.jax_debug_nans)  # pyright: ignore
    return _solve_cached((functions, (y0, f, args, solver, jumps)), y0, ts, dynamic, static, adjoint, known)


def odeint(
    f: Callable,
    y0: PyTree[Inexact[ArrayLike, " ..."]],
    ts: Real[ArrayLike, " saves"] | Sequence[ArrayLike],
    args: Any = None,
    *,
    solver: Solver = Adaptive(),
    adjoint: Adjoint = Backprop(),
    stops: Real[ArrayLike, " stops"] | Sequence[ArrayLike] | None = None,
    jumps: Any = None,
) -> PyTree[Inexact[Array, "saves ..."]]:
    """`solve(...).ys`: the states at the save times, without counts or status."""
    return solve(f, y0, ts, args, solver=solver, adjoint=adjoint, stops=stops, jumps=jumps).ys


DATA = (jax.Array, np.ndarray, np.generic, float, complex)  # other leaves of args are static

_REMEDIES = {
    Status.max_steps: "it needed more than max_steps steps: raise Adaptive(max_steps=...), or loosen rtol and atol. Noise in f "
    "(random numbers, a part of it in float32) wants them above its size, a jump of f wants stops; "
    "resets of an Event that pile up, as those of a ball that comes to rest, never end: stop there with another Event",
    Status.stiff: "the problem is stiff: not the error but stability limited the steps, and max_steps were not enough. Use an "
    "implicit method, Adaptive(jode.rodas5p, ...)",
    Status.step_underflow: "the step shrank below the resolution of time: the solution may blow up there or leave the domain of f, "
    "or f jumps there (give its time as one of stops) or is noisy (loosen rtol and atol); if none of these, give ts in float64, or "
    "measure time from ts[0]",
    Status.nonfinite_dynamics: "f returned NaN or infinity at the initial state: check y0, args and the domain of f",
    Status.nonfinite_state: "the state became NaN or infinite: check y0, take smaller steps, or use Adaptive",
    Status.linear_solve: "a linear system of the implicit method was not solved: with bands, f depends on "
    "components outside of them (widen them, or order the components so that neighbours stand together), or elimination needs "
    "pivots (use the dense matrix); with krylov, its solver did not converge (give it more iterations, or a looser tolerance)",
    Status.unstable: "the copies of the state that the method carries are further apart than the state is large: they grow apart "
    "where solutions decay, and y has one correct digit at most. Use a method of one copy (jode.rk4), Adaptive, or narrower steps",
    Status.capacity: "an observer had no room for all steps: give it a larger capacity",
    Status.invalid_input: "numbers known only at run time are out of range: ts must be finite, but for infinities that pad it at "
    "the end, and increase throughout or decrease throughout, Fixed's steps lie between 1 and max_steps, its width be above zero, "
    "Adaptive's tolerances and first_step not be negative, nor both tolerances zero, and its max_step be above zero",
}
_FOR_EXPLICIT = {
    Status.max_steps: ". If the problem may be stiff, try an implicit method, Adaptive(jode.rodas5p, ...)",
    Status.step_underflow: ". If the problem may be stiff, try an implicit method, Adaptive(jode.rodas5p, ...)",
}


def check(sol: Solution) -> Solution:
    """Return sol if every trajectory succeeded, and raise `SolveError` otherwise. Call it outside `jax.jit`.

    The message names the first failed trajectory, the time it reached, its last good save time, its step count and the remedy.
    """
    if isinstance(sol.status, jax.core.Tracer):
        raise TypeError(
            "jode.check needs concrete values: call it outside jax.jit, on the solution that the jitted function returns"
        )
    status = np.asarray(sol.status)
    failed = np.argwhere(np.atleast_1d((status != Status.success) & (status != Status.event)))
    if not len(failed):
        return sol
    row = tuple(int(i) for i in failed[0]) if status.ndim else ()
    code = Status(int(status[row]))
    ts = np.asarray(sol.ts)
    ts = ts[row] if ts.ndim > 1 else ts
    finite = np.ones(ts.shape, bool)
    for leaf in jax.tree.leaves(sol.ys):
        y = np.asarray(leaf)[row]
        finite &= np.isfinite(y).reshape(len(ts), -1).all(1)
    saved = f"last good save time {ts[finite][-1]}" if finite.any() else f"no good state, not even at {ts[0]}"
    reached = f"at t = {np.asarray(sol.reached)[row]}, {saved}"
    which = f"trajectory {row[0] if len(row) == 1 else row} of {status.size} ({len(failed)} failed)" if row else "the solve"
    steps, implicit = int(np.asarray(sol.stats.steps)[row]), bool(np.asarray(sol.stats.jacobians)[row])
    remedy = _REMEDIES[code] + ("" if implicit else _FOR_EXPLICIT.get(code, ""))
    raise SolveError(f"{which} ended with {code.name} after {steps} steps, {reached}: {remedy}")


def _check_callables(f: Any, y0: Any, solver: Any, adjoint: Any) -> None:
    if not callable(f):
        what = " (y0 comes second: solve(f, y0, ts, args))" if callable(y0) else ""
        raise TypeError(f"f must be a function f(t, y, args), got {type(f).__name__}{what}")
    if not isinstance(solver, Solver):
        hint = ""
        if isinstance(solver, Method):
            adaptive = f"Adaptive({solver!r}) for steps chosen by their error, " if solver.embedded_order is not None else ""
            hint = f": write {adaptive}Fixed({solver!r}, steps) for equal steps, or Layers({solver!r}) for a network"
        raise TypeError(f"solver must be jode.Fixed, jode.Adaptive or jode.Layers, got {solver!r}{hint}")
    if solver.layered and getattr(f, "wants_all_layers", False):
        raise TypeError("depth.field wants all layers, stacked, and Layers hands over one per step. Under Layers give f itself")
    if not isinstance(solver.method, Method):
        raise TypeError(f"solver's method must be a jode method such as jode.tsit5, got {solver.method!r}")
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint must be a value such as jode.Backprop(), got {adjoint!r}")
    if refusal := solver.refusal() or adjoint.refusal(solver):
        raise ValueError(refusal)


def _state(y0: Any) -> Any:
    def leaf(path: Any, x: Any) -> Array:
        name = "y0" + jax.tree_util.keystr(path)
        try:
            x = jnp.asarray(x)
        except TypeError as e:
            raise TypeError(f"{name} must be a floating or complex array, got {type(x).__name__}") from e
        if not is_inexact(x):
            raise TypeError(f"{name} must be a floating or complex array, got dtype {x.dtype}: write 1.0 for 1, or keep it in args")
        if jnp.finfo(x.dtype).bits < 16:
            raise TypeError(f"{name} has dtype {x.dtype}, too coarse to advance by small steps: use bfloat16, float16 or wider")
        if concrete(x) and not np.isfinite(np.asarray(x)).all():
            raise ValueError(f"{name} must be finite, got {np.asarray(x)}")
        return x

    return jax.tree_util.tree_map_with_path(leaf, y0)


def _times(ts: Any, y0: Any, pads: bool) -> Any:
    """The save times as a vector. Arrays keep their dtype; Python numbers and integers take the state's real precision.

    pads: whether the last of them may be infinite.
    """
    parts = list(ts) if isinstance(ts, (tuple, list)) else [ts]
    given = [t if hasattr(t, "dtype") else np.asarray(t) for t in parts]
    for t in given:
        if not (jnp.issubdtype(t.dtype, jnp.floating) or jnp.issubdtype(t.dtype, jnp.integer)):
            raise TypeError(f"ts must be real, got dtype {t.dtype}")
    arrays = [t.dtype for t in parts if hasattr(t, "dtype") and not getattr(t, "weak_type", False) and is_inexact(t)]
    dtype = widest(*(jnp.result_type(d) for d in arrays or [x.dtype for x in jax.tree.leaves(y0)]), default=jnp.result_type(float))
    known = all(concrete(t) for t in given)
    xp = np if known else jnp  # under a trace only NumPy's arrays stay known
    out = xp.stack([xp.asarray(t, dtype) for t in given]) if isinstance(ts, (tuple, list)) and ts else xp.asarray(ts, dtype)
    if out.ndim != 1 or out.shape[0] < 2:
        raise ValueError(f"ts must be a vector of at least two save times, the first the initial time; got shape {out.shape}")
    if known:
        _check_times(np.concatenate([np.asarray(t, np.float64).reshape(-1) for t in given]), np.asarray(out), pads)
    return out


def _check_times(exact: np.ndarray, ts: np.ndarray, pads: bool) -> None:
    """Refuse times that are not finite or not in order, and times that differ as they were given but not in the dtype of ts."""
    finite = np.isfinite(ts)
    if np.isnan(ts).any() or not finite[0] or not (pads or finite.all()):
        says = "ts must be finite" if not pads else "ts must be finite, or end in infinities that pad it"
        raise ValueError(f"{says}, got {ts}")
    if not _in_order(ts):
        raise ValueError(f"ts must increase throughout or decrease throughout, got {ts}: sort it")
    exact, ts = exact[finite], ts[finite]
    apart = np.abs(np.diff(exact)) > 4 * np.finfo(np.float64).eps * np.abs(exact[1:])
    for i in np.flatnonzero(apart & (np.diff(ts) == 0)):
        raise ValueError(
            f"ts[{i}] = {float(exact[i])} and ts[{i + 1}] = {float(exact[i + 1])} are the same number in {ts.dtype}: "
            "give ts as a float64 array (with jax_enable_x64), or measure time from ts[0]"
        )


def _in_order(ts: Any) -> Any:
    """Whether times increase throughout or decrease throughout; none of them is NaN then."""
    return (ts[1:] >= ts[:-1]).all() | (ts[1:] <= ts[:-1]).all()


def _unpadded(ts: Any) -> Any:
    """The times with the last finite one in the place of those that are not: intervals of no length."""
    xp: Any = np if concrete(ts) else jnp
    finite = xp.isfinite(ts)
    last = xp.sum(xp.where(finite & ~xp.concatenate([finite[1:], xp.zeros(1, bool)]), ts, 0))
    return xp.where(finite, ts, last)


def _asked(given: Array, padded: bool, saves: int, saved: Any) -> dict:
    """Which of the times that are saved are no padding, for the march; `saved` are the places of those given among them."""
    if not padded:
        return {}
    finite = jnp.isfinite(given)
    return {"asked": finite if saved is None else jnp.ones(saves, bool).at[saved].set(finite)}


def _valid(ts: Array, solver: Any, *others: Array | None) -> Array:
    """Whether times and numbers that are traced are such as the checks at the door ask for."""
    finite = jnp.isfinite(ts)
    valid = (jnp.all(finite) if solver.layered else finite[0]) & _in_order(ts) & solver.valid()
    return reduce(jnp.logical_and, [~jnp.any(jnp.isnan(x)) for x in others if x is not None], valid)


def _stops(times: Any, ts: Any, name: str = "stops") -> Any:
    """Times of stops or jumps as a vector in the dtype of ts, or None where there are none."""
    if times is None:
        return None
    known = all(concrete(x) for x in jax.tree.leaves(times))
    out = (np if known else jnp).asarray(times, ts.dtype)
    if out.ndim != 1:
        raise ValueError(f"{name} must be a vector of times, got shape {out.shape}")
    if known and np.isnan(out).any():
        raise ValueError(f"{name} must not be NaN, got {out}; infinity stands for a time that never comes")
    return out if out.shape[0] else None


def _looked_at(times: Any, ts: Any) -> Any:
    """Times that an observer looks at."""
    out = _stops(times, ts, "the times of At")
    if out is None:
        raise ValueError(f"At: give at least one time, got ts={times!r}, or leave the observer out")
    return out


def _jumps(jumps: Any, ts: Any) -> Any:
    """(times, g, xs), or None where there are none."""
    if jumps is None:
        return None
    if not (isinstance(jumps, tuple) and len(jumps) in (2, 3) and callable(jumps[1])):
        raise TypeError(f"jumps must be (times, g) or (times, g, xs) with g a function g(t, y, args), got {jumps!r}")
    times, xs = _stops(jumps[0], ts, "the times of jumps"), jumps[2] if len(jumps) == 3 else None
    for x in jax.tree.leaves(xs):
        if np.shape(x)[:1] != (0 if times is None else times.shape[0],):
            raise ValueError(
                f"every array in the xs of jumps must lead with an entry for each time, got shape {np.shape(x)}: a list of "
                "numbers is a pytree, jnp.asarray makes an array of it"
            )
    return None if times is None else (times, jumps[1], jax.tree.map(jnp.asarray, xs))


def _check_stops(solver: Solver, adjoint: Adjoint) -> None:
    if solver.layered:
        raise ValueError("stops and jumps belong to an ODE, and Layers has no time between its layers: use Fixed or Adaptive")
    if not adjoint.sees_steps:
        raise ValueError(f"{type(adjoint).__name__} solves an ODE without stops or jumps backwards: use jode.Backprop")


class Known(NamedTuple):
    """Of a solve where it is traced: whether all numbers were checked at the door, whether save times may be padded, of how many
    rows the maps around are, and whether JAX looks for NaNs.
    """

    checked: bool
    padded: bool
    rows: int
    nans: bool


def _solve(y0: Any, ts: Any, dynamic: list, static: Any, adjoint: Any, known: Known) -> Solution:
    f, args, solver, asked, looks, stops, jumps = merge(dynamic, static)
    y, given, beside = y0, jnp.asarray(ts), bool(asked.beside)
    ts = _unpadded(given) if known.padded else given
    if beside:
        leaves, treedef = jax.tree.flatten(args)
        first = jax.tree.unflatten(treedef, [x[0] if m else x for x, m in zip(leaves, solver.leading(args), strict=True)])
        y0 = asked.initial(ts[0], y, first)
    layout = Layout.of(y0)
    solver.method.check(y)
    valid, packed = None, layout.pack(jax.tree.leaves(y0))
    if not known.checked:  # an invalid trajectory starts from NaN and goes nowhere, like any other that fails at its start
        valid = _valid(given, solver, stops, jumps and jumps[0])
        ts = jnp.where(valid, ts, 0)
        packed = tuple(jnp.where(valid, x, nan_unless(valid, jnp.zeros_like(x))) for x in packed)
        solver = jax.tree.map(lambda x: x if isinstance(x, int) else jnp.where(valid, x, 1).astype(x.dtype), solver)
    saved, jump = None, None
    orders, others = in_order(looks, ts)
    if stops is not None or jumps or asked.resets:
        solver, ts, saved = stopping(solver, ts, others, stops, jumps and jumps[0])
    elif looks:
        ts = jnp.concatenate([ts, others])
    f = observing(f, list(asked.beside)) if beside else f
    if jumps:
        args, jump = (args, jumps[2]), jump_of(jumps[1], beside, jumps[2] is not None)
        f, of = (lambda t, y, args: of(t, y, args[0])), f
    saves = given.shape[0] if saved is None else ts.shape[0] - others.shape[0]
    intervals = saves - 1
    layers = solver.layers(args, intervals)
    steps = solver.steps_between(intervals, layers)
    jac = solver.method.jac and inside(solver.method.jac, beside, bool(jumps))
    closed, params, outs = close(
        f,
        ts,
        y0,
        args,
        layout,
        solver.leading(args),
        beside,
        jump,
        jac,
        asked.seen_with(bool(jumps)),
        asked.resets_with(bool(jumps)),
    )
    weights = sum(x.size for x in (*params.shared, *params.layers))
    most = solver.most_steps(intervals, steps)
    method = solver.method.for_steps(most)
    watches = asked.placed(outs, saves, most, method)
    if beside:
        method = Observed(method, layout.leading(len(jax.tree.leaves(y))))
    plan = Plan(closed, replace(solver.static, method=method), layout, saves, ts.dtype, steps, weights, watches, known.rows)
    outcome = adjoint.solve(plan, Problem(ts, packed, params, {**solver.numbers, **_asked(given, known.padded, saves, saved)}))
    stats, status, reached = outcome.stats, outcome.status, outcome.reached
    if valid is not None:
        stats = jax.tree.map(lambda n: jnp.where(valid, n, 0), stats)
        status = jnp.where(valid, status, int(Status.invalid_input))
        reached = jnp.where(valid, reached, given[0])
    ys = tuple(x[saved] for x in outcome.ys) if saved is not None else outcome.ys
    ys = jax.tree.unflatten(layout.treedef, layout.unpack(ys, given.shape))
    ys, kept = ys if beside else (ys, None)
    reached = jax.lax.stop_gradient(reached)
    observed = asked.results(kept, watches, outcome.observed, orders, reached, layout) if asked else None
    return Solution(given, ys, stats, status, reached, observed)


_solve_cached = cached(_solve, static=(3, 4, 5))
