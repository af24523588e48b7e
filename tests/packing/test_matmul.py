"""Specifies `refinfer.packing.matmul`: products right to the rounding, bit by bit the same, in reserved memory."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from measured_scratch import MeasuredScratch
from refinfer.arrays import PAGE_BYTES, Float32Array, IntArray, aligned_empty
from refinfer.errors import PackingError, RequestError
from refinfer.packing import int4
from refinfer.packing import matmul as packed_matmul
from refinfer.packing.formats import FORMATS, PackedMatrix, layout_of, pack_matrix
from refinfer.packing.layout import Tiles
from refinfer.packing.matmul import scratch_floats, unpack_rows
from refinfer.packing.product import GemmScratch

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


def matmul(
    x: Float32Array, packed: PackedMatrix, out: Float32Array | None = None, scratch: GemmScratch | None = None
) -> Float32Array:
    return packed_matmul.matmul(x, packed.layout, packed.tiles, out, scratch)


def rows_of(packed: PackedMatrix, ids: IntArray) -> Float32Array:
    return unpack_rows(ids, packed.layout, lambda numbers: [packed.tiles[number] for number in numbers])


def assert_product(y: Float32Array, x: Float32Array, w: Float32Array, name: str) -> None:
    """Check `y` against `x @ w.T` in float64, to the rounding of sums of K products in float32.

    int4 sums up `(q + 8) * s` and then takes `8 * s` away, so its products round like those of larger weights.
    """
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    error, size, K = np.abs(y - x64 @ w64.T), np.abs(w64), x.shape[1]
    if name == "int4":
        starts = np.arange(0, K, int4.BLOCK)
        eight_scales = np.maximum.reduceat(size, starts, axis=1) * 8 / 7
        size += np.repeat(eight_scales, int4.BLOCK, axis=1)[:, :K]
    assert (error <= K * (8 * 2.0**-24 * (np.abs(x64) @ size.T) + 2.0**-149)).all()


@pytest.mark.spec("PACK-23")
@every_format
@given(
    M=st.sampled_from(ROWS),
    N=st.integers(1, 70) | st.sampled_from([256, 300, 520]),
    K=st.integers(1, 140) | st.sampled_from([256, 511]),
    chunk_nbytes=st.sampled_from([1, 3000, 1 << 20]),
)
def test_a_product_equals_that_with_the_unpacked_weights(name: str, M: int, N: int, K: int, chunk_nbytes: int) -> None:
    packed = pack_matrix(normal(N, N, K), name, chunk_nbytes)
    x = normal(M, M, K)
    y = matmul(x, packed)
    assert (str(y.dtype), y.shape) == ("float32", (M, N))
    assert_product(y, x, packed.unpack(), name)


@pytest.mark.spec("PACK-23")
@pytest.mark.parametrize("M", [1, 16, 17, 128])
@pytest.mark.parametrize("shape", [(470, 3000), (96, 8003)], ids=str)
@every_format
def test_a_product_of_more_weights_than_are_widened_at_a_time_is_right(
    name: str, shape: tuple[int, int], M: int
) -> None:
    packed, x = large(name, *shape), normal(1, M, shape[1])
    assert_product(matmul(x, packed), x, packed.unpack(), name)


@pytest.mark.spec("PACK-23", "PACK-26")
@pytest.mark.parametrize("shape", [(64, 40_000), (3, 31_249), (100_000, 1)], ids=str)
@every_format
def test_a_product_of_very_long_or_very_many_rows_is_right(name: str, shape: tuple[int, int]) -> None:
    packed = large(name, *shape)
    w = packed.unpack()
    for M in (1, 2, 16):
        x = normal(M, M, shape[1])
        assert_product(matmul(x, packed), x, w, name)


@pytest.mark.spec("PACK-23")
@pytest.mark.parametrize("M", [1, 3, 17, 128])
@every_format
def test_inputs_of_which_one_number_is_one_and_all_others_zero_give_the_weights_themselves(name: str, M: int) -> None:
    packed = pack_matrix(normal(0, 40, 131), name)
    w, ones = packed.unpack(), np.eye(131, dtype=np.float32)
    for first in range(0, 131 - M + 1, M):
        assert_array_equal(matmul(ones[first : first + M], packed), w[:, first : first + M].T, strict=True)


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
    assert_product(y, x, pack_matrix(w, name).unpack(), name)


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
    assert_product(matmul(x, packed), x, packed.unpack(), name)


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
    assert_product(y[sound], x[sound], packed.unpack(), name)


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
    assert_product(y[:, sound], x, pack_matrix(w, name).unpack()[sound], name)


def elsewhere(packed: PackedMatrix, seed: int) -> PackedMatrix:
    """Copy each chunk to a page of its own, in random order and with random gaps, not to be written to."""
    rng, layout = np.random.default_rng(seed), packed.layout
    order, gaps = rng.permutation(len(layout.chunks)), rng.integers(0, 5, len(layout.chunks))
    room = aligned_empty(((layout.padded_nbytes + int(gaps.sum()) * PAGE_BYTES) // 4,), PAGE_BYTES).view(np.uint8)
    buffers, start = list(packed.buffers), 0
    for i, gap in zip(order, gaps, strict=True):
        chunk = layout.chunks[i]
        start += int(gap) * PAGE_BYTES
        buffers[i] = room[start : start + chunk.nbytes]
        np.copyto(buffers[i], packed.buffers[i])
        buffers[i].flags.writeable = False
        start += chunk.padded_nbytes
    return PackedMatrix(layout, buffers)


def dirty_scratch(packed: PackedMatrix, M: int) -> GemmScratch:
    """Return scratch memory for M rows that held something else."""
    scratch = GemmScratch(scratch_floats([packed.layout], M))
    scratch.take(scratch.nbytes // 4)[:] = np.nan
    scratch.reset()
    return scratch


def in_random_order(x: Float32Array, packed: PackedMatrix, seed: int) -> Float32Array:
    """Multiply chunk by chunk in random order."""
    layout, scratch = packed.layout, dirty_scratch(packed, len(x))
    out = np.full((len(x), layout.N), np.nan, np.float32)
    operand = layout.format.start(x, scratch)
    used = scratch.used
    for i in np.random.default_rng(seed).permutation(len(layout.chunks)):
        chunk = layout.chunks[i]
        layout.format.multiply(operand, packed.tiles[i], out[:, chunk.first_row : chunk.first_row + chunk.n_rows])
        scratch.reset(used)
    return out


def each_by_itself(x: Float32Array, packed: PackedMatrix) -> Float32Array:
    """Multiply each chunk as a matrix of its own."""
    layout, scratch = packed.layout, dirty_scratch(packed, len(x))
    alone = [PackedMatrix(layout.alone(i), [buffer]) for i, buffer in enumerate(packed.buffers)]
    return np.hstack([matmul(x, chunk, scratch=scratch) for chunk in alone])


@pytest.mark.spec("PACK-19", "PACK-24")
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
    assert_array_equal(each_by_itself(x, moved).view(np.uint32), expected)


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
    packed, x = pack_matrix(normal(0, N, K), name, chunk_nbytes), normal(1, M, K)
    expected = matmul(x, packed).view(np.uint32)
    moved = elsewhere(packed, seed)
    assert_array_equal(matmul(x, moved).view(np.uint32), expected)
    assert_array_equal(in_random_order(x, moved, seed).view(np.uint32), expected)
    assert_array_equal(each_by_itself(x, moved).view(np.uint32), expected)


@pytest.mark.spec("PACK-24")
@every_format
def test_multiplying_a_chunk_writes_its_outputs_only(name: str) -> None:
    packed, x = large(name, *LARGE[name]), normal(1, 3, LARGE[name][1])
    layout, first = packed.layout, packed.layout.chunks[-1].first_row
    out = np.full((3, layout.N), 7, np.float32)
    operand = layout.format.start(x, GemmScratch(scratch_floats([layout], 3)))
    layout.format.multiply(operand, packed.tiles[-1], out[:, first:])
    assert (out[:, :first] == 7).all()
    assert_array_equal(out[:, first:], matmul(x, packed)[:, first:])


class Ring:
    """A single slot through which the chunks of a matrix pass, one after another; it records what happens."""

    def __init__(self, packed: PackedMatrix) -> None:
        self.packed = packed
        self.events: list[str] = []
        self.slot = np.empty(max(chunk.padded_nbytes for chunk in packed.layout.chunks), np.uint8)

    def arriving(self, numbers: Sequence[int]) -> Iterator[Tiles]:
        """Yield the tiles of some chunks; whoever asks for the next one can no longer use the one before it."""
        self.events.append(f"asked for {list(numbers)}")
        for number in numbers:
            self.slot[: self.packed.buffers[number].size] = self.packed.buffers[number]
            self.events.append(f"gave {number}")
            yield self.packed.layout.tiles(self.slot, self.packed.layout.chunks[number])
            self.slot[:] = 0xFF
            self.events.append(f"released {number}")


@pytest.mark.spec("PACK-24")
@every_count
@every_format
def test_a_product_with_chunks_that_arrive_has_the_same_bits_and_uses_each_before_it_asks_for_the_next(
    name: str, M: int
) -> None:
    packed, x = pack_matrix(normal(0, 1100, 70), name, 1), normal(1, M, 70)
    ring, numbers = Ring(packed), range(len(packed.layout.chunks))
    assert len(numbers) > 1
    y = packed_matmul.matmul(x, packed.layout, ring.arriving(numbers))
    assert_array_equal(y.view(np.uint32), matmul(x, packed).view(np.uint32))
    assert ring.events[1:] == [f"{what} {number}" for number in numbers for what in ("gave", "released")]


@pytest.mark.spec("PACK-27")
@pytest.mark.parametrize("count", [0, 1, 3])
def test_tiles_that_are_not_one_for_each_chunk_are_refused(count: int) -> None:
    packed = pack_matrix(normal(0, 32, 5), "f32", 1)
    assert len(packed.tiles) == 2
    with pytest.raises(ValueError, match=r"argument 2 is (shorter|longer)"):
        packed_matmul.matmul(normal(1, 2, 5), packed.layout, [packed.tiles[0]] * count)


@pytest.mark.spec("PACK-18")
@every_format
@given(
    N=st.integers(1, 40) | st.sampled_from([300, 1100]),
    K=st.integers(1, 140),
    chunk_nbytes=st.sampled_from([1, 2000, 1 << 20]),
    data=st.data(),
)
def test_unpacking_rows_gives_those_rows(name: str, N: int, K: int, chunk_nbytes: int, data: st.DataObject) -> None:
    packed = pack_matrix(normal(0, N, K), name, chunk_nbytes)
    ids = np.array(data.draw(st.lists(st.integers(0, N - 1), max_size=40)), np.int64)
    assert_array_equal(rows_of(packed, ids), packed.unpack()[ids], strict=True)


@pytest.mark.spec("PACK-18")
@every_format
def test_unpacking_rows_asks_for_the_chunks_that_hold_them_each_once_and_in_order(name: str) -> None:
    packed = pack_matrix(normal(0, 2500, 40), name, 1)
    chunks = packed.layout.chunks
    assert len(chunks) >= 5
    last = chunks[4].first_row
    ids = np.array([last + 1, 0, chunks[2].first_row, last, last + 1, chunks[3].first_row - 1])
    ring = Ring(packed)
    assert_array_equal(unpack_rows(ids, packed.layout, ring.arriving), packed.unpack()[ids], strict=True)
    used = [f"{what} {number}" for number in (0, 2, 4) for what in ("gave", "released")]
    assert ring.events == ["asked for [0, 2, 4]", *used]


@pytest.mark.spec("PACK-18")
@every_format
def test_unpacking_no_rows_asks_for_no_chunk(name: str) -> None:
    ring = Ring(pack_matrix(normal(0, 20, 7), name))
    assert unpack_rows(np.array([], np.int64), ring.packed.layout, ring.arriving).shape == (0, 7)
    assert ring.events == ["asked for []"]


@pytest.mark.spec("PACK-18")
@pytest.mark.parametrize("ids", [[-1], [0, 5]], ids=["before the first", "after the last"])
@every_format
def test_rows_that_do_not_exist_are_refused(name: str, ids: list[int]) -> None:
    packed = pack_matrix(normal(0, 5, 3), name)
    with pytest.raises(RequestError, match="are asked for; there are 0 to 4"):
        rows_of(packed, np.array(ids))


@pytest.mark.spec("PACK-18")
@pytest.mark.parametrize("count", [1, 200])
@every_format
def test_unpacking_rows_takes_memory_for_a_few_rows_at_a_time(name: str, count: int) -> None:
    K = 2048
    packed, ids = large(name, 1100, K), np.arange(count) + 700
    rows_of(packed, ids)
    tracemalloc.start()
    try:
        rows_of(packed, ids)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The rows themselves, a few copies of up to 16 of them, and small change: a tile of 16 rows alone has 64 * K.
    assert peak < 4 * K * count + 20 * K * min(count, 16) + 20_000


def assert_takes_what_it_reserves(packed: PackedMatrix, M: int) -> None:
    layout = packed.layout
    scratch = MeasuredScratch(layout.format.scratch_floats(layout, M))
    matmul(np.ones((M, layout.K), np.float32), packed, scratch=scratch)  # raises PackingError if it is too small
    assert scratch.most == scratch.nbytes // 4


EXTREME_SHAPES = [
    (1, 1),
    (5, 1),
    (1, 5),
    (100_000, 1),
    (60_000, 3),
    (2, 70_000),
    (3, 31_249),
    (40, 31_250),
    (470, 3000),
]


@pytest.mark.slow
@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("shape", EXTREME_SHAPES, ids=str)
@every_format
def test_a_product_of_an_extreme_shape_takes_exactly_the_scratch_that_its_format_reserves(
    name: str, shape: tuple[int, int]
) -> None:
    for M in (1, 2, 8, 16, 17, 64, 127, 128, 300):
        assert_takes_what_it_reserves(large(name, *shape), M)


@pytest.mark.spec("PACK-26")
@every_format
def test_a_product_of_rows_too_long_for_tiles_takes_exactly_the_scratch_that_its_format_reserves(name: str) -> None:
    assert_takes_what_it_reserves(large(name, 3, 31_249), 16)


@pytest.mark.spec("PACK-26")
@every_format
@given(
    M=st.integers(1, 140) | st.just(300),
    N=st.integers(1, 600) | st.sampled_from([1100, 5000]),
    K=st.integers(1, 130) | st.just(511),
    chunk_nbytes=st.sampled_from([1, 20_000, 1 << 22]),
)
def test_a_product_takes_exactly_the_scratch_that_its_format_reserves(
    name: str, M: int, N: int, K: int, chunk_nbytes: int
) -> None:
    layout = layout_of(name, N, K, chunk_nbytes)
    assert_takes_what_it_reserves(PackedMatrix(layout, [np.zeros(c.nbytes, np.uint8) for c in layout.chunks]), M)


@pytest.mark.spec("PACK-26")
@every_format
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 1 << 17)), max_size=3),
    most_rows=st.integers(1, 300),
    chunk_nbytes=st.integers(1, 1 << 23),
)
def test_scratch_for_several_matrices_is_the_most_that_any_of_them_takes_for_any_number_of_rows(
    name: str, shapes: list[tuple[int, int]], most_rows: int, chunk_nbytes: int
) -> None:
    layouts = [layout_of(name, N, K, chunk_nbytes) for N, K in shapes]
    each = [layout.format.scratch_floats(layout, M) for layout in layouts for M in range(1, most_rows + 1)]
    assert scratch_floats(layouts, most_rows) == max(each, default=0)


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("most_rows", [1, 2, 16, 17, 127, 128, 200])
@every_format
def test_products_of_several_matrices_share_one_scratch(name: str, most_rows: int) -> None:
    shapes = [(1, 1), (1, 5), (16, 2), (300, 65), (17, 3000), (520, 511), (1100, 40), (470, 3000)]
    matrices = [large(name, *shape) for shape in shapes]
    scratch = GemmScratch(scratch_floats([packed.layout for packed in matrices], most_rows))
    for packed in matrices:
        for M in {min(most_rows, m) for m in (1, 2, 5, 16, 17, 64, 127, 128, 200)}:
            x = np.ones((M, packed.layout.K), np.float32)
            assert_array_equal(matmul(x, packed, scratch=scratch), matmul(x, packed))


@pytest.mark.spec("PACK-26")
def test_a_scratch_too_small_is_refused_and_says_how_much_is_needed() -> None:
    packed = large("int8", 470, 3000)
    needed = re.escape(" floats of scratch are needed, 1000 are reserved")
    with pytest.raises(PackingError, match=rf"^\d+{needed}$"):
        matmul(normal(0, 3, 3000), packed, scratch=GemmScratch(1000))


@pytest.mark.spec("PACK-26")
@pytest.mark.parametrize("M", [1, 3, 16, 17, 127, 128])
@every_format
def test_a_product_allocates_nothing_but_its_scratch(name: str, M: int) -> None:
    packed = large(name, *LARGE[name])
    layout, x = packed.layout, normal(1, M, LARGE[name][1])
    scratch, out = GemmScratch(scratch_floats([layout], M)), np.empty((M, layout.N), np.float32)
    tracemalloc.start()
    try:
        matmul(x, packed, out, scratch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150_000 < layout.padded_nbytes / 10


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
