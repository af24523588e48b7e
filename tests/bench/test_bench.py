"""Measuring: who takes turns, what a ratio is, what every bench prints. Speed itself is never judged here."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from refinfer.bench import decode
from refinfer.bench.harness import Timings, interleave
from refinfer.cli import main
from refinfer.model.config import ModelConfig


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
    monkeypatch.setattr(decode, "decode_rows", lambda progress: rows)
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
