"""The bench of decoding. Speed itself is never judged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from refinfer.bench import decode
from refinfer.bench.naive import NaiveDecoder, _softmax
from refinfer.cli.main import main
from refinfer.errors import GenerationError
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


@pytest.mark.spec("BENCH-4")
def test_decoders_that_do_not_agree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NaiveDecoder.decode
    monkeypatch.setattr(decode, "DECODE_SHAPES", decode.DECODE_SHAPES[:1])
    monkeypatch.setattr(decode, "interleave", None)  # whoever calls it fails
    monkeypatch.setattr(NaiveDecoder, "decode", lambda self, token_id: right(self, token_id) + np.float32(0.1))
    with pytest.raises(GenerationError, match="the two decoders differ by"):
        next(decode.decode_rows(rounds=1))


@pytest.mark.spec("BENCH-4")
def test_the_naive_softmax_bears_scores_whose_exponential_is_no_float32() -> None:
    shares = _softmax(np.array([[-1000, 0, 999, 1000]], np.float32))
    assert shares.sum() == pytest.approx(1)
    assert shares[0].tolist() == sorted(shares[0].tolist())
