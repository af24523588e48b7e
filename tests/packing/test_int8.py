"""Specifies `refinfer.packing.int8`: every weight within half a scale of its row."""

from __future__ import annotations

import re
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
from refinfer.packing import int4
from refinfer.packing.formats import pack_matrix
from refinfer.packing.int8 import dequantize, quantize

LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)


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
    rounding = 128 * 2.0**-24  # of w / s to float32
    assert (np.abs(w.astype(np.float64) - q * each) <= each * (0.5 + rounding)).all()
    large = np.abs(w).max(axis=1) >= np.float32(256 * TINY)
    assert (np.abs(q[large].astype(int)).max(axis=1) == 127).all()  # no scale is larger than need be
    assert_array_equal(dequantize(q, scales), q.astype(np.float32) * scales[:, None], strict=True)


@pytest.mark.spec("PACK-10")
def test_int8_rounds_to_the_nearest_step_and_ties_to_even() -> None:
    w = np.array([[127, 0.4, -0.6, 2.5, 3.5, -126.5], [-254, 1, 2, 3, -4.9, 0]], np.float32)
    q, scales = quantize(w)
    assert q.tolist() == [[127, 0, -1, 2, 4, -126], [-127, 0, 1, 2, -2, 0]]
    assert scales.tolist() == [1, 2]
    assert dequantize(q, scales)[1].tolist() == [-254, 0, 2, 4, -4, 0]


@pytest.mark.spec("PACK-12")
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45, TINY / 300], ids=["zero", "minus zero", "smallest", "subnormal"])
def test_rows_of_zeros_or_of_nearly_nothing_become_zero_in_int8(zero: float) -> None:
    w = np.linspace(-1, 1, 3 * 100, dtype=np.float32).reshape(3, 100)
    w[1] = zero
    q, scales = quantize(w)
    assert not dequantize(q, scales)[1].any()
    assert q[[0, 2]].any(axis=1).all()


@pytest.mark.spec("PACK-10")
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (3, 33), (4, 64), (2, 95), (17, 130)], ids=str)
def test_quantising_a_row_to_int8_does_not_depend_on_the_rows_next_to_it(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    q, scales = quantize(w)
    assert (q.shape, scales.shape) == (shape, shape[:1])
    for n in range(shape[0]):
        q_alone, scales_alone = quantize(np.asfortranarray(w[n : n + 1]))
        assert_array_equal(q[n : n + 1], q_alone, strict=True)
        assert_array_equal(scales[n : n + 1], scales_alone, strict=True)


@pytest.mark.spec("PACK-13")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 69), (1, 40)], ids=str)
def test_int8_refuses_nan_and_infinity_in_any_place(place: tuple[int, int], value: float) -> None:
    w = np.ones((3, 70), np.float32)
    w[place] = value
    with pytest.raises(PackingError, match="NaN or infinity, which cannot be quantised"):
        quantize(w)


@pytest.mark.spec("PACK-21")
@pytest.mark.parametrize("w", [np.ones((2, 3)), np.ones(3, "f4"), np.ones((0, 3), "f4")], ids=lambda w: str(w.shape))
def test_only_a_float32_matrix_is_quantised_to_int8(w: Float32Array) -> None:
    with pytest.raises(PackingError, match="a float32 matrix is wanted, not "):
        quantize(w)


@pytest.mark.spec("PACK-16")
def test_the_bytes_of_a_small_int8_matrix_are_these() -> None:
    raw = pack_matrix(np.array([[7, -1.5, 1], [-127, 0, 63.5]], np.float32), "int8").buffers[0]
    assert raw.size == 16 * 7
    assert raw[:6].view(np.int8).tolist() == [127, -27, 18, -127, 0, 64]
    assert not raw[6:48].any()
    assert_array_equal(raw[48:56].view(np.float32), np.array([7, 127], np.float32) / 127)
    assert not raw[56:].any()


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
