"""Workspaces: made once, found again, led from lab to lab."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab_workspaces import KV_CACHE, LAYERS, solved, write
from refinfer.errors import LabError
from refinfer.labs.catalogue import PACKAGE, lab_of, labs
from refinfer.labs.regions import is_blank
from refinfer.labs.run import own_labs
from refinfer.labs.workspace import Workspace, all_labs


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
        assert [each.number for each in labs() if workspace.is_blank(each)] == [lab.number]
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


@pytest.mark.spec("LAB-6")
@pytest.mark.parametrize("loss", ["the file", "a comment"])
def test_a_lab_can_be_reset_when_its_file_or_a_comment_is_gone(tmp_path: Path, loss: str) -> None:
    workspace = solved(tmp_path)
    if loss == "the file":
        (workspace.folder / LAYERS).unlink()
    else:
        write(workspace, LAYERS, "    # end lab\n", "")
    workspace.open(lab_of("1"))
    assert all(is_blank(workspace.region(place)) for place in lab_of("1").places)
    workspace.solve(lab_of("1"))
    assert workspace.source(LAYERS) == (PACKAGE.parent / LAYERS).read_text()


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
     '{"course": [1], "current": null}', '{"course": ["01"], "current": "01", "hints": {"01": "a"}}', '{"more": 1}'],
    ids=["empty", "half", "a list", "brackets", "no such lab", "no list", "a number", "a hint", "other names"],
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
    assert own_labs(workspace) == []
    workspace.solve(lab_of("1"))
    assert own_labs(workspace) == []
    write(workspace, LAYERS, "    np.exp(scores, out=scores)\n", "    scores[:] = np.exp(scores)\n")
    assert own_labs(workspace) == [lab_of("1")]
    workspace.finish(lab_of("1"))
    assert own_labs(workspace) == [lab_of("1")]
