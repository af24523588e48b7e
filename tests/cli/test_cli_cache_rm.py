"""The command `cache rm`, and wrong uses of `cache`: what goes, what stays, what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from refinfer.cli.main import main, make_parser
from refinfer.generate import STORYTELLER, load
from refinfer.units import format_nbytes
from refinfer.weight_cache.format import MAGIC
from refinfer.weight_cache.identity import side_path
from refinfer.weight_cache.publish import draft_path

sys.path.insert(0, str(Path(__file__).parent))
from cache_files import directory, flip, model, names_in, packed
from command_line import WATCHDOG_S, program, run


@pytest.mark.spec("CLI-13", "DIR-4")
@pytest.mark.parametrize("way", ["path", "name", "model", "model and format", "all"])
def test_rm_removes_the_files_it_is_given(packed: Path, directory: Path, model: Path, way: str) -> None:
    kept = Path(run("pack", STORYTELLER)[1].rstrip("\n")) if way != "all" else None
    draft_path(packed).write_bytes(MAGIC + b"dead")
    (directory / "notes.txt").write_text("dear")
    nbytes = len(MAGIC) + 4 + packed.stat().st_size + side_path(packed).stat().st_size
    targets: dict[str, list[object]] = {
        "path": [packed],
        "name": [packed.name],
        "model": [model],
        "model and format": [model, "--weights", "bf16"],
        "all": ["--all"],
    }
    status, out, err = run("cache", "rm", *targets[way])
    assert (status, out, err) == (0, f"removed {packed}, {format_nbytes(nbytes)}\n", "")
    left = {kept.name, side_path(kept).name} if kept else set()
    assert names_in(directory) == left | {"notes.txt"}
    assert model.exists()


@pytest.mark.spec("CLI-13")
def test_rm_json_says_what_was_freed(packed: Path, directory: Path) -> None:
    nbytes = packed.stat().st_size + side_path(packed).stat().st_size
    status, out, err = run("cache", "rm", "--all", "--json")
    assert (status, json.loads(out), err) == (0, [{"path": str(packed), "bytes": nbytes}], "")
    assert names_in(directory) == set()


@pytest.mark.spec("CLI-13")
def test_rm_of_one_format_leaves_the_others(packed: Path, model: Path) -> None:
    other = Path(run("pack", model, "--weights", "int8")[1].rstrip("\n"))
    assert run("cache", "rm", model, "--weights", "int8")[0] == 0
    assert packed.exists()
    assert not other.exists()


@pytest.mark.spec("CLI-13")
def test_rm_removes_a_damaged_file_in_the_cache_directory(packed: Path, directory: Path) -> None:
    flip(packed, 0)  # not even its first byte is right
    assert run("cache", "rm", packed.name)[0] == 0
    assert names_in(directory) == set()


@pytest.mark.spec("CLI-13")
def test_rm_removes_a_cache_file_outside_the_cache_directory(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "any name"
    run("pack", model, "-o", elsewhere)
    assert run("cache", "rm", elsewhere)[0] == 0
    assert names_in(elsewhere.parent) == set()


@pytest.mark.spec("CLI-13", "ERR-2")
@pytest.mark.parametrize("what", ["notes", "weights", "config", "empty", "link to notes"])
def test_rm_refuses_a_file_that_is_not_a_cache_file(packed: Path, model: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "notes").write_text("dear")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "link to notes").symlink_to("notes")
    target = {"weights": model / "model.safetensors", "config": model / "config.json"}.get(what, tmp_path / what)
    before = target.read_bytes()
    status, out, err = run("cache", "rm", target)
    assert (status, out, err) == (2, "", f"refinfer: {target} is not a refinfer weight cache\n")
    assert target.read_bytes() == before
    assert packed.exists()


@pytest.mark.spec("CLI-13")
@pytest.mark.parametrize("target", ["../dear", "notes.txt", "../../dear"])
def test_rm_refuses_another_file_in_the_cache_directory_by_its_name(
    packed: Path, directory: Path, tmp_path: Path, target: str
) -> None:
    dear = directory / target
    dear.write_text("dear")
    assert run("cache", "rm", target)[0] == 2
    assert dear.read_text() == "dear"


@pytest.mark.spec("CLI-13", "ERR-2")
def test_rm_removes_nothing_if_one_of_several_names_is_wrong(packed: Path) -> None:
    status, out, err = run("cache", "rm", packed, "nonsense")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert packed.exists()


@pytest.mark.spec("CLI-13")
def test_a_file_that_is_named_twice_is_removed_once(packed: Path) -> None:
    nbytes = packed.stat().st_size + side_path(packed).stat().st_size
    status, out, _ = run("cache", "rm", packed, packed.name, "--json")
    assert status == 0
    assert sum(row["bytes"] for row in json.loads(out)) == nbytes
    assert len(json.loads(out)) == 1


@pytest.mark.spec("CLI-13", "DIR-4")
def test_rm_leaves_the_draft_that_another_process_is_writing(packed: Path, directory: Path) -> None:
    with draft_path(packed).open("wb") as draft:
        fcntl.flock(draft, fcntl.LOCK_EX)
        assert run("cache", "rm", "--all")[0] == 0
        assert names_in(directory) == {draft_path(packed).name}


@pytest.mark.spec("CLI-13", "PUBLISH-5")
def test_rm_does_not_disturb_a_session(directory: Path) -> None:
    with load() as session:
        expected = "".join(session.generate("ROMEO:", max_tokens=12))
        pieces = session.generate("ROMEO:", max_tokens=12)
        text = next(pieces)
        assert run("cache", "rm", "--all")[0] == 0
        assert names_in(directory) == set()
        assert text + "".join(pieces) == expected
    with load() as session:
        assert session.weight_cache.state == "built"


WRONG: list[tuple[list[str], str]] = [
    (["pack", "/no/such/model"], "is not a folder"),
    (["pack", "MODEL", "MODEL"], "unrecognized arguments"),
    (["pack", "MODEL", "--weights", "fp8"], "invalid choice: 'fp8'"),
    (["pack", "MODEL", "--weights-format", "f32"], "unrecognized arguments"),
    (["pack", "MODEL", "-o"], "expected one argument"),
    (["pack", "MODEL", "-o", ""], "is not a file; give a file name"),
    (["pack", "MODEL", "-o", "."], "is not a file; give a file name"),
    (["pack", "MODEL", "-o", "MODEL"], "is not a file; give a file name"),
    (["pack", "MODEL", "-o", "/dev/null"], "is not a file; give a file name"),
    (["pack", "MODEL", "-o", "MODEL/model.safetensors"], "is a file of a model"),
    (["pack", "MODEL", "-o", "MODEL/config.json"], "is a file of a model"),
    (["pack", "EMPTY"], "config.json does not exist"),
    (["cache"], "required"),
    (["cache", "show"], "invalid choice: 'show'"),
    (["cache", "info"], "nothing was named"),
    (["cache", "verify"], "nothing was named"),
    (["cache", "rm"], "(see refinfer cache rm --help)"),
    (["cache", "rm", "--json"], "nothing was named"),
    (["cache", "rm", "--al"], "unrecognized arguments"),
    (["cache", "rm", "PACKED", "--all"], "names and --all were both given"),
    (["cache", "verify", "MODEL", "--all"], "names and --all were both given"),
    (["cache", "list", "nonsense"], "nonsense is neither a cache file nor a model"),
    (["cache", "info", "nonsense"], "nonsense is neither a cache file nor a model"),
    (["cache", "verify", "nonsense"], "nonsense is neither a cache file nor a model"),
    (["cache", "rm", "nonsense"], "nonsense is neither a cache file nor a model"),
    (["cache", "rm", ""], "has neither"),
    (["cache", "path", "nonsense"], "nonsense is not a model folder"),
    (["cache", "path", "EMPTY"], "has neither"),
    (["cache", "info", "EMPTY"], "has neither"),
    (["cache", "info", "MODEL", "--weights", "int4"], "has no cache file yet; write one with refinfer pack"),
    (["cache", "info", "MODEL", "--weights", "fp8"], "invalid choice: 'fp8'"),
    (["cache", "verify", "/dev/null"], "/dev/null is neither a cache file nor a model"),
    (["cache", "list", "/"], "has neither"),
]


@pytest.mark.spec("CLI-4", "CLI-10", "CLI-11", "CLI-12", "CLI-13", "ERR-2")
@pytest.mark.parametrize(("argv", "why"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_every_wrong_use_is_one_line_and_status_2(
    packed: Path, directory: Path, model: Path, tmp_path: Path, argv: list[str], why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": model, "PACKED": packed, "EMPTY": tmp_path / "empty"}
    filled = [str(names[a]) if a in names else a.replace("MODEL/", f"{model}/") for a in argv]
    before = names_in(directory)
    status, out, err = run(*filled)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert why in err
    assert names_in(directory) == before
    assert names_in(model) == names_in(Path(__file__).parents[1] / "golden" / "qwen2")


@pytest.mark.spec("CLI-4", "ERR-2")
@pytest.mark.parametrize(
    "argv",
    [
        ["pack", "-o"],
        ["pack"],
        ["cache", "info"],
        ["cache", "path"],
        ["cache", "rm"],
    ],
    ids=" ".join,
)
def test_a_name_that_is_too_long_is_bad_input(directory: Path, argv: list[str]) -> None:
    status, out, err = run(*argv, "m" * 300)
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="needs the right to become anybody")
@pytest.mark.spec("DIR-1", "ERR-2")
@pytest.mark.parametrize("argv", [["cache", "list"], ["generate", "--max-tokens", "1"]], ids=" ".join)
def test_a_user_without_a_home_is_told_in_one_line_or_served(
    argv: list[str], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_parser(argv)  # imports what nobody might not be allowed to read
    nobody = next(uid for uid in range(54321, 60000) if not any(entry.pw_uid == uid for entry in pwd.getpwall()))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, of BLAS, and the child starts none
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(WATCHDOG_S)
            os.dup2(writer, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr, sys.stdout = os.fdopen(2, "w"), os.fdopen(1, "w")
            os.setgroups([])
            os.setgid(nobody)
            os.setuid(nobody)
            status = main(argv)
            sys.stderr.flush()
            os._exit(status)
        finally:
            os._exit(99)
    os.close(writer)
    with os.fdopen(reader) as told:
        said = told.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in {0, 1, 2}
    assert status == 0 or said.count("\n") == 1


def as_bytes(value: Any) -> bytes:
    return os.fsencode(str(value))


@pytest.mark.spec("CLI-11", "CLI-10")
def test_a_name_that_is_no_text_is_packed_listed_and_removed(directory: Path, tmp_path: Path) -> None:
    """A folder whose name is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"m\xff")
    try:
        shutil.copytree(Path(__file__).parents[1] / "golden" / "qwen2", folder)
    except OSError:
        pytest.skip("this file system takes no such name")
    for argv in (["pack", folder], ["cache", "list"], ["cache", "info", folder], ["cache", "verify", folder]):
        done = subprocess.run(program(*argv), capture_output=True, timeout=WATCHDOG_S, check=False)
        assert done.returncode == 0, done.stderr
    listed = json.loads(run("cache", "list", "--json")[1])["files"]
    assert as_bytes(listed[0]["model"]) == as_bytes(folder)
    assert run("cache", "rm", folder)[0] == 0
    assert names_in(directory) == set()


@pytest.mark.spec("CLI-13", "DIR-4")
def test_rm_of_a_link_to_a_cache_file_removes_the_file_and_what_belongs_to_it(model: Path, tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "there" / "file"
    file.parent.mkdir()
    link.symlink_to(file)
    run("pack", model, "-o", link)
    nbytes = sum(path.stat().st_size for path in (file, side_path(file)))
    assert run("cache", "rm", link)[:2] == (0, f"removed {file}, {format_nbytes(nbytes)}\n")
    assert names_in(file.parent) == set()


@pytest.mark.spec("CLI-13", "DIR-4")
@pytest.mark.parametrize("way", ["what the link leads to", "the link", "all"])
def test_a_link_in_the_cache_directory_leads_rm_to_no_file_of_a_person(
    packed: Path, directory: Path, tmp_path: Path, way: str
) -> None:
    thesis, link = tmp_path / "thesis", directory / "thesis.packed"
    thesis.write_text("dear")
    link.symlink_to(thesis)
    named = {"what the link leads to": thesis, "the link": link, "all": "--all"}[way]
    assert run("cache", "rm", named)[0] == (2 if named == thesis else 0)
    assert thesis.read_text() == "dear"
    assert link.is_symlink() == (named == thesis)
