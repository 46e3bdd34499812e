"""How the benchmarks measure: contestants alternate in one process, medians are quoted, compile time is apart."""

from __future__ import annotations

import os

os.environ.setdefault("EQX_ON_ERROR", "nan")  # as diffrax's FAQ advises for speed; it must precede the import
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads of PyTorch do not spin through the next contestant's turn

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "diffrax", "equinox", "torch", "torchdiffeq", "torchode", "jode")


def compiled(f: Callable, *x: Any, quick: bool = False) -> tuple[Callable, float]:
    """f compiled for these arguments, and the seconds that tracing and compiling took: the median of three cold starts."""
    times = []
    for _ in range(1 if quick else 3):
        jax.clear_caches()
        start = time.perf_counter()
        program = jax.jit(lambda *x: f(*x)).lower(*x).compile()
        times.append(time.perf_counter() - start)
    return program, float(np.median(times))


def race(contestants: dict[str, Callable], *x: Any, repeats: int = 7, seconds: float = 0.2) -> dict[str, float]:
    """Median seconds a call of each program, taken in turns; each turn repeats a fast call for about `seconds` / `repeats`.

    Where one turn of all takes longer than `seconds`, there are only three turns.
    """
    loops, turn = {}, 0.0
    for name, f in contestants.items():
        jax.block_until_ready(f(*x))
        start = time.perf_counter()
        jax.block_until_ready(f(*x))
        once = time.perf_counter() - start
        loops[name], turn = max(1, int(seconds / repeats / max(once, 1e-7))), turn + once
    repeats = repeats if turn < seconds else 3
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, f in contestants.items():
            if loops[name] > 1:
                jax.block_until_ready(f(*x))  # untimed: caches and threads are this contestant's again
            start = time.perf_counter()
            for _ in range(loops[name]):
                out = f(*x)
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / loops[name])
    return {name: float(np.median(t)) for name, t in times.items()}


def best(times: dict[str, float], *names: str) -> float:
    """The least time of the contestants whose names begin so."""
    return min((t for name, t in times.items() if name.startswith(names)), default=float("nan"))


def exponent(sizes: Any, times: Any) -> float:
    """The slope of log time against log size."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def report(name: str, title: str, columns: list[str], rows: list[list[Any]], quick: bool = False) -> None:
    """Print a Markdown table and write it, with machine and versions, to results/, or results/quick/ for a quick run."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(str(x) for x in row)} |" for row in rows]
    print(f"\n{title}\n\n" + "\n".join(lines), flush=True)
    folder = RESULTS / "quick" if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "machine": machine(), "columns": columns, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    (folder / f"{name}.md").write_text(f"{title}\n\n" + "\n".join(lines) + "\n")


def machine() -> dict:
    """What a table was measured on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0].device_kind),
        "versions": versions,
    }


def save(figure: Any, name: str, quick: bool = False) -> None:
    """Keep a figure beside the results."""
    folder = RESULTS / "quick" if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120)
    print(f"figure: {folder / name}.png")
