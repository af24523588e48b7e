"""The bench of decoding. Speed itself is never judged."""

from __future__ import annotations

import json

import pytest

from refinfer.bench import decode
from refinfer.cli.main import main
from refinfer.model.config import ModelConfig


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
    printed = capsys.readouterr().out
    assert "64 x 4" in printed
    low, high = row["ratio_quartiles"]
    assert f" {low:.2f} - {high:.2f} " in printed


@pytest.mark.spec("BENCH-4")
@pytest.mark.parametrize("config", decode.DECODE_SHAPES[:2], ids=lambda c: f"{c.hidden_size}x{c.num_hidden_layers}")
def test_the_naive_decode_agrees_with_the_transformer(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "DECODE_SHAPES", (config,))
    done: list[None] = []
    (row,) = decode.decode_rows(rounds=1, progress=lambda: done.append(None))
    assert len(done) == 1
    assert row["largest_difference"] < 1e-4
