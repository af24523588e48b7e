"""`refinfer lab`: what a student and a teacher see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import WATCHDOG_S, program, refused, run
from refinfer.errors import LabError
from refinfer.labs.catalogue import PACKAGE, Lab, lab_of, labs
from refinfer.labs.check import Failure, Verdict
from refinfer.labs.workspace import Workspace

LAYERS = "refinfer/model/layers.py"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def solve(here: Path, number: str) -> None:
    Workspace.find(here / "refinfer-labs").solve(lab_of(number))


@pytest.mark.spec("LAB-5", "LAB-15")
def test_a_start_says_where_the_workspace_is_and_what_to_do(here: Path) -> None:
    status, out, err = run("lab", "start")
    assert (status, err) == (0, "")
    assert "refinfer-labs" in out
    assert f"{LAYERS}, line " in out
    assert "then: refinfer lab check" in out
    assert (here / "refinfer-labs" / "README.md").read_text().startswith("# A course cut out of refinfer")
    assert run("lab")[1].startswith("0 of 12 labs passed")
    assert "is not an empty folder" in refused("lab", "start", here)
    assert "has a workspace already" in refused("lab", "start")


@pytest.mark.spec("LAB-5")
@pytest.mark.parametrize(("option", "course"), [("--only", ["03"]), ("--at", [f"{n:02}" for n in range(3, 13)])])
def test_a_start_takes_one_lab_alone_or_begins_at_one(here: Path, option: str, course: list[str]) -> None:
    assert run("lab", "start", option, 3)[0] == 0
    workspace = Workspace.find(here / "refinfer-labs")
    assert workspace.state.course == course
    assert [lab.number for lab in labs() if workspace.is_blank(lab)] == ["03", "04"]  # in the same module


@pytest.mark.spec("LAB-7", "CLI-4")
@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["check"], "has no workspace; refinfer lab start makes one"),
        (["hint"], "has no workspace"),
        (["run"], "has no workspace"),
        (["list", "--dir", "nowhere"], "nowhere has no workspace"),
        (["start", "--only", "77"], "there is no lab '77'; the labs are 01, "),
        (["check", "one"], "has no workspace"),
        (["grade"], "the following arguments are required: DIR"),
        (["grade", ".", "--tests", "nowhere"], "nowhere is not a folder of tests"),
        (["check", "--dir", "a" * 300], "has no workspace"),
        (["check", "--seconds", "0"], "must be more than 0 and at most 86400, not 0"),
        (["check", "--seconds=-1"], "must be more than 0"),
        (["check", "--seconds", "1e9"], "must be more than 0 and at most 86400, not 1e9"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("here")
def test_misuse_is_one_line_and_status_two(argv: list[str], why: str) -> None:
    assert why in refused("lab", *argv)


@pytest.mark.spec("LAB-15")
@pytest.mark.usefixtures("here")
def test_the_list_has_every_lab_with_its_state() -> None:
    run("lab", "start")
    rows = json.loads(run("lab", "list", "--json")[1])
    assert [row["number"] for row in rows] == [lab.number for lab in labs()]
    assert set(rows[0]) == {"number", "title", "minutes", "state", "page"}
    assert [row["state"] for row in rows[:2]] == ["open", "not begun"]
    assert "Attention with a KV cache" in run("lab", "list")[1]


@pytest.mark.spec("LAB-7")
def test_the_list_of_a_damaged_workspace_is_refused(here: Path) -> None:
    run("lab", "start")
    (here / "refinfer-labs" / "lab.json").write_text("{")
    assert "lab.json is damaged" in refused("lab", "list")


@pytest.mark.spec("LAB-15")
@pytest.mark.usefixtures("here")
def test_each_hint_is_one_more_and_says_which_it_is_until_there_are_no_others() -> None:
    run("lab", "start")
    lab = lab_of("1")
    for count, ending in ((1, ""), (2, ""), (3, ""), (3, ": there are no more")):
        shown = " ".join(run("lab", "hint")[1].split())
        assert shown == f"lab 01, {lab.title}, hint {count} of 3{ending} {lab.hints[count - 1]}"


@pytest.mark.spec("LAB-15")
@pytest.mark.usefixtures("here")
def test_places_that_give_a_lab_away_are_named() -> None:
    for number in ("3", "7"):
        shown = " ".join(run("lab", "start", "--only", number, number)[1].split())
        lab = lab_of(number)
        assert (f"these places give it away: {', '.join(lab.spoilers)}" in shown) == bool(lab.spoilers)


@pytest.mark.spec("LAB-15")
def test_when_all_labs_are_done_the_others_are_named(here: Path) -> None:
    run("lab", "start", "--only", "1")
    Workspace.find(here / "refinfer-labs").finish(lab_of("1"))
    shown = " ".join(run("lab")[1].split())
    assert "is done; refinfer lab run writes a text with your code" in shown
    assert "refinfer lab reset 02 opens one of 02, 03" in shown


@pytest.mark.spec("LAB-5", "LAB-17", "CLI-4")
@pytest.mark.parametrize("argv", [["start"], ["grade", "ann"]], ids=" ".join)
@pytest.mark.usefixtures("here")
def test_actions_that_take_folders_have_no_option_for_one(argv: list[str]) -> None:
    assert "unrecognized arguments: --dir" in refused("lab", *argv, "--dir", "bob")


@pytest.mark.spec("LAB-13", "LAB-6")
def test_a_check_has_status_one_until_the_lab_is_passed_and_then_names_the_next(here: Path) -> None:
    run("lab", "start")
    status, out, err = run("lab", "check")
    assert (status, err) == (1, "")
    assert "lab 01, Attention with a KV cache: not written yet" in out
    assert "read: tutorial 07; for help: refinfer lab hint 01" in out
    solve(here, "1")
    status, out, err = run("lab", "check")
    assert (status, err) == (0, "")
    assert (
        f"lab 01, Attention with a KV cache: passed, {len(lab_of('1').tests)} of {len(lab_of('1').tests)} laws" in out
    )
    assert "next: lab 02" in out
    assert "not written yet" not in out


@pytest.mark.spec("LAB-13")
def test_a_check_prints_one_object_as_json(here: Path) -> None:
    run("lab", "start")
    status, out, _ = run("lab", "check", "--json")
    found = json.loads(out)
    assert status == 1
    assert (found["lab"], found["passed"], found["held"]) == ("01", False, 0)
    assert found["problem"].startswith("not written yet")
    assert "--watch and --json do not go together" in refused("lab", "check", "--watch", "--json")


@pytest.mark.spec("LAB-19")
def test_a_watch_checks_whenever_a_file_is_saved_and_ends_when_the_lab_is_passed(here: Path) -> None:
    run("lab", "start")
    watching = subprocess.Popen(program("lab", "check", "--watch"), cwd=here, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    seen = []
    for line in watching.stdout:
        seen.append(line)
        if line.startswith("waiting for you to save"):
            solve(here, "1")
            break
    out, _ = watching.communicate(timeout=WATCHDOG_S)
    assert watching.returncode == 0
    assert "not written yet" in "".join(seen)
    assert "passed" in out


@pytest.mark.spec("LAB-19")
def test_a_watch_of_a_lab_that_is_passed_ends_at_once(here: Path) -> None:
    run("lab", "start")
    solve(here, "1")
    status, out, _ = run("lab", "check", "--watch")
    assert status == 0
    assert "waiting for you" not in out


@pytest.mark.spec("LAB-13")
def test_a_check_is_shown_even_if_it_cannot_be_noted_and_keeps_the_hints_that_were_read_meanwhile(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passed(workspace: Workspace, lab: Lab, **_: object) -> Verdict:
        Workspace.find(workspace.folder).hint(lab)
        return Verdict(lab, len(lab.tests))

    run("lab", "start")
    monkeypatch.setattr("refinfer.cli.lab.check", passed)
    assert run("lab", "check")[0] == 0
    assert Workspace.find(here / "refinfer-labs").state.hints == {"01": 1}

    def fail(*_: object) -> None:
        raise LabError("lab.json cannot be written")

    monkeypatch.setattr(Workspace, "finish", fail)
    status, out, err = run("lab", "check")
    assert (status, err) == (2, "refinfer: lab.json cannot be written\n")
    assert "passed" in out


@pytest.mark.spec("LAB-13", "LAB-17")
def test_a_law_that_does_not_hold_is_shown_with_its_first_clause_and_in_the_table_of_grades(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(lines: tuple[str, ...], *argv: str) -> str:
        failure = Failure("what goes in comes out", ("A-1: It comes out.", "B-2: Nothing is lost."), lines)
        monkeypatch.setattr("refinfer.cli.lab.check", lambda _, lab, **__: Verdict(lab, 0, failures=(failure,)))
        return " ".join(run("lab", *argv)[1].split())

    run("lab", "start", "--only", "1", "ann")
    Workspace.find(here / "ann").solve(lab_of("1"))
    shown = check(("ValueError: 3",), "check", "--dir", "ann")
    assert "the first that does not: what goes in comes out" in shown
    assert "in the specification: A-1; B-2 read: " in shown
    shown = check(("3 is not 4",), "check", "--dir", "ann")
    assert "in the specification: A-1: It comes out.; B-2 read: " in shown
    assert "what goes in comes out" in check(("3 is not 4",), "grade", "ann")
    run("lab", "solution", "1", "--give-up", "--apply", "--dir", "ann")
    assert " given up " in check(("3 is not 4",), "grade", "ann")


@pytest.mark.spec("LAB-16")
def test_a_solution_is_shown_after_passing_or_when_the_lab_is_given_up(here: Path) -> None:
    run("lab", "start")
    assert "lab 01 is not passed yet" in refused("lab", "solution")
    status, out, _ = run("lab", "solution", "--give-up", "--apply")
    assert status == 0
    assert "+np.matmul(q, keys, out=scores)" in out
    assert lab_of("1").shows[:40] in out
    assert f"next: lab 02, {lab_of('2').title}" in out
    workspace = Workspace.find(here / "refinfer-labs")
    assert workspace.state_of(lab_of("1")) == "given up"
    assert workspace.source(LAYERS) == (PACKAGE.parent / LAYERS).read_text()
    assert run("lab", "check", "1")[0] == 0
    assert Workspace.find(here / "refinfer-labs").state_of(lab_of("1")) == "given up"


@pytest.mark.spec("LAB-8")
def test_a_run_writes_a_text_at_any_time_and_names_the_students_parts(here: Path) -> None:
    run("lab", "start")
    ours = subprocess.run(program("lab", "run", "JULIET:"), cwd=here, capture_output=True, text=True, check=False)
    assert ours.returncode == 0, ours.stderr
    assert ours.stderr == "all of it is our code so far\n"
    (packed,) = (here / "refinfer-labs" / "weight-cache").glob("*.packed")
    inode = packed.stat().st_ino
    solve(here, "1")
    run("lab", "check")
    theirs = subprocess.run(program("lab", "run", "JULIET:"), cwd=here, capture_output=True, text=True, check=False)
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stdout == ours.stdout
    assert theirs.stdout.startswith("JULIET:")
    assert theirs.stderr == "written with your code of 01 Attention with a KV cache; all else is ours\n"
    assert {path.name for path in (here / "refinfer-labs").iterdir()} == {
        *("README.md", "lab.json", "refinfer", "weight-cache")
    }
    assert packed.stat().st_ino == inode, "the second run packs nothing"
    assert len(list(packed.parent.glob("*.packed"))) == 1


@pytest.mark.spec("LAB-8")
def test_a_run_inside_the_workspace_takes_the_clean_copy_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("lab", "start")
    monkeypatch.chdir(here / "refinfer-labs")  # a Python that begins here finds the student's package first
    assert run("lab", "run", "JULIET:") == (0, "", "all of it is our code so far\n")


@pytest.mark.spec("LAB-8")
def test_an_error_of_the_students_code_in_a_run_is_one_line_with_its_place(here: Path) -> None:
    run("lab", "start")
    solve(here, "1")
    path = here / "refinfer-labs" / LAYERS
    path.write_text(path.read_text().replace("np.exp(scores, out=scores)", "np.exp(wrong)"))
    done = subprocess.run(program("lab", "run"), cwd=here, capture_output=True, text=True, check=False)
    empty = "refinfer: the prompt is empty; give at least one token\n"
    assert run("lab", "run", "") == (1, "\n", empty)
    assert done.returncode == 1
    assert done.stderr.startswith("refinfer: NameError: name 'wrong' is not defined (refinfer/model/layers.py, line ")
    assert done.stderr.count("\n") == 1


@pytest.mark.spec("LAB-17")
def test_a_grade_has_a_row_for_each_student_and_lab_and_for_a_broken_workspace(here: Path) -> None:
    for name in ("ann", "bob"):
        run("lab", "start", "--only", "1", name)
    Workspace.find(here / "ann").solve(lab_of("1"))
    path = here / "ann" / LAYERS
    path.write_text(path.read_text().replace("np.exp(scores, out=scores)", "scores[:] = np.exp(scores)"))
    (here / "cyd" / "refinfer-labs").mkdir(parents=True)
    status, out, _ = run("lab", "grade", "ann", "bob", "cyd/refinfer-labs", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [(row["student"], row["lab"], row["state"]) for row in rows] == [
        ("ann", "01", "passed"),
        ("bob", "01", "blank"),
        ("cyd", None, "no workspace"),
    ]
    assert "student" in run("lab", "grade", "bob", "cyd")[1]


@pytest.mark.spec("LAB-7")
def test_the_copy_in_a_workspace_does_not_run_labs(here: Path) -> None:
    run("lab", "start")
    command = [sys.executable, "-m", "refinfer", "lab"]
    done = subprocess.run(command, cwd=here / "refinfer-labs", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "this is the copy in" in done.stderr
