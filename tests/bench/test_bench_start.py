"""The bench of starts. Speed itself is never judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from refinfer.bench import start
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS


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
