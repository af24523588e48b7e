"""Cuts labs out of source text: finds their regions, blanks them, and puts other lines into them.

A region is what stands between two comments, with the first one's indentation: the body of a function, or one branch.

    def store(self, layer, keys, values):
        # lab 01: write the new positions after those that are filled
        start = self._length                                              -+
        ...                                                                |  the region
        return all_keys, all_values                                       -+
        # end lab

Works on text alone. Leaves to others: what a lab is about (`catalogue`), files (`workspace`).
Read more: tutorial 00; clauses LAB-1, LAB-2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import dedent, indent
from typing import Final

from refinfer.errors import LabError

__all__ = ["Region", "blank", "is_blank", "outside", "regions_of", "replaced"]

_BEGIN: Final = re.compile(r"( *)# lab (\d\d[a-z]?): (.+)")
_END: Final = re.compile(r" *# end lab")


@dataclass(frozen=True, slots=True)
class Region:
    """One region of a lab. `first` is the number of the line above it, and `end` that of its last line, from 1."""

    lab: str
    task: str
    first: int
    end: int
    margin: str
    text: str

    def with_margin(self, lines: str) -> str:
        """Return lines that begin at the left edge, moved to where the region is."""
        return indent(lines.rstrip() + "\n", self.margin)

    @property
    def lines(self) -> str:
        """The region moved to the left edge."""
        return dedent(self.text)


def regions_of(source: str) -> list[Region]:
    """Return the regions of a module, in their order.

    Raises:
        LabError: a comment that begins or ends a region stands alone.
    """
    found: list[Region] = []
    begun: tuple[int, re.Match[str]] | None = None
    lines = source.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if match := _BEGIN.fullmatch(line.rstrip()):
            if begun is not None:
                raise LabError(f"line {number} begins a lab within another one; the line `# end lab` is missing")
            begun = number, match
        elif _END.fullmatch(line.rstrip()):
            if begun is None:
                raise LabError(f"line {number} ends a lab that was not begun; the line `# lab ...` is missing")
            first, (margin, lab, task) = begun[0], begun[1].groups()
            found.append(Region(lab, task, first, number - 1, margin, "".join(lines[first : number - 1])))
            begun = None
    if begun is not None:
        raise LabError(f"the lab that begins in line {begun[0]} does not end; the line `# end lab` is missing")
    return found


def blank(region: Region) -> str:
    """Return what stands in a region that nobody has written yet."""
    task = region.task.replace('"', "'")
    return region.with_margin(f'raise NotImplementedError("lab {region.lab}: {task}")')


def is_blank(region: Region) -> bool:
    """Return whether a region is as `blank` left it, or has no code at all; comments count for nothing."""
    lines = [line.strip() for line in region.text.splitlines()]
    return [line for line in lines if line and line[0] != "#"] in ([], [blank(region).strip()])


def replaced(source: str, texts: Mapping[int, str]) -> str:
    """Return a module with other text in some of its regions, given by their place in the order.

    Raises:
        LabError: as `regions_of`.
    """
    lines = source.splitlines(keepends=True)
    for place, region in reversed(list(enumerate(regions_of(source)))):
        if place in texts:
            lines[region.first : region.end] = [texts[place]]
    return "".join(lines)


def outside(source: str) -> list[tuple[int, str]]:
    """Return the lines of a module that are in no region, each with its number; of markers, what they mark alone.

    Raises:
        LabError: as `regions_of`.
    """
    inside = {n for region in regions_of(source) for n in range(region.first + 1, region.end + 1)}
    return [(n, _marked(line)) for n, line in enumerate(source.splitlines(), start=1) if n not in inside]


def _marked(line: str) -> str:
    if match := _BEGIN.fullmatch(line.rstrip()):
        return f"# lab {match[2]}"
    return line.strip() if _END.fullmatch(line.rstrip()) else line
