"""The primitives under `jax.jvp`, where reverse mode follows, and transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from jode.native.derived import cotangent_march, tangent_march
from jode.native.forms import LINEAR, March, arrays, count, held_of, replaced, without
from jode.native.primitives import PRIMITIVES, joint_p, pull_p, record_p, rows_p, run_p, tangent_p
from jode.native.settings import in_settings_of_its_march


def _run_jvp(primals: Sequence, tangents: Sequence, *, march: March, rows: tuple | None) -> tuple:
    primals = arrays(primals)
    active = tuple(i for i, v in enumerate(tangents[: march.moving]) if not isinstance(v, ad.Zero))
    if not active:
        out = run_p.bind(*primals, march=march, rows=rows)
        return out, [_zero(x) for x in out]
    out = joint_p.bind(*primals, *(tangents[i] for i in active), march=march, rows=rows, over=(), active=active)
    n = len(march.values) + len(march.rest)
    return out[:n], [*out[n:], *(_zero(x) for x in out[len(march.values) : n])]


def _differentiate(
    kind: str,
    primals: Sequence,
    tangents: Sequence,
    *,
    march: March,
    rows: tuple | None,
    over: tuple = (),
    active: tuple = (),
    **sized: int,
) -> tuple:
    """The derivative of a form is that of the march which the form is."""
    primals = arrays(primals)
    if kind == "record":
        results = record_p.bind(*primals, march=march, rows=rows, **sized)
        moved = tuple(i for i, v in enumerate(tangents[: march.moving]) if not isinstance(v, ad.Zero))
        params = {"march": march, "rows": rows, "over": (), "active": moved}
        dots = tangent_p.bind(*primals, *results, *(tangents[i] for i in moved), **params) if moved else []
        return results, [*dots, *map(_zero, results[len(dots) :])]
    count = held_of(march, kind, primals, active)
    moved = [i for i, v in enumerate(tangents) if not isinstance(v, ad.Zero) and (i < march.moving or i >= count)]
    if kind != "joint" and all(i >= count for i in moved):  # only what the form is linear in: no march is taken again
        form = partial(PRIMITIVES[kind].bind, *primals[:count], march=march, rows=rows, over=over, active=active)
        return form(*primals[count:]), form(*map(ad.instantiate_zeros, tangents[count:]))
    f = _as_march(kind, primals, march, rows, over, active)

    def moving(*xs: Any) -> list:
        operands = replaced(primals, moved, xs)
        return f(operands[:count], operands[count:])

    out, dots = jax.jvp(moving, [primals[i] for i in moved], [tangents[i] for i in moved])
    return out, [v if jnp.issubdtype(x.dtype, jnp.inexact) else _zero(x) for x, v in zip(out, dots, strict=True)]


def _as_march(kind: str, operands: Sequence, march: March, rows: tuple | None, over: tuple, active: tuple) -> Callable:
    """A linear form as a function of (held, linear) operands that binds the march it is."""
    n, values, count = march.moving, len(march.values), held_of(march, kind, operands, active)
    key = (kind == "pull", rows, active)
    if key not in march.derived:
        if kind == "pull":
            places = [[axes[i] for axes in reversed(over)] for i in active]
            bars = [without(jax.typeof(operands[i]), axes) for i, axes in zip(active, places, strict=True)]
            march.derived[key] = cotangent_march(march, rows, active, count, bars)
        else:
            march.derived[key] = tangent_march(march, rows, active)
    derived = march.derived[key]

    def f(held: Sequence, linear: Sequence) -> list:
        still = held[n:] if kind == "pull" else held[n : march.operands]
        out = run_p.bind(*held[:n], *linear, *still, march=derived, rows=None)
        if kind == "pull":
            return out
        dots = out[values : 2 * values]
        return dots if kind == "tangent" else [*out[:values], *out[2 * values :], *dots]

    for axes in over:
        f = _over(f, axes, values + len(march.rest) if kind == "joint" else 0)
    return f


def _over(f: Callable, axes: Sequence, plain: int) -> Callable:
    """f mapped over some axes of its held operands and the first of its linear ones; without the former the first `plain` outputs
    are as without the map.
    """

    def mapped(held: Sequence, linear: Sequence) -> list:
        out = jax.vmap(f, (list(axes), 0))(list(held), list(linear))
        return out if any(a is not None for a in axes) else [x[0] if i < plain else x for i, x in enumerate(out)]

    return mapped


def _zero(x: Any) -> ad.Zero:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _split_joint(trace: Any, *tracers: Any, march: March, rows: tuple | None, over: tuple, active: tuple) -> list:
    """Where reverse mode follows: the march is recorded now, and its tangent waits to be transposed."""
    params = {"march": march, "rows": rows, "over": over, "active": active}
    held, moved = tracers[: march.operands], tracers[march.operands :]
    if over or all(t.is_known() for t in moved) or not all(t.is_known() for t in held):
        return trace.default_process_primitive(joint_p, tracers, params)
    # What is kept of a row has shapes that no later `vmap` changes: JAX asks that of what one program hands to another.
    sized = max(march.live, count(rows))
    results = record_p.bind(*(t.pval.get_known() for t in held), march=march, rows=rows, sized=sized)
    known = [trace.new_const(x) for x in results]
    dots = trace.default_process_primitive(tangent_p, [*held, *known, *moved], params)
    return [*known[: len(march.values) + len(march.rest)], *dots]


def _split_joint_again(saveable: Any, unknown: Sequence[bool], staged: Sequence[bool], eqn: Any) -> tuple:
    """The same under `jax.checkpoint`, which runs the march now, and the whole equation again where it goes back."""
    march, n = eqn.params["march"], eqn.params["march"].operands
    outputs = len(march.values) + len(march.rest)
    if any(unknown[:n]) or eqn.params["over"]:
        known, unknown_out = None, [True] * len(eqn.outvars)
    else:
        run = {"march": march, "rows": eqn.params["rows"]}
        known = eqn.replace(primitive=run_p, invars=eqn.invars[:n], outvars=eqn.outvars[:outputs], params=run)
        unknown_out = [i >= outputs for i in range(len(eqn.outvars))]
    needed = [x for x, there in zip(eqn.invars, staged, strict=True) if not there and not hasattr(x, "val")]  # literals have one
    return known, eqn, unknown_out, [True] * len(eqn.outvars), needed


def _transpose_tangent(cotangents: Sequence, *operands: Any, march: March, rows: tuple | None, over: tuple, active: tuple) -> list:
    held = operands[: len(operands) - len(active)]
    bars = [ad.instantiate_zeros(c) for c in cotangents]
    back = pull_p.bind(*held, *bars, march=march, rows=rows, over=over, active=active)
    return [None] * len(held) + list(back)


def _transpose_pull(cotangents: Sequence, *operands: Any, march: March, rows: tuple | None, over: tuple, active: tuple) -> list:
    held = operands[: len(operands) - len(march.values)]
    dots = [ad.instantiate_zeros(c) for c in cotangents]
    return [None] * len(held) + tangent_p.bind(*held, *dots, march=march, rows=rows, over=over, active=active)


ad.primitive_jvps[rows_p] = lambda primals, tangents, *, found: (rows_p.bind(*primals, found=found), [])
ad.primitive_jvps[run_p] = in_settings_of_its_march(_run_jvp)
for _kind in ("record", *LINEAR):
    ad.primitive_jvps[PRIMITIVES[_kind]] = in_settings_of_its_march(partial(_differentiate, _kind))
pe.custom_partial_eval_rules[joint_p] = in_settings_of_its_march(_split_joint)
pe.partial_eval_jaxpr_custom_rules[joint_p] = _split_joint_again
ad.primitive_transposes[tangent_p] = in_settings_of_its_march(_transpose_tangent)
ad.primitive_transposes[pull_p] = in_settings_of_its_march(_transpose_pull)
