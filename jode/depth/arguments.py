"""What the functions of this room are given: states, stacked weights and their order, checked, and refused in words."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.control import Layers
from jode.dependencies import cached
from jode.method import euler
from jode.tree import depth_of, is_inexact, merge, partition, widest, work_dtype

P = ParamSpec("P")
T = TypeVar("T")


def ordered(measure: Callable[P, T]) -> Callable[P, T]:
    """A function of (f, x, weights, …) that says so where it fails because these have changed places.

    Costs nothing where the function does not fail. Where it does, f is traced twice, for the shapes alone.
    """

    @wraps(measure)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        given = inspect.signature(measure).bind(*args, **kwargs).arguments
        f, x, weights, axes = given["f"], given["x"], given["weights"], given.get("depth_axes", 0)
        name = measure.__name__
        if not callable(f):
            raise TypeError(f"{name}: f must be a function f(t, x, w), got {described(f)}; the order is f, x, weights")
        if not all(_finite(v) for v in jax.tree.leaves(x)):
            raise ValueError(f"{name}: x must be finite, got {described(x)} with NaN or infinity in it")
        try:
            return measure(*args, **kwargs)
        except Exception as error:
            if _fits_network(f, weights, x) and not _fits_network(f, x, weights, axes):
                raise TypeError(
                    f"{name}: x and weights have changed places: the order is f, x, weights; got x = {described(x)} and "
                    f"weights = {described(weights)}"
                ) from error
            if isinstance(weights, (list, tuple)):
                error.add_note(f"{name}: if weights is a list of layers, stack them first: jode.depth.stack(layers)")
            raise

    return checked


def compiled(measure: Callable) -> Callable:
    """A function (f, data, *options) as one program, compiled once for each f and what it depends on, shapes of data and options
    that can be hashed.
    """

    def inner(static: tuple, arrays: list) -> Any:
        f, data, options = static
        return measure(f, merge(arrays, data), *options)

    program = cached(inner, static=(0,))

    @wraps(measure)
    def outer(f: Callable, data: Any, *options: Any) -> Any:
        arrays, still = partition(data, jax.Array)
        return program(((f, *filter(callable, options)), data), (f, still, options), arrays)

    return outer


def _fits_network(f: Callable, x: Any, weights: Any, depth_axes: Any = 0) -> bool:
    """Whether the first layer of the stacked weights takes the state x."""
    try:
        weights = as_arrays(weights)
        leaves, treedef = jax.tree.flatten(weights)
        leading = Layers(euler, depth_axes=depth_axes).leading(weights)
        first = jax.tree.unflatten(treedef, [a[0] if m else a for a, m in zip(leaves, leading, strict=True)])
        t = jnp.zeros((), widest(*(jnp.asarray(v).dtype for v in jax.tree.leaves(x)), default=jnp.result_type(float)))
    except Exception:
        return False
    return fits(f, t, x, first)


def fits(f: Callable, t: Array, x: Any, w: Any) -> bool:
    """Whether f(t, x, w) can be traced and has the structure and the shapes of x."""
    try:
        arrays, join = split(as_arrays(w))
        x = jax.tree.map(jnp.asarray, x)
        return alike(jax.eval_shape(lambda t, x, arrays: f(t, x, join(arrays)), t, x, arrays), x)
    except Exception:
        return False


def _finite(x: Any) -> bool:
    """False where values are known, and one is NaN or infinite."""
    known = isinstance(x, (jax.Array, np.ndarray, float)) and not isinstance(x, jax.core.Tracer)
    return not known or not is_inexact(jnp.asarray(x)) or bool(np.isfinite(np.asarray(x)).all())


def alike(a: Any, b: Any) -> bool:
    """Whether two pytrees are equal in structure and shapes."""
    (a, one), (b, other) = (jax.tree.flatten(v) for v in (a, b))
    return one == other and [getattr(v, "shape", ()) for v in a] == [getattr(v, "shape", ()) for v in b]


def described(tree: Any, most: int = 4) -> str:
    """The arrays of a pytree in a line: where they are, their dtypes and shapes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    if not any(hasattr(x, "shape") for _, x in leaves):
        return type(tree).__name__
    said = [f"{jax.tree_util.keystr(path)} {x.dtype}{list(x.shape)}".strip() for path, x in leaves if hasattr(x, "shape")]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more arrays" if len(said) > most else "")


def as_arrays(tree: Any) -> Any:
    """The tree with NumPy arrays and floats as JAX arrays; modules that keep a state are refused."""
    modules = sys.modules.get("equinox")  # not imported: there are no modules then
    if modules is not None:
        index = modules.nn.StateIndex
        if any(isinstance(x, index) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, index))):
            raise TypeError(
                "weights hold an equinox layer with a state (StateIndex), such as BatchNorm, which a step cannot update: use "
                "GroupNorm or LayerNorm, or normalise over the batch with the whole batch as x"
            )
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, (np.ndarray, np.generic, float, complex)) else x, tree)


def floating(tree: Any, name: str) -> Any:
    """The tree, refused where an array is not floating."""
    tree = as_arrays(tree)
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(x, jax.Array) and not is_inexact(x):
            raise TypeError(f"{name}{jax.tree_util.keystr(path)} must be floating, got {x.dtype}")
    return tree


def working(x: Any) -> Any:
    """The state in the dtype that steps are computed in: small steps in half precision would be rounded away."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(work_dtype(jnp.asarray(x).dtype)), x)


def steps_of(weights: Any, steps: int | None) -> int:
    """How many steps the stacked weights make: as many as slices, or one fewer where `steps` says so."""
    n = depth_of(weights, "weights")
    if steps is None:
        return n
    if steps not in (n, n - 1) or steps < 1:
        raise ValueError(f"steps must be the number of slices, {n}, or {n - 1} for weights at both ends, got {steps}")
    return steps


def map_arrays(leaf: Callable, tree: Any) -> Any:
    """The tree with its arrays mapped and the rest as it is."""
    return jax.tree.map(lambda x: leaf(x) if isinstance(x, jax.Array) else x, tree)


def split(tree: Any) -> tuple[list[Array], Callable[[list], Any]]:
    """The arrays of a tree, and the function that puts others in their places."""
    arrays, static = partition(tree, jax.Array)  # no array stays in the function: it may be of a trace
    return arrays, lambda arrays: merge(arrays, static)
