"""Specifies `refinfer.arrays`: exact conversions of bfloat16, and aligned memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from numpy.testing import assert_array_equal

from refinfer.arrays import (
    PAGE_BYTES,
    Float32Array,
    IntArray,
    UInt16Array,
    aligned_empty,
    bf16_to_f32,
    f32_to_bf16,
    require_rows,
    stored_to_f32,
    whole_pages,
)
from refinfer.errors import RequestError

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)
EXPONENT, FRACTION = ALL_BITS >> 7 & 0xFF, ALL_BITS & 0x7F

# Every upper half with the lower halves at which rounding turns: nothing, a little, just under, on and over the half.
LOWER_HALVES = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
TURNING_POINTS = (ALL_BITS.astype(np.uint32)[:, None] << 16 | LOWER_HALVES).ravel().view(np.float32)

SHAPES = [(), (0,), (5,), (2, 0, 3), (2, 3, 4)]


def by_the_book(bits: IntArray) -> npt.NDArray[np.float64]:
    """Read bfloat16 bits as sign, exponent and fraction; infinity comes out as the 2^128 that it stands for."""
    exponent, fraction = bits >> 7 & 0xFF, bits & 0x7F
    magnitude = np.ldexp(np.where(exponent > 0, 128.0 + fraction, fraction), np.maximum(exponent, 1) - 134)
    return np.asarray(np.where(bits >> 15, -magnitude, magnitude))


def nearest(values: Float32Array) -> UInt16Array:
    """Round finite values by comparing the distances to both neighbours, which float64 holds exactly."""
    inner = (values.view(np.uint32) >> 16).astype(np.int64)
    to_inner, to_outer = np.abs(values - by_the_book(inner)), np.abs(values - by_the_book(inner + 1))
    goes_outward = (to_outer < to_inner) | ((to_outer == to_inner) & (inner % 2 == 1))
    return np.asarray(inner + goes_outward, np.uint16)


@pytest.mark.spec("ARR-1")
def test_widening_every_bit_pattern_gives_the_number_it_stands_for() -> None:
    wide = bf16_to_f32(ALL_BITS)
    finite = EXPONENT != 255
    assert_array_equal(wide[finite].astype(np.float64), by_the_book(ALL_BITS[finite].astype(np.int64)))
    assert_array_equal(np.isinf(wide), ~finite & (FRACTION == 0))
    assert_array_equal(np.isnan(wide), ~finite & (FRACTION != 0))
    assert_array_equal(np.signbit(wide), ALL_BITS >> 15)


@pytest.mark.spec("ARR-1")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_widening_keeps_the_shape(shape: tuple[int, ...]) -> None:
    wide = bf16_to_f32(np.full(shape, 0xC000, np.uint16))
    assert_array_equal(wide, np.full(shape, -2, np.float32), strict=True)


@pytest.mark.spec("ARR-1")
def test_widening_into_given_memory_fills_just_that_memory() -> None:
    memory = np.zeros((4, 6), np.float32)
    columns = memory[:, ::2]
    assert bf16_to_f32(np.full((4, 3), 0x3F80, np.uint16), out=columns) is columns
    assert_array_equal(memory, np.tile(np.array([1, 0], np.float32), (4, 3)))


@pytest.mark.spec("ARR-2")
def test_rounding_takes_the_nearest_value_and_of_two_the_even_one_around_every_bfloat16() -> None:
    values = TURNING_POINTS[np.isfinite(TURNING_POINTS)]
    assert_array_equal(f32_to_bf16(values), nearest(values))


@pytest.mark.spec("ARR-2")
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_rounding_takes_the_nearest_value_for_any_numbers(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    assert_array_equal(f32_to_bf16(values), nearest(values))


@pytest.mark.spec("ARR-1", "ARR-2")
def test_rounding_a_widened_bfloat16_gives_its_bits_back() -> None:
    numbers = ALL_BITS[(EXPONENT != 255) | (FRACTION == 0)]
    assert_array_equal(f32_to_bf16(bf16_to_f32(numbers)), numbers)


@pytest.mark.spec("ARR-2")
def test_rounding_keeps_infinities_and_turns_what_is_too_large_into_them() -> None:
    largest = np.finfo(np.float32).max
    values = np.array([np.inf, -np.inf, largest, -largest], np.float32)
    assert f32_to_bf16(values).tolist() == [0x7F80, 0xFF80, 0x7F80, 0xFF80]


@pytest.mark.spec("ARR-2")
def test_rounding_keeps_every_nan_a_nan_of_its_sign() -> None:
    nans = TURNING_POINTS[np.isnan(TURNING_POINTS)]
    rounded = bf16_to_f32(f32_to_bf16(nans))
    assert np.isnan(rounded).all()
    assert_array_equal(np.signbit(rounded), np.signbit(nans))


@pytest.mark.spec("ARR-2")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_keeps_the_shape(shape: tuple[int, ...]) -> None:
    rounded = f32_to_bf16(np.full(shape, -2, np.float32))
    assert_array_equal(rounded, np.full(shape, 0xC000, np.uint16), strict=True)


@pytest.mark.spec("ARR-3")
@given(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9), st.sampled_from([4, 16, 64, 512, 4096]))
def test_aligned_memory_starts_on_its_alignment_and_has_its_shape(shape: tuple[int, ...], alignment: int) -> None:
    array = aligned_empty(shape, alignment)
    assert array.ctypes.data % alignment == 0
    assert array.dtype == np.float32
    assert array.shape == shape
    assert array.flags.c_contiguous
    array[...] = 1  # it is ours to write


@pytest.mark.spec("ARR-3")
def test_aligned_memory_starts_on_a_cache_line_when_nothing_is_asked_for() -> None:
    assert {aligned_empty((n,)).ctypes.data % 64 for n in range(1, 100)} == {0}


@pytest.mark.spec("ARR-3")
@pytest.mark.parametrize("alignment", [64, PAGE_BYTES])
def test_aligned_memory_takes_the_alignment_more_than_its_data(alignment: int) -> None:
    assert PAGE_BYTES == 4096
    raw = aligned_empty((25, 40), alignment).base
    assert isinstance(raw, np.ndarray)
    assert raw.nbytes == 4 * 25 * 40 + alignment


@pytest.mark.spec("ARR-1")
@pytest.mark.parametrize("stored", [np.float32, np.float16, np.uint16])
def test_every_stored_type_widens_to_the_numbers_it_stands_for(stored: npt.DTypeLike) -> None:
    numbers = np.array([[0, 1, -2], [0.5, 1024, -0.125]], np.float32)
    as_stored = f32_to_bf16(numbers) if stored is np.uint16 else numbers.astype(stored)
    assert_array_equal(stored_to_f32(as_stored), numbers, strict=True)


@pytest.mark.spec("SOURCE-5")
def test_float32_is_not_copied_unless_it_lies_askew() -> None:
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert stored_to_f32(numbers) is numbers
    askew = np.frombuffer(b"." + numbers.tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 3)
    assert not askew.flags.aligned
    wide = stored_to_f32(askew)
    assert wide.flags.aligned
    assert_array_equal(wide, numbers)


@pytest.mark.spec("SOURCE-6", "ERR-1")
def test_rows_are_refused_unless_all_of_them_exist() -> None:
    for there in ([], [0], [4, 0, 4]):
        require_rows(np.array(there, np.int64), 5)
    for missing in ([5], [-1], [0, 5], [-5, 0], [0, 1 << 40]):
        with pytest.raises(RequestError, match=rf"rows {min(missing)} to {max(missing)} are asked for; .* 0 to 4"):
            require_rows(np.array(missing, np.int64), 5)


@pytest.mark.spec("FILE-7")
@given(st.integers(0, 1 << 62))
def test_whole_pages_are_the_fewest_that_hold_so_many_bytes(nbytes: int) -> None:
    whole = whole_pages(nbytes)
    assert whole % PAGE_BYTES == 0
    assert whole - PAGE_BYTES < nbytes <= whole
