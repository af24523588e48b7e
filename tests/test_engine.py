"""What a session does with its cache file and its budget, from the first start to damage in the middle of a text."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinfer.cli import main
from refinfer.engine import OffloadStats, WeightCacheStats
from refinfer.errors import BudgetError, DamagedWeightsError, InputError, RequestError
from refinfer.generate import STORYTELLER, GenerationStats, Session, load
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.offload.inventory import Inventory
from refinfer.offload.store import FileStore
from refinfer.packing.formats import FORMATS
from refinfer.weight_cache.format import Entry
from refinfer.weight_cache.identity import side_path
from refinfer.weight_cache.mapped_file import MappedFile, read_file
from refinfer.weight_cache.packers import record_nbytes

WATCHDOG_S = 10
NOBODY = 65534
PROMPT = [1, 2, 3, 4, 5]
POSITIONS = 24
BUFFERS = 24  # vectors, embedding table, seven matrices in each of three layers, output table

every_format = pytest.mark.parametrize("name", list(FORMATS))


def opened(folder: Path, cache: Path | str | None, **options: Any) -> Session:
    return load(folder, weight_cache=cache, max_positions=POSITIONS, threads=1, **options)


def stats_of(session: Session, max_tokens: int = 8) -> GenerationStats:
    list(session.generate(token_ids=PROMPT, max_tokens=max_tokens))
    assert session.stats is not None
    return session.stats


def tokens_of(session: Session, max_tokens: int = 8) -> tuple[int, ...]:
    return stats_of(session, max_tokens).token_ids


def start(folder: Path, cache: Path | str | None, **options: Any) -> tuple[tuple[int, ...], WeightCacheStats]:
    """Load a model, generate a few tokens, close it; return the tokens, and what the cache did."""
    with opened(folder, cache, **options) as session:
        return tokens_of(session), session.weight_cache


def smallest_for(folder: Path, cache: Path | str | None, **options: Any) -> int:
    """Ask for the smallest budget as people do: by trying one that is too small."""
    with pytest.raises(BudgetError) as refused:
        opened(folder, cache, budget=1, **options)
    found = re.search(r"the smallest that works is (\d+) bytes", str(refused.value))
    assert found
    return int(found[1])


def entries_of(cache: Path) -> dict[tuple[str, str], Entry]:
    return {(entry.key.packer, entry.key.name): entry for entry in read_file(cache)[1].entries}


def flip(cache: Path, offset: int) -> None:
    """Change a bit of a byte, in place."""
    with cache.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def place_in(cache: Path, what: str) -> int:
    """Return where some part of a cache file lies."""
    entries = entries_of(cache)
    vectors = next(entry for (packer, _), entry in entries.items() if packer == "vectors")
    table = entries["rows", "model.embed_tokens.weight"]
    places = {
        "header": 20,
        "index": cache.stat().st_size - 1,
        "vectors": vectors.offset + 100,
        "first layer": entries["goi", "model.layers.0.self_attn.v_proj.weight"].offset,
        "last layer": entries["goi", "model.layers.2.mlp.down_proj.weight"].offset + 77,
        "output table": entries["goi", "lm_head.weight"].offset + 1234,
        "a row of the prompt": table.offset + record_nbytes(table.key) * PROMPT[2] + 3,
    }
    return places[what]


PARTS = ["header", "index", "vectors", "first layer", "last layer", "output table", "a row of the prompt"]
WEIGHTS = PARTS[2:]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")


def in_a_child(work: Callable[[], Any], *, unprivileged: bool = False) -> Any:
    """Return what `work` returns in a process of its own, forked, where asked without rights; a watchdog ends it."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, of BLAS, and the child starts none
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(WATCHDOG_S)
            os.close(reader)
            if unprivileged and os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            with os.fdopen(writer, "w") as answer:
                json.dump(work(), answer)
            status = 0
        except BaseException:  # noqa: BLE001, RUF100 -- the child must not return into pytest
            sys.stderr.write(traceback.format_exc())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}"
    return json.loads(text)


def told_by(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what `work` returns, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    assert all(warning.category is RuntimeWarning for warning in caught)
    return result, [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def folder(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of a model with two tables, each of whose tokens is a letter; not to be written to."""
    folder = tmp_path_factory.mktemp("engine") / "model"
    write_checkpoint(folder, replace(tiny_config, vocab_size=65), dtype="f32", seed=3)
    shutil.copy(STORYTELLER / "tokenizer.json", folder)
    return folder


@pytest.fixture
def everyones(folder: Path) -> Iterator[Path]:
    """A folder that everyone may look into, with a model in it, and an empty folder `cache`."""
    with tempfile.TemporaryDirectory() as name:
        everyones = Path(name)
        everyones.chmod(0o755)
        model = Path(shutil.copytree(folder, everyones / "model"))
        (everyones / "cache").mkdir()
        for path in (model, *model.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield everyones


@pytest.fixture
def read_only(everyones: Path) -> Iterator[Path]:
    """The same, where the folder `cache` takes no new file."""
    (everyones / "cache").chmod(0o555)
    yield everyones
    (everyones / "cache").chmod(0o755)


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[int, ...]:
    """The tokens, whatever they are computed with."""
    return start(folder, ":memory")[0]


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


# GEN-13 and GEN-14: where there is no room for a file.


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
    ({"budget": "40%", "cache": ":memory"}, "a budget needs a cache file; --weight-cache :memory has none"),
    ({"budget": "40%", "cache": "off"}, "a budget needs a cache file; --weight-cache off has none"),
    ({"budget": "40%", "plan": "nonsense"}, "the plan must be one of"),
    ({"budget": "40%", "lock_memory": True}, "under a budget the plan says what is locked"),
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
    assert stats.offload.locked_bytes == 0
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
    assert (first.streamed_bytes_per_token, first.ring_bytes, first.wait_s) == (0, 0, 0.0)
    assert first.locked_bytes == Inventory(config, "bf16").streamable_nbytes
    assert first.read_bytes_total == second.read_bytes_total == first.locked_bytes + first.resident_bytes


# GEN-16: damage before the first token is mended.


@pytest.fixture
def built(folder: Path, tmp_path: Path) -> Path:
    """A cache file, built."""
    start(folder, tmp_path / "cache" / "weights")
    return tmp_path / "cache" / "weights"


REASONS = {
    "header": "its header is damaged",
    "index": "its index is damaged",
    "vectors": r"\d+ vectors [0-9a-f]{16},? .*does not agree with its checksum",
    "first layer": r"model\.layers\.0\.self_attn\.v_proj\.weight, chunk 0, does not agree with its checksum",
    "last layer": r"model\.layers\.2\.mlp\.down_proj\.weight, chunk 0, does not agree with its checksum",
    "output table": r"lm_head\.weight, chunk 0, does not agree with its checksum",
    "a row of the prompt": r"model\.embed_tokens\.weight does not agree with its checksum",
}


@pytest.mark.spec("GEN-16")
@pytest.mark.parametrize("budget", [None, "smallest", "1GB"])
@pytest.mark.parametrize("part", PARTS)
def test_damage_between_two_runs_is_mended_in_the_same_run(
    part: str, budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget == "smallest" else budget
    flip(built, place_in(built, part))
    tokens, stats = start(folder, built, budget=bytes_)
    assert tokens == expected
    assert stats.state == "built"
    assert stats.reason is not None
    assert re.search(REASONS[part], stats.reason)
    assert stats.packed_buffers == BUFFERS
    assert not list(MappedFile(built).problems())
    tokens, stats = start(folder, built, budget=bytes_)
    assert (tokens, stats.state, stats.reason) == (expected, "loaded", None)
    assert {path.name for path in built.parent.iterdir()} == {built.name, side_path(built).name}


@pytest.mark.spec("GEN-16", "GEN-6")
@pytest.mark.parametrize("budget", [None, "smallest"])
def test_damage_found_by_logits_is_mended_too(budget: str | None, folder: Path, built: Path) -> None:
    bytes_ = smallest_for(folder, built) if budget else None
    with opened(folder, ":memory") as session:
        expected = session.logits(PROMPT)
    with opened(folder, built, budget=bytes_) as session:
        flip(built, place_in(built, "last layer"))
        np.testing.assert_array_equal(session.logits(PROMPT), expected)
        assert session.weight_cache.state == "built"
        assert tokens_of(session)


@pytest.mark.spec("GEN-16")
@pytest.mark.parametrize("budget", [None, "smallest"])
@pytest.mark.parametrize("size", [0, 4096, 100_000])
def test_a_file_cut_short_between_two_runs_is_built_anew(
    size: int, budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget else None
    os.truncate(built, size)
    tokens, stats = start(folder, built, budget=bytes_)
    assert (tokens, stats.state) == (expected, "built")


@needs_fork
@pytest.mark.spec("GEN-16", "OFFLOAD-5")
@pytest.mark.parametrize("budget", [None, "smallest"])
def test_a_file_cut_short_after_loading_is_built_anew_before_the_first_token(
    budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget else None

    def work() -> Any:
        with opened(folder, built, budget=bytes_) as session:
            os.truncate(built, 8192)
            return [tokens_of(session), session.weight_cache.state, session.weight_cache.reason]

    tokens, state, reason = in_a_child(work)
    assert (tuple(tokens), state) == (expected, "built")
    assert "was cut short while it was in use" in reason
    assert start(folder, built)[1].state == "loaded"


@needs_fork
@pytest.mark.spec("GEN-16")
@pytest.mark.parametrize("part", WEIGHTS)
def test_damage_that_cannot_be_removed_is_packed_around_in_memory(
    part: str, read_only: Path, expected: tuple[int, ...]
) -> None:
    cache = read_only / "cache" / "weights"
    (read_only / "cache").chmod(0o755)
    start(read_only / "model", cache)
    (read_only / "cache").chmod(0o555)
    flip(cache, place_in(cache, part))
    before = cache.read_bytes()

    def work() -> Any:
        (tokens, stats), told = told_by(lambda: start(read_only / "model", cache))
        return [tokens, stats.state, stats.path, stats.reason, told]

    tokens, state, path, reason, _ = in_a_child(work, unprivileged=True)
    assert (tuple(tokens), state, path) == (expected, "memory", None)
    assert re.search(REASONS[part], reason)
    assert cache.read_bytes() == before


@needs_fork
@pytest.mark.spec("GEN-16", "GEN-14")
@pytest.mark.parametrize("budget", ["smallest", "1GB"])
def test_damage_that_cannot_be_removed_is_one_error_under_a_budget(budget: str, read_only: Path) -> None:
    cache = read_only / "cache" / "weights"
    (read_only / "cache").chmod(0o755)
    start(read_only / "model", cache)
    (read_only / "cache").chmod(0o555)
    bytes_ = smallest_for(read_only / "model", cache) if budget == "smallest" else budget
    flip(cache, place_in(cache, "last layer"))

    def work() -> Any:
        with pytest.raises(DamagedWeightsError) as error:
            start(read_only / "model", cache, budget=bytes_)
        return str(error.value)

    assert "does not agree with its checksum" in in_a_child(work, unprivileged=True)


# GEN-17: damage later on ends the run, and the next start builds.


def begun(session: Session, n: int = 3) -> Iterator[str]:
    """Begin a generation, and have its first tokens."""
    pieces = session.generate(token_ids=PROMPT, max_tokens=12)
    assert len("".join(next(pieces) for _ in range(n))) == n
    return pieces


@pytest.mark.spec("GEN-17", "OFFLOAD-4", "OFFLOAD-9")
@pytest.mark.parametrize("budget", [None, "smallest"])
@pytest.mark.parametrize("part", ["first layer", "last layer", "output table"])
def test_damage_after_the_first_token_ends_the_run_and_the_next_start_builds(
    part: str, budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget else None
    with opened(folder, built, budget=bytes_) as session:
        assert session.weight_cache.state == "loaded"
        pieces = begun(session)
        flip(built, place_in(built, part))
        with pytest.raises(DamagedWeightsError, match=REASONS[part]):
            next(pieces)
        assert not built.exists()
        assert list(pieces) == []
        assert tokens_of(session) == expected  # the same session begins anew
        assert session.weight_cache.state == "built"
    assert start(folder, built)[1].state == "loaded"


@pytest.mark.spec("GEN-17")
@pytest.mark.parametrize("budget", [None, "smallest"])
def test_after_damage_in_the_middle_of_a_text_another_process_builds(
    budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget else None
    with opened(folder, built, budget=bytes_) as session:
        pieces = begun(session)
        flip(built, place_in(built, "last layer"))
        with pytest.raises(DamagedWeightsError):
            list(pieces)
    tokens, stats = start(folder, built, budget=bytes_)
    assert (tokens, stats.state, stats.reason) == (expected, "built", "there was no file yet")


@pytest.mark.spec("GEN-17", "OFFLOAD-6")
@pytest.mark.parametrize("budget", [None, "smallest", "1GB"])
def test_a_damaged_row_of_the_next_token_ends_the_run(budget: str | None, folder: Path, built: Path) -> None:
    bytes_ = smallest_for(folder, built) if budget == "smallest" else budget
    table = entries_of(built)["rows", "model.embed_tokens.weight"]
    with opened(folder, built, budget=bytes_) as session:
        pieces = session.generate(token_ids=PROMPT, max_tokens=12)
        token = session.model.encode(next(pieces))[0]  # its row is looked up next
        flip(built, table.offset + record_nbytes(table.key) * token + 9)
        with pytest.raises(DamagedWeightsError, match=REASONS["a row of the prompt"]):
            next(pieces)
    assert not built.exists()


@pytest.mark.spec("GEN-17")
def test_what_is_locked_is_safe_from_damage_on_the_disk(folder: Path, built: Path, expected: tuple[int, ...]) -> None:
    with opened(folder, built, budget="1GB") as session:
        pieces = session.generate(token_ids=PROMPT, max_tokens=8)
        next(pieces)
        for part in ("vectors", "first layer", "last layer", "output table"):
            flip(built, place_in(built, part))
        list(pieces)
        assert session.stats is not None
        assert session.stats.token_ids == expected
        assert session.weight_cache.state == "loaded"


@needs_fork
@pytest.mark.spec("GEN-17", "OFFLOAD-5", "OFFLOAD-9")
@pytest.mark.parametrize("budget", [None, "smallest"])
@pytest.mark.parametrize("size", [0, 4096, 60_000])
def test_a_file_cut_short_after_the_first_token_ends_the_run_and_the_next_start_builds(
    size: int, budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget else None

    def work() -> Any:
        with opened(folder, built, budget=bytes_) as session:
            pieces = begun(session)
            os.truncate(built, size)
            with pytest.raises(DamagedWeightsError, match="was cut short while it was in use; start again"):
                next(pieces)
            return built.exists()

    assert in_a_child(work) is False
    tokens, stats = start(folder, built, budget=bytes_)
    assert (tokens, stats.state) == (expected, "built")


@needs_fork
@pytest.mark.spec("GEN-17")
@pytest.mark.parametrize("budget", [None, "smallest"])
def test_damage_after_the_first_token_that_cannot_be_removed_ends_the_run_all_the_same(
    budget: str | None, read_only: Path
) -> None:
    cache = read_only / "cache" / "weights"
    (read_only / "cache").chmod(0o755)
    start(read_only / "model", cache)
    (read_only / "cache").chmod(0o555)
    cache.chmod(0o666)
    bytes_ = smallest_for(read_only / "model", cache) if budget else None

    def work() -> Any:
        with opened(read_only / "model", cache, budget=bytes_) as session:
            pieces = begun(session)
            flip(cache, place_in(cache, "last layer"))
            with pytest.raises(DamagedWeightsError, match=REASONS["last layer"]):
                next(pieces)
        return True

    assert in_a_child(work, unprivileged=True)
    assert cache.exists()


@pytest.mark.spec("GEN-17", "OPEN-7")
@pytest.mark.parametrize("budget", [None, "smallest"])
def test_a_file_that_has_taken_the_place_of_the_damaged_one_stays(
    budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget else None
    good = built.read_bytes()
    with opened(folder, built, budget=bytes_) as session:
        pieces = begun(session)
        flip(built, place_in(built, "last layer"))
        other = built.with_name("other")
        other.write_bytes(good)
        other.replace(built)
        with pytest.raises(DamagedWeightsError):
            next(pieces)
    tokens, stats = start(folder, built)
    assert (tokens, stats.state) == (expected, "loaded")


@pytest.mark.spec("GEN-16", "OPEN-7")
def test_a_file_that_another_replaces_while_it_is_opened_is_not_removed(
    tiny_config: ModelConfig, folder: Path, built: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the good file of another model, after the first one was looked at and before it is read."""
    another = built.with_name("another")
    write_checkpoint(built.parent / "m", replace(tiny_config, vocab_size=65), dtype="f32", seed=4)
    start(built.parent / "m", another)
    removed: list[Path] = []

    def opening(path: Path) -> FileStore:
        if another.exists():
            another.replace(path)
        return FileStore(path)

    monkeypatch.setattr("refinfer.engine.FileStore", opening)
    monkeypatch.setattr("refinfer.engine.discard", lambda path, is_at: removed.append(path))
    tokens, stats = start(folder, built, budget="1GB")
    assert (tokens, stats.state, stats.reason) == (expected, "built", f"{built} was replaced while it was opened")
    assert not removed


@pytest.mark.spec("GEN-6", "GEN-16")
@pytest.mark.parametrize("budget", [None, "smallest"])
def test_damage_found_by_logits_does_not_disturb_a_generation(
    budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget else None
    with opened(folder, built, budget=bytes_) as session:
        pieces = session.generate(token_ids=PROMPT, max_tokens=8)
        text = "".join(next(pieces) for _ in range(3))
        flip(built, place_in(built, "last layer"))
        session.logits(PROMPT)
        try:
            text += "".join(pieces)
        except (RequestError, DamagedWeightsError):
            text = session.model.tokenizer.decode(expected)  # type: ignore[union-attr]  # it may end, but not go astray
        assert tuple(session.model.encode(text)) == expected


# GEN-8: what a closed session has released.


@pytest.mark.spec("GEN-8", "OFFLOAD-8")
@pytest.mark.parametrize("budget", [None, "1GB"])
def test_a_closed_session_has_released_its_weights_at_once(budget: str | None, folder: Path, built: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        with opened(folder, built, budget=budget) as session:
            tokens_of(session)
            weights = weakref.ref(session._transformer.source.layers().__next__().q_proj)
        assert weights() is None
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
    with opened(folder, built, budget=smallest_for(folder, built)) as session:
        for _ in session.generate(token_ids=PROMPT, max_tokens=4):
            assert not is_mapped(folder / "model.safetensors")


# GEN-18: the closing figures.


GENERATION_KEYS = ["text", "prompt_token_ids", "token_ids", "finish_reason", "time_to_first_token_s", "tokens_per_s",
                   "peak_rss_bytes", "weight_cache", "offload"]  # fmt: skip
WEIGHT_CACHE_KEYS = ["state", "path", "reason", "packed_buffers", "packed_bytes", "load_or_build_s"]
OFFLOAD_KEYS = ["plan", "budget_bytes", "locked_bytes", "resident_bytes", "ring_bytes", "kv_cache_bytes",
                "scratch_bytes", "peak_bytes", "streamed_bytes_per_token", "read_bytes_total",
                "predicted_tokens_per_s", "ideal_tokens_per_s", "wait_s", "compute_s"]  # fmt: skip


@pytest.mark.spec("GEN-18", "CLI-2")
def test_the_figures_have_the_documented_names() -> None:
    assert [field.name for field in fields(GenerationStats)] == GENERATION_KEYS
    assert [field.name for field in fields(WeightCacheStats)] == WEIGHT_CACHE_KEYS
    assert [field.name for field in fields(OffloadStats)] == OFFLOAD_KEYS


def generated(folder: Path, cache: Path | str, *options: str) -> list[str]:
    ids = ",".join(map(str, PROMPT))
    return ["generate", "--model", str(folder), "--token-ids", ids, "--max-tokens", "6", "--weight-cache", str(cache),
            *options]  # fmt: skip


@pytest.mark.spec("GEN-18", "CLI-2", "OFFLOAD-8")
def test_json_says_what_the_cache_did_and_where_the_budget_went(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    argv = generated(folder, cache, "--json")
    streaming = ["--plan", "leading", "--prefetch-threads", "0", "--budget"]
    for n, (budget, state) in enumerate([(None, "built"), ("200kB", "loaded"), ("1GB", "loaded")]):
        assert main([*argv, *([*streaming, budget] if budget else [])]) == 0
        captured = capsys.readouterr()
        result = json.loads(captured.out)
        assert captured.err == ""
        assert list(result) == GENERATION_KEYS
        assert list(result["weight_cache"]) == WEIGHT_CACHE_KEYS
        about = result["weight_cache"]
        assert (about["state"], about["path"]) == (state, str(cache))
        assert (about["packed_buffers"], about["packed_bytes"] > 0) == ((BUFFERS, True) if n == 0 else (0, False))
        assert about["load_or_build_s"] > 0
        if budget is None:
            assert result["offload"] is None
            continue
        offload = result["offload"]
        assert list(offload) == OFFLOAD_KEYS
        inventory = Inventory(open_folder(folder).config, "f32")
        parts = sum(offload[f"{part}_bytes"] for part in ("locked", "resident", "ring", "kv_cache", "scratch"))
        assert offload["budget_bytes"] == {"200kB": 200_000, "1GB": 10**9}[budget]
        assert parts <= offload["peak_bytes"] <= offload["budget_bytes"]
        assert offload["resident_bytes"] == inventory.resident_nbytes
        assert offload["streamed_bytes_per_token"] == inventory.streamable_nbytes - offload["locked_bytes"]
        read_once = offload["locked_bytes"] + offload["resident_bytes"]
        rows = 4096 * (len(PROMPT) + 6)
        streamed = 6 * offload["streamed_bytes_per_token"]
        assert read_once + streamed < offload["read_bytes_total"] <= read_once + streamed + 2 * rows
        assert offload["wait_s"] + offload["compute_s"] > 0


@pytest.mark.spec("GEN-18", "CLI-1")
def test_people_read_what_the_cache_did_and_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"

    def line(*options: str, where: Path | str = cache) -> str:
        assert main(generated(folder, where, *options)) == 0
        found = re.findall(r"^weight cache: (.*)$", capsys.readouterr().err, flags=re.MULTILINE)
        assert len(found) == 1
        return str(found[0])

    assert re.fullmatch(r"packed 24 buffers, \d+ kB, in \d+ ms; the next start will map them", line())
    assert re.fullmatch(r"mapped 24 buffers, \d+ kB, in \d+ ms; packing took \d+ ms", line())
    flip(cache, place_in(cache, "header"))
    assert line().startswith("rebuilt: its header is damaged; packed 24 buffers, ")
    flip(cache, place_in(cache, "last layer"))
    assert re.match(r"rebuilt: .*down_proj\.weight, chunk 0, does not agree .*; packed 24 buffers, ", line())
    assert re.fullmatch(r"packed 24 buffers, \d+ kB, into memory in \d+ ms", line(where=":memory"))
    assert line(where="off") == "off: nothing was packed"


@pytest.mark.spec("GEN-18", "CLI-1")
def test_people_read_where_a_budget_went(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generated(folder, tmp_path / "cache", "--budget", "200kB", "--plan", "leading")) == 0
    err = capsys.readouterr().err
    parts = r"locked .*, norms and biases .*, ring .*, KV cache .*, scratch .*"
    assert re.search(rf"^budget: 200 kB, at most \d+ kB in use: {parts}$", err, flags=re.MULTILINE)
    said = r"^plan leading: \d+ kB read for each token, .* in all; waited \d+ ms for it, computed \d+ ms$"
    assert re.search(said, err, flags=re.MULTILINE)


@needs_fork
@pytest.mark.spec("GEN-18")
def test_people_read_why_weights_are_in_memory_although_a_file_was_asked_for(read_only: Path) -> None:
    cache = read_only / "cache" / "weights"
    (read_only / "cache").chmod(0o755)
    start(read_only / "model", cache)
    (read_only / "cache").chmod(0o555)
    flip(cache, place_in(cache, "last layer"))

    def work() -> Any:
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.stdout = os.fdopen(2, "w", closefd=False), os.fdopen(1, "w", closefd=False)
        assert main(generated(read_only / "model", cache)) == 0
        sys.stderr.flush()
        return os.read(reader, 1 << 16).decode()

    assert "does not agree with its checksum" in in_a_child(work, unprivileged=True)


class SteppingClock:
    """A clock that goes on by one second each time it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        self.seconds += 1
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.mark.spec("GEN-18", "ERR-3")
def test_waiting_and_computing_are_what_a_generation_took(folder: Path, built: Path) -> None:
    budget = smallest_for(folder, built)
    with opened(folder, built, budget=budget, prefetch_threads=0, clock=SteppingClock()) as session:
        first = stats_of(session).offload
    assert first is not None
    chunks = len(Inventory(open_folder(folder).config, "f32").cycle)
    assert first.wait_s == 8 * chunks  # a second for each reading of the clock, two for each chunk
    assert first.compute_s == 8 * chunks + 8


@pytest.mark.spec("GEN-18")
def test_waiting_and_computing_of_a_later_generation_are_its_own(folder: Path, built: Path) -> None:
    budget = smallest_for(folder, built)
    with opened(folder, built, budget=budget, prefetch_threads=0, clock=SteppingClock()) as session:
        first, second = stats_of(session).offload, stats_of(session).offload
    assert first is not None
    assert second is not None
    assert (second.wait_s, second.compute_s) == (first.wait_s, first.compute_s)
