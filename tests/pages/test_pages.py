"""Everything that README, tutorials and docs show is run, or compared with what a bench wrote.

A page reads for people; this is what its fences and comments mean besides:

    ```python                        runs; all of a page share one namespace and one empty folder
    ```python title="..."            a quotation from the source; not run
    ```text title="Output"           what the python fences since the last such one printed
    ```console                       lines after `$ ` run in one bash session; each must print what stands below it
    ```bash                          runs; the two commands of README, which begin with `# 1` and `# 2`, aside
    <!-- varies: REGEX -->           in the next output, what matches may be anything else that matches
    <!-- measured: NAME -->          the next fence is not run: its lines are those of `refinfer bench NAME`, printed
                                     from docs/figures/NAME.json; a line `...` leaves some out
    <!-- = EXPR -->7.1<!-- / -->     what EXPR makes of the committed figures; each file is a name, `row(...)` chooses
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from refinfer.cli.machine import benches, print_bench

ROOT: Final = Path(__file__).parents[2]
FIGURES: Final = ROOT / "docs" / "figures"
NOT_RUN: Final = ("teaching.md", "contributing.md", "mutants.md", "spec.md", "decisions")
PAGES: Final = [
    ROOT / "README.md",
    *sorted((ROOT / "tutorials").glob("*.md")),
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if not any(part in NOT_RUN for part in p.parts)),
]
_FENCE: Final = re.compile(r"(?P<indent> *)```(?P<language>\w+)?(?P<rest>[^`\n]*)$")
_COMMENT: Final = re.compile(r"<!-- (?P<what>varies|measured): (?P<value>.*?) -->")
_FIGURE: Final = re.compile(r"<!-- = (?P<expression>.*?) -->(?P<shown>.*?)<!-- / -->")


@dataclass(frozen=True)
class Fence:
    """A fenced block: the line of its first line of text, counted from 1, and the comments right before it."""

    language: str
    title: str
    line: int
    text: str
    varies: tuple[str, ...] = ()
    measured: str | None = None


def fences(page: str) -> Iterator[Fence]:
    """Yield the fenced blocks of a page; indented ones too, as they stand in a list or in a box to be opened."""
    lines = iter(enumerate(page.splitlines(), start=1))
    said: list[tuple[str, str]] = []
    for number, line in lines:
        if opening := _FENCE.match(line):
            indent = opening["indent"]
            inside = []
            for _, text in lines:
                if text.startswith(f"{indent}```"):
                    break
                inside.append(text.removeprefix(indent) + "\n")
            yield Fence(
                opening["language"] or "",
                title[1] if (title := re.search(r'title="(.*?)"', opening["rest"])) else "",
                number + 1,
                "".join(inside),
                tuple(value for what, value in said if what == "varies"),
                next((value for what, value in said if what == "measured"), None),
            )
        if comment := _COMMENT.search(line):
            said.append((comment["what"], comment["value"]))
        elif line.strip():
            said = []


def same(shown: str, printed: str, varies: tuple[str, ...]) -> bool:
    """Return whether two texts are equal but for what may vary, and for spaces at the ends of lines."""

    def settled(text: str) -> list[str]:
        for pattern in varies:
            text = re.sub(pattern, "…", text)
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return settled(shown) == settled(printed)


def run_page(page: Path, folder: Path) -> None:
    """Run one page in `folder`, from its first fence to its last.

    Raises:
        AssertionError: something does not print what the page shows; names the line.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    for fence in fences(page.read_text()):
        where = f"{page.relative_to(ROOT) if page.is_relative_to(ROOT) else page}:{fence.line}"
        if fence.measured is not None:
            _require_measured(fence, where)
        elif fence.language == "python" and not fence.title:
            with contextlib.redirect_stdout(printed):
                try:
                    exec(compile("\n" * (fence.line - 1) + fence.text, str(page), "exec"), namespace)
                except Exception as error:
                    raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        elif fence.language == "text" and fence.title == "Output":
            _require(fence, where, fence.text, printed.getvalue())
            printed = io.StringIO()
        elif fence.language == "console":
            _run_console(fence, where, folder)
        elif fence.language == "bash" and not re.match(r"# [12]:", fence.text):
            done = _bash(fence.text, folder)
            assert done.returncode == 0, f"{where}: exit status {done.returncode}\n{done.stdout}"


def _require(fence: Fence, where: str, shown: str, printed: str) -> None:
    assert same(shown, printed, fence.varies), f"{where}: the page shows\n{shown}\nand this is printed:\n{printed}"


def _bash(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as a reader would: in `folder`, with this Python's commands first, everything in one stream."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def _run_console(fence: Fence, where: str, folder: Path) -> None:
    """Run the commands of a console block in one session; what each prints is told apart by a mark no page has."""
    mark = "\x1e"
    commands: list[tuple[int, str, str]] = []  # how many lines before it, the command, what it shows
    for number, line in enumerate(fence.text.splitlines()):
        if line.startswith("$ "):
            commands.append((number, line[2:], ""))
        elif commands and commands[-1][1].endswith("\\") and not commands[-1][2]:
            before, command, _ = commands[-1]
            commands[-1] = before, f"{command}\n{line.removeprefix('> ')}", ""
        else:
            assert commands, f"{where}: a console block begins with a command"
            commands[-1] = *commands[-1][:2], f"{commands[-1][2]}{line}\n"
    # The mark keeps `$?` as the command before it left it.
    script = "".join(f'{command}\n_s=$?; printf "{mark}"; (exit $_s)\n' for _, command, _ in commands)
    outputs = _bash(script, folder).stdout.split(mark)
    for (before, _, shown), printed in zip(commands, outputs, strict=False):
        _require(fence, f"{where.rpartition(':')[0]}:{fence.line + before}", shown, printed)


def _require_measured(fence: Fence, where: str) -> None:
    """Require that every line of a fence stands in what the bench printed, in its order."""
    name = str(fence.measured)
    result = json.loads((FIGURES / f"{name}.json").read_text())
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_bench(benches()[name], result, result["machine"])
    printed = iter(line.rstrip() for line in text.getvalue().splitlines())
    for line in fence.text.splitlines():
        if line.startswith("$ ") or line.strip() in ("", "..."):
            continue
        assert line.rstrip() in printed, f"{where}: not what refinfer bench {name} printed: {line}"


def committed() -> dict[str, Any]:
    """Return the committed figures by the names of their files, and what chooses among their rows."""

    def row(of: dict[str, Any], threads: int = 1, **wanted: Any) -> Any:
        of_threads = [r for r in of["rows"] if r.get("threads", 1) == threads]
        found = [r for r in of_threads if all(r[key] == value for key, value in wanted.items())]
        assert len(found) == 1, f"{len(found)} rows have {wanted}"
        return found[0]

    return {path.stem: json.loads(path.read_text()) for path in FIGURES.glob("*.json")} | {"row": row}


@pytest.mark.pages
@pytest.mark.spec("BOOK-1")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    run_page(page, tmp_path)


@pytest.mark.spec("BOOK-2")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_figure_in_a_text_is_what_a_bench_wrote(page: Path) -> None:
    names = committed()
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        for figure in _FIGURE.finditer(line):
            value = eval(figure["expression"], dict(names))
            assert str(value) == figure["shown"], f"{page.name}:{number}: {figure['shown']!r} should read {value!r}"


PAGE = """\
# A page

```python
print("one")
print(6 * 7, "ms")
```

<!-- varies: \\d+ ms -->
```text title="Output"
one
41 ms
```

```python title="refinfer/no/such.py"
not run, and no Python
```

- in a list

  ```console
  $ false; echo $?
  1
  $ echo several \\
  > words
  several words
  ```

<!-- measured: share -->
```console
$ refinfer bench share
...
```
"""


@pytest.mark.spec("BOOK-1")
def test_the_collector_runs_a_page_from_its_first_fence_to_its_last(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    run_page(page, tmp_path)


@pytest.mark.spec("BOOK-2", "BOOK-3")
@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [
        ("one\n41 ms", "two\n41 ms", 10),
        ("one\n41 ms", "one\nfast", 10),
        ('print("one")', "print(never)", 4),
        ('print("one")', "print(", 4),
        ("  1\n", "  0\n", 21),
        ("  several words\n", "  several\n", 23),
        ("...\n", "four processes share nothing\n", 30),
    ],
    ids=["output", "pattern", "exception", "syntax", "first command", "second command", "measured"],
)
def test_a_page_that_shows_something_else_fails_with_its_line(
    right: str, wrong: str, line: int, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    assert PAGE.count(right) == 1
    page.write_text(PAGE.replace(right, wrong))
    with pytest.raises(AssertionError, match=rf"page\.md:{line}: "):
        run_page(page, tmp_path)


@pytest.mark.spec("BOOK-1")
def test_every_language_of_a_fence_is_one_that_is_run_or_one_that_is_only_read() -> None:
    known = {"python", "console", "bash", "text", "json", "toml", "mermaid"}
    for page in PAGES:
        for fence in fences(page.read_text()):
            assert fence.language in known, f"{page.name}:{fence.line}"
