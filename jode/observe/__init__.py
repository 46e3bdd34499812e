"""Observers: what is kept while marching, a map beside its transpose."""

from jode.observe.at import At
from jode.observe.base import Bars, Seen, Watch
from jode.observe.dense import Dense, Interpolation
from jode.observe.effort import Effort
from jode.observe.event import Crossings, Event
from jode.observe.fold import Observed, Observer, observing
from jode.observe.record import Record, Recorded
from jode.observe.saves import Interpolated
from jode.observe.table import Steps, StepsTaken, Table

__all__ = [
    "At",
    "Bars",
    "Crossings",
    "Dense",
    "Effort",
    "Event",
    "Interpolated",
    "Interpolation",
    "Observed",
    "Observer",
    "Record",
    "Recorded",
    "Seen",
    "Steps",
    "StepsTaken",
    "Table",
    "Watch",
    "observing",
]
