"""What the README shows runs."""

import re
from pathlib import Path

import jax
import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def test_the_snippets_run():
    assert len(BLOCKS) == 2
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        space = {}
        for block in BLOCKS:
            exec(block, space)
    assert space["sol"].ys.shape == (50, 2)
    assert space["batch"].ys.shape == (1000, 50, 2)
    assert pytest.approx(float(space["jax"].numpy.sum(space["batch"].status))) == 0
