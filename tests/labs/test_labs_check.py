"""Checking: what students write is put into a clean copy, and every way to go wrong has its own line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from lab_workspaces import KV_CACHE, LAYERS, quick_lab, solved, write
from refinfer import __version__
from refinfer.errors import LabError
from refinfer.labs import catalogue
from refinfer.labs import check as checking
from refinfer.labs.catalogue import lab_of
from refinfer.labs.check import REPORT, TIME_LIMIT, Limits, Verdict, check, require_pytest, sentence
from refinfer.labs.regions import blank
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
    line = workspace.source(LAYERS).splitlines().index("    while True:") + 1
    verdict = quick(workspace, tmp_path, seconds=3)
    told = "not over after 3 seconds, in: Attention to one position gives its value. Is there a loop that does not end?"
    assert verdict.problem in {f"{told} ({LAYERS}, line {n})" for n in (line, line + 1)}


@pytest.mark.spec("LAB-11")
@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        (PRODUCT, "    np.matmul(q, keys, out=scores\n", "'(' was never closed"),
        (PRODUCT, "  np.matmul(q, keys, out=scores)\n", "unindent does not match"),
        (PRODUCT, "    np.matmul(q keys)\n", "invalid syntax"),
        (PRODUCT, "    q is 1\n", '"is" with a literal'),
    ],
    ids=["bracket", "indentation", "comma", "warning"],
)
@pytest.mark.filterwarnings("default")
def test_a_syntax_error_is_named_with_its_line(
    workspace: Workspace, tmp_path: Path, was: str, now: str, why: str
) -> None:
    write(workspace, LAYERS, was, now)
    line = workspace.source(LAYERS).splitlines().index(now.rstrip("\n")) + 1
    problem = quick(workspace, tmp_path).problem
    assert problem is not None
    assert problem.startswith(f"{LAYERS}, line {line}: ")
    assert why in problem


@pytest.mark.spec("LAB-11")
def test_a_syntax_error_that_shows_only_below_the_region_is_named_with_its_lab(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Python names the line that should have been indented, and that one is not the student's."""
    write(workspace, KV_CACHE, "        # end lab\n", "        if keys is values:\n        # end lab\n")
    problem = quick(workspace, tmp_path).problem
    assert problem is not None
    assert problem.startswith(f"{KV_CACHE}, in lab 01: expected an indented block")


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
    verdict = quick(workspace, tmp_path)
    assert verdict.held == 0
    assert verdict.failure is not None
    assert verdict.failure.lines[0] == "Skipped: later"


@pytest.mark.spec("LAB-10", "LAB-11")
@pytest.mark.parametrize("code", ["raise KeyboardInterrupt", "import pytest; pytest.exit('later')"])
def test_an_interruption_of_the_tests_is_named(workspace: Workspace, tmp_path: Path, code: str) -> None:
    write(workspace, LAYERS, PRODUCT, f"    {code}\n{PRODUCT}")
    problem = quick(workspace, tmp_path).problem
    assert problem == "the program ended in the middle of: Attention to one position gives its value."


@pytest.mark.spec("LAB-10", "LAB-14")
def test_a_thread_that_never_ends_does_not_keep_a_check(workspace: Workspace, tmp_path: Path) -> None:
    code = "import threading; threading.Thread(target=threading.Event().wait).start()"
    write(workspace, LAYERS, PRODUCT, f"    {code}\n{PRODUCT}")
    assert quick(workspace, tmp_path, seconds=30).passed


@pytest.mark.spec("LAB-10", "LAB-11")
@pytest.mark.parametrize("code", ["import shutil; shutil.rmtree('.')", f"import os; os.remove(os.environ['{REPORT}'])"])
def test_code_that_removes_files_has_not_passed_and_a_line_says_so(
    workspace: Workspace, tmp_path: Path, code: str
) -> None:
    write(workspace, LAYERS, PRODUCT, f"    {code}\n{PRODUCT}")
    verdict = quick(workspace, tmp_path)
    assert not verdict.passed
    assert verdict.problem or verdict.failure


@pytest.mark.spec("LAB-14")
def test_a_check_takes_no_notice_of_settings_for_other_programs_and_finds_what_python_finds(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_module.py").touch()
    for name, text in (("PYTHONOPTIMIZE", "1"), ("PYTEST_ADDOPTS", "--no"), ("PYTEST_PLUGINS", "no")):
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    write(workspace, LAYERS, PRODUCT, f"    import my_module\n{PRODUCT}")
    assert quick(workspace, tmp_path).passed


@pytest.mark.spec("LAB-14")
def test_a_check_leaves_no_file(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    write(workspace, LAYERS, PRODUCT, f"    import tempfile; tempfile.mkdtemp()\n{PRODUCT}")
    assert quick(workspace, tmp_path).passed
    assert list(place.iterdir()) == []


@pytest.mark.spec("LAB-14")
def test_tests_that_nobody_ends_any_more_end_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text("def test_long():\n    import time\n    time.sleep(600)\n")
    command = [sys.executable, "-m", "pytest", "-p", "refinfer.labs.reporter", "--rootdir", str(tmp_path), "."]
    environment = os.environ | {TIME_LIMIT: "0.1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=60)
    assert done.returncode == 1
    assert b" in " not in done.stdout  # no `1 failed in 0.10s`


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


@pytest.mark.spec("LAB-9")
def test_changes_that_came_with_another_version_are_one_note(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, "import math\n", "import math\nimport os\n")
    state = json.loads((workspace.folder / "lab.json").read_text())
    (workspace.folder / "lab.json").write_text(json.dumps(state | {"version": "0.0.1"}))
    (note,) = quick(Workspace.find(workspace.folder), tmp_path).notes
    assert note == f"the workspace is from refinfer 0.0.1; what is outside the lab is that of {__version__}"


@pytest.mark.spec("LAB-9")
@pytest.mark.parametrize("reference_before", [False, True])
def test_an_earlier_lab_that_was_passed_is_the_students_own_unless_ours_is_asked_for(
    reference_before: bool, tmp_path: Path
) -> None:
    """Somebody has passed lab 01, and spoils it while lab 02 is open; the tests come to lab 01."""
    workspace = Workspace.start(tmp_path / "workspace", [lab_of("1"), lab_of("2")])
    for number in ("1", "2"):
        workspace.solve(lab_of(number))
        if number == "1":
            workspace.finish(lab_of(number))
    write(workspace, LAYERS, PRODUCT, f"{PRODUCT}    scores.missing()\n")
    quick, tests = quick_lab(tmp_path)
    lab = replace(lab_of("2"), tests=quick.tests)
    verdict = check(workspace, lab, reference_before=reference_before, tests=tests)
    assert verdict.problem is None
    assert verdict.passed is reference_before


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
@pytest.mark.parametrize(
    "there", [(), ("tests/conftest.py",), ("docs/spec.md",), ("tests/conftest.py", "docs/spec.md")]
)
@pytest.mark.parametrize("place", ["refinfer/labs/course", "."])
def test_the_tests_of_the_labs_are_in_the_package_or_next_to_it_or_else_one_line_says_that_they_are_missing(
    place: str, there: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in there:
        (tmp_path / place / name).parent.mkdir(parents=True)
        (tmp_path / place / name).touch()
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path / "refinfer")
    if len(there) == 2:
        assert catalogue.course() == tmp_path / place
    else:
        with pytest.raises(LabError, match="the tests of the labs are missing; install refinfer from"):
            catalogue.course()


@pytest.mark.spec("LAB-18")
def test_a_missing_pytest_is_one_line_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "find_spec", lambda name: None if name == "hypothesis" else sys)
    with pytest.raises(LabError, match=r"the labs need hypothesis; install them with: pip install 'refinfer\[labs\]'"):
        require_pytest()


@pytest.mark.spec("LAB-13")
def test_the_name_of_a_test_is_its_sentence() -> None:
    assert sentence("tests/a/test_b.py::test_an_int8_row_is_near[2-3]") == "An int8 row is near."


@pytest.mark.spec("LAB-13")
def test_what_the_tests_print_while_they_run_is_kept_from_the_terminal(
    workspace: Workspace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(workspace, LAYERS, PRODUCT, f"    import os; os.write(1, b'one'); os.write(2, b'two')\n{PRODUCT}")
    assert quick(workspace, tmp_path).passed
    assert capfd.readouterr() == ("", "")


@pytest.mark.spec("LAB-13")
def test_what_the_code_prints_is_shown_where_it_fails(workspace: Workspace, tmp_path: Path) -> None:
    write(workspace, LAYERS, PRODUCT, f"    print('shape', scores.shape)\n{PRODUCT}    scores += 1\n    1 / 0\n")
    verdict = quick(workspace, tmp_path)
    assert verdict.failure is not None
    assert verdict.failure.printed == ("shape (1, 1, 1, 1)",)
    others = [other.sentence for other in verdict.failures[1:]]
    assert others == ["Attention gives every value.", "Nothing else is done."]


@pytest.mark.spec("LAB-11")
def test_a_raise_that_was_left_above_the_code_is_named(workspace: Workspace, tmp_path: Path) -> None:
    place = lab_of("1").places[1]
    write(workspace, LAYERS, PRODUCT, f"{blank(place.region)}{PRODUCT}")
    problem = quick(workspace, tmp_path).problem
    assert problem is not None
    assert problem.startswith("the line that raises NotImplementedError is still there; remove it (")


@pytest.mark.spec("LAB-10")
def test_a_lab_that_is_still_our_code_is_not_begun_and_has_not_passed(tmp_path: Path) -> None:
    workspace = Workspace.start(tmp_path / "workspace", [lab_of("1")])
    verdict = check(workspace, lab_of("5"))
    assert not verdict.passed
    assert verdict.problem == "not begun, this is our code; refinfer lab reset 05 makes it blank"


@pytest.mark.spec("LAB-13")
def test_an_error_below_the_students_code_is_shown_with_the_line_that_led_to_it(
    workspace: Workspace, tmp_path: Path
) -> None:
    write(workspace, LAYERS, PRODUCT, f"    rms_norm(q, None, 0.0, scores)\n{PRODUCT}")
    line = workspace.source(LAYERS).splitlines().index("    rms_norm(q, None, 0.0, scores)") + 1
    verdict = quick(workspace, tmp_path)
    assert verdict.failure is not None
    assert verdict.failure.lines[-1] == f"at {LAYERS}, line {line}"


@pytest.mark.spec("LAB-9")
def test_other_words_in_a_comment_that_marks_a_region_and_its_margin_are_no_change(
    workspace: Workspace, tmp_path: Path
) -> None:
    write(workspace, LAYERS, "    # lab 01: mix", "  # lab 01: I mix")
    write(workspace, LAYERS, "    # end lab", "  # end lab")
    assert quick(workspace, tmp_path).notes == ()
