"""Specifies `refinfer.packing.xnnpack`: where weights, biases and pads lie, byte for byte as XNNPACK puts them."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from refinfer.arrays import Float32Array, IntArray
from refinfer.errors import PackingError, RequestError
from refinfer.packing.int8 import Int8Array
from refinfer.packing.layout import TileShape
from refinfer.packing.xnnpack import (
    GoiLayout,
    bias_of,
    draw,
    pack,
    pack_rows,
    pack_xnnpack_int8,
    unpack,
    unpack_rows,
    unpack_xnnpack_int8,
)
from words import require_equal

XNNPACK = Path(__file__).parents[1] / "golden" / "xnnpack"

Matrix = npt.NDArray[Any]


def places(layout: GoiLayout) -> list[str]:
    """Transcribe the loop of `xnn_pack_f32_gemm_goi_w`, and write down what lies at each index."""
    N, K, nr, kr = layout.N, layout.K, layout.tile.nr, layout.tile.kr
    skr = layout.tile.sr * kr
    found: list[str] = []
    for n0 in range(0, N, nr):
        rows = range(n0, n0 + nr)
        if layout.has_bias:
            found += [f"bias {n}" if n < N else "missing" for n in rows]
        for k0 in range(0, (K + skr - 1) // skr * skr, kr):
            for j, n in enumerate(rows):
                start = k0 // skr * skr + (k0 + j * kr) % skr
                found += [f"weight {n} {k}" if n < N else "missing" for k in range(start, start + kr)]
    return found


@st.composite
def layouts(draw: st.DrawFn) -> GoiLayout:
    """Draw any small layout; kr is a power of two or all of K."""
    N, K = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    nr, kr = draw(st.integers(1, 9) | st.just(16)), draw(st.sampled_from([1, 2, 4, 8, K]))
    return GoiLayout(N, K, TileShape(nr, kr, draw(st.sampled_from([1, 2, 4]))), has_bias=draw(st.booleans()))


@pytest.mark.spec("PACK-1")
@given(layouts())
def test_every_weight_bias_and_pad_lies_where_the_loop_of_xnnpack_puts_it(layout: GoiLayout) -> None:
    right = {what: place for place, what in enumerate(places(layout))}
    assert layout.elements == len(places(layout))
    for n in range(layout.N):
        assert not layout.has_bias or layout.bias_index(n) == right[f"bias {n}"]
        for k in range(layout.padded_k):
            require_equal(layout.weight_index(n, k), right[f"weight {n} {k}"], f"weight_index({n}, {k})")


@pytest.mark.spec("PACK-1")
@given(layouts())
def test_a_layout_counts_tiles_columns_and_elements_as_xnnpack_does(layout: GoiLayout) -> None:
    nr, kr, sr = layout.tile.nr, layout.tile.kr, layout.tile.sr
    assert 0 <= layout.n_tiles * nr - layout.N < nr
    assert 0 <= layout.padded_k - layout.K < kr * sr
    assert layout.padded_k % (kr * sr) == 0
    assert layout.tile_elements == nr * (layout.padded_k + (1 if layout.has_bias else 0))


@pytest.mark.spec("PACK-2")
@given(layouts())
def test_every_place_of_a_packed_matrix_belongs_to_one_weight_bias_or_pad(layout: GoiLayout) -> None:
    lanes = range(layout.n_tiles * layout.tile.nr)  # those of missing rows as well
    taken = {layout.bias_index(n): f"bias {n}" for n in lanes if layout.has_bias}
    for n in lanes:
        for k in range(layout.padded_k):
            place, what = layout.weight_index(n, k), f"weight {n}, {k}"
            assert place not in taken, f"{what} and {taken[place]} both lie at {place} in your code"
            assert 0 <= place < layout.elements, f"{what} lies at {place}, outside the {layout.elements} places"
            taken[place] = what
    assert len(taken) == layout.elements


def matrix_of(*sizes: int, bias: bool = True) -> GoiLayout:
    N, K, nr, kr, sr = sizes
    return GoiLayout(N, K, TileShape(nr, kr, sr), has_bias=bias)


DRAWINGS = {
    "pairs of columns": (
        matrix_of(5, 3, 4, 2, 1),
        """
@ 0: b0 b1 b2 b3
@ 4: w00 w01 | w10 w11 | w20 w21 | w30 w31
@12: w02 0   | w12 0   | w22 0   | w32 0
@20: b4 -- -- --
@24: w40 w41 | -- -- | -- -- | -- --
@32: w42 0   | -- -- | -- -- | -- --
""",
    ),
    "single columns": (
        matrix_of(5, 3, 4, 1, 1),
        """
@ 0: b0 b1 b2 b3
@ 4: w00 w10 w20 w30
@ 8: w01 w11 w21 w31
@12: w02 w12 w22 w32
@16: b4 -- -- --
@20: w40 -- -- --
@24: w41 -- -- --
@28: w42 -- -- --
""",
    ),
    "shuffled": (
        matrix_of(4, 8, 4, 1, 4),
        """
@ 0: b0 b1 b2 b3
@ 4: w00 w11 w22 w33
@ 8: w01 w12 w23 w30
@12: w02 w13 w20 w31
@16: w03 w10 w21 w32
@20: w04 w15 w26 w37
@24: w05 w16 w27 w34
@28: w06 w17 w24 w35
@32: w07 w14 w25 w36
""",
    ),
    "shuffled pairs": (
        matrix_of(4, 8, 4, 2, 4),
        """
@ 0: b0 b1 b2 b3
@ 4: w00 w01 w12 w13 w24 w25 w36 w37
@12: w02 w03 w14 w15 w26 w27 w30 w31
@20: w04 w05 w16 w17 w20 w21 w32 w33
@28: w06 w07 w10 w11 w22 w23 w34 w35
""",
    ),
    "whole rows, no biases": (
        matrix_of(3, 3, 2, 3, 1, bias=False),
        """
@ 0: w00 w01 w02 | w10 w11 w12
@ 6: w20 w21 w22 | -- -- --
""",
    ),
    "many columns": (
        matrix_of(2, 11, 2, 8, 1, bias=False),
        """
@ 0: w0,0 w0,1 w0,2 w0,3 w0,4 w0,5 w0,6 w0,7 | w1,0 w1,1 w1,2 w1,3 w1,4 w1,5 w1,6 w1,7
@16: w0,8 w0,9 w0,10 0     0     0     0     0     | w1,8 w1,9 w1,10 0     0     0     0     0
""",
    ),
}


def require_places_drawn(layout: GoiLayout, drawing: str) -> None:
    """Require that each weight lies at the place at which it is drawn."""
    for line in drawing.strip().splitlines():
        at, _, cells = line.removeprefix("@").partition(":")
        for place, cell in enumerate(cells.replace("|", " ").split(), start=int(at)):
            if match := re.fullmatch(r"w(\d)(\d)|w(\d+),(\d+)", cell):
                n, k = (int(number) for number in match.groups() if number)
                require_equal(layout.weight_index(n, k), place, f"{layout}.weight_index({n}, {k})")


STRAIGHT = {name: drawn for name, drawn in DRAWINGS.items() if drawn[0].tile.sr == 1}
SHUFFLED = {name: drawn for name, drawn in DRAWINGS.items() if drawn[0].tile.sr > 1}


@pytest.mark.spec("PACK-1")
@pytest.mark.parametrize(("layout", "drawing"), list(STRAIGHT.values()), ids=list(STRAIGHT))
def test_each_weight_lies_in_the_place_at_which_the_worked_examples_draw_it(layout: GoiLayout, drawing: str) -> None:
    require_places_drawn(layout, drawing)


@pytest.mark.spec("PACK-1")
@pytest.mark.parametrize(("layout", "drawing"), list(SHUFFLED.values()), ids=list(SHUFFLED))
def test_in_a_shuffled_tile_each_row_starts_a_block_later_than_the_one_before_it(
    layout: GoiLayout, drawing: str
) -> None:
    require_places_drawn(layout, drawing)


@pytest.mark.spec("PACK-1", "PACK-3")
@pytest.mark.parametrize(("layout", "drawing"), list(DRAWINGS.values()), ids=list(DRAWINGS))
def test_a_layout_is_drawn_as_in_the_worked_examples(layout: GoiLayout, drawing: str) -> None:
    assert draw(layout) == drawing.strip()


@pytest.mark.spec("PACK-3")
@given(layouts())
def test_a_drawing_has_a_line_for_the_biases_of_a_tile_and_one_for_each_step(layout: GoiLayout) -> None:
    lines = draw(layout).splitlines()
    starts = [int(line[1 : line.index(":")]) for line in lines]
    bias = [layout.tile.nr] if layout.has_bias else []
    steps = [layout.tile.nr * layout.tile.kr] * (layout.padded_k // layout.tile.kr)
    sizes = (bias + steps) * layout.n_tiles
    assert starts == [sum(sizes[:i]) for i in range(len(sizes))]
    drawn = [line[line.index(":") + 1 :].replace("|", " ").split() for line in lines]
    assert [len(cells) for cells in drawn] == sizes
    assert [cell for cells in drawn for cell in cells] == layout.labels()


@pytest.mark.spec("PACK-3")
@given(layouts())
def test_the_labels_name_every_weight_and_bias_once_and_say_what_is_a_pad(layout: GoiLayout) -> None:
    short = max(layout.N, layout.K) <= 10
    labels = {"0": 0, "--": 0}
    for place in places(layout):
        kind, *numbers = place.split()
        if kind == "missing":
            label = "--"
        elif kind == "bias":
            label = "b" + numbers[0]
        else:
            label = "w" + ("" if short else ",").join(numbers) if int(numbers[1]) < layout.K else "0"
        labels[label] = labels.get(label, 0) + 1
    assert Counter(layout.labels()) == Counter(labels)


def sources(layout: GoiLayout) -> IntArray:
    """Transcribe the loop of `xnn_pack_f32_gemm_goi_w`: the place that each element comes from.

    Places count through the weights `[N, K]`, then the biases `[N]`, then a zero.
    """
    N, K, nr, kr = layout.N, layout.K, layout.tile.nr, layout.tile.kr
    skr, zero = layout.tile.sr * kr, N * K + N
    found: list[int] = []
    for n0 in range(0, N, nr):
        rows = range(n0, n0 + nr)
        if layout.has_bias:
            found += [N * K + n if n < N else zero for n in rows]
        for k0 in range(0, (K + skr - 1) // skr * skr, kr):
            for j, n in enumerate(rows):
                start = k0 // skr * skr + (k0 + j * kr) % skr
                found += [n * K + k if n < N and k < K else zero for k in range(start, start + kr)]
    return np.array(found, np.int64)


def random_bits(seed: int, dtype: str, *shape: int) -> Matrix:
    """Return elements of any bits, NaNs and infinities among them."""
    itemsize = np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, itemsize), np.uint8)
    return raw.view(dtype).reshape(shape)


def same_bytes(a: Matrix, b: Matrix) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@st.composite
def matrices(draw: st.DrawFn) -> tuple[GoiLayout, Matrix, Matrix | None]:
    """Draw a layout, a matrix of random bits for it, and perhaps biases."""
    N, K = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    nr = draw(st.integers(1, 9) | st.sampled_from([16, 32]))
    tile = TileShape(nr, draw(st.sampled_from([1, 2, 4, 8, 16, K])), draw(st.sampled_from([1, 2, 4, 8])))
    layout = GoiLayout(N, K, tile, has_bias=draw(st.booleans()))
    seed, dtype = draw(st.integers(0, 1 << 32)), draw(st.sampled_from(["f4", "f2", "u2", "i1", "f8"]))
    has_values = layout.has_bias and draw(st.booleans())
    return layout, random_bits(seed, dtype, N, K), random_bits(seed + 1, dtype, N) if has_values else None


@pytest.mark.spec("PACK-6")
@settings(max_examples=200)
@given(matrices())
def test_packing_equals_the_loop_of_xnnpack_byte_for_byte(drawn: tuple[GoiLayout, Matrix, Matrix | None]) -> None:
    layout, w, bias = drawn
    zero = np.zeros(1, w.dtype)
    biases = np.zeros(layout.N, w.dtype) if bias is None else bias
    expected = np.concatenate((w.ravel(), biases, zero))[sources(layout)]
    assert same_bytes(pack(w, layout, bias), expected)


@pytest.mark.spec("PACK-6")
@pytest.mark.parametrize("tile", [TileShape(4), TileShape(4, 2, 2), TileShape(3, 7), TileShape(16, 8)], ids=str)
def test_a_matrix_may_lie_in_memory_in_any_way(tile: TileShape) -> None:
    layout = GoiLayout(10, 7, tile)
    w = random_bits(0, "f4", 10, 7)
    doubled = np.repeat(np.repeat(w, 2, axis=0), 2, axis=1)
    for same in (np.asfortranarray(w), doubled[::2, 1::2], w[::-1, ::-1].copy()[::-1, ::-1]):
        assert same_bytes(pack(same, layout), pack(w, layout))


@pytest.mark.spec("PACK-6")
def test_a_single_row_repeated_without_a_copy_packs_like_its_copies() -> None:
    layout = GoiLayout(9, 5, TileShape(4, 2))
    repeated = np.broadcast_to(random_bits(0, "f4", 5), (9, 5))
    assert same_bytes(pack(repeated, layout), pack(repeated.copy(), layout))


@pytest.mark.spec("PACK-7")
@given(matrices(), st.data())
def test_unpacking_returns_the_matrix_its_biases_and_any_of_its_rows(
    drawn: tuple[GoiLayout, Matrix, Matrix | None], data: st.DataObject
) -> None:
    layout, w, bias = drawn
    packed = pack(w, layout, bias)
    assert same_bytes(unpack(packed, layout), w)
    ids = np.array(data.draw(st.lists(st.integers(0, layout.N - 1), max_size=8)), np.int64)
    assert same_bytes(unpack_rows(packed, layout, ids), w[ids])
    if layout.has_bias:
        assert same_bytes(bias_of(packed, layout), np.zeros(layout.N, w.dtype) if bias is None else bias)


@pytest.mark.spec("PACK-8")
@given(matrices(), st.data())
def test_packing_in_blocks_of_rows_in_any_order_gives_the_same_bytes(
    drawn: tuple[GoiLayout, Matrix, Matrix | None], data: st.DataObject
) -> None:
    layout, w, bias = drawn
    tiles = range(1, layout.n_tiles)
    cuts = sorted(data.draw(st.sets(st.sampled_from(tiles)))) if tiles else []
    edges = [0, *(cut * layout.tile.nr for cut in cuts), layout.N]
    packed = np.zeros(layout.elements, w.dtype)
    for first, end in data.draw(st.permutations(list(pairwise(edges)))):
        pack_rows(w[first:end], layout, packed, first, None if bias is None else bias[first:end])
    assert same_bytes(packed, pack(w, layout, bias))


@pytest.mark.spec("PACK-8")
def test_packing_some_rows_leaves_the_tiles_of_all_others_alone() -> None:
    layout = GoiLayout(11, 5, TileShape(4, 2), has_bias=True)
    packed = random_bits(0, "i1", layout.elements)
    before = packed.reshape(3, -1).copy()
    pack_rows(random_bits(1, "i1", 4, 5), layout, packed, first_row=4)
    assert_array_equal(packed.reshape(3, -1)[::2], before[::2])


F32_GOLDENS = ["5x3-nr16", "20x7-nr16", "40x5-nr16", "50x7-nr32", "64x10-nr32", "127x9-nr32"]


@pytest.mark.spec("PACK-9")
@pytest.mark.parametrize("name", F32_GOLDENS)
def test_packed_float32_bytes_equal_those_of_the_real_xnnpack(name: str) -> None:
    with np.load(XNNPACK / f"f32-{name}.npz") as golden:
        w, bias, raw = golden["weights"], golden["bias"], golden["packed"]
        tile = TileShape(int(golden["nr"]), int(golden["kr"]), int(golden["sr"]))
    N, K = w.shape
    assert name == f"{N}x{K}-nr{tile.nr}"
    layout = GoiLayout(N, K, tile, has_bias=True)
    ours = pack(w, layout, bias).view(np.uint32)
    theirs = raw.view(np.uint32)
    assert ours.shape == theirs.shape
    missing = np.array(layout.labels()) == "--"
    assert missing.sum() == (layout.n_tiles * tile.nr - N) * (K + 1)
    assert_array_equal(ours[~missing], theirs[~missing])


@pytest.mark.spec("PACK-7", "PACK-9")
@pytest.mark.parametrize("name", F32_GOLDENS)
def test_the_bytes_of_the_real_xnnpack_unpack_to_the_weights_of_the_model(name: str) -> None:
    with np.load(XNNPACK / f"f32-{name}.npz") as golden:
        w, bias, packed = golden["weights"], golden["bias"], golden["packed"].view(np.float32)
        tile = TileShape(int(golden["nr"]))
    N, K = w.shape
    layout = GoiLayout(N, K, tile, has_bias=True)
    assert same_bytes(unpack(packed, layout), w)
    assert same_bytes(bias_of(packed, layout), bias)


SMALL = GoiLayout(5, 3, TileShape(4), has_bias=True)
BARE = GoiLayout(5, 3, TileShape(4))


def f32(*shape: int) -> Matrix:
    return np.zeros(shape, np.float32)


def into(w: Matrix, first_row: int = 0, bias: Matrix | None = None) -> Callable[[], object]:
    return lambda: pack_rows(w, SMALL, f32(SMALL.elements), first_row, bias)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "other columns": (lambda: pack(f32(5, 4), SMALL), "rows of shape (5, 4) at 0 do not fit a matrix [5, 3]"),
    "too few rows": (lambda: pack(f32(4, 3), SMALL), "(4, 3)"),
    "too many rows": (lambda: pack(f32(6, 3), SMALL), "rows of shape (6, 3) at 0 do not fit a matrix [5, 3]"),
    "transposed": (lambda: pack(f32(3, 5), SMALL), "rows of shape (3, 5)"),
    "a number": (lambda: pack(f32(), SMALL), "rows of shape ()"),
    "a vector": (lambda: pack(f32(5), SMALL), "rows of shape (5,)"),
    "three dimensions": (lambda: pack(f32(5, 3, 1), SMALL), "rows of shape (5, 3, 1)"),
    "rows beyond the end": (into(f32(2, 3), 4), "rows of shape (2, 3) at 4"),
    "rows before the start": (into(f32(1, 3), -4), "at -4"),
    "rows within a tile": (into(f32(1, 3), 2), "from the start of a tile of 4 rows on, not from row 2"),
    "memory too small": (lambda: pack_rows(f32(5, 3), SMALL, f32(31)), "do not fit a matrix [5, 3]"),
    "memory too large": (lambda: pack_rows(f32(5, 3), SMALL, f32(33)), "do not fit a matrix [5, 3]"),
    "another type": (into(np.zeros((5, 3))), "must be of the packed type float32; rows are float64"),
    "short bias": (lambda: pack(f32(5, 3), SMALL, f32(4)), "a bias of shape (4,) does not fit 5 rows"),
    "bias matrix": (lambda: pack(f32(5, 3), SMALL, f32(5, 1)), "a bias of shape (5, 1) does not fit 5 rows"),
    "no room for a bias": (lambda: pack(f32(5, 3), BARE, f32(5)), "a bias of shape (5,) does not fit"),
    "bias of the matrix": (into(f32(1, 3), 4, f32(5)), "a bias of shape (5,) does not fit 1 rows"),
    "unpacking too little": (lambda: unpack(f32(31), SMALL), "31 elements are not a packed matrix of 32"),
    "unpacking too much": (lambda: unpack_rows(f32(33), SMALL, np.arange(2)), "33 elements are not"),
    "biases of a layout without": (lambda: bias_of(f32(BARE.elements), BARE), "24 elements are not a packed matrix"),
}


@pytest.mark.spec("PACK-6", "PACK-7", "PACK-8")
@pytest.mark.parametrize(("make", "why"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_does_not_fit_the_layout_is_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(PackingError, match=re.escape(why)):
        make()


@pytest.mark.spec("PACK-7")
@pytest.mark.parametrize("ids", [[-1], [0, 5]], ids=["before the first", "after the last"])
def test_rows_that_do_not_exist_are_refused(ids: list[int]) -> None:
    with pytest.raises(RequestError, match="are asked for; there are 0 to 4"):
        unpack_rows(f32(SMALL.elements), SMALL, np.array(ids))


SIZES = {
    "no outputs": (0, 3, "a matrix of 0 outputs and 3 inputs cannot be packed"),
    "no inputs": (5, 0, "a matrix of 5 outputs and 0 inputs"),
    "negative outputs": (-1, 3, "a matrix of -1 outputs and 3 inputs"),
}


@pytest.mark.spec("PACK-5")
@pytest.mark.parametrize(("N", "K", "why"), list(SIZES.values()), ids=list(SIZES))
def test_a_layout_of_a_size_below_one_is_refused(N: int, K: int, why: str) -> None:
    with pytest.raises(PackingError, match=why):
        GoiLayout(N, K, TileShape(4))


@pytest.mark.spec("PACK-6")
def test_packing_into_memory_with_gaps_is_refused() -> None:
    with pytest.raises(PackingError, match="contiguous memory only"):
        pack_rows(f32(5, 3), SMALL, np.zeros(2 * SMALL.elements, np.float32)[::2])


def tiles_by_hand(q: Int8Array, scales: Float32Array, bias: Float32Array, tile: TileShape) -> bytes:
    """Transcribe XNNPACK's loop for int8 weights, followed by scales and biases, number by number."""
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
REFUSED_INT8: dict[str, tuple[Callable[[], object], str]] = {
    "few scales": (
        lambda: pack_xnnpack_int8(Q, ONES[:4], ONES, TILE),
        "5 rows need one scale and one bias each, not (4,)",
    ),
    "many biases": (lambda: pack_xnnpack_int8(Q, ONES, np.ones(8, "f4"), TILE), "not (5,) and (8,)"),
    "scales in a column": (lambda: pack_xnnpack_int8(Q, ONES[:, None], ONES, TILE), "not (5, 1) and (5,)"),
    "one scale": (lambda: pack_xnnpack_int8(Q, ONES[:1], ONES, TILE), "not (1,) and (5,)"),
    "wide weights": (lambda: pack_xnnpack_int8(Q.astype("i4"), ONES, ONES, TILE), "float32 and float32, not int32"),
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
@pytest.mark.parametrize(("make", "why"), list(REFUSED_INT8.values()), ids=list(REFUSED_INT8))
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
