"""A function that carries its own batched form, so that `vmap` of a march is one native loop.

`native(form, operands)` calls `form(None)`, a function of the operands for one trajectory. Under `jax.vmap` it calls
`form(Batch(size, mapped))` instead: the same function written for a batch, told which operands differ from row to row, so
that what is shared (the weights of a network) stays shared, in the loop and in its cotangent. Nested `vmap`s fold into
one batch. These are the only lines that touch JAX's extension interface (`jax.extend`, `jax.interpreters`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jode.tree import State

SMALL = 32  # components up to which a state is small
FEW = 4


class Batch(NamedTuple):
    """How many rows, and which operands (a pytree of bools like the operands) have a leading row axis."""

    size: int
    mapped: Any


class Promise(NamedTuple):
    """What a form returns for one trajectory (a pytree of shapes and dtypes), and the effects of running it."""

    out: Any
    effects: Any


class _Native:
    """A form and what is needed to stage it: the jaxpr of each batch it was asked for, traced once."""

    def __init__(self, form: Callable[[Batch | None], Callable], treedef: Any, promise: Promise | None, effects: Any) -> None:
        self.form, self.treedef, self.promise, self.jaxprs, self.out_tree = form, treedef, promise, {}, None
        self.effects = promise.effects if promise else effects

    def flat(self, rows: tuple | None) -> Callable:
        batch = None if rows is None else Batch(rows[0], jax.tree.unflatten(self.treedef, rows[1]))
        f = self.form(batch)

        def flat(*leaves: Any) -> list:
            out, self.out_tree = jax.tree.flatten(f(*jax.tree.unflatten(self.treedef, leaves)))
            return out

        return flat

    def jaxpr(self, rows: tuple | None, avals: tuple) -> Any:
        key = (rows, avals)
        if key not in self.jaxprs:
            structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
            self.jaxprs[key] = jax.make_jaxpr(self.flat(rows))(*structs)
        return self.jaxprs[key]


_native_p = Primitive("native_march")
_native_p.multiple_results = True


def native(form: Callable[[Batch | None], Callable], *operands: Any, promise: Promise | None = None, effects: Any = ()) -> Any:
    """Call form(None)(*operands), or under `vmap` form(batch)(*operands): outputs then all lead with the row axis.

    With a `promise` of what comes out, a form that ends up batched is never traced for one trajectory.
    """
    leaves, treedef = jax.tree.flatten(operands)
    carrier = _Native(form, treedef, promise, effects)
    out = _native_p.bind(*leaves, carrier=carrier, rows=None)
    return jax.tree.unflatten(carrier.out_tree, out)


def _abstract(*avals: Any, carrier: _Native, rows: tuple | None) -> tuple:
    if carrier.promise is not None:
        out, carrier.out_tree = jax.tree.flatten(carrier.promise.out)
        lead = (rows[0],) if rows else ()
        return [jax.core.ShapedArray(lead + x.shape, x.dtype) for x in out], carrier.effects
    staged = carrier.jaxpr(rows, avals)
    return staged.out_avals, staged.effects  # a vector field may print, or call back to count its own calls


def _impl(*leaves: Any, carrier: _Native, rows: tuple | None) -> list:
    return carrier.flat(rows)(*leaves)


def _lower(ctx: Any, *leaves: Any, carrier: _Native, rows: tuple | None) -> Any:
    staged = jaxpr_as_fun(carrier.jaxpr(rows, tuple(ctx.avals_in)))
    return mlir.lower_fun(staged, multiple_results=True)(ctx, *leaves)


def _jvp(primals: tuple, tangents: tuple, *, carrier: _Native, rows: tuple | None) -> tuple:
    moving = [i for i, v in enumerate(tangents) if not isinstance(v, ad.Zero)]

    def f(*moved: Any) -> list:
        leaves = list(primals)
        for i, x in zip(moving, moved, strict=True):
            leaves[i] = x
        return carrier.flat(rows)(*leaves)

    out, dots = jax.jvp(f, [primals[i] for i in moving], [tangents[i] for i in moving])
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in out]
    return out, [v if yes else ad.Zero(jax.typeof(x).to_tangent_aval()) for x, v, yes in zip(out, dots, inexact, strict=True)]


def _batch(axis: Any, leaves: tuple, dims: tuple, *, carrier: _Native, rows: tuple | None) -> tuple:
    if any(getattr(e, "name", None) == axis.name for e in carrier.effects):
        raise TypeError(
            f"f reduces over the axis {axis.name!r} of the jax.vmap around its solve, but trajectories of a batch march by "
            "themselves: to normalise over the batch, let y0 be the whole batch, one state"
        )
    if all(d is None for d in dims):  # a solve that no mapped operand reaches is not a batch: it is done once
        out = _native_p.bind(*leaves, carrier=carrier, rows=rows)
        return out, [None] * len(out)
    size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)
    leaves = tuple(x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, dims, strict=True))
    outer = tuple(d is not None for d in dims)
    if rows is None:
        out = _native_p.bind(*leaves, carrier=carrier, rows=(size, outer))
        return out, [0] * len(out)
    inner_size, inner = rows
    folded = [_fold(x, size, inner_size, o, i) for x, o, i in zip(leaves, outer, inner, strict=True)]
    mapped = tuple(o or i for o, i in zip(outer, inner, strict=True))
    out = _native_p.bind(*folded, carrier=carrier, rows=(size * inner_size, mapped))
    return [x.reshape(size, inner_size, *x.shape[1:]) for x in out], [0] * len(out)


def _fold(x: Array, size: int, inner_size: int, outer: bool, inner: bool) -> Array:
    """Fold an outer row axis into an inner one, repeating the operand along the axis it lacks."""
    if not (outer or inner):
        return x
    x = x if outer else x[None]
    x = x if inner else x[:, None]
    x = jnp.broadcast_to(x, (size, inner_size, *x.shape[2:]))
    return x.reshape(size * inner_size, *x.shape[2:])


_native_p.def_impl(_impl)
_native_p.def_effectful_abstract_eval(_abstract)
mlir.register_lowering(_native_p, _lower)
ad.primitive_jvps[_native_p] = _jvp
batching.fancy_primitive_batchers[_native_p] = _batch


_only_forward_p, _only_reverse_p, _cotangent_p = Primitive("only_forward"), Primitive("only_reverse"), Primitive("cotangent")


def only_forward(tree: Any, message: str) -> Any:
    """The identity. To differentiate it in reverse raises a TypeError with this message."""
    return jax.tree.map(lambda x: _only_forward_p.bind(x, message=message), tree)


def only_reverse(tree: Any, message: str) -> Any:
    """The identity. To differentiate it forwards raises a TypeError with this message; its gradients may be."""
    return jax.tree.map(lambda x: _only_reverse_p.bind(x, message=message), tree)


def _refuse(*_: Any, message: str) -> Any:
    raise TypeError(message)


for _p in (_only_forward_p, _only_reverse_p):
    batching.defvectorized(_p)
    _p.def_abstract_eval(lambda x, message: x)
    _p.def_impl(lambda x, message: x)
    mlir.register_lowering(_p, lambda ctx, x, message: [x])
ad.deflinear2(_only_forward_p, _refuse)
# A tangent of only_reverse can be transposed, but not evaluated: transposing is all that reverse mode does with it.
ad.primitive_jvps[_only_reverse_p] = lambda xs, vs, message: (xs[0], _tangent(vs[0], message))
ad.deflinear2(_cotangent_p, lambda g, x, message: [g])
_cotangent_p.def_abstract_eval(lambda x, message: x)
_cotangent_p.def_impl(_refuse)
batching.primitive_batchers[_cotangent_p] = _refuse
mlir.register_lowering(_cotangent_p, lambda ctx, x, message: _refuse(message=message))


def _tangent(v: Any, message: str) -> Any:
    return v if isinstance(v, ad.Zero) else _cotangent_p.bind(v, message=message)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie inside a march: nowhere (one trajectory), last (small states) or first (large ones).

    Numbers that differ by row are kept as *columns*, (1, B) or (B, 1), which broadcast against states (D, B) or (B, D).
    """

    size: int | None = None
    axis: int = 0

    @classmethod
    def of(cls, batch: Batch | None, state_size: int) -> Rows:
        if batch is None:
            return cls()
        # Small states want unit stride along the rows; large ones want each row whole, as convolutions and matrix
        # products do.
        return cls(batch.size, -1 if state_size <= SMALL else 0)

    def enter(self, x: Array, mapped: bool, lead: int = 0) -> Array:
        """From the leading row axis of an operand to this place, behind `lead` axes (save times, layers)."""
        if self.size is None or not mapped:
            return x
        return jnp.moveaxis(x, 0, -1 if self.axis == -1 else lead)

    def leave(self, x: Array, lead: int = 0) -> Array:
        """The inverse of `enter`."""
        if self.size is None:
            return x
        return jnp.moveaxis(x, -1 if self.axis == -1 else lead, 0)

    def column(self, x: Array, mapped: bool = True) -> Array:
        """Numbers (B, ...) as columns (..., 1, B) or (..., B, 1); shared numbers stay as they are."""
        if self.size is None or not mapped:
            return x
        return jnp.expand_dims(jnp.moveaxis(x, 0, -1), -2 if self.axis == -1 else -1)

    def flat(self, column: Array) -> Array:
        """The inverse of `column`."""
        if self.size is None:
            return column
        return jnp.moveaxis(column.squeeze(-2 if self.axis == -1 else -1), -1, 0)

    def spread(self, x: Array) -> Array:
        """A shared number or a column, as a column."""
        if self.size is None:
            return x
        return jnp.broadcast_to(x, (1, self.size) if self.axis == -1 else (self.size, 1))

    def over_time(self, table: Array) -> Array:
        """A table of numbers by save time, shaped to broadcast against states by save time."""
        return table[:, None] if self.size is None else table

    def sum(self, x: Array) -> Array:
        """Sum over the components of each row, as a column."""
        if self.size is None and x.ndim == 1 and 0 < x.shape[0] <= FEW:
            return reduce(jnp.add, [x[i] for i in range(x.shape[0])])
        if self.size is None:
            return jnp.sum(x)
        if self.axis == -1 and x.ndim == 2 and 0 < x.shape[0] <= FEW:
            return reduce(jnp.add, [x[i : i + 1] for i in range(x.shape[0])])
        return jnp.sum(x, axis=-2 if self.axis == -1 else -1, keepdims=True)

    def all(self, x: Array) -> Array:
        if self.size is None and x.ndim == 1 and 0 < x.shape[0] <= FEW:
            return reduce(jnp.logical_and, [x[i] for i in range(x.shape[0])])  # fuses with what reads it; a reduction does not
        if self.size is None:
            return jnp.all(x)
        return jnp.all(x, axis=-2 if self.axis == -1 else -1, keepdims=True)

    def finite(self, y: State) -> Array:
        """Whether every component of each row is finite, as a column."""
        return reduce(jnp.logical_and, [self.all(jnp.isfinite(x)) for x in y], self.spread(jnp.array(True)))

    def lift(self, f: Callable, mapped: Any) -> Callable:
        """The vector field of one trajectory, f(t, y, params), for these rows; `mapped` flags the leaves of params."""
        if self.size is None:
            return f
        axes = jax.tree.map(lambda m: self.axis if m else None, mapped)

        def lifted(t: Array, y: Any, params: Any) -> Any:
            t_axis = None if t.ndim == 0 else 0
            t = t if t.ndim == 0 else self.flat(t)
            return jax.vmap(f, (t_axis, self.axis, axes), self.axis)(t, y, params)

        return lifted

    def pick(self, table: Array, j: Array) -> Array:
        """table[j], where each row may ask for its own entry j of the first axis."""
        if self.size is None:
            return jax.lax.dynamic_index_in_dim(table, j, 0, keepdims=False)
        if table.ndim == 1:
            return table[j]
        return jnp.take_along_axis(table, jnp.broadcast_to(j[None], (1, *table.shape[1:])), 0)[0]

    def write(self, table: Array, j: Array, value: Array) -> Array:
        """The table with entry j of the first axis set, row by row; a row's entry out of range is dropped."""
        if self.size is None:
            return jax.lax.dynamic_update_index_in_dim(table, value, j, 0)
        j, r = self.flat(j), jnp.arange(self.size)
        if self.axis == -1:
            return table.at[j, :, r].set(value.T, mode="drop", unique_indices=True)
        return table.at[j, r].set(value, mode="drop", unique_indices=True)

    def pick_state(self, table: Array, j: Array) -> Array:
        """The state table[j], where each row may ask for its own entry j of the first axis."""
        if self.size is None:
            return jax.lax.dynamic_index_in_dim(table, j, 0, keepdims=False)
        j, r = self.flat(j), jnp.arange(self.size)
        return table[j, :, r].T if self.axis == -1 else table[j, r]

    def add_at(self, table: Array, j: Array, value: Array) -> Array:
        """A table of numbers, shared or by row, with each row's value added to its entry j."""
        if self.size is None:
            return table.at[j].add(value)
        j, value, r = self.flat(j), self.flat(value), jnp.arange(self.size)
        if table.ndim == 1:
            return table.at[j].add(value)
        return table.at[j, 0, r].add(value) if self.axis == -1 else table.at[j, r, 0].add(value)

    def gather(self, column: Array, like: Array) -> Array:
        """A column of cotangents as the cotangent of a number: summed where rows share the number."""
        return jnp.sum(column) if like.ndim == 0 and self.size is not None else column
