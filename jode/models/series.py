"""Latent ODEs for time series: read the observations backwards in time, solve forwards from a random initial state, decode.

Everything is for one series; batches are `jax.vmap`'s. Modules are Equinox's; solvers and adjoints are handed in at the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import jode
from jode.data_series import Series
from jode.models.flow import states_after, states_around

SOLVER = jode.Fixed(jode.midpoint, 1)
ADJOINT = jode.Backprop(None)


class GRUEncoder(eqx.Module):
    """A gated recurrent unit over the observations from the last to the first (Chen et al. 2018).

    h ← GRU([y_i, t_{i+1} - t_i], h), where t_{i+1} is the observation read before (the gap is zero for the last one), and at the
    end once more with the gap down to t0 and y = 0. Cost: T + 1 cells.
    """

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, channels: int, hidden: int, latent: int, *, key: Array):
        a, b = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(channels + 1, hidden, key=a)
        self.head = eqx.nn.Linear(hidden, 2 * latent, key=b)

    def states(self, series: Series, t0: Any, solver: Any = SOLVER) -> Array:
        """Hidden states (T + 1, H): row i + 1 has read the observations i, i + 1, …; row 0 has also gone down to t0."""
        del solver
        return _backwards(series, t0, self.cell.hidden_size, lambda h, gap: h, self._read)

    def _read(self, h: Array, y: Array, gap: Array) -> Array:
        return self.cell(jnp.append(y, gap), h)

    def __call__(self, series: Series, t0: Any, solver: Any = SOLVER) -> tuple[Array, Array]:
        """Mean and standard deviation of q(z(t0) | series), (L,) each."""
        return _gaussian(self.head(self.states(series, t0)[0]))


class ODERNN(eqx.Module):
    """A recurrent network whose state flows between observations, for irregular times (Rubanova, Chen & Duvenaud 2019).

    From the last observation to the first: dh/dt = f(h) down to t_i, then h ← GRU(y_i, h); at the end the flow down to t0. Each
    gap is one solve over [0, 1] of dh/ds = (t_i - t_{i+1}) f(h), so gaps may be zero. Cost: T + 1 cells and solves.
    """

    cell: eqx.nn.GRUCell
    field: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, channels: int, hidden: int, latent: int, *, width: int = 20, key: Array):
        a, b, c = jax.random.split(key, 3)
        self.cell = eqx.nn.GRUCell(channels, hidden, key=a)
        self.field = eqx.nn.MLP(hidden, hidden, width, 1, activation=jnp.tanh, key=b)
        self.head = eqx.nn.Linear(hidden, 2 * latent, key=c)

    def states(self, series: Series, t0: Any, solver: Any = SOLVER) -> Array:
        """Hidden states (T + 1, H): row i + 1 has read the observations i, i + 1, …; row 0 has also flowed down to t0."""

        def flow(h: Array, gap: Array) -> Array:
            return jode.odeint(_scaled, h, (0.0, 1.0), (-gap, self.field), solver=solver, adjoint=ADJOINT)[-1]

        return _backwards(series, t0, self.cell.hidden_size, flow, lambda h, y, gap: self.cell(y, h))

    def __call__(self, series: Series, t0: Any, solver: Any = SOLVER) -> tuple[Array, Array]:
        """Mean and standard deviation of q(z(t0) | series), (L,) each."""
        return _gaussian(self.head(self.states(series, t0, solver)[0]))


def _scaled(s: Array, h: Array, args: tuple[Array, Callable]) -> Array:
    del s
    rate, field = args
    return rate * field(h)


def _backwards(series: Series, t0: Any, hidden: int, flow: Callable, read: Callable) -> Array:
    """The hidden states of an encoder: flow(h, gap) between observations, read(h, y, gap) at them, from the last to t0."""
    ts, ys = _clean(series)
    h0 = jnp.zeros(hidden, ys.dtype)
    # Before anything is read, the gap is zero: the first observation that is read starts the clock.
    start = (h0, jnp.zeros((), ts.dtype), jnp.zeros((), bool))

    def step(carry: tuple, row: tuple) -> tuple[tuple, Array]:
        h, after, begun = carry
        t, y, seen = row
        gap = jnp.where(seen & begun, after - t, jnp.zeros_like(t))
        h = jnp.where(seen, read(flow(h, gap), y, gap.astype(y.dtype)), h)  # what was not observed changes no bit of the state
        return (h, jnp.where(seen, t, after), begun | seen), h

    (h, after, begun), hs = jax.lax.scan(step, start, (ts, ys, series.mask), reverse=True)
    gap = jnp.where(begun, after - jnp.asarray(t0, ts.dtype), jnp.zeros_like(after))
    h = read(flow(h, gap), jnp.zeros_like(ys[0]), gap.astype(ys.dtype))
    return jnp.concatenate([h[None], hs])


def _clean(series: Series) -> tuple[Array, Array]:
    """Times and values with zeros where nothing was observed, so that NaN there reaches no gradient."""
    ts = jnp.where(series.mask, series.ts, jnp.zeros_like(series.ts))
    return ts, jnp.where(series.mask[:, None], series.ys, jnp.zeros_like(series.ys))


def _gaussian(out: Array) -> tuple[Array, Array]:
    mean, log_std = jnp.split(out, 2)
    return mean, jnp.exp(log_std)


def _field(t: Array, z: Array, field: Callable) -> Array:
    del t
    return field(z)


class LatentODE(eqx.Module):
    """The latent ODE of Chen et al. 2018, §5: z(t0) ~ q(z | series), dz/dt = f(z), y_i ~ N(g(z(t_i)), noise²).

    Args:
        channels: D, of one observation.
        latent: L, dimension of z.
        hidden: H, of the encoder's state.
        width: of the hidden layers of f and g, both tanh.
        depth: hidden layers of f; g has one.
        noise: standard deviation of an observation, fixed.
        encoder: `GRUEncoder` or `ODERNN`, or any (channels, hidden, latent, key=) that makes a module like them.
        key: a PRNG key.
    """

    encoder: Any
    field: Any
    decoder: Any
    noise: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        *,
        latent: int = 4,
        hidden: int = 25,
        width: int = 20,
        depth: int = 1,
        noise: float = 0.3,
        encoder: Callable = GRUEncoder,
        key: Array,
    ):
        a, b, c = jax.random.split(key, 3)
        self.encoder = encoder(channels, hidden, latent, key=a)
        self.field = eqx.nn.MLP(latent, latent, width, depth, activation=jnp.tanh, key=b)
        self.decoder = eqx.nn.MLP(latent, channels, width, 1, activation=jnp.tanh, key=c)
        self.noise = noise

    def decode(self, z0: Array, t0: Any, ts: Array, mask: Any = None, *, solver: Any = SOLVER, adjoint: Any = ADJOINT) -> Array:
        """g(z(t)), (T, D), at times (T,) from t0 on, not decreasing where the mask is true. See `flow.states_after`."""
        return jax.vmap(self.decoder)(states_after(_field, z0, t0, ts, self.field, mask=mask, solver=solver, adjoint=adjoint))

    def extrapolate(self, z0: Array, t0: Any, ts: Array, *, solver: Any = SOLVER, adjoint: Any = ADJOINT) -> Array:
        """g(z(t)), (T, D), at times (T,) on both sides of t0, not decreasing. See `flow.states_around`."""
        return jax.vmap(self.decoder)(states_around(_field, z0, t0, ts, self.field, solver=solver, adjoint=adjoint))

    def predict(self, series: Series, t0: Any, ts: Array, *, solver: Any = SOLVER, encoder_solver: Any = None) -> Array:
        """g(z(t)) from the mean of q, (T, D), at times (T,) from t0 on: earlier, between and after the observations."""
        mean, _ = self.encoder(series, t0, solver if encoder_solver is None else encoder_solver)
        return self.decode(mean, t0, ts, solver=solver)


class Elbo(NamedTuple):
    """The evidence lower bound and its two parts: value = likelihood - KL."""

    value: Array
    likelihood: Array
    kl: Array


def elbo(
    model: LatentODE,
    key: Array,
    series: Series,
    targets: Series | None = None,
    *,
    t0: Any = 0.0,
    beta: Any = 1.0,
    solver: Any = SOLVER,
    encoder_solver: Any = None,
    adjoint: Any = ADJOINT,
) -> Elbo:
    """A one-sample estimate of log p(targets) >= E_q Σ_i log p(y_i | z(t_i)) - KL(q(z0 | series) ‖ N(0, I)).

    z0 = mean + std ε, ε ~ N(0, I) (Kingma & Welling 2014), so the gradient passes through the sample; the KL is in closed form.
    Cost: the encoder, one solve through the targets' times, T decoders.

    Args:
        model: a `LatentODE`.
        key: of the sample.
        series: what the encoder reads, ts (T,), ys (T, D), mask (T,).
        targets: what the likelihood is of; the series itself by default. Masked rows count for nothing, whatever they hold.
        t0: the time of z0, not after the first observation or target.
        beta: weight of the KL in the value; 1 gives the bound.
        solver: of the decoder's ODE.
        encoder_solver: of an ODE-RNN; by default `solver`. Where few points are observed their gaps are wide, and need more steps.
        adjoint: of the decoder's solve.

    Raises:
        TypeError, ValueError: what `jode.solve` raises, when traced.
    """
    targets = series if targets is None else targets
    mean, std = model.encoder(series, t0, solver if encoder_solver is None else encoder_solver)
    z0 = sample(key, mean, std)
    path = model.decode(z0, t0, targets.ts, targets.mask, solver=solver, adjoint=adjoint)
    likelihood = log_likelihood(path, targets, model.noise)
    kl = divergence(mean, std)
    return Elbo(likelihood - beta * kl, likelihood, kl)


def sample(key: Array, mean: Array, std: Array) -> Array:
    """mean + std ε, ε ~ N(0, I): a normal sample that is differentiable in mean and std."""
    return mean + std * jax.random.normal(key, mean.shape, mean.dtype)


def divergence(mean: Array, std: Array) -> Array:
    """KL(N(mean, std²) ‖ N(0, I)) = ½ Σ (mean² + std² - 1 - log std²)."""
    return jnp.sum(mean**2 + std**2 - 1 - 2 * jnp.log(std)) / 2


def log_likelihood(path: Array, targets: Series, noise: float) -> Array:
    """Σ log N(y_i; path_i, noise²) over the observed rows of the targets; path is (T, D)."""
    misfit = jnp.where(targets.mask[:, None], (targets.ys - path) / noise, jnp.zeros_like(path))
    count = jnp.sum(targets.mask) * path.shape[-1]
    return -jnp.sum(misfit**2) / 2 - count.astype(path.dtype) * (jnp.log(noise) + jnp.log(2 * jnp.pi) / 2).astype(path.dtype)
