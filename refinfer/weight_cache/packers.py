"""What each packer makes of a tensor: which chunks, which bytes; and a fingerprint, a digest of all that.

Packs the three kinds of buffer of a cache file. Leaves to others: which tensor goes where (`prepare`), files, models.
Read more: tutorial 04; clauses KEY-4 to KEY-8, SUM-3.

    goi       a matrix in the tiles of a weight format, cut into chunks (groups, outputs, inputs: XNNPACK's word)
    rows      a table from which single rows are read: each row as it is stored, with a checksum of its own

              | CRC-32, begun with the row's number: u32 | K elements, zeros up to 4 bytes |   a record for each row

              The checksum comes first. A record that ended in its own CRC would leave the CRC of the whole chunk the
              same whatever the row holds, so that two sound rows could change places unnoticed.

    vectors   small arrays (norms, biases) as float32, one after another: one chunk, always in memory
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from refinfer.arrays import f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing.formats import format_of, layout_of, pack_chunk
from refinfer.packing.layout import Bytes, Chunk, PackedLayout, TileShape, count_chunks, cut_into_chunks
from refinfer.weight_cache.key import PackKey, WeightId

__all__ = [
    "LARGEST_BLOCK_BYTES",
    "PACKERS",
    "STORED_TYPES",
    "Packer",
    "chunks_of",
    "count_of",
    "first_wrong_row",
    "layout_of_key",
    "matrix_key",
    "pack_into",
    "packer_fingerprint",
    "padded_nbytes_of",
    "record_nbytes",
    "row_of_record",
    "rows_key",
    "scrambled",
    "vectors_key",
]

STORED_TYPES: Final[Mapping[str, np.dtype[Any]]] = MappingProxyType(
    {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
)
"""The types that a row may be stored in; bfloat16 as its 16 bits."""

_ONE: Final = TileShape(1)
_CHUNK_BYTES: Final = 4 << 20  # of a table of rows
_CHECKSUM: Final = np.dtype("<u4")
LARGEST_BLOCK_BYTES: Final = 4 << 20
"""Tiles are packed in blocks of at most this many bytes as float32; after each block, mapped pages are released."""


def matrix_key(layout: PackedLayout, weights: WeightId) -> PackKey:
    """Return the key of a packed matrix."""
    return PackKey("goi", (layout.N, layout.K), layout.format.name, layout.tile, layout.chunk_nbytes, weights)


def rows_key(shape: tuple[int, int], stored: str, weights: WeightId, chunk_nbytes: int = _CHUNK_BYTES) -> PackKey:
    """Return the key of a table of rows; `stored` is one of `STORED_TYPES`."""
    return PackKey("rows", shape, stored, _ONE, chunk_nbytes, weights)


def vectors_key(n: int, weights: WeightId) -> PackKey:
    """Return the key of the `n` float32 numbers of all vectors."""
    return PackKey("vectors", (n,), "f32", _ONE, _CHUNK_BYTES, weights)


def layout_of_key(key: PackKey) -> PackedLayout:
    """Return how the matrix of a `goi` key is packed.

    Raises:
        PackingError: it is not a matrix, or this version packs it in other tiles.
    """
    _tiling_of_matrix(key)
    return layout_of(key.format, key.shape[0], key.shape[1], key.chunk_nbytes)


def record_nbytes(key: PackKey) -> int:
    """Return the bytes of one row of a `rows` key, its checksum included."""
    size = _CHECKSUM.itemsize
    return -(-key.shape[1] * STORED_TYPES[key.format].itemsize // size) * size + size


Tiling: TypeAlias = tuple[int, int, int]
"""What decides where chunks are cut: the number of rows, the rows of a tile, the bytes of a tile."""


@dataclass(frozen=True, slots=True)
class Packer:
    """One kind of buffer: where its tiles lie and how it is packed; `as_stored` if it keeps the type of the tensor.

    `pack` fills a buffer of zeros from a tensor as stored, in blocks of at most as many bytes as its last argument, and
    yields how many bytes are done so far.
    """

    tiling: Callable[[PackKey], Tiling]
    pack: Callable[[npt.NDArray[Any], PackKey, Bytes, int], Iterator[int]]
    as_stored: bool


def _tiling_of_matrix(key: PackKey) -> Tiling:
    if key.packer != "goi" or len(key.shape) != 2:
        raise PackingError(f"{key.name!r} is not a packed matrix")
    packed_as, (N, K) = format_of(key.format), key.shape
    tile = packed_as.tile_shape(N, K)
    if tile != key.tile:
        raise PackingError(f"{key.name!r} lies in tiles of {key.tile}, but {tile} is what {key.format} uses")
    return N, tile.nr, packed_as.tile_nbytes(tile.nr, K)


def _tiling_of_rows(key: PackKey) -> Tiling:
    if len(key.shape) != 2 or key.format not in STORED_TYPES:
        raise PackingError(f"{key.name!r} is not a table of rows")
    return key.shape[0], 1, record_nbytes(key)


def _tiling_of_vectors(key: PackKey) -> Tiling:
    if len(key.shape) != 1 or key.format != "f32":
        raise PackingError(f"{key.name!r} is not a block of vectors")
    return 1, 1, 4 * key.shape[0]


def _pack_matrix(stored: npt.NDArray[Any], key: PackKey, buffer: Bytes, most: int) -> Iterator[int]:
    """Pack `stored` `[N, K]` in blocks of whole tiles, each at most `most` bytes as float32, or one tile."""
    layout = layout_of_key(key)
    nr, tile_nbytes = layout.tile.nr, layout.format.tile_nbytes(layout.tile.nr, layout.K)
    block_nbytes = max(1, most // (4 * layout.K * nr)) * tile_nbytes
    for chunk in layout.chunks:
        for offset in range(0, chunk.nbytes, block_nbytes):
            nbytes = min(block_nbytes, chunk.nbytes - offset)
            row, start = offset // tile_nbytes * nr, chunk.offset + offset
            n_rows = min(chunk.n_rows - row, nbytes // tile_nbytes * nr)
            block = Chunk(chunk.first_row + row, n_rows, start, nbytes)
            rows = stored[block.first_row : block.first_row + n_rows]
            pack_chunk(rows, layout, block, buffer[start : start + nbytes])
            yield start + nbytes


def _pack_rows(stored: npt.NDArray[Any], key: PackKey, buffer: Bytes, most: int) -> Iterator[int]:
    """Copy the rows of `stored` `[N, K]`, each with its checksum, chunk by chunk."""
    nbytes, row_nbytes = record_nbytes(key), stored.shape[1] * stored.dtype.itemsize
    for chunk in chunks_of(key):
        records = buffer[chunk.offset : chunk.offset + chunk.nbytes].reshape(-1, nbytes)
        rows = np.ascontiguousarray(stored[chunk.first_row : chunk.first_row + chunk.n_rows])
        records[:, _CHECKSUM.itemsize : _CHECKSUM.itemsize + row_nbytes] = rows.view(np.uint8)
        sums = records[:, : _CHECKSUM.itemsize].view(_CHECKSUM)[:, 0]
        for i, record in enumerate(records):
            sums[i] = _row_checksum(record, chunk.first_row + i)
        yield chunk.offset + chunk.nbytes


def _pack_vectors(stored: npt.NDArray[Any], key: PackKey, buffer: Bytes, most: int) -> Iterator[int]:
    """Copy the float32 numbers."""
    buffer[: stored.nbytes].view(np.float32)[:] = stored
    yield stored.nbytes


PACKERS: Final[Mapping[str, Packer]] = MappingProxyType(
    {
        "goi": Packer(_tiling_of_matrix, _pack_matrix, as_stored=False),
        "rows": Packer(_tiling_of_rows, _pack_rows, as_stored=True),
        "vectors": Packer(_tiling_of_vectors, _pack_vectors, as_stored=True),
    }
)
"""Each packer by name."""


def _tiling_of(key: PackKey) -> Tiling:
    if key.packer not in PACKERS:
        raise PackingError(f"{key.packer!r} is not a packer; there are {', '.join(PACKERS)}")
    return PACKERS[key.packer].tiling(key)


@lru_cache(maxsize=4096)
def chunks_of(key: PackKey) -> tuple[Chunk, ...]:
    """Return the chunks of a buffer, placed from its start.

    Raises:
        PackingError: no packer makes such a buffer.
    """
    return cut_into_chunks(*_tiling_of(key), key.chunk_nbytes)


def count_of(key: PackKey) -> int:
    """Return how many chunks a buffer has, without listing them: a damaged file may claim an absurd shape.

    Raises:
        PackingError: no packer makes such a buffer.
    """
    return count_chunks(*_tiling_of(key), key.chunk_nbytes)


def padded_nbytes_of(key: PackKey) -> int:
    """Return the bytes of a buffer: all its chunks, each padded to whole pages."""
    return sum(chunk.padded_nbytes for chunk in chunks_of(key))


def pack_into(stored: npt.NDArray[Any], key: PackKey, buffer: Bytes, most: int = LARGEST_BLOCK_BYTES) -> Iterator[int]:
    """Pack a tensor, as stored, into `buffer` of `padded_nbytes_of(key)` zeros; yield how many are done.

    Raises:
        PackingError: the tensor does not fit the key, or holds what the format cannot.
    """
    if stored.shape != key.shape or buffer.shape != (padded_nbytes_of(key),):
        raise PackingError(f"{key.name!r}: {list(stored.shape)} does not fit {list(key.shape)} in {buffer.size} bytes")
    packer = PACKERS[key.packer]
    if packer.as_stored and stored.dtype != STORED_TYPES[key.format]:
        raise PackingError(f"{key.name!r} is kept as {key.format}, and cannot be packed from {stored.dtype}")
    return packer.pack(stored, key, buffer, most)


def _row_checksum(record: Bytes, row: int) -> int:
    """Return the CRC-32 of a record, begun with the row's number, so that no row can be mistaken for another."""
    return zlib.crc32(record[_CHECKSUM.itemsize :].data, row & 0xFFFFFFFF)


def row_of_record(record: Bytes, key: PackKey, row: int) -> npt.NDArray[Any] | None:
    """Return the row `[K]`, as stored, of a record `[record_nbytes]`, or None if its checksum does not agree."""
    start, stored = _CHECKSUM.itemsize, STORED_TYPES[key.format]
    if _row_checksum(record, row) != record[:start].view(_CHECKSUM)[0]:
        return None
    return record[start : start + key.shape[1] * stored.itemsize].view(stored)


def first_wrong_row(buffer: Bytes, key: PackKey) -> int | None:
    """Return the first row of a table whose checksum does not agree, or None; other buffers have no such checksums."""
    if key.packer != "rows":
        return None
    for chunk in chunks_of(key):
        records = buffer[chunk.offset : chunk.offset + chunk.nbytes].reshape(chunk.n_rows, -1)
        for row, record in enumerate(records, chunk.first_row):
            if row_of_record(record, key, row) is None:
                return row
    return None


_SAMPLES: Final = ((1, 1), (37, 65), (64, 96), (529, 40))
"""Shapes of the made-up matrices that are packed for a fingerprint: odd sizes, one tile and several."""

_LARGE: Final = ((4096, 4096), (11008, 4096), (4096, 11008), (128256, 2048))


@lru_cache(maxsize=8)
def packer_fingerprint(format: str) -> bytes:
    """Return the SHA-256 of what packing in a format makes of fixed pseudo-random matrices.

    They cover every stored type and odd sizes; of large matrices only the places of the chunks are included. When
    packing writes something else, the fingerprint changes, and nobody has to remember to raise a version number.
    XNNPACK does the same for each kind of layer (`src/operators/fingerprint_cache.c`), with a hash of 32 bits. Takes
    some milliseconds, once.
    """
    digest = hashlib.sha256()
    for N, K in _SAMPLES:
        for key, stored in _operators(format, N, K):
            buffer = np.zeros(padded_nbytes_of(key), np.uint8)
            for _ in pack_into(stored, key, buffer):
                pass
            digest.update(buffer.data)
    for N, K in _LARGE:
        layout = layout_of(format, N, K)
        places = [(chunk.first_row, chunk.n_rows, chunk.offset, chunk.nbytes) for chunk in layout.chunks]
        digest.update(f"{layout.tile!r} {layout.chunk_nbytes}".encode() + np.array(places, "<u8").tobytes())
    table = chunks_of(rows_key((200_000, 1024), "bf16", WeightId(bytes(32), "fingerprint")))
    digest.update(repr([(chunk.first_row, chunk.offset) for chunk in table]).encode())
    return digest.digest()


def _operators(format: str, N: int, K: int) -> Iterator[tuple[PackKey, npt.NDArray[Any]]]:
    weights = WeightId(bytes(32), "fingerprint")
    w = (scrambled(N * K, stream=2) >> np.uint64(40)).astype(np.float32).reshape(N, K) / np.float32(1 << 23) - 1
    for dtype, stored in {"f32": w, "f16": w.astype(np.float16), "bf16": f32_to_bf16(w)}.items():
        yield matrix_key(layout_of(format, N, K), weights), stored
        yield rows_key((min(N, 3), K), dtype, weights), stored[:3]
    yield vectors_key(N, weights), w[:, 0].copy()


def scrambled(n: int, stream: int) -> npt.NDArray[np.uint64]:
    """Return `n` fixed pseudo-random numbers of 64 bits: number i is what splitmix64 makes of `i + 2^32 * stream`.

    Written out because the file format contains the fingerprint, and numpy may change its own random numbers.
    """
    z = (np.arange(1, n + 1, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
