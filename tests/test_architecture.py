"""Imports point one way, and nobody reaches into another library's private rooms."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jode"
ROOMS = [
    "config",
    "tree",
    "tuning",
    "tableau",
    "native",
    "rows",
    "runner",
    "window",
    "field",
    "method",
    "control",
    "observe",
    "turns",
    "march",
    "adjoint",
    "asked",
    "dependencies",
    "ivp",
    "depth",
    "validity",
    "audit",
    "compat",
    "regularize",
    "data",
    "data_series",
    "models",
    "train",
]
FILES = {p.relative_to(ROOT).with_suffix(""): p for p in ROOT.rglob("*.py")}
ALLOWED = {"models": {"jode"}}  # the examples' models use the front door, as users do
OPTIONAL = {"diffrax": {"bridge"}, "optax": {"train"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


@pytest.mark.parametrize("name", FILES, ids=str)
def test_imports_point_one_way(name):
    room = name.parts[0]
    if room == "__init__":
        return
    for module in imports(FILES[name]):
        parts = module.split(".")
        if parts[0] == "jode" and len(parts) > 1 and parts[1] != room and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) < ROOMS.index(room), f"{name} imports {module}"
        if module == "jode":
            assert "jode" in ALLOWED.get(room, set())
        if parts[0] in OPTIONAL:
            assert room in OPTIONAL[parts[0]]


@pytest.mark.parametrize("name", FILES, ids=str)
def test_public_names_only(name):
    for module in imports(FILES[name]):
        assert not re.search(r"(^|\.)_(?!_)", module), f"{name} imports {module}"
        assert not module.startswith("equinox.internal")


@pytest.mark.parametrize("name", FILES, ids=str)
def test_every_file_opens_with_its_job(name):
    text = FILES[name].read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 450
