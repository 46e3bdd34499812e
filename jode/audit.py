"""What each adjoint costs and how wrong it is, on the user's own loss and model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jode.adjoint import Adjoint, Backprop
from jode.control import Adaptive, Fixed
from jode.field import spied
from jode.tree import is_inexact


@dataclass(frozen=True)
class Row:
    """One adjoint's gradient against the exact one.

    `cosine` and `error`, `‖g - g*‖² / ‖g*‖²`, are by leaf, under the leaf's path; memory is XLA's count of temporaries in bytes,
    time in seconds, NFE those of all rows together, `compile` the seconds of tracing and compiling.
    """

    adjoint: Any
    cosine: dict[str, float]
    error: dict[str, float]
    memory: int
    time: float
    compile: float
    nfe_forward: int
    nfe_backward: int


@dataclass(frozen=True)
class Audit:
    """A table with one row per adjoint; `str` makes it text."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ["adjoint", "worst cosine", "worst error", "memory", "time", "compile", "NFE forward", "NFE backward"]
        lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
        for r in self.rows:
            shown = [f"`{_shown(r.adjoint)}`", f"{_worst(r.cosine, min):.6f}", f"{_worst(r.error, max):.1e}"]
            shown += [f"{r.memory / 2**20:.2f} MiB", f"{r.time * 1e3:.2f} ms", f"{r.compile:.2f} s"]
            lines.append([*shown, f"{r.nfe_forward:,}", f"{r.nfe_backward:,}"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gradient(loss: Callable, adjoints: Sequence[Adjoint], *args: Any, exact: Adjoint = Backprop(), repeats: int = 5) -> Audit:
    """Compare adjoints by the gradient of loss(adjoint, *args) with respect to args[0].

    Args:
        loss: a pure function of an adjoint and the args to a real scalar, which hands the adjoint to its solves.
        adjoints: the values to compare, such as `jode.MemoryFree()`.
        args: the parameters (a pytree with floating leaves), then anything else.
        exact: the adjoint whose gradient is taken for true.
        repeats: timed calls; the median is reported.

    Returns:
        An `Audit`. Each adjoint is compiled three times: for its time and memory, and, with a counter in the vector field, for
        its evaluations forwards and in all.
    """
    true = _leaves(_gradient(loss, exact)(*args))
    rows = []
    for adjoint in adjoints:
        start = time.perf_counter()
        program = jax.jit(_gradient(loss, adjoint)).lower(*args).compile()
        compiling = time.perf_counter() - start
        found = _leaves(program(*args))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            times.append(time.perf_counter() - start)
        analysis: Any = program.memory_analysis()
        forward = _count(lambda *x, a=adjoint: loss(a, *x), args)
        total = _count(_gradient(loss, adjoint), args)
        cosine = {k: _cosine(g, true[k]) for k, g in found.items()}
        error = {k: float(np.sum(abs(g - true[k]) ** 2) / max(np.sum(abs(true[k]) ** 2), 1e-300)) for k, g in found.items()}
        rows.append(
            Row(adjoint, cosine, error, analysis.temp_size_in_bytes, float(np.median(times)), compiling, forward, total - forward)
        )
    return Audit(tuple(rows))


def _gradient(loss: Callable, adjoint: Adjoint) -> Callable:
    """The gradient of the loss with respect to the inexact leaves of its first argument, None elsewhere."""

    def gradient(params: Any, *rest: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        moving = [isinstance(x, (jax.Array, np.ndarray, float)) and is_inexact(jnp.asarray(x)) for x in leaves]

        def of(moved: list) -> Any:
            values = iter(moved)
            merged = [next(values) if m else x for x, m in zip(leaves, moving, strict=True)]
            return loss(adjoint, jax.tree.unflatten(treedef, merged), *rest)

        bars = iter(jax.grad(of)([jnp.asarray(x) for x, m in zip(leaves, moving, strict=True) if m]))
        return jax.tree.unflatten(treedef, [next(bars) if m else None for m in moving])

    return gradient


def _leaves(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path) or "params": np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _count(f: Callable, args: tuple) -> int:
    """How often the vector fields of the solves in f are evaluated, each row for itself."""
    calls = [0]

    def bump(_: Any) -> None:
        calls[0] += 1

    with spied(lambda y: jax.debug.callback(bump, jnp.ravel(jax.tree.leaves(y)[0])[:1])):
        jax.block_until_ready(jax.jit(lambda *x: f(*x))(*args))
    jax.effects_barrier()
    return calls[0]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.real(np.vdot(a, b)) / size) if size else float(not (a.any() or b.any()))


def _worst(values: dict[str, float], of: Callable) -> float:
    return float("nan") if any(np.isnan(x) for x in values.values()) else of(values.values(), default=float("nan"))


def _shown(x: Any) -> str:
    """The repr of a value, without the fields that have their defaults."""
    if not isinstance(x, (Adjoint, Fixed, Adaptive)):
        return repr(x)
    values = [(f, getattr(x, f.name)) for f in fields(x)]  # pyright: ignore[reportArgumentType]
    return f"{type(x).__name__}({', '.join(f'{f.name}={_shown(v)}' for f, v in values if v != f.default)})"
