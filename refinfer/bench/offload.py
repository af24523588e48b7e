"""Tokens per second within a memory budget: every plan and every arm, next to what disk and processor allow.

Chooses the runs and what they are compared with. Leaves to others: one run (`arm`), how chunks are read.
Read more: tutorial 12; clauses BENCH-11 to BENCH-14.

Every run is a process of its own, one BLAS thread, greedy, from a prompt of one token. In each round, each run under a
budget is compared with:

    read-only leg       the same plan and store, the same number of tokens, nothing computed
    compute-only leg    all weights mapped, resident and checked before: nothing read

    overlap           max(read-only, compute-only) / run           1: the shorter of the two is hidden altogether
    ideal             1 / max(compute-only, bytes that must stream / bandwidth of the read-only leg), each the best of
                      all rounds, or the best that the runs themselves saw
    byte efficiency   bytes that must stream / bytes that the plan streams

All budgets are real if control groups can be made: the process may have its own memory (what the same command on the
storyteller takes), the budget and 16 MB. The mmap arm runs the same kernels over the same mapped file, with its own
memory and the budget; it is left out if there are no groups. Rounds are interleaved within a budget, over all its arms
and formats, so that rows come budget by budget. Budgets smaller than the smallest that works are named, not run.

A compute-heavy bench multiplies each chunk several times over, so that with half of the weights locked the products of
a token take as long as its reads: there overlap and balance matter most.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from refinfer.bench.arm import POSITIONS, Arm, can_limit_memory, run_arm
from refinfer.bench.calibrate import calibrate
from refinfer.bench.entry import Bench, Progress, Row
from refinfer.bench.machine import describe_machine
from refinfer.bench.start import drop_page_cache, run_start
from refinfer.generate import STORYTELLER
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.offload.calibration import known_calibration
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import PREFETCH_THREADS
from refinfer.planning.plan import PLANS, smallest_budget
from refinfer.process import usable_cores
from refinfer.units import format_nbytes

__all__ = ["BENCH", "MODEL", "arms", "offload_bench", "steps"]

MODEL: Final = replace(
    SHAPES["tinyllama-1.1b"], num_hidden_layers=6, vocab_size=8192, num_key_value_heads=8, tie_word_embeddings=False
)
"""Six layers of TinyLlama with its output table: 1.2 GB in float32."""

_ROUNDS: Final = 3
_QUICK_ROUNDS: Final = 2
_ALL_SHARES: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
_PLAN_SHARES: Final = (0.25, 0.5, 0.75)
_TWO_CORE_SHARES: Final = (0.9, 0.95)  # where products are the limit
_HEADROOM_BYTES: Final = 16_000_000
_ONLY_PLANNED: Final = ("ideal_tokens_per_s", "efficiency", "overlap", "byte_efficiency", "planned_bytes_per_token",
                        "estimated_tokens_per_s", "in_range")  # fmt: skip


def arms(*, quick: bool = False, compute_heavy: bool = False) -> tuple[Arm, ...]:
    """Return every run of a round, budget by budget; a quick bench leaves out the slowest."""
    found: list[Arm] = []
    for share in (0.5,) if quick else _PLAN_SHARES if compute_heavy else _ALL_SHARES:
        found += [Arm("f32", share, "optimal"), Arm("f32", share, "synchronous", 0)]
        if share in _PLAN_SHARES:
            found += [Arm("f32", share, plan) for plan in PLANS if plan != "optimal" and not (quick and plan == "none")]
        if compute_heavy:
            continue
        found.append(Arm("f32", share, "mmap", 0))
        if quick:
            continue
        if share in _PLAN_SHARES:
            found += [Arm("f32", share, "lru-paged", 0), Arm("f32", share, "optimal", 1)]
        found += [Arm(name, share, "optimal") for name in ("bf16", "int8", "int4")]
        if share in _TWO_CORE_SHARES and usable_cores() > 1:
            found.append(Arm("f32", share, "optimal", threads=2))
    return tuple(found)


def steps(*, quick: bool = False, compute_heavy: bool = False) -> int:
    """Return the number of times that `offload_bench` reports progress."""
    return len(arms(quick=quick, compute_heavy=compute_heavy)) * (_QUICK_ROUNDS if quick else _ROUNDS)


@dataclass(frozen=True, slots=True)
class _Bench:
    """What is measured: `base` is the memory of a process without a model, `limited` whether groups can be made."""

    config: ModelConfig
    arms: tuple[Arm, ...]
    rounds: int
    base: int
    limited: bool

    def budget(self, arm: Arm) -> int:
        return round(arm.budget_share * Inventory(self.config, arm.format).streamable_nbytes)

    def is_too_small(self, arm: Arm) -> bool:
        inventory = Inventory(self.config, arm.format)
        fixed = fixed_of(inventory, POSITIONS, arm.prefetch_threads)
        return arm.arm != "mmap" and self.budget(arm) < smallest_budget(inventory, fixed)

    def limit(self, arm: Arm) -> int | None:
        """Return the bytes of the arm's control group, if it has one."""
        headroom = 0 if arm.arm == "mmap" else _HEADROOM_BYTES
        return self.base + self.budget(arm) + headroom if self.limited else None


def offload_bench(
    progress: Progress = lambda: None,
    *,
    config: ModelConfig = MODEL,
    rounds: int | None = None,
    quick: bool = False,
    compute_heavy: bool = False,
) -> dict[str, Any]:
    """Return what `refinfer bench offload` prints: its `rows` come one by one, medians over interleaved rounds."""
    limited = can_limit_memory()
    wanted = tuple(arm for arm in arms(quick=quick, compute_heavy=compute_heavy) if limited or arm.arm != "mmap")
    base = run_start(STORYTELLER, "auto", ":memory")["peak_rss_bytes"]
    bench = _Bench(config, wanted, rounds or (_QUICK_ROUNDS if quick else _ROUNDS), base, limited)
    too_small = [arm for arm in wanted if bench.is_too_small(arm)]
    bench = replace(bench, arms=tuple(arm for arm in wanted if arm not in too_small))
    return {
        "base_bytes": base,
        "too_small": [f"{arm.format} {arm.budget_share:.0%}" for arm in too_small],
        "rounds": bench.rounds,
        "compute_heavy": compute_heavy,
        "memory_limited": limited,
        "rows": _rows(bench, progress, compute_heavy=compute_heavy),
    }


@dataclass(frozen=True, slots=True)
class _Site:
    """The files of a bench: a model, its packed weights in each format, and a cache directory for the calibration."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def cache_home(self) -> Path:
        return self.folder / "home"

    def weights(self, name: str) -> Path:
        return self.folder / f"{name}.packed"

    def run(self, arm: Arm, limit: int | None = None) -> dict[str, Any]:
        return run_arm(self.model, self.weights(arm.format), arm, limit, self.cache_home)


def _rows(bench: _Bench, progress: Progress, *, compute_heavy: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as scratch:
        site = _Site(Path(scratch).resolve())
        write_checkpoint(site.model, bench.config, dtype="f32")
        for name in dict.fromkeys(arm.format for arm in bench.arms):
            site.run(Arm(name, 1.0, "resident"))  # builds the file
        os.sync()
        products = _calibrate(
            site.cache_home, Inventory(bench.config, "f32"), rounds=min(bench.rounds, 3), compute_heavy=compute_heavy
        )
        for share in dict.fromkeys(arm.budget_share for arm in bench.arms):
            group = [replace(arm, products=products) for arm in bench.arms if arm.budget_share == share]
            measured: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in group}
            for _ in range(bench.rounds):
                for arm, found in _round(bench, site, group):
                    measured[arm].append(found)
                    progress()
            read_ahead_kb = describe_machine(site.folder)["folder"]["read_ahead_kb"]
            for arm, runs in measured.items():
                row = _row(arm, runs)
                yield row | (_mapped(read_ahead_kb) if arm.arm == "mmap" else _planned(bench, arm, runs))


def _round(bench: _Bench, site: _Site, group: Sequence[Arm]) -> Iterator[tuple[Arm, dict[str, Any]]]:
    """Run the compute-only leg of each format and number of BLAS threads, then each arm."""
    compute_s = {
        (name, threads): site.run(Arm(name, 1.0, "resident", 0, group[0].products, threads))["token_s"]
        for name, threads in dict.fromkeys((arm.format, arm.threads) for arm in group)
    }
    for arm in group:
        if bench.limited:
            drop_page_cache(site.weights(arm.format))
        yield arm, site.run(arm, bench.limit(arm)) | {"compute_s": compute_s[arm.format, arm.threads]}


def _calibrate(cache_home: Path, inventory: Inventory, *, rounds: int, compute_heavy: bool) -> int:
    """Measure disk and processor for the runs to come; return the number of times to multiply each chunk.

    For a compute-heavy run, the calibration says what a chunk costs when it is multiplied that often.
    """
    place = Path(calibrate(folder=cache_home / "refinfer", rounds=rounds)["calibration_file"])
    if not compute_heavy:
        return 1
    found = known_calibration(place, cache_home)
    reading_half_s = inventory.streamable_nbytes / 2 / found.device.bandwidth[PREFETCH_THREADS]
    once_s = inventory.streamable_nbytes * found.processor.seconds_per_byte[inventory.format][1]
    products = max(1, round(reading_half_s / once_s))
    raw = json.loads(place.read_text())
    for processor in raw["processors"].values():
        for points in processor["seconds_per_byte"].values():
            points["1"] *= products
    place.write_text(json.dumps(raw))
    return products


def _row(arm: Arm, runs: list[dict[str, Any]]) -> Row:
    """Return the medians of an arm's rounds."""
    return {
        "format": arm.format,
        "budget_share": arm.budget_share,
        "arm": arm.arm,
        "prefetch_threads": arm.prefetch_threads,
        "threads": arm.threads,
        "products": arm.products,
        "tokens_per_s": statistics.median(1 / run["token_s"] for run in runs),
        "compute_only_tokens_per_s": statistics.median(1 / run["compute_s"] for run in runs),
        "read_bytes_per_token": round(statistics.median(run["read_bytes_per_token"] for run in runs)),
        "read_bytes_per_s": statistics.median(run["read_bytes_per_token"] / run["token_s"] for run in runs),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def _mapped(read_ahead_kb: int | None) -> Row:
    """Return the fields that only a row of mmap has: read-ahead, and no plan."""
    return dict.fromkeys((*_ONLY_PLANNED, "peak_bytes")) | {"read_ahead_kb": read_ahead_kb}


def _planned(bench: _Bench, arm: Arm, runs: list[dict[str, Any]]) -> Row:
    """Return the fields that only a row within a budget has: how near it comes to what disk and processor allow."""
    inventory, plan = Inventory(bench.config, arm.format), runs[0]["offload"]
    streamed = inventory.streamable_nbytes if arm.arm == "lru-paged" else plan["streamed_bytes_per_token"]
    fixed = fixed_of(inventory, POSITIONS, arm.prefetch_threads)
    lockable = bench.budget(arm) - fixed.total - plan["ring_bytes"]
    must = max(0, inventory.streamable_nbytes - lockable)
    compute_s, read_s = (min(run[leg] for run in runs) for leg in ("compute_s", "read_s"))
    seen = [run["offload"]["ideal_tokens_per_s"] for run in runs]
    ideal = max(1 / max(compute_s, read_s * must / streamed if streamed else 0), *seen)
    overlaps = [max(run["read_s"], run["compute_s"]) / run["token_s"] for run in runs]
    return {
        "ideal_tokens_per_s": ideal,
        "efficiency": statistics.median(1 / run["token_s"] / ideal for run in runs),
        "overlap": statistics.median(overlaps),
        "byte_efficiency": must / streamed if streamed else 1.0,
        "read_only_tokens_per_s": statistics.median(1 / run["read_s"] for run in runs) if streamed else None,
        "planned_bytes_per_token": streamed,
        "peak_bytes": max(run["offload"]["peak_bytes"] for run in runs),
        "predicted_tokens_per_s": statistics.median(run["offload"]["predicted_tokens_per_s"] for run in runs),
        "estimated_tokens_per_s": _averaged(statistics.median, [run["estimated_tokens_per_s"] for run in runs]),
        "in_range": _averaged(statistics.mean, [_share_in_range(run) for run in runs]),
    }


def _averaged(average: Callable[[Sequence[float]], float], values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return average(known) if known else None


def _share_in_range(run: dict[str, Any]) -> float | None:
    """Return 1 if a run was as fast as its prediction's range says, 0 if not, None if there is no range."""
    likely = run["offload"]["predicted_range_tokens_per_s"]
    return None if likely is None else float(likely[0] <= 1 / run["token_s"] <= likely[1])


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


BENCH: Final = Bench(
    summary="Measure every plan, and mmap, within real memory budgets.",
    title="Tokens per second within a memory budget, 1.2 GB of float32 and its smaller formats",
    steps=steps,
    measure=offload_bench,
    columns={
        "format": lambda row: str(row["format"]),
        "budget": lambda row: f"{row['budget_share']:.0%}",
        "arm": lambda row: (
            str(row["arm"])
            + (", 1 thread" if row["prefetch_threads"] == 1 else "")
            + (", both cores" if row.get("threads", 1) > 1 else "")
        ),
        "tokens/s": lambda row: f"{row['tokens_per_s']:.2f}",
        "predicted": lambda row: " / ".join(
            f"{row[name]:.2f}"
            for name in ("predicted_tokens_per_s", "estimated_tokens_per_s")
            if row.get(name) is not None
        ),
        "in range": lambda row: _maybe(row.get("in_range"), ".0%"),
        "ideal": lambda row: _maybe(row["ideal_tokens_per_s"], ".2f"),
        "of ideal": lambda row: _maybe(row["efficiency"], ".0%"),
        "overlap": lambda row: _maybe(row["overlap"], ".2f"),
        "byte efficiency": lambda row: _maybe(row["byte_efficiency"], ".3f"),
        "read per token": lambda row: format_nbytes(row["read_bytes_per_token"]),
        "GB/s": lambda row: f"{row['read_bytes_per_s'] / 1e9:.2f}",
    },
    keys=3,
    notes={
        "predicted": "before the first token; then, after /, from the rates of eight tokens",
        "in range": "the share of runs within the range that was predicted before them",
        "ideal": "tokens/s if a token took as long as its products, or as the bytes that must stream, at best: the "
        "longer of the two, at the best rates of all rounds",
        "overlap": "the time of the read-only or the compute-only leg, whichever is longer, divided by that of the run",
        "byte efficiency": "bytes that must stream, divided by bytes that the plan streams",
        "mmap": "the same file mapped, in a control group with a real memory limit",
    },
    flags={
        "quick": "run one budget and one format, without the slowest arms, in two rounds",
        "compute_heavy": "multiply each chunk until products take as long as reads",
    },
)
