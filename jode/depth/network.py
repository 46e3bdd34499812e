"""A residual network, and how far it is from its ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from jode.adjoint import Adjoint, Backprop
from jode.depth.weights import as_arrays, map_arrays, piece, pieces, root, split, steps_of, working
from jode.grid import Layers
from jode.ivp import odeint
from jode.method import Method, RungeKutta, dopri5, euler
from jode.tree import depth_of, is_inexact, magnitude


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
    weights = as_arrays(weights)
    ts = (0.0, float(depth_of(weights, "weights") - degree) if span is None else span)
    return jax.tree.map(lambda y: y[-1], odeint(f, x, ts, weights, solver=Layers(method, degree), adjoint=adjoint))


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
    at, flow = _paths(f, as_arrays(weights), x, solver, degree, span, substeps)
    return root(jnp.max(jnp.sum(magnitude(at - flow[::substeps]) ** 2, axis=1)))


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
    weights = as_arrays(weights)
    solver, steps = Layers(euler), steps_of(weights, None)
    at, flow = _paths(f, weights, x, solver, degree, span, substeps)
    x, unravel = ravel_pytree(working(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError("distance_bound: x must be real")
    h, length = span / steps, abs(span)
    coefficients, join = split(pieces(weights, degree, steps))
    ts = jnp.asarray(np.arange(steps) * h, x.dtype)

    def slope(t: Array, y: Array, n: Array, a: list) -> Array:
        return ravel_pytree(f(t, unravel(y), piece(join(a), t / h - n)))[0].astype(x.dtype)

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
    C, L = (jnp.max(v) for v in jax.lax.map(layer, (counts, ts, coefficients, flow[windows], at[:-1])))
    growth = jnp.where(L * length > 1e-6, jnp.expm1(L * length) / jnp.where(L > 0, L, 1), length)
    return Bound(abs(h) / 2 * C * growth, C, L)


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
    weights = as_arrays(weights)
    last = jax.tree.map(lambda y: y[-1], odeint(f, x, (0.0, span), weights, solver=solver))
    # The inverse step is the step with its ends swapped, so the way back is a network too: backwards in time, slices reversed.
    steps = depth_of(weights, "weights") - solver.degree

    def turned(w: Array) -> Array:
        # Integers and keys of a step are those of its first node, in either direction.
        return w[::-1] if is_inexact(w) else jnp.concatenate([w[:steps][::-1], w[steps:]])

    back = jax.tree.map(lambda y: y[-1], odeint(f, last, (span, 0.0), map_arrays(turned, weights), solver=solver))
    x, back = ravel_pytree(x)[0], ravel_pytree(back)[0]
    return jnp.linalg.norm(back - x) / jnp.linalg.norm(x)


def _paths(f: Callable, weights: Any, x: Any, solver: Layers, degree: int, span: float, substeps: int) -> tuple[Array, Array]:
    """States at each layer, and those of the ODE at `substeps` times as many depths, as vectors."""
    steps, x = depth_of(weights, "weights") - solver.degree, working(x)
    if steps < 1 or span == 0:
        raise ValueError(f"want at least one step over a span that is not zero, got {steps} steps and span = {span}")
    layers = odeint(f, x, jnp.linspace(0.0, span, steps + 1), weights, solver=solver)
    coefficients = map_arrays(lambda a: jnp.repeat(a, substeps, axis=0), pieces(weights, degree, steps))
    index = jnp.repeat(jnp.arange(steps), substeps)  # an integer: it has no gradient

    def inside(t: Array, y: Any, args: tuple) -> Any:
        a, n = args
        return f(t, y, piece(a, t * (steps / span) - n.astype(t.dtype)))

    flow = odeint(inside, x, jnp.linspace(0.0, span, steps * substeps + 1), (coefficients, index), solver=Layers(dopri5))
    vector = jax.vmap(lambda y: ravel_pytree(y)[0])
    return vector(layers), vector(flow)
