"""The matmul core: `x @ W.T` with a packed W, chunk by chunk; and single rows of W.

Takes the tiles of each chunk from an iterator, so that a chunk may be in memory, mapped, or still arriving. Leaves to
others: how a chunk is multiplied (the format's module), where chunks lie, biases, models.
Read more: tutorial 02; clauses PACK-18, PACK-23 to PACK-29.

Two laws. First, no call into BLAS spans two chunks, and the calls for a chunk depend on M and that chunk alone. So a
product is the same, to the bit, wherever its chunks lie. Second, all scratch is reserved before a product begins
(`scratch_floats`): weights are widened into it a few rows at a time, never the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from refinfer.arrays import Float32Array, IntArray, require_rows
from refinfer.errors import PackingError
from refinfer.packing.layout import PackedLayout, Tiles
from refinfer.packing.product import FEW_ROWS, GEMM_CONFIG, GemmScratch

__all__ = ["UNPACKED_AT_ONCE", "matmul", "scratch_floats", "unpack_rows"]

_F32: Final = np.dtype(np.float32)  # comparing with it is quicker than with np.float32
UNPACKED_AT_ONCE: Final = 16
"""How many rows `unpack_rows` unpacks at a time; a memory budget counts the memory they take."""

# the numbers of rows of x at which a call, or a format's own way, is used for the last time
_EDGES: Final = (1, FEW_ROWS, int(GEMM_CONFIG[-2].most_rows))


def scratch_floats(layouts: Iterable[PackedLayout], most_rows: int) -> int:
    """Return how many floats of scratch are enough for products of up to `most_rows` rows of x with any of `layouts`.

    As long as the numpy call stays the same, more rows take more scratch. So only the largest number of rows of each
    call is tried.
    """
    edges = {min(most_rows, edge) for edge in (*_EDGES, most_rows)}
    return max((layout.format.scratch_floats(layout, M) for layout in layouts for M in edges), default=0)


# --8<-- [start:matmul]
def matmul(
    x: Float32Array,
    layout: PackedLayout,
    tiles: Iterable[Tiles],
    out: Float32Array | None = None,
    scratch: GemmScratch | None = None,
) -> Float32Array:
    """Return `x @ W.T`, `[M, K]` to `[M, N]`; reads each packed byte once.

    Args:
        x: float32, any strides.
        layout: how the weights are packed.
        tiles: the tiles of each chunk in order, such as `PackedMatrix.tiles`; each is used before the next is asked
            for.
        out: where to write, contiguous; None makes a new array.
        scratch: at least `scratch_floats([layout], M)` floats; None reserves them for this product alone.

    Raises:
        PackingError: shapes or types do not match, or the scratch is too small.
        ValueError: `tiles` has more or fewer items than there are chunks.
    """
    out = _checked(x, layout, out)
    scratch = scratch or GemmScratch(scratch_floats([layout], len(x)))
    scratch.reset()
    start, multiply = layout.format.start, layout.format.multiply
    operand = start(np.ascontiguousarray(x), scratch)
    used = scratch.used
    for chunk, of_chunk in zip(layout.chunks, tiles, strict=True):
        multiply(operand, of_chunk, out[:, chunk.first_row : chunk.first_row + chunk.n_rows])
        scratch.reset(used)
    return out


# --8<-- [end:matmul]


def _checked(x: Float32Array, layout: PackedLayout, out: Float32Array | None) -> Float32Array:
    """Check the shapes and types of x and `out`, and return `out`, or a new array if it is None."""
    if x.dtype != _F32 or x.ndim != 2 or x.shape[1] != layout.K or not len(x):
        raise PackingError(f"x must be float32 [M, {layout.K}] with M of at least 1, not {x.dtype} {list(x.shape)}")
    shape = (len(x), layout.N)
    if out is None:
        return np.empty(shape, np.float32)
    if out.dtype != _F32 or out.shape != shape or not out.flags.c_contiguous:
        raise PackingError(f"out must be contiguous float32 {list(shape)}, not {out.dtype} {list(out.shape)}")
    return out


def unpack_rows(
    ids: IntArray, layout: PackedLayout, tiles_of: Callable[[Sequence[int]], Iterable[Tiles]]
) -> Float32Array:
    """Return the rows `ids` of a packed matrix as float32 `[len(ids), K]`.

    Args:
        ids: numbers of rows, in any order.
        layout: how the weights are packed.
        tiles_of: called once, with the numbers of the chunks that hold these rows; returns the tiles of each, in the
            same order.

    Raises:
        RequestError: there is no such row.
    """
    require_rows(ids, layout.N)
    out = np.empty((len(ids), layout.K), np.float32)
    chunk_of = np.searchsorted([chunk.first_row for chunk in layout.chunks], ids, side="right") - 1
    needed = np.unique(chunk_of).tolist()
    for number, tiles in zip(needed, tiles_of(needed), strict=True):
        here = np.flatnonzero(chunk_of == number)
        for first in range(0, len(here), UNPACKED_AT_ONCE):
            some = here[first : first + UNPACKED_AT_ONCE]
            which, lane = np.divmod(ids[some] - layout.chunks[number].first_row, layout.tile.nr)
            out[some] = layout.format.unpack_rows(tiles, which, lane)
    return out
