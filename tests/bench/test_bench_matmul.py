"""The bench of the matmul. Speed itself is never judged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from refinfer.bench import matmul
from refinfer.cli.main import main
from refinfer.packing.formats import FORMATS


@pytest.mark.spec("BENCH-5")
def test_bench_matmul_prints_a_row_for_every_format_and_comparison(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"read_gb_per_s": 10.0, "sgemm_gflop_per_s": 100.0}
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    rows = [row for M in (1, 4, 64) for row in matmul.matmul_rows([(128, 96)], [M], rounds=1, limits=limits)]
    monkeypatch.setattr(matmul, "machine_limits", lambda: limits)
    monkeypatch.setattr(matmul, "matmul_rows", lambda limits, progress: rows)
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
