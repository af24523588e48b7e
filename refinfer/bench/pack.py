"""`refinfer bench pack`: how fast rows become tiles, against a plain copy of the same rows.

Leaves to others: files.
Read more: tutorial 01; clause BENCH-7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import f32_to_bf16
from refinfer.bench.entry import Bench, Progress, Row, quartiles
from refinfer.bench.harness import interleave
from refinfer.packing.formats import layout_of, pack_chunk
from refinfer.packing.layout import TileShape
from refinfer.packing.xnnpack import GoiLayout, pack_rows

__all__ = ["BENCH", "pack_bench_rows"]

_SHAPE: Final = (4096, 4096)
_ROUNDS: Final = 9


def pack_bench_rows(
    shape: tuple[int, int] = _SHAPE, rounds: int = _ROUNDS, progress: Progress = lambda: None
) -> Iterator[Row]:
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


BENCH: Final = Bench(
    summary="Measure how fast weights are packed, against a plain copy.",
    title="Packing, against a plain copy of the same rows",
    steps=lambda: _ROUNDS,
    measure=lambda progress: {"rows": list(pack_bench_rows(progress=progress))},
    columns={
        "format": lambda row: str(row["format"]),
        "N x K": lambda row: f"{row['n']} x {row['k']}",
        "of a copy's speed": lambda row: f"{row['ratio_to_copy']:.2f}",
        "quartiles": quartiles,
        "GB/s read": lambda row: f"{row['gb_per_s']:.1f}",
    },
    notes={
        "f32-nrN-krM": "XNNPACK's own layouts, written for any tile; all others are the formats that refinfer computes "
        "with",
    },
)
