"""Does a march that is one function ever end the process, fail to compile, or differ from the same march without?

    python -m benchmarks.fuzz --minutes 5

Random programs, each compiled and run twice. Most are random functions and their derivatives, lowered as a march is; one in forty is
a solve with a random field, solver, adjoint and mode, of which each form counts. They run in a process of their own, so that one
that ends it is reported, with the seed that makes it again, and the search goes on. Exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jode
from jode import config
from jode.native import primitives, whole

from benchmarks import measure

SMALL = [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64]
LARGE = [100, 128, 300, 500, 1000, 2000, 4000, 4095, 4096, 5000, 9000]
STATES = [0, 1, 2, 3, 4, 8, 12, 17, 33, 40, 64]
RECYCLED, GROUP = 300, 8  # programs of one process, and functions compiled as one program


def tamed(x):
    """Within [-2, 2], smoothly: no difference grows."""
    return x / (1 + abs(x) / 2)


UNARY = {
    "abs": jnp.abs, "acos": lambda x: lax.acos(0.4 * x), "acosh": lambda x: lax.acosh(1.5 + abs(x)), "asin": lambda x: lax.asin(0.4 * x),
    "asinh": lax.asinh, "atan": lax.atan, "atanh": lambda x: lax.atanh(0.4 * x), "cbrt": lambda x: lax.cbrt(abs(x) + 0.3),
    "ceil": lax.ceil, "clamp": lambda x: lax.clamp(jnp.asarray(-1, x.dtype), x, jnp.asarray(1, x.dtype)), "cos": lax.cos, "cosh": lax.cosh,
    "digamma": lambda x: lax.digamma(abs(x) + 0.5), "erf": lax.erf, "erf_inv": lambda x: lax.erf_inv(0.4 * x), "erfc": lax.erfc,
    "exp": lax.exp, "exp2": lax.exp2, "expm1": lax.expm1, "floor": lax.floor, "half": lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
    "cube": lambda x: x**3, "inverse power": lambda x: (abs(x) + 0.5) ** -2, "power": lambda x: (abs(x) + 0.1) ** 1.5, "square": lambda x: x**2,
    "is_finite": lambda x: jnp.where(jnp.isfinite(x), x, 0), "lgamma": lambda x: lax.lgamma(abs(x) + 0.5), "log": lambda x: jnp.log(abs(x) + 0.5),
    "log1p": lambda x: jnp.log1p(abs(x)), "logistic": lax.logistic, "neg": lax.neg, "round": jnp.round, "rsqrt": lambda x: lax.rsqrt(abs(x) + 0.4),
    "sign": lax.sign, "sin": lax.sin, "sinh": lax.sinh, "sqrt": lambda x: jnp.sqrt(abs(x) + 0.2), "tan": lambda x: lax.tan(0.5 * x), "tanh": lax.tanh,
    "softplus": jax.nn.softplus, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "stop": lax.stop_gradient, "barrier": lax.optimization_barrier,
    "integers": lambda x: (lax.shift_left((10 * x).astype(jnp.int32) & 7, jnp.int32(1)) ^ 3).astype(x.dtype) / 8,
    "unsigned": lambda x: ((20 * abs(x)).astype(jnp.uint8) % 7 | 1).astype(x.dtype) / 7,
    "int64": lambda x: lax.rem((100 * x).astype(jnp.int64), jnp.int64(9)).astype(x.dtype) / 9,
}  # fmt: skip
COMPLEX = {
    "exp": jnp.exp, "square": lambda z: z * z, "tanh": lambda z: jnp.tanh(0.3 * z), "sqrt": lambda z: jnp.sqrt(z + 3), "conj": jnp.conj,
    "sin": jnp.sin, "log": lambda z: jnp.log(z + 4), "div": lambda z: 1 / (z + 5), "power": lambda z: z**3,
}  # fmt: skip
BINARY = {
    "add": jnp.add, "atan2": lambda x, y: lax.atan2(x, abs(y) + 0.5), "div": lambda x, y: x / (abs(y) + 0.7), "max": jnp.maximum,
    "min": jnp.minimum, "mul": jnp.multiply, "pow": lambda x, y: (abs(x) + 0.5) ** y, "rem": lambda x, y: lax.rem(x, abs(y) + 0.5),
    "sub": jnp.subtract, "where": lambda x, y: jnp.where(x > 0.3 * y, x, y), "ge": lambda x, y: (x >= y).astype(x.dtype) * y,
    "ne": lambda x, y: ((x != y) & ~(y < 0) | (x > 1)).astype(x.dtype), "hypot": jnp.hypot, "logaddexp": jnp.logaddexp,
}  # fmt: skip


@jax.custom_vjp
def _doubled(x):
    return jnp.sin(x) * 0.5


_doubled.defvjp(lambda x: (_doubled(x), x), lambda x, b: (b * jnp.cos(x) * 0.5,))


class Field:
    """A random function R^n -> R^n, the same each time it is traced."""

    def __init__(self, seed: int, steps: int, refused: bool = False, depth: int = 0) -> None:
        self.seed, self.steps, self.refused, self.depth = seed, steps, refused, depth

    def __call__(self, t, y, args):
        rng = np.random.default_rng(self.seed)
        pool = [y, *jax.tree.leaves(args)]
        for _ in range(self.steps):
            pool.append(self.step(rng, pool, y, t))
        if self.refused:
            pool.append(self.refuse(rng, y))
        out = y * 0.1
        for x in pool[-3:]:
            out = out + 0.3 * self.fitted(rng, x, y.shape).astype(y.dtype)
        return tamed(out)

    def pick(self, rng, pool):
        return pool[-1 - int(min(rng.geometric(0.4) - 1, len(pool) - 1))]

    def fitted(self, rng, x, shape):
        """x as an array of this shape."""
        if x.shape == shape:
            return x
        n, flat = int(np.prod(shape)), x.reshape(-1)
        if flat.size == 0:
            return jnp.zeros(shape, x.dtype)
        if flat.size >= n:
            start = int(rng.integers(0, flat.size - n + 1))
            return flat[start : start + n].reshape(shape)
        kind = rng.integers(3)
        if kind == 0:
            return jnp.broadcast_to(jnp.mean(flat), shape).astype(x.dtype)
        if kind == 1:
            return jnp.tile(flat, -(-n // flat.size))[:n].reshape(shape)
        return jnp.pad(flat, (0, n - flat.size)).reshape(shape)

    def step(self, rng, pool, y, t):
        kind = rng.choice(["unary", "binary", "moved", "reduced", "product", "indexed", "complex", "control", "time"],
                          p=[0.25, 0.22, 0.14, 0.07, 0.1, 0.08, 0.03, 0.09, 0.02])  # fmt: skip
        x = self.pick(rng, pool)
        if x.size == 0 or x.size > 20_000:
            x = y if y.size else jnp.ones(1, y.dtype)
        x = jnp.atleast_1d(x)
        return tamed(getattr(self, kind)(rng, x, pool, t)).astype(x.dtype)

    def unary(self, rng, x, pool, t):
        return UNARY[str(rng.choice(list(UNARY)))](x)

    def binary(self, rng, x, pool, t):
        other = self.fitted(rng, self.pick(rng, pool), x.shape).astype(x.dtype)
        if rng.random() < 0.3:
            other = jnp.asarray(rng.uniform(-1, 1, x.shape), x.dtype)
        return BINARY[str(rng.choice(list(BINARY)))](x, other)

    def time(self, rng, x, pool, t):
        return x * jnp.cos(3 * t).astype(x.dtype)

    def complex(self, rng, x, pool, t):
        x = x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)
        z = COMPLEX[str(rng.choice(list(COMPLEX)))](lax.complex(0.5 * x, x))
        return [jnp.real, jnp.imag, jnp.abs][rng.integers(3)](z)

    def moved(self, rng, x, pool, t):
        flat = x.reshape(-1)
        m = int(rng.integers(1, flat.size + 1))
        return [
            lambda: jnp.roll(x, int(rng.integers(-3, 4))), lambda: x[::-1], lambda: x.T, lambda: flat, lambda: flat[:m], lambda: flat[::2],
            lambda: jnp.concatenate([flat, flat[:m]]), lambda: jnp.stack([flat, 0.5 * flat, flat[::-1]]), lambda: jnp.pad(flat, (1, 2)),
            lambda: jnp.broadcast_to(flat, (3, flat.size)), lambda: flat[: m // 2 * 2].reshape(2, -1), lambda: jnp.concatenate(jnp.split(flat[: m // 2 * 2], 2)[::-1]),
            lambda: flat[:, None] * jnp.arange(3, dtype=x.dtype), lambda: jnp.diff(flat), lambda: jnp.repeat(flat, 2), lambda: jnp.squeeze(x[None], 0),
        ][rng.integers(16)]()  # fmt: skip

    def reduced(self, rng, x, pool, t):
        over = [jnp.sum, jnp.max, jnp.min, jnp.mean, lambda x, a: jnp.prod(0.5 + 0.1 * x, a), jnp.argmax, jnp.argmin,
                lambda x, a: jnp.all(x > 0, a), lambda x, a: jnp.any(x > 1, a), lambda x, a: jnp.linalg.norm(x, axis=a),
                jax.nn.softmax, jax.scipy.special.logsumexp][rng.integers(12)]  # fmt: skip
        out = over(x, None if x.ndim < 2 or rng.random() < 0.3 else int(rng.integers(x.ndim))).astype(x.dtype)
        return out if rng.random() < 0.3 else x * jnp.sum(out) / out.size

    def product(self, rng, x, pool, t):
        flat = x.reshape(-1)
        m = int(rng.choice(SMALL)) if flat.size < 200 else 2
        A = jnp.asarray(rng.normal(size=(m, flat.size)) / np.sqrt(flat.size), x.dtype)
        kind = rng.integers(7)
        if kind < 3:
            return A @ flat if kind < 2 else flat @ A.T
        if kind == 3:
            return x * jnp.dot(flat, flat[::-1]) / flat.size
        if kind == 4:
            return x * (flat[None] @ flat)[0] / flat.size
        if kind == 5:
            return jnp.outer(flat[:33], flat[:m])
        return jnp.tanh(A @ flat) @ A

    def indexed(self, rng, x, pool, t):
        flat = x.reshape(-1)
        n = flat.size
        i = jnp.floor(abs(flat[0].astype(jnp.float32)) * n / 3).astype(jnp.int32)
        places = jnp.asarray(rng.integers(0, n, size=int(rng.choice(SMALL))))
        table = jnp.asarray(rng.uniform(-1, 1, int(rng.choice([5, 50, 3000, 12_000]))), x.dtype)
        return [
            lambda: flat[places], lambda: flat.at[0].set(0.5), lambda: flat.at[int(n / 2)].add(flat[0]), lambda: flat.at[i].multiply(0.5, mode="drop"),
            lambda: lax.dynamic_slice(flat, (i,), (max(1, n // 2),)), lambda: lax.dynamic_update_slice(flat, flat[: max(1, n // 3)] * 0.5, (i,)),
            lambda: flat * table[i % table.size], lambda: flat * lax.dynamic_index_in_dim(flat, i, keepdims=False), lambda: jnp.take(flat, places, mode="clip"),
            lambda: flat.at[places[:1]].max(0.25),
        ][rng.integers(10)]()  # fmt: skip

    def control(self, rng, x, pool, t):
        inner = Field(int(rng.integers(2**31)), int(rng.integers(1, 4)), depth=self.depth + 1)
        inner.differentiated, inner.forwards = self.differentiated, self.forwards
        g = lambda x: inner(t, x, ())
        if self.depth > 1:
            return g(x)
        turns = int(rng.integers(1, 4))
        first = x.reshape(-1)[0].astype(jnp.float32)
        return [
            lambda: lax.cond(first > 0.1, g, lambda x: -x, x), lambda: lax.fori_loop(0, turns, lambda _, z: g(z), x),
            lambda: lax.while_loop(lambda c: (c[0] < 3) & (abs(c[1].reshape(-1)[0].astype(jnp.float32)) < 1.5), lambda c: (c[0] + 1, g(c[1])), (0, x))[1]
            if not self.differentiated else g(x),
            lambda: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, g(c[1])), (0, x))[1] if not self.differentiated else g(x),
            lambda: lax.scan(lambda c, w: (g(c) * w, c.reshape(-1)[0]), x, jnp.linspace(0.5, 1, turns).astype(x.dtype))[0],
            lambda: jax.jit(g, inline=False)(x), lambda: g(x) if self.forwards else _doubled(x), lambda: jax.checkpoint(g)(x),
            lambda: lax.switch(jnp.floor(abs(first)).astype(jnp.int32), [g, lambda x: x * 0.5, jnp.sin], x),
            lambda: lax.map(lambda r: r * 0.5 + jnp.sin(r), x),
        ][rng.integers(10)]()  # fmt: skip

    differentiated = forwards = False  # in reverse, which a while loop has not; forwards, which a custom_vjp has not

    def refuse(self, rng, y):
        flat = y.reshape(-1)
        y32 = flat.astype(jnp.float32) if flat.dtype.itemsize < 4 else flat
        A = jnp.eye(3, dtype=y32.dtype) * 2 + 0.1 * jnp.sum(y32)
        B = jnp.outer(y32[:9], y32[:9])
        return [lambda: jnp.sort(flat), lambda: jnp.cumsum(flat), lambda: jnp.linalg.solve(A, jnp.ones(3, y32.dtype)), lambda: B @ B,
                lambda: jax.random.uniform(jax.random.key(0), (3,), y32.dtype), lambda: flat.at[jnp.array([0, 0])].add(0.5),
                lambda: jnp.fft.fft(y32.astype(jnp.float32)).real, lambda: lax.top_k(y32, 1)[0]][rng.integers(8)]()  # fmt: skip


# A function lowered as a march is.
class Program:
    """A traced function, compared by identity."""

    def __init__(self, jaxpr) -> None:
        self.jaxpr, self.out_avals = jaxpr, jaxpr.out_avals


one_p = jax.extend.core.Primitive("fuzzed")
one_p.multiple_results = True
one_p.def_abstract_eval(lambda *_, program: program.out_avals)


def _lowered(ctx, *operands, program):
    CONTEXT.append(ctx)
    if whole.can_be_whole(ctx, program.jaxpr):
        return whole.lower_whole(ctx, program.jaxpr, operands)
    return whole.mlir.lower_fun(jax.extend.core.jaxpr_as_fun(program.jaxpr), multiple_results=True)(ctx, *operands)


whole.mlir.register_lowering(one_p, _lowered)
CONTEXT: list = []  # of a lowering


def _taken(program):
    """Whether this program is one function."""
    if not CONTEXT:
        jax.jit(lambda: one_p.bind(program=Program(jax.make_jaxpr(lambda: 1.0)()))).lower()
    return whole.can_be_whole(CONTEXT[0], program.jaxpr)


HANDED_OVER = r'outer_dimension_partitions":\[|kind=kCustom|kind=kInput|custom_call_target="|\bsort\(|\bscatter\(|\bfft\('


def function(rng):
    """A random function, its derivative or its rows, of random arrays."""
    dtype = jnp.dtype(rng.choice(["float32", "float64", "bfloat16", "float16"], p=[0.38, 0.47, 0.1, 0.05]))
    large = rng.random() < 0.12
    n = int(rng.choice(LARGE if large else SMALL))
    shape = (n,) if rng.random() < 0.75 or large else (int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 2, 3, 5, 16])))
    field = Field(int(rng.integers(2**31)), int(rng.integers(2, 5 if large else 9)), rng.random() < 0.04)
    mode = rng.choice(
        ["plain", "scan", "while", "grad", "jvp", "rows", "rows grad", "root"], p=[0.2, 0.15, 0.15, 0.2, 0.1, 0.08, 0.07, 0.05]
    )
    field.differentiated, field.forwards = mode in ("grad", "rows grad"), mode == "jvp"
    make = lambda seed: [np.random.default_rng(seed).uniform(-1, 1, s).astype(d)
                         for s, d in ((shape if "rows" not in mode else (rows, *shape), dtype), ((int(extra),), dtype if rng_mixed else jnp.float32))]  # fmt: skip
    rows, extra, rng_mixed = int(rng.choice([1, 2, 5, 10, 33])), rng.choice(SMALL), rng.random() < 0.7
    g = lambda x, a: field(jnp.asarray(0.3, jnp.float32), x, (a,))
    total = lambda x, a: jnp.sum(g(x, a).astype(jnp.promote_types(dtype, jnp.float32)))
    forms = {
        "plain": g,
        "scan": lambda x, a: lax.scan(lambda c, _: (g(c, a), c), x, None, length=3),
        "while": lambda x, a: lax.while_loop(
            lambda c: c[0] < 2.5 + a[0].astype(jnp.float32), lambda c: (c[0] + 1, g(c[1], a)), (jnp.float32(0), x)
        ),
        "root": lambda x, a: lax.while_loop(lambda c: abs(c.reshape(-1)[0]) < 0, lambda c: g(c, a), x),
        "grad": jax.grad(total, (0, 1)),
        "jvp": lambda x, a: jax.jvp(g, (x, a), (jnp.ones_like(x), jnp.sin(a))),
        "rows": jax.vmap(g, (0, None)),
        "rows grad": jax.vmap(jax.grad(total), (0, None)),
    }
    return forms[str(mode)], make, f"{mode} {dtype} {shape}"


def run_functions(seeds):
    """Several in one program, which is compiled sooner than each."""
    drawn = [function(np.random.default_rng(seed)) for seed in seeds]
    numbers = [make(seed) for seed, (_, make, _) in zip(seeds, drawn, strict=True)]
    programs = [Program(jax.make_jaxpr(f)(*args)) for (f, _, _), args in zip(drawn, numbers, strict=True)]
    taken = [_taken(p) for p in programs]
    found = {"programs": len(seeds), "taken": sum(taken), "words": [words for _, _, words in drawn]}
    kept = [
        (p, make, args, seed) for p, (_, make, _), args, seed, t in zip(programs, drawn, numbers, seeds, taken, strict=True) if t
    ]
    if not kept:
        return found
    every = [args for _, _, args, _ in kept]
    one = (
        jax.jit(lambda every: [one_p.bind(*xs, program=p) for (p, *_), xs in zip(kept, every, strict=True)]).lower(every).compile()
    )
    handed = sorted(set(re.findall(HANDED_OVER, one.as_text())))
    if handed:
        return {**found, "handed over": handed}
    print(json.dumps({"plain": True}), flush=True)
    plain = [jax.extend.core.jaxpr_as_fun(p.jaxpr) for p, *_ in kept]
    plain = jax.jit(lambda every: [f(*xs) for f, xs in zip(plain, every, strict=True)]).lower(every)
    makes = lambda draw: [make(seed + draw) for _, make, _, seed in kept]
    coarse = [_coarsest(p.jaxpr) for p, *_ in kept for _ in p.out_avals]
    return {**found, **compared(one, plain, makes, coarse)}


def _coarsest(jaxpr):
    """The rounding of the coarsest of the operands, float32 at most: what follows from them has no less."""
    dtypes = [x.dtype for x in (*jaxpr.in_avals, *jaxpr.consts)]
    return max((float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact)), default=0.0)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compared(one, plain, make, coarse):
    """Whether results differ from those of the program without, compiled quickly and, where they do, as JAX compiles it: that may
    join a product and a sum to one operation, and 0 is then a rounding.
    """
    return _compared(one, plain.compile(QUICK), make, coarse) and _compared(one, plain.compile(), make, coarse)


def _compared(one, plain, make, coarse):
    """Whether they differ, for three draws of the numbers, by more than the results without for numbers an ulp or two away do.

    A rounding may tip a comparison or a floor: for one draw, not for three.
    """
    numbers = lambda x: [np.asarray(y) for y in x]
    worst = None
    for draw in range(3):
        args = make(draw)
        rng = np.random.default_rng(draw)
        got, want = jax.tree.leaves(one(args)), jax.tree.leaves(plain(args))
        nudged = [jax.tree.leaves(plain(jax.tree.map(partial(_nudged, rng), args))) for _ in range(3)]
        apart = np.array(
            [_apart(*map(np.asarray, x[:2]), numbers(x[3:]), x[2]) for x in zip(got, want, coarse, *nudged, strict=True)]
        )
        worst = apart if worst is None else np.minimum(worst, apart)
        if (worst <= 1).all():
            return {}
    return {"difference": float(worst.max())}


def _nudged(rng, x):
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return x * (1 + rng.choice([-2, -1, 1, 2], x.shape).astype(x.dtype) * x.dtype.type(jnp.finfo(x.dtype).eps))


def _apart(got, want, nudged, coarse):
    if not np.issubdtype(want.dtype, np.inexact) and want.dtype.name not in ("bfloat16", "float16"):
        return 0.0 if np.array_equal(got, want) else 2.0
    eps = {2: 2**-7, 4: 2**-23, 8: 2**-52 if want.dtype.kind != "c" else 2**-23, 16: 2**-52}[want.dtype.itemsize]
    eps = max(eps, min(coarse, 2**-23))
    wide = np.complex128 if want.dtype.kind == "c" else np.float64
    got, want, *nudged = (np.asarray(x).astype(wide) for x in (got, want, *nudged))
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return 2.0
    ok = np.isfinite(want)
    scale = max(1.0, float(np.max(abs(want[ok]), initial=0.0)))
    spread = max((float(np.max(abs(n[ok] - want[ok]), initial=0.0)) for n in nudged), default=0.0)
    off = float(np.max(abs(got[ok] - want[ok]), initial=0.0))
    return off / (200 * spread + 5000 * eps * scale)


METHODS = ["euler", "midpoint", "heun", "ralston", "bosh3", "rk4", "dopri5", "tsit5", "dopri8"]


def problem(rng):
    """A solve of a random field as a function of arrays."""
    dtypes = [jnp.dtype(d) for d in (["float64"], ["float32"], ["float64", "float32"])[rng.integers(3)]]
    n = int(rng.choice(STATES))
    field = Field(int(rng.integers(2**31)), int(rng.integers(2, 7)), rng.random() < 0.04)
    field.differentiated = True
    kind = rng.choice(["fixed", "traced", "adaptive", "stiff", "reversible"], p=[0.35, 0.1, 0.35, 0.08, 0.12])
    tableau = getattr(jode, str(rng.choice(METHODS)))
    steps = int(rng.integers(1, 6))
    if kind == "adaptive":
        tableau = getattr(jode, str(rng.choice(["bosh3", "dopri5", "tsit5", "dopri8"])))
    solvers = {
        "fixed": lambda k: jode.Fixed(tableau, steps),
        "traced": lambda k: jode.Fixed(tableau, k, max_steps=8),
        "adaptive": lambda k: jode.Adaptive(tableau, 1e-3, 1e-3, max_steps=4096 if steps > 3 else 20),
        "stiff": lambda k: jode.Adaptive([jode.rodas5p, jode.rosenbrock23][steps % 2], 1e-2, 1e-2, max_steps=20),
        "reversible": lambda k: jode.Fixed([jode.reversible_heun, jode.leapfrog][steps % 2], steps),
    }
    if kind == "stiff":
        n = min(n, 4)
    adjoint = [jode.Backprop(), jode.Backprop(checkpoints=3), jode.Backprop(checkpoints=None), jode.MemoryFree(), jode.Backsolve()][
        rng.integers(5)
    ]
    rows = None if rng.random() < 0.7 else int(rng.choice([1, 2, 5, 10, 33]))
    mode = str(rng.choice(["solve", "jvp", "grad", "hvp", "jacfwd"], p=[0.25, 0.15, 0.35, 0.15, 0.1]))
    field.forwards = mode in ("jvp", "hvp", "jacfwd") or kind == "stiff"
    saves = np.linspace(0.0, 0.6, int(rng.integers(2, 6)))
    observe = (
        [None, None, None, None, jode.Steps(16), jode.At([0.1, 0.3], lambda t, y, a: y)][rng.integers(6)]
        if kind != "traced"
        else None
    )
    extra, closed = int(rng.choice(SMALL)), jnp.asarray(rng.uniform(-1, 1, 3), dtypes[0])

    def f(t, y, a):
        ys, form = jax.tree.flatten(y)
        return jax.tree.unflatten(form, [field(t, x, (a, closed, *(z.astype(x.dtype) for z in ys))) for x in ys])

    def one(y, a, k):
        sol = jode.solve(f, y, saves, a, solver=solvers[str(kind)](k), adjoint=adjoint, observe=observe)
        return [jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((sol.ys, sol.observed)) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def total(y, a, k):
        parts = one(y, a, k) if rows is None else jax.vmap(one, (0, None, None))(y, a, k)
        return sum(jnp.sum(x).astype(jnp.float64) for x in parts)

    ones = partial(jax.tree.map, jnp.ones_like)
    forms = {
        "solve": total,
        "jvp": lambda y, a, k: jax.jvp(lambda y, a: total(y, a, k), (y, a), (ones(y), ones(a))),
        "grad": jax.grad(total, (0, 1)),
        "hvp": lambda y, a, k: jax.jvp(lambda a: jax.grad(total, 1)(y, a, k), (a,), (ones(a),)),
        "jacfwd": lambda y, a, k: jax.jacfwd(lambda a: total(y, a, k))(a),
    }

    def make(seed):
        draw = np.random.default_rng(seed)
        size = (n,) if rows is None else (rows, n)
        y = [jnp.asarray(draw.uniform(-1, 1, size), d) for d in dtypes]
        return [*y, jnp.asarray(draw.uniform(-1, 1, extra), dtypes[0]), jnp.asarray(min(steps, 4), jnp.int32)]

    g = lambda xs: jax.tree.leaves(forms[mode](list(xs[:-2]), xs[-2], xs[-1]))
    words = f"{mode} of {solvers[str(kind)](1)}, {adjoint}, n={n}, rows={rows}, {[str(d) for d in dtypes]}, {observe}"
    return g, make, words


def run_problem(seed):
    g, make, words = problem(np.random.default_rng(seed))
    args, programs = make(seed), []
    asked = primitives.can_be_whole

    def spied(ctx, staged):
        programs.append(asked(ctx, staged))
        return programs[-1]

    primitives.can_be_whole = spied
    try:
        config.one_function = "auto"
        try:
            lowered = jax.jit(g).lower(args)
        except (ValueError, TypeError) as e:
            if "jode" in str(e.__traceback__) or programs == []:
                return {"programs": 0, "taken": 0, "refused": str(e)[:200], "words": words}
            raise
        one = lowered.compile()
        found = {"programs": len(programs), "taken": sum(programs), "words": words}
        if not any(programs):
            return found
        print(json.dumps({"plain": True}), flush=True)
        config.one_function = "never"
        plain = jax.jit(g).lower(args)
    finally:
        primitives.can_be_whole = asked
        config.one_function = "auto"
    coarse = max(float(jnp.finfo(x.dtype).eps) for x in args[:-1])
    return {**found, **compared(one, plain, lambda draw: make(seed + draw), [coarse] * len(jax.tree.leaves(plain.out_info)))}


def worker(seed, first, last, solves, size):
    """Programs one after the other, functions in groups of `size`; each group is announced, and what came of it."""
    jax.config.update("jax_enable_x64", True)
    i = first
    while i < last:
        number = lambda i: seed * 1_000_003 + i
        solve = [np.random.default_rng(number(j)).random() < solves for j in range(i, min(i + size, last))]
        n = 1 if solve[0] else ([*solve, True]).index(True)
        print(json.dumps({"begin": i, "next": i + n}), flush=True)
        try:
            found = run_problem(number(i)) if solve[0] else run_functions([number(j) for j in range(i, i + n)])
        except Exception as e:  # what a compiler says is what is looked for
            found = {"programs": n, "taken": n, "failure": f"{type(e).__name__}: {str(e)[:1500]}"}
        print(json.dumps({"end": i, "next": i + n, **found}), flush=True)
        i += n


TROUBLE = ("failure", "handed over", "difference", "abort")


def search(seed, minutes, programs, solves, first=0):
    """Run workers until the time or the programs are over; what was found. A group in which something was is run one by one."""
    count, found, start, i, singly = Counter(), [], time.monotonic(), first, 0
    over = lambda: time.monotonic() - start > 60 * minutes or count["programs"] >= programs
    told = start
    while not over():
        last, size = (singly, 1) if i < singly else (i + RECYCLED, GROUP)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", "--seed", str(seed), "--first", str(i), "--last", str(last)]
        command += ["--solves", str(solves), "--size", str(size)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        begun, without = None, False
        for line in child.stdout:
            said = json.loads(line)
            if "begin" in said:
                begun, without = (said["begin"], said["next"]), False
                continue
            if "plain" in said:
                without = True
                continue
            begun = None
            if any(x in said for x in TROUBLE) and said["next"] > said["end"] + 1:
                i, singly = said["end"], said["next"]
                child.kill()
                break
            i = said["next"]
            count.update(programs=said["programs"], taken=said["taken"], refused="refused" in said)
            for what in TROUBLE:
                if what in said:
                    count[what] += 1
                    found.append([what, said["end"], said.get("words"), said[what]])
                    print("FOUND", *found[-1], flush=True)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{told - start:.0f} s, next {i}", dict(count), flush=True)
            if over():
                child.kill()
                break
        child.wait()
        if begun is not None and not over():
            i, singly = begun[0], begun[1]
            if begun[1] == begun[0] + 1:
                i = begun[1]
                if without:  # XLA makes one function of small loops by itself, and some versions fail
                    count["abort of JAX alone"] += 1
                    continue
                count.update(programs=1, abort=1)
                found.append(["abort", begun[0], None, child.returncode])
                print("FOUND", *found[-1], flush=True)
    return count, found


def report(logs):
    """Add up the closing lines of runs, by version of JAX, and write the table."""
    sums = {}
    for log in logs:
        for line in Path(log).read_text().splitlines():
            if said := re.match(r"jax (\S+), seed (\S+): (.*)", line):
                counts = {what: int(n) for n, what in re.findall(r"(\d+) ([^,]+)", said[3])}
                sums.setdefault(said[1], Counter()).update(counts)
    columns = list(dict.fromkeys(what for counts in sums.values() for what in counts))
    title = "Random programs, with and without one function (`python -m benchmarks.fuzz`)"
    measure.report("fuzz", title, ["jax", *columns], [[v, *(counts[c] for c in columns)] for v, counts in sums.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", nargs="+", metavar="LOG", help="add up what runs printed, to benchmarks/results/fuzz.md")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--programs", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first program")
    parser.add_argument("--solves", type=float, default=0.025, help="the part that are solves")
    parser.add_argument("--only", type=int, help="run this program alone, here")
    for hidden in ("--last", "--size"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.report:
        report(given.report)
        return
    if given.worker:
        worker(given.seed, given.first, given.last, given.solves, given.size)
        return
    if given.only is not None:
        worker(given.seed, given.only, given.only + 1, given.solves, 1)
        return
    count, found = search(given.seed, given.minutes, given.programs, given.solves, given.first)
    print(f"jax {jax.__version__}, seed {given.seed}: {count['programs']} programs, {count['taken']} of them one function, "
          f"{count['abort']} aborts, {count['failure']} compile errors, {count['handed over']} handed over, {count['difference']} differences")  # fmt: skip
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
