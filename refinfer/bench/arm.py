"""One run of `bench offload` in a fresh process, inside a control group with a real memory limit if there can be one.

Runs a plan, or an arm that plans are compared with. Leaves to others: choosing and comparing runs (`offload`).
Read more: tutorial 12; clauses BENCH-11, BENCH-12, BENCH-14.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from refinfer.arrays import Float32Array
from refinfer.bench.start import how_it_failed
from refinfer.errors import GenerationError
from refinfer.generate import Session, load
from refinfer.inventory import Inventory
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS
from refinfer.packing.layout import Operand, Tiles
from refinfer.planning.cost import PREFETCH_THREADS
from refinfer.planning.plan import PLANS

__all__ = ["POSITIONS", "Arm", "can_limit_memory", "run_arm"]

POSITIONS: Final = 32
_TOKENS: Final = 4
_TOLD_AFTER: Final = 9  # tokens, the first of the prompt: as many as the speed is estimated from
_RING_FILLS_S: Final = 0.1
_MEMORY_GROUPS: Final = Path("/sys/fs/cgroup/memory")
_CHILD: Final = "from refinfer.bench.arm import child; import sys; child(*sys.argv[1:])"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run: a plan, or `synchronous`, `lru-paged`, `mmap`, or `resident` for the compute-only leg.

    `products` is the number of times that each chunk is multiplied, `threads` that of BLAS threads.
    """

    format: str
    budget_share: float
    arm: str
    prefetch_threads: int = PREFETCH_THREADS
    products: int = 1
    threads: int = 1

    @property
    def is_mapped(self) -> bool:
        """Whether the file is mapped, and there is no budget."""
        return self.arm in ("mmap", "resident")


def run_arm(
    model: Path, weight_cache: Path, arm: Arm, limit: int | None = None, cache_home: Path | None = None
) -> dict[str, Any]:
    """Run one arm in a fresh process, in a memory group of `limit` bytes if a limit is given.

    Raises:
        GenerationError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder, _memory_group(limit) as group:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-c", _CHILD, str(model), str(weight_cache), json.dumps(asdict(arm)), str(report)]
        if group is not None:
            joining = f"import os,sys; open({str(group / 'cgroup.procs')!r},'w').write(str(os.getpid())); "
            command = [sys.executable, "-c", joining + "os.execv(sys.argv[1], sys.argv[1:])", *command]
        environment = os.environ | (
            {} if cache_home is None else {"XDG_CACHE_HOME": str(cache_home), "REFINFER_CACHE_DIR": ""}
        )
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603  (this very program)
        if done.returncode:
            raise GenerationError(f"a run of {arm} failed: {how_it_failed(done)}")
        measured: dict[str, Any] = json.loads(report.read_text())
        return measured


@contextmanager
def _memory_group(limit: int | None) -> Iterator[Path | None]:
    """Make a control group, version 1, with a memory limit; yield None if there is no limit."""
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
    """Return whether control groups with a memory limit can be made here."""
    return os.access(_MEMORY_GROUPS, os.W_OK) and (_MEMORY_GROUPS / "memory.limit_in_bytes").exists()


def child(model: str, weight_cache: str, arm: str, report: str) -> None:
    """Run one arm and write what was measured to the file `report`; runs in a process of its own."""
    wanted = Arm(**json.loads(arm))
    _multiply_often(wanted.products)
    with load(
        model,
        weights=wanted.format,
        weight_cache=weight_cache,
        budget=None if wanted.is_mapped else f"{100 * wanted.budget_share}%",
        plan=wanted.arm if wanted.arm in PLANS else "optimal",
        prefetch_threads=wanted.prefetch_threads,
        paged=wanted.arm == "lru-paged",
        verify=wanted.arm != "mmap",
        threads=wanted.threads,
        max_positions=POSITIONS,
    ) as session:
        Path(report).write_text(json.dumps(_measured(session, wanted)))


def _measured(session: Session, arm: Arm) -> dict[str, Any]:
    """Generate, and return the measurements; the read-only leg comes last."""
    for _ in session.generate(token_ids=[1], max_tokens=_TOLD_AFTER if arm.arm == "optimal" else 1):
        pass
    early = session.stats.offload if session.stats else None
    before = _bytes_read()
    for _ in session.generate(token_ids=[1], max_tokens=_TOKENS):
        pass
    stats = session.stats
    assert stats is not None
    assert stats.tokens_per_s is not None
    return {
        "token_s": 1 / stats.tokens_per_s,
        "offload": stats.offload.to_json() if stats.offload else None,
        "estimated_tokens_per_s": early.estimated_tokens_per_s if early else None,
        "read_bytes_per_token": (_bytes_read() - before) / _TOKENS,
        "read_s": None if arm.is_mapped else _read_only_s(session, arm),
        "peak_rss_bytes": stats.peak_rss_bytes,
    }


def _multiply_often(products: int) -> None:
    """Make this process multiply each chunk `products` times over, with the same result."""

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


def _bytes_read() -> int:
    """Return the bytes that this process has read from disks once the ring is full; 0 if the system has no such count.

    The count is in `/proc/self/io`.
    """
    time.sleep(_RING_FILLS_S)
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _read_only_s(session: Session, arm: Arm) -> float:
    """Return the seconds that a token takes if its chunks are read and nothing is computed."""
    source = session.source
    assert isinstance(source, StreamedSource)
    n_chunks = len(Inventory(source.config, arm.format).cycle)
    seconds = 0.0
    for _ in range(2):  # the first begins with a full ring
        started = time.perf_counter()
        for _ in source.chunks(0, n_chunks):
            pass
        seconds = time.perf_counter() - started
    return seconds
