"""Regions: found by their comments, blanked, and put back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.errors import LabError
from refinfer.labs.regions import blank, is_blank, outside, regions_of, replaced

SOURCE = '''\
def f(x):
    """Add one."""
    # lab 03: add one
    y = x

    return y + 1
    # end lab


def g(x):
    if x:
        # lab 10b: say so
        return "yes"
        # end lab
    return "no"
'''


@pytest.mark.spec("LAB-1")
def test_a_region_is_what_stands_between_two_comments() -> None:
    first, second = regions_of(SOURCE)
    assert (first.lab, first.task, first.first, first.end) == ("03", "add one", 3, 6)
    assert first.text == "    y = x\n\n    return y + 1\n"
    assert first.lines == "y = x\n\nreturn y + 1\n"
    assert (second.lab, second.margin) == ("10b", " " * 8)


@pytest.mark.spec("LAB-2")
def test_a_blank_region_raises_an_error_with_the_lab_and_its_task() -> None:
    first, _ = regions_of(SOURCE)
    blanked = replaced(SOURCE, {0: blank(first)})
    names: dict[str, object] = {}
    exec(blanked, names)
    f = names["f"]
    assert callable(f)
    with pytest.raises(NotImplementedError, match="lab 03: add one"):
        f(1)
    assert [is_blank(region) for region in regions_of(blanked)] == [True, False]
    assert replaced(blanked, {0: first.text}) == SOURCE


@pytest.mark.spec("LAB-2")
def test_a_region_without_any_code_is_blank() -> None:
    region = regions_of(SOURCE)[1]
    for text in ("\n", "    # think\n\n", f"    # think\n{blank(region)}"):
        assert is_blank(regions_of(replaced(SOURCE, {1: text}))[1])
    assert not is_blank(regions_of(replaced(SOURCE, {1: "    pass\n"}))[1])


@pytest.mark.spec("LAB-1")
@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("# lab 01: a\n", "line 1 does not end"),
        ("x = 1\n# end lab\n", "line 2 ends a lab that was not begun"),
        ("# lab 01: a\n# lab 02: b\n# end lab\n", "line 2 begins a lab within another"),
    ],
    ids=["no end", "no beginning", "nested"],
)
def test_a_comment_that_stands_alone_is_refused_with_its_line(source: str, why: str) -> None:
    with pytest.raises(LabError, match=why):
        regions_of(source)


@pytest.mark.spec("LAB-9")
def test_lines_outside_are_all_lines_but_those_of_the_regions() -> None:
    lines = outside(SOURCE)
    assert [n for n, _ in lines] == [1, 2, 3, 7, 8, 9, 10, 11, 12, 14, 15]
    assert lines[2] == (3, "# lab 03")
    text = SOURCE.splitlines()
    markers = [n for n, _ in lines if "lab" in text[n - 1]]
    assert [line for n, line in lines if n not in markers] == [text[n - 1] for n, _ in lines if n not in markers]


@pytest.mark.spec("LAB-2")
@given(st.text("ab \n#:", max_size=40), st.text("ab \n", max_size=20))
def test_what_is_put_into_one_region_leaves_everything_else_as_it_was(text: str, other: str) -> None:
    text = "".join(f"    {line}\n" for line in text.splitlines() if "lab" not in line) + other.replace("\n", "") + "\n"
    changed = replaced(SOURCE, {0: text})
    assert (
        changed.replace(f"    # lab 03: add one\n{text}", "    # lab 03: add one\n" + regions_of(SOURCE)[0].text)
        == SOURCE
    )
