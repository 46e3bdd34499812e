"""Small marches as one function each, on a CPU.

XLA on a CPU runs a program kernel by kernel, and starting a kernel takes longer than a step of a small system. A loop that moves
less than a kilobyte it compiles as one function, by a call with the attribute `xla_cpu_small_call`. A march with that attribute
becomes one function whatever its loops move. Its emitter does not know every operation, and stops the process where a call has a
parameter that is not used, so a march must be made of primitives known to be safe, and a result of its call depends on all
parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.extend.mlir import ir
from jax.interpreters import mlir

from jode.tree import programs_in

ATTRIBUTES = {"xla_cpu_small_call": "true", "inlineable": "false"}

ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy copy_p "
    "cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le le_to lgamma log "
    "log1p logistic lt lt_to max min mul name ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor"
)
MOVING = (
    "broadcast_in_dim concatenate dynamic_slice dynamic_update_slice gather iota optimization_barrier pad reshape rev slice split "
    "squeeze stack tile transpose unstack"
)
REDUCING = (
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
)
NESTING = "checkpoint closed_call cond custom_jvp_call custom_linear_solve custom_vjp_call jit pjit remat2 scan while"
SAFE = frozenset(" ".join((ELEMENTWISE, MOVING, REDUCING, NESTING)).split())


def can_be_whole(ctx: Any, program: Any) -> bool:
    """Whether a traced program that is lowered here may be one function: on one device, and made of what is safe."""
    module = ctx.module_context
    alone = getattr(module.axis_context, "num_devices", None) == 1 and not module.lowering_parameters.for_export
    return alone and safe(program)


def safe(program: Any) -> bool:
    """Whether all operations of a traced program are known to be safe."""
    return all(map(_safe, program.eqns))


def _safe(eqn: Any) -> bool:
    name = eqn.primitive.name
    if not all(jnp.issubdtype(x.aval.dtype, jnp.number) or x.aval.dtype == bool for x in (*eqn.invars, *eqn.outvars)):
        return False
    if name == "dot_general":  # by a vector; a product of matrices may become a call of a library
        (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
        left, right = (x.aval.ndim - len(contracted) - len(batched) for x in eqn.invars)
        return not batched and min(left, right) == 0
    if name.startswith("scatter"):  # at one place: a slice that is updated
        return eqn.invars[1].aval.size == eqn.invars[1].aval.shape[-1]
    return name in SAFE and all(map(safe, programs_in(eqn)))


def lower_whole(ctx: Any, staged: Any, operands: Sequence) -> Any:
    """Lower a staged form as one function. Behind a barrier XLA does not take operands for the constants that some are."""

    def march(*xs: Any) -> tuple[list, list]:
        used: dict = {}
        for x in xs:
            if x.size:
                first = x if x.size == 1 else jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
                used.setdefault(x.dtype, []).append(jax.lax.reshape(first, (1,)))
        return jaxpr_as_fun(staged)(*xs), [jax.lax.concatenate(x, 0) for x in used.values()]

    out = mlir.lower_fun(lambda *xs: jax.jit(march)(*jax.lax.optimization_barrier(xs))[0], multiple_results=True)(ctx, *operands)
    for x in jax.tree.leaves(out):
        if x.owner.name == "func.call":
            attributes: dict[str, ir.Attribute] = {k: ir.StringAttr.get(v) for k, v in ATTRIBUTES.items()}
            x.owner.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(attributes)
    return out
