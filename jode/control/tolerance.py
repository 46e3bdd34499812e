"""Tolerances of a step's error: checked, laid out like the state, and the norm of errors in units of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.control.base import as_known, concrete
from jode.rows import Rows
from jode.tree import Layout, State, magnitude, nan_unless, real_dtype, widest


def checked_number(name: str, given: Any, shaped: bool = False) -> Any:
    """A number as an array, refused where it is known and out of range."""
    value = as_known(given, jnp.result_type(float))
    if value.ndim and not shaped:
        raise ValueError(f"Adaptive: {name} must be a scalar, got shape {value.shape}")
    if concrete(value) and name == "max_step" and not float(value) > 0:
        raise ValueError(f"Adaptive: max_step must be a width above zero, or None for any, got {float(value)}")
    if concrete(value) and name != "max_step" and not ((value >= 0) & np.isfinite(value)).all():
        raise ValueError(f"Adaptive: {name} must be finite and not negative, got {np.asarray(value)}")
    return value


def absolute_tolerance(atol: Any, y0: Any) -> Any:
    """The absolute tolerance: a number, or one for each component, packed as the state is."""
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(atol)) and jnp.ndim(atol) == 0:
        return checked_number("atol", atol)
    try:
        jax.tree.map(lambda a, y: None, atol, y0)
    except (ValueError, TypeError) as e:
        raise ValueError(
            f"Adaptive: atol must be a number, or have the structure of y0, {jax.tree.structure(y0)}, or of a prefix of it; got "
            f"{jax.tree.structure(atol)}"
        ) from e

    def spread(path: Any, a: Any, below: Any) -> Any:
        name = "atol" + jax.tree_util.keystr(path)
        a = checked_number(name, a, shaped=True)
        for y in jax.tree.leaves(below):
            if a.ndim > len(y.shape) or any(m not in (1, n) for m, n in zip(a.shape[::-1], y.shape[::-1], strict=False)):
                raise ValueError(f"Adaptive: {name} has shape {a.shape} and must broadcast against that of y0, {y.shape}")
        xp = np if concrete(a) else jnp
        return jax.tree.map(lambda y: xp.broadcast_to(a.astype(real_dtype(y.dtype)), y.shape), below)

    return Layout.of(y0).pack(jax.tree.leaves(jax.tree_util.tree_map_with_path(spread, atol, y0)))


@dataclass(frozen=True)
class Norm:
    """A user's norm of a pytree like the state, as one of the packed vectors of all rows."""

    norm: Callable
    layout: Layout

    @classmethod
    def of(cls, norm: Any, y0: Any) -> Norm:
        like = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, real_dtype(y.dtype)), y0)
        if not callable(norm):
            raise TypeError(f"Adaptive: norm must be a function of the scaled errors, a pytree like y0, got {norm!r}")
        out = jax.eval_shape(norm, like)
        if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"Adaptive: norm must return a floating scalar, got {out}")
        return cls(norm, Layout.of(y0))

    def __call__(self, rows: Rows, ratios: State) -> Array:
        """A column; of several states (`Backsolve`'s) the root mean square of their norms."""
        count = len(self.layout.groups)

        def one(ratios: State) -> Array:
            parts = [self.layout.unpack(ratios[i : i + count]) for i in range(0, len(ratios), count)]
            norms = [self.norm(jax.tree.unflatten(self.layout.treedef, x)) for x in parts]
            return norms[0] if len(norms) == 1 else jnp.sqrt(sum(x * x for x in norms) / len(norms))

        return one(ratios) if rows.size is None else rows.column(jax.vmap(one, (rows.axis,))(ratios))


def scaled_norm(norm: Norm | None, rows: Rows, measured: tuple | None, tol: dict, estimate: State, a: State, b: State) -> Array:
    """The norm over each row of |e| / (atol + rtol max(|a|, |b|)), by default the root mean square, as a column."""
    ratios: list = []
    total, count = rows.spread(jnp.zeros((), widest(*(x.dtype for x in a), default=jnp.float32))), 0
    if measured is not None:
        estimate, a, b = (tuple(rows.leading(x, n) for x, n in zip(s, measured, strict=True)) for s in (estimate, a, b))
    atol = tol["atol"]
    # Vectors that only observers fill are not measured: they have no tolerance.
    each = (*atol, *[jnp.zeros(())] * (len(a) - len(atol))) if isinstance(atol, tuple) else (atol,) * len(a)
    for e, x, z, absolute in zip(estimate, a, b, each, strict=True):
        size = jnp.maximum(magnitude(x), magnitude(z))
        scale = jnp.maximum(absolute.astype(size.dtype) + tol["rtol"].astype(size.dtype) * size, jnp.finfo(size.dtype).tiny)
        ratio = magnitude(e) / scale
        ratios.append(ratio)
        total = total + rows.sum(ratio * ratio).astype(total.dtype)
        count += x.size // (rows.size or 1)
    if norm is None or not ratios:
        return jnp.sqrt(total / max(1, count))
    n = len(ratios) if measured is None else len(norm.layout.groups)
    # What a norm leaves out must not hide a state that is not finite.
    return nan_unless(~jnp.isnan(total), norm(rows, tuple(ratios[:n])).astype(total.dtype))
