"""The one loop over windows, and its transpose.

A march knows how to `run` (values only), how to `record` (values, and what the way back needs), and how to take a step of the
grid it found again, on (`advance`) or back (`invert`); `reverse` pulls cotangents back over that grid. How the state that a
step starts from is recovered is the adjoint's business.
"""

from jode.march.backwards import failed_at_start, replace_failed, reverse
from jode.march.forwards import March
from jode.march.layout import cotangents_from_layout, from_layout, kept_from_layout, kept_to_layout, numbers_to_layout, to_layout
from jode.march.values import Cotangents, Given, Kept, Outcome, Plan, Problem, inner, moving_of, problem_of

__all__ = [
    "Cotangents",
    "Given",
    "Kept",
    "March",
    "Outcome",
    "Plan",
    "Problem",
    "cotangents_from_layout",
    "failed_at_start",
    "from_layout",
    "inner",
    "kept_from_layout",
    "kept_to_layout",
    "moving_of",
    "numbers_to_layout",
    "problem_of",
    "replace_failed",
    "reverse",
    "to_layout",
]
