"""What a method sees of the vector field during one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.rows import Rows
from jode.tree import State, blend


class Params(NamedTuple):
    """The arrays a vector field reads: with gradients (`shared`, `layers`) and without; `layers` have one slice per step."""

    shared: list
    layers: list
    fixed: list
    fixed_layers: list


class Problem(NamedTuple):
    """Everything a march depends on that is data. `numbers` are the solver's: a step count, or tolerances."""

    ts: Array
    y0: State
    params: Params
    numbers: dict


@dataclass(frozen=True, eq=False)
class Window:
    """A step of width `h` from time `t`; both are columns, one number a row. Called with a fraction c of the step and a state
    y it returns f(t + c h, y) of every row.

    field: f(t, y, params) for these rows. params: those of this step, layers at its nodes. rows: where the rows lie.
    kept: what observers keep at (t, y, params), for a state that carries it. limits: the earliest and the latest time that f may
    be asked for (columns): where f jumps, these are the times beside. still: rows that stand still while others step (a column;
    None where none may). long: whether the field's program is so long that a step should hold
    it once, its stages in a loop. alone: f(t, y, params) of one trajectory, and mapped: which of the params differ by row. jac:
    ∂f/∂y of these rows as (t, y, params), where the user gave it.
    """

    field: Callable
    rows: Rows
    t: Array
    h: Array
    params: Params
    swapped: bool = False
    kept: Callable | None = None
    limits: Any = None
    still: Any = None
    long: bool = False
    alone: Any = None
    mapped: Any = None
    jac: Callable | None = None

    def __call__(self, c: Any, y: State) -> State:
        return self._asked(self.field, c, y)

    def _asked(self, f: Callable, c: Any, y: State) -> Any:
        h = self.h
        if self.swapped:
            c, h = 1 - c, -h
        t = self.t + c * h
        if self.limits is not None:
            t = within(t, *self.limits)
        return f(t, y, at_fraction(self.params, c))

    def given_jacobian(self, y: State) -> Array | None:
        """∂f/∂y at the start of the step, (n, n), with the rows where they lie, as the user gave it; None where none was given."""
        return self._asked(self.jac, 0.0, y) if self.jac is not None else None

    def ends_swapped(self) -> Window:
        """The same step taken from its end to its start: h is negative, and c counts from the end."""
        return replace(self, h=-self.h, swapped=not self.swapped)

    def after(self, y: State) -> State:
        """The state at the end of the step with what observers keep there."""
        assert self.kept is not None
        return self.kept(self.t + self.h, y, at_fraction(self.params, 1.0))

    @property
    def moving(self) -> tuple:
        """What of a window has a cotangent: (t, h, shared, layers)."""
        return self.t, self.h, self.params.shared, self.params.layers

    def at(self, moving: tuple) -> Window:
        """The window with another (t, h, shared, layers)."""
        t, h, shared, layers = moving
        return replace(self, t=t, h=h, params=self.params._replace(shared=shared, layers=layers))

    def linearised(self, y: State, along: State) -> tuple[State, State, State]:
        """At the start of the step f(t, y), h ∂f/∂t, and ∂f/∂y along some states, stacked.

        Costs one forward derivative of f for each of the states, and one more.
        """
        still = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), along)
        c = jnp.zeros((), self.h.dtype)
        n = jax.tree.leaves(along)[0].shape[0]
        moves = jnp.concatenate([jnp.ones(1, c.dtype), jnp.zeros(n, c.dtype)])
        derivative = lambda move, v: jax.jvp(self, (c, y), (move, v))
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), still, along)
        slope, moved = jax.vmap(derivative, out_axes=(None, 0))(moves, both)
        return slope, tuple(x[0] for x in moved), tuple(x[1:] for x in moved)

    def each(self, g: Callable, *xs: Any) -> Any:
        """g(window, *xs) of every row by itself, stacked; arrays in xs and in what it returns lead with the rows."""
        rows = self.rows
        if rows.size is None:
            return g(self, *xs)
        numbers = [rows.flat(rows.spread(x)) for x in (self.t, self.h)]
        limits = None if self.limits is None else tuple(rows.flat(rows.spread(x)) for x in self.limits)
        place = lambda m, lead=0: (rows.axis if rows.axis == -1 else lead) if m else None
        axes = [[place(m, lead) for m in flags] for flags, lead in zip(self.mapped, (0, 1, 0, 1), strict=True)]

        def one(t: Array, h: Array, limits: Any, params: Params, *xs: Any) -> Any:
            return g(replace(self, field=self.alone, rows=Rows(), t=t, h=h, params=params, limits=limits), *xs)

        of: Any = jax.vmap(one, (0, 0, None if limits is None else 0, Params(*axes), *(0 for _ in xs)))
        return of(*numbers, limits, self.params, *xs)

    def jacobian(self, c: Any, y: State) -> Array:
        """∂f/∂y a fraction c into the step, (n, n) of the n components of y, with a leading axis for rows where there are any.

        Costs n forward derivatives of f, of all rows at once.
        """
        vector = self.rows.vectors(y)
        basis = jnp.eye(vector.shape[-1], dtype=vector.dtype)

        def column(e: Array) -> Array:
            direction = self.rows.states(jnp.broadcast_to(e, vector.shape), y)
            return self.rows.vectors(jax.jvp(lambda y: self(c, y), (y,), (direction,))[1])

        return jnp.moveaxis(jax.vmap(column)(basis), 0, -1)

    def solve_shifted(self, jacobian: Array, h: Any, r: State) -> State:
        """x of (I - h J) x = r for each row, by a dense factorisation: n³/3 products a row; h is a column."""
        r_ = self.rows.vectors(r)
        h = self.rows.flat(self.rows.spread(jnp.asarray(h, r_.dtype)))
        matrix = jnp.broadcast_to(jnp.eye(r_.shape[-1], dtype=r_.dtype), jacobian.shape) - h[..., None, None] * jacobian
        return self.rows.states(jnp.linalg.solve(matrix, r_[..., None])[..., 0], r)


@jax.custom_jvp
def within(t: Array, earliest: Array, latest: Array) -> Array:
    """The time, or the limit that it is beyond; it moves with t."""
    return jnp.minimum(jnp.maximum(t, earliest), latest)


within.defjvps(lambda tdot, _, t, earliest, latest: tdot, None, None)


def just_after(t: Array, sign: Array) -> Array:
    """The number next to t in the direction of time (1 or -1); it moves with t."""
    fixed = jax.lax.stop_gradient(t)
    gap = jnp.nextafter(fixed, sign * jnp.full_like(fixed, jnp.inf)) - fixed
    return t + jnp.where(fixed == 0, sign * jnp.finfo(t.dtype).tiny, gap)  # around 0 the gap is no normal number


def at_fraction(params: Params, c: Any) -> Params:
    """The parameters at a fraction c of a step: of its one layer, or on the line between the layers at its two nodes."""
    layers = [x[0] if x.shape[0] == 1 else blend(x[0], x[1], c) for x in params.layers]
    return params._replace(layers=layers, fixed_layers=[x[0] for x in params.fixed_layers])


def at_nodes(params: Params, i: Array, degree: int) -> Params:
    """The parameters at the nodes of step i: layers i … i + degree."""
    layers, fixed = ([jax.lax.dynamic_slice_in_dim(x, i, degree + 1, 0) for x in xs] for xs in (params.layers, params.fixed_layers))
    return params._replace(layers=layers, fixed_layers=fixed)
