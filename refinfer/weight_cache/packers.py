"""What each packer makes of a tensor: which chunks, which bytes; and a fingerprint of all that.

Knows: the three kinds of buffer of a cache file. Does not know: keys of what, files, models.
Spec: KEY-4 to KEY-8. Tutorial: 04.

    goi       a matrix in the tiles of a weight format, cut into chunks (`packing.formats`)
    rows      a table of which single rows are read: each row as it is stored, then its own checksum

              | K elements, zeros up to 8 bytes | checksum: u64 |   one record for each row, runs of them in chunks

    vectors   norms and biases as float32, one after another: one chunk, always resident
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import IntArray, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing.formats import Bytes, PackedLayout, format_of, layout_of, pack_chunk
from refinfer.packing.layout import Chunk, TileShape, count_chunks, cut_into_chunks
from refinfer.weight_cache.checksum import checksums, scrambled
from refinfer.weight_cache.key import PackKey, WeightId

__all__ = [
    "PACKERS",
    "STORED_TYPES",
    "chunks_of",
    "count_of",
    "layout_of_key",
    "matrix_key",
    "nbytes_of",
    "pack_into",
    "packer_fingerprint",
    "record_nbytes",
    "rows_key",
    "rows_of_records",
    "vectors_key",
]

STORED_TYPES: Final[Mapping[str, np.dtype[Any]]] = MappingProxyType(
    {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
)
"""The types a row may be stored in; bfloat16 as its bits."""

_ONE: Final = TileShape(1)
_ROWS_CHUNK_BYTES: Final = 4 << 20
_CHECKSUM_BYTES: Final = 8
_WORD: Final = np.dtype("<u8")
_ROW_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)
LARGEST_BLOCK_BYTES: Final = 16 << 20
"""Weights are packed in blocks of rows that take at most as much as stored and as float32 each."""


def matrix_key(layout: PackedLayout, weights: WeightId) -> PackKey:
    """Return the key of a packed matrix."""
    return PackKey("goi", (layout.N, layout.K), layout.format.name, layout.tile, weights)


def rows_key(shape: tuple[int, int], stored: str, weights: WeightId) -> PackKey:
    """Return the key of a table of rows; `stored` is one of `STORED_TYPES`."""
    return PackKey("rows", shape, stored, _ONE, weights)


def vectors_key(n: int, weights: WeightId) -> PackKey:
    """Return the key of `n` float32 numbers in one block."""
    return PackKey("vectors", (n,), "f32", _ONE, weights)


def layout_of_key(key: PackKey) -> PackedLayout:
    """Return how the matrix of a `goi` key is packed.

    Raises:
        PackingError: it is none, or this version packs it in other tiles.
    """
    if key.packer != "goi" or len(key.shape) != 2:
        raise PackingError(f"{key.name!r} is not a packed matrix")
    layout = layout_of(key.format, *key.shape)
    if layout.tile != key.tile:
        raise PackingError(f"{key.name!r} lies in tiles of {key.tile}, but {layout.tile} is what {key.format} uses")
    return layout


def record_nbytes(key: PackKey) -> int:
    """Return the bytes of one row of a `rows` key, its checksum included."""
    return -(-key.shape[1] * STORED_TYPES[key.format].itemsize // 8) * 8 + _CHECKSUM_BYTES


def _chunks_of_rows(key: PackKey) -> tuple[Chunk, ...]:
    if len(key.shape) != 2 or key.format not in STORED_TYPES:
        raise PackingError(f"{key.name!r} is not a table of rows")
    return cut_into_chunks(key.shape[0], 1, record_nbytes(key), _ROWS_CHUNK_BYTES)


def _chunks_of_vectors(key: PackKey) -> tuple[Chunk, ...]:
    if len(key.shape) != 1 or key.format != "f32":
        raise PackingError(f"{key.name!r} is not a block of vectors")
    return (Chunk(0, 1, 0, 4 * key.shape[0]),)


PACKERS: Final[Mapping[str, Callable[[PackKey], tuple[Chunk, ...]]]] = MappingProxyType(
    {"goi": lambda key: layout_of_key(key).chunks, "rows": _chunks_of_rows, "vectors": _chunks_of_vectors}
)
"""Each packer by name, with the chunks it makes."""


@lru_cache(maxsize=4096)
def chunks_of(key: PackKey) -> tuple[Chunk, ...]:
    """Return the chunks of a buffer, placed from its start.

    Raises:
        PackingError: no packer makes such a buffer.
    """
    if key.packer not in PACKERS:
        raise PackingError(f"{key.packer!r} is not a packer; there are {', '.join(PACKERS)}")
    return PACKERS[key.packer](key)


def count_of(key: PackKey) -> int:
    """Return how many chunks a buffer has, without listing them.

    Raises:
        PackingError: no packer makes such a buffer.
    """
    if key.packer == "goi" and len(key.shape) == 2:
        fmt, (N, K) = format_of(key.format), key.shape
        tile = fmt.tile(N, K)
        return count_chunks(N, tile.nr, fmt.tile_nbytes(tile, K), fmt.chunk_nbytes)
    if key.packer == "rows" and len(key.shape) == 2 and key.format in STORED_TYPES:
        return count_chunks(key.shape[0], 1, record_nbytes(key), _ROWS_CHUNK_BYTES)
    return 1


def nbytes_of(key: PackKey) -> int:
    """Return the bytes of a buffer: whole pages."""
    return sum(chunk.padded_nbytes for chunk in chunks_of(key))


def _pack_blocks(
    w: npt.NDArray[Any], layout: PackedLayout, buffer: Bytes, most: int = LARGEST_BLOCK_BYTES
) -> Iterator[int]:
    """Pack `w` `[N, K]`, as stored, into `buffer` of zeros, in blocks of whole tiles; yield the bytes done so far.

    A block takes at most `most` bytes as float32, or one tile.
    """
    tile_nbytes = layout.format.tile_nbytes(layout.tile, layout.K)
    n_tiles = max(1, most // (4 * layout.K * layout.tile.nr))
    for chunk in layout.chunks:
        for offset in range(0, chunk.nbytes, n_tiles * tile_nbytes):
            nbytes = min(n_tiles * tile_nbytes, chunk.nbytes - offset)
            first = offset // tile_nbytes * layout.tile.nr
            n_rows = min(chunk.n_rows - first, nbytes // tile_nbytes * layout.tile.nr)
            start = chunk.offset + offset
            block = Chunk(chunk.first_row + first, n_rows, start, nbytes)
            rows = w[block.first_row : block.first_row + n_rows]
            pack_chunk(rows, layout, block, buffer[start : start + nbytes])
            yield start + nbytes


def _pack_records(w: npt.NDArray[Any], key: PackKey, buffer: Bytes) -> Iterator[int]:
    """Copy the rows of `w` `[N, K]`, as stored, into `buffer` of zeros, each with its checksum; yield bytes done."""
    stride, row_nbytes = record_nbytes(key), w.shape[1] * w.dtype.itemsize
    for chunk in chunks_of(key):
        records = buffer[chunk.offset : chunk.offset + chunk.nbytes].reshape(-1, stride)
        rows = np.ascontiguousarray(w[chunk.first_row : chunk.first_row + chunk.n_rows])
        records[:, :row_nbytes] = rows.view(np.uint8)
        numbers = np.arange(chunk.first_row, chunk.first_row + chunk.n_rows)
        records[:, -_CHECKSUM_BYTES:].view(_WORD)[:, 0] = _record_sums(records, numbers)
        yield chunk.offset + chunk.nbytes


def _record_sums(records: Bytes, numbers: IntArray) -> npt.NDArray[np.uint64]:
    """Return what the checksums of records must be; each row's number is in it, so that no row passes for another."""
    return checksums(records[:, :-_CHECKSUM_BYTES]) ^ ((numbers.astype(np.uint64) + np.uint64(1)) * _ROW_FACTOR)


def rows_of_records(records: Bytes, key: PackKey, numbers: IntArray) -> npt.NDArray[Any] | None:
    """Return the rows `numbers` of `records` `[n, record_nbytes]`, as stored; None where a checksum does not agree."""
    if not np.array_equal(_record_sums(records, numbers), records[:, -_CHECKSUM_BYTES:].view(_WORD)[:, 0]):
        return None
    stored = STORED_TYPES[key.format]
    return np.ascontiguousarray(records[:, : key.shape[1] * stored.itemsize]).view(stored)


def _pack_vectors(vectors: npt.NDArray[np.float32], buffer: Bytes) -> Iterator[int]:
    """Copy float32 numbers into `buffer`; yield the bytes done."""
    buffer[: vectors.nbytes].view(np.float32)[:] = vectors
    yield vectors.nbytes


def pack_into(stored: npt.NDArray[Any], key: PackKey, buffer: Bytes, most: int = LARGEST_BLOCK_BYTES) -> Iterator[int]:
    """Pack a tensor, as stored, into `buffer` of `nbytes_of(key)` zeros; yield the bytes done so far.

    Raises:
        PackingError: the tensor does not fit the key, or holds what the format cannot.
    """
    if stored.shape != key.shape or buffer.shape != (nbytes_of(key),):
        raise PackingError(f"{key.name!r}: {list(stored.shape)} does not fit {list(key.shape)} in {buffer.size} bytes")
    if key.packer != "goi" and stored.dtype != STORED_TYPES[key.format]:
        raise PackingError(f"{key.name!r} is kept as {key.format}, and cannot be packed from {stored.dtype}")
    if key.packer == "goi":
        return _pack_blocks(stored, layout_of_key(key), buffer, most)
    return _pack_records(stored, key, buffer) if key.packer == "rows" else _pack_vectors(stored, buffer)


_SAMPLES: Final = ((1, 1), (37, 65), (64, 96), (529, 40))
"""Shapes of the operators that are packed for a fingerprint: odd sizes, one tile and several."""

_LARGE: Final = ((4096, 4096), (11008, 4096), (4096, 11008), (128256, 2048))


@lru_cache(maxsize=8)
def packer_fingerprint(name: str) -> bytes:
    """Return the SHA-256 of what packing in the format `name` makes of fixed pseudo-random operators.

    Every stored type, odd sizes, with and without a bias, the chunks of large matrices. So whoever changes what
    packing writes need not remember to raise a number. XNNPACK does the same for each of its operators
    (`src/operators/fingerprint_cache.c`), with a hash of 32 bits. Takes some milliseconds, once.
    """
    digest = hashlib.sha256()
    for N, K in _SAMPLES:
        for key, stored in _operators(name, N, K):
            buffer = np.zeros(nbytes_of(key), np.uint8)
            for _ in pack_into(stored, key, buffer):
                pass
            digest.update(buffer.data)
    for N, K in _LARGE:
        layout = layout_of(name, N, K)
        places = [(chunk.first_row, chunk.n_rows, chunk.offset, chunk.nbytes) for chunk in layout.chunks]
        digest.update(repr(layout.tile).encode() + np.array(places, _WORD).tobytes())
    table = chunks_of(rows_key((200_000, 1024), "bf16", WeightId(bytes(32), "fingerprint")))
    digest.update(repr([(chunk.first_row, chunk.offset) for chunk in table]).encode())
    return digest.digest()


def _operators(name: str, N: int, K: int) -> Iterator[tuple[PackKey, npt.NDArray[Any]]]:
    weights = WeightId(bytes(32), "fingerprint")
    w = (scrambled(N * K, stream=2) >> np.uint64(40)).astype(np.float32).reshape(N, K) / np.float32(1 << 23) - 1
    for dtype, stored in {"f32": w, "f16": w.astype(np.float16), "bf16": f32_to_bf16(w)}.items():
        yield matrix_key(layout_of(name, N, K), weights), stored
        yield rows_key((min(N, 3), K), dtype, weights), stored[:3]
    bias = w[:, 0].copy()
    yield vectors_key(N, weights), bias
