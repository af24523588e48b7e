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

__all__ = [
    "available_bytes",
    "cgroup_memory",
    "format_nbytes",
    "lines_of",
    "meminfo_bytes",
    "parse_nbytes",
    "peak_rss_bytes",
    "usable_cores",
]

_UNITS: Final = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST_BYTES: Final = 2.0**63
_NO_LIMIT_BYTES: Final = 1 << 60


def usable_cores() -> int:
    """Return how many cores this process may use, where the system tells; otherwise how many there are."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file of the system; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def meminfo_bytes(key: str) -> int | None:
    """Return an entry of `/proc/meminfo`; None where there is none."""
    for line in lines_of(Path("/proc/meminfo")):
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    return None


def cgroup_memory() -> dict[str, int | None] | None:
    """Return the version of control groups, and the memory limit that binds first, up the tree: least is left there.

    `memory_used_bytes` is what counts against it and cannot simply be dropped: without pages of files that were not
    used lately. None where there is no limit.
    """
    for line in lines_of(Path("/proc/self/cgroup")):
        if line.count(":") < 2:
            continue
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit, usage, version = Path("/sys/fs/cgroup"), "memory.max", "memory.current", 2
        elif "memory" in controllers.split(","):
            root, limit, version = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", 1
            usage = "memory.usage_in_bytes"
        else:
            continue
        leaf = root / path.lstrip("/")
        groups = [leaf, *(parent for parent in leaf.parents if parent == root or root in parent.parents)]
        found = [(lines[0], group) for group in groups if (lines := lines_of(group / limit))]
        if found:
            limits = [(int(text), group) for text, group in found if text != "max" and int(text) < _NO_LIMIT_BYTES]
            with_use = [(limit, _used(group, usage)) for limit, group in limits]
            least, used = min(with_use, key=lambda pair: pair[0] - (pair[1] or 0), default=(None, None))
            return {"version": version, "memory_limit_bytes": least, "memory_used_bytes": used}
    return None


def _used(group: Path, usage: str) -> int | None:
    lines = lines_of(group / usage)
    stat = dict(line.split(maxsplit=1) for line in lines_of(group / "memory.stat"))
    droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    return max(0, int(lines[0]) - droppable) if lines else None


def available_bytes() -> int | None:
    """Return how much memory this process may still take: what the system and its control group have left.

    None where the system does not tell.
    """
    left = [meminfo_bytes("MemAvailable")]
    group = cgroup_memory()
    if group and group["memory_limit_bytes"] is not None:
        left.append(max(0, group["memory_limit_bytes"] - (group["memory_used_bytes"] or 0)))
    return min((nbytes for nbytes in left if nbytes is not None), default=None)


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
