"""Specifies `refinfer.packing.f32`: every weight is kept, in rows as they are."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from refinfer.packing.formats import pack_matrix

SHAPES = [(1, 1), (16, 2), (17, 3), (5, 32), (33, 63), (16, 64), (2, 65), (300, 70), (3, 257)]


@pytest.mark.spec("PACK-16")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_f32_keeps_every_weight_bit_by_bit(shape: tuple[int, int]) -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, shape, np.uint32)
    bits.ravel()[:4] = [0x7FA00001, 0xFF800000, 0x80000000, 0x00000001][: bits.size]  # NaN, infinity, -0, subnormal
    assert_array_equal(pack_matrix(bits.view(np.float32), "f32").unpack().view(np.uint32), bits)


@pytest.mark.spec("PACK-16")
def test_the_bytes_of_a_small_f32_matrix_are_these() -> None:
    raw = pack_matrix(np.array([[7, -1.5, 1], [-127, 0, 63.5]], np.float32), "f32").buffers[0]
    assert raw.size == 16 * 12
    assert raw.view(np.float32)[:6].tolist() == [7, -1.5, 1, -127, 0, 63.5]
    assert not raw[6 * 4 :].any()
