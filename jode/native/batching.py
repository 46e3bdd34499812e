"""The primitives under `jax.vmap`: rows of a batch, and directions of a derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.interpreters import batching

from jode.native.forms import March, arrays, held_of, linear_of, place_axis
from jode.native.primitives import PRIMITIVES, rows_p
from jode.native.settings import in_settings_of_its_march
from jode.tuning import SMALL


def _batch(kind: str, axis: Any, operands: Sequence, dims: tuple, *, march: March, rows: tuple | None, **params: Any) -> tuple:
    """Under `vmap`: a direction, a batch of rows, or rows folded into those that are there."""
    if any(getattr(e, "name", None) == axis.name for e in march.effects):
        raise TypeError(
            f"f reduces over the axis {axis.name!r} of the jax.vmap around its solve, but trajectories of a batch march by "
            "themselves: to normalise over the batch, let y0 be the whole batch, one state"
        )
    operands = arrays(operands)
    primitive, over, active = PRIMITIVES[kind], params.get("over", ()), params.get("active", ())
    bind = partial(primitive.bind, march=march)
    if all(d is None for d in dims):  # a solve that no mapped operand reaches is not a batch: it is done once
        out = bind(*operands, rows=rows, **params)
        return out, [None] * len(out)
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    count = held_of(march, kind, operands, active)
    held, linear, held_dims, linear_dims = operands[:count], operands[count:], dims[:count], dims[count:]
    outer = tuple(d is not None for d in held_dims)
    plain = any(any(a is not None for a in axes) for axes in over)
    # A row's own gradient of an operand that rows share is no sum over rows. A small operand is repeated for each row then;
    # for a large one the form for fewer rows is mapped, so that products with it stay products of matrices.
    if kind == "pull" and any(outer):
        small = [i for i in active if not outer[i] and held[i].size <= SMALL]
        held = [place_axis(x, None, 0, size) if i in small else x for i, x in enumerate(held)]
        held_dims = [0 if i in small else d for i, d in enumerate(held_dims)]
        outer = tuple(d is not None for d in held_dims)
    own = kind == "pull" and not all(outer[i] for i in active)
    if not any(outer) or plain or own:
        linear = [place_axis(x, d, 0, size) for x, d in zip(linear, linear_dims, strict=True)]
        out = bind(*held, *linear, rows=rows, **{**params, "over": (*over, tuple(held_dims))})
        first = len(out) - linear_of(march, kind, out)
        place = 0 if any(outer) else None
        return out, [place] * first + [0] * (len(out) - first)
    return _batch_rows(bind, march, kind, rows, size, (held, held_dims), (linear, linear_dims), params)


def _batch_rows(
    bind: Callable, march: March, kind: str, rows: tuple | None, size: int, held_: tuple, linear_: tuple, params: dict
) -> tuple:
    """The form for rows, or for more of them: operands that are held and linear ones, each with the places of the new axis."""
    (held, held_dims), (linear, linear_dims) = held_, linear_
    active, depth = params.get("active", ()), len(params.get("over", ()))
    results = [i >= march.operands for i in range(len(held))]  # what was recorded differs by row
    owner = active if kind in ("joint", "tangent") else ()  # a tangent has rows where its operand has them
    moved = {i for i, d in zip(owner, linear_dims, strict=False) if d is not None}
    held = [
        x if d is None and not (of or i in moved) else place_axis(x, d, 0, size)
        for i, (x, d, of) in enumerate(zip(held, held_dims, results, strict=True))
    ]
    outer = tuple(d is not None or i in moved for i, d in enumerate(held_dims[: march.operands]))
    lead = [outer[i] for i in owner] or [True] * len(linear)
    linear = [place_axis(x, d, depth, size) if o else x for x, d, o in zip(linear, linear_dims, lead, strict=True)]
    if rows is None:
        out = bind(*held, *linear, rows=(size, outer), **params)
        return out, _row_axes(march, kind, out, depth)
    inner_size, inner = rows
    flags = zip([*outer, *results[len(outer) :]], [*inner, *results[len(outer) :]], strict=True)
    held = [_fold(x, 0, size, inner_size, o, i) for x, (o, i) in zip(held, flags, strict=True)]
    within = [inner[i] for i in owner] or [True] * len(linear)
    linear = [_fold(x, depth, size, inner_size, o, i) for x, o, i in zip(linear, lead, within, strict=True)]
    mapped = tuple(o or i for o, i in zip(outer, inner, strict=True))
    out = bind(*held, *linear, rows=(size * inner_size, mapped), **params)
    places = _row_axes(march, kind, out, depth)
    out = [x.reshape(*x.shape[:p], size, inner_size, *x.shape[p + 1 :]) for x, p in zip(out, places, strict=True)]
    if kind == "pull":
        out = [x if inner[i] else jnp.sum(x, depth + 1) for i, x in zip(active, out, strict=True)]
    return out, places


def _row_axes(march: March, kind: str, out: Sequence, depth: int) -> list[int]:
    """Where the row axis of each output is: behind the directions in what is linear, first elsewhere."""
    linear = linear_of(march, kind, out)
    return [0] * (len(out) - linear) + [depth] * linear


def _fold(x: Array, at: int, size: int, inner_size: int, outer: bool, inner: bool) -> Array:
    """Fold an outer row axis into an inner one, behind `at` axes, repeating the operand along the axis it lacks."""
    if not (outer or inner):
        return x
    x = x if outer else jnp.expand_dims(x, at)
    x = x if inner else jnp.expand_dims(x, at + 1)
    lead, rest = x.shape[:at], x.shape[at + 2 :]
    return jnp.broadcast_to(x, (*lead, size, inner_size, *rest)).reshape(*lead, size * inner_size, *rest)


def _count(axis: Any, operands: Sequence, dims: tuple, *, found: Any) -> tuple:
    """One more axis of rows, if operands have it."""
    if any(d is not None for d in dims):
        found.rows *= axis.size
    return rows_p.bind(*operands, found=found), []


batching.fancy_primitive_batchers[rows_p] = _count
for _kind, _p in PRIMITIVES.items():
    batching.fancy_primitive_batchers[_p] = in_settings_of_its_march(partial(_batch, _kind))
