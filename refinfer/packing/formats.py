"""The table of weight formats, and matrices packed in one of them.

Leaves to others: what a format is (`layout`; a module for each: `f32`, `bf16`, `int8`, `int4`), how a packed matrix is
multiplied (`matmul`). A new format is a new module and one more name in `FORMATS`.
Read more: tutorial 03; clauses PACK-16 to PACK-22, PACK-30.

Each chunk can be packed, read and multiplied by itself: scales lie in the tile they belong to. Biases, the numbers that
some models add to outputs, are not packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import PAGE_BYTES, Float32Array
from refinfer.errors import PackingError
from refinfer.packing import bf16, f32, int4, int8
from refinfer.packing.layout import Bytes, Chunk, Format, PackedLayout, cut_into_chunks

__all__ = ["FORMATS", "PackedMatrix", "format_of", "layout_of", "pack_chunk", "pack_matrix", "packing_nbytes"]

FORMATS: Final[Mapping[str, Format]] = MappingProxyType({page.name: page for page in (f32, bf16, int8, int4)})
"""Each format by name: its value is the format's module."""

_PACKED_AT_ONCE: Final = 1 << 16  # weights; what is made of them on the way stays in the processor's cache
_PADDING: Final = 64  # columns: more than any format adds to a row, its scales included


def format_of(format: str) -> Format:
    """Return the module of a format; raises PackingError if there is no such format."""
    if format not in FORMATS:
        raise PackingError(f"{format!r} is not a weight format; there are {', '.join(FORMATS)}")
    return FORMATS[format]


def layout_of(format: str, N: int, K: int, chunk_nbytes: int | None = None) -> PackedLayout:
    """Return how a matrix `[N, K]` is packed in a format.

    `chunk_nbytes` is the aim for a chunk's size; None means the format's usual aim.

    Raises:
        PackingError: there is no such format, or a size is below one.
    """
    packed_as = format_of(format)
    aim = packed_as.chunk_nbytes if chunk_nbytes is None else chunk_nbytes
    if min(N, K, aim) < 1:
        raise PackingError(f"a matrix of {N} outputs and {K} inputs cannot be packed in chunks of {aim} bytes")
    tile = packed_as.tile_shape(N, K)
    chunks = cut_into_chunks(N, tile.nr, packed_as.tile_nbytes(tile.nr, K), aim)
    return PackedLayout(packed_as, N, K, tile, aim, chunks)


class PackedMatrix:
    """A packed matrix with all of its chunks, in memory or in a mapped file (one that is used as if it were memory).

    `buffers` are the bytes of each chunk. `tiles` are the typed views of each, made once: making them costs as much as
    a small product.

    Raises:
        PackingError: there are more or fewer buffers than chunks, or a buffer is too small.
    """

    __slots__ = ("buffers", "layout", "tiles")

    def __init__(self, layout: PackedLayout, buffers: Sequence[Bytes]) -> None:
        self.layout = layout
        self.buffers = tuple(buffers)
        if len(self.buffers) != len(layout.chunks):
            raise PackingError(f"{len(layout.chunks)} chunks need one buffer each, not {len(self.buffers)}")
        self.tiles = tuple(map(layout.tiles, self.buffers, layout.chunks))

    def unpack(self) -> Float32Array:
        """Return the float32 weights `[N, K]` that a product uses, such as for a test that compares the product."""
        layout = self.layout
        # for each chunk: which tile, and which lane of it, each of its rows has
        every = (np.divmod(np.arange(chunk.n_rows), layout.tile.nr) for chunk in layout.chunks)
        rows = [layout.format.unpack_rows(tiles, *at) for tiles, at in zip(self.tiles, every, strict=True)]
        return np.concatenate(rows)


def pack_chunk(rows: npt.NDArray[Any], layout: PackedLayout, chunk: Chunk, buffer: Bytes) -> None:
    """Pack the rows of one chunk `[chunk.n_rows, K]`, as stored, into `buffer` of `chunk.nbytes` zeros.

    Raises:
        PackingError: the rows have another shape or type, or hold values that the format cannot.
    """
    if rows.shape != (chunk.n_rows, layout.K):
        raise PackingError(f"rows of shape {rows.shape} do not fit a chunk [{chunk.n_rows}, {layout.K}]")
    if rows.dtype not in (np.float32, np.float16, np.uint16):
        raise PackingError(f"weights of type {rows.dtype} cannot be packed; give float32, float16 or bfloat16 bits")
    tiles, step = layout.tiles(buffer, chunk), _rows_at_once(layout)
    for first in range(0, chunk.n_rows, step):
        layout.format.pack(rows[first : first + step], tiles, first)


def _rows_at_once(layout: PackedLayout) -> int:
    """Return how many rows are packed at a time, however large a tile is: of a small matrix, a sixteenth."""
    return max(1, min(layout.N // 16, _PACKED_AT_ONCE // (layout.K + _PADDING)))


def packing_nbytes(layouts: Iterable[PackedLayout]) -> int:
    """Return how many bytes of memory are enough to pack any of `layouts`, besides its own and the stored weights'."""

    def needed(layout: PackedLayout) -> int:
        return math.ceil(4 * layout.format.copies * _rows_at_once(layout) * (layout.K + _PADDING))

    return max(map(needed, layouts), default=0)


def pack_matrix(w: npt.NDArray[Any], format: str, chunk_nbytes: int | None = None) -> PackedMatrix:
    """Pack `w` `[N, K]`, as stored, into new memory, chunk by chunk; each chunk begins on a page.

    Raises:
        PackingError: `w` is not a matrix, or holds values that the format cannot; there is no such format; or a size
            is below one.
    """
    if w.ndim != 2:
        raise PackingError(f"only matrices can be packed, not an array of shape {w.shape}")
    layout = layout_of(format, w.shape[0], w.shape[1], chunk_nbytes)
    memory = np.zeros(layout.padded_nbytes + PAGE_BYTES, np.uint8)
    memory = memory[-memory.ctypes.data % PAGE_BYTES :]  # begins at a multiple of a page
    buffers = [memory[chunk.offset : chunk.offset + chunk.nbytes] for chunk in layout.chunks]
    for chunk, buffer in zip(layout.chunks, buffers, strict=True):
        pack_chunk(w[chunk.first_row : chunk.first_row + chunk.n_rows], layout, chunk, buffer)
    return PackedMatrix(layout, buffers)
