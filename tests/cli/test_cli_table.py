"""Tables that fit a terminal: their shapes, and that no name or number is ever broken."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.cli.table import Cell, print_table

FRAME = "┏┓┗┛┡┩┳╇┴━┃│└┘─"


def shown(columns: int, names: list[str], rows: list[list[Cell]], *, keys: int = 1, prose: tuple[str, ...] = ()) -> str:
    """Return what is printed below the title."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": str(columns)}), contextlib.redirect_stdout(out):
        print_table("A title", names, rows, keys=keys, prose=prose)
    title, _, table = out.getvalue().partition("\n")
    assert title == "A title"
    return table


def words_in(table: str) -> list[str]:
    return table.translate(dict.fromkeys(map(ord, FRAME), " ")).split()


NAMES = ["budget", "read per token", "optimal"]
ROWS: list[list[Cell]] = [["105 MB", "1.1 GB", "0.438"], ["1.2 GB", "38.7 GB", "0.993"]]


@pytest.mark.spec("CLI-20")
def test_a_table_has_a_frame_and_its_own_width_if_that_fits() -> None:
    expected = """\
┏━━━━━━━━┳━━━━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ budget ┃ read per token ┃ optimal ┃
┡━━━━━━━━╇━━━━━━━━━━━━━━━━╇━━━━━━━━━┩
│ 105 MB │         1.1 GB │   0.438 │
│ 1.2 GB │        38.7 GB │   0.993 │
└────────┴────────────────┴─────────┘
"""
    assert shown(37, NAMES, ROWS) == shown(200, NAMES, ROWS) == expected


@pytest.mark.spec("CLI-20")
def test_headings_are_broken_between_words_first() -> None:
    expected = """\
┏━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━┓
┃        ┃ read per ┃         ┃
┃ budget ┃    token ┃ optimal ┃
┡━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━┩
│ 105 MB │   1.1 GB │   0.438 │
│ 1.2 GB │  38.7 GB │   0.993 │
└────────┴──────────┴─────────┘
"""
    assert shown(31, NAMES, ROWS) == expected


@pytest.mark.spec("CLI-20")
def test_a_column_of_prose_takes_no_more_room_than_its_text() -> None:
    assert shown(13, ["a", "state"], [["x", "ok"]], prose=("state",)).startswith("┏━━━┳━━━━━━━┓")


@pytest.mark.spec("CLI-20")
def test_the_frame_is_left_out_next() -> None:
    expected = """\
        read per
budget     token  optimal
──────  ────────  ───────
105 MB    1.1 GB    0.438
1.2 GB   38.7 GB    0.993

"""
    assert [line.rstrip() for line in shown(25, NAMES, ROWS).splitlines()] == expected.splitlines()


@pytest.mark.spec("CLI-20")
def test_then_the_table_is_cut_into_even_pieces_that_repeat_what_names_a_row() -> None:
    names = ["key", *(f"column{i}" for i in range(5))]
    for columns in (35, 46):  # in the wider one, four columns besides the key would fit
        table = shown(columns, names, [["row", *"12345"]])
        headings = [words_in(line) for line in table.splitlines() if "key" in line]
        assert headings == [["key", *names[1:4]], ["key", *names[4:]]]
        assert [words_in(line) for line in table.splitlines() if "row" in line] == [["row", *"123"], ["row", *"45"]]


@pytest.mark.spec("CLI-20")
def test_a_table_that_is_not_to_be_cut_becomes_a_list_for_each_row() -> None:
    rows: list[list[Cell]] = [["a-long-file-name.packed", Path("/a folder/with blanks"), "it is not one of ours"]]
    expected = """\
a-long-file-name.packed
  model
    /a folder/with blanks
  state  it is not one of
         ours
"""
    assert shown(26, ["file", "model", "state"], rows, keys=0, prose=("model", "state")) == expected


@pytest.mark.spec("CLI-20")
def test_a_table_of_two_columns_becomes_one_list() -> None:
    rows: list[list[Cell]] = [["format", "bf16"], ["path", Path("/a/long/path/of/a.packed")]]
    assert shown(24, ["what", "value"], rows, keys=0) == "  format  bf16\n  path\n/a/long/path/of/a.packed\n"


@pytest.mark.spec("CLI-20")
def test_a_name_longer_than_the_terminal_is_printed_whole() -> None:
    name = "n" * 100
    table = shown(60, ["file", "size", "state"], [[name, "4.8 MB", "good"]], keys=0)
    assert table.splitlines() == [name, "  size   4.8 MB", "  state  good"]


CELLS = st.text("ab-/.0你", min_size=1, max_size=14)
PROSE = st.lists(CELLS, min_size=1, max_size=6).map(" ".join)
HEADINGS = st.lists(st.text("cd", min_size=1, max_size=8), min_size=1, max_size=3).map(" ".join)


@pytest.mark.spec("CLI-20")
@given(data=st.data(), columns=st.integers(60, 130), keys=st.integers(0, 2))
def test_whatever_is_in_a_table_no_line_is_too_long_and_no_word_is_broken(
    data: st.DataObject, columns: int, keys: int
) -> None:
    n = data.draw(st.integers(2, 12))
    names = [f"{i} {data.draw(HEADINGS)}" for i in range(n)]
    prose = tuple(name for name in names if data.draw(st.booleans()))
    kinds = [PROSE if name in prose else CELLS for name in names]
    rows: list[list[Cell]] = data.draw(st.lists(st.tuples(*kinds).map(list), max_size=4))
    table = shown(columns, names, rows, keys=keys, prose=prose)
    widths = [sum(2 if letter == "你" else 1 for letter in line.rstrip()) for line in table.splitlines()]
    assert max(widths, default=0) <= columns
    seen, cells = Counter(words_in(table)), Counter(word for row in rows for cell in row for word in str(cell).split())
    assert not cells - seen
    known = {*cells, *(word for name in names for word in name.split())}
    assert set(seen) <= known
