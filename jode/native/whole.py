"""Small marches as one function each, on a CPU.

XLA on a CPU runs a program kernel by kernel, and starting a kernel takes longer than a step of a small system. A loop that moves
less than a kilobyte it compiles as one function, by a call with the attribute `xla_cpu_small_call`. A march with that attribute
becomes one function whatever its loops move. The emitter of such functions does not know every operation, none that is shared out
to threads or handed to a library, and stops the process where a call has a parameter that is not used. So a march must be made of
primitives known to be safe, on arrays so small that no operation is shared out, and a result of its call depends on all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.extend.mlir import ir
from jax.interpreters import mlir

from jode.tree import programs_in

ATTRIBUTES = {"xla_cpu_small_call": "true", "inlineable": "false"}


def _names(*lines: str) -> frozenset:
    return frozenset(" ".join(lines).split())


ELEMENTWISE = _names(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy copy_p cos",
    "cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le le_to lgamma log log1p",
    "logistic lt lt_to max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n shift_left",
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor",
)
EXPANDED = _names("acosh asinh atan atanh digamma erf erf_inv erfc lgamma tan")  # into some fifty operations at most
MOVING = _names(
    "broadcast_in_dim concatenate dynamic_slice gather iota pad reshape rev slice split squeeze stack tile",
    "transpose unstack",
)
REDUCING = _names("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum")
IDENTITY = _names("name optimization_barrier stop_gradient")
INLINED = _names("checkpoint closed_call custom_jvp_call custom_linear_solve custom_vjp_call jit pjit remat2")
LOOPS = _names("cond scan while")

# XLA shares an operation out to threads where flops + 2 transcendentals + 10 bytes come to WORK and flops exceed bytes, or where
# bytes come to twice TABLE. Reductions of 4,096 numbers it hands to a library.
WORK, TABLE, ARRAY, REDUCED = 200_000, 2**18, 2**16, 4096


def can_be_whole(ctx: Any, program: Any) -> bool:
    """Whether a traced program that is lowered here may be one function: on one device, of small operands and of what is safe."""
    module = ctx.module_context
    alone = getattr(module.axis_context, "num_devices", None) == 1 and not module.lowering_parameters.for_export
    return alone and all(_bytes(x) <= TABLE for x in program.in_avals) and work(program) < WORK


def work(program: Any) -> float:
    """An upper bound on what XLA counts for any one operation it makes of a traced program, were all of it fused; infinite where it
    is not safe. What is inside of a loop is fused with nothing outside of it.
    """
    return sum(map(_work, program.eqns))


def _work(eqn: Any) -> float:
    name, inner = eqn.primitive.name, [work(p) for p in programs_in(eqn)]
    given, made = ([x.aval for x in xs] for xs in (eqn.invars, eqn.outvars))
    if not all(jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool for x in (*given, *made)):
        return math.inf
    if name in LOOPS:
        stacked = made if name == "scan" else []
        safe, found = all(w < WORK for w in inner) and all(_bytes(x) <= TABLE for x in stacked), 0.0
    elif name in INLINED or name in IDENTITY:
        safe, found = True, sum(inner)
    elif name == "dynamic_update_slice":  # in place
        safe, found = True, 11 * given[1].size
    elif name.startswith("scatter"):  # to one place, which is such a slice
        safe, found = given[1].size == given[1].shape[-1], 11 * given[2].size
    elif name == "dot_general":  # by a vector; a product of matrices may become a call of a library
        (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
        small = all(_bytes(x) <= TABLE for x in (*given, *made))
        safe = small and not batched and min(x.ndim for x in given) == len(contracted)
        found = 0.0 if contracted else 11 * made[0].size  # products that are sums are shared out by none
    elif name in REDUCING:
        safe, found = given[0].size < REDUCED, 11 * given[0].size
    elif name in MOVING:
        filling = name in ("broadcast_in_dim", "iota")
        safe, found = all(_bytes(x) <= (TABLE if filling else ARRAY) for x in made), 0.0
    else:
        safe = name in ELEMENTWISE and all(_bytes(x) <= ARRAY for x in made)
        found = (550.0 if name in EXPANDED else 11.0) * sum(x.size for x in made)
    return found if safe else math.inf


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


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
