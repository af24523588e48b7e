"""The verdicts of `doctor`: what this machine can do, tried where it is needed."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refinfer.bench import abilities as bench_abilities
from refinfer.bench.abilities import Ability, abilities
from refinfer.bench.machine import describe_machine, drops_pages
from refinfer.offload.calibration import CALIBRATION_FILE


@pytest.fixture(scope="module")
def machine() -> dict[str, Any]:
    """What this machine is."""
    return describe_machine(Path.cwd())


def verdicts(machine: dict[str, Any]) -> dict[str, Ability]:
    return {verdict.ability: verdict for verdict in abilities(machine)}


@pytest.mark.spec("CLI-22")
def test_every_verdict_has_a_reason_and_names_who_needs_it(machine: dict[str, Any]) -> None:
    found = verdicts(machine)
    assert len(found) >= 10
    for verdict in found.values():
        assert verdict.why
        assert verdict.needed_by
        assert verdict.without


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(
    ("works", "why"), [(True, "supports O_DIRECT"), (False, "REFINFER_CACHE_DIR"), (None, "REFINFER_CACHE_DIR")]
)
def test_direct_reads_are_tried_in_what_there_is_of_the_cache_directory(
    works: bool | None, why: str, machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def direct_io_works(folder: Path) -> bool | None:
        tried.append(folder)
        return works

    monkeypatch.setattr(bench_abilities, "direct_io_works", direct_io_works)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    verdict = verdicts(machine)["direct reads in the cache directory"]
    assert (tried, verdict.works) == ([tmp_path], works is True)
    assert why in verdict.why
    assert not list(tmp_path.iterdir())


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(("kind", "named"), [("ext9", "ext9"), (None, "the file system")])
@pytest.mark.parametrize("works", [True, False])
def test_a_verdict_on_direct_reads_names_the_file_system_if_the_system_reports_it(
    kind: str | None, named: str, works: bool, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_abilities, "direct_io_works", lambda _: works)
    monkeypatch.setattr(bench_abilities, "file_system", lambda _: kind)
    verdict = verdicts(machine)["direct reads in the cache directory"]
    assert verdict.why.startswith(f"{named} {'supports' if works else 'does not support'} O_DIRECT")


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(("locked", "why"), [(True, "flock works"), (False, "lies on a file system without flock")])
def test_locks_are_tried_in_the_cache_directory_and_leave_nothing_there(
    locked: bool, why: str, machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def draft(path: Path) -> SimpleNamespace:
        tried.append(path)
        return SimpleNamespace(locked=locked, abandon=lambda: None)

    monkeypatch.setattr(bench_abilities, "Draft", draft)
    monkeypatch.setenv("REFINFER_CACHE_DIR", str(tmp_path))
    verdict = verdicts(machine)["file locks in the cache directory"]
    assert (verdict.works, why in verdict.why) == (locked, True)
    assert [tmp_path in path.parents for path in tried] == [True]
    assert not list(tmp_path.iterdir())


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(
    ("left", "why"), [(5_000_000_000, "5.0 GB, by the system's count"), (None, "this system does not report it")]
)
def test_the_memory_that_is_left_is_named_if_the_system_reports_it(
    left: int | None, why: str, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_abilities, "available_bytes", lambda: left)
    verdict = verdicts(machine)["the memory that is left"]
    assert (verdict.works, verdict.why) == (left is not None, why)


@pytest.mark.spec("CLI-22")
def test_a_user_without_a_home_has_no_cache_directory_to_try(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")

    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    found = verdicts(machine)
    for ability in ("direct reads in the cache directory", "file locks in the cache directory"):
        assert not found[ability].works
        assert "set REFINFER_CACHE_DIR" in found[ability].why


@pytest.mark.spec("CLI-22")
def test_refused_locks_are_reported_with_the_reason(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(bench_abilities, "Draft", refuse)
    verdict = verdicts(machine)["file locks in the cache directory"]
    assert not verdict.works
    assert verdict.why.endswith(": No locks available")


@pytest.mark.spec("CLI-22")
@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux reads what is in the page cache and nothing else")
def test_a_page_is_seen_to_be_dropped_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if drops_pages(tmp_path) is None:
        pytest.skip("this file system does not tell what is in the page cache")
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    assert drops_pages(tmp_path) is False
    monkeypatch.delattr(os, "RWF_NOWAIT")
    assert drops_pages(tmp_path) is None
    monkeypatch.delattr(os, "posix_fadvise")
    assert drops_pages(tmp_path) is False


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(
    ("limit", "privileged", "why"),
    [(None, False, "without a limit"), (64_000, False, "up to 64.0 kB"), (64_000, True, "CAP_IPC_LOCK")],
)
def test_locked_memory_is_reported_with_its_limit(
    limit: int | None, privileged: bool, why: str, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_abilities, "_may_lock_all", lambda: privileged)
    verdict = verdicts(machine | {"memlock_limit_bytes": limit})["packed weights locked in memory"]
    assert verdict.works
    assert why in verdict.why


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(("numbers", "privileged"), [({14}, True), (set(range(41)) - {14}, False)])
def test_of_all_capabilities_number_14_lifts_the_limit_on_locked_memory(
    numbers: set[int], privileged: bool, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux shows the capabilities of a process as bits; CAP_IPC_LOCK has the number 14."""
    mask = sum(1 << number for number in numbers)
    monkeypatch.setattr(bench_abilities, "lines_of", lambda _: ["CapPrm:\t0", f"CapEff:\t{mask:016x}"])
    verdict = verdicts(machine | {"memlock_limit_bytes": 64_000})["packed weights locked in memory"]
    assert ("CAP_IPC_LOCK" in verdict.why) == privileged


@pytest.mark.spec("CLI-22")
def test_no_limit_at_all_is_not_no_locked_memory_at_all(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_abilities, "_may_lock_all", lambda: False)
    assert not verdicts(machine | {"memlock_limit_bytes": 0})["packed weights locked in memory"].works


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(
    ("text", "works"), [("always [madvise] never", True), ("always madvise [never]", False), (None, False)]
)
def test_huge_pages_are_there_unless_they_are_switched_off(
    text: str | None, works: bool, machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "enabled").write_text(f"{text}\n")
    monkeypatch.setattr(bench_abilities, "_HUGE_PAGES", tmp_path / "enabled")
    verdict = verdicts(machine)["huge pages"]
    assert verdict.works == works
    chosen = text and text.split("[")[1].split("]")[0]
    assert verdict.why == (
        f"transparent huge pages are set to {chosen}" if text else f"this system has no {tmp_path}/enabled"
    )


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize("there", [True, False])
def test_counts_of_the_system_are_there_if_their_files_can_be_read(
    there: bool, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_abilities, "lines_of", lambda path: ["a line"] if there else [])
    found = verdicts(machine)
    for ability, file in (("bytes read from disks are counted", "io"), ("shared memory is counted", "smaps_rollup")):
        why = f"in /proc/self/{file}" if there else f"this system has no /proc/self/{file}"
        assert (found[ability].works, found[ability].why) == (there, why)


@pytest.mark.spec("CLI-22")
def test_a_blas_that_cannot_be_set_is_reported(machine: dict[str, Any]) -> None:
    verdict = verdicts(machine | {"blas": []})["BLAS threads that can be set"]
    assert not verdict.works
    assert "its own environment variable" in verdict.why


@pytest.mark.spec("CLI-22")
def test_speeds_are_measured_once_the_calibration_has_this_disk_and_processor(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ability = "speeds of disk and processor measured here"
    assert "refinfer bench calibrate" in verdicts(machine)[ability].why
    (tmp_path / "refinfer").mkdir()
    (tmp_path / "refinfer" / CALIBRATION_FILE).write_text("{}")
    assert not verdicts(machine)[ability].works


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize("known", [True, False])
def test_a_tokenizers_package_that_is_there_is_named_with_its_version(
    known: bool, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package may lie in a folder of modules without having been installed: then nobody knows its version."""

    def version(name: str) -> str:
        if not known:
            raise PackageNotFoundError(name)
        return "9.8.7"

    monkeypatch.setattr(bench_abilities, "version", version)
    monkeypatch.setattr(bench_abilities, "find_spec", lambda _: object())
    verdict = verdicts(machine)["the tokenizers package, for other tokenizers than refinfer's own"]
    assert verdict.works
    assert verdict.why == f"version {'9.8.7' if known else '(unknown)'} is installed"


@pytest.mark.spec("CLI-22")
@pytest.mark.parametrize(
    ("module", "ability", "why"),
    [
        ("fcntl", "file locks in the cache directory", "this system has no flock"),
        ("resource", "packed weights locked in memory", "this system has no mlock"),
        ("tokenizers", "the tokenizers package, for other tokenizers than refinfer's own", "it is not installed"),
    ],
)
def test_what_rests_on_a_module_that_is_not_there_is_missing(
    module: str, ability: str, why: str, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_abilities, "find_spec", lambda name: None if name == module else object())
    verdict = verdicts(machine)[ability]
    assert not verdict.works
    assert verdict.why.startswith(why)
