"""What this machine is and can do: the block at the head of every bench, and what `refinfer doctor` prints.

Asks the operating system, and the BLAS that numpy uses. Leaves to others: models, how the facts are shown.
Read more: tutorial 00; clauses BENCH-3, CLI-7.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refinfer.blas_threads import blas_libraries
from refinfer.process import cgroup_memory, lines_of, meminfo_bytes, usable_cores

__all__ = ["describe_machine", "direct_io_works", "drops_pages", "file_system"]


def describe_machine(folder: Path) -> dict[str, Any]:
    """Return what matters for packing and offloading on this machine; a fact that cannot be found out is None.

    Args:
        folder: where model files would lie; its file system is described, and direct I/O is tried there.
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
            "file_system": file_system(folder),
            "direct_io": direct_io_works(folder),
            "read_ahead_kb": _read_ahead_kb(folder),
        },
        "blas": _blas(),
        "numpy": np.__version__,
        "python": platform.python_version() + ("" if _has_gil() else " without the GIL"),
        "system": f"{platform.system()} {platform.release()}",
    }


def _has_gil() -> bool:
    """Return whether one thread at a time runs Python code; free-threaded builds of Python 3.13 and later differ."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _cpu_name() -> str:
    for line in lines_of(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memlock_limit() -> int | None:
    """Return how many bytes may be locked in memory; None if there is no limit, or no such thing as a limit."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _mount_of(folder: Path) -> list[str] | None:
    """Return the fields of the mount that `folder` is on: the deepest of those in /proc/self/mountinfo."""
    real = folder.resolve()
    mounts = [line.split() for line in lines_of(Path("/proc/self/mountinfo"))]
    holding = [m for m in mounts if real == Path(m[4]) or Path(m[4]) in real.parents]
    return max(holding, key=lambda m: len(m[4]), default=None)


def file_system(folder: Path) -> str | None:
    """Return the kind of file system that a folder is on; None if the system does not report it."""
    mount = _mount_of(folder)
    return mount[mount.index("-") + 1] if mount else None


def _read_ahead_kb(folder: Path) -> int | None:
    """Return how far the kernel reads ahead on the disk of `folder`."""
    mount = _mount_of(folder)
    lines = lines_of(Path("/sys/class/bdi") / mount[2] / "read_ahead_kb") if mount else []
    return int(lines[0]) if lines else None


def direct_io_works(folder: Path) -> bool | None:
    """Write a page and read it back with O_DIRECT into page-aligned memory; return None if that cannot be tried."""
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


def drops_pages(folder: Path) -> bool | None:
    """Return whether the page cache drops a page that is on the disk when it is asked to; None if it cannot be tried.

    `RWF_NOWAIT` reads only what is in the page cache.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.preadv(file.fileno(), [bytearray(mmap.PAGESIZE)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except (AttributeError, OSError):
        return None
    return False


def _blas() -> list[Mapping[str, Any]]:
    return [
        {
            "name": info["internal_api"],
            "version": info.get("version"),
            "core": info.get("architecture"),
            "threads": info["num_threads"],
        }
        for info in blas_libraries()
    ]
