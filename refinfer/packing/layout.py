r"""The words of this room: tile, chunk, weight format, and where each chunk of a packed matrix lies.

Index arithmetic and one Protocol, no data. Leaves to others: the weight formats (a page for each: `f32`, `bf16`,
`int8`, `int4`), and XNNPACK's own layouts (`xnnpack`).
Read more: tutorial 01; clauses PACK-4, PACK-5.

A matrix `[N, K]` is cut into tiles of `nr` rows, and a row of tiles into chunks:

    row 0     +--------+ \
              | tile 0 |  |
    row nr    +--------+  |  chunk 0, starts on a page, padded with zeros to the next
              | tile 1 |  |
    row 2nr   +--------+ <
              | tile 2 |  |  chunk 1
    ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from refinfer.arrays import PAGE_BYTES, Float32Array, IntArray
from refinfer.errors import PackingError
from refinfer.packing.product import GemmScratch

__all__ = [
    "Bytes",
    "Chunk",
    "Format",
    "Operand",
    "PackedLayout",
    "TileShape",
    "Tiles",
    "count_chunks",
    "cut_into_chunks",
    "part_of_tiles",
]

Bytes: TypeAlias = npt.NDArray[np.uint8]

Tiles: TypeAlias = Any
"""The tiles of one chunk: whatever a format's `view` returns."""

Operand: TypeAlias = Any
"""x as the chunks of a product want it: whatever a format's `start` returns."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """XNNPACK's words: `nr` rows to a tile, `kr` neighbouring columns kept together, `sr` shuffled groups of them.

    `kr=1` gives a tile `[K, nr]`, its transpose; `kr=K` keeps rows whole, `[nr, K]`.

    Raises:
        PackingError: a size below one.
    """

    nr: int
    kr: int = 1
    sr: int = 1

    def __post_init__(self) -> None:
        if min(self.nr, self.kr, self.sr) < 1:
            raise PackingError(f"nr, kr and sr must be at least 1, not {self.nr}, {self.kr}, {self.sr}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of whole tiles: the unit that is checksummed, read, locked and multiplied.

    `offset` and `nbytes` are its place in the packed matrix, in bytes. It holds the `n_rows` rows from `first_row` on;
    the lanes of missing rows in a last tile are not counted.
    """

    first_row: int
    n_rows: int
    offset: int
    nbytes: int

    @property
    def padded_nbytes(self) -> int:
        """The bytes it takes in a file: `nbytes` rounded up to whole pages."""
        return -(-self.nbytes // PAGE_BYTES) * PAGE_BYTES


def count_chunks(N: int, nr: int, tile_nbytes: int, chunk_nbytes: int) -> int:
    """Return how many chunks `cut_into_chunks` would cut."""
    n_tiles = -(-N // nr)
    return min(n_tiles, max(1, round(n_tiles * tile_nbytes / chunk_nbytes)))


def cut_into_chunks(N: int, nr: int, tile_nbytes: int, chunk_nbytes: int) -> tuple[Chunk, ...]:
    """Cut a row of tiles into chunks of about `chunk_nbytes`, as equal as whole tiles allow, each on a page.

    A matrix below one and a half times the aim is one chunk; a tile larger than the aim is a chunk by itself.
    """
    return tuple(_cut(N, nr, tile_nbytes, chunk_nbytes))


# --8<-- [start:cut]
def _cut(N: int, nr: int, tile_nbytes: int, chunk_nbytes: int) -> Iterator[Chunk]:
    n_tiles = -(-N // nr)
    n_chunks = count_chunks(N, nr, tile_nbytes, chunk_nbytes)
    offset = 0
    for i in range(n_chunks):
        first, end = i * n_tiles // n_chunks, (i + 1) * n_tiles // n_chunks
        chunk = Chunk(first * nr, min(N, end * nr) - first * nr, offset, (end - first) * tile_nbytes)
        yield chunk
        offset += chunk.padded_nbytes


# --8<-- [end:cut]


class Format(Protocol):
    """A weight format. Each is a module of this room that has these names, so that the module is its whole page."""

    @property
    def name(self) -> str:
        """The name on the command line and in keys."""
        ...

    @property
    def chunk_nbytes(self) -> int:
        """The usual aim for a chunk: about a million weights (two million in int4)."""
        ...

    @property
    def nanoseconds_per_byte(self) -> Mapping[int, float]:
        """What a product costs for each packed byte, by rows of x, as measured on one core of the figures page."""
        ...

    def tile_shape(self, N: int, K: int) -> TileShape:
        """Return the tile shape for a matrix `[N, K]`; it does not depend on the aim for a chunk."""
        ...

    def tile_nbytes(self, nr: int, K: int) -> int:
        """Return the bytes of a tile of `nr` rows."""
        ...

    def view(self, raw: Bytes, nr: int, K: int) -> Tiles:
        """See tiles `[T, tile_nbytes]` as their typed parts. Copies nothing."""
        ...

    def pack(self, rows: npt.NDArray[Any], tiles: Tiles) -> None:
        """Fill tiles of zeros from rows `[n, K]` as stored: float32, float16, or bfloat16 as its bits."""
        ...

    def unpack_rows(self, tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
        """Return the float32 rows in lanes `lane` of tiles `which` that a product with those tiles uses."""
        ...

    def start(self, x: Float32Array, scratch: GemmScratch) -> Operand:
        """Return what all chunks share of a product: x `[M, K]` in the form that `multiply` wants."""
        ...

    def multiply(self, operand: Operand, tiles: Tiles, out: Float32Array) -> None:
        """Write the outputs of one chunk, `[M, n_rows]`; `operand` is what `start` returned."""
        ...

    def scratch_floats(self, layout: PackedLayout, M: int) -> int:
        """Return exactly the floats of scratch that a product of M rows of x takes, `start` included."""
        ...


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Everything about a packed matrix `[N, K]` but its bytes; `chunk_nbytes` is the aim its chunks were cut for."""

    format: Format
    N: int
    K: int
    tile: TileShape
    chunk_nbytes: int
    chunks: tuple[Chunk, ...]

    @property
    def padded_nbytes(self) -> int:
        """The bytes of all chunks, each padded to whole pages."""
        return sum(chunk.padded_nbytes for chunk in self.chunks)

    @property
    def most_rows(self) -> int:
        """The rows of the largest chunk."""
        return max(chunk.n_rows for chunk in self.chunks)

    def alone(self, index: int) -> PackedLayout:
        """Return the layout of the matrix that is one chunk of this one."""
        chunk = self.chunks[index]
        return replace(self, N=chunk.n_rows, chunks=(replace(chunk, first_row=0, offset=0),))

    def tiles(self, buffer: Bytes, chunk: Chunk) -> Tiles:
        """See the bytes of a chunk, in a buffer at least as large, as the format's typed tiles.

        Raises:
            PackingError: the buffer is not contiguous bytes, or too small.
        """
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or not buffer.flags.c_contiguous or buffer.size < chunk.nbytes:
            raise PackingError(f"a chunk of {chunk.nbytes} bytes does not lie in {buffer.dtype} {list(buffer.shape)}")
        raw = buffer[: chunk.nbytes].reshape(-1, self.format.tile_nbytes(self.tile.nr, self.K))
        return self.format.view(raw, self.tile.nr, self.K)


def part_of_tiles(raw: Bytes, start: int, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
    """See the part of each tile `[T, tile_nbytes]` that starts at its byte `start` as `[T, *shape]`. Copies nothing."""
    end = start + math.prod(shape) * np.dtype(dtype).itemsize
    return raw[:, start:end].view(dtype).reshape(len(raw), *shape)
