"""Where the rows of a batch lie inside a march."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.native import Batch
from jode.tree import State
from jode.tuning import SMALL, WRITTEN_OUT


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
        return cls(batch.size, -1 if state_size <= SMALL else 0)

    def to_layout(self, x: Array, mapped: bool, lead: int = 0) -> Array:
        """From the leading row axis of an operand to this place, behind `lead` axes (save times, layers)."""
        if self.size is None or not mapped:
            return x
        return jnp.moveaxis(x, 0, -1 if self.axis == -1 else lead)

    def from_layout(self, x: Array, lead: int = 0) -> Array:
        """The inverse of `to_layout`."""
        if self.size is None:
            return x
        return jnp.moveaxis(x, -1 if self.axis == -1 else lead, 0)

    def column(self, x: Array, mapped: bool = True) -> Array:
        """Numbers (B, ...) as columns (..., 1, B) or (..., B, 1); shared numbers stay as they are."""
        if self.size is None or not mapped:
            return x
        return jnp.expand_dims(jnp.moveaxis(x, 0, -1), -2 if self.axis == -1 else -1)

    def components(self, x: Array, mapped: bool) -> Array:
        """Numbers (n,), one for each component, or (B, n) by row, to broadcast against states."""
        if self.size is None or mapped:
            return self.to_layout(x, mapped)
        return jnp.expand_dims(x, -1 if self.axis == -1 else 0)

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
        if self.size is None and x.ndim == 1 and 0 < x.shape[0] <= WRITTEN_OUT:
            return reduce(jnp.add, [x[i] for i in range(x.shape[0])])
        if self.size is None:
            return jnp.sum(x)
        if self.axis == -1 and x.ndim == 2 and 0 < x.shape[0] <= WRITTEN_OUT:
            return reduce(jnp.add, [x[i : i + 1] for i in range(x.shape[0])])
        return jnp.sum(x, axis=-2 if self.axis == -1 else -1, keepdims=True)

    def all(self, x: Array) -> Array:
        if self.size is None and x.ndim == 1 and 0 < x.shape[0] <= WRITTEN_OUT:
            return reduce(jnp.logical_and, [x[i] for i in range(x.shape[0])])  # fuses with what reads it; a reduction does not
        if self.size is None:
            return jnp.all(x)
        return jnp.all(x, axis=-2 if self.axis == -1 else -1, keepdims=True)

    def finite(self, y: State) -> Array:
        """Whether every component of each row is finite, as a column."""
        return reduce(jnp.logical_and, [self.all(jnp.isfinite(x)) for x in y], self.spread(jnp.array(True)))

    def lift(self, f: Callable, mapped: Any) -> Callable:
        """The vector field of one trajectory, f(t, y, params), for these rows; `mapped` flags the leaves of params. More arguments
        are columns.
        """
        if self.size is None:
            return f

        def lifted(t: Array, y: Any, params: Any, *numbers: Array) -> Any:
            t_axis = None if t.ndim == 0 else 0
            t = t if t.ndim == 0 else self.flat(t)

            def along(axis: int) -> Any:
                """f of all rows, which lie along this axis where f sees them."""
                to = lambda x: jnp.moveaxis(x, self.axis, axis)
                axes = (t_axis, axis, jax.tree.map(lambda m: axis if m else None, mapped), *(0 for _ in numbers))
                given = jax.tree.map(to, y), jax.tree.map(lambda m, x: to(x) if m else x, mapped, params)
                out = jax.vmap(f, axes, axis)(t, *given, *map(self.flat, numbers))
                return jax.tree.map(lambda x: jnp.moveaxis(x, axis, self.axis), out)

            try:
                return along(self.axis)
            except NotImplementedError:  # the rules of some primitives, of sparse matrices among them, want rows in front
                return along(0)

        return lifted

    def vectors(self, y: State) -> Array:
        """All components of a state as one vector, (n,), or (B, n) for rows."""
        return jnp.concatenate([self.from_layout(x) for x in y], -1)

    def states(self, vectors: Array, like: State) -> State:
        """The inverse of `vectors`, in the dtypes of `like`."""
        sizes = [x.shape[0 if self.size is None or self.axis == -1 else 1] for x in like]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = [vectors[..., e - n : e] for n, e in zip(sizes, ends, strict=True)]
        return tuple(self.to_layout(v, True).astype(x.dtype) for v, x in zip(parts, like, strict=True))

    @property
    def component_axis(self) -> int:
        """The axis of the components of a state."""
        return 1 if self.size is not None and self.axis == 0 else 0

    def leading(self, x: Array, n: int) -> Array:
        """The first n components of each row."""
        return x[:, :n] if self.size is not None and self.axis == 0 else x[:n]

    def replaced_after(self, n: int, x: Array, other: Array) -> Array:
        """The first n components of each row of x, and the others of `other`."""
        axis = self.component_axis
        if n == x.shape[axis]:
            return x
        return jnp.concatenate([self.leading(x, n), jax.lax.slice_in_dim(other, n, None, axis=axis)], axis)

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
        if table.shape[0] <= 32:
            places = jnp.arange(table.shape[0], dtype=j.dtype).reshape(-1, 1, 1)
            return jnp.where(places == j[None], value[None].astype(table.dtype), table)
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

    def as_vector(self, column: Array) -> Array:
        """A number of each row as a state of one component."""
        return column[None] if self.size is None else self.spread(column)

    def number(self, vector: Array) -> Array:
        """The inverse of `as_vector`."""
        return vector[0] if self.size is None else vector

    def as_column(self, vectors: Array) -> Array:
        """The inverse of `as_vector`, of a table."""
        return vectors[:, 0] if self.size is None else vectors

    def repeated(self, x: Array) -> Array:
        """The vector of one trajectory for each row."""
        if self.size is None:
            return x
        return (
            jnp.broadcast_to(x[:, None], (*x.shape, self.size)) if self.axis == -1 else jnp.broadcast_to(x, (self.size, *x.shape))
        )

    def joined(self, xs: Any) -> Array:
        """Vectors of the same rows, one after another."""
        return jnp.concatenate(xs, axis=self.component_axis)

    def total(self, column: Array, like: Array) -> Array:
        """A column of cotangents as the cotangent of a number: summed where rows share the number."""
        return jnp.sum(column) if like.ndim == 0 and self.size is not None else column
