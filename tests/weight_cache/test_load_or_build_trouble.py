"""Specifies `refinfer.weight_cache.load_or_build` in trouble: places that cannot be written, sources that change."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from build_site import Site, come_to_rest, mapped_of, put
from children import NOBODY, in_child, needs_fork, needs_root
from file_contents import flip
from refinfer.clock import RealClock
from refinfer.errors import PackingError, WeightCacheError, WeightsError
from refinfer.weight_cache import publish
from refinfer.weight_cache.format import MAGIC, SourceFile
from refinfer.weight_cache.identity import side_path
from refinfer.weight_cache.load_or_build import Contents, load_or_build
from refinfer.weight_cache.mapped_file import NO_FILE, MappedFile
from refinfer.weight_cache.publish import Draft, discard, draft_path

NBYTES = 4 * 300 * 96
OTHER_WEIGHTS = "the model's weights changed"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


@pytest.fixture
def built(site: Site) -> Site:
    """A site with a good file."""
    assert site.open().outcome.reason == NO_FILE
    return site


# Places that cannot be written.


@pytest.fixture
def open_site() -> Iterator[Site]:
    """A site in a folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        yield Site.make(folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.spec("OPEN-1", "OPEN-5")
@needs_fork
@needs_root
def test_a_file_that_may_not_be_read_is_rebuilt_if_it_can_be_written(open_site: Site) -> None:
    site = open_site
    site.open()
    site.cache.chmod(0)
    site.cache.parent.chmod(0o777)

    def work() -> None:
        prepared = site.open()
        site.check_alone(prepared)
        assert prepared.outcome.reason == "it cannot be read: Permission denied"

    in_child(work, user=NOBODY)


@pytest.mark.spec("OPEN-5")
@needs_fork
@needs_root
def test_a_good_file_is_used_though_it_cannot_be_written(open_site: Site) -> None:
    site = open_site
    site.open()
    site.cache.parent.chmod(0o755)
    come_to_rest(site.source)
    site.open()  # now the side file is believed
    before = site.files

    def work(hashed: int) -> None:
        prepared = site.open()
        site.check_alone(prepared)
        assert (prepared.outcome.reason, prepared.outcome.packed_buffers, site.hashed) == (None, 0, hashed)
        assert prepared.outcome.packing_s is not None

    in_child(partial(work, 0), user=NOBODY)
    site.source.touch()
    in_child(partial(work, NBYTES), user=NOBODY)  # hashed, and used
    in_child(partial(work, NBYTES), user=NOBODY)  # and again: that cannot be noted
    assert site.files == before


@pytest.mark.spec("OPEN-5")
@needs_fork
@needs_root
@pytest.mark.parametrize("side", ["missing", "unreadable"])
def test_a_good_file_is_used_without_its_side_file_though_it_cannot_be_written(open_site: Site, side: str) -> None:
    site = open_site
    site.open()
    site.cache.parent.chmod(0o755)
    if side == "missing":
        side_path(site.cache).unlink()
    else:
        side_path(site.cache).chmod(0)

    def work() -> None:
        prepared = site.open()
        assert (prepared.outcome.reason, prepared.outcome.packed_buffers, prepared.outcome.packing_s) == (None, 0, None)
        assert site.hashed == NBYTES

    in_child(work, user=NOBODY)


def no_file(site: Site) -> None:
    site.cache.unlink()


def not_readable(site: Site) -> None:
    site.cache.chmod(0)


def damaged(site: Site) -> None:
    flip(site.cache, 20)


def outdated(site: Site) -> None:
    site.fill(1)


def incomplete(site: Site) -> None:
    site.names = (*site.names, "c")


def of_other_code(site: Site) -> None:
    site.fingerprint = bytes(32)


@pytest.mark.spec("OPEN-5")
@needs_fork
@needs_root
@pytest.mark.parametrize("spoil", [no_file, not_readable, damaged, outdated, incomplete, of_other_code])
def test_without_a_good_file_a_place_that_cannot_be_written_is_an_error(
    open_site: Site, spoil: Callable[[Site], None]
) -> None:
    site = open_site
    site.open()
    spoil(site)
    before = site.files

    def work() -> None:
        with pytest.raises(WeightCacheError, match=r"model\.rwc cannot be written: Permission denied"):
            site.open()
        assert not site.packed

    in_child(work, user=NOBODY)
    assert site.files == before


@pytest.mark.spec("OPEN-5")
@needs_fork
@needs_root
def test_a_folder_that_cannot_be_made_is_an_error(open_site: Site) -> None:
    site = open_site
    root = site.source.parent.parent

    def work() -> None:
        with pytest.raises(WeightCacheError, match="cannot be written: Permission denied"):
            site.open()

    in_child(work, user=NOBODY)
    assert {path.name for path in root.iterdir()} == {"model"}


@pytest.mark.spec("OPEN-5")
def test_a_folder_whose_place_is_taken_by_a_file_is_an_error(site: Site) -> None:
    site.cache.parent.write_bytes(b"in the way")
    with pytest.raises(WeightCacheError, match="cannot be written: "):
        site.open()
    assert site.cache.parent.read_bytes() == b"in the way"
    assert not site.packed


@pytest.mark.spec("OPEN-5")
def test_a_name_that_is_too_long_is_an_error(site: Site) -> None:
    site.cache = site.cache.with_name("m" * 300)
    with pytest.raises(WeightCacheError, match=f"cannot be written: {os.strerror(errno.ENAMETOOLONG)}"):
        site.open()
    assert not site.folder


@pytest.mark.spec("OPEN-5")
def test_a_folder_under_the_name_of_the_file_is_an_error(site: Site) -> None:
    site.cache.mkdir(parents=True)
    with pytest.raises(WeightCacheError, match="cannot be written: "):
        site.open()
    assert site.folder == {site.cache.name}


@pytest.mark.spec("OPEN-5", "OPEN-1")
@needs_fork
@needs_root
def test_a_folder_that_may_be_written_but_not_listed_takes_a_file(open_site: Site) -> None:
    site = open_site
    site.cache.parent.mkdir()
    os.chown(site.cache.parent, NOBODY, NOBODY)
    site.cache.parent.chmod(0o300)

    def work() -> None:
        assert site.open().outcome.reason == NO_FILE
        assert site.open().outcome.reason is None

    in_child(work, user=NOBODY)


@pytest.mark.spec("OPEN-5")
@needs_fork
@needs_root
def test_a_dead_draft_of_another_user_does_not_stop_a_build(open_site: Site) -> None:
    site = open_site
    site.cache.parent.mkdir()
    site.cache.parent.chmod(0o777)
    draft_path(site.cache).write_bytes(MAGIC + b"half")  # by root, who was killed

    def work() -> None:
        assert site.open().outcome.reason == NO_FILE

    in_child(work, user=NOBODY)


# Changes and failures while packing.


def files_at_start(site: Site, *, old: bool) -> dict[str, bytes]:
    """Return what the cache's folder holds when packing begins: the file of another model, or nothing."""
    if not old:
        return {}
    site.fill(9)
    site.open()
    site.fill(0)
    return site.files


every_start = pytest.mark.parametrize("old", [False, True], ids=["no file", "an old file"])
every_tensor = pytest.mark.parametrize("when", ["a", "norm"])


def in_place(site: Site) -> None:
    site.fill(1)


def by_renaming(site: Site) -> None:
    new = replace(site, source=site.source.with_name("new"))
    new.fill(1)
    new.source.replace(site.source)


def with_its_time_put_back(site: Site) -> None:
    stat = site.source.stat()
    flip(site.source, NBYTES - 1)
    os.utime(site.source, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def removing_it(site: Site) -> None:
    site.source.unlink()


def fail_at(site: Site, when: str, work: Callable[[], object]) -> None:
    """Let `work` be done once, while the tensor of that name is being packed."""
    done = False

    def step(name: str) -> None:
        nonlocal done
        if name == when and not done:
            done = True
            work()

    site.step = step


@pytest.mark.slow
@pytest.mark.spec("OPEN-6")
@every_start
@pytest.mark.parametrize("when", ["a", "norm"])
@pytest.mark.parametrize("change", [in_place, by_renaming, with_its_time_put_back, removing_it])
def test_sources_that_change_while_they_are_packed_are_noticed_and_nothing_is_published(
    site: Site, old: bool, when: str, change: Callable[[Site], None]
) -> None:
    files = files_at_start(site, old=old)
    put(site.cache.parent, files)
    come_to_rest(site.source)
    fail_at(site, when, partial(change, site))
    with pytest.raises(WeightsError, match=r"changed while they were packed|cannot be read"):
        site.open()
    assert site.files == files
    site.fill(2)
    site.check(site.open())


class Stop(Exception):  # noqa: N818 -- it is no error
    """Something nobody knows of."""


@pytest.mark.spec("OPEN-6", "OPEN-1")
@every_start
@every_tensor
@pytest.mark.parametrize("what", [KeyboardInterrupt, PackingError, WeightsError, Stop, MemoryError, SystemExit])
def test_packing_that_fails_or_is_interrupted_leaves_what_was_there(
    site: Site, old: bool, when: str, what: type[BaseException]
) -> None:
    files = files_at_start(site, old=old)
    put(site.cache.parent, files)

    def fail() -> None:
        raise what("why")

    fail_at(site, when, fail)
    with pytest.raises(what, match="why"):
        site.open()
    assert site.files == files
    prepared = site.open()
    site.check_alone(prepared)
    assert prepared.outcome.reason == (OTHER_WEIGHTS if files else NO_FILE)


@pytest.mark.spec("OPEN-6")
@every_start
@needs_fork
def test_ctrl_c_while_packing_leaves_what_was_there(site: Site, old: bool) -> None:
    files = files_at_start(site, old=old)
    put(site.cache.parent, files)

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fail_at(site, "b", lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            site.open()

    in_child(work)
    assert site.files == files


@pytest.mark.spec("OPEN-6")
def test_sources_that_cannot_be_read_leave_what_was_there(built: Site) -> None:
    before = built.files
    built.source.unlink()
    with pytest.raises(WeightsError, match="cannot be read: "):
        built.open()
    assert built.files == before


@pytest.mark.spec("OPEN-6")
def test_sources_that_change_between_their_digest_and_their_packing_are_noticed(site: Site) -> None:
    come_to_rest(site.source)

    def contents(sources: tuple[SourceFile, ...]) -> Contents:
        site.fill(1)
        return site.contents(sources)

    with pytest.raises(WeightsError, match="changed while they were packed"):
        load_or_build(site.cache, [site.source], contents, clock=RealClock())
    assert not site.files


# Discarding.


@pytest.mark.spec("OPEN-7")
def test_a_damaged_file_is_removed(built: Site) -> None:
    found = mapped_of(built.open())
    assert discard(built.cache, MAGIC, found.is_at)
    assert built.folder == {side_path(built.cache).name}
    prepared = built.open()
    built.check_alone(prepared)
    assert prepared.outcome.reason == NO_FILE


@pytest.mark.spec("OPEN-7")
@pytest.mark.parametrize("how", ["rebuilt", "replaced by a copy"])
def test_a_file_that_was_replaced_meanwhile_is_not_removed(built: Site, how: str) -> None:
    found = mapped_of(built.open())
    if how == "rebuilt":
        built.fill(1)
        built.open()
    else:
        copy = built.cache.with_name("copy")
        copy.write_bytes(built.cache.read_bytes())
        copy.replace(built.cache)
    before = built.files
    assert discard(built.cache, MAGIC, found.is_at)  # what was damaged is gone
    assert built.files == before


@pytest.mark.spec("OPEN-7")
def test_a_file_that_is_gone_already_is_gone(built: Site) -> None:
    found = mapped_of(built.open())
    built.cache.unlink()
    assert discard(built.cache, MAGIC, found.is_at)
    assert not built.cache.exists()


@pytest.mark.spec("OPEN-7")
def test_a_file_is_compared_and_removed_while_nobody_can_publish(built: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Watched(Draft):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            held.append(self)

    monkeypatch.setattr(publish, "Draft", Watched)
    found = mapped_of(built.open())

    def is_at(path: Path) -> bool:
        assert held[-1].temporary.exists()
        return found.is_at(path)

    assert discard(built.cache, MAGIC, is_at)
    assert not draft_path(built.cache).exists()


@pytest.mark.spec("OPEN-7", "OPEN-5")
@needs_fork
@needs_root
def test_a_damaged_file_that_cannot_be_removed_stays_and_the_caller_learns_it(open_site: Site) -> None:
    site = open_site
    site.open()
    site.cache.parent.chmod(0o755)
    before = site.files

    def work() -> None:
        found = MappedFile(site.cache)
        assert not discard(site.cache, MAGIC, found.is_at)

    in_child(work, user=NOBODY)
    assert site.files == before
