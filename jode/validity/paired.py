"""The mean change of paired numbers, with its confidence interval, and what an equivalence test makes of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

WITHIN, OUTSIDE, UNDECIDED, UNTESTED = "within", "outside", "undecided", "untested"


class Change(NamedTuple):
    """The mean of test - own over the examples, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g}" if self.low == self.high else f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def change(own: np.ndarray, test: np.ndarray, confidence: float) -> Change:
    """The mean change from own to test, one number per example each (or one number: then there is no interval).

    Two values, such as right and wrong, have the score interval of Tango (1998), which inverts McNemar's test; other numbers the
    paired t interval, mean ± t s / √n, s the standard deviation of the differences. A change that is not finite is infinite.
    """
    own, test = (np.asarray(x, np.float64) for x in (own, test))
    gaps = test - own
    if not np.all(np.isfinite(gaps)):
        return Change(math.inf, math.inf, math.inf)
    mean = float(np.mean(gaps))
    if own.ndim == 0:
        return Change(mean, mean, mean)
    values = two_values(own, test)
    if values is not None:
        low, high = values
        scale = (high - low) or 1.0
        worse, better = int(np.sum(gaps < 0)), int(np.sum(gaps > 0))
        ends = tango(better, worse, gaps.size, confidence)
        return Change(mean, *(scale * x for x in ends))
    half = _t(confidence, gaps.size - 1) * float(np.std(gaps, ddof=1)) / math.sqrt(gaps.size)
    return Change(mean, mean - half, mean + half)


def two_values(*arrays: np.ndarray) -> tuple[float, float] | None:
    """The two values of a metric that has no others; of one that has a single value, that one and zero."""
    values = np.unique(np.concatenate([np.ravel(x) for x in arrays]))
    if len(values) > 2:
        return None
    return (float(values[0]), float(values[1])) if len(values) == 2 else (min(0.0, float(values[0])), max(0.0, float(values[0])))


def tango(better: int, worse: int, n: int, confidence: float) -> tuple[float, float]:
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
    half = _t(confidence, x.size - 1) * float(np.std(x, ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.inf
    return float(np.mean(x)) - half, float(np.mean(x)) + half


def equivalence(low: float, high: float, tolerance: float) -> str:
    """Whether the whole interval lies within ± tolerance, or outside; if neither, the data do not decide."""
    if -tolerance <= low and high <= tolerance:
        return WITHIN
    return OUTSIDE if low > tolerance or high < -tolerance else UNDECIDED


def wanted(mean: float, low: float, high: float, tolerance: float, n: int) -> float:
    """How many examples would decide, if the mean stays: intervals shrink like 1/√n. Infinite where it lies on the tolerance."""
    if abs(mean) == tolerance:
        return math.inf
    if abs(mean) < tolerance:
        return n * max((high - mean) / (tolerance - mean), (mean - low) / (tolerance + mean)) ** 2
    return n * ((mean - low) / (mean - tolerance) if mean > 0 else (high - mean) / (-mean - tolerance)) ** 2


def worst(verdicts: list[str]) -> str:
    """The verdict on a model from those under each solver that counts: all must be within."""
    for verdict in (OUTSIDE, UNDECIDED, WITHIN):
        if verdict in verdicts:
            return verdict
    return UNTESTED


def _z(confidence: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + confidence) / 2))


def _t(confidence: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + confidence) / 2)) if degrees > 0 else math.inf
