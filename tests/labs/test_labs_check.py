"""Checking: what students write is put into a clean copy, and every way to go wrong has its own line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lab_workspaces import KV_CACHE, LAYERS, quick_lab, solved, write
from refinfer.errors import LabError
from refinfer.labs import check as checking
from refinfer.labs.catalogue import lab_of
from refinfer.labs.check import Limits, Verdict, check, require_pytest, sentence
from refinfer.labs.workspace import Workspace

PRODUCT = "    np.matmul(q, keys, out=scores)\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return solved(tmp_path)


def quick(workspace: Workspace, tmp_path: Path, **limits: float) -> Verdict:
    lab, tests = quick_lab(tmp_path)
    return check(workspace, lab, tests=tests, limits=Limits(**limits))  # type: ignore[arg-type]


@pytest.mark.spec("LAB-9", "LAB-13")
def test_a_right_solution_passes_with_every_law(workspace: Workspace, tmp_path: Path) -> None:
    verdict = quick(workspace, tmp_path)
    assert (verdict.passed, verdict.held, verdict.problem, verdict.failure, verdict.notes) == (True, 3, None, None, ())


@pytest.mark.spec("LAB-13")
def test_a_wrong_solution_shows_the_first_law_that_it_breaks_its_clause_and_the_smallest_example(
    workspace: Workspace, tmp_path: Path
) -> None:
    write(workspace, LAYERS, "    np.matmul(scores, values, out=out)\n", "    np.matmul(scores, values * 2, out=out)\n")
    verdict = quick(workspace, tmp_path)
    assert (verdict.passed, verdict.held) == (False, 1)
    assert verdict.failure is not None
    assert verdict.failure.sentence == "Attention to one position gives its value."
    assert verdict.failure.lines == ("position 0: you give something else than its value",)
    assert verdict.failure.clauses[0].startswith("MODEL-4: ")


@pytest.mark.spec("LAB-13")
def test_a_property_shows_its_smallest_example_in_one_line(workspace: Workspace, tmp_path: Path) -> None:
    wrong = "    np.matmul(scores, np.where(values > 3, 0, values), out=out)\n"
    write(workspace, LAYERS, "    np.matmul(scores, values, out=out)\n", wrong)
    verdict = quick(workspace, tmp_path)
    assert verdict.failure is not None
    assert verdict.failure.lines == ("the value is not 4", "smallest example: value=4")


@pytest.mark.spec("LAB-11")
def test_an_error_in_the_code_is_shown_with_the_line_of_the_students_file(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, PRODUCT, f"    # one more line\n{PRODUCT}    scores.missing()\n")
    line = workspace.source(LAYERS).splitlines().index("    scores.missing()") + 1
    verdict = quick(workspace, tmp_path)
    assert verdict.failure is not None
    assert verdict.failure.lines[0].startswith("AttributeError: ")
    assert verdict.failure.lines[-1] == f"at {LAYERS}, line {line}"


@pytest.mark.spec("LAB-11")
def test_a_blank_lab_is_named_with_its_task_and_its_line(tmp_path: Path) -> None:
    workspace = Workspace.start(tmp_path / "workspace", [lab_of("1")])
    verdict = check(workspace, lab_of("1"))
    assert verdict.problem is not None
    assert verdict.problem.startswith("not written yet: write the new positions")
    assert KV_CACHE in verdict.problem


@pytest.mark.spec("LAB-11", "LAB-14")
def test_a_loop_that_does_not_end_is_ended_and_named(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, PRODUCT, f"    while True:\n        pass\n{PRODUCT}")
    verdict = quick(workspace, tmp_path, seconds=3)
    assert verdict.problem == (
        "not over after 3 seconds, in: Attention to one position gives its value. Is there a loop that does not end?"
    )


@pytest.mark.spec("LAB-11")
@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        (PRODUCT, "    np.matmul(q, keys, out=scores\n", "'(' was never closed"),
        (PRODUCT, "  np.matmul(q, keys, out=scores)\n", "unindent does not match"),
        (PRODUCT, "    np.matmul(q keys)\n", "invalid syntax"),
    ],
    ids=["bracket", "indentation", "comma"],
)
def test_a_syntax_error_is_named_with_its_line(
    workspace: Workspace, tmp_path: Path, was: str, now: str, why: str
) -> None:
    write(workspace, LAYERS, was, now)
    line = workspace.source(LAYERS).splitlines().index(now.rstrip("\n")) + 1
    problem = quick(workspace, tmp_path).problem
    assert problem is not None
    assert problem.startswith(f"{LAYERS}, line {line}: ")
    assert why in problem


@pytest.mark.spec("LAB-11", "LAB-10")
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; sys.exit()", "SystemExit: the code ends the program"),
        ("bytearray(1 << 36)", "MemoryError: the code takes more memory than it may"),
    ],
    ids=["exit", "memory"],
)
def test_an_exit_and_too_much_memory_are_failures_with_a_name(
    workspace: Workspace, tmp_path: Path, code: str, why: str
) -> None:
    write(workspace, LAYERS, PRODUCT, f"    {code}\n{PRODUCT}")
    verdict = quick(workspace, tmp_path)
    assert not verdict.passed
    assert verdict.failure is not None
    assert verdict.failure.lines[0] == why


@pytest.mark.spec("LAB-10")
def test_a_program_that_ends_with_status_zero_has_not_passed(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, PRODUCT, f"    import os; os._exit(0)\n{PRODUCT}")
    verdict = quick(workspace, tmp_path)
    assert not verdict.passed
    assert verdict.problem == "the program ended in the middle of: Attention to one position gives its value."


@pytest.mark.spec("LAB-10")
def test_a_law_whose_test_is_skipped_or_missing_does_not_hold(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, PRODUCT, f"    import pytest; pytest.skip('later')\n{PRODUCT}")
    assert quick(workspace, tmp_path).held == 0


@pytest.mark.spec("LAB-11", "LAB-9")
def test_a_changed_signature_is_named_and_stays_ours(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, "def attention(\n    q: Float32Array,", "def attention(\n    query: Float32Array,")
    verdict = quick(workspace, tmp_path)
    assert verdict.passed
    (note,) = verdict.notes
    assert note.startswith(f"{LAYERS}, line ")
    assert "`query: Float32Array,` is outside the lab" in note


@pytest.mark.spec("LAB-9")
def test_a_helper_outside_the_region_is_named_and_not_used(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, "import math\n", "import math\nfrom os import path as helper\n")
    write(workspace, LAYERS, PRODUCT, f"    helper.join('a')\n{PRODUCT}")
    verdict = quick(workspace, tmp_path)
    assert any("`from os import path as helper` is outside the lab" in note for note in verdict.notes)
    assert verdict.failure is not None
    assert verdict.failure.lines[0].startswith("NameError: ")


@pytest.mark.spec("LAB-11")
def test_a_missing_file_and_missing_comments_are_named(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, "    # end lab\n", "")
    problem = quick(workspace, tmp_path).problem
    assert problem is not None
    assert LAYERS in problem
    assert "# end lab" in problem
    (workspace.folder / LAYERS).unlink()
    assert quick(workspace, tmp_path).problem == (
        f"{LAYERS} is missing or cannot be read; refinfer lab reset writes it again"
    )


@pytest.mark.spec("LAB-14")
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are looked for in /proc")
def test_a_check_leaves_no_process(workspace: Workspace, tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99.25)'])"
    write(workspace, LAYERS, PRODUCT, f"    {code}\n{PRODUCT}")
    quick(workspace, tmp_path)
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(b"99.25" in line for line in lines)


@pytest.mark.spec("LAB-18")
def test_a_missing_pytest_is_one_line_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "find_spec", lambda name: None if name == "hypothesis" else sys)
    with pytest.raises(LabError, match=r"the labs need hypothesis; install them with: pip install 'refinfer\[labs\]'"):
        require_pytest()


@pytest.mark.spec("LAB-13")
def test_the_name_of_a_test_is_its_sentence() -> None:
    assert sentence("tests/a/test_b.py::test_an_int8_row_is_near[2-3]") == "An int8 row is near."
