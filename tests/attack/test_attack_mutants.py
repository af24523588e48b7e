"""Mutants: each is one small change, those that a test notices are told from the others, and nothing else changes."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

import mutants
from cage import ESCAPED
from mutations import draw

pytestmark = pytest.mark.attack

TOY: Final = '''"""A toy of 1 function that is tested, and 1 that is not."""

def largest(numbers: "list[1]") -> int:
    if not numbers:
        raise ValueError(f"there are {len(numbers)} numbers, and at least {1} is needed")
    return max(numbers[0:3])


def untested(number: int = 5) -> int:
    return number
'''
TESTS: Final = """
import subprocess, sys
from refinfer.toy import largest

def test_the_largest_of_the_first_three_numbers_is_returned():
    assert largest([1, 3, 2, 4]) == largest([3, 1]) == 3
    try:
        largest([])
    except ValueError:
        return
    raise AssertionError
"""
IN_A_PROGRAM: Final = """
import subprocess, sys

def test_a_program_imports_the_module():
    subprocess.run([sys.executable, "-c", "from refinfer.toy import largest; assert largest([1]) == 1"], check=True)
"""


@pytest.fixture
def toy(tmp_path: Path) -> mutants.Module:
    """A checkout with one module and its tests."""
    root = tmp_path / "checkout"
    for folder in ("refinfer", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").write_text("[tool.pytest]\n")
    (root / "refinfer" / "__init__.py").write_text("")
    (root / "refinfer" / "toy.py").write_text(TOY)
    (root / "tests" / "test_toy.py").write_text(TESTS)
    return mutants.Module(root, root / "refinfer" / "toy.py")


def script(module: mutants.Module, *more: object) -> tuple[list[dict[str, Any]], str]:
    """Run the script on a checkout; return the lines of its results, and what it printed."""
    results = module.root.parent / "results"
    command = [sys.executable, mutants.__file__, "--root", module.root, "--results", results, *more]
    printed = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
    return [json.loads(line) for line in results.read_text().splitlines()], printed


def run_tests(module: mutants.Module, source: str, seconds: int) -> int:
    """Return how the tests of a module with that source ended; from a process without threads, as the script is."""
    call = f"run_tests(Module(Path({str(module.root)!r}), Path({str(module.path)!r})), {source!r}, {seconds}).status"
    code = f"import os; from pathlib import Path; from mutants import Module, run_tests; print({call})"
    folder = str(Path(mutants.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.PIPE, timeout=120)
    return int(done.stdout)


def test_a_mutant_is_one_change_of_what_the_code_does() -> None:
    drawn = draw(TOY, 1000, Random(1))
    changes = {(mutant.line, mutant.before, mutant.after) for mutant in drawn}
    assert len(changes) == len({mutant.source for mutant in drawn}) == len(drawn)
    assert {(4, "not numbers", "numbers"), (6, "max", "min"), (6, "0:3", ":3"), (9, "5", "0")} <= changes
    assert any((line, after) == (5, "pass") for line, _, after in changes)
    assert {line for line, _, after in changes if after != "pass"} == {4, 6, 9, 10}
    original = ast.unparse(ast.parse(TOY)).splitlines()
    for mutant in drawn:
        changed = mutant.source.splitlines()
        assert sum(new != old for new, old in zip(changed, original, strict=True)) == 1


def test_a_larger_sample_begins_with_the_smaller_one() -> None:
    assert draw(TOY, 9, Random("1 toy"))[:4] == draw(TOY, 4, Random("1 toy"))
    assert draw(TOY, 9, Random("1 toy")) != draw(TOY, 9, Random("2 toy"))


def test_survivors_are_told_from_mutants_that_a_test_notices(toy: mutants.Module) -> None:
    before = {path: path.read_bytes() for path in toy.root.rglob("*") if path.is_file()}
    rows, printed = script(toy, "--seed", 2, "--jobs", 2)
    survivors = {(row["before"], row["after"]) for row in rows if not row["killed"]}
    assert survivors >= {("5", "6"), ("5", "0"), ("number", "None"), ("0:3", ":3")}
    assert ("max", "min") not in survivors
    assert {row["by"] for row in rows if row["after"] == "min"} == {
        "tests/test_toy.py::test_the_largest_of_the_first_three_numbers_is_returned"
    }
    assert f"all{len(rows):38}{len(rows) - len(survivors):9}{len(survivors):11}" in printed
    assert "toy:9: 5  ->  6\n" in printed
    assert {path: path.read_bytes() for path in toy.root.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_where_it_was_broken_off(toy: mutants.Module) -> None:
    few, _ = script(toy, "--sample", 3)
    more, _ = script(toy, "--sample", 8)
    assert (len(few), len(more)) == (3, 8)
    assert more[:3] == few
    toy.tests[0].write_text(
        TESTS + "\ndef test_more():\n    from refinfer.toy import untested\n    assert untested() == 5\n"
    )
    again, _ = script(toy, "--sample", 8)
    assert {row["number"] for row in again[8:]} == {row["number"] for row in more if not row["killed"]}
    toy.path.write_text(TOY + "\n# another source\n")
    anew, _ = script(toy, "--sample", 2)
    assert len(anew) == len(again) + 2


def test_the_quickest_test_that_runs_the_line_is_the_first(toy: mutants.Module) -> None:
    toy.tests[0].write_text(
        "import time\n"
        "from refinfer.toy import largest, untested\n"
        "def test_slow():\n    time.sleep(0.5)\n    assert untested() == 5\n"
        "def test_of_another_line():\n    assert largest([1]) == 1 and untested.__defaults__ == (5,)\n"
        "def test_quick():\n    assert untested() == 5\n"
    )
    rows, _ = script(toy)
    assert {row["by"] for row in rows if row["before"] == "number"} == {"tests/test_toy.py::test_quick"}
    assert all("largest" in row["by"] or "another" in row["by"] for row in rows if row["killed"] and row["line"] < 7)


def test_a_test_that_fails_while_it_is_watched_is_used_all_the_same(toy: mutants.Module) -> None:
    toy.tests[0].write_text(TESTS + "\ndef test_unwatched():\n    assert sys.gettrace() is None\n")
    rows, _ = script(toy)
    assert {row["by"] for row in rows if row["after"] == "min"} == {
        "tests/test_toy.py::test_the_largest_of_the_first_three_numbers_is_returned"
    }


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ("def test_nothing():\n    assert not 1\n", "its tests end with 1 without a mutant"),
        ("", "none of the tests that mirror it is in the default run"),
    ],
    ids=["failing", "none"],
)
def test_tests_that_fail_or_are_not_run_say_nothing_about_mutants(toy: mutants.Module, tests: str, why: str) -> None:
    toy.tests[0].write_text(tests)
    root = toy.root.parent
    printed = subprocess.run(
        [sys.executable, mutants.__file__, "--root", toy.root, "--results", root / "results"],
        check=True, stdout=subprocess.PIPE, text=True, timeout=300,
    ).stdout  # fmt: skip
    assert f"toy: {why}" in printed
    assert not (root / "results").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_tests_may_go_on_as_another_user_and_write_to_memory(toy: mutants.Module) -> None:
    toy.tests[0].write_text(
        "import os, tempfile\n"
        "def test_it():\n"
        "    with tempfile.TemporaryDirectory(dir='/dev/shm'), tempfile.TemporaryDirectory() as folder:\n"
        "        os.chmod(folder, 0o777)\n"
        "        if (pid := os.fork()) == 0:\n"
        "            os.setuid(65534)\n"
        "            open(f'{folder}/file', 'w').close()\n"
        "            os._exit(0)\n"
        "        assert os.waitpid(pid, 0)[1] == 0\n"
    )
    assert run_tests(toy, TOY, 60) == 0


def test_a_module_without_tests_is_named_and_the_others_are_tried(toy: mutants.Module) -> None:
    for name in ("bare", "zoo"):
        (toy.root / "refinfer" / f"{name}.py").write_text(TOY)
    (toy.root / "tests" / "test_zoo.py").write_text(TESTS.replace("toy", "zoo"))
    rows, printed = script(toy, "--sample", 2)
    assert "bare: no tests mirror it: write tests/test_bare.py, or name others in SHARED of " in printed
    assert {row["module"] for row in rows} == {"toy", "zoo"}


def test_every_module_of_this_checkout_has_tests_that_mirror_it() -> None:
    paths = (mutants.ROOT / "refinfer").rglob("*.py")
    changed = [mutants.Module(mutants.ROOT, path) for path in paths if draw(path.read_text(), 1, Random(1))]
    assert len(changed) > 80
    assert [module.name for module in changed if not module.tests] == []


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("while True: pass", -signal.SIGALRM),
        ("bytearray(1 << 40)", 1),
        ("open(OUTSIDE, 'w')", ESCAPED),
        ("import os; os.remove(__file__)", ESCAPED),
    ],
)
@pytest.mark.parametrize("tests", [TESTS, IN_A_PROGRAM], ids=["here", "in a program"])
def test_a_mutant_that_hangs_eats_memory_or_writes_outside_is_killed(
    toy: mutants.Module, tests: str, line: str, status: int
) -> None:
    outside = toy.root.parent / "outside"
    toy.tests[0].write_text(tests)
    source = TOY.replace("    if not", "    " + line.replace("OUTSIDE", repr(str(outside))) + "\n    if not")
    ran = run_tests(toy, source, 4 if status == -signal.SIGALRM else 60)
    assert ran == (status if tests == TESTS or status < 0 else 1)
    assert not outside.exists()
    assert toy.path.exists()
    assert run_tests(toy, TOY, 60) == 0
