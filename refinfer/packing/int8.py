"""int8: one byte q for each weight, one float32 scale s for each row; the weight is about q s.

The whole format in one module. Leaves to others: where chunks are cut (`layout`), which numpy call multiplies for how
many rows of x (`product`).
Read more: tutorial 03; clauses PACK-10, PACK-12, PACK-13, PACK-16, PACK-23, PACK-26, PACK-32.

    tile    nr = 16 rows of K bytes       q[0,0] q[0,1] ... q[0,K-1] q[1,0] ...     rows whole: widened by one copy
            nr float32 scales             s[0] ... s[15]                            applied to the outputs

To quantise is to find q and s for given weights w. numpy multiplies integers without BLAS, which is slow, so a few rows
at a time are widened to float32. All weights of a row share a scale, so it can be taken out of the sum:
(q s) . x = s (q . x), one multiplication for each output instead of one for each weight.
Error bound: |w - q s| <= s / 2, plus one float32 rounding; s is the largest weight of the row divided by 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, IntArray, stored_to_f32
from refinfer.errors import PackingError
from refinfer.packing.layout import Bytes, PackedLayout, TileShape, part_of_tiles
from refinfer.packing.product import GemmScratch, Product, rows_at_once

name: Final = "int8"
chunk_nbytes: Final = 1 << 20
nanoseconds_per_byte: Final[Mapping[int, float]] = {1: 0.268, 8: 0.329, 64: 1.183, 256: 3.477}
copies: Final = 3.1

Int8Array: TypeAlias = npt.NDArray[np.int8]

_ROWS: Final = 16
_SMALLEST_SCALE: Final = float(np.finfo(np.float32).tiny)  # smaller float32 numbers have fewer digits


# --8<-- [start:quantize]
def quantize(w: Float32Array) -> tuple[Int8Array, Float32Array]:
    """Return `q` `[N, K]` from -127 to 127 and the scales `[N]` with `|w - q * s| <= s / 2`; zero rows get scale 1.

    The scale of a row makes its largest weight, without its sign, 127 steps long. If this is too small for a float32,
    `usable_scales` gives the row scale 1. A weight goes to the nearest step, and from the middle to an even one.

    Raises:
        PackingError: `w` is not a float32 matrix (`require_matrix`), or holds NaN or infinity (`usable_scales`).
    """
    # lab 03: find each row's scale, and the whole number of steps nearest to each weight
    require_matrix(w)
    largest = np.maximum.reduce(np.abs(w), axis=1)
    scales = usable_scales(largest / np.float32(127), largest)
    return np.rint(w / scales[:, None]).astype(np.int8), scales
    # end lab


# --8<-- [end:quantize]


def dequantize(q: Int8Array, scales: Float32Array) -> Float32Array:
    """Return `q * s` `[N, K]`: the weights that a product with int8 uses."""
    return q * scales[:, None]


def require_matrix(w: Float32Array) -> None:
    """Check that `w` is a float32 matrix and not empty; raises PackingError."""
    if w.dtype != np.float32 or w.ndim != 2 or not w.size:
        raise PackingError(f"a float32 matrix is wanted, not {w.dtype} {list(w.shape)}")


def usable_scales(scales: Float32Array, largest: Float32Array) -> Float32Array:
    """Return `scales` with each that is too small for float32 replaced by 1: its weights, nearly zero, become zero.

    `largest` has the largest weight, without its sign, of those that share a scale.

    Raises:
        PackingError: one of `largest` is NaN or infinite.
    """
    if not np.isfinite(largest).all():
        raise PackingError("the weights hold NaN or infinity, which cannot be quantised")
    return np.where(scales >= _SMALLEST_SCALE, scales, np.float32(1))


class Tiles(NamedTuple):
    """The weights `[T, nr, K]` and the scales `[T, nr]` of the T tiles of a chunk."""

    q: Int8Array
    scales: Float32Array


def tile_shape(N: int, K: int) -> TileShape:
    """Return tiles of 16 whole rows."""
    return TileShape(nr=_ROWS, kr=K)


def tile_nbytes(nr: int, K: int) -> int:
    """Return the bytes of a tile."""
    return nr * (K + 4)


def view(raw: Bytes, nr: int, K: int) -> Tiles:
    """Return views of the weights and of the scales of tiles."""
    return Tiles(part_of_tiles(raw, 0, np.int8, nr, K), part_of_tiles(raw, nr * K, np.float32, nr))


def pack(rows: npt.NDArray[Any], tiles: Tiles, first: int) -> None:
    """Quantise rows `[n, K]`, as stored, into n lanes of `tiles` from lane `first` on.

    Lanes count over all tiles: lane 16 is the first of tile 1. All other lanes stay as they are.

    Raises:
        PackingError: a weight is NaN or infinite.
    """
    rows = stored_to_f32(rows)
    # lab 03: quantise the rows, and put each with its scale into its lane
    which, lane = np.divmod(np.arange(first, first + len(rows)), _ROWS)
    tiles.q[which, lane], tiles.scales[which, lane] = quantize(rows)
    # end lab


def unpack_rows(tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
    """Return float32 rows: row i is in lane `lane[i]` of tile `which[i]`."""
    return dequantize(tiles.q[which, lane], tiles.scales[which, lane])


def start(x: Float32Array, scratch: GemmScratch) -> Product:
    """Return x, ready for the numpy call that suits its number of rows."""
    return Product(x, scratch)


# --8<-- [start:multiply]
def multiply(product: Product, tiles: Tiles, out: Float32Array) -> None:
    """Write the outputs of a chunk of R rows, `[M, R]`: widen some tiles by one copy, multiply, scale the outputs.

    The T tiles have `T * nr` lanes, of which the first R are rows. `product.rows(w, out)` multiplies with float32 rows.
    `product.scratch.take` reserves memory to widen into: for T tiles at most, and for `rows_at_once` rows at most.
    Nothing else of this size is allocated. Scales are applied once for each output, after its sum.
    """
    # lab 04: widen some tiles at a time into scratch, multiply, and scale the outputs
    q, R = tiles.q, out.shape[1]
    _, nr, K = q.shape
    step = min(len(q), rows_at_once(product.M, nr, K) // nr)
    wide = product.scratch.take(step, nr, K)
    rows = wide.reshape(step * nr, K)
    for t in range(0, len(q), step):
        part = q[t : t + step]
        np.copyto(wide if len(part) == step else wide[: len(part)], part)
        first, end = t * nr, min(R, (t + len(part)) * nr)
        product.rows(rows if end - first == len(rows) else rows[: end - first], out[:, first:end])
    out *= tiles.scales.reshape(-1)[:R]
    # end lab


# --8<-- [end:multiply]


def scratch_floats(layout: PackedLayout, M: int) -> int:
    """Return how many floats of scratch a product takes: the tiles widened at a time, and what the numpy call needs."""
    rows = layout.most_rows
    widened = min(-(-rows // _ROWS) * _ROWS, rows_at_once(M, _ROWS, layout.K))
    return widened * layout.K + Product.scratch_floats(M, layout.K, min(rows, widened))
