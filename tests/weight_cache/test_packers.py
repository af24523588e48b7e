"""Specifies `refinfer.weight_cache.packers`: chunks, bytes and checksums of each kind of buffer, their fingerprint."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from packer_bytes import CRC, Stored, W, bytes_of_matrix, crc32, every_format, noise, packed, pages
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError
from refinfer.packing.formats import FORMATS, layout_of, pack_matrix
from refinfer.packing.layout import Bytes, Chunk, TileShape, cut_into_chunks
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import StoredChunk
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.packers import (
    STORED_TYPES,
    chunks_of,
    count_of,
    layout_of_key,
    matrix_key,
    pack_into,
    padded_nbytes_of,
    record_nbytes,
    row_of_record,
    rows_key,
    vectors_key,
)

every_stored_type = pytest.mark.parametrize("stored", list(STORED_TYPES))


def require_sound(key: PackKey, n_rows: int) -> None:
    """Check that chunks hold every row once, each on the page that follows the one before."""
    row = offset = 0
    for chunk in chunks_of(key):
        assert (chunk.first_row, chunk.offset) == (row, offset)
        assert chunk.padded_nbytes == pages(chunk.nbytes)
        row, offset = row + chunk.n_rows, offset + pages(chunk.nbytes)
    assert (row, offset) == (n_rows, padded_nbytes_of(key))
    assert len(chunks_of(key)) == count_of(key)


aims = st.none() | st.integers(1, 5000) | st.integers(1, (1 << 32) - 1)


@pytest.mark.spec("KEY-4")
@every_format
@given(N=st.integers(1, 3000), K=st.integers(1, 3000), aim=aims)
def test_a_matrix_has_the_chunks_of_its_layout(name: str, N: int, K: int, aim: int | None) -> None:
    layout = layout_of(name, N, K, aim)
    key = matrix_key(layout, W)
    assert (key.packer, key.shape, key.format, key.tile) == ("goi", (N, K), name, layout.tile)
    assert key.chunk_nbytes == (aim or FORMATS[name].chunk_nbytes)
    assert layout_of_key(key) == layout
    assert chunks_of(key) == layout.chunks
    assert padded_nbytes_of(key) == layout.padded_nbytes == sum(pages(chunk.nbytes) for chunk in layout.chunks)
    require_sound(key, N)


@pytest.mark.spec("KEY-4")
@every_stored_type
@given(N=st.integers(1, 200_000), K=st.integers(1, 3000))
def test_a_table_has_runs_of_whole_records(stored: str, N: int, K: int) -> None:
    key = rows_key((N, K), stored, W)
    stride = record_nbytes(key)
    row_nbytes = K * {"f32": 4, "f16": 2, "bf16": 2}[stored]
    assert stride % 4 == 0
    assert row_nbytes + 4 <= stride < row_nbytes + 8
    assert key.chunk_nbytes == 4 << 20
    assert all(chunk.nbytes == chunk.n_rows * stride < 8 << 20 for chunk in chunks_of(key))
    require_sound(key, N)


@pytest.mark.spec("KEY-4")
@every_stored_type
@given(N=st.integers(1, 3000), K=st.integers(1, 300), aim=st.integers(1, 50_000))
def test_a_table_is_cut_for_the_aim_of_its_key(stored: str, N: int, K: int, aim: int) -> None:
    key = rows_key((N, K), stored, W, aim)
    stride = record_nbytes(key)
    assert key.chunk_nbytes == aim
    assert chunks_of(key) == cut_into_chunks(N, 1, stride, aim)
    assert all(chunk.nbytes == chunk.n_rows * stride <= max(1.5 * aim + stride, stride) for chunk in chunks_of(key))
    require_sound(key, N)


@pytest.mark.spec("KEY-4", "KEY-7")
@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 3_000_000])
def test_vectors_are_one_chunk_of_float32(n: int) -> None:
    key = vectors_key(n, W)
    assert chunks_of(key) == (Chunk(0, 1, 0, 4 * n),)
    assert padded_nbytes_of(key) == pages(4 * n)


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
    for ask in (chunks_of, count_of, padded_nbytes_of):
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
    fitting, buffer = np.zeros(key.shape, np.float16), np.zeros(padded_nbytes_of(key), np.uint8)
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
@pytest.mark.parametrize("aim", [1, 3000, 1 << 20])
@given(w=small_matrices(), most=st.integers(0, 20_000))
def test_packing_in_blocks_however_small_gives_the_bytes_of_packing_at_once(
    name: str, aim: int, w: Stored, most: int
) -> None:
    N, K = w.shape
    layout = layout_of(name, N, K, aim)
    assert len(layout.chunks) == 1 or aim < 1 << 20
    at_once = bytes_of_matrix(pack_matrix(w, name, aim))
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
    done = list(pack_into(noise(100, 10), key, np.zeros(padded_nbytes_of(key), np.uint8), most=1))
    assert done == [16 * 10 * 4 * tile for tile in range(1, 8)]


def records_of(buffer: Bytes, key: PackKey) -> Bytes:
    """Return the records of a packed table, `[N, record_nbytes]`."""
    chunks = [buffer[chunk.offset : chunk.offset + chunk.nbytes] for chunk in chunks_of(key)]
    return np.concatenate(chunks).reshape(key.shape[0], -1)


@pytest.mark.spec("KEY-6")
@every_stored_type
@given(N=st.integers(1, 40), K=st.integers(1, 1100), seed=st.integers(0, 99), data=st.data())
def test_a_row_is_read_back_as_stored(stored: str, N: int, K: int, seed: int, data: st.DataObject) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, (N, K * STORED_TYPES[stored].itemsize), np.uint8)
    w, key = bits.view(STORED_TYPES[stored]), rows_key((N, K), stored, W)  # NaN and all
    records = records_of(packed(w, key), key)
    for number in data.draw(st.lists(st.integers(0, N - 1), max_size=8)):
        row = row_of_record(records[number], key, number)
        assert row is not None
        assert (row.dtype, row.shape) == (w.dtype, (K,))
        assert_array_equal(row.view(np.uint8), bits[number])


@pytest.mark.spec("KEY-6", "SUM-2")
@every_stored_type
@pytest.mark.parametrize("K", [1, 3, 4, 513])
def test_a_record_is_a_crc_begun_with_its_number_the_row_and_zeros(stored: str, K: int) -> None:
    w, key = noise(3, K, stored=stored), rows_key((3, K), stored, W)
    at = 0
    raw = packed(w, key).tobytes()
    for number, row in enumerate(w):
        expected = row.tobytes() + bytes(-row.nbytes % 4)
        assert int.from_bytes(raw[at : at + 4], "little") == crc32(expected, number)
        at += 4 + len(expected)
        assert raw[at - len(expected) : at] == expected
        assert at % record_nbytes(key) == 0
    assert not any(raw[at:])


@pytest.mark.spec("KEY-6")
@pytest.mark.parametrize("aim", [1, 100_000, 4 << 20])
def test_a_table_of_several_chunks_holds_its_rows(aim: int) -> None:
    w = np.resize(noise(1009), (3000, 701))[::-1]
    key = rows_key((3000, 701), "f32", W, aim)
    assert len(chunks_of(key)) > 1
    for number, record in enumerate(records_of(packed(w, key), key)):
        assert_array_equal(row_of_record(record, key, number), w[number])


@pytest.mark.spec("KEY-6")
@every_stored_type
@pytest.mark.parametrize("number", range(3))
def test_a_change_of_any_bit_of_a_row_is_known(stored: str, number: int) -> None:
    w, key = noise(3, 7, stored=stored), rows_key((3, 7), stored, W)
    record = records_of(packed(w, key), key)[number]
    for at in range(record_nbytes(key)):
        for bit in range(8):
            record[at] ^= 1 << bit
            assert row_of_record(record, key, number) is None
            record[at] ^= 1 << bit
    assert_array_equal(row_of_record(record, key, number), w[number])


@pytest.mark.spec("KEY-6")
def test_a_row_whose_elements_changed_places_is_known() -> None:
    key = rows_key((2, 600), "f32", W)
    records = records_of(packed(noise(2, 600), key), key)
    records[0, :8], records[0, 8:16] = records[0, 8:16].copy(), records[0, :8].copy()
    assert row_of_record(records[0], key, 0) is None
    assert row_of_record(records[1], key, 1) is not None


@pytest.mark.spec("KEY-6", "SUM-3")
@every_stored_type
@pytest.mark.parametrize("w", [np.zeros((300, 5)), noise(300, 5)], ids=["a table of zeros", "noise"])
def test_a_row_of_which_nothing_is_left_but_zeros_is_known(stored: str, w: Stored) -> None:
    key = rows_key((300, 5), stored, W)
    for number, record in enumerate(records_of(packed(w.astype(STORED_TYPES[stored]), key), key)):
        assert row_of_record(record, key, number) is not None
        assert row_of_record(record * np.uint8(0), key, number) is None


def number_of_zeros(nbytes: int, register: int = 0xFFFFFFFF) -> Iterator[int]:
    """Yield for 1 to `nbytes` zeros the one number that their CRC-32 must be begun with to be 0.

    The register ends with ones, and the steps of the CRC are undone: each entry of its table has another upper byte.
    """
    from_upper_byte = {entry >> 24: i for i, entry in enumerate(CRC)}
    for _ in range(nbytes):
        i = from_upper_byte[register >> 24]
        register = (register ^ CRC[i]) << 8 & 0xFFFFFFFF | i
        yield register ^ 0xFFFFFFFF


@pytest.mark.spec("SUM-3")
def test_zeros_pass_for_no_row_of_any_table_of_262144_rows_of_up_to_64_kib() -> None:
    passing = list(number_of_zeros(64 << 10))
    assert min(passing[3::4]) >= 1 << 18
    for K in (1, 7, 512):  # a record of zeros passes for that row number and for no other
        key, number = rows_key((1, K), "f32", W), passing[4 * K - 1]
        record = np.zeros(record_nbytes(key), np.uint8)
        assert row_of_record(record, key, number) is not None
        for other in (0, 1, number - 1, number + 1, number ^ 1 << 31):
            assert row_of_record(record, key, other) is None


@pytest.mark.spec("KEY-6", "SUM-3")
@every_stored_type
def test_another_row_in_the_place_of_a_row_is_known_even_where_both_are_equal(stored: str) -> None:
    w, key = np.resize(noise(7, stored=stored), (300, 7)), rows_key((300, 7), stored, W)
    records = records_of(packed(w, key), key)
    for by in (1, 2, 128, 255, 256, 299):
        for number in range(300):
            assert row_of_record(records[number], key, (number + by) % 300) is None


row_numbers = st.integers(0, (1 << 32) - 1)


@pytest.mark.spec("SUM-3")
@given(row=st.binary(min_size=2, max_size=80), one=row_numbers, other=row_numbers)
@example(row=bytes(4), one=0, other=1)
@example(row=bytes(4), one=0, other=1 << 31)
def test_the_record_of_one_row_never_passes_for_another(row: bytes, one: int, other: int) -> None:
    row += bytes(len(row) % 2)
    key = rows_key((1, len(row) // 2), "bf16", W)
    content = row + bytes(-len(row) % 4)
    record = np.frombuffer(crc32(content, one).to_bytes(4, "little") + content, np.uint8)
    found = row_of_record(record, key, one)
    assert found is not None
    assert found.tobytes() == row
    assert (row_of_record(record, key, other) is None) == (one != other)


@dataclass(frozen=True, slots=True)
class Damageable:
    """A cache file that can be written to while it is mapped."""

    mapped: MappedFile
    file: int

    @property
    def chunks(self) -> list[StoredChunk]:
        return [chunk for entry in self.mapped.index.entries for chunk in entry.chunks]

    def read(self, chunk: StoredChunk) -> bytes:
        return os.pread(self.file, chunk.nbytes, chunk.offset)

    @contextmanager
    def with_bits_flipped(self, chunk: StoredChunk, flips: int) -> Iterator[None]:
        """Flip bits of a chunk for a while; bit 0 of `flips` is the lowest bit of its first byte."""
        whole = self.read(chunk)
        changed = int.from_bytes(whole, "little") ^ flips
        os.pwrite(self.file, changed.to_bytes(chunk.nbytes, "little"), chunk.offset)
        try:
            yield
        finally:
            os.pwrite(self.file, whole, chunk.offset)


@pytest.fixture(scope="module")
def damageable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Damageable]:
    """Make a cache file of every kind of buffer, of chunks of many sizes."""
    w = noise(N := 40, K := 33)
    path: Path = tmp_path_factory.mktemp("checksums") / "cache"
    provider = FileWeightCacheProvider.build(path)
    tensors: list[tuple[PackKey, Stored]] = [
        (matrix_key(layout_of(name, N, K, 4000), W), w) for name in FORMATS if name != "int4"
    ]
    tensors += [(matrix_key(layout_of("int4", N, K), W), w), (rows_key((N, K), "f32", W, 2000), w)]
    tensors += [(vectors_key(n, W), noise(n, seed=n)) for n in (1, 2, 1023, 1024, 1025)]
    for key, stored in tensors:
        provider.look_up_or_insert(key, packed(stored, key))
    provider.finalize()
    path.chmod(0o600)
    file = os.open(path, os.O_RDWR)
    yield Damageable(provider.mapped, file)
    os.close(file)


@pytest.mark.spec("SUM-2")
def test_a_chunk_is_known_by_the_crc32_of_its_bytes_without_the_pad(damageable: Damageable) -> None:
    assert crc32(b"123456789") == 0xCBF43926  # the check value in every catalogue of CRCs
    assert len(damageable.chunks) > 12
    for chunk in damageable.chunks:
        assert chunk.checksum == crc32(damageable.read(chunk))
        assert damageable.mapped.is_sound(chunk)
        for wrong in (chunk.checksum ^ 1, chunk.checksum ^ 1 << 31, 0):
            assert not damageable.mapped.is_sound(replace(chunk, checksum=wrong))


@pytest.mark.spec("SUM-1")
@given(data=st.data(), burst=st.integers(1, (1 << 32) - 1) | st.integers(0, 31).map(lambda bit: 1 << bit))
def test_any_changed_burst_of_up_to_32_bits_changes_the_checksum_of_its_chunk(
    damageable: Damageable, data: st.DataObject, burst: int
) -> None:
    chunk = data.draw(st.sampled_from(damageable.chunks))
    last = 8 * chunk.nbytes - burst.bit_length()
    at = data.draw(st.integers(0, last) | st.sampled_from([0, last]))
    with damageable.with_bits_flipped(chunk, burst << at):
        assert not damageable.mapped.is_sound(chunk)
    assert damageable.mapped.is_sound(chunk)


@pytest.mark.spec("SUM-1")
@given(data=st.data())
def test_any_two_flipped_bits_change_the_checksum_of_their_chunk(damageable: Damageable, data: st.DataObject) -> None:
    chunk = data.draw(st.sampled_from(damageable.chunks))
    bits = st.integers(0, 8 * chunk.nbytes - 1)
    one, other = data.draw(st.lists(bits, min_size=2, max_size=2, unique=True))
    with damageable.with_bits_flipped(chunk, 1 << one | 1 << other):
        assert not damageable.mapped.is_sound(chunk)
    assert damageable.mapped.is_sound(chunk)


@pytest.mark.spec("SUM-2")
@given(data=st.data())
def test_two_words_or_two_lines_of_a_chunk_cannot_change_places_unnoticed(
    damageable: Damageable, data: st.DataObject
) -> None:
    chunk = data.draw(st.sampled_from([chunk for chunk in damageable.chunks if chunk.nbytes > 1000]))
    whole, step = damageable.read(chunk), data.draw(st.sampled_from([8, 64]))
    n_parts = chunk.nbytes // step
    i, j = data.draw(st.lists(st.integers(0, n_parts - 1), min_size=2, max_size=2, unique=True))
    parts = np.frombuffer(whole, np.uint8)[: n_parts * step].reshape(n_parts, step)
    different = int.from_bytes(parts[i].tobytes(), "little") ^ int.from_bytes(parts[j].tobytes(), "little")
    with damageable.with_bits_flipped(chunk, different << 8 * step * i | different << 8 * step * j):
        assert damageable.mapped.is_sound(chunk) == (different == 0)


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
    buffer = np.zeros(padded_nbytes_of(key), np.uint8)
    with pytest.raises(PackingError, match=f"^'w' is kept as {key.format}, and cannot be packed from {stored.dtype}$"):
        next(pack_into(stored, key, buffer))
    assert not buffer.any()


@pytest.mark.spec("KEY-7")
@given(n=st.integers(1, 3000), seed=st.integers(0, 99))
def test_vectors_are_kept_as_float32_one_after_another(n: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).integers(0, 256, 4 * n, np.uint8).view(np.float32)
    raw = packed(vectors, vectors_key(n, W)).tobytes()
    assert raw == vectors.astype("<f4").tobytes() + bytes(-4 * n % 4096)


@pytest.mark.spec("KEY-7")
def test_a_norm_and_a_bias_lie_where_their_lengths_say() -> None:
    norm, bias = noise(5), noise(3, seed=1)
    raw = packed(np.concatenate((norm, bias)), vectors_key(8, W))
    assert_array_equal(raw[:20].view("<f4"), norm)
    assert_array_equal(raw[20:32].view("<f4"), bias)
