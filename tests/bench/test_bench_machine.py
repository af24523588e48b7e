"""What a machine is: facts about its disks, and trials in a folder. What `doctor` shows of them is tested there."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from refinfer.bench import machine
from refinfer.bench.machine import describe_machine, direct_io_works, drops_pages, file_system


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> dict[Path, list[str]]:
    """The lines of the system's files, as this test gives them: a disk, one in a folder of it, and one beside that."""
    about = "rw,relatime shared:1 -"
    lines = {
        Path("/proc/self/mountinfo"): [
            f"1 4 9:3 / /disk/a/deeper {about} ext9 /dev/c rw",
            f"5 0 9:1 / / {about} rootfs /dev/a rw",
            f"4 5 9:2 / /disk/a {about} middlefs /dev/b rw",
            f"2 5 9:4 / /disk/ab {about} otherfs /dev/d rw",
        ],
        Path("/sys/class/bdi/9:2/read_ahead_kb"): ["128"],
    }
    monkeypatch.setattr(machine, "lines_of", lambda path: lines.get(path, []))
    monkeypatch.setattr(machine, "direct_io_works", lambda _: None)  # it would write into these folders
    return lines


@pytest.mark.spec("CLI-7")
@pytest.mark.parametrize(
    ("folder", "kind", "read_ahead"),
    [
        ("/disk/a", "middlefs", 128),
        ("/disk/a/x/y", "middlefs", 128),
        ("/disk/a/deeper/x", "ext9", None),
        ("/disk/abc", "rootfs", None),
        ("/", "rootfs", None),
    ],
)
@pytest.mark.usefixtures("mounts")
def test_a_folder_is_on_the_deepest_mount_that_holds_it(folder: str, kind: str, read_ahead: int | None) -> None:
    assert file_system(Path(folder)) == kind
    assert describe_machine(Path(folder))["folder"]["read_ahead_kb"] == read_ahead


@pytest.mark.spec("CLI-7")
def test_a_system_that_reports_no_mounts_says_nothing_of_file_systems(mounts: dict[Path, list[str]]) -> None:
    mounts.clear()
    told = describe_machine(Path("/disk/a"))["folder"]
    assert (told["file_system"], told["read_ahead_kb"]) == (None, None)


@pytest.mark.spec("CLI-7", "CLI-22")
def test_both_trials_are_made_in_their_folder_and_leave_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    right = tempfile.NamedTemporaryFile

    def noted(**options: Any) -> Any:
        tried.append(options.get("dir"))
        return right(**options)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", noted)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else None
    for _ in range(2):
        direct_io_works(tmp_path)
        drops_pages(tmp_path)
    assert tried == [tmp_path] * 4
    assert not list(tmp_path.iterdir())
    assert before is None or len(list(descriptors.iterdir())) == before
    assert direct_io_works(tmp_path / "not there") is None
    assert drops_pages(tmp_path / "not there") is None


@pytest.mark.spec("CLI-22")
@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux reads what is in the page cache and nothing else")
@pytest.mark.parametrize("dropped", [True, False])
def test_a_page_is_on_the_disk_before_the_page_cache_is_asked_to_drop_it(
    dropped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def synced(descriptor: int) -> None:
        asked.append(("sync", os.fstat(descriptor).st_size))

    def advised(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)  # no length is up to the end of the file
        asked.append(("drop", os.fstat(descriptor).st_size))

    def read(*_: object) -> int:
        if dropped:
            raise BlockingIOError
        return mmap.PAGESIZE

    monkeypatch.setattr(os, "fdatasync", synced)
    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(os, "preadv", read)
    assert drops_pages(tmp_path) is dropped
    assert asked == [("sync", mmap.PAGESIZE), ("drop", mmap.PAGESIZE)]


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(
    ("refusal", "works"),
    [(None, True), (errno.EINVAL, False), (errno.EOPNOTSUPP, False), (errno.EIO, None), (errno.ENFILE, None)],
)
def test_direct_reads_are_tried_with_o_direct_and_only_a_refusal_of_that_says_that_there_are_none(
    refusal: int | None, works: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that refuses, or takes, whatever is opened with O_DIRECT; the bit is any that is free."""
    flag, real = 1 << 40, os.open
    seen: list[int] = []

    def opened(path: str, flags: int, *more: Any, **options: Any) -> int:
        if flags & flag:
            seen.append(flags & ~flag)
            if refusal is not None:
                raise OSError(refusal, os.strerror(refusal))
        return real(path, flags & ~flag, *more, **options)

    monkeypatch.setattr(os, "O_DIRECT", flag, raising=False)
    monkeypatch.setattr(os, "open", opened)
    assert direct_io_works(tmp_path) is works
    assert seen == [os.O_RDONLY]


@pytest.mark.spec("CLI-22")
def test_a_system_without_o_direct_has_no_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert direct_io_works(tmp_path) is False


@pytest.mark.spec("CLI-7")
@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["processor\t: 0", "model name\t: A Processor: 2 GHz", "model name\t: Another"], "A Processor: 2 GHz"),
        (["processor\t: 0", "CPU part\t: 0xd40"], "what Python says"),
        ([], "what Python says"),
    ],
)
def test_a_processor_has_the_name_that_the_system_gives_the_first_core(
    lines: list[str], name: str, mounts: dict[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts[Path("/proc/cpuinfo")] = lines
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "what Python says")
    assert describe_machine(Path("/disk/a"))["cpu"] == name


@pytest.mark.spec("CLI-7")
@pytest.mark.parametrize("limit", [65_536, 0, None])
def test_the_limit_on_locked_memory_is_the_one_that_holds_now(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource", reason="only POSIX has limits of resources")
    infinity = resource.RLIM_INFINITY

    def limits(which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_MEMLOCK
        return infinity if limit is None else limit, infinity

    monkeypatch.setattr(resource, "getrlimit", limits)
    assert describe_machine(Path.cwd())["memlock_limit_bytes"] == limit


@pytest.mark.spec("BENCH-3")
@pytest.mark.parametrize(("gil", "ending"), [(True, ""), (False, " without the GIL")])
def test_a_python_whose_threads_run_at_once_is_named(monkeypatch: pytest.MonkeyPatch, gil: bool, ending: str) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: gil, raising=False)
    assert describe_machine(Path.cwd())["python"] == platform.python_version() + ending
