"""What a bench is to the command line: how it measures, and how a row of its result is shown.

Leaves to others: measuring (each bench defines its `BENCH` next to its code), tables and JSON (`cli.machine`).
Read more: tutorial 02; clauses BENCH-3, BENCH-13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["Bench", "Progress", "Row", "quartiles"]

Row: TypeAlias = dict[str, Any]
Progress: TypeAlias = Callable[[], None]
"""A function that is called after each step of a bench."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One bench.

    `summary` is a sentence for the list of benches. `title`, `columns` and `notes` make the table that people read: its
    first `keys` columns name a row, and the notes explain terms. `measure(progress, **flags)` returns the object that
    `--json` prints; its `rows` may come one by one. It calls `progress` `steps(**flags)` times. `flags` are the bench's
    own options, each with its help; all are off by default.
    """

    summary: str
    title: str
    steps: Callable[..., int]
    measure: Callable[..., dict[str, Any]]
    columns: Mapping[str, Callable[[Row], str]]
    keys: int = 1
    notes: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)


def quartiles(row: Row) -> str:
    """Show the quartiles of a row's ratios."""
    return " - ".join(f"{quartile:.2f}" for quartile in row["ratio_quartiles"])
