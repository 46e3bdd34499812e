"""Derivative rules for a march, one file each."""

from jode.adjoint.backprop import Backprop
from jode.adjoint.backsolve import Backsolve
from jode.adjoint.memoryfree import MemoryFree
from jode.adjoint.rule import Adjoint

__all__ = ["Adjoint", "Backprop", "Backsolve", "MemoryFree"]
