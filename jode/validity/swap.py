"""The test: evaluate a trained model under other solvers than it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jode.grid import Adaptive, Fixed


def error_scale(solver: Fixed | Adaptive) -> float:
    """The nominal error of a solver: h^p for `steps` = 1/h steps of order p, or the tolerance (the larger of rtol and atol)."""
    if isinstance(solver, Fixed):
        return float(solver.steps) ** -solver.method.order
    if isinstance(solver, Adaptive):
        return max(float(solver.rtol), float(solver.atol))
    raise TypeError(f"solver must be jode.Fixed or jode.Adaptive, got {solver!r}")


def at_least_as_fine(test: Fixed | Adaptive, train: Fixed | Adaptive) -> bool:
    """Whether a test solver's failure counts against the model: its nominal error is no larger than the training solver's."""
    return error_scale(test) <= error_scale(train) * (1 + 1e-6)


@dataclass(frozen=True)
class Swap:
    """The cross table: `table[i, j]` is the metric of the model trained with `train[i]` under `test[j]`.

    `counts[i, j]` says whether that test solver counts against the model, `own[i]` is the metric under the training solver.
    """

    train: tuple
    test: tuple
    table: np.ndarray
    counts: np.ndarray
    own: np.ndarray
    threshold: float

    @property
    def drops(self) -> np.ndarray:
        """The largest |change| of the metric under another solver that counts, one a model: infinite where the metric is not
        finite, NaN where no other solver counts.
        """
        change = np.abs(self.table - self.own[:, None])
        worst = np.where(self.counts, np.where(np.isfinite(change), change, np.inf), 0.0).max(axis=1, initial=0.0)
        others = np.array(
            [
                [c and name(t) != name(s) for t, c in zip(self.test, row, strict=True)]
                for s, row in zip(self.train, self.counts, strict=True)
            ]
        )
        return np.where(others.any(axis=1), worst, np.nan)

    @property
    def verdicts(self) -> list[str]:
        """Of each model: `an ODE`, `not an ODE`, or `untested` where no other solver was fine enough to count."""
        return ["untested" if np.isnan(d) else "an ODE" if d <= self.threshold else "not an ODE" for d in self.drops]

    @property
    def valid(self) -> bool | np.ndarray:
        """Whether the model is an ODE as far as these solvers can tell: tested, and no change beyond the threshold; an array
        for several models.
        """
        valid = self.drops <= self.threshold
        return bool(valid[0]) if len(valid) == 1 else valid

    def __str__(self) -> str:
        head = ["trained with", *map(name, self.test), "verdict"]
        lines = [head, ["---"] + ["---:"] * len(self.test) + ["---"]]
        for i, solver in enumerate(self.train):
            cells = [f"{v:.3f}" if c else f"({v:.3f})" for v, c in zip(self.table[i], self.counts[i], strict=True)]
            lines.append([name(solver), *cells, self.verdicts[i]])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\nIn brackets: coarser than in training, not counted. A change beyond {self.threshold:g} counts."

    def plot(self, ax: Any = None) -> Any:
        """A heat map on matplotlib axes, which are returned; solvers that do not count are hatched."""
        import matplotlib.pyplot as plt
        from matplotlib.patches import Rectangle

        ax = ax if ax is not None else plt.figure(layout="constrained").add_subplot()
        image = ax.imshow(self.table, cmap="viridis", vmin=np.nanmin(self.table), vmax=np.nanmax(self.table), aspect="auto")
        middle = (np.nanmin(self.table) + np.nanmax(self.table)) / 2
        for (i, j), v in np.ndenumerate(self.table):
            ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color="white" if v < middle else "#22303c")
            if not self.counts[i, j]:
                patch = Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor="white", lw=0, alpha=0.35)
                ax.add_patch(patch)
        ax.set_xticks(range(len(self.test)), [name(s) for s in self.test], rotation=60, ha="right")
        marks = [{"an ODE": "✓", "not an ODE": "✗", "untested": "?"}[v] for v in self.verdicts]
        ax.set_yticks(range(len(self.train)), [f"{name(s)} {v}" for s, v in zip(self.train, marks, strict=True)])
        ax.set(xlabel="tested with (hatched: coarser, not counted)", ylabel="trained with")
        ax.figure.colorbar(image, ax=ax)
        return ax


def swap(
    metric: Callable | Mapping[Any, Callable],
    solvers: Sequence[Any],
    *,
    threshold: float = 0.1,
    counts: Callable[[Any, Any], bool] = at_least_as_fine,
) -> Swap:
    """Evaluate a model, or several, under other solvers than it was trained with, and say whether it is an ODE.

    Args:
        metric: metric(solver) -> a real number, where larger or smaller is of no matter: accuracy, loss. Or a mapping from
            training solvers to the metrics of the models trained with them, for a table with several rows.
        solvers: what to test with. The first is the one the model was trained with, unless metric is a mapping.
        threshold: a change of the metric that still is none; 0.1 of accuracy in Ott et al.
        counts: counts(test, train) -> whether a test solver counts against a model trained with `train`.

    A jitted metric is compiled once a method: the step counts and tolerances of solvers are data.
    """
    solvers = [_plain(s) for s in solvers]
    rows = {_plain(s): m for s, m in metric.items()} if isinstance(metric, Mapping) else dict.fromkeys(solvers[:1], metric)
    if not solvers or not rows:
        raise ValueError("swap: there must be at least one model and one solver")
    table = np.array([[float(m(s)) for s in solvers] for m in rows.values()])
    own = np.array([table[i, solvers.index(s)] if s in solvers else float(m(s)) for i, (s, m) in enumerate(rows.items())])
    mask = np.array([[bool(counts(test, train)) for test in solvers] for train in rows])
    return Swap(tuple(rows), tuple(solvers), table, mask, own, threshold)


def _plain(solver: Any) -> Any:
    """The solver with Python's numbers for arrays, as a step that adapts has them."""
    if isinstance(solver, Fixed):
        return replace(solver, steps=int(solver.steps))
    if isinstance(solver, Adaptive):
        return replace(solver, rtol=float(solver.rtol), atol=float(solver.atol))
    return solver


def name(solver: Any) -> str:
    """A short name, such as `euler 8` or `dopri5 0.001`."""
    method = repr(solver.method).removeprefix("jode.")
    if isinstance(solver, Fixed):
        return f"{method} {solver.steps}"
    return f"{method} {error_scale(solver):.3g}" if isinstance(solver, Adaptive) else repr(solver)


class Critical(NamedTuple):
    """`bracket` = (the most steps found invalid, the fewest found valid), None where there was none; `tried`: {steps: verdict}."""

    bracket: tuple[int | None, int | None]
    tried: dict[int, bool]


def critical_steps(verdict: Callable[[int], Any], *, fewest: int = 1, most: int = 512, ratio: float = 2.0) -> Critical:
    """Bracket the critical step: the number of steps from which on a model trained with them is an ODE.

    Steps double from `fewest` until verdict(steps), a bool or a `Swap`, is valid; then the bracket is bisected
    (geometrically) until its ends are within a factor `ratio`, or neighbours. The verdict is taken to hold beyond the first
    valid count; `tried` shows where it does not. verdict(steps) trains a model, or swaps the solver of one that is trained.
    """
    if not 1 <= fewest <= most or ratio < 1:
        raise ValueError(f"critical_steps: want 1 <= fewest <= most and ratio >= 1, got {fewest}, {most}, {ratio}")
    tried: dict[int, bool] = {}

    def valid(steps: int) -> bool:
        if steps not in tried:
            found = verdict(steps)
            tried[steps] = bool(np.all(found.valid if isinstance(found, Swap) else found))
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
