"""Two evenings: the reading lists of README and site, checked against what runs and what is imported."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import refinfer
from code_lines import lines_of_code

PACKAGE = Path(refinfer.__file__).parent
ROOT = Path(__file__).parents[1]
LINES_A_MINUTE = 6


@dataclass(frozen=True)
class Evening:
    """One list of the page: what it promises, the modules to read, those to skip, and the commands that run."""

    promised: tuple[int, int, int]
    read: tuple[str, ...]
    skip: tuple[str, ...]
    commands: tuple[str, ...]


def evenings() -> list[Evening]:
    """Read the page."""
    parts = (ROOT / "docs" / "evenings.md").read_text().split("\n## ")[1:]
    found = []
    for part in parts:
        promised = re.search(r"(\d+) modules, (\d+) lines of code, (\d+) minutes", part)
        assert promised
        modules, lines, minutes = map(int, promised.groups())
        found.append(
            Evening(
                (modules, lines, minutes),
                tuple(re.findall(r"^\d+\. `([\w/]+)`:", part, flags=re.MULTILINE)),
                tuple(re.findall(r"^\| `([\w/]+)` \|", part, flags=re.MULTILINE)),
                tuple(re.findall(r"^refinfer (.+)$", part, flags=re.MULTILINE)),
            )
        )
    return found


FIRST, SECOND = evenings()
both = pytest.mark.parametrize("evening", [FIRST, SECOND], ids=["first", "second"])


def imported_by(module: str) -> set[str]:
    """Return the modules of refinfer that a module imports."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("refinfer."):
            name = node.module.removeprefix("refinfer.").replace(".", "/")
            within = [f"{name}/{alias.name}" for alias in node.names]
            found |= {name} if (PACKAGE / f"{name}.py").exists() else set(within)
    return found


def functions_of(module: str) -> set[str]:
    """Return the qualified names of the functions of a module that have a body; methods of Protocols do not."""
    found: set[str] = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                if any(
                    not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)) for part in child.body
                ):
                    found.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.<locals>.")
            else:
                walk(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    walk(ast.parse((PACKAGE / f"{module}.py").read_text()), "")
    return found


WATCHED = """
import json, sys, threading
from pathlib import Path
import refinfer
package, ran = str(Path(refinfer.__file__).parent) + "/", set()
def note(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package):
        ran.add((code.co_filename.removeprefix(package).removesuffix(".py"), code.co_qualname))
threading.setprofile(note)
sys.setprofile(note)
from refinfer.cli.main import main
for command in json.loads(sys.argv[1]):
    assert main(command) == 0
sys.setprofile(None)
print(json.dumps(sorted(ran)))
"""


@both
@pytest.mark.spec("HOUSE-4")
def test_at_least_half_of_the_functions_of_each_listed_module_run_in_the_evenings_command(
    evening: Evening, tmp_path: Path
) -> None:
    commands = json.dumps([[*command.split(), "--max-tokens", "12"] for command in evening.commands])
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    program = [sys.executable, "-c", WATCHED, commands]
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=True)
    ran = {tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])}
    for module in evening.read:
        functions = functions_of(module)
        unused = sorted(name for name in functions if (module, name) not in ran)
        assert 2 * len(unused) <= len(functions), f"most of {module} never runs: {unused}"


@pytest.mark.spec("HOUSE-4")
def test_whatever_a_listed_module_imports_is_listed_or_in_the_annex() -> None:
    known: set[str] = set()
    for evening in (FIRST, SECOND):
        known |= {*evening.read, *evening.skip}
        for module in evening.read:
            assert imported_by(module) <= known, f"{module} imports what no list names"


@both
@pytest.mark.spec("HOUSE-4")
def test_an_evening_is_short_enough_and_takes_as_long_as_it_says(evening: Evening) -> None:
    lines = sum(lines_of_code(PACKAGE / f"{module}.py") for module in evening.read)
    assert evening.promised == (len(evening.read), lines, round(lines / LINES_A_MINUTE))
    assert len(evening.read) <= 16
    assert lines <= 950
    assert 0 < len(evening.skip) <= 12


@pytest.mark.spec("HOUSE-4")
def test_the_readme_gives_the_same_lists_and_times() -> None:
    readme = (ROOT / "README.md").read_text().split("## Two evenings")[1].split("\n## ")[0]
    for number, evening in enumerate((FIRST, SECOND), start=1):
        item = next(line for line in readme.splitlines() if line.startswith(f"{number}. "))
        assert tuple(re.findall(r"\(refinfer/([\w/]+)\.py\)", item)) == evening.read
        modules, lines, minutes = evening.promised
        assert f"{modules} modules, {lines} lines of code, {minutes} minutes" in item
