"""How much memory several processes take that use one model, when they map its file and when each packs for itself.

Leaves to others: how a cache works.
Read more: tutorial 06; clause BENCH-10.

The proportional set size (`Pss` in `/proc/PID/smaps_rollup`) counts a page that n processes share as 1/n of a page.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from refinfer.bench.entry import Bench, Progress, Row
from refinfer.bench.start import GIGABYTE
from refinfer.errors import GenerationError
from refinfer.generate import load
from refinfer.model.config import ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.units import format_nbytes

__all__ = ["BENCH", "share_rows"]

_FORMATS: Final = ("f32", "bf16")
_PROCESSES: Final = (1, 2, 4)
_CHILD: Final = "from refinfer.bench.share import child; import sys; child(*sys.argv[1:])"


def child(model: str, weights: str, weight_cache: str) -> None:
    """Load, generate one token, write a byte to standard output, and wait until standard input ends."""
    with load(model, weights=weights, weight_cache=weight_cache, threads=1, max_positions=8) as session:
        for _ in session.generate(token_ids=[1], max_tokens=1):
            pass
        os.write(1, b"1")
        Path("/dev/stdin").open("rb").read()  # noqa: SIM115  (until the parent ends)


def share_rows(config: ModelConfig = GIGABYTE, progress: Progress = lambda: None) -> Iterator[Row]:
    """Yield the rows of `refinfer bench share`: the proportional set size of each of 1, 2 and 4 processes.

    Raises:
        GenerationError: this system does not report it, or a process failed.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        raise GenerationError("this system does not report proportional set sizes; bench share needs Linux")
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        write_checkpoint(model, config, dtype="f32")
        for weights in _FORMATS:
            file = Path(name) / f"{weights}.packed"
            for mapped in (True, False):
                for processes in _PROCESSES:
                    place = str(file) if mapped else ":memory"
                    sizes = _pss_of(processes, [str(model), weights, place])
                    yield {
                        "format": weights,
                        "processes": processes,
                        "mapped": mapped,
                        "pss_bytes": round(statistics.mean(sizes)),
                    }
                    progress()
            file.unlink()


def _pss_of(processes: int, arguments: list[str]) -> list[int]:
    with ExitStack() as stack:
        running = []
        for _ in range(processes):
            process = subprocess.Popen(  # noqa: S603  (this very program)
                [sys.executable, "-c", _CHILD, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # a terminal's Ctrl-C is answered here, and ends them without a word of their own
            )
            stack.callback(_end, process)
            running.append(process)
        for process in running:
            if process.stdout is None or process.stdout.read(1) != b"1":
                raise GenerationError("a process of bench share failed")
        return [_pss(process.pid) for process in running]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise GenerationError("this system does not report proportional set sizes")


BENCH: Final = Bench(
    summary="Measure the memory of several processes that use one model.",
    title="Proportional set size of each of several processes with one model, 0.95 GB of float32",
    steps=lambda: len(_FORMATS) * len(_PROCESSES) * 2,
    measure=lambda progress: {"rows": list(share_rows(progress=progress))},
    columns={
        "format": lambda row: str(row["format"]),
        "processes": lambda row: str(row["processes"]),
        "weights": lambda row: "mapped" if row["mapped"] else "packed by each",
        "memory of each": lambda row: format_nbytes(row["pss_bytes"]),
    },
    keys=3,
    notes={"proportional set size": "a page that n processes share counts as 1/n of a page for each of them"},
)
