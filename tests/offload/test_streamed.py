"""Specifies `refinfer.offload.streamed`: the same bits in less memory, each chunk read once and in order."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pytest

from refinfer.arrays import PAGE_BYTES, Float32Array
from refinfer.clock import RealClock
from refinfer.errors import BudgetError, CacheFileError, DamagedWeightsError, GenerationError
from refinfer.generate import load
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer
from refinfer.model.weights import WeightSource
from refinfer.offload.budget import Budget
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.readers import Loan
from refinfer.offload.run import PlannedRun, Within, open_run, plan_run
from refinfer.offload.store import FileStore, Store
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS
from refinfer.packing.layout import Bytes
from refinfer.trace import Recorder
from refinfer.weight_cache.packers import record_nbytes

sys.path.insert(0, str(Path(__file__).parent))
from interleavings import World
from packed_model import Logits, PackedModel, assert_same_logits, change, drawn_ids, logits_of, within
from words import require_equal, require_items

POSITIONS: Final = 80
PROMPT: Final = 40
STEPS: Final = (1, 1, 3, 17)
WATCHDOG_S: Final = 60

every_format = pytest.mark.parametrize("name", list(FORMATS))


def streamed(case: PackedModel, budget: int, store: Store | None = None, threads: int = 0) -> StreamedSource:
    """Return the weights within a budget; read when they are needed, or ahead by some threads."""
    return case.streamed(case.plan("leading", budget, prefetch_threads=threads), store)


def embedded(source: WeightSource, ids: list[int]) -> Float32Array:
    """Return the rows of the embedding table for these tokens, looked up in a pass of their own."""
    with source.forward_pass() as weights:
        return weights.embed_tokens.rows(np.array(ids))


def with_head(inventory: Inventory) -> list[int]:
    """Return the numbers in the cycle of the chunks of the output table."""
    return [number for number, chunk in enumerate(inventory.cycle) if chunk.kind == "lm_head"]


def told_by(source: WeightSource, seed: int = 0) -> Logits:
    """Return the bits of all logits of a prompt longer than a block, single tokens, and several at once."""
    assert Transformer(source, POSITIONS).block < PROMPT
    return logits_of(source, POSITIONS, PROMPT, STEPS, seed)


def budgets_of(case: PackedModel) -> list[int]:
    """Return the smallest budget that works, one that locks a half, the last that streams, more than everything."""
    return sorted({case.smallest, (case.smallest + case.most) // 2, case.most - 1, case.most + 1})


@pytest.fixture(scope="module", params=["tied", "untied"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding table is the output table, and one with two tables; each small, and with more rows."""
    folder = tmp_path_factory.mktemp("either")
    config = replace(
        SHAPES["tiny"], vocab_size=101, hidden_size=40, intermediate_size=52, num_hidden_layers=2, qkv_bias=True
    )
    config = replace(config, tie_word_embeddings=request.param == "tied")
    write_checkpoint(folder / "small", config, dtype="f32")
    write_checkpoint(folder / "tall", replace(config, vocab_size=530, intermediate_size=530), dtype="f32")
    return folder


def case_of(either: Path, name: str, file: Path) -> PackedModel:
    """Return a model with several chunks to a matrix: in int4 that takes more than 512 rows."""
    folder = either / ("tall" if name == "int4" else "small")
    return PackedModel(open_folder(folder).config, folder, name, file, POSITIONS)


@pytest.fixture
def case(either: Path, tmp_path: Path) -> PackedModel:
    return case_of(either, "int8", tmp_path / "cache")


class Recording:
    """A store that writes down what is read: offset and bytes."""

    def __init__(self, path: Path) -> None:
        self.store = FileStore(path)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, into: Bytes) -> None:
        self.reads.append((offset, into.size))
        self.store.read(offset, into)

    def close(self) -> None:
        self.store.close()

    def taken(self) -> list[tuple[int, int]]:
        """Return what was read since this was last asked."""
        reads, self.reads = self.reads, []
        return reads


def places(case: PackedModel, numbers: list[int]) -> list[tuple[int, int]]:
    return [(case.chunks[number].offset, case.chunks[number].padded_nbytes) for number in numbers]


@pytest.mark.spec("OFFLOAD-7")
def test_a_source_first_reads_the_vectors_and_the_locked_chunks_each_once(case: PackedModel) -> None:
    vectors = case.vectors
    for budget in budgets_of(case):
        store = Recording(case.built)
        source = streamed(case, budget, store)
        locked = places(case, sorted(case.plan("leading", budget).locked))
        assert store.taken() == [(vectors.offset, vectors.padded_nbytes), *locked]
        source.close()


@pytest.mark.spec("OFFLOAD-7")
@every_format
def test_each_token_reads_exactly_the_chunks_that_are_not_locked_in_the_order_of_use(
    either: Path, name: str, tmp_path: Path
) -> None:
    """And the rows of the embedding table that are looked up."""
    case = case_of(either, name, tmp_path / "cache")
    assert {chunk.kind for chunk in case.inventory.cycle if chunk.index} >= {"gate_proj", "up_proj", "lm_head"}
    head = with_head(case.inventory)
    for budget in budgets_of(case):
        store = Recording(case.built)
        source = streamed(case, budget, store)
        transformer = Transformer(source, POSITIONS)
        locked = case.plan("leading", budget).locked
        streaming = [n for n in range(len(case.inventory.cycle)) if n not in locked]

        def looking_up(ids: list[int], source: StreamedSource = source, store: Recording = store) -> Any:
            store.taken()
            embedded(source, ids)
            return store.taken()

        for token in (7, 100, 7):
            expected = looking_up([token]) + places(case, streaming)
            transformer.decode([token])
            assert store.taken() == expected

        transformer.kv_cache.rewind(0)
        first, second = list(range(transformer.block)), [1, 2, 3]
        without_head = [n for n in streaming if n not in head]
        expected = looking_up(first) + places(case, without_head) + looking_up(second) + places(case, streaming)
        transformer.prefill(first + second)
        assert store.taken() == expected
        source.close()


@pytest.mark.spec("OFFLOAD-7")
def test_each_token_of_a_tied_model_reads_each_chunk_once_and_that_of_its_row_before(golden_tied: PackedModel) -> None:
    store = Recording(golden_tied.built)
    transformer = Transformer(streamed(golden_tied, golden_tied.smallest, store), POSITIONS)
    store.taken()
    transformer.decode([1])
    cycle = list(range(len(golden_tied.inventory.cycle)))
    assert store.taken() == places(golden_tied, [with_head(golden_tied.inventory)[0], *cycle])


@pytest.fixture
def golden_tied(tmp_path: Path) -> PackedModel:
    folder = Path(__file__).parents[1] / "golden" / "qwen3"
    return PackedModel(open_folder(folder).config, folder, "bf16", tmp_path / "cache", POSITIONS)


@pytest.mark.spec("OFFLOAD-7", "OFFLOAD-6")
def test_a_row_of_an_embedding_table_costs_the_pages_or_the_chunk_that_hold_it(case: PackedModel) -> None:
    store = Recording(case.built)
    source = streamed(case, case.smallest, store)
    for row in (0, 1, 50, 99, 100):
        store.taken()
        embedded(source, [row])
        reads = store.taken()
        if case.inventory.table is None:
            head = with_head(case.inventory)
            layout = case.inventory.matrices[-1].layout
            holding = [n for n, c in zip(head, layout.chunks, strict=True) if 0 <= row - c.first_row < c.n_rows]
            assert reads == places(case, holding)
        else:
            entry = case.entries[case.inventory.table]
            nbytes = record_nbytes(entry.key)
            start = entry.offset + row * nbytes
            assert len(reads) == 1
            offset, size = reads[0]
            assert offset % PAGE_BYTES == size % PAGE_BYTES == 0
            assert offset <= start < offset + PAGE_BYTES
            assert start + nbytes <= offset + size < start + nbytes + PAGE_BYTES


@pytest.mark.spec("OFFLOAD-7")
def test_looking_up_rows_of_a_tied_table_reads_each_chunk_that_holds_one_once(golden_tied: PackedModel) -> None:
    store = Recording(golden_tied.built)
    source = streamed(golden_tied, golden_tied.smallest, store)
    store.taken()
    rows = embedded(source, [50, 3, 50, 20, 3])
    head = with_head(golden_tied.inventory)
    assert len(head) == 4  # of 16 rows each
    assert store.taken() == places(golden_tied, [head[0], head[1], head[3]])
    everything = embedded(golden_tied.in_memory(), list(range(53)))
    np.testing.assert_array_equal(rows, everything[[50, 3, 50, 20, 3]])


@pytest.mark.spec("OFFLOAD-7", "OFFLOAD-14")
def test_rows_of_a_locked_chunk_are_looked_up_without_reading(golden_tied: PackedModel) -> None:
    store = Recording(golden_tied.built)
    source = streamed(golden_tied, golden_tied.most, store)
    store.taken()
    rows = embedded(source, [50, 3])
    assert store.taken() == []
    np.testing.assert_array_equal(rows, embedded(golden_tied.in_memory(), [50, 3]))


@pytest.mark.spec("OFFLOAD-7")
def test_threads_that_read_ahead_read_no_locked_chunk_again(case: PackedModel) -> None:
    budget, store = (case.smallest + case.most) // 2, Recording(case.built)
    source = streamed(case, budget, store, threads=2)
    for _ in range(3):
        within(lambda: list(source.chunks(0, len(case.chunks))))
    source.close()
    locked = places(case, sorted(case.plan("leading", budget, prefetch_threads=2).locked))
    assert locked
    assert [store.reads.count(place) for place in locked] == [1] * len(locked)


@pytest.mark.spec("READ-2")
def test_a_page_cache_has_the_room_that_locked_chunks_and_ring_would_take(case: PackedModel) -> None:
    plan, store = case.plan("leading", (case.smallest + case.most) // 2), Recording(case.built)
    room = (plan.account.locked + plan.account.ring) // plan.slot_nbytes
    assert 1 < room < len(case.chunks)
    source = case.streamed(plan, store, paged=True)
    store.taken()
    for _ in range(2):
        list(source.chunks(0, room))
    assert store.taken() == places(case, list(range(room)))
    for _ in range(2):
        list(source.chunks(0, room + 1))
    assert len(store.taken()) == 1 + (room + 1)  # the next one, for which the first is dropped, and then each again
    source.close()


def parts_of(tiles: Any) -> list[npt.NDArray[Any]]:
    """Return the arrays of a chunk's tiles, whatever its format."""
    return list(tiles) if isinstance(tiles, tuple) else [tiles]


@pytest.mark.spec("OFFLOAD-7")
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_chunk_is_valid_until_the_next_one_is_asked_for(case: PackedModel, threads: int) -> None:
    source = streamed(case, case.smallest + 30_000, threads=threads)
    content = case.built.read_bytes()

    def one_pass() -> None:
        for number, tiles in enumerate(source.chunks(0, len(case.chunks))):
            used, chunk = case.inventory.cycle[number], case.chunks[number]
            layout = case.inventory.matrices[used.matrix].layout
            stored = np.frombuffer(content[chunk.offset : chunk.offset + chunk.nbytes], np.uint8)
            expected = parts_of(layout.tiles(stored, layout.chunks[used.index]))
            for _ in range(3):
                for part, as_stored in zip(parts_of(tiles), expected, strict=True):
                    what = f"chunk {number}, {threads} threads: its tiles have changed, or are those of another chunk"
                    assert part.tobytes() == as_stored.tobytes(), what
                    assert (part.dtype, part.shape) == (as_stored.dtype, as_stored.shape)
            assert parts_of(tiles)[0].ctypes.data % PAGE_BYTES == 0

    for _ in range(5):
        stuck = f"{threads} threads: a take waits for ever; into which slot should its chunk be read?"
        within(one_pass, World.patience_s, stuck)
    source.close()


# Chunks that are given one by one, with a reader and a clock that only take notes.


class Notes:
    """A source of which chunks 3 and 6 are locked; each take lasts 2 s, and each product 3 s.

    `events` are the takes, products and releases; `given` is what was given.
    """

    def __init__(self, source: StreamedSource) -> None:
        self.events: list[str] = []
        self.given: list[object] = []
        self.damaged: int | None = None
        self.recorder = Recorder(self, traced=True)
        self.source = source
        self.kinds = [chunk.kind for chunk in source._inventory.cycle]
        self._time = 0.0
        source.close()
        source.locked = {3: "locked chunk 3", 6: "locked chunk 6"}
        source._reader, source._recorder = self, self.recorder

    def now(self) -> float:
        return self._time

    def sleep(self, seconds: float) -> None:
        self._time += seconds

    def take(self, number: int) -> Loan:
        self.events.append(f"take of chunk {number}")
        self.sleep(2)
        if number == self.damaged:
            raise DamagedWeightsError(f"chunk {number} is damaged")
        return Loan(f"chunk {number}")

    def release(self, loan: Loan) -> None:
        self.events.append(f"release of {loan.tiles}")

    def close(self) -> None:
        pass

    def use(self, tiles: object) -> None:
        """Multiply a chunk."""
        self.given.append(tiles)
        self.events.append(f"product of {tiles}")
        self.sleep(3)

    def run(self, first: int, n: int) -> Self:
        """Use some chunks."""
        for tiles in self.source.chunks(first, n):
            self.use(tiles)
        return self

    def spans(self, kind: str) -> list[str]:
        """Return the spans of a kind, in words."""
        spans = (span for span in self.recorder.trace.spans if span.kind == kind)
        return [f"{span.name} from {span.start:g} to {span.end:g} s, on lane {span.lane}" for span in spans]


@pytest.fixture
def notes(golden_tied: PackedModel) -> Notes:
    return Notes(streamed(golden_tied, golden_tied.smallest))


@pytest.mark.spec("OFFLOAD-7")
@pytest.mark.parametrize(("first", "n"), [(0, 1), (4, 2), (7, 3)], ids=["one", "two", "three"])
def test_chunks_are_given_one_by_one_from_their_number_in_the_cycle_on(notes: Notes, first: int, n: int) -> None:
    expected = [f"chunk {number}" for number in range(first, first + n)]
    require_items(notes.run(first, n).given, expected, f"chunks({first}, {n}): what is given as number")


@pytest.mark.spec("OFFLOAD-14")
def test_a_locked_chunk_is_given_from_memory_and_not_taken_from_the_reader(notes: Notes) -> None:
    notes.run(2, 5)
    takes = [event for event in notes.events if event.startswith("take")]
    require_items(takes, [f"take of chunk {number}" for number in (2, 4, 5)], "of the takes, number")
    expected = ["chunk 2", "locked chunk 3", "chunk 4", "chunk 5", "locked chunk 6"]
    require_items(notes.given, expected, "chunks(2, 5): what is given as number")


@pytest.mark.spec("OFFLOAD-14")
def test_a_chunk_is_taken_when_it_is_asked_for_and_released_when_the_next_one_is(notes: Notes) -> None:
    notes.run(2, 4)
    expected = ["product of locked chunk 3"]
    for number in (2, 4, 5):
        steps = [f"take of chunk {number}", f"product of chunk {number}", f"release of chunk {number}"]
        expected = [*steps, *expected] if number == 2 else [*expected, *steps]
    require_items(notes.events, expected, "chunks(2, 4), of which 3 is locked: event")


@pytest.mark.spec("OFFLOAD-14", "OFFLOAD-10")
@pytest.mark.parametrize("how", ["the caller leaves", "an exception ends it"])
def test_a_chunk_is_released_also_when_its_product_is_left(notes: Notes, how: str) -> None:
    chunks = notes.source.chunks(4, 2)
    assert isinstance(chunks, Generator), f"chunks returns {type(chunks).__name__}, and not what a `yield` makes"
    notes.use(next(chunks))
    if how == "the caller leaves":
        chunks.close()
    else:
        with suppress(KeyboardInterrupt):
            chunks.throw(KeyboardInterrupt())
            raise AssertionError("an exception ends a product, and does not reach the caller")
    ends = notes.events[2:]
    assert ends, f"{how} during the product of chunk 4, and chunk 4 is not released"
    require_items(ends, ["release of chunk 4"], f"{how} during the product of chunk 4; after it, event")


@pytest.mark.spec("OFFLOAD-9", "OFFLOAD-14")
def test_an_error_of_a_take_reaches_the_caller_and_nothing_is_released_for_it(notes: Notes) -> None:
    notes.damaged = 5
    with pytest.raises(DamagedWeightsError, match="chunk 5 is damaged"):
        notes.run(4, 3)
    steps = ["take of chunk 4", "product of chunk 4", "release of chunk 4", "take of chunk 5"]
    require_items(notes.events, steps, "event")


@pytest.mark.spec("OFFLOAD-15")
def test_the_time_of_a_take_is_counted_as_waiting(notes: Notes) -> None:
    notes.run(2, 4)
    require_equal(notes.recorder.wait_s, 6.0, "three takes of 2 s: the seconds of waiting")
    times = ((2, 0), (4, 8), (5, 13))
    expected = [f"{notes.kinds[number]} from {start} to {start + 2} s, on lane compute" for number, start in times]
    require_items(notes.spans("wait"), expected, "wait")


@pytest.mark.spec("OFFLOAD-15")
def test_the_time_of_a_product_is_noted_as_computing_also_of_a_locked_chunk(notes: Notes) -> None:
    notes.run(2, 4)
    times = ((2, 2), (3, 5), (4, 10), (5, 15))
    expected = [f"{notes.kinds[number]} from {start} to {start + 3} s, on lane compute" for number, start in times]
    require_items(notes.spans("compute"), expected, "product")


@pytest.mark.spec("OFFLOAD-8", "BUDGET-1", "PLAN-1")
def test_all_that_a_plan_counts_is_acquired_before_anything_is_read(
    case: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, opened = case.most, []

    class Noted(FileStore):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    def run(limit: int) -> PlannedRun:
        planned = plan_run(Within(most - 1, "leading"), case.inventory, POSITIONS, case.built)
        planned = replace(planned, budget=Budget(limit))
        open_run(planned, case.keys, RealClock(), quiet=False).source.close()
        return planned

    monkeypatch.setattr("refinfer.offload.run.FileStore", Noted)
    planned = run(most - 1)
    needed = most - 1 - planned.plan.account.unused
    assert planned.budget.in_use == planned.budget.peak == needed
    assert opened == [case.built]
    for limit in (needed - 1, 0):
        with pytest.raises(BudgetError):
            run(limit)
    assert opened == [case.built]
    assert run(needed).budget.peak == needed


@pytest.mark.spec("OFFLOAD-9")
@every_format
def test_a_damaged_chunk_that_streams_is_named_before_it_is_used(either: Path, name: str, tmp_path: Path) -> None:
    case = case_of(either, name, tmp_path / "cache")
    source = streamed(case, case.smallest)
    transformer = Transformer(source, POSITIONS)
    expected = transformer.decode([100]).view(np.uint32)
    for number, chunk in list(enumerate(case.chunks))[::3]:
        offset = chunk.offset + (chunk.nbytes - 1 if number % 2 else 0)
        change(case.file, offset)
        transformer.kv_cache.rewind(0)
        cycle = case.inventory.cycle[number]
        tensor = re.escape(case.inventory.matrices[cycle.matrix].name)
        with pytest.raises(DamagedWeightsError, match=f"{tensor}, chunk {cycle.index}, does not agree"):
            transformer.decode([100])
        change(case.file, offset)
    transformer.kv_cache.rewind(0)
    np.testing.assert_array_equal(transformer.decode([100]).view(np.uint32), expected)


@pytest.mark.spec("OFFLOAD-9")
def test_damage_in_what_stays_in_memory_is_found_when_it_is_read(case: PackedModel) -> None:
    vectors = case.vectors.chunks[0]
    for chunk in (vectors, case.chunks[0], case.chunks[-1]):
        change(case.built, chunk.offset + chunk.nbytes // 2)
        with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
            streamed(case, case.most)
        change(case.file, chunk.offset + chunk.nbytes // 2)
    streamed(case, case.most).close()


@pytest.mark.spec("OFFLOAD-11")
def test_an_interrupt_while_chunks_are_locked_ends_the_sleep_of_a_throttled_store(
    case: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a store that sleeps in each read of a chunk until it is closed."""
    begun, closed = threading.Event(), threading.Event()
    ended_by_closing: list[bool] = []

    class Sleeping(Recording):
        def read(self, offset: int, into: Bytes) -> None:
            if offset != case.vectors.offset:
                begun.set()
                ended_by_closing.append(closed.wait(10))
            super().read(offset, into)

        def close(self) -> None:
            closed.set()

    class Interrupted(Prefetcher):
        def take(self, chunk: int) -> Loan:
            assert begun.wait(WATCHDOG_S)
            raise KeyboardInterrupt

    store = Sleeping(case.built)
    monkeypatch.setattr("refinfer.offload.streamed.Prefetcher", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        streamed(case, case.most - 1, store, threads=2)
    assert ended_by_closing
    assert all(ended_by_closing)
    store.store.close()


@pytest.mark.spec("OFFLOAD-9", "OFFLOAD-6")
def test_a_damaged_row_of_a_table_is_found_when_it_is_looked_up_and_only_then(
    tmp_path: Path, tiny_folder: Path
) -> None:
    case = PackedModel(open_folder(tiny_folder).config, tiny_folder, "f32", tmp_path / "cache", POSITIONS)
    source = streamed(case, case.smallest)
    expected = told_by(source, seed=1)
    used = set(drawn_ids(261, PROMPT + sum(STEPS), seed=1))
    entry = case.entries["model.embed_tokens.weight"]
    nbytes = record_nbytes(entry.key)
    for row, is_used in ((min(used), True), (max(used), True), (min(set(range(261)) - used), False)):
        for at in (0, nbytes - 1):  # a weight, its checksum
            change(case.file, entry.offset + row * nbytes + at)
            with pytest.raises(DamagedWeightsError, match=r"model\.embed_tokens\.weight does not agree"):
                embedded(source, [row])
            if is_used:
                with pytest.raises(DamagedWeightsError):
                    told_by(source, seed=1)
            else:
                assert_same_logits(told_by(source, seed=1), expected)
            change(case.file, entry.offset + row * nbytes + at)
    assert_same_logits(told_by(source, seed=1), expected)


@pytest.mark.spec("OFFLOAD-9")
def test_pads_are_no_weights(case: PackedModel) -> None:
    source = streamed(case, case.smallest)
    expected = told_by(source)
    padded = [chunk for chunk in case.chunks if chunk.nbytes < chunk.padded_nbytes]
    assert padded
    for chunk in padded:
        change(case.file, chunk.offset + chunk.nbytes)
    assert_same_logits(told_by(source), expected)


@pytest.mark.spec("OFFLOAD-9")
def test_a_disk_that_fails_is_one_named_error_and_the_run_may_go_on(
    case: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = streamed(case, case.smallest)
    transformer = Transformer(source, POSITIONS)
    expected, real, left = transformer.decode([1]), os.preadv, [0]

    def failing(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    for reads in (0, 1, 20):
        left[0] = reads
        with pytest.raises(GenerationError, match="cannot be read: Input/output error"):
            transformer.decode([1])
    left[0] = 1000
    transformer.kv_cache.rewind(0)
    np.testing.assert_array_equal(transformer.decode([1]), expected)


@pytest.mark.spec("OFFLOAD-9")
def test_a_file_that_is_not_there_is_one_named_error(case: PackedModel) -> None:
    plan, store = case.plan("leading", case.smallest), FileStore(case.built)
    assert case.keys
    case.file.unlink()
    with pytest.raises(CacheFileError, match="No such file"):
        case.streamed(plan)
    with pytest.raises(DamagedWeightsError, match="there was no file yet"):  # gone since the store was opened
        case.streamed(plan, store)
    store.close()


@pytest.mark.spec("OFFLOAD-9", "KV-3")
@pytest.mark.parametrize("where", ["a layer", "the output table"])
def test_a_pass_that_finds_damage_leaves_the_kv_cache_as_it_was(case: PackedModel, where: str) -> None:
    transformer = Transformer(streamed(case, case.smallest), POSITIONS)
    expected = [transformer.decode([1]), transformer.decode([2])]
    transformer.kv_cache.rewind(1)
    chunk = case.chunks[0 if where == "a layer" else -1]
    change(case.file, chunk.offset)
    with pytest.raises(DamagedWeightsError):
        transformer.decode([2])
    change(case.file, chunk.offset)
    assert transformer.kv_cache.length == 1
    np.testing.assert_array_equal(transformer.decode([2]), expected[1])


# Memory, measured from outside: in a fresh process, whenever something has been read.

ALLOWANCE = 2 << 20
"""What a run may take beyond its budget: Python's objects, a thread with the scratch of its checksums, the logits."""

MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
from refinfer.generate import load
from refinfer.offload.store import FileStore

model, cache, name, budget, positions = sys.argv[1:4] + [int(text) for text in sys.argv[4:6]]
ids = list(range(100))


def private():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def maps():
    return "\\n".join(line for line in Path("/proc/self/maps").read_text().splitlines() if cache in line)


def look(*_):
    most[0] = max(most[0], private())
    mapped.append(maps())


def run(**options):
    with load(model, weights=name, weight_cache=cache, max_positions=positions, threads=1, **options) as session:
        for _ in session.generate(token_ids=ids, max_tokens=4):
            look()
        look()
    return session


most, mapped = [0], []
run()  # whatever is loaded or reserved once, such as the memory of BLAS
gc.collect()
getattr(ctypes.CDLL(None), "malloc_trim", print)(0)  # what is free is given back, and not used again unseen
assert any(mapped)  # without a budget it is mapped, and seen to be
before, most, mapped = private(), [0], []
real = FileStore.read


def read(*arguments):
    real(*arguments)
    look()


FileStore.read = read
session = run(budget=budget)
print(json.dumps({
    "growth": most[0] - before, "looks": len(mapped), "mapped": sorted(set(mapped)),
    "peak": session.stats.offload.peak_bytes, "ids": session.stats.token_ids,
}))
"""

LARGE = replace(SHAPES["storyteller"], vocab_size=1500, hidden_size=512, intermediate_size=1500, num_hidden_layers=3)


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "m"
    write_checkpoint(folder, LARGE, dtype="bf16", seed=2)
    return folder


def smallest_for(folder: Path, name: str, cache: Path, positions: int) -> int:
    """Ask for the smallest budget as people do: by trying one that is too small."""
    with pytest.raises(BudgetError) as refused:
        load(folder, weights=name, weight_cache=cache, budget=1, max_positions=positions)
    found = re.search(r"the smallest that works is (\d+) bytes", str(refused.value))
    assert found
    return int(found[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("OFFLOAD-8")
@pytest.mark.parametrize(("name", "share"), [("f32", 0.0), ("bf16", 0.4), ("int4", 0.0)])
def test_private_memory_grows_by_at_most_the_budget_and_nothing_is_mapped(
    large_folder: Path, name: str, share: float, tmp_path: Path
) -> None:
    cache, positions = tmp_path / "weights", 104
    inventory = Inventory(LARGE, name)
    smallest = smallest_for(large_folder, name, cache, positions)
    budget = smallest + int(share * (inventory.streamable_nbytes - smallest))
    argv = [sys.executable, "-c", MEASURE, str(large_folder), str(cache), name, str(budget), str(positions)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WATCHDOG_S, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["peak"] <= budget
    assert measured["growth"] <= budget + ALLOWANCE
    assert measured["mapped"] == [""]
    assert measured["looks"] > 30
    if name == "f32":
        assert inventory.streamable_nbytes > 1.5 * (budget + ALLOWANCE)  # there is something to be noticed


@pytest.mark.spec("OFFLOAD-11", "ERR-1")
@pytest.mark.parametrize("locked", [True, False], ids=["all locked", "all streamed"])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_matrix_or_a_table_that_outlives_its_source_gives_a_named_error(
    either: Path, locked: bool, threads: int, tmp_path: Path
) -> None:
    case = case_of(either, "int8", tmp_path / "cache")
    source = streamed(case, case.most if locked else case.smallest, threads=threads)
    with source.forward_pass() as weights:
        layer = next(iter(weights.layers))
        held = [layer.q_proj, layer.down_proj, weights.lm_head]
        table = weights.embed_tokens
        table.rows(np.array([1]))
    source.close()
    for matrix in held:
        with pytest.raises(GenerationError, match="closed"):
            matrix.matmul(np.ones((1, matrix.shape[1]), np.float32))
    with pytest.raises(GenerationError, match="closed"):
        table.rows(np.array([1]))
