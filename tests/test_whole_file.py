"""Specifies `refinfer.whole_file`: regular files only, of a stated size at most, and JSON from any bytes."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.whole_file import open_regular, parse_json, read_json, read_whole, will_need


def make(kind: str, path: Path) -> None:
    """Put something at `path` that is not a regular file."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))  # its name may have at most 107 bytes
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nothing"))


WHY = {
    "FIFO": "it is not a regular file",
    "folder": "Is a directory",
    "socket": "it is not a regular file",
    "device": "it is not a regular file",
    "loop": "Too many levels of symbolic links",
    "dangling link": "No such file or directory",
    "nothing": "No such file or directory",
}


@pytest.mark.spec("INPUT-1")
@pytest.mark.parametrize("kind", WHY)
def test_what_is_not_a_regular_file_is_refused_and_never_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(kind, tmp_path / "x")
    for read in (open_regular, lambda path: read_whole(path, 100), lambda path: read_json(path, 100)):
        with pytest.raises(OSError) as refused:  # noqa: PT011  (its text is compared below)
            read(tmp_path / "x")
        assert refused.value.strerror == WHY[kind]


@pytest.mark.spec("INPUT-1")
def test_a_name_that_becomes_a_fifo_after_it_was_looked_at_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, really_open = tmp_path / "x", os.open
    path.write_text("{}")

    def swap(name: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return really_open(name, flags)

    monkeypatch.setattr(os, "open", swap)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="it is not a regular file"):
        open_regular(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.spec("INPUT-1")
def test_a_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"[1]")
    (tmp_path / "x").symlink_to("blob")
    assert read_json(tmp_path / "x", 3) == [1]


@pytest.mark.spec("INPUT-1")
def test_a_file_that_is_larger_than_its_kind_can_be_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1_000_000))
    assert len(read_whole(path, 1_000_000)) == 1_000_000
    os.truncate(path, 1 << 40)  # sparse: it takes no space
    with pytest.raises(OSError, match="it is larger than the 1 MB that such a file may have"):
        read_whole(path, 1_000_000)


@pytest.mark.spec("TENSOR-16")
def test_a_pointer_of_git_lfs_is_refused_as_one_but_not_what_only_mentions_it(tmp_path: Path) -> None:
    path, pointer = tmp_path / "x", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    path.write_bytes(pointer)
    with pytest.raises(OSError, match="it is a Git LFS pointer"):
        read_whole(path, 1000)
    path.write_bytes(b"# " + pointer)
    assert read_whole(path, 1000) == b"# " + pointer


@pytest.mark.spec("INPUT-1")
def test_an_opened_file_is_not_passed_on_to_programs_and_closes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    with open_regular(path, buffering=0) as file:
        assert not os.get_inheritable(file.fileno())
        assert file.read(2) == b"ab"
    assert file.closed


@pytest.mark.spec("INPUT-1")
def test_an_opened_file_is_buffered_unless_asked_otherwise(tmp_path: Path) -> None:
    """An unbuffered file may return fewer bytes than asked for, and most readers ask once."""
    (tmp_path / "x").write_bytes(b"abc")
    with open_regular(tmp_path / "x") as file, open_regular(tmp_path / "x", buffering=0) as raw:
        assert isinstance(file, io.BufferedReader)
        assert isinstance(raw, io.FileIO)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise, as Linux has it")
def test_the_system_is_told_which_part_of_a_file_will_be_needed_and_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def refuse(*part: int) -> None:
        told.append(part)
        raise OSError

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    will_need(5, 4096, 100)
    monkeypatch.delattr(os, "posix_fadvise")
    will_need(5, 8192, 100)
    assert told == [(5, 4096, 100, os.POSIX_FADV_WILLNEED)]


BAD = {
    "nothing": b"",
    "half an object": b'{"a": ',
    "brackets": b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000,
    "a number of 5000 digits": b"1" * 5000,
    "not UTF-8": b'"\xff"',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "zeros": bytes(100),
}


@pytest.mark.spec("INPUT-2")
@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_is_not_json_raises_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        parse_json(data)
    assert len(str(refused.value)) < 300


def values(value: object) -> Iterator[object]:
    yield value
    for part in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from values(part)


@pytest.mark.spec("INPUT-2")
@given(st.binary(max_size=60) | st.text('[]{}:,"\\ud8eE+-.0123456789 ntfINa', max_size=60).map(str.encode))
def test_any_bytes_give_a_value_or_a_value_error(data: bytes) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    kinds = (dict, list, str, int, float, bool, type(None))
    assert all(isinstance(part, kinds) for part in values(value))
