"""`refinfer bench pack`: how fast rows become tiles, against a plain copy of the same rows.

Knows: the packers. Does not know: files.
Spec: BENCH-7. Tutorial: 01.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import f32_to_bf16
from refinfer.bench.harness import interleave
from refinfer.packing.formats import layout_of, pack_chunk
from refinfer.packing.layout import TileShape
from refinfer.packing.xnnpack import GoiLayout, pack_rows

__all__ = ["PACK_ROUNDS", "PACK_SHAPE", "pack_bench_rows"]

PACK_SHAPE: Final = (4096, 4096)
PACK_ROUNDS: Final = 9


def pack_bench_rows(
    shape: tuple[int, int] = PACK_SHAPE, rounds: int = PACK_ROUNDS, progress: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each format from the type it is stored in, and for XNNPACK's shapes: ratio to a plain copy."""
    N, K = shape
    w = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    bits = f32_to_bf16(w)
    sources: dict[str, npt.NDArray[Any]] = {"f32": w, "bf16": bits, "int8": w, "int4": w}
    compared = {name: (rows, _packer(rows, name)) for name, rows in sources.items()}
    for tile in (TileShape(16), TileShape(32), TileShape(8, kr=4)):
        compared[f"f32-nr{tile.nr}-kr{tile.kr}"] = (w, _goi_packer(w, GoiLayout(N, K, tile, has_bias=True)))
    candidates: dict[str, Callable[[], object]] = {name: pack for name, (_, pack) in compared.items()}
    for source in (w, bits):
        candidates[f"copy-{source.dtype}"] = _copier(source)
    timings = interleave(candidates, rounds, progress=progress)
    for name, (rows, _) in compared.items():
        baseline = f"copy-{rows.dtype}"
        low, high = timings.spread(name, baseline)
        yield {
            "format": name,
            "n": N,
            "k": K,
            "ratio_to_copy": round(timings.ratio(name, baseline), 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "gb_per_s": round(rows.nbytes / timings.median(name) / 1e9, 2),
        }


def _packer(rows: npt.NDArray[Any], name: str) -> Callable[[], object]:
    layout = layout_of(name, *rows.shape)
    memory = np.zeros(layout.padded_nbytes, np.uint8)

    def pack() -> None:
        for chunk in layout.chunks:
            buffer = memory[chunk.offset : chunk.offset + chunk.nbytes]
            pack_chunk(rows[chunk.first_row : chunk.first_row + chunk.n_rows], layout, chunk, buffer)

    return pack


def _goi_packer(rows: npt.NDArray[Any], layout: GoiLayout) -> Callable[[], object]:
    packed = np.zeros(layout.elements, rows.dtype)
    return lambda: pack_rows(rows, layout, packed)


def _copier(rows: npt.NDArray[Any]) -> Callable[[], object]:
    copy = np.zeros_like(rows)
    return lambda: np.copyto(copy, rows)
