"""The rooms stay apart: who may import whom, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opd_jax"
LEAVES = {"errors", "config", "config_base", "config_train", "config_errors", "config_load"}
FLOORS = {
    "core": 0,
    "model": 1,
    "data": 1,
    "algo": 1,
    "sampling": 2,
    "teacher": 2,
    "train": 3,
    "evals": 3,
    "stages": 4,
    "fit": 4,
    "report": 4,
    "main": 5,
}
LEVEL_DOORS = {("stages", "report"), ("stages", "fit")}
"""Rooms of one floor that may look in: a stage is the glue that calls them."""
PUBLIC = {"sampling"}
"""Rooms that people import by themselves: their `__init__` names what is theirs to use."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(importer: str, target: str) -> bool:
    if target in LEAVES or importer == target or (importer, target) in LEVEL_DOORS:
        return True
    return importer not in LEAVES and FLOORS[target] < FLOORS[importer]


def test_the_rules_themselves():
    assert allowed("train", "sampling")
    assert allowed("core", "errors")
    assert not allowed("data", "model")
    assert not allowed("core", "data")
    assert not allowed("config", "core")
    assert not allowed("report", "stages")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    importer = room_of(path)
    for name in imported(path):
        if name.startswith("opd_jax.") and importer != "__init__":
            target = name.split(".")[1]
            assert target in FLOORS or target in LEAVES, f"{name}: no such room"
            assert allowed(importer, target), f"{path}: {importer} may not import {name}"


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in MODULES} - LEAVES - {"__init__"}
    assert rooms <= set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_imported_nowhere(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "tensorflow"}


def test_stages_meet_only_through_files():
    """`pipeline`, their table of contents, alone imports them."""
    stages = {"answer", "sft", "rollout", "score", "train", "evaluate", "export"}
    assert stages <= {path.stem for path in (PACKAGE / "stages").glob("*.py")}
    for path in (PACKAGE / "stages").glob("*.py"):
        if path.stem != "pipeline":
            met = {name.split(".")[2] for name in imported(path) if "opd_jax.stages." in name}
            assert not met & stages, f"{path}: stages may not import each other ({met & stages})"


def test_packages_hold_a_docstring_only():
    """Or, where they are for use by people, the names of their own modules to use."""
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = [ast.unparse(node).split(" = ")[0] for node in body[1:]]
        assert ast.get_docstring(ast.Module(body, [])), f"{path}: no docstring"
        if path.parent.name in PUBLIC:
            own = f"from opd_jax.{path.parent.name}."
            assert names.pop() == "__all__", path
            assert all(name.startswith(own) for name in names), path
            continue
        assert names == (["__version__"] if path.parent == PACKAGE else []), path
