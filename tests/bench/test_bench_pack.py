"""The bench of packing. Speed itself is never judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from refinfer.arrays import Float32Array
from refinfer.bench import pack
from refinfer.bench.harness import Timings
from refinfer.cli.main import main
from refinfer.packing.formats import FORMATS
from refinfer.packing.layout import Chunk, PackedLayout

Buffer: TypeAlias = npt.NDArray[np.uint8]


@pytest.mark.spec("BENCH-7")
def test_bench_pack_prints_a_row_for_every_packer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that gives each packer 10, 40 and 20 microseconds, and each copy 5."""

    def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, progress: object) -> Timings:
        for run in candidates.values():
            run()
        return Timings({name: (5e-6,) * 3 if "copy" in name else (1e-5, 4e-5, 2e-5) for name in candidates})

    monkeypatch.setattr(pack, "interleave", interleave)
    rows = list(pack.pack_bench_rows((64, 96), rounds=1))
    assert {row["format"] for row in rows} == {*FORMATS, "f32-nr16-kr1", "f32-nr32-kr1", "f32-nr8-kr4"}
    assert all((row["ratio_to_copy"], row["ratio_quartiles"]) == (0.25, [0.125, 0.5]) for row in rows)
    for row in rows:
        nbytes = 64 * 96 * (2 if row["format"] == "bf16" else 4)
        assert row["gb_per_s"] == pytest.approx(nbytes / 2e-5 / 1e9, abs=0.01)
    monkeypatch.setattr(pack, "pack_bench_rows", lambda progress: rows)
    assert main(["bench", "pack", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert main(["bench", "pack"]) == 0
    assert "f32-nr32-kr1" in capsys.readouterr().out
    keys = list(pack.BENCH.columns.values())[: pack.BENCH.keys]
    assert len({tuple(show(row) for show in keys) for row in rows}) == len(rows)  # its first columns name a row


@pytest.mark.spec("BENCH-7")
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_timed_packs_every_row_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.broadcast_to(np.arange(4800, dtype=np.float32)[:, None], (4800, 1024))
    chunks: list[list[float]] = []
    memory: list[Buffer] = []

    def pack_chunk(some: Float32Array, layout: PackedLayout, chunk: Chunk, buffer: Buffer) -> None:
        chunks.append(some[:, 0].tolist())
        memory.append(buffer)
        assert buffer.nbytes == chunk.nbytes

    monkeypatch.setattr(pack, "pack_chunk", pack_chunk)
    pack._packer(rows, name)()
    assert not any(np.may_share_memory(one, other) for one, other in pairwise(memory))
    assert len(chunks) > 1
    assert [number for chunk in chunks for number in chunk] == list(range(4800))
