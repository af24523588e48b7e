"""Specifies `refinfer.packing.layout`: tiles, and how a packed matrix is cut into chunks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.packing.layout import Chunk, TileShape, count_chunks, cut_into_chunks
from words import require_equal, require_items

every_format = pytest.mark.parametrize("name", list(FORMATS))


def assert_whole(chunks: tuple[Chunk, ...], N: int, nr: int, tile_nbytes: int) -> None:
    """Check that chunks are runs of whole tiles on pages, one after another, with each row once and in order."""
    row = offset = 0
    for i, chunk in enumerate(chunks):
        require_equal(chunk.first_row, row, f"the first row of chunk {i}")
        assert chunk.first_row % nr == 0, f"chunk {i} begins with row {row}, which is not the first of a tile of {nr}"
        assert chunk.n_rows > 0, f"chunk {i} has no rows"
        require_equal(chunk.nbytes, -(-chunk.n_rows // nr) * tile_nbytes, f"the size of chunk {i}, in bytes,")
        require_equal(chunk.offset, offset, f"the offset of chunk {i}, in bytes,")
        assert chunk.offset % PAGE_BYTES == chunk.padded_nbytes % PAGE_BYTES == 0
        assert 0 <= chunk.padded_nbytes - chunk.nbytes < PAGE_BYTES
        row, offset = row + chunk.n_rows, offset + chunk.padded_nbytes
    require_equal(row, N, "the number of rows in all chunks")


@pytest.mark.spec("PACK-4")
@pytest.mark.parametrize(
    ("N", "expected"),
    [
        (8, [Chunk(0, 4, 0, 1000), Chunk(4, 4, 4096, 1000)]),
        (10, [Chunk(0, 4, 0, 1000), Chunk(4, 4, 4096, 1000), Chunk(8, 2, 8192, 1000)]),
        (3, [Chunk(0, 3, 0, 1000)]),
    ],
    ids=["two whole tiles", "the last tile has two empty lanes", "less than a tile"],
)
def test_the_chunks_of_a_small_matrix_of_tiles_of_four_rows_are_these(N: int, expected: list[Chunk]) -> None:
    chunks = cut_into_chunks(N, 4, 1000, 1000)
    asked = f"cut_into_chunks({N}, 4, 1000, 1000): "
    require_equal(type(chunks).__name__, "tuple", f"{asked}what is returned")
    for name in ("first_row", "n_rows", "offset", "nbytes"):
        yours, right = ([getattr(chunk, name) for chunk in each] for each in (chunks, expected))
        require_items(yours, right, f"{asked}{name} of chunk")


@pytest.mark.spec("PACK-4")
@given(st.integers(1, 3000), st.integers(1, 256), st.integers(1, 100_000), st.integers(1, 1 << 20))
def test_chunks_are_whole_tiles_on_pages_about_as_large_as_wanted(N: int, nr: int, tile_nbytes: int, aim: int) -> None:
    chunks = cut_into_chunks(N, nr, tile_nbytes, aim)
    assert_whole(chunks, N, nr, tile_nbytes)
    require_equal(len(chunks), count_chunks(N, nr, tile_nbytes, aim), "the number of chunks")
    tiles = [chunk.nbytes // tile_nbytes for chunk in chunks]
    assert max(tiles) - min(tiles) <= 1, f"one chunk has {min(tiles)} tiles and another {max(tiles)}"
    assert max(tiles) == 1 or max(tiles) * tile_nbytes <= 1.5 * aim + tile_nbytes
    assert len(tiles) == 1 or min(tiles) * tile_nbytes >= 0.75 * aim - tile_nbytes


@pytest.mark.spec("PACK-31")
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 10))
def test_chunks_end_with_the_last_whole_tile_of_an_even_cut(N: int, nr: int, tiles_wanted: int) -> None:
    chunks = cut_into_chunks(N, nr, 1000, 1000 * tiles_wanted)
    n_tiles = Fraction(-(-N // nr))
    for i, chunk in enumerate(chunks, start=1):
        end = min(N, math.floor(n_tiles / len(chunks) * i) * nr)
        require_equal(chunk.first_row + chunk.n_rows, end, f"the row that ends chunk {i - 1} of {len(chunks)}")


@pytest.mark.spec("PACK-4")
@pytest.mark.parametrize("aim", [None, 1, 100_000])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (600, 3000), (257, 20_000), (5000, 512), (151_936, 896)], ids=str)
@every_format
def test_the_chunks_of_every_format_hold_each_row_once_and_in_order(
    name: str, shape: tuple[int, int], aim: int | None
) -> None:
    layout = layout_of(name, *shape, aim)
    assert_whole(layout.chunks, layout.N, layout.tile.nr, layout.format.tile_nbytes(layout.tile.nr, layout.K))
    assert layout.padded_nbytes == sum(chunk.padded_nbytes for chunk in layout.chunks)
    assert layout.most_rows == max(chunk.n_rows for chunk in layout.chunks)


@pytest.mark.spec("PACK-4")
@pytest.mark.parametrize(
    ("N", "aim", "rows"),
    [(11, 8, [11]), (12, 8, [6, 6]), (19, 8, [9, 10]), (3, 0.1, [1, 1, 1]), (1, 8, [1])],
    ids=["below one and a half", "one and a half", "below two and a half", "large tiles", "a single row"],
)
def test_a_matrix_is_cut_into_the_number_of_chunks_that_comes_nearest_to_the_aim(
    N: int, aim: float, rows: list[int]
) -> None:
    assert [chunk.n_rows for chunk in cut_into_chunks(N, 1, 1000, int(1000 * aim))] == rows


# Rows of a tile, number of chunks, and the last chunk, whose offset sums up all others; for each format in turn.
USUAL_CHUNKS: dict[tuple[int, int], list[tuple[int, int, Chunk]]] = {
    (300, 65): [
        (16, 1, Chunk(0, 300, 0, 79_040)),
        (16, 1, Chunk(0, 300, 0, 40_128)),
        (16, 1, Chunk(0, 300, 0, 20_976)),
        (304, 1, Chunk(0, 300, 0, 21_888)),
    ],
    (896, 4864): [
        (16, 4, Chunk(672, 224, 13_074_432, 4_358_144)),
        (16, 4, Chunk(672, 224, 6_537_216, 2_179_072)),
        (16, 4, Chunk(672, 224, 3_280_896, 1_090_432)),
        (304, 2, Chunk(304, 592, 835_584, 1_663_488)),
    ],
    (4096, 14_336): [
        (16, 56, Chunk(4016, 80, 230_293_504, 4_587_520)),
        (16, 56, Chunk(4016, 80, 115_146_752, 2_293_760)),
        (16, 56, Chunk(4016, 80, 57_798_656, 1_147_200)),
        (144, 29, Chunk(4032, 64, 32_571_392, 1_161_216)),
    ],
    (151_936, 896): [
        (16, 130, Chunk(150_752, 1184, 540_295_168, 4_243_456)),
        (16, 130, Chunk(150_752, 1184, 270_147_584, 2_121_728)),
        (16, 130, Chunk(150_752, 1184, 135_876_608, 1_065_600)),
        (512, 65, Chunk(149_504, 2432, 75_350_016, 1_290_240)),
    ],
}


@pytest.mark.spec("PACK-4")
@pytest.mark.parametrize("shape", list(USUAL_CHUNKS), ids=str)
def test_the_usual_chunks_of_these_matrices_are_these(shape: tuple[int, int]) -> None:
    layouts = [layout_of(name, *shape) for name in FORMATS]
    assert [(layout.tile.nr, len(layout.chunks), layout.chunks[-1]) for layout in layouts] == USUAL_CHUNKS[shape]


@pytest.mark.spec("PACK-4")
@every_format
@given(N=st.integers(1, 5000), K=st.integers(1, 5000), aim=st.integers(1, 1 << 23))
def test_the_aim_for_a_chunk_is_an_argument_that_leaves_the_tiles_as_they_are(
    name: str, N: int, K: int, aim: int
) -> None:
    usual, layout = layout_of(name, N, K), layout_of(name, N, K, aim)
    assert (layout.format, layout.N, layout.K, layout.tile) == (usual.format, N, K, usual.tile)
    assert (usual.chunk_nbytes, layout.chunk_nbytes) == (FORMATS[name].chunk_nbytes, aim)
    assert layout.chunks == cut_into_chunks(N, layout.tile.nr, layout.format.tile_nbytes(layout.tile.nr, K), aim)
    assert layout_of(name, N, K, chunk_nbytes=usual.chunk_nbytes) == usual


@pytest.mark.spec("PACK-4")
@every_format
def test_a_smaller_aim_cuts_smaller_chunks_down_to_single_tiles(name: str) -> None:
    layouts = [layout_of(name, 4096, 64, aim) for aim in (None, 60_000, 40_000, 1)]
    counts = [len(layout.chunks) for layout in layouts]
    assert counts[0] == 1
    assert counts == sorted(set(counts))
    assert counts[-1] == 4096 // layouts[0].tile.nr


@pytest.mark.spec("PACK-4", "PACK-19")
@every_format
def test_a_chunk_alone_is_a_matrix_of_its_rows(name: str) -> None:
    layout = layout_of(name, 1100, 70, 1)
    assert len(layout.chunks) > 1
    for i, chunk in enumerate(layout.chunks):
        alone = layout.alone(i)
        assert alone.chunks == (Chunk(0, chunk.n_rows, 0, chunk.nbytes),)
        assert (alone.N, alone.most_rows, alone.padded_nbytes) == (chunk.n_rows, chunk.n_rows, chunk.padded_nbytes)
        assert (alone.format, alone.K, alone.tile) == (layout.format, layout.K, layout.tile)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no rows to a tile": (lambda: TileShape(0), "at least 1, not 0, 1, 1"),
    "negative kr": (lambda: TileShape(4, kr=-2), "at least 1, not 4, -2, 1"),
    "no sr": (lambda: TileShape(4, kr=2, sr=0), "at least 1, not 4, 2, 0"),
    **{f"{name} without outputs": (partial(layout_of, name, 0, 3), "0 outputs") for name in FORMATS},
    **{f"{name} without inputs": (partial(layout_of, name, 3, 0), "0 inputs") for name in FORMATS},
    **{f"{name} in empty chunks": (partial(layout_of, name, 5, 3, 0), "in chunks of 0 bytes") for name in FORMATS},
    **{f"{name} in negative chunks": (partial(layout_of, name, 5, 3, -1), "chunks of -1 bytes") for name in FORMATS},
}


@pytest.mark.spec("PACK-5")
@pytest.mark.parametrize(("make", "why"), list(REFUSED.values()), ids=list(REFUSED))
def test_sizes_below_one_are_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(PackingError, match=re.escape(why)):
        make()
