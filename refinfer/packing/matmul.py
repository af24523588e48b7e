"""The numpy matmul core: `x @ W.T` over packed weights, chunk by chunk.

Knows: which numpy call suits which format and how many rows of x; BLAS is our micro-kernel. Does not know: where the
chunks lie, biases, models.
Spec: PACK-23 to PACK-29. Tutorial: 02.

Laws: no call into BLAS spans two chunks, and the calls inside a chunk depend on M and that chunk alone. So a product
has the same bits wherever its chunks lie and in whichever order they arrive. Scratch memory is reserved before, as
much as `scratch_floats` says; weights are widened into it a few rows at a time, never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refinfer.arrays import Float32Array, aligned_empty, bf16_to_f32
from refinfer.errors import PackingError
from refinfer.packing.formats import Bytes, PackedLayout, PackedMatrix, Tiles, half_blocks
from refinfer.packing.layout import Chunk
from refinfer.packing.quantized import BLOCK

__all__ = [
    "GEMM_CONFIG",
    "Call",
    "GemmScratch",
    "Product",
    "call_for",
    "matmul",
    "multiply_chunk",
    "scratch_floats",
    "start_product",
]


@dataclass(frozen=True, slots=True)
class Call:
    """How rows of float32 weights are multiplied with up to `most_rows` rows of x, and why so."""

    name: str
    most_rows: float
    reason: str


GEMM_CONFIG: Final = (
    Call("dot", 1, "a matrix times a vector streams its weights at the speed of memory: nothing to gain"),
    Call("tiles", 16, "OpenBLAS has a path for small matrices that packs nothing: 2 to 3 times as fast as one call"),
    Call("weights-first", 127, "W @ x.T lets the larger operand be the one that BLAS walks through: 1.1 to 1.4 times"),
    Call("whole", float("inf"), "BLAS packs both operands itself and reaches its peak: a plain call"),
)
"""Which call for how many rows of x; `refinfer bench matmul` measures each."""

_SMALL_MATMUL: Final = 1_000_000
"""OpenBLAS takes its small-matrix path while M * rows * K stays below this; measured, its source names 10^6 too."""

_FEW: Final = 16
"""Up to this many rows of x, widening weights costs more than multiplying them."""

_CACHED_FLOATS: Final = 1 << 17
"""Weights widened at a time for few rows of x: half a megabyte, which stays in a core's second-level cache."""

_MANY_FLOATS: Final = 1 << 20
"""The same for many rows of x: as many as BLAS needs to be efficient."""

_LEAST_ROWS: Final = 16
_APART: Final = 64

_MASK: Final = np.array(0xFFFF0000, np.uint32)
_SHIFT: Final = np.array(16, np.uint32)
_LOW: Final = np.array(15, np.uint8)
_HIGH: Final = np.array(0xF0, np.uint8)
_FOUR: Final = np.array(4, np.uint8)


@lru_cache(maxsize=256)
def tile_rows(M: int, K: int) -> int:
    """Return how many rows of weights one call by tiles takes; 0 where no number of at least 4 is small enough."""
    return next((rows for rows in (16, 8, 4) if M * rows * K < _SMALL_MATMUL), 0)


@lru_cache(maxsize=256)
def call_for(M: int, K: int) -> Call:
    """Return the entry of `GEMM_CONFIG` for M rows of x."""
    call = next(call for call in GEMM_CONFIG if call.most_rows >= M)
    return GEMM_CONFIG[2] if call.name == "tiles" and not tile_rows(M, K) else call


class GemmScratch:
    """Reserved memory for one product at a time: `take` hands out pieces, `reset` takes all of them back."""

    def __init__(self, floats: int) -> None:
        self._arena = aligned_empty((floats,))
        self._used = 0

    @property
    def nbytes(self) -> int:
        """The bytes reserved."""
        return self._arena.nbytes

    def take(self, *shape: int) -> Float32Array:
        """Return an uninitialised float32 array; raises PackingError when the scratch is too small."""
        size = 1
        for n in shape:
            size *= n
        start, self._used = self._used, self._used + size
        if self._used > self._arena.size:
            raise PackingError(f"{self._used} floats of scratch are needed, {self._arena.size} are reserved")
        return self._arena[start : self._used].reshape(shape)

    def reset(self, used: int = 0) -> None:
        """Take back everything handed out since `used` floats were in use."""
        self._used = used

    @property
    def used(self) -> int:
        """How many floats are handed out."""
        return self._used


def scratch_floats(layouts: Iterable[PackedLayout], most_rows: int) -> int:
    """Return how many floats of scratch suffice for products of up to `most_rows` rows with any of `layouts`."""
    edges = {min(most_rows, m) for m in (1, 16, 127, most_rows)}
    return max((_floats_for(layout, M) for layout in layouts for M in edges), default=0)


def _floats_for(layout: PackedLayout, M: int) -> int:
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
    return widened + widened // K + x + 2 * M * (K + 1) + M * rows + nr + _APART


class Product:
    """One product under way: x, what was derived from it for every chunk, and the scratch behind both."""

    __slots__ = ("M", "call", "columns", "parts", "scratch", "x", "x1")

    def __init__(self, x: Float32Array, scratch: GemmScratch) -> None:
        self.x = x
        self.M = len(x)
        self.x1 = x[0]
        self.call = call_for(self.M, x.shape[1]).name
        self.scratch = scratch
        self.columns = x.T  # contiguous after `take_columns`
        self.parts: tuple[Any, ...] = ()  # what a format wants of x

    def rows(self, w: Float32Array, out: Float32Array) -> None:
        """Multiply with some rows of float32 weights: `out` `[M, R]` becomes `x @ w.T`."""
        if self.call == "dot":
            np.dot(w, self.x1, out=out[0])
        elif self.call == "tiles":
            self._by_tiles(w, out)
        elif self.call == "whole":
            np.matmul(self.x, w.T, out=out)
        else:
            before = self.scratch.used
            columns = self.scratch.take(w.shape[0], self.M)
            np.matmul(w, self.columns, out=columns)
            np.copyto(out, columns.T)
            self.scratch.reset(before)

    def take_columns(self) -> None:
        """Transpose x once for all chunks, where weights go first."""
        if self.call == "weights-first":
            self.columns = self.scratch.take(self.x.shape[1], self.M)
            np.copyto(self.columns, self.x.T)

    def _by_tiles(self, w: Float32Array, out: Float32Array) -> None:
        (R, K), M = w.shape, self.M
        nr = tile_rows(M, K)
        if rest := R % nr:
            np.matmul(self.x, w[R - rest :].T, out=out[:, R - rest :])
            w, out = w[: R - rest], out[:, : R - rest]
        if rest < R:
            tiles = w.reshape(-1, nr, K).transpose(0, 2, 1)
            np.matmul(self.x, tiles, out=out.reshape(M, -1, nr).transpose(1, 0, 2))


def matmul(
    x: Float32Array, packed: PackedMatrix, out: Float32Array | None = None, scratch: GemmScratch | None = None
) -> Float32Array:
    """Return `x @ W.T`, `[M, K]` to `[M, N]`; reads each packed byte once.

    Args:
        x: float32, any strides.
        packed: the weights.
        out: where to write, contiguous; a new array where it is None.
        scratch: of `scratch_floats`; made for this product where it is None.

    Raises:
        PackingError: shapes or types that do not match.
    """
    layout = packed.layout
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != layout.K or not len(x):
        raise PackingError(f"x must be float32 [M, {layout.K}] with M of at least 1, not {x.dtype} {list(x.shape)}")
    shape = (len(x), layout.N)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
        raise PackingError(f"out must be contiguous float32 {list(shape)}, not {out.dtype} {list(out.shape)}")
    if scratch is None:
        scratch = GemmScratch(scratch_floats([layout], len(x)))
    product = start_product(x, layout, scratch)
    kernel, used = _KERNELS[layout.format.name], scratch.used
    for chunk, tiles in zip(layout.chunks, packed.tiles, strict=True):
        kernel(product, tiles, out[:, chunk.first_row : chunk.first_row + chunk.n_rows])
        scratch.reset(used)
    return out


def start_product(x: Float32Array, layout: PackedLayout, scratch: GemmScratch) -> Product:
    """Derive from x what all chunks of `layout` need; takes the whole scratch."""
    scratch.reset()
    product = Product(np.ascontiguousarray(x), scratch)
    if layout.format.name == "int4":
        product.parts = _int4_parts(product, layout.K)
    elif layout.format.name == "bf16":
        product.parts = _bf16_parts(product, layout.K)
        for part in product.parts:
            part.take_columns()
    else:
        product.take_columns()
    return product


def multiply_chunk(product: Product, layout: PackedLayout, chunk: Chunk, buffer: Bytes, out: Float32Array) -> None:
    """Write the outputs of one chunk: columns `first_row` to `first_row + n_rows` of `out` `[M, N]`."""
    used = product.scratch.used
    columns = out[:, chunk.first_row : chunk.first_row + chunk.n_rows]
    _KERNELS[layout.format.name](product, layout.tiles(buffer), columns)
    product.scratch.reset(used)


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


_KERNELS: Final = MappingProxyType({"f32": _f32, "bf16": _bf16, "int8": _int8, "int4": _int4})
