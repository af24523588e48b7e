"""Specifies `refinfer.packing.int8`: every weight within half a scale of its row."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from refinfer.arrays import Float32Array
from refinfer.errors import PackingError
from refinfer.packing import int4, int8
from refinfer.packing.formats import layout_of, pack_matrix
from refinfer.packing.int8 import Int8Array, dequantize, quantize
from refinfer.packing.product import GemmScratch, Product, rows_at_once
from words import require_equal, require_error, require_items, require_near

LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)
ROUNDING = 128 * 2.0**-24  # of w / s to float32


def empty_tiles(T: int, K: int) -> int8.Tiles:
    """Return T tiles of 16 lanes in new memory that holds zeros."""
    return int8.view(np.zeros((T, int8.tile_nbytes(16, K)), np.uint8), 16, K)


@st.composite
def weights(draw: st.DrawFn) -> Float32Array:
    """Draw a matrix whose elements are of all sizes: zeros, subnormals, the largest that there are."""
    N, K = draw(st.integers(1, 6)), draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    if draw(st.booleans()):  # rows of one size each
        exponents = draw(st.lists(st.integers(-149, 127), min_size=N, max_size=N))
        return np.asarray(np.ldexp(rng.uniform(-1, 1, (N, K)), np.array(exponents)[:, None]), np.float32)
    values = [0.0, -0.0, 1.0, -1.0, 1e-45, -TINY, 127 * TINY, 1e-20, 0.003, 1e9, LARGEST / 2, -LARGEST / 2]
    return rng.choice(np.array(values, np.float32), (N, K))


@pytest.mark.spec("PACK-10")
@settings(max_examples=200)
@given(weights())
def test_int8_keeps_every_weight_within_half_a_scale(w: Float32Array) -> None:
    q, scales = quantize(w)
    assert (str(q.dtype), q.shape, str(scales.dtype), scales.shape) == ("int8", w.shape, "float32", w.shape[:1])
    assert np.isfinite(scales).all()
    assert np.abs(q.astype(int)).max(initial=0) <= 127
    each = scales.astype(np.float64)[:, None]
    assert (np.abs(w.astype(np.float64) - q * each) <= each * (0.5 + ROUNDING)).all()
    large = np.abs(w).max(axis=1) >= np.float32(256 * TINY)
    assert (np.abs(q[large].astype(int)).max(axis=1) == 127).all()  # no scale is larger than need be
    assert_array_equal(dequantize(q, scales), q.astype(np.float32) * scales[:, None], strict=True)


@pytest.mark.spec("PACK-10")
@pytest.mark.parametrize(
    ("row", "expected", "scale"),
    [
        ([127, 0.4, -0.6, 2.5, 3.5, -126.5], [127, 0, -1, 2, 4, -126], 1),
        ([-254, 1, 2, 3, -4.9, 0], [-127, 0, 1, 2, -2, 0], 2),
    ],
    ids=["a row with scale 1", "a row with scale 2"],
)
def test_int8_rounds_to_the_nearest_step_and_ties_to_even(row: list[float], expected: list[int], scale: float) -> None:
    q, scales = quantize(np.array([row], np.float32))
    require_equal(float(scales[0]), float(scale), f"the scale of the row {row}")
    for weight, ours, right in zip(row, q[0].tolist(), expected, strict=True):
        require_equal(ours, right, f"with the scale {scale}, q for the weight {weight:g}")
    assert dequantize(q, scales)[0].tolist() == [right * scale for right in expected]


@pytest.mark.spec("PACK-10")
@settings(max_examples=300)
@given(row=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_the_largest_weight_of_a_row_takes_127_steps_and_none_is_off_by_more_than_half_a_step(row: list[float]) -> None:
    w = np.array([row], np.float32)
    q, scales = quantize(w)
    require_equal((str(q.dtype), q.shape), ("int8", w.shape), "the type and shape of q")
    require_equal((str(scales.dtype), scales.shape), ("float32", (1,)), "the type and shape of the scales")
    scale, largest = float(scales[0]), max(map(abs, row))
    assert 0 < scale < np.inf, f"the scale is {scale:g}"
    steps = np.abs(q[0].astype(int))
    assert steps.max() <= 127, f"q has {q[0].min()}, below -127"
    if largest >= 256 * TINY:
        require_equal(int(steps.max()), 127, f"with the scale {scale:g}, the number of steps of the largest weight")
    for weight, number in zip(row, q[0].tolist(), strict=True):
        off = abs(weight - number * scale)
        assert off <= scale * (0.5 + ROUNDING), f"the weight {weight:g} becomes {number} * {scale:g}, off by {off:g}"


@pytest.mark.spec("PACK-12")
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45, TINY / 300], ids=["zero", "minus zero", "smallest", "subnormal"])
def test_rows_of_zeros_or_of_nearly_nothing_become_zero_in_int8(zero: float) -> None:
    w = np.linspace(-1, 1, 3 * 100, dtype=np.float32).reshape(3, 100)
    w[1] = zero
    q, scales = quantize(w)
    require_near(dequantize(q, scales)[1], np.zeros(100), f"in a row of {zero:g}, the weight", ("column",))
    require_equal(float(scales[1]), 1.0, f"the scale of a row of {zero:g}")
    assert q[[0, 2]].any(axis=1).all(), "the rows before and after it became zero as well"


@pytest.mark.spec("PACK-10")
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 31), (2, 32), (3, 33), (4, 64), (2, 95), (17, 130)], ids="{0[0]} rows of {0[1]}".format
)
def test_quantising_a_row_to_int8_does_not_depend_on_the_rows_next_to_it(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    q, scales = quantize(w)
    require_equal((q.shape, scales.shape), (shape, shape[:1]), "the shapes of q and of the scales")
    for n in range(shape[0]):
        q_alone, scales_alone = quantize(np.asfortranarray(w[n : n + 1]))
        require_equal(float(scales[n]), float(scales_alone[0]), f"with other rows, the scale of row {n}")
        require_near(q[n], q_alone[0], f"with other rows, q of row {n}", ("column",))


@pytest.mark.spec("PACK-13")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 69), (1, 40)], ids="row {0[0]}, column {0[1]}".format)
def test_int8_refuses_nan_and_infinity_in_any_place(place: tuple[int, int], value: float) -> None:
    w = np.ones((3, 70), np.float32)
    w[place] = value
    what = f"`quantize` gets {value} in row {place[0]}, column {place[1]}"
    require_error(PackingError, "NaN or infinity, which cannot be quantised", lambda: quantize(w), what)


@pytest.mark.spec("PACK-21")
@pytest.mark.parametrize(
    "w", [np.ones((2, 3)), np.ones(3, "f4"), np.ones((0, 3), "f4")], ids=["float64", "a vector", "no rows"]
)
def test_only_a_float32_matrix_is_quantised_to_int8(w: Float32Array) -> None:
    what = f"`quantize` gets {w.dtype} of shape {list(w.shape)}"
    require_error(PackingError, "a float32 matrix is wanted, not ", lambda: quantize(w), what)


@pytest.mark.spec("PACK-16")
def test_the_bytes_of_a_small_int8_matrix_are_these() -> None:
    raw = pack_matrix(np.array([[7, -1.5, 1], [-127, 0, 63.5]], np.float32), "int8").buffers[0]
    assert raw.size == 16 * 7
    require_items(raw[:6].view(np.int8).tolist(), [127, -27, 18, -127, 0, 64], "the weight at byte")
    assert not raw[6:48].any(), "a weight in the 14 lanes that have no row is not zero"
    require_items((raw[48:56].view(np.float32) * 127).tolist(), [7, 127], "127 times the scale of lane")
    assert not raw[56:].any(), "a scale of the 14 lanes that have no row is not zero"


@pytest.mark.spec("PACK-16", "PACK-30")
@pytest.mark.parametrize(
    ("first", "n"),
    [(0, 2), (3, 2), (14, 4), (17, 3)],
    ids=["the first lanes", "from lane 3 on", "over the edge of a tile", "the second tile"],
)
def test_rows_lie_in_the_lanes_from_the_first_one_on_and_all_other_lanes_stay_as_they_are(first: int, n: int) -> None:
    K = 3
    rows = np.array([[i, 127, -i] for i in range(1, n + 1)], np.float32)  # scale 1, so each weight is its own q
    tiles = empty_tiles(2, K)
    tiles.q[:], tiles.scales[:] = 99, 99
    int8.pack(rows, tiles, first)
    is_as_before = bool((tiles.q == 99).all() and (tiles.scales == 99).all())
    assert not is_as_before, (
        "the tiles still hold the 99 they held before: nothing arrived. A `reshape` of these views is a copy"
    )
    for lane in range(32):
        is_row = first <= lane < first + n
        expected = rows[lane - first].tolist() if is_row else [99] * K
        what = f"lane {lane}, that of row {lane - first}," if is_row else f"lane {lane}, which has no row,"
        require_items(tiles.q[lane // 16, lane % 16].tolist(), expected, f"in {what} weight")
        require_equal(float(tiles.scales[lane // 16, lane % 16]), 1.0 if is_row else 99.0, f"in {what} the scale")


@pytest.mark.spec("PACK-21")
@pytest.mark.parametrize("quantise", [quantize, int4.quantize], ids=["int8", "int4"])
@pytest.mark.parametrize(
    ("w", "what"),
    [
        (np.ones((3, 4)), "float64 [3, 4]"),
        (np.ones((3, 4), np.float16), "float16 [3, 4]"),
        (np.ones((3, 4), np.int8), "int8 [3, 4]"),
        (np.ones(4, np.float32), "float32 [4]"),
        (np.ones((2, 3, 4), np.float32), "float32 [2, 3, 4]"),
        (np.ones((0, 4), np.float32), "float32 [0, 4]"),
        (np.ones((3, 0), np.float32), "float32 [3, 0]"),
    ],
    ids=["float64", "float16", "int8", "vector", "three dimensions", "no rows", "no columns"],
)
def test_only_a_float32_matrix_that_is_not_empty_is_quantised(
    quantise: Callable[[Any], object], w: npt.NDArray[Any], what: str
) -> None:
    with pytest.raises(PackingError, match=re.escape(f"a float32 matrix is wanted, not {what}")):
        quantise(w)
    quantise(np.ones((1, 1), np.float32))


def normal(seed: int, *shape: int) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def whole(seed: int, *shape: int) -> Float32Array:
    """Return whole numbers from -8 to 8; sums of products of a few thousand of them with an int8 are exact."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def some_q(R: int, K: int) -> Int8Array:
    return np.random.default_rng(R).integers(-127, 128, (R, K), np.int8)


def powers(R: int) -> Float32Array:
    """Return scales that multiply exactly."""
    return np.ldexp(np.float32(1), np.arange(R) % 7 - 3).astype(np.float32)


class WatchedProduct(Product):
    """A product that says in words if weights and outputs do not fit each other."""

    def rows(self, w: Float32Array, out: Float32Array) -> None:
        fits = w.ndim == out.ndim == 2 and out.shape == (self.M, len(w))
        assert fits, f"weights of shape {list(w.shape)} are multiplied into outputs of shape {list(out.shape)}"
        super().rows(w, out)


def multiplied(x: Float32Array, q: Int8Array, scales: Float32Array, scratch: GemmScratch | None = None) -> Float32Array:
    """Return what `int8.multiply` makes of x `[M, K]` and a chunk with rows q `[R, K]`, in memory that was used.

    Checks that nothing is written next to the outputs. By default there is more scratch than the product reserves.
    """
    (R, K), M = q.shape, len(x)
    tiles = empty_tiles(-(-R // 16), K)
    which, lane = np.divmod(np.arange(R), 16)
    tiles.q[which, lane], tiles.scales[which, lane] = q, scales
    scratch = scratch or GemmScratch(4 * reserved(R, K, M) + (1 << 19))
    scratch.take(scratch.nbytes // 4)[:] = np.nan
    scratch.reset()
    memory = np.full((M, R + 2), np.nan, np.float32)
    memory[:, [0, -1]] = 7
    int8.multiply(WatchedProduct(x, scratch), tiles, memory[:, 1:-1])
    assert (memory[:, [0, -1]] == 7).all(), "memory next to the outputs was written to"
    return memory[:, 1:-1]


def reserved(R: int, K: int, M: int) -> int:
    """Return how many floats of scratch are reserved for a chunk of R rows."""
    layout = layout_of("int8", R, K, 1 << 60)
    assert len(layout.chunks) == 1
    return int8.scratch_floats(layout, M)


def exact(x: Float32Array, q: Int8Array, scales: Float32Array) -> npt.NDArray[np.float64]:
    return (x.astype(np.float64) @ q.T.astype(np.float64)) * scales


OUTPUTS = ("row of x", "column")


@pytest.mark.spec("PACK-23")
def test_two_int8_rows_multiply_as_worked_out_by_hand() -> None:
    q, scales = np.array([[1, 2, 3], [-127, 0, 1]], np.int8), np.array([0.5, 2], np.float32)
    y = multiplied(np.array([[1, 10, 100]], np.float32), q, scales)
    require_near(y, np.array([[0.5 * 321, 2 * -27]]), "the output", OUTPUTS)


@pytest.mark.spec("PACK-23", "PACK-24")
@given(M=st.sampled_from([1, 2, 16, 17, 40, 128]), R=st.integers(1, 70), K=st.integers(1, 40))
def test_every_row_of_every_tile_gives_its_output_and_empty_lanes_give_none(M: int, R: int, K: int) -> None:
    x, q, scales = whole(M, M, K), some_q(R, K), powers(R)
    require_near(multiplied(x, q, scales), exact(x, q, scales), "the output", OUTPUTS)


@pytest.mark.spec("PACK-23", "PACK-26")
@pytest.mark.parametrize("size", [(1, 70), (3, 64), (40, 550), (130, 550)], ids="M {0[0]}, R {0[1]}".format)
def test_of_more_tiles_than_are_widened_at_a_time_none_is_forgotten(size: tuple[int, int]) -> None:
    (M, R), K = size, 4096
    assert rows_at_once(M, 16, K) < R
    x, q, scales = whole(M, M, K), some_q(R, K), powers(R)
    require_near(multiplied(x, q, scales), exact(x, q, scales), "the output", OUTPUTS)


@pytest.mark.spec("PACK-32")
@pytest.mark.parametrize("M", [1, 4, 20, 130], ids="M {}".format)
def test_the_scale_of_a_row_multiplies_its_sum_once_and_not_its_weights(M: int) -> None:
    x, q = whole(M, M, 100), some_q(35, 100)
    scales = (np.abs(normal(0, 35)) / 127).astype(np.float32)
    sums = (x.astype(np.int64) @ q.T.astype(np.int64)).astype(np.float32)
    require_near(multiplied(x, q, scales), sums * scales, "the output, to the last bit,", OUTPUTS)


SIZES = [(1, 5, 7), (1, 70, 4096), (3, 64, 4096), (16, 300, 1000), (40, 550, 4096), (130, 40, 90)]


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("size", SIZES, ids="M {0[0]}, R {0[1]}, K {0[2]}".format)
def test_an_int8_product_takes_no_more_scratch_than_is_reserved_for_it(size: tuple[int, int, int]) -> None:
    M, R, K = size
    x, q, scales = whole(M, M, K), some_q(R, K), powers(R)
    scratch = GemmScratch(reserved(R, K, M))
    require_near(multiplied(x, q, scales, scratch), exact(x, q, scales), "the output", OUTPUTS)


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("size", SIZES[1:5], ids="M {0[0]}, R {0[1]}, K {0[2]}".format)
def test_an_int8_product_allocates_no_memory_for_widened_weights(size: tuple[int, int, int]) -> None:
    M, R, K = size
    tiles, x, out = empty_tiles(-(-R // 16), K), np.ones((M, K), np.float32), np.empty((M, R), np.float32)
    product = int8.start(x, GemmScratch(reserved(R, K, M)))
    tracemalloc.start()
    try:
        int8.multiply(product, tiles, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # numpy's own buffers take some 100 kB if outputs are scaled part by part; weights, widened, half a megabyte or more
    assert peak < 256 << 10, f"the product allocates {peak:,} bytes; what it widens belongs into its scratch"
