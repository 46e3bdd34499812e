"""The linear systems of an implicit step, (I - w J) x = r for each row, with J = ∂f/∂y at the start of the step.

Solutions are differentiable in every mode: a derivative is one more solve with the factors that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import Array

from jode.rows import Rows
from jode.tree import State, widest
from jode.tuning import BLOCK, INVERTED, WRITTEN_OUT
from jode.window import Window


class System(NamedTuple):
    """At the start of a step: f, its derivative by the fraction of the step, h ∂f/∂t, and solve(r) -> x, whether it was found (a
    column, or None where x is NaN if not).
    """

    slope: State
    bend: State
    solve: Callable[[State], tuple[State, Array | None]]


# --- states as real vectors, with the rows where they lie


def joined(rows: Rows, s: State, lead: int = 0) -> Array:
    """All components of a state as one real vector in its working dtype, behind `lead` more axes."""
    dtype = widest(*(x.dtype for x in s), default=jnp.float32)
    parts = [y.astype(dtype) for x in s for y in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=rows.component_axis + lead)


def parted(rows: Rows, v: Array, like: Any, lead: int = 0) -> State:
    """The inverse of `joined`, in the dtypes of `like`, which has no more axes."""
    out, start, axis = [], 0, rows.component_axis

    def piece(n: int, dtype: Any) -> Array:
        nonlocal start
        start += n
        return jax.lax.slice_in_dim(v, start - n, start, axis=axis + lead).astype(dtype)

    for x in like:
        n, dtype = x.shape[axis], x.dtype
        if jnp.iscomplexobj(x):
            dtype = jnp.finfo(dtype).dtype
            out.append(jax.lax.complex(piece(n, dtype), piece(n, dtype)))
        else:
            out.append(piece(n, dtype))
    return tuple(out)


def along(window: Window, s: State, directions: Array) -> tuple[State, State, Array]:
    """f, h ∂f/∂t, and ∂f/∂y along some directions, (k, n), the same for all rows: (k, ...) with the rows where they lie."""
    rows, y = window.rows, joined(window.rows, s)
    v = directions.astype(y.dtype)
    v = v if rows.size is None else jnp.expand_dims(v, -1 if rows.axis == -1 else 1)
    v = jnp.broadcast_to(v, (v.shape[0], *y.shape))
    slope, bend, moved = window.linearised(s, parted(rows, v, s, lead=1))
    return slope, bend, joined(rows, moved, lead=1)


def implicit(matvec: Callable, apply: Callable, back: Callable | None = None) -> Callable:
    """r -> x of matvec(x) = r, where apply(r) is x, with the derivatives of the system; back is the transpose of apply."""
    back = back or (lambda r: jax.linear_transpose(apply, r)(r)[0])
    return lambda r: jax.lax.custom_linear_solve(matvec, r, lambda _, r: apply(r), lambda _, r: back(r))


def posed(*xs: Array) -> Array:
    """Whether systems are made of numbers, with norms that are: those of a step that left the domain of f are not, and no solver
    is to blame.
    """
    return reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x * x), axis=-1) for x in map(jax.lax.stop_gradient, xs)])


# --- matrices


def dense(window: Window, s: State, gamma: float) -> System:
    """By a matrix a row, with all its columns; w = γ h. n forward derivatives of f, n³ products for an
    inverse or a third of them for factors, and n² a solve.
    """
    rows, y = window.rows, joined(window.rows, s)
    n = y.shape[rows.component_axis]
    J = window.given_jacobian(s)
    if J is None:
        slope, bend, columns = along(window, s, jnp.eye(n))
        J = jnp.moveaxis(columns, 0, 1)  # (n, n), or with the rows behind or before them: (n, n, B), (B, n, n)
        J = jnp.swapaxes(J, 1, 2) if rows.component_axis else J
    else:
        slope, bend, _ = along(window, s, jnp.zeros((0, n)))
        J = J.astype(y.dtype)
    if n <= INVERTED and rows.component_axis == 0:
        w = rows.spread(gamma * window.h).astype(y.dtype)
        W = _identity(J, 0) - (w if rows.size is None else w[None]) * J
        M = inverse(jax.lax.stop_gradient(W))
        solve = implicit(partial(_times, W), partial(_product, M), partial(_product, M, over=0))
    else:
        J = jnp.moveaxis(J, -1, 0) if rows.size is not None and not rows.component_axis else J
        W = _identity(J, J.ndim - 2) - _width(window, gamma, y.dtype) * J
        rows_first = implicit(partial(_times_rows, W), factored(jax.lax.stop_gradient(W)))
        solve = lambda r: rows.to_layout(rows_first(rows.from_layout(r)), True)
    return System(slope, bend, lambda r: (parted(rows, solve(joined(rows, r)), s), None))


def _identity(like: Array, at: int) -> Array:
    """Identity matrices whose rows and columns are the axes `at` and at + 1."""
    shape = [n if i in (at, at + 1) else 1 for i, n in enumerate(like.shape)]
    return jnp.broadcast_to(jnp.eye(like.shape[at], dtype=like.dtype).reshape(shape), like.shape)


def _width(window: Window, gamma: float, dtype: Any) -> Array:
    """γ h, to multiply matrices with the rows first."""
    return window.rows.flat(window.rows.spread(gamma * window.h)).astype(dtype)[..., None, None]


def _times(M: Array, x: Array) -> Array:
    """M x with the rows last."""
    return jnp.sum(M * x[None], axis=1)


def _product(M: Array, x: Array, over: int = 1) -> Array:
    """M x with the rows last, and xᵀ M `over` the first axis, of a constant M: no sum over an axis that is not the last one."""
    n = x.shape[0]
    if n <= WRITTEN_OUT:
        return jnp.sum(M * (x[None] if over else x[:, None]), axis=over)
    if x.ndim == 1:
        return jnp.tensordot(M, x, ((over,), (0,)), precision="highest")
    at = lambda x, k, axis: jax.lax.dynamic_index_in_dim(x, k, axis, keepdims=False)
    return jax.lax.fori_loop(0, n, lambda k, total: total + at(M, k, over) * at(x, k, 0)[None], jnp.zeros_like(x))


def _times_rows(M: Array, x: Array) -> Array:
    """M x with the rows first."""
    return jnp.einsum("...ij,...j->...i", M, x)


def inverse(W: Array) -> Array:
    """W⁻¹ of matrices with the rows last; not finite where W is singular."""
    if W.shape[0] <= WRITTEN_OUT:
        return _pivoted(W)
    blocks = 1 if W.ndim == 2 else -(-W.size // BLOCK)
    if blocks == 1:
        return _eliminated(W)
    size = -(-W.shape[2] // (8 * blocks)) * 8

    def turn(i: Array, M: Array) -> Array:  # the last rows may be those of two blocks
        of_block = _eliminated(jax.lax.dynamic_slice_in_dim(W, i * size, size, 2))
        return jax.lax.dynamic_update_slice_in_dim(M, of_block, i * size, 2)

    return jax.lax.fori_loop(0, blocks, turn, jnp.zeros_like(W))


def _pivoted(W: Array) -> Array:
    """By elimination with partial pivoting, written out."""
    n = W.shape[0]
    equations = list(jnp.concatenate([W, _identity(W, 0)], axis=1))
    for k in range(n):
        for i in range(k + 1, n):  # the largest comes up
            larger = jnp.abs(equations[i][k : k + 1]) > jnp.abs(equations[k][k : k + 1])
            up, down = equations[i], equations[k]
            equations[k], equations[i] = jnp.where(larger, up, down), jnp.where(larger, down, up)
        equations[k] = equations[k] / equations[k][k : k + 1]
        for i in set(range(n)) - {k}:
            equations[i] = equations[i] - equations[i][k : k + 1] * equations[k]
    return jnp.stack([x[n:] for x in equations])


def _eliminated(W: Array) -> Array:
    """By elimination without pivots; where that is wrong in more than a third of the digits, again with the equations in order.

    I - w J seldom needs a pivot: its diagonal dominates its columns where what one component loses the others gain.
    """
    M, x = _gauss_jordan(W), jnp.cos(jnp.arange(W.shape[0], dtype=W.dtype))  # of no symmetry
    x = jnp.broadcast_to(jnp.expand_dims(x, range(1, W.ndim - 1)), W.shape[1:])
    found = jnp.abs(_product(W, _product(M, x)) - x) <= jnp.finfo(W.dtype).eps ** (2 / 3)

    def in_order() -> Array:
        order = _pivots(W)
        M = _gauss_jordan(jnp.take_along_axis(W, order[:, None], 0))
        i = jnp.arange(W.shape[0]).reshape(1, -1, *[1] * (W.ndim - 2))
        column = lambda x, k, axis: jax.lax.dynamic_slice_in_dim(x, k, 1, axis)
        place = lambda k, out: jnp.where(column(order, k, 0)[None] == i, column(M, k, 1), out)  # of equation order[k]
        return jax.lax.fori_loop(0, W.shape[0], place, M)

    once = lambda c: (jnp.zeros_like(c[0]), in_order())
    return jax.lax.while_loop(lambda c: c[0], once, (~jnp.all(found), M))[1]  # `cond` would copy M


def _pivots(W: Array) -> Array:
    """The order of the equations, (n, ...), in which elimination meets the largest pivot that is left in each column."""
    i = jnp.arange(W.shape[0]).reshape(-1, *[1] * (W.ndim - 2))

    def turn(k: Array, carry: tuple) -> tuple:
        M, order = carry
        at = lambda x: jax.lax.dynamic_index_in_dim(x, k, 0)
        column = jax.lax.dynamic_index_in_dim(M, k, 1, keepdims=False)
        largest = i == jnp.argmax(jnp.where(i < k, -1, jnp.abs(column)), axis=0, keepdims=True)

        def swapped(x: Array) -> Array:
            here, there = (m if x.ndim == largest.ndim else m[:, None] for m in (i == k, largest))
            return jnp.where(here, jnp.sum(jnp.where(there, x, 0), axis=0, keepdims=True), jnp.where(there, at(x), x)).astype(
                x.dtype
            )

        M, order = swapped(M), swapped(order)
        column = jax.lax.dynamic_index_in_dim(M, k, 1, keepdims=False)
        return M - jnp.where(i > k, column / at(column), 0)[:, None] * at(M), order

    return jax.lax.fori_loop(0, W.shape[0], turn, (W, jnp.broadcast_to(i, W.shape[1:])))[1]


def _gauss_jordan(W: Array) -> Array:
    """W⁻¹ in the place of W, without pivots: n³ products.

    The row and the column of the pivot are carried from turn to turn, or XLA would compute them again for each entry.
    """
    n = W.shape[0]
    i = jnp.arange(n).reshape(n, *[1] * (W.ndim - 2))

    def pivot(M: Array, k: Any) -> tuple[Array, Array]:
        row, column = (jax.lax.dynamic_index_in_dim(M, k, axis, keepdims=False) for axis in (0, 1))
        return jnp.where(i == k, 1, row) * (1 / jax.lax.dynamic_index_in_dim(row, k, 0)), jnp.where(i == k, -1, column)

    def turn(k: Array, carry: tuple) -> tuple:
        M, row, column = carry
        M = jnp.where((i != k)[:, None] & (i != k)[None], M, 0) - column[:, None] * row[None]
        return M, *pivot(M, k + 1)

    return jax.lax.fori_loop(0, n, turn, (W, *pivot(W, 0)))[0]


def factored(W: Array) -> Callable:
    """r -> W⁻¹ r with the rows first, by an LU factorisation with partial pivoting."""
    factors = jsl.lu_factor(W)
    return lambda r: jsl.lu_solve(factors, r[..., None])[..., 0]


# --- bands


def banded(window: Window, s: State, gamma: float, lower: int, upper: int) -> System:
    """By the bands of the matrix: lower + upper + 1 forward derivatives of f, whose directions share no component of f, and one
    more, by which the bands are checked.

    W is a block tridiagonal matrix with blocks of size m = max(lower, upper), eliminated block by block: O(n m²) products. Pivots
    are chosen within blocks alone, so the residual is looked at: a system that is not solved to 1e-3 (in float32, else 1e-6) has
    failed. So has one whose matrix has more than these bands: J v is not B v, to half of the digits of |B| |v|.
    """
    rows, y = window.rows, joined(window.rows, s)
    n = y.shape[rows.component_axis]
    lower, upper = min(lower, n - 1), min(upper, n - 1)
    m = max(lower, upper, 1)
    colours, blocks = lower + upper + 1, -(-n // m)
    size, i = blocks * m, np.arange(blocks * m)
    v = np.cos(3.0 * i[:n])  # of no symmetry
    directions = np.concatenate([i[:n] % colours == np.arange(colours)[:, None], v[None]])
    slope, bend, moved = along(window, s, jnp.asarray(directions, y.dtype))
    moved = jnp.moveaxis(jax.vmap(rows.from_layout)(moved), 0, -1)  # (..., n, colours), and J v behind them
    Jv, moved = jax.lax.stop_gradient(moved[..., -1]), moved[..., :-1]
    first = i[:n, None] - lower
    j = first + (np.arange(colours) - first) % colours  # the column, within the bands of row i, of each colour
    of_colours = np.where((j >= 0) & (j < n), v[np.clip(j, 0, n - 1)], 0)
    Bv = jax.lax.stop_gradient(moved) * jnp.asarray(of_colours, y.dtype).reshape(*[1] * (moved.ndim - 2), n, colours)
    beyond = jnp.max(jnp.abs(Jv - jnp.sum(Bv, -1)), -1) > jnp.finfo(y.dtype).eps ** 0.5 * jnp.max(jnp.sum(jnp.abs(Bv), -1), -1)
    moved = jnp.pad(moved, [(0, 0)] * (moved.ndim - 2) + [(0, size - n), (0, 0)])

    def blocks_of(first: int) -> Array:
        """Blocks of W, (blocks, ..., m, m): for block k the columns from (k + first) m on."""
        j = (i // m + first)[:, None] * m + np.arange(m)
        inside = (j >= 0) & (j < n) & (j - i[:, None] <= upper) & (i[:, None] - j <= lower) & (i[:, None] < n)
        as_rows = lambda x: jnp.broadcast_to(jnp.asarray(x).reshape(*[1] * (moved.ndim - 2), size, m), (*moved.shape[:-1], m))
        J = jnp.where(as_rows(inside), jnp.take_along_axis(moved, as_rows(j % colours), -1), 0)
        W = as_rows((i[:, None] == j).astype(y.dtype)) - _width(window, gamma, y.dtype) * J
        return jnp.moveaxis(W.reshape(*W.shape[:-2], blocks, m, m), -3, 0)

    W = tuple(map(blocks_of, (-1, 0, 1)))
    lift = lambda r: jnp.moveaxis(jnp.pad(r, [(0, 0)] * (r.ndim - 1) + [(0, size - n)]).reshape(*r.shape[:-1], blocks, m), -2, 0)
    drop = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], size)[..., :n]
    matvec = lambda x: drop(_tridiagonal(W, lift(x)))
    eliminate = _thomas(jax.lax.stop_gradient(W))
    apply = implicit(matvec, lambda r: drop(eliminate(lift(r))))
    limit = 1e-3 if y.dtype == jnp.float32 else 1e-6

    def solve(r: State) -> tuple[State, Array]:
        r_ = rows.from_layout(joined(rows, r))
        x = apply(r_)
        far = jax.lax.stop_gradient(jnp.max(jnp.abs(matvec(x) - r_), axis=-1))
        ok = far <= limit * jax.lax.stop_gradient(jnp.max(jnp.abs(r_), axis=-1))
        ok = (ok & ~beyond) | ~posed(Jv, r_)
        return parted(rows, rows.to_layout(x, True), s), rows.column(ok)

    return System(slope, bend, solve)


def _tridiagonal(W: tuple, x: Array) -> Array:
    """W x by blocks."""
    lower, diagonal, upper = W
    none = jnp.zeros_like(x[:1])
    before, after = jnp.concatenate([none, x[:-1]]), jnp.concatenate([x[1:], none])
    return _times_rows(lower, before) + _times_rows(diagonal, x) + _times_rows(upper, after)


def _thomas(W: tuple) -> Callable:
    """r -> W⁻¹ r by blocks: D_k ← D_k - L_k D_{k-1}⁻¹ U_{k-1}, and likewise for r; then back."""
    lower, diagonal, upper = W

    def one(D: Array) -> Array:
        if D.shape[-1] > WRITTEN_OUT:
            return jsl.lu_solve(jsl.lu_factor(D), _identity(D, D.ndim - 2))
        return jnp.moveaxis(inverse(jnp.moveaxis(D, (-2, -1), (0, 1))), (0, 1), (-2, -1))

    def forth(carry: tuple, blocks: tuple) -> tuple:
        M, U = carry
        L, D, after = blocks
        M = one(D - L @ M @ U)
        return (M, after), M

    M = jax.lax.scan(forth, (jnp.zeros_like(diagonal[0]), jnp.zeros_like(upper[0])), (lower, diagonal, upper))[1]
    before = jnp.concatenate([jnp.zeros_like(M[:1]), M[:-1]])

    def apply(r: Array) -> Array:
        def down(z: Array, xs: tuple) -> tuple:
            A, r = xs
            z = r - _times_rows(A, z)
            return z, z

        def up(x: Array, xs: tuple) -> tuple:
            M, U, z = xs
            x = _times_rows(M, z - _times_rows(U, x))
            return x, x

        z = jax.lax.scan(down, jnp.zeros_like(r[0]), (lower @ before, r))[1]
        return jax.lax.scan(up, jnp.zeros_like(r[0]), (M, upper, z), reverse=True)[1]

    return apply


# --- without a matrix


def krylov(window: Window, s: State, gamma: float, solver: Any) -> System:
    """By products with J alone, and an iterative solver of `lineax`, for each row by itself; each product is a derivative of f."""
    import lineax as lx

    rows = window.rows
    n = joined(rows, s).shape[rows.component_axis]
    slope, bend, _ = along(window, s, jnp.zeros((0, n)))
    y, like = (
        rows.from_layout(joined(rows, s)),
        tuple(jax.ShapeDtypeStruct(x.shape[rows.component_axis : rows.component_axis + 1], x.dtype) for x in s),
    )

    def one(window: Window, y: Array, r: Array) -> tuple[Array, Array]:
        F = lambda y: joined(Rows(), window(0.0, parted(Rows(), y, like)))
        _, J = jax.linearize(F, y)
        w = (gamma * window.h).astype(y.dtype)
        W = lx.FunctionLinearOperator(lambda x: x - w * J(x), jax.eval_shape(lambda: y))
        found = lx.linear_solve(W, r, solver, throw=False)
        return found.value, (found.result == lx.RESULTS.successful) | ~posed(r)

    def solve(r: State) -> tuple[State, Array]:
        x, ok = window.each(one, y, rows.from_layout(joined(rows, r)))
        return parted(rows, rows.to_layout(x, True), s), rows.column(ok)

    return System(slope, bend, solve)
