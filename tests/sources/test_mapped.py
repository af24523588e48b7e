"""Specifies `refinfer.sources.mapped`: mapped weights are checked, and changes of their file are found."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES
from refinfer.clock import Clock, RealClock
from refinfer.errors import DamagedWeightsError, GenerationError
from refinfer.model.config import SHAPES
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer
from refinfer.model.weights import LayerWeights, Weights, WeightSource
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.readers import Loan
from refinfer.packing.layout import Bytes, Tiles
from refinfer.sources.mapped import MakeAhead, Watch
from refinfer.sources.matrices import ChunkedMatrix
from refinfer.sources.packed import PackedSource
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import StoredChunk
from refinfer.weight_cache.mapped_file import MappedFile

sys.path.insert(0, str(Path(__file__).parents[1] / "offload"))
from build_site import come_to_rest
from packed_model import PackedModel, change, threads_and_descriptors

POSITIONS = 48
WATCHDOG_S = 60


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding table is the output table, and one with two tables."""
    folder = tmp_path_factory.mktemp("source") / "m"
    config = replace(
        SHAPES["tiny"],
        vocab_size=70,
        hidden_size=40,
        intermediate_size=52,
        num_hidden_layers=2,
        qkv_bias=True,
        qk_norm=True,
        model_type="qwen3",
    )
    write_checkpoint(folder, replace(config, tie_word_embeddings=request.param == "tied"), dtype="f32")
    return folder


class Mapped:
    """A model in its mapped cache file, and a transformer over it."""

    def __init__(self, folder: Path, path: Path, name: str = "int8", ahead: MakeAhead | None = Prefetcher) -> None:
        self.model = PackedModel(open_folder(folder).config, folder, name, path, POSITIONS, ahead=ahead)
        self.path, self.inventory = path, self.model.inventory
        self.source = self.model.packed()
        self.transformer = Transformer(self.source, POSITIONS)
        self.entries, self.vectors = self.model.entries, self.model.vectors

    def token(self, token_id: int = 7) -> npt.NDArray[np.uint32]:
        """Return the bits of the logits after one token, from an empty text."""
        self.transformer.kv_cache.rewind(0)
        return self.transformer.decode([token_id]).view(np.uint32)

    def again(self, clock: Clock | None = None, ahead: MakeAhead | None = None) -> Transformer:
        """Return a transformer over the same file, mapped once more."""
        ahead = ahead or self.model.ahead
        provider = FileWeightCacheProvider.load(self.path)
        keys = {entry.key.name: entry.key for entry in provider.entries}
        rows = self.transformer.block
        source = PackedSource(self.inventory, provider, keys, rows, clock or RealClock(), provider.mapped, ahead)
        return Transformer(source, POSITIONS)

    def chunks(self) -> Iterator[tuple[str, int, int, int]]:
        """Walk over the matrices' chunks: name, number, offset, bytes."""
        for matrix in self.inventory.matrices:
            for number, chunk in enumerate(self.entries[matrix.name].chunks):
                yield matrix.name, number, chunk.offset, chunk.nbytes


@pytest.fixture(params=[Prefetcher, None], ids=["ahead", "in place"])
def mapped(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Mapped:
    """A model whose chunks are checked by threads ahead of their use, or when they are used."""
    return Mapped(folder, tmp_path / "cache", ahead=request.param)


@pytest.fixture
def ahead(folder: Path, tmp_path: Path) -> Mapped:
    return Mapped(folder, tmp_path / "cache")


@pytest.mark.spec("OFFLOAD-4")
def test_a_chunk_damaged_before_its_first_product_is_found(mapped: Mapped) -> None:
    """Each chunk, and the vectors: in a file that has just been mapped, and none of which has been read."""
    places = [*mapped.chunks(), ("vectors", None, mapped.vectors.offset, 4 * sum(mapped.inventory.vectors.values()))]
    for name, number, offset, nbytes in places:
        at = offset + (nbytes - 1 if (number or 0) % 2 else 0)
        fresh = mapped.again()
        change(mapped.path, at)
        what = r"\d+ vectors" if number is None else f"{re.escape(name)}, chunk {number},"
        with pytest.raises(DamagedWeightsError, match=f"{re.escape(str(mapped.path))}: {what}.*does not agree"):
            fresh.decode([7])
        change(mapped.path, at)


@pytest.mark.spec("OFFLOAD-4")
def test_a_byte_written_between_two_tokens_is_found_before_the_next_is_shown(mapped: Mapped) -> None:
    """In each chunk and in the vectors; put back, the run goes on with the same bits."""
    expected = mapped.token()
    vectors = (mapped.vectors.offset, 4 * sum(mapped.inventory.vectors.values()))
    places = [(offset, nbytes) for _, _, offset, nbytes in mapped.chunks()]
    for offset, nbytes in [*places, vectors]:
        for at in (offset, offset + nbytes // 2, offset + nbytes - 1):
            change(mapped.path, at)
            with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
                mapped.token()
            change(mapped.path, at)
        np.testing.assert_array_equal(mapped.token(), expected)


@pytest.mark.spec("OFFLOAD-4")
def test_damage_is_found_again_and_again_until_it_is_put_right(mapped: Mapped) -> None:
    expected = mapped.token()
    for _, _, offset, _ in list(mapped.chunks())[::7]:
        change(mapped.path, offset)
        for _ in range(3):
            with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
                mapped.token()
        change(mapped.path, offset)
        np.testing.assert_array_equal(mapped.token(), expected)


class ActingDuringAPass:
    """A source during whose pass somebody does something: before the layer of a number, after all, or at the end."""

    def __init__(self, source: WeightSource, act: Callable[[], None], at: int | str, *, in_pass: int = 0) -> None:
        self.source, self.config = source, source.config
        self.passes = 0
        self._act, self._at, self._in_pass = act, at, in_pass

    def _layers(self, weights: Weights, at: int | str) -> Iterator[LayerWeights]:
        for number, layer in enumerate(weights.layers):
            if number == at:
                self._act()
            yield layer
        if at == "after all layers":
            self._act()

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        at = self._at if self.passes == self._in_pass else "never"
        self.passes += 1
        with self.source.forward_pass() as weights:
            yield replace(weights, layers=self._layers(weights, at))
            if at == "at the end":
                self._act()

    def close(self) -> None:
        self.source.close()


MOMENTS: Final = [0, 1, "after all layers", "at the end"]


@pytest.mark.spec("OFFLOAD-4", "KV-3")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_byte_written_during_a_pass_is_found_before_its_logits_are_returned(
    mapped: Mapped, moment: int | str
) -> None:
    """Also in a chunk that this pass has used before, or that was checked before and is used after."""
    plain = mapped.transformer
    plain.kv_cache.rewind(0)
    expected = [plain.decode([3]), plain.decode([7])]
    for at in [*(offset for _, _, offset, _ in mapped.chunks()), mapped.vectors.offset]:
        writing = ActingDuringAPass(mapped.source, lambda at=at: change(mapped.path, at), moment, in_pass=1)  # type: ignore[misc]
        transformer = Transformer(writing, POSITIONS)
        np.testing.assert_array_equal(transformer.decode([3]), expected[0])
        with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
            transformer.decode([7])
        assert transformer.kv_cache.length == 1
        change(mapped.path, at)
        np.testing.assert_array_equal(transformer.decode([7]), expected[1])


@pytest.mark.spec("OFFLOAD-4", "KV-3")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_byte_written_between_two_blocks_of_a_prompt_is_found_and_no_block_of_it_counts(
    mapped: Mapped, moment: int | str
) -> None:
    at = next(iter(mapped.chunks()))[2]
    writing = ActingDuringAPass(mapped.source, lambda: change(mapped.path, at), moment, in_pass=2)
    transformer = Transformer(writing, POSITIONS)
    assert transformer.block < 40
    transformer.decode([3])
    with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
        transformer.prefill(list(range(40)))
    assert (writing.passes, transformer.kv_cache.length) == (3, 1)
    change(mapped.path, at)
    mapped.transformer.kv_cache.rewind(0)
    mapped.transformer.decode([3])
    np.testing.assert_array_equal(transformer.prefill(list(range(40))), mapped.transformer.prefill(list(range(40))))


class LeftError(Exception):
    """Raised in the middle of a pass."""


@pytest.mark.spec("OFFLOAD-4", "OFFLOAD-10")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pass_that_an_exception_ends_is_not_checked_and_the_next_one_is(
    folder: Path, tmp_path: Path, moment: int | str, checked: list[int]
) -> None:
    mapped = Mapped(folder, tmp_path / "cache", ahead=None)
    at = [offset for _, _, offset, _ in mapped.chunks()][-1]
    checked_then: list[int] = []

    def write_and_leave() -> None:
        change(mapped.path, at)
        checked_then[:] = checked
        raise LeftError

    expected = mapped.token()
    transformer = Transformer(ActingDuringAPass(mapped.source, write_and_leave, moment), POSITIONS)
    with pytest.raises(LeftError):
        transformer.decode([7])
    assert checked == checked_then
    with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
        transformer.decode([7])
    change(mapped.path, at)
    np.testing.assert_array_equal(transformer.decode([7]).view(np.uint32), expected)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the offsets of all chunks that are checked from now on."""
    offsets, real = [], MappedFile.is_sound

    def is_sound(file: MappedFile, chunk: StoredChunk) -> bool:
        offsets.append(chunk.offset)
        return real(file, chunk)

    monkeypatch.setattr(MappedFile, "is_sound", is_sound)
    return offsets


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content)


def through_a_mapping(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[PAGE_BYTES + 3] ^= 1
        mapping.flush()


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.spec("OFFLOAD-4")
@pytest.mark.parametrize("act", [rewrite, extend, os.utime, lambda path: path.chmod(0o600)])
def test_whoever_touches_the_file_and_leaves_its_weights_alone_changes_nothing(
    mapped: Mapped, act: Callable[[Path], None]
) -> None:
    expected = mapped.token()
    act(mapped.path)
    np.testing.assert_array_equal(mapped.token(), expected)


@pytest.mark.spec("OFFLOAD-4")
def test_what_is_written_through_a_mapping_and_flushed_is_found(mapped: Mapped) -> None:
    mapped.token()
    through_a_mapping(mapped.path)
    with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
        mapped.token()


@pytest.mark.spec("OFFLOAD-4")
def test_times_put_back_hide_nothing(mapped: Mapped) -> None:
    mapped.token()
    before = mapped.path.stat()
    change(mapped.path, next(iter(mapped.chunks()))[2])
    os.utime(mapped.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
        mapped.token()


@pytest.mark.spec("OFFLOAD-4", "PUBLISH-5")
def test_a_file_that_takes_the_place_of_the_mapped_one_changes_nothing(mapped: Mapped) -> None:
    expected = mapped.token()
    other = mapped.path.with_name("other")
    other.write_bytes(bytes(mapped.path.stat().st_size))
    other.replace(mapped.path)
    np.testing.assert_array_equal(mapped.token(), expected)
    mapped.path.unlink()
    np.testing.assert_array_equal(mapped.token(), expected)


class StoppedClock:
    """A clock that stands still until somebody sets it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.mark.spec("OFFLOAD-4")
def test_nothing_is_checked_twice_unless_somebody_wrote_lately(mapped: Mapped, checked: list[int]) -> None:
    """Checking everything at each token would cost more than multiplying."""
    clock = StoppedClock()
    everything = {mapped.vectors.offset, *(offset for _, _, offset, _ in mapped.chunks())}
    transformer = mapped.again(clock)

    def checked_by_a_token(seconds_later: float) -> set[int]:
        clock.seconds += seconds_later
        checked.clear()
        transformer.kv_cache.rewind(0)
        transformer.decode([7])
        return set(checked)

    os.utime(mapped.path)
    for _ in range(3):  # as long as another write may leave the same times
        assert checked_by_a_token(0) == everything
    checked_by_a_token(10)  # the file is at rest now, in any case
    assert checked_by_a_token(0) == set()
    assert checked_by_a_token(10) == set()
    os.utime(mapped.path)
    assert checked_by_a_token(10) == everything
    checked_by_a_token(10)
    assert checked_by_a_token(10) == set()


class Ahead:
    """Checks a chunk when it is taken, and notes what it was asked for."""

    made: ClassVar[list[Ahead]] = []

    def __init__(
        self, order: Sequence[int], slots: Sequence[Bytes], read: Callable[[int, Bytes, int], Tiles], threads: int
    ) -> None:
        self.order, self.slots, self.threads = list(order), len(slots), threads
        self.taken: list[int] = []
        self.released = self.closed = 0
        self._read = read
        self.made.append(self)

    def take(self, chunk: int) -> Loan:
        assert not self.closed
        assert self.released == len(self.taken)
        self.taken.append(chunk)
        return Loan(self._read(chunk, np.empty(0, np.uint8), 0))

    def release(self, loan: Loan) -> None:
        self.released += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Ahead]:
    """Return the list of all that is made from now on."""
    monkeypatch.setattr(Ahead, "made", [])
    return Ahead.made


@pytest.mark.spec("OFFLOAD-13")
def test_every_chunk_is_checked_ahead_once_in_the_order_of_use_in_a_pass_that_needs_it(
    ahead: Mapped, made: list[Ahead], checked: list[int]
) -> None:
    clock = StoppedClock()
    transformer = ahead.again(clock, Ahead)
    clock.seconds = 10  # so that the file is at rest, in any case
    everything = list(range(len(list(ahead.chunks()))))
    for n in (1, 2, 3):
        checked.clear()
        for _ in range(3):
            transformer.kv_cache.rewind(0)
            transformer.decode([7])
            clock.seconds += 10
        assert len(made) in (n, n + 1)  # twice, if the file was young
        assert made[-1].order == made[-1].taken == everything
        assert (made[-1].slots, made[-1].closed) == (8, 1)
        del made[n:]
        os.utime(ahead.path)


@pytest.mark.spec("OFFLOAD-13")
def test_what_a_pass_left_unchecked_is_checked_ahead_in_the_next(ahead: Mapped, made: list[Ahead]) -> None:
    """The first block of a prompt does not use the output table."""
    transformer = ahead.again(StoppedClock(), Ahead)
    ahead.source.close()
    first_of_output = min(n for n, (name, *_) in enumerate(ahead.chunks()) if name == ahead.inventory.matrices[-1].name)
    with transformer.source.forward_pass() as weights:
        weights.embed_tokens.rows(np.array([7]))
        for layer in weights.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                matrix = getattr(layer, name)
                matrix.matmul(np.zeros((1, matrix.shape[1]), np.float32))
    assert made[0].taken == list(range(first_of_output))
    with transformer.source.forward_pass() as weights:
        for _ in range(2):  # what is used again is not asked for again
            weights.lm_head.matmul(np.zeros((1, weights.lm_head.shape[1]), np.float32))
    taken = made[-1].taken
    assert taken[-1] == len(list(ahead.chunks())) - 1
    assert taken == sorted(set(taken))
    assert [each.closed for each in made] == [1] * len(made)


@pytest.mark.spec("OFFLOAD-13")
def test_the_chunk_after_the_one_that_is_multiplied_is_under_check(
    ahead: Mapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = {offset: threading.Event() for _, _, offset, _ in ahead.chunks()}
    real = MappedFile.is_sound
    ended: list[int] = []
    by: set[str] = set()

    def is_sound(file: MappedFile, chunk: StoredChunk) -> bool:
        if chunk.offset in begun:
            begun[chunk.offset].set()
            by.add(threading.current_thread().name)
        sound = real(file, chunk)
        ended.append(chunk.offset)
        return sound

    monkeypatch.setattr(MappedFile, "is_sound", is_sound)
    with ahead.again().source.forward_pass() as weights:
        first = next(iter(weights.layers)).q_proj
        assert isinstance(first, ChunkedMatrix)
        offsets = [offset for _, _, offset, _ in ahead.chunks()]
        for number, _ in enumerate(first._chunks.in_order()):
            assert offsets[number] in ended
            assert begun[offsets[number + 1]].wait(WATCHDOG_S)  # while this chunk is in use
        threads = {"prefetch-0", "prefetch-1"}
        assert by & threads  # the first chunks are theirs alone
        assert by <= threads | {"MainThread"}


@pytest.mark.spec("OFFLOAD-13")
def test_whoever_multiplies_checks_later_chunks_before_it_waits_for_one_that_is_under_check(
    ahead: Mapped, made: list[Ahead], checked: list[int]
) -> None:
    """These threads have checked nothing yet when the first chunk is needed; of what they come to, nothing is left."""
    transformer = ahead.again(StoppedClock(), Ahead)
    transformer.decode([7])
    offsets = [offset for _, _, offset, _ in ahead.chunks()]
    beyond_the_ring = offsets[8:16]
    first = checked.index(offsets[0])
    assert checked[first - len(beyond_the_ring) : first] == beyond_the_ring
    assert sorted(checked[: len(offsets) + 1]) == sorted([ahead.vectors.offset, *offsets])


@pytest.mark.spec("OFFLOAD-13")
@pytest.mark.parametrize("first", [3, 9, 12])
def test_damage_that_whoever_multiplies_finds_early_is_named_when_its_chunk_is_used(
    ahead: Mapped, made: list[Ahead], first: int
) -> None:
    places = list(ahead.chunks())
    for _, _, offset, _ in (places[first], places[13]):
        change(ahead.path, offset)
    name, number = places[first][:2]
    with pytest.raises(DamagedWeightsError, match=f"{re.escape(name)}, chunk {number},"):
        ahead.again(StoppedClock(), Ahead).decode([7])
    assert made[-1].taken == list(range(first + 1))


@pytest.mark.spec("OFFLOAD-13")
@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 2), (64, 2)])
def test_the_products_keep_a_core_for_themselves(
    ahead: Mapped, made: list[Ahead], monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr("refinfer.sources.mapped.usable_cores", lambda: cores)
    ahead.again(StoppedClock(), Ahead).decode([7])
    assert [each.threads for each in made] == [threads] * len(made)


@pytest.mark.spec("OFFLOAD-13", "FETCH-8")
@pytest.mark.parametrize("moment", MOMENTS)
def test_no_thread_outlives_its_pass_however_it_ends(ahead: Mapped, moment: int | str) -> None:
    def leave() -> None:
        raise LeftError

    source = ahead.again().source
    expected = ahead.token()
    gc.collect()
    before = threads_and_descriptors()
    with pytest.raises(LeftError):
        Transformer(ActingDuringAPass(source, leave, moment), POSITIONS).decode([7])
    assert threads_and_descriptors() == before
    at = [offset for _, _, offset, _ in ahead.chunks()]
    for offset in (at[0], at[-1], ahead.vectors.offset):
        change(ahead.path, offset)
        with pytest.raises(DamagedWeightsError):
            Transformer(source, POSITIONS).decode([7])
        assert threads_and_descriptors() == before
        change(ahead.path, offset)
    np.testing.assert_array_equal(Transformer(source, POSITIONS).decode([7]).view(np.uint32), expected)
    assert threads_and_descriptors() == before


@pytest.mark.spec("OFFLOAD-13", "OFFLOAD-4")
def test_damage_in_a_chunk_that_nobody_used_yet_stops_nobody(mapped: Mapped) -> None:
    damaged = mapped.inventory.matrices[1].name
    at = next(offset for name, _, offset, _ in mapped.chunks() if name == damaged)
    change(mapped.path, at)
    with mapped.again().source.forward_pass() as weights:
        layer = next(iter(weights.layers))
        x = np.zeros((1, 40), np.float32)
        for matrix in (layer.q_proj, layer.v_proj):
            matrix.matmul(x)
        with pytest.raises(DamagedWeightsError, match=re.escape(damaged)):
            layer.k_proj.matmul(x)
        change(mapped.path, at)


@pytest.mark.spec("OFFLOAD-4")
def test_a_write_is_not_forgotten_if_the_pass_that_noticed_it_is_interrupted_at_once(
    mapped: Mapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    come_to_rest(mapped.path)
    transformer = mapped.again()
    transformer.decode([7])
    real = MappedFile.changed

    def interrupted(file: MappedFile) -> bool:
        real(file)
        raise KeyboardInterrupt

    change(mapped.path, next(iter(mapped.chunks()))[2])
    with monkeypatch.context() as patch:
        patch.setattr(MappedFile, "changed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transformer.decode([7])
    with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
        transformer.decode([7])


@pytest.mark.spec("OFFLOAD-4")
def test_a_check_that_ends_after_a_write_was_noticed_does_not_count(
    ahead: Mapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = FileWeightCacheProvider.load(ahead.path)
    keys = {entry.key.name: entry.key for entry in provider.entries}
    names = [matrix.name for matrix in ahead.inventory.matrices]
    watch = Watch(MappedFile(ahead.path), ahead.vectors.key, [keys[name] for name in names], RealClock())
    checks: list[int] = []

    def while_it_is_written_to(file: MappedFile, chunk: StoredChunk) -> bool:
        watch.epoch += not checks
        checks.append(chunk.offset)
        return True

    monkeypatch.setattr(MappedFile, "is_sound", while_it_is_written_to)
    for _ in range(3):
        watch.check(0)
    assert len(checks) == 2


@pytest.mark.spec("OFFLOAD-13", "OFFLOAD-10")
def test_a_second_pass_within_one_that_is_still_open_leaves_no_thread(ahead: Mapped) -> None:
    source = ahead.again().source
    gc.collect()
    before = threads_and_descriptors()
    with source.forward_pass(), source.forward_pass() as weights:
        next(iter(weights.layers)).q_proj.matmul(np.zeros((1, 40), np.float32))
    assert threads_and_descriptors() == before


@pytest.mark.spec("OFFLOAD-13", "OFFLOAD-10")
def test_a_pass_that_is_dropped_in_the_middle_ends_its_threads(ahead: Mapped) -> None:
    source = ahead.again().source
    gc.collect()
    before = threads_and_descriptors()
    passing = source.forward_pass()
    weights = passing.__enter__()
    next(iter(weights.layers)).q_proj.matmul(np.zeros((1, 40), np.float32))
    assert threads_and_descriptors() != before
    del passing, weights
    gc.collect()
    assert threads_and_descriptors() == before


@pytest.mark.spec("OFFLOAD-13", "OFFLOAD-4")
def test_of_several_damaged_chunks_the_first_is_named(mapped: Mapped) -> None:
    """However many are checked at once."""
    places = list(mapped.chunks())
    for first in range(0, len(places) - 3, 5):
        name, number = places[first][:2]
        for _, _, offset, _ in places[first : first + 3]:
            change(mapped.path, offset)
        with pytest.raises(DamagedWeightsError, match=f"{re.escape(name)}, chunk {number},"):
            mapped.again().decode([7])
        for _, _, offset, _ in places[first : first + 3]:
            change(mapped.path, offset)


@pytest.mark.spec("OFFLOAD-13")
def test_where_no_thread_can_be_started_each_chunk_is_checked_when_it_is_used(
    ahead: Mapped, checked: list[int]
) -> None:
    def none(*_: object) -> Ahead:
        raise GenerationError("this system starts no further thread; use fewer prefetch threads")

    expected = ahead.token()
    checked.clear()
    np.testing.assert_array_equal(ahead.again(ahead=none).decode([7]).view(np.uint32), expected)
    assert {offset for _, _, offset, _ in ahead.chunks()} <= set(checked)


@pytest.mark.spec("OFFLOAD-4")
def test_of_a_file_to_which_nobody_wrote_lately_everything_is_checked_once_too(
    mapped: Mapped, checked: list[int]
) -> None:
    come_to_rest(mapped.path)
    transformer = mapped.again()
    for _ in range(2):
        transformer.decode([7])
    assert sorted(checked) == sorted({mapped.vectors.offset, *(offset for _, _, offset, _ in mapped.chunks())})


@pytest.mark.spec("OFFLOAD-4")
def test_of_a_file_that_came_to_rest_after_it_was_mapped_everything_is_checked_once_too(
    mapped: Mapped, checked: list[int]
) -> None:
    clock, written = StoppedClock(), time.time_ns() + 3_600_000_000_000
    os.utime(mapped.path, ns=(written, written))  # however slow the machine is: lately
    transformer = mapped.again(clock)
    clock.seconds += 10
    for _ in range(2):
        transformer.decode([7])
    assert sorted(checked) == sorted({mapped.vectors.offset, *(offset for _, _, offset, _ in mapped.chunks())})


@pytest.mark.spec("OFFLOAD-4")
@settings(max_examples=40)
@given(
    writes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3),
    token_id=st.integers(0, 69),
)
def test_whatever_is_written_wherever_the_next_token_is_right_or_an_error(
    writes: list[tuple[float, int]], token_id: int, shared: Mapped
) -> None:
    expected = shared.token(token_id)
    whole = shared.path.read_bytes()
    for share, by in writes:
        change(shared.path, int(share * len(whole)), by)
    try:
        got = shared.token(token_id)
    except DamagedWeightsError:
        got = expected
    with shared.path.open("r+b") as file:
        file.write(whole)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(shared.token(token_id), expected)


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapped:
    return Mapped(folder, tmp_path_factory.mktemp("shared") / "cache")


def in_a_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a process of its own, forked, which may die of it; a watchdog ends it."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, of BLAS, and the child starts none
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(WATCHDOG_S)
            os.close(reader)
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


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")


def mount_ramfs(folder: Path) -> None:
    """Mount a file system whose times count ticks of some milliseconds, which only this process sees.

    So do all file systems before Linux 6.13, and many after.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursive_private = 0x20000, 0x44000
    failed = (
        libc.unshare(new_namespace)
        or libc.mount(b"none", b"/", None, recursive_private, None)
        or libc.mount(b"none", bytes(folder), b"ramfs", 0, None)
    )
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.fixture(scope="module")
def coarse_clock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Return what mounts a file system with a coarse clock, in a child."""

    def try_it() -> bool:
        try:
            mount_ramfs(tmp_path_factory.getbasetemp())
        except OSError:
            return False
        return True

    if sys.platform != "linux" or os.geteuid() != 0 or not in_a_child(try_it):
        pytest.skip("needs Linux, and the right to mount a file system")
    return mount_ramfs


@pytest.mark.spec("OFFLOAD-4")
@pytest.mark.parametrize(
    "since",
    ["the last token", "loading"],
)
def test_of_two_writes_in_one_tick_of_the_clock_the_second_is_found_too(
    tmp_path: Path, coarse_clock: Callable[[Path], None], since: str
) -> None:
    """The first writes what is there already; between them is a token, or the file is mapped and gives its first.

    So that both fit in a tick, it has just begun, and the model is as small as can be.
    """
    folder = tmp_path / "m"
    write_checkpoint(folder, replace(SHAPES["tiny"], vocab_size=8, hidden_size=8, num_hidden_layers=1), dtype="f32")
    (tmp_path / "coarse").mkdir()

    def wait_for_a_tick(path: Path) -> None:
        begun = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == begun:
            os.utime(path)

    def work() -> list[int]:
        """Return how often two writes were in one tick, and how many of the tokens after them were wrong."""
        coarse_clock(tmp_path / "coarse")
        mapped = Mapped(folder, tmp_path / "coarse" / "cache")
        clock = tmp_path / "coarse" / "clock"
        clock.touch()
        expected, coincidences, wrong = mapped.token(), 0, 0
        at = next(offset for name, _, offset, _ in mapped.chunks() if "down_proj" in name)
        deadline = time.monotonic() + WATCHDOG_S / 4
        while coincidences < 2 and time.monotonic() < deadline:
            wait_for_a_tick(clock)
            change(mapped.path, at, by=0)
            first = mapped.path.stat().st_ctime_ns
            transformer = mapped.transformer if since == "the last token" else mapped.again()
            transformer.kv_cache.rewind(0)
            transformer.decode([7])
            change(mapped.path, at, by=0x40)
            coincidences += mapped.path.stat().st_ctime_ns == first
            transformer.kv_cache.rewind(0)
            try:
                wrong += not np.array_equal(transformer.decode([7]).view(np.uint32), expected)
            except DamagedWeightsError:
                wrong += 0
            change(mapped.path, at, by=0x40)
            os.utime(mapped.path, ns=(0, 0))  # in any case seen
            assert (mapped.token() == expected).all()
        return [coincidences, wrong]

    coincidences, wrong = in_a_child(work)
    if not coincidences:
        pytest.skip("this machine is too slow, or its clock too quick, for two writes in a tick")
    assert wrong == 0


@needs_fork
@pytest.mark.spec("OFFLOAD-13", "GEN-20")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_child_that_is_forked_within_the_first_pass_ends_it_without_threads(ahead: Mapped, moment: int | str) -> None:
    expected = ahead.token()
    children: list[int] = []
    told, tell = os.pipe()

    def fork() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, and that is the point
            children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(WATCHDOG_S)

    transformer = Transformer(ActingDuringAPass(ahead.again().source, fork, moment), POSITIONS)
    try:
        got = transformer.decode([7]).view(np.uint32)
        if children[-1] == 0:
            os.write(tell, b"same" if np.array_equal(got, expected) else b"else")
    finally:
        if children[-1] == 0:
            os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as answer:
        assert answer.read() == b"same"
    os.waitpid(children[-1], 0)
    np.testing.assert_array_equal(got, expected)


@needs_fork
@pytest.mark.spec("OFFLOAD-13", "FETCH-8")
def test_a_child_ends_the_threads_of_its_own_passes(ahead: Mapped) -> None:
    ahead.token()

    def work() -> list[str]:
        for _ in range(3):
            os.utime(ahead.path)
            ahead.token()
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]

    assert in_a_child(work) == []


@needs_fork
@pytest.mark.spec("OFFLOAD-5")
def test_a_file_cut_short_between_two_tokens_is_an_error_and_not_the_end_of_the_process(mapped: Mapped) -> None:
    """Cut to nothing, to a page, within a chunk, by a single byte."""
    whole = mapped.path.read_bytes()

    def work() -> list[str]:
        said = []
        for size in (0, 1, PAGE_BYTES, len(whole) // 2, len(whole) - 1):
            expected = mapped.token()
            os.truncate(mapped.path, size)
            for _ in range(2):
                try:
                    mapped.token()
                    said.append("a token")
                except DamagedWeightsError as error:
                    said.append(str(error))
            with mapped.path.open("r+b") as file:
                file.write(whole)
            assert (mapped.token() == expected).all()
        return said

    assert in_a_child(work) == [f"{mapped.path} was cut short while it was in use; start again"] * 10


@needs_fork
@pytest.mark.spec("OFFLOAD-5")
@pytest.mark.parametrize("size", [0, PAGE_BYTES, 20 * PAGE_BYTES])
def test_a_file_cut_short_after_it_was_mapped_and_before_the_first_token_is_an_error(mapped: Mapped, size: int) -> None:
    def work() -> str:
        os.truncate(mapped.path, size)
        try:
            mapped.token()
        except DamagedWeightsError as error:
            return str(error)
        return "a token"

    assert "was cut short while it was in use" in in_a_child(work)


@needs_fork
@pytest.mark.spec("OFFLOAD-5", "OFFLOAD-4")
def test_a_file_cut_short_and_grown_again_is_found_damaged(mapped: Mapped) -> None:
    def work() -> list[str]:
        size, said = mapped.path.stat().st_size, []
        mapped.token()
        os.truncate(mapped.path, PAGE_BYTES)
        os.truncate(mapped.path, size)
        for _ in range(2):
            try:
                mapped.token()
                said.append("a token")
            except DamagedWeightsError as error:
                said.append(str(error))
        return said

    assert all("does not agree with its checksum" in text for text in in_a_child(work))
