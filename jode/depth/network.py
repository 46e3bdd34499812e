"""A residual network, and how far it is from its ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from jode.adjoint import Adjoint, Backprop
from jode.control import Fixed, Layers
from jode.depth.arguments import as_arrays, compiled, map_arrays, ordered, split, working
from jode.depth.spectral import spectral_norm
from jode.depth.weights import piece, pieces, root
from jode.ivp import odeint
from jode.method import Method, RungeKutta, dopri5, euler
from jode.tree import depth_of, is_inexact, magnitude, real_dtype

if TYPE_CHECKING:
    from jaxtyping import ArrayLike, Inexact, PyTree


@ordered
def resnet(
    f: Callable,
    x: PyTree[Inexact[ArrayLike, " ..."]],
    weights: Any,
    *,
    method: Method = euler,
    degree: int = 0,
    span: float | None = None,
    depth_axes: Any = 0,
    adjoint: Adjoint = Backprop(),
) -> PyTree[Inexact[Array, " ..."]]:
    """The output of a residual network, one step of `method` per layer: x ← x + h f(t, x, θ_n) under Euler.

    Args:
        f: the residual block f(t, x, w) of one example, with the shapes of x; t is the depth at which the step starts.
        x: the input, any pytree of floating arrays.
        weights: stacked, see `stack`: N slices lead every array, but for those that `depth_axes` says.
        method: `euler` (1 evaluation per layer), `heun` (2), or any other.
        degree: 0 where each step has weights of its own, constant within it; 1 where slices are the weights at the ends of
            N - 1 steps: with `heun` the network of Sander, Ablin & Peyré 2022.
        span: depth runs over [0, span], so that h = span / steps. None is one unit per layer, x + f(n, x, θ_n). 1.0 is the
            scaling 1/N. Independent layers want 1/√N: span = √N (Cohen et al. 2021).
        depth_axes: 0, None, or a pytree of them that is a prefix of weights: None where an array is the same in all layers.
        adjoint: any but `Backsolve`; `MemoryFree()` keeps no states, with errors that fall with depth.

    Returns:
        x at the last layer, NaN where the network overflowed; `jode.solve` with `Layers` gives every layer, and a status.

    Raises:
        TypeError: for x and weights in the wrong order, and for a block with a state (running statistics of a batch): use
            group or layer normalisation, which have none. To normalise over the batch let x be the whole batch, one state: the
            statistics are then those of x at every layer, in the reverse march too.
    """
    weights = as_arrays(weights)
    solver = Layers(method, degree, depth_axes)
    end = float(solver.depth(weights, "weights") - degree) if span is None else span
    return _last(odeint(f, x, (0.0, end), weights, solver=solver, adjoint=adjoint))


@ordered
def reconstruction_error(
    f: Callable, x: Any, weights: Any, *, method: Method = euler, degree: int = 0, span: float | None = None
) -> Array:
    """RMS(x̃_0 - x_0) / RMS(x_0): x̃_0 is what `MemoryFree` makes of the input after marching to the last layer and back.

    For Euler ‖x̃_n - x_n‖ ≤ h B ((1 + h L)^(N-n) - 1) ≤ h B (e^(L T) - 1), T the span, h = T / N, B = sup ‖f‖, L the Lipschitz
    constant of f in x: one inverse step errs by h ‖f(x_{n+1}) - f(x_n)‖ ≤ h² L B, and errors grow by 1 + h L per step. No
    smoothness in depth is needed. Heun with weights at nodes errs by O(h³) where f and weights are smooth, and by O(h) where
    weights are rough.

    Args:
        f: the residual block f(t, x, w) of one example.
        x: the input.
        weights: stacked.
        method: that of the network, as in `resnet`.
        degree: that of the network, as in `resnet`.
        span: that of the network, as in `resnet`: None is one unit per layer.

    Returns:
        The error, a scalar; NaN where the network overflows. It costs two passes through the network.

    Raises:
        ValueError: for a reversible method, which errs by rounding alone.
        TypeError: for x and weights in the wrong order.
    """
    if not isinstance(method, RungeKutta):
        raise ValueError(f"reconstruction_error: {method!r} is inverted exactly; only Runge-Kutta methods are not")
    weights = as_arrays(weights)
    steps = depth_of(weights, "weights") - degree
    end, solver = float(steps) if span is None else span, Layers(method, degree)
    last = _last(odeint(f, x, (0.0, end), weights, solver=solver))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(y)) for y in jax.tree.leaves(last)]))
    last = jax.tree.map(lambda y: jnp.where(finite, y, 0), last)  # a march wants a finite start; what it gives is not used
    # The inverse step is the step with its ends swapped, so the way back is a network too: backwards in time, slices reversed.

    def turned(w: Array) -> Array:
        # Integers and keys of a step are those of its first node, in either direction.
        return w[::-1] if is_inexact(w) else jnp.concatenate([w[:steps][::-1], w[steps:]])

    back = _last(odeint(f, last, (end, 0.0), map_arrays(turned, weights), solver=solver))
    x, back = ravel_pytree(x)[0], ravel_pytree(back)[0]
    return jnp.where(finite, jnp.linalg.norm(back - x) / jnp.linalg.norm(x), jnp.nan)


def _last(states: Any) -> Any:
    return jax.tree.map(lambda y: y[-1], states)


# How far a network is from its ODE.


class Bound(NamedTuple):
    """`value` = h/2 · `curvature` · ((1 + h L)^N - 1) / L + `rounding`.

    L is `lipschitz`, the largest ‖∂f/∂x‖; `curvature` is the largest ‖d²x/dt²‖; `rounding` is what the rounding of both
    marches may add. N steps of width h.
    """

    value: Array
    curvature: Array
    lipschitz: Array
    rounding: Array


@ordered
def distance(
    f: Callable,
    x: Any,
    weights: Any,
    *,
    method: Method = euler,
    degree: int = 0,
    ode_degree: int = 1,
    span: float | None = None,
    substeps: int = 8,
) -> Array:
    """max_n ‖x_n - x(t_n)‖ for one example: how far the layers of a network are from the ODE through their weights.

    The layers x_n are those of `resnet` with the same `method`, `degree` and `span`; by default, those of `resnet(f, x,
    weights)`. The ODE is dx/dt = f(t, x, θ(t / span)) with θ = `interpolate(weights, ·, ode_degree)`, solved by Dormand-Prince
    steps of order 5, with which its error is far below the distance unless ‖∂f/∂x‖ h is large.

    The distance is O(h) for Euler, and O(h²) for Heun with weights at nodes, where weights are smooth in depth (Sander, Ablin &
    Peyré 2022).

    Args:
        f: the residual block f(t, x, w) of one example.
        x: the input. Half precision is measured in float32.
        weights: stacked.
        method: that of the network, as in `resnet`.
        degree: that of the network, as in `resnet`: 0, one slice per step, or 1, slices at the ends of steps.
        ode_degree: that of the weights of the ODE, as in `interpolate`: 0, 1 or 3. It is another thing than `degree`: the
            network reads the slices alone, and the ODE what lies between them too.
        span: that of the network, as in `resnet`: None is one unit per layer, 1.0 the scaling 1/N.
        substeps: steps of the ODE's solver per layer.

    Returns:
        The distance, a scalar; NaN where network or ODE overflows. Costs N (s + 6 substeps) evaluations, s those of one step.

    Raises:
        ValueError: for no step, a span of zero, a wrong degree, or an x that is not finite.
        TypeError: for x and weights in the wrong order.
    """
    return _distance(f, (working(x), as_arrays(weights)), method, degree, ode_degree, span, substeps)


@compiled
def _distance(f: Callable, data: tuple, *options: Any) -> Array:
    layers, path, _ = _paths(f, *data, *options)
    flow = jnp.concatenate([path[:, 0], path[-1:, -1]])
    return root(jnp.max(jnp.sum(magnitude(layers - flow) ** 2, axis=1)))


@ordered
def distance_bound(
    f: Callable,
    x: Any,
    weights: Any,
    *,
    degree: int = 0,
    ode_degree: int = 1,
    span: float | None = None,
    lipschitz: float | None = None,
    substeps: int = 8,
) -> Bound:
    """A bound on `distance` for Euler's method: (C h² / 2 + ρ) ((1 + h L)^N - 1) / (h L); N times (C h² / 2 + ρ) for L = 0.

    h = T / N with T the span. Without rounding, ρ = 0, that is at most the C h (e^(L T) - 1) / (2 L) of Sander, Ablin & Peyré
    2022.

    Derivation. Let e_n = x_n - x(t_n). By Taylor's formula e_0 = 0 and

        e_{n+1} = e_n + Δ_n - D_n + r_n,    Δ_n = h [f(x_n) - f(x(t_n))],    D_n = ∫ (t_{n+1} - s) ẍ(s) ds,

    with r_n what rounding adds in layer n. As ‖Δ_n‖ ≤ h L ‖e_n‖ and ‖D_n‖ ≤ C h² / 2, it follows that ‖e_{n+1}‖ ≤ (1 + h L) ‖e_n‖ +
    C h² / 2 + ρ, and the sum of (1 + h L)^m over m < N gives the bound. C = max ‖ẍ‖, ẍ = ∂f/∂t + ∂f/∂θ θ' + ∂f/∂x f, is needed
    along the solution alone, and L = max ‖∂f/∂x‖ along the segments from x(t_n) to x_n alone. Equality where f does not depend on
    x and ẍ is constant.

    Rounding. Let u be the unit roundoff of the dtype (6e-8 in float32), X = max ‖x‖, F = max ‖f‖, S = `substeps`, n the size
    of x, κ = 8 + √n. Every addition to the state errs by u X: one per layer of the network, S per layer of the ODE. One
    evaluation of f errs by

        δ = u κ (F + L X + T (C + L F)),

    as from changes of f, x and t by a factor 1 + κ u, for ‖∂f/∂t + ∂f/∂θ θ'‖ ≤ C + L F. A layer of the network has h δ of it, one
    of the ODE 2 h δ, since the weights of its stages have 1.65 as the sum of their magnitudes. What happens within a layer of
    the ODE grows until its end by φ = (e^(h L) - 1) / (h L) at most. Differences and norms of states err by κ u X. Hence

        ρ = (u X + h δ) + φ (S u X + 2 h δ) + κ u X,    rounding = ρ ((1 + h L)^N - 1) / (h L) ≤ ρ (e^(L T) - 1) / (h L).

    What is guaranteed. ‖ẍ‖ is sampled at `substeps` + 1 places per layer, and ‖∂f/∂x‖ at three per segment: both ends and the
    middle. δ is a model: an f that cancels inside, as (x + 1e6) - 1e6 does, rounds by more, and so do matrix products on
    accelerators by default. What both leave out is taken from the two marches: C is raised to 2 / h² times what ‖D_n‖ has
    beyond φ (S u X + 2 h δ), and L to what ‖Δ_n‖ has beyond u X + h δ, over h ‖e_n‖. So every inequality above holds for the
    numbers computed, and `distance` ≤ `value`, whatever f is. Only with `lipschitz` given it rests on that number. The ODE is
    the one computed; its truncation error counts as part of D_n.

    C and L themselves may be less than the true maxima between the places, though never less than the computed steps show.
    ‖∂f/∂x‖ at a place is exact for n ≤ 96; for larger n it is at most 1 % too large, and too small with probability 1e-9: see
    `jode.depth.spectral`.

    Args:
        f: the residual block f(t, x, w) of one example; not a function with a `jax.custom_vjp`, which has no products with ∂f/∂x.
        x: the input, real. Half precision is measured in float32.
        weights: stacked.
        degree: that of the network, as in `resnet`.
        ode_degree: that of the weights of the ODE, as in `distance`.
        span: that of the network, as in `resnet`: None is one unit per layer, 1.0 the scaling 1/N.
        lipschitz: L, where it is known; nothing is then spent on it.
        substeps: places per layer at which ẍ is sampled, and steps of the ODE's solver there.

    Returns:
        A `Bound`: NaN where network or ODE overflows, infinite where the bound does.

    Raises:
        ValueError: for no step, a span of zero, a wrong degree, or an x that is not finite.
        TypeError: for a complex x, and for x and weights in the wrong order.

    Cost: per layer 1 + 6 `substeps` evaluations of f for the two marches, `substeps` + 1 of f and its derivative for ẍ, and
    three times at most min(n, 96) products with ∂f/∂x and as many with its transpose; no matrix is formed, and 3 min(n, 96)
    vectors of size n are held. Times are in docs/depth.md.
    """
    if any(jnp.iscomplexobj(v) for v in jax.tree.leaves(x)):
        raise TypeError("distance_bound: x must be real, got a complex array")
    given = None if lipschitz is None else jnp.asarray(lipschitz)
    return _distance_bound(f, (working(x), as_arrays(weights), given), degree, ode_degree, span, substeps)


@compiled
def _distance_bound(f: Callable, data: tuple, degree: int, ode_degree: int, span: float | None, substeps: int) -> Bound:
    """The bound in units of one layer: K, D and Δ as they are, but F, C and L times h, h² and h."""
    x, weights, lipschitz = data
    layers, path, ode = _paths(f, x, weights, euler, degree, ode_degree, span, substeps)
    steps, h = path.shape[0], ode[1]
    K, F, C, L = _sampled(layers, path, ode, lipschitz)
    rise, flow = jnp.diff(layers, axis=0), path[:, -1] - path[:, 0]
    F, X = jnp.maximum(F, jnp.max(_norm(rise))), jnp.maximum(jnp.max(_norm(layers)), jnp.max(_norm(path)))
    unit, kappa = float(jnp.finfo(path.dtype).eps) / 2, 8 + float(np.sqrt(path.shape[-1]))

    def rounding(C: Array, L: Array) -> tuple[Array, Array]:
        """What rounding adds in one layer of the network, and in one of the ODE."""
        safe = jnp.where(unit < L, L, 1)
        phi = jnp.where(unit < L, jnp.expm1(safe) / safe, 1 + L / 2)
        delta = unit * kappa * (F + L * X + steps * (C + L * F))
        return unit * X + delta, phi * (unit * X * substeps + 2 * delta)

    # What the steps computed show beyond the samples; in layer 0 the network and the ODE start from one state.
    at_net, at_ode = rounding(C, L)
    K = K.at[0].set(rise[0])
    C = jnp.maximum(C, 2 * (jnp.max(_norm(flow - K)) - at_ode))
    if lipschitz is None:
        e = _norm(layers[:-1] - path[:, 0])
        secants = (_norm(rise - K) - at_net) / jnp.where(e > 0, e, 1)
        L = jnp.maximum(L, jnp.max(jnp.where(e > 0, secants, 0)))
    rho = sum(rounding(C, L)) + kappa * unit * X
    safe = jnp.where(unit < L, L, 1)
    growth = jnp.where(unit < L, jnp.expm1(steps * jnp.log1p(safe)) / safe, steps * (1 + (steps - 1) / 2 * L))

    def grown(v: Array) -> Array:
        return jnp.where(v == 0, 0, v * growth)  # growth may be infinite

    return Bound(grown(C / 2 + rho), C / h**2, L / abs(h), grown(rho))


def _sampled(layers: Array, path: Array, ode: tuple, lipschitz: Array | None) -> tuple[Array, Array, Array, Array]:
    """The slopes K where layers start on the ODE, and the largest F, C and L found, in units of one layer."""
    slope, h, coefficients = ode
    (steps, places, _), dtype = path.shape, path.dtype
    counts, zero = jnp.arange(steps).astype(dtype), jnp.zeros((), dtype)
    fractions = jnp.asarray(np.linspace(0, 1, places), dtype)
    # f is traced once, and what it closes over is made an argument, so that gradients reach it past the search for ‖∂f/∂x‖.
    slope, consts = jax.closure_convert(slope, counts[0], [a[0] for a in coefficients], zero, path[0, 0])

    def layer(xs: tuple) -> tuple[Array, Array, Array, Array]:
        n, a, path, net = xs

        def derivatives(xs: tuple) -> tuple[Array, Array]:
            k, push = jax.linearize(lambda c, y: slope(n, a, c, y, *consts), *xs)
            return k, _norm(push(jnp.ones_like(xs[0]), k))

        k, curvature = jax.lax.map(derivatives, (fractions, path))
        largest = (jnp.max(_norm(k)), jnp.max(curvature))
        if lipschitz is not None:
            return k[0], *largest, lipschitz.astype(dtype) * abs(h)
        at_node = lambda y, n, a, *consts: slope(n, a, zero, y, *consts)
        segment = jnp.stack([path[0], (path[0] + net) / 2, net])
        return k[0], *largest, jnp.max(jax.vmap(lambda y: spectral_norm(at_node, y, n, a, *consts))(segment))

    K, *found = jax.lax.map(layer, (counts, coefficients, path, layers[:-1]))
    F, C, L = (jnp.max(v) for v in found)
    return K, F, C, L


def _norm(x: Array) -> Array:
    return root(jnp.sum(x**2, axis=-1))


def _paths(
    f: Callable, x: Any, weights: Any, method: Method, degree: int, ode_degree: int, span: float | None, substeps: int
) -> tuple[Array, Array, tuple[Callable, float, list]]:
    """States as vectors: of the network (steps + 1, n), of the ODE within each layer (steps, substeps + 1, n); and that ODE.

    Time is counted in layers, τ = t / h, in both: then times are whole numbers, and those within a layer fractions of one,
    without rounding. The ODE is dx/dτ = slope(n, a, c, x) = h f(h (n + c), x, Σ_k a_k c^k) at τ = n + c, a the coefficients of
    layer n.
    """
    steps = depth_of(weights, "weights") - degree
    if steps < 1 or span == 0:
        raise ValueError(f"want at least one step over a span that is not zero, got {steps} steps and span = {span}")
    h = 1.0 if span is None else span / steps
    x, unravel = ravel_pytree(x)
    dtype, time = x.dtype, real_dtype(x.dtype)

    def scaled(t: Array, y: Array, w: Any) -> Array:
        k = ravel_pytree(f(t * jnp.asarray(h, t.dtype), unravel(y), w))[0]
        return jnp.asarray(h, dtype) * k.astype(dtype)

    coefficients, join = split(pieces(weights, ode_degree, steps, "ode_degree"))

    def slope(n: Array, a: list, c: Array, y: Array) -> Array:
        return scaled(n + c, y, piece(join(a), c))

    def within(x: Array, xs: tuple) -> tuple[Array, Array]:
        fractions = jnp.linspace(0, 1, substeps + 1, dtype=time)
        path = odeint(lambda c, y, xs: slope(xs[0], xs[1], c, y), x, fractions, xs, solver=Fixed(dopri5, 1))
        return path[-1], path

    layers = odeint(scaled, x, jnp.arange(steps + 1).astype(time), weights, solver=Layers(method, degree))
    _, path = jax.lax.scan(within, x, (jnp.arange(steps).astype(time), coefficients))
    return layers, path, (slope, h, coefficients)
