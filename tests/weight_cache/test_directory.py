"""Specifies `refinfer.weight_cache.directory`: where cache files lie, how they are described and removed."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_site import mapped_of
from file_contents import make_version
from refinfer.arrays import PAGE_BYTES
from refinfer.clock import RealClock
from refinfer.errors import InputError
from refinfer.inventory import Inventory
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.prepare import cache_path, prepare
from refinfer.weight_cache.directory import (
    SUFFIX,
    cache_directory,
    cache_files,
    describe,
    files_of,
    is_cache_file,
    path_for,
    remove,
)
from refinfer.weight_cache.format import MAGIC
from refinfer.weight_cache.identity import SIDE_FILE_BEGINS, side_path
from refinfer.weight_cache.load_or_build import Prepared
from refinfer.weight_cache.mapped_file import NO_FILE, read_file
from refinfer.weight_cache.packers import packer_fingerprint
from refinfer.weight_cache.publish import draft_path

PACKERS = bytes(32)


@pytest.mark.spec("DIR-1")
def test_cache_files_lie_in_the_users_cache_directory(tmp_path: Path) -> None:
    assert cache_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "refinfer"
    home = Path.home() / ".cache" / "refinfer"
    assert cache_directory({}) == cache_directory({"XDG_CACHE_HOME": ""}) == home


@pytest.mark.spec("DIR-1")
@pytest.mark.parametrize("relative", ["cache", "./cache", "../cache", "~/cache"])
def test_a_relative_cache_home_is_ignored(relative: str) -> None:
    assert cache_directory({"XDG_CACHE_HOME": relative}) == Path.home() / ".cache" / "refinfer"


@pytest.mark.spec("DIR-1")
def test_a_directory_of_our_own_is_preferred_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = {"REFINFER_CACHE_DIR": str(tmp_path / "own"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert cache_directory(given) == tmp_path / "own"
    assert cache_directory({"REFINFER_CACHE_DIR": "own"}) == tmp_path / "own"
    assert cache_directory({"REFINFER_CACHE_DIR": "~/own"}) == tmp_path / "home" / "own"
    assert cache_directory(given | {"REFINFER_CACHE_DIR": ""}) == tmp_path / "xdg" / "refinfer"


@pytest.mark.spec("DIR-1")
def test_a_home_elsewhere_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "refinfer"


@pytest.mark.spec("DIR-1")
def test_without_a_home_a_cache_directory_has_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "refinfer"
    with pytest.raises(InputError, match="there is no home folder for cache files: set REFINFER_CACHE_DIR"):
        cache_directory({})


@pytest.mark.spec("DIR-1", "DIR-2")
def test_a_model_is_packed_into_that_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not there yet"))
    site = Site(tmp_path)
    prepared = site.pack()
    path = mapped_of(prepared).path
    assert path.parent == tmp_path / "not there yet" / "refinfer"
    assert path == path_for(site.folder, "f32", packer_fingerprint("f32"))


NAMES = ["model", "a model", "m\u00f6del", "..", "-", "m" * 255, "a.b_c-d", "[x]", "$(rm)", "\u200b", "\udcff"]


@pytest.mark.spec("DIR-2")
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_file_name_is_one_that_every_system_takes_and_people_can_read(name: str, tmp_path: Path) -> None:
    path = path_for(tmp_path / "models" / name, "bf16", PACKERS, tmp_path)
    assert path.parent == tmp_path
    assert path.name.isascii()
    assert len(side_path(path).name) + len(".tmp") <= 255
    assert not set(path.name) & set(" /\\:*?\"'<>|[]$\n")
    assert path.name.endswith(SUFFIX)
    if name == "a model":
        assert path.name.startswith("a-model-bf16-")


@pytest.mark.spec("DIR-2")
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["/m/a", "/m/b", "/n/a", "/m/a b", "/m/a-b"]),
            st.sampled_from(["f32", "int8"]),
            st.sampled_from([b"1", b"2"]),
        ),
        unique=True,
    )
)
def test_two_models_formats_or_packers_never_share_a_file(them: list[tuple[str, str, bytes]]) -> None:
    paths = [path_for(Path(model), name, packers) for model, name, packers in them]
    assert len(set(paths)) == len(them)
    assert paths == [path_for(Path(model), name, packers) for model, name, packers in them]


@pytest.mark.spec("DIR-2")
def test_the_ways_to_one_folder_lead_to_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    ways = [tmp_path / "model", Path("model"), tmp_path / "link", tmp_path / "x" / ".." / "model", Path("./model/")]
    assert len({path_for(way, "f32", PACKERS) for way in ways}) == 1


class Site:
    """A model of its own, and a folder for its cache file."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = Path(shutil.copytree(Path(__file__).parents[1] / "golden" / "qwen2", tmp_path / "a model"))
        self.cache = tmp_path / "cache"

    def pack(self, name: str = "f32", where: Path | None = None) -> Prepared:
        inventory = Inventory(open_folder(self.folder).config, name)
        place = str(where) if where else None
        return prepare(inventory, open_checkpoint(self.folder), place, clock=RealClock())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def packed(site: Site) -> Path:
    """The cache file of a model."""
    path = site.cache / f"model{SUFFIX}"
    site.pack(where=path)
    return path


@pytest.mark.spec("DIR-2", "OPEN-3")
def test_a_changed_model_replaces_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "m"
    paths = []
    for seed in (1, 2):
        shutil.rmtree(folder, ignore_errors=True)
        config = replace(SHAPES["tiny"], num_hidden_layers=1)
        write_checkpoint(folder, config, dtype="f32", seed=seed)
        prepared = prepare(Inventory(config, "f32"), open_checkpoint(folder), None, clock=RealClock())
        paths.append(mapped_of(prepared).path)
    assert prepared.outcome.reason == "the model's weights changed"
    assert paths[0] == paths[1]
    assert [path.suffix for path in sorted((tmp_path / "home" / "refinfer").iterdir())] == [SUFFIX, ".json"]


@pytest.mark.spec("DIR-3")
def test_a_file_is_described_by_its_header_index_and_side_file(site: Site, packed: Path) -> None:
    row = describe(packed)
    header, index = read_file(packed)
    sources = [path for path in site.folder.iterdir() if path.suffix == ".safetensors"]
    assert row["path"] == str(packed)
    assert row["bytes"] == sum(path.stat().st_size for path in packed.parent.iterdir())
    assert row["reason"] is None
    assert (row["model"], row["format"]) == (str(site.folder.resolve()), "f32")
    assert row["buffers"] == len(index.entries)
    assert row["chunks"] == sum(len(entry.chunks) for entry in index.entries)
    assert (
        row["packed_bytes"] == header.index_offset - PAGE_BYTES == sum(entry.padded_nbytes for entry in index.entries)
    )
    assert row["packers"] == packer_fingerprint("f32").hex()
    assert row["model_digest"] == header.model.hex()
    assert row["packing_s"] > 0
    assert [(source["name"], source["bytes"]) for source in row["sources"]] == [
        (path.name, path.stat().st_size) for path in sources
    ]


@pytest.mark.spec("DIR-3")
def test_describing_reads_no_weight(packed: Path) -> None:
    """All of them may be damaged, and nothing else is said."""
    row, (header, _) = describe(packed), read_file(packed)
    with packed.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(bytes(header.index_offset - PAGE_BYTES))
    assert describe(packed) == row


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def never_completed(path: Path) -> None:
    os.truncate(path, PAGE_BYTES)


def damaged_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"x")


def damaged_index(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def foreign(path: Path) -> None:
    path.write_text("notes")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.spec("DIR-3", "FILE-3")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut_short, "instead of"),
        (never_completed, "bytes instead of"),
        (damaged_header, "its header is damaged"),
        (damaged_index, "its index is damaged"),
        (partial(make_version, version=1), "it has the format version 1, and this is version 2"),
        (foreign, "it is not a refinfer weight cache"),
        (empty, "it is not a refinfer weight cache"),
        (gone, NO_FILE),
        (a_folder, "it cannot be read: Is a directory"),
    ],
)
def test_a_file_that_cannot_be_used_is_described_with_its_reason(packed: Path, spoil: Any, reason: str) -> None:
    spoil(packed)
    row = describe(packed)
    assert reason in row["reason"]
    assert row["model"] is row["format"] is row["buffers"] is row["packed_bytes"] is None
    assert row["bytes"] == sum(path.stat().st_size for path in packed.parent.iterdir())


@pytest.mark.spec("DIR-3")
def test_a_file_of_another_packer_is_described_as_outdated(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinfer.weight_cache.directory.packer_fingerprint", lambda name: bytes(32))
    row = describe(packed)
    assert row["reason"] == "the packing code changed"
    assert row["format"] == "f32"


@pytest.mark.spec("DIR-3")
@pytest.mark.parametrize("content", [None, b"", b"{", b'{"records": [], "packing_s": null}', b"[1]"])
def test_a_missing_or_malformed_side_file_leaves_the_seconds_unknown(packed: Path, content: bytes | None) -> None:
    if content is None:
        side_path(packed).unlink()
    else:
        side_path(packed).write_bytes(content)
    row = describe(packed)
    assert (row["reason"], row["packing_s"]) == (None, None)


@pytest.mark.spec("DIR-3")
def test_the_files_of_a_folder_are_those_of_which_anything_is_left(tmp_path: Path) -> None:
    names = ["b.packed", "a.packed", "c.packed.tmp", "d.packed.sources.json", "e.packed.sources.json.tmp"]
    for name in [*names, "notes.txt", "b.packed.sources.json", "packed", "x.json"]:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in cache_files(tmp_path)] == [f"{letter}.packed" for letter in "abcde"]
    assert list(cache_files(tmp_path / "none")) == []


@pytest.mark.spec("DIR-3", "DIR-4")
def test_what_belongs_to_a_file_is_found(packed: Path) -> None:
    draft_path(packed).write_bytes(b"")
    assert set(files_of(packed)) == {packed, side_path(packed), draft_path(packed)}


@pytest.mark.spec("CLI-13", "DIR-4")
def test_a_cache_file_is_known_by_how_it_begins(packed: Path, tmp_path: Path) -> None:
    assert is_cache_file(packed)
    cut_short(packed)
    damaged_header(packed)
    assert is_cache_file(packed)
    for content in (b"", b"notes", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "other").write_bytes(content)
        assert not is_cache_file(tmp_path / "other")
    assert not is_cache_file(tmp_path)
    assert not is_cache_file(tmp_path / "none")


@pytest.mark.spec("DIR-4")
def test_removing_removes_everything_that_belongs_to_a_file_and_nothing_else(packed: Path) -> None:
    (packed.parent / "notes.txt").write_text("dear")
    (packed.parent / "model.packed2").write_text("dear")
    draft_path(packed).write_bytes(MAGIC + b"a draft whose builder was killed")
    draft_path(side_path(packed)).write_bytes(SIDE_FILE_BEGINS)
    nbytes = sum(path.stat().st_size for path in files_of(packed))
    assert remove(packed) == nbytes > 10_000
    assert {path.name for path in packed.parent.iterdir()} == {"notes.txt", "model.packed2"}


@pytest.mark.spec("DIR-4")
def test_removing_leaves_files_that_only_have_the_names_of_a_side_file_or_a_draft(packed: Path) -> None:
    for file in (side_path(packed), draft_path(packed), draft_path(side_path(packed))):
        file.unlink(missing_ok=True)
        file.write_bytes(b"a thesis")
    assert remove(packed) > 10_000
    left = {side_path(packed), draft_path(packed), draft_path(side_path(packed))}
    assert set(packed.parent.iterdir()) == left
    assert {file.read_bytes() for file in left} == {b"a thesis"}


@pytest.mark.spec("DIR-4")
@pytest.mark.parametrize("left", ["nothing", "side file", "draft"])
@pytest.mark.parametrize("usual", [True, False], ids=["in the cache directory", "elsewhere"])
def test_removing_what_is_left_of_a_file_is_allowed(
    packed: Path, left: str, usual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINFER_CACHE_DIR", str(packed.parent if usual else packed.parent.parent))
    packed.unlink()
    if left != "side file":
        side_path(packed).unlink()
    if left == "draft":
        draft_path(packed).write_bytes(MAGIC + b"dead")
    nbytes = sum(path.stat().st_size for path in packed.parent.iterdir())
    assert remove(packed) == nbytes
    assert list(packed.parent.iterdir()) == []


@pytest.mark.spec("DIR-4")
def test_a_draft_that_is_being_written_stays(packed: Path) -> None:
    file_bytes = packed.stat().st_size + side_path(packed).stat().st_size
    with draft_path(packed).open("wb") as draft:
        fcntl.flock(draft, fcntl.LOCK_EX)
        draft.write(bytes(5000))
        draft.flush()
        assert remove(packed) == file_bytes
        assert [path.name for path in packed.parent.iterdir()] == [draft_path(packed).name]


@pytest.mark.spec("DIR-4", "PUBLISH-5")
def test_who_has_mapped_a_file_keeps_it_when_it_is_removed(site: Site, packed: Path) -> None:
    provider = site.pack(where=packed).provider
    content = {key: provider[key].copy() for key in provider}
    remove(packed)
    assert not packed.exists()
    for key in provider:
        np.testing.assert_array_equal(provider[key], content[key])
    again = site.pack(where=packed)
    assert (again.outcome.state, again.outcome.reason) == ("built", NO_FILE)


@pytest.mark.spec("DIR-2")
def test_a_path_may_be_named_by_hand(site: Site, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(site.folder)
    assert cache_path(checkpoint, "f32", str(tmp_path / "x" / ".." / "here")) == (tmp_path / "here").resolve()
