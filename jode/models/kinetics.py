"""Chemical mechanisms whose rates differ by many orders of magnitude, as vector fields of concentrations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

ROBERTSON_RATES = (0.04, 3e7, 1e4)


def robertson(t: Any, y: Array, k: Any) -> Array:
    """Three species, A → B, 2 B → B + C, B + C → A + C, with rate constants k: Robertson 1966."""
    slow, fast, back = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
    return jnp.stack([back - slow, slow - back - fast, fast])


# POLLU, air pollution by 20 species: Verwer 1994. Rate constants of its 25 reactions, which species each takes (one or two), and of
# each species the reactions that consume and that produce it.
POLLU_RATES = (
    *(0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9.0e3, 0.022, 1.2e4, 1.88, 1.63e4, 4.8e6),
    *(3.5e-4, 0.0175, 1.0e8, 4.44e11, 1240.0, 2.1, 5.78, 0.0474, 1780.0, 3.12),
)
POLLU_START = tuple({2: 0.2, 4: 0.04, 7: 0.1, 8: 0.3, 9: 0.01, 17: 0.007}.get(i, 0.0) for i in range(1, 21))
POLLU_TAKES = (
    *((1,), (2, 4), (5, 2), (7,), (7,), (7, 6), (9,), (9, 6), (11, 2), (11, 1), (13,), (10, 2), (14,), (1, 6), (3,)),
    *((4,), (4,), (16,), (16,), (17, 6), (19,), (19,), (1, 4), (19, 1), (20,)),
)
POLLU_CHANGES = (
    ((1, 10, 14, 23, 24), (2, 3, 9, 11, 12, 22, 25)),
    ((2, 3, 9, 12), (1, 21)),
    ((15,), (1, 17, 19, 22)),
    ((2, 16, 17, 23), (15,)),
    ((3,), (4, 4, 6, 7, 13, 20)),
    ((6, 8, 14, 20), (3, 18, 18)),
    ((4, 5, 6), (13,)),
    ((), (4, 5, 6, 7)),
    ((7, 8), ()),
    ((12,), (7, 9)),
    ((9, 10), (8, 11)),
    ((), (9,)),
    ((11,), (10,)),
    ((13,), (12,)),
    ((), (14,)),
    ((18, 19), (16,)),
    ((20,), ()),
    ((), (20,)),
    ((21, 22, 24), (23, 25)),
    ((25,), (24,)),
)
_STOICHIOMETRY = np.array([[given.count(r) - taken.count(r) for r in range(1, 26)] for taken, given in POLLU_CHANGES], float)
_FIRST, _SECOND = (np.array([(*x, 0)[i] - 1 for x in POLLU_TAKES]) for i in (0, 1))  # -1: no second one


def pollu(t: Any, y: Array, k: Array) -> Array:
    """dy/dt = S r, with r the rates of the reactions by the law of mass action."""
    one = jnp.concatenate([y, jnp.ones(1, y.dtype)])
    return jnp.asarray(_STOICHIOMETRY, y.dtype) @ (k * y[_FIRST] * one[_SECOND])
