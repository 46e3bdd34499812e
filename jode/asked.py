"""What a user asked to observe: beside the state, or inside the loop, and how the results become what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.control.adaptive import direction
from jode.observe import At, Event, Observer, Table
from jode.observe.at import AtTimes
from jode.observe.event import ResetTable
from jode.tree import Layout, State


@dataclass(frozen=True)
class Asked:
    """The observers of one solve.

    beside: those that are marched beside the state. inside: those that look inside the loop. treedef, folds: the pytree that they
    were, and which of its leaves are marched beside the state.
    """

    beside: tuple[Observer, ...]
    inside: tuple[Table, ...]
    treedef: Any
    folds: tuple[bool, ...]

    @classmethod
    def of(cls, observe: Any, times: Callable, layered: bool) -> tuple[Asked, list]:
        """The observers, and the times that those inside look at; times(x) checks some of them and makes an array."""
        kinds = (Observer, Table, At, Event)
        leaves, treedef = jax.tree.flatten(observe, is_leaf=lambda x: isinstance(x, kinds))
        for o in leaves:
            if not isinstance(o, kinds):
                raise TypeError(
                    f"observe must be a jode.Observer, jode.Steps() or the like, or a pytree of them, got {type(o).__name__}"
                )
            if isinstance(o, (At, Event)) and layered:
                raise ValueError(f"{type(o).__name__} looks between steps, and Layers has no state there: use Fixed or Adaptive")
        folds = tuple(isinstance(o, Observer) for o in leaves)
        looks = [times(o.ts) for o in leaves if isinstance(o, At)]
        sizes = iter(looks)
        inside = [o for o, fold in zip(leaves, folds, strict=True) if not fold]
        inside = [AtTimes(len(next(sizes)), o.g) if isinstance(o, At) else o.table if isinstance(o, Event) else o for o in inside]
        return cls(tuple(o for o in leaves if isinstance(o, Observer)), tuple(inside), treedef, folds), looks

    def __bool__(self) -> bool:
        return bool(self.folds)

    @property
    def functions(self) -> list:
        """What each observer inside looks by, a function of (t, y, args), or None."""
        return [w.g for w in self.inside]

    @property
    def resets(self) -> list:
        """What resets the state, a function of (t, y, args) of each event that does."""
        return [w.reset for w in self.inside if isinstance(w, ResetTable)]

    def initial(self, t: Array, y: Any, args: Any) -> Any:
        """The state with what is marched beside it."""
        return y, jax.tree.map(jnp.asarray, [o.init(t, y, args) for o in self.beside])

    def seen_with(self, jumping: bool) -> list:
        """The functions of the state and args that f has inside: with what is beside the state, and with the data of jumps."""
        return [g and inside(g, bool(self.beside), jumping) for g in self.functions]

    def resets_with(self, jumping: bool) -> list:
        """Those of the state and args that f has inside: what observers keep beside the state stays."""

        def within(reset: Callable) -> Callable:
            of = inside(reset, bool(self.beside), jumping)
            return (lambda t, y, args: (of(t, y, args), y[1])) if self.beside else of

        return [within(reset) for reset in self.resets]

    def placed(self, outs: list, first: int, most: int, method: Any) -> tuple:
        """The observers inside, told what their functions return, where their times are (from ts[first] on), and how many steps of
        the method there may be.
        """
        placed = []
        for given, out in zip(self.inside, outs, strict=True):
            w = given.sized(most, method)
            placed.append(w if out is None else w.told(out))
            if isinstance(w, AtTimes):
                placed[-1], first = replace(placed[-1], first=first), first + (w.capacity or 0)
        return tuple(placed)

    def results(self, kept: Any, watches: tuple, tables: tuple, orders: list, reached: Array, layout: Layout) -> Any:
        """What was asked for: what was kept beside the state, by save time, and the tables of the observers inside."""
        unflatten, left = Unpack(layout, bool(self.beside)), iter(orders)
        beside = iter([jax.tree.map(lambda x: x[-1], k) for k in kept or []])
        inside = []
        for w, table in zip(watches, tables, strict=True):
            result = w.result(table, reached, unflatten)
            inside.append(_as_given(result, next(left)) if isinstance(w, AtTimes) else result)
        seen = iter(inside)
        return jax.tree.unflatten(self.treedef, [next(beside if fold else seen) for fold in self.folds])


def inside(g: Callable, beside: bool, jumping: bool) -> Callable:
    """A function of (t, y, args) as one of the state and args that f has inside."""
    return lambda t, y, args: g(t, y[0] if beside else y, args[0] if jumping else args)


def _as_given(result: Any, order: Array) -> Any:
    """A result of times in order, as they were given."""
    return jax.tree.map(lambda x: x[jnp.argsort(order)], result)


def in_order(looks: list, ts: Array) -> tuple[list, Array]:
    """The orders of some vectors of times in the direction of the solve, and all of them, each in order."""
    orders = [jnp.argsort(direction(ts) * jax.lax.stop_gradient(x)) for x in looks]
    return orders, jnp.concatenate([ts[:0], *(x[order] for x, order in zip(looks, orders, strict=True))])


@dataclass(frozen=True)
class Unpack:
    """The states of packed ones with leading axes, without what is marched beside them."""

    layout: Layout
    beside: bool

    def __call__(self, vectors: State, lead: tuple) -> Any:
        y = jax.tree.unflatten(self.layout.treedef, self.layout.unpack(vectors, lead))
        return y[0] if self.beside else y
