"""Specifies `refinfer.weight_cache.identity`: a model is known by its content, which is read only when it must be."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from build_site import (
    FAR_FUTURE_NS,
    Site,
    bytes_read,
    come_to_rest,
    drop_from_memory,
    noted,
    nothing,
    resident_bytes,
)
from file_contents import flip
from refinfer.clock import RealClock
from refinfer.errors import WeightsError
from refinfer.weight_cache import identity
from refinfer.weight_cache.format import SourceFile
from refinfer.weight_cache.identity import SideFile, Stat, believed, identify, side_path, unchanged
from refinfer.weight_cache.load_or_build import Contents, load_or_build
from refinfer.weight_cache.mapped_file import NO_FILE
from words import require_equal, require_error

HEAD_BYTES = 64 << 10
BLOCK_BYTES = 1 << 20
SHAPE = (257, 192)  # reaches beyond the first 64 KiB
NBYTES = 4 * SHAPE[0] * SHAPE[1]
STAT = ["size", "mtime_ns", "ctime_ns", "inode", "head"]
INVENTED = "ab" * 32

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has read")


def no_progress(nbytes: int) -> None:
    raise AssertionError(f"{nbytes} bytes were read")


def write(path: Path, nbytes: int, seed: int = 0) -> bytes:
    data = np.random.default_rng(seed).bytes(nbytes)
    path.write_bytes(data)
    return data


@pytest.fixture
def model(tmp_path: Path) -> Site:
    """A model of two buffers in one file, without a cache file yet."""
    return Site.make(tmp_path, SHAPE, ("a", "norm"))


@pytest.fixture
def model_at_rest(model: Site) -> Site:
    """A model with a cache file, whose side file is believed."""
    come_to_rest(model.source)
    assert model.open_checked().outcome.reason is not None
    return model


# The digest.


@pytest.mark.spec("IDENT-1")
@pytest.mark.parametrize(
    "nbytes", [0, 1, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5]
)
def test_a_source_file_is_identified_by_the_sha256_of_its_content(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "w"
    data = write(path, nbytes)
    progress: list[int] = []
    (record,) = identify([path], SideFile(()), FAR_FUTURE_NS, progress.append)
    assert record.source == SourceFile("w", nbytes, hashlib.sha256(data).digest())
    assert sum(progress) == nbytes


@pytest.mark.spec("IDENT-1")
def test_a_record_has_the_digest_of_every_byte_and_what_was_seen_of_the_file(tmp_path: Path) -> None:
    path, nbytes = tmp_path / "w", HEAD_BYTES + 1000
    data = write(path, nbytes)
    progress: list[int] = []
    (record,) = identify([path], SideFile(()), FAR_FUTURE_NS, progress.append)
    require_equal(record.name, "w", "the name in the record of file w")
    require_equal(record.digest, hashlib.sha256(data).hexdigest(), f"the digest of the {nbytes:,} bytes of file w")
    seen = Stat.of(path)
    for what in STAT:
        require_equal(getattr(record.stat, what), getattr(seen, what), f"the {what} in the record of file w")
    assert record.at_rest, "file w was written long ago, but its record has at_rest false"
    require_equal(sum(progress), nbytes, "the number of bytes that were reported as read")


@pytest.mark.spec("IDENT-1")
def test_files_are_identified_in_the_order_they_are_given(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "cab"]
    digests = [hashlib.sha256(write(path, 100, seed)).digest() for seed, path in enumerate(paths)]
    records = identify(paths, SideFile(()), FAR_FUTURE_NS, nothing)
    assert [(record.name, record.source.digest) for record in records] == list(zip("cab", digests, strict=True))
    assert believed(paths, SideFile(records)) == tuple(record.source for record in records)
    assert believed(paths[::-1], SideFile(records)) == tuple(record.source for record in records[::-1])


@pytest.mark.spec("IDENT-1")
@pytest.mark.parametrize(
    "at",
    [0, HEAD_BYTES, 2 * BLOCK_BYTES - 1],
    ids=["its first byte", "the byte after its first 64 KiB", "its last byte"],
)
def test_a_file_that_changes_while_its_digest_is_taken_is_refused(tmp_path: Path, at: int) -> None:
    path = tmp_path / "w"
    write(path, 2 * BLOCK_BYTES)
    come_to_rest(path)

    def change(_: int) -> None:
        flip(path, at)

    require_error(
        WeightsError,
        "w changed while it was read; try again",
        lambda: identify([path], SideFile(()), FAR_FUTURE_NS, change),
        f"byte {at:,} of w changed while `_digest` read it",
    )


@pytest.mark.spec("IDENT-1")
def test_a_file_that_is_replaced_while_its_digest_is_taken_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write(path, BLOCK_BYTES)

    def change(_: int) -> None:
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)

    with pytest.raises(WeightsError, match="changed while it was read"):
        identify([path], SideFile(()), FAR_FUTURE_NS, change)


@pytest.mark.spec("IDENT-1")
@pytest.mark.parametrize("kind", ["nothing", "a folder"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w"
    write(path, 10)
    side = noted(path)
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    for look in (
        partial(believed, [path], side),
        partial(identify, [path], side, FAR_FUTURE_NS, nothing),
        partial(identify, [path], SideFile(()), FAR_FUTURE_NS, nothing),
        partial(unchanged, [path], side.records),
    ):
        with pytest.raises(WeightsError, match="w cannot be read: "):
            look()


class Failing:
    """A file that cannot be read beyond its first 64 KiB."""

    def __init__(self, *_: object, **__: object) -> None:
        self.at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, nbytes: int) -> bytes:
        if nbytes > HEAD_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return bytes(nbytes)


@pytest.mark.spec("IDENT-1")
def test_a_disk_that_fails_while_a_digest_is_taken_is_an_error_and_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    write(path, 3 * BLOCK_BYTES)
    restless = [replace(record, at_rest=False) for record in identify([path], SideFile(()), 0, nothing)]
    monkeypatch.setattr("refinfer.weight_cache.identity.open_regular", Failing)
    with pytest.raises(WeightsError, match="w cannot be read: Input/output error"):
        identify([path], SideFile(()), FAR_FUTURE_NS, nothing)
    seen = [replace(record, stat=Stat.of(path)) for record in restless]
    with pytest.raises(WeightsError, match="w cannot be read: Input/output error"):
        unchanged([path], seen)


@pytest.mark.spec("INPUT-1", "IDENT-1")
def test_a_fifo_in_place_of_a_source_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w")
    with pytest.raises(WeightsError, match="w cannot be read: it is not a regular file"):
        identify([tmp_path / "w"], SideFile(()), FAR_FUTURE_NS, nothing)


# What is believed.


@pytest.mark.spec("IDENT-2")
def test_a_record_that_agrees_is_believed_and_its_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write(path, 2 * HEAD_BYTES)
    (record,) = noted(path).records
    side = SideFile((replace(record, digest=INVENTED),))  # only who reads the file can know that this is not true
    assert believed([path], side) is not None, "file w is as it was, but its record is not believed"
    progress: list[int] = []
    (found,) = identify([path], side, FAR_FUTURE_NS, progress.append)
    require_equal(sum(progress), 0, "the number of bytes that were read of file w, whose record agrees,")
    require_equal(found.digest, INVENTED, "the digest of file w, which is in its record,")


@pytest.mark.spec("IDENT-2")
@pytest.mark.parametrize("what", STAT)
def test_a_digest_is_believed_only_while_everything_seen_is_the_same(tmp_path: Path, what: str) -> None:
    path = tmp_path / "w"
    write(path, 2 * HEAD_BYTES)
    side = noted(path)
    assert believed([path], side) == (side.records[0].source,), "file w is as it was, but its record is not believed"
    stat = side.records[0].stat
    other: Any = stat.head[::-1] if what == "head" else getattr(stat, what) + 1
    record = replace(side.records[0], stat=replace(stat, **{what: other}))
    assert believed([path], SideFile((record,))) is None, f"file w has another {what}, but its record is believed"
    assert not unchanged([path], [record]), f"file w has another {what}, but it counts as unchanged"
    assert unchanged([path], side.records), "file w is as it was, but it counts as changed"


@pytest.mark.spec("IDENT-2")
def test_what_is_seen_of_a_file_is_what_the_file_system_says(tmp_path: Path) -> None:
    path = tmp_path / "w"
    data, stat = write(path, 3 * HEAD_BYTES), path.stat()
    head = hashlib.sha256(data[:HEAD_BYTES]).hexdigest()
    assert Stat.of(path) == Stat(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, head)


@pytest.mark.spec("IDENT-2")
@on_linux
def test_believing_a_digest_reads_64_kib_of_each_file_and_nothing_else(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        write(path, 32 * HEAD_BYTES)
    side = noted(*paths)
    for path in paths:
        drop_from_memory(path)
    bytes_read()
    before = bytes_read()
    assert believed(paths, side) is not None
    assert bytes_read() - before <= len(paths) * HEAD_BYTES + 1000
    for path in paths:  # a mapping would not be counted above; the system may read ahead, but not all
        assert 0 < resident_bytes(path) <= 16 * HEAD_BYTES


@pytest.mark.spec("IDENT-2", "IDENT-5")
def test_only_the_file_that_is_not_believed_is_hashed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for n, path in enumerate(paths):
        write(path, HEAD_BYTES + n)
    side = noted(*paths)
    assert identify(paths, side, FAR_FUTURE_NS, no_progress) == side.records
    os.utime(paths[1], ns=(0, 0))
    progress: list[int] = []
    assert believed(paths, side) is None
    found = identify(paths, side, FAR_FUTURE_NS, progress.append)
    assert sum(progress) == HEAD_BYTES + 1
    assert [record.digest for record in found] == [record.digest for record in side.records]
    assert found[::2] == side.records[::2]


@pytest.mark.spec("IDENT-2")
def test_a_digest_of_another_file_or_of_some_of_the_files_is_not_believed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        write(path, 10)
    a, b = noted(*paths).records
    assert believed(paths, SideFile((a,))) is None, "there is no record of file b, but both files are believed"
    assert believed(paths[:1], SideFile((a, b))) == (a.source,), "there is a record of file a, but it is not believed"
    for records, what in (
        ((replace(a, name="b"),), "its record has the name b"),
        ((replace(b, name="a"), replace(a, name="b")), "files a and b have changed their names"),
        ((), "there is no record at all"),
    ):
        assert believed(paths[:1], SideFile(records)) is None, f"{what}, but file a is believed"


# What is noticed.


def in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def by_renaming(path: Path, data: bytes) -> None:
    path.with_name("new").write_bytes(data)
    path.with_name("new").replace(path)


def through_a_mapping(path: Path, data: bytes) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[:] = data
        mapping.flush()


@pytest.mark.spec("IDENT-3")
@pytest.mark.parametrize("how", [in_place, by_renaming, through_a_mapping])
@pytest.mark.parametrize("at", [0, HEAD_BYTES - 1, HEAD_BYTES, NBYTES - 1])
def test_other_weights_of_the_same_size_are_noticed_with_the_times_put_back(
    model: Site, how: Callable[[Path, bytes], None], at: int
) -> None:
    model.cache.parent.mkdir()
    come_to_rest(model.source)
    side = noted(model.source)
    side_path(model.cache).write_bytes(side.encode())
    model.open_checked()
    assert model.hashed == 0  # it is believed
    stat, data = model.source.stat(), bytearray(model.source.read_bytes())
    data[at] ^= 1
    how(model.source, bytes(data))
    os.utime(model.source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = model.source.stat()
    assert (now.st_size, now.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert believed([model.source], side) is None
    assert not unchanged([model.source], side.records)
    prepared = model.open_checked()
    assert prepared.outcome.reason == "the model's weights changed"
    assert model.hashed == NBYTES


@pytest.mark.spec("IDENT-3")
def test_a_file_that_takes_the_name_of_another_with_its_times_is_noticed(tmp_path: Path) -> None:
    path, twin = tmp_path / "w", tmp_path / "twin"
    write(path, 1000, seed=1)
    write(twin, 1000, seed=2)
    side = noted(path)
    os.utime(twin, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    twin.replace(path)
    assert believed([path], side) is None


# The tick of the clock.


@pytest.mark.spec("IDENT-4")
@pytest.mark.parametrize(
    ("ctime_ns", "tick_ns"),
    [(5_000_000_001, 100_000_000), (5_000_000_000, 2_000_000_000)],
    ids=["a tick of 100 ms", "a tick of 2 s"],
)
def test_a_record_is_believed_only_if_the_file_had_been_at_rest_for_a_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctime_ns: int, tick_ns: int
) -> None:
    path = tmp_path / "w"
    write(path, 1000)
    seen = replace(Stat.of(path), ctime_ns=ctime_ns)  # a clock of nanoseconds, one of whole seconds
    monkeypatch.setattr(Stat, "of", lambda path: seen)
    for age_ns, at_rest in [
        (-ctime_ns, False),  # the time is not known, or was turned back
        (0, False),
        (tick_ns, False),
        (tick_ns + 1, True),
        (10 * tick_ns, True),
    ]:
        records = identify([path], SideFile(()), ctime_ns + age_ns, nothing)
        when = f"file w had changed {age_ns:,} ns before its digest was begun, and a tick has {tick_ns:,} ns: "
        if age_ns < 0:
            when = "file w seems to have changed after its digest was begun: "
        require_equal(records[0].at_rest, at_rest, f"{when}at_rest")
        is_believed = believed([path], SideFile(records)) is not None
        require_equal(is_believed, at_rest, f"{when}whether its record is believed")
        progress: list[int] = []
        identify([path], SideFile(records), FAR_FUTURE_NS, progress.append)
        require_equal(bool(progress), not at_rest, f"{when}whether it is read again")


def freeze(monkeypatch: pytest.MonkeyPatch, path: Path, tick_ns: int = 3_600_000_000_000) -> None:
    """Let a clock that ticks every hour make the file look as it does now for the rest of the test."""
    seen = Stat.of(path)
    monkeypatch.setattr(identity, "_TICK_NS", tick_ns)
    monkeypatch.setattr(identity, "_COARSE_TICK_NS", tick_ns)
    monkeypatch.setattr(Stat, "of", lambda path: seen)


@pytest.mark.spec("IDENT-4", "IDENT-7")
def test_only_files_that_were_not_at_rest_are_read_again_to_see_whether_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        write(path, 1000)
    a, b = noted(*paths).records
    invented = [a, replace(b, digest=INVENTED)]  # only who reads file b can know that this is not true
    assert unchanged(paths, invented), "file b was at rest and looks the same, but it was read again"
    restless = [a, replace(b, at_rest=False)]
    assert unchanged(paths, restless), "file b was not at rest, and has the same bytes, but counts as changed"
    look = Stat.of
    monkeypatch.setattr(Stat, "of", lambda path: look(path) if path == paths[0] else b.stat)
    write(paths[1], 1000, seed=1)  # in the same tick: it looks as before
    assert not unchanged(paths, restless), "file b was not at rest, and has other bytes, but counts as unchanged"
    assert not unchanged(paths[::-1], restless[::-1]), "of files b and a, b has changed, but both count as unchanged"


@pytest.mark.spec("IDENT-4")
def test_weights_changed_in_the_tick_in_which_they_were_packed_are_packed_again(
    model: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(monkeypatch, model.source)
    for seed in range(3):
        model.fill(seed)
        prepared = model.open_checked()
        assert prepared.outcome.reason == ("the model's weights changed" if seed else NO_FILE)
        assert model.hashed == NBYTES
        assert json.loads(side_path(model.cache).read_bytes())["records"][0]["at_rest"] is False
    assert model.open_checked().outcome.reason is None
    assert model.hashed == NBYTES  # looking at it still does not suffice


@pytest.mark.spec("IDENT-4", "OPEN-6")
def test_weights_changed_in_the_tick_in_which_they_were_hashed_are_noticed_after_packing(
    model: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(monkeypatch, model.source)

    def contents(sources: tuple[SourceFile, ...]) -> Contents:
        model.fill(1)  # the digest has been taken
        return model.contents(sources)

    with pytest.raises(WeightsError, match="changed while they were packed"):
        load_or_build(model.cache, [model.source], contents, clock=RealClock())
    assert not model.cache.exists()


@pytest.mark.spec("IDENT-4")
def test_a_file_with_a_change_time_in_the_future_is_never_believed(
    model: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = replace(Stat.of(model.source), ctime_ns=FAR_FUTURE_NS)  # the clock was turned back since
    monkeypatch.setattr(Stat, "of", lambda path: seen)
    for reason in [NO_FILE, None, None]:
        assert model.open_checked().outcome.reason == reason
        assert model.hashed == NBYTES


@pytest.mark.spec("IDENT-4", "IDENT-5")
def test_a_model_that_was_just_written_is_believed_once_it_has_come_to_rest(
    model: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_TICK_NS", 3_600_000_000_000)
        patch.setattr(identity, "_COARSE_TICK_NS", 3_600_000_000_000)
        model.open_checked()
        model.open_checked()
        assert model.hashed == NBYTES
    come_to_rest(model.source)
    for hashed in [NBYTES, 0, 0]:
        assert model.open_checked().outcome.reason is None
        assert model.hashed == hashed


# Touching, and the side file.


def touch(path: Path) -> None:
    path.touch()


def put_a_copy_in_its_place(path: Path) -> None:
    by_renaming(path, path.read_bytes())


def rename_to_and_fro(path: Path) -> None:
    path.rename(path.with_name("elsewhere")).rename(path)


def link(path: Path) -> None:
    path.with_name("second name").hardlink_to(path)


@pytest.mark.spec("IDENT-5")
@pytest.mark.parametrize("what", [touch, put_a_copy_in_its_place, rename_to_and_fro, link])
def test_a_mere_touch_costs_one_hashing_once(model_at_rest: Site, what: Callable[[Path], None]) -> None:
    model, before = model_at_rest, model_at_rest.cache.read_bytes()
    assert model.open_checked().outcome.reason is None
    assert model.hashed == 0
    what(model.source)
    come_to_rest(model.source)
    packing_s = SideFile.read(side_path(model.cache)).packing_s
    assert packing_s is not None
    for hashed in [NBYTES, 0, 0]:
        prepared = model.open_checked()
        assert (prepared.outcome.reason, prepared.outcome.packed_buffers, model.packed) == (None, 0, [])
        assert prepared.outcome.packing_s == packing_s
        assert model.hashed == hashed
    assert model.cache.read_bytes() == before
