"""A march as JAX primitives: one native loop under `vmap`, and derivatives in both modes from one rule.

Primitives stand for a march, its tangent (linear, forwards) and its cotangent (linear, backwards). Each has forms: a
function of the operands for one trajectory, and under `jax.vmap` the same written for a batch, told which operands differ from
row to row, so that what is shared (the weights of a network) stays shared, in the loop and in its cotangent. Nested `vmap`s
fold into one batch. An axis that only tangents or cotangents have is a direction: the rest of the work is done once for all of
them.

Forward mode binds the march and its tangent as one, unrecorded. Where reverse mode follows, partial evaluation splits that into a
march that records what the way back needs, and a tangent, whose transpose is the cotangent. First-order gradients so never trace
the forward derivative of the vector field. These are the only lines that touch JAX's extension interface (`jax.extend`,
`jax.interpreters`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from jode.tuning import SMALL


class Batch(NamedTuple):
    """How many rows, and which operands (a pytree of bools like the operands) have a leading row axis."""

    size: int
    mapped: Any


class Promise(NamedTuple):
    """What a march returns for one trajectory, pytrees of shapes and dtypes: what can be differentiated, and the rest; and the
    effects of running it.
    """

    values: Any
    rest: Any
    effects: Any


class Rule(NamedTuple):
    """The forms of a march: functions of (batch or None, platform or None) that return functions of the operands.

    run: (moving, still) -> (values, rest). record: the same and what the way back needs, each array led by the rows of a batch.
    pull: (moving, still, values, rest, kept, cotangents of values) -> cotangents of moving; of an operand that all rows share it is
    the sum over rows.
    """

    run: Callable
    record: Callable
    pull: Callable


def native(rule: Rule, moving: Any, still: Any, promise: Promise) -> tuple[Any, Any]:
    """The march of a rule: (values, rest), differentiable by `moving`; outputs of a batch lead with its row axis.

    With what it promises a march that ends up batched is never traced for one trajectory.
    """
    leaves, treedef = jax.tree.flatten((moving, still))
    march = _March(rule, treedef, len(jax.tree.leaves(moving)), promise)
    out = _run_p.bind(*leaves, march=march, rows=None)
    return jax.tree.unflatten(jax.tree.structure((promise.values, promise.rest)), out)


class _March:
    """A rule and what is needed to stage it. Its forms are functions of (held, linear) operands, flat."""

    def __init__(self, rule: Rule, treedef: Any, moving: int, promise: Promise) -> None:
        self.rule, self.treedef, self.effects = rule, treedef, promise.effects
        self.values, self.rest = jax.tree.leaves(promise.values), jax.tree.leaves(promise.rest)
        self.out = jax.tree.structure((promise.values, promise.rest))
        self.operands, self.moving = treedef.num_leaves, moving
        self.kept: Any = None  # the structure of what is kept
        self.staged: dict = {}
        self.compiled: dict = {}

    def batch(self, rows: tuple | None) -> Batch | None:
        return None if rows is None else Batch(rows[0], jax.tree.unflatten(self.treedef, rows[1]))

    def run(self, rows: tuple | None, platform: str | None) -> Callable:
        def form(held: Sequence, _: Sequence) -> tuple[list, list]:
            return jax.tree.leaves(self.rule.run(self.batch(rows), platform)(*self.unflatten(held))), []

        return form

    def record(self, rows: tuple | None, platform: str | None) -> Callable:
        def form(held: Sequence, _: Sequence) -> tuple[list, list]:
            values, rest, kept = self.rule.record(self.batch(rows), platform)(*self.unflatten(held))
            leaves, self.kept = jax.tree.flatten(kept)
            return [*jax.tree.leaves((values, rest)), *leaves], []

        return form

    def joint(self, rows: tuple | None, platform: str | None, active: tuple) -> Callable:
        def form(held: Sequence, tangents: Sequence) -> tuple[list, list]:
            run = self.run(rows, platform)

            def values(*moved: Any) -> tuple[list, list]:
                leaves = list(held)
                for i, x in zip(active, moved, strict=True):
                    leaves[i] = x
                out = run(leaves, [])[0]
                return out[: len(self.values)], out[len(self.values) :]

            out, dots, rest = jax.jvp(values, [held[i] for i in active], list(tangents), has_aux=True)
            return [*out, *rest], dots

        return form

    def tangent(self, rows: tuple | None, platform: str | None, active: tuple) -> Callable:
        """Of (operands, results of `record`) and tangents; it marches anew, so what was recorded is for the transpose."""

        def form(held: Sequence, tangents: Sequence) -> tuple[list, list]:
            return [], self.joint(rows, platform, active)(held[: self.operands], tangents)[1]

        return form

    def pull(self, rows: tuple | None, platform: str | None, active: tuple) -> Callable:
        def form(held: Sequence, cotangents: Sequence) -> tuple[list, list]:
            moving, still = self.unflatten(held[: self.operands])
            results = held[self.operands :]
            n = len(self.values) + len(self.rest)
            values, rest = jax.tree.unflatten(self.out, results[:n])
            kept = jax.tree.unflatten(self.kept, results[n:])
            bars = jax.tree.unflatten(jax.tree.structure(values), cotangents)
            moved = jax.tree.leaves(self.rule.pull(self.batch(rows), platform)(moving, still, values, rest, kept, bars))
            return [], [moved[i] for i in active]

        return form

    def unflatten(self, held: Sequence) -> tuple:
        return jax.tree.unflatten(self.treedef, held)


def _form(march: _March, kind: str, rows: tuple | None, over: tuple, active: tuple, platform: str | None) -> Callable:
    """A form as a function of flat operands; `over` are axes that it is mapped over, each the places of the axis in the held
    ones.
    """
    form = getattr(march, kind)(rows, platform, *([active] if kind in _LINEAR else []))
    for axes in over:
        form = jax.vmap(form, (list(axes), 0), (0 if any(a is not None for a in axes) else None, 0))

    def flat(*operands: Any) -> list:
        given = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in operands]
        held = len(over[0]) if over else _held(march, kind, given, active)
        out, linear = form(list(given[:held]), list(given[held:]))
        return [*out, *linear]

    return flat


_LINEAR = ("joint", "tangent", "pull")


def _held(march: _March, kind: str, operands: Sequence, active: tuple) -> int:
    """How many operands come before the tangents or cotangents."""
    linear = {"joint": len(active), "tangent": len(active), "pull": len(march.values)}.get(kind, 0)
    return len(operands) - linear


def _stage(march: _March, kind: str, rows: tuple | None, over: tuple, active: tuple, platform: str | None, avals: Sequence) -> Any:
    key = (kind, rows, over, active, platform, tuple(avals))
    if key not in march.staged:
        structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
        march.staged[key] = jax.make_jaxpr(_form(march, kind, rows, over, active, platform))(*structs)
    return march.staged[key]


def _abstract(kind: str, *avals: Any, march: _March, rows: tuple | None, over: tuple = (), active: tuple = ()) -> tuple:
    """What comes out: promised, but for what is recorded."""
    if kind == "record":
        return _stage(march, kind, rows, (), (), None, avals).out_avals, march.effects
    row = () if rows is None else (rows[0],)
    sizes = []
    held = _held(march, kind, avals, active)
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
        inner = [_without(avals[i], [axes[i] for axes in reversed(over)]) for i in active]
        out += [jax.core.ShapedArray(lead + a.shape, a.dtype) for a in inner]
    return out, march.effects


def _without(aval: Any, axes: Sequence) -> Any:
    """The shape of an operand inside the maps over some of its axes."""
    shape = list(aval.shape)
    for a in axes:
        if a is not None:
            del shape[a]
    return jax.core.ShapedArray(tuple(shape), aval.dtype)


def _evaluate(kind: str, *operands: Any, march: _March, rows: tuple | None, over: tuple = (), active: tuple = ()) -> list:
    """Outside `jax.jit`: compiled all the same, once for each form, unless that is switched off."""
    if jax.config.jax_disable_jit:  # pyright: ignore
        return _form(march, kind, rows, over, active, jax.default_backend())(*operands)
    key = (kind, rows, over, active)
    if key not in march.compiled:
        params = {"march": march, "rows": rows, **({"over": over, "active": active} if kind in _LINEAR else {})}
        march.compiled[key] = jax.jit(partial(_PRIMITIVES[kind].bind, **params))
    return march.compiled[key](*operands)


def _lower(
    kind: str,
    platform: str | None,
    ctx: Any,
    *operands: Any,
    march: _March,
    rows: tuple | None,
    over: tuple = (),
    active: tuple = (),
) -> Any:
    platform = None if kind == "record" else platform
    staged = jaxpr_as_fun(_stage(march, kind, rows, over, active, platform, ctx.avals_in))
    return mlir.lower_fun(staged, multiple_results=True)(ctx, *operands)


def _differentiate(kind: str, primals: tuple, tangents: tuple, *, march: _March, rows: tuple | None, **params: Any) -> tuple:
    """Derivatives of the forms that JAX takes by itself: of a recorded march, and second ones."""
    f = _form(march, kind, rows, params.get("over", ()), params.get("active", ()), None)
    moving = [i for i, v in enumerate(tangents) if not isinstance(v, ad.Zero)]

    def moved(*xs: Any) -> list:
        leaves = list(primals)
        for i, x in zip(moving, xs, strict=True):
            leaves[i] = x
        return f(*leaves)

    out, dots = jax.jvp(moved, [primals[i] for i in moving], [tangents[i] for i in moving])
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in out]
    return out, [v if yes else _zero(x) for x, v, yes in zip(out, dots, inexact, strict=True)]


def _zero(x: Any) -> ad.Zero:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _run_jvp(primals: tuple, tangents: tuple, *, march: _March, rows: tuple | None) -> tuple:
    active = tuple(i for i, v in enumerate(tangents[: march.moving]) if not isinstance(v, ad.Zero))
    if not active:
        out = _run_p.bind(*primals, march=march, rows=rows)
        return out, [_zero(x) for x in out]
    out = _joint_p.bind(*primals, *(tangents[i] for i in active), march=march, rows=rows, over=(), active=active)
    n = len(march.values) + len(march.rest)
    return out[:n], [*out[n:], *(_zero(x) for x in out[len(march.values) : n])]


def _split_joint(trace: Any, *tracers: Any, march: _March, rows: tuple | None, over: tuple, active: tuple) -> list:
    """Where reverse mode follows: the march is recorded now, and its tangent waits to be transposed."""
    params = {"march": march, "rows": rows, "over": over, "active": active}
    held, moved = tracers[: march.operands], tracers[march.operands :]
    if over or all(t.is_known() for t in moved) or not all(t.is_known() for t in held):
        return trace.default_process_primitive(_joint_p, tracers, params)
    results = _record_p.bind(*(t.pval.get_known() for t in held), march=march, rows=rows)
    known = [trace.new_const(x) for x in results]
    dots = trace.default_process_primitive(_tangent_p, [*held, *known, *moved], params)
    return [*known[: len(march.values) + len(march.rest)], *dots]


def _split_joint_again(saveable: Any, unknown: Sequence[bool], staged: Sequence[bool], eqn: Any) -> tuple:
    """The same under `jax.checkpoint`, which runs the march now, and the whole equation again where it goes back."""
    march, n = eqn.params["march"], eqn.params["march"].operands
    outputs = len(march.values) + len(march.rest)
    if any(unknown[:n]) or eqn.params["over"]:
        known, unknown_out = None, [True] * len(eqn.outvars)
    else:
        run = {"march": march, "rows": eqn.params["rows"]}
        known = eqn.replace(primitive=_run_p, invars=eqn.invars[:n], outvars=eqn.outvars[:outputs], params=run)
        unknown_out = [i >= outputs for i in range(len(eqn.outvars))]
    needed = [x for x, there in zip(eqn.invars, staged, strict=True) if not there and not hasattr(x, "val")]  # literals have one
    return known, eqn, unknown_out, [True] * len(eqn.outvars), needed


def _transpose(cotangents: Sequence, *operands: Any, march: _March, rows: tuple | None, over: tuple, active: tuple) -> list:
    held = operands[: len(operands) - len(active)]
    bars = [ad.instantiate_zeros(c) for c in cotangents]
    back = _pull_p.bind(*held, *bars, march=march, rows=rows, over=over, active=active)
    return [None] * len(held) + list(back)


def _batch(kind: str, axis: Any, operands: tuple, dims: tuple, *, march: _March, rows: tuple | None, **params: Any) -> tuple:
    """Under `vmap`: a direction, a batch of rows, or rows folded into those that are there."""
    if any(getattr(e, "name", None) == axis.name for e in march.effects):
        raise TypeError(
            f"f reduces over the axis {axis.name!r} of the jax.vmap around its solve, but trajectories of a batch march by "
            "themselves: to normalise over the batch, let y0 be the whole batch, one state"
        )
    primitive, over, active = _PRIMITIVES[kind], params.get("over", ()), params.get("active", ())
    bind = partial(primitive.bind, march=march)
    if all(d is None for d in dims):  # a solve that no mapped operand reaches is not a batch: it is done once
        out = bind(*operands, rows=rows, **params)
        return out, [None] * len(out)
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    count = _held(march, kind, operands, active)
    held, linear, held_dims, linear_dims = operands[:count], operands[count:], dims[:count], dims[count:]
    outer = tuple(d is not None for d in held_dims)
    plain = any(any(a is not None for a in axes) for axes in over)
    # A row's own gradient of an operand that rows share is no sum over rows. A small operand is repeated for each row then;
    # for a large one the form for fewer rows is mapped, so that products with it stay products of matrices.
    if kind == "pull" and any(outer):
        small = [i for i in active if not outer[i] and held[i].size <= SMALL]
        held = [_moved(x, None, 0, size) if i in small else x for i, x in enumerate(held)]
        held_dims = [0 if i in small else d for i, d in enumerate(held_dims)]
        outer = tuple(d is not None for d in held_dims)
    own = kind == "pull" and not all(outer[i] for i in active)
    if not any(outer) or plain or own:
        linear = [_moved(x, d, 0, size) for x, d in zip(linear, linear_dims, strict=True)]
        out = bind(*held, *linear, rows=rows, **{**params, "over": (*over, tuple(held_dims))})
        first = len(out) - _linear(march, kind, out)
        place = 0 if any(outer) else None
        return out, [place] * first + [0] * (len(out) - first)
    return _batch_rows(bind, march, kind, rows, size, (held, held_dims), (linear, linear_dims), params)


def _batch_rows(
    bind: Callable, march: _March, kind: str, rows: tuple | None, size: int, held_: tuple, linear_: tuple, params: dict
) -> tuple:
    """The form for rows, or for more of them: operands that are held and linear ones, each with the places of the new axis."""
    (held, held_dims), (linear, linear_dims) = held_, linear_
    active, depth = params.get("active", ()), len(params.get("over", ()))
    results = [i >= march.operands for i in range(len(held))]  # what was recorded differs by row
    owner = active if kind in ("joint", "tangent") else ()  # a tangent has rows where its operand has them
    moved = {i for i, d in zip(owner, linear_dims, strict=False) if d is not None}
    held = [
        x if d is None and not (of or i in moved) else _moved(x, d, 0, size)
        for i, (x, d, of) in enumerate(zip(held, held_dims, results, strict=True))
    ]
    outer = tuple(d is not None or i in moved for i, d in enumerate(held_dims[: march.operands]))
    lead = [outer[i] for i in owner] or [True] * len(linear)
    linear = [_moved(x, d, depth, size) if o else x for x, d, o in zip(linear, linear_dims, lead, strict=True)]
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


def _row_axes(march: _March, kind: str, out: Sequence, depth: int) -> list[int]:
    """Where the row axis of each output is: behind the directions in what is linear, first elsewhere."""
    linear = _linear(march, kind, out)
    return [0] * (len(out) - linear) + [depth] * linear


def _linear(march: _March, kind: str, out: Sequence) -> int:
    """How many outputs, the last ones, are tangents or cotangents."""
    return {"joint": len(march.values), "tangent": len(out), "pull": len(out)}.get(kind, 0)


def _moved(x: Array, axis: int | None, place: int, size: int) -> Array:
    """The axis moved to its place, or made there."""
    if axis is None:
        return jnp.broadcast_to(jnp.expand_dims(x, place), (*x.shape[:place], size, *x.shape[place:]))
    return jnp.moveaxis(x, axis, place)


def _fold(x: Array, at: int, size: int, inner_size: int, outer: bool, inner: bool) -> Array:
    """Fold an outer row axis into an inner one, behind `at` axes, repeating the operand along the axis it lacks."""
    if not (outer or inner):
        return x
    x = x if outer else jnp.expand_dims(x, at)
    x = x if inner else jnp.expand_dims(x, at + 1)
    lead, rest = x.shape[:at], x.shape[at + 2 :]
    return jnp.broadcast_to(x, (*lead, size, inner_size, *rest)).reshape(*lead, size * inner_size, *rest)


_PRIMITIVES = {kind: Primitive(f"march_{kind}") for kind in ("run", "record", *_LINEAR)}
_run_p, _record_p, _joint_p, _tangent_p, _pull_p = _PRIMITIVES.values()
for _kind, _p in _PRIMITIVES.items():
    _p.multiple_results = True
    _p.def_impl(partial(_evaluate, _kind))
    _p.def_effectful_abstract_eval(partial(_abstract, _kind))
    for _platform in ("cpu", "cuda", "rocm", "tpu"):
        mlir.register_lowering(_p, partial(_lower, _kind, _platform), platform=_platform)
    mlir.register_lowering(_p, partial(_lower, _kind, None))
    ad.primitive_jvps[_p] = _run_jvp if _kind == "run" else partial(_differentiate, _kind)
    batching.fancy_primitive_batchers[_p] = partial(_batch, _kind)
pe.custom_partial_eval_rules[_joint_p] = _split_joint
pe.partial_eval_jaxpr_custom_rules[_joint_p] = _split_joint_again
ad.primitive_transposes[_tangent_p] = _transpose


_only_forward_p = Primitive("only_forward")


def only_forward(tree: Any, message: str) -> Any:
    """The identity. To differentiate it in reverse raises a TypeError with this message."""
    return jax.tree.map(lambda x: _only_forward_p.bind(x, message=message), tree)


def _refuse(*_: Any, message: str) -> Any:
    raise TypeError(message)


batching.defvectorized(_only_forward_p)
_only_forward_p.def_abstract_eval(lambda x, message: x)
_only_forward_p.def_impl(lambda x, message: x)
mlir.register_lowering(_only_forward_p, lambda ctx, x, message: [x])
ad.deflinear2(_only_forward_p, _refuse)
