"""bf16: bfloat16 weights, the upper half of a float32, two bytes each.

The whole format on one page. Leaves to others: where chunks are cut (`layout`), which numpy call multiplies for how
many rows of x (`product`).
Read more: tutorial 02; clauses PACK-16, PACK-23, PACK-26.

    tile    nr = 16 rows of K bfloat16, an odd K padded with a zero, read as words of 32 bits:

            | w[0,1] w[0,0] | w[0,3] w[0,2] | ...    the high half of a word is an odd column, the low half the even
              high     low                           one before it

numpy has no bfloat16. A mask of a word gives its odd column as float32, a shift its even one: two passes, exact, and
no interleaving, because x is split into odd and even columns instead.
Error bound: none for bfloat16 checkpoints; other weights are rounded to nearest, |w - w'| <= 2^-8 |w|
unless w is subnormal.
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
nanoseconds_per_byte: Final[Mapping[int, float]] = {1: 0.152, 8: 0.199, 64: 0.783, 256: 2.084}

_ROWS: Final = 16
_APART: Final = 64  # floats between two scratch arrays: a cache line or more
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
    """See tiles as rows of words."""
    return Tiles(raw.reshape(-1).view(np.uint32).reshape(raw.shape[0] * nr, -1), K)


def pack(rows: npt.NDArray[Any], tiles: Tiles) -> None:
    """Round rows `[n, K]`, as stored, into the first n rows of `tiles`.

    Raises:
        PackingError: a finite weight is too large for bfloat16.
    """
    bits = rows if rows.dtype == np.uint16 else f32_to_bf16(stored_to_f32(rows))
    if rows.dtype != np.uint16 and np.count_nonzero(bits & 0x7FFF == 0x7F80) > np.count_nonzero(np.isinf(rows)):
        raise PackingError("a weight is too large for bfloat16; use f32")
    np.copyto(tiles.words.view(np.uint16)[: len(rows), : tiles.K], bits)


def unpack_rows(tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
    """Return the rows in lanes `lane` of tiles `which`."""
    return bf16_to_f32(tiles.words[which * _ROWS + lane].view(np.uint16)[:, : tiles.K])


def start(x: Float32Array, scratch: GemmScratch) -> tuple[Product] | tuple[Product, Product]:
    """Return products with the odd and with the even columns of x; for many rows, one product with odd, then even.

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
    """Write the outputs of one chunk, `[M, R]`, widening `step` rows at a time."""
    words, R = tiles.words, out.shape[1]
    step = min(R, rows_at_once(products[0].M, _ROWS, tiles.K))
    if len(products) == 1:
        _multiply_many(products[0], words, out, step)
    else:
        _multiply_few(*products, words, out, step)


def _multiply_few(by_odd: Product, by_even: Product, words: Words, out: Float32Array, step: int) -> None:
    """Widen odd and even columns into an array each, and add their products."""
    take, half, R = by_odd.scratch.take, words.shape[1], out.shape[1]
    # The two arrays lie somewhat apart: the same place of two pages would make loads wait for stores.
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
    """Return the floats of scratch: x in two halves, `step` widened rows, what the products want for themselves.

    With few rows of x there are also a second output, a gap between two arrays, and a product for each half; these
    two take the memory for their outputs in turn.
    """
    rows, half = layout.most_rows, (layout.K + 1) // 2
    step = min(rows, rows_at_once(M, _ROWS, layout.K))
    halves = 2 * half * (M + step)
    if M > FEW_ROWS:
        return halves + Product.scratch_floats(M, 2 * half, step)
    products = Product.scratch_floats(M, half, step) + Product.scratch_floats(M, half, 0)
    return halves + M * rows + _APART + products
