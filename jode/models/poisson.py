"""Event times as a Poisson process whose rate is read off an ODE's state; the rate's integral is one more state of that ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import jode
from jode.models.flow import states_after


class Likelihood(NamedTuple):
    """The log-likelihood of the events, and ∫ λ dt over the whole span."""

    value: Array
    integral: Array


def poisson_log_likelihood(
    f: Callable,
    log_rate: Callable,
    z0: Any,
    span: tuple[Any, Any],
    events: Array,
    mask: Array,
    args: Any = None,
    *,
    solver: Any = jode.Adaptive(),
    adjoint: Any = jode.Backprop(),
) -> Likelihood:
    """log p(t_1, …, t_N) = Σ log λ(t_i) - ∫ λ dt, with λ = exp(log_rate(t, z, args)) and dz/dt = f(t, z, args), z(t0) = z0.

    The integral is carried as a state, dΛ/dt = λ, Λ(t0) = 0, so the solver that follows z also controls the error of Λ (Chen et al.
    2018, §5). It is exact to the order, or to the tolerance, of the solver.

    Args:
        f: the vector field of z.
        log_rate: (t, z, args) -> log λ, a scalar.
        z0: the state at t0, any pytree.
        span: (t0, t1), where events were looked for; they may be traced.
        events: times (N,), not decreasing where the mask is true, within the span.
        mask: (N,), which of them are events. The others change no bit of the result, whatever they hold.
        args: of f and log_rate.
        solver: of the ODE; `Fixed` takes its steps between consecutive events, and from the last one to t1.
        adjoint: how gradients are computed.

    Returns:
        A `Likelihood` of two scalars. Cost: one solve through N + 1 save times.

    Raises:
        TypeError, ValueError: what `jode.solve` raises, when traced.
    """
    t0, t1 = (jnp.asarray(t, events.dtype) for t in span)
    ts, counts = jnp.append(events, t1), jnp.append(mask, True)
    # Λ has the precision of the state, as the rate has.
    like = jax.eval_shape(lambda: log_rate(t0, z0, args))
    start = (z0, jnp.zeros((), like.dtype))
    field = _Counting(f, log_rate)
    zs, totals = states_after(field, start, t0, ts, args, mask=counts, solver=solver, adjoint=adjoint)
    logs = jax.vmap(log_rate, (0, 0, None))(jnp.where(counts, ts, t1)[:-1], jax.tree.map(lambda z: z[:-1], zs), args)
    return Likelihood(jnp.sum(jnp.where(mask, logs, jnp.zeros_like(logs))) - totals[-1], totals[-1])


class _Counting(NamedTuple):
    """The vector field of (z, Λ); a tuple, so that equal ones compare equal and compile once."""

    f: Callable
    log_rate: Callable

    def __call__(self, t: Array, y: tuple[Any, Array], args: Any) -> tuple[Any, Array]:
        z, _ = y
        return self.f(t, z, args), jnp.exp(self.log_rate(t, z, args))


class PoissonODE(eqx.Module):
    """A rate that is read off a latent ODE: dz/dt = f(z), λ = exp(g(z)), z(t0) a parameter, f and g perceptrons of one hidden
    layer.

    Args:
        latent: L, dimension of z.
        width: of the hidden layers.
        key: a PRNG key.
    """

    z0: Array
    field: eqx.nn.MLP
    rate: eqx.nn.MLP

    def __init__(self, latent: int = 2, *, width: int = 20, key: Array):
        a, b, c = jax.random.split(key, 3)
        self.z0 = jax.random.normal(a, (latent,))
        self.field = eqx.nn.MLP(latent, latent, width, 1, activation=jnp.tanh, key=b)
        self.rate = eqx.nn.MLP(latent, "scalar", width, 1, activation=jnp.tanh, key=c)

    def log_likelihood(
        self, span: tuple[Any, Any], events: Array, mask: Array, *, solver: Any = jode.Adaptive(), adjoint: Any = jode.Backprop()
    ) -> Likelihood:
        """See `poisson_log_likelihood`."""
        heads = self.field, self.rate
        return poisson_log_likelihood(_field, _log_rate, self.z0, span, events, mask, heads, solver=solver, adjoint=adjoint)

    def log_rates(self, t0: Any, ts: Array, *, solver: Any = jode.Adaptive()) -> Array:
        """log λ(t), (T,), at times (T,) from t0 on, not decreasing."""
        zs = states_after(_field, self.z0, t0, ts, (self.field, self.rate), solver=solver)
        return jax.vmap(self.rate)(zs)


def _field(t: Array, z: Array, heads: tuple[Callable, Callable]) -> Array:
    del t
    return heads[0](z)


def _log_rate(t: Array, z: Array, heads: tuple[Callable, Callable]) -> Array:
    del t
    return heads[1](z)
