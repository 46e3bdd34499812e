"""Stiff problems whose solutions are known to many digits: the Test Set for IVP Solvers (Mazzia & Magherini 2008), and a partial
differential equation by lines.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jode
from tests.problems import DIGITS


class Stiff(NamedTuple):
    """dy/dt = f(t, y, args) from y0 at 0 to t1; atol over rtol, as the test set scales it, or None where it is 1.7e-24."""

    f: Callable
    y0: tuple
    t1: float
    args: Any
    atol: float | None


def robertson(t, y, k):
    """Three species, rate constants (0.04, 3e7, 1e4): Robertson 1966."""
    slow, fast, back = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
    return jnp.stack([back - slow, slow - back - fast, fast])


def hires(t, y, args):
    """Eight species, high irradiance response of a plant: Schäfer 1975."""
    a, b = 280.0 * y[5] * y[7], 1.81 * y[6]
    return jnp.stack(
        [
            -1.71 * y[0] + 0.43 * y[1] + 8.32 * y[2] + 0.0007,
            1.71 * y[0] - 8.75 * y[1],
            -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
            8.32 * y[1] + 1.71 * y[2] - 1.12 * y[3],
            -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
            -a + 0.69 * y[3] + 1.71 * y[4] - 0.43 * y[5] + 0.69 * y[6],
            a - b,
            b - a,
        ]
    )


def oregonator(t, y, args):
    """Three species that oscillate: Field & Noyes 1974."""
    return jnp.stack(
        [
            77.27 * (y[1] + y[0] * (1 - 8.375e-6 * y[0] - y[1])),
            (y[2] - (1 + y[0]) * y[1]) / 77.27,
            0.161 * (y[0] - y[2]),
        ]
    )


def van_der_pol(t, y, eps):
    return jnp.stack([y[1], ((1 - y[0] ** 2) * y[1] - y[0]) / eps])


def e5(t, y, args):
    """Four species over sixteen orders of magnitude: Enright, Hull & Lindberg 1975."""
    a, b, c, m = 7.89e-10, 1.1e7, 1.13e3, 1e6
    p, q, r, s = a * y[0], b * y[0] * y[2], m * c * y[1] * y[2], c * y[3]
    second, fourth = p - r, q - s
    return jnp.stack([-p - q, second, second - fourth, fourth])


# POLLU, air pollution by 20 species: Verwer 1994. Rate constants of its 25 reactions, which species each takes (one or two), and of
# each species the reactions that consume and that produce it.
POLLU_RATES = (
    *(0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9.0e3, 0.022, 1.2e4, 1.88, 1.63e4, 4.8e6),
    *(3.5e-4, 0.0175, 1.0e8, 4.44e11, 1240.0, 2.1, 5.78, 0.0474, 1780.0, 3.12),
)
POLLU_TAKES = (
    *((1,), (2, 4), (5, 2), (7,), (7,), (7, 6), (9,), (9, 6), (11, 2), (11, 1), (13,), (10, 2), (14,), (1, 6), (3,)),
    *((4,), (4,), (16,), (16,), (17, 6), (19,), (19,), (1, 4), (19, 1), (20,)),
)
POLLU_CHANGES = (
    ((1, 10, 14, 23, 24), (2, 3, 9, 11, 12, 22, 25)),
    ((2, 3, 9, 12), (1, 21)),
    ((15,), (1, 17, 19, 22)),
    ((2, 16, 17, 23), (15,)),
    ((3,), (4, 4, 6, 7, 13, 20)),
    ((6, 8, 14, 20), (3, 18, 18)),
    ((4, 5, 6), (13,)),
    ((), (4, 5, 6, 7)),
    ((7, 8), ()),
    ((12,), (7, 9)),
    ((9, 10), (8, 11)),
    ((), (9,)),
    ((11,), (10,)),
    ((13,), (12,)),
    ((), (14,)),
    ((18, 19), (16,)),
    ((20,), ()),
    ((), (20,)),
    ((21, 22, 24), (23, 25)),
    ((25,), (24,)),
)
_STOICHIOMETRY = np.array([[given.count(r) - taken.count(r) for r in range(1, 26)] for taken, given in POLLU_CHANGES], float)
_FIRST, _SECOND = (np.array([(*x, 0)[i] - 1 for x in POLLU_TAKES]) for i in (0, 1))  # -1: no second one


def pollu(t, y, k):
    """dy/dt = S r, with r the rates of the reactions by the law of mass action."""
    one = jnp.concatenate([y, jnp.ones(1, y.dtype)])
    return jnp.asarray(_STOICHIOMETRY, y.dtype) @ (k * y[_FIRST] * one[_SECOND])


def brusselator(t, y, alpha):
    """u' = 1 + u² v - 4 u + α n² Δu, v' = 3 u - u² v + α n² Δv on (0, 1), u and v interleaved: Hairer & Wanner II, section IV.10."""
    u, v = y.reshape(-1, 2).T
    rate = u * u * v
    return jnp.stack([1 + rate - 4 * u + _diffusion(u, alpha, 1.0), 3 * u - rate + _diffusion(v, alpha, 3.0)], 1).reshape(-1)


def _diffusion(x, alpha, end):
    wide = jnp.pad(x, 1, constant_values=end)
    return alpha * (x.shape[0] + 1) ** 2 * (wide[2:] - 2 * x + wide[:-2])


def brusselator_start(n):
    x = np.arange(1, n + 1) / (n + 1)
    return np.stack([1 + np.sin(2 * np.pi * x), np.full(n, 3.0)], 1).reshape(-1)


_POLLU_START = np.zeros(20)
_POLLU_START[[1, 3, 6, 7, 8, 16]] = 0.2, 0.04, 0.1, 0.3, 0.01, 0.007
_RATES = (0.04, 3e7, 1e4)

STIFF = {
    "robertson 40": Stiff(robertson, (1.0, 0.0, 0.0), 40.0, _RATES, 1e-6),
    "robertson 1e11": Stiff(robertson, (1.0, 0.0, 0.0), 1e11, _RATES, 1e-6),
    "hires": Stiff(hires, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057), 321.8122, None, 1e-4),
    "oregonator 30": Stiff(oregonator, (1.0, 2.0, 3.0), 30.0, None, 1e-6),
    "oregonator 360": Stiff(oregonator, (1.0, 2.0, 3.0), 360.0, None, 1e-6),
    "van der pol": Stiff(van_der_pol, (2.0, 0.0), 2.0, 1e-6, 1.0),
    "pollu": Stiff(pollu, tuple(_POLLU_START), 60.0, np.array(POLLU_RATES), 1e-4),
    "e5": Stiff(e5, (1.76e-3, 0.0, 0.0, 0.0), 1e13, None, None),
}


def solved(name, solver_of, tol, **options):
    """The solution of a problem, and its error at the end in units of its tolerance; solver_of(rtol, atol) is the solver."""
    p = STIFF[name]
    atol = 1.7e-24 if p.atol is None else p.atol * tol
    y0, args = jnp.array(p.y0), None if p.args is None else jnp.asarray(p.args)
    sol = jode.solve(p.f, y0, (0.0, p.t1), args, solver=solver_of(tol, atol), **options)
    true = DIGITS[name]
    return sol, float(np.max(np.abs(np.asarray(sol.ys[-1]) - true) / (atol + tol * np.abs(true))))
