"""Workspaces: made once, found again, led from lab to lab."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lab_workspaces import KV_CACHE, LAYERS, solved, write
from refinfer.errors import LabError
from refinfer.labs.catalogue import PACKAGE, Lab, lab_of, labs
from refinfer.labs.regions import is_blank
from refinfer.labs.run import generate, own_labs
from refinfer.labs.workspace import Workspace, all_labs, copy_folder


def files_of(folder: Path) -> dict[str, bytes]:
    kept = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


@pytest.mark.spec("LAB-5")
def test_a_workspace_is_the_package_with_the_first_lab_blank_and_no_bytecode(tmp_path: Path) -> None:
    workspace = Workspace.start(tmp_path / "new", all_labs())
    assert not list(workspace.folder.rglob("__pycache__"))
    ours, theirs = files_of(PACKAGE), files_of(workspace.folder / "refinfer")
    different = {name for name in ours if "course/" not in name and theirs[name] != ours[name]}
    assert {f"refinfer/{name}" for name in different} == {KV_CACHE, LAYERS}
    assert [lab.number for lab in labs() if workspace.is_blank(lab)] == ["01"]


@pytest.mark.spec("LAB-4", "LAB-6")
def test_the_labs_solved_one_after_another_end_in_the_package(tmp_path: Path) -> None:
    workspace = Workspace.start(tmp_path / "new", list(labs()))
    for lab in labs():
        assert workspace.current == lab
        modules = {place.module for place in lab.places}
        with_it = [each for each in labs() if each.number > lab.number and modules & {p.module for p in each.places}]
        assert [each for each in labs() if workspace.is_blank(each)] == [lab, *with_it]
        workspace.solve(lab)
        workspace.finish(lab)
    assert workspace.current is None
    ours = {name: data for name, data in files_of(PACKAGE).items() if not name.startswith("labs/course/")}
    assert files_of(workspace.folder / "refinfer") == ours


@pytest.mark.spec("LAB-5")
def test_a_folder_that_is_not_empty_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LabError, match="is not an empty folder"):
        Workspace.start(tmp_path, all_labs())
    assert files_of(tmp_path) == {"thesis.txt": b"mine"}
    with pytest.raises(LabError, match="is not an empty folder"):
        Workspace.start(tmp_path / "thesis.txt", all_labs())
    solved(tmp_path)
    with pytest.raises(LabError, match="has a workspace already"):
        Workspace.start(tmp_path / "workspace", all_labs())


@pytest.mark.spec("LAB-5")
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_start_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, is_there: bool
) -> None:
    def fail(_: Workspace) -> None:
        raise error

    monkeypatch.setattr(Workspace, "save", fail)
    if is_there:
        (tmp_path / "new").mkdir()
    with pytest.raises((LabError, KeyboardInterrupt), match=r"No space left|^$"):
        Workspace.start(tmp_path / "new", all_labs())
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"][:is_there]


@pytest.mark.spec("LAB-5")
def test_no_workspace_is_made_within_another_one_or_within_the_package(tmp_path: Path) -> None:
    workspace = solved(tmp_path)
    for above in (workspace.folder, PACKAGE):
        with pytest.raises(LabError, match="would be inside"):
            Workspace.start(above / "model" / "mine", all_labs())
        assert not (above / "model" / "mine").exists()


@pytest.mark.spec("LAB-5")
def test_a_copy_can_be_written_even_if_the_package_cannot(tmp_path: Path) -> None:
    (tmp_path / "ours" / "part").mkdir(parents=True)
    (tmp_path / "ours" / "part" / "a.py").touch(0o444)
    (tmp_path / "ours" / "part").chmod(0o555)
    copy_folder(tmp_path / "ours", tmp_path / "theirs", without="course")
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "theirs").rglob("*"))
    (tmp_path / "ours" / "part").chmod(0o755)


@pytest.mark.spec("LAB-6")
def test_a_module_that_cannot_be_written_keeps_what_the_student_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    workspace = solved(tmp_path)
    before = files_of(workspace.folder)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(LabError, match="cannot be written: No space left on device"):
        workspace.open(lab_of("1"))
    assert files_of(workspace.folder) == before


@pytest.mark.spec("LAB-11")
def test_a_module_may_begin_with_a_mark_of_its_encoding_and_is_not_lost_in_another_encoding(tmp_path: Path) -> None:
    workspace = solved(tmp_path)
    path, text = workspace.folder / LAYERS, workspace.source(LAYERS)
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert workspace.source(LAYERS) == text
    path.write_bytes(f"# caf\xe9\n{text}".encode("latin-1"))
    with pytest.raises(LabError, match="is not in UTF-8; save it again in this encoding"):
        workspace.source(LAYERS)


@pytest.mark.spec("LAB-6")
def test_passing_a_lab_opens_the_next_and_keeps_what_was_written(tmp_path: Path) -> None:
    workspace = Workspace.start(tmp_path / "new", list(labs()))
    first, second = labs()[:2]
    workspace.solve(first)
    write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    scores[:] = np.exp(scores)\n")
    assert workspace.finish(first) == second
    assert "scores[:] = np.exp(scores)" in workspace.source(LAYERS)
    again = Workspace.find(workspace.folder)
    assert (again.current, again.state.passed, again.is_blank(second)) == (second, [first.number], True)
    assert [again.state_of(lab) for lab in labs()[:3]] == ["passed", "open", "not begun"]


@pytest.mark.spec("LAB-6")
@pytest.mark.parametrize("loss", ["the file", "its folder", "a comment"])
def test_a_lab_can_be_reset_when_its_file_or_a_comment_is_gone(tmp_path: Path, loss: str) -> None:
    workspace = solved(tmp_path)
    if loss == "the file":
        (workspace.folder / LAYERS).unlink()
    elif loss == "its folder":
        shutil.rmtree((workspace.folder / LAYERS).parent)
    else:
        write(workspace, LAYERS, "    # end lab\n", "")
    workspace.open(lab_of("1"))
    assert all(is_blank(workspace.region(place)) for place in lab_of("1").places)
    workspace.solve(lab_of("1"))
    assert workspace.source(LAYERS) == (PACKAGE.parent / LAYERS).read_text()


@pytest.mark.spec("LAB-9")
def test_empty_lines_outside_a_lab_are_no_change_and_any_other_is_named(tmp_path: Path) -> None:
    workspace, lab = solved(tmp_path), lab_of("1")
    for old, new in (("\n\n\n", "\n"), ("import numpy as np\n", "import numpy as np\n\n\n\n")):
        write(workspace, LAYERS, old, new)
        assert workspace.strays(lab) == []
    write(workspace, LAYERS, "import numpy as np\n", "import numpy\n")
    (note,) = workspace.strays(lab)
    assert LAYERS in note


@pytest.mark.spec("LAB-7")
def test_a_workspace_is_found_in_the_folder_above_it_and_in_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Workspace.start(tmp_path / "refinfer-labs", all_labs())
    for folder in (tmp_path, made.folder, made.folder / "refinfer" / "model"):
        monkeypatch.chdir(folder)
        assert Workspace.find().folder.resolve() == made.folder.resolve()
    with pytest.raises(LabError, match="has no workspace; refinfer lab start makes one"):
        Workspace.find(tmp_path)


@pytest.mark.spec("LAB-7")
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"course": ["77"], "current": null}', '{"course": 3, "current": "01"}',
     '{"course": [1], "current": null}', '{"course": ["01"], "current": "01", "hints": {"01": "a"}}', '{"more": 1}',
     '{"course": ["01"], "current": "01", "hints": {"01": -9}}', '{"course": ["01"], "current": "1"}',
     '{"course": ["01"], "current": "01", "passed": 3}', '{"course": ["01"], "current": "01", "given_up": [1]}'],
    ids=["empty", "half", "a list", "brackets", "no such lab", "no list", "a number", "a hint", "other names",
         "a hint below zero", "one digit", "passed", "given up"],
)  # fmt: skip
def test_a_damaged_state_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    workspace = solved(tmp_path)
    (workspace.folder / "lab.json").write_text(text)
    with pytest.raises(LabError, match=r"lab\.json is damaged"):
        Workspace.find(workspace.folder)


@pytest.mark.spec("LAB-15")
def test_hints_come_one_at_a_time_and_the_last_one_stays(tmp_path: Path) -> None:
    workspace = solved(tmp_path)
    lab = lab_of("1")
    seen = [workspace.hint(lab) for _ in range(4)]
    assert seen == [(1, lab.hints[0]), (2, lab.hints[1]), (3, lab.hints[2]), (3, lab.hints[2])]
    assert json.loads((workspace.folder / "lab.json").read_text())["hints"] == {"01": 3}


@pytest.mark.spec("LAB-16")
def test_the_difference_names_both_sides_and_is_empty_for_our_own_solution(tmp_path: Path) -> None:
    workspace = solved(tmp_path)
    assert workspace.difference(lab_of("1")) == ""
    write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    scores[:] = np.exp(scores)\n")
    lines = workspace.difference(lab_of("1")).splitlines()
    assert lines[:2] == [f"--- yours: {LAYERS}, lab 01", f"+++ ours: {LAYERS}, lab 01"]
    assert "-scores[:] = np.exp(scores)" in lines
    assert "+np.exp(scores, out=scores)" in lines


@pytest.mark.spec("LAB-8")
def test_a_run_uses_what_the_student_has_written_and_neither_blanks_nor_our_own(tmp_path: Path) -> None:
    workspace = Workspace.start(tmp_path / "new", all_labs())
    assert own_labs(workspace) == ([], [])
    workspace.solve(lab_of("1"))
    assert own_labs(workspace) == ([], [])
    write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    scores[:] = np.exp(scores)\n")
    assert own_labs(workspace) == ([lab_of("1")], [])
    workspace.finish(lab_of("1"))
    assert own_labs(workspace) == ([lab_of("1")], [])


@pytest.mark.spec("LAB-6")
def test_a_reset_keeps_what_was_written(tmp_path: Path) -> None:
    workspace = solved(tmp_path)
    assert workspace.open(lab_of("1")) == []
    for n in (1, 2):
        workspace.solve(lab_of("1"))
        write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    scores[:] = np.exp(scores)\n")
        (kept,) = workspace.open(lab_of("1"))
        assert kept == workspace.folder / "yours" / f"lab-01-{n}.py"
        assert "scores[:] = np.exp(scores)" in kept.read_text()
        assert workspace.is_blank(lab_of("1"))


@pytest.mark.spec("LAB-6", "LAB-16")
def test_our_solution_takes_the_place_of_the_students_only_after_that_was_kept(tmp_path: Path) -> None:
    workspace = solved(tmp_path)
    write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    scores[:] = np.exp(scores)\n")
    (kept,) = workspace.apply(lab_of("1"))
    assert "scores[:] = np.exp(scores)" in kept.read_text()
    assert workspace.source(LAYERS) == (PACKAGE.parent / LAYERS).read_text()


@pytest.mark.spec("LAB-6")
def test_a_reset_keeps_whole_files_whose_comments_are_gone(tmp_path: Path) -> None:
    workspace = solved(tmp_path)
    write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    scores[:] = np.exp(scores)\n")
    write(workspace, LAYERS, "    # end lab\n", "")
    before = {workspace.source(module) for module in (LAYERS, KV_CACHE)}
    assert {path.read_text() for path in workspace.open(lab_of("1"))} == before


@pytest.mark.spec("LAB-6")
def test_a_reset_leaves_later_labs_of_the_same_file_that_were_passed_and_blanks_those_that_are_not_begun(
    tmp_path: Path,
) -> None:
    def modules(lab: Lab) -> set[str]:
        return {place.module for place in lab.places}

    workspace = Workspace.start(tmp_path / "new", list(labs()))
    pairs = [(a, b) for a in labs() for b in labs() if a.number < b.number and modules(a) & modules(b)]
    first, later = pairs[0]
    for lab in labs():
        workspace.solve(lab)
    workspace.finish(first)
    workspace.open(first)
    assert workspace.is_blank(later)
    workspace.solve(first)
    workspace.solve(later)
    workspace.finish(later)
    workspace.open(first)
    assert workspace.is_blank(first)
    assert not workspace.is_blank(later)


@pytest.mark.spec("LAB-8")
def test_a_run_of_code_that_is_not_python_says_in_which_line(tmp_path: Path) -> None:
    workspace = solved(tmp_path)
    write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    np.exp(scores, out=)\n")
    number = workspace.source(LAYERS).splitlines().index("    np.exp(scores, out=)") + 1
    assert str(generate(workspace, "ROMEO:")).startswith(f"{LAYERS}, line {number}: ")


@pytest.mark.spec("LAB-9")
def test_a_lab_is_begun_when_one_of_its_two_places_is_written_in(tmp_path: Path) -> None:
    workspace = Workspace.start(tmp_path / "new", [lab_of("2")])
    assert not workspace.is_begun(lab_of("1"))
    write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    scores[:] = np.exp(scores)\n")
    assert workspace.is_begun(lab_of("1"))
