"""Budgets under a real memory limit: a run that takes more than it counts is killed by the system, and is seen.

Each run has a control group, version 1, of its own. It may take what the same command takes for the storyteller with
its weights in memory, the budget, and 16 MB, as in `bench offload`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from cage import Cases
from refinfer.bench.arm import can_limit_memory
from refinfer.generate import STORYTELLER
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS
from refinfer.planning.account import THREAD_BYTES

pytestmark = [
    pytest.mark.attack,
    pytest.mark.skipif(not can_limit_memory(), reason="needs control groups, version 1, that can be written: be root"),
]

GROUPS: Final = Path("/sys/fs/cgroup/memory")
HEADROOM: Final = 16_000_000
WATCHDOG_S: Final = 120
WIDE: Final = (8192, 11008, 16384, 28672)
NAMES: Final = count()


@dataclass(frozen=True)
class Ran:
    """How a command in a group ended, and the most memory that the group had."""

    status: int
    out: str
    err: str
    peak: int


@contextmanager
def group() -> Iterator[Path]:
    """Make a group for the memory of one command; whatever happens, nothing of it is left."""
    path = GROUPS / f"refinfer-attack-{os.getpid()}-{next(NAMES)}"
    path.mkdir()
    try:
        yield path
    finally:
        for pid in (path / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        path.rmdir()


def generated(folder: Path, *argv: object, limit: int | None = None) -> Ran:
    """Run `generate` with its cache directory in `folder`, in a group of its own."""
    with group() as path:
        if limit is not None:
            (path / "memory.limit_in_bytes").write_text(str(limit))
        command = ["sh", "-c", f'echo $$ > {path}/cgroup.procs && exec "$@"', "sh", sys.executable, "-m", "refinfer"]
        done = subprocess.run(
            [*command, "generate", *map(str, argv)],
            capture_output=True,
            text=True,
            check=False,
            timeout=WATCHDOG_S,
            env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache-home"), "TMPDIR": str(folder)},
        )
        return Ran(done.returncode, done.stdout, done.stderr, int((path / "memory.max_usage_in_bytes").read_text()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The bytes that the command takes for the storyteller."""
    ran = generated(tmp_path_factory.mktemp("base"), "--max-tokens", 2, "--weight-cache", ":memory", "--threads", 1)
    assert ran.status == 0, ran.err
    return ran.peak


def smallest(folder: Path, *argv: object) -> int:
    """Ask for the smallest budget as people do."""
    refused = generated(folder, *argv, "--budget", 1)
    found = re.search(r"the smallest that works is (\d+) bytes", refused.err)
    assert found, refused.err
    return int(found[1])


def wide(rng: Random) -> ModelConfig:
    """Return a model with wide rows, of at most about 40 million weights."""
    width = rng.choice(WIDE)
    most = max(1, 40_000_000 // (3 * 64 * width))
    return replace(
        SHAPES["tiny"], vocab_size=rng.choice([300, 5000]), hidden_size=64 * rng.randint(1, min(most, 8)),
        intermediate_size=width, num_hidden_layers=rng.choice([1, 2]), num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=1024, tie_word_embeddings=rng.random() < 0.5,
    )  # fmt: skip


def survives(folder: Path, limit: int, *argv: object) -> dict[str, Any]:
    """Require that a run ends well within a limit, and that it kept its budget; return what it says it spent."""
    ran = generated(folder, *argv, "--json", limit=limit)
    said = f"{' '.join(map(str, argv))} within {limit} bytes: {ran.err[-500:]}"
    assert ran.status != -signal.SIGKILL, f"killed: {said}"
    assert ran.status == 0, said
    spent: dict[str, Any] = json.loads(ran.out)
    assert spent["offload"]["peak_bytes"] <= spent["offload"]["budget_bytes"]
    return spent


def test_no_run_is_killed_within_its_budget_be_it_the_first_or_a_later_one(
    cases: Cases, base: int, tmp_path: Path
) -> None:
    """Every format, wide rows, long prompts, no thread and many, the smallest budget and larger ones."""
    for n, rng in enumerate(cases):
        folder, config = tmp_path / str(n), wide(rng)
        write_checkpoint(folder / "m", config, dtype=rng.choice(["f32", "f16", "bf16"]), seed=rng.randint(0, 99))
        os.sync()
        ids = [rng.randrange(config.vocab_size) for _ in range(rng.choice([1, 30, 300, 600]))]
        argv: list[object] = ["--model", folder / "m", "--token-ids", ",".join(map(str, ids)), "--max-tokens", 3]
        argv += ["--weights", rng.choice(list(FORMATS)), "--prefetch-threads", rng.choice([0, 2, 16, 64])]
        argv += rng.choice([["--temperature", 0], ["--temperature", 1, "--top-p", 0.99]])
        budget = int(smallest(folder, *argv) * rng.choice([1, 1, 1.1, 1.5]))
        states = []
        for _ in range(2):
            spent = survives(folder, base + budget + HEADROOM, *argv, "--budget", budget)
            states.append(spent["weight_cache"]["state"])
        assert states == ["built", "loaded"]
        for file in folder.rglob("*"):
            if file.is_file():
                file.unlink()


def test_a_thread_that_reads_takes_no_more_than_is_counted_for_it(tmp_path: Path) -> None:
    """One thread and 64 read into the same ring; the system's own memory counts, too."""
    config = replace(SHAPES["tiny"], hidden_size=512, intermediate_size=8192, num_hidden_layers=6)
    write_checkpoint(tmp_path / "m", config, dtype="f32")
    argv = ["--model", tmp_path / "m", "--token-ids", "1", "--max-tokens", 6, "--weights", "int8", "--plan", "none"]
    generated(tmp_path, *argv)  # builds the file
    ring = 40 << 20
    peaks: dict[int, list[int]] = {1: [], 64: []}
    for _ in range(3):
        for threads, measured in peaks.items():
            ran = generated(tmp_path, *argv, "--budget", "60MB", "--prefetch-threads", threads, "--prefetch-ring", ring)
            assert ran.status == 0, ran.err
            measured.append(ran.peak)
    one, many = statistics.median(peaks[1]), statistics.median(peaks[64])
    assert many - one <= 63 * THREAD_BYTES


def test_a_run_that_takes_more_than_its_limit_is_killed_and_noticed(base: int, tmp_path: Path) -> None:
    argv = ["--model", STORYTELLER, "--token-ids", "1,2", "--max-tokens", 2, "--budget", "4MB"]
    assert generated(tmp_path, *argv).status == 0
    with pytest.raises(AssertionError, match="killed"):
        survives(tmp_path, base // 3, *argv)
