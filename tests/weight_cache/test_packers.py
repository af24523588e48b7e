"""Specifies `refinfer.weight_cache.packers`: the chunks and bytes of each kind of buffer, and their fingerprint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from refinfer.arrays import PAGE_BYTES, Float32Array, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing import formats
from refinfer.packing.formats import FORMATS, Format, PackedMatrix, Tiles, layout_of, pack_matrix
from refinfer.packing.layout import Chunk, TileShape, cut_into_chunks
from refinfer.weight_cache import packers
from refinfer.weight_cache.checksum import checksum
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey, WeightId
from refinfer.weight_cache.packers import (
    PACKERS,
    STORED_TYPES,
    chunks_of,
    layout_of_key,
    matrix_key,
    nbytes_of,
    pack_into,
    packer_fingerprint,
    record_nbytes,
    rows_key,
    rows_of_records,
    vectors_key,
)

Stored = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

W = WeightId(bytes(DIGEST_BYTES), "w")

every_format = pytest.mark.parametrize("name", list(FORMATS))
every_stored_type = pytest.mark.parametrize("stored", list(STORED_TYPES))


def noise(*shape: int, stored: str = "f32", seed: int = 0) -> Stored:
    """Return numbers as they are stored in a checkpoint."""
    w = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return f32_to_bf16(w) if stored == "bf16" else w.astype(STORED_TYPES[stored])


def packed(stored: Stored, key: PackKey, **kwargs: int) -> Bytes:
    buffer = np.zeros(nbytes_of(key), np.uint8)
    done = list(pack_into(stored, key, buffer, **kwargs))
    last = chunks_of(key)[-1]
    assert done == sorted(set(done))
    assert done[-1] == last.offset + last.nbytes
    return buffer


def forget() -> None:
    """Forget what was remembered of chunks and fingerprints."""
    chunks_of.cache_clear()
    packer_fingerprint.cache_clear()


@contextmanager
def instead(module: object, name: str, value: object) -> Iterator[None]:
    """Put `value` in the place of a name of a module for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, value)
        forget()
        yield
    forget()


@contextmanager
def other_format(name: str, **changes: Any) -> Iterator[None]:
    """Have a format packed in another way for a while."""
    changed: Mapping[str, Format] = {**FORMATS, name: replace(FORMATS[name], **changes)}
    with instead(formats, "FORMATS", changed):
        yield


def bytes_of_matrix(matrix: PackedMatrix) -> Bytes:
    """Return the bytes of a packed matrix as they lie in a file: each chunk on a page."""
    buffer = np.zeros(matrix.layout.nbytes, np.uint8)
    for chunk, part in zip(matrix.layout.chunks, matrix.buffers, strict=True):
        buffer[chunk.offset : chunk.offset + chunk.nbytes] = part
    return buffer


def pages(nbytes: int) -> int:
    return (nbytes + 4095) // 4096 * 4096


def require_sound(key: PackKey, n_rows: int) -> None:
    """Check that chunks hold every row once, each on the page that follows the one before."""
    row = offset = 0
    for chunk in chunks_of(key):
        assert (chunk.first_row, chunk.offset) == (row, offset)
        row, offset = row + chunk.n_rows, offset + pages(chunk.nbytes)
    assert (row, offset) == (n_rows, nbytes_of(key))


@pytest.mark.spec("KEY-4")
@every_format
@given(N=st.integers(1, 3000), K=st.integers(1, 3000))
def test_a_matrix_has_the_chunks_of_its_layout(name: str, N: int, K: int) -> None:
    layout = layout_of(name, N, K)
    key = matrix_key(layout, W)
    assert (key.packer, key.shape, key.format, key.tile) == ("goi", (N, K), name, layout.tile)
    assert layout_of_key(key) == layout
    assert chunks_of(key) == layout.chunks
    assert nbytes_of(key) == layout.nbytes == sum(pages(chunk.nbytes) for chunk in layout.chunks)
    require_sound(key, N)


@pytest.mark.spec("KEY-4")
@every_stored_type
@given(N=st.integers(1, 200_000), K=st.integers(1, 3000))
def test_a_table_has_runs_of_whole_records(stored: str, N: int, K: int) -> None:
    key = rows_key((N, K), stored, W)
    stride = record_nbytes(key)
    row_nbytes = K * {"f32": 4, "f16": 2, "bf16": 2}[stored]
    assert stride % 8 == 0
    assert row_nbytes + 8 <= stride < row_nbytes + 16
    assert all(chunk.nbytes == chunk.n_rows * stride < 8 << 20 for chunk in chunks_of(key))
    require_sound(key, N)


@pytest.mark.spec("KEY-4", "KEY-7")
@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 3_000_000])
def test_vectors_are_one_chunk_of_float32(n: int) -> None:
    key = vectors_key(n, W)
    assert chunks_of(key) == (Chunk(0, 1, 0, 4 * n),)
    assert nbytes_of(key) == pages(4 * n)


MATRIX, TABLE, VECTORS = matrix_key(layout_of("f32", 5, 3), W), rows_key((5, 3), "f16", W), vectors_key(5, W)

NO_BUFFER: dict[str, tuple[PackKey, str]] = {
    "unknown packer": (replace(MATRIX, packer="giu"), "'giu' is not a packer; there are goi, rows, vectors"),
    "packer in capitals": (replace(MATRIX, packer="GOI"), "'GOI' is not a packer"),
    "no packer": (replace(MATRIX, packer=""), "'' is not a packer"),
    "matrix of one dimension": (replace(MATRIX, shape=(15,)), "'w' is not a packed matrix"),
    "matrix of three dimensions": (replace(MATRIX, shape=(1, 5, 3)), "'w' is not a packed matrix"),
    "matrix of no format": (replace(MATRIX, format="f16"), "'f16' is not a weight format"),
    "matrix in other tiles": (replace(MATRIX, tile=TileShape(32, 3)), "'w' lies in tiles of TileShape(nr=32, kr=3"),
    "matrix in the tiles of its transpose": (replace(MATRIX, shape=(3, 5)), "'w' lies in tiles of TileShape(nr=16"),
    "table of one dimension": (replace(TABLE, shape=(15,)), "'w' is not a table of rows"),
    "table of packed numbers": (replace(TABLE, format="int8"), "'w' is not a table of rows"),
    "vectors of two dimensions": (replace(VECTORS, shape=(5, 3)), "'w' is not a block of vectors"),
    "vectors of another type": (replace(VECTORS, format="f16"), "'w' is not a block of vectors"),
}


@pytest.mark.spec("KEY-4")
@pytest.mark.parametrize(("key", "why"), list(NO_BUFFER.values()), ids=list(NO_BUFFER))
def test_a_key_of_no_buffer_is_refused(key: PackKey, why: str) -> None:
    for ask in (chunks_of, nbytes_of):
        with pytest.raises(PackingError, match=re.escape(why)):
            ask(key)


@pytest.mark.spec("KEY-4")
@pytest.mark.parametrize("key", [TABLE, VECTORS], ids=["table", "vectors"])
def test_only_a_matrix_has_the_layout_of_one(key: PackKey) -> None:
    with pytest.raises(PackingError, match="is not a packed matrix"):
        layout_of_key(key)


@pytest.mark.spec("KEY-4")
@pytest.mark.parametrize("key", [MATRIX, TABLE, VECTORS], ids=["matrix", "table", "vectors"])
def test_a_tensor_or_a_buffer_of_another_size_is_refused(key: PackKey) -> None:
    fitting, buffer = np.zeros(key.shape, np.float16), np.zeros(nbytes_of(key), np.uint8)
    for stored in (np.zeros((3, 5), np.float16), np.zeros(15, np.float16), np.zeros((5, 3, 1), np.float16)):
        with pytest.raises(PackingError, match="does not fit"):
            pack_into(stored, key, buffer)
    for other in (buffer[:-1], np.zeros(buffer.size + PAGE_BYTES, np.uint8), buffer.reshape(2, -1), buffer[:0]):
        with pytest.raises(PackingError, match="does not fit"):
            pack_into(fitting, key, other)


@st.composite
def small_matrices(draw: st.DrawFn) -> Stored:
    shape = draw(st.integers(1, 90)), draw(st.integers(1, 140))
    return noise(*shape, stored=draw(st.sampled_from(list(STORED_TYPES))), seed=draw(st.integers(0, 99)))


@pytest.mark.spec("KEY-5")
@every_format
@pytest.mark.parametrize("chunk_nbytes", [1, 3000, 1 << 20])
@given(w=small_matrices(), most=st.integers(0, 20_000))
def test_packing_in_blocks_however_small_gives_the_bytes_of_packing_at_once(
    name: str, chunk_nbytes: int, w: Stored, most: int
) -> None:
    with other_format(name, chunk_nbytes=chunk_nbytes):  # so that small matrices have many chunks
        layout = layout_of(name, *w.shape)
        assert len(layout.chunks) == 1 or chunk_nbytes < 1 << 20
        at_once = bytes_of_matrix(pack_matrix(w, name))
        for blocks in (most, 1):
            assert_array_equal(packed(w, matrix_key(layout, W), most=blocks), at_once)


@pytest.mark.spec("KEY-5")
@every_format
def test_a_large_matrix_has_the_same_bytes_in_blocks_of_any_size(name: str) -> None:
    w = np.resize(noise(211), (1500, 2001))  # the last tile is not full, and an odd column pads
    layout = layout_of(name, *w.shape)
    key = matrix_key(layout, W)
    assert len(layout.chunks) > 1
    at_once = bytes_of_matrix(pack_matrix(w, name))
    for most in (1, 3_000_000, 1 << 40):
        assert_array_equal(packed(w, key, most=most), at_once)
    assert_array_equal(packed(w, key), at_once)


@pytest.mark.spec("KEY-5")
def test_the_smallest_block_is_a_tile() -> None:
    key = matrix_key(layout_of("f32", 100, 10), W)
    done = list(pack_into(noise(100, 10), key, np.zeros(nbytes_of(key), np.uint8), most=1))
    assert done == [16 * 10 * 4 * tile for tile in range(1, 8)]


def records_of(buffer: Bytes, key: PackKey) -> Bytes:
    """Return the records of a packed table, `[N, record_nbytes]`."""
    chunks = [buffer[chunk.offset : chunk.offset + chunk.nbytes] for chunk in chunks_of(key)]
    return np.concatenate(chunks).reshape(key.shape[0], -1)


@pytest.mark.spec("KEY-6")
@every_stored_type
@given(N=st.integers(1, 40), K=st.integers(1, 1100), seed=st.integers(0, 99), data=st.data())
def test_rows_are_read_back_as_stored(stored: str, N: int, K: int, seed: int, data: st.DataObject) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, (N, K * STORED_TYPES[stored].itemsize), np.uint8)
    w, key = bits.view(STORED_TYPES[stored]), rows_key((N, K), stored, W)  # NaN and all
    ids = np.array(data.draw(st.lists(st.integers(0, N - 1), max_size=8)), np.int64)
    rows = rows_of_records(records_of(packed(w, key), key)[ids], key, ids)
    assert rows is not None
    assert (rows.dtype, rows.shape) == (w.dtype, (len(ids), K))
    assert_array_equal(rows.view(np.uint8), bits[ids])


@pytest.mark.spec("KEY-6")
@every_stored_type
@pytest.mark.parametrize("K", [1, 3, 4, 513])
def test_a_record_is_the_row_zeros_and_its_checksum_with_its_number(stored: str, K: int) -> None:
    w, key = noise(3, K, stored=stored), rows_key((3, K), stored, W)
    at = 0
    raw = packed(w, key).tobytes()
    for number, row in enumerate(w):
        expected = row.tobytes() + bytes(-row.nbytes % 8)
        assert raw[at : at + len(expected)] == expected
        at += len(expected) + 8
        told_apart_by = (number + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
        known_by = checksum(np.frombuffer(expected, np.uint8)) ^ told_apart_by
        assert int.from_bytes(raw[at - 8 : at], "little") == known_by
        assert at % record_nbytes(key) == 0
    assert not any(raw[at:])


@pytest.mark.spec("KEY-6")
def test_a_table_of_several_chunks_holds_its_rows() -> None:
    w = np.resize(noise(1009), (3000, 701))
    key = rows_key((3000, 701), "f32", W)
    assert len(chunks_of(key)) > 1
    records = records_of(packed(w[::-1], key), key)
    assert_array_equal(rows_of_records(records, key, np.arange(3000)), w[::-1])
    for chunk in chunks_of(key):
        numbers = np.arange(chunk.first_row, chunk.first_row + chunk.n_rows)
        assert_array_equal(rows_of_records(records[numbers], key, numbers), w[::-1][numbers])


@pytest.mark.spec("KEY-6")
@every_stored_type
def test_a_change_of_any_bit_of_a_row_is_known_and_other_rows_are_not_suspected(stored: str) -> None:
    w, key = noise(3, 7, stored=stored), rows_key((3, 7), stored, W)
    whole = records_of(packed(w, key), key)
    for at in range(record_nbytes(key)):
        for bit in range(8):
            records = whole.copy()
            records[1, at] ^= 1 << bit
            assert rows_of_records(records, key, np.arange(3)) is None
            assert rows_of_records(records[1:2], key, np.array([1])) is None
            assert_array_equal(rows_of_records(records[::2], key, np.array([0, 2])), w[::2])


@pytest.mark.spec("KEY-6")
def test_a_row_whose_numbers_changed_places_is_known() -> None:
    key = rows_key((2, 600), "f32", W)
    records = records_of(packed(noise(2, 600), key), key)
    records[0, :8], records[0, 8:16] = records[0, 8:16].copy(), records[0, :8].copy()
    assert rows_of_records(records, key, np.arange(2)) is None
    assert rows_of_records(records[1:], key, np.array([1])) is not None


@pytest.mark.spec("KEY-6")
@every_stored_type
@pytest.mark.parametrize("w", [np.zeros((300, 5)), noise(300, 5)], ids=["a table of zeros", "noise"])
def test_a_row_of_which_nothing_is_left_but_zeros_is_known(stored: str, w: Stored) -> None:
    key = rows_key((300, 5), stored, W)
    records = records_of(packed(w.astype(STORED_TYPES[stored]), key), key)
    assert rows_of_records(records, key, np.arange(300)) is not None
    for number in range(300):
        zeroed = records[number : number + 1] * np.uint8(0)
        assert rows_of_records(zeroed, key, np.array([number])) is None


@pytest.mark.spec("KEY-6")
@every_stored_type
def test_another_row_in_the_place_of_a_row_is_known_even_where_both_are_equal(stored: str) -> None:
    w, key = np.resize(noise(7, stored=stored), (300, 7)), rows_key((300, 7), stored, W)
    records = records_of(packed(w, key), key)
    for by in (1, 2, 128, 255, 256, 299):
        for number in range(300):
            other = (number + by) % 300
            assert rows_of_records(records[number : number + 1], key, np.array([other])) is None
    turned = np.arange(300)[::-1]
    assert rows_of_records(records, key, turned) is None
    assert_array_equal(rows_of_records(records[turned], key, turned), w)


@pytest.mark.spec("KEY-6")
@given(st.integers(0, 1 << 48), st.integers(0, 1 << 48))
def test_no_two_numbers_of_rows_are_the_same_to_a_record(one: int, other: int) -> None:
    key = rows_key((1, 9), "bf16", W)
    record = records_of(packed(noise(1, 9, stored="bf16"), key), key)
    moved = [record.copy() for _ in range(2)]
    for number, to in zip((one, other), moved, strict=True):
        to[:, -8:].view("<u8")[:] ^= np.uint64(0x9E3779B97F4A7C15 ^ (number + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
        assert rows_of_records(to, key, np.array([number])) is not None
    assert (rows_of_records(moved[0], key, np.array([other])) is None) == (one != other)


WRONG_TYPES: list[tuple[PackKey, Stored]] = [
    (rows_key((5, 4), "f32", W), np.ones((5, 4), np.float16)),
    (rows_key((5, 4), "f32", W), np.ones((5, 4), np.int32)),
    (rows_key((5, 4), "f32", W), np.ones((5, 4))),
    (rows_key((5, 4), "f16", W), np.ones((5, 4), np.uint16)),
    (rows_key((5, 4), "bf16", W), np.ones((5, 4), np.float16)),
    (vectors_key(1, W), np.ones(1)),
    (vectors_key(4, W), np.ones(4, np.float16)),
    (vectors_key(4, W), np.ones(4, np.int32)),
]


@pytest.mark.spec("KEY-6", "KEY-7")
@pytest.mark.parametrize(
    ("key", "stored"), WRONG_TYPES, ids=[f"{key.packer} of {key.format} from {w.dtype}" for key, w in WRONG_TYPES]
)
def test_a_tensor_stored_as_another_type_than_its_key_says_is_refused(key: PackKey, stored: Stored) -> None:
    buffer = np.zeros(nbytes_of(key), np.uint8)
    with pytest.raises(PackingError, match=f"^'w' is kept as {key.format}, and cannot be packed from {stored.dtype}$"):
        pack_into(stored, key, buffer)  # already before the first step
    assert not buffer.any()


@pytest.mark.spec("KEY-7")
@given(n=st.integers(1, 3000), seed=st.integers(0, 99))
def test_vectors_are_kept_as_float32_one_behind_the_other(n: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).integers(0, 256, 4 * n, np.uint8).view(np.float32)
    raw = packed(vectors, vectors_key(n, W)).tobytes()
    assert raw == vectors.astype("<f4").tobytes() + bytes(-4 * n % 4096)


@pytest.mark.spec("KEY-7")
def test_a_norm_and_a_bias_lie_where_their_lengths_say() -> None:
    norm, bias = noise(5), noise(3, seed=1)
    raw = packed(np.concatenate((norm, bias)), vectors_key(8, W))
    assert_array_equal(raw[:20].view("<f4"), norm)
    assert_array_equal(raw[20:32].view("<f4"), bias)


@pytest.mark.spec("KEY-4")
def test_there_are_three_packers_and_no_more() -> None:
    assert list(PACKERS) == ["goi", "rows", "vectors"]
    assert not hasattr(PACKERS, "__setitem__")


def fingerprints() -> dict[str, bytes]:
    forget()
    return {name: packer_fingerprint(name) for name in FORMATS}


def changed_since(before: Mapping[str, bytes]) -> set[str]:
    return {name for name, fingerprint in fingerprints().items() if fingerprint != before[name]}


def with_one_byte_changed(name: str) -> Callable[[Stored, Tiles], None]:
    """Return a format's own packing, but for the lowest bit of the first byte of the last tile."""

    def pack(rows: Stored, tiles: Tiles) -> None:
        FORMATS[name].pack(rows, tiles)
        tiles.raw[-1, 0] ^= 1

    return pack


@pytest.mark.spec("KEY-8")
def test_a_fingerprint_is_a_digest_that_does_not_change_by_itself() -> None:
    before = fingerprints()
    assert all(len(fingerprint) == DIGEST_BYTES for fingerprint in before.values())
    assert len(set(before.values())) == len(before)
    assert not changed_since(before)


@pytest.mark.spec("KEY-8")
@every_format
def test_packing_a_single_other_bit_changes_the_fingerprint_of_that_format_only(name: str) -> None:
    before = fingerprints()
    with other_format(name, pack=with_one_byte_changed(name)):
        assert changed_since(before) == {name}
    assert not changed_since(before)


@pytest.mark.spec("KEY-8")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16], ids=["f32", "f16", "bf16"])
def test_packing_only_one_stored_type_otherwise_changes_the_fingerprint(dtype: type[np.generic]) -> None:
    before = fingerprints()

    def pack(rows: Stored, tiles: Tiles) -> None:
        FORMATS["int8"].pack(rows, tiles)
        tiles.raw[-1, -1] ^= rows.dtype == dtype

    with other_format("int8", pack=pack):
        assert changed_since(before) == {"int8"}


@pytest.mark.spec("KEY-8")
@every_format
def test_cutting_other_chunks_changes_the_fingerprint_of_that_format_only(name: str) -> None:
    before = fingerprints()
    with other_format(name, chunk_nbytes=FORMATS[name].chunk_nbytes // 2):
        assert changed_since(before) == {name}


@pytest.mark.spec("KEY-8")
def test_other_tiles_change_the_fingerprint_of_that_format_only() -> None:
    before = fingerprints()
    with other_format("int4", tile=lambda N, K: TileShape(16 * -(-min(N, 256) // 16))):
        assert changed_since(before) == {"int4"}


@pytest.mark.spec("KEY-8")
def test_other_checksums_of_rows_change_every_fingerprint() -> None:
    before = fingerprints()
    with instead(packers, "checksums", lambda rows: np.zeros(len(rows), np.uint64)):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
@every_format
def test_the_same_bytes_packed_by_other_code_have_the_same_fingerprint(name: str) -> None:
    before = fingerprints()

    def pack(rows: Stored, tiles: Tiles) -> None:
        FORMATS[name].pack(np.asfortranarray(rows), tiles)
        tiles.raw[0, 0] ^= 1
        tiles.raw[0, 0] ^= 1

    with other_format(name, pack=pack, unpack_rows=lambda *_: np.zeros((1, 1), np.float32)):
        assert not changed_since(before)


def cut_with_a_tile_moved(N: int, nr: int, tile_nbytes: int, target_nbytes: int) -> tuple[Chunk, ...]:
    """Cut as ever, but for a tile that moves from the second of many chunks to the third."""
    chunks = cut_into_chunks(N, nr, tile_nbytes, target_nbytes)
    if len(chunks) < 5:
        return chunks
    first, second, third, *rest = chunks
    second = replace(second, n_rows=second.n_rows - nr, nbytes=second.nbytes - tile_nbytes)
    start = second.offset + second.padded_nbytes
    third = Chunk(third.first_row - nr, third.n_rows + nr, start, third.nbytes + tile_nbytes)
    return (first, second, third, *rest)


@pytest.mark.spec("KEY-8")
def test_cutting_only_inner_chunks_otherwise_changes_the_fingerprint() -> None:
    before = fingerprints()
    with instead(formats, "cut_into_chunks", cut_with_a_tile_moved):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
def test_cutting_other_chunks_of_rows_changes_the_fingerprint() -> None:
    before = fingerprints()
    for nbytes in (1 << 20, (4 << 20) - (1 << 16), (4 << 20) + (1 << 16), 8 << 20):
        with instead(packers, "_ROWS_CHUNK_BYTES", nbytes):
            assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
def test_cutting_only_inner_chunks_of_rows_otherwise_changes_the_fingerprint() -> None:
    before = fingerprints()
    with instead(packers, "cut_into_chunks", cut_with_a_tile_moved):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(0, id="of every row"),
        pytest.param(
            1,
            id="of all rows but the first",
        ),
    ],
)
def test_another_number_in_the_records_of_rows_changes_the_fingerprint(first: int) -> None:
    def sums(records: Bytes, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        own: npt.NDArray[np.uint64] = packers_record_sums(records, numbers)
        own[numbers >= first] ^= np.uint64(1)
        return own

    packers_record_sums = vars(packers)["_record_sums"]
    before = fingerprints()
    with instead(packers, "_record_sums", sums):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-7")
def test_packing_only_reads_what_is_stored() -> None:
    tensors: list[tuple[PackKey, Float32Array]] = [
        (matrix_key(layout_of("int4", 20, 7), W), noise(20, 7)),
        (rows_key((20, 7), "f32", W), noise(20, 7)),
        (vectors_key(9, W), noise(9)),
    ]
    for key, w in tensors:
        before = w.copy()
        w.flags.writeable = False
        packed(w, key)[:] = 0
        assert_array_equal(w, before)
