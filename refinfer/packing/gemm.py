"""Float packers: a row-major matrix into tiles and back, for any tile shape, without a loop over elements.

Knows: numpy views, and `layout`'s order as reshapes and transposes. Does not know: number formats; any element type
goes through unchanged. Does not know the engine's choices either (`formats`).
Spec: PACK-6 to PACK-9. Tutorial: 01.

Packing without a copy in between: the source is seen as `[tiles, row, group, block, column]`, and its axes are walked
in the order of the packed bytes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from refinfer.arrays import IntArray
from refinfer.errors import PackingError
from refinfer.packing.layout import GoiLayout

__all__ = ["bias_of", "pack", "pack_rows", "require_rows", "unpack", "unpack_rows"]

Element = TypeVar("Element", bound=np.generic)


def pack(w: npt.NDArray[Element], layout: GoiLayout, bias: npt.NDArray[Element] | None = None) -> npt.NDArray[Element]:
    """Pack `w` `[N, K]` and `bias` `[N]` into a new array of `layout.elements`; pads and missing biases are zero.

    Raises:
        PackingError: `w` or `bias` does not have the layout's shape.
    """
    if w.shape != (layout.N, layout.K):
        raise PackingError(f"rows of shape {w.shape} at 0 do not fit a matrix [{layout.N}, {layout.K}]")
    packed = np.zeros(layout.elements, w.dtype)
    pack_rows(w, layout, packed, bias=bias)
    return packed


def pack_rows(
    w: npt.NDArray[Element],
    layout: GoiLayout,
    packed: npt.NDArray[Element],
    first_row: int = 0,
    bias: npt.NDArray[Element] | None = None,
) -> None:
    """Pack the rows of `w` `[n, K]`, which start at `first_row` of the matrix, into `packed`, which is all of it.

    This is what lets a matrix be packed in blocks of rows. Pads are left as they are: `packed` starts as zeros.

    Raises:
        PackingError: shapes or types do not match, `first_row` is not the start of a tile, or `packed` has gaps.
    """
    K, nr = layout.K, layout.tile.nr
    if w.ndim != 2 or w.shape[1] != K or not 0 <= first_row <= layout.N - len(w) or packed.size != layout.elements:
        raise PackingError(f"rows of shape {w.shape} at {first_row} do not fit a matrix [{layout.N}, {K}]")
    n = len(w)
    if w.dtype != packed.dtype or (bias is not None and bias.dtype != packed.dtype):
        raise PackingError(f"rows and bias must be of the packed type {packed.dtype}; rows are {w.dtype}")
    if not packed.flags.c_contiguous:
        raise PackingError("rows can be packed into contiguous memory only")
    if first_row % nr:
        raise PackingError(f"rows can be packed from the start of a tile of {nr} rows on, not from row {first_row}")
    if bias is not None and (not layout.has_bias or bias.shape != (n,)):
        raise PackingError(f"a bias of shape {bias.shape} does not fit {n} rows of this layout")
    first_tile, whole = first_row // nr, n // nr
    tiles = packed.reshape(layout.n_tiles, layout.tile_elements)[first_tile:]
    if whole:
        _copy_tiles(w[: whole * nr], tiles[:whole], layout, nr)
    if n % nr:
        _copy_tiles(w[whole * nr :], tiles[whole : whole + 1], layout, n % nr)
    if bias is not None:
        tiles[:whole, :nr] = bias[: whole * nr].reshape(whole, nr)
        if n % nr:
            tiles[whole, : n % nr] = bias[whole * nr :]


def _copy_tiles(w: npt.NDArray[Element], tiles: npt.NDArray[Element], layout: GoiLayout, rows: int) -> None:
    """Copy `w` `[T * rows, K]` into `T` tiles, filling `rows` of each tile's nr lanes."""
    T, K = tiles.shape[0], layout.K
    whole = K // (layout.tile.kr * layout.tile.sr) * (layout.tile.kr * layout.tile.sr)
    source = w.reshape(T, rows, K)
    for columns, start in ((source[..., :whole], 0), (source[..., whole:], whole)):
        if columns.shape[-1]:
            _copy_columns(columns, _steps(tiles, layout, start, columns.shape[-1]), layout)


def _steps(tiles: npt.NDArray[Element], layout: GoiLayout, start: int, width: int) -> npt.NDArray[Element]:
    """See the columns from `start` on of some tiles as `[T, group, block, lane, kr]`."""
    nr, kr, sr = layout.tile.nr, layout.tile.kr, layout.tile.sr
    groups = -(-width // (kr * sr))
    begin = nr * (layout.has_bias + start)
    return tiles[:, begin : begin + groups * sr * nr * kr].reshape(tiles.shape[0], groups, sr, nr, kr)


def _copy_columns(source: npt.NDArray[Element], steps: npt.NDArray[Element], layout: GoiLayout) -> None:
    """Copy `[T, rows, columns]` to `[T, group, block, lane, kr]`: whole groups, or the part of a last one."""
    kr, sr = layout.tile.kr, layout.tile.sr
    T, rows, columns = source.shape
    if columns % (kr * sr) == 0:
        blocks = source.reshape(T, rows, -1, sr, kr)
        for turn in range(min(sr, rows)):  # the rows that are rotated alike
            rotated = np.roll(blocks[:, turn::sr], -turn, axis=3) if turn else blocks[:, turn::sr]
            np.copyto(steps[:, :, :, turn:rows:sr], rotated.transpose(0, 2, 3, 1, 4))
        return
    for block in range(-(-columns // kr)):  # fewer than sr blocks, the last of them perhaps not whole
        part = source[..., block * kr : (block + 1) * kr]
        for turn in range(min(sr, rows)):
            steps[:, 0, (block - turn) % sr, turn:rows:sr, : part.shape[-1]] = part[:, turn::sr]


def unpack(packed: npt.NDArray[Element], layout: GoiLayout) -> npt.NDArray[Element]:
    """Return the matrix `[N, K]` that was packed: the inverse of `pack`, an oracle."""
    return unpack_rows(packed, layout, np.arange(layout.N))


def unpack_rows(packed: npt.NDArray[Element], layout: GoiLayout, ids: IntArray) -> npt.NDArray[Element]:
    """Return the rows `ids` as `[len(ids), K]`; reads those rows only.

    Raises:
        PackingError: `packed` does not have the layout's size, or there is no such row.
    """
    ids = np.asarray(ids)
    if packed.size != layout.elements or packed.ndim != 1:
        raise PackingError(f"{packed.size} elements are not a packed matrix of {layout.elements}")
    require_rows(ids, layout.N)
    rows: npt.NDArray[Element] = packed[_indices(layout, ids)]
    return rows


def require_rows(ids: IntArray, N: int) -> None:
    """Check that all `ids` are rows of a matrix with `N`; raises PackingError."""
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < N):
        raise PackingError(f"rows {int(ids.min())} to {int(ids.max())} are asked for; there are 0 to {N - 1}")


def _indices(layout: GoiLayout, ids: IntArray) -> npt.NDArray[Any]:
    """`layout.weight_index` for whole rows at once: `[len(ids), K]`."""
    nr, kr, sr = layout.tile.nr, layout.tile.kr, layout.tile.sr
    t, j = (part[:, None] for part in np.divmod(ids, nr))
    group, within = np.divmod(np.arange(layout.K), kr * sr)
    block, offset = np.divmod(within, kr)
    step = group * sr + (block - j) % sr
    result: npt.NDArray[Any] = t * layout.tile_elements + nr * layout.has_bias + (step * nr + j) * kr + offset
    return result


def bias_of(packed: npt.NDArray[Element], layout: GoiLayout) -> npt.NDArray[Element]:
    """Return the biases `[N]` in front of the tiles; raises PackingError for a layout without them."""
    if not layout.has_bias or packed.size != layout.elements:
        raise PackingError(f"{packed.size} elements are no packed matrix of {layout.elements} with biases")
    tiles = packed.reshape(layout.n_tiles, layout.tile_elements)
    return tiles[:, : layout.tile.nr].reshape(-1)[: layout.N]
