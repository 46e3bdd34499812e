"""Time series drawn from a key: spirals, periodic curves, a Poisson process of known rate, noisy predators and prey."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control import Fixed
from jode.ivp import odeint
from jode.method import rk4


class Series(NamedTuple):
    """One time series, or a batch of them with a leading axis: times (T,), values (T, D), and which of them were observed (T,).

    Times increase where the mask is true. What the mask leaves out has no meaning: times and values there may be anything, NaN
    too, so that series of different lengths are padded to one length and share an array.
    """

    ts: Array
    ys: Array
    mask: Array


def subsample(key: Array, series: Series, count: int) -> Series:
    """`count` points of a series of T observed ones, drawn without replacement and kept in the order of time: a `Series` of
    length `count`.

    Raises `ValueError` unless 1 <= count <= T.
    """
    size = series.ts.shape[-1]
    if not 1 <= count <= size:
        raise ValueError(f"subsample: want between 1 and {size} of {size} points, got count = {count}")
    chosen = jnp.sort(jax.random.permutation(key, size)[:count])
    return Series(series.ts[chosen], series.ys[chosen], series.mask[chosen])


def spirals(
    key: Array,
    n: int,
    *,
    points: int = 100,
    later: int = 100,
    total: int = 500,
    turns: float = 3.0,
    inner: float = 0.0,
    growth: float = 0.3,
    noise: float = 0.3,
) -> tuple[Series, Series]:
    """Noisy windows of Archimedean spirals in the plane, half of them clockwise, and the same without noise (Chen et al. 2018).

    r = inner + growth θ at the angle θ; the point (r cos θ, ± r sin θ) runs along it at unit angular speed. `total` angles divide
    [0, 2π turns] equally; a series is `points` + `later` consecutive ones, from a start that is uniform among those that fit. Its
    time is zero at its start, so all series share their times.

    Args:
        key: a PRNG key.
        n: how many series; the first ⌈n / 2⌉ are clockwise.
        points: those that a model may see, at the front; the mask of the noisy series is true there.
        later: those after them, to be predicted; the mask is false.
        total: angles on a whole spiral, more than `points` + `later`.
        turns: of a whole spiral.
        inner: the radius at θ = 0.
        growth: of the radius with the angle.
        noise: standard deviation of what is added to each coordinate.

    Returns:
        (noisy, clean): batches of n series of P = `points` + `later` times, ts (n, P), ys (n, P, 2), mask (n, P). The mask of
        the clean ones is true throughout.

    Raises:
        ValueError: where a window does not fit into the spiral, or n < 2.
    """
    length = points + later
    if n < 2 or points < 1 or later < 0 or length >= total:
        raise ValueError(
            f"spirals: want n >= 2 and 1 <= points, points + later < total; got n = {n}, points = {points}, later = {later}, "
            f"total = {total}"
        )
    where, what = jax.random.split(key)
    step = 2 * math.pi * turns / (total - 1)
    start = jax.random.randint(where, (n,), 0, total - length + 1)
    ts = step * jnp.arange(length)
    angle = step * start[:, None] + ts[None]
    sign = jnp.where(jnp.arange(n) < (n + 1) // 2, -1.0, 1.0).astype(ts.dtype)
    radius = inner + growth * angle
    ys = radius[..., None] * jnp.stack([jnp.cos(angle), sign[:, None] * jnp.sin(angle)], -1)
    shape = (n, length)
    clean = Series(jnp.broadcast_to(ts, shape), ys, jnp.ones(shape, bool))
    seen = jnp.broadcast_to(jnp.arange(length) < points, shape)
    return Series(clean.ts, ys + noise * jax.random.normal(what, ys.shape), seen), clean


def periodic(key: Array, n: int, *, points: int = 50, span: float = 5.0, noise: float = 0.01) -> tuple[Series, Series]:
    """Sine waves of one amplitude and different frequencies at irregular times, with noise and without (Rubanova et al. 2019).

    y(t) = y0 + sin(2π ν t), ν uniform in [0.4, 0.8], y0 normal with mean 1 and standard deviation 0.1; `points` times of each
    series are uniform in [0, `span`], in order.

    Returns:
        (noisy, clean): batches of n series, ts (n, points), ys (n, points, 1), mask (n, points), true throughout.
    """
    a, b, c, d = jax.random.split(key, 4)
    frequency = jax.random.uniform(a, (n, 1), minval=0.4, maxval=0.8)
    offset = 1 + 0.1 * jax.random.normal(b, (n, 1))
    ts = jnp.sort(jax.random.uniform(c, (n, points), maxval=span), axis=1)
    ys = (offset + jnp.sin(2 * math.pi * frequency * ts))[..., None]
    clean = Series(ts, ys, jnp.ones((n, points), bool))
    return clean._replace(ys=ys + noise * jax.random.normal(d, ys.shape)), clean


def poisson_process(
    key: Array, rate: Callable[[Array], Array], span: tuple[float, float], bound: float, capacity: int
) -> tuple[Array, Array]:
    """Event times of a Poisson process of known rate, by thinning (Lewis & Shedler 1979).

    Events of a process of the constant rate `bound` are kept with probability rate(t) / `bound` each.

    Args:
        key: a PRNG key.
        rate: t -> λ(t), 0 <= λ <= `bound` on the span.
        span: the interval (t0, t1).
        bound: a constant that λ does not exceed.
        capacity: how many events before thinning there is room for. A process that would not fit has its last times cut off; with
            m = bound (t1 - t0), take m + 6 √m, which is exceeded once in 10⁸.

    Returns:
        (ts, mask), each (capacity,): times, and which of them are events. They increase.
    """
    a, b = jax.random.split(key)
    t0, t1 = span
    ts = t0 + jnp.cumsum(jax.random.exponential(a, (capacity,))) / bound
    kept = (ts < t1) & (bound * jax.random.uniform(b, (capacity,)) < rate(ts))
    return ts, kept


class Ecology(NamedTuple):
    """Rates of dx/dt = α x - β x y, dy/dt = γ x y - δ y."""

    alpha: float = 1.3
    beta: float = 0.9
    gamma: float = 0.8
    delta: float = 1.8


def predators_and_prey(t: Array, y: Array, args: Ecology) -> Array:
    """The vector field of Lotka and Volterra."""
    del t
    meet = y[0] * y[1]
    return jnp.stack([args.alpha * y[0] - args.beta * meet, args.gamma * meet - args.delta * y[1]])


@partial(jax.jit, static_argnames=("points", "span", "noise"))
def lotka_volterra(
    key: Array,
    y0: Array,
    rates: Ecology = Ecology(),
    *,
    points: int = 61,
    span: float = 10.0,
    noise: float = 0.05,
) -> tuple[Series, Series]:
    """One solution of Lotka and Volterra's equations at irregular times, with relative noise and without.

    Times are uniform in [0, `span`] and sorted, the first is 0. Noise is normal and multiplies: y (1 + noise ε).

    Args:
        key: a PRNG key.
        y0: prey and predators at t = 0, (2,).
        rates: α, β, γ, δ.
        points: how many times.
        span: the last time possible.
        noise: relative standard deviation.

    Returns:
        (noisy, clean): series of ts (points,), ys (points, 2), mask (points,), true throughout. RK4 with 20 steps an interval.
    """
    a, b = jax.random.split(key)
    ts = jnp.sort(jax.random.uniform(a, (points,), y0.dtype, maxval=span)).at[0].set(0.0)
    ys = odeint(predators_and_prey, y0, ts, rates, solver=Fixed(rk4, 20))
    clean = Series(ts, ys, jnp.ones(points, bool))
    return clean._replace(ys=ys * (1 + noise * jax.random.normal(b, ys.shape, ys.dtype))), clean
