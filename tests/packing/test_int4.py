"""Specifies `refinfer.packing.int4`: every weight within half a scale of its block, in tiles that waste little."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from refinfer.arrays import Float32Array, bf16_to_f32, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing import int4
from refinfer.packing.formats import layout_of, pack_matrix
from refinfer.packing.int4 import BLOCK, dequantize, quantize

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


@pytest.mark.spec("PACK-11")
@settings(max_examples=200)
@given(weights())
def test_int4_keeps_every_weight_within_half_a_scale_of_its_block_or_makes_the_tiny_zero(w: Float32Array) -> None:
    N, K = w.shape
    B = -(-K // BLOCK)
    q, scales = quantize(w)
    assert (str(q.dtype), q.shape, str(scales.dtype), scales.shape) == ("int8", (N, B * BLOCK), "uint16", (N, B))
    each = np.repeat(bf16_to_f32(scales).astype(np.float64), BLOCK, axis=1)
    assert np.isfinite(each).all()
    assert np.abs(q).max(initial=0) <= 7
    assert not q[each == 0].any()
    each[each == 0] = 16 * TINY  # a weight without a scale is smaller than half of this
    rounding = 8 * 2.0**-24  # of w / s to float32
    assert (np.abs(w.astype(np.float64) - (q * each)[:, :K]) <= each[:, :K] * (0.5 + rounding)).all()
    assert not q[:, K:].any()
    blocks = [slice(start, start + BLOCK) for start in range(0, K, BLOCK)]
    for block in blocks:
        large = np.abs(w[:, block]).max(axis=1) >= np.float32(16 * TINY)
        assert (np.abs(q[large, block]).max(axis=1) == 7).all()  # no scale is larger than need be
    expected = (q * np.repeat(bf16_to_f32(scales), BLOCK, axis=1))[:, :K]
    assert_array_equal(dequantize(q, scales, K), expected, strict=True)


@pytest.mark.spec("PACK-11")
def test_int4_scales_each_block_of_32_columns_by_itself() -> None:
    w = np.zeros((1, 70), np.float32)
    w[0, [0, 1, 2, 31]] = 7, 0.4, -2.5, -6.6
    w[0, [32, 33, 63]] = -14, 3.1, 2.9
    w[0, [64, 69]] = 0.875, -0.875
    q, scales = quantize(w)
    assert bf16_to_f32(scales).tolist() == [[1, 2, 0.125]]
    assert {k: int(q[0, k]) for k in np.flatnonzero(q[0])} == {0: 7, 2: -2, 31: -7, 32: -7, 33: 2, 63: 1, 64: 7, 69: -7}


@pytest.mark.spec("PACK-11")
@given(st.floats(min_value=16 * TINY, max_value=LARGEST, width=32))
def test_an_int4_scale_is_a_seventh_of_the_largest_weight_as_bfloat16(largest: float) -> None:
    scale = f32_to_bf16(np.array([[largest]], np.float32) / np.float32(7))
    assert_array_equal(quantize(np.full((1, 3), -largest, np.float32))[1], scale, strict=True)


@pytest.mark.spec("PACK-11")
def test_the_largest_weight_stays_seven_when_its_scale_was_rounded_down() -> None:
    w = np.linspace(1, 2, 1000, dtype=np.float32)[:, None]
    q, scales = quantize(w)
    assert (bf16_to_f32(scales)[:, 0] < w[:, 0] / 7).any()
    assert (q[:, 0] == 7).all()


@pytest.mark.spec("PACK-12")
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45, TINY / 300], ids=["zero", "minus zero", "smallest", "subnormal"])
def test_rows_and_blocks_of_zeros_or_of_nearly_nothing_become_zero_in_int4(zero: float) -> None:
    w = np.linspace(-1, 1, 3 * 100, dtype=np.float32).reshape(3, 100)
    w[1] = zero
    w[2, 32:64] = zero
    w[2, 96:] = zero
    dense = dequantize(*quantize(w), 100)
    assert not dense[1].any()
    assert not dense[2, 32:64].any()
    assert not dense[2, 96:].any()
    assert dense[0].any()
    assert dense[2, :32].any()
    assert dense[2, 64:96].any()


@pytest.mark.spec("PACK-11")
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (3, 33), (4, 64), (2, 95), (17, 130)], ids=str)
def test_quantising_a_row_to_int4_does_not_depend_on_the_rows_next_to_it(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    q, scales = quantize(w)
    assert scales.shape == (shape[0], -(-shape[1] // BLOCK))
    for n in range(shape[0]):
        q_alone, scales_alone = quantize(np.asfortranarray(w[n : n + 1]))
        assert_array_equal(q[n : n + 1], q_alone, strict=True)
        assert_array_equal(scales[n : n + 1], scales_alone, strict=True)


@pytest.mark.spec("PACK-13")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 69), (1, 40)], ids=str)
def test_int4_refuses_nan_and_infinity_in_any_place(place: tuple[int, int], value: float) -> None:
    w = np.ones((3, 70), np.float32)
    w[place] = value
    with pytest.raises(PackingError, match="NaN or infinity, which cannot be quantised"):
        quantize(w)


@pytest.mark.spec("PACK-21")
@pytest.mark.parametrize("w", [np.ones((2, 3)), np.ones(3, "f4"), np.ones((0, 3), "f4")], ids=lambda w: str(w.shape))
def test_only_a_float32_matrix_is_quantised_to_int4(w: Float32Array) -> None:
    with pytest.raises(PackingError, match="a float32 matrix is wanted, not "):
        quantize(w)


@pytest.mark.spec("PACK-16")
def test_the_bytes_of_a_small_int4_matrix_are_these() -> None:
    raw = pack_matrix(np.array([[7, -1.5, 1], [-127, 0, 63.5]], np.float32), "int4").buffers[0]
    assert raw.size == 512 + 64  # 32 columns of 16 rows, the second plane a block of zeros; then the scales
    nibbles = raw[:512].reshape(32, 16)
    assert nibbles[:3, :2].tolist() == [[0x8F, 0x81], [0x86, 0x88], [0x89, 0x8C]]
    assert (nibbles[3:] == 0x88).all()
    assert bf16_to_f32(raw[512:516].view(np.uint16)).tolist() == [1, 18.125]
    assert not raw[516:].any()


@pytest.mark.spec("PACK-20")
@pytest.mark.parametrize(
    ("N", "K", "nr"),
    [
        (1, 64, 16),
        (70, 64, 80),
        (512, 64, 512),
        (513, 64, 272),
        (4096, 14_336, 144),
        (64, 100_000, 64),
        (70, 1 << 20, 48),
    ],
)
def test_an_int4_matrix_is_a_few_tiles_that_are_all_alike(N: int, K: int, nr: int) -> None:
    assert int4.tile_shape(N, K).nr == nr


@pytest.mark.spec("PACK-20")
@given(st.integers(1, 200_000), st.integers(1, 200_000))
def test_an_int4_tile_is_a_multiple_of_16_rows_and_few_of_them_are_missing(N: int, K: int) -> None:
    nr = int4.tile_shape(N, K).nr
    n_tiles = -(-N // nr)
    assert nr % 16 == 0
    assert nr <= 512
    assert n_tiles * nr - N < 16 * n_tiles
    assert nr <= 64 or int4.tile_nbytes(nr, K) <= int4.chunk_nbytes


@pytest.mark.spec("PACK-4", "PACK-20")
@pytest.mark.parametrize("K", [64, 4096, 14_336, 28_672])
def test_an_int4_chunk_is_about_a_megabyte_however_long_its_rows_are(K: int) -> None:
    assert max(chunk.nbytes for chunk in layout_of("int4", 4096, K).chunks) <= 2 << 20
