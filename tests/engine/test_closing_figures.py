"""The closing figures of a session: what the cache did and why, and where the budget went."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from refinfer.cli.main import main
from refinfer.generate import GenerationStats
from refinfer.inventory import Inventory
from refinfer.model.folder import open_folder
from refinfer.offload.prediction import OffloadStats
from refinfer.weight_cache.load_or_build import CacheOutcome

sys.path.insert(0, str(Path(__file__).parent))
import engine_runs
from engine_runs import (
    BUFFERS,
    PROMPT,
    entries_of,
    flip,
    in_a_child,
    needs_fork,
    opened,
    place_in,
    smallest_for,
    start,
    stats_of,
)

folder = engine_runs.folder
everyones = engine_runs.everyones
read_only = engine_runs.read_only
built = engine_runs.built

GENERATION_KEYS = ["text", "prompt_token_ids", "token_ids", "finish_reason", "time_to_first_token_s", "tokens_per_s",
                   "peak_rss_bytes", "weight_cache", "offload"]  # fmt: skip
WEIGHT_CACHE_KEYS = ["state", "path", "reason", "packed_buffers", "packed_bytes", "load_or_build_s", "held_buffers",
                     "held_bytes", "packing_s"]  # fmt: skip
ACCOUNT_KEYS = ["budget_bytes", "locked_bytes", "resident_bytes", "ring_bytes", "kv_cache_bytes", "scratch_bytes",
                "threads_bytes"]  # fmt: skip
OFFLOAD_KEYS = ["plan", *ACCOUNT_KEYS, "peak_bytes", "streamed_bytes_per_token", "read_bytes_total",
                "predicted_tokens_per_s", "predicted_range_tokens_per_s",
                "assumed", "estimated_tokens_per_s", "ideal_tokens_per_s", "wait_s", "compute_s"]  # fmt: skip


@pytest.mark.spec("GEN-18", "CLI-2")
def test_the_figures_have_the_documented_names() -> None:
    assert [field.name for field in fields(GenerationStats)] == GENERATION_KEYS
    assert [field.name for field in fields(CacheOutcome)] == WEIGHT_CACHE_KEYS
    within = [key for key in OFFLOAD_KEYS if key not in ACCOUNT_KEYS]
    assert [field.name for field in fields(OffloadStats) if field.name != "account"] == within


def held_bytes(cache: Path) -> int:
    return sum(entry.padded_nbytes for entry in entries_of(cache).values())


def generated(folder: Path, cache: Path | str, *options: str) -> list[str]:
    ids = ",".join(map(str, PROMPT))
    return ["generate", "--model", str(folder), "--token-ids", ids, "--max-tokens", "6", "--weight-cache", str(cache),
            *options]  # fmt: skip


@pytest.mark.spec("GEN-18", "CLI-2", "OFFLOAD-8")
def test_json_says_what_the_cache_did_and_where_the_budget_went(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    argv = generated(folder, cache, "--json")
    streaming = ["--plan", "leading", "--prefetch-threads", "0", "--budget"]
    for n, (budget, state) in enumerate([(None, "built"), ("200kB", "loaded"), ("1GB", "loaded")]):
        assert main([*argv, *([*streaming, budget] if budget else [])]) == 0
        captured = capsys.readouterr()
        result = json.loads(captured.out)
        assert captured.err == ""
        assert list(result) == [*GENERATION_KEYS, "sampling"]
        assert list(result["weight_cache"]) == WEIGHT_CACHE_KEYS
        about = result["weight_cache"]
        assert (about["state"], about["path"]) == (state, str(cache))
        assert (about["packed_buffers"], about["packed_bytes"] > 0) == ((BUFFERS, True) if n == 0 else (0, False))
        assert about["load_or_build_s"] > 0
        assert (about["held_buffers"], about["held_bytes"]) == (BUFFERS, held_bytes(cache))
        if budget is None:
            assert result["offload"] is None
            continue
        offload = result["offload"]
        assert list(offload) == OFFLOAD_KEYS
        inventory = Inventory(open_folder(folder).config, "f32")
        parts = sum(
            offload[f"{part}_bytes"] for part in ("locked", "resident", "ring", "kv_cache", "scratch", "threads")
        )
        assert offload["budget_bytes"] == {"200kB": 200_000, "1GB": 10**9}[budget]
        assert parts <= offload["peak_bytes"] <= offload["budget_bytes"]
        assert offload["resident_bytes"] == inventory.resident_nbytes
        assert offload["streamed_bytes_per_token"] == inventory.streamable_nbytes - offload["locked_bytes"]
        read_once = offload["locked_bytes"] + offload["resident_bytes"]
        rows = 4096 * (len(PROMPT) + 6)
        streamed = 6 * offload["streamed_bytes_per_token"]
        assert read_once + streamed < offload["read_bytes_total"] <= read_once + streamed + 2 * rows
        assert offload["wait_s"] + offload["compute_s"] > 0


@pytest.mark.spec("GEN-18", "CLI-1")
def test_people_read_what_the_cache_did_and_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"

    def line(*options: str, where: Path | str = cache) -> str:
        assert main(generated(folder, where, *options)) == 0
        found = re.findall(r"^weight cache: (.*)$", capsys.readouterr().err, flags=re.MULTILINE)
        assert len(found) == 1
        return str(found[0])

    assert re.fullmatch(r"packed 24 buffers, \d+ kB, in \d+ ms; the next start will map them", line())
    assert re.fullmatch(r"mapped 24 buffers, \d+ kB, in \d+ ms; packing took \d+ ms", line())
    flip(cache, place_in(cache, "header"))
    assert line().startswith("rebuilt: its header is damaged; packed 24 buffers, ")
    flip(cache, place_in(cache, "last layer"))
    assert re.match(r"rebuilt: .*down_proj\.weight, chunk 0, does not agree .*; packed 24 buffers, ", line())
    assert re.fullmatch(r"packed 24 buffers, \d+ kB, into memory in \d+ ms", line(where=":memory"))
    assert line(where="off") == "off: nothing was packed"


@pytest.mark.spec("GEN-18", "CLI-1")
def test_people_read_where_a_budget_went(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generated(folder, tmp_path / "cache", "--budget", "400kB", "--plan", "leading")) == 0
    err = capsys.readouterr().err
    parts = r"locked .*, resident .*, ring .*, KV cache .*, scratch .*, threads .*"
    assert re.search(rf"^budget: 400 kB, peak \d+ kB: {parts}$", err, flags=re.MULTILINE)
    said = r"^plan leading: \d+ kB streamed per token, .* read in total; waited \d+ ms for it, computed \d+ ms$"
    assert re.search(said, err, flags=re.MULTILINE)


@needs_fork
@pytest.mark.spec("GEN-18")
def test_people_read_why_weights_are_in_memory_although_a_file_was_asked_for(read_only: Path) -> None:
    cache = read_only / "cache" / "weights"
    (read_only / "cache").chmod(0o755)
    start(read_only / "model", cache)
    (read_only / "cache").chmod(0o555)
    flip(cache, place_in(cache, "last layer"))

    def work() -> Any:
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.stdout = os.fdopen(2, "w", closefd=False), os.fdopen(1, "w", closefd=False)
        assert main(generated(read_only / "model", cache)) == 0
        sys.stderr.flush()
        return os.read(reader, 1 << 16).decode()

    assert "does not agree with its checksum" in in_a_child(work, unprivileged=True)


class SteppingClock:
    """A clock that goes on by one second each time it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        self.seconds += 1
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.mark.spec("GEN-18", "ERR-3")
def test_waiting_and_computing_are_what_a_generation_took(folder: Path, built: Path) -> None:
    budget = smallest_for(folder, built, prefetch_threads=0)
    with opened(folder, built, budget=budget, prefetch_threads=0, clock=SteppingClock()) as session:
        first = stats_of(session).offload
    assert first is not None
    chunks = len(Inventory(open_folder(folder).config, "f32").cycle)
    # A second for each reading of the clock: five for each chunk, of which three are the wait, and for each token one,
    # and two more for its rates, of which the first token has only one.
    assert first.wait_s == 8 * 3 * chunks
    assert first.compute_s == 8 * 2 * chunks + 8 + 8 + 7


@pytest.mark.spec("GEN-18")
def test_waiting_and_computing_of_a_later_generation_are_its_own(folder: Path, built: Path) -> None:
    budget = smallest_for(folder, built, prefetch_threads=0)
    with opened(folder, built, budget=budget, prefetch_threads=0, clock=SteppingClock()) as session:
        first, second = stats_of(session).offload, stats_of(session).offload
    assert first is not None
    assert second is not None
    assert (second.wait_s, second.compute_s) == (first.wait_s, first.compute_s)
