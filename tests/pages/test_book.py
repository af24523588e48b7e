"""What holds the book together: reference, tutorials, pictures and contents agree with the code and with each other."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from refinfer.labs.catalogue import Lab, labs

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
REFERENCE: Final[dict[str, Any]] = runpy.run_path(str(Path(__file__).with_name("reference.py")))
TUTORIALS: Final = sorted((ROOT / "tutorials").glob("[0-9][0-9]-*.md"))
PICTURES: Final = DOCS / "pictures"
SCRIPTS: Final = sorted(PICTURES.glob("*.py"))
CONTENTS: Final = (ROOT / "mkdocs.yml").read_text()

PARTS: Final = {
    "a number in its title": r"\A# \d\d\. .+",
    "what one will be able to explain": r"(?i)you will be able to|after this page\W+you can",
    "how long it takes": r"\d+ minutes",
    "what it reads": r"(?i)\breads\b",
    "what one needs": r"(?i)\*\*(you need|needs)\b",
    "a picture": r"!\[.{30,}\]\[\w+\.svg\]",
    "code from the source": r'^```python title="\S+\.py"$',
    "what it leaves out": r"^## What this leaves out$",
    "where it comes from": r"^## Where it comes from$(?s:.*?)\[[A-Z]+-\d+\]",
    "three exercises": r"^## Three exercises$(?s:.*?)^1\. (?s:.*?)^2\. (?s:.*?)^3\. ",
    "an answer to each": r"^## Answers$"
    + "".join(rf'(?s:.*?)^<details markdown="1"><summary>Answer {n}</summary>$' for n in (1, 2, 3)),
    "a way to the next page or the one before": r"\]\[\d\d\]\.?\n\n<!-- --8<-- \[end:page\] -->$",
}
WORDS_A_MINUTE: Final = 200
LAB: Final = re.compile(
    r"^\*\*Lab (?P<number>\w+), (?P<title>.+?)\*\* \((?P<minutes>\d+) minutes(?P<optional>, optional)?\)\. ",
    re.MULTILINE,
)
_FENCE: Final = re.compile(r"^(?P<indent> *)```(?P<head>[^\n]*)\n.*?^(?P=indent)```$", flags=re.MULTILINE | re.DOTALL)


def named(paths: list[Path]) -> Callable[..., pytest.MarkDecorator]:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def minutes_to_read(page: str) -> float:
    """Words at a steady pace, a minute for a quotation from the source, half a minute for any other block.

    An output belongs to the block that printed it. Answers are not counted: they are read by those who looked. Nor are
    the labs after them, which say how many minutes they take.
    """
    body = page.partition("\n## Answers\n")[0]
    heads = [fence["head"] for fence in _FENCE.finditer(body)]
    quotations = sum('.py"' in head for head in heads)
    others = sum("title=" not in head for head in heads)
    prose = re.sub(
        r"<!--.*?-->|<div .*?</div>|<summary>.*?</summary>|</?details[^>]*>|\]\([^)]*\)|\]\[[^]]*\]",
        "",
        _FENCE.sub("", body),
    )
    return len(prose.split()) / WORDS_A_MINUTE + quotations + others / 2


@pytest.mark.spec("BOOK-6")
def test_the_reference_is_what_the_modules_say() -> None:
    wanted = REFERENCE["pages"]()
    written = {path.relative_to(DOCS / "reference").as_posix(): path for path in (DOCS / "reference").rglob("*.md")}
    assert sorted(written) == sorted(wanted), "run tests/pages/reference.py"
    for name, path in written.items():
        assert path.read_text() == wanted[name], f"run tests/pages/reference.py: {name} is not what it writes"


@pytest.mark.spec("BOOK-6")
def test_every_public_name_is_on_its_page() -> None:
    for module in REFERENCE["modules"]().values():
        page = (DOCS / "reference" / f"{module.title}.md").read_text()
        assert all(f"        - {name}\n" in page for name in module.names), module.name


@pytest.mark.spec("BOOK-6")
def test_every_module_names_a_tutorial_that_there_is() -> None:
    there_are = [path.name for path in TUTORIALS]
    for module in REFERENCE["modules"]().values():
        assert module.tutorials, f"the doorplate of {module.name} names no tutorial"
        assert set(module.tutorials) <= set(there_are), module.name


@pytest.mark.spec("BOOK-8")
def test_tutorials_are_numbered_from_zero() -> None:
    assert [int(path.stem[:2]) for path in TUTORIALS] == list(range(len(TUTORIALS)))


@pytest.mark.spec("BOOK-7")
def test_every_script_has_its_picture_and_every_picture_its_script() -> None:
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in PICTURES.glob("*.svg"))


@named(SCRIPTS)
@pytest.mark.spec("BOOK-7")
def test_a_picture_is_what_its_script_draws(path: Path) -> None:
    drawn = runpy.run_path(str(path))["draw"]()
    assert path.with_suffix(".svg").read_text() == drawn, f"draw docs/pictures/{path.stem}.svg anew"


@pytest.mark.spec("BOOK-7")
def test_every_picture_is_on_a_page() -> None:
    pages = "".join(path.read_text() for path in [*TUTORIALS, *DOCS.glob("*.md"), ROOT / "README.md"])
    for path in SCRIPTS:
        assert f"][{path.stem}.svg]" in pages or f"](pictures/{path.stem}.svg)" in pages, path.name


@named(TUTORIALS)
@pytest.mark.spec("BOOK-8")
def test_a_tutorial_has_all_its_parts(path: Path) -> None:
    page = path.read_text()
    missing = {part for part, pattern in PARTS.items() if not re.search(pattern, page, flags=re.MULTILINE)}
    assert missing <= ({"code from the source"} if path.stem.startswith("00") else set())  # the tour reads no module


@named(TUTORIALS)
@pytest.mark.spec("BOOK-8")
def test_a_tutorial_leads_to_the_reference_of_what_it_quotes(path: Path) -> None:
    page = path.read_text()
    for module in re.findall(r'^```python title="refinfer/(\S+)\.py"$', page, flags=re.MULTILINE):
        assert f"][{module}]" in page, module


@named(TUTORIALS)
@pytest.mark.spec("BOOK-8")
def test_a_tutorial_takes_no_longer_than_it_says(path: Path) -> None:
    page = path.read_text()
    stated = int(re.findall(r"(\d+) minutes", page)[0])
    assert minutes_to_read(page) <= stated <= 20


@pytest.mark.spec("BOOK-8")
def test_reading_takes_time_for_words_for_blocks_and_for_quotations() -> None:
    page = (
        "word " * 400 + '\n\n```python\n1\n```\n\n```text title="Output"\n1\n```\n\n```python title="a/b.py"\nx\n```\n'
    )
    assert minutes_to_read(page) == 2 + 0.5 + 1
    assert minutes_to_read(page + "\n## Answers\n" + page) == 2 + 0.5 + 1


@named(TUTORIALS)
@pytest.mark.spec("BOOK-13")
def test_a_tutorial_ends_with_its_labs_as_the_catalogue_has_them(path: Path) -> None:
    page, _, section = path.read_text().partition("\n## Lab\n")
    assert "\n## Answers\n" in page
    assert "\n## " not in section
    wanted = [lab for lab in labs() if lab.page == path.stem[:2]]
    shown = list(LAB.finditer(section))
    assert [found["number"] for found in shown] == [lab.number for lab in wanted]
    for lab, found in zip(wanted, shown, strict=True):
        assert_it_is_shown(lab, found, section)


def assert_it_is_shown(lab: Lab, found: re.Match[str], section: str) -> None:
    assert (found["title"], int(found["minutes"])) == (lab.title, lab.minutes)
    assert bool(found["optional"]) == lab.is_optional
    own = section[found.end() :].partition("\n**Lab ")[0]
    assert re.search(rf"\brefinfer lab start --only {lab.number}\b", own)
    assert "Think first" in own


@named(TUTORIALS)
@pytest.mark.spec("BOOK-6")
def test_a_page_of_the_reference_leads_to_each_tutorial(path: Path) -> None:
    pages = REFERENCE["pages"]().values()
    assert any(f"tutorials/{path.name})" in page for page in pages)


@pytest.mark.spec("BOOK-9")
def test_the_contents_name_every_page_once() -> None:
    listed = re.findall(r"[\w./-]+\.md\b", CONTENTS)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.spec("BOOK-9")
def test_the_contents_call_a_tutorial_by_its_title() -> None:
    for path in TUTORIALS:
        title = path.read_text().splitlines()[0].removeprefix("# ")
        assert f'      - "{title}": tutorials/{path.name}\n' in CONTENTS


@pytest.mark.spec("BOOK-9")
def test_the_contents_list_the_reference_in_reading_order() -> None:
    listed = re.findall(r"reference/([\w./-]+)\.md\b", CONTENTS)
    assert listed == ["index", *(module.title for module in REFERENCE["modules"]().values())]


@pytest.mark.spec("BOOK-10")
def test_a_term_of_the_glossary_is_on_the_page_that_introduces_it() -> None:
    entries = re.findall(
        r'^- <a id="[\w-]+"></a>\*\*(.+?)\*\*.*\[[\w ]+\]\((\S+\.md)\)$',
        (DOCS / "glossary.md").read_text(),
        flags=re.MULTILINE,
    )
    assert len(entries) == (DOCS / "glossary.md").read_text().count("\n- ")
    order = [re.sub(r"\W", "", term).lower() for term, _ in entries]
    assert order == sorted(order)
    for terms, page in entries:
        place = ROOT / page if page.startswith("tutorials/") else DOCS / page
        text = re.sub(r"[\s_]+", " ", place.read_text()).lower()
        assert any(term.lower() in text for term in terms.split(", ")), f"{terms} is not on {page}"
