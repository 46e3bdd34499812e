"""Higher derivatives: the tangent and the cotangent of a march are marches too.

With z = F(x), J its Jacobian, and H(z̄) = ∂/∂x (Jᵀ z̄), which is symmetric,

    (x, v) -> (F, J v)   pulls (a, b) back to   x̄ = Jᵀ a + H(b) v,  v̄ = Jᵀ b,
    (x, z̄) -> Jᵀ z̄       pulls w back to        x̄ = H(z̄) w,         z̄̄ = J w,

each pair one forward derivative of F and Jᵀ z̄ together (`March.back`). So the three forms of the first derivative give those of
every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp

from jode.native.forms import Batch, March, Promise, Rule, count, place_axis, replaced
from jode.tuning import SMALL


def tangent_march(march: March, rows: tuple | None, active: tuple) -> March:
    """(x, v) -> (F(x), J(x) v), v tangents of the `active` operands."""
    values = len(march.values)

    def run(rows: tuple | None, platform: str | None) -> Callable:
        def form(held: list, v: list) -> tuple[list, list]:
            out, dots = march.joint(platform, rows, active)(held, v)
            return [*out[:values], *dots], out[values:]

        return form

    def pull(rows: tuple | None, platform: str | None) -> Callable:
        def form(held: list, v: list, bars: list) -> list:
            a, b = bars[:values], bars[values:]
            back = lambda moved, b: march.back(platform, rows)(replaced(held, active, moved), b)[1]
            vbar, xbar = jax.jvp(back, ([held[i] for i in active], b), (v, a))
            return [*xbar, *(vbar[i] for i in active)]

        return form

    def by_row(held: list, v: list) -> tuple[list, list]:
        moved = {i for i, m in zip(active, v, strict=True) if m}
        held = [m or i in moved for i, m in enumerate(held)]
        return held, [held[i] for i in active]

    row = () if rows is None else rows[:1]
    shaped = lambda xs: [jax.ShapeDtypeStruct((*row, *x.shape), x.dtype) for x in xs]
    made = shaped(march.values * 2), shaped(march.rest)
    return _march(march, rows, (march.operands, len(active)), by_row, made, run, pull)


def cotangent_march(march: March, rows: tuple | None, active: tuple, held: int, bars: Sequence) -> March:
    """(x, z̄) -> Jᵀ z̄ of the `active` operands, with the shapes of `bars`. What was recorded is a cache: its derivatives are not
    asked for, the march is taken again.
    """

    def run(rows: tuple | None, platform: str | None) -> Callable:
        return lambda held, zbar: (march.pull(platform, rows, active)(held, zbar)[1], [])

    def anew(rows: tuple | None, platform: str | None) -> Callable:
        def form(held: list, zbar: list) -> tuple[list, list]:
            xbar = march.back(platform, rows)(held[: march.operands], zbar)[1]
            return [xbar[i] for i in active], []

        return form

    def pull(rows: tuple | None, platform: str | None) -> Callable:
        def form(held: list, zbar: list, w: list) -> list:
            back = lambda *moved: march.back(platform, rows)(replaced(held[: march.operands], active, moved), zbar)
            zdot, xbar = jax.jvp(back, [held[i] for i in active], w)[1]
            return [*xbar, *zdot]

        return form

    def by_row(held: list, zbar: list) -> tuple[list, list]:
        return [m or i in active or i >= march.operands for i, m in enumerate(held)], [True] * len(zbar)

    return _march(march, rows, (held, len(march.values)), by_row, (list(bars), []), run, pull, anew)


def _march(
    march: March, rows: tuple | None, sizes: tuple, by_row: Callable, made: tuple[Any, Any], run: Any, pull: Any, anew: Any = None
) -> March:
    """A march of the operands that a form of `march` for these rows holds and of the linear ones, as many as `sizes` says, which
    returns (values, rest) as `made` says.

    run, pull, anew: its forms, (rows, platform) -> function of (held, linear). by_row: which operands the form for a batch wants by
    row, given which are (flags for both).
    """
    n, (held, linear) = march.moving, sizes

    def form(of: Callable, batch: Batch | None, platform: str | None) -> Callable:
        """The form `of`, as a function of (moving, still, *cotangents)."""

        def single(moving: list, still: list, *bars: list) -> Any:
            return of(rows, platform)([*moving[:n], *still], moving[n:], *bars)

        if batch is None:
            return single
        are = (*batch.mapped[0][:n], *batch.mapped[1], *batch.mapped[0][n:])
        become = [*chain.from_iterable(by_row(list(are[:held]), list(are[held:])))]

        def batched(moving: list, still: list, *bars: list) -> Any:
            flat = [*moving[:n], *still, *moving[n:]]
            wanting = [i for i, (has, will) in enumerate(zip(are, become, strict=True)) if will > has]
            if rows is not None or any(flat[i].size > SMALL for i in wanting):
                axes = jax.tree.map(lambda m: 0 if m else None, batch.mapped)
                return jax.vmap(single, (*axes, *[0] * len(bars)))(moving, still, *bars), [True] * (held + linear)
            flat = replaced(flat, wanting, [place_axis(flat[i], None, 0, batch.size) for i in wanting])
            inner = batch.size, tuple(become[: march.operands])
            return of(inner, platform)(flat[:held], flat[held:], *bars), become

        if of is not pull:
            return lambda moving, still: batched(moving, still)[0]

        def summed(moving: list, still: list, bars: list) -> list:
            """Cotangents of what moves: of operands that all rows share the sums."""
            out, led = batched(moving, still, bars)
            led = [*led[:n], *led[held:]]
            return [jnp.sum(x, 0) if rowed > mapped else x for x, rowed, mapped in zip(out, led, batch.mapped[0], strict=True)]

        return summed

    rule = Rule(
        run=lambda batch, platform: form(run, batch, platform),
        record=lambda batch, platform, sized: lambda moving, still: (*form(run, batch, platform)(moving, still), ()),
        pull=lambda batch, platform: (
            lambda moving, still, values, rest, kept, bars: form(pull, batch, platform)(moving, still, bars)
        ),
        anew=anew and (lambda batch, platform: form(anew, batch, platform)),
    )
    promise = Promise(*made, march.effects, march.state, march.rows * count(rows))
    return March(rule, jax.tree.structure(([0] * (n + linear), [0] * (held - n))), n + linear, promise, march.settings)
