"""Specifies `refinfer.process`: how much memory the system and the control groups have left (for BUDGET-4)."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from refinfer import process
from refinfer.errors import BudgetError
from refinfer.offload.budget import parse_budget

V1 = Path("/sys/fs/cgroup/memory")
NO_LIMIT_V1 = "9223372036854771712"
GIB = 1 << 30

System = Callable[[dict[str, str]], None]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    """Replace the files of the system by others: path and contents."""

    def replace_by(files: dict[str, str]) -> None:
        monkeypatch.setattr(process, "lines_of", lambda path: files.get(str(path), "").splitlines())

    return replace_by


def meminfo(available_kb: int) -> dict[str, str]:
    return {
        "/proc/meminfo": f"MemTotal:       64000000 kB\nMemFree:          100 kB\nMemAvailable:   {available_kb} kB\n"
    }


def group_v1(path: str, limit: int | str, usage: int = 0, inactive: int = 0) -> dict[str, str]:
    return {
        f"{V1}{path}/memory.limit_in_bytes": f"{limit}\n",
        f"{V1}{path}/memory.usage_in_bytes": f"{usage}\n",
        f"{V1}{path}/memory.stat": f"cache 12345\ninactive_file 7\ntotal_cache 999\ntotal_inactive_file {inactive}\n",
    }


def group_v2(path: str, limit: int | str, usage: int = 0, inactive: int = 0) -> dict[str, str]:
    return {
        f"/sys/fs/cgroup{path}/memory.max": f"{limit}\n",
        f"/sys/fs/cgroup{path}/memory.current": f"{usage}\n",
        f"/sys/fs/cgroup{path}/memory.stat": f"anon 5\nfile 12345\ninactive_anon 3\ninactive_file {inactive}\n",
    }


IN_V1 = {"/proc/self/cgroup": "9:name=systemd:/\n5:cpu,cpuacct:/elsewhere\n4:memory:/a/b\n0::/\n"}
IN_V1_WITH_OTHERS = {"/proc/self/cgroup": "3:hugetlb,memory:/a/b\n"}
IN_V2 = {"/proc/self/cgroup": "0::/a/b\n"}
PLENTY = meminfo(16 << 20)

SYSTEMS: dict[str, tuple[dict[str, str], int]] = {
    "no control group": (meminfo(1000), 1_024_000),
    "version 2": (IN_V2 | PLENTY | group_v2("/a/b", 8 * GIB, 3 * GIB, GIB), 6 * GIB),
    "version 2, limit of a parent": (
        IN_V2 | PLENTY | group_v2("/a/b", "max", GIB) | group_v2("/a", 4 * GIB, 3 * GIB, GIB // 2),
        3 * GIB // 2,
    ),
    "version 2, the least of two limits": (
        IN_V2 | PLENTY | group_v2("/a/b", 2 * GIB, GIB) | group_v2("/a", 8 * GIB, 2 * GIB),
        GIB,
    ),
    "version 2, no limit anywhere": (IN_V2 | PLENTY | group_v2("/a/b", "max") | group_v2("/a", "max"), 16 * GIB),
    "version 2, its own root": ({"/proc/self/cgroup": "0::/\n"} | PLENTY | group_v2("", 4 * GIB, GIB), 3 * GIB),
    "version 2, the path of the host": (IN_V2 | PLENTY | group_v2("", 4 * GIB, GIB), 3 * GIB),
    "version 2, more left than the system has": (IN_V2 | meminfo(1 << 20) | group_v2("/a/b", 8 * GIB), GIB),
    "version 2, limit passed": (IN_V2 | PLENTY | group_v2("/a/b", 2 * GIB, 3 * GIB), 0),
    "version 1": (IN_V1 | PLENTY | group_v1("/a/b", 8 * GIB, 3 * GIB, GIB), 6 * GIB),
    "version 1, several controllers": (IN_V1_WITH_OTHERS | PLENTY | group_v1("/a/b", 8 * GIB, 3 * GIB, GIB), 6 * GIB),
    "version 1, limit of a parent": (
        IN_V1 | PLENTY | group_v1("/a/b", NO_LIMIT_V1, GIB) | group_v1("/a", 4 * GIB, GIB) | group_v1("", NO_LIMIT_V1),
        3 * GIB,
    ),
    "version 1, no limit": (IN_V1 | PLENTY | group_v1("/a/b", NO_LIMIT_V1) | group_v1("", NO_LIMIT_V1), 16 * GIB),
    "version 1, the path of the host": (IN_V1 | PLENTY | group_v1("", 2 * GIB, GIB, GIB // 4), 5 * GIB // 4),
    "version 1, its own root along with an empty version 2": (
        {"/proc/self/cgroup": "0::/\n4:memory:/\n"} | PLENTY | group_v1("", 2 * GIB, GIB),
        GIB,
    ),
    "a limit and a system that reports nothing": (IN_V2 | group_v2("/a/b", 2 * GIB, GIB), GIB),
    "more of its pages are droppable than counted": (IN_V2 | PLENTY | group_v2("/a/b", GIB, 10, 20), GIB),
}


@pytest.mark.spec("BUDGET-4")
@pytest.mark.parametrize("name", SYSTEMS)
def test_auto_is_nine_tenths_of_what_system_and_control_group_have_left(system: System, name: str) -> None:
    files, left = SYSTEMS[name]
    system(files)
    assert process.available_bytes() == left
    assert parse_budget("auto", 1) == pytest.approx(left * 0.9, abs=1)
    assert parse_budget(" auto\n", 1) == parse_budget("auto", 1 << 40)


@pytest.mark.spec("BUDGET-4")
@pytest.mark.parametrize("version", [1, 2])
def test_a_parent_with_a_larger_limit_but_less_left_counts(system: System, version: int) -> None:
    group, inside = (group_v1, IN_V1) if version == 1 else (group_v2, IN_V2)
    system(inside | PLENTY | group("/a/b", 5 * GIB, GIB) | group("/a", 8 * GIB, 7 * GIB))
    assert process.available_bytes() == GIB


@pytest.mark.spec("BUDGET-4", "ERR-1")
def test_auto_is_refused_if_the_system_does_not_report_what_is_left(system: System) -> None:
    system({})
    assert process.available_bytes() is None
    assert process.cgroup_memory() is None
    with pytest.raises(BudgetError, match="does not report how much memory is left; give the budget as a size"):
        parse_budget("auto", 1000)


@pytest.mark.spec("BUDGET-4")
def test_the_version_the_limit_and_what_is_used_are_reported(system: System) -> None:
    system(IN_V1 | group_v1("/a/b", 8 * GIB, 3 * GIB, GIB))
    assert process.cgroup_memory() == {"version": 1, "memory_limit_bytes": 8 * GIB, "memory_used_bytes": 2 * GIB}
    system(IN_V2 | group_v2("/a/b", "max", 3 * GIB))
    assert process.cgroup_memory() == {"version": 2, "memory_limit_bytes": None, "memory_used_bytes": None}


@pytest.mark.spec("BUDGET-4")
@pytest.mark.parametrize("line", ["nonsense", "", "a:b"], ids=repr)
def test_lines_of_another_form_are_skipped(system: System, line: str) -> None:
    system({"/proc/self/cgroup": f"{line}\n0::/a/b\n"} | PLENTY | group_v2("/a/b", 2 * GIB, GIB))
    assert process.available_bytes() == GIB


@pytest.mark.spec("BUDGET-4")
@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux reports in /proc how much memory is left")
def test_here_auto_is_some_of_the_memory_that_is_left() -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            assert 0 < parse_budget("auto", 1) < int(line.split()[1]) * 1024
            return
    pytest.fail("there is no MemTotal")


QUOTAS: dict[str, tuple[dict[str, str], int]] = {
    "no control group": ({}, 8),
    "version 2, two cores and a half": (IN_V2 | {"/sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2),
    "version 2, less than a core": (IN_V2 | {"/sys/fs/cgroup/a/b/cpu.max": "10000 100000\n"}, 1),
    "version 2, more than there are": (IN_V2 | {"/sys/fs/cgroup/a/b/cpu.max": "6400000 100000\n"}, 8),
    "version 2, no limit": (IN_V2 | {"/sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
    "version 2, limit of a parent": (
        IN_V2 | {"/sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "/sys/fs/cgroup/a/cpu.max": "400000 100000\n"},
        4,
    ),
    "version 2, a group with colons in its name": (
        {"/proc/self/cgroup": "0::/a:b:c\n", "/sys/fs/cgroup/a:b:c/cpu.max": "300000 100000\n"},
        3,
    ),
    "version 1": (
        {"/proc/self/cgroup": "5:cpu,cpuacct:/a\n"}
        | {"/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "150000\n", "/sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "50000\n"},
        3,
    ),
    "version 1, no limit": (
        {"/proc/self/cgroup": "5:cpu,cpuacct:/a\n"}
        | {"/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "nonsense": (IN_V2 | {"/sys/fs/cgroup/a/b/cpu.max": "1 0\n", "/sys/fs/cgroup/a/cpu.max": "a lot\n"}, 8),
}


@pytest.mark.spec("GEN-10")
@pytest.mark.parametrize("name", QUOTAS)
def test_a_core_is_usable_if_the_control_groups_leave_it_the_time(
    system: System, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, cores = QUOTAS[name]
    system(files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert process.usable_cores() == cores


CHILD = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
from refinfer.offload.budget import parse_budget
from refinfer.process import cgroup_memory
print(parse_budget("auto", 1), cgroup_memory()["memory_limit_bytes"])
"""


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A memory control group of version 1 with a group inside; both are gone afterwards."""
    group = V1 / f"refinfer-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and control groups of version 1: {error.strerror}")
    inner = group / "inner"
    try:
        inner.mkdir()
        yield group
    finally:
        if inner.exists():
            inner.rmdir()
        group.rmdir()


@pytest.mark.spec("BUDGET-4")
@pytest.mark.parametrize("inside", ["", "inner"])
def test_a_real_limit_of_version_1_holds_in_its_group_and_in_groups_inside(real_group: Path, inside: str) -> None:
    limit = 300 << 20
    try:
        (real_group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        pytest.skip(f"memory is not limited here: {error.strerror}")
    command = [sys.executable, "-c", CHILD, str(real_group / inside / "cgroup.procs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    budget, told = map(int, done.stdout.split())
    assert told == limit
    assert 0.9 * (limit - (200 << 20)) < budget < 0.9 * limit


@pytest.mark.spec("CLI-25")
def test_figures_that_the_system_does_not_report_are_none(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> set[int]:
        raise PermissionError

    system({})
    monkeypatch.setattr(os, "sched_getaffinity", refuse, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert process.peak_rss_bytes() is None
    assert process.meminfo_bytes("MemTotal") is None
    assert process.cgroup_memory() is None
    assert process.available_bytes() is None
    assert process.usable_cores() == (os.cpu_count() or 1)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert process.usable_cores() == 1


def test_the_lines_of_a_file_of_the_system_may_have_any_bytes(tmp_path: Path) -> None:
    """The name of a process or of a control group has whatever bytes somebody gave it."""
    (tmp_path / "status").write_bytes(b"Name:\t\xff\nUmask:\t0022\n")
    assert process.lines_of(tmp_path / "status") == ["Name:\t\ufffd", "Umask:\t0022"]
    assert process.lines_of(tmp_path / "nothing") == []


@pytest.mark.spec("GEN-10")
def test_the_usable_cores_are_those_of_this_very_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda pid: {3, 5, 7} if pid in (0, os.getpid()) else {1}, raising=False
    )
    assert process.usable_cores() == 3


@pytest.mark.spec("CLI-2", "CLI-25")
@pytest.mark.parametrize(("platform", "nbytes"), [("linux", 5_120), ("darwin", 7), ("win32", None)])
def test_the_peak_memory_is_reported_as_each_system_counts_it(
    platform: str, nbytes: int | None, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    system({"/proc/self/status": "Name:\tpython\nVmPeak:\t 9 kB\nVmHWM:\t 5 kB\nVmRSS:\t 4 kB\n"})
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setattr(sys, "platform", platform)
    assert process.peak_rss_bytes() == nbytes
