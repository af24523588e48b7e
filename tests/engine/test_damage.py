"""Damage of the cache file: mended before the first token, one error after it, and never a wrong token."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinfer.errors import DamagedWeightsError, RequestError
from refinfer.generate import Session
from refinfer.model.config import ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.model.weights import Weights
from refinfer.offload.store import FileStore
from refinfer.sources.packed import PackedSource
from refinfer.weight_cache.format import encode_file
from refinfer.weight_cache.identity import side_path
from refinfer.weight_cache.mapped_file import MappedFile, read_file
from refinfer.weight_cache.packers import record_nbytes

sys.path.insert(0, str(Path(__file__).parent))
import engine_runs
from engine_runs import (
    BUFFERS,
    PARTS,
    PROMPT,
    WEIGHTS,
    entries_of,
    flip,
    in_a_child,
    needs_fork,
    opened,
    place_in,
    smallest_for,
    start,
    tokens_of,
    told_by,
)

folder = engine_runs.folder
everyones = engine_runs.everyones
read_only = engine_runs.read_only
expected = engine_runs.expected
built = engine_runs.built


def fill_table_with_nan(cache: Path) -> None:
    """Make every number of the embedding table NaN, and every checksum and digest right again."""
    header, index = read_file(cache)
    data, entries = bytearray(cache.read_bytes()), []
    for entry in index.entries:
        if entry.key.packer == "rows":
            nbytes = record_nbytes(entry.key)
            for row in range(entry.key.shape[0]):
                start = entry.offset + row * nbytes
                data[start + 4 : start + nbytes] = b"\xff" * (nbytes - 4)
                data[start : start + 4] = zlib.crc32(data[start + 4 : start + nbytes], row).to_bytes(4, "little")
        chunks = [replace(c, checksum=zlib.crc32(data[c.offset : c.offset + c.nbytes])) for c in entry.chunks]
        digest = hashlib.sha256(data[entry.offset : entry.offset + entry.padded_nbytes]).digest()
        entries.append(replace(entry, chunks=tuple(chunks), digest=digest))
    encoded, page = encode_file(replace(index, entries=tuple(entries)), header.index_offset)
    cache.write_bytes(page + data[len(page) : header.index_offset] + encoded)


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
def test_a_file_cut_short_between_two_runs_is_rebuilt(
    size: int, budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    bytes_ = smallest_for(folder, built) if budget else None
    os.truncate(built, size)
    tokens, stats = start(folder, built, budget=bytes_)
    assert (tokens, stats.state) == (expected, "built")


@needs_fork
@pytest.mark.spec("GEN-16", "OFFLOAD-5")
@pytest.mark.parametrize("budget", [None, "smallest"])
def test_a_file_cut_short_after_loading_is_rebuilt_before_the_first_token(
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


@pytest.mark.spec("GEN-16", "GEN-5")
@pytest.mark.parametrize("budget", [None, "1GB"])
def test_packed_weights_that_are_not_finite_are_damage_if_those_of_the_model_are(
    budget: str | None, folder: Path, built: Path, expected: tuple[int, ...]
) -> None:
    fill_table_with_nan(built)
    assert not list(MappedFile(built).problems())
    tokens, stats = start(folder, built, budget=budget)
    assert (tokens, stats.state) == (expected, "built")
    assert stats.reason is not None
    assert "its logits are not finite, although all weights of the model are" in stats.reason
    assert start(folder, built, budget=budget)[1].state == "loaded"


@pytest.mark.spec("ERR-4", "GEN-16")
@pytest.mark.parametrize("budget", [None, "1GB"])
def test_damage_that_rebuilding_does_not_mend_says_what_else_helps(
    budget: str | None, folder: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinfer.sources.matrices.row_of_record", lambda *_: None)  # as on a failing disk
    with opened(folder, built, budget=budget) as session, pytest.raises(DamagedWeightsError) as caught:
        tokens_of(session)
    message = str(caught.value)
    assert message.endswith("; rebuilding the file did not help: remove it, or name another with --weight-cache")
    assert "start again" not in message


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
        assert tokens_of(session) == expected  # the same session begins again
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


def damage_in_pass(number: int, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage the last layer when the computation of a pass is done, just before the pass ends."""
    real, passes = PackedSource.forward_pass, count()

    @contextmanager
    def forward_pass(source: PackedSource) -> Iterator[Weights]:
        with real(source) as weights:
            yield weights
            if next(passes) == number:
                flip(built, place_in(built, "last layer"))

    monkeypatch.setattr(PackedSource, "forward_pass", forward_pass)


@pytest.mark.spec("GEN-16", "OFFLOAD-4")
def test_damage_during_the_pass_of_the_first_token_is_mended(
    folder: Path, built: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_in_pass(0, built, monkeypatch)
    tokens, stats = start(folder, built)
    assert (tokens, stats.state) == (expected, "built")
    assert re.search(REASONS["last layer"], str(stats.reason))


@pytest.mark.spec("GEN-17", "OFFLOAD-4", "KV-3")
def test_damage_during_the_pass_of_a_later_token_ends_the_run_before_that_token_is_shown(
    folder: Path, built: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_in_pass(3, built, monkeypatch)
    with opened(folder, built) as session:
        pieces = begun(session)
        with pytest.raises(DamagedWeightsError, match=REASONS["last layer"]):
            next(pieces)
        assert not built.exists()
        assert tokens_of(session) == expected


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

    monkeypatch.setattr("refinfer.offload.run.FileStore", opening)
    for module in ("refinfer.offload.run", "refinfer.engine"):
        monkeypatch.setattr(f"{module}.discard", lambda path, is_at: removed.append(path))
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
