"""bf16: bfloat16 weights, the upper half of a float32, two bytes each.

The whole format in one module. Leaves to others: where chunks are cut (`layout`), which numpy call multiplies for how
many rows of x (`product`).
Read more: tutorial 02; clauses PACK-16, PACK-23, PACK-26.

    tile    nr = 16 rows of K bfloat16, an odd K padded with a zero, read as words of 32 bits:

            | w[0,1] w[0,0] | w[0,3] w[0,2] | ...    the high half of a word is an odd column, the low half the even
              high     low                           one before it

numpy has no bfloat16. A mask turns each word into its odd column as float32, a shift into its even one, both exactly.
They are not put back in order: x is split into odd and even columns instead.
Error bound: no error if weights are stored as bfloat16; others are rounded to nearest, |w - w'| <= 2^-8 |w| unless w is
subnormal (so small that float32 itself has fewer digits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, IntArray, bf16_to_f32, f32_to_bf16, stored_to_f32
from refinfer.errors import PackingError
from refinfer.packing.layout import Bytes, PackedLayout, TileShape
from refinfer.packing.product import FEW_ROWS, GemmScratch, Product, rows_at_once

name: Final = "bf16"
chunk_nbytes: Final = 2 << 20
nanoseconds_per_byte: Final[Mapping[int, float]] = {1: 0.164, 8: 0.225, 64: 0.784, 256: 1.923}
copies: Final = 4.6

_ROWS: Final = 16
_APART: Final = 64  # floats between two scratch arrays: more than the 64 bytes that a processor loads at once
_MASK: Final = np.array(0xFFFF0000, np.uint32)
_SHIFT: Final = np.array(16, np.uint32)

Words: TypeAlias = npt.NDArray[np.uint32]


class Tiles(NamedTuple):
    """The rows of a chunk as words `[T * nr, ceil(K / 2)]`, and K, which may be odd."""

    words: Words
    K: int


def tile_shape(N: int, K: int) -> TileShape:
    """Return tiles of 16 rows of an even number of columns."""
    return TileShape(nr=_ROWS, kr=K + K % 2)


def tile_nbytes(nr: int, K: int) -> int:
    """Return the bytes of a tile."""
    return nr * 2 * (K + K % 2)


def view(raw: Bytes, nr: int, K: int) -> Tiles:
    """Return tiles as a view of rows of words."""
    return Tiles(raw.reshape(-1).view(np.uint32).reshape(raw.shape[0] * nr, -1), K)


def pack(rows: npt.NDArray[Any], tiles: Tiles, first: int) -> None:
    """Round rows `[n, K]`, as stored, into n rows of `tiles` from row `first` on.

    Raises:
        PackingError: a finite weight is too large for bfloat16.
    """
    bits = rows if rows.dtype == np.uint16 else f32_to_bf16(stored_to_f32(rows))
    if rows.dtype != np.uint16 and np.count_nonzero(bits & 0x7FFF == 0x7F80) > np.count_nonzero(np.isinf(rows)):
        raise PackingError("a weight is too large for bfloat16; use f32")
    np.copyto(tiles.words.view(np.uint16)[first : first + len(rows), : tiles.K], bits)


def unpack_rows(tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
    """Return float32 rows: row i is in lane `lane[i]` of tile `which[i]`."""
    return bf16_to_f32(tiles.words[which * _ROWS + lane].view(np.uint16)[:, : tiles.K])


def start(x: Float32Array, scratch: GemmScratch) -> tuple[Product] | tuple[Product, Product]:
    """Return a `Product` for the odd columns of x and one for the even; for many rows, one for odd, then even ones.

    An odd K is padded with a column of zeros, as its weights are.
    """
    M, K = x.shape
    half = (K + 1) // 2
    columns = scratch.take(2, M, half) if M <= FEW_ROWS else scratch.take(M, 2, half).transpose(1, 0, 2)
    odd, even = columns
    np.copyto(even, x[:, 0::2])
    np.copyto(odd[:, : K // 2], x[:, 1::2])
    odd[:, K // 2 :] = 0
    if M <= FEW_ROWS:
        return Product(odd, scratch), Product(even, scratch)
    return (Product(columns.transpose(1, 0, 2).reshape(M, 2 * half), scratch),)


def multiply(products: tuple[Product] | tuple[Product, Product], tiles: Tiles, out: Float32Array) -> None:
    """Write the outputs of a chunk of R rows, `[M, R]`, widening `step` rows at a time."""
    words, R = tiles.words, out.shape[1]
    step = min(R, rows_at_once(products[0].M, _ROWS, tiles.K))
    if len(products) == 1:
        _multiply_many(products[0], words, out, step)
    else:
        _multiply_few(*products, words, out, step)


def _multiply_few(by_odd: Product, by_even: Product, words: Words, out: Float32Array, step: int) -> None:
    """Widen odd and even columns into one array each, and add the two products."""
    take, half, R = by_odd.scratch.take, words.shape[1], out.shape[1]
    # If both arrays began at the same place in a page, the processor would mistake one for the other, and wait.
    odd, _, even, more = take(step, half), take(_APART), take(step, half), take(by_odd.M, R)
    odd_bits, even_bits = odd.view(np.uint32), even.view(np.uint32)
    for n in range(0, R, step):
        part = words[n : min(n + step, R)]
        if (rows := len(part)) < step:
            odd, even, odd_bits, even_bits = odd[:rows], even[:rows], odd_bits[:rows], even_bits[:rows]
        np.bitwise_and(part, _MASK, out=odd_bits)
        np.left_shift(part, _SHIFT, out=even_bits)
        by_odd.rows(odd, out[:, n : n + step])
        by_even.rows(even, more[:, n : n + step])
    np.add(out, more, out=out)


def _multiply_many(product: Product, words: Words, out: Float32Array, step: int) -> None:
    """Widen all odd columns, then all even ones, into one array, and multiply once."""
    half, R = words.shape[1], out.shape[1]
    wide = product.scratch.take(step, 2 * half)
    bits = wide.view(np.uint32)
    for n in range(0, R, step):
        part = words[n : min(n + step, R)]
        np.bitwise_and(part, _MASK, out=bits[: len(part), :half])
        np.left_shift(part, _SHIFT, out=bits[: len(part), half:])
        product.rows(wide[: len(part)], out[:, n : n + step])


def scratch_floats(layout: PackedLayout, M: int) -> int:
    """Return how many floats of scratch a product takes: x in two halves, `step` widened rows, what numpy calls need.

    With few rows of x there are also a second output, the gap between two arrays, and a `Product` for each half. The
    two use the same memory for their outputs, one after the other.
    """
    rows, half = layout.most_rows, (layout.K + 1) // 2
    step = min(rows, rows_at_once(M, _ROWS, layout.K))
    halves = 2 * half * (M + step)
    if M > FEW_ROWS:
        return halves + Product.scratch_floats(M, 2 * half, step)
    products = Product.scratch_floats(M, half, step) + Product.scratch_floats(M, half, 0)
    return halves + M * rows + _APART + products
