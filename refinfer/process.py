"""What this process may use of the machine, and what it has used.

Knows: the operating system's counters. Does not know: models, benches.
Spec: GEN-10, CLI-2. Tutorial: 00.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

__all__ = ["format_nbytes", "parse_nbytes", "peak_rss_bytes", "usable_cores"]

_UNITS: Final = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST_BYTES: Final = 2.0**63


def usable_cores() -> int:
    """Return how many cores this process may use, where the system tells; otherwise how many there are."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def peak_rss_bytes() -> int | None:
    """Return the most memory this process has had resident at once; None where the system does not tell.

    On Linux from `VmHWM`: unlike `getrusage` it starts anew when a program is executed. The kernel counts pages in
    batches, so that it may be some hundred kilobytes off.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


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
        ValueError: it is none, below one byte or beyond 2^63.

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
