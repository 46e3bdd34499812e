"""The mean change of paired numbers, with its confidence interval, and what an equivalence test makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

WITHIN, OUTSIDE, BETTER, UNDECIDED, UNTESTED = "within", "outside", "better", "undecided", "untested"


class Change(NamedTuple):
    """The mean of test - own over the examples, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g}" if self.low == self.high else f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def change(own: np.ndarray, test: np.ndarray, confidence: float) -> Change:
    """The mean change from own to test, one number per example each (or one number: then there is no interval).

    Two values, such as right and wrong, have the score interval of Tango (1998), which inverts McNemar's test. Other numbers have
    the paired t interval, mean ± t s / √n, s the standard deviation of the differences, widened by r (1 - ((1 - c) / 2)^(1/n)), r
    the range of the metric under both solvers and c the confidence: n examples do not show what happens to fewer than some 3 in n,
    and no interval made of what they show knows of it. A change that is not finite is infinite.
    """
    gaps = np.asarray(test, np.float64) - np.asarray(own, np.float64)
    if not np.all(np.isfinite(gaps)):
        return Change(math.inf, math.inf, math.inf)
    return Change(float(np.mean(gaps)), *_ends(own, test, confidence)(max(1, gaps.size)))


def wanted(own: np.ndarray, test: np.ndarray, confidence: float, tolerance: float) -> float:
    """How many examples would decide, if the changes seen are typical: infinite where no 10⁹ do, or there is no interval."""
    if np.ndim(own) == 0 or not np.all(np.isfinite(np.subtract(test, own, dtype=np.float64))):
        return math.inf
    ends, n = _ends(own, test, confidence), np.size(own)
    decided = lambda m: equivalence(*ends(m), tolerance) != UNDECIDED
    low = high = n
    while not decided(high):
        low, high = high, 2 * high
        if high > 1e9:
            return math.inf
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return float(high)


def _ends(own: np.ndarray, test: np.ndarray, confidence: float) -> Callable[[int], tuple[float, float]]:
    """The ends of the interval, had the changes seen been those of m examples."""
    own, test = np.asarray(own, np.float64), np.asarray(test, np.float64)
    gaps, n = test - own, max(1, own.size)
    mean = float(np.mean(gaps))
    if own.ndim == 0:
        return lambda m: (mean, mean)
    values = two_values(own, test)
    if values is not None:
        scale, worse, better = values[1] - values[0] or 1.0, float(np.mean(gaps < 0)), float(np.mean(gaps > 0))

        def score(m: int) -> tuple[float, float]:
            low, high = tango(better * m, worse * m, m, confidence)
            return scale * low, scale * high

        return score
    size = float(np.std(gaps, ddof=1)) if n > 1 else 0.0
    reach = float(np.ptp(np.concatenate([own, test])))

    def t_interval(m: int) -> tuple[float, float]:
        unseen = 1 - ((1 - confidence) / 2) ** (1 / m)
        half = _half(size, m, confidence) + reach * unseen
        return mean - half, mean + half

    return t_interval


def two_values(*arrays: np.ndarray) -> tuple[float, float] | None:
    """The two values of a metric that has no others, such as right and wrong; None for other metrics.

    One of them is 0, or both occur under one solver, on ten examples or more: a few numbers, or two constants, are no such metric.
    """
    values = np.unique(np.concatenate([np.ravel(x) for x in arrays]))
    if len(values) > 2 or (len(values) == 2 and 0 not in values and all(len(np.unique(x)) < 2 or x.size < 10 for x in arrays)):
        return None
    if len(values) == 2:
        return float(values[0]), float(values[1])
    return min(0.0, float(values[0])), max(0.0, float(values[0]))


def tango(better: float, worse: float, n: int, confidence: float) -> tuple[float, float]:
    """The score interval of the difference p₁ - p₂ of paired proportions, from n pairs of which `better` rose and `worse` fell.

    It holds the δ for which |b - w - n δ| ≤ z √(n (2 q + δ (1 - δ))), where q maximises the likelihood of the proportion that fell
    given δ (Tango 1998, Statistics in Medicine 17). At δ = 0 that is McNemar's test. It keeps its confidence for few changes, too.
    """
    z = _z(confidence)

    def score(d: float) -> float:
        b = -better - worse + (2 * n - better + worse) * d
        q = (math.sqrt(max(b * b + 8 * n * worse * d * (1 - d), 0.0)) - b) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        gap = better - worse - n * d
        return 0.0 if gap == 0 else gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)

    def root(level: float) -> float:
        a, b = -1.0, 1.0  # the score falls as δ grows
        for _ in range(60):
            middle = (a + b) / 2
            a, b = (middle, b) if score(middle) > level else (a, middle)
        return (a + b) / 2

    return root(z), root(-z)


def wilson(count: int, n: int, confidence: float) -> tuple[float, float]:
    """The score interval of a proportion of which `count` of n were seen (Wilson 1927)."""
    z, p = _z(confidence), count / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def mean_interval(x: np.ndarray, confidence: float) -> tuple[float, float]:
    """The t interval of a mean."""
    half = _half(float(np.std(x, ddof=1)) if x.size > 1 else 0.0, x.size, confidence)
    return float(np.mean(x)) - half, float(np.mean(x)) + half


def equivalence(low: float, high: float, tolerance: float) -> str:
    """Whether the whole interval lies within ± tolerance, or outside; if neither, the data do not decide."""
    if -tolerance <= low and high <= tolerance:
        return WITHIN
    return OUTSIDE if low > tolerance or high < -tolerance else UNDECIDED


def worst(verdicts: list[str]) -> str:
    """The verdict on a model from those under each solver that counts: all must be within, and none for the worse outside."""
    for verdict in (OUTSIDE, BETTER, UNDECIDED, WITHIN):
        if verdict in verdicts:
            return verdict
    return UNTESTED


def _z(confidence: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + confidence) / 2))


def _half(deviation: float, n: int, confidence: float) -> float:
    """Half the t interval of the mean of n numbers with this standard deviation: t s / √n."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n) if n > 1 else math.inf
