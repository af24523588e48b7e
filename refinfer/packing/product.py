"""Multiply x with some rows of float32 weights: which numpy call for how many rows of x, and the memory it works in.

Records what BLAS (the library in which numpy multiplies matrices) is quick at, and how much fits in a processor's cache
(its small, fast memory). Leaves to others: how weights are stored (`int8` and its like), where they lie (`layout`).
Read more: tutorial 02; clauses PACK-25, PACK-26.

A weight matrix W is `[N, K]`: N outputs, each with a row of K weights. x is `[M, K]`: a row for each token that is
computed at once, so M is 1 while text is generated and large while a prompt is read. A product is `x @ W.T`, `[M, N]`.
R is the number of rows in a part of W, and a tile is `nr` neighbouring rows. To widen weights is to turn a smaller
type, such as int8, into float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from refinfer.arrays import Float32Array, aligned_empty
from refinfer.errors import PackingError

__all__ = [
    "CACHED_FLOATS",
    "FEW_ROWS",
    "GEMM_CONFIG",
    "MANY_FLOATS",
    "Call",
    "GemmScratch",
    "Product",
    "call_for",
    "rows_at_once",
    "tile_rows",
]

FEW_ROWS: Final = 16
"""Up to this many rows of x, widening weights costs more than multiplying them."""

CACHED_FLOATS: Final = 1 << 17
"""How many weights to widen at a time for few rows of x: half a megabyte, which stays in the processor's cache."""

MANY_FLOATS: Final = 1 << 20
"""How many weights to widen at a time for many rows of x: BLAS is not efficient with fewer."""


@dataclass(frozen=True, slots=True)
class Call:
    """One way to multiply float32 rows of weights with up to `most_rows` rows of x, and the reason for it."""

    name: str
    most_rows: float
    reason: str


GEMM_CONFIG: Final = (
    Call("dot", 1, "a matrix times a vector streams its weights at the speed of memory: nothing to gain"),
    Call("tiles", 16, "OpenBLAS has a path for small matrices that packs nothing: 1.5 to 2.5 times as fast"),
    Call("weights-first", 127, "W @ x.T lets the larger operand be the one that BLAS walks through: up to 1.1 times"),
    Call("whole", float("inf"), "BLAS packs both operands itself and reaches its peak: a plain call"),
)
"""Which call to use for how many rows of x; `refinfer bench matmul` measures each.

GEMM is BLAS's name for a product of two matrices. That BLAS "packs" means here that it first copies both into an order
of its own. OpenBLAS is the BLAS that numpy brings along.
"""

_SMALL_MATMUL: Final = 1_000_000
"""The call "tiles" is quick while M * rows * K stays below this, as measured.

OpenBLAS does not copy matrices that are this small on processors with AVX-512, which are instructions for 16 floats at
once (`kernel/x86_64/sgemm_small_kernel_permit_skylakex.c`).
"""


@lru_cache(maxsize=256)
def tile_rows(M: int, K: int) -> int:
    """Return how many rows make a tile for the call "tiles"; 0 if even 4 rows are too many."""
    return next((rows for rows in (16, 8, 4) if M * rows * K < _SMALL_MATMUL), 0)


@lru_cache(maxsize=256)
def call_for(M: int, K: int) -> Call:
    """Return the entry of `GEMM_CONFIG` for M rows of x; "weights-first" instead of "tiles" if rows are too long."""
    call = next(call for call in GEMM_CONFIG if call.most_rows >= M)
    return GEMM_CONFIG[2] if call.name == "tiles" and not tile_rows(M, K) else call


def rows_at_once(M: int, nr: int, K: int) -> int:
    """Return how many rows of weights to widen at a time for M rows of x: whole tiles of `nr`, at least one."""
    floats = CACHED_FLOATS if M <= FEW_ROWS else MANY_FLOATS
    return max(1, floats // (K * nr)) * nr


class GemmScratch:
    """Scratch: memory reserved for one product to work in. `take` hands out a piece, `reset` takes pieces back."""

    def __init__(self, floats: int) -> None:
        self._arena = aligned_empty((floats,))
        self._used = 0

    @property
    def nbytes(self) -> int:
        """How many bytes are reserved."""
        return self._arena.nbytes

    def take(self, *shape: int) -> Float32Array:
        """Return an uninitialised float32 array; raises PackingError when the scratch is too small."""
        start, end = self._used, self._used + math.prod(shape)
        if end > self._arena.size:
            raise PackingError(f"{end} floats of scratch are needed, {self._arena.size} are reserved")
        self._used = end
        return self._arena[start:end].reshape(shape)

    def reset(self, used: int = 0) -> None:
        """Take back everything that was handed out since `used` floats were in use: all of it by default."""
        self._used = used

    @property
    def used(self) -> int:
        """How many floats are handed out."""
        return self._used


class Product:
    """x `[M, K]`, ready to be multiplied with float32 rows: the call to use, and x in the form that this call needs."""

    __slots__ = ("M", "call", "columns", "row", "scratch", "x")

    row: Float32Array  # x[0], for the call "dot"
    columns: Float32Array  # x.T, contiguous, for the call "weights-first"

    def __init__(self, x: Float32Array, scratch: GemmScratch) -> None:
        self.x = x
        self.M, K = x.shape
        self.scratch = scratch
        self.call = call_for(self.M, K).name
        if self.call == "dot":
            self.row = x[0]
        elif self.call == "weights-first":
            self.columns = scratch.take(K, self.M)
            np.copyto(self.columns, x.T)

    @staticmethod
    def scratch_floats(M: int, K: int, rows: int) -> int:
        """Return how many floats of scratch a product with up to `rows` rows of weights takes.

        Only the call "weights-first" takes any: for x and for the outputs, both transposed.
        """
        return M * (K + rows) if call_for(M, K).name == "weights-first" else 0

    # --8<-- [start:rows]
    def rows(self, w: Float32Array, out: Float32Array) -> None:
        """Multiply with R rows of weights `w` `[R, K]`: `out` `[M, R]` becomes `x @ w.T`."""
        if self.call == "dot":
            np.dot(w, self.row, out=out[0])
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

    # --8<-- [end:rows]

    # --8<-- [start:by_tiles]
    def _by_tiles(self, w: Float32Array, out: Float32Array) -> None:
        """Multiply the last rows, which fill no tile, and then all tiles: numpy calls BLAS once for each."""
        (R, K), M = w.shape, self.M
        nr = tile_rows(M, K)
        if rest := R % nr:
            np.matmul(self.x, w[R - rest :].T, out=out[:, R - rest :])
            w, out = w[: R - rest], out[:, : R - rest]
        if rest < R:
            tiles = w.reshape(-1, nr, K).transpose(0, 2, 1)
            np.matmul(self.x, tiles, out=out.reshape(M, -1, nr).transpose(1, 0, 2))

    # --8<-- [end:by_tiles]
