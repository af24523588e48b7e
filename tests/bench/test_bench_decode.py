"""The bench of decoding. Speed itself is never judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sized
from typing import Any

import numpy as np
import pytest

from refinfer.bench import decode
from refinfer.bench.harness import Timings
from refinfer.bench.naive import NaiveDecoder, _softmax
from refinfer.cli.main import main
from refinfer.errors import GenerationError
from refinfer.model.config import ModelConfig
from refinfer.model.transformer import Transformer


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


@pytest.mark.spec("BENCH-1", "BENCH-4")
def test_a_row_is_made_from_the_tokens_of_a_turn_and_every_turn_computes_the_same_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With times as this test says: the rounds' ratios are 8, 1, 2 and 4."""
    computed: list[tuple[str, int]] = []
    tokens: set[int] = set()
    naively, right = NaiveDecoder.decode, Transformer.decode

    def decode_naively(self: NaiveDecoder, token_id: int) -> Any:
        computed.append(("naive", self.length))
        return naively(self, token_id)

    def decode_ours(self: Transformer, token_ids: list[int]) -> Any:
        computed.append(("refinfer", self.kv_cache.length))
        return right(self, token_ids)

    def interleave(turns: Mapping[str, Callable[[], Sized]], rounds: int) -> Timings:
        assert rounds > 0
        computed.clear()
        tokens.update(len(run()) for run in (*turns.values(), *turns.values()))
        return Timings({"naive": (2.0, 2.0, 4.0, 8.0, 4.0), "refinfer": (0.25, 2.0, 2.0, 2.0, 2.0)})

    monkeypatch.setattr(decode, "DECODE_SHAPES", decode.DECODE_SHAPES[:1])
    monkeypatch.setattr(NaiveDecoder, "decode", decode_naively)
    monkeypatch.setattr(Transformer, "decode", decode_ours)
    monkeypatch.setattr(decode, "interleave", interleave)
    done: list[None] = []
    (row,) = decode.BENCH.measure(lambda: done.append(None))["rows"]
    assert len(done) == decode.BENCH.steps()
    (n,) = tokens
    assert computed == [(name, at) for name in ("naive", "refinfer") for at in range(88, 96)] * 2
    assert (row["tokens_per_s"], row["naive_tokens_per_s"]) == (n / 2.0, n / 4.0)
    assert (row["ratio_to_naive"], row["ratio_quartiles"]) == (2.0, [2.0, 4.0])


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


@pytest.mark.spec("BENCH-4")
def test_the_naive_softmax_of_a_head_does_not_depend_on_how_large_the_scores_of_other_heads_are() -> None:
    shares = _softmax(np.array([[[1, 2, 3]], [[1001, 1002, 1003]]], np.float32))
    np.testing.assert_allclose(shares[0], shares[1])
