"""What a march is to JAX: a rule, and its forms as functions of flat operands, for one trajectory or for a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import Array

from jode.native.settings import Settings


class Batch(NamedTuple):
    """How many rows, and which operands (a pytree of bools like the operands) have a leading row axis."""

    size: int
    mapped: Any


class Promise(NamedTuple):
    """What a march returns for one trajectory, pytrees of shapes and dtypes: what can be differentiated, and the rest; the effects
    of running it, how many numbers its state is, and of how many trajectories it is. live: of how many rows the maps around are.
    """

    values: Any
    rest: Any
    effects: Any
    state: int
    rows: int = 1
    live: int = 1


class Rule(NamedTuple):
    """The forms of a march: functions of (batch or None, platform or None) that return functions of the operands.

    run: (moving, still) -> (values, rest). record: the same and what the way back needs, each array led by the rows of a batch; it
    is a function of a number `sized` too, and the shapes of what is kept of a row depend on that number alone, not on the batch.
    pull: (moving, still, values, rest, kept, cotangents of values) -> cotangents of moving; of an operand that all rows share it is
    the sum over rows. anew: as `run`, but a function of `moving` alone where `still` holds what was computed from it.
    """

    run: Callable
    record: Callable
    pull: Callable
    anew: Callable | None = None


class March:
    """A rule and what is needed to stage it. Its forms are functions of (held, linear) operands, flat."""

    def __init__(self, rule: Rule, treedef: Any, moving: int, promise: Promise, settings: Settings | None = None) -> None:
        self.rule, self.treedef, self.effects = rule, treedef, promise.effects
        self.settings = settings or Settings.now()
        self.state, self.rows, self.live = promise.state, promise.rows, promise.live
        self.values, self.rest = jax.tree.leaves(promise.values), jax.tree.leaves(promise.rest)
        self.out = jax.tree.structure((promise.values, promise.rest))
        self.operands, self.moving = treedef.num_leaves, moving
        self.kept: Any = None  # the structure of what is kept
        self.staged: dict = {}
        self.compiled: dict = {}
        self.derived: dict = {}

    def batch(self, rows: tuple | None) -> Batch | None:
        return None if rows is None else Batch(rows[0], jax.tree.unflatten(self.treedef, rows[1]))

    def run(self, platform: str | None, rows: tuple | None) -> Callable:
        def form(held: Sequence, _: Sequence) -> tuple[list, list]:
            return jax.tree.leaves(self.rule.run(self.batch(rows), platform)(*self.unflatten(held))), []

        return form

    def record(self, platform: str | None, rows: tuple | None, sized: int) -> Callable:
        def form(held: Sequence, _: Sequence) -> tuple[list, list]:
            values, rest, kept = self.rule.record(self.batch(rows), platform, sized)(*self.unflatten(held))
            leaves, self.kept = jax.tree.flatten(kept)
            return [*jax.tree.leaves((values, rest)), *leaves], []

        return form

    def joint(self, platform: str | None, rows: tuple | None, active: tuple) -> Callable:
        def form(held: Sequence, tangents: Sequence) -> tuple[list, list]:
            run = (self.rule.anew or self.rule.run)(self.batch(rows), platform)

            def values(*moved: Any) -> tuple[list, list]:
                out = jax.tree.leaves(run(*self.unflatten(replaced(held, active, moved))))
                return out[: len(self.values)], out[len(self.values) :]

            out, dots, rest = jax.jvp(values, [held[i] for i in active], list(tangents), has_aux=True)
            return [*out, *rest], dots

        return form

    def tangent(self, platform: str | None, rows: tuple | None, active: tuple) -> Callable:
        """Of (operands, results of `record`) and tangents; it marches anew, so what was recorded is for the transpose."""

        def form(held: Sequence, tangents: Sequence) -> tuple[list, list]:
            return [], self.joint(platform, rows, active)(held[: self.operands], tangents)[1]

        return form

    def pull(self, platform: str | None, rows: tuple | None, active: tuple) -> Callable:
        def form(held: Sequence, cotangents: Sequence) -> tuple[list, list]:
            moving, still = self.unflatten(held[: self.operands])
            results = held[self.operands :]
            n = len(self.values) + len(self.rest)
            values, rest = jax.tree.unflatten(self.out, results[:n])
            kept = jax.tree.unflatten(self.kept, results[n:])
            bars = jax.tree.unflatten(jax.tree.structure(values), cotangents)
            moved = jax.tree.leaves(self.rule.pull(self.batch(rows), platform)(moving, still, values, rest, kept, bars))
            return [], [moved[i] for i in active]

        return form

    def back(self, platform: str | None, rows: tuple | None) -> Callable:
        """(operands, cotangents) -> (values, cotangents of all that moves): there and back as one function of the operands."""

        def form(held: Sequence, cotangents: Sequence) -> tuple[list, list]:
            moving, still = self.unflatten(held)
            values, rest, kept = self.rule.record(self.batch(rows), platform, count(rows))(moving, still)
            bars = jax.tree.unflatten(jax.tree.structure(values), cotangents)
            bars = self.rule.pull(self.batch(rows), platform)(moving, still, values, rest, kept, bars)
            return jax.tree.leaves(values), jax.tree.leaves(bars)

        return form

    def unflatten(self, held: Sequence) -> tuple:
        return jax.tree.unflatten(self.treedef, held)


def count(rows: tuple | None) -> int:
    """How many rows a form is for."""
    return rows[0] if rows else 1


def replaced(leaves: Sequence, places: Sequence[int], by: Sequence) -> list:
    """The leaves with those at some places replaced."""
    out = list(leaves)
    for i, x in zip(places, by, strict=True):
        out[i] = x
    return out


def form_of(march: March, kind: str, platform: str | None, over: tuple = (), **params: Any) -> Callable:
    """A form as a function of flat operands; `over` are axes that it is mapped over, each the places of the axis in the held
    ones. params: its rows, and what its kind has besides.
    """
    form, active = getattr(march, kind)(platform, **params), params.get("active", ())
    for axes in over:
        form = jax.vmap(form, (list(axes), 0), (0 if any(a is not None for a in axes) else None, 0))

    def flat(*operands: Any) -> list:
        given = arrays(operands)
        held = len(over[0]) if over else held_of(march, kind, given, active)
        out, linear = form(list(given[:held]), list(given[held:]))
        return [*out, *linear]

    return flat


def arrays(operands: Sequence) -> list:
    """The operands as arrays: numbers that are known where a program is traced may be literals of it."""
    return [x if isinstance(x, jax.Array) else jnp.asarray(x, jax.typeof(x).dtype) for x in operands]


LINEAR = ("joint", "tangent", "pull")


def held_of(march: March, kind: str, operands: Sequence, active: tuple) -> int:
    """How many operands come before the tangents or cotangents."""
    linear = {"joint": len(active), "tangent": len(active), "pull": len(march.values)}.get(kind, 0)
    return len(operands) - linear


def linear_of(march: March, kind: str, out: Sequence) -> int:
    """How many outputs, the last ones, are tangents or cotangents."""
    return {"joint": len(march.values), "tangent": len(out), "pull": len(out)}.get(kind, 0)


def place_axis(x: Array, axis: int | None, place: int, size: int) -> Array:
    """The axis moved to its place, or made there."""
    if axis is None:
        return jnp.broadcast_to(jnp.expand_dims(x, place), (*x.shape[:place], size, *x.shape[place:]))
    return jnp.moveaxis(x, axis, place)


def without(aval: Any, axes: Sequence) -> Any:
    """The shape of an operand inside the maps over some of its axes."""
    shape = list(aval.shape)
    for a in axes:
        if a is not None:
            del shape[a]
    return jax.core.ShapedArray(tuple(shape), aval.dtype)
