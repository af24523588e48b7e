"""The terminal: how many columns it has, and lines that are broken between words to fit them.

A name, or a number with its unit, is never broken: one that is longer than a line has a line of its own.
Leaves to others: what is printed, tables (`table`).
Read more: tutorial 00; clause CLI-20.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TextIO

__all__ = [
    "PIPE_COLUMNS",
    "columns_of",
    "display_width",
    "hanging",
    "native_code_unheard",
    "say",
    "say_terms",
    "terms",
    "words_of",
    "wrap",
]

PIPE_COLUMNS: Final = 120
"""How wide tables and charts may be in a pipe, unless `COLUMNS` is set."""

_USUAL_COLUMNS: Final = 80
_LONGEST_COUNT: Final = 4  # digits of `COLUMNS`
_LEAST_INDENT: Final = 4  # of a word that is too long for its place


def columns_of(stream: TextIO) -> int | None:
    """Return the number of columns of a stream: that in `COLUMNS`, or else the terminal's; None for a pipe."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and len(given) <= _LONGEST_COUNT and int(given):
        return int(given)
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL_COLUMNS
    except (OSError, ValueError):
        return _USUAL_COLUMNS


@contextlib.contextmanager
def native_code_unheard() -> Iterator[None]:
    """Drop what code in other languages writes to standard error: Rust reports an error there before it is raised."""
    try:
        shown_by, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no standard error
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(shown_by, 2)
        os.close(shown_by)
        os.close(nowhere)


def display_width(text: str) -> int:
    """Return how many columns a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def words_of(text: str) -> list[str]:
    """Return the words of a text; a number and what follows it are one.

    Examples:
        >>> words_of("packed 44 buffers, 4.8 MB, in 73 ms")
        ['packed', '44 buffers,', '4.8 MB,', 'in', '73 ms']
    """
    return re.split(r"(?<!\d) +", text.strip())


def wrap(words: Sequence[str], columns: int, first: str = "", then: str = "") -> list[str]:
    """Break a line between words; it begins with `first`, and the lines after it begin with `then`.

    A word that is too long for a line begins further to the left, and may go beyond the end.

    Examples:
        >>> wrap(["one", "two", "three"], 9, "- ", "  ")
        ['- one two', '  three']
    """
    lines, begun = [first], False
    for word in words:
        space = " " if begun else ""
        if display_width(lines[-1] + space + word) <= columns:
            lines[-1] += space + word
        elif begun or first.strip():
            lines[-1] = lines[-1].rstrip()
            lines.append(_shifted(then, word, columns))
        else:
            lines[-1] = _shifted(first, word, columns)
        begun = True
    return lines


def _shifted(indent: str, word: str, columns: int) -> str:
    room = columns - display_width(word)
    if room >= len(indent):
        return indent + word
    return indent[: min(_LEAST_INDENT, room) if room >= 0 else _LEAST_INDENT] + word


def say(words: str | Sequence[str], stream: TextIO | None = None) -> None:
    """Print a line; if the stream's columns are known, break it between words, and indent what follows.

    A sequence is broken between its elements only.
    """
    stream = stream or sys.stdout
    parts = words_of(words) if isinstance(words, str) else words
    columns = columns_of(stream)
    print(*([" ".join(parts)] if columns is None else wrap(parts, columns, then="  ")), sep="\n", file=stream)


def terms(explained: Mapping[str, str]) -> list[str]:
    """Return a line for each term: what it means begins at the same column."""
    longest = max(map(len, explained), default=0)
    return [f"{term:<{longest}}  {text}" for term, text in explained.items()]


def hanging(line: str, columns: int) -> list[str]:
    """Break a line between words; after a term and two spaces, what follows begins where its text begins.

    Examples:
        >>> hanging("read  with checksums, as always", 20)
        ['read  with', '      checksums, as', '      always']
    """
    match = re.match(r"\S+(?: \S+)*  +", line)
    first = match[0] if match else ""
    return wrap(words_of(line[len(first) :]), columns, first, " " * len(first))


def say_terms(explained: Mapping[str, str]) -> None:
    """Print terms and what they mean, within the columns that tables have."""
    for line in terms(explained):
        print(*hanging(line, columns_of(sys.stdout) or PIPE_COLUMNS), sep="\n")
