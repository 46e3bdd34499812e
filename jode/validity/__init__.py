"""Is a trained model an ODE? It is if the solver does not matter (Ott, Katiyar, Hennig & Tiemann 2021).

A model trained with coarse steps can use the error of its solver as a feature: another solver of equal or smaller error then
ruins it, and the model is a discrete map, not an ODE. All tools here take pure functions of a solver: a `metric`, such as whether
a model is right on each example, or its `outputs`. Steps are measured as fractions h = 1 / steps of the interval between save
times.
"""

from jode.validity.adaptation import Check, StepAdaptation, StepState, ToleranceAdaptation, ToleranceState, first_step
from jode.validity.critical import Critical, critical_steps
from jode.validity.diagnostics import Convergence, convergence, crossings, local_errors
from jode.validity.errors import at_least_as_fine, error_scale, measured_errors
from jode.validity.paired import Change
from jode.validity.verdict import (
    Agreement,
    Swap,
    agreement,
    swap,
)

__all__ = [
    "Agreement",
    "Change",
    "Check",
    "Convergence",
    "Critical",
    "StepAdaptation",
    "StepState",
    "Swap",
    "ToleranceAdaptation",
    "ToleranceState",
    "agreement",
    "at_least_as_fine",
    "convergence",
    "critical_steps",
    "crossings",
    "error_scale",
    "first_step",
    "local_errors",
    "measured_errors",
    "swap",
]
