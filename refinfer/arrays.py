"""Arrays: their types, the letters of their dimensions, their alignment, and bfloat16.

Leaves to others: models, files, layouts.
Read more: tutorial 07; clauses ARR-1 to ARR-3, SOURCE-6.

These letters are used in every docstring. Only `packing` also uses T for tiles, R for rows and B for blocks. A KV cache
keeps what earlier tokens have left for later ones (keys and values).

    M   rows of x: the tokens computed together               V   vocabulary size
    N   outputs of a matrix                                   L   number of layers
    K   inputs of a matrix                                    S   positions a KV cache has room for
    T   tokens of a whole text                                P   positions in use, `P <= S`
    D   hidden size                                           F   intermediate size of the feed-forward part
    H   query heads         G   key and value heads           R   query heads per key head, `H == G * R`
    hd  size of one head                                      B   a batch of independent things
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from refinfer.errors import RequestError

__all__ = [
    "PAGE_BYTES",
    "BoolArray",
    "Float32Array",
    "Float64Array",
    "IntArray",
    "UInt16Array",
    "aligned_empty",
    "bf16_to_f32",
    "f32_to_bf16",
    "require_rows",
    "stored_to_f32",
    "whole_pages",
]

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
UInt16Array: TypeAlias = npt.NDArray[np.uint16]
IntArray: TypeAlias = npt.NDArray[np.int64]

PAGE_BYTES = 4096
"""A page: the unit in which systems map files, and read them directly; such addresses are multiples of it."""


def whole_pages(nbytes: int) -> int:
    """Return the bytes of the pages that hold `nbytes`.

    Examples:
        >>> whole_pages(1), whole_pages(4096), whole_pages(4097)
        (4096, 4096, 8192)
    """
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES  # -(-a // b) is a / b, rounded up


def aligned_empty(shape: tuple[int, ...], alignment: int = 64) -> Float32Array:
    """Return an uninitialised float32 array whose first byte lies on a multiple of `alignment` bytes.

    numpy promises a multiple of 16 only. A processor loads 64 bytes at once; a page has `PAGE_BYTES`. Takes `alignment`
    bytes more than the data.

    Examples:
        >>> aligned_empty((3, 5), alignment=4096).ctypes.data % 4096
        0
    """
    raw = np.empty(math.prod(shape) * 4 + alignment, dtype=np.uint8)
    return np.ndarray(shape, np.float32, buffer=raw, offset=-raw.ctypes.data % alignment)


def bf16_to_f32(bits: UInt16Array, out: Float32Array | None = None) -> Float32Array:
    """Widen bfloat16 values, kept as their 16 bits, to float32; exact, any shape.

    A bfloat16 is the upper half of a float32, so widening is a shift: sign, the same 8 bits of exponent, and
    7 bits of fraction.

        float32   s eeeeeeee fffffffffffffffffffffff
        bfloat16  s eeeeeeee fffffff

    Examples:
        >>> bf16_to_f32(np.array([0x3F80, 0xC000], np.uint16))
        array([ 1., -2.], dtype=float32)
    """
    if out is None:
        out = np.empty(bits.shape, dtype=np.float32)
    wide = out.view(np.uint32)
    np.copyto(wide, bits)
    np.left_shift(wide, 16, out=wide)
    return out


def f32_to_bf16(values: Float32Array) -> UInt16Array:
    """Round float32 values to bfloat16, nearest first and ties to even; returns the 16 bits of each, any shape.

    Infinities stay; what is too large for bfloat16 becomes infinite; a NaN stays a NaN.

    Examples:
        >>> [hex(bits) for bits in f32_to_bf16(np.array([1.0, 1.00390625, 1.01171875], np.float32))]
        ['0x3f80', '0x3f80', '0x3f82']
    """
    wide = np.asarray(values, dtype=np.float32, order="C").view(np.uint32)
    # Adding half of the last kept bit rounds; one less when that bit is even, so that a tie goes to the even one.
    rounded = (wide + (((wide >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    quiet_nan = (wide >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def stored_to_f32(stored: npt.NDArray[Any]) -> Float32Array:
    """Return float32, float16 or bfloat16 bits as aligned float32; copies unless they are that already."""
    if stored.dtype == np.uint16:
        return bf16_to_f32(stored)
    return np.require(stored, np.float32, ["C", "A"])


def require_rows(ids: IntArray, N: int) -> None:
    """Check that a matrix of N rows has the rows `ids`; numpy would count negative ones from the end.

    Raises:
        RequestError: one of them does not exist.
    """
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < N:
        raise RequestError(f"rows {int(ids.min())} to {int(ids.max())} are asked for; there are 0 to {N - 1}")
