"""Specifies what a traced run shows of prefetching: each chunk read before it is computed, one thing at a time."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from refinfer.cli.main import main
from refinfer.generate import Session, load
from refinfer.model.config import ModelConfig
from refinfer.planning.account import THREAD_BYTES
from refinfer.trace import Span, Trace

sys.path.insert(0, str(Path(__file__).parent))
from packed_model import PackedModel, within

TOKENS: Final = 3


@pytest.fixture
def model(tiny_folder: Path, tiny_config: ModelConfig, tmp_path: Path) -> PackedModel:
    """A model whose chunks are as large as usual, and its cache file."""
    model = PackedModel(tiny_config, tiny_folder, "int8", tmp_path / "cache", 1 + TOKENS, chunk_nbytes=None)
    assert len(model.inventory.cycle) == 7 * 3 + 1
    return model


def budget_of(model: PackedModel) -> int:
    """Return a budget for a ring of some chunks and a few locks."""
    return model.smallest + 3 * int(model.inventory.sizes.max())


def trace_of(written: dict[str, Any]) -> Trace:
    """Return the trace that a file for Chrome holds."""
    events = written["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    return Trace(
        tuple(Span(lanes[e["tid"]], e["cat"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X")
    )


def of(trace: Trace, kind: str, lane: str | None = None) -> list[Span]:
    return sorted((s for s in trace.spans if s.kind == kind and lane in (None, s.lane)), key=lambda s: s.start)


@pytest.mark.spec("FETCH-1", "FETCH-3", "FETCH-4")
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_traced_run_shows_every_chunk_read_before_it_is_computed(
    model: PackedModel, threads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slack = 0.01  # times are written in thousandths of a microsecond
    file, of_threads = tmp_path / "trace.json", threads * THREAD_BYTES
    budget = budget_of(model)
    argv = ["generate", "--model", str(model.folder), "--weights", model.format, "--weight-cache", str(model.file)]
    argv += ["--threads", "1"]
    argv += [
        "--budget",
        str(budget + of_threads),
        "--plan",
        "balanced",
        "--prefetch-threads",
        str(threads),
        "--trace",
        str(file),
    ]
    argv += ["--token-ids", "7", "--max-tokens", str(TOKENS), "--json"]
    assert within(lambda: main(argv)) == 0
    stats = json.loads(capsys.readouterr().out)
    trace = trace_of(json.loads(file.read_text()))

    inventory = model.inventory
    plan = model.plan("balanced", budget, prefetch_threads=threads)
    kinds = [chunk.kind for chunk in inventory.cycle]
    streamed = [chunk.kind for n, chunk in enumerate(inventory.cycle) if n not in plan.locked]
    assert 0 < len(streamed) < len(kinds)
    computed, waited, read = of(trace, "compute"), of(trace, "wait"), of(trace, "read")
    assert [span.name for span in computed] == TOKENS * kinds
    assert [span.name for span in waited] == TOKENS * streamed
    assert TOKENS * len(streamed) <= len(read) <= TOKENS * len(streamed) + (plan.ring_slots if threads else 0)
    lanes = {f"disk {1 + thread}" for thread in range(max(1, threads))}
    assert {span.lane for span in computed + waited} == {"compute"}
    assert {span.lane for span in read} <= lanes
    for lane in ("compute", *lanes):  # on a lane, one thing at a time
        spans = sorted((s for s in trace.spans if s.lane == lane), key=lambda s: (s.start, s.end))
        if lane == "compute" and threads == 0:
            assert all(s.end >= s.start for s in spans)
        assert all(a.end <= b.start + slack for a, b in pairwise(spans))
    for name in set(streamed):  # the n-th wait for a kind ends when at least n chunks of it were read
        ends = sorted(span.end for span in read if span.name == name)
        for end, wait in zip(ends, (w for w in waited if w.name == name), strict=False):
            assert end <= wait.end + slack
    seconds = sum(span.end - span.start for span in waited) / 1e6
    assert seconds == pytest.approx(stats["offload"]["wait_s"], rel=0.5, abs=0.02)
    assert trace.start == 0


@pytest.mark.spec("FETCH-1")
def test_a_run_that_is_not_traced_keeps_no_span(model: PackedModel) -> None:
    def run(*, trace: bool) -> Session:
        session = load(
            model.folder,
            weights=model.format,
            weight_cache=model.file,
            budget=budget_of(model),
            prefetch_threads=0,
            max_positions=model.positions,
            trace=trace,
        )
        list(session.generate(token_ids=[7], max_tokens=TOKENS))
        return session

    with run(trace=False) as session:
        assert session.trace == Trace(())
    with run(trace=True) as session:
        assert session.trace.spans
