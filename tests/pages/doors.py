"""Refreshes what the tutorials quote, and writes their links and `docs/tutorials/`, their doors on the site.

    python tests/pages/doors.py

A tutorial is read in two views: as a file of the repository, and on the site. Its text, between the marks START and
END, is the same in both, and a link in it is `[text][label]`, or `[label]` alone. A label is

    05                        a tutorial
    weight_cache/format       a module: its source in the repository, its page of the reference on the site
    file-format, figures#a-b  a page of `docs/`, or a section of it
    decision 8                a decision
    FILE-3                    a clause of the specification
    trust_chain.svg           a picture, after `![what it shows]`

What the labels stand for is written below END for the repository, and into the tutorial's door for the site. Source is
quoted in a fence whose title is the file and which has the name of the region before it, in a comment:

    <!-- quoted: header -->
    ```python title="refinfer/weight_cache/format.py"
    ```

The script fills it with what stands between `# --8<-- [start:header]` and `# --8<-- [end:header]` in the file. If that
is an exercise, between `# lab 05: ...` and `# end lab`, the fence is put into a box that readers open themselves. So
are the fences in GIVE_AWAY, which show the solution of a lab in another place. A view of the repository does not show
titles of fences, so there the file's name stands above, or on the box.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
TUTORIALS: Final = sorted((ROOT / "tutorials").glob("[0-9][0-9]-*.md"))

START: Final = "<!-- --8<-- [start:page] -->"
END: Final = "<!-- --8<-- [end:page] -->"
CLAUSE: Final = re.compile(r'^- <a id="([A-Z]+-\d+)"></a>', flags=re.MULTILINE)
QUOTE: Final = re.compile(
    r'(?P<box><details markdown="1"><summary>Lab [^\n]*</summary>\n\n)?'
    r'(?:^<div class="in-the-repository"[^\n]*><code>[\w/]+\.py</code></div>\n\n)?'
    r'^<!-- quoted: (?P<name>[\w-]+) -->\n```python title="(?P<path>[\w/]+\.py)"\n(?s:.*?)^```\n'
    r"(?(box)\n</details>\n)",
    flags=re.MULTILINE,
)
GIVE_AWAY: Final = {
    ("refinfer/weight_cache/file.py", "commit"): "05",
    ("tutorials/shelf.py", "shelf"): "05",
    ("refinfer/planning/simulate.py", "ring"): "12b",
}
_PAGE: Final = re.compile(rf"\A(?P<title># [^\n]+)\n\n{re.escape(START)}\n(?P<body>.*){re.escape(END)}\n", re.DOTALL)
_CODE: Final = re.compile(r"^(?P<indent> *)```.*?^(?P=indent)```$|<!--.*?-->", flags=re.MULTILINE | re.DOTALL)
_SPAN: Final = re.compile(r"(?P<ticks>`+)[^`]+(?P=ticks)")
_LINK: Final = re.compile(r"\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\](?:\[(?P<label>[^\[\]]+)\]|(?P<inline>\())?")
_LIKE_A_LABEL: Final = re.compile(r"\d\d|[A-Z]+-\d+|decision \d+")


class Target(NamedTuple):
    """Where a label leads: a path of the repository, and one of the site's pages, within `docs/`."""

    repository: str
    site: str


def targets() -> dict[str, Target]:
    """What every label stands for, in the order in which definitions are written.

    Raises:
        LookupError: one label stands for two things.
    """
    found = [(path.name[:2], Target(f"tutorials/{path.name}", f"tutorials/{path.name}")) for path in TUTORIALS]
    for path in sorted((DOCS / "reference").rglob("*.md")):
        module = path.relative_to(DOCS / "reference").with_suffix("").as_posix()
        if module != "index":
            found.append((module, Target(f"refinfer/{module}.py", f"reference/{module}.md")))
    for path in sorted([*DOCS.glob("*.md"), *(DOCS / "explore").glob("*.md"), *(DOCS / "decisions").glob("*.md")]):
        page = path.relative_to(DOCS).as_posix()
        label = f"decision {int(path.name[:4])}" if path.parent.name == "decisions" else page.removesuffix(".md")
        found.append((label, Target(f"docs/{page}", page)))
    clauses = CLAUSE.findall((DOCS / "spec.md").read_text())
    found += [(clause, Target(f"docs/spec.md#{clause}", f"spec.md#{clause}")) for clause in clauses]
    pictures = sorted(path.name for path in (DOCS / "pictures").glob("*.svg"))
    found += [(name, Target(f"docs/pictures/{name}", f"pictures/{name}")) for name in pictures]
    times = Counter(label.lower() for label, _ in found)  # Markdown does not tell capitals from small letters here
    if twice := [label for label, n in times.items() if n > 1]:
        raise LookupError(f"these labels stand for two things: {twice}")
    return dict(found)


def labels_of(body: str, known: dict[str, Target]) -> dict[str, Target]:
    """The labels that a text uses, and what they stand for, in the order of `known`, sections after their pages.

    Raises:
        LookupError: a label stands for nothing, or a link is written out although the views would need two.
    """
    used: dict[str, Target] = {}
    prose = _SPAN.sub(lambda code: re.sub(r"[][]", "", code[0]), _CODE.sub("", body))
    for link in _LINK.finditer(prose):
        text, label, inline = link["text"], link["label"], link["inline"]
        if inline:
            if not re.match(r"https?://|#", link.string[link.end() :]):
                raise LookupError(f"[{text}](...) leads to a file: write [{text}][label] instead")
            continue
        page, mark, section = (label or text).partition("#")
        if page in known:
            used[label or text] = Target(*(path + mark + section for path in known[page]))
        elif label or _LIKE_A_LABEL.fullmatch(text):
            raise LookupError(f"{link[0]} leads nowhere: there is no {page!r}")
    order = list(known)
    return dict(sorted(used.items(), key=lambda item: (order.index(item[0].partition("#")[0]), item[0])))


def region(path: str, name: str) -> tuple[str, str]:
    """What stands between the marks of a region, without margin, and the number of the lab it is, or an empty string.

    Raises:
        LookupError: the file has no such region.
    """
    source = (ROOT / path).read_text()
    marks = rf"^ *# --8<-- \[start:{name}\]\n(.*?)^ *# --8<-- \[end:{name}\]$"
    if (found := re.search(marks, source, flags=re.MULTILINE | re.DOTALL)) is None:
        raise LookupError(f"{path} has no region {name}")
    lab = re.search(r"^ *# lab (\w+): ", found[1], flags=re.MULTILINE)
    text = re.sub(r"^ *# (?:--8<--|lab |end lab).*\n", "", found[1], flags=re.MULTILINE)
    return textwrap.dedent(text).strip("\n") + "\n", lab[1] if lab else ""


def quote(path: str, name: str) -> str:
    """The fence that quotes a region; in a closed box if the region is an exercise, or gives one away.

    Without a box the file's name is above it for the repository, which shows no titles of fences.
    """
    text, lab = region(path, name)
    fence = f'<!-- quoted: {name} -->\n```python title="{path}"\n{text}```\n'
    if lab:
        box = f"Lab {lab} asks you to write this part of <code>{path}</code> yourself. Here is ours"
    elif lab := GIVE_AWAY.get((path, name), ""):
        box = f"Lab {lab} asks you to write much the same in another place. Here is <code>{path}</code>"
    else:
        return f'<div class="in-the-repository" data-search-exclude><code>{path}</code></div>\n\n{fence}'
    return f'<details markdown="1"><summary>{box}</summary>\n\n{fence}\n</details>\n'


def definitions(labels: dict[str, Target], *, site: bool) -> str:
    """What the labels stand for, as Markdown, for a file in `tutorials/` or for one in `docs/tutorials/`."""
    paths = ((label, t.site if site else t.repository) for label, t in labels.items())
    return "".join(f"[{label}]: {os.path.relpath(path, 'tutorials')}\n" for label, path in paths)


def door(tutorial: Path, title: str, labels: dict[str, Target]) -> str:
    """The site's page of a tutorial; in the repository it shows a way to the tutorial, which the site hides."""
    path = tutorial.relative_to(ROOT).as_posix()
    link = f"The page itself: [{title.removeprefix('# ')}](../../{path})"
    return f'{in_the_repository(link)}\n{title}\n\n--8<-- "{path}:page"\n\n{definitions(labels, site=True)}'


def in_the_repository(text: str) -> str:
    """Markdown that the repository shows and the site hides, by `docs/site.css`."""
    return f'<div class="in-the-repository" data-search-exclude>\n\n{text}\n\n</div>\n'


def pages() -> dict[str, str]:
    """Every tutorial and every door as it has to be, by its path in the repository.

    Raises:
        LookupError: a tutorial lacks its marks, links to nothing or quotes what is not there.
    """
    known = targets()
    wanted = {}
    for tutorial in TUTORIALS:
        path = tutorial.relative_to(ROOT).as_posix()
        try:
            if (page := _PAGE.match(tutorial.read_text())) is None:
                raise LookupError(f"it has to be a title, {START}, the text, {END}")
            body = QUOTE.sub(lambda found: quote(found["path"], found["name"]), page["body"])
            labels = labels_of(body, known)
        except LookupError as error:
            raise LookupError(f"{path}: {error}") from None
        repository = definitions(labels, site=False)
        wanted[path] = f"{page['title']}\n\n{START}\n{body}{END}\n\n{repository}"
        wanted[f"docs/{path}"] = door(tutorial, page["title"], labels)
    return wanted


def write_pages() -> None:
    """Write every tutorial and every door, and remove the doors of tutorials that are no more."""
    wanted = pages()
    for path in (DOCS / "tutorials").glob("*.md"):
        if path.relative_to(ROOT).as_posix() not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    write_pages()
    sys.exit()
