"""Small marches as one function each, on a CPU.

XLA on a CPU runs a program kernel by kernel, and starting a kernel takes longer than a step of a small system. A loop that moves
less than a kilobyte it compiles as one function, by a call with the attribute `xla_cpu_small_call`. A march with that attribute
becomes one function whatever its loops move. What XLA does before it writes such a function it does as in every program, and some
of that the function cannot hold. Read in the source of XLA (xla/service/cpu, xla/backends/cpu) and tried, from jax 0.7 to 0.12:

- Not every operation can be written: no sorting, scattering, transforms, collectives, or calls of anything else. So a march must be
  made of primitives that are known here, on numbers of usual kinds.
- The process stops where a parameter is not used, so the results of the call depend on all of them; and a constant of more than
  10,000 bytes is not there, so constants are operands, behind a barrier.
- What is handed to a library cannot be written: "Fusion kind not implemented on CPU". Those are products of matrices, and, from
  jax 0.9 on, reductions of which an operand has MANY numbers or more, with what stands beside them. So nothing that computes sees
  so many, and a product is one by a vector (or none of these: the products of two vectors' numbers, or their sum).
- Nor can what is shared out to threads: "Invalid LLVM IR", or the process stops. An operation, or what is fused to one, is shared
  out where it has more flops than bytes, and flops + 2 transcendentals + 10 bytes, which is less than 11 flops + 2 transcendentals,
  come to twice 100,000; else where it reads and writes twice 2^18 bytes. `most` bounds both by sums over all of a program, or over
  all that leads to one result, so that it does not matter what is fused with what. Loops of one turn are taken away, others are
  never unrolled, and fused with nothing outside of them. Fewer flops than FLOPS (18,181 would do) make results of less than
  2^17 + 2^14 bytes; with those and MOVED an operation stays below 2^19. A table is below 2^18, for a copy reads and writes it.

Products of small matrices, a network's on the rows of a batch, stay outside: a library takes those of eight numbers a side. Written
as sums they could be inside, but what pays then is the sums: ten rows of a network 2-32-2, 20 steps of rk4, take 94 µs with
products, 40 with sums, and 31 with sums in one function; their gradient 555, 114 and 110. One trajectory of it takes 11 µs so and
18 without, its gradient 27 and 50, of 2-32-32-2 67 and 150.

A table, which may have more than MANY numbers, is filled, read in slices or by index, written to in place and moved, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, jaxpr_as_fun
from jax.extend.mlir import ir
from jax.interpreters import mlir

from jode.tree import programs_in

ATTRIBUTES = {"xla_cpu_small_call": "true", "inlineable": "false"}
MANY, TABLE, FLOPS, MOVED = 4096, 2**18, 18_000, 23 * 2**14


def _names(*lines: str) -> frozenset:
    return frozenset(" ".join(lines).split())


# By how many operations XLA makes of one at most, in 0.7, 0.10 and 0.12: see `_operations`.
ONE = _names(
    "abs add add_any and atan2 cbrt ceil complex conj copy copy_p cos div eq eq_to erf exp expm1 floor ge gt imag is_finite le",
    "le_to log log1p lt lt_to max min mul ne neg not or real reduce_precision round rsqrt select_n shift_left",
    "shift_right_arithmetic shift_right_logical sin sqrt square sub tan tanh xor",
)
TWO = _names("clamp convert_element_type exp2 log2 one_minus_square pow rem sign")
SOME = _names("acos acosh argmax argmin asin asinh atan atanh cosh logistic sinh")
LONG = _names("digamma erf_inv erfc lgamma nextafter")
ELEMENTWISE = ONE | TWO | SOME | LONG | {"integer_pow"}
COMPLEX = _names(
    "add add_any complex conj convert_element_type copy copy_p div eq imag mul ne neg real select_n sub"
)  # four at most
REDUCING = _names("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum")
MOVING = _names("broadcast_in_dim concatenate empty empty2 gather iota pad reshape rev split squeeze stack tile transpose unstack")
SLICING = _names("dynamic_slice dynamic_update_slice scatter scatter-add scatter-max scatter-min scatter-mul slice")
IDENTITY = _names("device_put name optimization_barrier stop_gradient")
INLINED = _names("checkpoint closed_call custom_jvp_call custom_linear_solve custom_vjp_call jit pjit remat2")
LOOPS = _names("cond scan while")
DTYPES = _names(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128",
)


def can_be_whole(ctx: Any, program: Any) -> bool:
    """Whether a traced program that is lowered here may be one function: on one device, of small operands and of what is safe."""
    module = ctx.module_context
    alone = getattr(module.axis_context, "num_devices", None) == 1 and not module.lowering_parameters.for_export
    return alone and all(_is_table(x) for x in program.in_avals) and most(program).safe


class Most(NamedTuple):
    """Bounds for any one operation that XLA makes of a program: flops, transcendentals among them, and bytes moved by all of it and
    by what leads to one result, were that fused. And which results XLA may know, since they depend on constants alone.
    """

    flops: float
    moved: float
    together: float
    known: Sequence[bool]
    apart: bool = False  # a loop, with which nothing outside is fused

    @property
    def safe(self) -> bool:
        return self.flops < FLOPS and self.together < MOVED


def most(program: Any, given: Sequence[bool] = ()) -> Most:
    """The bounds for a traced program; given: which of its operands XLA may know."""
    jaxpr = _open(program)
    unknown = set(jaxpr.invars) - {v for v, k in zip(jaxpr.invars, given, strict=False) if k}
    knows = lambda xs: [isinstance(v, Literal) or v not in unknown for v in xs]
    flops, weights, places, behind = 0.0, [], {}, {}  # behind a result: a bit for each array that was moved on the way to it
    for e in jaxpr.eqns:
        found = _most(e, knows(e.invars))
        flops += found.flops
        bits = 0
        for v in [] if found.apart else e.invars:
            bits |= 0 if isinstance(v, Literal) else behind.get(v, 0)
        for x, size in [*((v, _bytes(v.aval)) for v in _moved(e) if not isinstance(v, Literal)), (id(e), found.moved)]:
            if size and x not in places:
                places[x] = len(weights)
                weights.append(size)
            bits |= 1 << places[x] if size else 0
        behind.update(dict.fromkeys(e.outvars, bits))
        unknown.update(v for v, k in zip(e.outvars, found.known, strict=True) if not k)
    moved = together = sum(weights)
    if moved >= MOVED:
        together = max(sum(w for i, w in enumerate(weights) if bits >> i & 1) for bits in set(behind.values()))
    return Most(flops, moved, together, knows(jaxpr.outvars))


def _moved(eqn: Any) -> list:
    """What an operation that moves numbers or sums them writes, and reads as a whole. A table that is filled is written alone."""
    name = eqn.primitive.name
    filled = name in MOVING and all(v.aval.size == 1 for v in eqn.invars)
    if filled or name in SLICING or not (name in MOVING or name in REDUCING or name == "dot_general"):
        return []
    return [*eqn.invars, *eqn.outvars]


def _most(eqn: Any, known: Sequence[bool]) -> Most:
    name = eqn.primitive.name
    given, made = ([x.aval for x in xs] for xs in (eqn.invars, eqn.outvars))
    safe = all(getattr(x.dtype, "name", None) in DTYPES and _is_table(x) for x in (*given, *made))
    safe = safe and all(d is None for d in eqn.params.get("devices", ()))
    if safe and (name in LOOPS or name in INLINED or name in IDENTITY):
        return _most_within(eqn, known)
    few, largest = all(x.size < MANY for x in (*given, *made)), max((x.size for x in (*given, *made)), default=0)
    if name in MOVING or name in SLICING:
        flops = 4.0 * (largest if any(map(_half, made)) else made[0].size if name == "gather" else 0)
        safe = safe and (not name.startswith("scatter") or given[1].size == given[1].shape[-1])  # to one place: a slice
    elif name == "dot_general":
        product, flops = _product(eqn, few)
        safe = safe and product
    else:
        safe = safe and few and (name in ELEMENTWISE or name in REDUCING)
        flops = _operations(eqn) * (largest + (made[0].size if name in REDUCING else 0)) if safe else 0.0
    return Most(flops if safe else math.inf, 0.0, 0.0, [all(known)] * len(made))


def _most_within(eqn: Any, known: Sequence[bool]) -> Most:
    """The bounds for what an equation calls. A loop of one turn XLA takes away, and a condition that it knows: then what is inside
    is beside what is outside. A loop may take one turn if its length is one, or if XLA may know what its condition reads at first.
    """
    name, p, beside, out = eqn.primitive.name, eqn.params, True, [all(known)] * len(eqn.outvars)
    if name == "while":
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        test, body, starts = _open(p["cond_jaxpr"]), _open(p["body_jaxpr"]), [*known[:n], *known[m:]]
        read = {v for e in test.eqns for v in e.invars if not isinstance(v, Literal)}.union(test.outvars)
        beside = all(k for v, k in zip(test.invars, starts, strict=True) if v in read)
        carried = zip(body.invars[m - n :], body.outvars, known[m:], strict=True)
        out = [
            k and (beside or v is w) for v, w, k in carried
        ]  # what a loop carries stays what it is, or is not known inside of it
        inside = [most(test, [*known[:n], *out]), most(body, [*known[n:m], *out])]
    elif name == "scan":
        inside, beside = [most(p["jaxpr"], known)], p["length"] == 1
        out = inside[0].known
    elif name == "cond":
        each = [most(x, known[1:]) for x in p["branches"]]
        inside = [Most(max(x.flops for x in each), max(x.moved for x in each), max(x.together for x in each), ())]
        out = [any(ks) for ks in zip(*(x.known for x in each), strict=True)]
    else:
        inside = [most(x, known) for x in programs_in(eqn)]
        out = inside[0].known if len(inside) == 1 else out
    if not all(x.safe for x in inside):
        return Most(math.inf, 0.0, 0.0, out)
    if not beside:
        return Most(0.0, 0.0, 0.0, out, apart=True)
    moved = sum(x.moved for x in inside)
    return Most(sum(x.flops for x in inside), moved, moved, out)


def _product(eqn: Any, few: bool) -> tuple[bool, float]:
    """Whether a product is one by a vector, and flops where XLA may make an elementwise one or a sum of it."""
    given, made = [x.aval for x in eqn.invars], eqn.outvars[0].aval
    (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
    summed = math.prod(given[0].shape[i] for i in contracted)
    vector = not batched and min(x.size for x in given) <= summed
    written_out = summed <= 1 or made.size <= 1 or any(map(_half, given))
    return (vector or (summed == 1 and not batched)) and (few or not written_out), 4.0 * made.size * summed if written_out else 0.0


def _operations(eqn: Any) -> float:
    """How many operations XLA makes of one number at most; numbers of half precision it converts before and after each."""
    name, dtypes = eqn.primitive.name, [x.aval.dtype for x in (*eqn.invars, *eqn.outvars)]
    if any(d.kind == "c" for d in dtypes):
        n = 4.0 if name in COMPLEX else 400.0
    elif name in REDUCING and name not in SOME:
        long = eqn.invars[0].aval.size > 16 * eqn.outvars[0].aval.size  # is summed by windows of 16, the last one filled up
        n = (2.0 if long else 1.0) * (1 if dtypes[0].name in ("float32", "float64") else 4)
    elif name == "integer_pow":
        y = abs(eqn.params["y"])
        n = float(y.bit_length() + y.bit_count())  # squares and products
    else:
        n = 1.0 if name in ONE else 2.0 if name in TWO else 16.0 if name in SOME else 400.0
    return n * (2 + len(eqn.invars)) if any(_half(v.aval) for v in (*eqn.invars, *eqn.outvars)) else n


def _open(program: Any) -> Any:
    return getattr(program, "jaxpr", program)


def _half(x: Any) -> bool:
    return x.dtype.name in ("float16", "bfloat16")


def _is_table(x: Any) -> bool:
    return _bytes(x) < TABLE


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
