"""Specifies `refinfer.offload.packed_file`: every chunk, vector and row as it was packed, each read checked."""

from __future__ import annotations

import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import DamagedWeightsError, GenerationError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.offload.packed_file import PackedFile, pages
from refinfer.offload.store import FileStore
from refinfer.packing.formats import FORMATS
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import WeightId

sys.path.insert(0, str(Path(__file__).parent))
from packed_model import PackedModel, change

POSITIONS: Final = 8
TABLE: Final = "model.embed_tokens.weight"


class Noted(FileStore):
    """A store that writes down where it reads."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, into: Bytes) -> None:
        self.reads.append((offset, into.size))
        super().read(offset, into)


def opened(model: PackedModel) -> tuple[PackedFile, Noted]:
    store = Noted(model.built)
    return PackedFile(model.built, model.inventory, model.keys, store), store


@pytest.fixture(params=list(FORMATS))
def model(request: pytest.FixtureRequest, tiny_folder: Path, tiny_config: ModelConfig, tmp_path: Path) -> PackedModel:
    """A model in each format, and a cache file of its own."""
    return PackedModel(tiny_config, tiny_folder, request.param, tmp_path / "cache", POSITIONS)


@pytest.fixture
def one(tiny_folder: Path, tiny_config: ModelConfig, tmp_path: Path) -> PackedModel:
    return PackedModel(tiny_config, tiny_folder, "int8", tmp_path / "cache", POSITIONS)


@pytest.mark.spec("OFFLOAD-7", "OFFLOAD-9")
def test_every_chunk_is_read_in_whole_pages_and_returned_without_its_padding(model: PackedModel) -> None:
    file, store = opened(model)
    content = model.built.read_bytes()
    assert len(model.chunks) == len(model.inventory.cycle)
    for number, chunk in enumerate(model.chunks):
        slot = pages(chunk.padded_nbytes + PAGE_BYTES)
        slot[:] = 0xA5
        store.reads.clear()
        got = file.read(number, slot)
        assert got.tobytes() == content[chunk.offset : chunk.offset + chunk.nbytes]
        assert np.shares_memory(got, slot)
        assert (slot[chunk.padded_nbytes :] == 0xA5).all()
        assert store.reads == [(chunk.offset, chunk.padded_nbytes)]
        assert zlib.crc32(got.data) == chunk.checksum
    file.close()


@pytest.mark.spec("OFFLOAD-9", "ERR-1")
@pytest.mark.parametrize("at", [0, -1])
def test_a_damaged_chunk_is_named_with_its_file_its_matrix_and_its_number(one: PackedModel, at: int) -> None:
    file, _ = opened(one)
    for number in (0, 3, len(one.chunks) - 1):
        chunk, used = one.chunks[number], one.inventory.cycle[number]
        place = chunk.offset + at % chunk.nbytes
        change(one.built, place)
        with pytest.raises(DamagedWeightsError) as caught:
            file.read(number, pages(chunk.padded_nbytes))
        name = one.inventory.matrices[used.matrix].name
        assert caught.value.reason == (
            f"{one.built}: {name}, chunk {used.index}, does not agree with its checksum: the file is damaged"
        )
        change(one.built, place)
        assert file.read(number, pages(chunk.padded_nbytes)).size == chunk.nbytes
    file.close()


@pytest.mark.spec("OFFLOAD-9")
def test_a_file_that_lacks_one_of_the_keys_has_taken_the_place_of_another(one: PackedModel) -> None:
    name = one.inventory.matrices[0].name
    other = replace(one.keys[name], weights=WeightId(bytes(32), name))
    with FileStore(one.built) as store:
        with pytest.raises(DamagedWeightsError) as caught:
            PackedFile(one.built, one.inventory, {**one.keys, name: other}, store)
        assert caught.value.reason == f"{one.built} was replaced while it was opened"
        PackedFile(one.built, one.inventory, one.keys, store)


@pytest.mark.spec("OFFLOAD-7")
def test_vectors_and_rows_of_the_table_are_those_of_the_checkpoint(model: PackedModel) -> None:
    file, store = opened(model)
    checkpoint, shapes = open_checkpoint(model.folder), model.config.tensor_shapes()
    vectors = file.vectors()
    assert set(vectors) == {name for name, shape in shapes.items() if len(shape) == 1}
    for name, vector in vectors.items():
        np.testing.assert_array_equal(vector, checkpoint.float32(name, shapes[name]), strict=True)
    table, ids = file.table(TABLE), np.array([0, 260, 7, 7])
    store.reads.clear()
    np.testing.assert_array_equal(table.rows(ids), checkpoint.float32(TABLE, shapes[TABLE])[ids], strict=True)
    assert len(store.reads) == len(ids)
    assert all(nbytes <= 2 * PAGE_BYTES for _, nbytes in store.reads)  # the pages of one row
    file.close()


@pytest.mark.spec("OFFLOAD-9", "ERR-1")
def test_a_damaged_block_of_vectors_and_a_damaged_row_are_named(one: PackedModel) -> None:
    file, _ = opened(one)
    change(one.built, one.vectors.offset)
    with pytest.raises(DamagedWeightsError, match=r"vectors .* does not agree with its checksum"):
        file.vectors()
    table = file.table(TABLE)
    change(one.built, one.entries[TABLE].offset + 4)  # the first row
    with pytest.raises(DamagedWeightsError, match=f"{TABLE} does not agree with its checksum"):
        table.rows(np.array([0]))
    assert table.rows(np.array([1])).any()
    file.close()


@pytest.mark.spec("OFFLOAD-9", "OPEN-7")
def test_a_file_without_these_buffers_was_replaced_while_it_was_opened(one: PackedModel, tmp_path: Path) -> None:
    other = replace(one, format="bf16", file=tmp_path / "other")
    with FileStore(one.built) as store, pytest.raises(DamagedWeightsError) as caught:
        PackedFile(other.built, one.inventory, one.keys, store)
    assert caught.value.reason == f"{other.built} was replaced while it was opened"


@pytest.mark.spec("OFFLOAD-9", "ERR-1")
@pytest.mark.parametrize("content", [None, b"", bytes(3 * PAGE_BYTES)], ids=["missing", "empty", "garbage"])
def test_a_file_that_is_not_a_cache_file_is_one_named_error(
    content: bytes | None, one: PackedModel, tmp_path: Path
) -> None:
    path = tmp_path / "other"
    if content is not None:
        path.write_bytes(content)
    with FileStore(one.built) as store, pytest.raises(DamagedWeightsError) as caught:
        PackedFile(path, one.inventory, one.keys, store)
    assert caught.value.reason.startswith(f"{path} cannot be used: ")


@pytest.mark.spec("OFFLOAD-11", "STORE-4")
def test_closing_closes_the_store_and_again_is_allowed(one: PackedModel) -> None:
    file, _ = opened(one)
    file.close()
    file.close()
    with pytest.raises(GenerationError, match=r"is closed$"):
        file.read(0, pages(one.chunks[0].padded_nbytes))


@pytest.mark.spec("OFFLOAD-7")
@pytest.mark.parametrize("n", [0, 1, 3])
def test_pages_are_bytes_that_start_on_a_page(n: int) -> None:
    memory = pages(n * PAGE_BYTES)
    assert (memory.dtype, memory.shape) == (np.dtype(np.uint8), (n * PAGE_BYTES,))
    assert n == 0 or memory.ctypes.data % PAGE_BYTES == 0
