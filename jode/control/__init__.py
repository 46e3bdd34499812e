"""Controls: which step comes next. A solver is a method and a control."""

from jode.control.adaptive import Adaptive
from jode.control.base import Grid, Solver, Stats, Status
from jode.control.equal import Equal, Fixed, Layers

__all__ = ["Adaptive", "Equal", "Fixed", "Grid", "Layers", "Solver", "Stats", "Status"]
