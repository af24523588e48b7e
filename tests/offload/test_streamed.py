"""Specifies `refinfer.offload.streamed`: the same bits in less memory, each chunk read once and in order."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from refinfer.arrays import PAGE_BYTES
from refinfer.engine import fixed_of
from refinfer.errors import BudgetError, CacheFileError, DamagedWeightsError
from refinfer.generate import load
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer, prefill_block
from refinfer.model.weights import WeightSource
from refinfer.offload.budget import Budget
from refinfer.offload.inventory import Inventory
from refinfer.offload.plan import Fixed, Plan, make_plan, smallest_budget
from refinfer.offload.source import PackedSource
from refinfer.offload.store import FileStore, Store
from refinfer.offload.streamed import StreamedSource
from refinfer.packing import formats
from refinfer.packing.formats import FORMATS, Bytes
from refinfer.prepare import prepare
from refinfer.trace import RealClock
from refinfer.weight_cache import packers
from refinfer.weight_cache.file import read_file
from refinfer.weight_cache.format import Entry, Index, StoredChunk

POSITIONS = 80
PROMPT = 40
WATCHDOG_S = 60

every_format = pytest.mark.parametrize("name", list(FORMATS))


def forget_layouts() -> None:
    """Forget what was derived from the sizes of chunks."""
    packers.chunks_of.cache_clear()
    packers.packer_fingerprint.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Cut chunks of half a KiB, at least a tile, and int4 tiles of 16 rows: several to a tiny matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "FORMATS", {name: replace(f, chunk_nbytes=512) for name, f in FORMATS.items()})
        patch.setattr(formats, "_LARGEST_INT4_TILE", 16)
        patch.setattr(formats, "_SMALLEST_INT4_TILE", 16)
        patch.setattr(packers, "_LARGE", ())  # large matrices in such chunks would take seconds
        forget_layouts()
        yield
    forget_layouts()


@dataclass(frozen=True)
class Case:
    """A model in a format, and its cache file, built at first use."""

    folder: Path
    name: str
    file: Path

    @cached_property
    def inventory(self) -> Inventory:
        return Inventory(open_folder(self.folder).config, self.name)

    @property
    def fixed(self) -> Fixed:
        return fixed_of(self.inventory, POSITIONS)

    @property
    def smallest(self) -> int:
        return smallest_budget(self.inventory, self.fixed)

    @property
    def most(self) -> int:
        return self.fixed.total + self.inventory.streamable_nbytes

    @property
    def rows(self) -> int:
        return prefill_block(self.inventory.config, POSITIONS)

    def packed(self, where: str | None = None) -> PackedSource:
        """Return the weights in memory, in the file just built, or in the file as it is found."""
        prepared = prepare(self.inventory, open_checkpoint(self.folder), where or str(self.file), clock=RealClock())
        return PackedSource(self.inventory, prepared.provider, self.rows, RealClock())

    @cached_property
    def index(self) -> Index:
        return read_file(self.built)[1]

    @cached_property
    def built(self) -> Path:
        self.packed().close()
        return self.file

    @cached_property
    def entries(self) -> dict[tuple[str, str], Entry]:
        return {(entry.key.packer, entry.key.name): entry for entry in self.index.entries}

    @cached_property
    def chunks(self) -> list[StoredChunk]:
        """Where the chunks of the cycle lie in the file."""
        names = [matrix.name for matrix in self.inventory.matrices]
        return [self.entries["goi", names[c.matrix]].chunks[c.index] for c in self.inventory.cycle]

    def plan(self, budget: int, name: str = "leading") -> Plan:
        return make_plan(name, self.inventory, self.fixed, budget)

    def streamed(
        self, budget: int, store: Store | None = None, plan: str = "leading", threads: int = 0
    ) -> StreamedSource:
        """Return the weights within a budget; read when they are needed, or ahead by some threads."""
        return self.carried_out(self.plan(budget, plan), Budget(budget), store or FileStore(self.built), threads)

    def carried_out(self, plan: Plan, budget: Budget, store: Store, threads: int = 0) -> StreamedSource:
        return StreamedSource(
            self.inventory,
            self.index,
            store,
            plan,
            budget,
            most_rows=self.rows,
            clock=RealClock(),
            threads=threads,
        )


def with_head(inventory: Inventory) -> list[int]:
    """Return the numbers in the cycle of the chunks of the output table."""
    return [number for number, chunk in enumerate(inventory.cycle) if chunk.kind == "lm_head"]


Logits = list[npt.NDArray[np.uint32]]


def logits_of(source: WeightSource, seed: int = 0) -> Logits:
    """Return the bits of all logits of a prompt longer than a block, single tokens, and several at once."""
    V = source.config.vocab_size
    ids = np.random.default_rng(seed).integers(0, V, POSITIONS).tolist()
    transformer = Transformer(source, POSITIONS)
    assert transformer.block < PROMPT
    logits = [transformer.prefill(ids[:PROMPT])]
    at = PROMPT
    for n in (1, 1, 3, 17):
        logits.append(transformer.decode(ids[at : at + n]))
        at += n
    transformer.kv_cache.rewind(0)
    logits.append(transformer.prefill(ids[:1]))
    return [part.view(np.uint32) for part in logits]


def assert_same(got: Logits, expected: Logits) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def budgets_of(case: Case) -> list[int]:
    """Return the smallest budget that works, one that locks a half, the last that streams, more than everything."""
    return sorted({case.smallest, (case.smallest + case.most) // 2, case.most - 1, case.most + 1})


@pytest.fixture(scope="module", params=["tied", "untied"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with several chunks to a matrix, whose embedding table is the output table, and one with two tables."""
    folder = tmp_path_factory.mktemp("either")
    config = replace(
        SHAPES["tiny"], vocab_size=101, hidden_size=40, intermediate_size=52, num_hidden_layers=2, qkv_bias=True
    )
    write_checkpoint(folder / "m", replace(config, tie_word_embeddings=request.param == "tied"), dtype="f32")
    return folder / "m"


@pytest.fixture
def case(either: Path, tmp_path: Path) -> Case:
    return Case(either, "int8", tmp_path / "cache")


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


def places(case: Case, numbers: list[int]) -> list[tuple[int, int]]:
    return [(case.chunks[number].offset, case.chunks[number].padded_nbytes) for number in numbers]


@pytest.mark.spec("OFFLOAD-7")
def test_a_source_first_reads_the_vectors_and_the_locked_chunks_each_once(case: Case) -> None:
    vectors = case.entries["vectors", case.inventory.vectors_name]
    for budget in budgets_of(case):
        store = Recording(case.built)
        source = case.streamed(budget, store)
        locked = places(case, sorted(case.plan(budget).locked))
        assert store.taken() == [(vectors.offset, vectors.nbytes), *locked]
        source.close()


@pytest.mark.spec("OFFLOAD-7")
@every_format
def test_each_token_reads_exactly_the_chunks_that_are_not_locked_in_the_order_of_use(
    either: Path, name: str, tmp_path: Path
) -> None:
    """Beside them, the rows of the embedding table that are looked up."""
    case = Case(either, name, tmp_path / "cache")
    assert len(case.inventory.cycle) > 2 * len(case.inventory.matrices)
    head = with_head(case.inventory)
    for budget in budgets_of(case):
        store = Recording(case.built)
        source = case.streamed(budget, store)
        transformer = Transformer(source, POSITIONS)
        streaming = [n for n in range(len(case.inventory.cycle)) if n not in case.plan(budget).locked]

        def looking_up(ids: list[int], source: StreamedSource = source, store: Recording = store) -> Any:
            store.taken()
            source.embed_tokens.rows(np.array(ids))
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
def test_each_token_of_a_tied_model_reads_each_chunk_once_and_that_of_its_row_before(golden_tied: Case) -> None:
    store = Recording(golden_tied.built)
    transformer = Transformer(golden_tied.streamed(golden_tied.smallest, store), POSITIONS)
    store.taken()
    transformer.decode([1])
    cycle = list(range(len(golden_tied.inventory.cycle)))
    assert store.taken() == places(golden_tied, [with_head(golden_tied.inventory)[0], *cycle])


@pytest.fixture
def golden_tied(tmp_path: Path) -> Case:
    return Case(Path(__file__).parents[1] / "golden" / "qwen3", "bf16", tmp_path / "cache")


@pytest.mark.spec("OFFLOAD-7", "OFFLOAD-6")
def test_a_row_of_an_embedding_table_costs_the_pages_or_the_chunk_that_hold_it(case: Case) -> None:
    store = Recording(case.built)
    source = case.streamed(case.smallest, store)
    for row in (0, 1, 50, 99, 100):
        store.taken()
        source.embed_tokens.rows(np.array([row]))
        reads = store.taken()
        if case.inventory.table is None:
            head = with_head(case.inventory)
            layout = case.inventory.matrices[-1].layout
            holding = [n for n, c in zip(head, layout.chunks, strict=True) if 0 <= row - c.first_row < c.n_rows]
            assert reads == places(case, holding)
        else:
            entry = case.entries["rows", case.inventory.table]
            nbytes = packers.record_nbytes(entry.key)
            start = entry.offset + row * nbytes
            assert len(reads) == 1
            offset, size = reads[0]
            assert offset % PAGE_BYTES == size % PAGE_BYTES == 0
            assert offset <= start < offset + PAGE_BYTES
            assert start + nbytes <= offset + size < start + nbytes + PAGE_BYTES


@pytest.mark.spec("OFFLOAD-7")
def test_looking_up_rows_of_a_tied_table_reads_each_chunk_that_holds_one_once(golden_tied: Case) -> None:
    store = Recording(golden_tied.built)
    source = golden_tied.streamed(golden_tied.smallest, store)
    store.taken()
    rows = source.embed_tokens.rows(np.array([50, 3, 50, 20, 3]))
    head = with_head(golden_tied.inventory)
    assert len(head) == 4  # of 16 rows each
    assert store.taken() == places(golden_tied, [head[0], head[1], head[3]])
    everything = golden_tied.packed(":memory").embed_tokens.rows(np.arange(53))
    np.testing.assert_array_equal(rows, everything[[50, 3, 50, 20, 3]])


@pytest.mark.spec("OFFLOAD-7")
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_chunk_is_valid_until_the_next_one_is_asked_for(case: Case, threads: int) -> None:
    source = case.streamed(case.smallest + 30_000, threads=threads)
    content = case.built.read_bytes()
    for _ in range(5):
        for chunk, view in zip(case.chunks, source.chunks(0, len(case.chunks)), strict=True):
            for _ in range(3):
                assert view.tobytes() == content[chunk.offset : chunk.offset + chunk.nbytes]
            assert view.ctypes.data % PAGE_BYTES == 0
    source.close()


@pytest.mark.spec("OFFLOAD-8", "BUDGET-1", "PLAN-1")
def test_all_that_a_plan_counts_is_acquired_before_anything_is_read(case: Case) -> None:
    plan = case.plan(case.most - 1)
    for limit in (case.most - 2 - plan.account.unused, 0):
        store, budget = Recording(case.built), Budget(limit)
        with pytest.raises(BudgetError):
            case.carried_out(plan, budget, store)
        assert store.taken() == []
        store.close()
    budget = Budget(case.most - 1)
    case.carried_out(plan, budget, FileStore(case.built)).close()
    assert budget.in_use == budget.peak == case.most - 1 - plan.account.unused


def flip(path: Path, offset: int) -> None:
    """Change a bit of a byte, in place."""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.spec("OFFLOAD-9")
@every_format
def test_a_damaged_chunk_that_streams_is_named_before_it_is_used(either: Path, name: str, tmp_path: Path) -> None:
    case = Case(either, name, tmp_path / "cache")
    source = case.streamed(case.smallest)
    transformer = Transformer(source, POSITIONS)
    expected = transformer.decode([100]).view(np.uint32)
    for number, chunk in list(enumerate(case.chunks))[::3]:
        offset = chunk.offset + (chunk.nbytes - 1 if number % 2 else 0)
        flip(case.file, offset)
        transformer.kv_cache.rewind(0)
        cycle = case.inventory.cycle[number]
        tensor = re.escape(case.inventory.matrices[cycle.matrix].name)
        with pytest.raises(DamagedWeightsError, match=f"{tensor}, chunk {cycle.index}, does not agree"):
            transformer.decode([100])
        flip(case.file, offset)
    transformer.kv_cache.rewind(0)
    np.testing.assert_array_equal(transformer.decode([100]).view(np.uint32), expected)


@pytest.mark.spec("OFFLOAD-9")
def test_damage_in_what_stays_in_memory_is_found_when_it_is_read(case: Case) -> None:
    vectors = case.entries["vectors", case.inventory.vectors_name].chunks[0]
    for chunk in (vectors, case.chunks[0], case.chunks[-1]):
        flip(case.built, chunk.offset + chunk.nbytes // 2)
        with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
            case.streamed(case.most)
        flip(case.file, chunk.offset + chunk.nbytes // 2)
    case.streamed(case.most).close()


@pytest.mark.spec("OFFLOAD-9", "OFFLOAD-6")
def test_a_damaged_row_of_a_table_is_found_when_it_is_looked_up_and_only_then(
    tmp_path: Path, tiny_folder: Path
) -> None:
    case = Case(tiny_folder, "f32", tmp_path / "cache")
    source = case.streamed(case.smallest)
    expected = logits_of(source, seed=1)
    used = set(np.random.default_rng(1).integers(0, 261, POSITIONS).tolist())
    entry = case.entries["rows", "model.embed_tokens.weight"]
    nbytes = packers.record_nbytes(entry.key)
    for row, is_used in ((min(used), True), (max(used), True), (min(set(range(261)) - used), False)):
        for at in (0, nbytes - 1):  # a weight, its checksum
            flip(case.file, entry.offset + row * nbytes + at)
            with pytest.raises(DamagedWeightsError, match=r"model\.embed_tokens\.weight does not agree"):
                source.embed_tokens.rows(np.array([row]))
            if is_used:
                with pytest.raises(DamagedWeightsError):
                    logits_of(source, seed=1)
            else:
                assert_same(logits_of(source, seed=1), expected)
            flip(case.file, entry.offset + row * nbytes + at)
    assert_same(logits_of(source, seed=1), expected)


@pytest.mark.spec("OFFLOAD-9")
def test_pads_are_no_weights(case: Case) -> None:
    source = case.streamed(case.smallest)
    expected = logits_of(source)
    padded = [chunk for chunk in case.chunks if chunk.nbytes < chunk.padded_nbytes]
    assert padded
    for chunk in padded:
        flip(case.file, chunk.offset + chunk.nbytes)
    assert_same(logits_of(source), expected)


@pytest.mark.spec("OFFLOAD-9")
def test_a_disk_that_fails_is_one_named_error_and_the_run_may_go_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = case.streamed(case.smallest)
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
        with pytest.raises(DamagedWeightsError, match="cannot be read: Input/output error"):
            transformer.decode([1])
    left[0] = 1000
    transformer.kv_cache.rewind(0)
    np.testing.assert_array_equal(transformer.decode([1]), expected)


@pytest.mark.spec("OFFLOAD-9")
def test_a_file_that_is_not_there_is_one_named_error(case: Case) -> None:
    plan = case.plan(case.smallest)
    assert case.index
    case.file.unlink()
    with pytest.raises(CacheFileError, match="No such file"):
        case.carried_out(plan, Budget(case.smallest), FileStore(case.file))


@pytest.mark.spec("OFFLOAD-9", "KV-3")
@pytest.mark.parametrize("where", ["a layer", "the output table"])
def test_a_pass_that_finds_damage_leaves_the_kv_cache_as_it_was(case: Case, where: str) -> None:
    transformer = Transformer(case.streamed(case.smallest), POSITIONS)
    expected = [transformer.decode([1]), transformer.decode([2])]
    transformer.kv_cache.rewind(1)
    chunk = case.chunks[0 if where == "a layer" else -1]
    flip(case.file, chunk.offset)
    with pytest.raises(DamagedWeightsError):
        transformer.decode([2])
    flip(case.file, chunk.offset)
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


@pytest.fixture
def usual_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut chunks as everywhere else."""
    monkeypatch.setattr(formats, "FORMATS", FORMATS)
    monkeypatch.setattr(formats, "_LARGEST_INT4_TILE", 512)
    monkeypatch.setattr(formats, "_SMALLEST_INT4_TILE", 64)
    forget_layouts()
    yield
    forget_layouts()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.usefixtures("usual_chunks")
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
