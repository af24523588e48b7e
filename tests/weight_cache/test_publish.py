"""Specifies `refinfer.weight_cache.publish`: a file is whole or not there, whoever is killed and whatever is lost."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import itertools
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, ClassVar, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES, Float32Array
from refinfer.errors import WeightCacheError, WeightsError
from refinfer.packing.formats import Bytes, layout_of
from refinfer.trace import RealClock
from refinfer.weight_cache import publish
from refinfer.weight_cache.directory import discard
from refinfer.weight_cache.file import MappedFile
from refinfer.weight_cache.format import Provenance, SourceFile
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.load_or_build import Contents, Listener, Opened, load_or_build
from refinfer.weight_cache.packers import (
    matrix_key,
    nbytes_of,
    pack_into,
    packer_fingerprint,
    rows_key,
    vectors_key,
)
from refinfer.weight_cache.publish import Draft, draft_path, remove_dead_draft, write_small_file
from refinfer.weight_cache.sources import side_path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")

N, K = 48, 40
WATCHDOG_S = 40


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Nothing may wait for ever; children inherit the handler, but not the timer."""

    def bark(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(WATCHDOG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    for child in Child.living.copy():  # of a test that failed
        os.kill(child.pid, signal.SIGKILL)
        child.end()


def nothing() -> None:
    """Do nothing."""


def weights(seed: int) -> Float32Array:
    return np.random.default_rng(seed).standard_normal((N, K), np.float32)


@dataclass(frozen=True)
class Site:
    """A model's file and where its cache file belongs; `step` is called while packing."""

    source: Path
    cache: Path
    step: Callable[[], None] = nothing

    def tensors(self, digest: bytes) -> dict[PackKey, Float32Array]:
        w = np.fromfile(self.source, np.float32).reshape(N, K)
        return {
            matrix_key(layout_of("int8", N, K), WeightId(digest, "matrix")): w,
            rows_key((N, K), "f32", WeightId(digest, "table")): w,
            vectors_key(N, WeightId(digest, "norm")): w[:, 0].copy(),
        }

    def pack(self, w: Float32Array, key: PackKey, buffer: Bytes) -> Iterator[int]:
        self.step()
        yield from pack_into(w, key, buffer)
        self.step()

    def contents(self, sources: tuple[SourceFile, ...]) -> Contents:
        packs = {key: partial(self.pack, w, key) for key, w in self.tensors(sources[0].digest).items()}
        return Contents(Provenance("model", "int8", sources, packer_fingerprint("int8")), dict(packs))

    def open(self, on_wait: Callable[[], None] = nothing) -> Opened:
        return load_or_build(
            self.cache, [self.source], self.contents, clock=RealClock(), listener=Listener(on_wait=on_wait)
        )

    def check(self, opened: Opened) -> None:
        """Check that every buffer of the file has the bytes that packing its tensor gives."""
        assert not list(opened.provider.mapped.problems())
        for key, w in self.tensors(hashlib.sha256(self.source.read_bytes()).digest()).items():
            expected = np.zeros(nbytes_of(key), np.uint8)
            list(pack_into(w, key, expected))
            assert opened.provider[key].tobytes() == expected.tobytes()

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.cache.parent.iterdir()}

    @property
    def own_names(self) -> set[str]:
        return {self.cache.name, side_path(self.cache).name}

    def with_model(self, seed: int) -> Site:
        source = self.source.with_name(f"{seed}.safetensors")
        source.write_bytes(weights(seed).tobytes())
        return replace(self, source=source)


def make(folder: Path) -> Site:
    (folder / "model").mkdir()
    (folder / "cache").mkdir()
    return Site(folder / "model" / "source", folder / "cache" / "model.rwc").with_model(0)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make(tmp_path)


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory where there is such, for tests that build hundreds of files."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def quick_site(quick_folder: Path) -> Site:
    return make(quick_folder)


def at_rest(site: Site) -> Site:
    """Wait until the clock of the file system has left the tick in which the model was written."""
    ctime = site.source.stat().st_ctime_ns
    tick = 110_000_000 if ctime % 1_000_000_000 else 2_100_000_000
    probe, deadline = site.source.with_name("probe"), time.monotonic() + WATCHDOG_S
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_mtime_ns > ctime + tick:
            probe.unlink()
            return site
        assert time.monotonic() < deadline


def _say(writer: int, text: str) -> None:
    os.write(writer, f"{text}\n".encode())


class Child:
    """A process of its own, forked: does `work`, which may tell its parent lines, and ends; a watchdog ends it too."""

    living: ClassVar[set[Child]] = set()

    def __init__(self, work: Callable[[Callable[[str], None]], object]) -> None:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # BLAS has threads; the child calls none of it
            self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.alarm(WATCHDOG_S)
                os.close(reader)
                work(partial(_say, writer))
                status = 0
            except BaseException:  # noqa: BLE001, RUF100 -- the child must not return into pytest
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        os.close(writer)
        self._lines: IO[str] = os.fdopen(reader)
        self._status: int | None = None
        self.living.add(self)

    def hear(self) -> str:
        """Return the next line that the child says, or "" at its end."""
        return self._lines.readline().rstrip("\n")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL

    def end(self) -> int:
        """Wait for the end; return the exit status, or minus the signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self._lines.close()
            self.living.remove(self)
        return self._status


class Gate:
    """Several processes wait before it until it is opened."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def wait(self) -> None:
        assert os.read(self._reader, 1)

    def open(self) -> None:
        os.write(self._writer, bytes(64))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reader)
        os.close(self._writer)


def sum_of(data: Bytes) -> str:
    return hashlib.sha256(data.data).hexdigest()


def put(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder hold exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def taken(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_whole(path: Path, old: bytes | None) -> None:
    """Check the law: under the name is the old file, or nothing where there was none, or a whole new one."""
    if path.exists() and path.read_bytes() != old:
        assert not list(MappedFile(path).problems())
    else:
        assert path.exists() == (old is not None)


# What a folder may hold before a build.
NO_FILE, OLD_FILE, DEAD_DRAFT, LOST_FILE = "no file", "an old file", "a dead draft", "a lost file"


def before(what: str, site: Site) -> dict[str, bytes]:
    """Return the files of a cache folder before a build that begins with `what`."""
    folder = site.cache.parent
    put(folder, {})
    if what == OLD_FILE:  # of another model, with a side file of its own
        site.with_model(1).open()
    elif what == DEAD_DRAFT:  # whole, and longer than the new one will be
        site.with_model(1).open()
        site.cache.rename(draft_path(site.cache))
        side_path(site.cache).unlink()
        with draft_path(site.cache).open("ab") as file:
            file.write(bytes(range(256)) * 64)
    elif what == LOST_FILE:  # the side file is still there, and true
        at_rest(site).open()
        site.cache.unlink()
    return taken(folder)


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
    """Do `work` in a process that kills itself at its boundary of that number; tell whether it got there."""

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


every_start = pytest.mark.parametrize("what", [NO_FILE, OLD_FILE, DEAD_DRAFT])


@pytest.mark.spec("PUBLISH-1", "PUBLISH-4")
@pytest.mark.parametrize("what", [NO_FILE, OLD_FILE])
def test_a_build_killed_at_any_boundary_leaves_a_whole_file_or_none(quick_site: Site, what: str) -> None:
    files, seen = before(what, quick_site), set()
    old = files.get(quick_site.cache.name)
    for _ in kill_everywhere(quick_site.cache.parent, files, quick_site.open):
        check_whole(quick_site.cache, old)
        seen.add(quick_site.cache.exists() and quick_site.cache.read_bytes() != old)
        quick_site.check(quick_site.open())
        assert quick_site.names == quick_site.own_names
    assert seen == {False, True}  # it was killed before and after the new file appeared


@pytest.mark.spec("PUBLISH-4")
def test_after_a_kill_the_next_start_leaves_no_draft_behind_where_the_file_had_been_lost(quick_site: Site) -> None:
    for boundary in kill_everywhere(quick_site.cache.parent, before(LOST_FILE, quick_site), quick_site.open):
        check_whole(quick_site.cache, None)
        quick_site.check(quick_site.open())
        assert quick_site.names == quick_site.own_names, f"killed at boundary {boundary}"


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
        assert site.names == site.own_names


@pytest.mark.spec("PUBLISH-1", "PUBLISH-4")
def test_a_build_killed_at_a_random_moment_leaves_a_whole_file(quick_site: Site) -> None:
    kill_at_random(quick_site, kills=30, builders=1, seed=0)


@pytest.mark.slow
@pytest.mark.spec("PUBLISH-1", "PUBLISH-4")
def test_two_hundred_kills_of_builders_that_race_each_other_leave_a_whole_file(quick_site: Site) -> None:
    kill_at_random(quick_site, kills=67, builders=3, seed=1)


@pytest.mark.spec("PUBLISH-1", "PUBLISH-3")
def test_who_looks_all_the_time_while_models_take_turns_sees_whole_files_only(quick_site: Site) -> None:
    sites = [quick_site, quick_site.with_model(1)]
    sites[0].open()
    with Gate() as enough:

        def look(say: Callable[[str], None]) -> None:
            found: set[bytes] = set()
            while not select.select([enough._reader], [], [], 0)[0]:
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
    """Check what any failure leaves; told also whether it happened after the very end."""
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
@every_start
def test_whatever_is_lost_in_a_power_failure_a_file_is_whole_or_not_there(quick_site: Site, what: str) -> None:
    old = before(what, quick_site).get(quick_site.cache.name)
    disk = record(quick_site.cache.parent, lambda disk: replace(quick_site, step=disk.look).open())
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


# Several processes.


def build_and_say(site: Site, start: Gate, go_on: Gate) -> Callable[[Callable[[str], None]], None]:
    """Build where that is needed, and say so; else say that one waits; then say what came of it."""

    def work(say: Callable[[str], None]) -> None:
        begun = False

        def step() -> None:
            nonlocal begun
            if not begun:
                begun = True
                say("packs")
                go_on.wait()

        start.wait()
        here = replace(site, step=step)
        opened = here.open(on_wait=lambda: say("waits"))
        here.check(opened)
        say(f"packed {opened.packed_buffers}, {hashlib.sha256(site.cache.read_bytes()).hexdigest()}")

    return work


def result(child: Child) -> tuple[int, str]:
    while (line := child.hear()) == "waits":  # once more, behind another one that looks
        pass
    assert line.startswith("packed "), line
    assert child.end() == 0
    packed, digest = line.removeprefix("packed ").split(", ")
    return int(packed), digest


@pytest.mark.spec("PUBLISH-3")
@pytest.mark.parametrize("what", [NO_FILE, OLD_FILE, DEAD_DRAFT])
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
    assert site.names == site.own_names


@pytest.mark.spec("PUBLISH-3")
def test_a_draft_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    path, inside = tmp_path / "file", tmp_path / "inside"

    def work(number: int) -> Callable[[object], None]:
        def take_turns(_: object) -> None:
            start.wait()
            for n in range(60):
                draft = Draft(path)
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another one is inside
                draft.write(0, data := f"{number} {n}".encode())
                draft.settle(len(data))
                inside.unlink()
                if (number + n) % 3:
                    draft.publish()
                draft.abandon()
                remove_dead_draft(path)

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
    assert site.names == site.own_names


def all_lines(child: Child) -> Iterator[str]:
    """Yield what a child says of its result, and wait for its end."""
    while line := child.hear():
        if line.startswith("packed"):
            yield line
    assert child.end() == 0


def frees_its_lock(draft: Path, work: Callable[[Callable[[], None]], object]) -> bool:
    """Tell whether the lock of a draft is free after `work`, which calls its argument once the draft is there."""
    with Gate() as go_on, Gate() as enough:

        def say_and_wait(say: Callable[[str], None]) -> None:
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
        def step() -> None:
            there()
            raise WeightsError("no more weights")

        try:
            replace(site, step=step).open()
        except WeightsError as error:
            return error  # its traceback holds the frames, and these what was reserved
        raise AssertionError

    assert frees_its_lock(draft_path(site.cache), fail)


@pytest.mark.spec("PUBLISH-3", "PUBLISH-4")
@pytest.mark.parametrize("end", [Draft.publish, Draft.abandon])
def test_the_end_of_a_draft_frees_its_lock_even_while_a_mapping_of_it_lives(
    tmp_path: Path, end: Callable[[Draft], None]
) -> None:
    def keep_the_mapping(there: Callable[[], None]) -> memoryview:
        draft = Draft(tmp_path / "file")
        draft.secure(0, PAGE_BYTES)
        mapping = draft.map(0, PAGE_BYTES)
        there()
        draft.settle(PAGE_BYTES)
        end(draft)
        return mapping

    assert frees_its_lock(tmp_path / "file.tmp", keep_the_mapping)


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
def test_a_start_that_finds_a_good_file_removes_a_dead_draft_beside_it(site: Site) -> None:
    at_rest(site).open()
    draft_path(site.cache).write_bytes(b"half")
    site.check(opened := site.open())
    assert opened.reason is None
    assert site.names == site.own_names


@pytest.mark.spec("PUBLISH-3", "PUBLISH-4")
def test_a_start_that_finds_a_good_file_leaves_a_live_draft_to_its_builder(site: Site) -> None:
    at_rest(site).open()
    other = site.with_model(1)
    with Gate() as start, Gate() as go_on:
        builder = Child(build_and_say(other, start, go_on))
        start.open()
        assert builder.hear() == "packs"
        site.check(opened := site.open())
        assert opened.reason is None
        assert draft_path(site.cache).exists()
        go_on.open()
        assert result(builder)[0] == 3
    site.check(opened)  # its own file, though the name is another's now
    assert site.names == site.own_names


@pytest.mark.spec("PUBLISH-4", "PUBLISH-3")
def test_a_damaged_file_is_discarded_only_after_whoever_builds_has_ended(site: Site) -> None:
    damaged = site.open()
    other = site.with_model(1)
    with Gate() as start, Gate() as go_on:
        builder = Child(build_and_say(other, start, go_on))
        start.open()
        assert builder.hear() == "packs"
        remover = Child(lambda say: say(str(discard(site.cache, damaged.provider.mapped.is_at))))
        assert not select.select([remover._lines], [], [], 0.05)[0]
        go_on.open()
        assert result(builder)[0] == 3
        assert remover.hear() == "True"
        assert remover.end() == 0
    other.check(opened := other.open())
    assert opened.reason is None


@pytest.mark.spec("PUBLISH-5")
def test_a_reader_keeps_its_bytes_while_the_file_is_replaced_cut_and_removed(site: Site) -> None:
    first_built = site.open()
    sums = [sum_of(first_built.provider[key]) for key in first_built.provider]
    first_built.provider.delete_cache()
    with Gate() as replaced, Gate() as removed:

        def read(say: Callable[[str], None]) -> None:
            mapped = MappedFile(site.cache)

            def now() -> list[str]:
                assert not list(mapped.problems())
                return [sum_of(mapped.bytes(entry.offset, entry.nbytes)) for entry in mapped.index.entries]

            assert now() == sums
            for gate in (replaced, removed):
                say("reads")
                gate.wait()
                assert now() == sums
                assert not mapped.is_at(site.cache)

        reader = Child(read)
        assert reader.hear() == "reads"
        other = site.with_model(1)
        other.check(opened := other.open())
        assert opened.reason == "the model's weights changed"
        replaced.open()
        assert reader.hear() == "reads"
        site.cache.unlink()
        removed.open()
        assert reader.end() == 0


# Full disks.


def try_on_a_full_disk(site: Site, old: dict[str, bytes]) -> bool:
    """Build where there may be no room; check that it is all there or nothing, and tell which."""
    folder, others = site.cache.parent, site.names - old.keys()
    try:
        opened = site.open()
    except WeightCacheError as error:
        assert "cannot be written" in str(error)  # noqa: PT017 -- either way is right
        assert {name: data for name, data in taken(folder).items() if name not in others} == old
        return False
    site.check(opened)
    assert site.names - others in (site.own_names, {site.cache.name})  # the side file may find no room
    return True


@pytest.mark.spec("PUBLISH-6")
@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "no fallocate"])
@pytest.mark.parametrize("what", [NO_FILE, OLD_FILE])
def test_beyond_the_largest_file_allowed_a_build_fails_and_leaves_what_was_there(
    site: Site, what: str, fallocate: bool
) -> None:
    old = before(what, site)
    nbytes = len(whole_file(site))
    limits = [*range(0, nbytes + PAGE_BYTES, 1024), nbytes - 1, nbytes]

    def work(_: object) -> None:
        import resource

        if not fallocate:
            del os.posix_fallocate
        for limit in limits:
            put(site.cache.parent, old)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            done = try_on_a_full_disk(site, old)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert done == (limit >= nbytes)

    assert Child(work).end() == 0


def whole_file(site: Site) -> bytes:
    apart = replace(site, cache=site.source.with_name("apart.rwc"))
    apart.open()
    return apart.cache.read_bytes()


def tmpfs(folder: Path, nbytes: int) -> None:
    """Mount a file system of that size, which only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursive_private = 0x20000, 0x44000
    failed = (
        libc.unshare(new_namespace)
        or libc.mount(b"none", b"/", None, recursive_private, None)
        or libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=%d" % nbytes)
    )
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def can_mount(tmp_path_factory: pytest.TempPathFactory) -> bool:
    folder = tmp_path_factory.mktemp("mount")
    return sys.platform == "linux" and os.geteuid() == 0 and Child(lambda _: tmpfs(folder, PAGE_BYTES)).end() == 0


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int], None]:
    """Return what mounts a small file system, in a child."""
    if not can_mount(tmp_path_factory):
        pytest.skip("needs Linux, and the right to mount a file system")
    return tmpfs


def leave_free(filler: Path, n_pages: int) -> None:
    """Fill a disk but for so many pages."""
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE_BYTES))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
        file.truncate(max(0, file.tell() // PAGE_BYTES - n_pages) * PAGE_BYTES)


@pytest.mark.spec("PUBLISH-6")
@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "no fallocate"])
@pytest.mark.parametrize("what", [NO_FILE, OLD_FILE])
def test_on_a_full_disk_a_build_fails_and_leaves_what_was_there(
    site: Site, what: str, fallocate: bool, small_disk: Callable[[Path, int], None]
) -> None:
    old, folder = before(what, site), site.cache.parent
    n_pages = -(-len(whole_file(site)) // PAGE_BYTES)

    def work(_: object) -> None:
        if not fallocate:
            del os.posix_fallocate
        small_disk(folder, 64 * PAGE_BYTES)
        outcomes = []
        for n_free in range(n_pages + 4):
            for path in folder.iterdir():
                path.unlink()
            for name, data in old.items():
                (folder / name).write_bytes(data)
            leave_free(folder / "filler", n_free)
            outcomes.append(try_on_a_full_disk(site, old))
        assert outcomes == [n_free >= n_pages for n_free in range(n_pages + 4)]

    assert Child(work).end() == 0


@pytest.mark.spec("PUBLISH-6")
@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "no fallocate"])
def test_a_full_disk_is_an_error_when_space_is_secured_and_never_when_it_is_written(
    tmp_path: Path, fallocate: bool, small_disk: Callable[[Path, int], None]
) -> None:
    def work(_: object) -> None:
        if not fallocate:
            del os.posix_fallocate
        small_disk(tmp_path, 16 * PAGE_BYTES)
        leave_free(tmp_path / "filler", 10)
        draft = Draft(tmp_path / "file")
        draft.secure(0, 6 * PAGE_BYTES)
        with pytest.raises(OSError, match="No space left"):
            draft.secure(6 * PAGE_BYTES, 5 * PAGE_BYTES)
        draft.settle(6 * PAGE_BYTES)
        draft.write(5 * PAGE_BYTES, b"kept")
        draft.secure(4 * PAGE_BYTES, 4 * PAGE_BYTES)
        mapping = draft.map(0, 8 * PAGE_BYTES)
        leave_free(tmp_path / "more", 0)
        assert bytes(mapping) == bytes(5 * PAGE_BYTES) + b"kept".ljust(3 * PAGE_BYTES, b"\0")
        mapping[:] = b"x" * (8 * PAGE_BYTES)  # where there is no page, this ends the process
        draft.settle(8 * PAGE_BYTES)
        draft.publish()
        assert (tmp_path / "file").read_bytes() == b"x" * (8 * PAGE_BYTES)

    assert Child(work).end() == 0


# Small files.


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


@pytest.mark.spec("PUBLISH-7", "PUBLISH-6")
def test_a_small_file_that_finds_no_room_leaves_the_old_one(
    tmp_path: Path, small_disk: Callable[[Path, int], None]
) -> None:
    def work(_: object) -> None:
        small_disk(tmp_path, 16 * PAGE_BYTES)
        (tmp_path / "small").write_bytes(b"old")
        leave_free(tmp_path / "filler", 2)
        before = taken(tmp_path)
        with pytest.raises(OSError, match="No space left"):
            write_small_file(tmp_path / "small", bytes(3 * PAGE_BYTES))
        assert taken(tmp_path) == before
        write_small_file(tmp_path / "small", bytes(2 * PAGE_BYTES))
        assert taken(tmp_path) == {**before, "small": bytes(2 * PAGE_BYTES)}

    assert Child(work).end() == 0


@pytest.mark.spec("PUBLISH-7")
def test_a_small_file_in_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_small_file(tmp_path / "none" / "small", b"")
    assert not taken(tmp_path)
