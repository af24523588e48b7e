"""The commands `pack` and `cache`: what they print, which files they leave, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from refinfer.generate import STORYTELLER, load
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS
from refinfer.units import format_nbytes
from refinfer.weight_cache.identity import side_path
from refinfer.weight_cache.mapped_file import MappedFile, read_file

sys.path.insert(0, str(Path(__file__).parent))
from cache_files import directory, flip, model, names_in, packed
from command_line import WATCHDOG_S, program, run

PACK_KEYS = ["state", "path", "reason", "packed_buffers", "packed_bytes", "load_or_build_s", "held_buffers",
             "held_bytes", "packing_s"]  # fmt: skip


FILE_KEYS = {"path", "bytes", "reason", "model", "format", "buffers", "packed_bytes", "chunks", "format_version",
             "packers", "model_digest", "packing_s", "sources", "repository"}  # fmt: skip


@pytest.mark.spec("CLI-10", "GEN-12")
def test_pack_makes_the_file_says_where_and_does_nothing_the_second_time(directory: Path, model: Path) -> None:
    status, out, err = run("pack", model)
    path = Path(out.rstrip("\n"))
    assert (status, out) == (0, f"{path}\n")
    assert path.parent == directory
    assert path.name.startswith("ein-Modell-f-r--bf16-")
    assert (
        err == f"weight cache: packed 16 buffers, {packed_size(path)}, in {took(err)}; the next start will map them\n"
    )
    assert names_in(directory) == {path.name, side_path(path).name}
    before = path.stat()
    status, again, err = run("pack", model)
    assert (status, again) == (0, out)
    assert err.startswith("weight cache: mapped 16 buffers, ")
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with load(model) as session:
        assert session.weight_cache.state == "loaded"
        assert session.weight_cache.path == str(path)


def packed_size(path: Path) -> str:
    _, index = read_file(path)
    return format_nbytes(sum(entry.padded_nbytes for entry in index.entries))


def took(err: str) -> str:
    return err.partition(", in ")[2].partition(";")[0]


@pytest.mark.spec("CLI-10", "CLI-2")
def test_pack_json_is_one_object(directory: Path, model: Path) -> None:
    results = []
    for _ in range(2):
        status, out, err = run("pack", model, "--json")
        assert (status, err) == (0, "")
        results.append(json.loads(out))
        assert list(results[-1]) == PACK_KEYS
    first, second = results
    assert (first["state"], first["reason"], first["packed_buffers"]) == ("built", "there was no file yet", 16)
    assert (second["state"], second["reason"], second["packed_buffers"]) == ("loaded", None, 0)
    assert (second["packed_bytes"], second["path"]) == (0, first["path"])
    assert first["packed_bytes"] > 0
    assert Path(first["path"]).parent == directory


@pytest.mark.spec("CLI-10")
@pytest.mark.parametrize("name", list(FORMATS))
def test_pack_writes_the_format_and_the_file_that_are_asked_for(
    directory: Path, model: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "sub" / "a file"
    status, out, _ = run("pack", model, "--weights", name, "-o", target)
    assert (status, out) == (0, f"{target}\n")
    assert read_file(target)[1].provenance.format == name
    assert not list(MappedFile(target).problems())
    assert names_in(directory) == set()
    status, out, _ = run("generate", "--model", model, "--token-ids", "1,2", "--max-tokens", 2, "--weights", name,
                         "--weight-cache", target, "--json")  # fmt: skip
    assert json.loads(out)["weight_cache"]["state"] == "loaded"


@pytest.mark.spec("CLI-10")
def test_pack_without_a_model_packs_the_storyteller(directory: Path) -> None:
    status, out, _ = run("pack")
    assert status == 0
    assert Path(out.rstrip("\n")).name.startswith("storyteller-bf16-")
    with load() as session:
        assert (session.weight_cache.state, session.weight_cache.path) == ("loaded", out.rstrip("\n"))


@pytest.mark.spec("CLI-10")
def test_pack_into_memory_is_refused(directory: Path, model: Path) -> None:
    status, out, err = run("pack", model, "-o", ":memory")
    assert (status, out) == (2, "")
    assert err == "refinfer: --output :memory is not a file; give a file name\n"


@pytest.mark.spec("CLI-10", "ERR-2")
def test_pack_says_where_it_may_not_write(directory: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, out, err = run("pack", model, "-o", tmp_path / "file" / "below")
    assert (status, out) == (1, "")
    assert err == f"refinfer: {tmp_path / 'file' / 'below'} cannot be written: File exists\n"


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a while to pack."""
    folder = tmp_path_factory.mktemp("larger") / "m"
    config = replace(SHAPES["tiny"], vocab_size=16_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=1)
    write_checkpoint(folder, config, dtype="bf16")
    return folder


@pytest.mark.spec("CLI-10", "CLI-5", "ERR-2")
def test_ctrl_c_while_packing_ends_with_130_and_leaves_nothing(larger: Path, directory: Path) -> None:
    argv = program("pack", larger, "--weights", "int4")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + WATCHDOG_S
        while not any(path.stat().st_size > 1 << 20 for path in drafts(directory)):  # it is packing now
            assert process.poll() is None
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WATCHDOG_S)
    assert (process.returncode, out, err) == (130, b"", b"refinfer: interrupted\n")
    assert names_in(directory) == set()


def drafts(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*.tmp") if path.exists()] if directory.exists() else []


@pytest.mark.spec("CLI-10", "PUBLISH-3")
def test_of_two_packs_at_once_one_packs(larger: Path, directory: Path) -> None:
    argv = program("pack", larger, "--json")
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=WATCHDOG_S) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    results = [json.loads(out) for out, _ in outputs]
    assert sorted(result["state"] for result in results) == ["built", "loaded"]
    assert sorted(result["packed_buffers"] > 0 for result in results) == [False, True]
    assert results[0]["path"] == results[1]["path"]
    waited = b"refinfer: waiting for another process that is packing the same weights\n"
    assert all(err in {b"", waited} for _, err in outputs)
    assert names_in(directory) == {Path(results[0]["path"]).name, side_path(Path(results[0]["path"])).name}


@pytest.mark.spec("CLI-11")
def test_an_empty_cache_directory_is_listed_as_that(directory: Path) -> None:
    assert run("cache", "list") == (0, f"no cache files in {directory}\n", "")
    status, out, err = run("cache", "list", "--json")
    assert (status, json.loads(out), err) == (0, {"directory": str(directory), "files": []}, "")
    for action in ("info", "verify", "rm"):
        status, out, err = run("cache", action, "--all", "--json")
        assert (status, json.loads(out), err) == (0, [], "")
    assert not directory.exists()


@pytest.mark.spec("CLI-11")
def test_cache_list_shows_every_file_for_people(
    packed: Path, directory: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    run("pack", model, "--weights", "int8")
    (directory / "broken.packed").write_text("notes")
    status, out, err = run("cache", "list")
    assert (status, err) == (0, "")
    columns = columns_of(out)
    assert "broken.packed" in columns[0]
    assert packed.name in columns[0]
    assert columns[1].replace(" ", "").count(model.name.replace(" ", "")) == 2
    assert columns[2] == "bf16int8"
    assert columns[4].count("good") == 2
    assert "is not a refinfer" in columns[4]
    nbytes = sum(path.stat().st_size for path in directory.iterdir())
    assert out.endswith(f"{format_nbytes(nbytes)} in all\n")


def columns_of(table: str) -> list[str]:
    """Return the text of each column of a table that was printed with a frame."""
    rows = [line.split("\u2502")[1:-1] for line in table.splitlines() if line.startswith("\u2502")]
    return ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)]


@pytest.mark.spec("CLI-11")
def test_cache_list_json_describes_every_file(packed: Path, directory: Path, model: Path) -> None:
    (directory / "broken.packed").write_text("notes")
    (directory / "notes.txt").write_text("notes")
    status, out, err = run("cache", "list", "--json")
    listed = json.loads(out)
    assert (status, err, listed["directory"]) == (0, "", str(directory))
    broken, good = listed["files"]
    assert set(good) == FILE_KEYS
    assert (good["path"], good["reason"], good["model"], good["format"]) == (str(packed), None, str(model), "bf16")
    assert good["bytes"] == packed.stat().st_size + side_path(packed).stat().st_size
    assert (broken["path"], broken["bytes"]) == (str(directory / "broken.packed"), 5)
    assert (broken["reason"], broken["model"]) == ("it is not a refinfer weight cache", None)


@pytest.mark.spec("CLI-11")
def test_cache_list_of_some_models_shows_theirs(packed: Path, model: Path, tmp_path: Path) -> None:
    run("pack", STORYTELLER)
    run("pack", model, "--weights", "f32")
    listed = [
        json.loads(run("cache", "list", model, *more, "--json")[1])["files"] for more in ([], ["--weights", "f32"])
    ]
    assert [row["format"] for row in listed[0]] == ["f32", "bf16"]
    assert [row["format"] for row in listed[1]] == ["f32"]


@pytest.mark.spec("CLI-11", "DIR-3")
@pytest.mark.parametrize("way", ["path", "name", "model", "all"])
def test_cache_info_shows_what_is_in_a_file(packed: Path, model: Path, way: str) -> None:
    target = {"path": packed, "name": packed.name, "model": model, "all": "--all"}[way]
    status, out, err = run("cache", "info", target, "--json")
    rows = json.loads(out)
    assert (status, err, len(rows)) == (0, "", 1)
    assert set(rows[0]) == FILE_KEYS
    assert (Path(rows[0]["path"]), rows[0]["buffers"], rows[0]["format"]) == (packed, 16, "bf16")
    assert rows[0]["sources"][0]["name"] == "model.safetensors"
    status, out, err = run("cache", "info", target)
    assert (status, err) == (0, "")
    for text in (packed.name, "good", "16 in ", "format version", rows[0]["packers"][:16], "source model.safetensors"):
        assert text in out
    assert re.search(rf"packing took\W+{rows[0]['packing_s']:.3f} s", out)


@pytest.mark.spec("CLI-11")
def test_cache_info_of_a_file_that_cannot_be_used_says_why(packed: Path) -> None:
    flip(packed, 30)
    status, out, _ = run("cache", "info", packed)
    assert status == 0
    assert "its header is damaged" in out
    assert json.loads(run("cache", "info", packed, "--json")[1])[0]["reason"] == "its header is damaged"


@pytest.mark.spec("CLI-11", "DIR-1")
def test_cache_path_says_where_files_lie_whether_they_are_there_or_not(directory: Path, model: Path) -> None:
    assert run("cache", "path") == (0, f"{directory}\n", "")
    assert json.loads(run("cache", "path", "--json")[1]) == [str(directory)]
    status, out, _ = run("cache", "path", model)
    assert status == 0
    assert run("pack", model)[1] == out
    several = json.loads(run("cache", "path", model, STORYTELLER, "--weights", "int8", "--json")[1])
    assert [Path(path).parent for path in several] == [directory] * 2
    assert several[0] == run("pack", model, "--weights", "int8")[1].rstrip("\n")
    assert not Path(several[1]).exists()


@pytest.mark.spec("CLI-11", "ERR-2")
@pytest.mark.parametrize("action", ["list", "info"])
@pytest.mark.parametrize("name", ["[", "[bold]"])
def test_brackets_in_a_path_are_shown_as_they_are(
    directory: Path, model: Path, tmp_path: Path, name: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder `[`, and `x]` in it: together they look like a closing tag."""
    monkeypatch.setenv("COLUMNS", "500")
    (tmp_path / name).mkdir()
    moved = Path(shutil.move(model, tmp_path / name / "x]"))
    run("pack", moved)
    status, out, _ = run("cache", action, "--all")
    assert status == 0
    assert f"{name}/x]" in columns_of(out)[1]


def damage_chunk(path: Path) -> str:
    entry = read_file(path)[1].entries[-1]
    flip(path, entry.chunks[0].offset + 5)
    return entry.key.name


def damage_header(path: Path) -> str:
    flip(path, 30)
    return "its header is damaged"


def damage_pad_of_header(path: Path) -> str:
    flip(path, 4000)
    return "the header is not followed by zeros"


def damage_pad_of_chunk(path: Path) -> str:
    entry = next(e for e in read_file(path)[1].entries if e.chunks[0].nbytes % 4096)
    flip(path, entry.chunks[0].offset + entry.chunks[0].padded_nbytes - 1)
    return entry.key.name


def damage_index(path: Path) -> str:
    flip(path, path.stat().st_size - 1)
    return "its index is damaged"


def cut_short(path: Path) -> str:
    os.truncate(path, path.stat().st_size - 1)
    return "bytes instead of"


@pytest.mark.spec("CLI-12")
@pytest.mark.parametrize("way", ["path", "name", "model", "all"])
def test_a_good_file_is_verified(packed: Path, model: Path, way: str) -> None:
    target = {"path": packed, "name": packed.name, "model": model, "all": "--all"}[way]
    status, out, err = run("cache", "verify", target)
    assert (status, err) == (0, "")
    assert out.endswith(f"{packed}: good\n")
    status, out, err = run("cache", "verify", target, "--json")
    assert (status, json.loads(out), err) == (0, [{"path": str(packed), "problems": []}], "")


@pytest.mark.spec("CLI-12", "FILE-13")
@pytest.mark.parametrize(
    "damage", [damage_chunk, damage_header, damage_pad_of_header, damage_pad_of_chunk, damage_index, cut_short]
)
def test_a_file_with_one_wrong_byte_is_named_and_ends_with_status_1(
    packed: Path, model: Path, damage: Callable[[Path], str]
) -> None:
    run("pack", model, "--weights", "f32")
    problem = damage(packed)
    status, out, err = run("cache", "verify", "--all")
    assert status == 1
    assert err == "refinfer: 1 of 2 cache files are damaged; the next start rebuilds them\n"
    good, bad = sorted(out.splitlines(), key=len)
    assert good.endswith("-f32-" + good.rpartition("-f32-")[2])
    assert good.endswith(": good")
    assert bad.startswith(f"{packed}: ")
    assert problem in bad
    status, out, err = run("cache", "verify", packed, "--json")
    assert (status, err.count("\n")) == (1, 1)
    problems = json.loads(out)[0]["problems"]
    assert any(problem in text for text in problems)


@pytest.mark.spec("CLI-12")
def test_verify_reports_the_same_to_programs_and_to_people(packed: Path) -> None:
    damage_chunk(packed)
    done = subprocess.run(program("cache", "verify", packed), capture_output=True, timeout=WATCHDOG_S, check=False)
    assert done.returncode == 1
    assert done.stdout.decode().startswith(f"{packed}: ")
    assert done.stderr.count(b"\n") == 1
