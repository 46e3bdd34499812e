"""Rosenbrock methods for stiff problems: linearly implicit, one factorisation a step and no iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jode.tableau as tb
from jode.method.base import Method, Step
from jode.method.linear import System, banded, dense, krylov
from jode.tableau import RosenbrockTableau
from jode.tree import State, increment, increment_stacked, put, stack_zeros, unstack
from jode.window import Window


@dataclass(frozen=True)
class Rosenbrock(Method):
    """(I - h γ J) k_i = γ (f(t + c_i h, y + h Σ_j a_ij k_j) + Σ_j C_ij k_j + d_i h ∂f/∂t), y1 = y + h Σ b_i k_i, J = ∂f/∂y at (t,
    y): a linearly implicit method for stiff problems, given by its tableau.

    Local error O(h^(p+1)), global O(h^p) for order p where the problem is not stiff; very stiff ones lower the order. A step costs
    one evaluation of f per stage, one Jacobian (n forward derivatives of f for n components, and one in time) and one factorisation
    (n³ products at most). There is no iteration: a step is an explicit function of its start, derivatives are exact, and solve with
    the factors that are there. A row whose matrix is singular, or whose stage is not finite, rejects the step and tries a
    smaller one; equal steps fail there.

    jac: jac(t, y, args) -> ∂f/∂y as `jax.jacfwd(f, 1)` gives it, where you know a cheaper way than forward derivatives. The order
        holds for the exact Jacobian alone.
    bands: (l, u), where component i of f depends on components i - l … i + u of y alone (y raveled, its leaves one after another):
        then l + u + 1 forward derivatives are enough, and O(n) products. Each step compares one more derivative with the bands: a
        row in which they are wrong ends in `Status.linear_solve`.
    krylov: an iterative solver of lineax, such as `lineax.GMRES(rtol=1e-8, atol=1e-8)`, for states whose matrix is too
        large; a system that it does not solve rejects the step, and a row whose steps cannot do without it ends in
        `Status.linear_solve`.
    """

    tableau: RosenbrockTableau
    jac: Callable | None = None
    bands: tuple[int, int] | None = None
    krylov: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.tableau, RosenbrockTableau):
            raise TypeError(f"Rosenbrock takes a jode.tableau.RosenbrockTableau, got {self.tableau!r}")
        given = [name for name in ("jac", "bands", "krylov") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{self!r}: {' and '.join(given)} are ways to solve the same systems: give one")
        pair = isinstance(self.bands, tuple) and len(self.bands) == 2 and all(isinstance(n, int) and n >= 0 for n in self.bands)
        if self.bands is not None and not pair:
            raise ValueError(f"{self!r}: bands must be two ints, how many below and above the diagonal, got {self.bands!r}")
        t = self.tableau
        of_t = {"order": t.order, "embedded_order": t.embedded_order, "error": (t.error,), "dense": t.dense}
        self.__dict__.update(of_t, evaluations=t.stages, trials=t.stages, jacobians=1, solves=bool(self.bands or self.krylov))

    def __repr__(self) -> str:
        return f"jode.{self.tableau.name}"

    def for_steps(self, most: int) -> Rosenbrock:
        """Without `jac`, which may close over tracers: the march has it as a function of its parameters."""
        return replace(self, jac=None)

    def check(self, y0: Any) -> None:
        dtypes = {x.dtype for x in jax.tree.leaves(y0)}
        if self.bands is not None and (len(dtypes) > 1 or any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes)):
            raise ValueError(
                "bands are those of states of one real dtype: use jac or krylov, or give real and imaginary parts in turn"
            )

    def system(self, window: Window, s: State) -> System:
        """f, h ∂f/∂t, and how to solve (I - h γ J) x = r, at the start of a step from s."""
        gamma = self.tableau.gamma
        if self.krylov is not None:
            return krylov(window, s, gamma, self.krylov)
        return banded(window, s, gamma, *self.bands) if self.bands else dense(window, s, gamma)

    def step(self, window: Window, s: State, slope: Any = ()) -> Step:
        if not any(x.size for x in s):  # nothing to solve
            return Step(s, [s] * self.tableau.stages, window.rows.spread(jnp.ones((), bool)) if self.solves else None)
        return self._looped(window, s) if window.long else self._written_out(window, s)

    def _written_out(self, window: Window, s: State) -> Step:
        t, h = self.tableau, window.h
        f, bend, solve = self.system(window, s)
        ks, found = [], []
        for i in range(t.stages):
            f = window(t.c[i], increment(s, h, t.a[i], ks)) if i else f
            k, ok = solve(increment(_scaled(t.gamma, f), _one(h), [t.gamma * x for x in (*t.C[i], t.d[i])], [*ks, bend]))
            ks.append(k)
            found += [] if ok is None else [ok]
        return Step(increment(s, h, t.b, ks), ks, reduce(jnp.logical_and, found) if found else None)

    def _looped(self, window: Window, s: State) -> Step:
        """The same with the stages after the first in a loop: f stands there once."""
        t, h = self.tableau, window.h
        f, bend, solve = self.system(window, s)
        table = lambda rows: jnp.asarray([[*row, *[0.0] * (t.stages - len(row))] for row in rows], h.dtype)
        k, ok = solve(increment(_scaled(t.gamma, f), _one(h), [t.gamma * t.d[0]], [bend]))
        K = put(stack_zeros(t.stages, s), 0, k)
        c, d, a, C = (
            x[1:] for x in (jnp.asarray(t.c, h.dtype), t.gamma * jnp.asarray(t.d, h.dtype), table(t.a), t.gamma * table(t.C))
        )

        def stage(carry: tuple, xs: tuple) -> tuple:
            (i, K, found), (c, d, a, C) = carry, xs
            r = increment_stacked(_scaled(t.gamma, window(c, increment_stacked(s, h, a, K))), _one(h), C, K)
            k, ok = solve(increment(r, d, [1.0], [bend]))
            return (i + 1, put(K, i, k), found if ok is None else found & ok), None

        (_, K, ok), _ = jax.lax.scan(stage, (jnp.ones((), jnp.int32), K, ok), (c, d, a, C))
        ks = unstack(K, t.stages)
        return Step(increment(s, h, t.b, ks), ks, ok)


def _scaled(gamma: float, f: State) -> State:
    return tuple((gamma * x).astype(x.dtype) for x in f)


def _one(h: Array) -> Array:
    return jnp.ones((), h.dtype)


rodas5p = Rosenbrock(tb.RODAS5P)
rosenbrock23 = Rosenbrock(tb.ROSENBROCK23)
