"""Where every weight, bias and pad of a packed matrix lies: index arithmetic, no data.

Knows: XNNPACK's `goi` order for any tile shape, and how a row of tiles is cut into chunks. Does not know: bytes,
arrays, number formats.
Spec: PACK-1 to PACK-5. Tutorial: 01.

A matrix `[N, K]` is cut into tiles of `nr` rows. XNNPACK's micro-kernel computes `nr` outputs at once and wants to
walk straight through memory, so a tile is stored as its kernel reads it:

    nr biases | step 0: kr weights of row 0, kr of row 1, ... of row nr-1 | step 1: ... | ...

With `sr > 1` the rows of a step start at different places, row j rotated by j * kr inside each kr * sr columns, so
that a kernel can shuffle its inputs instead of broadcasting them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError

__all__ = ["Chunk", "GoiLayout", "TileShape", "count_chunks", "cut_into_chunks", "draw"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class TileShape:
    """XNNPACK's words: `nr` rows to a tile, `kr` neighbouring columns kept together, `sr` shuffled groups of them.

    `kr=1` gives a tile `[K, nr]`, its transpose; `kr=K` keeps rows whole, `[nr, K]`.

    Raises:
        PackingError: a size below one.
    """

    nr: int
    kr: int = 1
    sr: int = 1

    def __post_init__(self) -> None:
        if min(self.nr, self.kr, self.sr) < 1:
            raise PackingError(f"nr, kr and sr must be at least 1, not {self.nr}, {self.kr}, {self.sr}")


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
        """How many tiles hold all rows."""
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
        """Return where the weight of output `n` and input `k` lies; `k` may be a pad, up to `padded_k - 1`."""
        nr, kr, sr = self.tile.nr, self.tile.kr, self.tile.sr
        t, j = divmod(n, nr)
        group, within = divmod(k, kr * sr)
        block, offset = divmod(within, kr)
        step = group * sr + (block - j) % sr  # row j starts j blocks later, and wraps
        return t * self.tile_elements + nr * self.has_bias + (step * nr + j) * kr + offset

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


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of whole tiles: the unit that is checksummed, read, locked and multiplied.

    `offset` and `nbytes` are its place in the packed matrix, in bytes; `nbytes` without the padding that brings the
    next chunk to a page. It holds the rows `first_row` to `first_row + n_rows - 1`, `n_rows` without missing rows.
    """

    first_row: int
    n_rows: int
    offset: int
    nbytes: int

    @property
    def padded_nbytes(self) -> int:
        """The bytes it takes in a file: whole pages."""
        return _round_up(self.nbytes, PAGE_BYTES)


def count_chunks(N: int, nr: int, tile_nbytes: int, target_nbytes: int) -> int:
    """Return how many chunks `cut_into_chunks` would cut."""
    n_tiles = -(-N // nr)
    return min(n_tiles, max(1, round(n_tiles * tile_nbytes / target_nbytes)))


def cut_into_chunks(N: int, nr: int, tile_nbytes: int, target_nbytes: int) -> tuple[Chunk, ...]:
    """Cut a row of tiles into chunks of about `target_nbytes`, as equal as whole tiles allow, each on a page.

    A matrix below one and a half targets is one chunk; a tile larger than the target is a chunk by itself.
    """
    return tuple(_cut(N, nr, tile_nbytes, target_nbytes))


# --8<-- [start:cut]
def _cut(N: int, nr: int, tile_nbytes: int, target_nbytes: int) -> Iterator[Chunk]:
    n_tiles = -(-N // nr)
    n_chunks = count_chunks(N, nr, tile_nbytes, target_nbytes)
    offset = 0
    for i in range(n_chunks):
        first, end = i * n_tiles // n_chunks, (i + 1) * n_tiles // n_chunks
        chunk = Chunk(first * nr, min(N, end * nr) - first * nr, offset, (end - first) * tile_nbytes)
        yield chunk
        offset += chunk.padded_nbytes


# --8<-- [end:cut]
