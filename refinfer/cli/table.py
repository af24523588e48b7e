"""Tables that fit the terminal, or change their shape until they do.

Shapes are tried in this order, and each keeps every name and number in one piece:

    framed             as wide as its cells, or with headings and prose broken between words
    bare               without the frame
    several pieces     under each other; each begins with the columns that name a row
    row by row         the first cell, then a line for each of the others

Leaves to others: what is shown; lines of text (`terminal`).
Read more: tutorial 00; clause CLI-20.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from refinfer.cli.terminal import PIPE_COLUMNS, columns_of, display_width, say, words_of, wrap

__all__ = ["Cell", "print_table"]

Cell: TypeAlias = str | Path
"""A text; or a path, which is never broken, not even between its words."""

_NARROWEST_PROSE: Final = 20


def print_table(
    title: str | Sequence[str],
    names: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    keys: int = 1,
    prose: Collection[str] = (),
) -> None:
    """Print a table within the terminal's columns, or `PIPE_COLUMNS` in a pipe.

    Args:
        title: a line above it, or the parts of one that are not to be broken.
        names: the headings of the columns.
        rows: their cells.
        keys: how many of the first columns name a row, and are repeated if a table is cut into pieces; 0 if the table
            is not to be cut, but printed row by row.
        prose: the columns that may be broken between words.
    """
    say(title)
    width = columns_of(sys.stdout) or PIPE_COLUMNS
    columns = [_Column(name, tuple(row[i] for row in rows), name in prose) for i, name in enumerate(names)]
    pieces = _pieces(columns, keys, width)
    if pieces:
        framed = all(_widths(piece, width, framed=True) for piece in pieces)
        for piece in pieces:
            _print_piece(piece, width, framed=framed)
            if not framed:
                print()
    elif len(names) == 2:
        _print_items([(str(what), value) for what, value in rows], width)
    else:
        for row in rows:
            print(*wrap(columns[0].units(row[0]), width), sep="\n")
            _print_items(list(zip(names[1:], row[1:], strict=True)), width)


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    cells: tuple[Cell, ...]
    prose: bool

    def units(self, cell: Cell) -> list[str]:
        """Return the parts of a cell that must stay in one piece."""
        return words_of(cell) if self.prose and isinstance(cell, str) else [str(cell)]

    @property
    def most(self) -> int:
        """The width at which nothing is broken."""
        return max(display_width(str(text)) for text in (self.name, *self.cells))

    @property
    def least(self) -> int:
        """The smallest width at which names and numbers stay in one piece."""
        units = [*words_of(self.name), *(unit for cell in self.cells for unit in self.units(cell))]
        longest = max(map(display_width, units))
        return max(longest, min(self.most, _NARROWEST_PROSE)) if self.prose else longest


def _widths(columns: Sequence[_Column], width: int, *, framed: bool) -> list[int] | None:
    """Return how wide to make each column, or None if they do not fit."""
    most, widths = [column.most for column in columns], [column.least for column in columns]
    spare = width - sum(widths) - (3 * len(columns) + 1 if framed else 2 * (len(columns) - 1))
    for _ in range(spare):
        lacking = [wanted - given for wanted, given in zip(most, widths, strict=True)]
        widths[lacking.index(max(lacking))] += max(lacking) > 0
    return widths if spare >= 0 else None


def _fits(columns: Sequence[_Column], width: int) -> bool:
    return _widths(columns, width, framed=False) is not None


def _pieces(columns: Sequence[_Column], keys: int, width: int) -> list[list[_Column]]:
    """Return the columns of each piece: of one if everything fits, of none if the table cannot be cut to fit."""
    if _fits(columns, width):
        return [list(columns)]
    if not keys:
        return []
    n = len(columns) - keys
    few = _cut(columns, keys, n, width)
    even = next(cut for most in range(1, n + 1) if len(cut := _cut(columns, keys, most, width)) == len(few))
    return even if all(_fits(piece, width) for piece in even) else []


def _cut(columns: Sequence[_Column], keys: int, most: int, width: int) -> list[list[_Column]]:
    """Cut columns into pieces of at most `most` besides the keys."""
    pieces = [list(columns[:keys])]
    for column in columns[keys:]:
        begun = len(pieces[-1]) - keys
        if begun == most or (begun and not _fits([*pieces[-1], column], width)):
            pieces.append(list(columns[:keys]))
        pieces[-1].append(column)
    return pieces


def _print_piece(columns: Sequence[_Column], width: int, *, framed: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = _widths(columns, width, framed=framed)
    assert widths is not None
    table = Table(box=box.HEAVY_HEAD) if framed else Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    headings = [wrap(words_of(column.name), n) for column, n in zip(columns, widths, strict=True)]
    height = max(map(len, headings))
    for i, (column, heading, n) in enumerate(zip(columns, headings, widths, strict=True)):
        lines = [""] * (height - len(heading)) + heading + ([] if framed else ["─" * n])
        table.add_column(Text("\n".join(lines)), width=n, justify="left" if i == 0 or column.prose else "right")
    for cells in zip(*(column.cells for column in columns), strict=True):
        broken = (wrap(column.units(cell), n) for column, cell, n in zip(columns, cells, widths, strict=True))
        table.add_row(*(Text("\n".join(lines)) for lines in broken))
    Console(width=width).print(table)


def _print_items(items: Sequence[tuple[str, Cell]], width: int) -> None:
    longest = max((display_width(what) for what, _ in items), default=0)
    for what, value in items:
        first = f"  {what}{' ' * (longest - display_width(what))}  "
        units = words_of(value) if isinstance(value, str) else [str(value)]
        print(*wrap(units, width, first, " " * len(first)), sep="\n")
