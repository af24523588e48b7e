"""`import refinfer`: which names it gives, where they come from, and that no module is imported before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import refinfer
from refinfer import errors


def names_for_type_checkers() -> dict[str, str]:
    """Return the names that the block `if TYPE_CHECKING` imports, each with its module."""
    tree = ast.parse(Path(refinfer.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        str(alias.asname): str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


@pytest.mark.spec("HOUSE-3")
def test_type_checkers_see_the_names_that_programs_get() -> None:
    assert names_for_type_checkers() == refinfer._HOME
    assert set(refinfer.__all__) == {*refinfer._HOME, "__version__"} == set(dir(refinfer))
    assert len(refinfer.__all__) == len(set(refinfer.__all__))


@pytest.mark.spec("HOUSE-3")
@pytest.mark.parametrize("name", refinfer._HOME)
def test_a_name_is_the_object_that_its_module_makes_public(name: str) -> None:
    module = import_module(refinfer._HOME[name])
    assert name in module.__all__
    assert getattr(refinfer, name) is getattr(module, name)


@pytest.mark.spec("ERR-1")
def test_the_front_door_has_every_public_error() -> None:
    assert set(errors.__all__) <= set(refinfer.__all__)


@pytest.mark.spec("HOUSE-3")
def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="refinfer has no 'nothing'"):
        _ = refinfer.nothing


@pytest.mark.spec("HOUSE-3")
def test_a_module_is_imported_when_its_name_is_first_used() -> None:
    code = (
        "import sys, refinfer\n"
        "print(sorted(name for name in sys.modules if name.startswith(('refinfer', 'numpy'))))\n"
        "refinfer.BudgetError\n"
        "print(sorted(name for name in sys.modules if name.startswith(('refinfer', 'numpy'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['refinfer']", "['refinfer', 'refinfer.errors']"]
