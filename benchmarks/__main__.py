"""All benchmarks of speed, a quick version of each: JSON, plots, and one Markdown table, under results/quick.

python -m benchmarks            # under ten minutes on two cores
python -m benchmarks NAME …     # these alone, in full, under results; the studies of networks too
"""

import importlib
import json
import sys
import time

from benchmarks.measure import RESULTS, machine

NAMES = (
    "adaptive_small",
    "adaptive_gradient",
    "derivatives",
    "fixed_step",
    "work_precision",
    "save_times",
    "dosing",
    "events",
    "stiff",
    "batch_scaling",
    "steps_scaling",
    "compile_time",
    "training",
    "gradient_memory",
    "reversible",
)
STUDIES = (  # what networks do; by name, minutes each
    "gradient_depth",
    "thousand_layers",
    "regularisation",
    "sphere2",
    "tolerance",
    "density_matching",
    "flow_matching",
    "density_samples",
    "fewer_evaluations",
    "spirals",
    "waves",
    "poisson",
)


def main(names):
    if unknown := set(names) - {*NAMES, *STUDIES}:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join((*NAMES, *STUDIES))}")
    quick = not names
    for name in names or NAMES:
        start = time.perf_counter()
        importlib.import_module(f"benchmarks.{name}").main(quick=quick)
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    if quick:
        summary()


def summary():
    """One table of everything: the question, the case, the solver, and what was measured."""
    folder = RESULTS / "quick"
    lines = ["| benchmark | case | solver | measured |", "|---|---|---|---|"]
    for name in NAMES:
        content = json.loads((folder / f"{name}.json").read_text())
        columns = content["columns"]
        at = columns.index("solver")
        for row in content["rows"]:
            case = ", ".join(f"{c} {v}" if isinstance(v, int) else str(v) for c, v in zip(columns[:at], row[:at], strict=True))
            found = "; ".join(f"{c} {v}" for c, v in zip(columns[at + 1 :], row[at + 1 :], strict=True) if v != "–")
            lines.append(f"| {name} | {case} | {row[at]} | {found} |")
    about = "; ".join(f"{k} {v}" for k, v in machine().items() if k != "versions")
    versions = ", ".join(f"{k} {v}" for k, v in machine()["versions"].items())
    (folder / "all.md").write_text(f"{about}; {versions}\n\n" + "\n".join(lines) + "\n")
    print(f"one table: {folder / 'all.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
