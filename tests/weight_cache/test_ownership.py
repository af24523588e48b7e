"""Specifies `refinfer.weight_cache.ownership`: what may be written over, and who may read what is written."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from build_site import Site, taken
from children import NOBODY, Child, Gate, in_child, needs_root, watched
from refinfer.errors import RequestError, WeightCacheError
from refinfer.weight_cache.format import MAGIC
from refinfer.weight_cache.identity import SIDE_FILE_BEGINS, side_path
from refinfer.weight_cache.mapped_file import NO_FILE
from refinfer.weight_cache.ownership import (
    READ_ONLY,
    is_ours,
    make_folder,
    mode_like,
    open_draft,
    require_replaceable,
    write_to_device,
)
from refinfer.weight_cache.publish import Draft, Patience, draft_path, write_small_file
from starts import make_small

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs owners and modes, as POSIX has them")


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Nothing may wait for ever."""
    with watched():
        yield


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_small(tmp_path)
    site.cache.parent.mkdir()
    return site


@pytest.fixture
def open_site() -> Iterator[Site]:
    """A site in a folder that everybody may enter and write to."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        site = make_small(folder)
        site.cache.parent.mkdir()
        site.cache.parent.chmod(0o777)
        yield site
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o666, 0o777], ids="umask {:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each umask in turn."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


# What lies at the names that a build writes to.


def a_link(name: Path, thesis: Path) -> None:
    name.symlink_to(thesis)


def a_link_to_nothing(name: Path, thesis: Path) -> None:
    name.symlink_to(thesis.with_name("nothing"))


def a_hard_link(name: Path, thesis: Path) -> None:
    os.link(thesis, name)


def a_pipe(name: Path, thesis: Path) -> None:
    os.mkfifo(name)


def a_socket(name: Path, thesis: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(name))


def a_folder(name: Path, thesis: Path) -> None:
    name.mkdir()


def a_text(name: Path, thesis: Path) -> None:
    name.write_bytes(b"notes")


def an_image_of_a_disk(name: Path, thesis: Path) -> None:
    name.write_bytes(bytes(5000) + b"files")
    name.chmod(0o644)


PLANTED = [a_link, a_link_to_nothing, a_hard_link, a_pipe, a_socket, a_folder, a_text, an_image_of_a_disk]
Plant = Callable[[Path, Path], None]


def looked_at(folder: Path) -> dict[str, object]:
    """Return what lies in a folder: each name with its kind and content."""
    return {
        path.name: path.read_bytes() if path.is_file() else stat.S_IFMT(path.lstat().st_mode)
        for path in folder.iterdir()
    }


@pytest.mark.spec("PUBLISH-8")
@pytest.mark.parametrize("plant", PLANTED)
def test_what_is_planted_at_the_name_of_a_draft_is_refused_by_name_and_stays(site: Site, plant: Plant) -> None:
    thesis = site.source.parent / "thesis"
    thesis.write_bytes(b"dear")
    plant(draft_path(site.cache), thesis)
    before = looked_at(site.cache.parent), looked_at(thesis.parent)
    with pytest.raises(
        WeightCacheError, match=rf"cannot be written: .*{draft_path(site.cache).name} is .*stays as it is"
    ):
        site.open()
    assert (looked_at(site.cache.parent), looked_at(thesis.parent)) == before


@pytest.mark.spec("PUBLISH-8")
def test_a_draft_with_a_second_name_is_refused_although_it_may_be_ours(site: Site) -> None:
    kept = site.source.with_name("kept")
    kept.write_bytes(MAGIC + b"half")
    kept.chmod(0o600)
    os.link(kept, draft_path(site.cache))
    with pytest.raises(
        WeightCacheError, match=r"cannot be written: .* is a link or a special file, and stays as it is"
    ):
        site.open()
    assert kept.read_bytes() == draft_path(site.cache).read_bytes() == MAGIC + b"half"


@pytest.mark.spec("PUBLISH-8")
@pytest.mark.parametrize(("content", "ours"), [(MAGIC, True), (MAGIC + b"half", True), (b"notes", False)])
def test_a_draft_is_ours_by_how_it_begins_even_if_it_was_read_to_its_end(
    tmp_path: Path, content: bytes, ours: bool
) -> None:
    (tmp_path / "draft").write_bytes(content)
    with open_draft(tmp_path / "draft") as draft:
        assert draft.read() == content
        assert is_ours(draft, MAGIC) == ours


@pytest.mark.spec("PUBLISH-8", "OPEN-5")
@pytest.mark.parametrize("plant", PLANTED)
def test_a_good_file_is_used_whatever_is_planted_next_to_it(site: Site, plant: Plant) -> None:
    site.open()
    for name in (draft_path(site.cache), draft_path(side_path(site.cache))):
        plant(name, site.source)
    source = site.source.read_bytes()
    assert site.open_checked().outcome.reason is None
    assert site.source.read_bytes() == source
    assert site.folder == site.own_names | {draft_path(site.cache).name, draft_path(side_path(site.cache)).name}


@pytest.mark.spec("PUBLISH-8", "IDENT-6")
@pytest.mark.parametrize("plant", PLANTED)
def test_what_is_planted_at_the_names_of_the_side_file_is_not_written_to(site: Site, plant: Plant) -> None:
    thesis = site.source.parent / "thesis"
    thesis.write_bytes(b"dear")
    plant(draft_path(side_path(site.cache)), thesis)
    before = looked_at(thesis.parent)
    assert site.open_checked().outcome.reason == NO_FILE
    assert not side_path(site.cache).exists()
    assert looked_at(thesis.parent) == before
    assert site.open_checked().outcome.reason is None


@pytest.mark.spec("PUBLISH-8", "PUBLISH-7")
def test_a_link_at_the_name_of_a_small_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_bytes(b"dear")
    (tmp_path / "small").symlink_to(tmp_path / "thesis")
    write_small_file(tmp_path / "small", b"new")
    assert taken(tmp_path) == {"thesis": b"dear", "small": b"new"}
    assert not (tmp_path / "small").is_symlink()


@pytest.mark.spec("PUBLISH-8", "PUBLISH-4")
@pytest.mark.parametrize("left", [b"", bytes(5000), MAGIC, MAGIC + bytes(5000), MAGIC[:3]], ids=len)
def test_what_a_crash_has_left_of_a_draft_is_taken_over(site: Site, left: bytes) -> None:
    draft_path(site.cache).write_bytes(left)
    draft_path(site.cache).chmod(0o600)
    draft_path(side_path(site.cache)).write_bytes(SIDE_FILE_BEGINS[: len(left)])
    assert site.open_checked().outcome.reason == NO_FILE
    assert site.folder == site.own_names


@pytest.mark.spec("CLI-24")
def test_a_pipe_gets_all_of_what_is_written_to_it_if_somebody_reads_it(tmp_path: Path) -> None:
    pipe, data = tmp_path / "pipe", os.urandom(300_000)  # more than a pipe holds
    os.mkfifo(pipe)
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader, ThreadPoolExecutor(1) as pool:
        with pipe.open("wb"):  # it does not end meanwhile
            os.set_blocking(reader.fileno(), True)
            read = pool.submit(reader.read)
            write_to_device(pipe, data)
        assert read.result() == data
    with pytest.raises(OSError, match="No such device or address"):
        write_to_device(pipe, data)


@pytest.mark.spec("PUBLISH-8")
def test_a_draft_is_for_its_user_alone(tmp_path: Path, umask: int) -> None:
    draft = Draft(tmp_path / "file")
    assert stat.S_IMODE(draft.temporary.stat().st_mode) == 0o600
    draft.abandon()


@pytest.mark.spec("PUBLISH-8")
def test_a_draft_whose_name_was_given_to_another_file_is_not_published(tmp_path: Path) -> None:
    path = tmp_path / "file"
    draft = Draft(path)
    draft.write(0, b"ours")
    draft.settle(4)
    draft.temporary.unlink()
    draft.temporary.write_bytes(b"theirs")
    with pytest.raises(OSError, match="no longer the draft that was written"):
        draft.publish()
    draft.abandon()
    assert taken(tmp_path) == {"file.tmp": b"theirs"}


@pytest.mark.spec("PUBLISH-9")
@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_dead_draft_of_another_user_is_never_written_to(open_site: Site, mode: int) -> None:
    draft = draft_path(open_site.cache)
    draft.write_bytes(MAGIC + b"half")
    draft.chmod(mode)
    with draft.open("rb") as kept:

        def work() -> None:
            if mode == 0o644:
                assert open_site.open().outcome.reason == NO_FILE
            else:  # it cannot be seen whether somebody is writing it
                with pytest.raises(WeightCacheError, match="another user's, and stays as it is"):
                    open_site.open()

        in_child(work, user=NOBODY)
        assert kept.read() == MAGIC + b"half"
    assert draft.exists() == (mode == 0o600)


@pytest.mark.spec("PUBLISH-9")
@needs_root
def test_root_takes_over_no_draft_of_another_user_but_removes_it(open_site: Site) -> None:
    draft = draft_path(open_site.cache)
    draft.write_bytes(MAGIC + b"half")
    os.chown(draft, NOBODY, NOBODY)
    with draft.open("rb") as kept:
        assert open_site.open_checked().outcome.reason == NO_FILE
        assert kept.read() == MAGIC + b"half"
    assert open_site.cache.stat().st_uid == 0


@pytest.mark.spec("PUBLISH-9", "PUBLISH-3")
@needs_root
def test_a_draft_of_another_user_that_is_being_written_is_waited_for(open_site: Site) -> None:
    draft = draft_path(open_site.cache)
    draft.write_bytes(MAGIC + b"half")
    os.chown(draft, NOBODY, NOBODY)
    there: list[bool] = []
    with draft.open("rb") as written:
        fcntl.flock(written, fcntl.LOCK_EX)

        def on_wait() -> None:
            there.append(draft.exists())
            fcntl.flock(written, fcntl.LOCK_UN)

        assert open_site.open(on_wait).outcome.reason == NO_FILE
    assert there == [True]


# What a file of ours may replace.


@pytest.mark.spec("OPEN-9")
@pytest.mark.parametrize("content", [None, b"", MAGIC, MAGIC + b"more"], ids=["nothing", "empty", "begin", "more"])
def test_nothing_an_empty_file_and_a_file_of_ours_may_be_replaced(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cache"
    if content is not None:
        path.write_bytes(content)
    require_replaceable(path, MAGIC, "a weight cache")
    require_replaceable(path / "below a file, or in no folder", MAGIC, "a weight cache")
    assert taken(tmp_path) == ({} if content is None else {"cache": content})


@pytest.mark.spec("OPEN-9")
@pytest.mark.parametrize("content", [b"a thesis", MAGIC[:-1], b"\0" + MAGIC, bytes(100)])
def test_a_file_that_is_not_ours_may_not_be_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=rf"{path} is not a weight cache, and stays as it is; name another file"):
        require_replaceable(path, MAGIC, "a weight cache")


@pytest.mark.spec("OPEN-9")
@pytest.mark.parametrize("plant", [a_link, a_link_to_nothing])
def test_a_link_may_not_be_replaced_even_if_it_leads_to_a_file_of_ours(tmp_path: Path, plant: Plant) -> None:
    (tmp_path / "thesis").write_bytes(MAGIC)
    plant(tmp_path / "cache", tmp_path / "thesis")
    with pytest.raises(RequestError, match="cache is not a weight cache, and stays as it is"):
        require_replaceable(tmp_path / "cache", MAGIC, "a weight cache")


@pytest.mark.spec("OPEN-9")
@pytest.mark.parametrize(
    ("plant", "why"),
    [(a_pipe, "it is not a regular file"), (a_socket, "it is not a regular file"), (a_folder, "Is a directory")],
)
def test_what_cannot_be_read_may_not_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, why: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may have at most 107 bytes
    plant(Path("cache"), tmp_path)
    with pytest.raises(RequestError, match=rf"cache cannot be read: {why}"):
        require_replaceable(tmp_path / "cache", MAGIC, "a weight cache")


@pytest.mark.spec("PUBLISH-11")
@pytest.mark.parametrize("name", ["file", "file/folder", "link to nothing"])
def test_a_folder_cannot_be_made_where_something_else_lies(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"dear")
    (tmp_path / "link to nothing").symlink_to("nothing")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"dear"


# Who may read what is published.


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.spec("PUBLISH-10")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o604, 0o400, 0o755], ids="source {:03o}".format)
def test_a_published_file_is_read_only_and_no_more_readable_than_its_source(
    open_site: Site, mode: int, umask: int
) -> None:
    open_site.source.chmod(mode)
    open_site.open()
    expected = (mode & 0o444 & ~umask) | 0o400
    assert {path.name: mode_of(path) for path in open_site.cache.parent.iterdir()} == dict.fromkeys(
        open_site.own_names, expected
    )


@pytest.mark.spec("PUBLISH-10")
def test_a_source_is_looked_at_behind_its_link(open_site: Site) -> None:
    blob = open_site.source.with_name("blob")
    open_site.source.rename(blob)
    open_site.source.symlink_to(blob)
    blob.chmod(0o600)
    open_site.open()
    assert mode_of(open_site.cache) == 0o400


@pytest.mark.spec("PUBLISH-10")
@needs_root
def test_the_group_may_read_it_only_if_it_is_the_group_of_the_source(open_site: Site) -> None:
    before = os.umask(0o022)
    try:
        open_site.source.chmod(0o640)
        open_site.open()
        assert mode_of(open_site.cache) == 0o440
        os.chown(open_site.source, -1, NOBODY)
        open_site.cache.unlink()
        open_site.open()
        assert mode_of(open_site.cache) == 0o400
    finally:
        os.umask(before)


@pytest.mark.spec("PUBLISH-10")
@needs_root
def test_a_group_that_may_not_read_the_source_is_not_let_in_among_the_others(open_site: Site) -> None:
    os.chown(open_site.source, -1, NOBODY)
    open_site.source.chmod(0o604)
    open_site.open()
    assert mode_of(open_site.cache) == 0o400


@pytest.mark.spec("PUBLISH-10")
@pytest.mark.parametrize(("mode", "expected"), [(0o644, 0o404), (0o640, 0o400), (0o604, 0o400), (0o600, 0o400)])
def test_in_another_group_others_may_read_it_only_if_the_group_of_the_source_may_too(
    tmp_path: Path, mode: int, expected: int
) -> None:
    source, before = tmp_path / "source", os.umask(0)
    try:
        source.touch()
        source.chmod(mode)
        assert mode_like([source], READ_ONLY, source.stat().st_gid + 1) == expected
    finally:
        os.umask(before)


@pytest.mark.spec("PUBLISH-10")
def test_a_file_is_as_private_as_the_most_private_of_its_sources(tmp_path: Path) -> None:
    sources = [tmp_path / "a", tmp_path / "b"]
    for source, mode in zip(sources, (0o644, 0o640), strict=True):
        source.touch()
        source.chmod(mode)
    draft = Draft(tmp_path / "file")
    draft.make_readable_like(sources)
    draft.settle(0)
    draft.publish()
    assert mode_of(tmp_path / "file") & 0o007 == 0


@pytest.mark.spec("PUBLISH-11")
def test_folders_that_are_made_are_for_their_user_alone(tmp_path: Path, umask: int) -> None:
    site = make_small(tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    site.cache = there / "far" / "away" / "model.rwc"
    site.open_checked()
    assert [mode_of(folder) for folder in (there, there / "far", there / "far" / "away")] == [0o755, 0o700, 0o700]


@pytest.mark.spec("FILE-14", "PUBLISH-10")
@needs_root
@pytest.mark.parametrize("how", ["cut", "overwrite", "append"])
def test_whoever_is_not_root_cannot_change_a_published_file_by_accident(open_site: Site, how: str) -> None:
    def work() -> None:
        open_site.open()
        change: dict[str, Callable[[], object]] = {
            "cut": lambda: os.truncate(open_site.cache, 100),
            "overwrite": lambda: open_site.cache.open("wb"),
            "append": lambda: open_site.cache.open("ab"),
        }
        with pytest.raises(PermissionError, match="Permission denied"):
            change[how]()
        open_site.check(open_site.open())
        open_site.cache.unlink()
        assert open_site.open().outcome.reason == NO_FILE

    in_child(work, user=NOBODY)


@pytest.mark.spec("OPEN-10")
@needs_root
@pytest.mark.parametrize(("owner", "of_source", "warnings"), [(NOBODY, 0, 1), (0, NOBODY, 0), (NOBODY, NOBODY, 0)])
def test_a_file_of_another_user_is_used_with_one_warning(site: Site, owner: int, of_source: int, warnings: int) -> None:
    site.open()
    os.chown(site.cache, owner, owner)
    os.chown(site.source, of_source, of_source)
    assert site.open_checked().outcome.reason is None
    assert len(site.warned) == warnings
    assert all("belongs to another user" in warning for warning in site.warned)


# Waiting, and file systems that cannot lock.


class Patient:
    """A clock on which only waiting takes time."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.mark.spec("PUBLISH-12")
def test_who_waits_reports_it_at_once_and_after_five_seconds_names_the_draft_each_once(tmp_path: Path) -> None:
    clock, told = Patient(), list[tuple[float, object]]()
    draft = tmp_path / "file.tmp"
    patience = Patience(clock, lambda: told.append((clock.time, "waits")), lambda path: told.append((clock.time, path)))
    assert patience.wait(draft, lambda: clock.time > 1)
    assert told == [(0.0, "waits")]
    assert not patience.wait(draft, lambda: False)
    assert not patience.wait(draft, lambda: False)
    assert told[0] == (0.0, "waits")
    [(when, what)] = told[1:]
    assert (round(when, 1), what) == (5.0, draft)


@pytest.mark.spec("PUBLISH-12", "PUBLISH-3")
def test_who_has_waited_long_still_gets_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with Gate() as go_on:

        def hold(say: Callable[[str], None]) -> None:
            draft = Draft(path)
            say("locked")
            go_on.wait()
            draft.abandon()

        holder = Child(hold)
        assert holder.hear() == "locked"
        told: list[Path] = []

        def long_wait(draft: Path) -> None:
            told.append(draft)
            go_on.open()

        Draft(path, patience=Patience(Patient(), on_long_wait=long_wait)).abandon()
        assert told == [draft_path(path)]
        assert holder.end() == 0


@pytest.fixture(
    params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL], ids=errno.errorcode.__getitem__
)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a file system without locks, or a system that refuses them."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.spec("PUBLISH-13")
def test_without_locks_a_build_has_a_draft_of_its_own(site: Site, no_locks: None) -> None:
    seen: set[str] = set()
    site.step = lambda _: seen.update(site.folder)
    assert site.open_checked().outcome.reason == NO_FILE
    assert seen == {f"{site.cache.name}.{os.getpid()}.tmp"}
    assert site.folder == site.own_names
    assert site.open_checked().outcome.reason is None
    assert site.folder == site.own_names


@pytest.mark.spec("PUBLISH-13", "PUBLISH-1")
def test_without_locks_a_build_that_fails_leaves_nothing(site: Site, no_locks: None) -> None:
    def fail(_: str) -> None:
        raise KeyboardInterrupt

    site.step = fail
    with pytest.raises(KeyboardInterrupt):
        site.open()
    assert site.folder == set()


@pytest.mark.spec("PUBLISH-13", "PUBLISH-8")
@pytest.mark.parametrize("plant", PLANTED)
def test_without_locks_what_is_planted_at_the_name_of_a_draft_stays(site: Site, no_locks: None, plant: Plant) -> None:
    thesis = site.source.parent / "thesis"
    thesis.write_bytes(b"dear")
    draft = draft_path(site.cache, locks=False)
    plant(draft, thesis)
    before = looked_at(site.cache.parent), looked_at(thesis.parent)
    with pytest.raises(WeightCacheError, match=rf"cannot be written: .*{draft.name} is .*stays as it is"):
        site.open()
    assert (looked_at(site.cache.parent), looked_at(thesis.parent)) == before


@pytest.mark.spec("OPEN-5")
def test_a_folder_in_which_no_file_can_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    def work() -> None:
        os.chdir(gone)
        gone.rmdir()
        with pytest.raises(FileNotFoundError):
            Draft(Path("file"))

    in_child(work)


@pytest.mark.spec("PUBLISH-14")
@pytest.mark.parametrize("name", ["fsync", "fchmod", "posix_fallocate", "utime"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.__getitem__)
def test_a_service_that_is_refused_is_done_without(
    site: Site, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, refuse)
    assert site.open_checked().outcome.reason == NO_FILE
    assert site.folder == site.own_names
    assert site.open_checked().outcome.reason is None
