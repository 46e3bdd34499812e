"""The primitives, their shapes, and how they are compiled. A form is staged once for each platform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.core
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir

from jode.native.forms import LINEAR, March, count, form_of, held_of, without
from jode.native.whole import can_be_whole, lower_whole
from jode.tuning import one_function


def stage(march: March, kind: str, rows: tuple | None, over: tuple, active: tuple, platform: str | None, avals: Sequence) -> Any:
    key = (kind, rows, over, active, platform, tuple(avals))
    if key not in march.staged:
        structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
        march.staged[key] = jax.make_jaxpr(form_of(march, kind, rows, over, active, platform))(*structs)
    return march.staged[key]


def _abstract(kind: str, *avals: Any, march: March, rows: tuple | None, over: tuple = (), active: tuple = ()) -> tuple:
    """What comes out: promised, but for what is recorded."""
    if kind == "record":
        return stage(march, kind, rows, (), (), None, avals).out_avals, march.effects
    row = () if rows is None else (rows[0],)
    sizes = []
    held = held_of(march, kind, avals, active)
    for _ in over:
        sizes.append(avals[held].shape[len(sizes)])
    lead = tuple(sizes)
    outer = tuple(n for n, axes in zip(sizes, reversed(over), strict=True) if any(a is not None for a in axes))
    shaped = lambda xs, lead: [jax.core.ShapedArray(lead + row + x.shape, x.dtype) for x in xs]
    out = []
    if kind in ("run", "joint"):
        out += shaped([*march.values, *march.rest], outer)
    if kind in ("joint", "tangent"):
        out += shaped(march.values, lead)
    if kind == "pull":
        inner = [without(avals[i], [axes[i] for axes in reversed(over)]) for i in active]
        out += [jax.core.ShapedArray(lead + a.shape, a.dtype) for a in inner]
    return out, march.effects


def _evaluate(kind: str, *operands: Any, march: March, rows: tuple | None, over: tuple = (), active: tuple = ()) -> list:
    """Outside `jax.jit`: compiled all the same, once for each form, unless that is switched off."""
    if jax.config.jax_disable_jit:  # pyright: ignore
        return form_of(march, kind, rows, over, active, jax.default_backend())(*operands)
    key = (kind, rows, over, active)
    if key not in march.compiled:
        params = {"march": march, "rows": rows, **({"over": over, "active": active} if kind in LINEAR else {})}
        march.compiled[key] = jax.jit(partial(PRIMITIVES[kind].bind, **params))
    return march.compiled[key](*operands)


def _lower(
    kind: str,
    platform: str | None,
    ctx: Any,
    *operands: Any,
    march: March,
    rows: tuple | None,
    over: tuple = (),
    active: tuple = (),
) -> Any:
    staged = stage(march, kind, rows, over, active, None if kind == "record" else platform, ctx.avals_in)
    directions = math.prod(ctx.avals_in[-1].shape[: len(over)])
    backwards = kind in ("record", "pull")
    if one_function(platform, march.state, march.rows * count(rows) * directions, backwards) and can_be_whole(ctx, staged):
        return lower_whole(ctx, staged, operands)
    return mlir.lower_fun(jaxpr_as_fun(staged), multiple_results=True)(ctx, *operands)


PRIMITIVES = {kind: Primitive(f"march_{kind}") for kind in ("run", "record", *LINEAR)}
run_p, record_p, joint_p, tangent_p, pull_p = PRIMITIVES.values()
for _kind, _p in PRIMITIVES.items():
    _p.multiple_results = True
    _p.def_impl(partial(_evaluate, _kind))
    _p.def_effectful_abstract_eval(partial(_abstract, _kind))
    for _platform in ("cpu", "cuda", "rocm", "tpu"):
        mlir.register_lowering(_p, partial(_lower, _kind, _platform), platform=_platform)
    mlir.register_lowering(_p, partial(_lower, _kind, None))
