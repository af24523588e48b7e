"""How soon the first token comes, and how much memory that takes: packing at each start, building, loading.

Measures fresh processes, with the page cache warm and cold, on a synthetic checkpoint of a gigabyte. Leaves to others:
how a cache works.
Read more: tutorial 06; clause BENCH-9.

Every start is a process of its own, timed from inside: from the beginning of loading to the first token after a prompt
of one token, with one BLAS thread. Python's own start and imports are not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from refinfer.bench.entry import Bench, Progress, Row
from refinfer.errors import GenerationError
from refinfer.generate import STORYTELLER, load
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS
from refinfer.units import format_nbytes
from refinfer.weight_cache.directory import remove

__all__ = ["BENCH", "GIGABYTE", "Start", "drop_page_cache", "run_start", "start_bench"]

GIGABYTE: Final = replace(SHAPES["tinyllama-1.1b"], num_hidden_layers=5, vocab_size=8192, tie_word_embeddings=True)
"""Five layers of TinyLlama: 0.95 GB in float32, and few names."""

_ROUNDS: Final = 5
_CHILD: Final = "from refinfer.bench.start import child; import sys; child(*sys.argv[1:])"
_BLOCK: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Start:
    """One way to start: `mode` none (packs into memory), build or load, with the page cache warm or cold."""

    mode: str
    page_cache: str
    verify: bool = True


_STARTS: Final = (
    Start("none", "warm"),
    Start("none", "cold"),
    Start("build", "warm"),
    Start("build", "cold"),
    Start("load", "warm"),
    Start("load", "warm", verify=False),
    Start("load", "cold"),
    Start("load", "cold", verify=False),
)


def child(model: str, weights: str, weight_cache: str, verify: str, report: str) -> None:
    """Start once, generate one token, and write the statistics to the file `report`; runs in a process of its own."""
    with load(
        model, weights=weights, weight_cache=weight_cache, verify=verify == "True", threads=1, max_positions=8
    ) as session:
        for _ in session.generate(token_ids=[1], max_tokens=1):
            pass
        assert session.stats is not None
        Path(report).write_text(json.dumps(session.stats.to_json()))


def run_start(model: Path, weights: str, weight_cache: str, *, verify: bool = True) -> dict[str, Any]:
    """Start a fresh process that generates one token; return its `GenerationStats` as JSON.

    Raises:
        GenerationError: the start failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-c", _CHILD, str(model), weights, weight_cache, str(verify), str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (this very program)
        if done.returncode:
            raise GenerationError(f"a start failed: {done.stderr.strip().splitlines()[-1:]}")
        stats: dict[str, Any] = json.loads(report.read_text())
        return stats


def drop_page_cache(path: Path) -> None:
    """Take a file out of the page cache; needs no privileges. Pages that are not yet on the disk stay."""
    if path.exists() and hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    if path.exists():
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass


def start_bench(
    config: ModelConfig = GIGABYTE, rounds: int = _ROUNDS, progress: Progress = lambda: None
) -> dict[str, Any]:
    """Return the rows of `refinfer bench start`, and the peak memory of a start with the storyteller."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, file = folder / "model", folder / "weights.packed"
        write_checkpoint(model, config, dtype="f32")
        os.sync()
        sources = sorted(model.glob("*.safetensors"))
        base = run_start(STORYTELLER, "auto", ":memory")["peak_rss_bytes"]
        rows = [row for weights in FORMATS for row in _rows(weights, model, sources, file, rounds, progress)]
        return {"base_rss_bytes": base, "source_bytes": sum(s.stat().st_size for s in sources), "rows": rows}


def _rows(weights: str, model: Path, sources: list[Path], file: Path, rounds: int, progress: Progress) -> Iterator[Row]:
    measured: dict[Start, list[dict[str, Any]]] = {start: [] for start in _STARTS}
    remove(file)
    run_start(model, weights, str(file))  # to warm up, and so that the digest of the source is known
    for _ in range(rounds):
        for start in _STARTS:
            if start.mode == "build":
                file.unlink(missing_ok=True)  # the side file stays, so that hashing is not timed
            for path in (*sources, file):
                (drop_page_cache if start.page_cache == "cold" else _read_through)(path)
            place = ":memory" if start.mode == "none" else str(file)
            measured[start].append(run_start(model, weights, place, verify=start.verify))
        progress()
    remove(file)
    for start, stats in measured.items():
        yield _row(weights, start, stats, measured[Start("none", start.page_cache)])


def _row(weights: str, start: Start, stats: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> Row:
    ratios = [
        none["time_to_first_token_s"] / own["time_to_first_token_s"] for none, own in zip(baseline, stats, strict=True)
    ]
    return {
        "format": weights,
        **asdict(start),
        "open_s": statistics.median(s["weight_cache"]["load_or_build_s"] for s in stats),
        "time_to_first_token_s": statistics.median(s["time_to_first_token_s"] for s in stats),
        "ratio_to_none": statistics.median(ratios),
        "peak_rss_bytes": statistics.median(s["peak_rss_bytes"] for s in stats),
    }


BENCH: Final = Bench(
    summary="Measure how soon the first token comes: pack, build or load.",
    title="From the start of loading to the first token: 0.95 GB of float32, one BLAS thread",
    steps=lambda: _ROUNDS * len(FORMATS),
    measure=lambda progress: start_bench(progress=progress),
    columns={
        "format": lambda row: str(row["format"]),
        "mode": lambda row: str(row["mode"]) + ("" if row["verify"] else ", unchecked"),
        "page cache": lambda row: str(row["page_cache"]),
        "open": lambda row: f"{row['open_s'] * 1e3:,.1f} ms",
        "first token": lambda row: f"{row['time_to_first_token_s'] * 1e3:,.0f} ms",
        "times as soon": lambda row: f"{row['ratio_to_none']:.1f}",
        "peak memory": lambda row: format_nbytes(row["peak_rss_bytes"]),
    },
    keys=3,
    notes={
        "none": "packs into memory at each start",
        "build": "packs into the file, as the first start does; the digest of the original is known",
        "load": "maps the file, as every later start does; unchecked: without comparing checksums",
        "cold": "the original and the cache file are taken out of the page cache (the host may still have them in its "
        "own)",
        "times as soon": "the time to the first token of none, with the same page cache, divided by this row's",
    },
)
