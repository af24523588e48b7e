"""The bench of starts. Speed itself is never judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refinfer.bench import start
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS
from refinfer.weight_cache.format import MAGIC


@pytest.mark.slow
@pytest.mark.spec("BENCH-9")
def test_bench_start_measures_every_format_and_mode_in_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "FORMATS", {"int8": FORMATS["int8"]})
    result = start.start_bench(SHAPES["tiny"], rounds=1)
    rows = result["rows"]
    assert [(r["mode"], r["page_cache"], r["verify"]) for r in rows] == [
        ("none", "warm", True),
        ("none", "cold", True),
        ("build", "warm", True),
        ("build", "cold", True),
        ("load", "warm", True),
        ("load", "warm", False),
        ("load", "cold", True),
        ("load", "cold", False),
    ]
    keys = {"format", "mode", "page_cache", "verify", "open_s", "time_to_first_token_s", "peak_rss_bytes"}
    assert all(keys <= row.keys() and row["time_to_first_token_s"] >= row["open_s"] > 0 for row in rows)
    assert [row["ratio_to_none"] for row in rows[:2]] == [1, 1]
    assert 0 < result["base_rss_bytes"] <= rows[0]["peak_rss_bytes"] * 1.2


@pytest.mark.spec("BENCH-9")
def test_a_start_loads_what_the_one_before_it_built(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"])
    states = [
        start.run_start(tmp_path / "m", "int4", place)["weight_cache"]["state"]
        for place in (":memory", str(tmp_path / "w.packed"), str(tmp_path / "w.packed"))
    ]
    assert states == ["memory", "built", "loaded"]


@pytest.mark.spec("BENCH-9")
def test_each_start_finds_the_files_that_its_row_speaks_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the starts: one that is given a file builds it if it is not there."""
    model, file = tmp_path / "m", tmp_path / "w.packed"
    sources = [model / "model.safetensors"]
    starts: list[tuple[str, bool]] = []
    prepared: list[tuple[str, Path]] = []

    def run_start(folder: Path, weights: str, place: str, *, verify: bool = True) -> dict[str, Any]:
        assert (folder, weights) == (model, "int8")
        assert place in (":memory", str(file))
        starts.append(("none" if place == ":memory" else "load" if file.exists() else "build", verify))
        if place != ":memory":
            file.write_bytes(MAGIC)
        seconds = float(2 ** len(starts))
        return {"weight_cache": {"load_or_build_s": seconds}, "time_to_first_token_s": seconds, "peak_rss_bytes": 1}

    def prepares(kind: str) -> Callable[[Path], None]:
        return lambda path: prepared.append((kind, path))

    monkeypatch.setattr(start, "run_start", run_start)
    monkeypatch.setattr(start, "drop_page_cache", prepares("cold"))
    monkeypatch.setattr(start, "_read_through", prepares("warm"))
    done: list[None] = []
    rows = list(start._rows("int8", model, sources, file, 2, lambda: done.append(None)))
    ways = [(row["mode"], row["verify"]) for row in rows]
    assert len(ways) == 8
    assert starts == [("build", True), *ways, *ways]
    assert prepared == [(row["page_cache"], path) for row in rows * 2 for path in (*sources, file)]
    assert len(done) == 2
    assert not file.exists()
    keys = list(start.BENCH.columns.values())[: start.BENCH.keys]
    assert len({tuple(show(row) for show in keys) for row in rows}) == len(rows)  # its first columns name a row
    # each start takes twice as long as the one before it, and the first two of a round pack into memory
    warm_or_cold = {"warm": 0, "cold": 1}
    assert [row["ratio_to_none"] for row in rows] == [
        2.0 ** (warm_or_cold[row["page_cache"]] - number) for number, row in enumerate(rows)
    ]
