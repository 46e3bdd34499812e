"""Recurrent networks that a latent ODE is compared with: forwards in time, autoregressive, of any parameter count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from jode.data_series import Series


class RNN(eqx.Module):
    """A gated recurrent unit that predicts the next value and, where it sees none, goes on from its own prediction.

    h ← GRU([x_i, t_{i+1} - t_i], h), ŷ_{i+1} = x_i + W h + b, with x_i = y_i where it was observed and ŷ_i elsewhere; ŷ_1 is a
    parameter. Every time of the series is one step, observed or not: the time between steps is an input.
    """

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear
    first: Array

    def __init__(self, channels: int, hidden: int, *, key: Array):
        a, b = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(channels + 1, hidden, key=a)
        self.head = eqx.nn.Linear(hidden, channels, key=b)
        self.first = jnp.zeros(channels)

    def __call__(self, series: Series) -> Array:
        """Predictions (T, D): row i from the observations before t_i alone. Values that are not observed are not read."""
        ys = jnp.where(series.mask[:, None], series.ys, jnp.zeros_like(series.ys))
        gaps = jnp.diff(series.ts, append=series.ts[-1:]).astype(ys.dtype)

        def step(carry: tuple[Array, Array], row: tuple) -> tuple[tuple, Array]:
            h, guess = carry
            y, gap, seen = row
            x = jnp.where(seen, y, guess)
            h = self.cell(jnp.append(x, gap), h)
            return (h, x + self.head(h)), guess

        start = jnp.zeros(self.cell.hidden_size, ys.dtype), self.first.astype(ys.dtype)
        return jax.lax.scan(step, start, (ys, gaps, series.mask))[1]


class GRUDecay(eqx.Module):
    """A gated recurrent unit whose state decays between observations (Che et al. 2018, "GRU-D").

    h(t) = h(t_i) exp(-max(0, w (t - t_i) + b)), by component; ŷ(t) = W h(t) + c; at an observation h ← GRU(y_i, h(t_i)). A time
    that is not observed leaves no trace.
    """

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear
    rate: Array
    shift: Array

    def __init__(self, channels: int, hidden: int, *, key: Array):
        a, b, c = jax.random.split(key, 3)
        self.cell = eqx.nn.GRUCell(channels, hidden, key=a)
        self.head = eqx.nn.Linear(hidden, channels, key=b)
        self.rate = jax.random.uniform(c, (hidden,), maxval=1.0)
        self.shift = jnp.zeros(hidden)

    def __call__(self, series: Series) -> Array:
        """Predictions (T, D): row i from the observations before t_i alone."""
        ys = jnp.where(series.mask[:, None], series.ys, jnp.zeros_like(series.ys))

        def step(carry: tuple[Array, Array], row: tuple) -> tuple[tuple, Array]:
            h, last = carry
            t, y, seen = row
            decayed = h * jnp.exp(-jax.nn.relu(self.rate * (t - last).astype(h.dtype) + self.shift))
            carry = jnp.where(seen, self.cell(y, decayed), h), jnp.where(seen, t, last)
            return carry, self.head(decayed)

        start = jnp.zeros(self.cell.hidden_size, ys.dtype), series.ts[0]
        return jax.lax.scan(step, start, (series.ts, ys, series.mask))[1]


def parameters(model: Any) -> int:
    """How many numbers there are to train; of arrays, or of their shapes as `jax.eval_shape` returns them."""
    numbers = [x for x in jax.tree.leaves(model) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(x.size for x in numbers)


def of_size(make: Callable[..., Any], count: int, *, key: Array, most: int = 512) -> Any:
    """make(hidden, key=key) with the hidden size whose parameter count comes nearest to `count`.

    Raises `ValueError` where even `most` hidden units are too few.
    """

    def size(hidden: int) -> int:
        return parameters(eqx.filter_eval_shape(make, hidden, key=key))

    low, high = 1, most
    if size(high) < count:
        raise ValueError(f"of_size: {most} hidden units make {size(high)} parameters, fewer than {count}: raise most")
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if size(middle) < count else (low, middle)
    best = min((h for h in (low - 1, low) if h >= 1), key=lambda h: abs(size(h) - count))
    return make(best, key=key)
