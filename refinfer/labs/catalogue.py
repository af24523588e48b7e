"""What each lab is about: its title, minutes, page, clauses, tests, hints, and what its solution shows.

The labs are data, a file `exercises/NN.toml` for each; where they are in the code is marked there (`regions`).
Leaves to others: workspaces, checking.
Read more: tutorial 00; clauses LAB-3, LAB-4.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from refinfer.errors import LabError
from refinfer.labs.regions import Region, regions_of

__all__ = ["PACKAGE", "Lab", "Place", "course", "lab_of", "labs", "places"]

PACKAGE: Final = Path(__file__).parents[1]
"""The folder of the package that is running: the reference that labs are cut from."""

_EXERCISES: Final = Path(__file__).parent / "exercises"


@dataclass(frozen=True, slots=True)
class Place:
    """A region of the reference: `module` as `refinfer/model/layers.py`, `order` among all regions of that module."""

    module: str
    order: int
    region: Region


@dataclass(frozen=True, slots=True)
class Lab:
    """One lab; `number` is two digits, with a letter if it is optional.

    `minutes` is how long it takes most people, `page` the number of its tutorial, `think` what to think about first.
    `tests` names functions as pytest does, in the order in which a student should meet them. `shows` is what there is
    to see in the solution. `spoilers` are places in the package that give it away.
    """

    number: str
    title: str
    minutes: int
    page: str
    think: str
    clauses: tuple[str, ...]
    tests: tuple[str, ...]
    hints: tuple[str, ...]
    shows: str
    spoilers: tuple[str, ...] = ()

    @property
    def is_optional(self) -> bool:
        """Whether the course goes on without it."""
        return not self.number.isdecimal()

    @property
    def places(self) -> tuple[Place, ...]:
        """Where its regions are."""
        return tuple(place for place in places() if place.region.lab == self.number)


@cache
def labs() -> tuple[Lab, ...]:
    """Return all labs, in their order."""
    return tuple(_read(path) for path in sorted(_EXERCISES.glob("*.toml")))


def _read(path: Path) -> Lab:
    raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    return Lab(number=path.stem, **fields)


def lab_of(number: str) -> Lab:
    """Return the lab with a number such as `4`, `04` or `10b`.

    Raises:
        LabError: no lab has that number.
    """
    wanted = number.strip().lower().lstrip("0")
    for lab in labs():
        if lab.number.lstrip("0") == wanted:
            return lab
    raise LabError(f"there is no lab {number!r}; the labs are {', '.join(lab.number for lab in labs())}")


@cache
def places() -> tuple[Place, ...]:
    """Return every region of the package, module by module."""
    found: list[Place] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if "# lab " in (source := path.read_text(encoding="utf-8")) and PACKAGE / "labs" not in path.parents:
            module = path.relative_to(PACKAGE.parent).as_posix()
            found += [Place(module, order, region) for order, region in enumerate(regions_of(source))]
    return tuple(found)


def course() -> Path:
    """Return the folder that has the tests of the labs, and the specification.

    An installed package carries them; in a clone they are next to the package.

    Raises:
        LabError: they are not there.
    """
    for folder in (PACKAGE / "labs" / "course", PACKAGE.parent):
        if (folder / "tests" / "conftest.py").is_file() and (folder / "docs" / "spec.md").is_file():
            return folder
    raise LabError("the tests of the labs are missing; install refinfer from a wheel, or in place from a clone")
