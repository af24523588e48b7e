"""f32: float32 weights, as they are.

The whole format in one module. Leaves to others: where chunks are cut (`layout`), which numpy call multiplies for how
many rows of x (`product`).
Read more: tutorial 02; clauses PACK-16, PACK-23.

    tile    nr = 16 rows of K float32     w[0,0] w[0,1] ... w[0,K-1] w[1,0] ...      rows whole, nothing padded

BLAS multiplies such rows in place, so a product needs no copy of a weight.
Error bound: no error, every float32, float16 and bfloat16 weight is kept exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, IntArray, bf16_to_f32
from refinfer.packing.layout import Bytes, PackedLayout, TileShape
from refinfer.packing.product import GemmScratch, Product

name: Final = "f32"
chunk_nbytes: Final = 4 << 20
nanoseconds_per_byte: Final[Mapping[int, float]] = {1: 0.066, 8: 0.093, 64: 0.295, 256: 0.840}
copies: Final = 0.0

_ROWS: Final = 16


def tile_shape(N: int, K: int) -> TileShape:
    """Return tiles of 16 whole rows."""
    return TileShape(nr=_ROWS, kr=K)


def tile_nbytes(nr: int, K: int) -> int:
    """Return the bytes of a tile."""
    return nr * 4 * K


def view(raw: Bytes, nr: int, K: int) -> Float32Array:
    """Return T tiles as a view of rows `[T * nr, K]`: nothing lies between rows, so a chunk is one matrix."""
    return raw.reshape(-1).view(np.float32).reshape(-1, K)


def pack(rows: npt.NDArray[Any], tiles: Float32Array, first: int) -> None:
    """Copy rows `[n, K]`, as stored, to n rows of `tiles` from row `first` on."""
    target = tiles[first : first + len(rows)]
    if rows.dtype == np.uint16:
        bf16_to_f32(rows, out=target)
    else:
        np.copyto(target, rows)


def unpack_rows(tiles: Float32Array, which: IntArray, lane: IntArray) -> Float32Array:
    """Return float32 rows: row i is in lane `lane[i]` of tile `which[i]`."""
    rows: Float32Array = tiles[which * _ROWS + lane]
    return rows


def start(x: Float32Array, scratch: GemmScratch) -> Product:
    """Return x, ready for the numpy call that suits its number of rows."""
    return Product(x, scratch)


def multiply(product: Product, tiles: Float32Array, out: Float32Array) -> None:
    """Write the outputs of a chunk of R rows, `[M, R]`: one product with all of them."""
    R = out.shape[1]
    product.rows(tiles if len(tiles) == R else tiles[:R], out)


def scratch_floats(layout: PackedLayout, M: int) -> int:
    """Return how many floats of scratch a product takes: what the numpy call needs for a whole chunk."""
    return Product.scratch_floats(M, layout.K, layout.most_rows)
