"""jode: residual networks and neural ODEs as one object, seen at two step sizes."""

from jode.adjoint import Backprop, Backsolve, ForwardMode, MemoryFree
from jode.depth import resnet
from jode.grid import Adaptive, Fixed, Layers, Stats, Status
from jode.ivp import Solution, SolveError, check, odeint, solve
from jode.method import RungeKutta, bosh3, dopri5, dopri8, euler, heun, midpoint, ralston, rk4, tsit5
from jode.reversible import Momentum, Reversible, leapfrog, reversible_heun
from jode.tableau import Tableau

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "Backprop",
    "Backsolve",
    "Fixed",
    "ForwardMode",
    "Layers",
    "MemoryFree",
    "Momentum",
    "Reversible",
    "RungeKutta",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "Tableau",
    "bosh3",
    "check",
    "dopri5",
    "dopri8",
    "euler",
    "heun",
    "leapfrog",
    "midpoint",
    "odeint",
    "ralston",
    "resnet",
    "reversible_heun",
    "rk4",
    "solve",
    "tsit5",
]
