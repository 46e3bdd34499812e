"""How the benchmarks measure: contestants alternate in one process, medians are quoted, compile time is apart."""

from __future__ import annotations

import os

os.environ.setdefault("EQX_ON_ERROR", "nan")  # as diffrax's FAQ advises for speed; it must precede the import

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"


def compiled(f: Callable, *x: Any) -> tuple[Callable, float]:
    """f compiled for these arguments, and the seconds that tracing and compiling took: the median of three cold starts."""
    times = []
    for _ in range(3):
        jax.clear_caches()
        start = time.perf_counter()
        program = jax.jit(lambda *x: f(*x)).lower(*x).compile()
        times.append(time.perf_counter() - start)
    return program, float(np.median(times))


def race(contestants: dict[str, Callable], *x: Any, repeats: int = 7, seconds: float = 0.2) -> dict[str, float]:
    """Median seconds a call of each program, taken in turns; each turn repeats a fast call for about `seconds`."""
    loops = {}
    for name, f in contestants.items():
        jax.block_until_ready(f(*x))
        start = time.perf_counter()
        jax.block_until_ready(f(*x))
        loops[name] = max(1, int(seconds / repeats / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, f in contestants.items():
            start = time.perf_counter()
            for _ in range(loops[name]):
                out = f(*x)
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / loops[name])
    return {name: float(np.median(t)) for name, t in times.items()}


def report(name: str, title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table and write it, with machine and versions, to results/."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(str(x) for x in row)} |" for row in rows]
    print(f"\n{title}\n\n" + "\n".join(lines), flush=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0].device_kind),
        "versions": {p: version(p) for p in ("jax", "jaxlib", "diffrax", "equinox", "jode")},
    }
    RESULTS.mkdir(exist_ok=True)
    content = {"title": title, "machine": machine, "columns": columns, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    (RESULTS / f"{name}.md").write_text(f"{title}\n\n" + "\n".join(lines) + "\n")


def save(figure: Any, name: str) -> None:
    """Keep a figure beside the results."""
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    print(f"figure: {RESULTS / name}.png")
