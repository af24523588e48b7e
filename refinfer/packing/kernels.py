"""What a chunk of each format does to one product: weights widened a few rows at a time, then multiplied.

Knows: the tiles of each format, and which numpy operations widen them in few passes. Does not know: where chunks lie.
Spec: PACK-23, PACK-26. Tutorial: 02.

A kernel writes the outputs of one chunk, `[M, n_rows]`. Its scratch is taken anew for each chunk, as many floats as
`floats_for` says; what all chunks share of x is made once, by `parts_of`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refinfer.arrays import Float32Array, bf16_to_f32
from refinfer.packing.formats import PackedLayout, Tiles, half_blocks
from refinfer.packing.product import GEMM_CONFIG, Product
from refinfer.packing.quantized import BLOCK

__all__ = ["KERNELS", "floats_for", "parts_of"]

_FEW: Final = 16
"""Up to this many rows of x, widening weights costs more than multiplying them."""

_CACHED_FLOATS: Final = 1 << 17
"""Weights widened at a time for few rows of x: half a megabyte, which stays in a core's second-level cache."""

_MANY_FLOATS: Final = 1 << 20
"""The same for many rows of x: as many as BLAS needs to be efficient."""

_LEAST_ROWS: Final = 16  # of an int4 tile, widened for many rows of x however long they are
_APART: Final = 64  # floats between two scratch arrays: a cache line or more

_MASK: Final = np.array(0xFFFF0000, np.uint32)
_SHIFT: Final = np.array(16, np.uint32)
_LOW: Final = np.array(15, np.uint8)
_HIGH: Final = np.array(0xF0, np.uint8)
_FOUR: Final = np.array(4, np.uint8)


def parts_of(product: Product, layout: PackedLayout) -> tuple[Any, ...]:
    """Derive from x what the chunks of `layout` want of it besides x itself."""
    if layout.format.name == "int4":
        return _int4_parts(product, layout.K)
    if layout.format.name != "bf16":
        product.take_columns()
        return ()
    parts = _bf16_parts(product, layout.K)
    for part in parts:
        part.take_columns()
    return parts


def floats_for(layout: PackedLayout, M: int) -> int:
    """Return how many floats of scratch products of M rows with `layout` take."""
    K, nr, rows = layout.K, layout.tile.nr, max(chunk.n_rows for chunk in layout.chunks)
    if layout.format.name == "int4":
        B = 2 * half_blocks(K)
        x_and_scales = M * B * (BLOCK + 1) + B * nr
        if M <= _FEW:
            return x_and_scales + 2 * max(_CACHED_FLOATS, BLOCK * nr) + (B + 2) * M * nr + 1
        return x_and_scales + 2 * max(_MANY_FLOATS, B * BLOCK * _LEAST_ROWS) + 1
    whole_chunk = -(-rows // nr) * nr * K
    widened = min(whole_chunk, max(nr * K, _CACHED_FLOATS if M <= _FEW else _MANY_FLOATS))
    x = M * (K + 1) + M * min(rows, widened // K + nr) if 1 < M <= GEMM_CONFIG[-2].most_rows else 0
    if layout.format.name == "f32":
        return x + M * rows if x else 0
    if layout.format.name == "int8":
        return widened + x
    return widened + widened // K + x + 2 * M * (K + 1) + M * rows + nr + _APART


def _f32(product: Product, tiles: Tiles, out: Float32Array) -> None:
    w, R = tiles.f32, out.shape[1]
    product.rows(w if len(w) == R else w[:R], out)


def _rows_at_once(product: Product, tiles: Tiles) -> int:
    """Return how many rows to widen at a time: whole tiles, about as many weights as the cache holds."""
    floats = _CACHED_FLOATS if product.M <= _FEW else _MANY_FLOATS
    return max(1, floats // (tiles.K * tiles.nr)) * tiles.nr


def _bf16_parts(product: Product, K: int) -> tuple[Product, ...]:
    """Return products with the odd and with the even columns of x; for many rows, one product with both in that order.

    An odd K is padded with a column of zeros, as its weights are.
    """
    M, half = product.M, (K + 1) // 2
    columns = product.scratch.take(2, M, half) if M <= _FEW else product.scratch.take(M, 2, half).transpose(1, 0, 2)
    odd, even = columns
    np.copyto(even, product.x[:, 0::2])
    np.copyto(odd[:, : K // 2], product.x[:, 1::2])
    odd[:, K // 2 :] = 0
    if M <= _FEW:
        return Product(odd, product.scratch), Product(even, product.scratch)
    return (Product(columns.transpose(1, 0, 2).reshape(M, 2 * half), product.scratch),)


def _bf16(product: Product, tiles: Tiles, out: Float32Array) -> None:
    """Mask for the odd columns, shift for the even ones: exact, one pass each."""
    pairs, R, take = tiles.bf16_pairs, out.shape[1], product.scratch.take
    step, half = min(R, _rows_at_once(product, tiles)), pairs.shape[1]
    if product.M > _FEW:
        (both,) = product.parts
        wide = take(step, 2 * half)
        bits = wide.view(np.uint32)
        for n in range(0, R, step):
            part = pairs[n : min(n + step, R)]
            np.bitwise_and(part, _MASK, out=bits[: len(part), :half])
            np.left_shift(part, _SHIFT, out=bits[: len(part), half:])
            both.rows(wide[: len(part)], out[:, n : n + step])
        return
    by_odd, by_even = product.parts
    # Two arrays, somewhat apart: the same place of two pages would make loads wait for stores.
    odd, _, even, more = take(step, half), take(_APART), take(step, half), take(product.M, R)
    odd_bits, even_bits = odd.view(np.uint32), even.view(np.uint32)
    for n in range(0, R, step):
        part = pairs[n : min(n + step, R)]
        if (rows := len(part)) < step:
            odd, even, odd_bits, even_bits = odd[:rows], even[:rows], odd_bits[:rows], even_bits[:rows]
        np.bitwise_and(part, _MASK, out=odd_bits)
        np.left_shift(part, _SHIFT, out=even_bits)
        by_odd.rows(odd, out[:, n : n + step])
        by_even.rows(even, more[:, n : n + step])
    np.add(out, more, out=out)


# --8<-- [start:int8]
def _int8(product: Product, tiles: Tiles, out: Float32Array) -> None:
    """Widen by one copy, multiply, and scale the outputs: a scale for each row leaves the sum."""
    q, nr, K, R = tiles.int8, tiles.nr, tiles.K, out.shape[1]
    step = min(len(q), _rows_at_once(product, tiles) // nr)
    wide = product.scratch.take(step, nr, K)
    rows = wide.reshape(step * nr, K)
    for t in range(0, len(q), step):
        part = q[t : t + step]
        np.copyto(wide if len(part) == step else wide[: len(part)], part)
        start, end = t * nr, min(R, (t + len(part)) * nr)
        product.rows(rows if end - start == len(rows) else rows[: end - start], out[:, start:end])
    out *= tiles.int8_scales.reshape(-1)[:R]


# --8<-- [end:int8]


def _int4_parts(product: Product, K: int) -> tuple[Float32Array, Float32Array]:
    """Return x in blocks, `[B, M, 32]` for few rows or `[M, B * 32]` for many, and -8 times their sums `[M, B]`.

    Nibbles hold q + 8; what the 8 adds to a product is taken away through those sums.
    """
    M, B, scratch = product.M, 2 * half_blocks(K), product.scratch
    x, sums = scratch.take(B * M * BLOCK), scratch.take(M, B)
    blocks = x.reshape(B, M, BLOCK).transpose(1, 0, 2) if M <= _FEW else x.reshape(M, B, BLOCK)
    whole = K // BLOCK
    np.copyto(blocks[:, :whole], product.x[:, : whole * BLOCK].reshape(M, whole, BLOCK))
    blocks[:, whole:] = 0
    if K % BLOCK:
        blocks[:, whole, : K % BLOCK] = product.x[:, whole * BLOCK :]
    np.add.reduce(blocks, axis=2, out=sums)
    sums *= -8
    if M <= _FEW:
        x.reshape(B, M, BLOCK)[B // 2 :] /= 16  # high nibbles are masked, not shifted: they come 16 times as large
    return (x.reshape(B, M, BLOCK) if M <= _FEW else x.reshape(M, B * BLOCK)), sums


def _int4(product: Product, tiles: Tiles, out: Float32Array) -> None:
    kernel = _int4_partial_sums if product.M <= _FEW else _int4_widened
    used = product.scratch.used
    for t in range(len(tiles.raw)):
        kernel(product, tiles, t, out[:, t * tiles.nr : (t + 1) * tiles.nr])
        product.scratch.reset(used)


def _int4_partial_sums(product: Product, tiles: Tiles, t: int, out: Float32Array) -> None:
    """Multiply nibble by nibble, block by block, and scale the partial sums: they are 1/32 of the weights."""
    take, M, nr = product.scratch.take, product.M, tiles.nr
    nibbles, (x, sums) = tiles.nibbles[t], product.parts
    half = len(nibbles)
    scales = bf16_to_f32(tiles.int4_scales[t], take(2 * half, nr))
    step = min(half, max(1, _CACHED_FLOATS // (BLOCK * nr)))
    wide, partial = take(step, BLOCK, nr), take(2 * half, M, nr)
    plane = take(step * BLOCK * nr // 4 + 1).view(np.uint8)[: step * BLOCK * nr].reshape(step, BLOCK, nr)
    for b in range(0, half, step):
        part = nibbles[b : b + step]
        n = len(part)
        for first, mask in ((b, _LOW), (half + b, _HIGH)):
            np.bitwise_and(part, mask, out=plane[:n])
            np.copyto(wide[:n], plane[:n])
            np.matmul(x[first : first + n], wide[:n], out=partial[first : first + n])
    partial *= scales[:, None]
    total = np.add.reduce(partial, axis=0, out=take(M, nr))
    total += np.matmul(sums, scales, out=take(M, nr))
    np.copyto(out, total[:, : out.shape[1]])


def _int4_widened(product: Product, tiles: Tiles, t: int, out: Float32Array) -> None:
    """Widen and scale whole columns, some rows of weights at a time, and multiply once."""
    take, nr = product.scratch.take, tiles.nr
    nibbles, (x, _) = tiles.nibbles[t], product.parts
    half = len(nibbles)
    B = 2 * half
    scales = bf16_to_f32(tiles.int4_scales[t], take(B, nr))
    step = min(nr, max(_LEAST_ROWS, _MANY_FLOATS // (B * BLOCK)))
    plane, wide = take(half * BLOCK * step // 4 + 1).view(np.int8), take(B * BLOCK * step)
    for n in range(0, out.shape[1], step):
        part = nibbles[..., n : n + step]
        width = part.shape[2]
        q = plane[: part.size].reshape(part.shape)
        w = wide[: B * BLOCK * width].reshape(B, BLOCK, width)
        for rows, split, operand in ((w[:half], np.bitwise_and, _LOW), (w[half:], np.right_shift, _FOUR)):
            split(part, operand, out=q.view(np.uint8))
            q -= 8
            np.copyto(rows, q)
        w *= scales[:, None, n : n + width]
        target = out[:, n : n + width]
        np.matmul(x, w.reshape(B * BLOCK, width)[:, : target.shape[1]], out=target)


KERNELS: Final = MappingProxyType({"f32": _f32, "bf16": _bf16, "int8": _int8, "int4": _int4})
