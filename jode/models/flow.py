"""States of an ODE at the times of a ragged series: repeated, masked and padded times, and times on both sides of the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jode


def states_after(
    f: Callable,
    z0: Any,
    t0: Any,
    ts: Array,
    args: Any = None,
    *,
    mask: Any = None,
    solver: Any = jode.Adaptive(),
    adjoint: Any = jode.Backprop(),
) -> Any:
    """The solution of dz/dt = f(t, z, args), z(t0) = z0, at times t0 <= t_1 <= t_2 <= …, some of which may be equal or masked.

    `jode.solve` wants times that increase. Here a time that exceeds all before it becomes a save time; the others share a row:
    an equal time that of its equal; a masked one, or one before t0, that of the last time before it in the series. The solve
    sees the remaining times in order, and then as many as fill the shape, close after the last, which no row reads. So what a
    masked row holds changes no bit of the others.

    Args:
        f: the vector field.
        z0: the initial state, any pytree.
        t0: its time.
        ts: times (T,), not decreasing where the mask is true.
        args: of f.
        mask: (T,), which times count; all by default. Others may be anything, NaN too.
        solver: `Fixed` takes its steps between consecutive distinct times.
        adjoint: how gradients are computed.

    Returns:
        States with the structure of z0 and a leading axis T. Cost: one solve through T save times.

    Raises:
        TypeError, ValueError: what `jode.solve` raises, when traced.
    """
    times, row = _distinct(jnp.asarray(t0, ts.dtype), ts, jnp.ones(ts.shape, bool) if mask is None else mask)
    zs = jode.odeint(f, z0, times, args, solver=solver, adjoint=adjoint)
    return jax.tree.map(lambda z: z[row], zs)


def states_around(
    f: Callable,
    z0: Any,
    t0: Any,
    ts: Array,
    args: Any = None,
    *,
    solver: Any = jode.Adaptive(),
    adjoint: Any = jode.Backprop(),
) -> Any:
    """The same at times on both sides of t0, not decreasing: one solve forwards in time, one backwards. Cost: two solves."""
    t0 = jnp.asarray(t0, ts.dtype)
    after = states_after(f, z0, t0, ts, args, mask=ts >= t0, solver=solver, adjoint=adjoint)
    # Backwards: from t0 down, as a solve in the time -t.
    times, row = _distinct(-t0, -ts[::-1], ts[::-1] < t0)
    zs = jode.odeint(f, z0, -times, args, solver=solver, adjoint=adjoint)
    before = jax.tree.map(lambda z: z[row][::-1], zs)
    return jax.tree.map(lambda a, b: jnp.where((ts < t0).reshape(-1, *[1] * (a.ndim - 1)), b, a), after, before)


def _distinct(t0: Array, ts: Array, mask: Array) -> tuple[Array, Array]:
    """Times (T + 1,) that increase from t0 and hold each distinct time that counts; and the row (T,) of each time among them."""
    running = jax.lax.cummax(jnp.where(mask, jnp.maximum(ts, t0), t0))
    new = running > jnp.concatenate([t0[None], running[:-1]])
    row = jnp.cumsum(new)
    count = row[-1]
    order = jnp.argsort(~new, stable=True)
    last = running[-1]
    ahead = jnp.arange(1, len(ts) + 1) - count  # 1, 2, … behind the last
    scale = jnp.sqrt(jnp.finfo(ts.dtype).eps) * (1 + jnp.abs(last) + jnp.abs(t0))
    padding = last + scale.astype(ts.dtype) * ahead.astype(ts.dtype)
    times = jnp.where(ahead > 0, padding, running[order])
    return jnp.concatenate([t0[None], times]), row
