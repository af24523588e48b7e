"""Tutorials are whole as files: what they quote equals the source, and their links lead on in both views."""

from __future__ import annotations

from pathlib import Path

import pytest

import doors
from doors import DOCS, QUOTE, ROOT, TUTORIALS, Target, definitions, labels_of, pages, quote, targets
from test_pages import Fence, fences

WANTED = pages()


@pytest.mark.spec("BOOK-12")
@pytest.mark.parametrize("name", WANTED)
def test_a_tutorial_and_its_door_are_what_the_script_writes(name: str) -> None:
    assert (ROOT / name).read_text() == WANTED[name], f"run tests/pages/doors.py: it would change {name}"


@pytest.mark.spec("BOOK-8")
def test_every_tutorial_has_its_door_and_every_door_its_tutorial() -> None:
    assert [door.name for door in sorted((DOCS / "tutorials").iterdir())] == [path.name for path in TUTORIALS]


@pytest.mark.spec("BOOK-12")
def test_whatever_has_a_file_as_its_title_is_a_quotation() -> None:
    for path in TUTORIALS:
        page = path.read_text()
        titled: list[Fence] = [fence for fence in fences(page) if fence.title.endswith(".py")]
        assert len(titled) == len(list(QUOTE.finditer(page))), f"{path.name}: a fence has no <!-- quoted: NAME -->"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(doors, "ROOT", tmp_path)
    return tmp_path / "a.py"


SOURCE = """
class A:
    # --8<-- [start:one]
    def f(self):
        # --8<-- [start:two]
        return 1
        # --8<-- [end:two]

    # --8<-- [end:one]
"""
NAMED = (
    '<div class="in-the-repository" data-search-exclude><code>a.py</code></div>\n\n'  # the site has the fence's title
)


@pytest.mark.spec("BOOK-12")
def test_a_quotation_has_neither_margin_nor_marks(source: Path) -> None:
    source.write_text(SOURCE)
    one = '<!-- quoted: one -->\n```python title="a.py"\ndef f(self):\n    return 1\n```\n'
    assert quote("a.py", "one") == NAMED + one
    assert quote("a.py", "two") == NAMED + '<!-- quoted: two -->\n```python title="a.py"\nreturn 1\n```\n'
    with pytest.raises(LookupError, match=r"a\.py has no region three"):
        quote("a.py", "three")


@pytest.mark.spec("BOOK-12")
def test_the_source_of_a_lab_is_quoted_in_a_closed_box(source: Path) -> None:
    source.write_text(SOURCE.replace("return 1\n", "# lab 05: return one\n        return 1\n        # end lab\n"))
    boxed = quote("a.py", "one")
    assert boxed.startswith('<details markdown="1"><summary>Lab 05 ')
    assert boxed.endswith("```\n\n</details>\n")
    assert '```python title="a.py"\ndef f(self):\n    return 1\n```\n' in boxed


@pytest.mark.spec("BOOK-12")
def test_source_that_gives_a_lab_away_is_quoted_in_a_closed_box_too(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text(SOURCE)
    monkeypatch.setattr(doors, "GIVE_AWAY", {("a.py", "one"): "05"})
    boxed = quote("a.py", "one")
    assert boxed.startswith('<details markdown="1"><summary>Lab 05 ')
    assert [found["name"] for found in QUOTE.finditer(boxed)] == ["one"]
    assert quote("a.py", "two") == NAMED + '<!-- quoted: two -->\n```python title="a.py"\nreturn 1\n```\n'


@pytest.mark.spec("BOOK-12")
def test_what_gives_a_lab_away_is_quoted_and_is_no_exercise_itself() -> None:
    text = "".join(path.read_text() for path in TUTORIALS)
    quoted = {(found["path"], found["name"]) for found in QUOTE.finditer(text)}
    for path, name in doors.GIVE_AWAY:
        assert (path, name) in quoted
        assert not doors.region(path, name)[1]


@pytest.mark.spec("BOOK-12")
def test_a_box_comes_and_goes_with_its_lab_and_leaves_what_stands_around_it(source: Path) -> None:
    source.write_text(SOURCE)
    plain = quote("a.py", "one")
    source.write_text(SOURCE.replace("return 1\n", "# lab 05: return one\n        return 1\n        # end lab\n"))
    boxed = quote("a.py", "one")
    around = '<details markdown="1"><summary>Answer 1</summary>\n\n{}\n</details>\n\nAfter.\n'
    assert QUOTE.sub(lambda _: boxed, around.format(plain)) == around.format(boxed)
    assert QUOTE.sub(lambda _: plain, around.format(boxed)) == around.format(plain)


@pytest.mark.spec("BOOK-12")
def test_a_label_stands_for_one_thing_in_each_view() -> None:
    known = targets()
    body = "[`key`][weight_cache/key], [FILE-3] of [the page][figures#a-b], ![x][trust_chain.svg], a[n][k], [0] `[06]`"
    labels = labels_of(body.replace("a[n][k]", "`a[n][k]`"), known)
    assert definitions(labels, site=False) == (
        "[weight_cache/key]: ../refinfer/weight_cache/key.py\n[figures#a-b]: ../docs/figures.md#a-b\n"
        "[FILE-3]: ../docs/spec.md#FILE-3\n[trust_chain.svg]: ../docs/pictures/trust_chain.svg\n"
    )
    assert definitions(labels, site=True) == (
        "[weight_cache/key]: ../reference/weight_cache/key.md\n[figures#a-b]: ../figures.md#a-b\n"
        "[FILE-3]: ../spec.md#FILE-3\n[trust_chain.svg]: ../pictures/trust_chain.svg\n"
    )
    assert known["05"] == Target(*["tutorials/05-a-file-you-can-trust.md"] * 2)


@pytest.mark.spec("BOOK-12")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[FILE-99]", r"\[FILE-99\] leads nowhere"),
        ("[tutorial 99][99]", "there is no '99'"),
        ("[page](../docs/spec.md)", r"leads to a file: write \[page\]\[label\]"),
    ],
)
def test_a_link_that_leads_nowhere_is_an_error(body: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        labels_of(body, targets())
