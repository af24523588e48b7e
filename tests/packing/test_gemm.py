"""Specifies `refinfer.packing.gemm`: packing and unpacking matrices of any element type, and XNNPACK's own bytes."""

from __future__ import annotations

import re
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

from refinfer.arrays import IntArray
from refinfer.errors import PackingError
from refinfer.packing.formats import pack_matrix
from refinfer.packing.gemm import bias_of, pack, pack_rows, unpack, unpack_rows
from refinfer.packing.layout import GoiLayout, TileShape

XNNPACK = Path(__file__).parents[1] / "golden" / "xnnpack"

Matrix = npt.NDArray[Any]


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
def test_unpacking_gives_back_the_matrix_its_biases_and_any_of_its_rows(
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
    "short bias": (lambda: pack(f32(5, 3), SMALL, f32(4)), "a bias of shape (4,) does not fit 5 rows"),
    "bias matrix": (lambda: pack(f32(5, 3), SMALL, f32(5, 1)), "a bias of shape (5, 1) does not fit 5 rows"),
    "no room for a bias": (lambda: pack(f32(5, 3), BARE, f32(5)), "a bias of shape (5,) does not fit"),
    "bias of the matrix": (into(f32(1, 3), 4, f32(5)), "a bias of shape (5,) does not fit 1 rows"),
    "unpacking too little": (lambda: unpack(f32(31), SMALL), "31 elements are not a packed matrix of 32"),
    "unpacking too much": (lambda: unpack_rows(f32(33), SMALL, np.arange(2)), "33 elements are not"),
}


@pytest.mark.spec("PACK-6", "PACK-7", "PACK-8")
@pytest.mark.parametrize(("make", "why"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_does_not_fit_the_layout_is_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(PackingError, match=re.escape(why)):
        make()


@pytest.mark.spec("PACK-7", "PACK-18")
@pytest.mark.parametrize("ids", [[-1], [0, 5]], ids=["before the first", "behind the last"])
def test_rows_that_do_not_exist_are_refused(ids: list[int]) -> None:
    w = f32(5, 3)
    for unpack_some in (lambda i: unpack_rows(pack(w, SMALL), SMALL, i), pack_matrix(w, "int8").unpack_rows):
        with pytest.raises(PackingError, match="are asked for; there are 0 to 4"):
            unpack_some(np.array(ids))


@pytest.mark.spec("PACK-6")
def test_packing_into_memory_with_gaps_is_refused() -> None:
    with pytest.raises(PackingError, match="contiguous memory only"):
        pack_rows(f32(5, 3), SMALL, np.zeros(2 * SMALL.elements, np.float32)[::2])
