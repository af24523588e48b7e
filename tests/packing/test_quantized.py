"""Specifies `refinfer.packing.quantized`: int8 and int4 within half a scale, and XNNPACK's int8 tile byte by byte."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from refinfer.arrays import Float32Array, bf16_to_f32, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing.layout import TileShape
from refinfer.packing.quantized import (
    BLOCK,
    Int8Array,
    dequantize_int4,
    dequantize_int8,
    pack_xnnpack_int8,
    quantize_int4,
    quantize_int8,
    unpack_xnnpack_int8,
)

XNNPACK = Path(__file__).parents[1] / "golden" / "xnnpack"

LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)
SHAPES = [(1, 1), (3, 31), (2, 32), (3, 33), (4, 64), (2, 95), (17, 130)]


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


def assert_within_half_a_scale(w: Float32Array, q: Int8Array, scales: npt.NDArray[np.float64], most: int) -> None:
    """Check `|w - q * s| <= s / 2` in float64, but for the rounding of `w / s` to float32, and the range of q."""
    error = np.abs(w.astype(np.float64) - q * scales)
    assert (error <= scales * (0.5 + (most + 1) * 2.0**-24)).all()
    assert np.abs(q.astype(int)).max(initial=0) <= most
    assert np.isfinite(scales).all()


@pytest.mark.spec("PACK-10")
@settings(max_examples=200)
@given(weights())
def test_int8_keeps_every_weight_within_half_a_scale(w: Float32Array) -> None:
    q, scales = quantize_int8(w)
    assert (str(q.dtype), q.shape, str(scales.dtype), scales.shape) == ("int8", w.shape, "float32", w.shape[:1])
    assert_within_half_a_scale(w, q, scales.astype(np.float64)[:, None], 127)
    large = np.abs(w).max(axis=1) >= np.float32(256 * TINY)
    assert (np.abs(q[large].astype(int)).max(axis=1) == 127).all()  # no scale is larger than need be
    assert_array_equal(dequantize_int8(q, scales), q.astype(np.float32) * scales[:, None], strict=True)


@pytest.mark.spec("PACK-10")
def test_int8_rounds_to_the_nearest_step_and_ties_to_even() -> None:
    w = np.array([[127, 0.4, -0.6, 2.5, 3.5, -126.5], [-254, 1, 2, 3, -4.9, 0]], np.float32)
    q, scales = quantize_int8(w)
    assert q.tolist() == [[127, 0, -1, 2, 4, -126], [-127, 0, 1, 2, -2, 0]]
    assert scales.tolist() == [1, 2]
    assert dequantize_int8(q, scales)[1].tolist() == [-254, 0, 2, 4, -4, 0]


@pytest.mark.spec("PACK-11")
@settings(max_examples=200)
@given(weights())
def test_int4_keeps_every_weight_within_half_a_scale_of_its_block_or_makes_the_tiny_zero(w: Float32Array) -> None:
    N, K = w.shape
    B = -(-K // BLOCK)
    q, scales = quantize_int4(w)
    assert (str(q.dtype), q.shape, str(scales.dtype), scales.shape) == ("int8", (N, B * BLOCK), "uint16", (N, B))
    for_each = np.repeat(bf16_to_f32(scales).astype(np.float64), BLOCK, axis=1)
    assert not q[for_each == 0].any()
    for_each[for_each == 0] = 16 * TINY  # what has no scale is smaller than half of this
    assert_within_half_a_scale(w, q[:, :K], for_each[:, :K], 7)
    assert not q[:, K:].any()
    blocks = [slice(start, start + BLOCK) for start in range(0, K, BLOCK)]
    for block in blocks:
        large = np.abs(w[:, block]).max(axis=1) >= np.float32(16 * TINY)
        assert (np.abs(q[large, block]).max(axis=1) == 7).all()  # no scale is larger than need be
    expected = (q * np.repeat(bf16_to_f32(scales), BLOCK, axis=1))[:, :K]
    assert_array_equal(dequantize_int4(q, scales, K), expected, strict=True)


@pytest.mark.spec("PACK-11")
def test_int4_scales_each_block_of_32_columns_by_itself() -> None:
    w = np.zeros((1, 70), np.float32)
    w[0, [0, 1, 2, 31]] = 7, 0.4, -2.5, -6.6
    w[0, [32, 33, 63]] = -14, 3.1, 2.9
    w[0, [64, 69]] = 0.875, -0.875
    q, scales = quantize_int4(w)
    assert bf16_to_f32(scales).tolist() == [[1, 2, 0.125]]
    assert {k: int(q[0, k]) for k in np.flatnonzero(q[0])} == {0: 7, 2: -2, 31: -7, 32: -7, 33: 2, 63: 1, 64: 7, 69: -7}


@pytest.mark.spec("PACK-11")
def test_the_largest_weight_stays_seven_where_its_scale_was_rounded_down() -> None:
    w = np.linspace(1, 2, 1000, dtype=np.float32)[:, None]
    q, scales = quantize_int4(w)
    assert (bf16_to_f32(scales)[:, 0] < w[:, 0] / 7).any()
    assert (q[:, 0] == 7).all()


@pytest.mark.spec("PACK-12")
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45, TINY / 300], ids=["zero", "minus zero", "smallest", "subnormal"])
def test_rows_and_blocks_of_zeros_or_of_nearly_nothing_become_zero(zero: float) -> None:
    w = np.linspace(-1, 1, 3 * 100, dtype=np.float32).reshape(3, 100)
    w[1] = zero
    w[2, 32:64] = zero
    w[2, 96:] = zero
    q8, s8 = quantize_int8(w)
    q4, s4 = quantize_int4(w)
    assert not dequantize_int8(q8, s8)[1].any()
    assert q8[[0, 2]].any(axis=1).all()
    dense = dequantize_int4(q4, s4, 100)
    assert not dense[1].any()
    assert not dense[2, 32:64].any()
    assert not dense[2, 96:].any()
    assert dense[0].any()
    assert dense[2, :32].any()
    assert dense[2, 64:96].any()


@pytest.mark.spec("PACK-10", "PACK-11")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantising_gives_the_same_for_a_row_whatever_stands_beside_it(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    q8, s8 = quantize_int8(w)
    q4, s4 = quantize_int4(w)
    assert (q8.shape, s8.shape, s4.shape) == (shape, shape[:1], (shape[0], -(-shape[1] // BLOCK)))
    for n in range(shape[0]):
        q8_alone, s8_alone = quantize_int8(w[n : n + 1].copy())
        q4_alone, s4_alone = quantize_int4(np.asfortranarray(w[n : n + 1]))
        assert_array_equal(q8[n : n + 1], q8_alone, strict=True)
        assert_array_equal(s8[n : n + 1], s8_alone, strict=True)
        assert_array_equal(q4[n : n + 1], q4_alone, strict=True)
        assert_array_equal(s4[n : n + 1], s4_alone, strict=True)


@pytest.mark.spec("PACK-13")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_nan_and_infinity_are_refused_wherever_they_stand(
    quantize: Callable[[Float32Array], object], value: float
) -> None:
    for n, k in ((0, 0), (2, 69), (1, 40)):
        w = np.ones((3, 70), np.float32)
        w[n, k] = value
        with pytest.raises(PackingError, match="NaN or infinity, which cannot be quantised"):
            quantize(w)


def tiles_by_hand(q: Int8Array, scales: Float32Array, bias: Float32Array, tile: TileShape) -> bytes:
    """Transcribe XNNPACK's loop for int8 weights with scales and biases behind them, number by number."""
    (N, K), nr, kr, skr = q.shape, tile.nr, tile.kr, tile.kr * tile.sr
    raw = b""
    for n0 in range(0, N, nr):
        rows = [n if n < N else None for n in range(n0, n0 + nr)]
        raw += b"".join(struct.pack("<i", 0 if n is None else -sum(q[n].tolist())) for n in rows)
        for k0 in range(0, (K + skr - 1) // skr * skr, kr):
            for j, n in enumerate(rows):
                start = k0 // skr * skr + (k0 + j * kr) % skr
                values = [0 if n is None or k >= K else int(q[n, k]) for k in range(start, start + kr)]
                raw += struct.pack(f"<{kr}b", *values)
        for extra in (scales, bias):
            raw += b"".join(struct.pack("<f", 0 if n is None else extra[n]) for n in rows)
    return raw


@st.composite
def int8_matrices(draw: st.DrawFn) -> tuple[Int8Array, Float32Array, Float32Array, TileShape]:
    """Draw quantised weights with scales, biases and a tile shape."""
    N, K = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    nr, kr, sr = (draw(st.sampled_from(sizes)) for sizes in ([1, 3, 4, 8, 64], [1, 2, 4, 8, K], [1, 2, 4]))
    scales, bias = rng.uniform(0.001, 1, N).astype(np.float32), rng.standard_normal(N, np.float32)
    return rng.integers(-128, 128, (N, K), np.int8), scales, bias, TileShape(nr, kr, sr)


@pytest.mark.spec("PACK-14")
@given(int8_matrices())
def test_the_int8_tile_of_xnnpack_holds_row_sums_weights_scales_and_biases(
    drawn: tuple[Int8Array, Float32Array, Float32Array, TileShape],
) -> None:
    packed = pack_xnnpack_int8(*drawn)
    assert (str(packed.dtype), packed.ndim) == ("uint8", 1)
    assert packed.tobytes() == tiles_by_hand(*drawn)


@pytest.mark.spec("PACK-14")
@given(int8_matrices())
def test_the_int8_tile_of_xnnpack_unpacks_to_what_was_packed(
    drawn: tuple[Int8Array, Float32Array, Float32Array, TileShape],
) -> None:
    q, scales, bias, tile = drawn
    N, K = q.shape
    packed = pack_xnnpack_int8(q, scales, bias, tile)
    for ours, theirs in zip(unpack_xnnpack_int8(packed, N, K, tile), (q, scales, bias), strict=True):
        assert_array_equal(ours, theirs, strict=True)


@pytest.mark.spec("PACK-14")
def test_row_sums_do_not_overflow() -> None:
    one = np.ones(1, np.float32)
    packed = pack_xnnpack_int8(np.full((1, 1000), -127, np.int8), one, one, TileShape(1, 4))
    assert packed[:4].view(np.int32).tolist() == [127_000]


TILE = TileShape(4, 2)
Q = np.ones((5, 3), np.int8)
ONES = np.ones(5, np.float32)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "few scales": (
        lambda: pack_xnnpack_int8(Q, ONES[:4], ONES, TILE),
        "5 rows need as many scales and biases, not (4,)",
    ),
    "many biases": (lambda: pack_xnnpack_int8(Q, ONES, np.ones(8, "f4"), TILE), "not (5,) and (8,)"),
    "scales in a column": (lambda: pack_xnnpack_int8(Q, ONES[:, None], ONES, TILE), "not (5, 1) and (5,)"),
    "one scale": (lambda: pack_xnnpack_int8(Q, ONES[:1], ONES, TILE), "not (1,) and (5,)"),
    "no rows": (lambda: pack_xnnpack_int8(Q[:0], ONES[:0], ONES[:0], TILE), "0 outputs and 3 inputs"),
    "no columns": (lambda: pack_xnnpack_int8(Q[:, :0], ONES, ONES, TILE), "5 outputs and 0 inputs"),
    "a byte missing": (
        lambda: unpack_xnnpack_int8(pack_xnnpack_int8(Q, ONES, ONES, TILE)[1:], 5, 3, TILE),
        "127 bytes are not an int8 matrix [5, 3] in tiles of 4 rows",
    ),
    "other rows": (
        lambda: unpack_xnnpack_int8(pack_xnnpack_int8(Q, ONES, ONES, TILE), 9, 3, TILE),
        "128 bytes are not an int8 matrix [9, 3] in tiles of 4 rows",
    ),
    "unpacking nothing": (lambda: unpack_xnnpack_int8(np.zeros(0, "u1"), 0, 3, TILE), "0 outputs and 3 inputs"),
}


@pytest.mark.spec("PACK-14")
@pytest.mark.parametrize(("make", "why"), list(REFUSED.values()), ids=list(REFUSED))
def test_numbers_that_do_not_fit_an_int8_tile_are_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(PackingError, match=re.escape(why)):
        make()


def lanes_of_rows(N: int, K: int, tile: TileShape) -> npt.NDArray[np.bool_]:
    """Return which bytes of XNNPACK's int8 tiles belong to a row of the matrix."""
    n_tiles, steps = -(-N // tile.nr), -(-K // tile.kr)
    there = np.arange(n_tiles * tile.nr).reshape(n_tiles, tile.nr) < N
    words, step = np.repeat(there, 4, axis=1), np.repeat(there, tile.kr, axis=1)
    return np.hstack((words, np.tile(step, steps), words, words)).reshape(-1)


INT8_GOLDENS = ["5x3", "64x64", "70x37"]


@pytest.mark.spec("PACK-15")
@pytest.mark.parametrize("name", INT8_GOLDENS)
def test_packed_int8_bytes_equal_those_of_the_real_xnnpack(name: str) -> None:
    with np.load(XNNPACK / f"int8-{name}-nr64.npz") as golden:
        q, scales, bias, theirs = (golden[key] for key in ("weights", "scales", "bias", "packed"))
        tile = TileShape(int(golden["nr"]), int(golden["kr"]), int(golden["sr"]))
    N, K = q.shape
    assert (f"{N}x{K}", tile) == (name, TileShape(64, 4))
    ours = pack_xnnpack_int8(q, scales, bias, tile)
    assert ours.shape == theirs.shape
    there = lanes_of_rows(N, K, tile)
    assert there.sum() == N * (-(-K // 4) * 4 + 12)
    assert_array_equal(ours[there], theirs[there])


@pytest.mark.spec("PACK-14", "PACK-15")
@pytest.mark.parametrize("name", INT8_GOLDENS)
def test_the_int8_bytes_of_the_real_xnnpack_unpack_to_the_weights_of_the_model(name: str) -> None:
    with np.load(XNNPACK / f"int8-{name}-nr64.npz") as golden:
        expected = [golden[key] for key in ("weights", "scales", "bias")]
        N, K = expected[0].shape
        unpacked = unpack_xnnpack_int8(golden["packed"], N, K, TileShape(64, 4))
    for ours, theirs in zip(unpacked, expected, strict=True):
        assert_array_equal(ours, theirs, strict=True)


@pytest.mark.spec("PACK-11")
@given(st.floats(min_value=16 * TINY, max_value=LARGEST, width=32))
def test_an_int4_scale_is_a_seventh_of_the_largest_weight_as_bfloat16(largest: float) -> None:
    scale = f32_to_bf16(np.array([[largest]], np.float32) / np.float32(7))
    assert_array_equal(quantize_int4(np.full((1, 3), -largest, np.float32))[1], scale, strict=True)
