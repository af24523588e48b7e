"""Specifies `refinfer.weight_cache.publish` in a crash: a file is whole or not there, whatever is killed and lost."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_site import Site, nothing, put, taken
from children import Child, Gate, Say, watched
from refinfer.arrays import PAGE_BYTES
from refinfer.weight_cache import publish
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.publish import write_small_file
from starts import BEGINNINGS, LOST_FILE, NOTHING, OLD_FILE, before, make_small

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Nothing may wait for ever."""
    with watched():
        yield


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory if there is such, for tests that build hundreds of files."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def quick_site(quick_folder: Path) -> Site:
    return make_small(quick_folder)


def check_whole(path: Path, old: bytes | None) -> None:
    """Check the law: under the name is the old file, nothing if there was none, or a whole new one."""
    if path.exists() and path.read_bytes() != old:
        assert not list(MappedFile(path).problems())
    else:
        assert path.exists() == (old is not None)


BOUNDARIES = frozenset(
    {"open", "close", "utime", "mkdir", "flock", "madvise", "posix_fallocate", "ftruncate", "truncate"}
)
BOUNDARIES |= {"write", "pwrite", "fsync", "rename", "replace", "unlink", "remove"}


def watch(at_boundary: Callable[[], None]) -> None:
    """Call `at_boundary` before and after each system call that writes, and whenever a function of `publish` begins.

    So too when a step of packing begins.
    """
    here = {publish.__file__, nothing.__code__.co_filename}

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event.startswith("c_"):
            inside = getattr(called, "__name__", "") in BOUNDARIES
        else:
            inside = event == "call" and frame.f_code.co_filename in here
        if inside:
            at_boundary()

    sys.setprofile(profile)


def killed_at(boundary: int, work: Callable[[], object]) -> bool:
    """Do `work` in a process that kills itself at its boundary of that number; return whether it got there."""

    def killed(_: object) -> None:
        left = boundary

        def count() -> None:
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        watch(count)
        work()
        sys.setprofile(None)

    status = Child(killed).end()
    assert status in (0, -signal.SIGKILL)
    return status != 0


def kill_everywhere(folder: Path, files: dict[str, bytes], work: Callable[[], object]) -> Iterator[int]:
    """Yield after `work` was killed at each of its boundaries in turn, in a folder that held `files`."""
    for boundary in itertools.count():
        put(folder, files)
        if not killed_at(boundary, work):
            break
        yield boundary
    assert boundary > 25


@pytest.mark.slow
@pytest.mark.spec("PUBLISH-1", "PUBLISH-4")
@pytest.mark.parametrize("what", [NOTHING, OLD_FILE])
def test_a_build_killed_at_any_boundary_leaves_a_whole_file_or_none(quick_site: Site, what: str) -> None:
    files, seen = before(what, quick_site), set()
    old = files.get(quick_site.cache.name)
    for _ in kill_everywhere(quick_site.cache.parent, files, quick_site.open):
        check_whole(quick_site.cache, old)
        seen.add(quick_site.cache.exists() and quick_site.cache.read_bytes() != old)
        quick_site.check(quick_site.open())
        assert quick_site.folder == quick_site.own_names
    assert seen == {False, True}  # it was killed before and after the new file appeared


@pytest.mark.slow
@pytest.mark.spec("PUBLISH-4")
def test_after_a_kill_the_next_start_leaves_no_draft_of_a_file_that_had_been_lost(quick_site: Site) -> None:
    for boundary in kill_everywhere(quick_site.cache.parent, before(LOST_FILE, quick_site), quick_site.open):
        check_whole(quick_site.cache, None)
        quick_site.check(quick_site.open())
        assert quick_site.folder == quick_site.own_names, f"killed at boundary {boundary}"


def rebuild_for_ever(sites: Sequence[Site]) -> Callable[[object], None]:
    def work(_: object) -> None:
        while True:
            for site in sites:
                site.open()

    return work


def kill_at_random(site: Site, kills: int, builders: int, seed: int) -> None:
    """Kill builders, of two models in turn under one name, at random moments."""
    rng = random.Random(seed)
    sites = [site, site.with_model(1)]
    sites[0].open()
    for _ in range(kills):
        children = [Child(rebuild_for_ever(sites[:: rng.choice((1, -1))])) for _ in range(builders)]
        select.select([], [], [], rng.uniform(0, 0.05))  # the moment is what is left to chance
        for child in children:
            child.kill()
        assert not list(MappedFile(site.cache).problems())
        chosen = rng.choice(sites)
        chosen.check(chosen.open())
        assert site.folder == site.own_names


@pytest.mark.slow
@pytest.mark.spec("PUBLISH-1", "PUBLISH-4")
def test_a_build_killed_at_a_random_moment_leaves_a_whole_file(quick_site: Site) -> None:
    kill_at_random(quick_site, kills=30, builders=1, seed=0)


@pytest.mark.long
@pytest.mark.spec("PUBLISH-1", "PUBLISH-4")
def test_two_hundred_kills_of_builders_that_race_each_other_leave_a_whole_file(quick_site: Site) -> None:
    kill_at_random(quick_site, kills=67, builders=3, seed=1)


@pytest.mark.spec("PUBLISH-1", "PUBLISH-3")
def test_who_looks_all_the_time_while_models_take_turns_sees_whole_files_only(quick_site: Site) -> None:
    sites = [quick_site, quick_site.with_model(1)]
    sites[0].open()
    with Gate() as enough:

        def look(say: Say) -> None:
            found: set[bytes] = set()
            while not select.select([enough.reader], [], [], 0)[0]:
                mapped = MappedFile(quick_site.cache)
                found.add(mapped.header.model)
                assert not list(mapped.problems())
            say(str(len(found)))

        reader = Child(look)
        builders = [Child(rebuild_for_ever(sites)), Child(rebuild_for_ever(sites[::-1]))]
        for n in range(40):
            sites[n % 2].check(sites[n % 2].open())
        enough.open()
        for child in builders:
            child.kill()
        assert reader.hear() == "2"
        assert reader.end() == 0


# Power failures.


@dataclass(frozen=True)
class Instant:
    """What a power failure at some instant may leave: what each name may stand for, which bytes a file may have.

    Of each list the first is durable, the last is what is there now, and pages may come from any.
    """

    names: dict[str, list[int | None]]
    versions: dict[int, list[bytes]]

    def crash(self, name: Callable[[list[int | None]], int | None], page: Callable[[list[bytes]], bytes]) -> Any:
        """Return the files after a failure that leaves of each name and page what is chosen."""
        stands_for = {text: name(inodes) for text, inodes in self.names.items()}
        return {text: self._content(inode, page) for text, inode in stands_for.items() if inode is not None}

    def _content(self, inode: int, page: Callable[[list[bytes]], bytes]) -> bytes:
        versions = self.versions[inode]
        size = len(page(versions))
        starts = range(0, size, PAGE_BYTES)
        return b"".join(page(versions)[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0") for at in starts)[:size]


class Disk:
    """Looks at a folder before and after whatever makes bytes or names durable or changes names."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._held: list[IO[bytes]] = []  # so that no inode number is used twice
        self._names: dict[str, list[int | None]] = {}
        self._versions: dict[int, list[bytes]] = {}
        self.instants: list[Instant] = []
        self.log: list[str] = []
        self.look()
        self._names = {name: inodes[-1:] for name, inodes in self._names.items()}
        self._versions = {inode: versions[-1:] for inode, versions in self._versions.items()}
        self.instants.clear()  # what was there at first is durable
        for verb in ("replace", "rename", "unlink", "remove"):
            patch.setattr(os, verb, partial(self._watched, verb, getattr(os, verb)))
        patch.setattr(os, "fsync", partial(self._fsync, os.fsync))

    def look(self) -> None:
        there: dict[str, int] = {}
        for path in self._folder.iterdir():
            there[path.name] = inode = path.stat().st_ino
            if inode not in self._versions:
                self._held.append(path.open("rb"))
                self._versions[inode] = [b""]
            if (data := path.read_bytes()) != self._versions[inode][-1]:
                self._versions[inode].append(data)
        for name in {*self._names, *there}:
            inodes = self._names.setdefault(name, [None])
            if there.get(name) != inodes[-1]:
                inodes.append(there.get(name))
        copy = Instant({n: [*i] for n, i in self._names.items()}, {i: [*v] for i, v in self._versions.items()})
        self.instants.append(copy)

    def _watched(self, verb: str, real: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self.look()
        real(*args, **kwargs)
        self.log.append(verb)
        self.look()

    def _fsync(self, real: Callable[[int], None], descriptor: int) -> None:
        self.look()
        real(descriptor)
        inode = os.fstat(descriptor).st_ino
        if inode == self._folder.stat().st_ino:
            self.log.append("fsync of the folder")
            self._names = {name: inodes[-1:] for name, inodes in self._names.items()}
        else:
            self.log.append("fsync")
            self._versions[inode] = self._versions[inode][-1:]
        self.look()

    def close(self) -> None:
        for file in self._held:
            file.close()


def first(versions: list[Any]) -> Any:
    return versions[0]


def last(versions: list[Any]) -> Any:
    return versions[-1]


EXTREMES = [(name, page) for name in (first, last) for page in (first, last)]


def every_failure(instants: list[Instant], check: Callable[[dict[str, bytes], bool], None]) -> None:
    """Check what any failure leaves; `check` also gets whether it happened after the very end."""
    for instant in instants:
        for name, page in EXTREMES:
            check(instant.crash(name, page), instant is instants[-1])

    @given(st.sampled_from(range(len(instants))), st.randoms(use_true_random=False))
    def some_are_lost(at: int, chance: random.Random) -> None:
        check(instants[at].crash(chance.choice, chance.choice), at == len(instants) - 1)

    some_are_lost()


def record(folder: Path, work: Callable[[Disk], object]) -> Disk:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(folder, patch)
        work(disk)
        disk.look()
    disk.close()
    return disk


@pytest.mark.spec("PUBLISH-2")
@pytest.mark.parametrize("what", BEGINNINGS)
def test_whatever_is_lost_in_a_power_failure_a_file_is_whole_or_not_there(quick_site: Site, what: str) -> None:
    old = before(what, quick_site).get(quick_site.cache.name)
    disk = record(quick_site.cache.parent, lambda disk: replace(quick_site, step=lambda _: disk.look()).open())
    new = quick_site.cache.read_bytes()
    assert disk.log == ["fsync", "replace", "fsync of the folder"] * 2  # the file, then its side file
    assert any(len(v) > 1 for instant in disk.instants for v in instant.versions.values())

    def check(files: dict[str, bytes], ended: bool) -> None:
        put(quick_site.cache.parent, files)
        check_whole(quick_site.cache, old)
        if ended:
            assert quick_site.cache.read_bytes() == new  # it is durable once the call has returned
        quick_site.check(quick_site.open())

    every_failure(disk.instants, check)


@pytest.mark.spec("PUBLISH-2", "PUBLISH-7")
@pytest.mark.parametrize("old", [None, b"old" * 3000], ids=["no file", "an old file"])
def test_whatever_is_lost_in_a_power_failure_a_small_file_is_the_old_or_the_new(
    quick_folder: Path, old: bytes | None
) -> None:
    folder, new = quick_folder / "folder", b"new" * 5000
    put(folder, {} if old is None else {"small": old})
    disk = record(folder, lambda _: write_small_file(folder / "small", new))

    def check(files: dict[str, bytes], ended: bool) -> None:
        assert files.get("small") in ([new] if ended else [old, new])
        put(folder, files)
        write_small_file(folder / "small", b"newer")
        assert taken(folder) == {"small": b"newer"}

    every_failure(disk.instants, check)


@pytest.mark.spec("PUBLISH-1", "PUBLISH-4", "PUBLISH-7")
def test_a_file_whose_writer_is_killed_at_any_step_is_the_old_or_the_new_one(quick_folder: Path) -> None:
    folder, old, new, seen = quick_folder / "folder", b"old" * 3000, b"new" * 5000, set[bytes]()
    path = folder / "file"
    put(folder, {})
    write_small_file(path, new)
    assert taken(folder) == {"file": new}, "a file that was written is not there, or something else is"
    for step in itertools.count():
        put(folder, {"file": old})
        if not killed_at(step, lambda: write_small_file(path, new)):
            break
        assert path.exists(), f"when its writer was killed at step {step}, the file was gone"
        found = path.read_bytes()
        what = f"when its writer was killed at step {step}, the file was neither the old one nor the new one"
        assert found in (old, new), f"{what}: it had {len(found):,} bytes"
        seen.add(found)
        write_small_file(path, b"newer")
        there = ", ".join(sorted(taken(folder)))
        what = f"when its writer was killed at step {step}, the next writer did not write it, or left more: {there}"
        assert taken(folder) == {"file": b"newer"}, what
    assert seen == {old, new}, "the file does not change from the old one to the new one"


@pytest.mark.spec("PUBLISH-7")
@pytest.mark.parametrize("old", [None, b"old" * 3000], ids=["no file", "an old file"])
def test_a_small_file_killed_at_any_boundary_is_the_old_or_the_new(quick_folder: Path, old: bytes | None) -> None:
    folder, new, seen = quick_folder / "folder", b"new" * 5000, []
    path, files = folder / "small", {} if old is None else {"small": old}
    for _ in kill_everywhere(folder, files, lambda: write_small_file(path, new)):
        seen.append(path.read_bytes() if path.exists() else None)
        write_small_file(path, b"newer")
        assert taken(folder) == {"small": b"newer"}
    n_old = seen.index(new)
    assert seen == [old] * n_old + [new] * (len(seen) - n_old)
