"""Continuous normalizing flows: a vector field, a base density, and the solve that carries x and log p together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import jode
from jode.models.density.trace import Exact

SOLVER = jode.Adaptive(jode.dopri5, 1e-5, 1e-5)


class Normal(eqx.Module):
    """The normal density with independent entries; x has the shape of `mean`."""

    mean: Array
    scale: Array

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        self.mean, self.scale = jnp.zeros(dim), scale * jnp.ones(dim)

    def log_prob(self, x: Array) -> Array:
        """log p(x) = -½ Σ ((xᵢ - μᵢ)/σᵢ)² - Σ log σᵢ - ½ d log 2π."""
        mean, scale = (jax.lax.stop_gradient(v).astype(x.dtype) for v in (self.mean, self.scale))
        z = (x - mean) / scale
        return -0.5 * jnp.sum(z * z) - jnp.sum(jnp.log(scale)) - 0.5 * x.size * jnp.log(2 * jnp.pi).astype(x.dtype)

    def sample(self, key: Array) -> Array:
        """One draw."""
        return jax.lax.stop_gradient(self.mean + self.scale * jax.random.normal(key, self.mean.shape, self.mean.dtype))


class Field(eqx.Module):
    """dx/dt = MLP([x, t]) for x (d,): `depth` hidden layers of `width`, and a smooth activation."""

    mlp: eqx.nn.MLP

    def __init__(self, dim: int, width: int = 64, depth: int = 2, *, key: Array, activation: Callable = jnp.tanh) -> None:
        self.mlp = eqx.nn.MLP(dim + 1, dim, width, depth, activation, key=key)

    def __call__(self, t: Array, x: Array, args: Any = None) -> Array:
        return self.mlp(jnp.append(x, jnp.asarray(t, x.dtype)))


class Augmented(eqx.Module):
    """A field of x (d,) together with `extra` more dimensions that start at zero (Dupont, Doucet & Teh 2019).

    In more dimensions paths may pass each other, so flows need not stretch space to separate points, and take fewer steps.
    y = lift(x), dy/dt = MLP([y, t]), and `drop(y)` are the first d entries. Points lie on a plane at the start and not at the
    end: log p of `drop(y)` alone is not known, so use it for regression and classification.
    """

    field: Field
    dim: int = eqx.field(static=True)
    extra: int = eqx.field(static=True)

    def __init__(
        self, dim: int, extra: int, width: int = 64, depth: int = 2, *, key: Array, activation: Callable = jnp.tanh
    ) -> None:
        self.field, self.dim, self.extra = Field(dim + extra, width, depth, key=key, activation=activation), dim, extra

    def __call__(self, t: Array, y: Array, args: Any = None) -> Array:
        return self.field(t, y, args)

    def lift(self, x: Array) -> Array:
        """(d,) -> (d + extra,), zeros appended."""
        return jnp.concatenate([x, jnp.zeros(self.extra, x.dtype)])

    def drop(self, y: Array) -> Array:
        """(d + extra,) -> (d,)."""
        return y[: self.dim]


class CNF(eqx.Module):
    """A continuous normalizing flow: x(t₀) ~ base, dx/dt = field(t, x, args), x(t₁) ~ the model's density; span = (t₀, t₁).

    `base` has log_prob(z) and sample(key); where the flow only moves samples, sample(key) alone.
    """

    field: Callable
    base: Any
    span: tuple[float, float] = eqx.field(static=True, default=(0.0, 1.0))


class Density(NamedTuple):
    """One row: the point x, the base point z it comes from, log p(x), and how sure that is.

    `standard_error` is that of an estimated trace: 0 for an exact one, infinite for a single probe, which cannot tell.
    `solver_error` is |log p - log p by a finer solver|, where one was given. After a failure x or z, log p and the errors are
    NaN, and `status` says why. `nfe` counts evaluations of the field.
    """

    x: Array
    z: Array
    log_prob: Array | None
    standard_error: Array | None
    solver_error: Array | None
    status: Array
    nfe: Array


class _Joint(eqx.Module):
    """The field of (x, ∫ tr ∂f/∂x dt), the latter once a probe."""

    field: Callable
    vectors: Any
    trace: Any = eqx.field(static=True)

    def __call__(self, t: Array, state: tuple[Array, Array], args: Any) -> tuple[Array, Array]:
        return self.trace.slope(self.field, t, state[0], args, self.vectors)


def log_likelihood(
    flow: CNF,
    x: Array,
    *,
    key: Array | None = None,
    trace: Any = Exact(),
    args: Any = None,
    solver: Any = SOLVER,
    adjoint: Any = jode.Backprop(),
    finer: Any = None,
) -> Density:
    """log p(x) = log base(z) - ∫_{t₀}^{t₁} tr ∂f/∂x dt, z the state at t₀ of the solution that ends in x; for one x (d,).

    Args:
        flow: the model.
        x: one example, any one array.
        key: for an estimated trace; one a row.
        trace: `Exact()`, `Formula()`, `Hutchinson(m)` or `HutchPlusPlus(k, m)`.
        args: handed to the field.
        solver: any jode solver; solved from t₁ back to t₀.
        adjoint: any jode adjoint.
        finer: a solver to measure the first one's error with: the cost of its solve on top. Random vectors are the same.

    Returns:
        A `Density`.

    Raises:
        ValueError: for an estimated trace without a key.
    """
    return _march(flow, x, False, key, trace, args, solver, adjoint, finer)


def push(
    flow: CNF,
    z: Array,
    *,
    key: Array | None = None,
    trace: Any = None,
    args: Any = None,
    solver: Any = SOLVER,
    adjoint: Any = jode.Backprop(),
    finer: Any = None,
) -> Density:
    """x(t₁) from z = x(t₀), and log p(x) = log base(z) - ∫ tr ∂f/∂x dt where a trace is given; arguments as in `log_likelihood`.

    Without a trace the log-density and its errors are None, and the solve costs the field alone.
    """
    return _march(flow, z, True, key, trace, args, solver, adjoint, finer)


def sample(
    flow: CNF,
    key: Array,
    *,
    trace: Any = None,
    args: Any = None,
    solver: Any = SOLVER,
    adjoint: Any = jode.Backprop(),
    finer: Any = None,
) -> Density:
    """One sample: `push` of one draw of the base; arguments as in `log_likelihood`. Many: `jax.vmap` over keys."""
    draw, probe = jax.random.split(key)
    options = {"trace": trace, "args": args, "solver": solver, "adjoint": adjoint, "finer": finer}
    return push(flow, flow.base.sample(draw), key=probe, **options)


def _march(
    flow: CNF, start: Array, forward: bool, key: Array | None, trace: Any, args: Any, solver: Any, adjoint: Any, finer: Any
) -> Density:
    """The solve, forward from the base or back from the data; `forward` is data about the direction, the sums are the same."""
    ts = flow.span if forward else flow.span[::-1]
    if trace is None:
        sol = jode.solve(flow.field, start, ts, args, solver=solver, adjoint=adjoint)
        return Density(sol.ys[-1], start, None, None, None, sol.status, sol.stats.nfe)
    joint = _Joint(flow.field, trace.draw(key, start), trace)
    zeros = jnp.zeros(trace.probes, start.dtype)

    def run(solver: Any) -> tuple[Any, Array, Array]:
        sol = jode.solve(joint, (start, zeros), ts, args, solver=solver, adjoint=adjoint)
        end, integrals = (y[-1] for y in sol.ys)
        logs = flow.base.log_prob(start if forward else end) + (-integrals if forward else integrals)
        return sol, end, logs

    sol, end, logs = run(solver)
    log_prob, failed = jnp.mean(logs), jnp.any(jnp.isnan(logs))
    solver_error = None if finer is None else jax.lax.stop_gradient(jnp.abs(jnp.mean(run(finer)[2]) - log_prob))
    standard_error = jax.lax.stop_gradient(jnp.where(failed, jnp.nan, _standard_error(logs, trace)))
    x, z = (end, start) if forward else (start, end)
    return Density(x, z, log_prob, standard_error, solver_error, sol.status, sol.stats.nfe)


def _standard_error(logs: Array, trace: Any) -> Array:
    if not hasattr(trace, "law"):  # nothing is random
        return jnp.zeros((), logs.dtype)
    if len(logs) == 1:
        return jnp.full((), jnp.inf, logs.dtype)
    return jnp.std(logs, ddof=1) / len(logs) ** 0.5


class Grid(NamedTuple):
    """`density` (n, …, n) at the products of `axes` (d, n), and its integral over the box by the midpoint rule."""

    axes: Array
    density: Array
    mass: Array


def on_grid(log_prob: Callable, low: Any, high: Any, points: int = 100, *, batch: int = 4096) -> Grid:
    """p(x) = exp(log_prob(x)) at the midpoints of the pointsᵈ cells of a box.

    Args:
        log_prob: a pure function of one point (d,), such as `lambda x: log_likelihood(flow, x).log_prob`.
        low: the lower corner (d,).
        high: the upper corner (d,).
        points: n, cells an axis; there are nᵈ evaluations.
        batch: how many rows are evaluated at a time.

    Returns:
        A `Grid`; `mass` is 1 where the box holds all of the density and n resolves it. Rows that fail are NaN, and so is
        the mass.
    """
    low, high = jnp.asarray(low, jnp.result_type(float)), jnp.asarray(high, jnp.result_type(float))
    middles = (jnp.arange(points, dtype=low.dtype) + 0.5) / points
    axes = low[:, None] + (high - low)[:, None] * middles[None]
    mesh = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)
    density = jnp.exp(jax.lax.map(log_prob, mesh.reshape(-1, low.size), batch_size=batch)).reshape(mesh.shape[:-1])
    return Grid(axes, density, jnp.sum(density) * jnp.prod((high - low) / points))
