"""XNNPACK's own layouts: `goi` order for any nr, kr and sr, and its int8 tile.

The engine does not use them: its kernels are numpy calls, which want other tiles (`f32`, `bf16`, `int8`, `int4`). They
are here because they are what the article packs, and because they can be checked against bytes that XNNPACK wrote.
Leaves to others: the engine's formats.
Read more: tutorial 01; clauses PACK-1 to PACK-3, PACK-6 to PACK-9, PACK-14, PACK-15.

XNNPACK's micro-kernel computes `nr` outputs at once and wants to walk straight through memory, so a tile of a matrix
`[N, K]` is stored in the order in which its kernel reads it:

    nr biases | step 0: kr weights of row 0, kr of row 1, ... of row nr-1 | step 1: ... | ...

With `sr > 1` the rows of a step start at different places, row j rotated by j * kr within each kr * sr columns, so
that a kernel can shuffle its inputs instead of broadcasting them.

Its int8 tile (`xnn_pack_qs8_gemm_goi_w` as used for qd8, dynamic activations) serves an integer kernel:

    nr int32   -sum over k of q[n, k]     times the zero point of an activation row, added by the kernel
    int8       the weights in goi order   kr columns of each row, K padded to kr with 0
    nr float32 scales | nr float32 biases
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, IntArray, require_rows
from refinfer.errors import PackingError
from refinfer.packing.int8 import Int8Array
from refinfer.packing.layout import TileShape

__all__ = [
    "GoiLayout",
    "bias_of",
    "draw",
    "pack",
    "pack_rows",
    "pack_xnnpack_int8",
    "unpack",
    "unpack_rows",
    "unpack_xnnpack_int8",
]

Element = TypeVar("Element", bound=np.generic)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class GoiLayout:
    """A packed matrix of `N` outputs and `K` inputs, in elements; `has_bias` puts nr biases in front of each tile.

    The name is XNNPACK's: the source is ordered groups, outputs, inputs (`xnn_pack_f32_gemm_goi_w`,
    `src/reference/packing.cc`); there is one group.

    Raises:
        PackingError: N or K is below one.

    Examples:
        >>> GoiLayout(5, 3, TileShape(4, kr=2), has_bias=True).weight_index(4, 2)
        32
    """

    N: int
    K: int
    tile: TileShape
    has_bias: bool = False

    def __post_init__(self) -> None:
        if min(self.N, self.K) < 1:
            raise PackingError(f"a matrix of {self.N} outputs and {self.K} inputs cannot be packed")

    @property
    def n_tiles(self) -> int:
        """The number of tiles that hold all rows."""
        return -(-self.N // self.tile.nr)

    @property
    def padded_k(self) -> int:
        """K rounded up to whole groups of `kr * sr` columns."""
        return _round_up(self.K, self.tile.kr * self.tile.sr)

    @property
    def tile_elements(self) -> int:
        """Elements of one tile, its biases and pads included."""
        return self.tile.nr * (self.padded_k + self.has_bias)

    @property
    def elements(self) -> int:
        """Elements of all tiles."""
        return self.n_tiles * self.tile_elements

    def bias_index(self, n: int) -> int:
        """Return where the bias of output `n` lies."""
        t, j = divmod(n, self.tile.nr)
        return t * self.tile_elements + j

    # --8<-- [start:weight_index]
    def weight_index(self, n: int, k: int) -> int:
        """Return where the weight of output `n` and input `k` lies; `k` may be a pad, up to `padded_k - 1`.

        Places are counted in elements from the first tile on. In a tile, the biases come first, then step after step.
        In a step, lane after lane has `kr` neighbouring columns, called a block. The `sr` blocks of a group fill `sr`
        steps: lane j has block j of the group in the first of them, then block j + 1, and wraps within the group.
        """
        # lab 02: find a weight's tile, step and lane, and count what lies before it
        nr, kr, sr = self.tile.nr, self.tile.kr, self.tile.sr
        t, j = divmod(n, nr)
        group, within = divmod(k, kr * sr)
        block, offset = divmod(within, kr)
        step = group * sr + (block - j) % sr  # row j starts j blocks later, and wraps
        return t * self.tile_elements + nr * self.has_bias + (step * nr + j) * kr + offset
        # end lab

    # --8<-- [end:weight_index]

    def labels(self) -> list[str]:
        """Return what lies at each index: `b3`, `w21`, `0` for a pad in K, `--` for the lanes of missing rows."""
        digits = len(str(max(self.N, self.K) - 1))
        labels = ["--"] * self.elements
        for n in range(self.N):
            if self.has_bias:
                labels[self.bias_index(n)] = f"b{n}"
            for k in range(self.padded_k):
                name = f"w{n}{k}" if digits == 1 else f"w{n},{k}"
                labels[self.weight_index(n, k)] = name if k < self.K else "0"
        return labels


def draw(layout: GoiLayout) -> str:
    """Draw a small layout: a line for the biases of a tile, then one for each step of `kr` columns.

    Examples:
        >>> print(draw(GoiLayout(2, 3, TileShape(2, kr=2), has_bias=True)))
        @ 0: b0 b1
        @ 2: w00 w01 | w10 w11
        @ 6: w02 0   | w12 0
    """
    nr, kr, labels = layout.tile.nr, layout.tile.kr, layout.labels()
    digits = max(2, len(str(layout.elements)))
    pad = "0".ljust(max(map(len, labels)) if kr > 1 else 1)  # as wide as a weight, so that columns stay columns
    between = " | " if kr > 1 and layout.tile.sr == 1 else " "
    lines = []
    for start in range(0, layout.elements, layout.tile_elements):
        steps = start + nr * layout.has_bias
        if layout.has_bias:
            lines.append(f"@{start:{digits}}: " + " ".join(labels[start:steps]))
        for step in range(steps, start + layout.tile_elements, nr * kr):
            rows = [labels[i : i + kr] for i in range(step, step + nr * kr, kr)]
            drawn = between.join(" ".join(pad if x == "0" else x for x in row) for row in rows)
            lines.append(f"@{step:{digits}}: {drawn.rstrip()}")
    return "\n".join(lines)


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
    """Pack the rows of `w` `[n, K]`, which start at `first_row` of the matrix, into `packed`.

    `packed` holds the whole matrix, so that it can be packed in blocks of rows. Pads are left as they are: `packed`
    starts as zeros.

    Raises:
        PackingError: shapes or types do not match, `first_row` is not the start of a tile, or `packed` is not
            contiguous.
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
    """View the columns of some tiles, from `start` on, as `[T, group, block, lane, kr]`."""
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
    """Return the matrix `[N, K]` that was packed: the inverse of `pack`, for tests."""
    return unpack_rows(packed, layout, np.arange(layout.N))


def unpack_rows(packed: npt.NDArray[Element], layout: GoiLayout, ids: IntArray) -> npt.NDArray[Element]:
    """Return the rows `ids` as `[len(ids), K]`; reads those rows only.

    Raises:
        PackingError: `packed` does not have the layout's size.
        RequestError: a row does not exist.
    """
    ids = np.asarray(ids)
    if packed.size != layout.elements or packed.ndim != 1:
        raise PackingError(f"{packed.size} elements are not a packed matrix of {layout.elements}")
    require_rows(ids, layout.N)
    rows: npt.NDArray[Element] = packed[_indices(layout, ids)]
    return rows


def _indices(layout: GoiLayout, ids: IntArray) -> npt.NDArray[Any]:
    """Return `layout.weight_index` for whole rows at once: `[len(ids), K]`."""
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
        raise PackingError(f"{packed.size} elements are not a packed matrix of {layout.elements} with biases")
    tiles = packed.reshape(layout.n_tiles, layout.tile_elements)
    return tiles[:, : layout.tile.nr].reshape(-1)[: layout.N]


def pack_xnnpack_int8(q: Int8Array, scales: Float32Array, bias: Float32Array, tile: TileShape) -> npt.NDArray[np.uint8]:
    """Pack into XNNPACK's int8 tiles, byte for byte: row sums, weights, scales, biases; missing rows are zero.

    Raises:
        PackingError: shapes or types do not match.
    """
    N, K = q.shape
    layout = GoiLayout(N, K, tile)
    if scales.shape != (layout.N,) or bias.shape != (layout.N,):
        raise PackingError(f"{layout.N} rows need one scale and one bias each, not {scales.shape} and {bias.shape}")
    if q.dtype != np.int8 or scales.dtype != np.float32 or bias.dtype != np.float32:
        raise PackingError(
            f"q, scales and bias must be int8, float32 and float32, not {q.dtype}, {scales.dtype} and {bias.dtype}"
        )

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
