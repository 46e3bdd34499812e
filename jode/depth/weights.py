"""Stacked weights as functions of depth: stacks of blocks, interpolation, bases, smoothness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.depth.arguments import alike, as_arrays, described, fits, floating, map_arrays, split, steps_of
from jode.tree import depth_of, is_inexact, magnitude, work_dtype

# A list of blocks, and its stack.


def stack(blocks: Sequence[Any]) -> Any:
    """Equal blocks (modules, dicts, any pytrees) as one, whose arrays and floats lead with depth.

    What is not an array, such as an activation function, must be the same in all. Raises ValueError, naming block and leaf,
    where structure, shape, dtype or such a leaf differs, and TypeError for Equinox layers with a state.
    """
    if not blocks:
        raise ValueError("stack: blocks must not be empty")
    blocks = [as_arrays(b) for b in blocks]
    first, treedef = jax.tree_util.tree_flatten_with_path(blocks[0])
    columns: list[list] = [[x] for _, x in first]
    for n, block in enumerate(blocks[1:], 1):
        leaves, other = jax.tree.flatten(block)
        if other != treedef:
            raise ValueError(f"stack: block {n} has the structure {other}, block 0 {treedef}")
        for (path, x), y, column in zip(first, leaves, columns, strict=True):
            if _kind(x) != _kind(y):
                name = jax.tree_util.keystr(path)
                raise ValueError(f"stack: {name} is {_kind(y)} in block {n}, {_kind(x)} in block 0: blocks must be equal in shape")
            column.append(y)
    return jax.tree.unflatten(treedef, [jnp.stack(c) if isinstance(c[0], jax.Array) else c[0] for c in columns])


def unstack(weights: Any) -> list[Any]:
    """The inverse of `stack`: a list of blocks."""
    weights = as_arrays(weights)
    return [map_arrays(lambda x, n=n: x[n], weights) for n in range(depth_of(weights, "weights"))]


def untie(block: Any, n: int) -> Any:
    """n copies of one block, stacked: n layers that start equal and are trained each for itself."""
    return map_arrays(lambda x: jnp.broadcast_to(x, (n, *x.shape)), as_arrays(block))


# Weights as functions of depth.


def interpolate(weights: Any, t: Any, degree: int = 1, steps: int | None = None) -> Any:
    """θ(t), 0 ≤ t ≤ 1: the piecewise polynomial of depth with θ(n / steps) = θ_n.

    Args:
        weights: stacked, N slices.
        t: depth, a fraction of the whole; an array of depths gives stacked weights.
        degree: 0, constant from each node to the next; 1, a line; 3, a cubic whose slope at a node is that between its
            neighbours. Integers and keys are always constant.
        steps: N, the default, where slice n is that of the step that begins at n / N, and the last one stays to the end;
            N - 1 for weights at both ends.
    """
    weights = as_arrays(weights)
    steps = steps_of(weights, steps)
    t = jnp.asarray(t) if jnp.issubdtype(jnp.result_type(t), jnp.floating) else jnp.asarray(t, jnp.result_type(float))
    u = jnp.clip(t, 0, 1).astype(jnp.result_type(float)) * steps
    node, slack = jnp.round(u), 4 * float(jnp.finfo(t.dtype).eps) * jnp.maximum(u, 1)
    u = jnp.where(jnp.abs(u - node) <= slack, node, u)  # n / N is node n, rounding or not
    n = jnp.minimum(jnp.floor(u).astype(jnp.int32), steps - 1)
    return _at(pieces(weights, degree, steps), n, u - n.astype(u.dtype))


def field(f: Callable, *, degree: int = 1, steps: int | None = None, span: float | None = None) -> Callable:
    """The network as an ODE: the vector field F(t, x, weights) = f(t, x, θ(t / span)), for any solver that runs from 0 to span.

    Euler's method with N steps gives the network back, whatever the degree: a network says what its weights are at N depths, and
    not what they are between. So it has an ODE for each reading, and whether it *is* an ODE is a question for each:

    - `degree=0`, weights constant within each layer: is one step a layer fine enough? Neighbouring layers may differ as they like.
    - `degree=1`, weights on lines between neighbours: that, and are the layers samples of a function of depth? A network of
      independent layers may be an ODE by the first question, and is none by the second.

    `jode.validity.swap(..., of=F)` prints which one was asked. A gradient by the weights costs memory and time for all N slices at
    each evaluation; a gradient through `Layers` does not.

    Args:
        f: the residual block f(t, x, w) of one example.
        degree: that of `interpolate`: the piecewise polynomial through the weights.
        steps: that of `interpolate`: N, or N - 1 for weights at both ends.
        span: the depth of the last layer, as in `resnet`. None is one unit per layer: span = steps.

    Returns:
        F, for `Fixed` and `Adaptive`. It wants all slices of the weights at every evaluation. `Layers` hands over one slice
        per step: give it f itself.

    Raises:
        TypeError: when F is traced, if the weights it was given are one slice, which f takes and the interpolation does not.
    """
    return _Field(f, degree, steps, span)


@dataclass(frozen=True)
class _Field:
    """`field` as a value: equal fields compile once."""

    wants_all_layers = True  # so `Layers`, which hands over one, is refused
    f: Callable
    degree: int
    steps: int | None
    span: float | None

    def __str__(self) -> str:
        reading = ["constant within each layer", "on lines between layers"][self.degree]
        return f"the ODE with weights {reading} (degree {self.degree})"

    def __call__(self, t: Array, x: Any, weights: Any) -> Any:
        try:
            span = steps_of(as_arrays(weights), self.steps) if self.span is None else self.span
            slope = self.f(t, x, interpolate(weights, t / span, self.degree, self.steps))
        except Exception as error:
            if fits(self.f, t, x, weights):
                raise _one_layer(weights) from error
            raise
        if not alike(slope, x) and fits(self.f, t, x, weights):
            raise _one_layer(weights)
        return slope


def _one_layer(weights: Any) -> TypeError:
    return TypeError(
        f"depth.field: weights must be all layers, stacked, and these are one layer, which f takes as it is: {described(weights)}. "
        "Under Layers, which hands over one layer per step, give f itself: depth.field is for Fixed and Adaptive"
    )


def refine(weights: Any, factor: float, degree: int = 0, steps: int | None = None) -> Any:
    """The weights of `factor` times as many steps: θ'_i = θ(i / (factor · steps)), which for degree 0 is θ_⌊i / factor⌋.

    The function changes by O(1/N) (degree 1, smooth weights) if `span` stays. Raises ValueError unless factor · steps is whole.
    """
    weights = as_arrays(weights)
    steps = steps_of(weights, steps)
    many = round(factor * steps)
    if many < 1 or abs(many - factor * steps) > 1e-6:
        raise ValueError(f"refine: factor times {steps} steps must be a whole number of steps, got factor = {factor}")
    i = np.arange(many + depth_of(weights, "weights") - steps)
    n = np.minimum(i * steps // many, steps - 1)  # in integers: nodes fall on nodes
    return _at(pieces(weights, degree, steps), jnp.asarray(n), jnp.asarray((i * steps - n * many) / many))


def legendre(t: Array, k: int) -> Array:
    """The first k Legendre polynomials on [0, 1], normalised: ∫ φ_i φ_j dt = δ_ij; the last axis counts them."""
    x, rows = 2 * t - 1, [jnp.ones_like(t), 2 * t - 1]
    for n in range(1, k - 1):
        rows.append(((2 * n + 1) * x * rows[n] - n * rows[n - 1]) / (n + 1))
    return jnp.stack([row * np.sqrt(2 * n + 1) for n, row in enumerate(rows[:k])], -1)


def cosine(t: Array, k: int) -> Array:
    """1, √2 cos πt, √2 cos 2πt, …: k functions, orthonormal on [0, 1]."""
    return jnp.stack([jnp.cos(n * np.pi * t) * (np.sqrt(2) if n else 1) for n in range(k)], -1)


def expand(coefficients: Any, t: Any, basis: Callable = legendre) -> Any:
    """θ(t) = Σ_k φ_k(t) θ_k, for coefficients stacked along a leading axis; an array of depths gives stacked weights.

    Stateful-ODE nets and ContinuousNet (Queiruga et al. 2020, 2021) train the θ_k, and choose the depth afterwards.
    """
    coefficients = floating(coefficients, "expand: coefficients")
    k = depth_of(coefficients, "coefficients")
    phi = basis(jnp.asarray(t, jnp.result_type(float)), k)
    return map_arrays(lambda x: jnp.tensordot(phi.astype(x.dtype), x, 1), coefficients)


def project(weights: Any, k: int, basis: Callable = legendre) -> Any:
    """The k coefficients whose `expand` at n / N is nearest to the weights, by least squares; k = N gives them exactly."""
    weights = floating(weights, "project: weights")
    n = depth_of(weights, "weights")
    inverse = jnp.linalg.pinv(basis(jnp.asarray(np.arange(n) / n), k))
    return map_arrays(lambda x: jnp.tensordot(inverse.astype(x.dtype), x, 1), weights)


# Smoothness in depth.


def smoothness(weights: Any) -> Array:
    """N max_n ‖θ_{n+1} - θ_n‖ over all leaves: it stays bounded as N grows where weights are a function of depth, and grows
    like N (or, scaled by 1/√N, like √N) where they are independent. Of one leaf it is `smoothness(leaf)`.
    """
    n = depth_of(as_arrays(weights), "weights")
    return n * root(jnp.max(_squares(weights), initial=0.0))


def roughness(weights: Any) -> Array:
    """N Σ_n ‖θ_{n+1} - θ_n‖², which tends to ∫ ‖dθ/dt‖² dt: a penalty that keeps weights smooth in depth."""
    n = depth_of(as_arrays(weights), "weights")
    return n * jnp.sum(_squares(weights))


def sobolev(gradient: Any, mu: float) -> Any:
    """The gradient G in the inner product ∫ (G D + μ G' D') dt of functions of depth: (1 - μ d²/dt²) G = g, G' = 0 at both
    ends.

    It descends as g does (⟨G, g⟩ > 0) and is smooth where g is not (Baravdish et al. 2022). Differences stand for
    derivatives; by cosine waves, O(N log N).
    """
    gradient = floating(gradient, "sobolev: gradient")
    n = depth_of(gradient, "gradient")
    eigenvalues = 1 + 4 * mu * n**2 * np.sin(np.pi * np.fft.fftfreq(2 * n)) ** 2

    def smooth(x: Array) -> Array:
        y = x.astype(work_dtype(x.dtype)).reshape(n, -1)
        waves = jnp.fft.fft(jnp.concatenate([y, y[::-1]]), axis=0)  # even about both ends: their slopes are zero there
        found = jnp.fft.ifft(waves / jnp.asarray(eigenvalues, waves.dtype)[:, None], axis=0)[:n]
        return (found if jnp.iscomplexobj(x) else found.real).astype(x.dtype).reshape(x.shape)

    return map_arrays(smooth, gradient)


def smooth_init(key: Array, init: Callable[[Array], Any], n: int, turn: float = np.pi / 2) -> Any:
    """Weights of n layers that are smooth in depth: θ(t) = cos(turn t) A + sin(turn t) B, with A and B two draws of init(key).

    Every layer has the mean-zero draw's own variance (and its law, if normal), and ‖dθ/dt‖ ≤ turn √(‖A‖² + ‖B‖²); numbers
    that both draws share, such as ones and zeros, stay. turn = 0 ties all layers. A network that starts as the discretisation
    of an ODE and is trained with smooth activations stays one (Marion, Wu, Sander & Biau 2024).
    """
    a, b = (as_arrays(init(k)) for k in jax.random.split(key))
    angle = jnp.asarray(turn * np.arange(n) / n)

    def turned(x: Any, y: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if not is_inexact(x):
            return jnp.broadcast_to(x, (n, *x.shape))
        by = angle.astype(x.dtype).reshape((n,) + (1,) * x.ndim)
        return jnp.where(x == y, x, jnp.cos(by) * x[None] + jnp.sin(by) * y[None])

    return jax.tree.map(turned, a, b)


# Weights as piecewise polynomials: θ(c) = Σ_k a_k c^k on each step, c the fraction of it. Coefficients are the second axis.


def pieces(weights: Any, degree: int, steps: int, name: str = "degree") -> Any:
    """Coefficients on each step; of integers and keys, which are constant, only the first."""
    if degree not in (0, 1, 3):
        raise ValueError(f"{name} must be 0 (constant), 1 (linear) or 3 (cubic), got {degree!r}")

    def leaf(x: Array) -> Array:
        if not is_inexact(x) or degree == 0:
            return x[:steps, None]
        nodes = jnp.concatenate([x, x[-1:]])[: steps + 1]  # beyond the last node weights stay
        rise = nodes[1:] - nodes[:-1]
        if degree == 1:
            return jnp.stack([nodes[:-1], rise], 1)
        slopes = jnp.concatenate([rise[:1], (rise[1:] + rise[:-1]) / 2, rise[-1:]])
        left, right = slopes[:-1], slopes[1:]
        return jnp.stack([nodes[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise], 1)

    return map_arrays(leaf, weights)


def piece(coefficients: Any, c: Array) -> Any:
    """Σ_k a_k c^k, by Horner's rule."""

    def leaf(a: Array) -> Array:
        total = a[-1]
        for k in range(a.shape[0] - 2, -1, -1):
            total = total * c.astype(a.dtype) + a[k]
        return total

    return map_arrays(leaf, coefficients)


def _at(coefficients: Any, n: Array, c: Array) -> Any:
    """The weights a fraction c into step n; arrays of both give stacked weights."""
    if n.ndim:
        return split(coefficients)[1](jax.vmap(lambda n, c: split(_at(coefficients, n, c))[0])(n, c))
    return piece(map_arrays(lambda a: jax.lax.dynamic_index_in_dim(a, n, 0, keepdims=False), coefficients), c)


def _squares(weights: Any) -> Array:
    """‖θ_{n+1} - θ_n‖² over all leaves with gradients."""
    leaves = [x for x in jax.tree.leaves(as_arrays(weights)) if isinstance(x, jax.Array) and is_inexact(x)]
    return sum((jnp.sum(magnitude(x[1:] - x[:-1]) ** 2, axis=tuple(range(1, x.ndim))) for x in leaves), jnp.zeros(()))


def root(x: Array) -> Array:
    """√x, with slope 0 at 0; NaN stays NaN."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def _kind(x: Any) -> str:
    return f"an array {x.dtype}{list(x.shape)}" if isinstance(x, jax.Array) else repr(x)
