"""What the README and the docs show runs."""

import re
import textwrap
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent


def blocks(page):
    found = re.findall(r"^ *```python\n(.*?)^ *```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def test_the_snippets_run():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        space = {}
        for block in blocks("README.md"):
            exec(block, space)
    assert space["sol"].ys.shape == (50, 2)
    assert space["batch"].ys.shape == (1000, 50, 2)
    assert pytest.approx(float(space["jax"].numpy.sum(space["batch"].status))) == 0


def test_the_page_on_adjoints_runs(capsys):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks("docs/adjoints.md"):
            exec(block, {})
    assert "MemoryFree()" in capsys.readouterr().out


def test_the_page_on_residual_networks_runs():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        space = {}
        for block in blocks("docs/depth.md"):
            exec(block, space)
    assert space["batch"].shape == (32, 4)


def test_the_page_on_validity_runs(capsys):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        space = {}
        for block in blocks("docs/validity.md"):
            exec(block, space)
    assert "verdict" in capsys.readouterr().out
    assert int(space["steps"]) >= 1
