"""Specifies `refinfer.packing.product`: which call for how many rows, and the scratch memory that it works in."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from measured_scratch import MeasuredScratch
from refinfer.arrays import Float32Array
from refinfer.errors import PackingError
from refinfer.packing.formats import pack_matrix
from refinfer.packing.matmul import matmul
from refinfer.packing.product import (
    CACHED_FLOATS,
    FEW_ROWS,
    GEMM_CONFIG,
    MANY_FLOATS,
    GemmScratch,
    Product,
    call_for,
    rows_at_once,
    tile_rows,
)


def normal(seed: int, *shape: int) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.spec("PACK-25")
def test_each_entry_of_the_configuration_takes_over_where_the_one_before_it_ends() -> None:
    assert [call.name for call in GEMM_CONFIG] == ["dot", "tiles", "weights-first", "whole"]
    assert GEMM_CONFIG[-1].most_rows == np.inf
    assert call_for(1, 100) is GEMM_CONFIG[0]
    assert call_for(1_000_000, 100) is GEMM_CONFIG[-1]
    for call, after in pairwise(GEMM_CONFIG):
        assert call.most_rows < after.most_rows
        assert (call_for(int(call.most_rows), 100), call_for(int(call.most_rows) + 1, 100)) == (call, after)


@pytest.mark.spec("PACK-25")
def test_each_entry_of_the_configuration_has_a_reason_of_its_own() -> None:
    reasons = {call.reason for call in GEMM_CONFIG}
    assert len(reasons) == len(GEMM_CONFIG)
    assert all(len(reason.split()) > 5 for reason in reasons)


@pytest.mark.spec("PACK-25")
@given(M=st.integers(1, 300), K=st.integers(1, 1 << 20))
def test_tiles_are_as_large_as_the_small_path_of_blas_allows_or_give_way(M: int, K: int) -> None:
    rows = tile_rows(M, K)
    assert rows in (0, 4, 8, 16)
    assert rows == 0 or M * rows * K < 1_000_000
    assert rows == 16 or M * max(4, 2 * rows) * K >= 1_000_000
    by_count = next(call.name for call in GEMM_CONFIG if call.most_rows >= M)
    assert call_for(M, K).name == ("weights-first" if by_count == "tiles" and not rows else by_count)


@pytest.mark.spec("PACK-25")
@pytest.mark.parametrize(
    ("M", "K", "expected"),
    [
        (1, 60, [("dot", (32, 60), (60,))]),
        (3, 60, [("matmul", (3, 60), (2, 60, 16))]),
        (16, 5000, [("matmul", (16, 5000), (4, 5000, 8))]),
        (16, 20_000, [("matmul", (32, 20_000), (20_000, 16))]),
        (40, 60, [("matmul", (32, 60), (60, 40))]),
        (200, 60, [("matmul", (200, 60), (60, 32))]),
    ],
    ids=["dot", "tiles", "smaller tiles", "no tiles", "weights-first", "whole"],
)
def test_a_product_makes_the_call_that_the_configuration_names(
    M: int, K: int, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def watch(name: str) -> None:
        call = getattr(np, name)

        def watched(a: Float32Array, b: Float32Array, **kwargs: Any) -> Any:
            made.append((name, a.shape, b.shape))
            return call(a, b, **kwargs)

        monkeypatch.setattr(np, name, watched)

    packed, x = pack_matrix(normal(0, 32, K), "f32"), normal(1, M, K)
    watch("dot")
    watch("matmul")
    matmul(x, packed.layout, packed.tiles)
    assert made == expected


@pytest.mark.spec("PACK-23", "PACK-26")
@pytest.mark.parametrize("R", [1, 3, 16, 35, 64])
@pytest.mark.parametrize(("M", "K"), [(1, 60), (3, 60), (16, 5000), (16, 20_000), (40, 60), (200, 60)], ids=str)
def test_every_call_multiplies_any_number_of_rows_in_the_scratch_it_asks_for(M: int, K: int, R: int) -> None:
    w, x = normal(0, R, K), normal(1, M, K)
    memory = np.full((M, R + 2), 7, np.float32)
    scratch = GemmScratch(Product.scratch_floats(M, K, R))
    product = Product(x, scratch)
    used = scratch.used
    for _ in range(2):
        product.rows(w, memory[:, 1:-1])
        assert scratch.used == used
    exact, size = x.astype(np.float64) @ w.astype(np.float64).T, np.abs(x) @ np.abs(w).T
    assert (np.abs(memory[:, 1:-1] - exact) <= K * 2.0**-21 * size).all()
    assert (memory[:, [0, -1]] == 7).all()


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("R", [1, 16, 35])
@pytest.mark.parametrize(("M", "K"), [(1, 60), (3, 60), (16, 5000), (16, 20_000), (40, 60), (200, 60)], ids=str)
def test_a_product_takes_exactly_the_scratch_it_asks_for(M: int, K: int, R: int) -> None:
    scratch = MeasuredScratch(1 << 20)
    Product(normal(1, M, K), scratch).rows(normal(0, R, K), np.empty((M, R), np.float32))
    assert scratch.most == Product.scratch_floats(M, K, R)


@pytest.mark.spec("PACK-26")
@given(nr=st.integers(1, 600), K=st.integers(1, 1 << 17))
def test_for_many_rows_of_x_more_weights_are_widened_at_a_time_than_for_few(nr: int, K: int) -> None:
    few, many = (rows_at_once(M, nr, K) for M in (FEW_ROWS, FEW_ROWS + 1))
    assert many > few or many * K > CACHED_FLOATS


@pytest.mark.spec("PACK-26")
@given(M=st.integers(1, 300), nr=st.integers(1, 600), K=st.integers(1, 1 << 17))
def test_whole_tiles_are_widened_at_a_time_as_many_as_fit_and_at_least_one(M: int, nr: int, K: int) -> None:
    rows, floats = rows_at_once(M, nr, K), CACHED_FLOATS if M <= FEW_ROWS else MANY_FLOATS
    assert rows % nr == 0
    assert rows == nr or rows * K <= floats
    assert rows >= nr
    assert (rows + nr) * K > floats


@pytest.mark.spec("PACK-26")
def test_scratch_is_handed_out_piece_by_piece_and_taken_back() -> None:
    scratch = GemmScratch(12)
    first, second = scratch.take(2, 3), scratch.take(6)
    first[:], second[:] = 1, 2
    assert (scratch.used, scratch.nbytes) == (12, 48)
    assert (first == 1).all()
    with pytest.raises(PackingError, match="13 floats of scratch are needed, 12 are reserved"):
        scratch.take(1)
    scratch.reset(6)
    assert np.shares_memory(scratch.take(6), second)
    scratch.reset()
    assert np.shares_memory(scratch.take(1), first)
