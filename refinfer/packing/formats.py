"""The four weight formats of the engine, and a packed matrix: its chunks, wherever their bytes lie.

Knows: which tile each format uses, how many bytes it takes, how rows become tiles and tiles rows again. Does not know:
how a chunk is multiplied (`matmul`), where chunks are kept.
Spec: PACK-16 to PACK-22. Tutorial: 03.

Every chunk can be read and multiplied by itself: scales lie in the tile they belong to. Biases are not here: a matrix
adds its own.

    f32    16 rows of K float32
    bf16   16 rows of K bfloat16, an odd K padded with a zero; read as words of 32 bits, whose low half is an even
           column and whose high half the odd one behind it: a shift and a mask, one pass each, give both as float32
    int8   16 rows of K bytes, 16 scales
    int4   up to 512 rows in blocks of 32 columns, two blocks to a byte, then the scales (see `quantized`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import PAGE_BYTES, Float32Array, IntArray, UInt16Array, bf16_to_f32, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing.gemm import require_rows
from refinfer.packing.layout import Chunk, TileShape, cut_into_chunks
from refinfer.packing.quantized import BLOCK, dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

__all__ = [
    "FORMATS",
    "Bytes",
    "Format",
    "PackedLayout",
    "PackedMatrix",
    "Tiles",
    "format_of",
    "half_blocks",
    "layout_of",
    "pack_chunk",
    "pack_matrix",
]

Bytes = npt.NDArray[np.uint8]

_ROWS: Final = 16
_LARGEST_INT4_TILE: Final = 512
_SMALLEST_INT4_TILE: Final = 64
_INT4_CHUNK_BYTES: Final = 9 << 17  # two million weights


@dataclass(frozen=True, slots=True)
class Format:
    """How one weight format is laid out.

    `tile` picks the tile shape for a matrix `[N, K]`; `tile_nbytes` says what a tile takes; `pack` fills whole tiles
    `[T, tile_nbytes]` from rows as stored (float32, float16, or bfloat16 as its bits); `unpack_rows` gives the
    float32 rows, in some lanes of some tiles, that a product with those tiles uses. `chunk_nbytes` is the aim for a
    chunk: a million weights, two million in int4.
    """

    name: str
    chunk_nbytes: int
    tile: Callable[[int, int], TileShape]
    tile_nbytes: Callable[[TileShape, int], int]
    pack: Callable[[npt.NDArray[Any], Tiles], None]
    unpack_rows: Callable[[Tiles, IntArray, IntArray], Float32Array]

    def unpack(self, tiles: Tiles) -> Float32Array:
        """Return all rows of some tiles, `[T * nr, K]`, missing ones too."""
        which, lane = np.divmod(np.arange(len(tiles.raw) * tiles.nr), tiles.nr)
        return self.unpack_rows(tiles, which, lane)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Everything about a packed matrix but its bytes."""

    format: Format
    N: int
    K: int
    tile: TileShape
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all chunks, each padded to whole pages."""
        return sum(chunk.padded_nbytes for chunk in self.chunks)

    def tiles(self, buffer: Bytes, chunk: Chunk) -> Tiles:
        """See the bytes of a chunk, in a buffer at least as large, as its tiles.

        Raises:
            PackingError: the buffer is not contiguous bytes, or too small.
        """
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or not buffer.flags.c_contiguous or buffer.size < chunk.nbytes:
            raise PackingError(f"a chunk of {chunk.nbytes} bytes does not lie in {buffer.dtype} {list(buffer.shape)}")
        nbytes = self.format.tile_nbytes(self.tile, self.K)
        return Tiles(buffer[: chunk.nbytes].reshape(-1, nbytes), self.tile.nr, self.K)


class Tiles:
    """The tiles of a chunk, `[T, tile_nbytes]`, with typed views of their parts, made when first asked for."""

    def __init__(self, raw: Bytes, nr: int, K: int) -> None:
        self.raw = raw
        self.nr = nr
        self.K = K

    @cached_property
    def f32(self) -> Float32Array:
        """The rows `[T * nr, K]` of an f32 chunk."""
        return self.raw.reshape(-1).view(np.float32).reshape(-1, self.K)

    @cached_property
    def bf16_pairs(self) -> npt.NDArray[np.uint32]:
        """The rows `[T * nr, ceil(K/2)]` of a bf16 chunk, two neighbouring columns to a word."""
        return self.raw.reshape(-1).view(np.uint32).reshape(self.raw.shape[0] * self.nr, -1)

    @cached_property
    def int8(self) -> npt.NDArray[np.int8]:
        """The weights `[T, nr, K]` of an int8 chunk."""
        return self._part(0, np.dtype(np.int8), self.nr, self.K)

    @cached_property
    def int8_scales(self) -> Float32Array:
        """The scales `[T, nr]` of an int8 chunk."""
        return self._part(self.nr * self.K, np.dtype(np.float32), self.nr)

    @cached_property
    def nibbles(self) -> Bytes:
        """The bytes `[T, B/2, 32, nr]` of an int4 chunk."""
        return self._part(0, np.dtype(np.uint8), half_blocks(self.K), BLOCK, self.nr)

    @cached_property
    def int4_scales(self) -> UInt16Array:
        """The bfloat16 scales `[T, B, nr]` of an int4 chunk."""
        half = half_blocks(self.K)
        return self._part(half * BLOCK * self.nr, np.dtype(np.uint16), 2 * half, self.nr)

    def _part(self, start: int, dtype: np.dtype[Any], *shape: int) -> npt.NDArray[Any]:
        """See the same part of each tile as `[T, *shape]`."""
        nbytes = math.prod(shape) * dtype.itemsize
        part = self.raw[:, start : start + nbytes].view(dtype)
        strides = np.empty(shape, np.bool_).strides
        return np.lib.stride_tricks.as_strided(
            part, (len(self.raw), *shape), (self.raw.strides[0], *(n * dtype.itemsize for n in strides))
        )


def half_blocks(K: int) -> int:
    """Return how many blocks of 32 columns each of int4's two planes has."""
    return -(-K // (2 * BLOCK))


def _as_f32(rows: npt.NDArray[Any]) -> Float32Array:
    return bf16_to_f32(rows) if rows.dtype == np.uint16 else rows.astype(np.float32, copy=False)


def _rows_whole(N: int, K: int) -> TileShape:
    return TileShape(nr=_ROWS, kr=K)


def _pairs_whole(N: int, K: int) -> TileShape:
    return TileShape(nr=_ROWS, kr=K + K % 2)


def _pack_f32(rows: npt.NDArray[Any], tiles: Tiles) -> None:
    target = tiles.f32[: len(rows)]
    if rows.dtype == np.uint16:
        bf16_to_f32(rows, out=target)
    else:
        np.copyto(target, rows)


def _f32_rows(tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
    rows: Float32Array = tiles.f32[which * tiles.nr + lane]
    return rows


def _bf16_rows(tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
    return bf16_to_f32(tiles.bf16_pairs[which * tiles.nr + lane].view(np.uint16)[:, : tiles.K])


def _int8_rows(tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
    return dequantize_int8(tiles.int8[which, lane], tiles.int8_scales[which, lane])


def _int4_rows(tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
    bytes_ = tiles.nibbles[which, :, :, lane]
    planes = np.stack((bytes_ & 15, bytes_ >> 4), axis=1).astype(np.int8) - np.int8(8)
    return dequantize_int4(planes.reshape(len(which), -1), tiles.int4_scales[which, :, lane], tiles.K)


def _pack_bf16(rows: npt.NDArray[Any], tiles: Tiles) -> None:
    bits = rows if rows.dtype == np.uint16 else f32_to_bf16(_as_f32(rows))
    if rows.dtype != np.uint16 and np.count_nonzero(bits & 0x7FFF == 0x7F80) > np.count_nonzero(np.isinf(rows)):
        raise PackingError("a weight is too large for bfloat16; use f32")
    np.copyto(tiles.bf16_pairs.view(np.uint16)[: len(rows), : tiles.K], bits)


def _pack_int8(rows: npt.NDArray[Any], tiles: Tiles) -> None:
    q, scales = quantize_int8(_as_f32(rows))
    whole, rest = divmod(len(rows), tiles.nr)
    for t, n in ((slice(0, whole), tiles.nr), (slice(whole, whole + 1), rest)):
        a, b = t.start * tiles.nr, t.start * tiles.nr + (t.stop - t.start) * n
        if a < b:
            tiles.int8[t, :n] = q[a:b].reshape(-1, n, tiles.K)
            tiles.int8_scales[t, :n] = scales[a:b].reshape(-1, n)


def _int4_tile(N: int, K: int) -> TileShape:
    """As few tiles as possible, all alike, a multiple of 16 rows: little is wasted on missing rows.

    At most 512 rows; fewer, down to 64, where a row is so long that a tile would be larger than a chunk.
    """
    fitting = _INT4_CHUNK_BYTES // (half_blocks(K) * (BLOCK + 4)) // _ROWS * _ROWS
    n_tiles = -(-N // min(_LARGEST_INT4_TILE, max(_SMALLEST_INT4_TILE, fitting)))
    return TileShape(nr=-(-N // (n_tiles * _ROWS)) * _ROWS, kr=1)


def _pack_int4(rows: npt.NDArray[Any], tiles: Tiles) -> None:
    T, half, nr = len(tiles.raw), half_blocks(tiles.K), tiles.nr
    q, scales = quantize_int4(_as_f32(rows))
    # Missing rows, and the block that makes the number of blocks even, are zeros.
    padded = np.full((T * nr, 2 * half * BLOCK), 8, np.uint8)
    padded[: len(q), : q.shape[1]] = q + 8
    planes = padded.reshape(T, nr, 2, half, BLOCK).transpose(2, 0, 3, 4, 1)
    np.bitwise_or(planes[0], planes[1] << 4, out=tiles.nibbles)
    padded_scales = np.zeros((T * nr, 2 * half), np.uint16)
    padded_scales[: len(scales), : scales.shape[1]] = scales
    tiles.int4_scales[:] = padded_scales.reshape(T, nr, -1).transpose(0, 2, 1)


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "f32": Format(
            name="f32",
            chunk_nbytes=4 << 20,
            tile=_rows_whole,
            tile_nbytes=lambda tile, K: tile.nr * 4 * K,
            pack=_pack_f32,
            unpack_rows=_f32_rows,
        ),
        "bf16": Format(
            name="bf16",
            chunk_nbytes=2 << 20,
            tile=_pairs_whole,
            tile_nbytes=lambda tile, K: tile.nr * 2 * tile.kr,
            pack=_pack_bf16,
            unpack_rows=_bf16_rows,
        ),
        "int8": Format(
            name="int8",
            chunk_nbytes=1 << 20,
            tile=_rows_whole,
            tile_nbytes=lambda tile, K: tile.nr * (K + 4),
            pack=_pack_int8,
            unpack_rows=_int8_rows,
        ),
        "int4": Format(
            name="int4",
            chunk_nbytes=_INT4_CHUNK_BYTES,
            tile=_int4_tile,
            tile_nbytes=lambda tile, K: tile.nr * half_blocks(K) * (BLOCK + 4),
            pack=_pack_int4,
            unpack_rows=_int4_rows,
        ),
    }
)
"""The engine's formats by name."""


def format_of(name: str) -> Format:
    """Return a format by its name; raises PackingError for another name."""
    if name not in FORMATS:
        raise PackingError(f"{name!r} is not a weight format; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def layout_of(name: str, N: int, K: int) -> PackedLayout:
    """Return how a matrix `[N, K]` is packed in the format `name`; raises PackingError for impossible sizes."""
    fmt = format_of(name)
    if min(N, K) < 1:
        raise PackingError(f"a matrix of {N} outputs and {K} inputs cannot be packed")
    tile = fmt.tile(N, K)
    return PackedLayout(fmt, N, K, tile, cut_into_chunks(N, tile.nr, fmt.tile_nbytes(tile, K), fmt.chunk_nbytes))


class PackedMatrix:
    """A packed matrix: its layout, and the bytes of each chunk, in memory, in a mapped file or in a ring.

    Its `tiles` are typed views of those bytes, made once: making them costs as much as a small product.
    """

    __slots__ = ("buffers", "layout", "tiles")

    def __init__(self, layout: PackedLayout, buffers: Sequence[Bytes]) -> None:
        self.layout = layout
        self.buffers = tuple(buffers)
        if len(self.buffers) != len(layout.chunks):
            raise PackingError(f"{len(layout.chunks)} chunks need as many buffers, not {len(self.buffers)}")
        self.tiles = tuple(
            layout.tiles(buffer, chunk) for buffer, chunk in zip(self.buffers, layout.chunks, strict=True)
        )

    def unpack(self) -> Float32Array:
        """Return the float32 weights `[N, K]` that a product uses: the inverse of packing, an oracle."""
        layout = self.layout
        return np.concatenate(
            [
                layout.format.unpack(tiles)[: chunk.n_rows]
                for chunk, tiles in zip(layout.chunks, self.tiles, strict=True)
            ]
        )

    def unpack_rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as float32 `[len(ids), K]`; reads only those rows.

        Raises:
            PackingError: there is no such row.
        """
        layout, nr = self.layout, self.layout.tile.nr
        require_rows(ids, layout.N)
        out = np.empty((len(ids), layout.K), np.float32)
        chunk_of = np.searchsorted([chunk.first_row for chunk in layout.chunks], ids, side="right") - 1
        for c in np.unique(chunk_of):
            here = np.flatnonzero(chunk_of == c)
            which, lane = np.divmod(ids[here] - layout.chunks[c].first_row, nr)
            out[here] = layout.format.unpack_rows(self.tiles[c], which, lane)
        return out


def pack_chunk(rows: npt.NDArray[Any], layout: PackedLayout, chunk: Chunk, buffer: Bytes) -> None:
    """Pack the rows of one chunk `[chunk.n_rows, K]`, as stored, into `buffer` of `chunk.nbytes` zeros.

    Raises:
        PackingError: another shape or type of rows, or values that the format cannot hold.
    """
    if rows.shape != (chunk.n_rows, layout.K):
        raise PackingError(f"rows of shape {rows.shape} do not fit a chunk [{chunk.n_rows}, {layout.K}]")
    if rows.dtype not in (np.float32, np.float16, np.uint16):
        raise PackingError(f"weights of type {rows.dtype} cannot be packed; give float32, float16 or bfloat16 bits")
    layout.format.pack(rows, layout.tiles(buffer, chunk))


def pack_matrix(w: npt.NDArray[Any], name: str) -> PackedMatrix:
    """Pack `w` `[N, K]`, as stored, into memory of its own, chunk by chunk, each on a page.

    Raises:
        PackingError: not a matrix, an unknown format, or values that the format cannot hold.
    """
    if w.ndim != 2:
        raise PackingError(f"only matrices can be packed, not an array of shape {w.shape}")
    layout = layout_of(name, *w.shape)
    memory = np.zeros(layout.nbytes + PAGE_BYTES, np.uint8)
    memory = memory[-memory.ctypes.data % PAGE_BYTES :]
    buffers = []
    for chunk in layout.chunks:
        buffer = memory[chunk.offset : chunk.offset + chunk.nbytes]
        pack_chunk(w[chunk.first_row : chunk.first_row + chunk.n_rows], layout, chunk, buffer)
        buffers.append(buffer)
    return PackedMatrix(layout, buffers)
