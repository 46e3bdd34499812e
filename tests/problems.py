"""Initial value problems whose solutions are known to many digits; `users_jit`, for tests of bits.

DETEST: Hull, Enright, Fellen & Sedgwick 1972, t in [0, 20]. The digits in reference_digits.json were computed in quadruple
precision for the float64-rounded constants.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DIGITS = {k: np.array(v) for k, v in json.loads((Path(__file__).parent / "reference_digits.json").read_text()).items()}


def users_jit(f: Callable) -> Callable:
    """`jax.jit` with the code for fused loops that users get, which tests/conftest.py switches off: they add in another order."""
    return jax.jit(f, compiler_options={"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else None)


class IVP(NamedTuple):
    f: Callable
    y0: list
    t1: float
    y1: np.ndarray


def _tridiagonal(n, lower, diagonal, upper):
    A = np.diag(np.broadcast_to(diagonal, n).astype(float))
    A += np.diag(np.broadcast_to(lower, n - 1).astype(float), -1)
    return A + np.diag(np.broadcast_to(upper, n - 1).astype(float), 1)


def _linear(A):
    return lambda t, y, args: jnp.asarray(A, y.dtype) @ y


def _planets(t, y, args):
    """Five outer planets around the sun: positions x(5), y(5), z(5), then velocities."""
    k2, m0 = 2.95912208286, 1.00000597682
    m = jnp.array([0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778], y.dtype)
    q, v = y.reshape(2, 3, 5)
    sun = q / jnp.sum(q * q, axis=0, keepdims=True) ** 1.5
    gap = q[:, None, :] - q[:, :, None]
    squared = jnp.sum(gap * gap, axis=0) + jnp.eye(5, dtype=y.dtype)
    pull = jnp.where(jnp.eye(5, dtype=bool)[None], 0, gap / squared[None] ** 1.5 - sun[:, None, :])
    a = k2 * (-(m0 + m)[None] * sun + jnp.sum(m[None, None] * pull, axis=-1))
    return jnp.concatenate([v.reshape(-1), a.reshape(-1)])


_PLANETS = [
    3.42947415189,
    6.64145542550,
    11.2630437207,
    -30.1552268759,
    -21.1238353380,
    3.35386959711,
    5.97156957878,
    14.6952576794,
    1.65699966404,
    28.4465098142,
    1.35494901715,
    2.18231499728,
    6.27960525067,
    1.43785752721,
    15.3882659679,
    -0.557160570446,
    -0.415570776342,
    -0.325325669158,
    -0.024047625417,
    -0.176860753121,
    0.505696783289,
    0.365682722812,
    0.189706021964,
    -0.287659532608,
    -0.216393453025,
    0.230578543901,
    0.169143213293,
    0.087726532278,
    -0.117219543175,
    -0.014864789309,
]


def _kepler(t, y, args):
    r3 = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return jnp.stack([y[2], y[3], -y[0] / r3, -y[1] / r3])


def _ellipse(e):
    return [1 - e, 0.0, 0.0, np.sqrt((1 + e) / (1 - e))]


def _b4(t, y, args):
    r = jnp.sqrt(y[0] ** 2 + y[1] ** 2)
    return jnp.stack([-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r])


def _e1(t, y, args):
    return jnp.stack([y[1], -(y[1] / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y[0])])


def van_der_pol(mu):
    return lambda t, y, args: jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


_e = [1.0] + [0.0] * 50
_FIELDS = {
    "A1": (lambda t, y, args: -y, [1.0]),
    "A2": (lambda t, y, args: -(y**3) / 2, [1.0]),
    "A3": (lambda t, y, args: y * jnp.cos(t), [1.0]),
    "A4": (lambda t, y, args: y / 4 * (1 - y / 20), [1.0]),
    "A5": (lambda t, y, args: (y - t) / (y + t), [4.0]),
    "B1": (lambda t, y, args: jnp.stack([2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])]), [1.0, 3.0]),
    "B2": (_linear([[-1, 1, 0], [1, -2, 1], [0, 1, -1]]), [2.0, 0.0, 1.0]),
    "B3": (lambda t, y, args: jnp.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2]), [1.0, 0.0, 0.0]),
    "B4": (_b4, [3.0, 0.0, 0.0]),
    "B5": (lambda t, y, args: jnp.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]]), [0.0, 1.0, 1.0]),
    "C1": (_linear(_tridiagonal(10, 1, [-1] * 9 + [0], 0)), _e[:10]),
    "C2": (_linear(_tridiagonal(10, np.arange(1, 10), [*-np.arange(1, 10), 0], 0)), _e[:10]),
    "C3": (_linear(_tridiagonal(10, 1, -2, 1)), _e[:10]),
    "C4": (_linear(_tridiagonal(51, 1, -2, 1)), _e),
    "C5": (_planets, _PLANETS),
    **{f"D{i}": (_kepler, _ellipse(e)) for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), 1)},
    "E1": (_e1, [0.671396707141803, 0.09540051444747446]),
    "E2": (van_der_pol(1.0), [2.0, 0.0]),
    "E3": (lambda t, y, args: jnp.stack([y[1], y[0] ** 3 / 6 - y[0] + 2 * jnp.sin(2.78535 * t)]), [0.0, 0.0]),
    "E4": (lambda t, y, args: jnp.stack([y[1], 0.032 - 0.4 * y[1] ** 2]), [30.0, 0.0]),
    "E5": (lambda t, y, args: jnp.stack([y[1], jnp.sqrt(1 + y[1] ** 2) / (25 - t)]), [0.0, 0.0]),
}
DETEST = {name: IVP(f, y0, 20.0, DIGITS[name]) for name, (f, y0) in _FIELDS.items()}


def pleiades(t, y, args):
    """Seven bodies of masses 1 … 7 in the plane: x(7), y(7), x'(7), y'(7)."""
    m = jnp.arange(1.0, 8.0, dtype=y.dtype)
    q, v = y.reshape(2, 2, 7)
    gap = q[:, None, :] - q[:, :, None]
    squared = jnp.sum(gap * gap, axis=0) + jnp.eye(7, dtype=y.dtype)
    return jnp.concatenate([v.reshape(-1), jnp.sum(m[None, None] * gap / squared[None] ** 1.5, axis=-1).reshape(-1)])


PLEIADES = [3, 3, -1, -3, 2, -2, 2, 3, -3, 2, 0, 0, -4, 4, 0, 0, 0, 0, 0, 1.75, -1.5, 0, 0, 0, -1.25, 1, 0, 0]


def lotka_volterra(t, y, args):
    return jnp.stack([1.5 * y[0] - y[0] * y[1], -3 * y[1] + y[0] * y[1]])


def lorenz(t, y, args):
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def rigid_body(t, y, args):
    return jnp.stack([-2 * y[1] * y[2], 1.25 * y[0] * y[2], -0.5 * y[0] * y[1]])


def brusselator(t, y, args):
    return jnp.stack([1 + y[0] ** 2 * y[1] - 4 * y[0], 3 * y[0] - y[0] ** 2 * y[1]])


def fitzhugh_nagumo(t, y, args):
    v, w = y
    return jnp.stack([v - v**3 / 3 - w + 0.5, 0.08 * (v + 0.7 - 0.8 * w)])


def arenstorf(t, y, args):
    """A satellite between earth and moon (Hairer, Norsett & Wanner I, section II.0): period 17.0652165601579625."""
    mu = 0.012277471
    nu = 1 - mu
    a = ((y[0] + mu) ** 2 + y[1] ** 2) ** 1.5
    b = ((y[0] - nu) ** 2 + y[1] ** 2) ** 1.5
    return jnp.stack(
        [
            y[2],
            y[3],
            y[0] + 2 * y[3] - nu * (y[0] + mu) / a - mu * (y[0] - nu) / b,
            y[1] - 2 * y[2] - nu * y[1] / a - mu * y[1] / b,
        ]
    )


CLASSICS = {
    "pleiades": IVP(pleiades, [float(x) for x in PLEIADES], 3.0, DIGITS["pleiades"]),
    "rigid_body": IVP(rigid_body, [1.0, 0.0, 0.9], 20.0, DIGITS["rigid_body_t20"]),
    "lotka_volterra": IVP(lotka_volterra, [1.0, 1.0], 10.0, DIGITS["lotka_volterra_t10"]),
    "lorenz": IVP(lorenz, [1.0, 1.0, 1.0], 10.0, DIGITS["lorenz_t10"]),
    "brusselator": IVP(brusselator, [1.5, 3.0], 20.0, DIGITS["brusselator_t20"]),
    "van_der_pol": IVP(van_der_pol(1.0), [2.0, 0.0], 20.0, DIGITS["vdp_mu1_t20"]),
    "fitzhugh_nagumo": IVP(fitzhugh_nagumo, [1.0, 1.0], 20.0, DIGITS["fitzhugh_nagumo_t20"]),
    "planets": DETEST["C5"],
}
