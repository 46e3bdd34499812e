"""Planar flows: the continuous one, its trace in O(d), and the layered one it is compared with (Chen et al. 2018, section 4)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from jode.models.density.flow import Normal


class PlanarField(eqx.Module):
    """dx/dt = Σₙ σₙ(t) uₙ(t) tanh(wₙ(t)ᵀx + bₙ(t)), n = 1 … `width`; x (d,).

    A hypernetwork of t (two hidden layers of `hyper`) gives uₙ, wₙ, bₙ and the gates σₙ in (0, 1). The trace is a sum over the
    units, Σₙ σₙ uₙᵀwₙ (1 - tanh²): O(d M) for M units.
    """

    hyper: eqx.nn.MLP
    dim: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    def __init__(self, dim: int, width: int = 64, hyper: int = 32, *, key: Array) -> None:
        self.dim, self.width = dim, width
        self.hyper = eqx.nn.MLP(1, width * (2 * dim + 2), hyper, 2, jnp.tanh, key=key)

    def units(self, t: Array, dtype: Any) -> tuple[Array, Array, Array]:
        """σₙ uₙ (M, d), wₙ (M, d) and bₙ (M,) at t."""
        out = self.hyper(jnp.asarray(t, dtype)[None]).reshape(self.width, 2 * self.dim + 2)
        u, w, b, gate = jnp.split(out, [self.dim, 2 * self.dim, 2 * self.dim + 1], axis=1)
        return jax.nn.sigmoid(gate) * u, w, b[:, 0]

    def __call__(self, t: Array, x: Array, args: Any = None) -> Array:
        u, w, b = self.units(t, x.dtype)
        return jnp.tanh(w @ x + b) @ u

    def divergence(self, t: Array, x: Array, args: Any = None) -> Array:
        """tr ∂f/∂x."""
        u, w, b = self.units(t, x.dtype)
        return jnp.sum(u * w, axis=1) @ (1 - jnp.tanh(w @ x + b) ** 2)


class PlanarMap(eqx.Module):
    """K planar layers x + û tanh(wᵀx + b), each invertible (Rezende & Mohamed 2015).

    û = u + (softplus(wᵀu) - 1 - wᵀu) w / ‖w‖² has wᵀû > -1, so that log|det| = log(1 + wᵀû (1 - tanh²)) exists.
    """

    u: Array
    w: Array
    b: Array

    def __init__(self, dim: int, layers: int, *, key: Array) -> None:
        a, b = jax.random.split(key)
        self.u, self.w = 0.1 * jax.random.normal(a, (layers, dim)), jax.random.normal(b, (layers, dim))
        self.b = jnp.zeros(layers)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """(K layers of x, log|det of their Jacobian|); x (d,)."""

        def layer(x: Array, weights: tuple) -> tuple[Array, Array]:
            u, w, b = _invertible(*weights)
            h = jnp.tanh(w @ x + b)
            return x + u * h, jnp.log1p((w @ u) * (1 - h * h))

        x, logs = jax.lax.scan(layer, x, (self.u, self.w, self.b))
        return x, jnp.sum(logs)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """(x, log|det of the inverse's Jacobian|) with self(x)[0] = y.

        A layer's a = wᵀx solves a + wᵀû tanh(a + b) = wᵀy, which increases in a: 60 bisections of an interval of 2 |wᵀû|. One
        Newton step after them carries the derivative.
        """

        def layer(y: Array, weights: tuple) -> tuple[Array, Array]:
            u, w, b = _invertible(*weights)
            c, goal = w @ u, w @ y
            off = lambda a, c, b, goal: a + c * jnp.tanh(a + b) - goal

            def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
                low, high = ends
                middle = (low + high) / 2
                above = off(middle, *jax.lax.stop_gradient((c, b, goal))) > 0
                return jnp.where(above, low, middle), jnp.where(above, middle, high)

            ends = jax.lax.stop_gradient((goal - jnp.abs(c), goal + jnp.abs(c)))
            a = sum(jax.lax.fori_loop(0, 60, halve, ends)) / 2
            a = a - off(a, c, b, goal) / (1 + c * (1 - jnp.tanh(a + b) ** 2))
            h = jnp.tanh(a + b)
            return y - u * h, -jnp.log1p(c * (1 - h * h))

        x, logs = jax.lax.scan(layer, y, (self.u, self.w, self.b), reverse=True)
        return x, jnp.sum(logs)


def _invertible(u: Array, w: Array, b: Array) -> tuple[Array, Array, Array]:
    """The layer's weights with û for u."""
    along = w @ u
    return u + (jax.nn.softplus(along) - 1 - along) * w / (w @ w + jnp.finfo(w.dtype).tiny), w, b


class NF(eqx.Module):
    """A normalizing flow: z = map(x) ~ base, so that log p(x) = log base(map(x)) + log|det ∂map/∂x|, cheap to train by likelihood.

    To match a density that is known up to a constant, use the map the other way: x = map(z), log q(x) = log base(z) - log|det|.
    """

    map: PlanarMap
    base: Normal

    def log_prob(self, x: Array) -> Array:
        """log p(x) for one x (d,); O(K d)."""
        z, log_det = self.map(x)
        return self.base.log_prob(z) + log_det

    def sample(self, key: Array) -> Array:
        """One sample, by the inverse map."""
        return self.map.inverse(self.base.sample(key))[0]
