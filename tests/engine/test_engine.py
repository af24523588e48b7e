"""What a session does with its cache file and its budget: built, loaded, refused, and released."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinfer.engine import require_finite_weights
from refinfer.errors import BudgetError, InputError, RequestError, WeightsError
from refinfer.generate import Session
from refinfer.inventory import Inventory
from refinfer.model.checkpoint import SINGLE_NAME, open_checkpoint
from refinfer.model.config import SHAPES
from refinfer.model.safetensors import TensorSpec, write_safetensors
from refinfer.model.synth import write_checkpoint
from refinfer.model.weights import Matrix
from refinfer.trace import Trace
from refinfer.weight_cache.load_or_build import Listener

sys.path.insert(0, str(Path(__file__).parent))
import engine_runs
from cage import command
from engine_runs import (
    BUFFERS,
    PROMPT,
    WATCHDOG_S,
    entries_of,
    every_format,
    in_a_child,
    needs_fork,
    opened,
    smallest_for,
    start,
    stats_of,
    tokens_of,
    told_by,
)

NORM = "model.norm.weight"

folder = engine_runs.folder
everyones = engine_runs.everyones
read_only = engine_runs.read_only
expected = engine_runs.expected
built = engine_runs.built


@pytest.mark.spec("GEN-5")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_with_a_value_that_is_not_finite_is_named(value: float, folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    require_finite_weights(checkpoint)
    w = checkpoint.float32(NORM, checkpoint[NORM].shape).copy()
    w[-1] = value
    write_safetensors(tmp_path / SINGLE_NAME, [TensorSpec(NORM, "F32", w.shape, [w])])
    with pytest.raises(WeightsError, match=f"{tmp_path / SINGLE_NAME}: '{NORM}' holds NaN or infinity"):
        require_finite_weights(open_checkpoint(tmp_path))


# GEN-12: built once, mapped afterwards.


@pytest.mark.spec("GEN-12")
@every_format
def test_the_first_start_builds_and_the_second_packs_nothing(name: str, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first_tokens, first = start(folder, cache, weights=name)
    assert (first.state, first.path, first.reason) == ("built", str(cache), "there was no file yet")
    assert first.packed_buffers == BUFFERS
    assert first.packed_bytes == sum(entry.padded_nbytes for entry in entries_of(cache).values())
    before = cache.read_bytes()
    second_tokens, second = start(folder, cache, weights=name)
    assert (second.state, second.path, second.reason) == ("loaded", str(cache), None)
    assert (second.packed_buffers, second.packed_bytes) == (0, 0)
    assert second_tokens == first_tokens
    assert cache.read_bytes() == before


@pytest.mark.spec("GEN-12", "OFFLOAD-3", "PLAN-4")
@every_format
def test_memory_built_loaded_and_any_budget_give_the_same_bits(name: str, folder: Path, tmp_path: Path) -> None:
    cache, ids = tmp_path / "cache", list(range(40, 62))
    with opened(folder, ":memory", weights=name) as session:
        expected = session.logits(ids).view(np.uint32)
        tokens = tokens_of(session)
    smallest = smallest_for(folder, cache, weights=name)
    for options in ({}, {}, {"budget": smallest}, {"budget": smallest + 20_000}, {"budget": 1 << 30}):
        with opened(folder, cache, weights=name, **options) as session:
            np.testing.assert_array_equal(session.logits(ids).view(np.uint32), expected)
            assert tokens_of(session) == tokens


@pytest.mark.spec("PREP-8", "CLI-36")
def test_a_start_within_a_budget_reports_the_same_progress_as_one_without(folder: Path, tmp_path: Path) -> None:
    def told(budget: str | None) -> tuple[list[int], list[tuple[str, int]]]:
        progress, begun = list[int](), list[tuple[str, int]]()
        listener = Listener(progress=progress.append, begin=lambda what, nbytes: begun.append((what, nbytes)))
        start(folder, tmp_path / f"for {budget}", budget=budget, listener=listener)
        return progress, begun

    expected = told(None)
    assert expected[0]
    assert told("1GB") == expected


@pytest.mark.spec("TRACE-5")
@pytest.mark.parametrize("budget", [None, "1GB"])
def test_a_run_that_is_not_traced_has_an_empty_trace(budget: str | None, folder: Path, built: Path) -> None:
    with opened(folder, built, budget=budget) as session:
        tokens_of(session)
        assert session.trace == Trace(())


@pytest.mark.spec("GEN-12", "DIR-1")
def test_without_a_path_the_file_lies_in_the_cache_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    states = [start(folder, None, weights=name)[1] for name in ("f32", "int8", "f32", "int8")]
    assert [state.state for state in states] == ["built", "built", "loaded", "loaded"]
    paths = [Path(str(state.path)) for state in states]
    assert paths[:2] == paths[2:]
    assert {path.parent for path in paths} == {tmp_path / "refinfer"}
    assert paths[0] != paths[1]


@pytest.mark.spec("GEN-12", "PREP-3")
@pytest.mark.parametrize("cache", [":memory", "off"])
def test_in_memory_and_off_leave_no_file(
    cache: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: tuple[int, ...]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tokens, stats = start(folder, cache)
    assert tokens == expected
    assert (stats.state, stats.path, stats.reason) == (cache.lstrip(":"), None, None)
    assert (stats.packed_buffers > 0) == (cache == ":memory")
    assert list(tmp_path.iterdir()) == []


def resident(path: Path) -> list[bool]:
    """Return for each page of a file whether it is in the page cache; looking brings none in."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapping:
        state = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        view = np.frombuffer(mapping, np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, length, state)
        del view
    assert not failed
    return [bool(page & 1) for page in state]


def wait_until_at_rest(path: Path, probe: Path) -> None:
    """Wait until the clock of the file system has left the tick in which a file was written."""
    ctime = path.stat().st_ctime_ns
    tick = 110_000_000 if ctime % 1_000_000_000 else 2_100_000_000
    deadline = time.monotonic() + WATCHDOG_S
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_mtime_ns > ctime + tick:
            probe.unlink()
            return
        assert time.monotonic() < deadline


@pytest.mark.skipif(sys.platform != "linux", reason="needs mincore and posix_fadvise, as Linux has them")
@pytest.mark.spec("GEN-12", "OPEN-2")
@pytest.mark.parametrize("budget", [None, "60%"])
def test_the_second_start_reads_only_the_beginning_of_the_original(budget: str | None, tmp_path: Path) -> None:
    config = replace(SHAPES["tiny"], vocab_size=2000, hidden_size=512, intermediate_size=2000, num_hidden_layers=2)
    write_checkpoint(tmp_path / "m", config, dtype="f32")
    original, cache = tmp_path / "m" / "model.safetensors", tmp_path / "cache"
    wait_until_at_rest(original, tmp_path / "probe")
    first = start(tmp_path / "m", cache)
    with original.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(resident(original)):
        pytest.skip("this file system keeps files in the page cache")
    second = start(tmp_path / "m", cache, budget=budget)
    assert second[0] == first[0]
    assert (second[1].state, second[1].packed_buffers) == ("loaded", 0)
    read = resident(original)
    assert len(read) * mmap.PAGESIZE > 20_000_000
    assert not any(read[len(read) // 8 :])  # 64 KiB and the list of tensors, and what the system read ahead of them
    assert read[0]


# GEN-13 and GEN-14: a file that cannot be written.


@needs_fork
@pytest.mark.spec("GEN-13")
def test_a_read_only_folder_costs_one_warning_and_the_run_goes_on(read_only: Path, expected: tuple[int, ...]) -> None:
    cache = read_only / "cache" / "weights"

    def work() -> Any:
        (tokens, stats), told = told_by(lambda: start(read_only / "model", cache))
        return [tokens, stats.state, stats.path, stats.reason, stats.packed_buffers, told]

    tokens, state, path, reason, packed, told = in_a_child(work, unprivileged=True)
    assert tuple(tokens) == expected
    assert (state, path, packed) == ("memory", None, BUFFERS)
    assert reason == f"{cache} cannot be written: Permission denied"
    assert told == [f"{reason}; the weights are packed into memory, and will be again at the next start"]
    assert list((read_only / "cache").iterdir()) == []


@needs_fork
@pytest.mark.spec("GEN-13")
def test_a_full_disk_costs_one_warning_and_the_run_goes_on(
    folder: Path, tmp_path: Path, expected: tuple[int, ...]
) -> None:
    cache = tmp_path / "weights"

    def work() -> Any:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        (tokens, stats), told = told_by(lambda: start(folder, cache))
        return [tokens, stats.state, stats.reason, told]

    tokens, state, reason, told = in_a_child(work)
    assert tuple(tokens) == expected
    assert (state, len(told)) == ("memory", 1)
    assert reason == f"{cache} cannot be written: File too large"
    assert told[0].startswith(reason)
    assert list(tmp_path.iterdir()) == []


@needs_fork
@pytest.mark.spec("GEN-13", "OPEN-5")
def test_a_good_file_in_a_read_only_folder_is_mapped_without_a_word(read_only: Path, expected: tuple[int, ...]) -> None:
    cache = read_only / "cache" / "weights"
    (read_only / "cache").chmod(0o755)
    start(read_only / "model", cache)
    (read_only / "cache").chmod(0o555)
    before = sorted((read_only / "cache").iterdir())
    budget = smallest_for(read_only / "model", cache)

    def work() -> Any:
        answers = [told_by(partial(start, read_only / "model", cache, budget=b)) for b in (None, budget)]
        return [[tokens, stats.state, told] for (tokens, stats), told in answers]

    assert in_a_child(work, unprivileged=True) == [[list(expected), "loaded", []]] * 2
    assert sorted((read_only / "cache").iterdir()) == before


@pytest.mark.spec("GEN-13")
def test_a_place_below_a_file_costs_one_warning(folder: Path, tmp_path: Path, expected: tuple[int, ...]) -> None:
    (tmp_path / "file").write_text("")
    (tokens, stats), told = told_by(lambda: start(folder, tmp_path / "file" / "below"))
    assert (tokens, stats.state, len(told)) == (expected, "memory", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_fork
@pytest.mark.spec("GEN-14")
def test_under_a_budget_a_read_only_folder_is_bad_input(read_only: Path) -> None:
    cache = read_only / "cache" / "weights"
    budget = smallest_for(read_only / "model", cache)

    def work() -> Any:
        def refused() -> str:
            with pytest.raises(RequestError) as error:
                start(read_only / "model", cache, budget=budget)
            return str(error.value)

        return told_by(refused)

    said, told = in_a_child(work, unprivileged=True)
    assert f"{cache} cannot be written: Permission denied" in said
    assert "name another place with --weight-cache" in said
    assert told == []
    assert list((read_only / "cache").iterdir()) == []


@needs_fork
@pytest.mark.spec("GEN-14")
def test_under_a_budget_a_full_disk_is_bad_input(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "weights"
    budget = smallest_for(folder, cache)

    def work() -> Any:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(RequestError) as error:
            start(folder, cache, budget=budget)
        return str(error.value)

    said = in_a_child(work)
    assert f"{cache} cannot be written: File too large" in said
    assert "--weight-cache" in said
    assert list(tmp_path.iterdir()) == []


# GEN-15: what is refused before anything is packed.


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"budget": "40%", "cache": ":memory"}, "--weight-cache :memory keeps no file, which a budget needs; name a file"),
    ({"budget": "40%", "cache": "off"}, "--weight-cache off keeps no file, which a budget needs; name a file"),
    ({"budget": "40%", "plan": "nonsense"}, "the plan must be one of"),
    ({"budget": "40%", "lock_memory": True}, "within a budget: there the plan decides what is locked"),
    ({"budget": "abc"}, "'abc' is not a size"),
    ({"budget": "0"}, "at least one byte"),
    ({"budget": "0%"}, "at least one byte"),
    ({"budget": "-5"}, "'-5' is not a size"),
    ({"budget": "5 parsecs"}, "'5 parsecs' is not a size"),
    ({"budget": ""}, "is not a size"),
    ({"budget": 0}, "the smallest that works is"),
    ({"budget": -5}, "the smallest that works is"),
    ({"budget": "1"}, "the smallest that works is"),
    ({"budget": "1%"}, "the smallest that works is"),
]


@pytest.mark.spec("GEN-15", "BUDGET-3", "ERR-1")
@pytest.mark.parametrize(("options", "why"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else None)
def test_what_cannot_be_kept_is_refused_before_anything_is_packed(
    options: dict[str, Any], why: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = dict(options)
    with pytest.raises(InputError, match=re.escape(why)) as refused:
        opened(folder, options.pop("cache", None), **options)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("GEN-15")
def test_an_unknown_plan_is_refused_also_without_a_budget(folder: Path) -> None:
    with pytest.raises(RequestError):
        opened(folder, ":memory", plan="nonsense").close()


@pytest.mark.spec("GEN-15", "PLAN-3")
@every_format
def test_the_smallest_budget_runs_and_one_byte_less_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    smallest = smallest_for(folder, cache, weights=name)
    with pytest.raises(BudgetError, match=f"the smallest that works is {smallest} bytes"):
        opened(folder, cache, weights=name, budget=smallest - 1)
    assert not cache.exists()
    with opened(folder, cache, weights=name, budget=smallest) as session:
        stats = stats_of(session)
    assert stats.offload is not None
    assert stats.offload.account.locked == 0
    assert stats.offload.peak_bytes <= smallest


@pytest.mark.spec("PLAN-4", "OFFLOAD-7", "GEN-18")
def test_a_budget_larger_than_the_model_locks_everything_and_streams_nothing(tmp_path: Path) -> None:
    """A tied model, so that no row is read either."""
    config = replace(SHAPES["tiny"], num_hidden_layers=2)
    write_checkpoint(tmp_path / "m", config)
    with opened(tmp_path / "m", tmp_path / "cache", budget="1GB") as session:
        first, second = stats_of(session).offload, stats_of(session).offload
    assert first is not None
    assert second is not None
    assert (first.streamed_bytes_per_token, first.account.ring, first.wait_s) == (0, 0, 0.0)
    assert first.account.locked == Inventory(config, "bf16").streamable_nbytes
    read_once = first.account.locked + first.account.fixed.resident
    assert first.read_bytes_total == second.read_bytes_total == read_once


# GEN-8: what a closed session has released.


def first_matrix_of(session: Session) -> weakref.ref[Matrix]:
    with session.source.forward_pass() as weights:
        return weakref.ref(next(iter(weights.layers)).q_proj)


@pytest.mark.spec("GEN-8", "OFFLOAD-8")
@pytest.mark.parametrize("budget", [None, "1GB"])
def test_a_closed_session_has_released_its_weights_at_once(budget: str | None, folder: Path, built: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        with opened(folder, built, budget=budget) as session:
            tokens_of(session)
            first_matrix = first_matrix_of(session)
            assert first_matrix() is not None
        assert first_matrix() is None
    finally:
        gc.enable()


@pytest.mark.spec("GEN-8", "OFFLOAD-8")
@pytest.mark.parametrize("budget", [None, "smallest", "1GB"])
def test_a_closed_session_has_nothing_of_its_file_open_or_mapped(budget: str | None, folder: Path, built: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc, as Linux has it")
    bytes_ = smallest_for(folder, built) if budget == "smallest" else budget
    session = opened(folder, built, budget=bytes_)
    tokens_of(session)
    assert is_mapped(built) == (budget is None)
    assert is_open(built)
    session.close()
    gc.collect()
    assert not is_mapped(built)
    assert not is_open(built)


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def is_open(path: Path) -> bool:
    descriptors = Path("/proc/self/fd")
    return any(path == link.readlink() for link in descriptors.iterdir() if link.is_symlink())


@pytest.mark.spec("OFFLOAD-8")
def test_under_a_budget_no_weight_is_mapped_also_in_the_run_that_builds(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with opened(folder, cache, budget=smallest_for(folder, cache)) as session:
        assert session.weight_cache.state == "built"
        for _ in session.generate(token_ids=PROMPT, max_tokens=4):
            assert not is_mapped(cache)


@pytest.mark.spec("OFFLOAD-8")
def test_under_a_budget_the_original_is_not_mapped_either(folder: Path, built: Path) -> None:
    smallest = smallest_for(folder, built)
    gc.collect()  # the traceback of the refusal has the original open
    with opened(folder, built, budget=smallest) as session:
        for _ in session.generate(token_ids=PROMPT, max_tokens=4):
            assert not is_mapped(folder / "model.safetensors")


@pytest.mark.spec("OFFLOAD-8")
def test_a_run_within_a_budget_maps_neither_the_checkpoint_nor_the_file(tmp_path: Path) -> None:
    """Its process may have less address space than either of them takes."""
    config = replace(SHAPES["tiny"], intermediate_size=24_000, num_hidden_layers=4)
    write_checkpoint(tmp_path / "model", config, dtype="f32", seed=1)
    argv = ["generate", "--model", tmp_path / "model", "--token-ids", "1,2", "--max-tokens", 2, "--prefetch-threads", 0]
    argv += ["--budget", "16MB", "--weight-cache", tmp_path / "packed"]
    first = command(tmp_path, *argv, memory=None)
    assert first.status == 0, first.err
    whole = (tmp_path / "packed").stat().st_size
    assert whole > 70 << 20
    second = command(tmp_path, *argv, memory=48 << 20)
    second.require_civil()
    assert (second.status, second.out) == (0, first.out)
    without = ["generate", "--model", tmp_path / "model", "--token-ids", "1,2", "--weight-cache", tmp_path / "packed"]
    mapped = command(tmp_path, *without, memory=48 << 20)
    mapped.require_civil()
    assert mapped.status == 1
    assert "packed cannot be mapped: Cannot allocate memory; a run with --budget maps nothing" in mapped.err
