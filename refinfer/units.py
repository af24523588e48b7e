"""Sizes as people write and read them.

Leaves to others: everything that has a size.
Read more: tutorial 00; clauses UNIT-1, UNIT-2.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["format_nbytes", "parse_nbytes"]

_UNITS: Final = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST_BYTES: Final = 2.0**63


def format_nbytes(nbytes: float) -> str:
    """Return a number of bytes as people read it, in powers of ten.

    Examples:
        >>> format_nbytes(4_754_528), format_nbytes(12)
        ('4.8 MB', '12 bytes')
    """
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if nbytes >= 100 or unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


def parse_nbytes(text: str) -> int:
    """Return a size as people write it in bytes: `300MB` or `1.5GiB`.

    Raises:
        ValueError: it is not a size, it is below one byte, or it is 2^63 bytes or more.

    Examples:
        >>> parse_nbytes("1.5KiB"), parse_nbytes("300 MB")
        (1536, 300000000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 300MB or 1.5GiB")
    value = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= value < _MOST_BYTES:
        raise ValueError(f"must be at least one byte and less than 2^63, not {text!r}")
    return int(value)
