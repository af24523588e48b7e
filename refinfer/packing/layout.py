r"""The words tile, chunk and weight format, and where each chunk of a packed matrix lies.

Has index arithmetic and one Protocol, no data. Leaves to others: the weight formats (a module for each: `f32`, `bf16`,
`int8`, `int4`), and the layouts of XNNPACK, Google's library for neural networks (`xnnpack`).
Read more: tutorial 01; clauses PACK-4, PACK-5, PACK-31.

To pack a matrix is to store it in the order in which a product reads it. A matrix `[N, K]` is cut into tiles of `nr`
rows, and several tiles, one after another, make a chunk. In shapes, T is a number of tiles. The place of a row in its
tile is its lane. A page is 4096 bytes, the unit in which a system reads files.

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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, IntArray, whole_pages
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
"""x in the form that a format's `multiply` needs: whatever its `start` returns."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """The shape of a tile, in XNNPACK's letters: `nr` rows, of which `kr` neighbouring columns stay together.

    `kr=K` keeps rows whole, `[nr, K]`; `kr=1` stores a tile column by column, `[K, nr]`. `sr` is for processors that
    shuffle their inputs (tutorial 01); in all weight formats it is 1.

    Raises:
        PackingError: a size is below one.
    """

    nr: int
    kr: int = 1
    sr: int = 1

    def __post_init__(self) -> None:
        if min(self.nr, self.kr, self.sr) < 1:
            raise PackingError(f"nr, kr and sr must be at least 1, not {self.nr}, {self.kr}, {self.sr}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some neighbouring tiles: the unit that is read, checked, multiplied, and locked (kept in memory).

    `offset` and `nbytes` are its place in the packed matrix, in bytes. It holds the `n_rows` rows from `first_row` on.
    If N is not a multiple of `nr`, the last tile has empty lanes, which `n_rows` does not count.
    """

    first_row: int
    n_rows: int
    offset: int
    nbytes: int

    @property
    def padded_nbytes(self) -> int:
        """The bytes it takes in a file: `nbytes` rounded up to whole pages."""
        return whole_pages(self.nbytes)


def count_chunks(N: int, nr: int, tile_nbytes: int, chunk_nbytes: int) -> int:
    """Return how many chunks `cut_into_chunks` returns, without making them."""
    n_tiles = -(-N // nr)
    return min(n_tiles, max(1, round(n_tiles * tile_nbytes / chunk_nbytes)))


# --8<-- [start:cut]
def cut_into_chunks(N: int, nr: int, tile_nbytes: int, chunk_nbytes: int) -> tuple[Chunk, ...]:
    """Cut the tiles of N rows into `count_chunks` chunks, as equal as whole tiles allow, each on a page of its own.

    `chunk_nbytes` is called the aim. A matrix of less than one and a half times the aim is one chunk; a tile larger
    than the aim is a chunk by itself. Chunks end where an even cut would end them, rounded down to whole tiles. In
    memory they follow one another without gaps, except for the padding to whole pages. They are returned in a tuple.
    """
    # lab 02: cut tiles into chunks that are equal up to one tile, each on its own page
    n_tiles = -(-N // nr)
    n_chunks = count_chunks(N, nr, tile_nbytes, chunk_nbytes)
    chunks: list[Chunk] = []
    offset = 0
    for i in range(n_chunks):
        first, end = i * n_tiles // n_chunks, (i + 1) * n_tiles // n_chunks
        chunk = Chunk(first * nr, min(N, end * nr) - first * nr, offset, (end - first) * tile_nbytes)
        chunks.append(chunk)
        offset += chunk.padded_nbytes
    return tuple(chunks)
    # end lab


# --8<-- [end:cut]


class Format(Protocol):
    """A weight format: how weights are stored and multiplied. Each format is a module that defines these names."""

    @property
    def name(self) -> str:
        """The name on the command line and in the keys of the weight cache."""
        ...

    @property
    def chunk_nbytes(self) -> int:
        """The usual aim, in bytes: about a million weights (two million in int4)."""
        ...

    @property
    def nanoseconds_per_byte(self) -> Mapping[int, float]:
        """What a product costs for each packed byte, by rows of x: measured on one core (`docs/figures.md`)."""
        ...

    @property
    def copies(self) -> float:
        """How many float32 copies of its rows `pack` makes on the way, at most, whatever type they are stored in."""
        ...

    def tile_shape(self, N: int, K: int) -> TileShape:
        """Return the tile shape for a matrix `[N, K]`; it does not depend on how chunks are cut."""
        ...

    def tile_nbytes(self, nr: int, K: int) -> int:
        """Return the bytes of a tile of `nr` rows."""
        ...

    def view(self, raw: Bytes, nr: int, K: int) -> Tiles:
        """Return typed views of the parts of T tiles; `raw` is their bytes, `[T, tile_nbytes]`. Copies nothing."""
        ...

    def pack(self, rows: npt.NDArray[Any], tiles: Tiles, first: int) -> None:
        """Pack rows `[n, K]` into n lanes, counted over all tiles from lane `first` on, of tiles that held zeros.

        All rows of the tiles are packed in order, from lane 0 on, some at a time. Rows come as stored: as float32,
        float16, or bfloat16. A bfloat16 is the upper half of a float32. numpy has no such type, so its 16 bits come as
        uint16.
        """
        ...

    def unpack_rows(self, tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
        """Return float32 rows as a product uses them: row i is in lane `lane[i]` of tile `which[i]`."""
        ...

    def start(self, x: Float32Array, scratch: GemmScratch) -> Operand:
        """Prepare x `[M, K]`, once for all chunks of a product: return it in the form that `multiply` needs."""
        ...

    def multiply(self, operand: Operand, tiles: Tiles, out: Float32Array) -> None:
        """Multiply with one chunk: write its outputs, `[M, n_rows]`, to `out`; `operand` is what `start` returned."""
        ...

    def scratch_floats(self, layout: PackedLayout, M: int) -> int:
        """Return exactly how many floats of scratch a product with M rows of x takes, `start` included."""
        ...


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Everything about a packed matrix `[N, K]` except its bytes; `chunk_nbytes` is the aim its chunks were cut for."""

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
        """Return the layout of one chunk, seen as a matrix of its own."""
        chunk = self.chunks[index]
        return replace(self, N=chunk.n_rows, chunks=(replace(chunk, first_row=0, offset=0),))

    def tiles(self, buffer: Bytes, chunk: Chunk) -> Tiles:
        """Return the tiles of a chunk, as typed views; `buffer` begins with the chunk's bytes.

        Raises:
            PackingError: the buffer is not contiguous bytes, or is too small.
        """
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or not buffer.flags.c_contiguous or buffer.size < chunk.nbytes:
            raise PackingError(f"a chunk of {chunk.nbytes} bytes does not lie in {buffer.dtype} {list(buffer.shape)}")
        raw = buffer[: chunk.nbytes].reshape(-1, self.format.tile_nbytes(self.tile.nr, self.K))
        return self.format.view(raw, self.tile.nr, self.K)


def part_of_tiles(raw: Bytes, start: int, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
    """Return a view `[T, *shape]` of the part that begins at byte `start` of each tile; `raw` is `[T, tile_nbytes]`."""
    end = start + math.prod(shape) * np.dtype(dtype).itemsize
    return raw[:, start:end].view(dtype).reshape(len(raw), *shape)
