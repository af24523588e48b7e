"""Tokens per second within a memory budget: every plan, every arm, beside what disk and processor allow.

Knows: fresh processes, control groups, the legs that a run is compared with. Does not know: how chunks are read.
Spec: BENCH-11 to BENCH-14. Tutorial: 12.

Every run is a process of its own, one BLAS thread, greedy, from a prompt of one token. In each round, beside each run
under a budget:

    read-only leg       the same plan and store, the same number of tokens, nothing computed
    compute-only leg    all weights mapped, resident and checked before: nothing read

    overlap           max(read-only, compute-only) / run           1: the shorter of the two is hidden altogether
    ideal             1 / max(compute-only, bytes that must stream / bandwidth of the read-only leg)
    byte efficiency   bytes that must stream / bytes that the plan streams

All budgets are real where control groups can be made: the process may have its own memory (that of the same command on
the storyteller), the budget and 16 MB. The mmap arm runs the same kernels over the same mapped file, with its own
memory and the budget; it is left out where there are no groups. Rounds are interleaved within a budget, over all its
arms and formats; so rows come budget by budget. Budgets smaller than the smallest that works are named, not run.

Compute-heavy multiplies each chunk several times over, as often as it takes for the products of a token to take as long
as its reads at half of the weights: there overlap and balance show.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from refinfer.arrays import Float32Array
from refinfer.bench.calibrate import calibrate
from refinfer.bench.machine import describe_machine
from refinfer.bench.start import drop_page_cache, run_start
from refinfer.engine import fixed_of
from refinfer.errors import GenerationError
from refinfer.generate import STORYTELLER, Session, load
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.offload.calibration import known_calibration
from refinfer.offload.inventory import Inventory
from refinfer.offload.plan import PLANS, smallest_budget
from refinfer.offload.prefetch import PREFETCH_THREADS
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS
from refinfer.packing.layout import Operand, Tiles

__all__ = ["MODEL", "OFFLOAD_ROUNDS", "Arm", "arms", "can_limit_memory", "offload_bench", "run_arm", "steps"]

MODEL: Final = replace(
    SHAPES["tinyllama-1.1b"], num_hidden_layers=6, vocab_size=8192, num_key_value_heads=8, tie_word_embeddings=False
)
"""Six layers of TinyLlama with its output table: 1.2 GB in float32."""

POSITIONS: Final = 32
OFFLOAD_ROUNDS: Final = 7
_QUICK_ROUNDS: Final = 2
_TOKENS: Final = 4
_RING_FILLS_S: Final = 0.1
_ALL_SHARES: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
_PLAN_SHARES: Final = (0.25, 0.5, 0.75)
_HEADROOM_BYTES: Final = 16_000_000
_MEMORY_GROUPS: Final = Path("/sys/fs/cgroup/memory")
_CHILD: Final = "from refinfer.bench.offload import child; import sys; child(*sys.argv[1:])"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run: a plan, or `synchronous`, `lru-paged`, `mmap`, or `resident` for the compute-only leg.

    `products` is how often each chunk is multiplied.
    """

    format: str
    budget_share: float
    arm: str
    prefetch_threads: int = PREFETCH_THREADS
    products: int = 1


def arms(*, quick: bool = False, compute_heavy: bool = False) -> tuple[Arm, ...]:
    """Return every run of a round, budget by budget."""
    found: list[Arm] = []
    for share in (0.5,) if quick else _PLAN_SHARES if compute_heavy else _ALL_SHARES:
        found += [Arm("f32", share, "optimal"), Arm("f32", share, "synchronous", 0)]
        if share in _PLAN_SHARES:
            found += [Arm("f32", share, plan) for plan in PLANS if plan != "optimal"]
        if compute_heavy:
            continue
        found.append(Arm("f32", share, "mmap", 0))
        if share in _PLAN_SHARES:
            found += [Arm("f32", share, "lru-paged", 0), Arm("f32", share, "optimal", 1)]
        found += [Arm(name, share, "optimal") for name in ("bf16", "int8", "int4") if not quick]
    return tuple(found)


def steps(*, quick: bool = False, compute_heavy: bool = False) -> int:
    """Return how often `offload_bench` tells of progress."""
    return len(arms(quick=quick, compute_heavy=compute_heavy)) * (_QUICK_ROUNDS if quick else OFFLOAD_ROUNDS)


def child(model: str, weight_cache: str, arm: str, report: str) -> None:
    """Run one arm and write what was measured to the file `report`; runs in a process of its own."""
    wanted = Arm(**json.loads(arm))
    _multiply_often(wanted.products)
    mapped = wanted.arm in ("mmap", "resident")
    share = None if mapped else f"{100 * wanted.budget_share}%"
    with load(
        model,
        weights=wanted.format,
        weight_cache=weight_cache,
        budget=share,
        plan=wanted.arm if wanted.arm in PLANS else "optimal",
        prefetch_threads=wanted.prefetch_threads,
        paged=wanted.arm == "lru-paged",
        verify=not mapped or wanted.arm == "resident",
        threads=1,
        max_positions=POSITIONS,
    ) as session:
        for _ in session.generate(token_ids=[1], max_tokens=1):
            pass
        before = _io()
        for _ in session.generate(token_ids=[1], max_tokens=_TOKENS):
            pass
        stats = session.stats
        assert stats is not None
        assert stats.tokens_per_s is not None
        measured = {
            "token_s": 1 / stats.tokens_per_s,
            "offload": None if stats.offload is None else asdict(stats.offload),
            "read_bytes_per_token": (_io() - before) / _TOKENS,
            "read_s": _read_only(session) if not mapped else None,
            "peak_rss_bytes": stats.peak_rss_bytes,
        }
    Path(report).write_text(json.dumps(measured))


def _multiply_often(products: int) -> None:
    """Let this process multiply each chunk `products` times over, with the same result."""

    def often(once: Callable[[Operand, Tiles, Float32Array], None]) -> Callable[[Operand, Tiles, Float32Array], None]:
        def multiply(operand: Operand, tiles: Tiles, out: Float32Array) -> None:
            scratch = operand.scratch if hasattr(operand, "scratch") else operand[0].scratch
            used = scratch.used
            for _ in range(products):
                scratch.reset(used)
                once(operand, tiles, out)

        return multiply

    for page in FORMATS.values() if products > 1 else ():
        page.multiply = often(page.multiply)  # type: ignore[method-assign, assignment]


def _io() -> int:
    """Return the bytes that this process has read from disks so far, ring filled; 0 where the system does not tell."""
    time.sleep(_RING_FILLS_S)
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _read_only(session: Session) -> float:
    """Return the seconds a token takes when its chunks are read, and nothing else is done."""
    source = session._transformer.source  # noqa: SLF001  (a bench may look inside)
    assert isinstance(source, StreamedSource)
    seconds = 0.0
    for _ in range(2):  # the first begins with a full ring
        started = time.perf_counter()
        for _ in source.chunks(0, source.n_chunks):
            pass
        seconds = time.perf_counter() - started
    return seconds


@contextmanager
def _memory_group(limit: int | None) -> Iterator[Path | None]:
    """Make a control group, version 1, with a memory limit; None where none is wanted."""
    if limit is None:
        yield None
        return
    group = _MEMORY_GROUPS / f"refinfer-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def can_limit_memory() -> bool:
    """Tell whether control groups with a memory limit can be made here."""
    return os.access(_MEMORY_GROUPS, os.W_OK) and (_MEMORY_GROUPS / "memory.limit_in_bytes").exists()


def run_arm(
    model: Path, weight_cache: Path, arm: Arm, limit: int | None = None, cache_home: Path | None = None
) -> dict[str, Any]:
    """Run one arm in a fresh process, in a memory group of `limit` bytes where that is given.

    Raises:
        GenerationError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder, _memory_group(limit) as group:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-c", _CHILD, str(model), str(weight_cache), json.dumps(asdict(arm)), str(report)]
        if group is not None:
            joining = f"import os,sys; open({str(group / 'cgroup.procs')!r},'w').write(str(os.getpid())); "
            command = [sys.executable, "-c", joining + "os.execv(sys.argv[1], sys.argv[1:])", *command]
        environment = os.environ | ({} if cache_home is None else {"XDG_CACHE_HOME": str(cache_home)})
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603  (this very program)
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise GenerationError(f"a run of {arm} failed: {why[0]}")
        measured: dict[str, Any] = json.loads(report.read_text())
        return measured


def offload_bench(
    config: ModelConfig = MODEL,
    *,
    rounds: int | None = None,
    quick: bool = False,
    compute_heavy: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return what `refinfer bench offload` prints: its `rows` come one by one, medians over interleaved rounds."""
    rounds = rounds or (_QUICK_ROUNDS if quick else OFFLOAD_ROUNDS)
    base = run_start(STORYTELLER, "auto", ":memory")["peak_rss_bytes"]
    wanted = arms(quick=quick, compute_heavy=compute_heavy)
    if not can_limit_memory():
        wanted = tuple(arm for arm in wanted if arm.arm != "mmap")
    too_small = [arm for arm in wanted if _budget_of(arm, config) < _least_of(arm, config)]
    wanted = tuple(arm for arm in wanted if arm not in too_small)
    return {
        "base_bytes": base,
        "too_small": [f"{arm.format} {arm.budget_share:.0%}" for arm in too_small],
        "rounds": rounds,
        "compute_heavy": compute_heavy,
        "memory_limited": can_limit_memory(),
        "rows": _rows(config, wanted, rounds, base, compute_heavy=compute_heavy, progress=progress),
    }


def _budget_of(arm: Arm, config: ModelConfig) -> int:
    return round(arm.budget_share * Inventory(config, arm.format).streamable_nbytes)


def _least_of(arm: Arm, config: ModelConfig) -> int:
    inventory = Inventory(config, arm.format)
    return 0 if arm.arm == "mmap" else smallest_budget(inventory, fixed_of(inventory, POSITIONS))


def _rows(
    config: ModelConfig,
    wanted: tuple[Arm, ...],
    rounds: int,
    base: int,
    *,
    compute_heavy: bool,
    progress: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as scratch:
        folder = Path(scratch).resolve()
        model, cache_home = folder / "model", folder / "home"
        write_checkpoint(model, config, dtype="f32")
        files = {arm.format: folder / f"{arm.format}.packed" for arm in wanted}
        inventories = {name: Inventory(config, name) for name in files}
        for name, file in files.items():
            run_arm(model, file, Arm(name, 1.0, "resident"), cache_home=cache_home)  # builds the file
        os.sync()
        products = _calibrate(cache_home, inventories["f32"], rounds=min(rounds, 3), compute_heavy=compute_heavy)
        for share in dict.fromkeys(arm.budget_share for arm in wanted):
            group = [replace(arm, products=products) for arm in wanted if arm.budget_share == share]
            measured: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in group}
            for _ in range(rounds):
                compute = {
                    name: run_arm(model, files[name], Arm(name, 1.0, "resident", 0, products), cache_home=cache_home)[
                        "token_s"
                    ]
                    for name in dict.fromkeys(arm.format for arm in group)
                }
                for arm in group:
                    file = files[arm.format]
                    limit = None
                    if can_limit_memory():
                        limit = base + _budget_of(arm, config)
                        limit += 0 if arm.arm == "mmap" else _HEADROOM_BYTES
                        drop_page_cache(file)
                    found = run_arm(model, file, arm, limit, cache_home)
                    measured[arm].append(found | {"compute_s": compute[arm.format]})
                    progress()
            read_ahead_kb = describe_machine(folder)["folder"]["read_ahead_kb"]
            for arm, runs in measured.items():
                yield _row(arm, inventories[arm.format], runs, read_ahead_kb)


def _calibrate(cache_home: Path, inventory: Inventory, *, rounds: int, compute_heavy: bool) -> int:
    """Measure disk and processor for the runs to come; return how often each chunk is to be multiplied.

    For a compute-heavy run, the calibration says what a chunk costs when it is multiplied so often.
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


def _row(arm: Arm, inventory: Inventory, runs: list[dict[str, Any]], read_ahead_kb: int | None) -> dict[str, Any]:
    """Return the medians of an arm's rounds."""
    budget = _budget_of(arm, inventory.config)
    token_s = [run["token_s"] for run in runs]
    read = statistics.median(run["read_bytes_per_token"] for run in runs)
    row: dict[str, Any] = {
        "format": arm.format,
        "budget_share": arm.budget_share,
        "arm": arm.arm,
        "prefetch_threads": arm.prefetch_threads,
        "products": arm.products,
        "tokens_per_s": statistics.median(1 / seconds for seconds in token_s),
        "compute_only_tokens_per_s": statistics.median(1 / run["compute_s"] for run in runs),
        "read_bytes_per_token": round(read),
        "read_bytes_per_s": statistics.median(run["read_bytes_per_token"] / run["token_s"] for run in runs),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }
    if arm.arm == "mmap":
        planned = ("ideal_tokens_per_s", "efficiency", "overlap", "byte_efficiency", "planned_bytes_per_token")
        return row | dict.fromkeys((*planned, "peak_bytes")) | {"read_ahead_kb": read_ahead_kb}
    plan = runs[0]["offload"]
    streamed = inventory.streamable_nbytes if arm.arm == "lru-paged" else plan["streamed_bytes_per_token"]
    fixed = fixed_of(inventory, POSITIONS)
    must = max(0, inventory.streamable_nbytes - (budget - fixed.total - plan["ring_bytes"]))
    ideals = [1 / max(run["compute_s"], run["read_s"] * must / streamed if streamed else 0) for run in runs]
    overlaps = [max(run["read_s"], run["compute_s"]) / run["token_s"] for run in runs]
    return row | {
        "ideal_tokens_per_s": statistics.median(ideals),
        "efficiency": statistics.median(1 / t / ideal for t, ideal in zip(token_s, ideals, strict=True)),
        "overlap": statistics.median(overlaps),
        "byte_efficiency": must / streamed if streamed else 1.0,
        "read_only_tokens_per_s": statistics.median(1 / run["read_s"] for run in runs) if streamed else None,
        "planned_bytes_per_token": streamed,
        "peak_bytes": max(run["offload"]["peak_bytes"] for run in runs),
        "predicted_tokens_per_s": statistics.median(run["offload"]["predicted_tokens_per_s"] for run in runs),
    }
