"""Copies of the package in which some labs are blank and some are solved in another way."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refinfer.labs.catalogue import PACKAGE, Lab, Place, labs, places
from refinfer.labs.check import Verdict, run_tests
from refinfer.labs.regions import blank, replaced
from refinfer.labs.workspace import copy_package

__all__ = ["WRONG", "WrongSolution", "after", "failed_of", "reach_of", "tree", "verdict_of", "wrong_solutions"]

WRONG = Path(__file__).parent / "wrong"


def after(lab: Lab) -> list[str]:
    """Return the numbers of the labs after one."""
    return [each.number for each in labs() if each.number > lab.number]


def tree(folder: Path, *, blanks: Collection[str] = (), own: Mapping[Place, str] | None = None) -> None:
    """Copy the package into a folder with some labs blank, and with other text in some places."""
    copy_package(folder)
    own = own or {}
    for module in dict.fromkeys(place.module for place in places()):
        texts = {
            place.order: own[place] if place in own else blank(place.region)
            for place in places()
            if place.module == module and (place in own or place.region.lab in blanks)
        }
        (folder / module).write_text(replaced((PACKAGE.parent / module).read_text(), texts))


def verdict_of(
    folder: Path, lab: Lab, *, blanks: Collection[str] = (), own: Mapping[Place, str] | None = None
) -> Verdict:
    """Run a lab's tests on a tree."""
    tree(folder, blanks=blanks, own=own)
    return run_tests(folder, lab)


@dataclass(frozen=True)
class WrongSolution:
    """A solution that is wrong but plausible: the law that names it, why people write it, and its regions."""

    lab: Lab
    name: str
    law: str
    why: str
    own: Mapping[Place, str]


def wrong_solutions() -> list[WrongSolution]:
    """Return all of them, from `wrong/NN/*.toml`: `law`, `why`, and `regions`, in which an empty one means ours."""
    found = []
    for lab in labs():
        for path in sorted((WRONG / lab.number).glob("*.toml")):
            raw: dict[str, Any] = tomllib.loads(path.read_text())
            regions = raw["regions"]
            assert len(regions) == len(lab.places), f"{path}: {len(lab.places)} regions are wanted"
            pairs = zip(lab.places, regions, strict=True)
            own = {place: place.region.with_margin(text) for place, text in pairs if text.strip()}
            found.append(WrongSolution(lab, path.stem, raw["law"], raw["why"], own))
    return found


_PLUGIN = """
from pathlib import Path
from reach import Recorder

def pytest_configure(config):
    config.pluginmanager.register(Recorder(Path({module!r}), open({found!r}, "w")))
"""


def reach_of(folder: Path, module: str, files: Sequence[str]) -> dict[str, tuple[float, list[int]]]:
    """Return the lines of a module that each test of some files runs, in the package as it is."""
    tree(folder)
    found = folder / "reach.json"
    (folder / "reach_plugin.py").write_text(_PLUGIN.format(module=str(folder / module), found=str(found)))
    _run(folder, "-p", "reach_plugin", *files)
    reach: dict[str, tuple[float, list[int]]] = json.loads(found.read_text())
    return reach


def failed_of(folder: Path, lab: Lab, files: Sequence[str]) -> set[str]:
    """Return the tests of some files that fail while a lab is blank."""
    tree(folder, blanks=[lab.number])
    found = (re.match(r"(?:FAILED|ERROR) (.+?)(?: - .*)?$", line) for line in _run(folder, *files).splitlines())
    return {match[1] for match in found if match}


def _run(folder: Path, *argv: str) -> str:
    """Run the clone's tests with the package of a folder instead of the clone's own; return what pytest prints."""
    root = Path(__file__).parents[2]
    shutil.copytree(root / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "docs"):
        (folder / name).symlink_to(root / name)
    paths = [folder, folder / "tests" / "attack"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False).stdout
