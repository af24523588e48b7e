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
from types import MappingProxyType
from typing import Final

import numpy as np

from refinfer.arrays import Float32Array, aligned_empty
from refinfer.errors import PackingError
from refinfer.packing.formats import Bytes, PackedLayout, PackedMatrix, Tiles, half_blocks
from refinfer.packing.layout import Chunk
from refinfer.packing.quantized import BLOCK

__all__ = ["GEMM_CONFIG", "Call", "GemmScratch", "call_for", "matmul", "multiply_chunk", "scratch_floats"]


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

_L2_FLOATS: Final = 1 << 17
"""Weights widened at a time when x has few rows: half a megabyte, which stays in a core's second-level cache."""

_MANY_FLOATS: Final = 1 << 20
"""The same when x has many rows: as many as BLAS needs to be efficient."""

_MASK: Final = np.array(0xFFFF0000, np.uint32)
_SHIFT: Final = np.array(16, np.uint32)
_LOW: Final = np.array(15, np.uint8)
_HIGH: Final = np.array(4, np.uint8)


def tile_rows(M: int, K: int) -> int:
    """Return how many rows of weights one call by tiles takes; 0 where no number of at least 4 is small enough."""
    return next((rows for rows in (16, 8, 4) if M * rows * K < _SMALL_MATMUL), 0)


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
    K, rows = layout.K, max(chunk.n_rows for chunk in layout.chunks)
    weights_first = M * (K + min(rows, _MANY_FLOATS // K + layout.tile.nr)) if 1 < M < 128 else 0
    group = max(layout.tile.nr * K, _L2_FLOATS if M <= 16 else _MANY_FLOATS)
    if layout.format.name == "f32":
        return M * (K + rows) if weights_first else 0
    if layout.format.name == "int4":
        B, nr = 2 * half_blocks(K), layout.tile.nr
        few = M * B * (BLOCK + 1) + B * nr + 3 * _L2_FLOATS + 64 * nr * (M + 1)
        many = 2 * max(_MANY_FLOATS, B * BLOCK * 16) + B * nr + M * B * BLOCK
        return few if M <= 16 else many
    return group + weights_first + M * (K + 1 + group // max(1, K // 2)) + 64


@dataclass(slots=True)
class _Product:
    """One product under way: x `[M, K]`, what was derived from it, and the scratch behind both."""

    x: Float32Array
    scratch: GemmScratch
    call: Call
    x_columns: Float32Array | None  # x.T, contiguous, for weights-first

    @property
    def columns(self) -> Float32Array:
        """`x_columns` of a product that has them."""
        assert self.x_columns is not None
        return self.x_columns

    def rows(self, w: Float32Array, out: Float32Array) -> None:
        """Multiply with some rows of float32 weights: `out` `[M, R]` becomes `x @ w.T`."""
        name = self.call.name
        if name == "dot":
            np.dot(w, self.x[0], out=out[0])
        elif name == "tiles":
            self._by_tiles(w, out)
        elif name == "weights-first":
            before = self.scratch.used
            columns = self.scratch.take(w.shape[0], self.x.shape[0])
            np.matmul(w, self.columns, out=columns)
            np.copyto(out, columns.T)
            self.scratch.reset(before)
        else:
            np.matmul(self.x, w.T, out=out)

    def _by_tiles(self, w: Float32Array, out: Float32Array) -> None:
        (M, K), R = self.x.shape, w.shape[0]
        nr = tile_rows(M, K)
        whole = R // nr * nr
        if whole:
            tiles = w[:whole].reshape(-1, nr, K).transpose(0, 2, 1)
            np.matmul(self.x, tiles, out=out[:, :whole].reshape(M, -1, nr).transpose(1, 0, 2))
        if whole < R:
            np.matmul(self.x, w[whole:].T, out=out[:, whole:])


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
    M = len(x)
    if out is None:
        out = np.empty((M, layout.N), np.float32)
    elif out.dtype != np.float32 or out.shape != (M, layout.N) or not out.flags.c_contiguous:
        raise PackingError(f"out must be contiguous float32 [{M}, {layout.N}], not {out.dtype} {list(out.shape)}")
    if scratch is None:
        scratch = GemmScratch(scratch_floats([layout], M))
    product = start_product(x, layout, scratch)
    for chunk, buffer in zip(layout.chunks, packed.buffers, strict=True):
        multiply_chunk(product, layout, chunk, buffer, out)
    return out


def start_product(x: Float32Array, layout: PackedLayout, scratch: GemmScratch) -> _Product:
    """Derive from x what all chunks of `layout` need; takes the whole scratch."""
    scratch.reset()
    call = call_for(len(x), layout.K)
    columns = None
    if call.name == "weights-first" and layout.format.name != "int4":
        columns = scratch.take(x.shape[1], len(x))
        np.copyto(columns, x.T)
    return _Product(np.ascontiguousarray(x), scratch, call, columns)


def multiply_chunk(product: _Product, layout: PackedLayout, chunk: Chunk, buffer: Bytes, out: Float32Array) -> None:
    """Write the outputs of one chunk: columns `first_row` to `first_row + n_rows` of `out` `[M, N]`."""
    used = product.scratch.used
    _KERNELS[layout.format.name](
        product, layout.tiles(buffer), out[:, chunk.first_row : chunk.first_row + chunk.n_rows]
    )
    product.scratch.reset(used)


def _f32(product: _Product, tiles: Tiles, out: Float32Array) -> None:
    product.rows(tiles.f32[: out.shape[1]], out)


def _rows_at_once(product: _Product, tiles: Tiles) -> int:
    """Return how many rows to widen at a time: whole tiles, about as many weights as the cache holds."""
    floats = _L2_FLOATS if len(product.x) <= 16 else _MANY_FLOATS
    return max(1, floats // (tiles.K * tiles.nr)) * tiles.nr


def _bf16(product: _Product, tiles: Tiles, out: Float32Array) -> None:
    """Mask for the columns of the high halves, shift for those of the low halves: exact, one pass each."""
    pairs, step = tiles.bf16_pairs[: out.shape[1]], _rows_at_once(product, tiles)
    half, K = pairs.shape[1], tiles.K
    if len(product.x) > 16:
        wide = product.scratch.take(min(step, len(pairs)), K)
        for n in range(0, len(pairs), step):
            part = pairs[n : n + step]
            w = wide[: len(part)]
            np.bitwise_and(part, _MASK, out=w[:, :half].view(np.uint32))
            np.left_shift(part[:, : K - half], _SHIFT, out=w[:, half:].view(np.uint32))
            product.rows(w, out[:, n : n + step])
        return
    take, M, rows = product.scratch.take, len(product.x), min(step, len(pairs))
    # Two arrays, 64 floats apart: rows of both at the same place of a page would make loads wait for stores.
    high, _, low, second = take(rows, half), take(64), take(rows, half), take(M * rows)
    x_low = take(M, half)
    x_low[:, : K - half] = product.x[:, half:]
    x_low[:, K - half :] = 0
    x_high = take(M, half)
    np.copyto(x_high, product.x[:, :half])
    by_high = _Product(x_high, product.scratch, call_for(M, half), None)
    by_low = _Product(x_low, product.scratch, by_high.call, None)
    for n in range(0, len(pairs), step):
        part = pairs[n : n + step]
        R = len(part)
        np.bitwise_and(part, _MASK, out=high[:R].view(np.uint32))
        np.left_shift(part, _SHIFT, out=low[:R].view(np.uint32))
        target, more = out[:, n : n + R], second[: M * R].reshape(M, R)
        by_high.rows(high[:R], target)
        by_low.rows(low[:R], more)
        np.add(target, more, out=target)


def _int8(product: _Product, tiles: Tiles, out: Float32Array) -> None:
    """Widen by one copy, multiply, and scale the outputs: a scale for each row leaves the sum."""
    T, nr, K = tiles.int8.shape
    step = _rows_at_once(product, tiles) // nr
    wide = product.scratch.take(min(step, T), nr, K)
    for t in range(0, T, step):
        part = tiles.int8[t : t + step]
        target = out[:, t * nr : (t + len(part)) * nr]
        np.copyto(wide[: len(part)], part)
        product.rows(wide[: len(part)].reshape(-1, K)[: target.shape[1]], target)
    np.multiply(out, tiles.int8_scales.reshape(-1)[: out.shape[1]], out=out)


def _int4(product: _Product, tiles: Tiles, out: Float32Array) -> None:
    for t in range(len(tiles.raw)):
        part = out[:, t * tiles.nr : (t + 1) * tiles.nr]
        kernel = _int4_partial_sums if len(product.x) <= 16 else _int4_widened
        before = product.scratch.used
        kernel(product, tiles, t, part)
        product.scratch.reset(before)


def _int4_partial_sums(product: _Product, tiles: Tiles, t: int, out: Float32Array) -> None:
    """Multiply nibble by nibble, block by block, and scale the partial sums: they are 1/32 of the weights.

    Nibbles hold q + 8, so 8 times the sum of x over each block is taken away, scaled, first.
    """
    take, M, nr = product.scratch.take, len(product.x), tiles.nr
    nibbles = tiles.nibbles[t]
    half = len(nibbles)
    x = take(2 * half, M, BLOCK)
    blocks = _padded_blocks(product.x, 2 * half)
    np.copyto(x, blocks.transpose(1, 0, 2))
    scales = take(2 * half, nr)
    _widen_scales(tiles.int4_scales[t], scales)
    total = take(M, nr)
    sums = take(M, 2 * half)
    np.multiply(np.add.reduce(blocks, axis=2, out=sums), np.float32(-8), out=sums)
    np.matmul(sums, scales, out=total)
    step = max(1, min(half, _L2_FLOATS // (BLOCK * nr)))
    bytes_ = take(step * BLOCK * nr // 4 + 1).view(np.uint8)
    wide, partial, summed = take(step, BLOCK, nr), take(step, M, nr), take(M, nr)
    for b in range(0, half, step):
        part = nibbles[b : b + step]
        n = len(part)
        plane = bytes_[: part.size].reshape(part.shape)
        for first, split, operand in ((b, np.bitwise_and, _LOW), (half + b, np.right_shift, _HIGH)):
            split(part, operand, out=plane)
            np.copyto(wide[:n], plane)
            np.matmul(x[first : first + n], wide[:n], out=partial[:n])
            np.multiply(partial[:n], scales[first : first + n, None], out=partial[:n])
            np.add(total, np.add.reduce(partial[:n], axis=0, out=summed), out=total)
    np.copyto(out, total[:, : out.shape[1]])


def _int4_widened(product: _Product, tiles: Tiles, t: int, out: Float32Array) -> None:
    """Widen and scale whole columns, some rows of weights at a time, and multiply once."""
    take, M, nr = product.scratch.take, len(product.x), tiles.nr
    nibbles = tiles.nibbles[t]
    half = len(nibbles)
    B = 2 * half
    x = _padded_blocks(product.x, B).reshape(M, B * BLOCK)
    scales = take(B, nr)
    _widen_scales(tiles.int4_scales[t], scales)
    step = max(16, min(nr, _MANY_FLOATS // (B * BLOCK)) // 16 * 16)
    bytes_ = take(half * BLOCK * step // 4 + 1).view(np.uint8)
    wide = take(B * BLOCK * step)
    for n in range(0, out.shape[1], step):
        part = nibbles[..., n : n + step]
        width = part.shape[2]
        plane = bytes_[: part.size].reshape(part.shape)
        w = wide[: B * BLOCK * width].reshape(B, BLOCK, width)
        for rows, split, operand in ((w[:half], np.bitwise_and, _LOW), (w[half:], np.right_shift, _HIGH)):
            split(part, operand, out=plane)
            np.subtract(plane.view(np.int8), np.int8(8), out=plane.view(np.int8))
            np.copyto(rows, plane.view(np.int8))
        np.multiply(w, scales[:, None, n : n + width], out=w)
        target = out[:, n : n + width]
        np.matmul(x, w.reshape(B * BLOCK, width)[:, : target.shape[1]], out=target)


def _padded_blocks(x: Float32Array, B: int) -> Float32Array:
    """Return x `[M, K]` as `[M, B, 32]`, zeros behind K; a view where K is whole blocks already."""
    M, K = x.shape
    if K == B * BLOCK:
        return x.reshape(M, B, BLOCK)
    padded = np.zeros((M, B * BLOCK), np.float32)
    padded[:, :K] = x
    return padded.reshape(M, B, BLOCK)


def _widen_scales(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint16]], out: Float32Array) -> None:
    wide = out.view(np.uint32)
    np.copyto(wide, bits)
    np.left_shift(wide, _SHIFT, out=wide)


_KERNELS: Final = MappingProxyType({"f32": _f32, "bf16": _bf16, "int8": _int8, "int4": _int4})
