"""Methods: a step beside its inverse."""

from jode.method.base import Method, Step
from jode.method.reversible import Leapfrog, Momentum, Reversible, ReversibleHeun, leapfrog, reversible_heun
from jode.method.rosenbrock import Rosenbrock, rodas5p, rosenbrock23
from jode.method.runge_kutta import RungeKutta, bosh3, dopri5, dopri8, euler, heun, midpoint, ralston, rk4, tsit5

__all__ = [
    "Leapfrog",
    "Method",
    "Momentum",
    "Reversible",
    "ReversibleHeun",
    "Rosenbrock",
    "RungeKutta",
    "Step",
    "bosh3",
    "dopri5",
    "dopri8",
    "euler",
    "heun",
    "leapfrog",
    "midpoint",
    "ralston",
    "reversible_heun",
    "rk4",
    "rodas5p",
    "rosenbrock23",
    "tsit5",
]
