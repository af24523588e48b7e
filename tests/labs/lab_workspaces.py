"""Workspaces for tests, and labs with tests of their own that take a moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from refinfer.labs.catalogue import Lab, lab_of
from refinfer.labs.workspace import Workspace

__all__ = ["KV_CACHE", "LAYERS", "quick_lab", "solved", "write"]

LAYERS = "refinfer/model/layers.py"
KV_CACHE = "refinfer/model/kv_cache.py"

_TESTS = """
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refinfer.model.layers import attention


def attend(value):
    out = np.zeros((1, 1, 1, 4), np.float32)
    ones = np.ones((1, 1, 1, 4), np.float32)
    attention(ones, ones.reshape(1, 1, 4, 1), ones * value, np.empty((1, 1, 1, 1), np.float32), None, out)
    return out


@pytest.mark.spec("MODEL-4")
def test_attention_to_one_position_gives_its_value():
    assert attend(3.0)[0, 0, 0, 0] == 3, "position 0: you give something else than its value"


@given(value=st.integers(1, 9))
def test_attention_gives_every_value(value):
    assert attend(float(value))[0, 0, 0, 0] == value, f"the value is not {value}"


def test_nothing_else_is_done():
    attend(1.0)
"""

_NAMES = (
    "test_attention_to_one_position_gives_its_value",
    "test_attention_gives_every_value",
    "test_nothing_else_is_done",
)


def quick_lab(folder: Path) -> tuple[Lab, Path]:
    """Return lab 01 with three quick tests instead of its own, and the folder that has them."""
    tests = folder / "quick-tests"
    tests.mkdir(exist_ok=True)
    (tests / "conftest.py").touch()
    (tests / "test_quick.py").write_text(_TESTS)
    return replace(lab_of("1"), tests=tuple(f"tests/test_quick.py::{name}" for name in _NAMES)), tests


def solved(folder: Path) -> Workspace:
    """Return a workspace in which nothing is blank: the open lab has our solution."""
    workspace = Workspace.start(folder / "workspace", [lab_of("1")])
    workspace.solve(lab_of("1"))
    return workspace


def write(workspace: Workspace, module: str, was: str, now: str) -> None:
    """Change one place of a module, as a student with an editor does."""
    source = workspace.source(module)
    assert was in source
    (workspace.folder / module).write_text(source.replace(was, now, 1))
