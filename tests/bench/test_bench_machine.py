"""What a machine is: facts about its disks, and trials in a folder. What `doctor` shows of them is tested there."""

from __future__ import annotations

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

    def advised(descriptor: int, *_: int) -> None:
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


@pytest.mark.spec("BENCH-3")
@pytest.mark.parametrize(("gil", "ending"), [(True, ""), (False, " without the GIL")])
def test_a_python_whose_threads_run_at_once_is_named(monkeypatch: pytest.MonkeyPatch, gil: bool, ending: str) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: gil, raising=False)
    assert describe_machine(Path.cwd())["python"] == platform.python_version() + ending
