"""Linear algebra on states; the only place that knows dtypes.

Inside jode a state is *packed*: a tuple of vectors, one for each dtype among its leaves, so that a loop carries few
arrays whatever the user's pytree. Rows of a batch, where there are any, are one more axis of each vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

State = tuple[Array, ...]


def partition(tree: Any, kinds: Any) -> tuple[list, tuple]:
    """The leaves of a pytree of some kinds, and the rest, which can be hashed where its leaves can."""
    leaves, treedef = jax.tree.flatten(tree)
    chosen = tuple(isinstance(x, kinds) for x in leaves)
    still = tuple(None if yes else x for x, yes in zip(leaves, chosen, strict=True))
    types = tuple(map(type, still))  # 1 and True are equal, but not the same leaf
    return [x for x, yes in zip(leaves, chosen, strict=True) if yes], (treedef, chosen, still, types)


def merge(chosen: Sequence, static: tuple) -> Any:
    """The inverse of `partition`."""
    treedef, places, still, _ = static
    arrays = iter(chosen)
    return jax.tree.unflatten(treedef, [next(arrays) if yes else x for yes, x in zip(places, still, strict=True)])


def hashable(x: Any) -> bool:
    """Whether a value can be hashed."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class Layout:
    """How the leaves of a user's state lie in packed vectors."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @classmethod
    def of(cls, y: Any) -> Layout:
        leaves, treedef = jax.tree.flatten(y)
        return cls(treedef, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the leaves of each packed vector, in order of appearance."""
        kinds = dict.fromkeys(self.dtypes)
        return tuple(tuple(i for i, d in enumerate(self.dtypes) if d == kind) for kind in kinds)

    @property
    def like(self) -> Any:
        """The user's state as shapes and dtypes."""
        leaves = [jax.ShapeDtypeStruct(s, d) for s, d in zip(self.shapes, self.dtypes, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)

    @property
    def nbytes(self) -> int:
        return sum(_size(s) * jnp.dtype(d).itemsize for s, d in zip(self.shapes, self.dtypes, strict=True))

    @property
    def size(self) -> int:
        return sum(map(_size, self.shapes))

    @property
    def packed(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the packed vectors."""
        return tuple(jax.ShapeDtypeStruct((sum(_size(self.shapes[i]) for i in g),), self.dtypes[g[0]]) for g in self.groups)

    def leading(self, n: int) -> tuple[int, ...]:
        """How many components of each packed vector belong to the first n leaves; they come first in it."""
        return tuple(sum(_size(self.shapes[i]) for i in group if i < n) for group in self.groups)

    def pack(self, leaves: Sequence[Array]) -> State:
        vectors = [[leaves[i].reshape(-1) for i in group] for group in self.groups]
        xp: Any = np if all(isinstance(x, np.ndarray) for x in leaves) else jnp  # under a trace only NumPy's arrays stay known
        return tuple(v[0] if len(v) == 1 else xp.concatenate(v) for v in vectors)

    def unpack(self, state: State, lead: tuple[int, ...] = ()) -> list[Array]:
        """The leaves; `lead` are the shapes of axes in front of every vector (save times, rows)."""
        leaves: list[Any] = [None] * len(self.shapes)
        for group, vector in zip(self.groups, state, strict=True):
            start = 0
            for i in group:
                stop = start + _size(self.shapes[i])
                piece = vector if len(group) == 1 else vector[..., start:stop]
                leaves[i] = piece.reshape(lead + self.shapes[i])
                start = stop
        return leaves


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def depth_of(weights: Any, name: str) -> int:
    """The length that the leading axis of every array has."""
    depths = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(weights) if isinstance(x, jax.Array)}
    depth = next(iter(depths), None)
    if len(depths) != 1 or depth is None:
        raise ValueError(f"every array in {name} must lead with the same depth, got leading axes {sorted(map(str, depths))}")
    return depth


def is_inexact(x: Any) -> bool:
    """Whether a leaf carries gradients: floating or complex arrays do; integers, booleans and PRNG keys do not."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def work_dtype(dtype: Any) -> Any:
    """The dtype a step computes in: half precision states are stored in half and advanced in float32."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def real_dtype(dtype: Any) -> Any:
    """The real dtype of magnitudes of states of this dtype, at least float32."""
    return jnp.finfo(work_dtype(dtype)).dtype


def widest(*dtypes: Any, default: Any) -> Any:
    """The widest real dtype of states of these dtypes."""
    return max((real_dtype(d) for d in dtypes), key=lambda d: jnp.finfo(d).bits, default=default)


def _weighted(weights: Sequence[Any], ks: Sequence[Array], dtype: Any) -> Array | None:
    terms = []
    for w, k in zip(weights, ks, strict=True):
        if isinstance(w, float):
            if w != 0.0:
                terms.append(k.astype(dtype) if w == 1.0 else w * k.astype(dtype))
        else:
            terms.append(w.astype(dtype) * k.astype(dtype))
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total


def combine(h: Array, weights: Sequence[Any], ks: Sequence[State]) -> State:
    """h Σ w_i k_i, in the working dtype. Weights are Python floats (zeros cost nothing) or arrays."""
    out = []
    for vectors in zip(*ks, strict=True):
        dtype = work_dtype(vectors[0].dtype)
        total = _weighted(weights, vectors, dtype)
        out.append(jnp.zeros(vectors[0].shape, dtype) if total is None else h.astype(dtype) * total)
    return tuple(out)


def increment(y: State, h: Array, weights: Sequence[Any], ks: Sequence[State]) -> State:
    """y + h Σ w_i k_i, in the dtype of y."""
    if not any(not isinstance(w, float) or w != 0.0 for w in weights):
        return y
    return tuple((x.astype(d.dtype) + d).astype(x.dtype) for x, d in zip(y, combine(h, weights, ks), strict=True))


def combine_stacked(h: Array, weights: Array, stacked: State) -> State:
    """h Σ w_i k_i for slopes stacked along a leading axis; weights (n,), or (n, ...) where they differ by row."""
    out = []
    for K in stacked:
        dtype = work_dtype(K.dtype)
        w, k = weights.astype(dtype), K.astype(dtype)
        if w.ndim == 1 and k.ndim > 2:  # for rows of a batch a product is many times faster than a sum
            total = jnp.tensordot(w, k, 1, precision="highest")
        else:
            total = jnp.sum(w.reshape(w.shape + (1,) * (k.ndim - w.ndim)) * k, axis=0)
        out.append(h.astype(dtype) * total)
    return tuple(out)


def increment_stacked(y: State, h: Array, weights: Array, stacked: State) -> State:
    """y + h Σ w_i k_i for slopes stacked along a leading axis."""
    total = combine_stacked(h, weights, stacked)
    return tuple((x.astype(d.dtype) + d).astype(x.dtype) for x, d in zip(y, total, strict=True))


def stack(states: Sequence[State]) -> State:
    return tuple(jnp.stack(vectors) for vectors in zip(*states, strict=True))


def unstack(stacked: State, n: int) -> list[State]:
    """The inverse of `stack`."""
    return [tuple(x[i] for x in stacked) for i in range(n)]


def where(mask: Array, a: Any, b: Any) -> Any:
    """Choose between two pytrees of arrays, leaf by leaf; the mask broadcasts against every leaf."""
    return jax.tree.map(lambda x, y: jnp.where(mask, x, y), a, b)


def nan_unless(mask: Array, x: Array) -> Array:
    """x where the mask holds and NaN elsewhere. Where it holds everywhere no NaN is computed, so `jax_debug_nans` stays silent."""
    one = mask.astype(real_dtype(x.dtype))
    return x * (one / one).astype(x.dtype)


def add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def zeros_like(a: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, a)


def take(a: Any, i: Any) -> Any:
    """Entry i of the first axis of every leaf; a known place costs nothing."""
    if isinstance(i, (int, np.integer)):
        return jax.tree.map(lambda x: x[i], a)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), a)


def put(a: Any, i: Any, value: Any) -> Any:
    """`a` with entry i of the first axis of every leaf replaced."""
    return jax.tree.map(lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, i, 0), a, value)


def stack_full(n: int, like: Any, fill: Array) -> Any:
    """A table of n entries like `like`, each filled with a number that broadcasts against it."""
    return jax.tree.map(lambda x: jnp.broadcast_to(fill.astype(x.dtype), (n, *x.shape)), like)


def stack_zeros(n: int, like: Any) -> Any:
    return stack_full(n, like, jnp.zeros(()))


def magnitude(x: Array) -> Array:
    """|x| in a real dtype of at least float32."""
    return jnp.abs(x).astype(real_dtype(x.dtype))


def store(table: Any, i: Any, every: int, value: Any) -> Any:
    """A table with entry i / every of each leaf replaced where `every` divides i, and as it is elsewhere."""
    if every == 1:
        return put(table, i, value)
    j = i // every
    return put(table, j, where(i % every == 0, value, take(table, j)))


def blend(a: Array, b: Array, c: Any) -> Array:
    """(1 - c) a + c b."""
    c = jnp.asarray(c).astype(real_dtype(a.dtype))
    return ((1 - c) * a.astype(work_dtype(a.dtype)) + c * b.astype(work_dtype(a.dtype))).astype(a.dtype)


def programs_in(eqn: Any) -> list:
    """The programs that a traced equation calls."""
    return [x for x in jax.tree.leaves(list(eqn.params.values())) if hasattr(x, "eqns")]
