"""The numpy matmul core: `x @ W.T` and single rows of W, over packed weights, chunk by chunk.

Takes the tiles of each chunk from an iterator, so that a chunk may be in memory, mapped, or still arriving. Leaves to
others: how a chunk is multiplied (the format's page), where chunks lie, biases, models.
Read more: tutorial 02; clauses PACK-18, PACK-23 to PACK-29.

Two laws. No call into BLAS spans two chunks, and the calls inside a chunk depend on M and that chunk alone: so a
product has the same bits wherever its chunks lie. Scratch memory is reserved beforehand (`scratch_floats`): weights are
widened into it a few rows at a time, never as a whole.
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
"""Rows that `unpack_rows` takes from a chunk at a time: a budget counts the memory for them."""

_EDGES: Final = (1, FEW_ROWS, int(GEMM_CONFIG[-2].most_rows))


def scratch_floats(layouts: Iterable[PackedLayout], most_rows: int) -> int:
    """Return the floats of scratch that suffice for products of up to `most_rows` rows with any of `layouts`.

    Within the reach of one call more rows take more scratch, so only the edges of the calls are asked for.
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
        scratch: of at least `scratch_floats`; None makes it for this product.

    Raises:
        PackingError: shapes or types do not match, or the scratch is too small.
        ValueError: there are more or fewer tiles than chunks.
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
    """Check the shapes and types of x and `out`, and return `out`, made if need be."""
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
        tiles_of: returns the tiles of the chunks with these numbers, in order; only chunks that hold a row are asked
            for, each once.

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
