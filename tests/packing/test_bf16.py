"""Specifies `refinfer.packing.bf16`: bfloat16 weights are kept, others rounded to nearest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_array_equal

from refinfer.arrays import Float32Array, bf16_to_f32, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing.formats import pack_matrix

SHAPES = [(1, 1), (16, 2), (17, 3), (5, 32), (33, 63), (16, 64), (2, 65), (300, 70), (3, 257)]
LARGEST = float(bf16_to_f32(np.array(0x7F7F, np.uint16)))

finite = st.floats(-LARGEST, LARGEST, width=32)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=finite)


@pytest.mark.spec("PACK-16")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_keeps_every_bfloat16_weight_bit_by_bit(shape: tuple[int, int]) -> None:
    bits = np.random.default_rng(2).integers(0, 1 << 16, shape, np.uint16)
    bits.ravel()[:4] = [0x7FA0, 0xFF80, 0x8000, 0x0001][: bits.size]
    unpacked = pack_matrix(bits, "bf16").unpack()
    assert_array_equal(unpacked.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.spec("PACK-16")
@given(matrices)
def test_bf16_rounds_other_weights_to_the_nearest(w: Float32Array) -> None:
    unpacked = pack_matrix(w, "bf16").unpack()
    assert_array_equal(unpacked, bf16_to_f32(f32_to_bf16(w)), strict=True)
    normal = np.abs(w) >= np.finfo(np.float32).tiny
    exact, error = w.astype(np.float64), np.abs(w.astype(np.float64) - unpacked)
    assert (error[normal] <= 2.0**-8 * np.abs(exact[normal])).all()


@pytest.mark.spec("PACK-16")
def test_a_weight_too_large_for_bfloat16_is_refused_while_infinity_is_kept() -> None:
    w = np.array([[LARGEST, np.inf, -np.inf, np.nan]], np.float32)
    assert_array_equal(pack_matrix(w, "bf16").unpack(), w)
    w[0, 0] = np.finfo(np.float32).max
    with pytest.raises(PackingError, match="a weight is too large for bfloat16; use f32"):
        pack_matrix(w, "bf16")


@pytest.mark.spec("PACK-16")
def test_the_bytes_of_a_small_bf16_matrix_are_these() -> None:
    raw = pack_matrix(np.array([[7, -1.5, 1], [-127, 0, 63.5]], np.float32), "bf16").buffers[0]
    assert raw.size == 16 * 8  # a column of zeros makes three even
    assert raw.view(np.uint16)[:8].tolist() == [0x40E0, 0xBFC0, 0x3F80, 0, 0xC2FE, 0, 0x427E, 0]
    assert not raw[8 * 2 :].any()
