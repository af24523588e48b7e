"""Measuring: who takes turns, what a ratio is, what every bench prints. Speed itself is never judged here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refinfer.bench import decode, matmul, pack, report, share, start
from refinfer.bench.harness import Timings, interleave
from refinfer.cli import _BENCHES, main
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS


@pytest.mark.spec("BENCH-1", "BENCH-2")
def test_candidates_warm_up_once_and_then_take_turns() -> None:
    log: list[str] = []

    def candidate(name: str) -> Callable[[], None]:
        return lambda: log.append(name)

    interleave({"a": candidate("a"), "b": candidate("b")}, rounds=3)
    assert "".join(log) == "ab" * 4


@pytest.mark.spec("BENCH-1")
def test_a_turn_is_timed_by_the_clock() -> None:
    ticks = iter(range(100))
    timings = interleave({"a": lambda: next(ticks), "b": lambda: None}, rounds=4, now=lambda: float(next(ticks)))
    assert timings.median("a") == 2.0
    assert timings.median("b") == 1.0


@pytest.mark.spec("BENCH-1")
def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    timings = Timings({"new": (1.0, 1.0, 10.0), "old": (2.0, 3.0, 10.0)})
    assert timings.ratio("new", "old") == 2.0
    assert timings.spread("new", "old") == (1.0, 3.0)


@pytest.mark.spec("BENCH-3", "BENCH-4")
def test_bench_decode_prints_the_machine_and_a_row_for_each_shape(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "DECODE_SHAPES", decode.DECODE_SHAPES[:1])
    rows = list(decode.decode_rows(rounds=1))
    monkeypatch.setattr(report, "decode_rows", lambda progress: rows)
    assert main(["bench", "decode", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"machine", "rows"}
    assert result["machine"]["blas"]
    (row,) = result["rows"]
    assert {"hidden_size", "num_hidden_layers", "ratio_to_naive", "tokens_per_s"} <= set(row)
    assert (row["hidden_size"], row["num_hidden_layers"]) == (64, 4)
    assert row["ratio_to_naive"] > 0
    assert main(["bench", "decode"]) == 0
    assert "64 x 4" in capsys.readouterr().out


@pytest.mark.spec("BENCH-4")
@pytest.mark.parametrize("config", decode.DECODE_SHAPES[:2], ids=lambda c: f"{c.hidden_size}x{c.num_hidden_layers}")
def test_the_naive_decode_agrees_with_the_transformer(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "DECODE_SHAPES", (config,))
    (row,) = decode.decode_rows(rounds=1)
    assert row["largest_difference"] < 1e-4


@pytest.mark.spec("BENCH-5")
def test_bench_matmul_prints_a_row_for_every_format_and_comparison(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"read_gb_per_s": 10.0, "sgemm_gflop_per_s": 100.0}
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    rows = [row for M in (1, 4, 64) for row in matmul.matmul_rows([(128, 96)], [M], rounds=1, limits=limits)]
    monkeypatch.setattr(report, "machine_limits", lambda: limits)
    monkeypatch.setattr(report, "matmul_rows", lambda limits, progress: rows)
    assert main(["bench", "matmul", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"machine", "limits", "rows"}
    keys = {"format", "m", "n", "k", "ratio_to_naive", "gb_per_s", "gflop_per_s", "fraction_of_limit"}
    assert all(keys <= set(row) for row in result["rows"])
    always = {*FORMATS, "naive", "naive-4k-pages", "f32-4k-pages", "f32-nr16", "f32-nr32", "f32-nr128"}
    named = {M: {row["format"] for row in rows if row["m"] == M} for M in (1, 4, 64)}
    assert named == {1: always | {"int8-naive"}, 4: always | {"f32-by-tiles"}, 64: always}
    assert main(["bench", "matmul"]) == 0
    assert "f32-by-tiles" in capsys.readouterr().out


@pytest.mark.spec("BENCH-6")
@pytest.mark.parametrize("M", [1, 3, 16, 40, 130])
def test_everything_bench_matmul_times_computes_the_same_product(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((128, 96), dtype=np.float32)
    x = rng.standard_normal((M, 96), dtype=np.float32)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    coarse = {"bf16": 0.2, "int8": 0.5, "int8-naive": 0.5, "int4": 8.0}
    for name, (_, _, product) in matmul.candidates(matmul.Weights(w), x).items():
        result = product(0)
        np.testing.assert_allclose(np.asarray(result), exact, atol=coarse.get(name, 1e-4), err_msg=name)


@pytest.mark.spec("BENCH-5")
def test_the_machines_limits_are_measured() -> None:
    limits = matmul.machine_limits(rounds=1)
    assert set(limits) == {"read_gb_per_s", "sgemm_gflop_per_s"}
    assert min(limits.values()) > 0


@pytest.mark.spec("BENCH-7")
def test_bench_pack_prints_a_row_for_every_packer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(pack.pack_bench_rows((64, 96), rounds=1))
    assert {row["format"] for row in rows} == {*FORMATS, "f32-nr16-kr1", "f32-nr32-kr1", "f32-nr8-kr4"}
    assert all(row["ratio_to_copy"] > 0 and row["gb_per_s"] > 0 for row in rows)
    monkeypatch.setattr(report, "pack_bench_rows", lambda progress: rows)
    assert main(["bench", "pack", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert main(["bench", "pack"]) == 0
    assert "f32-nr32-kr1" in capsys.readouterr().out


@pytest.mark.spec("BENCH-3")
def test_the_command_line_knows_every_bench() -> None:
    assert tuple(report.BENCHES) == _BENCHES


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


@pytest.mark.spec("BENCH-10")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells proportional set sizes")
def test_bench_share_measures_processes_that_live_at_once() -> None:
    config = replace(SHAPES["tiny"], vocab_size=40_000)  # ten megabytes in float32
    rows = list(share.share_rows(config))
    assert [(r["format"], r["mapped"], r["processes"]) for r in rows] == [
        (name, mapped, n) for name in ("f32", "bf16") for mapped in (True, False) for n in (1, 2, 4)
    ]
    pss = {(r["format"], r["mapped"], r["processes"]): r["pss_bytes"] for r in rows}
    shared, own = pss["f32", True, 4], pss["f32", False, 4]
    assert own - shared > 5_000_000  # three quarters of ten megabytes, and some
