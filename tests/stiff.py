"""Stiff problems whose solutions are known to many digits: the Test Set for IVP Solvers (Mazzia & Magherini 2008), and a partial
differential equation by lines.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jode
from jode.models.kinetics import POLLU_RATES, POLLU_START, ROBERTSON_RATES, pollu, robertson
from tests.problems import DIGITS


class Stiff(NamedTuple):
    """dy/dt = f(t, y, args) from y0 at 0 to t1; atol over rtol, as the test set scales it, or None where it is 1.7e-24."""

    f: Callable
    y0: tuple
    t1: float
    args: Any
    atol: float | None


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


STIFF = {
    "robertson 40": Stiff(robertson, (1.0, 0.0, 0.0), 40.0, ROBERTSON_RATES, 1e-6),
    "robertson 1e11": Stiff(robertson, (1.0, 0.0, 0.0), 1e11, ROBERTSON_RATES, 1e-6),
    "hires": Stiff(hires, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057), 321.8122, None, 1e-4),
    "oregonator 30": Stiff(oregonator, (1.0, 2.0, 3.0), 30.0, None, 1e-6),
    "oregonator 360": Stiff(oregonator, (1.0, 2.0, 3.0), 360.0, None, 1e-6),
    "van der pol": Stiff(van_der_pol, (2.0, 0.0), 2.0, 1e-6, 1.0),
    "pollu": Stiff(pollu, POLLU_START, 60.0, POLLU_RATES, 1e-4),
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
