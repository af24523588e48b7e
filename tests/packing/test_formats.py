"""Specifies `refinfer.packing.formats`: what every format keeps of the weights, in bytes that are always the same."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from refinfer.arrays import PAGE_BYTES, Float32Array, UInt16Array, f32_to_bf16
from refinfer.errors import PackingError
from refinfer.packing import formats, int4, int8
from refinfer.packing.formats import (
    FORMATS,
    PackedMatrix,
    format_of,
    layout_of,
    pack_chunk,
    pack_matrix,
    packing_nbytes,
)

Stored = npt.NDArray[Any]

SHAPES = [(1, 1), (16, 2), (17, 3), (5, 32), (33, 63), (16, 64), (2, 65), (300, 70), (3, 257)]

every_format = pytest.mark.parametrize("name", list(FORMATS))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int) -> Float32Array:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def contents(packed: PackedMatrix) -> list[bytes]:
    return [buffer.tobytes() for buffer in packed.buffers]


@st.composite
def matrices(draw: st.DrawFn) -> Float32Array:
    """Draw a matrix with rows of different sizes, some rows and blocks of zeros."""
    N = draw(st.integers(1, 40) | st.integers(250, 300) | st.just(1100))  # an int4 tile has up to 512 rows
    K = draw(st.integers(1, 140))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    w = np.ldexp(rng.standard_normal((N, K)), rng.integers(-30, 30, (N, 1))).astype(np.float32)
    w[rng.random(N) < 0.1] = 0
    w[rng.random(N) < 0.1, : K // 2] = 0
    return w


@pytest.mark.spec("PACK-16")
def test_f32_and_bf16_hold_nan_and_infinity() -> None:
    w = normal(20, 7)
    w[3, :3] = np.nan, np.inf, -np.inf
    for name in ("f32", "bf16"):
        assert_array_equal(pack_matrix(w, name).unpack()[3, :3], w[3, :3])


@pytest.mark.spec("PACK-13", "PACK-16")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_int8_and_int4_refuse_nan_and_infinity_however_they_are_stored(name: str, stored: str, value: float) -> None:
    w = normal(20, 7)
    w[19, 6] = value
    as_stored: Stored = f32_to_bf16(w) if stored == "bf16" else w.astype(stored.replace("f", "float"))
    with pytest.raises(PackingError, match="NaN or infinity"):
        pack_matrix(as_stored, name)


@pytest.mark.spec("PACK-16")
@given(matrices())
def test_int8_and_int4_keep_what_quantising_and_dequantising_give(w: Float32Array) -> None:
    assert_array_equal(pack_matrix(w, "int8").unpack(), int8.dequantize(*int8.quantize(w)), strict=True)
    assert_array_equal(pack_matrix(w, "int4").unpack(), int4.dequantize(*int4.quantize(w), w.shape[1]), strict=True)


@st.composite
def short_numbers(draw: st.DrawFn) -> tuple[Float32Array, npt.NDArray[np.float16], UInt16Array]:
    """Draw a matrix of numbers that float32, float16 and bfloat16 can all hold, stored as each."""
    N, K = draw(st.integers(1, 40)), draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    exponents = rng.integers(-24, 8, (N, K)) if draw(st.booleans()) else rng.integers(-24, 8, (N, 1))
    w = np.ldexp(rng.integers(-255, 256, (N, K)).astype(np.float32), exponents).astype(np.float32)
    return w, w.astype(np.float16), (w.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.spec("PACK-17")
@every_format
@given(stored=short_numbers())
def test_weights_of_the_same_values_pack_to_the_same_bytes_however_they_are_stored(
    name: str, stored: tuple[Float32Array, npt.NDArray[np.float16], UInt16Array]
) -> None:
    as_f32, as_f16, as_bf16 = (contents(pack_matrix(w, name)) for w in stored)
    assert as_f32 == as_f16 == as_bf16


@pytest.mark.spec("PACK-19")
@every_format
@given(w=matrices(), chunk_nbytes=st.sampled_from([1, 2000, 9000]))
def test_a_chunk_packs_and_unpacks_by_itself(name: str, w: Float32Array, chunk_nbytes: int) -> None:
    at_once, apart = pack_matrix(w, name), pack_matrix(w, name, chunk_nbytes)
    assert b"".join(contents(apart)) == b"".join(contents(at_once))
    whole, layout = at_once.unpack(), apart.layout
    for chunk in layout.chunks:
        rows = slice(chunk.first_row, chunk.first_row + chunk.n_rows)
        buffer = np.zeros(chunk.nbytes, np.uint8)
        pack_chunk(w[rows], layout, chunk, buffer)
        lanes = np.arange(-(-chunk.n_rows // layout.tile.nr) * layout.tile.nr)
        unpacked = layout.format.unpack_rows(layout.tiles(buffer, chunk), *np.divmod(lanes, layout.tile.nr))
        assert_array_equal(unpacked[: chunk.n_rows], whole[rows], strict=True)
        assert not unpacked[chunk.n_rows :].any()  # missing rows are zeros


@pytest.mark.spec("PACK-19")
@every_format
def test_tiles_are_views_that_share_out_all_bytes_of_a_chunk(name: str) -> None:
    packed = pack_matrix(normal(1100, 70), name, 1)
    for buffer, tiles in zip(packed.buffers, packed.tiles, strict=True):
        parts = [part for part in (tiles if isinstance(tiles, tuple) else [tiles]) if isinstance(part, np.ndarray)]
        assert sum(part.nbytes for part in parts) == buffer.nbytes
        before = buffer.copy()
        for part in parts:
            part.view(np.uint8)[...] ^= 0xFF
        assert_array_equal(buffer, before ^ 0xFF)


@pytest.mark.spec("PACK-19")
@every_format
def test_the_chunks_of_a_large_matrix_lie_on_pages_and_hold_its_rows(name: str) -> None:
    w = np.resize(normal(211), (2400, 1536))
    packed = pack_matrix(w, name)
    chunks = packed.layout.chunks
    assert len(chunks) > 1
    assert all(buffer.ctypes.data % PAGE_BYTES == 0 for buffer in packed.buffers)
    assert [buffer.size for buffer in packed.buffers] == [chunk.nbytes for chunk in chunks]
    last = chunks[-1]
    alone = np.zeros(last.nbytes, np.uint8)
    pack_chunk(w[last.first_row :], packed.layout, last, alone)
    assert_array_equal(alone, packed.buffers[-1])


@pytest.mark.spec("PACK-16")
@pytest.mark.parametrize("name", ["f32", "bf16", "int8"])
@every_shape
def test_the_shape_of_a_tile_says_how_many_columns_of_each_row_lie_together(name: str, shape: tuple[int, int]) -> None:
    w = normal(*shape)
    packed = pack_matrix(w, name)
    nr, kr = packed.layout.tile.nr, packed.layout.tile.kr
    as_stored: dict[str, Stored] = {"f32": w, "bf16": f32_to_bf16(w), "int8": int8.quantize(w)[0]}
    stored = as_stored[name]
    columns = -(-shape[1] // kr) * kr
    raw = np.concatenate(packed.buffers).reshape(-1, packed.layout.format.tile_nbytes(nr, shape[1]))
    weights = np.ascontiguousarray(raw[:, : nr * columns * stored.itemsize]).view(stored.dtype)  # then scales, if any
    rows = weights.reshape(len(raw), columns // kr, nr, kr).transpose(0, 2, 1, 3).reshape(-1, columns)
    assert_array_equal(rows[: shape[0], : shape[1]], stored, strict=True)


BYTES_A_WEIGHT = {"f32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.57}


@pytest.mark.spec("PACK-20")
@every_format
@pytest.mark.parametrize("shape", [(256, 64), (16, 128), (2048, 2048), (8192, 4096)], ids=str)
def test_packed_sizes_keep_within_their_bytes_a_weight(name: str, shape: tuple[int, int]) -> None:
    N, K = shape
    layout = layout_of(name, N, K)
    assert N % layout.tile.nr == 0  # no missing rows
    assert sum(chunk.nbytes for chunk in layout.chunks) <= BYTES_A_WEIGHT[name] * N * K + 4 * N
    assert layout.padded_nbytes < sum(chunk.nbytes for chunk in layout.chunks) + PAGE_BYTES * len(layout.chunks)


@pytest.mark.spec("PACK-20")
@every_format
@given(N=st.integers(1, 3000), K=st.integers(1, 3000))
def test_only_missing_rows_and_odd_columns_add_to_a_packed_size(name: str, N: int, K: int) -> None:
    layout, multiple = layout_of(name, N, K), {"bf16": 2, "int4": 64}.get(name, 1)
    rows, columns = -(-N // layout.tile.nr) * layout.tile.nr, -(-K // multiple) * multiple
    assert rows < N + 16 * -(-N // 256)  # at most 15 missing rows for each 256
    assert sum(chunk.nbytes for chunk in layout.chunks) <= rows * (BYTES_A_WEIGHT[name] * columns + 4)


def rows_into_a_chunk(rows: Stored) -> None:
    layout = layout_of("int8", 20, 3)
    pack_chunk(rows, layout, layout.chunks[0], np.zeros(layout.chunks[0].nbytes, np.uint8))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "number": (lambda: pack_matrix(normal(), "f32"), "not an array of shape ()"),
    "vector": (lambda: pack_matrix(normal(5), "f32"), "only matrices can be packed, not an array of shape (5,)"),
    "three dimensions": (lambda: pack_matrix(normal(5, 3, 2), "int4"), "not an array of shape (5, 3, 2)"),
    "no outputs": (lambda: pack_matrix(normal(0, 3), "int8"), "a matrix of 0 outputs and 3 inputs"),
    "no inputs": (lambda: pack_matrix(normal(3, 0), "bf16"), "a matrix of 3 outputs and 0 inputs"),
    **{
        dtype: (partial(pack_matrix, np.zeros((5, 3), dtype), "f32"), f"weights of type {dtype} cannot be")
        for dtype in ("float64", "int8", "uint8", "int16", "int32", "bool", "complex64", "object")
    },
    "other byte order": (lambda: pack_matrix(normal(5, 3).astype(">f4"), "f32"), "weights of type >f4"),
    "unknown format": (lambda: pack_matrix(normal(5, 3), "int2"), "'int2' is not a weight format; there are f32, bf16"),
    "format in capitals": (lambda: pack_matrix(normal(5, 3), "F32"), "'F32' is not a weight format"),
    "empty format": (lambda: format_of(""), "'' is not a weight format"),
    "layout of no format": (lambda: layout_of("fp8", 5, 3), "'fp8' is not a weight format"),
    "chunk with few rows": (
        lambda: rows_into_a_chunk(normal(19, 3)),
        "rows of shape (19, 3) do not fit a chunk [20, 3]",
    ),
    "chunk with other columns": (lambda: rows_into_a_chunk(normal(20, 4)), "rows of shape (20, 4) do not fit"),
    "chunk of a vector": (lambda: rows_into_a_chunk(normal(60)), "rows of shape (60,) do not fit"),
    "chunk of another type": (lambda: rows_into_a_chunk(np.zeros((20, 3))), "weights of type float64 cannot be packed"),
}


@pytest.mark.spec("PACK-21")
@pytest.mark.parametrize(("make", "why"), list(REFUSED.values()), ids=list(REFUSED))
def test_weights_of_another_type_shape_or_format_are_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(PackingError, match=re.escape(why)):
        make()


@pytest.mark.spec("PACK-21")
def test_formats_are_found_by_name_and_cannot_be_changed() -> None:
    assert list(FORMATS) == ["f32", "bf16", "int8", "int4"]
    assert all(format_of(name) is FORMATS[name] and FORMATS[name].name == name for name in FORMATS)
    assert not hasattr(FORMATS, "__setitem__")


@pytest.mark.spec("PACK-22")
@every_format
@every_shape
def test_equal_weights_pack_to_equal_bytes_whatever_was_in_memory_before(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = normal(*shape)
    expected = contents(pack_matrix(w, name))
    empty = np.empty

    def dirty(shape: Any, dtype: Any = float, **kwargs: Any) -> Stored:
        memory = empty(shape, dtype, **kwargs)
        memory.view(np.uint8)[...] = 0xAB
        return memory

    monkeypatch.setattr(np, "empty", dirty)
    assert contents(pack_matrix(w, name)) == expected


@pytest.mark.spec("PACK-22")
@every_format
def test_equal_weights_pack_to_equal_bytes_however_they_lie_in_memory(name: str) -> None:
    w = normal(37, 70)
    wide = np.repeat(w, 2, axis=1)
    for same in (np.asfortranarray(w), wide[:, ::2], w[::-1].copy()[::-1]):
        assert contents(pack_matrix(same, name)) == contents(pack_matrix(w, name))


@pytest.mark.spec("PACK-22")
@every_format
def test_weights_are_only_read(name: str) -> None:
    w = normal(37, 70)
    before = w.copy()
    w.flags.writeable = False
    packed = pack_matrix(w, name)
    assert_array_equal(w, before)
    packed.unpack()[:] = 0
    packed.buffers[0][:] = 0
    assert_array_equal(w, before)


@pytest.mark.spec("PACK-19", "PACK-21")
@every_format
def test_a_chunk_may_lie_in_a_larger_buffer_but_not_in_a_smaller_one(name: str) -> None:
    packed = pack_matrix(normal(20, 7), name)
    (chunk,), (buffer,) = packed.layout.chunks, packed.buffers
    slot = np.full(chunk.padded_nbytes, 0xA5, np.uint8)
    slot[: chunk.nbytes] = buffer
    assert_array_equal(PackedMatrix(packed.layout, [slot]).unpack(), packed.unpack())
    with pytest.raises(PackingError, match="does not lie in"):
        PackedMatrix(packed.layout, [buffer[:-1].copy()])
    with pytest.raises(PackingError, match="1 chunks need one buffer each, not 0"):
        PackedMatrix(packed.layout, [])


# PACK-30: what packing takes on the way.

WIDE = [(520, 100), (300, 8192), (260, 11008), (140, 28672), (3, 300_000), (40_000, 1), (5000, 33), (700, 257)]
PYTHON_BYTES = 8192  # for objects of Python's own, which tracemalloc counts with the arrays


def taken_by(pack: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at once."""
    tracemalloc.start()
    try:
        pack()
        peak: int = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak


@pytest.mark.spec("PACK-30")
@every_format
@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_packing_takes_no_more_memory_than_is_counted_however_large_a_tile_is(
    name: str, stored: str, shape: tuple[int, int]
) -> None:
    layout = layout_of(name, *shape)
    w = np.resize(normal(1009), shape)
    sources: dict[str, Stored] = {"f32": w, "f16": w.astype(np.float16), "bf16": f32_to_bf16(w)}
    rows = sources[stored]
    buffers = [np.zeros(chunk.nbytes, np.uint8) for chunk in layout.chunks]

    def pack() -> None:
        for chunk, buffer in zip(layout.chunks, buffers, strict=True):
            pack_chunk(rows[chunk.first_row : chunk.first_row + chunk.n_rows], layout, chunk, buffer)

    assert taken_by(pack) <= packing_nbytes([layout]) + PYTHON_BYTES


@pytest.mark.spec("PACK-30")
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_what_is_counted_for_packing_is_nearly_what_it_takes(name: str) -> None:
    layout = layout_of(name, 256, 8192)
    rows, buffer = np.zeros((layout.chunks[0].n_rows, 8192), np.float16), np.zeros(layout.chunks[0].nbytes, np.uint8)
    taken = taken_by(lambda: pack_chunk(rows, layout, layout.chunks[0], buffer))
    assert packing_nbytes([layout]) / 1.2 <= taken


@pytest.mark.spec("PACK-30")
@every_format
def test_what_packing_takes_grows_with_a_single_row_at_most(name: str) -> None:
    usual = packing_nbytes([layout_of(name, 16_000, 1000)])
    assert packing_nbytes([layout_of(name, N, K) for N, K in ((1, 1), (10**5, 8192), (10**5, 1000))]) <= 1.05 * usual
    assert 16 * packing_nbytes([layout_of(name, 64, 64)]) <= 4 * 4.6 * 64 * (64 + 64) + 16
    longest = packing_nbytes([layout_of(name, 64, 10**6)])
    assert longest == packing_nbytes([layout_of(name, 1, 10**6)]) <= 4.7 * 4 * 10**6
    assert packing_nbytes([]) == 0


@pytest.mark.spec("PACK-30")
@every_format
@pytest.mark.parametrize("at_once", [1, 100, 1000, 7000])
@given(w=matrices())
def test_a_chunk_that_is_packed_some_rows_at_a_time_has_the_same_bytes(
    name: str, at_once: int, w: Float32Array
) -> None:
    usual = contents(pack_matrix(w, name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_PACKED_AT_ONCE", at_once)
        assert contents(pack_matrix(w, name)) == usual
