"""The trace of a vector field's Jacobian: exact, by a formula of the field's own, or estimated from products with random vectors.

A trace is a value with `probes`, the number m of estimates it makes; draw(key, x) -> the random vectors of one solve; and
slope(f, t, x, args, vectors) -> (f(t, x, args), (m,) estimates of tr ∂f/∂x). Random vectors stay the same during a solve: the
integrand is then smooth, and the integral's mean is that of the exact trace (FFJORD: Grathwohl et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jode.tuning import WRITTEN_OUT


@dataclass(frozen=True)
class Exact:
    """tr ∂f/∂x from d Jacobian-vector products, d the number of entries of x. For a few dimensions."""

    probes: ClassVar[int] = 1

    def draw(self, key: Array | None, x: Array) -> None:
        """Nothing: no randomness."""

    def slope(self, f: Callable, t: Array, x: Array, args: Any, vectors: None) -> tuple[Array, Array]:
        """f and its trace, exact."""
        dx, product = jax.linearize(lambda x: f(t, x, args), x)
        basis = jnp.eye(x.size, dtype=x.dtype)
        column = lambda e: product(e.reshape(x.shape)).reshape(-1)
        if x.size <= WRITTEN_OUT:  # one by one: over many rows products side by side leave the cache
            return dx, reduce(jnp.add, [column(e)[i] for i, e in enumerate(basis)])[None]
        return dx, jnp.trace(jax.vmap(column)(basis))[None]


@dataclass(frozen=True)
class Formula:
    """The trace that the field knows: f.divergence(t, x, args), as `PlanarField` has it, in O(d)."""

    probes: ClassVar[int] = 1

    def draw(self, key: Array | None, x: Array) -> None:
        """Nothing: no randomness."""

    def slope(self, f: Any, t: Array, x: Array, args: Any, vectors: None) -> tuple[Array, Array]:
        """f and its trace, by formula."""
        return f(t, x, args), f.divergence(t, x, args)[None]


@dataclass(frozen=True)
class Hutchinson:
    """εᵢᵀ (∂f/∂x) εᵢ for i = 1 … `probes`: m vector-Jacobian products, unbiased for E ε = 0, E εεᵀ = I (Hutchinson 1989).

    With random signs, the default `law`, one estimate has the variance Σ_{i<j} (J_ij + J_ji)². From two probes on their spread
    gives a standard error.
    """

    probes: int = 1
    law: Callable = jax.random.rademacher

    def draw(self, key: Array | None, x: Array) -> Array:
        """The vectors ε, (m, *x.shape)."""
        return self.law(_given(key), (self.probes, *x.shape), x.dtype)

    def slope(self, f: Callable, t: Array, x: Array, args: Any, vectors: Array) -> tuple[Array, Array]:
        """f and the m estimates."""
        dx, pull = jax.vjp(lambda x: f(t, x, args), x)
        return dx, jax.vmap(lambda e: jnp.sum(pull(e)[0] * e))(vectors)


@dataclass(frozen=True)
class HutchPlusPlus:
    """tr QᵀJQ + εᵢᵀ (I - QQᵀ) J (I - QQᵀ) εᵢ, Q an orthonormal basis of J S for `sketch` random vectors S.

    Meyer, Musco, Musco & Woodruff 2021 (Hutch++). The trace on the range of Q is exact and only the rest is estimated. It pays
    where the Jacobian has a few large singular values, or where sketch ≥ d: then it is exact. It costs 2 `sketch` + `probes`
    Jacobian-vector products; for a flat spectrum spend them on `Hutchinson`.

    Any fixed Q gives an unbiased estimate, and so an unbiased gradient: none is taken through Q.
    """

    sketch: int = 2
    probes: int = 2
    law: Callable = jax.random.rademacher

    def draw(self, key: Array | None, x: Array) -> tuple[Array, Array]:
        """The vectors S, (min(sketch, d), d), normal, so that they are independent, and ε, (m, d)."""
        a, b = jax.random.split(_given(key))
        sketch = jax.random.normal(a, (min(self.sketch, x.size), x.size), x.dtype)
        return sketch, self.law(b, (self.probes, x.size), x.dtype)

    def slope(self, f: Callable, t: Array, x: Array, args: Any, vectors: tuple[Array, Array]) -> tuple[Array, Array]:
        """f and the m estimates."""
        dx, product = jax.linearize(lambda flat: f(t, flat.reshape(x.shape), args).reshape(-1), x.reshape(-1))
        sketch, probes = vectors
        q = jax.lax.stop_gradient(jnp.linalg.qr(jax.vmap(product)(sketch).T)[0])
        inside = jnp.sum(jax.vmap(product)(q.T) * q.T)
        rest = probes - (probes @ q) @ q.T
        outside = jnp.sum(jax.vmap(product)(rest) * rest, axis=1)
        return dx.reshape(x.shape), inside[None] + outside


def _given(key: Array | None) -> Array:
    if key is None:
        raise ValueError("key: an estimated trace draws random vectors and needs a PRNG key, one a row")
    return key
