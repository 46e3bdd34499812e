"""The largest singular value of a Jacobian, from products with it and with its transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.depth.weights import root

MOST = 96  # steps at most: with them the bound is within 1 % of the value for every spectrum and n ≤ 10⁵
CHECK = 8  # steps between two looks at the bound
ENOUGH = 1.01  # the bound over the value attained at which to stop
ROUNDING = 8  # units of rounding that a product with JᵀJ may err by, as the size of a random vector added to it
DOUBT = 1e-9  # the probability, over the start, that the bound is too low


def spectral_norm(g: Callable, y: Array, *args: Any) -> Array:
    """‖J‖₂, J = ∂g/∂y at (y, *args), bounded from above by Lanczos's method on JᵀJ.

    k steps from a unit vector v_0 give a tridiagonal T_k, whose largest eigenvalue θ is at most ‖J‖², and orthonormal vectors
    v_j = p_j(JᵀJ) v_0, j ≤ k, with p_j a polynomial of degree j. Let γ be the component of v_0 along the right singular vector of
    ‖J‖. That of v_j is p_j(‖J‖²) γ, and the squares of all add up to 1 at most: Σ_j p_j(‖J‖²)² ≤ 1 / γ². Beyond θ every p_j
    increases. So, if |γ| ≥ δ, ‖J‖² is at most the t > θ where Σ_j p_j(t)² = 1 / δ². For v_0 uniform on the sphere in n
    dimensions P(|γ| < δ) ≤ δ √(2n / π), and δ is such that this is 1e-9.

    What is guaranteed: the number returned, √t, is at least ‖J‖ with probability 1 - 1e-9 over the start, whatever J is.
    The start is pseudo-random with a fixed seed: equal calls give equal numbers. Steps end when √t ≤ 1.01 √θ, so that the
    number is at most 1 % too large, or after 96 steps. For any J √t ≤ ‖J‖ (1 + (ln(2 / δ) / 2k)² / 2) to first order, by comparison
    with Chebyshev polynomials: with 96 steps 1 % for n = 10⁵. For n ≤ 96 there are at most n steps, and the n-th is exact.

    Rounding: each vector is orthogonalised against all before it, twice. To each product a random vector of 8 units of rounding
    is added, so that where v_0 lies in an invariant subspace the steps go on outside it. The number is raised by n + 8 units of
    rounding, since a product with J in floating point may err by n of them.

    The derivative is that of ‖J v‖, v the last Ritz vector: uᵀ dJ v up to the error of v, and 0 where J = 0.

    Cost: at most min(n, 96) products with J and with Jᵀ, each some two evaluations of g; as many vectors of size n.

    Source: Hochstenbach 2013, *Probabilistic upper bounds for the matrix two-norm*, who takes p_k alone for the sum; the rate for
    any J is that of Kuczyński & Woźniakowski 1992.
    """
    at, held = jax.lax.stop_gradient((y, args))
    _, push = jax.linearize(lambda y: g(y, *held), at)
    transpose = jax.linear_transpose(push, at)
    bound, v = _lanczos(lambda v: transpose(push(v))[0], y.size, y.dtype)
    _, image = jax.jvp(lambda y: g(y, *args), (y,), (v.reshape(y.shape),))
    attained = root(jnp.sum(image**2))
    fixed = jax.lax.stop_gradient(attained)
    return attained * jnp.where(fixed > 0, bound / jnp.where(fixed > 0, fixed, 1), 1)


def _lanczos(product: Callable[[Array], Array], n: int, dtype: Any) -> tuple[Array, Array]:
    """A bound on √ of the largest eigenvalue of a positive semidefinite operator, and the Ritz vector of the largest."""
    most, eps = min(n, MOST), float(jnp.finfo(dtype).eps)
    delta = DOUBT * float(np.sqrt(np.pi / (2 * n))) if n > 1 else 1.0

    start = jax.random.normal(jax.random.key(0), (n,), dtype)
    start = start / jnp.linalg.norm(start)

    def step(j: Array, carry: tuple) -> tuple:
        basis, alpha, beta = carry
        v = jax.lax.dynamic_index_in_dim(basis, j, 0, keepdims=False)
        w = product(v)
        a = _dot(v, w)
        size = jnp.maximum(jnp.linalg.norm(w), jnp.max(alpha))
        w = w + ROUNDING * eps * size * jnp.roll(start, j + 1)  # where nothing else is left, a new direction
        for _ in range(2):  # the second pass removes what rounding left of the first
            w = w - _dot(_dot(basis, w), basis)
        b = jnp.where(j + 1 < n, jnp.linalg.norm(w), 0)  # n vectors span everything: what remains is rounding
        basis = basis.at[j + 1].set(w / jnp.where(b > 0, b, 1), mode="drop")
        return basis, alpha.at[j].set(a), beta.at[j].set(b)

    def go_on(carry: tuple) -> Array:
        k, _, (theta, excess) = carry
        return (k < most) & (1 + excess > ENOUGH**2) & ((k == 0) | (theta > 0))

    def more(carry: tuple) -> tuple:
        k, state, _ = carry
        end = jnp.minimum(k + CHECK, most)
        state = jax.lax.fori_loop(k, end, step, state)
        _, alpha, beta = state
        return end, state, _top(end, alpha, beta, delta)

    one = jnp.ones((), dtype)
    state = (jnp.zeros((most, n), dtype).at[0].set(start), jnp.zeros(most, dtype), jnp.zeros(most, dtype))
    carry = (jnp.zeros((), jnp.int32), state, (0 * one, one))
    k, (basis, alpha, beta), (theta, excess) = jax.lax.while_loop(go_on, more, carry)
    bound = jnp.sqrt(theta * (1 + excess)) * (1 + (n + ROUNDING) * eps)
    return bound, _dot(_ritz(k, alpha, beta, theta), basis)


# The tridiagonal matrix T_k: α on its diagonal and β beside it; the last β belongs to the vector after.


def _top(k: Array, alpha: Array, beta: Array, delta: float) -> tuple[Array, Array]:
    """The largest eigenvalue θ of T_k, and the x ≥ 0 with Σ_j p_j(θ (1 + x))² = 1 / δ²; both rounded up.

    With d_j the pivots of t - T_k, p_j(t) = Π_{i<j} d_i / β_i, and t > θ where all pivots are positive.
    """
    dtype, eps = alpha.dtype, float(jnp.finfo(alpha.dtype).eps)
    inside = jnp.arange(alpha.shape[0], dtype=jnp.int32) < k
    scale = jnp.max(jnp.where(inside, alpha, 0))  # at most θ
    safe = jnp.where(scale > 0, scale, 1)
    a, b = alpha / safe, beta / safe
    links, logs = jnp.concatenate([jnp.zeros_like(b[:1]), b[:-1]]), jnp.log(b)

    def least(low: Any, high: Any, target: float, base: Any, rounds: int) -> Array:
        """The least x with pivots of base + x - T_k that are positive and Σ_j p_j² ≥ e^target: log x is cut into 64, and again."""

        def enough(x: Array) -> Array:
            def pivot(j: Array, carry: tuple) -> tuple:
                d, p, total, positive = carry  # p and total are logarithms
                d = base - a[j] + x - links[j] ** 2 / d
                positive, d = positive & (d > 0), jnp.where(d > 0, d, 1)
                p = p + jnp.log(d) - logs[j]  # ∞ where the last β is 0: then θ is exact
                return d, p, jnp.logaddexp(total, 2 * p), positive

            start = (jnp.ones_like(x), jnp.zeros_like(x), jnp.zeros_like(x), jnp.ones_like(x, bool))
            _, _, total, positive = jax.lax.fori_loop(0, k, pivot, start)
            return positive & (total >= target)

        def cut(_: Array, ends: tuple) -> tuple:
            low, width = ends
            width = width / 64
            x = jnp.exp(low + width * jnp.arange(1, 64, dtype=dtype))
            return low + width * jnp.sum(~enough(x), dtype=dtype), width

        low, high = (jnp.log(jnp.asarray(v, dtype)) for v in (low, high))
        low, width = jax.lax.fori_loop(0, rounds, cut, (low, high - low))
        return jnp.exp(low + width)

    rounds = int(np.ceil(-np.log2(eps) / 6)) + 1
    most = 1 + 2 * jnp.max(b)  # all of T_k is below, by Gershgorin, and 1 / δ times that is enough for any k
    theta = least(0.5, most, float(jnp.finfo(dtype).min), 0, rounds)
    excess = least(eps, most / delta, -2 * float(np.log(delta)), theta, 3) / theta
    return theta * scale, jnp.where(jnp.min(jnp.where(inside, b, 1)) > 0, excess, 0)


def _ritz(k: Array, alpha: Array, beta: Array, theta: Array) -> Array:
    """The unit eigenvector of T_k for its largest eigenvalue, by inverse iteration: all numbers in it are positive."""
    inside = jnp.arange(alpha.shape[0], dtype=jnp.int32) < k
    safe = jnp.where(theta > 0, theta, 1)
    shift = 1 + 16 * float(jnp.finfo(alpha.dtype).eps)
    diagonal = jnp.where(inside, shift - alpha / safe, 1)
    upper = jnp.where(inside & jnp.roll(inside, -1).at[-1].set(False), -beta / safe, 0)
    s = inside.astype(alpha.dtype)[:, None]
    for _ in range(2):
        s = jax.lax.linalg.tridiagonal_solve(jnp.roll(upper, 1), diagonal, upper, s)
        s = s / jnp.linalg.norm(s)
    return s[:, 0]


def _dot(a: Array, b: Array) -> Array:
    """Products in full precision, also where an accelerator's default is less."""
    return jnp.matmul(a, b, precision="highest")
