"""Errors of solvers: nominal ones, by which they are compared, and measured ones of a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jode.control import Adaptive, Fixed
from jode.method import dopri8

REFERENCE = Adaptive(dopri8, 1e-6, 1e-6, max_steps=65_536)


def error_scale(solver: Fixed | Adaptive) -> float:
    """The nominal error of a solver: h^p for steps of order p, `steps` = 1/h or `width` = h, or the tolerance (the largest of rtol
    and atol).
    """
    if isinstance(solver, Fixed):
        h = 1 / float(solver.steps or 1) if solver.width is None else float(solver.width)
        return h**solver.method.order
    if isinstance(solver, Adaptive):
        return max(float(np.max(x)) for x in jax.tree.leaves((solver.rtol, solver.atol)))
    raise TypeError(f"solver must be jode.Fixed or jode.Adaptive, got {solver!r}: give `outputs`, and its error is measured")


def at_least_as_fine(test: Fixed | Adaptive, train: Fixed | Adaptive) -> bool:
    """Whether a test solver's failure counts against the model: its nominal error is no larger than the training solver's."""
    return error_scale(test) <= error_scale(train) * (1 + 1e-6)


def measured_errors(outputs: Callable[[Any], Any], solvers: Sequence[Any], reference: Any = REFERENCE) -> np.ndarray:
    """The error of each solver: the root mean square over examples of ‖o - o*‖, relative to the spread of o* over examples.

    Args:
        outputs: outputs(solver) -> a pytree whose arrays lead with the examples: end states, or scores.
        solvers: the solvers to measure.
        reference: the solver whose outputs o* are taken for exact, by default dopri8 at 1e-6: errors below some 1e-5 are all alike.
    """
    return relative_errors([table(outputs(s)) for s in solvers], outputs, reference)


def relative_errors(tables: list[np.ndarray], outputs: Callable[[Any], Any], reference: Any) -> np.ndarray:
    """The errors of outputs that are known already."""
    exact = table(outputs(reference))
    if not np.isfinite(exact).all():
        raise ValueError(f"the reference solver {name(reference)} failed on some examples: give another reference")
    scale = spread_of(exact)
    return np.array([np.sqrt(np.mean(distances(t, exact) ** 2)) / scale for t in tables])


def finer(errors: Any, own: float, reference: Any) -> list[bool]:
    """Which measured errors are no larger than the training solver's; those that the reference cannot tell apart are equal."""
    return [bool(e <= max(own * (1 + 1e-6), 10 * error_scale(reference))) for e in errors]


def table(outputs: Any) -> np.ndarray:
    """Outputs as one row of real numbers per example."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(outputs)]
    if not leaves or any(x.ndim == 0 or len(x) != len(leaves[0]) for x in leaves):
        raise ValueError(f"outputs must lead with the examples, got shapes {[x.shape for x in leaves]}")
    rows = [x.reshape(len(x), -1) for x in leaves]
    parts = [part for x in rows for part in ((np.real(x), np.imag(x)) if np.iscomplexobj(x) else (x,))]
    return np.concatenate([np.asarray(x, np.float64) for x in parts], axis=1)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=1)


def spread_of(rows: np.ndarray) -> float:
    """√(mean ‖o - ō‖²) over examples; the size of the outputs where all are alike."""
    spread = np.sqrt(np.mean(distances(rows, rows.mean(axis=0)) ** 2))
    return float(spread or np.sqrt(np.mean(np.sum(rows**2, axis=1))) or 1.0)


def plain(solver: Any) -> Any:
    """The solver with Python's numbers for arrays, as a step that adapts has them."""
    if isinstance(solver, Fixed):
        return (
            replace(solver, width=float(solver.width))
            if solver.width is not None
            else replace(solver, steps=int(solver.steps or 1))
        )
    if isinstance(solver, Adaptive):
        if len(jax.tree.leaves(solver.atol)) != 1 or np.ndim(solver.atol):
            raise ValueError("solvers are compared by value here: give Adaptive one number for atol")
        return replace(solver, rtol=float(solver.rtol), atol=float(solver.atol))
    return solver


def name(solver: Any) -> str:
    """A short name, such as `euler 8` or `dopri5 0.001`."""
    method = repr(solver.method).removeprefix("jode.")
    if isinstance(solver, Fixed):
        return f"{method} {solver.steps or 1}" if solver.width is None else f"{method} width {float(solver.width):.3g}"
    return f"{method} {error_scale(solver):.3g}" if isinstance(solver, Adaptive) else repr(solver)
