"""Is a trained model an ODE? It is if the solver does not matter (Ott, Katiyar, Hennig & Tiemann 2021).

A model trained with coarse steps can use the error of its solver as a feature: another solver of equal or smaller error then
ruins it, and the model is a discrete map, not an ODE. All tools here take a `metric`, any pure function of a solver, such as
the accuracy of a model on a batch. Steps are measured as fractions h = 1 / steps of the interval between save times.
"""

from jode.validity.adaptation import Check, StepAdaptation, StepState, ToleranceAdaptation, ToleranceState, first_step
from jode.validity.diagnostics import Convergence, convergence, crossings, local_errors
from jode.validity.swap import Critical, Swap, at_least_as_fine, critical_steps, error_scale, swap

__all__ = [
    "Check",
    "Convergence",
    "Critical",
    "StepAdaptation",
    "StepState",
    "Swap",
    "ToleranceAdaptation",
    "ToleranceState",
    "at_least_as_fine",
    "convergence",
    "critical_steps",
    "crossings",
    "error_scale",
    "first_step",
    "local_errors",
    "swap",
]
