"""Observers: what is kept while marching, a map beside its transpose."""

from jode.observe.base import Seen, Watch
from jode.observe.fold import Observed, Observer, observing
from jode.observe.record import Record, Recorded
from jode.observe.saves import Interpolated

__all__ = ["Interpolated", "Observed", "Observer", "Record", "Recorded", "Seen", "Watch", "observing"]
