"""Every link and picture of README, tutorials and docs leads somewhere: in a view of the repository, and on the site.

Two things work on the site only: the drawings of the explorables, whose scripts are not followed here, and the anchors
that pages of the reference have for the names of a module, which the strict build of the site checks.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md")), *sorted(DOCS.rglob("*.md"))]
IN_THE_REPOSITORY: Final = re.compile(r'<div class="in-the-repository".*?</div>\n', flags=re.DOTALL)
# What the site makes something of, and a view of the repository shows as it is.
SITE_ONLY: Final = re.compile(r"--8<--|<script|\{:? ?[#.]|^\?\?\?|^!!!|^=== \"|^:::", flags=re.MULTILINE)
NO_PROSE: Final = re.compile(r"\A---$.*?^---$|^(?P<indent> *)```.*?^(?P=indent)```$", flags=re.MULTILINE | re.DOTALL)
ITEM: Final = re.compile(r" *(\d+\.|[-*]) ")


@dataclass(frozen=True)
class Page:
    """What is in a page: where its links and pictures lead, what can be linked to, and its text without code."""

    links: tuple[str, ...]
    anchors: frozenset[str]
    text: str


def slug_of_the_repository(heading: str) -> str:
    """Return the anchor of a heading as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def slug_of_the_site(heading: str) -> str:
    """Return the anchor of a heading as Python-Markdown makes it."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def read(markdown: str, *, site: bool) -> Page:
    """Parse a page, and give its headings their anchors in one of the views."""
    links: list[str] = []
    anchors: set[str] = set()
    texts: list[str] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    for before, token in zip([Token("", "", 0), *tokens], tokens, strict=False):
        inside = token.children or [token]
        for part in inside:
            target = part.attrGet("href") or part.attrGet("src")
            links += [str(target)] if target else []
            if part.type.startswith("html"):
                links += re.findall(r'<(?:a href|img src)="([^"]*)"', part.content)
                anchors |= set(re.findall(r'<a id="([^"]*)"', part.content))
        text = "".join(part.content for part in inside if part.type in ("text", "softbreak"))
        texts.append(text)
        if before.type == "heading_open":
            heading = "".join(part.content for part in inside if part.type in ("text", "code_inline"))
            if site and (given := re.search(r" *\{ #(\S+) \}$", heading)):
                anchors.add(given[1])
                continue
            slug = slug_of_the_site(heading) if site else slug_of_the_repository(heading)
            again = (f"{slug}{'_' if site else '-'}{n}" for n in range(1, 99))
            anchors.add(slug if slug not in anchors else next(each for each in again if each not in anchors))
    return Page(tuple(links), frozenset(anchors), "\n".join(texts))


@cache
def in_the_repository(path: Path) -> Page:
    """Return a page as a view of the repository shows it."""
    return read(path.read_text(), site=False)


@cache
def on_the_site(path: Path) -> Page:
    """Return a page as the site shows it: with what it includes, and without what it hides."""

    def included(match: re.Match[str]) -> str:
        name, section = match[1].split(":")
        begin, end = (f"<!-- --8<-- [{mark}:{section}] -->\n" for mark in ("start", "end"))
        return (ROOT / name).read_text().partition(begin)[2].partition(end)[0]

    markdown = IN_THE_REPOSITORY.sub("", path.read_text())
    return read(re.sub(r'^--8<-- "(.*)"\n', included, markdown, flags=re.MULTILINE), site=True)


def broken(path: Path, *, site: bool) -> Iterator[str]:
    """Yield every link and picture of a page that leads nowhere in one of the views."""
    look = on_the_site if site else in_the_repository
    for link in look(path).links:
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = Path(os.path.normpath(path.parent / name)) if name else path
        reachable = target.is_relative_to(DOCS if site else ROOT)
        if not (reachable and (target.is_file() or (target.is_dir() and not site))):
            yield link
        elif not anchor or (target.is_relative_to(DOCS / "reference") and anchor.startswith("refinfer.")):
            continue
        elif target.suffix != ".md" or anchor not in look(target).anchors:
            yield link


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@named(PAGES)
@pytest.mark.spec("BOOK-12")
def test_every_link_and_picture_leads_somewhere_in_a_view_of_the_repository(path: Path) -> None:
    assert list(broken(path, site=False)) == []


@named([path for path in PAGES if path.is_relative_to(DOCS)])
@pytest.mark.spec("BOOK-12")
def test_every_link_and_picture_leads_somewhere_on_the_site(path: Path) -> None:
    assert list(broken(path, site=True)) == []


@named([path for path in PAGES if DOCS / "tutorials" not in path.parents and DOCS / "reference" not in path.parents])
@pytest.mark.spec("BOOK-12")
def test_a_page_shows_nothing_in_the_repository_that_only_the_site_understands(path: Path) -> None:
    text = in_the_repository(path).text
    assert SITE_ONLY.findall(text) == []
    assert "][" not in text, "the label of a link stands for nothing"


@named([path for path in PAGES if DOCS / "reference" not in path.parents])
@pytest.mark.spec("BOOK-12")
def test_an_item_of_a_list_follows_an_empty_line_or_another_item(path: Path) -> None:
    """After anything else the site takes it for a part of the paragraph, and the repository for an item."""
    before = ""
    for line in NO_PROSE.sub("", path.read_text()).splitlines():
        if ITEM.match(line):
            assert not before.strip() or ITEM.match(before), line
        before = line


@named([path for path in PAGES if not path.is_relative_to(DOCS)])
@pytest.mark.spec("BOOK-12")
def test_what_readme_and_tutorials_say_of_a_module_leads_to_its_source_in_the_repository(path: Path) -> None:
    assert not [link for link in in_the_repository(path).links if "docs/reference/" in link]


@named([path for path in PAGES if path.parent == DOCS / "tutorials"])
@pytest.mark.spec("BOOK-12")
def test_a_door_opens_with_a_link_to_the_tutorial_which_the_site_hides(path: Path) -> None:
    way = f"../../tutorials/{path.name}"
    assert in_the_repository(path).links[0] == way
    assert way not in on_the_site(path).links


@pytest.mark.spec("BOOK-12")
def test_a_page_of_the_reference_leads_to_the_source_in_the_repository() -> None:
    for path in PAGES:
        if DOCS / "reference" in path.parents and path != DOCS / "reference" / "index.md":
            source = (ROOT / "refinfer" / path.relative_to(DOCS / "reference")).with_suffix(".py")
            assert in_the_repository(path).links[0] == os.path.relpath(source, path.parent), path.name


@pytest.mark.spec("BOOK-12")
def test_no_part_of_the_book_is_a_symbolic_link() -> None:
    assert not [path for folder in ("docs", "tutorials") for path in (ROOT / folder).rglob("*") if path.is_symlink()]


@pytest.mark.spec("BOOK-12")
def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "DOCS", tmp_path / "docs")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        '# A `b`: c\n\n## Twice\n\n## Twice\n\n- <a id="X-1"></a>**X-1**\n\n'
        "[a](#a-b-c) [b](#X-1) [c](page.md#twice-1) [d](../page.md) [e](#x-1) ![f](no.svg) [g](https://a.b) [h][i]\n\n"
        "```text\n[j](code.md)\n```\n\n[i]: gone.md\n"
    )
    assert list(broken(page, site=False)) == ["../page.md", "#x-1", "no.svg", "gone.md"]
    assert list(broken(page, site=True)) == ["page.md#twice-1", "../page.md", "#x-1", "no.svg", "gone.md"]
