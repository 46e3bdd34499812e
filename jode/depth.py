"""Residual networks and their ODEs: from one to the other, and how far apart they are.

A residual network of N layers is x_{n+1} = x_n + h f(t_n, x_n, θ_n) with t_n = n h and h = span / N: Euler's method for
dx/dt = f(t, x, θ(t / span)), where θ(n / N) = θ_n. Weights are stacked: a pytree, such as an Equinox module or a dict, whose
arrays lead with depth. Under `Layers(method, degree=1)` the N slices are weights at the nodes of N - 1 steps, and θ(n / (N -
1)) = θ_n.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from jode.adjoint import Adjoint, Backprop
from jode.grid import Layers
from jode.ivp import odeint
from jode.method import Method, RungeKutta, dopri5, euler
from jode.tree import depth_of, is_inexact


def resnet(
    f: Callable,
    x: Any,
    weights: Any,
    *,
    method: Method = euler,
    degree: int = 0,
    span: float | None = None,
    adjoint: Adjoint = Backprop(),
) -> Any:
    """The output of a residual network, one step of `method` a layer: x ← x + h f(t, x, θ_n) under Euler.

    Args:
        f: the residual block f(t, x, w) of one example, with the shapes of x; t is the depth at which the step starts.
        x: the input, any pytree of floating arrays.
        weights: stacked, see `stack`: N slices lead every array.
        method: `euler` (1 evaluation a layer), `heun` (2), or any other.
        degree: 0 where each step has weights of its own, frozen in it; 1 where slices are the weights at the ends of N - 1
            steps: with `heun` the network of Sander, Ablin & Peyré 2022.
        span: depth runs over [0, span], so that h = span / steps: 1.0 is the scaling of the ODE, 1/N a layer. None is one
        unit a
            layer, x + f(n, x, θ_n). Independent layers want 1/√N: span = √N (Cohen et al. 2021).
        adjoint: any but `Backsolve`; `MemoryFree()` keeps no states, with errors that fall with depth.

    Returns:
        x at the last layer, NaN where the network overflowed; `jode.solve` with `Layers` gives every layer, and a status.

    Raises:
        TypeError: for a block with a state (running statistics of a batch): use group or layer normalisation, which have
        none. To
            normalise over the batch let x be the whole batch, one state: the statistics are then those of x at every layer, in
            the reverse march too.
    """
    weights = _arrays(weights)
    ts = (0.0, float(depth_of(weights, "weights") - degree) if span is None else span)
    return jax.tree.map(lambda y: y[-1], odeint(f, x, ts, weights, solver=Layers(method, degree), adjoint=adjoint))


# A list of blocks, and its stack.


def stack(blocks: Sequence[Any]) -> Any:
    """Equal blocks (modules, dicts, any pytrees) as one, whose arrays and floats lead with depth.

    What is not an array, such as an activation function, must be the same in all. Raises ValueError, naming block and leaf,
    where structure, shape, dtype or such a leaf differs, and TypeError for Equinox layers with a state.
    """
    if not blocks:
        raise ValueError("stack: blocks must not be empty")
    blocks = [_arrays(b) for b in blocks]
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
    weights = _arrays(weights)
    return [_map(lambda x, n=n: x[n], weights) for n in range(depth_of(weights, "weights"))]


def untie(block: Any, n: int) -> Any:
    """One block as the stacked weights of n equal layers, from then on free to differ."""
    return _map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), _arrays(block))


# Weights as functions of depth.


def interpolate(weights: Any, t: Any, degree: int = 1, steps: int | None = None) -> Any:
    """θ(t), 0 ≤ t ≤ 1: the piecewise polynomial of depth with θ(n / steps) = θ_n.

    Args:
        weights: stacked, N slices.
        t: depth, a fraction of the whole; an array of depths gives stacked weights.
        degree: 0, constant from each node to the next; 1, a line; 3, a cubic whose slope at a node is that between its
        neighbours.
            Integers and keys are always constant.
        steps: N, the default, where slice n is that of the step that begins at n / N, and the last one stays to the end; N -
        1 for
            weights at both ends.
    """
    weights = _arrays(weights)
    steps = _steps(weights, steps)
    u = jnp.clip(jnp.asarray(t, jnp.result_type(float)), 0, 1) * steps
    n = jnp.minimum(jnp.floor(u).astype(jnp.int32), steps - 1)
    return _at(_pieces(weights, degree, steps), n, u - n.astype(u.dtype))


def field(f: Callable, *, degree: int = 1, steps: int | None = None, span: float = 1.0) -> Callable:
    """The vector field F(t, x, weights) = f(t, x, θ(t / span)), which any solver can run from 0 to span: the network as an ODE.

    Euler's method with N steps gives the network back. `degree` and `steps` are those of `interpolate`. A gradient by the
    weights costs memory and time for all N slices at each evaluation; `Layers` does not.
    """
    return lambda t, x, weights: f(t, x, interpolate(weights, t / span, degree, steps))


def refine(weights: Any, factor: float, degree: int = 0, steps: int | None = None) -> Any:
    """The weights of `factor` times as many steps: θ'_i = θ(i / (factor · steps)), which for degree 0 is θ_⌊i / factor⌋.

    The function changes by O(1/N) (degree 1, smooth weights) if `span` stays. Raises ValueError unless factor · steps is whole.
    """
    weights = _arrays(weights)
    steps = _steps(weights, steps)
    many = round(factor * steps)
    if many < 1 or abs(many - factor * steps) > 1e-6:
        raise ValueError(f"refine: factor times {steps} steps must be a whole number of steps, got factor = {factor}")
    i = np.arange(many + depth_of(weights, "weights") - steps)
    n = np.minimum(i * steps // many, steps - 1)  # in integers: nodes fall on nodes
    return _at(_pieces(weights, degree, steps), jnp.asarray(n), jnp.asarray((i * steps - n * many) / many))


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
    k = depth_of(_arrays(coefficients), "coefficients")
    phi = basis(jnp.asarray(t, jnp.result_type(float)), k)
    return _map(lambda x: jnp.tensordot(phi.astype(x.dtype), x, 1), _arrays(coefficients))


def project(weights: Any, k: int, basis: Callable = legendre) -> Any:
    """The k coefficients whose `expand` at n / N is nearest to the weights, by least squares; k = N gives them exactly."""
    weights = _arrays(weights)
    n = depth_of(weights, "weights")
    inverse = jnp.linalg.pinv(basis(jnp.asarray(np.arange(n) / n), k))
    return _map(lambda x: jnp.tensordot(inverse.astype(x.dtype), x, 1), weights)


# Smoothness in depth.


def smoothness(weights: Any) -> Array:
    """N max_n ‖θ_{n+1} - θ_n‖ over all leaves: it stays bounded as N grows where weights are a function of depth, and grows
    like N (or, scaled by 1/√N, like √N) where they are independent. `jax.tree.map(smoothness, weights)` tells it leaf by
    leaf.
    """
    n = depth_of(_arrays(weights), "weights")
    return n * jnp.sqrt(jnp.max(_squares(weights), initial=0.0))


def roughness(weights: Any) -> Array:
    """N Σ_n ‖θ_{n+1} - θ_n‖², which tends to ∫ ‖dθ/dt‖² dt: a penalty that keeps weights smooth in depth."""
    n = depth_of(_arrays(weights), "weights")
    return n * jnp.sum(_squares(weights))


def sobolev(gradient: Any, mu: float) -> Any:
    """The gradient G in the inner product ∫ (G D + μ G' D') dt of functions of depth: (1 - μ d²/dt²) G = g, G' = 0 at both
    ends.

    It descends as g does (⟨G, g⟩ > 0) and is smooth where g is not (Baravdish et al. 2022). Differences stand for
    derivatives; one tridiagonal system, O(N).
    """
    gradient = _arrays(gradient)
    n = depth_of(gradient, "gradient")
    weight = mu * n * n
    neighbours = np.full(n, 2.0)
    neighbours[[0, -1]] = 1.0 if n > 1 else 0.0

    def smooth(x: Array) -> Array:
        off = jnp.full(n, -weight, x.dtype)
        lower, upper = off.at[0].set(0), off.at[-1].set(0)
        diagonal = jnp.asarray(1 + weight * neighbours, x.dtype)
        return jax.lax.linalg.tridiagonal_solve(lower, diagonal, upper, x.reshape(n, -1)).reshape(x.shape)

    return _map(smooth, gradient)


def smooth_init(key: Array, init: Callable[[Array], Any], n: int, turn: float = np.pi / 2) -> Any:
    """Weights of n layers that are smooth in depth: θ(t) = cos(turn t) A + sin(turn t) B, with A and B two draws of init(key).

    Every layer has the mean-zero draw's own variance (and its law, if normal), and ‖dθ/dt‖ ≤ turn √(‖A‖² + ‖B‖²); numbers
    that both draws share, such as ones and zeros, stay. turn = 0 ties all layers. A network that starts as the discretisation
    of an ODE and is trained with smooth activations stays one (Marion, Wu, Sander & Biau 2024).
    """
    a, b = (_arrays(init(k)) for k in jax.random.split(key))
    angle = jnp.asarray(turn * np.arange(n) / n)

    def turned(x: Any, y: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if not is_inexact(x):
            return jnp.broadcast_to(x, (n, *x.shape))
        by = angle.astype(x.dtype).reshape((n,) + (1,) * x.ndim)
        return jnp.where(x == y, x, jnp.cos(by) * x[None] + jnp.sin(by) * y[None])

    return jax.tree.map(turned, a, b)


# How far a network is from its ODE.


class Bound(NamedTuple):
    """`value` = h/2 · `curvature` · (e^(L span) - 1) / L, where L is `lipschitz` and curvature the largest ‖d²x/dt²‖."""

    value: Array
    curvature: Array
    lipschitz: Array


def distance(
    f: Callable, weights: Any, x: Any, *, solver: Layers = Layers(euler), degree: int = 1, span: float = 1.0, substeps: int = 8
) -> Array:
    """max_n ‖x_n - x(t_n)‖ for one example: how far the layers are from the ODE through their weights.

    The ODE is dx/dt = f(t, x, θ(t / span)) with θ = `interpolate(weights, ·, degree)`, solved by `substeps` steps of order 5
    a layer, with which its error is far below the distance unless ‖∂f/∂x‖ h is large. It is O(1/N) for Euler, and O(1/N²) for
    Heun with weights at nodes, where weights are smooth in depth (Sander, Ablin & Peyré 2022). Costs N (1 + 6 substeps)
    evaluations.
    """
    at, flow = _paths(f, _arrays(weights), x, solver, degree, span, substeps)
    return jnp.max(jnp.linalg.norm(at - flow[::substeps], axis=1))


def distance_bound(
    f: Callable,
    weights: Any,
    x: Any,
    *,
    degree: int = 1,
    span: float = 1.0,
    lipschitz: float | None = None,
    substeps: int = 8,
) -> Bound:
    """A bound on `distance` for Euler's method: C h (e^(L T) - 1) / (2 L), h = T / N and T the span; C T h / 2 for L = 0.

    With e_n = x_n - x(t_n), Taylor gives e_{n+1} = e_n + h [f(x_n) - f(x(t_n))] - ∫ (t_{n+1} - s) ẍ(s) ds, hence
    ‖e_{n+1}‖ ≤ (1 + h L) ‖e_n‖ + C h² / 2, and with e_0 = 0 that sums to the bound. C = max ‖ẍ‖, ẍ = ∂f/∂t + ∂f/∂θ θ' + ∂f/∂x
    f, is needed along the solution alone, and L = max ‖∂f/∂x‖ along the segments from x(t_n) to x_n alone; C is sampled
    `substeps` + 1 times a layer, L thrice. Equality where f does not depend on x and ẍ is constant.

    L takes a Jacobian of all of x at 3 N places: for large states give `lipschitz`. It covers Euler's method and real states.
    """
    weights = _arrays(weights)
    solver, steps = Layers(euler), _steps(weights, None)
    at, flow = _paths(f, weights, x, solver, degree, span, substeps)
    x, unravel = ravel_pytree(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError("distance_bound: x must be real")
    h = span / steps
    pieces, join = _split(_pieces(weights, degree, steps))
    ts = jnp.asarray(np.arange(steps) * h, x.dtype)

    def slope(t: Array, y: Array, n: Array, a: list) -> Array:
        return ravel_pytree(f(t, unravel(y), _piece(join(a), t / h - n)))[0].astype(x.dtype)

    def layer(xs: tuple) -> tuple[Array, Array]:
        n, t, a, path, net = xs

        def acceleration(k: Array, y: Array) -> Array:
            moment = t + k * jnp.asarray(h / substeps, x.dtype)
            return jax.jvp(lambda t, y: slope(t, y, n, a), (moment, y), (jnp.ones_like(t), slope(moment, y, n, a)))[1]

        curvature = jnp.linalg.norm(jax.vmap(acceleration)(jnp.arange(substeps + 1).astype(x.dtype), path), axis=1)
        if lipschitz is not None:
            return jnp.max(curvature), jnp.asarray(lipschitz, x.dtype)
        places = jnp.stack([path[0], (path[0] + net) / 2, net])
        jacobians = jax.vmap(jax.jacfwd(lambda y: slope(t, y, n, a)))(places)
        return jnp.max(curvature), jnp.max(jnp.linalg.norm(jacobians, ord=2, axis=(1, 2)))

    windows = np.arange(steps)[:, None] * substeps + np.arange(substeps + 1)
    counts = jnp.arange(steps).astype(x.dtype)
    C, L = (jnp.max(v) for v in jax.lax.map(layer, (counts, ts, pieces, flow[windows], at[:-1])))
    growth = jnp.where(L * span > 1e-6, jnp.expm1(L * span) / jnp.where(L > 0, L, 1), span)
    return Bound(h / 2 * C * growth, C, L)


def reconstruction_error(f: Callable, weights: Any, x: Any, *, solver: Layers = Layers(euler), span: float = 1.0) -> Array:
    """RMS(x̃_0 - x_0) / RMS(x_0): what `MemoryFree` makes of the input after marching to the last layer and back by inverse
    steps.

    For Euler ‖x̃_n - x_n‖ ≤ (B/N)((1 + L/N)^(N-n) - 1) ≤ (e^L - 1) B / N, B = sup ‖f‖, L the Lipschitz constant of f in x
    (span 1): one inverse step errs by h ‖f(x_{n+1}) - f(x_n)‖ ≤ h² L B, and errors grow by 1 + h L a step. No smoothness in
    depth is needed. Heun with weights at nodes errs by O(1/N³) where f and weights are smooth, and by O(1/N) where weights
    are rough. Runge-Kutta methods only: reversible ones err by rounding.
    """
    if not isinstance(solver.method, RungeKutta):
        raise ValueError(f"reconstruction_error: {solver.method!r} is inverted exactly; only Runge-Kutta methods are not")
    weights = _arrays(weights)
    last = jax.tree.map(lambda y: y[-1], odeint(f, x, (0.0, span), weights, solver=solver))
    # The inverse step is the step with its ends swapped, so the way back is a network too: backwards in time, slices reversed.
    back = jax.tree.map(lambda y: y[-1], odeint(f, last, (span, 0.0), _map(lambda w: w[::-1], weights), solver=solver))
    x, back = ravel_pytree(x)[0], ravel_pytree(back)[0]
    return jnp.linalg.norm(back - x) / jnp.linalg.norm(x)


def _paths(f: Callable, weights: Any, x: Any, solver: Layers, degree: int, span: float, substeps: int) -> tuple[Array, Array]:
    """States at each layer, and those of the ODE at `substeps` times as many depths, as vectors."""
    steps = depth_of(weights, "weights") - solver.degree
    layers = odeint(f, x, jnp.linspace(0.0, span, steps + 1), weights, solver=solver)
    pieces = _map(lambda a: jnp.repeat(a, substeps, axis=0), _pieces(weights, degree, steps))
    index = jnp.repeat(jnp.arange(steps), substeps)  # an integer: it has no gradient

    def inside(t: Array, y: Any, args: tuple) -> Any:
        a, n = args
        return f(t, y, _piece(a, t * (steps / span) - n.astype(t.dtype)))

    flow = odeint(inside, x, jnp.linspace(0.0, span, steps * substeps + 1), (pieces, index), solver=Layers(dopri5))
    vector = jax.vmap(lambda y: ravel_pytree(y)[0])
    return vector(layers), vector(flow)


# Weights as piecewise polynomials: θ(c) = Σ_k a_k c^k on each step, c the fraction of it. Coefficients are the second axis.


def _pieces(weights: Any, degree: int, steps: int) -> Any:
    """Coefficients on each step; of integers and keys, which are constant, only the first."""
    if degree not in (0, 1, 3):
        raise ValueError(f"degree must be 0 (constant), 1 (linear) or 3 (cubic), got {degree!r}")

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

    return _map(leaf, weights)


def _piece(coefficients: Any, c: Array) -> Any:
    """Σ_k a_k c^k, by Horner's rule."""

    def leaf(a: Array) -> Array:
        total = a[-1]
        for k in range(a.shape[0] - 2, -1, -1):
            total = total * c.astype(a.dtype) + a[k]
        return total

    return _map(leaf, coefficients)


def _at(pieces: Any, n: Array, c: Array) -> Any:
    """The weights a fraction c into step n; arrays of both give stacked weights."""
    if n.ndim:
        return _split(pieces)[1](jax.vmap(lambda n, c: _split(_at(pieces, n, c))[0])(n, c))
    return _piece(_map(lambda a: jax.lax.dynamic_index_in_dim(a, n, 0, keepdims=False), pieces), c)


def _squares(weights: Any) -> Array:
    """‖θ_{n+1} - θ_n‖² over all leaves with gradients."""
    leaves = [x for x in jax.tree.leaves(_arrays(weights)) if isinstance(x, jax.Array) and is_inexact(x)]
    return sum((jnp.sum(jnp.abs(x[1:] - x[:-1]).reshape(len(x) - 1, -1) ** 2, axis=1) for x in leaves), jnp.zeros(()))


def _steps(weights: Any, steps: int | None) -> int:
    n = depth_of(weights, "weights")
    if steps is None:
        return n
    if steps not in (n, n - 1) or steps < 1:
        raise ValueError(f"steps must be the number of slices, {n}, or {n - 1} for weights at both ends, got {steps}")
    return steps


def _map(leaf: Callable, tree: Any) -> Any:
    """The tree with its arrays mapped and the rest as it is."""
    return jax.tree.map(lambda x: leaf(x) if isinstance(x, jax.Array) else x, tree)


def _split(tree: Any) -> tuple[list[Array], Callable[[list], Any]]:
    """The arrays of a tree, and the function that puts others in their places."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def join(arrays: list) -> Any:
        merged = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            merged[i] = x
        return jax.tree.unflatten(treedef, merged)

    return [leaves[i] for i in places], join


def _arrays(tree: Any) -> Any:
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


def _kind(x: Any) -> str:
    return f"an array {x.dtype}{list(x.shape)}" if isinstance(x, jax.Array) else repr(x)
