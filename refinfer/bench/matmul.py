"""`refinfer bench matmul`: the packed matmul of every format against `x @ W.T`, and where its gains come from.

Compares formats and kinds of memory pages. Leaves to others: models.
Read more: tutorial 02; clauses BENCH-5, BENCH-6, BENCH-15, BENCH-16.

One BLAS thread. There are enough copies of each matrix to make 160 MiB of float32, and they are multiplied one after
another, so that they do not stay in a core's own caches. From M = 64 on, when arithmetic takes the time, one copy of a
large matrix is enough. Both sides of a ratio lie in the same kind of page: huge ones, as numpy asks the system for, and
in rows named `4k-pages` small ones, as a mapped file may have.

The limit of a row is the longer of two times: its bytes at the speed of memory, its operations at the speed of
products. Turning narrow weights into float32 is a cost and no limit. No kernel is quickest on every machine, and the
speed of a machine drifts. So several kernels take turns with the rows, and the best of them is the limit. From M = 64
on only operations are a limit: reading takes a fraction of the time, if the weights do not stay in a cache anyway.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from refinfer.arrays import Float32Array
from refinfer.bench.entry import Bench, Progress, Row, quartiles
from refinfer.bench.harness import Timings, interleave
from refinfer.packing import int8
from refinfer.packing.formats import FORMATS, PackedMatrix, pack_matrix
from refinfer.packing.layout import TileShape
from refinfer.packing.matmul import matmul, scratch_floats
from refinfer.packing.product import GemmScratch, tile_rows
from refinfer.packing.xnnpack import GoiLayout, pack
from refinfer.process import usable_cores

__all__ = ["BENCH", "Weights", "candidates", "limit_kernels", "machine_limits", "matmul_rows"]

_SHAPES: Final = ((256, 256), (1024, 1024), (2048, 2048), (4096, 4096))
_ROWS_OF_X: Final = (1, 2, 4, 8, 16, 64, 256, 512)

_STREAMED_BYTES: Final = 160 << 20
_COMPUTE_COPIES_M: Final = 64  # from here on the time goes into arithmetic, not memory: one copy is enough

# the limits, by their names in the JSON
_READ, _READ_4K, _MULTIPLY = "read_gb_per_s", "read_4k_gb_per_s", "sgemm_gflop_per_s"
# how many, M, N, K: large products, and small ones that OpenBLAS does not pack
_PRODUCTS: Final = ((1, 1024, 1024, 1024), (1, 512, 1024, 1024), (16, 256, 256, 256), (256, 64, 64, 64))

Run = Callable[[], object]
Candidate = tuple[float, str, Callable[[int], object]]
"""The bytes of weights it reads, its baseline's name, and its product with copy `i`."""
Kernel = tuple[str, float, Run]
"""The limit it measures, and the bytes it reads or the operations it does."""


def limit_kernels(memory: Mapping[str, Float32Array]) -> dict[str, Kernel]:
    """Return the kernels of every limit: several that read each `memory`, named for its limit, and several products."""
    kernels: list[Kernel] = []
    for runs in zip(*map(_reads, memory.values()), strict=True):  # in turn, so that no cache holds what comes next
        kernels += [(limit, memory[limit].nbytes, run) for limit, run in zip(memory, runs, strict=True)]
    for n, M, N, K in _PRODUCTS:
        x, w, out = np.ones((M, K), np.float32), np.ones((K, N), np.float32), np.empty((n, M, N), np.float32)
        run = partial(np.matmul, x, np.broadcast_to(w, (n, K, N)), out=out)
        kernels.append((_MULTIPLY, 2.0 * n * M * N * K, run))
    return {f"limit {i}": kernel for i, kernel in enumerate(kernels)}


def _reads(memory: Float32Array) -> Iterator[Run]:
    flat = memory.reshape(-1)
    yield partial(np.dot, flat, flat)
    yield flat.max
    rows = flat[: flat.size // 2048 * 2048].reshape(-1, 2048)
    yield partial(np.dot, rows, np.ones(2048, np.float32))
    yield partial(np.dot, np.ones(len(rows), np.float32), rows)


def _best(kernels: Mapping[str, Kernel], timings: Timings) -> dict[str, float]:
    """Return the highest speed that a kernel of each limit reached in any round."""
    best: dict[str, float] = {}
    for name, (limit, work, _) in kernels.items():
        best[limit] = max(best.get(limit, 0.0), work / min(timings.seconds[name]) / 1e9)
    return best


def machine_limits(threads: int, rounds: int = 9) -> dict[str, float]:
    """Measure how fast BLAS threads read each kind of page (GB/s), and how fast they multiply float32 (GFLOP/s)."""
    ones, n = np.ones((1024, 1024), np.float32), max(1, _STREAMED_BYTES >> 22)
    kernels = limit_kernels({_READ: _copies(ones, n), _READ_4K: _copies(ones, n, _in_small_pages)})
    with threadpool_limits(threads, user_api="blas"):
        return _best(kernels, interleave({name: run for name, (_, _, run) in kernels.items()}, rounds))


def matmul_rows(
    shapes: Sequence[tuple[int, int]] = _SHAPES,
    rows_of_x: Sequence[int] = _ROWS_OF_X,
    rounds: int = 9,
    limits: dict[str, float] | None = None,
    progress: Progress = lambda: None,
) -> Iterator[Row]:
    """Yield a row for each format or named comparison, number of rows of x, and shape; `limits` keeps the best ones."""
    limits = {} if limits is None else limits
    rng = np.random.default_rng(0)
    with threadpool_limits(1, user_api="blas"):
        for N, K in shapes:
            weights = Weights(rng.standard_normal((N, K), dtype=np.float32) / np.float32(math.sqrt(K)))
            for M in rows_of_x:
                x = rng.standard_normal((M, K), dtype=np.float32)
                yield from _measure(weights, x, rounds, limits)
                progress()


class Weights:
    """One matrix in every form the bench compares, each in the same number of copies."""

    def __init__(self, w: Float32Array) -> None:
        self.N, self.K = w.shape
        self.n_copies = max(1, _STREAMED_BYTES // w.nbytes)
        self.row_major = _copies(w, self.n_copies)
        self.small_pages = _copies(w, self.n_copies, _in_small_pages)
        self.packed = {name: self._packed_copies(pack_matrix(w, name)) for name in FORMATS}
        self.packed_in_small_pages = self._packed_copies(pack_matrix(w, "f32"), _in_small_pages)
        self.xnnpack = {nr: self._xnnpack_copies(w, nr) for nr in (16, 32, 128) if self.N % nr == 0}
        q, self.int8_scales = int8.quantize(w)
        self.int8 = _copies(q, self.n_copies)

    def _packed_copies(
        self, packed: PackedMatrix, memory: Callable[[int], npt.NDArray[np.uint8]] | None = None
    ) -> list[PackedMatrix]:
        flat = np.zeros(packed.layout.padded_nbytes, np.uint8)
        for chunk, buffer in zip(packed.layout.chunks, packed.buffers, strict=True):
            flat[chunk.offset : chunk.offset + chunk.nbytes] = buffer
        return [
            PackedMatrix(packed.layout, [copy[c.offset : c.offset + c.nbytes] for c in packed.layout.chunks])
            for copy in _copies(flat, self.n_copies, memory)
        ]

    def _xnnpack_copies(self, w: Float32Array, nr: int) -> list[Float32Array]:
        """Return tiles `[T, K, nr]` as XNNPACK packs them, after their biases: views that skip the biases."""
        packed = pack(w, GoiLayout(self.N, self.K, TileShape(nr), has_bias=True))
        return [
            copy.reshape(self.N // nr, nr * (self.K + 1))[:, nr:].reshape(-1, self.K, nr)
            for copy in _copies(packed, self.n_copies)
        ]


def _copies(
    array: npt.NDArray[Any], n: int, memory: Callable[[int], npt.NDArray[np.uint8]] | None = None
) -> npt.NDArray[Any]:
    """Return `[n, *array.shape]`, all copies of `array`, each on a page of 4096 bytes."""
    stride = -(-array.nbytes // 4096) * 4096
    raw = (memory or _in_huge_pages)(n * stride + 4096)
    raw = raw[-raw.ctypes.data % 4096 :][: n * stride].reshape(n, stride)
    copies = raw[:, : array.nbytes].view(array.dtype).reshape(n, *array.shape)
    copies[:] = array
    return copies


def _in_huge_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    return np.empty(nbytes, np.uint8)  # numpy asks for huge pages from 4 MiB on


def _in_small_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def candidates(weights: Weights, x: Float32Array) -> dict[str, Candidate]:
    """Return everything that is compared for these weights and this x, by name."""
    M, N, K = len(x), weights.N, weights.K
    out = np.empty((M, N), np.float32)
    layouts = [packed[0].layout for packed in weights.packed.values()]
    scratch = GemmScratch(scratch_floats(layouts, M))
    f32_bytes = 4.0 * N * K

    def packed_run(copies: list[PackedMatrix]) -> Callable[[int], object]:
        return lambda i: matmul(x, copies[i].layout, copies[i].tiles, out=out, scratch=scratch)

    found: dict[str, Candidate] = {
        "naive": (f32_bytes, "naive", lambda i: x @ weights.row_major[i].T),
        "naive-4k-pages": (f32_bytes, "naive-4k-pages", lambda i: x @ weights.small_pages[i].T),
        "f32-4k-pages": (f32_bytes, "naive-4k-pages", packed_run(weights.packed_in_small_pages)),
    }
    for name, copies in weights.packed.items():
        nbytes = float(sum(chunk.nbytes for chunk in copies[0].layout.chunks))
        found[name] = (nbytes, "naive", packed_run(copies))
    if 1 < M <= 16 and (nr := tile_rows(M, K)):
        tiled_out = out.reshape(M, N // nr, nr).transpose(1, 0, 2)

        def by_tiles(i: int) -> object:
            np.matmul(x, weights.row_major[i].reshape(-1, nr, K).transpose(0, 2, 1), out=tiled_out)
            return out

        found["f32-by-tiles"] = (f32_bytes, "naive", by_tiles)
    for width, tiles in weights.xnnpack.items():
        found[f"f32-nr{width}"] = (f32_bytes, "naive", _xnnpack_run(x, tiles, out, width))
    if M == 1:
        q, scales = weights.int8, weights.int8_scales[:, None]
        found["int8-naive"] = (N * K + 4.0 * N, "naive", lambda i: x @ (q[i].astype(np.float32) * scales).T)
    return found


def _xnnpack_run(x: Float32Array, tiles: Sequence[Float32Array], out: Float32Array, nr: int) -> Callable[[int], object]:
    view = out.reshape(len(x), -1, nr).transpose(1, 0, 2)

    def run(i: int) -> object:
        np.matmul(x, tiles[i], out=view)
        return out

    return run


def _measure(weights: Weights, x: Float32Array, rounds: int, limits: dict[str, float]) -> Iterator[Row]:
    M, N, K = len(x), weights.N, weights.K
    n_copies = 1 if M >= _COMPUTE_COPIES_M and N * K >= 1 << 20 else weights.n_copies

    def over_copies(run: Callable[[int], object]) -> Run:
        def turn() -> None:
            for i in range(n_copies):
                run(i)

        return turn

    compared = candidates(weights, x)
    memory = {_READ: weights.row_major, _READ_4K: weights.small_pages} if M < _COMPUTE_COPIES_M else {}
    kernels = limit_kernels(memory)
    turns = {name: over_copies(run) for name, (_, _, run) in compared.items()}
    timings = interleave(turns | {name: run for name, (_, _, run) in kernels.items()}, rounds)
    here = _best(kernels, timings)
    limits.update({limit: max(speed, limits.get(limit, 0.0)) for limit, speed in here.items()})
    for name, (nbytes, baseline, _) in compared.items():
        seconds = timings.median(name) / n_copies
        work = {_MULTIPLY: 2.0 * M * N * K, _READ_4K if baseline == "naive-4k-pages" else _READ: nbytes}
        at_limit = {limit: work[limit] / here[limit] / 1e9 for limit in work if limit in here}
        limited_by = max(at_limit, key=lambda limit: at_limit[limit])
        low, high = timings.spread(name, baseline)
        yield {
            "format": name,
            "m": M,
            "n": N,
            "k": K,
            "ratio_to_naive": round(timings.ratio(name, baseline), 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "gb_per_s": round(nbytes / seconds / 1e9, 2),
            "gflop_per_s": round(2.0 * M * N * K / seconds / 1e9, 2),
            "fraction_of_limit": round(at_limit[limited_by] / seconds, 3),
            "limited_by": limited_by,
        }


def _with_limits(progress: Progress) -> dict[str, Any]:
    one: dict[str, float] = {}
    rows = list(matmul_rows(limits=one, progress=progress))
    by_threads = [{"threads": 1} | one]
    if (cores := usable_cores()) > 1:
        by_threads.append({"threads": cores} | machine_limits(cores))
    return {"limits": one | {"by_threads": by_threads}, "rows": rows}


BENCH: Final = Bench(
    summary="Measure the packed matmul of every format against x @ W.T.",
    title="x @ W.T, one BLAS thread, against the same on row-major float32 weights",
    steps=lambda: len(_SHAPES) * len(_ROWS_OF_X),
    measure=_with_limits,
    columns={
        "format": lambda row: str(row["format"]),
        "M": lambda row: str(row["m"]),
        "N x K": lambda row: f"{row['n']} x {row['k']}",
        "times as fast": lambda row: f"{row['ratio_to_naive']:.2f}",
        "quartiles": quartiles,
        "GB/s": lambda row: f"{row['gb_per_s']:.1f}",
        "GFLOP/s": lambda row: f"{row['gflop_per_s']:.1f}",
        "of the limit": lambda row: f"{row['fraction_of_limit']:.0%}",
    },
    keys=3,
    notes={
        "M": "the number of rows of x; W has N rows and K columns",
        "f32-by-tiles": "row-major weights, not packed: at M = 2 to 16 the gain comes from the call, not the layout",
        "f32-nr16/32": "XNNPACK's own tile shapes (nr128: the same order, wider). Its kernels want 16 or 32 outputs at "
        "once, BLAS wants long rows: from M = 64 on it repacks each narrow tile for itself, and loses up to half",
        "int8-naive": "q is widened and scaled as a whole, then multiplied, which writes and reads four bytes for each "
        "byte of q",
        "4k-pages": "both sides in small pages, as a mapped file may have; all other rows are in huge pages",
        "of the limit": "the time this core needs to read the weights or to multiply, whichever is longer, at the best "
        "speed of several kernels in the same rounds and kind of page",
    },
)
