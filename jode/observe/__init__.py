"""Observers: what is kept while marching, a map beside its transpose."""

from jode.observe.base import Seen, Watch
from jode.observe.record import Record, Recorded
from jode.observe.saves import Interpolated

__all__ = ["Interpolated", "Record", "Recorded", "Seen", "Watch"]
