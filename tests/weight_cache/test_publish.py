"""Specifies `refinfer.weight_cache.publish`: one process builds, others wait, readers keep what they have mapped."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest

from build_site import Site, come_to_rest, mapped_of, put, taken
from children import WATCHDOG_S, Child, Gate, Say, watched
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import RequestError, WeightsError
from refinfer.packing.layout import Bytes
from refinfer.process import umask
from refinfer.weight_cache import publish
from refinfer.weight_cache.format import MAGIC
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.ownership import READ_ONLY
from refinfer.weight_cache.publish import (
    Draft,
    Space,
    discard,
    draft_path,
    named_draft,
    remove_dead_draft,
    write_small_file,
)
from starts import BEGINNINGS, before, make_small
from words import require_equal, require_items

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Nothing may wait for ever."""
    with watched():
        yield


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_small(tmp_path)


def build_and_say(site: Site, start: Gate, go_on: Gate) -> Callable[[Say], None]:
    """Build if that is needed, and say so; else say that it waits; at last say the result."""

    def work(say: Say) -> None:
        begun = False

        def step(_: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                say("packs")
                go_on.wait()

        start.wait()
        here = replace(site, step=step)
        prepared = here.open(on_wait=lambda: say("waits"))
        here.check(prepared)
        say(f"packed {prepared.outcome.packed_buffers}, {hashlib.sha256(site.cache.read_bytes()).hexdigest()}")

    return work


def result(child: Child) -> tuple[int, str]:
    while (line := child.hear()) == "waits":  # once more, for another one that looks
        pass
    assert line.startswith("packed "), line
    assert child.end() == 0
    packed, digest = line.removeprefix("packed ").split(", ")
    return int(packed), digest


@pytest.mark.spec("PUBLISH-3")
@pytest.mark.parametrize("what", BEGINNINGS)
def test_of_processes_that_start_together_one_packs_and_the_others_load(site: Site, what: str) -> None:
    before(what, site)
    with Gate() as start, Gate() as go_on:
        children = [Child(build_and_say(site, start, go_on)) for _ in range(4)]
        start.open()
        assert sorted(child.hear() for child in children) == ["packs", "waits", "waits", "waits"]
        go_on.open()
        results = [result(child) for child in children]
    assert sorted(packed for packed, _ in results) == [0, 0, 0, 3]
    assert len({digest for _, digest in results}) == 1
    assert site.folder == site.own_names


@pytest.mark.spec("PUBLISH-3")
def test_a_draft_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    path, inside = tmp_path / "file", tmp_path / "inside"

    def work(number: int) -> Callable[[object], None]:
        def take_turns(_: object) -> None:
            start.wait()
            for n in range(60):
                draft = Draft(path)
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another one is inside
                draft.write(0, data := f"{number} {n}".encode())
                draft.settle(len(data))
                inside.unlink()
                if (number + n) % 3:
                    draft.publish()
                draft.abandon()
                remove_dead_draft(path, b"")

        return take_turns

    with Gate() as start:
        children = [Child(work(number)) for number in range(4)]
        start.open()
        assert [child.end() for child in children] == [0] * 4
    assert taken(tmp_path).keys() == {"file"}


@pytest.mark.spec("PUBLISH-4")
def test_when_a_builder_is_killed_one_of_those_who_wait_takes_over(site: Site) -> None:
    with Gate() as start, Gate() as go_on, Gate() as never:
        builder = Child(build_and_say(site, start, never))
        start.open()
        assert builder.hear() == "packs"
        waiting = [Child(build_and_say(site, start, go_on)) for _ in range(2)]
        assert [child.hear() for child in waiting] == ["waits", "waits"]
        go_on.open()
        assert draft_path(site.cache).exists()
        assert not site.cache.exists()
        builder.kill()
        packed = sorted(int(line.split()[1].rstrip(",")) for child in waiting for line in all_lines(child))
    assert packed == [0, 3]
    assert site.folder == site.own_names


def all_lines(child: Child) -> Iterator[str]:
    """Yield what a child says of its result, and wait for its end."""
    while line := child.hear():
        if line.startswith("packed"):
            yield line
    assert child.end() == 0


def frees_its_lock(draft: Path, work: Callable[[Callable[[], None]], object]) -> bool:
    """Return whether the lock of a draft is free after `work`, which calls its argument once the draft is there."""
    with Gate() as go_on, Gate() as enough:

        def say_and_wait(say: Say) -> None:
            def there() -> None:
                say("there")
                go_on.wait()

            kept = work(there)
            say("ended")
            enough.wait()
            del kept

        child = Child(say_and_wait)
        assert child.hear() == "there"
        with draft.open("rb") as waiting:
            with pytest.raises(BlockingIOError):
                fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
            go_on.open()
            assert child.hear() == "ended"
            try:
                fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            finally:
                enough.open()
                assert child.end() == 0
    return True


@pytest.mark.spec("PUBLISH-4")
def test_a_builder_that_fails_frees_its_lock_even_while_its_error_is_kept(site: Site) -> None:
    def fail(there: Callable[[], None]) -> Exception:
        def step(_: str) -> None:
            there()
            raise WeightsError("no more weights")

        try:
            replace(site, step=step).open()
        except WeightsError as error:
            return error  # its traceback holds the frames, and these what was reserved
        raise AssertionError

    assert frees_its_lock(draft_path(site.cache), fail)


@pytest.mark.spec("PUBLISH-4")
def test_a_draft_that_somebody_removes_at_the_last_moment_is_abandoned_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, is_at = Draft(tmp_path / "file"), publish._is_at

    def remove(path: Path, file: IO[bytes]) -> bool:
        try:
            return is_at(path, file)
        finally:
            path.unlink()

    monkeypatch.setattr(publish, "_is_at", remove)
    draft.abandon()
    assert draft._file.closed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("PUBLISH-3", "PUBLISH-4")
@pytest.mark.parametrize("end", [Draft.publish, Draft.abandon])
def test_the_end_of_a_draft_frees_its_lock_even_while_a_mapping_of_it_lives(
    tmp_path: Path, end: Callable[[Draft], None]
) -> None:
    def keep_the_mapping(there: Callable[[], None]) -> Space:
        draft = Draft(tmp_path / "file")
        space = draft.grow(0, PAGE_BYTES)
        there()
        draft.settle(PAGE_BYTES)
        end(draft)
        return space

    assert frees_its_lock(tmp_path / "file.tmp", keep_the_mapping)


def is_locked(file: IO[bytes]) -> bool:
    """Return whether the lock of a file is taken; if it is not, take it until the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def settled(path: Path, data: bytes = b"whole") -> Draft:
    draft = Draft(path)
    draft.write(0, data)
    draft.settle(len(data))
    return draft


@pytest.mark.spec("PUBLISH-3", "PUBLISH-15")
def test_those_who_wait_get_the_lock_only_when_the_file_and_what_comes_after_it_are_there(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", list[bytes]()
    draft = settled(path)

    def then() -> None:
        assert path.exists(), "when `then` runs, the draft does not have its name yet"
        with path.open("rb") as file:
            assert is_locked(file), "when `then` runs, the lock is released already"
        seen.append(path.read_bytes())

    draft.then = then
    draft.publish()
    require_items(seen, [b"whole"], "content that `then` has seen")
    with path.open("rb") as file:
        assert not is_locked(file), "after `publish` the file is still locked"


@pytest.mark.spec("PUBLISH-3", "PUBLISH-4")
@pytest.mark.parametrize("end", ["publish", "abandon"])
def test_the_end_of_a_draft_releases_its_lock_although_the_file_stays_mapped(tmp_path: Path, end: str) -> None:
    draft = Draft(tmp_path / "file")
    space = draft.grow(0, PAGE_BYTES)
    draft.settle(PAGE_BYTES)
    with draft.temporary.open("rb") as waiting:
        assert is_locked(waiting), "a draft that is being written is not locked"
        getattr(draft, end)()
        assert not is_locked(waiting), f"after `{end}` the draft is still locked: closing is not unlocking"
    del space


@pytest.mark.spec("PUBLISH-10", "PUBLISH-15")
def test_a_settled_draft_has_its_size_and_its_mode(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.touch(0o600)
    for files, sources, mode in (("no source file", [], READ_ONLY & ~umask()), ("a private one", [private], 0o400)):
        draft = Draft(tmp_path / "file")
        draft.make_readable_like(sources)
        draft.write(0, b"whole, and a rest that is cut off")
        draft.settle(5)
        found = draft.temporary.stat()
        require_equal(found.st_size, 5, "the number of bytes of the draft after `settle(5)`")
        what = f"the mode of the draft after `settle`, with {files},"
        require_equal(f"{stat.S_IMODE(found.st_mode):04o}", f"{mode:04o}", what)
        draft._close()
        draft.temporary.unlink()


@pytest.mark.spec("PUBLISH-1", "PUBLISH-15")
def test_publishing_gives_the_draft_its_name_in_place_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"first", b"second"):
        draft = settled(path, data)
        if path.exists():
            require_equal(path.read_bytes(), b"first", "before `publish`, the content of the file")
        draft.publish()
        require_equal(sorted(taken(tmp_path)), ["file"], "after `publish`, the list of names in the folder")
        require_equal(path.read_bytes(), data, "after `publish`, the content of the file")


@pytest.mark.spec("PUBLISH-15")
def test_what_runs_before_a_draft_gets_its_name_may_refuse_that(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"dear")
    draft = settled(path)

    def refuse() -> None:
        raise RequestError("this file is dear to somebody")

    draft.before = refuse
    with pytest.raises(RequestError, match="dear to somebody"):
        draft.publish()
    require_equal(path.read_bytes(), b"dear", "after `before` has refused, the content of the file")
    draft.abandon()


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except OSError as error:
        return str(error)
    return "no error"


def abandon(draft: Draft, what: str) -> None:
    """Abandon a draft, which `what` names, and say in words that this must not be an error."""
    try:
        draft.abandon()
    except (OSError, ValueError) as error:
        said = f"`abandon` of {what} must not fail: {type(error).__name__}: {error}"
        raise AssertionError(said).with_traceback(error.__traceback__) from None


@pytest.mark.spec("PUBLISH-4", "PUBLISH-15")
def test_only_the_draft_itself_is_published_or_removed(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "a")
    for what in ("a new draft", "a draft that was abandoned before, and whose name is gone,"):
        abandon(draft, what)
        assert not taken(tmp_path), "after `abandon` the draft is still there"
    draft = settled(tmp_path / "b")
    draft.publish()
    abandon(draft, "a draft that was published, and whose old name is gone,")
    assert set(taken(tmp_path)) == {"b"}, "`abandon` after `publish` has removed the published file"

    draft = settled(tmp_path / "c")
    draft.temporary.unlink()
    draft.temporary.write_bytes(b"theirs")
    error = error_of(draft.publish)
    what = "a file that another process has put in the draft's place"
    assert "no longer the draft that was written" in error, f"`publish` of {what} ends with {error}"
    abandon(draft, "a draft whose name is another file's")
    there = taken(tmp_path).get("c.tmp")
    require_equal(there, b"theirs", "after `abandon`, the content of a file that has the draft's name but is another's")

    def fail() -> None:
        raise OSError(errno.ENOSPC, "no room for the side file")

    draft = settled(tmp_path / "d")
    draft.then = fail
    with pytest.raises(OSError, match="no room for the side file"):
        draft.publish()
    assert "d" in taken(tmp_path), "when `then` runs, the draft does not have its name yet"
    abandon(draft, "a draft that has its new name, although publishing it failed after that,")
    draft = settled(tmp_path / "d")
    draft.then = fail
    with pytest.raises(OSError, match="no room for the side file"):
        draft.publish()
    later = Draft(tmp_path / "d")  # the draft's name is free, and so another one begins
    abandon(draft, "a draft whose name is another builder's")
    assert "d.tmp" in taken(tmp_path), "`abandon` has removed the draft of the next builder, which has the same name"
    later.abandon()


@pytest.mark.spec("PUBLISH-2", "PUBLISH-15")
def test_a_draft_is_durable_before_it_gets_its_name_and_the_name_before_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, steps = Draft(tmp_path / "file"), list[str]()
    made_durable = "the bytes are made durable"

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if os.path.samestat(found, tmp_path.stat()):
            steps.append("the name is made durable")
            return
        if steps[-1:] and steps[-1].startswith(made_durable):  # twice does no harm
            steps.pop()
        is_settled = found.st_size == 5 and not found.st_mode & 0o222
        steps.append(made_durable if is_settled else f"{made_durable} without the size or the mode")

    def rename(real: Callable[..., None], *args: Any) -> None:
        real(*args)
        steps.append("the draft gets its name")

    monkeypatch.setattr(os, "fsync", fsync)
    for verb in ("replace", "rename"):
        monkeypatch.setattr(os, verb, partial(rename, getattr(os, verb)))
    draft.before, draft.then = lambda: steps.append("`before` runs"), lambda: steps.append("`then` runs")
    draft.write(0, b"whole, and a rest that is cut off")
    draft.settle(5)
    draft.publish()
    order = [made_durable, "`before` runs", "the draft gets its name", "the name is made durable", "`then` runs"]
    require_items(steps, order, "step")


@pytest.mark.spec("PUBLISH-1", "PUBLISH-3")
def test_who_cannot_make_its_new_name_durable_leaves_the_next_draft_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, later = tmp_path / "file", os.fsync, []

    def fail_on_the_folder(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            monkeypatch.setattr(os, "fsync", real)
            later.append(Draft(path))  # the name is free now, and so another one begins
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_the_folder)
    with pytest.raises(OSError, match="Input/output error"):
        write_small_file(path, b"whole")
    there = later[0].temporary.exists()
    later[0].abandon()
    assert there
    assert taken(tmp_path) == {"file": b"whole"}


@pytest.mark.spec("PUBLISH-4")
def test_a_start_that_finds_a_good_file_removes_a_dead_draft_next_to_it(site: Site) -> None:
    come_to_rest(site.source)
    site.open()
    draft_path(site.cache).write_bytes(MAGIC + b"half")
    site.check(prepared := site.open())
    assert prepared.outcome.reason is None
    assert site.folder == site.own_names


@pytest.mark.spec("PUBLISH-4", "CACHE-2")
def test_what_a_killed_builder_had_written_is_not_in_the_file_that_the_next_one_builds(site: Site) -> None:
    """What is not written is zeros, such as the padding of a matrix."""
    put(site.cache.parent, {draft_path(site.cache).name: MAGIC + b"\xff" * 1_000_000})
    assert site.open_checked().outcome.packed_buffers == 3


@pytest.mark.spec("OPEN-9")
def test_a_persons_file_that_appears_while_its_place_is_built_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "thesis"
    draft = named_draft(path)
    draft.write(0, MAGIC)
    draft.settle(len(MAGIC))
    path.write_bytes(b"dear")
    with pytest.raises(RequestError, match="is not a weight cache, and stays as it is"):
        draft.publish()
    draft.abandon()
    assert taken(tmp_path) == {"thesis": b"dear"}


@pytest.mark.spec("OPEN-9")
def test_at_a_persons_file_no_draft_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "thesis"
    path.write_bytes(b"dear")
    with pytest.raises(RequestError, match="is not a weight cache, and stays as it is"):
        named_draft(path)
    assert taken(tmp_path) == {"thesis": b"dear"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("PUBLISH-15")
def test_a_draft_that_was_published_or_abandoned_leaves_no_descriptor(tmp_path: Path) -> None:
    def descriptors() -> set[str]:
        return {path.name for path in Path("/proc/self/fd").iterdir()}

    before = descriptors()
    settled(tmp_path / "file").publish()
    settled(tmp_path / "file").abandon()
    assert descriptors() == before


@pytest.mark.spec("PUBLISH-13", "PUBLISH-3")
def test_a_disk_that_fails_while_a_draft_is_locked_is_not_one_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Draft(tmp_path / "file")


@pytest.mark.spec("PUBLISH-13")
def test_without_locks_a_draft_that_another_removes_meanwhile_hinders_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_at = publish._is_at

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def remove(path: Path, file: IO[bytes]) -> bool:
        try:
            return is_at(path, file)
        finally:
            path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        patch.setattr(publish, "_is_at", remove)
        draft = Draft(tmp_path / "file")
    draft.write(0, b"whole")
    draft.settle(5)
    draft.publish()
    assert taken(tmp_path) == {"file": b"whole"}


@pytest.mark.spec("FILE-11")
@pytest.mark.parametrize("nbytes", [PAGE_BYTES, 1 << 20, 5 << 19], ids=["a page", "1 MiB", "2.5 MiB"])
def test_clearing_a_part_of_a_draft_makes_zeros_of_it_and_leaves_what_is_around(tmp_path: Path, nbytes: int) -> None:
    path, start, end = tmp_path / "file", PAGE_BYTES, PAGE_BYTES + nbytes
    draft = Draft(path)
    draft.write(0, b"\xff" * (end + PAGE_BYTES))
    draft.clear(start, end)
    draft.settle(end + PAGE_BYTES)
    draft.publish()
    assert path.read_bytes() == b"\xff" * start + bytes(nbytes) + b"\xff" * PAGE_BYTES


@pytest.mark.spec("PUBLISH-3", "PUBLISH-4")
def test_a_start_that_finds_a_good_file_leaves_a_live_draft_to_its_builder(site: Site) -> None:
    come_to_rest(site.source)
    site.open()
    other = site.with_model(1)
    with Gate() as start, Gate() as go_on:
        builder = Child(build_and_say(other, start, go_on))
        start.open()
        assert builder.hear() == "packs"
        site.check(prepared := site.open())
        assert prepared.outcome.reason is None
        assert draft_path(site.cache).exists()
        go_on.open()
        assert result(builder)[0] == 3
    site.check(prepared)  # its own file, though the name is another's now
    assert site.folder == site.own_names


@pytest.mark.spec("PUBLISH-4", "PUBLISH-3")
def test_a_damaged_file_is_discarded_only_after_whoever_builds_has_ended(site: Site) -> None:
    damaged = site.open()
    other = site.with_model(1)
    with Gate() as start, Gate() as go_on:
        builder = Child(build_and_say(other, start, go_on))
        start.open()
        assert builder.hear() == "packs"
        remover = Child(lambda say: say(str(discard(site.cache, MAGIC, mapped_of(damaged).is_at))))
        assert not select.select([remover.lines], [], [], 0.05)[0]
        go_on.open()
        assert result(builder)[0] == 3
        assert remover.hear() == "True"
        assert remover.end() == 0
    other.check(prepared := other.open())
    assert prepared.outcome.reason is None


def sum_of(data: Bytes) -> str:
    return hashlib.sha256(data.data).hexdigest()


@pytest.mark.spec("PUBLISH-5")
def test_a_reader_keeps_its_bytes_while_the_file_is_replaced_cut_and_removed(site: Site) -> None:
    first_built = site.open()
    sums = [sum_of(first_built.provider[key]) for key in first_built.provider]
    first_built.provider.delete_cache()
    with Gate() as replaced, Gate() as removed:

        def read(say: Say) -> None:
            mapped = MappedFile(site.cache)

            def now() -> list[str]:
                assert not list(mapped.problems())
                return [sum_of(mapped.bytes(entry.offset, entry.padded_nbytes)) for entry in mapped.index.entries]

            assert now() == sums
            for gate in (replaced, removed):
                say("reads")
                gate.wait()
                assert now() == sums
                assert not mapped.is_at(site.cache)

        reader = Child(read)
        assert reader.hear() == "reads"
        other = site.with_model(1)
        other.check(prepared := other.open())
        assert prepared.outcome.reason == "the model's weights changed"
        replaced.open()
        assert reader.hear() == "reads"
        site.cache.unlink()
        removed.open()
        assert reader.end() == 0


# Small files.


@pytest.mark.spec("PUBLISH-7")
def test_who_reads_a_small_file_while_it_is_written_finds_one_or_the_other(tmp_path: Path) -> None:
    path, contents = tmp_path / "small", [b"a" * 9000, b"b" * 7000]
    write_small_file(path, contents[0])

    def write_for_ever(_: object) -> None:
        while True:
            for data in contents:
                write_small_file(path, data)

    writers = [Child(write_for_ever), Child(write_for_ever)]
    found: list[bytes] = []
    deadline = time.monotonic() + WATCHDOG_S
    while len(found) < 2000 or len(set(found)) < 2:
        found.append(path.read_bytes())
        assert time.monotonic() < deadline
    for child in writers:
        child.kill()
    assert set(found) == set(contents)


@pytest.mark.spec("PUBLISH-7")
def test_a_small_file_in_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_small_file(tmp_path / "none" / "small", b"")
    assert not taken(tmp_path)
