"""Methods whose inverse is exact, up to rounding: gradients without stored states lose nothing with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import Array

from jode.method.base import Method, Step
from jode.method.runge_kutta import RungeKutta
from jode.rows import Rows
from jode.tree import State, add, combine, increment, magnitude, nan_unless, where, widest, work_dtype, zeros_like
from jode.tuning import GROWTH, SEGMENTS
from jode.window import Window


@dataclass(frozen=True)
class Reversible(Method):
    """Any explicit Runge-Kutta method made exactly invertible, by a second copy z of the state.

    With Ψ the increment of `method` and λ = `coupling`,

        y1 = λ y + (1 - λ) z + Ψ_h(t, z),    z1 = z - Ψ_-h(t + h, y1),

    of the order of `method`, at twice its cost per step (McCallum & Foster 2024).

    The coupling trades accuracy against memory. Where solutions decay at a rate μ the gap y - z grows by about λ e^(h μ) per step,
    so y is right only for h μ < ln(1/λ): 0.69 for λ = 0.5, 0.1 for 0.9, 0.001 for 0.999. Beyond that y is wrong, whatever the
    order. The inverse divides by λ, so a rounding error grows by 1/λ per step backwards.

    By default (None) λ is 100^(-16/n) for at most n steps, between 0.5 (n ≤ 106, or unknown) and 0.985 (n ≥ 4,876). Then y errs,
    relative to its largest size, about as much as that of `method` as long as h μ < 0.6, and h μ n, the rates of decay over the
    whole time, sum to less than about 60; near those limits it errs more. `MemoryFree` keeps 16 states, whatever n, or one per
    305 steps (float32; 610 in float64) for n beyond 4,876; in float32 its gradients are good to 1e-5, or 1e-3 where solutions
    contract strongly. Give a smaller λ for coarse steps over a long time, a larger one to keep fewer states. `Adaptive` counts
    what a step adds to the gap as an error: its steps then stay small enough for any λ < 1.
    """

    method: RungeKutta
    coupling: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, RungeKutta):
            raise TypeError(f"Reversible: method must be a Runge-Kutta method such as jode.midpoint, got {self.method!r}")
        if not (self.coupling is None or 0 < self.coupling <= 1):
            raise ValueError(f"Reversible: coupling must lie in (0, 1], or be None, got {self.coupling}")
        m = self.method
        of_m = {"order": m.order, "embedded_order": m.embedded_order, "error": m.error, "dense": m.dense, "extra": m.extra}
        cost = {"evaluations": 2 * m.evaluations, "trials": 2 * m.evaluations + 1}
        self.__dict__.update(of_m, **cost, parts=2, growth=1 / self.weight, exact=True)

    def __repr__(self) -> str:
        return f"jode.Reversible({self.method!r}{'' if self.coupling is None else f', coupling={self.coupling}'})"

    def for_steps(self, most: int) -> Reversible:
        if self.coupling is not None:
            return self
        return replace(self, coupling=min(max(GROWTH ** (-SEGMENTS / most), 0.5), 0.985) if most else 0.5)

    @property
    def weight(self) -> float:
        """λ."""
        return 0.5 if self.coupling is None else self.coupling

    def start(self, y: State, slope: Callable[[], State]) -> State:
        return (*y, *y)

    def _partner(self, window: Window, z: State, near: State, sign: float) -> State:
        """z ± Ψ_-h(t + h, y1), the half of a step that its inverse undoes first."""
        back = window.ends_swapped()
        ks = self.method.slopes(back, near)
        return increment(z, back.h, tuple(sign * b for b in self.method.tableau.b), ks)

    def step(self, window: Window, s: State, slope: Any = ()) -> Step:
        y, z = _halves(s)
        ks = self.method.slopes(window, z)
        near = increment(_mix(self.weight, y, z), window.h, self.method.tableau.b, ks)
        return Step((*near, *self._partner(window, z, near, -1.0)), ks)

    def inverse(self, window: Window, s1: State) -> State:
        y1, z1 = _halves(s1)
        z = self._partner(window, z1, y1, 1.0)
        weights = tuple(-b / self.weight for b in self.method.tableau.b)
        return (*increment(_mix(1 / self.weight, y1, z), window.h, weights, self.method.slopes(window, z)), *z)

    def estimated(self, window: Window, s: State, step: Step) -> Step:
        known, upto = step.slopes, self.method.tableau.stages + 1
        return step._replace(slopes=self.method.slopes(window, _halves(s)[1], known, upto))

    def refined(self, window: Window, s: State, K: list[State]) -> list[State]:
        return self.method.refined(window, _halves(s)[1], K)

    def errors(self, h: Array, K: list[State], s: State, s1: State) -> list[State]:
        """The estimates of `method`, and to each what the step adds to the gap: y1 - z1 - λ (y - z), which falls with h."""
        new, old = (tuple((y - z).astype(work_dtype(y.dtype)) for y, z in zip(*_halves(x), strict=True)) for x in (s1, s))
        added = tuple(a - self.weight * b for a, b in zip(new, old, strict=True))
        return [add(e, added) for e in self.method.errors(h, K, s, s1)]

    def base(self, theta: Array, s: State) -> State:
        y, z = _halves(s)
        return tuple(x + (theta * (1 - self.weight)).astype(x.dtype) * (w - x) for x, w in zip(y, z, strict=True))


@dataclass(frozen=True)
class ReversibleHeun(Method):
    """y1 = y + h (f̂ + f̂1) / 2 with ŷ1 = 2 y - ŷ + h f̂ and f̂1 = F(t + h, ŷ1): order 2 at one evaluation per step.

    Its region of stability is a segment of the imaginary axis: for problems that hardly decay (Kidger, Foster, Li & Lyons 2021).
    Where solutions decay ŷ - y grows as fast, and under `Fixed` rows that it has taken over end with `Status.unstable`.
    """

    order = 2
    embedded_order = 1
    evaluations = trials = starts = 1
    parts = 3
    error = ((-0.5, 0.5),)

    def __repr__(self) -> str:
        return "jode.reversible_heun"

    def start(self, y: State, slope: Callable[[], State]) -> State:
        return (*y, *y, *slope())

    def step(self, window: Window, s: State, slope: Any = ()) -> Step:
        h, (y, shadow, k) = window.h, _thirds(s)
        shadow1 = increment(_mix(2.0, y, shadow), h, (1.0,), [k])
        k1 = window(1.0, shadow1)
        return Step((*increment(y, h, (0.5, 0.5), [k, k1]), *shadow1, *k1), [k, k1])

    def looked_at(self, window: Window, s: State, step: Step) -> Step:
        return _alternating(window, s, step)

    def inverse(self, window: Window, s1: State) -> State:
        h, (y1, shadow1, k1) = window.h, _thirds(s1)
        shadow = increment(_mix(2.0, y1, shadow1), -h, (1.0,), [k1])
        k = window(0.0, shadow)
        return (*increment(y1, -h, (0.5, 0.5), [k, k1]), *shadow, *k)


@dataclass(frozen=True)
class Leapfrog(Method):
    """The asynchronous leapfrog: u = F(t + h/2, z + h v / 2), v1 = 2 u - v, z1 = z + h u: order 2, one evaluation per step.

    v follows the slope of z, and starts there. Stable where the solution oscillates, not where it decays (Zhuang, Dvornek,
    Tatikonda & Duncan 2021, without damping): there v - f grows as fast, and under `Fixed` rows that it has taken over end with
    `Status.unstable`.
    """

    order = 2
    embedded_order = 1
    evaluations = trials = starts = 1
    parts = 2
    error = ((-0.5, 0.5),)

    def __repr__(self) -> str:
        return "jode.leapfrog"

    def start(self, y: State, slope: Callable[[], State]) -> State:
        return (*y, *slope())

    def step(self, window: Window, s: State, slope: Any = ()) -> Step:
        h, (z, v) = window.h, _halves(s)
        u = window(0.5, increment(z, h, (0.5,), [v]))
        v1 = _mix(2.0, u, v)
        return Step((*increment(z, h, (1.0,), [u]), *v1), [v, v1])

    def looked_at(self, window: Window, s: State, step: Step) -> Step:
        return _alternating(window, s, step)

    def inverse(self, window: Window, s1: State) -> State:
        return self.step(window.ends_swapped(), s1).state


@dataclass(frozen=True)
class Momentum(Method):
    """v1 = γ v + (1 - γ) F(t, x), x1 = x + h v1: a residual step with momentum, order 1, one evaluation per step.

    v starts at the slope, so the limit of many steps is the same ODE. The inverse divides by γ, so a rounding error grows by
    1/γ per step backwards (Sander, Ablin, Blondel & Peyré 2021). Where solutions decay within a time h γ / (1 - γ) x swings past
    its end, and under `Fixed` such a row ends with `Status.unstable`.
    """

    momentum: float = 0.9
    order = 1
    embedded_order = None
    evaluations = trials = starts = 1
    parts = 2
    error = ()

    def __post_init__(self) -> None:
        if not 0 < self.momentum < 1:
            raise ValueError(f"Momentum: momentum must lie in (0, 1), got {self.momentum}")
        self.__dict__.update(growth=1 / self.momentum)

    def __repr__(self) -> str:
        return f"jode.Momentum({self.momentum})"

    def start(self, y: State, slope: Callable[[], State]) -> State:
        return (*y, *slope())

    def step(self, window: Window, s: State, slope: Any = ()) -> Step:
        x, v = _halves(s)
        v1 = _mix(self.momentum, v, window(0.0, x))
        return Step((*increment(x, window.h, (1.0,), [v1]), *v1), [v, v1])

    def looked_at(self, window: Window, s: State, step: Step) -> Step:
        """Lost are rows that v carries against the slope, where the way that it is behind, h γ / (1 - γ) of their difference, is
        larger than x.
        """
        (v, v1), g = step.slopes, self.momentum
        slope = tuple(x.astype(a.dtype) for x, a in zip(_mix(1 / (1 - g), v1, v), v, strict=True))
        behind = combine(window.h, (g / (1 - g), -g / (1 - g)), [v1, slope])
        return _marked_lost(window.rows, s, step, v1, slope, behind, ((1.0, 0.0),))

    def inverse(self, window: Window, s1: State) -> State:
        x1, v1 = _halves(s1)
        x = increment(x1, -window.h, (1.0,), [v1])
        return (*x, *_mix(1 / self.momentum, v1, window(0.0, x)))


def _marked_lost(rows: Rows, s: State, step: Step, a: State, b: State, gap: State, bounds: Sequence[tuple[float, float]]) -> Step:
    """The step from s, with y NaN and the other copies finite in rows that are lost: where the slopes a and b of one state point
    against each other, and what the gap of the copies is worth in y, and how far y moved, are so many times larger than y at both
    ends of the step, by one of the pairs of bounds. A row that was lost stays so: its y is NaN and its last copy is not.
    """
    n, dtype = len(a), widest(*(x.dtype for x in a), default=jnp.float32)
    total = lambda xs: sum(rows.sum(x.astype(dtype)) for x in xs)
    size = lambda x: total(magnitude(z) ** 2 for z in x)
    y, y1 = s[:n], step.state[:n]
    opposed = total(jnp.real(jnp.conj(p) * q) for p, q in zip(a, b, strict=True)) < 0
    before, last = size(y), size(s[-n:])
    largest, apart, moved = jnp.maximum(before, size(y1)), size(gap), size(_difference(y1, y))
    beyond = reduce(jnp.logical_or, [(apart > g**2 * largest) & (moved > m**2 * largest) for g, m in bounds])
    lost = (opposed & beyond) | (jnp.isnan(before) & ~jnp.isnan(last))
    marked = tuple(jnp.where(lost, nan_unless(~lost, jnp.zeros_like(x)), x) for x in y1)
    return step._replace(state=(*marked, *where(lost, zeros_like(step.state[n:]), step.state[n:])))


def _alternating(window: Window, s: State, step: Step) -> Step:
    """Lost are rows whose slopes at the two ends of a step point against each other, and move y further than it is large; or by a
    fifth of that, where they differ by twenty times as much as y is.

    Of y' = λ y, λ < 0, the two copies have two modes. That of the solution keeps the sign of its slope in a step of any width. The
    other turns it over in every step, and grows as fast as solutions decay; slopes have it before y does, by a factor of 4 / (h λ).
    It moves y by twice its own size. A solution turns over too, where it has an extremum, but its slopes are small there: twice as
    different as y is large, or eight times where it touches zero.
    """
    a, b = step.slopes
    return _marked_lost(window.rows, s, step, a, b, combine(window.h, (-1.0, 1.0), [a, b]), ((20.0, 0.2), (0.0, 1.0)))


def _halves(s: State) -> tuple[State, State]:
    m = len(s) // 2
    return s[:m], s[m:]


def _thirds(s: State) -> tuple[State, State, State]:
    m = len(s) // 3
    return s[:m], s[m : 2 * m], s[2 * m :]


def _difference(a: State, b: State) -> State:
    return tuple(x.astype(work_dtype(x.dtype)) - z.astype(work_dtype(x.dtype)) for x, z in zip(a, b, strict=True))


def _mix(w: float, a: State, b: State) -> State:
    """w a + (1 - w) b."""
    dtypes = [work_dtype(x.dtype) for x in a]
    return tuple((w * x.astype(d) + (1 - w) * z.astype(d)).astype(x.dtype) for x, z, d in zip(a, b, dtypes, strict=True))


reversible_heun = ReversibleHeun()
leapfrog = Leapfrog()
