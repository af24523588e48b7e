"""Quantised weights: int8 per output channel, int4 in blocks of 32, and how their tiles are laid out.

Knows: symmetric quantisation, its inverse and its error; the engine's int8 and int4 tiles, and XNNPACK's int8 tile.
Does not know: how they are multiplied (`matmul`), where chunks are cut (`formats`).
Spec: PACK-10 to PACK-15. Tutorial: 03.

The engine's tiles, and why they look so (numpy has no integer matmul, so weights are widened to float32 first):

    int8   nr rows, each K bytes          q[0,0] q[0,1] ... q[0,K-1] q[1,0] ...   rows whole: widened by one copy
           nr float32 scales              s[0] ... s[nr-1]                        applied after the product

    int4   B/2 x 32 x nr bytes            low nibble: block b, high nibble: block b + B/2, both of row n
           B x nr bfloat16 scales         s[block, n]                             applied to each block's partial sum

Nibbles hold q + 8. Two planes of blocks share a byte, so that one mask and one shift give two whole arrays.
XNNPACK's own int8 tile (`xnn_pack_qs8_gemm_goi_w` as used for qd8, dynamic activations) serves an integer kernel:

    nr int32   -sum over k of q[n, k]     times the zero point of an activation row, added by the kernel
    int8       the weights in goi order   kr columns of each row, K padded to kr with 0
    nr float32 scales | nr float32 biases
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, UInt16Array, bf16_to_f32, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing.gemm import pack, unpack
from refinfer.packing.layout import GoiLayout, TileShape

__all__ = [
    "BLOCK",
    "Int4Array",
    "Int8Array",
    "dequantize_int4",
    "dequantize_int8",
    "pack_xnnpack_int8",
    "quantize_int4",
    "quantize_int8",
    "unpack_xnnpack_int8",
]

Int8Array = npt.NDArray[np.int8]
Int4Array = npt.NDArray[np.int8]  # values from -7 to 7

BLOCK: Final = 32
"""How many neighbouring weights of a row share a scale in int4."""

_SMALLEST_SCALE: Final = float(np.finfo(np.float32).tiny)


# --8<-- [start:quantize_int8]
def quantize_int8(w: Float32Array) -> tuple[Int8Array, Float32Array]:
    """Return `q` `[N, K]` from -127 to 127 and the scales `[N]` with `|w - q * s| <= s / 2`; zero rows get scale 1.

    Raises:
        PackingError: `w` is not a float32 matrix, or holds NaN or infinity.
    """
    _require_matrix(w)
    largest = np.maximum.reduce(np.abs(w), axis=1)
    scales = _usable_scales(largest / np.float32(127), largest)
    return np.rint(w / scales[:, None]).astype(np.int8), scales


# --8<-- [end:quantize_int8]


def dequantize_int8(q: Int8Array, scales: Float32Array) -> Float32Array:
    """Return `q * s` `[N, K]`: the weights that a product with int8 uses."""
    return q * scales[:, None]


def quantize_int4(w: Float32Array) -> tuple[Int4Array, UInt16Array]:
    """Return `q` `[N, B * 32]` from -7 to 7 and bfloat16 scales `[N, B]`, a block of 32 columns each.

    K is padded with zeros to whole blocks. `|w - q * s| <= s / 2` and one rounding. Blocks of zeros, and of weights
    too small for a scale, get scale 0, so that they add exactly nothing to a product that takes 8 from each nibble.

    Raises:
        PackingError: `w` is not a float32 matrix, or holds NaN or infinity.
    """
    _require_matrix(w)
    N, K = w.shape
    blocks = np.zeros((N, -(-K // BLOCK), BLOCK), np.float32)
    blocks.reshape(N, -1)[:, :K] = w
    largest = np.maximum.reduce(np.abs(blocks), axis=2)
    scales = _usable_scales(bf16_to_f32(f32_to_bf16(largest / np.float32(7))), largest)
    # A scale that was rounded down lets the largest weight reach 7.03: rounded, it is 7 all the same.
    q = np.rint(blocks / scales[..., None]).astype(np.int8)
    return q.reshape(N, -1), np.where(q.any(axis=2), f32_to_bf16(scales), np.uint16(0))


def dequantize_int4(q: Int4Array, scales: UInt16Array, K: int) -> Float32Array:
    """Return the weights `[N, K]` that a product with int4 uses."""
    N = q.shape[0]
    values = q.reshape(N, -1, BLOCK) * bf16_to_f32(scales)[..., None]
    return values.reshape(N, -1)[:, :K]


def _require_matrix(w: Float32Array) -> None:
    if w.dtype != np.float32 or w.ndim != 2 or not w.size:
        raise PackingError(f"a float32 matrix is wanted, not {w.dtype} {list(w.shape)}")


def _usable_scales(scales: Float32Array, largest: Float32Array) -> Float32Array:
    if not np.isfinite(largest).all():
        raise PackingError("the weights hold NaN or infinity, which cannot be quantised")
    # Weights too small for a scale become zero, as they nearly are.
    return np.where(scales >= _SMALLEST_SCALE, scales, np.float32(1))


def pack_xnnpack_int8(q: Int8Array, scales: Float32Array, bias: Float32Array, tile: TileShape) -> npt.NDArray[np.uint8]:
    """Pack into XNNPACK's int8 tiles, byte for byte: row sums, weights, scales, biases; missing rows are zero.

    Raises:
        PackingError: shapes do not match.
    """
    N, K = q.shape
    layout = GoiLayout(N, K, tile)
    if scales.shape != (layout.N,) or bias.shape != (layout.N,):
        raise PackingError(f"{layout.N} rows need as many scales and biases, not {scales.shape} and {bias.shape}")
    if q.dtype != np.int8 or scales.dtype != np.float32 or bias.dtype != np.float32:
        raise PackingError(f"int8, float32 and float32 are wanted, not {q.dtype}, {scales.dtype} and {bias.dtype}")

    def per_tile(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
        padded = np.zeros(layout.n_tiles * tile.nr, values.dtype)
        padded[: layout.N] = values
        return padded.reshape(layout.n_tiles, tile.nr).view(np.uint8)

    sums = -np.add.reduce(q, axis=1, dtype=np.int32)
    weights = pack(q, layout).reshape(layout.n_tiles, -1).view(np.uint8)
    return np.hstack((per_tile(sums), weights, per_tile(scales), per_tile(bias))).reshape(-1)


def unpack_xnnpack_int8(
    packed: npt.NDArray[np.uint8], N: int, K: int, tile: TileShape
) -> tuple[Int8Array, Float32Array, Float32Array]:
    """Return `q` `[N, K]`, the scales `[N]` and the biases `[N]` of what `pack_xnnpack_int8` packed.

    Raises:
        PackingError: `packed` does not have the size of such a matrix.
    """
    layout, nr4 = GoiLayout(N, K, tile), 4 * tile.nr
    if packed.size != layout.n_tiles * (layout.tile_elements + 3 * nr4):
        raise PackingError(f"{packed.size} bytes are not an int8 matrix [{N}, {K}] in tiles of {tile.nr} rows")
    tiles = packed.reshape(layout.n_tiles, -1)
    weights = np.ascontiguousarray(tiles[:, nr4 : -2 * nr4]).reshape(-1).view(np.int8)
    scales, biases = (
        np.ascontiguousarray(part).view(np.float32).reshape(-1)[:N]
        for part in (tiles[:, -2 * nr4 : -nr4], tiles[:, -nr4:])
    )
    return unpack(weights, layout), scales, biases
