"""Specifies `refinfer.packing.layout`: where every weight, bias and pad lies, how that is drawn, and how it is cut."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.packing.layout import Chunk, GoiLayout, TileShape, cut_into_chunks, draw


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
    found = places(layout)
    assert layout.elements == len(found)
    for n in range(layout.N):
        assert not layout.has_bias or found[layout.bias_index(n)] == f"bias {n}"
        for k in range(layout.padded_k):
            assert found[layout.weight_index(n, k)] == f"weight {n} {k}"


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
    taken = [layout.weight_index(n, k) for n in lanes for k in range(layout.padded_k)]
    taken += [layout.bias_index(n) for n in lanes if layout.has_bias]
    assert sorted(taken) == list(range(layout.elements))


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


def assert_whole(chunks: tuple[Chunk, ...], N: int, nr: int, tile_nbytes: int) -> None:
    """Check that chunks are runs of whole tiles on pages, one behind the other, with each row once and in order."""
    assert [n for c in chunks for n in range(c.first_row, c.first_row + c.n_rows)] == list(range(N))
    offset = 0
    for chunk in chunks:
        assert chunk.first_row % nr == 0
        assert chunk.nbytes == -(-chunk.n_rows // nr) * tile_nbytes
        assert chunk.offset == offset
        assert chunk.offset % PAGE_BYTES == chunk.padded_nbytes % PAGE_BYTES == 0
        assert 0 <= chunk.padded_nbytes - chunk.nbytes < PAGE_BYTES
        offset += chunk.padded_nbytes


@pytest.mark.spec("PACK-4")
@given(st.integers(1, 3000), st.integers(1, 256), st.integers(1, 100_000), st.integers(1, 1 << 20))
def test_chunks_are_whole_tiles_on_pages_about_as_large_as_wanted(
    N: int, nr: int, tile_nbytes: int, target: int
) -> None:
    chunks = cut_into_chunks(N, nr, tile_nbytes, target)
    assert_whole(chunks, N, nr, tile_nbytes)
    tiles = [chunk.nbytes // tile_nbytes for chunk in chunks]
    assert max(tiles) - min(tiles) <= 1
    assert max(tiles) == 1 or max(tiles) * tile_nbytes <= 1.5 * target + tile_nbytes
    assert len(tiles) == 1 or min(tiles) * tile_nbytes >= 0.75 * target - tile_nbytes


@pytest.mark.spec("PACK-4")
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (600, 3000), (257, 20_000), (5000, 512), (151_936, 896)], ids=str)
@pytest.mark.parametrize("name", list(FORMATS))
def test_the_chunks_of_every_format_hold_each_row_once_and_in_order(name: str, shape: tuple[int, int]) -> None:
    layout = layout_of(name, *shape)
    assert_whole(layout.chunks, layout.N, layout.tile.nr, layout.format.tile_nbytes(layout.tile, layout.K))
    assert layout.nbytes == sum(chunk.padded_nbytes for chunk in layout.chunks)


@pytest.mark.spec("PACK-4")
@pytest.mark.parametrize(
    ("N", "target", "rows"),
    [(11, 8, [11]), (12, 8, [6, 6]), (19, 8, [9, 10]), (3, 0.1, [1, 1, 1]), (1, 8, [1])],
    ids=["below one and a half", "one and a half", "below two and a half", "large tiles", "a single row"],
)
def test_a_matrix_is_cut_into_as_many_chunks_as_targets_fit_to_the_nearest(
    N: int, target: float, rows: list[int]
) -> None:
    assert [chunk.n_rows for chunk in cut_into_chunks(N, 1, 1000, int(1000 * target))] == rows


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no rows to a tile": (lambda: TileShape(0), "at least 1, not 0, 1, 1"),
    "negative kr": (lambda: TileShape(4, kr=-2), "at least 1, not 4, -2, 1"),
    "no sr": (lambda: TileShape(4, kr=2, sr=0), "at least 1, not 4, 2, 0"),
    "no outputs": (lambda: GoiLayout(0, 3, TileShape(4)), "a matrix of 0 outputs and 3 inputs"),
    "no inputs": (lambda: GoiLayout(5, 0, TileShape(4)), "a matrix of 5 outputs and 0 inputs"),
    "negative outputs": (lambda: GoiLayout(-1, 3, TileShape(4)), "a matrix of -1 outputs and 3 inputs"),
    **{f"{name} without outputs": (partial(layout_of, name, 0, 3), "0 outputs") for name in FORMATS},
    **{f"{name} without inputs": (partial(layout_of, name, 3, 0), "0 inputs") for name in FORMATS},
}


@pytest.mark.spec("PACK-5")
@pytest.mark.parametrize(("make", "why"), list(REFUSED.values()), ids=list(REFUSED))
def test_sizes_below_one_are_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(PackingError, match=re.escape(why)):
        make()
