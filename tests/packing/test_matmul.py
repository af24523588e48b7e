"""Specifies `refinfer.packing.matmul`: products right to the rounding, bit by bit the same, in reserved memory."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from refinfer.arrays import PAGE_BYTES, Float32Array, aligned_empty
from refinfer.errors import PackingError
from refinfer.packing.formats import FORMATS, PackedLayout, PackedMatrix, format_of, layout_of, pack_chunk, pack_matrix
from refinfer.packing.layout import cut_into_chunks
from refinfer.packing.matmul import matmul, multiply_chunk, scratch_floats, start_product
from refinfer.packing.product import GEMM_CONFIG, GemmScratch, call_for, tile_rows

ROWS = [1, 2, 3, 15, 16, 17, 40, 127, 128, 130]
LARGE = {"f32": (600, 3000), "bf16": (1000, 2999), "int8": (700, 3001), "int4": (1700, 3000)}  # several chunks each

every_format = pytest.mark.parametrize("name", list(FORMATS))
every_count = pytest.mark.parametrize("M", ROWS)


def normal(seed: int, *shape: int) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@cache
def large(name: str, N: int, K: int) -> PackedMatrix:
    """Pack a large matrix once for all tests, with rows of different sizes."""
    sizes = np.ldexp(np.float32(1), np.arange(N) % 13 - 6).astype(np.float32)
    return pack_matrix(normal(0, N, K) * sizes[:, None], name)


def in_chunks(w: Float32Array, name: str, chunk_nbytes: int) -> PackedMatrix:
    """Pack into chunks of about `chunk_nbytes`, so that small matrices have many, each in memory of its own."""
    whole, fmt = layout_of(name, *w.shape), replace(format_of(name), chunk_nbytes=chunk_nbytes)
    tile_nbytes = fmt.tile_nbytes(whole.tile, whole.K)
    chunks = cut_into_chunks(whole.N, whole.tile.nr, tile_nbytes, chunk_nbytes)
    layout = PackedLayout(fmt, whole.N, whole.K, whole.tile, chunks)
    buffers = [np.zeros(chunk.nbytes, np.uint8) for chunk in chunks]
    for chunk, buffer in zip(chunks, buffers, strict=True):
        pack_chunk(w[chunk.first_row : chunk.first_row + chunk.n_rows], layout, chunk, buffer)
    return PackedMatrix(layout, buffers)


def assert_product(y: Float32Array, x: Float32Array, w: Float32Array) -> None:
    """Check `y` against `x @ w.T` in float64, to the rounding of sums of K products in float32."""
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    error = np.abs(y - x64 @ w64.T)
    K = x.shape[1]
    assert (error <= K * (8 * 2.0**-24 * (np.abs(x64) @ np.abs(w64).T) + 2.0**-149)).all()


@pytest.mark.spec("PACK-23")
@every_format
@given(
    M=st.sampled_from(ROWS),
    N=st.integers(1, 70) | st.sampled_from([256, 300, 520]),
    K=st.integers(1, 140) | st.sampled_from([256, 511]),
    chunk_nbytes=st.sampled_from([1, 3000, 1 << 20]),
)
def test_a_product_equals_that_with_the_unpacked_weights(name: str, M: int, N: int, K: int, chunk_nbytes: int) -> None:
    packed = in_chunks(normal(N, N, K), name, chunk_nbytes)
    x = normal(M, M, K)
    y = matmul(x, packed)
    assert (str(y.dtype), y.shape) == ("float32", (M, N))
    assert_product(y, x, packed.unpack())


@pytest.mark.spec("PACK-23")
@pytest.mark.parametrize("M", [1, 16, 17, 128])
@pytest.mark.parametrize("shape", [(470, 3000), (96, 8003)], ids=str)
@every_format
def test_a_product_of_more_weights_than_are_widened_at_a_time_is_right(
    name: str, shape: tuple[int, int], M: int
) -> None:
    packed, x = large(name, *shape), normal(1, M, shape[1])
    assert_product(matmul(x, packed), x, packed.unpack())


@pytest.mark.spec("PACK-23", "PACK-26")
@pytest.mark.parametrize("shape", [(64, 40_000), (3, 31_249), (100_000, 1)], ids=str)
@every_format
def test_a_product_of_very_long_or_very_many_rows_is_right(name: str, shape: tuple[int, int]) -> None:
    packed = large(name, *shape)
    w = packed.unpack()
    for M in (1, 2, 16):
        x = normal(M, M, shape[1])
        assert_product(matmul(x, packed), x, w)


@pytest.mark.spec("PACK-12", "PACK-23")
@pytest.mark.parametrize("M", [1, 3, 17, 128])
@every_format
def test_rows_and_blocks_of_zeros_give_and_add_nothing(name: str, M: int) -> None:
    w = normal(0, 40, 100) / 1000
    w[3] = 0
    w[20:, 32:64] = 0
    x = normal(1, M, 100)
    y = matmul(x, pack_matrix(w, name))
    assert not y[:, 3].any()
    assert_product(y, x, pack_matrix(w, name).unpack())


@pytest.mark.spec("PACK-23")
@every_count
@every_format
def test_tiny_and_subnormal_weights_and_inputs_lose_no_more_than_float32_does(name: str, M: int) -> None:
    w = normal(0, 20, 65)
    w[5] *= 1e-30
    w[6] *= np.float32(1e-40)
    x = normal(1, M, 65)
    x[0] *= np.float32(1e-40)
    packed = pack_matrix(w, name)
    assert_product(matmul(x, packed), x, packed.unpack())


@pytest.mark.spec("PACK-23")
@every_count
@every_format
def test_inputs_of_zero_give_zero(name: str, M: int) -> None:
    x = normal(0, M, 37)
    x[0] = 0
    y = matmul(x, pack_matrix(normal(1, 20, 37), name))
    assert not y[0].any()
    assert M == 1 or y[1:].all()


@pytest.mark.spec("PACK-23")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@every_count
@every_format
def test_nan_and_infinity_in_a_row_of_inputs_stay_in_that_row(name: str, M: int, value: float) -> None:
    packed, x = pack_matrix(normal(0, 20, 37), name), normal(1, M, 37)
    x[M // 2, 36] = value
    with np.errstate(invalid="ignore"):
        y = matmul(x, packed)
    assert not np.isfinite(y[M // 2]).any()
    sound = np.arange(M) != M // 2
    assert_product(y[sound], x[sound], packed.unpack())


@pytest.mark.spec("PACK-23")
@every_count
@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_nan_and_infinity_in_a_row_of_weights_reach_its_output_only(name: str, M: int) -> None:
    w, x = normal(0, 37, 35), np.abs(normal(1, M, 35)) + 1
    w[4, 34], w[5, 0], w[36, 20] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        y = matmul(x, pack_matrix(w, name))
    assert np.isnan(y[:, 4]).all()
    assert (y[:, 5] == np.inf).all()
    assert (y[:, 36] == -np.inf).all()
    sound = np.isfinite(w).all(axis=1)
    assert_product(y[:, sound], x, pack_matrix(w, name).unpack()[sound])


def elsewhere(packed: PackedMatrix, seed: int) -> PackedMatrix:
    """Copy each chunk to a page of its own, in random order and with random gaps, not to be written to."""
    rng, layout = np.random.default_rng(seed), packed.layout
    order, gaps = rng.permutation(len(layout.chunks)), rng.integers(0, 5, len(layout.chunks))
    room = aligned_empty(((layout.nbytes + int(gaps.sum()) * PAGE_BYTES) // 4,), PAGE_BYTES).view(np.uint8)
    buffers, start = list(packed.buffers), 0
    for i, gap in zip(order, gaps, strict=True):
        chunk = layout.chunks[i]
        start += int(gap) * PAGE_BYTES
        buffers[i] = room[start : start + chunk.nbytes]
        np.copyto(buffers[i], packed.buffers[i])
        buffers[i].flags.writeable = False
        start += chunk.padded_nbytes
    return PackedMatrix(layout, buffers)


def in_random_order(x: Float32Array, packed: PackedMatrix, seed: int) -> Float32Array:
    """Multiply chunk by chunk in random order, with scratch memory that held something else."""
    layout = packed.layout
    scratch = GemmScratch(scratch_floats([layout], len(x)))
    scratch.take(scratch.nbytes // 4)[:] = np.nan
    out = np.full((len(x), layout.N), np.nan, np.float32)
    product = start_product(x, layout, scratch)
    for i in np.random.default_rng(seed).permutation(len(layout.chunks)):
        multiply_chunk(product, layout, layout.chunks[i], packed.buffers[i], out)
    return out


@pytest.mark.spec("PACK-24")
@every_count
@every_format
def test_a_product_of_a_large_matrix_has_the_same_bits_in_any_place_and_order(name: str, M: int) -> None:
    packed = large(name, *LARGE[name])
    assert len(packed.layout.chunks) > 1
    x = normal(1, M, packed.layout.K)
    expected = matmul(x, packed).view(np.uint32)
    moved = elsewhere(packed, M)
    assert all(a.ctypes.data % PAGE_BYTES == 0 for a in moved.buffers)
    assert_array_equal(matmul(x, moved).view(np.uint32), expected)
    assert_array_equal(in_random_order(x, moved, M).view(np.uint32), expected)


@pytest.mark.spec("PACK-24")
@pytest.mark.parametrize("M", [1, 15, 16])
@every_format
def test_a_product_of_very_long_rows_has_the_same_bits_in_any_place_and_order(name: str, M: int) -> None:
    packed, x = large(name, 64, 40_000), normal(1, M, 40_000)
    expected = matmul(x, packed).view(np.uint32)
    for seed in range(3):
        assert_array_equal(in_random_order(x, elsewhere(packed, seed), seed).view(np.uint32), expected)


@pytest.mark.spec("PACK-24")
@every_format
@given(
    M=st.sampled_from(ROWS),
    N=st.integers(17, 300) | st.just(1100),
    K=st.integers(1, 100),
    chunk_nbytes=st.sampled_from([1, 3000, 20_000]),
    seed=st.integers(0, 1000),
)
def test_a_product_has_the_same_bits_in_any_place_and_order(
    name: str, M: int, N: int, K: int, chunk_nbytes: int, seed: int
) -> None:
    packed, x = in_chunks(normal(0, N, K), name, chunk_nbytes), normal(1, M, K)
    expected = matmul(x, packed).view(np.uint32)
    moved = elsewhere(packed, seed)
    assert_array_equal(matmul(x, moved).view(np.uint32), expected)
    assert_array_equal(in_random_order(x, moved, seed).view(np.uint32), expected)


@pytest.mark.spec("PACK-24")
@every_format
def test_multiplying_a_chunk_writes_its_outputs_only(name: str) -> None:
    packed, x = large(name, *LARGE[name]), normal(1, 3, LARGE[name][1])
    layout, chunk = packed.layout, packed.layout.chunks[-1]
    out = np.full((3, layout.N), 7, np.float32)
    product = start_product(x, layout, GemmScratch(scratch_floats([layout], 3)))
    multiply_chunk(product, layout, chunk, packed.buffers[-1], out)
    assert (out[:, : chunk.first_row] == 7).all()
    assert_array_equal(out[:, chunk.first_row :], matmul(x, packed)[:, chunk.first_row :])


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
    matmul(x, packed)
    assert made == expected


SCRATCH_SHAPES = [(1, 1), (5, 1), (1, 5), (16, 2), (300, 65), (17, 3000), (520, 511), (1100, 40), (470, 3000)]


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("most_rows", [1, 2, 16, 17, 127, 128, 200])
@every_format
def test_the_scratch_of_several_matrices_suffices_for_every_number_of_rows_up_to_the_most(
    name: str, most_rows: int
) -> None:
    matrices = [large(name, *shape) for shape in SCRATCH_SHAPES]
    scratch = GemmScratch(scratch_floats([packed.layout for packed in matrices], most_rows))
    for packed in matrices:
        for M in {min(most_rows, m) for m in (1, 2, 5, 16, 17, 64, 127, 128, 200)}:
            x = np.ones((M, packed.layout.K), np.float32)
            assert_array_equal(matmul(x, packed, scratch=scratch), matmul(x, packed))


@pytest.mark.spec("PACK-26")
@every_format
@given(
    N=st.integers(1, 600) | st.sampled_from([5000, 9000]),
    K=st.integers(1, 130),
    most_rows=st.integers(1, 140),
    chunk_nbytes=st.sampled_from([1, 20_000, 1 << 22]),
    data=st.data(),
)
def test_the_scratch_of_one_matrix_suffices_for_every_number_of_rows_up_to_the_most(
    name: str, N: int, K: int, most_rows: int, chunk_nbytes: int, data: st.DataObject
) -> None:
    packed = in_chunks(np.ones((N, K), np.float32), name, chunk_nbytes)
    scratch = GemmScratch(scratch_floats([packed.layout], most_rows))
    for M in {data.draw(st.integers(1, most_rows)), most_rows}:
        matmul(np.ones((M, K), np.float32), packed, scratch=scratch)  # raises where the scratch is too small


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("shape", [(100_000, 1), (60_000, 3), (2, 70_000), (40, 31_250)], ids=str)
@every_format
def test_the_scratch_of_a_matrix_of_extreme_shape_suffices(name: str, shape: tuple[int, int]) -> None:
    packed = large(name, *shape)
    for most_rows in (1, 2, 16, 17, 20):
        scratch = GemmScratch(scratch_floats([packed.layout], most_rows))
        for M in {min(most_rows, m) for m in (1, 2, 3, 16, 20)}:
            matmul(np.ones((M, shape[1]), np.float32), packed, scratch=scratch)  # raises where it is too small


@pytest.mark.spec("PACK-26")
def test_a_scratch_too_small_is_refused_and_says_how_much_is_needed() -> None:
    packed = large("int8", 470, 3000)
    needed = re.escape(" floats of scratch are needed, 1000 are reserved")
    with pytest.raises(PackingError, match=rf"^\d+{needed}$"):
        matmul(normal(0, 3, 3000), packed, scratch=GemmScratch(1000))


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
    assert scratch_floats([], 16) == 0


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("M", [1, 3, 16, 17, 127, 128])
@every_format
def test_a_product_allocates_nothing_beside_its_scratch(name: str, M: int) -> None:
    packed = large(name, *LARGE[name])
    layout, x = packed.layout, normal(1, M, LARGE[name][1])
    scratch, out = GemmScratch(scratch_floats([layout], M)), np.empty((M, layout.N), np.float32)
    tracemalloc.start()
    try:
        matmul(x, packed, out, scratch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150_000 < layout.nbytes / 10


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("M", [1, 16, 17, 128])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_the_scratch_itself_does_not_grow_with_the_number_of_weights(name: str, M: int) -> None:
    one, ten = (scratch_floats([layout_of(name, N, 4096)], M) for N in (4096, 40_960))
    assert ten < 1.1 * one
    assert ten < 4096 * 40_960 / 10


@pytest.mark.spec("PACK-26")
@every_format
def test_the_result_is_written_where_the_caller_wants_it(name: str) -> None:
    packed, x = pack_matrix(normal(0, 37, 33), name), normal(1, 3, 33)
    memory = np.full((5, 37), 7, np.float32)
    out = memory[1:4]
    assert matmul(x, packed, out=out) is out
    assert_array_equal(out, matmul(x, packed))
    assert (memory[::4] == 7).all()


VIEWS: dict[str, Callable[[Float32Array], Float32Array]] = {
    "Fortran order": np.asfortranarray,
    "every other row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every other column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "part of a wider array": lambda x: np.pad(x, 5)[5:-5, 5:-5],
    "off the alignment of 16 bytes": lambda x: np.append(np.float32(0), x)[1:].reshape(x.shape),
}


@pytest.mark.spec("PACK-27")
@pytest.mark.parametrize("view", list(VIEWS.values()), ids=list(VIEWS))
@every_count
@every_format
def test_x_may_be_a_strided_view_and_is_only_read(
    name: str, M: int, view: Callable[[Float32Array], Float32Array]
) -> None:
    packed, x = pack_matrix(normal(0, 37, 67), name), normal(1, M, 67)
    strided = view(x)
    strided.flags.writeable = False
    assert_array_equal(matmul(strided, packed), matmul(x, packed))
    assert_array_equal(strided, x)


@pytest.mark.spec("PACK-27")
@every_count
@every_format
def test_x_may_be_one_row_repeated_without_a_copy(name: str, M: int) -> None:
    packed, row = pack_matrix(normal(0, 37, 67), name), normal(1, 67)
    repeated = np.broadcast_to(row, (M, 67))
    assert_array_equal(matmul(repeated, packed), matmul(repeated.copy(), packed))


def f32(*shape: int) -> npt.NDArray[Any]:
    return np.zeros(shape, np.float32)


REFUSED_X = {
    "float64": (f32(2, 33).astype("f8"), "x must be float32 [M, 33] with M of at least 1, not float64 [2, 33]"),
    "float16": (f32(2, 33).astype("f2"), "not float16 [2, 33]"),
    "whole numbers": (f32(2, 33).astype("i4"), "not int32 [2, 33]"),
    "other byte order": (f32(2, 33).astype(">f4"), "not >f4 [2, 33]"),
    "too few columns": (f32(2, 32), "not float32 [2, 32]"),
    "too many columns": (f32(2, 34), "not float32 [2, 34]"),
    "transposed": (f32(33, 2), "not float32 [33, 2]"),
    "a vector": (f32(33), "not float32 [33]"),
    "a number": (f32(), "not float32 []"),
    "three dimensions": (f32(1, 2, 33), "not float32 [1, 2, 33]"),
    "no rows": (f32(0, 33), "not float32 [0, 33]"),
    "no columns": (f32(2, 0), "not float32 [2, 0]"),
}


@pytest.mark.spec("PACK-27")
@pytest.mark.parametrize(("x", "why"), list(REFUSED_X.values()), ids=list(REFUSED_X))
@every_format
def test_x_of_another_shape_or_type_is_refused(name: str, x: npt.NDArray[Any], why: str) -> None:
    with pytest.raises(PackingError, match=re.escape(why) + "$"):
        matmul(x, pack_matrix(normal(0, 20, 33), name))


REFUSED_OUT = {
    "float64": (f32(2, 20).astype("f8"), "out must be contiguous float32 [2, 20], not float64 [2, 20]"),
    "other byte order": (f32(2, 20).astype(">f4"), "not >f4 [2, 20]"),
    "too few rows": (f32(1, 20), "not float32 [1, 20]"),
    "too few columns": (f32(2, 19), "not float32 [2, 19]"),
    "padded columns": (f32(2, 32), "not float32 [2, 32]"),
    "transposed": (f32(20, 2), "not float32 [20, 2]"),
    "a vector": (f32(40), "not float32 [40]"),
    "Fortran order": (np.asfortranarray(f32(2, 20)), "out must be contiguous float32 [2, 20]"),
    "every other column": (f32(2, 40)[:, ::2], "out must be contiguous float32 [2, 20]"),
    "part of a wider array": (f32(2, 40)[:, :20], "out must be contiguous float32 [2, 20]"),
}


@pytest.mark.spec("PACK-27")
@pytest.mark.parametrize(("out", "why"), list(REFUSED_OUT.values()), ids=list(REFUSED_OUT))
@every_format
def test_an_out_of_another_shape_type_or_layout_is_refused(name: str, out: npt.NDArray[Any], why: str) -> None:
    with pytest.raises(PackingError, match=re.escape(why)):
        matmul(normal(0, 2, 33), pack_matrix(normal(1, 20, 33), name), out=out)
