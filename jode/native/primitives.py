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
from jode.native.settings import in_settings_of_its_march
from jode.native.whole import can_be_whole, lower_whole
from jode.tuning import one_function


def stage(march: March, kind: str, platform: str | None, avals: Sequence, **params: Any) -> Any:
    key = (kind, platform, tuple(avals), *params.items())
    if key not in march.staged:
        structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
        march.staged[key] = jax.make_jaxpr(form_of(march, kind, platform, **params))(*structs)
    return march.staged[key]


def _abstract(
    kind: str, *avals: Any, march: March, rows: tuple | None, over: tuple = (), active: tuple = (), **params: Any
) -> tuple:
    """What comes out: promised, but for what is recorded."""
    if kind == "record":
        return stage(march, kind, None, avals, rows=rows, **params).out_avals, march.effects
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


def _evaluate(kind: str, *operands: Any, march: March, **params: Any) -> list:
    """Outside `jax.jit`: compiled all the same, once for each form, unless that is switched off, or JAX looks for NaNs and
    infinities and wants to see operations one by one.
    """
    config: Any = jax.config
    if config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs:
        return form_of(march, kind, jax.default_backend(), **params)(*operands)
    key = (kind, *params.items())
    if key not in march.compiled:
        march.compiled[key] = jax.jit(partial(PRIMITIVES[kind].bind, march=march, **params))
    return march.compiled[key](*operands)


def _lower(
    kind: str,
    platform: str | None,
    ctx: Any,
    *operands: Any,
    march: March,
    rows: tuple | None,
    **params: Any,
) -> Any:
    staged = stage(march, kind, None if kind == "record" else platform, ctx.avals_in, rows=rows, **params)
    directions = math.prod(ctx.avals_in[-1].shape[: len(params.get("over", ()))])
    backwards = kind in ("record", "pull")
    if one_function(platform, march.state, march.rows * count(rows) * directions, backwards) and can_be_whole(ctx, staged):
        return lower_whole(ctx, staged, operands)
    return mlir.lower_fun(jaxpr_as_fun(staged), multiple_results=True)(ctx, *operands)


class _Found:
    """How many rows were found."""

    rows = 1


def live(operands: Any) -> int:
    """Of how many rows the operands, a pytree, are in the `jax.vmap`s around, as far as these are being traced now."""
    found, traced = _Found(), [x for x in jax.tree.leaves(operands) if isinstance(x, jax.core.Tracer)]
    if traced:
        rows_p.bind(*traced, found=found)
    return found.rows


rows_p = Primitive("march_rows")  # computes nothing: its rule under `vmap` counts
rows_p.multiple_results = True
rows_p.def_impl(lambda *_, found: [])
rows_p.def_abstract_eval(lambda *_, found: [])
mlir.register_lowering(rows_p, lambda ctx, *_, found: [])

PRIMITIVES = {kind: Primitive(f"march_{kind}") for kind in ("run", "record", *LINEAR)}
run_p, record_p, joint_p, tangent_p, pull_p = PRIMITIVES.values()
for _kind, _p in PRIMITIVES.items():
    _p.multiple_results = True
    _p.def_impl(in_settings_of_its_march(partial(_evaluate, _kind)))
    _p.def_effectful_abstract_eval(in_settings_of_its_march(partial(_abstract, _kind)))
    for _platform in ("cpu", "cuda", "rocm", "tpu"):
        mlir.register_lowering(_p, in_settings_of_its_march(partial(_lower, _kind, _platform)), platform=_platform)
    mlir.register_lowering(_p, in_settings_of_its_march(partial(_lower, _kind, None)))
