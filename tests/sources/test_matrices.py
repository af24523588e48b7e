"""Specifies `refinfer.sources.matrices`: a matrix over packed chunks wherever they are, and a table of single rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from refinfer.arrays import Float32Array, f32_to_bf16, stored_to_f32
from refinfer.errors import DamagedWeightsError, RequestError
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.packing.formats import FORMATS, PackedMatrix, pack_matrix
from refinfer.packing.layout import Bytes, Tiles
from refinfer.packing.matmul import matmul, scratch_floats
from refinfer.sources.matrices import ChunkedMatrix, RecordTable, ResidentChunks, Scratch, vectors_of
from refinfer.weight_cache.key import WeightId
from refinfer.weight_cache.packers import chunks_of, pack_into, padded_nbytes_of, record_nbytes, rows_key

SMALL_CHUNKS = 512
CONFIG = replace(SHAPES["tiny"], vocab_size=70, hidden_size=40, intermediate_size=530, num_hidden_layers=1)

every_format = pytest.mark.parametrize("name", list(FORMATS))


def normal(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def packed(name: str) -> PackedMatrix:
    """Return a matrix `[530, 40]`, which is several chunks in every format, the last of them with missing rows."""
    matrix = pack_matrix(f32_to_bf16(normal(530, 40)), name, SMALL_CHUNKS)
    assert len(matrix.layout.chunks) > 1
    return matrix


class OneByOne:
    """Gives the chunks of a matrix in one place of memory, each overwritten when the next is asked for."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self._matrix = matrix
        self._place = np.empty(max(buffer.size for buffer in matrix.buffers), np.uint8)
        self.asked_for: list[int] = []

    def in_order(self) -> Iterator[Tiles]:
        return self.some(range(len(self._matrix.buffers)))

    def some(self, numbers: Sequence[int]) -> Iterator[Tiles]:
        layout = self._matrix.layout
        for number in numbers:
            self.asked_for.append(number)
            buffer = self._matrix.buffers[number]
            self._place[:] = 0x7F
            self._place[: buffer.size] = buffer
            yield layout.tiles(self._place, layout.chunks[number])


def scratch_for(name: str, most_rows: int = 8) -> Scratch:
    return Scratch(Inventory(CONFIG, name, SMALL_CHUNKS), most_rows)


@pytest.mark.spec("SOURCE-1", "OFFLOAD-3")
@every_format
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_a_matrix_multiplies_and_adds_its_bias_wherever_its_chunks_are(name: str, biased: bool) -> None:
    p, bias = packed(name), normal(530, seed=1) if biased else None
    w = p.unpack().astype(np.float64)
    scratch = scratch_for(name)
    for M in (1, 5, 8, 70):
        x = normal(M, 40, seed=M)
        expected = matmul(x, p.layout, p.tiles) + (0 if bias is None else bias)
        np.testing.assert_allclose(expected, x @ w.T + (0 if bias is None else bias), atol=1e-3)
        for chunks in (ResidentChunks(p), OneByOne(p)):
            matrix = ChunkedMatrix(p.layout, chunks, bias, scratch)
            assert matrix.shape == (530, 40)
            out = np.full((M, 530), np.nan, np.float32)
            assert matrix.matmul(x, out) is out
            np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))
            np.testing.assert_array_equal(matrix.matmul(x).view(np.uint32), expected.view(np.uint32))


@pytest.mark.spec("SOURCE-1", "OFFLOAD-6")
@every_format
def test_rows_ask_for_the_chunks_that_hold_them_and_no_others(name: str) -> None:
    p = packed(name)
    chunks = OneByOne(p)
    matrix = ChunkedMatrix(p.layout, chunks, normal(530), scratch_for(name))
    ids = np.array([529, 0, 529, 3])
    rows = matrix.rows(ids)
    np.testing.assert_array_equal(rows, p.unpack()[ids])
    assert chunks.asked_for == [0, len(p.layout.chunks) - 1]
    np.testing.assert_array_equal(ChunkedMatrix(p.layout, ResidentChunks(p), None, scratch_for(name)).rows(ids), rows)


@pytest.mark.spec("SOURCE-6")
@pytest.mark.parametrize("row", [-1, 530])
def test_a_row_that_a_matrix_does_not_have_is_refused_before_a_chunk_is_asked_for(row: int) -> None:
    p = packed("int8")
    chunks = OneByOne(p)
    with pytest.raises(RequestError, match=f"{row}"):
        ChunkedMatrix(p.layout, chunks, None, scratch_for("int8")).rows(np.array([0, row]))
    assert not chunks.asked_for


@pytest.mark.spec("PACK-26")
@every_format
def test_scratch_is_shared_by_all_matrices_and_larger_for_more_rows_than_were_reserved(name: str) -> None:
    inventory = Inventory(CONFIG, name, SMALL_CHUNKS)
    scratch, layouts = Scratch(inventory, 8), {m.layout for m in inventory.matrices}
    assert scratch.of(1) is scratch.of(8)
    assert scratch.of(8).nbytes == 4 * scratch_floats(layouts, 8)
    assert scratch.of(9) is not scratch.of(8)
    assert scratch.of(100).nbytes == 4 * scratch_floats(layouts, 100)
    for M in (8, 100):
        for layout in layouts:
            p = pack_matrix(normal(layout.N, layout.K), name, SMALL_CHUNKS)
            assert ChunkedMatrix(layout, ResidentChunks(p), None, scratch).matmul(normal(M, layout.K)).shape[0] == M


@pytest.mark.spec("KEY-7")
def test_a_block_is_cut_into_its_vectors_in_order() -> None:
    inventory = Inventory(replace(CONFIG, qkv_bias=True), "f32")
    sizes = inventory.vectors
    block = np.arange(sum(sizes.values()), dtype=np.float32)
    vectors = vectors_of(block, inventory)
    assert {name: vector.size for name, vector in vectors.items()} == sizes
    np.testing.assert_array_equal(np.concatenate(list(vectors.values())), block)
    assert all(np.shares_memory(vector, block) for vector in vectors.values())


# Tables of rows.


class Records:
    """A table of rows as it is kept, in several chunks, and what is read of it."""

    def __init__(self, dtype: str, K: int = 7) -> None:
        w = normal(40, K, seed=3)
        stored: dict[str, npt.NDArray[Any]] = {"f32": w, "f16": w.astype(np.float16), "bf16": f32_to_bf16(w)}
        self.values = stored_to_f32(stored[dtype])
        self.key = rows_key(w.shape, dtype, WeightId(bytes(32), "table"), SMALL_CHUNKS)
        self.buffer = np.zeros(padded_nbytes_of(self.key), np.uint8)
        for _ in pack_into(stored[dtype], self.key, self.buffer):
            pass
        self.reads: list[tuple[int, int]] = []
        self.table = RecordTable(self.key, "here", self.read)

    def read(self, start: int, nbytes: int) -> Bytes:
        self.reads.append((start, nbytes))
        return self.buffer[start : start + nbytes]

    def start(self, row: int) -> int:
        chunk = max((c for c in chunks_of(self.key) if c.first_row <= row), key=lambda c: c.first_row)
        return chunk.offset + (row - chunk.first_row) * record_nbytes(self.key)


@pytest.mark.spec("OFFLOAD-6", "SOURCE-1")
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_table_reads_the_record_of_each_row_it_is_asked_for_and_nothing_else(dtype: str) -> None:
    records = Records(dtype)
    first_rows = [chunk.first_row for chunk in chunks_of(records.key)]
    ids = [39, 0, 7, 7, *first_rows, *(b - 1 for _, b in pairwise(first_rows))]
    rows = records.table.rows(np.array(ids))
    assert records.table.shape == (40, 7)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, records.values[ids])
    assert records.reads == [(records.start(row), record_nbytes(records.key)) for row in ids]
    assert records.table.rows(np.array([], np.int64)).shape == (0, 7)


@pytest.mark.spec("OFFLOAD-6", "KEY-6")
def test_a_record_that_was_changed_or_moved_is_a_named_error() -> None:
    said = re.escape("here: table does not agree with its checksum: the file is damaged; start again")
    records = Records("f32")
    nbytes = record_nbytes(records.key)
    for at in range(nbytes):
        records.buffer[records.start(5) + at] ^= 1
        with pytest.raises(DamagedWeightsError, match=said):
            records.table.rows(np.array([5]))
        np.testing.assert_array_equal(records.table.rows(np.array([4, 6])), records.values[[4, 6]])
        records.buffer[records.start(5) + at] ^= 1
    records.buffer[records.start(5) :][:nbytes] = records.buffer[records.start(6) :][:nbytes]
    with pytest.raises(DamagedWeightsError, match=said):
        records.table.rows(np.array([5]))


@pytest.mark.spec("SOURCE-6")
@pytest.mark.parametrize("row", [-1, 40])
def test_a_row_that_a_table_does_not_have_is_refused_before_anything_is_read(row: int) -> None:
    records = Records("f32")
    with pytest.raises(RequestError, match=f"{row}"):
        records.table.rows(np.array([0, row]))
    assert not records.reads
