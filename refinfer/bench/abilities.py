"""Which abilities that refinfer uses this machine has: a verdict for each, the reason, and what needs it.

Tries most of them out, in the folders in which they are needed. Leaves to others: facts (`machine`), how verdicts are
shown.
Read more: tutorial 00; clause CLI-22.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from refinfer.bench.arm import can_limit_memory
from refinfer.bench.machine import direct_io_works, drops_pages, file_system
from refinfer.errors import InputError
from refinfer.offload.calibration import calibration_file, known_calibration
from refinfer.process import available_bytes, lines_of
from refinfer.units import format_nbytes
from refinfer.weight_cache.directory import cache_directory
from refinfer.weight_cache.publish import Draft

__all__ = ["Ability", "abilities"]

_CAP_IPC_LOCK: Final = 1 << 14
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Ability:
    """An ability that a machine has or lacks.

    `needed_by` is the command or call that needs it, as it is typed; `without` says what that does if the ability is
    missing.
    """

    ability: str
    works: bool
    why: str
    needed_by: tuple[str, ...]
    without: str


def abilities(machine: Mapping[str, Any]) -> Iterator[Ability]:
    """Yield the verdicts on this machine, given its description by `describe_machine`."""
    yield from _of_the_cache_directory()
    yield from _of_memory(machine)
    yield from _of_the_bench()
    yield _threads(machine)
    yield _tokenizers()
    yield _measured_speeds()


def _of_the_cache_directory() -> Iterator[Ability]:
    try:
        folder: Path | None = _nearest(cache_directory())
        why = ""
    except (InputError, OSError) as error:
        folder, why = None, str(error)
    direct = direct_io_works(folder) if folder else None
    kind = (file_system(folder) if folder else None) or "the file system"
    yield Ability(
        "direct reads in the cache directory",
        bool(direct),
        why
        or {
            True: f"{kind} supports O_DIRECT",
            False: f"{kind} does not support O_DIRECT; choose another place with REFINFER_CACHE_DIR",
            None: f"{folder} cannot be written; choose another place with REFINFER_CACHE_DIR",
        }[direct],
        ("generate --budget", "bench calibrate", "bench offload"),
        "reads are ordinary ones, and the page cache is asked to drop them",
    )
    locks, reason = _file_locks(folder) if folder else (False, why)
    yield Ability(
        "file locks in the cache directory",
        locks,
        reason,
        ("generate", "pack"),
        "processes that start at the same time all pack the same weights",
    )


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _file_locks(folder: Path) -> tuple[bool, str]:
    if find_spec("fcntl") is None:
        return False, "this system has no flock"
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            draft = Draft(Path(name) / "locked")
            draft.abandon()
    except OSError as error:
        return False, f"{folder}: {error.strerror}"
    return draft.locked, "flock works" if draft.locked else f"{folder} lies on a file system without flock"


def _of_memory(machine: Mapping[str, Any]) -> Iterator[Ability]:
    left = available_bytes()
    yield Ability(
        "the memory that is left",
        left is not None,
        "this system does not report it" if left is None else f"{format_nbytes(left)}, by the system's count",
        ("generate --budget auto", "plan --budget auto", "simulate --budget auto"),
        "give the budget as a size",
    )
    limit = machine["memlock_limit_bytes"]
    has_mlock = find_spec("resource") is not None
    if not has_mlock:
        why = "this system has no mlock"
    elif limit is None:
        why = "without a limit"
    elif _may_lock_all():
        why = "without a limit, because this process has CAP_IPC_LOCK"
    else:
        why = f"up to {format_nbytes(limit)}, which ulimit -l sets"
    yield Ability(
        "packed weights locked in memory",
        has_mlock and limit != 0,
        why,
        ("refinfer.load(lock_memory=True)",),
        "it ends with an error; mapped weights may be dropped and read again",
    )
    chosen = re.search(r"\[(\w+)\]", " ".join(lines_of(_HUGE_PAGES)))
    yield Ability(
        "huge pages",
        chosen is not None and chosen[1] != "never",
        f"transparent huge pages are set to {chosen[1]}" if chosen else f"this system has no {_HUGE_PAGES}",
        ("bench matmul",),
        "all rows are measured in small pages, not only those named 4k-pages",
    )


def _may_lock_all() -> bool:
    """Return whether this process has the capability that lifts the limit on locked memory."""
    found = [line.split()[1] for line in lines_of(Path("/proc/self/status")) if line.startswith("CapEff:")]
    return any(int(mask, 16) & _CAP_IPC_LOCK for mask in found)


def _of_the_bench() -> Iterator[Ability]:
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError:
        folder = Path.cwd()
    dropped = drops_pages(folder)
    yield Ability(
        "files dropped from the page cache",
        bool(dropped),
        {
            True: f"tried in {folder}",
            False: f"{folder} keeps them; choose another place with TMPDIR",
            None: f"it cannot be tried in {folder}; choose another place with TMPDIR",
        }[dropped],
        ("bench start", "bench offload"),
        "the cold rows of bench start are measured with a warm page cache",
    )
    limits = can_limit_memory()
    yield Ability(
        "memory limits by control groups",
        limits,
        "/sys/fs/cgroup/memory can be written"
        if limits
        else "/sys/fs/cgroup/memory cannot be written; be root, on a system with control groups of version 1",
        ("bench offload",),
        "its mmap arm is left out, and nothing limits the other arms",
    )
    for name, what, command, without in (
        ("io", "bytes read from disks are counted", "bench offload", "its column read per token shows 0"),
        ("smaps_rollup", "shared memory is counted", "bench share", "it ends with an error"),
    ):
        file = Path("/proc/self") / name
        works = bool(lines_of(file))
        yield Ability(what, works, f"in {file}" if works else f"this system has no {file}", (command,), without)


def _threads(machine: Mapping[str, Any]) -> Ability:
    names = ", ".join(f"{library['name']} {library['version']}" for library in machine["blas"])
    return Ability(
        "BLAS threads that can be set",
        bool(names),
        names or "numpy's BLAS is unknown to threadpoolctl; set its own environment variable",
        ("generate --threads", "bench"),
        "the BLAS chooses the number of threads",
    )


def _tokenizers() -> Ability:
    try:
        found = version("tokenizers") if find_spec("tokenizers") else None
    except PackageNotFoundError:
        found = "(unknown)"
    return Ability(
        "the tokenizers package, for other tokenizers than refinfer's own",
        found is not None,
        f"version {found} is installed" if found else "it is not installed; run pip install 'refinfer[hf]'",
        ("generate --model",),
        "give the prompt as --token-ids",
    )


def _measured_speeds() -> Ability:
    file = calibration_file()
    measured = file is not None and known_calibration(file, file.parent).measured
    return Ability(
        "speeds of disk and processor measured here",
        measured,
        f"in {file}" if measured else "nothing was measured yet; run refinfer bench calibrate",
        ("plan", "simulate", "generate --budget"),
        "they assume speeds, and name them",
    )
