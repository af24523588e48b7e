"""What this process may use of the machine, and what it has used.

Reads the operating system's counters. Leaves to others: models, benches.
Read more: tutorial 00; clauses GEN-10, CLI-2, CLI-25.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = [
    "available_bytes",
    "cgroup_memory",
    "lines_of",
    "meminfo_bytes",
    "peak_rss_bytes",
    "umask",
    "usable_cores",
]

_NO_LIMIT_BYTES: Final = 1 << 60
_MEMORY_FILES: Final = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}


def usable_cores() -> int:
    """Return the number of cores that this process may use, or of all cores if the system does not report that.

    A control group that gives its processes the time of two and a half cores counts as two: more threads would be
    stopped halfway through a product.
    """
    cores = os.cpu_count() or 1
    with contextlib.suppress(AttributeError, OSError):
        cores = len(os.sched_getaffinity(0))
    return min(cores, max(1, int(min(_cgroup_quotas(), default=cores))))


def _cgroup_quotas() -> Iterator[float]:
    """Yield how many cores' time each limit on this process's control group and its parents allows."""
    for version, groups in _cgroups("cpu"):
        for group in groups:
            names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [word for name in names for line in lines_of(group / name) for word in line.split()]
            if len(words) == 2 and all(map(str.isdecimal, words)) and int(words[1]):  # no limit is "max" or -1
                yield int(words[0]) / int(words[1])


def _cgroups(controller: str) -> Iterator[tuple[int, list[Path]]]:
    """Yield the versions of control groups that may have this controller: this process's group and its parents."""
    for line in lines_of(Path("/proc/self/cgroup")):
        if line.count(":") < 2:
            continue
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, version = Path("/sys/fs/cgroup"), 2
        elif controller in controllers.split(","):
            root, version = Path("/sys/fs/cgroup") / controller, 1
        else:
            continue
        leaf = root / path.lstrip("/")
        yield version, [leaf, *(parent for parent in leaf.parents if parent == root or root in parent.parents)]


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file of the system, or an empty list if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def umask() -> int:
    """Return the mode bits that this process takes away from files that it makes."""
    for line in lines_of(Path("/proc/self/status")):
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    found = os.umask(0o077)  # it can only be read by setting it
    os.umask(found)
    return found


def meminfo_bytes(key: str) -> int | None:
    """Return an entry of `/proc/meminfo`, or None if the system has no such entry."""
    for line in lines_of(Path("/proc/meminfo")):
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    return None


def cgroup_memory() -> dict[str, int | None] | None:
    """Return the limit with the least headroom among this process's memory cgroup and its parents, and its version.

    `memory_used_bytes` is what counts against the limit and cannot simply be dropped: pages of files that were not
    used lately are left out. Returns None if there are no control groups.
    """
    for version, groups in _cgroups("memory"):
        limit, usage = _MEMORY_FILES[version]
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
    """Return the number of bytes that this process may still take, given what the system and control group have left.

    None if the system does not report it.
    """
    left = [meminfo_bytes("MemAvailable")]
    group = cgroup_memory()
    if group and group["memory_limit_bytes"] is not None:
        left.append(max(0, group["memory_limit_bytes"] - (group["memory_used_bytes"] or 0)))
    return min((nbytes for nbytes in left if nbytes is not None), default=None)


def peak_rss_bytes() -> int | None:
    """Return the most memory this process has had resident at once; None if the system does not report it.

    On Linux it is read from `VmHWM`, which, unlike `getrusage`, starts again when a program is executed. The kernel
    counts pages in batches, so it may be some hundred kilobytes off.
    """
    if sys.platform == "linux":
        for line in lines_of(Path("/proc/self/status")):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
