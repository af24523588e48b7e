"""Specifies `refinfer.weight_cache.packers`: chunks, bytes and checksums of each kind of buffer, their fingerprint."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from refinfer.arrays import PAGE_BYTES, Float32Array, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing import formats, int4
from refinfer.packing.formats import FORMATS, PackedMatrix, layout_of, pack_chunk, pack_matrix
from refinfer.packing.layout import Bytes, Chunk, PackedLayout, TileShape, cut_into_chunks
from refinfer.weight_cache import packers
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import StoredChunk
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey, WeightId
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.packers import (
    PACKERS,
    STORED_TYPES,
    chunks_of,
    count_of,
    layout_of_key,
    matrix_key,
    pack_into,
    packer_fingerprint,
    padded_nbytes_of,
    record_nbytes,
    row_of_record,
    rows_key,
    scrambled,
    vectors_key,
)

Stored = npt.NDArray[Any]

W = WeightId(bytes(DIGEST_BYTES), "w")
MASK = (1 << 64) - 1

every_format = pytest.mark.parametrize("name", list(FORMATS))
every_stored_type = pytest.mark.parametrize("stored", list(STORED_TYPES))


def noise(*shape: int, stored: str = "f32", seed: int = 0) -> Stored:
    """Return numbers as they are stored in a checkpoint."""
    w = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return f32_to_bf16(w) if stored == "bf16" else w.astype(STORED_TYPES[stored])


def packed(stored: Stored, key: PackKey, **kwargs: int) -> Bytes:
    buffer = np.zeros(padded_nbytes_of(key), np.uint8)
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
def instead(module: object, **changes: object) -> Iterator[None]:
    """Put other values in the place of names of a module, such as a format's page, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(module, name, value)
        forget()
        yield
    forget()


def bytes_of_matrix(matrix: PackedMatrix) -> Bytes:
    """Return the bytes of a packed matrix as they lie in a file: each chunk on a page."""
    buffer = np.zeros(matrix.layout.padded_nbytes, np.uint8)
    for chunk, part in zip(matrix.layout.chunks, matrix.buffers, strict=True):
        buffer[chunk.offset : chunk.offset + chunk.nbytes] = part
    return buffer


def crc_table() -> list[int]:
    table = []
    for byte in range(256):
        register = byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
        table.append(register)
    return table


CRC = crc_table()


def crc32(data: bytes, begun: int = 0) -> int:
    """Compute the CRC-32 of zlib byte by byte, begun with another number than 0 if asked."""
    register = begun ^ 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ CRC[(register ^ byte) & 255]
    return register ^ 0xFFFFFFFF


def pages(nbytes: int) -> int:
    return (nbytes + 4095) // 4096 * 4096


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


@pytest.mark.spec("KEY-4")
def test_there_are_three_packers_and_no_more() -> None:
    assert list(PACKERS) == ["goi", "rows", "vectors"]
    assert not hasattr(PACKERS, "__setitem__")


def fingerprints() -> dict[str, bytes]:
    forget()
    return {name: packer_fingerprint(name) for name in FORMATS}


def changed_since(before: Mapping[str, bytes]) -> set[str]:
    return {name for name, fingerprint in fingerprints().items() if fingerprint != before[name]}


def splitmix64(i: int) -> int:
    """Return number i, from 0, of the generator of Steele, Lea and Flood 2014 that starts at 0."""
    z = (i + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


@pytest.mark.spec("KEY-8")
def test_the_words_of_the_operators_are_those_of_splitmix64() -> None:
    # The first numbers of the reference implementation in C, https://prng.di.unimi.it/splitmix64.c, from seed 0.
    assert scrambled(3, 0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for stream in (0, 1, 2, 1000):
        assert scrambled(600, stream).tolist() == [splitmix64(i + (stream << 32)) for i in range(600)]


@pytest.mark.spec("KEY-8")
@every_format
def test_a_fingerprint_is_the_documented_digest(name: str) -> None:
    digest = hashlib.sha256()
    for N, K in ((1, 1), (37, 65), (64, 96), (529, 40)):
        words = [splitmix64(i + (2 << 32)) >> 40 for i in range(N * K)]
        w = (np.array(words) / (1 << 23) - 1).astype(np.float32).reshape(N, K)
        for stored in (w, w.astype(np.float16), f32_to_bf16(w)):
            digest.update(bytes_of_matrix(pack_matrix(stored, name)).data)
            records = b""
            for number, row in enumerate(stored[:3]):
                content = row.tobytes() + bytes(-row.nbytes % 4)
                records += crc32(content, number).to_bytes(4, "little") + content
            digest.update(records.ljust(pages(len(records)), b"\0"))
        digest.update(w[:, 0].tobytes().ljust(pages(4 * N), b"\0"))
    for N, K in ((4096, 4096), (11008, 4096), (4096, 11008), (128256, 2048)):
        layout = layout_of(name, N, K)
        tile = layout.tile
        digest.update(f"TileShape(nr={tile.nr}, kr={tile.kr}, sr={tile.sr}) {layout.chunk_nbytes}".encode())
        for chunk in layout.chunks:
            for place in (chunk.first_row, chunk.n_rows, chunk.offset, chunk.nbytes):
                digest.update(place.to_bytes(8, "little"))
    table = cut_into_chunks(200_000, 1, 2052, 4 << 20)
    digest.update(("[" + ", ".join(f"({chunk.first_row}, {chunk.offset})" for chunk in table) + "]").encode())
    assert packer_fingerprint(name) == digest.digest()
    page = Path(__file__).parents[2] / "docs" / "file-format.md"
    assert f"\n{name:8}{digest.hexdigest()}\n" in page.read_text(encoding="utf-8")


@pytest.mark.spec("KEY-8")
def test_a_fingerprint_is_a_digest_that_does_not_change_by_itself() -> None:
    before = fingerprints()
    assert all(len(fingerprint) == DIGEST_BYTES for fingerprint in before.values())
    assert len(set(before.values())) == len(before)
    assert not changed_since(before)


def packing_otherwise(name: str, flip: Callable[[Stored, Bytes], None]) -> Callable[..., None]:
    """Return `pack_chunk` as it is, but for a bit of the bytes of one format that `flip` flips."""

    def pack(rows: Stored, layout: PackedLayout, chunk: Chunk, buffer: Bytes) -> None:
        pack_chunk(rows, layout, chunk, buffer)
        if layout.format.name == name:
            flip(rows, buffer)

    return pack


@pytest.mark.spec("KEY-8")
@every_format
@pytest.mark.parametrize("at", [0, -1])
def test_packing_a_single_other_bit_changes_the_fingerprint_of_that_format_only(name: str, at: int) -> None:
    before = fingerprints()

    def flip(rows: Stored, buffer: Bytes) -> None:
        buffer[at] ^= 1

    with instead(packers, pack_chunk=packing_otherwise(name, flip)):
        assert changed_since(before) == {name}
    assert not changed_since(before)


@pytest.mark.spec("KEY-8")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16], ids=["f32", "f16", "bf16"])
def test_packing_only_one_stored_type_otherwise_changes_the_fingerprint(dtype: type[np.generic]) -> None:
    before = fingerprints()

    def flip(rows: Stored, buffer: Bytes) -> None:
        buffer[-1] ^= rows.dtype == dtype

    with instead(packers, pack_chunk=packing_otherwise("int8", flip)):
        assert changed_since(before) == {"int8"}


@pytest.mark.spec("KEY-8")
@every_format
def test_cutting_other_chunks_changes_the_fingerprint_of_that_format_only(name: str) -> None:
    before = fingerprints()
    with instead(FORMATS[name], chunk_nbytes=FORMATS[name].chunk_nbytes // 2):
        assert changed_since(before) == {name}


@pytest.mark.spec("KEY-8")
def test_other_tiles_change_the_fingerprint_of_that_format_only() -> None:
    before = fingerprints()
    with instead(int4, tile_shape=lambda N, K: TileShape(16 * -(-min(N, 256) // 16))):
        assert changed_since(before) == {"int4"}


@pytest.mark.spec("KEY-8")
@every_format
def test_the_same_bytes_packed_by_other_code_have_the_same_fingerprint(name: str) -> None:
    before, usual = fingerprints(), FORMATS[name].pack

    def pack(rows: Stored, tiles: Any) -> None:
        usual(np.asfortranarray(rows), tiles)

    with instead(FORMATS[name], pack=pack, unpack_rows=lambda *_: np.zeros((1, 1), np.float32)):
        assert not changed_since(before)


def cut_with_a_tile_moved(N: int, nr: int, tile_nbytes: int, chunk_nbytes: int) -> tuple[Chunk, ...]:
    """Cut as ever, but for a tile that moves from the second of many chunks to the third."""
    chunks = cut_into_chunks(N, nr, tile_nbytes, chunk_nbytes)
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
    with instead(formats, cut_into_chunks=cut_with_a_tile_moved):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
def test_cutting_other_chunks_of_rows_changes_the_fingerprint() -> None:
    before = fingerprints()
    for nbytes in (1 << 20, (4 << 20) - (1 << 16), (4 << 20) + (1 << 16), 8 << 20):
        with instead(packers, rows_key=partial(rows_key, chunk_nbytes=nbytes)):
            assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
def test_cutting_only_inner_chunks_of_rows_otherwise_changes_the_fingerprint() -> None:
    before = fingerprints()
    with instead(packers, cut_into_chunks=cut_with_a_tile_moved):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
@pytest.mark.parametrize("first", [0, 1], ids=["of every row", "of all rows but the first"])
def test_another_checksum_of_rows_changes_every_fingerprint(first: int) -> None:
    before, usual = fingerprints(), vars(packers)["_row_checksum"]
    with instead(packers, _row_checksum=lambda record, row: usual(record, row) ^ (row >= first)):
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
