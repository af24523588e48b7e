"""The bench of the matmul. Speed itself is never judged."""

from __future__ import annotations

import json
import mmap
import re
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
from threadpoolctl import threadpool_limits

from refinfer.bench import matmul
from refinfer.bench.harness import Timings
from refinfer.cli.main import main
from refinfer.packing.formats import FORMATS

READ, READ_4K, MULTIPLY = "read_gb_per_s", "read_4k_gb_per_s", "sgemm_gflop_per_s"


@pytest.mark.spec("BENCH-5", "BENCH-15")
def test_bench_matmul_prints_a_row_for_every_format_and_comparison(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    one: dict[str, float] = {}
    rows = [row for M in (1, 4, 64) for row in matmul.matmul_rows([(128, 96)], [M], rounds=1, limits=one)]
    monkeypatch.setattr(matmul, "matmul_rows", lambda limits, progress: limits.update(one) or rows)
    monkeypatch.setattr(matmul, "usable_cores", lambda: 3)
    three = {READ: 30.0, READ_4K: 20.0, MULTIPLY: 100.0}
    monkeypatch.setattr(matmul, "machine_limits", lambda threads: three if threads == 3 else {})
    assert main(["bench", "matmul", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"machine", "limits", "rows"}
    assert result["limits"] == one | {"by_threads": [{"threads": 1} | one, {"threads": 3} | three]}
    keys = {"format", "m", "n", "k", "ratio_to_naive", "gb_per_s", "gflop_per_s", "fraction_of_limit", "limited_by"}
    assert all(keys <= set(row) for row in result["rows"])
    always = {*FORMATS, "naive", "naive-4k-pages", "f32-4k-pages", "f32-nr16", "f32-nr32", "f32-nr128"}
    named = {M: {row["format"] for row in rows if row["m"] == M} for M in (1, 4, 64)}
    assert named == {1: always | {"int8-naive"}, 4: always | {"f32-by-tiles"}, 64: always}
    assert main(["bench", "matmul"]) == 0
    shown = capsys.readouterr().out
    assert "f32-by-tiles" in shown
    for name in ("M", "f32-by-tiles", "int8-naive", "4k-pages", "of the limit"):  # nobody could guess them
        assert re.search(rf"(?m)^{name} ", shown), name
    assert "BLAS threads: 3, which read 30.0 GB/s, in small pages 20.0 GB/s, and multiply 100 GFLOP/s" in shown


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
def test_products_by_tiles_are_compared_from_2_to_16_rows_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    weights = matmul.Weights(np.ones((64, 96), np.float32))
    compared = [M for M in range(1, 20) if "f32-by-tiles" in matmul.candidates(weights, np.ones((M, 96), np.float32))]
    assert compared == list(range(2, 17))


@pytest.mark.spec("BENCH-5")
def test_the_bytes_of_a_candidate_are_those_of_the_weights_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    weights = matmul.Weights(np.ones((64, 96), np.float32))
    nbytes = {name: read for name, (read, _, _) in matmul.candidates(weights, np.ones((1, 96), np.float32)).items()}
    packed = {name: sum(buffer.nbytes for buffer in copies[0].buffers) for name, copies in weights.packed.items()}
    row_major = weights.row_major[0].nbytes
    assert nbytes.pop("int8-naive") == weights.int8[0].nbytes + weights.int8_scales.nbytes
    assert nbytes == dict.fromkeys(nbytes, row_major) | packed


@pytest.mark.spec("BENCH-5")
def test_packed_products_are_timed_in_memory_that_is_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    weights, x = matmul.Weights(np.ones((512, 512), np.float32)), np.ones((64, 512), np.float32)
    compared = matmul.candidates(weights, x)
    for name in (*FORMATS, "f32-4k-pages"):
        product = compared[name][2]
        product(0)
        tracemalloc.start()
        product(0)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < x.nbytes, name


@pytest.mark.spec("BENCH-5")
def test_every_copy_of_a_matrix_begins_a_page_wherever_its_memory_begins() -> None:
    array = np.arange(5000, dtype=np.float32)
    for shift in (0, 16, 4095):

        def memory(nbytes: int, at: int = shift) -> npt.NDArray[np.uint8]:
            return np.frombuffer(mmap.mmap(-1, nbytes + at), np.uint8)[at:]

        copies = matmul._copies(array, 3, memory)
        assert [copy.ctypes.data % 4096 for copy in copies] == [0, 0, 0]
        assert all((copy == array).all() for copy in copies)


@pytest.mark.spec("BENCH-15")
def test_several_kernels_measure_the_limit_of_each_kind_of_page_and_of_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    limited = Mock(wraps=threadpool_limits)
    monkeypatch.setattr(matmul, "threadpool_limits", limited)
    limits = matmul.machine_limits(2, rounds=1)
    limited.assert_called_once_with(2, user_api="blas")
    assert set(limits) == {READ, READ_4K, MULTIPLY}
    assert min(limits.values()) > 0
    memory = np.ones((3, 50, 70), np.float32)
    kernels = matmul.limit_kernels({READ: memory, READ_4K: memory.copy()})
    assert min(Counter(limit for limit, _, _ in kernels.values()).values()) > 2
    assert {work for limit, work, _ in kernels.values() if limit != MULTIPLY} == {memory.nbytes}
    for limit, work, run in kernels.values():
        result = run()
        if limit == MULTIPLY:  # a product of ones is as many operations as it adds ones, and multiplies them
            assert 0 < work == 2 * np.sum(result, dtype=np.float64)  # type: ignore[call-overload]


@pytest.mark.spec("BENCH-15", "BENCH-16")
def test_the_limit_of_a_row_is_the_best_kernel_of_its_rounds_for_its_page_or_its_operations_whichever_takes_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memories: list[Mapping[str, Any]] = []
    quickest = {READ: 4.0, READ_4K: 2.0, MULTIPLY: 10.0}

    def kernels(memory: Mapping[str, Any]) -> dict[str, matmul.Kernel]:
        memories.append(memory)
        of = {name: speed * 1e9 / 2 for name, speed in quickest.items() if name in {*memory, MULTIPLY}}
        return {f"{share} of {name}": (name, share * work, int) for name, work in of.items() for share in (1, 0.5)}

    def interleave(turns: Mapping[str, Any], rounds: int) -> Timings:
        """A kernel takes half a second in its best round; a row takes as long as it reads float32 at 1 GB/s."""
        return Timings({name: (1.5, 0.5, 1.0) if "_per_s" in name else (4 * 128 * 96 / 1e9,) * 3 for name in turns})

    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    monkeypatch.setattr(matmul, "limit_kernels", kernels)
    monkeypatch.setattr(matmul, "interleave", interleave)
    limits = {READ: 5.0, MULTIPLY: 9.0}
    rows = {(row["format"], row["m"]): row for row in matmul.matmul_rows([(128, 96)], [1, 8, 64], limits=limits)}
    found = {key: (row["limited_by"], row["fraction_of_limit"]) for key, row in rows.items()}
    assert found["naive", 1] == (READ, 1 / 4)
    assert found["f32-4k-pages", 1] == (READ_4K, 1 / 2)
    assert found["int4", 1] == (MULTIPLY, 0.05)  # half an operation for each byte of float32, at 10 GFLOP/s
    assert found["naive", 8] == (MULTIPLY, 0.4)
    assert found["f32-4k-pages", 8] == (READ_4K, 1 / 2)
    assert found["f32-4k-pages", 64] == (MULTIPLY, 3.2)
    assert list(map(set, memories)) == [{READ, READ_4K}, {READ, READ_4K}, set()]
    assert limits == {READ: 5.0, READ_4K: 2.0, MULTIPLY: 10.0}, "the best of the whole run"
