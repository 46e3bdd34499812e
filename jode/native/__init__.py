"""A march as JAX primitives: one native loop under `vmap`, and derivatives in both modes from one rule.

Primitives stand for a march, its tangent (linear, forwards) and its cotangent (linear, backwards). Each has forms: a
function of the operands for one trajectory, and under `jax.vmap` the same written for a batch, told which operands differ from
row to row, so that what is shared (the weights of a network) stays shared, in the loop and in its cotangent. Nested `vmap`s
fold into one batch. An axis that only tangents or cotangents have is a direction: the rest of the work is done once for all of
them.

Forward mode binds the march and its tangent as one, unrecorded. Where reverse mode follows, partial evaluation splits that into a
march that records what the way back needs, and a tangent, whose transpose is the cotangent. First-order gradients so never trace
the forward derivative of the vector field. These are the only lines that touch JAX's extension interface (`jax.extend`,
`jax.interpreters`).
"""

from __future__ import annotations

from typing import Any

import jax

from jode.native import batching, derivatives  # noqa: F401  they register their rules
from jode.native.forms import Batch, March, Promise, Rule
from jode.native.primitives import live, run_p

__all__ = ["Batch", "Promise", "Rule", "live", "native"]


def native(rule: Rule, moving: Any, still: Any, promise: Promise) -> tuple[Any, Any]:
    """The march of a rule: (values, rest), differentiable by `moving`; outputs of a batch lead with its row axis.

    With what it promises a march that ends up batched is never traced for one trajectory.
    """
    leaves, treedef = jax.tree.flatten((moving, still))
    march = March(rule, treedef, len(jax.tree.leaves(moving)), promise)
    out = run_p.bind(*leaves, march=march, rows=None)
    return jax.tree.unflatten(jax.tree.structure((promise.values, promise.rest)), out)
