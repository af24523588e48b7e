"""What this machine is and can do: the block at the head of every bench, and what `refinfer doctor` prints.

Knows: the operating system, the BLAS that numpy brought. Does not know: models.
Spec: BENCH-3. Tutorial: 00.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from refinfer.process import cgroup_memory, lines_of, meminfo_bytes, usable_cores

__all__ = ["describe_machine"]


def describe_machine(folder: Path) -> dict[str, Any]:
    """Return what matters for packing and offloading here; what cannot be found out is None.

    Args:
        folder: where model files would lie: its file system and direct I/O are what is looked at.
    """
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": meminfo_bytes("MemTotal"),
        "memory_available_bytes": meminfo_bytes("MemAvailable"),
        "cgroup": cgroup_memory(),
        "memlock_limit_bytes": _memlock_limit(),
        "page_bytes": mmap.PAGESIZE,
        "folder": {
            "path": str(folder),
            "file_system": _file_system(folder),
            "direct_io": _direct_io_works(folder),
            "read_ahead_kb": _read_ahead_kb(folder),
        },
        "blas": _blas(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _cpu_name() -> str:
    for line in lines_of(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memlock_limit() -> int | None:
    """Return how many bytes may be locked in memory; None for no limit, or where there is no such limit."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _mount_of(folder: Path) -> list[str] | None:
    """Return the fields of the deepest mount in /proc/self/mountinfo that holds `folder`."""
    real = folder.resolve()
    mounts = [line.split() for line in lines_of(Path("/proc/self/mountinfo"))]
    holding = [m for m in mounts if real == Path(m[4]) or Path(m[4]) in real.parents]
    return max(holding, key=lambda m: len(m[4]), default=None)


def _file_system(folder: Path) -> str | None:
    mount = _mount_of(folder)
    return mount[mount.index("-") + 1] if mount else None


def _read_ahead_kb(folder: Path) -> int | None:
    """Return how far the kernel reads ahead on the disk that holds `folder`."""
    mount = _mount_of(folder)
    lines = lines_of(Path("/sys/class/bdi") / mount[2] / "read_ahead_kb") if mount else []
    return int(lines[0]) if lines else None


def _direct_io_works(folder: Path) -> bool | None:
    """Try it: write a page and read it back with O_DIRECT into page-aligned memory; None if that cannot be tried."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return False
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file, mmap.mmap(-1, mmap.PAGESIZE) as page:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            descriptor = os.open(file.name, os.O_RDONLY | flag)
            try:
                return os.preadv(descriptor, [page], 0) == mmap.PAGESIZE
            finally:
                os.close(descriptor)
    except OSError as error:
        return False if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) else None


def _blas() -> list[Mapping[str, Any]]:
    return [
        {
            "name": info["internal_api"],
            "version": info.get("version"),
            "core": info.get("architecture"),
            "threads": info["num_threads"],
        }
        for info in threadpool_info()
        if info["user_api"] == "blas"
    ]
