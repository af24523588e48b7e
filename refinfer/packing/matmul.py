"""The numpy matmul core: `x @ W.T` over packed weights, chunk by chunk.

Knows: the order of a product: x first, then each chunk. Does not know: how a chunk is multiplied (`kernels`, which
pick their calls in `product`), where chunks lie, biases, models.
Spec: PACK-23 to PACK-29. Tutorial: 02.

Laws: no call into BLAS spans two chunks, and the calls inside a chunk depend on M and that chunk alone. So a product
has the same bits wherever its chunks lie and in whichever order they arrive. Scratch memory is reserved before, as
much as `scratch_floats` says; weights are widened into it a few rows at a time, never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from refinfer.arrays import Float32Array
from refinfer.errors import PackingError
from refinfer.packing.formats import Bytes, PackedLayout, PackedMatrix
from refinfer.packing.kernels import KERNELS, floats_for, parts_of
from refinfer.packing.layout import Chunk
from refinfer.packing.product import GemmScratch, Product

__all__ = ["matmul", "multiply_chunk", "scratch_floats", "start_product"]

_F32: Final = np.dtype(np.float32)  # comparing with it is quicker than with np.float32


def scratch_floats(layouts: Iterable[PackedLayout], most_rows: int) -> int:
    """Return how many floats of scratch suffice for products of up to `most_rows` rows with any of `layouts`."""
    edges = {min(most_rows, m) for m in (1, 16, 127, most_rows)}
    return max((floats_for(layout, M) for layout in layouts for M in edges), default=0)


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
    if x.dtype != _F32 or x.ndim != 2 or x.shape[1] != layout.K or not len(x):
        raise PackingError(f"x must be float32 [M, {layout.K}] with M of at least 1, not {x.dtype} {list(x.shape)}")
    shape = (len(x), layout.N)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.dtype != _F32 or out.shape != shape or not out.flags.c_contiguous:
        raise PackingError(f"out must be contiguous float32 {list(shape)}, not {out.dtype} {list(out.shape)}")
    if scratch is None:
        scratch = GemmScratch(scratch_floats([layout], len(x)))
    product = start_product(x, layout, scratch)
    kernel, used = KERNELS[layout.format.name], scratch.used
    for chunk, tiles in zip(layout.chunks, packed.tiles, strict=True):
        kernel(product, tiles, out[:, chunk.first_row : chunk.first_row + chunk.n_rows])
        scratch.reset(used)
    return out


def start_product(x: Float32Array, layout: PackedLayout, scratch: GemmScratch) -> Product:
    """Derive from x what all chunks of `layout` need; takes the whole scratch."""
    scratch.reset()
    product = Product(np.ascontiguousarray(x), scratch)
    product.parts = parts_of(product, layout)
    return product


# --8<-- [start:multiply_chunk]
def multiply_chunk(product: Product, layout: PackedLayout, chunk: Chunk, buffer: Bytes, out: Float32Array) -> None:
    """Write the outputs of one chunk: columns `first_row` to `first_row + n_rows` of `out` `[M, N]`."""
    used = product.scratch.used
    columns = out[:, chunk.first_row : chunk.first_row + chunk.n_rows]
    KERNELS[layout.format.name](product, layout.tiles(buffer, chunk), columns)
    product.scratch.reset(used)


# --8<-- [end:multiply_chunk]
