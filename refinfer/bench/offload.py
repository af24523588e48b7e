"""Tokens per second within a memory budget: every plan, every arm, beside what disk and processor allow.

Knows: fresh processes, control groups, the legs that a run is compared with. Does not know: how chunks are read.
Spec: BENCH-11. Tutorial: 12.

Every run is a process of its own, one BLAS thread, greedy, from a prompt of one token. In each round, beside each run
under a budget:

    read-only leg       the same plan and store, the same number of tokens, nothing computed
    compute-only leg    all weights mapped, resident and checked before: nothing read

    overlap           max(read-only, compute-only) / run           1: the shorter of the two is hidden altogether
    ideal             1 / max(compute-only, bytes that must stream / bandwidth of the read-only leg)
    byte efficiency   bytes that must stream / bytes that the plan streams

The mmap arm is real: the same kernels over the same mapped file, in a control group that leaves the process its own
memory and the budget, no more; where no group can be made, it is left out.
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

from refinfer.bench.start import drop_page_cache
from refinfer.engine import fixed_of
from refinfer.errors import GenerationError
from refinfer.generate import STORYTELLER, Session, load
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.offload.inventory import Inventory
from refinfer.offload.plan import PLANS
from refinfer.offload.prefetch import PREFETCH_THREADS
from refinfer.offload.streamed import StreamedSource

__all__ = ["MODEL", "Arm", "arms", "offload_bench", "run_arm"]

MODEL: Final = replace(
    SHAPES["tinyllama-1.1b"], num_hidden_layers=6, vocab_size=8192, num_key_value_heads=8, tie_word_embeddings=False
)
"""Six layers of TinyLlama with its output table: 1.2 GB in float32."""

POSITIONS: Final = 32
_TOKENS: Final = 6
_ALL_SHARES: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
_PLAN_SHARES: Final = (0.25, 0.5, 0.75)
_MEMORY_GROUPS: Final = Path("/sys/fs/cgroup/memory")
_CHILD: Final = "from refinfer.bench.offload import child; import sys; child(*sys.argv[1:])"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run: a plan, or `synchronous`, `lru-paged`, `mmap`, or `resident` for the compute-only leg."""

    format: str
    budget_share: float
    arm: str
    prefetch_threads: int = PREFETCH_THREADS


def arms(*, quick: bool = False) -> tuple[Arm, ...]:
    """Return every run of a round; quick ones only at half of the weights, in f32."""
    found: list[Arm] = []
    for share in _PLAN_SHARES[1:2] if quick else _PLAN_SHARES:
        found += [Arm("f32", share, plan) for plan in PLANS]
        found.append(Arm("f32", share, "lru-paged", 0))
    for share in (0.5,) if quick else _ALL_SHARES:
        found += [Arm("f32", share, "optimal"), Arm("f32", share, "synchronous", 0), Arm("f32", share, "mmap", 0)]
        found += [Arm(name, share, "optimal") for name in ("bf16", "int8", "int4") if not quick]
    return tuple(dict.fromkeys(found))


def child(model: str, weight_cache: str, arm: str, report: str) -> None:
    """Run one arm and write what was measured to the file `report`; runs in a process of its own."""
    wanted = Arm(**json.loads(arm))
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
        }
    Path(report).write_text(json.dumps(measured))


def _io() -> int:
    """Return the bytes that this process had read from disks so far; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _read_only(session: Session) -> float:
    """Return the seconds a token takes when its chunks are read, and nothing else is done."""
    source = session._transformer.source  # noqa: SLF001  (a bench may look inside)
    assert isinstance(source, StreamedSource)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in source.chunks(0, source.n_chunks):
            pass
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


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


def run_arm(model: Path, weight_cache: Path, arm: Arm, limit: int | None = None) -> dict[str, Any]:
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
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (this very program)
        if done.returncode:
            raise GenerationError(f"a run of {arm} failed: {done.stderr.strip().splitlines()[-1:]}")
        measured: dict[str, Any] = json.loads(report.read_text())
        return measured


def offload_bench(
    config: ModelConfig = MODEL,
    *,
    rounds: int = 7,
    quick: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the rows of `refinfer bench offload`: medians over interleaved rounds."""
    wanted = arms(quick=quick)
    if not can_limit_memory():
        wanted = tuple(arm for arm in wanted if arm.arm != "mmap")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "model", config, dtype="f32")
        files = {arm.format: folder / f"{arm.format}.packed" for arm in wanted}
        inventories = {name: Inventory(config, name) for name in files}
        base = _base_bytes()
        for name, file in files.items():
            run_arm(folder / "model", file, Arm(name, 1.0, "resident"))  # builds the file
        os.sync()
        measured: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in wanted}
        for _ in range(rounds):
            compute = {
                name: run_arm(folder / "model", file, Arm(name, 1.0, "resident"))["token_s"]
                for name, file in files.items()
            }
            for arm in wanted:
                file = files[arm.format]
                limit = None
                if arm.arm == "mmap":
                    limit = base + round(arm.budget_share * inventories[arm.format].streamable_nbytes)
                    drop_page_cache(file)
                found = run_arm(folder / "model", file, arm, limit)
                measured[arm].append(found | {"compute_s": compute[arm.format]})
                progress()
        return {
            "base_bytes": base,
            "rounds": rounds,
            "rows": [_row(arm, inventories[arm.format], runs) for arm, runs in measured.items()],
        }


def _base_bytes() -> int:
    """Return what a run takes besides weights: the most memory that the storyteller's takes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = "from refinfer.bench.start import child; import sys; child(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(STORYTELLER), "auto", ":memory", "True", str(report)]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603  (this very program)
        return int(json.loads(report.read_text())["peak_rss_bytes"])


def _row(arm: Arm, inventory: Inventory, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of an arm's rounds."""
    budget = round(arm.budget_share * inventory.streamable_nbytes)
    token_s = [run["token_s"] for run in runs]
    row: dict[str, Any] = {
        "format": arm.format,
        "budget_share": arm.budget_share,
        "arm": arm.arm,
        "prefetch_threads": arm.prefetch_threads,
        "tokens_per_s": statistics.median(1 / seconds for seconds in token_s),
        "compute_only_tokens_per_s": statistics.median(1 / run["compute_s"] for run in runs),
        "read_bytes_per_token": round(statistics.median(run["read_bytes_per_token"] for run in runs)),
    }
    if arm.arm == "mmap":
        return (
            row
            | dict.fromkeys(("ideal_tokens_per_s", "efficiency", "overlap", "byte_efficiency"), None)
            | {
                "planned_bytes_per_token": None,
                "peak_bytes": None,
            }
        )
    plan = runs[0]["offload"]
    streamed = plan["streamed_bytes_per_token"]
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
        "predicted_tokens_per_s": plan["predicted_tokens_per_s"],
    }
