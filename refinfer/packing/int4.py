"""int4: half a byte for each weight, one bfloat16 scale for each block of 32 columns of a row.

The whole format in one module. Leaves to others: where chunks are cut (`layout`).
Read more: tutorial 03; clauses PACK-11 to PACK-13, PACK-16, PACK-23, PACK-26.

    K is padded with zeros to B blocks of 32 columns, B even. A tile of nr rows is stored column by column:

    tile    B/2 x 32 x nr bytes           byte [b, k, n] = low nibble: block b, high nibble: block b + B/2
            B x nr bfloat16 scales        s[b, n]

             block 0      block 1              block B/2    block B/2+1
            +------------+------------+  ...  +------------+------------+  ...      the columns of one row
             low nibbles: first plane          high nibbles: second plane

A nibble is half a byte. It holds q + 8, which is never negative; what the 8 adds to a product is 8 times the sum of x,
and is subtracted. The first half of the blocks (the first plane) lies in the low nibbles, the second in the high ones,
so that two masks give two whole arrays. For few rows of x the high nibbles are not shifted, because numpy shifts bytes
more slowly than it masks them: they are 16 times too large, and x is divided by 16 instead.
Error bound: |w - q s| <= s / 2, plus one rounding; s is the largest weight of the block divided by 7, as bfloat16. A
product first sums up (q + 8) s, so it rounds as if weights were larger by 8 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, IntArray, UInt16Array, bf16_to_f32, f32_to_bf16, stored_to_f32
from refinfer.packing.int8 import require_matrix, usable_scales
from refinfer.packing.layout import Bytes, PackedLayout, TileShape, part_of_tiles
from refinfer.packing.product import CACHED_FLOATS, FEW_ROWS, MANY_FLOATS, GemmScratch

name: Final = "int4"
chunk_nbytes: Final = 9 << 17  # two million weights
nanoseconds_per_byte: Final[Mapping[int, float]] = {1: 0.466, 8: 0.799, 64: 2.914, 256: 6.719}
copies: Final = 4.2

Int4Array: TypeAlias = npt.NDArray[np.int8]  # values from -7 to 7

BLOCK: Final = 32
"""How many neighbouring weights of a row share a scale."""

_LARGEST_TILE: Final = 512
_SMALLEST_TILE: Final = 64
_LARGEST_TILE_BYTES: Final = chunk_nbytes
_LANES: Final = 16  # the rows of a tile are a multiple of this
_LOW: Final = np.array(15, np.uint8)
_HIGH: Final = np.array(0xF0, np.uint8)
_FOUR: Final = np.array(4, np.uint8)


def quantize(w: Float32Array) -> tuple[Int4Array, UInt16Array]:
    """Return `q` `[N, B * 32]` from -7 to 7 and bfloat16 scales `[N, B]`, a block of 32 columns each.

    K is padded with zeros to whole blocks. `|w - q * s| <= s / 2`, plus one rounding. Blocks of zeros, and of weights
    too small for a scale, get scale 0, so that they add exactly nothing to a product.

    Raises:
        PackingError: `w` is not a float32 matrix, or holds NaN or infinity.
    """
    require_matrix(w)
    N, K = w.shape
    blocks = np.zeros((N, -(-K // BLOCK), BLOCK), np.float32)
    blocks.reshape(N, -1)[:, :K] = w
    largest = np.maximum.reduce(np.abs(blocks), axis=2)
    scales = usable_scales(bf16_to_f32(f32_to_bf16(largest / np.float32(7))), largest)
    # A scale that was rounded down lets the largest weight reach 7.03: rounded, it is 7 all the same.
    q = np.rint(blocks / scales[..., None]).astype(np.int8)
    return q.reshape(N, -1), np.where(q.any(axis=2), f32_to_bf16(scales), np.uint16(0))


def dequantize(q: Int4Array, scales: UInt16Array, K: int) -> Float32Array:
    """Return the weights `[N, K]` that a product with int4 uses."""
    N = q.shape[0]
    values = q.reshape(N, -1, BLOCK) * bf16_to_f32(scales)[..., None]
    return values.reshape(N, -1)[:, :K]


class Tiles(NamedTuple):
    """The bytes `[T, B/2, 32, nr]` and the bfloat16 scales `[T, B, nr]` of the T tiles of a chunk, and K."""

    nibbles: Bytes
    scales: UInt16Array
    K: int


def _half_blocks(K: int) -> int:
    """Return how many blocks each of the two planes has."""
    return -(-K // (2 * BLOCK))


def tile_shape(N: int, K: int) -> TileShape:
    """Return equal tiles of a multiple of 16 rows, as few as possible: little is wasted on empty lanes.

    A tile has at most 512 rows. If rows are so long that it would be larger than the usual chunk, this limit is lower,
    down to 64.
    """
    fitting = _LARGEST_TILE_BYTES // tile_nbytes(1, K) // _LANES * _LANES
    n_tiles = -(-N // min(_LARGEST_TILE, max(_SMALLEST_TILE, fitting)))
    return TileShape(nr=-(-N // (n_tiles * _LANES)) * _LANES, kr=1)


def tile_nbytes(nr: int, K: int) -> int:
    """Return the bytes of a tile."""
    return nr * _half_blocks(K) * (BLOCK + 4)


def view(raw: Bytes, nr: int, K: int) -> Tiles:
    """Return views of the nibbles and of the scales of tiles."""
    half = _half_blocks(K)
    nibbles = part_of_tiles(raw, 0, np.uint8, half, BLOCK, nr)
    return Tiles(nibbles, part_of_tiles(raw, half * BLOCK * nr, np.uint16, 2 * half, nr), K)


def pack(rows: npt.NDArray[Any], tiles: Tiles, first: int) -> None:
    """Quantise rows `[n, K]`, as stored, into n lanes of `tiles` from lane `first` on.

    Raises:
        PackingError: a weight is NaN or infinite.
    """
    if first == 0:
        tiles.nibbles[-1] = 0x88  # two zeros in each byte of the lanes that will have no row
    _, half, _, nr = tiles.nibbles.shape
    q, scales = quantize(stored_to_f32(rows))
    padded = np.full((len(q), 2 * half * BLOCK), 8, np.uint8)  # the block that makes their number even is zeros
    padded[:, : q.shape[1]] = q + 8
    low, high = padded.reshape(-1, 2, half, BLOCK).transpose(1, 0, 2, 3)
    which, lane = np.divmod(np.arange(first, first + len(q)), nr)
    tiles.nibbles[which, :, :, lane] = low | high << 4
    tiles.scales[which, : scales.shape[1], lane] = scales


def unpack_rows(tiles: Tiles, which: IntArray, lane: IntArray) -> Float32Array:
    """Return float32 rows: row i is in lane `lane[i]` of tile `which[i]`."""
    bytes_ = tiles.nibbles[which, :, :, lane]
    planes = np.stack((bytes_ & 15, bytes_ >> 4), axis=1).astype(np.int8) - np.int8(8)
    return dequantize(planes.reshape(len(which), -1), tiles.scales[which, :, lane], tiles.K)


class Operand(NamedTuple):
    """x in blocks, `[B, M, 32]` for few rows or `[M, B * 32]` for many; -8 times the sum of each block; the scratch."""

    x: Float32Array
    sums: Float32Array
    M: int
    scratch: GemmScratch


def start(x: Float32Array, scratch: GemmScratch) -> Operand:
    """Cut x into blocks, and sum each."""
    M, K = x.shape
    B, whole = 2 * _half_blocks(K), K // BLOCK
    cut, sums = scratch.take(B * M * BLOCK), scratch.take(M, B)
    blocks = cut.reshape(B, M, BLOCK).transpose(1, 0, 2) if M <= FEW_ROWS else cut.reshape(M, B, BLOCK)
    np.copyto(blocks[:, :whole], x[:, : whole * BLOCK].reshape(M, whole, BLOCK))
    blocks[:, whole:] = 0
    if K % BLOCK:
        blocks[:, whole, : K % BLOCK] = x[:, whole * BLOCK :]
    np.add.reduce(blocks, axis=2, out=sums)
    sums *= -8
    if M > FEW_ROWS:
        return Operand(cut.reshape(M, B * BLOCK), sums, M, scratch)
    by_block = cut.reshape(B, M, BLOCK)
    by_block[B // 2 :] /= 16  # high nibbles are masked, not shifted
    return Operand(by_block, sums, M, scratch)


def multiply(operand: Operand, tiles: Tiles, out: Float32Array) -> None:
    """Write the outputs of a chunk of R rows, `[M, R]`, tile by tile."""
    multiply_tile = _multiply_few if operand.M <= FEW_ROWS else _multiply_many
    nr, scratch = tiles.nibbles.shape[3], operand.scratch
    used = scratch.used
    for t, (nibbles, scales) in enumerate(zip(tiles.nibbles, tiles.scales, strict=True)):
        multiply_tile(operand, nibbles, scales, out[:, t * nr : (t + 1) * nr])
        scratch.reset(used)


def _multiply_few(operand: Operand, nibbles: Bytes, scales: UInt16Array, out: Float32Array) -> None:
    """Multiply block by block, and scale the sum of each block: fewer multiplications than scaling 32 weights."""
    take, (half, _, nr), M = operand.scratch.take, nibbles.shape, operand.M
    widened_scales = bf16_to_f32(scales, take(2 * half, nr))
    step = _blocks_at_once(half, nr)
    wide, partial = take(step, BLOCK, nr), take(2 * half, M, nr)
    plane = take(step * BLOCK * nr // 4 + 1).view(np.uint8)[: step * BLOCK * nr].reshape(step, BLOCK, nr)
    for b in range(0, half, step):
        part = nibbles[b : b + step]
        n = len(part)
        for first, mask in ((b, _LOW), (half + b, _HIGH)):
            np.bitwise_and(part, mask, out=plane[:n])
            np.copyto(wide[:n], plane[:n])
            np.matmul(operand.x[first : first + n], wide[:n], out=partial[first : first + n])
    partial *= widened_scales[:, None]
    total = np.add.reduce(partial, axis=0, out=take(M, nr))
    total += np.matmul(operand.sums, widened_scales, out=take(M, nr))
    np.copyto(out, total[:, : out.shape[1]])


def _multiply_many(operand: Operand, nibbles: Bytes, scales: UInt16Array, out: Float32Array) -> None:
    """Widen and scale some rows of weights at a time, and multiply with all their columns at once."""
    take, (half, _, nr) = operand.scratch.take, nibbles.shape
    B = 2 * half
    widened_scales = bf16_to_f32(scales, take(B, nr))
    step = _lanes_at_once(B, nr)
    plane, wide = take(half * BLOCK * step // 4 + 1).view(np.int8), take(B * BLOCK * step)
    for n in range(0, out.shape[1], step):
        part = nibbles[..., n : n + step]
        width = part.shape[2]
        q = plane[: part.size].reshape(part.shape)
        w = wide[: B * BLOCK * width].reshape(B, BLOCK, width)
        for rows, split, by in ((w[:half], np.bitwise_and, _LOW), (w[half:], np.right_shift, _FOUR)):
            split(part, by, out=q.view(np.uint8))
            q -= 8
            np.copyto(rows, q)
        w *= widened_scales[:, None, n : n + width]
        target = out[:, n : n + width]
        np.matmul(operand.x, w.reshape(B * BLOCK, width)[:, : target.shape[1]], out=target)


def _blocks_at_once(half: int, nr: int) -> int:
    """Return how many blocks of a tile to widen at a time for few rows of x: what fits in the cache."""
    return min(half, max(1, CACHED_FLOATS // (BLOCK * nr)))


def _lanes_at_once(B: int, nr: int) -> int:
    """Return how many rows of a tile to widen at a time for many rows of x."""
    return min(nr, max(_LANES, MANY_FLOATS // (B * BLOCK)))


def scratch_floats(layout: PackedLayout, M: int) -> int:
    """Return how many floats of scratch a product takes: x and its sums, a tile's scales, what is widened at a time.

    With few rows of x that is one plane as floats and as bytes, the sums of all blocks `[B, M, nr]`, and two outputs;
    with many, both planes as floats and one as bytes.
    """
    half, nr = _half_blocks(layout.K), layout.tile.nr
    B = 2 * half
    x_and_scales = M * B * (BLOCK + 1) + B * nr
    if M <= FEW_ROWS:
        plane = _blocks_at_once(half, nr) * BLOCK * nr
        return x_and_scales + plane + plane // 4 + 1 + (B + 2) * M * nr
    plane = half * BLOCK * _lanes_at_once(B, nr)
    return x_and_scales + 2 * plane + plane // 4 + 1
