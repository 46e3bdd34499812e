"""Derivative rules for a march, one file each."""

from jode.adjoint.backprop import Backprop

__all__ = ["Backprop"]
