"""The test: evaluate a trained model under other solvers than it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jode.validity import paired
from jode.validity.errors import (
    REFERENCE,
    at_least_as_fine,
    distances,
    finer,
    measured_errors,
    name,
    plain,
    relative_errors,
    spread_of,
    table,
)
from jode.validity.paired import BETTER, OUTSIDE, UNDECIDED, UNTESTED, WITHIN, Change

_ODE = {WITHIN: "an ODE", OUTSIDE: "not an ODE", BETTER: "better under finer solvers", UNDECIDED: UNDECIDED, UNTESTED: UNTESTED}
_AGREES = {WITHIN: "agrees", OUTSIDE: "differs", UNDECIDED: UNDECIDED, UNTESTED: UNTESTED}
_BETTER = {"higher": 1, "lower": -1, None: 0}


@dataclass(frozen=True)
class Swap:
    """Does the mean metric stay as it is under finer solvers?

    The cross table: `table[i, j]` is the mean metric of the model trained with `train[i]` under `test[j]`.

    `own[i]` is that under the training solver; `low` and `high` are the ends of the confidence interval of the change from it.
    The intervals of one model hold together with probability `confidence`. `counts[i, j]` says whether that test solver counts
    against the model, and `errors[i, j]` is its measured error (NaN where it was not). `tolerance[i]` is the change that is none,
    in units of the metric, `examples[i]` how many there were, 0 for a metric of one number, which has no interval, and
    `enough[i, j]` how many would decide about that pair. `better` and `of` are as they were given to `swap`.
    """

    train: tuple
    test: tuple
    table: np.ndarray
    own: np.ndarray
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray
    errors: np.ndarray
    tolerance: np.ndarray
    examples: np.ndarray
    enough: np.ndarray
    confidence: float
    better: str | None = None
    of: Any = "the model"

    @property
    def changes(self) -> np.ndarray:
        """The change of the mean metric, infinite where it is not finite."""
        change = self.table - self.own[:, None]
        return np.where(np.isfinite(change), change, np.inf)

    @property
    def drops(self) -> np.ndarray:
        """The largest |change| under another solver that counts, one per model; NaN where none counts."""
        worst = np.where(self.counts, np.abs(self.changes), 0.0).max(axis=1, initial=0.0)
        return np.where(self.counts.any(axis=1), worst, np.nan)

    def verdict(self, i: int, j: int) -> str:
        """What the interval of model i under solver j says."""
        return _ODE[self._within(i, j)]

    def _within(self, i: int, j: int) -> str:
        low, high = self.low[i, j], self.high[i, j]
        says = paired.equivalence(low, high, self.tolerance[i])
        return BETTER if says == OUTSIDE and np.isfinite(high) and _BETTER[self.better] * low > 0 else says

    @property
    def verdicts(self) -> list[str]:
        """Of each model. `an ODE`: under every solver that counts the whole interval of the change is within the tolerance.
        `not an ODE`: under one of them it is outside. `better under finer solvers`: it is outside, and everywhere for the better,
        where `better` says which way that is; the model's answers still depend on the solver. Otherwise `undecided`, or `untested`
        where no other solver counts.
        """
        return [_ODE[paired.worst([self._within(i, int(j)) for j in np.flatnonzero(row)])] for i, row in enumerate(self.counts)]

    @property
    def wanted(self) -> np.ndarray:
        """How many examples would decide about each model, if the changes seen are typical; 0 where it is decided."""
        undecided = np.array([v == UNDECIDED for v in self.verdicts])
        return np.where(undecided, np.where(self.counts, self.enough, 0).max(axis=1, initial=0), 0)

    @property
    def valid(self) -> bool | np.ndarray:
        """Whether the verdict is `an ODE`; an array for several models."""
        valid = np.array([v == _ODE[WITHIN] for v in self.verdicts])
        return bool(valid[0]) if len(valid) == 1 else valid

    def __str__(self) -> str:
        blocks = []
        for i, solver in enumerate(self.train):
            asks = f"Does the mean metric of {self.of} stay as it is under finer solvers?"
            lines = [f"{asks} Trained with {name(solver)}: metric {self.own[i]:.4g}", ""]
            lines += ["| under | error | metric | change | |", "|---|---:|---:|---:|---|"]
            for j, test in enumerate(self.test):
                if name(test) == name(solver):
                    continue
                error = "–" if np.isnan(self.errors[i, j]) else f"{self.errors[i, j]:.1e}"
                change = Change(self.changes[i, j], self.low[i, j], self.high[i, j])
                says = self.verdict(i, j) if self.counts[i, j] else "coarser, not counted"
                lines.append(f"| {name(test)} | {error} | {self.table[i, j]:.4g} | {change} | {says} |")
            blocks.append("\n".join([*lines, "", self._conclusion(i)]))
        return "\n\n".join(blocks)

    def _conclusion(self, i: int) -> str:
        n, verdict = int(self.examples[i]), self.verdicts[i]
        basis = f"{n:,} examples, {self.confidence:.0%} intervals" if n else "one number, so no interval"
        more = f"; about {_shown(self.wanted[i])} examples would decide" if verdict == UNDECIDED else ""
        says = f"Verdict: {verdict} ({basis}, a change of up to {self.tolerance[i]:.3g} is none{more})."
        return says + self._direction(i)

    def _direction(self, i: int) -> str:
        """What a change that is one says beside its verdict."""
        outside = [j for j in np.flatnonzero(self.counts[i]) if self._within(i, int(j)) in (OUTSIDE, BETTER)]
        if self.verdicts[i] == _ODE[BETTER]:
            return (
                " No finer solver harms it, but its answers depend on the solver: it is not the ODE that its training solver saw."
            )
        if self.better or not outside or not np.isfinite(self.high[i, outside]).all():
            return ""
        ways = {"rises" if self.low[i, j] > 0 else "falls" for j in outside}
        way = " or ".join(sorted(ways, reverse=True))
        return f" The metric {way} under finer solvers; whether that is for the better, `swap(better=...)` wants to know."

    def plot(self, ax: Any = None) -> Any:
        """A heat map of the mean metric on matplotlib axes, which are returned; solvers that do not count are hatched."""
        import matplotlib.pyplot as plt
        from matplotlib.patches import Rectangle

        ax = ax if ax is not None else plt.figure(layout="constrained").add_subplot()
        low, high = np.nanmin(self.table), np.nanmax(self.table)
        image = ax.imshow(self.table, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        for (i, j), v in np.ndenumerate(self.table):
            ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color="white" if v < (low + high) / 2 else "#22303c")
            if not self.counts[i, j]:
                patch = Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor="white", lw=0, alpha=0.35)
                ax.add_patch(patch)
        ax.set_xticks(range(len(self.test)), [name(s) for s in self.test], rotation=60, ha="right")
        ax.set_yticks(range(len(self.train)), [f"{name(s)}: {v}" for s, v in zip(self.train, self.verdicts, strict=True)])
        ax.set(xlabel="tested with (hatched: coarser, not counted)", ylabel="trained with")
        ax.figure.colorbar(image, ax=ax)
        return ax


def swap(
    metric: Callable | Mapping[Any, Callable],
    solvers: Sequence[Any],
    *,
    tolerance: float = 0.02,
    spread: float | None = None,
    confidence: float = 0.95,
    outputs: Callable | Mapping[Any, Callable] | None = None,
    reference: Any = REFERENCE,
    counts: Callable[[Any, Any], bool] | None = None,
    better: str | None = None,
    of: Any = "the model",
) -> Swap:
    """Evaluate a model, or several, under other solvers than it was trained with, and say whether it is an ODE.

    The question is whether the mean *metric* stays as it is under finer solvers; `agreement` asks whether the *outputs* do.
    Neither answer follows from the other: outputs that move by 1 % of their spread may change a small loss by much, and an
    accuracy may stay while all outputs move.

    The verdict is an equivalence test of the change of the mean metric, which has three outcomes: see `Swap.verdicts`. Wrong
    ones have a probability of at most 1 - confidence per model. Multiplying the metric by a constant changes no verdict.

    Args:
        metric: metric(solver) -> one number per example (right or wrong, a loss, a log-likelihood), or one number for all, which
            has no interval. Or a mapping from training solvers to the metrics of the models trained with them, for several models.
        solvers: what to test with. The first is the one the model was trained with, unless metric is a mapping.
        tolerance: the change of the mean that is none, as a fraction of the spread of the metric: 0.02 is two points of accuracy.
            Ott et al. allow 0.1.
        spread: what the metric ranges over: 1 for an accuracy given as one number. By default, under the training solver, the
            distance of the two values of a metric that has two; the standard deviation over the examples of one that has more; the
            size of a single number.
        confidence: that of all intervals of one model together (Bonferroni).
        outputs: outputs(solver) -> the model's outputs, see `measured_errors`, or a mapping like metric. With it the errors of
            the solvers are measured, and a solver counts if its error is no larger than that of the training solver. Without it
            nominal errors decide: see `error_scale`.
        reference: the solver taken for exact when errors are measured.
        counts: counts(test, train) -> whether a test solver counts against a model trained with `train`, instead of the above.
        better: "higher" or "lower", where one of them is the better metric. A model that finer solvers only make better is then
            named so: it is no ODE of its training steps, but nothing speaks against finer ones. By default nothing is known of it.
        of: what is tested, for the printed question, such as `jode.depth.field(f, degree=0)`: the ODE of a residual network is one
            for each way to read its weights between layers.

    Raises:
        ValueError: for a `better` that is none of these, for a metric that is neither one number nor a vector, and where the
            reference fails.

    A jitted metric is compiled once for each method: step counts and tolerances of solvers are data.
    """
    if better not in _BETTER:
        raise ValueError(f'swap: better must be "higher", "lower" or None, got {better!r}')
    solvers = [plain(s) for s in solvers]
    rows = {plain(s): m for s, m in metric.items()} if isinstance(metric, Mapping) else dict.fromkeys(solvers[:1], metric)
    if not solvers or not rows:
        raise ValueError("swap: there must be at least one model and one solver")
    given = {plain(s): o for s, o in outputs.items()} if isinstance(outputs, Mapping) else dict.fromkeys(rows, outputs)
    results = [_against(s, m, given[s], solvers, tolerance, spread, confidence, reference, counts) for s, m in rows.items()]
    own, table, low, high, mask, errors, bounds, examples, enough = (np.array(column) for column in zip(*results, strict=True))
    return Swap(tuple(rows), tuple(solvers), table, own, low, high, mask, errors, bounds, examples, enough, confidence, better, of)


def _against(train: Any, metric: Callable, outputs: Any, solvers: list, *options: Any) -> tuple:
    """One row of the table: own mean, means, ends of intervals, what counts, errors, tolerance, number of examples."""
    tolerance, spread, confidence, reference, counts = options
    own = _numbers(metric(train))
    if not np.isfinite(own).all():
        raise ValueError(
            f"swap: the metric under the training solver {name(train)} is not finite on {np.sum(~np.isfinite(own))} examples"
        )
    values = [own if s == train else _numbers(metric(s)) for s in solvers]
    if any(v.shape != own.shape for v in values):
        raise ValueError(f"swap: the metric must return as many numbers under each solver, got {sorted({v.shape for v in values})}")
    errors = np.full(len(solvers), np.nan)
    mine = np.nan
    if outputs is not None:
        others = [s for s in solvers if s != train]
        mine, *measured = measured_errors(outputs, [train, *others], reference)
        errors = [mine if s == train else measured[others.index(s)] for s in solvers]
    if counts is not None:
        mask = [bool(counts(s, train)) for s in solvers]
    elif outputs is not None:
        mask = finer(errors, mine, reference)
    else:
        mask = [at_least_as_fine(s, train) for s in solvers]
    mask = [m and name(s) != name(train) for m, s in zip(mask, solvers, strict=True)]
    level = 1 - (1 - confidence) / max(1, sum(mask))
    changes = [paired.change(own, v, level) for v in values]
    bound = tolerance * (_metric_spread(own, values) if spread is None else spread)
    return (
        np.mean(own),
        [np.mean(v) for v in values],
        [c.low for c in changes],
        [c.high for c in changes],
        mask,
        errors,
        bound,
        own.size if own.ndim else 0,
        [paired.wanted(own, v, level, bound) for v in values],
    )


def _metric_spread(own: np.ndarray, values: list[np.ndarray]) -> float:
    """The scale of a metric that nobody gave."""
    if own.ndim == 0:
        return abs(float(own))
    two = paired.two_values(own, *(v for v in values if np.isfinite(v).all()))
    return (two[1] - two[0]) if two else float(np.std(own)) or abs(float(np.mean(own)))


def _numbers(value: Any) -> np.ndarray:
    value = np.asarray(value, np.float64)
    if value.ndim > 1 or value.size == 0:
        raise ValueError(f"metric must return one number, or a vector of one per example; got shape {value.shape}")
    return value


# By how much do the outputs move?


@dataclass(frozen=True)
class Agreement:
    """Do a model's outputs stay where they are under finer solvers? How far they move under each, relative to their spread over
    examples.

    `moved` (solvers, examples) are the movements ‖o - o_train‖ / spread; `flips` the fractions of examples whose label changes
    (NaN without labels). `ends` and `flip_ends` (solvers, 2) are confidence intervals of the mean movement and of the flips,
    `errors` the measured errors of the solvers, the training solver's first, and `counts` says which solvers count.
    """

    train: Any
    test: tuple
    moved: np.ndarray
    ends: np.ndarray
    flips: np.ndarray
    flip_ends: np.ndarray
    errors: np.ndarray
    counts: np.ndarray
    tolerance: float
    confidence: float
    of: Any = "the model"

    def verdict(self, j: int) -> str:
        """`agrees` if mean movement and flips under solver j are within the tolerance, `differs` if one is outside."""
        return _AGREES[self._within(j)]

    def _within(self, j: int) -> str:
        says = [paired.equivalence(self.ends[j, 0], self.ends[j, 1], self.tolerance)]
        if np.isfinite(self.flips[j]):
            says.append(paired.equivalence(self.flip_ends[j, 0], self.flip_ends[j, 1], self.tolerance))
        return paired.worst(says)

    @property
    def verdicts(self) -> list[str]:
        """Under each solver; `untested` for one that does not count."""
        return [self.verdict(j) if c else UNTESTED for j, c in enumerate(self.counts)]

    @property
    def overall(self) -> str:
        """`agrees` if the outputs do under every solver that counts, `differs` if they do not under one of them."""
        return _AGREES[paired.worst([self._within(int(j)) for j in np.flatnonzero(self.counts)])]

    @property
    def valid(self) -> bool:
        """Whether the outputs agree under every solver that counts, and there is one."""
        return self.overall == _AGREES[WITHIN]

    def __str__(self) -> str:
        own = (
            f"Do the outputs of {self.of} stay where they are under finer solvers? Trained with {name(self.train)}, error "
            f"{self.errors[0]:.1e}. Movements are relative to the spread over examples; what they do to a metric, `swap` tells."
        )
        lines = [
            own,
            "",
            "| under | error | mean movement | 95 % below | largest | labels flipped | |",
            "|---|" + "---:|" * 5 + "---|",
        ]
        for j, test in enumerate(self.test):
            moved = Change(float(np.mean(self.moved[j])), self.ends[j, 0], self.ends[j, 1])
            flips = "–" if np.isnan(self.flips[j]) else str(Change(self.flips[j], self.flip_ends[j, 0], self.flip_ends[j, 1]))
            tail = f"{np.quantile(self.moved[j], 0.95):.2g} | {np.max(self.moved[j]):.2g}"
            says = self.verdicts[j] if self.counts[j] else "coarser, not counted"
            lines.append(f"| {name(test)} | {self.errors[j + 1]:.1e} | {moved} | {tail} | {flips} | {says} |")
        basis = f"{self.moved.shape[1]:,} examples, {self.confidence:.0%} intervals, up to {self.tolerance:g} is none"
        return "\n".join([*lines, "", f"Verdict: {self.overall} ({basis})."])


def agreement(
    outputs: Callable[[Any], Any],
    solvers: Sequence[Any],
    *,
    labels: Callable[[Any], Any] | None = None,
    tolerance: float = 0.02,
    confidence: float = 0.95,
    reference: Any = REFERENCE,
    of: Any = "the model",
) -> Agreement:
    """How far a model's outputs move under finer solvers: no metric is needed, and none can hide it.

    The question is about the *outputs*, at the scale of their spread. A metric that is small beside that, such as the loss of a
    regression that fits well, may change where they agree: `swap` asks about it.

    A metric may stay while every output moves: an accuracy where errors move points along the decision boundary, or as many to
    the right side as to the wrong one. Movements are ‖o_i - o_i,train‖ / √(mean ‖o_i - ō‖²), one per example.

    Args:
        outputs: outputs(solver) -> a pytree whose arrays lead with the examples: end states, scores, densities.
        solvers: the training solver, then those to test with. One counts if its measured error is no larger.
        labels: labels(outputs) -> the class of each example, such as `lambda scores: jnp.argmax(scores, -1)`.
        tolerance: the mean movement, and the fraction of labels that flip, that are none.
        confidence: that of all intervals together (Bonferroni): t intervals of movements, Wilson's of flips.
        reference: the solver taken for exact when errors are measured.
        of: what is tested, for the printed question, as in `swap`.
    """
    train, *tests = [plain(s) for s in solvers]
    mine, *others = (outputs(s) for s in (train, *tests))
    own, *tables = (table(o) for o in (mine, *others))
    spread = spread_of(own)
    moved = np.array([distances(t, own) / spread for t in tables]).reshape(len(tests), len(own))
    moved = np.where(np.isfinite(moved), moved, np.inf)
    errors = relative_errors([own, *tables], outputs, reference)
    counts = np.array(finer(errors[1:], errors[0], reference), bool)
    counts &= np.array([name(s) != name(train) for s in tests], bool)
    level = 1 - (1 - confidence) / max(1, (1 if labels is None else 2) * int(counts.sum()))
    ends = np.array([paired.mean_interval(m, level) if np.isfinite(m).all() else (np.inf, np.inf) for m in moved])
    flips, flip_ends = np.full(len(tests), np.nan), np.full((len(tests), 2), np.nan)
    if labels is not None:
        before = np.asarray(labels(mine))
        for j, o in enumerate(others):
            n = int(np.sum(np.asarray(labels(o)) != before))
            flips[j], flip_ends[j] = n / before.size, paired.wilson(n, before.size, level)
    return Agreement(train, tuple(tests), moved, ends.reshape(-1, 2), flips, flip_ends, errors, counts, tolerance, confidence, of)


def _shown(n: float) -> str:
    return f"{int(float(f'{n:.2g}')):,}" if np.isfinite(n) else "infinitely many"
