"""The critical step: from how many steps on a model is an ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Critical(NamedTuple):
    """`bracket` = (the most steps found invalid, the fewest found valid), None where there was none; `tried`: {steps: verdict}."""

    bracket: tuple[int | None, int | None]
    tried: dict[int, bool]


def critical_steps(verdict: Callable[[int], Any], *, fewest: int = 1, most: int = 512, ratio: float = 2.0) -> Critical:
    """Bracket the critical step: the number of steps from which on a model trained with them is an ODE.

    Steps double from `fewest` until verdict(steps), a bool or a `Swap`, is valid; then the bracket is bisected
    (geometrically) until its ends are within a factor `ratio`, or neighbours. The verdict is taken to hold beyond the first
    valid count; `tried` shows where it does not. verdict(steps) trains a model, or swaps the solver of one that is trained.
    An undecided `Swap` counts as not valid.
    """
    if not 1 <= fewest <= most or ratio < 1:
        raise ValueError(f"critical_steps: want 1 <= fewest <= most and ratio >= 1, got {fewest}, {most}, {ratio}")
    tried: dict[int, bool] = {}

    def valid(steps: int) -> bool:
        if steps not in tried:
            found = verdict(steps)
            tried[steps] = bool(np.all(getattr(found, "valid", found)))
        return tried[steps]

    bad, steps = None, fewest
    while not valid(steps):
        bad = steps
        if steps == most:
            return Critical((bad, None), tried)
        steps = min(2 * steps, most)
    good = steps
    while bad is not None and good > ratio * bad and good > bad + 1:
        middle = min(max(round((bad * good) ** 0.5), bad + 1), good - 1)
        bad, good = (bad, middle) if valid(middle) else (middle, good)
    return Critical((bad, good), tried)
