"""How soon the first token comes, and how much memory that takes: packing at each start, building, loading.

Measures fresh processes, with the page cache warm and cold, on a synthetic checkpoint of a gigabyte. Leaves to others:
how a cache works.
Read more: tutorial 06; clauses BENCH-9, BENCH-17.

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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from refinfer.bench.entry import Bench, Progress, Row
from refinfer.clock import RealClock
from refinfer.errors import GenerationError
from refinfer.generate import STORYTELLER, load
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS
from refinfer.process import usable_cores
from refinfer.units import format_nbytes
from refinfer.weight_cache.directory import remove
from refinfer.weight_cache.mapped_file import MappedFile

__all__ = ["BENCH", "GIGABYTE", "Start", "drop_page_cache", "how_it_failed", "run_start", "start_bench"]

GIGABYTE: Final = replace(SHAPES["tinyllama-1.1b"], num_hidden_layers=5, vocab_size=8192, tie_word_embeddings=True)
"""Five layers of TinyLlama: 0.95 GB in float32, and few names."""

_ROUNDS: Final = 5
_CHILD: Final = "from refinfer.bench.start import child; import sys; child(*sys.argv[1:])"
_BLOCK: Final = 8 << 20
_CLOCK: Final = RealClock()


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
            raise GenerationError(f"a start failed: {how_it_failed(done)}")
        stats: dict[str, Any] = json.loads(report.read_text())
        return stats


def how_it_failed(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a process wrote to standard error, or its exit status if it wrote nothing."""
    return next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")


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


def _read_s(path: Path) -> float:
    """Return the seconds that it takes to read a file alone, from its beginning to its end, from a cold page cache."""
    drop_page_cache(path)
    started = _CLOCK.now()
    _read_through(path)
    return _CLOCK.now() - started


def _check_s(path: Path) -> float:
    """Return the seconds in which one thread checks every chunk of a file that is mapped and in memory."""
    mapped = MappedFile(path)
    seconds = 0.0
    for _ in range(2):  # the first time, pages are entered in the page table
        started = _CLOCK.now()
        for entry in mapped.index.entries:
            for chunk in entry.chunks:
                mapped.is_sound(chunk)
        seconds = _CLOCK.now() - started
    return seconds


@dataclass(frozen=True, slots=True)
class _Round:
    """The seconds to the first token of each way to start, of reading the file alone, and of checking it alone."""

    starts: Mapping[Start, float]
    read_s: float
    check_s: float

    def checked_ratio(self, page_cache: str) -> tuple[float, float]:
        """Return the time of a checked start divided by that of another way, and the least that this can be.

        With a warm page cache the other way is an unchecked start; with a cold one it is that or reading the file
        alone, the quicker one. At best all cores share products and checks evenly, and nobody waits for the disk.
        """
        checked, unchecked = (self.starts[Start("load", page_cache, verify=verify)] for verify in (True, False))
        other = unchecked if page_cache == "warm" else min(unchecked, self.read_s)
        products_s = self.starts[Start("load", "warm", verify=False)]
        return checked / other, (products_s + self.check_s) / usable_cores() / other


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
    alone: list[tuple[float, float]] = []
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
        alone.append((_read_s(file), _check_s(file)))
        progress()
    remove(file)
    seconds = {start: [s["time_to_first_token_s"] for s in stats] for start, stats in measured.items()}
    of_rounds = [
        _Round({start: of_start[number] for start, of_start in seconds.items()}, *legs)
        for number, legs in enumerate(alone)
    ]
    for start in measured:
        yield _row(weights, start, measured, of_rounds)


def _row(weights: str, start: Start, measured: Mapping[Start, list[dict[str, Any]]], rounds: list[_Round]) -> Row:
    stats, none = measured[start], Start("none", start.page_cache)
    compared = [r.checked_ratio(start.page_cache) for r in rounds] if start.mode == "load" and start.verify else []
    return {
        "format": weights,
        **asdict(start),
        "open_s": statistics.median(s["weight_cache"]["load_or_build_s"] for s in stats),
        "time_to_first_token_s": statistics.median(s["time_to_first_token_s"] for s in stats),
        "ratio_to_none": statistics.median(r.starts[none] / r.starts[start] for r in rounds),
        "checked_ratio": statistics.median(ratio for ratio, _ in compared) if compared else None,
        "least_checked_ratio": statistics.median(least for _, least in compared) if compared else None,
        "read_alone_s": statistics.median(r.read_s for r in rounds) if compared else None,
        "check_alone_s": statistics.median(r.check_s for r in rounds) if compared else None,
        "peak_rss_bytes": statistics.median(s["peak_rss_bytes"] for s in stats),
    }


def _checking(row: Row) -> str:
    """Show what checking costs, and the least it can."""
    ratio = row.get("checked_ratio")  # a row of an older version does not have it
    return "" if ratio is None else f"{ratio:.2f} (≥ {row['least_checked_ratio']:.2f})"


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
        "checking": _checking,
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
        "checking": "this row's time to the first token, divided by that of the unchecked row or, cold, by the time to "
        "read the file alone if that is less; in brackets the least there can be, if all cores share products and "
        "checks evenly",
    },
)
