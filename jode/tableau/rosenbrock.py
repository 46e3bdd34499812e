"""Tableaus of Rosenbrock methods: one literal each, properties derived and checked.

With J = ∂f/∂y and T = ∂f/∂t at (t, y), a step of width h solves for its slopes k_1 … k_s, one after another,

    (I - h γ J) k_i = γ (f(t + c_i h, y + h Σ_j a_ij k_j) + Σ_j C_ij k_j + d_i h T),    j < i,

and y1 = y + h Σ b_i k_i. In the form of Hairer & Wanner II, section IV.7, u_i = h k_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jode.tableau.conditions import Conditions, as_floats, as_order, claimed
from jode.tableau.runge_kutta import Row


@dataclass(frozen=True)
class RosenbrockTableau:
    """The coefficients of one Rosenbrock method.

    `error` holds weights of the error estimate h Σ e_i k_i, and `embedded_order` the order of the solution that it compares with.
    `dense` holds, for every stage, the coefficients of θ, θ², … in b_i(θ), where y(t + θh) ≈ y + h Σ b_i(θ) k_i.

    Coefficients may be ints, fractions or NumPy's numbers; they are kept as floats. `order`, `embedded_order` and `dense_order` are
    checked by the order conditions up to order ten, to 1e-10; a method may claim less than it has.

    Raises `ValueError` when the rows do not fit together, the method is not consistent, or it has not the orders it claims.
    """

    name: str
    order: int
    gamma: float
    c: Row
    d: Row
    a: tuple[Row, ...]
    C: tuple[Row, ...]
    b: Row
    error: Row
    embedded_order: int
    dense: tuple[Row, ...]
    dense_order: int

    def __post_init__(self) -> None:
        for what in ("gamma", "c", "d", "a", "C", "b", "error", "dense"):
            object.__setattr__(self, what, as_floats(self.name, what, getattr(self, what)))
        for what in ("order", "embedded_order", "dense_order"):
            object.__setattr__(self, what, as_order(self.name, what, getattr(self, what)))
        s = len(self.b)
        rows = [*map(len, self.a), *map(len, self.C)]
        if rows != [*range(s), *range(s)] or any(len(x) != s for x in (self.c, self.d, self.error, self.dense)):
            raise ValueError(f"tableau {self.name}: {s} weights need {s} of c, d, error and dense, and rows a and C of 0 … {s - 1}")
        alpha, gamma, b = self.classical
        slack = max(np.abs(alpha.sum(1) - self.c).max(), np.abs(gamma.sum(1) - self.d).max(), abs(b.sum() - 1))
        if slack > 1e-11:
            raise ValueError(f"tableau {self.name}: rows must sum to c and d and weights to one, off by {slack:.1e}")
        conditions = Conditions(alpha, alpha + gamma)
        claimed(self.name, "order", self.order, conditions.order(b, self.order))
        found = conditions.vanishes(np.array(self.error) @ gamma, self.embedded_order)
        claimed(self.name, "embedded_order", self.embedded_order, found)
        for theta in (0.3, 0.7):
            b = np.array(self.dense) @ theta ** np.arange(1, len(self.dense[0]) + 1) @ gamma
            claimed(self.name, "dense_order", self.dense_order, conditions.order(b, self.dense_order, theta))

    @property
    def stages(self) -> int:
        """Stages, and so evaluations of f, those of the error estimate too."""
        return len(self.b)

    @property
    def classical(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(α, Γ, b) of the form k_i = f(y + h Σ α_ij k_j) + h J Σ γ_ij k_j, in which order conditions are stated."""
        n = self.stages
        a, C = np.zeros((n, n)), np.zeros((n, n))
        for i in range(n):
            a[i, :i], C[i, :i] = self.a[i], self.C[i]
        gamma = np.linalg.inv(np.eye(n) / self.gamma - C)
        return a @ gamma, gamma, np.array(self.b) @ gamma


def bridge(b: Row, *H: Row) -> tuple[Row, ...]:
    """b_i(θ) of y(t + θh) = (1 - θ) y + θ (y1 + (1 - θ) (κ_1 + θ κ_2 + θ² κ_3 …)) with κ_m = h Σ_i H_mi k_i."""
    rows = np.zeros((len(b), len(H) + 1))
    rows[:, 0] = b
    for m, row in enumerate(H):
        rows[:, m : m + 2] += np.outer(row, (1, -1))
    return tuple(tuple(map(float, row)) for row in rows)


# fmt: off
# Steinebach 2023: order 5, L-stable and stiffly accurate, with an interpolant of order 4.
_A = (-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946)
RODAS5P = RosenbrockTableau(
    "rodas5p",
    5,
    0.21193756319429014,
    c=(0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0),
    d=(0.21193756319429014, -0.42387512638858027, -0.3384627126235924, 1.8046452872882734, 2.325825639765069, 0.0, 0.0, 0.0),
    a=(
        (),
        (3.0,),
        (2.849394379747939, 0.45842242204463923),
        (-6.954028509809101, 2.489845061869568, -10.358996098473584),
        (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
        _A,
        (*_A, 1.0),
        (*_A, 1.0, 1.0),
    ),
    C=(
        (),
        (-14.155112264123755,),
        (-17.97296035885952, -2.859693295451294),
        (147.12150275711716, -1.41221402718213, 71.68940251302358),
        (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
        (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471),
        (
            30.91273214028599, -3.1208243349937974, 77.79954646070892, 34.28646028294783, -19.097331116725623,
            -28.087943162872662,
        ),
        (
            37.80277123390563, -3.2571969029072276, 112.26918849496327, 66.9347231244047, -40.06618937091002,
            -54.66780262877968, -9.48861652309627,
        ),
    ),
    b=(*_A, 1.0, 1.0, 1.0),
    error=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    embedded_order=4,
    dense=bridge(
        (*_A, 1.0, 1.0, 1.0),
        (
            25.948786856663858, -2.5579724845846235, 10.433815404888879, -2.3679251022685204, 0.524948541321073,
            1.1241088310450404, 0.4272876194431874, -0.17202221070155493,
        ),
        (
            -9.91568850695171, -0.9689944594115154, 3.0438037242978453, -24.495224566215796, 20.176138334709044,
            15.98066361424651, -6.789040303419874, -6.710236069923372,
        ),
        (
            11.419903575922262, 2.8879645146136994, 72.92137995996029, 80.12511834622643, -52.072871366152654,
            -59.78993625266729, -0.15582684282751913, 4.883087185713722,
        ),
    ),
    dense_order=4,
)

# Shampine & Reichelt 1997, ode23s: order 2, L-stable; its error is that of a third stage of order 3.
_G = 1 / (2 + 2**0.5)
_E = 6 + 2**0.5
ROSENBROCK23 = RosenbrockTableau(
    "rosenbrock23",
    2,
    _G,
    c=(0.0, 0.5, 1.0),
    d=(_G, 0.0, -_G),
    a=((), (0.5 / _G,), (1 / _G, 1 / _G)),
    C=((), (-1 / _G,), (-2 / _G, -_E / _G)),
    b=(1 / _G, 1 / _G, 0.0),
    error=(1 / (6 * _G), (_E - 2) / (6 * _G), 1 / (6 * _G)),
    embedded_order=2,
    dense=((1 / _G, 0.0), (-2 / (1 - 2 * _G), 1 / (_G * (1 - 2 * _G))), (0.0, 0.0)),
    dense_order=2,
)
# fmt: on
