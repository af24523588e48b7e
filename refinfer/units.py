"""Sizes and numbers as people write and read them, and long values as messages show them.

Leaves to others: everything that has a size.
Read more: tutorial 00; clauses UNIT-1 to UNIT-3, INPUT-3.
"""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Final

__all__ = [
    "format_nbytes",
    "is_number",
    "is_whole",
    "parse_integer",
    "parse_nbytes",
    "parse_number",
    "shortened",
    "shown",
]

_UNITS: Final = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST_BYTES: Final = 2.0**63
_MOST_SHOWN: Final = 80
# Python's own `int` and `float` also read the digits of other scripts, underscores, "nan" and "inf".
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,4000}")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Return whether a value is a whole number from `least` to `most`; numpy's count too, True and False do not.

    Examples:
        >>> is_whole(3, 1), is_whole(0, 1), is_whole(3.0, 1), is_whole("3", 1), is_whole(True, 1)
        (True, False, False, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_number(value: object) -> bool:
    """Return whether a value is a finite number; numpy's count too, True and False do not.

    Examples:
        >>> is_number(0.5), is_number(float("nan")), is_number("0.5"), is_number(True)
        (True, False, False, False)
    """
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def format_nbytes(nbytes: float) -> str:
    """Return a number of bytes as people read it, in powers of ten.

    Examples:
        >>> format_nbytes(4_754_528), format_nbytes(137_953_312_768), format_nbytes(12)
        ('4.8 MB', '138 GB', '12 bytes')
    """
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if nbytes < 999.5:  # above it, 1000 would be shown
            break
        nbytes, unit = nbytes / 1000, larger
    return f"{nbytes:.0f} {unit}" if nbytes >= 99.95 or unit == "bytes" else f"{nbytes:.1f} {unit}"


def parse_nbytes(text: str) -> int:
    """Return a size as people write it in bytes: `300MB` or `1.5GiB`.

    Raises:
        ValueError: it is not a size, it is below one byte, or it is 2^63 bytes or more.

    Examples:
        >>> parse_nbytes("1.5KiB"), parse_nbytes("300 MB")
        (1536, 300000000)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{shown(text)} is not a size such as 300MB or 1.5GiB")
    value = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= value < _MOST_BYTES:
        raise ValueError(f"must be at least one byte and less than 2^63, not {shown(text)}")
    return int(value)


def parse_integer(text: str) -> int:
    """Return a whole number, written with the digits 0 to 9 and perhaps a sign.

    Raises:
        ValueError: it is not such a number.

    Examples:
        >>> parse_integer(" -12 ")
        -12
    """
    if not _INTEGER.fullmatch(text.strip()):
        raise ValueError(f"{shown(text)} is not a whole number")
    return int(text)


def parse_number(text: str) -> float:
    """Return a number, written with the digits 0 to 9 and perhaps a sign, a point and an exponent.

    Raises:
        ValueError: it is not such a number.

    Examples:
        >>> parse_number("1.5e3")
        1500.0
    """
    if not _NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{shown(text)} is not a number")
    return float(text)


def shown(value: object, most: int = _MOST_SHOWN) -> str:
    """Return a value as a message repeats it: its `repr`, without the middle if it has more than `most` characters.

    Examples:
        >>> shown("short"), shown("x" * 100_000, 11)
        ("'short'", "'xxx...xxx'")
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists within lists within lists
        text = f"a value of type {type(value).__name__} that is too long to show"
    return shortened(text, most)


def shortened(text: str, most: int) -> str:
    """Return a text without the middle if it has more than `most` characters."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"
