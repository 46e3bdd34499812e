"""What the README and the docs show runs, and the reference is complete."""

import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jode
import jode.depth
import jode.models.density
import jode.validity
from jode.method import Method

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
METHODS = [name for name in jode.__all__ if isinstance(getattr(jode, name), Method)]  # the ready-made ones


def blocks(page):
    found = re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))) if blocks(p)}


def run(page):
    """Run the blocks of a page one after the other, as a reader with JAX's defaults does; their names."""
    space = {}
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks(page):
            exec(block, space)
    return space


CLAIMS = {
    "README.md": lambda s, _: s["sol"].ys.shape == (50, 2) and s["batch"].ys.shape == (1000, 50, 2) and not s["batch"].status.any(),
    "docs/index.md": lambda s, _: (
        s["sol"].ys.shape == (50, 2) and s["batch"].ys.shape == (3, 50, 2) and not s["batch"].status.any()
    ),
    "docs/accuracy.md": lambda s, out: (
        "step_underflow" in out and "last good save time 0.25" in out and "nan" not in out.split("\n")[-2]
    ),
    "docs/adjoints.md": lambda _, out: "MemoryFree()" in out,
    "docs/densities.md": lambda s, _: abs(s["grid"].mass - 1) < 1e-3 and s["samples"].shape == (2, 2) and s["penalty"] > 0,
    "docs/depth.md": lambda s, _: s["batch"].shape == (32, 4),
    "docs/validity.md": lambda s, out: "Verdict: " in out and "differs" in out and int(s["steps"]) >= 1,
    "docs/series.md": lambda s, _: (
        s["curve"].shape == (41, 2)
        and s["losses"].shape == (5,)
        and bool(s["found"].integral > 0)
        and s["shots"].gaps.shape == (5, 2)
    ),
    "docs/events.md": lambda s, out: "5.0" in out and abs(s["landing"](5.0).t - 10 / 9.81) < 1e-4 and int(s["sol"].status) == 0,
    "docs/stiff.md": lambda s, out: (
        out.startswith("stiff\nsuccess") and bool(jnp.isfinite(s["gradient"])) and bool(jnp.isfinite(s["pattern"]).all())
    ),
    "docs/extend.md": lambda s, _: int(s["sol"].stats.steps) < 300 and abs(s["largest"](1.0) - 2.94) < 0.1,
    "docs/troubleshooting.md": lambda *_: jode.config.one_function == "auto",
    "docs/reference/methods.md": lambda s, _: s["kutta3"].order == 3,
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_runs(name, capsys):
    space = run(PAGES[name])
    assert name in CLAIMS, f"say in CLAIMS what {name} shows"
    assert CLAIMS[name](space, capsys.readouterr().out)


def test_the_table_of_methods_is_true():
    text = (DOCS / "reference/methods.md").read_text()
    rows = {line.split("`")[1]: [c.strip() for c in line.split("|")] for line in text.splitlines() if line.startswith("| `jode.")}
    assert set(rows) == {f"jode.{name}" for name in METHODS}
    for name in METHODS:
        method, (order, evaluations, estimate, interpolant) = getattr(jode, name), rows[f"jode.{name}"][2:6]
        assert int(order) == method.order
        assert int(evaluations) == method.evaluations == method.trials
        assert estimate == ("–" if method.embedded_order is None else str(method.embedded_order))
        assert int(interpolant) == (method.tableau.dense_order if hasattr(method, "tableau") else 2)


def test_every_status_has_a_remedy_in_the_docs():
    rows = [line.split("`")[1] for line in (DOCS / "accuracy.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == [status.name for status in jode.Status]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (jode, jode.__all__),
        (jode.depth, jode.depth.__all__),
        (jode.validity, jode.validity.__all__),
        (jode.models.density, jode.models.density.__all__),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_reference_names_everything_public(module, names):
    pages = "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md"))
    for name in names:
        shown = re.search(rf"^::: jode(\.\w+)*\.{name}$", pages, re.MULTILINE)
        assert shown or name in METHODS, f"{module.__name__}.{name} is missing from docs/reference"
