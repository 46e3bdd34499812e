"""Butcher tableaus of explicit methods: one literal each, properties derived and checked.

A method of s stages is y1 = y0 + h Σ b_i k_i with k_i = f(t0 + c_i h, y0 + h Σ_j a_ij k_j). Only the stages that y1
needs are listed; the *end slope* f(t1, y1), which is the first stage of the next step, counts as stage s + 1 in `error`
and `dense`, so that under step control every method is "first same as last". Further stages that only the interpolant
needs are listed in `extra`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

from jode.tableau.conditions import Conditions, as_floats, as_order, claimed

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """The coefficients of one explicit Runge-Kutta method; everything else is derived from them.

    `error` holds weights of the error estimate h Σ e_i k_i over the s stages and the end slope: none (no step control),
    one, or two to be combined as Hairer's DOP853 does. `dense` holds, for every stage, the coefficients of θ, θ², … in
    b_i(θ), where y(t0 + θh) ≈ y0 + h Σ b_i(θ) k_i; when it is left out the cubic Hermite interpolant is used.

    Coefficients may be ints, fractions or NumPy's numbers; they are kept as floats. `order`, `embedded_order` (that of the error
    estimate: for two of orders p and q, combined, 2 p - q) and `dense_order` are checked by the order conditions of all rooted
    trees with up to ten vertices, to 1e-10; a method may claim less than it has. Conditions beyond order ten are not looked at.

    Raises `ValueError` when the rows do not fit together, the method is not consistent, or it has not the orders it claims.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    error: tuple[Row, ...] = ()
    embedded_order: int | None = None
    dense: tuple[Row, ...] = ()
    dense_order: int = 0
    extra: tuple[Row, ...] = ()
    extra_c: Row = ()

    def __post_init__(self) -> None:
        for what in ("c", "a", "b", "error", "dense", "extra", "extra_c"):
            object.__setattr__(self, what, as_floats(self.name, what, getattr(self, what)))
        for what, none in (("order", ()), ("embedded_order", (None,)), ("dense_order", (0,))):
            if getattr(self, what) not in none:
                object.__setattr__(self, what, as_order(self.name, what, getattr(self, what)))
        s = len(self.b)
        rows = [len(row) for row in self.a]
        if len(self.c) != s or rows != list(range(s)):
            raise ValueError(f"tableau {self.name}: {s} weights need {s} nodes and rows of 0 … {s - 1} entries, got {rows}")
        if any(len(e) != s + 1 for e in self.error):
            raise ValueError(f"tableau {self.name}: error weights cover the {s} stages and the end slope")
        if [len(row) for row in self.extra] != list(range(s + 1, s + 1 + len(self.extra))):
            raise ValueError(f"tableau {self.name}: an extra stage may use every stage before it, the end slope included")
        slack = max(abs(sum(row) - c) for row, c in zip((*self.a, *self.extra, self.b), (*self.c, *self.extra_c, 1.0), strict=True))
        if slack > 1e-13:
            raise ValueError(f"tableau {self.name}: rows must sum to their nodes and weights to one, off by {slack:.1e}")
        if not self.dense:
            object.__setattr__(self, "dense", hermite(self.b))
            object.__setattr__(self, "dense_order", min(self.order, 3))
        self._check_orders()

    def _check_orders(self) -> None:
        n = len(self.nodes)
        padded = lambda row: np.array((*row, *[0.0] * (n - len(row))))
        conditions = Conditions(np.array([padded(row) for row in self.rows]))
        claimed(self.name, "order", self.order, conditions.order(padded(self.b), self.order))
        if self.error and self.embedded_order is not None:
            found = [conditions.vanishes(padded(e), max(self.order, self.embedded_order)) for e in self.error]
            claimed(self.name, "embedded_order", self.embedded_order, 2 * found[0] - found[1] if len(found) == 2 else found[0])
        for theta in (0.3, 0.7):
            b = np.array(self.dense) @ theta ** np.arange(1, len(self.dense[0]) + 1)
            claimed(self.name, "dense_order", self.dense_order, conditions.order(padded(b), self.dense_order, theta))

    @property
    def stages(self) -> int:
        """Evaluations of the vector field that y1 needs."""
        return len(self.b)

    @property
    def nodes(self) -> Row:
        """The nodes of all slopes in order: stages, end slope, extra stages."""
        return (*self.c, 1.0, *self.extra_c)

    @property
    def rows(self) -> tuple[Row, ...]:
        """What each slope is evaluated at, as weights of those before it; the end slope's are b itself."""
        return (*self.a, self.b, *self.extra)

    @property
    def stability(self) -> float:
        """The method is stable for h λ in (-stability, 0): where its factor R(z) = 1 + z Σ b (zA)ⁿ 1 stays within 1, to 0.01."""
        s, x = self.stages, np.arange(1, 5000) / 100
        a = np.array([(*row, *[0.0] * (s - len(row))) for row in self.a])
        v, factor = np.ones(s), np.ones_like(x)
        for n in range(1, s + 1):
            factor, v = factor + (-x) ** n * (np.array(self.b) @ v), a @ v
        outside = np.abs(factor) > 1 + 1e-9
        return float(x[outside.argmax()]) if outside.any() else float(x[-1])

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its own error."""
        return bool(self.error)


def _poly(*coefficients: float) -> Polynomial:
    return Polynomial(np.array(coefficients))


def _rows(polynomials: list[Polynomial]) -> tuple[Row, ...]:
    """The coefficients of θ, θ², … (every b_i(0) is zero), padded to equal length."""
    degree = max(p.degree() for p in polynomials)
    return tuple(tuple(float(x) for x in np.pad(p.coef, (0, degree + 1 - len(p.coef)))[1:]) for p in polynomials)


def hermite(b: Row) -> tuple[Row, ...]:
    """b_i(θ) of the cubic through y0, y1 with slopes k_1 and the end slope; order 3."""
    rows = [b_i * _poly(0, 0, 3, -2) for b_i in (*b, 0.0)]
    rows[0] = rows[0] + _poly(0, 1, -2, 1)
    rows[-1] = rows[-1] + _poly(0, 0, -1, 1)
    return _rows(rows)


def nested(b: Row, *d: Row) -> tuple[Row, ...]:
    """b_i(θ) of Hairer's nested form: the cubic Hermite part plus θ²(1-θ)²(d0 + θ(d1 + (1-θ)(d2 + θ d3)))."""
    factor, tail = _poly(0, 0, 1, -2, 1), [_poly(0.0)] * len(d[0])
    for j, row in enumerate(d):
        tail = [p + w * factor for p, w in zip(tail, row, strict=True)]
        factor = factor * (_poly(0, 1) if j % 2 == 0 else _poly(1, -1))
    cubic = [Polynomial(np.array((0.0, *row))) for row in hermite(b)]
    cubic += [_poly(0.0)] * (len(tail) - len(cubic))
    return _rows([p + q for p, q in zip(cubic, tail, strict=True)])


# fmt: off
EULER = Tableau("euler", 1, c=(0.0,), a=((),), b=(1.0,))

MIDPOINT = Tableau(
    "midpoint", 2, c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0), error=((-1.0, 1.0, 0.0),), embedded_order=1
)

HEUN = Tableau("heun", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5), error=((-0.5, 0.5, 0.0),), embedded_order=1)

# Ralston 1962: the second-order method of least error bound.
RALSTON = Tableau(
    "ralston", 2, c=(0.0, 2 / 3), a=((), (2 / 3,)), b=(0.25, 0.75), error=((-0.75, 0.75, 0.0),), embedded_order=1
)

# Bogacki & Shampine 1989.
BOSH3 = Tableau(
    "bosh3",
    3,
    c=(0.0, 1 / 2, 3 / 4),
    a=((), (1 / 2,), (0.0, 3 / 4)),
    b=(2 / 9, 1 / 3, 4 / 9),
    error=((2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),),
    embedded_order=2,
)

# Kutta 1901.
RK4 = Tableau(
    "rk4",
    4,
    c=(0.0, 0.5, 0.5, 1.0),
    a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)

# Dormand & Prince 1980; fourth-order interpolant of Hairer, Norsett & Wanner I, section II.6.
_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
DOPRI5 = Tableau(
    "dopri5",
    5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    b=_DOPRI5_B,
    error=((71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),),
    embedded_order=4,
    dense=nested(
        _DOPRI5_B,
        (
            -12715105075 / 11282082432,
            0.0,
            87487479700 / 32700410799,
            -10690763975 / 1880347072,
            701980252875 / 199316789632,
            -1453857185 / 822651844,
            69997945 / 29380423,
        ),
    ),
    dense_order=4,
)

# Tsitouras 2011, with its interpolant.
TSIT5 = Tableau(
    "tsit5",
    5,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    ),
    b=(0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    error=(
        (
            0.0017800110522257773, 0.0008164344596567463, -0.007880878010261994, 0.1447110071732629,
            -0.5823571654525552, 0.45808210592918686, -0.015151515151515152,
        ),
    ),
    embedded_order=4,
    dense=_rows(
        [
            -1.0530884977290216 * _poly(0, 1) * _poly(-1.3299890189751412, 1) * _poly(0.7139816917074209, -1.4364028541716351, 1),
            0.1017 * _poly(0, 0, 1) * _poly(1.2949852507374631, -2.1966568338249754, 1),
            2.490627285651252793 * _poly(0, 0, 1) * _poly(1.57803468208092486, -2.38535645472061657, 1),
            -16.54810288924490272 * _poly(0, 0, 1) * _poly(-1.21712927295533244, 1) * _poly(-0.61620406037800089, 1),
            47.37952196281928122 * _poly(0, 0, 1) * _poly(-1.203071208372362603, 1) * _poly(-0.658047292653547382, 1),
            -34.87065786149660974 * _poly(0, 0, 1) * _poly(-1.2, 1) * _poly(-2 / 3, 1),
            2.5 * _poly(0, 0, 1) * _poly(-1, 1) * _poly(-0.6, 1),
        ]
    ),
    dense_order=4,
)

# DOP853: Dormand & Prince 1980, Hairer, Norsett & Wanner I, section II.10: error estimates of order 5 and 3 combined, and
# an interpolant of order 7 from three extra stages.
_DOPRI8_B = (
        0.054293734116568765, 0.0, 0.0, 0.0, 0.0, 4.450312892752409, 1.8915178993145003, -5.801203960010585,
        0.3111643669578199, -0.1521609496625161, 0.20136540080403034, 0.04471061572777259,
    )
DOPRI8 = Tableau(
    "dopri8",
    8,
    c=(
        0.0, 0.05260015195876773, 0.0789002279381516, 0.1183503419072274, 0.2816496580927726,
        0.3333333333333333, 0.25, 0.3076923076923077, 0.6512820512820513, 0.6, 0.8571428571428571, 1.0,
    ),
    a=(
        (),
        (0.05260015195876773,),
        (0.0197250569845379, 0.0591751709536137),
        (0.02958758547680685, 0.0, 0.08876275643042054),
        (0.2413651341592667, 0.0, -0.8845494793282861, 0.924834003261792),
        (0.037037037037037035, 0.0, 0.0, 0.17082860872947386, 0.12546768756682242),
        (0.037109375, 0.0, 0.0, 0.17025221101954405, 0.06021653898045596, -0.017578125),
        (
            0.03709200011850479, 0.0, 0.0, 0.17038392571223998, 0.10726203044637328, -0.015319437748624402,
            0.008273789163814023,
        ),
        (
            0.6241109587160757, 0.0, 0.0, -3.3608926294469414, -0.868219346841726, 27.59209969944671,
            20.154067550477894, -43.48988418106996,
        ),
        (
            0.47766253643826434, 0.0, 0.0, -2.4881146199716677, -0.590290826836843, 21.230051448181193,
            15.279233632882423, -33.28821096898486, -0.020331201708508627,
        ),
        (
            -0.9371424300859873, 0.0, 0.0, 5.186372428844064, 1.0914373489967295, -8.149787010746927,
            -18.52006565999696, 22.739487099350505, 2.4936055526796523, -3.0467644718982196,
        ),
        (
            2.273310147516538, 0.0, 0.0, -10.53449546673725, -2.0008720582248625, -17.9589318631188,
            27.94888452941996, -2.8589982771350235, -8.87285693353063, 12.360567175794303, 0.6433927460157636,
        ),
    ),
    b=_DOPRI8_B,
    error=(
        (
            0.01312004499419488, 0.0, 0.0, 0.0, 0.0, -1.2251564463762044, -0.4957589496572502,
            1.6643771824549864, -0.35032884874997366, 0.3341791187130175, 0.08192320648511571,
            -0.022355307863886294, 0.0,
        ),
        (
            -0.18980075407240762, 0.0, 0.0, 0.0, 0.0, 4.450312892752409, 1.8915178993145003, -5.801203960010585,
            -0.4226823213237919, -0.1521609496625161, 0.20136540080403034, 0.02265179219836082, 0.0,
        ),
    ),
    embedded_order=7,
    dense=nested(
        _DOPRI8_B,
        (
            -8.428938276109013, 0.0, 0.0, 0.0, 0.0, 0.5667149535193777, -3.0689499459498917, 2.38466765651207,
            2.117034582445028, -0.871391583777973, 2.2404374302607883, 0.6315787787694688, -0.08899033645133331,
            18.148505520854727, -9.194632392478356, -4.436036387594894,
        ),
        (
            10.427508642579134, 0.0, 0.0, 0.0, 0.0, 242.28349177525817, 165.20045171727028, -374.5467547226902,
            -22.113666853125306, 7.733432668472264, -30.674084731089398, -9.332130526430229, 15.697238121770845,
            -31.139403219565178, -9.35292435884448, 35.81684148639408,
        ),
        (
            19.985053242002433, 0.0, 0.0, 0.0, 0.0, -387.0373087493518, -189.17813819516758, 527.8081592054236,
            -11.57390253995963, 6.8812326946963, -1.0006050966910838, 0.7777137798053443, -2.778205752353508,
            -60.19669523126412, 84.32040550667716, 11.99229113618279,
        ),
        (
            -25.69393346270375, 0.0, 0.0, 0.0, 0.0, -154.18974869023643, -231.5293791760455, 357.6391179106141,
            93.40532418362432, -37.45832313645163, 104.0996495089623, 29.8402934266605, -43.53345659001114,
            96.32455395918828, -39.17726167561544, -149.72683625798564,
        ),
    ),
    dense_order=7,
    extra=(
        (
            0.056167502283047954, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25350021021662483, -0.2462390374708025,
            -0.12419142326381637, 0.15329179827876568, 0.00820105229563469, 0.007567897660545699, -0.008298,
        ),
        (
            0.03183464816350214, 0.0, 0.0, 0.0, 0.0, 0.028300909672366776, 0.053541988307438566,
            -0.05492374857139099, 0.0, 0.0, -0.00010834732869724932, 0.0003825710908356584,
            -0.00034046500868740456, 0.1413124436746325,
        ),
        (
            -0.42889630158379194, 0.0, 0.0, 0.0, 0.0, -4.697621415361164, 7.683421196062599, 4.06898981839711,
            0.3567271874552811, 0.0, 0.0, 0.0, -0.0013990241651590145, 2.9475147891527724, -9.15095847217987,
        ),
    ),
    extra_c=(0.1, 0.2, 0.7777777777777778),
)
# fmt: on
