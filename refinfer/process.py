"""What this process may use of the machine, and what it has used.

Knows: the operating system's counters. Does not know: models, benches.
Spec: GEN-10, CLI-2. Tutorial: 00.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["format_nbytes", "peak_rss_bytes", "usable_cores"]


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
