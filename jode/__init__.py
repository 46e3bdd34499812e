"""jode: residual networks and neural ODEs as one object, seen at two step sizes."""

import importlib
from typing import TYPE_CHECKING, Any

from jode import config as config
from jode.adjoint import Adjoint, Backprop, Backsolve, MemoryFree
from jode.control import Adaptive, Fixed, Layers, Stats, Status
from jode.depth import resnet
from jode.ivp import Solution, SolveError, check, odeint, solve
from jode.method import (
    Method,
    Momentum,
    Reversible,
    Rosenbrock,
    RungeKutta,
    Step,
    bosh3,
    dopri5,
    dopri8,
    euler,
    heun,
    leapfrog,
    midpoint,
    ralston,
    reversible_heun,
    rk4,
    rodas5p,
    rosenbrock23,
    tsit5,
)
from jode.observe import At, Dense, Event, Observer, Steps
from jode.runner import Compiled, Eager, Runner
from jode.tableau import RosenbrockTableau, Tableau

if TYPE_CHECKING:
    from jode import audit as audit
    from jode import compat as compat
    from jode import data as data
    from jode import depth as depth
    from jode import models as models
    from jode import regularize as regularize
    from jode import train as train
    from jode import validity as validity

__version__ = "0.1.0"

# Each loads, with what it needs, where it is first used.
ROOMS = ("audit", "compat", "data", "depth", "models", "regularize", "train", "validity")

__all__ = [
    "Adaptive",
    "Adjoint",
    "At",
    "Backprop",
    "Backsolve",
    "Compiled",
    "Dense",
    "Eager",
    "Event",
    "Fixed",
    "Layers",
    "MemoryFree",
    "Method",
    "Momentum",
    "Observer",
    "Reversible",
    "Rosenbrock",
    "RosenbrockTableau",
    "RungeKutta",
    "Runner",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "Step",
    "Steps",
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
    "rodas5p",
    "rosenbrock23",
    "solve",
    "tsit5",
]


def __getattr__(name: str) -> Any:
    """`jode.validity` and the other rooms, after `import jode` alone."""
    if name in ROOMS:
        return importlib.import_module(f"jode.{name}")
    raise AttributeError(f"module 'jode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ROOMS})
