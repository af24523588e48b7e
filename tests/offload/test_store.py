"""Specifies `refinfer.offload.store`: the right bytes, straight from the disk, or one named error."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES, aligned_empty
from refinfer.errors import CacheFileError, DamagedWeightsError, GenerationError
from refinfer.offload.store import FileStore, ThrottledStore
from refinfer.packing.layout import Bytes

N_PAGES = 64
WATCHDOG_S = 30.0
O_DIRECT = getattr(os, "O_DIRECT", 0)


def pages(n: int) -> Bytes:
    """Return `n` pages of memory that hold no page of a file."""
    memory = aligned_empty((n * PAGE_BYTES // 4,), PAGE_BYTES).reshape(-1).view(np.uint8)
    memory[:] = 0xA5
    return memory


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(N_PAGES * PAGE_BYTES)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    """A file whose bytes are on the disk; not to be written to."""
    path = tmp_path_factory.mktemp("store") / "file"
    write(path, content)
    return path


def write(path: Path, content: bytes) -> None:
    with path.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def refuse_direct_io(patch: pytest.MonkeyPatch, when: str, number: int = errno.EINVAL) -> None:
    """Be a file system without direct I/O, which reports that when a file is opened, or at its first read."""
    real_open, real_preadv, direct = os.open, os.preadv, set()

    def opening(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & O_DIRECT and when == "open":
            raise OSError(number, os.strerror(number))
        descriptor = real_open(path, flags, *rest, **more)
        direct.discard(descriptor)
        if flags & O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def reading(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(number, os.strerror(number))
        return real_preadv(descriptor, buffers, offset)

    patch.setattr(os, "open", opening)
    patch.setattr(os, "preadv", reading)


def without(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Be a system that lacks some of the calls."""
    for name in names:
        patch.delattr(os, name)


SYSTEMS = {
    "as it is here": lambda patch: None,
    "no O_DIRECT when opening": lambda patch: refuse_direct_io(patch, "open"),
    "no O_DIRECT when reading": lambda patch: refuse_direct_io(patch, "read"),
    "not supported": lambda patch: refuse_direct_io(patch, "open", errno.EOPNOTSUPP),
    "no such flag, as on macOS": lambda patch: without(patch, "O_DIRECT", "posix_fadvise"),
    "no such call, as on Windows": lambda patch: without(patch, "O_DIRECT", "posix_fadvise", "preadv"),
}


@pytest.fixture(params=list(SYSTEMS))
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of system in turn."""
    SYSTEMS[request.param](monkeypatch)
    return str(request.param)


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct_io(monkeypatch, "open")


@pytest.mark.spec("STORE-1")
def test_a_store_fills_a_buffer_with_the_bytes_at_an_offset(system: str, file: Path, content: bytes) -> None:
    with FileStore(file) as store:
        assert system == "as it is here" or not store.direct
        total = 0
        for first, n in ((0, 1), (0, N_PAGES), (5, 3), (N_PAGES - 1, 1), (17, 40), (5, 3)):
            into = pages(n)
            store.read(first * PAGE_BYTES, into)
            assert into.tobytes() == content[first * PAGE_BYTES : (first + n) * PAGE_BYTES]
            total += n * PAGE_BYTES
            assert store.bytes_read == total


@pytest.mark.spec("STORE-1")
@settings(max_examples=30)
@given(data=st.data())
def test_any_pages_are_read_into_any_pages(data: st.DataObject, file: Path, content: bytes) -> None:
    first = data.draw(st.integers(0, N_PAGES - 1))
    n = data.draw(st.integers(1, N_PAGES - first))
    before, behind = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    memory = pages(before + n + behind)
    with FileStore(file) as store:
        store.read(first * PAGE_BYTES, memory[before * PAGE_BYTES : (before + n) * PAGE_BYTES])
    expected = content[first * PAGE_BYTES : (first + n) * PAGE_BYTES]
    untouched = b"\xa5" * PAGE_BYTES
    assert memory.tobytes() == before * untouched + expected + behind * untouched


@pytest.mark.spec("STORE-1")
def test_what_the_system_reads_piece_by_piece_is_put_together(
    file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, []

    def reading_a_page(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(descriptor, [buffers[0][:PAGE_BYTES]], offset)

    with FileStore(file) as store:
        monkeypatch.setattr(os, "preadv", reading_a_page)
        into = pages(5)
        store.read(3 * PAGE_BYTES, into)
        assert store.bytes_read == 5 * PAGE_BYTES
    assert into.tobytes() == content[3 * PAGE_BYTES : 8 * PAGE_BYTES]
    assert calls == [n * PAGE_BYTES for n in range(3, 8)]


@pytest.mark.spec("STORE-1")
def test_bytes_that_were_just_written_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE_BYTES))
    with FileStore(path) as store, path.open("r+b", buffering=0) as writer:
        for value in range(5):
            writer.seek(PAGE_BYTES)
            writer.write(bytes([value]) * PAGE_BYTES)  # not made durable
            into = pages(1)
            store.read(PAGE_BYTES, into)
            assert (into == value).all()


def resident(path: Path) -> list[bool]:
    """Return for each page of a file whether it is in the page cache; looking brings none in."""
    size = path.stat().st_size
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as mapping:
        n = -(-size // mmap.PAGESIZE)
        state = (ctypes.c_ubyte * n)()
        view = np.frombuffer(mapping, np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, length, state)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return [bool(page & 1) for page in state]


def forget(path: Path) -> None:
    """Take a file out of the page cache; skip the test if that cannot be done."""
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(resident(path)):
        pytest.skip("this file system keeps files in the page cache")


linux_only = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise and mincore")


@pytest.mark.skipif(not O_DIRECT, reason="this system has no direct I/O")
@pytest.mark.spec("STORE-1", "STORE-2")
def test_direct_io_is_used_if_it_works(file: Path) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY | O_DIRECT)
    except OSError:
        pytest.skip("direct I/O does not work in the folder of this test")
    try:
        works = os.preadv(descriptor, [pages(1).data], 0) == PAGE_BYTES
    except OSError:
        works = False
    finally:
        os.close(descriptor)
    with FileStore(file) as store:
        assert store.direct == works


@linux_only
@pytest.mark.spec("STORE-2")
def test_direct_reads_leave_no_page_in_the_page_cache(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    write(path, content)
    with FileStore(path) as store:
        if not store.direct:
            pytest.skip("direct I/O does not work in the folder of this test")
        forget(path)
        for first, n in ((0, 8), (8, 8), (30, 1), (40, N_PAGES - 40), (0, N_PAGES)):
            store.read(first * PAGE_BYTES, pages(n))
            assert not any(resident(path))


@linux_only
@pytest.mark.spec("STORE-2")
def test_direct_reads_leave_the_pages_that_others_had_read_where_they_are(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    write(path, content)
    with FileStore(path) as store:
        if not store.direct:
            pytest.skip("direct I/O does not work in the folder of this test")
        forget(path)
        with path.open("rb", buffering=0) as other:
            os.posix_fadvise(other.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
            other.read(PAGE_BYTES)
            before = resident(path)
            assert 0 < sum(before) < N_PAGES
            for first in range(before.index(False), N_PAGES):
                store.read(first * PAGE_BYTES, pages(1))
            assert resident(path) == before


@linux_only
@pytest.mark.spec("STORE-2")
def test_looking_for_pages_in_memory_finds_those_that_were_read(file: Path) -> None:
    """This shows that the tests above would notice."""
    forget(file)
    file.read_bytes()
    assert all(resident(file))


@linux_only
@pytest.mark.spec("STORE-2")
def test_without_direct_io_the_page_cache_is_asked_to_forget_all_that_was_read(
    buffered: None, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write(path, content)
    asked, real = [], os.posix_fadvise

    def advising(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        asked.append((offset, nbytes, advice))
        real(descriptor, offset, nbytes, advice)

    forget(path)
    monkeypatch.setattr(os, "posix_fadvise", advising)
    with FileStore(path) as store:
        for first, n in ((3, 4), (0, N_PAGES)):
            store.read(first * PAGE_BYTES, pages(n))
    assert asked == [
        (3 * PAGE_BYTES, 4 * PAGE_BYTES, os.POSIX_FADV_DONTNEED),
        (0, N_PAGES * PAGE_BYTES, os.POSIX_FADV_DONTNEED),
    ]
    assert not any(resident(path))  # the last read was of the whole file


@pytest.mark.spec("STORE-3", "ERR-1")
@pytest.mark.parametrize("nbytes", [0, 100, PAGE_BYTES, 3 * PAGE_BYTES - 512, 3 * PAGE_BYTES - 1])
def test_a_file_that_ends_before_is_one_named_error(system: str, nbytes: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, bytes(8 * PAGE_BYTES))
    with FileStore(path) as store:
        os.truncate(path, nbytes)
        with pytest.raises(DamagedWeightsError, match="file") as caught:
            store.read(PAGE_BYTES, pages(2))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(DamagedWeightsError, match="was cut short while it was in use; start again"):
            store.read(4 * PAGE_BYTES, pages(2))
        assert store.bytes_read == 0


@pytest.mark.spec("STORE-3")
def test_a_file_that_ends_within_a_page_is_reported_as_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, bytes(8 * PAGE_BYTES))
    with FileStore(path) as store:
        os.truncate(path, 2 * PAGE_BYTES + 100)
        with pytest.raises(DamagedWeightsError, match="was cut short while it was in use; start again"):
            store.read(PAGE_BYTES, pages(2))


@pytest.mark.spec("STORE-3", "ERR-1")
def test_a_file_that_cannot_be_read_is_one_named_error(
    system: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with FileStore(file) as store:
        monkeypatch.setattr(os, "read" if "Windows" in system else "preadv", failing)
        with pytest.raises(GenerationError, match="cannot be read: Input/output error"):  # no proof of damage
            store.read(0, pages(1))


def no_such_file(folder: Path) -> Path:
    return folder / "none"


def under_a_file(folder: Path) -> Path:
    (folder / "file").write_bytes(b"")
    return folder / "file" / "below"


@pytest.mark.spec("STORE-3", "ERR-1")
@pytest.mark.parametrize("path_in", [no_such_file, under_a_file])
def test_what_cannot_be_opened_is_one_named_error(path_in: Any, tmp_path: Path) -> None:
    path = path_in(tmp_path)
    with pytest.raises(CacheFileError, match="cannot be read: ") as caught:
        FileStore(path)
    assert str(path) in str(caught.value)


@pytest.mark.spec("STORE-3", "ERR-1")
def test_a_folder_is_one_named_error_at_the_first_read_at_the_latest(tmp_path: Path) -> None:
    """Some file systems report of a folder that it has no direct I/O."""
    with pytest.raises((CacheFileError, GenerationError), match="cannot be read: "), FileStore(tmp_path) as store:
        store.read(0, pages(1))


@pytest.mark.spec("STORE-3", "ERR-1")
def test_a_missing_file_is_a_named_error_also_without_direct_io(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "O_DIRECT")
    with pytest.raises(CacheFileError, match="cannot be read: "):
        FileStore(tmp_path / "none")


@pytest.mark.spec("STORE-7")
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EIO])
def test_direct_io_that_is_refused_for_any_reason_is_done_without(
    file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_direct_io(monkeypatch, "read", number)
    with FileStore(file) as store:
        store.read(0, into := pages(N_PAGES))
        assert not store.direct
    assert into.tobytes() == content


@pytest.mark.spec("STORE-7")
@pytest.mark.skipif(not O_DIRECT, reason="this system has no direct I/O")
def test_direct_io_that_is_refused_after_the_first_read_is_done_without(
    file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real, refused = os.preadv, []

    def refusing(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset)

    with FileStore(file) as store:
        if not store.direct:
            pytest.skip("this file system has no direct I/O")
        monkeypatch.setattr(os, "preadv", refusing)
        store.read(0, into := pages(N_PAGES))
        store.read(0, again := pages(N_PAGES))
    assert into.tobytes() == again.tobytes() == content
    assert refused == [0]


@pytest.mark.spec("STORE-7")
@pytest.mark.skipif(not O_DIRECT, reason="this system has no direct I/O")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM], ids=errno.errorcode.__getitem__)
def test_two_threads_whose_direct_reads_are_refused_at_the_same_time_both_go_on(
    file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    real, both, one_went_on = os.preadv, threading.Barrier(2), threading.Event()

    def refusing(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT:
            if both.wait(30):
                one_went_on.wait(30)
            raise OSError(number, os.strerror(number))
        one_went_on.set()
        return real(descriptor, buffers, offset)

    with FileStore(file) as store:
        if not store.direct:
            pytest.skip("this file system has no direct I/O")
        monkeypatch.setattr(os, "preadv", refusing)
        read = [pages(N_PAGES), pages(N_PAGES)]
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda into: store.read(0, into), read))
        assert not store.direct
    assert [into.tobytes() for into in read] == [content, content]


@pytest.mark.spec("STORE-7")
@pytest.mark.usefixtures("buffered")
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_page_cache_that_refuses_to_forget_does_not_matter(
    file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refusing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fadvise", refusing, raising=False)
    with FileStore(file) as store:
        store.read(0, into := pages(N_PAGES))
    assert into.tobytes() == content


def descriptors() -> set[str]:
    """Return the descriptors that this process has open."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def no_descriptor_more() -> Iterator[None]:
    """Check that a test leaves no descriptor open."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not list descriptors")
    before = descriptors()
    yield
    assert descriptors() == before


@pytest.mark.spec("STORE-4")
@pytest.mark.usefixtures("no_descriptor_more")
def test_closing_closes_and_again_is_allowed(system: str, file: Path) -> None:
    before = descriptors()
    store = FileStore(file)
    assert len(descriptors() - before) == 1
    store.close()
    assert descriptors() == before
    store.close()
    with pytest.raises(GenerationError, match=r"is closed$"):  # not suspected of damage
        store.read(0, pages(1))


@pytest.mark.spec("STORE-6")
@pytest.mark.usefixtures("no_descriptor_more")
def test_a_store_that_is_closed_during_a_read_closes_after_it(
    file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read brings its bytes piece by piece; in between the store is closed, and another file is opened."""
    real, before, other = os.preadv, descriptors(), list[int]()

    def reading_a_page(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not other:
            store.close()
            other.append(os.open(os.devnull, os.O_RDONLY))
            assert len(descriptors() - before) == 2
        return real(descriptor, [buffers[0][:PAGE_BYTES]], offset)

    store, into = FileStore(file), pages(3)
    monkeypatch.setattr(os, "preadv", reading_a_page)
    store.read(PAGE_BYTES, into)
    os.close(other[0])
    assert into.tobytes() == content[PAGE_BYTES : 4 * PAGE_BYTES]
    assert descriptors() == before
    with pytest.raises(GenerationError, match=r"is closed$"):
        store.read(0, into)


@pytest.mark.spec("STORE-1")
def test_any_number_of_threads_may_read_at_once(system: str, file: Path, content: bytes) -> None:
    wrong: list[int] = []
    begin = threading.Barrier(4)

    def read(seed: int) -> None:
        into = pages(2)
        for first in np.random.default_rng(seed).integers(0, N_PAGES - 1, 50).tolist():
            begin.wait(30)
            store.read(first * PAGE_BYTES, into)
            if into.tobytes() != content[first * PAGE_BYTES : (first + 2) * PAGE_BYTES]:
                wrong.append(first)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with FileStore(file) as store:
            threads = [threading.Thread(target=read, args=(seed,), daemon=True) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
            assert store.bytes_read == 4 * 50 * 2 * PAGE_BYTES
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.spec("STORE-4")
@pytest.mark.usefixtures("no_descriptor_more")
def test_a_with_block_closes_also_after_an_error(system: str, file: Path) -> None:
    with pytest.raises(DamagedWeightsError), FileStore(file) as store:
        store.read(N_PAGES * PAGE_BYTES, pages(1))


@pytest.mark.spec("STORE-4")
@pytest.mark.usefixtures("no_descriptor_more")
@pytest.mark.parametrize("path_in", [no_such_file, under_a_file])
def test_an_opening_that_fails_leaves_no_descriptor(path_in: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheFileError):
        FileStore(path_in(tmp_path))


@pytest.mark.spec("STORE-4")
@pytest.mark.usefixtures("no_descriptor_more")
def test_a_first_direct_read_that_fails_leaves_no_descriptor(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct_io(monkeypatch, "read", errno.EIO)
    FileStore(file).close()


@pytest.mark.spec("OPEN-7")
def test_a_store_reports_whether_a_path_is_still_its_file(file: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    write(path, content)
    with FileStore(path) as store:
        assert store.is_at(path)
        assert not store.is_at(file)
        path.rename(tmp_path / "elsewhere")
        assert not store.is_at(path)
        assert store.is_at(tmp_path / "elsewhere")
        write(path, content)
        assert not store.is_at(path)
        into = pages(N_PAGES)
        store.read(0, into)
        assert into.tobytes() == content


# Between looking and counting no other thread gets in.


class Meddling(int):
    """A number that, the first time something is added to it, lets another thread try to change it meanwhile."""

    other: threading.Thread

    def __add__(self, more: int) -> int:
        if self.other.ident is None:
            self.other.start()
            self.other.join(timeout=0.1)  # it waits for us, or it has got through
        return int(self) + more


@pytest.mark.spec("STORE-1")
def test_the_bytes_of_reads_at_once_are_all_counted(file: Path) -> None:
    with FileStore(file) as store:
        store.bytes_read = counted = Meddling(0)
        counted.other = threading.Thread(target=store.read, args=(0, pages(1)), daemon=True)
        store.read(0, pages(2))
        counted.other.join(WATCHDOG_S)
        assert store.bytes_read == 3 * PAGE_BYTES


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv, as POSIX has it")
@pytest.mark.spec("STORE-6")
def test_a_read_that_begins_while_another_does_keeps_the_file_open(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, inside, go = os.preadv, threading.Event(), threading.Event()
    store, descriptors = FileStore(file), list[int]()

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        descriptors.append(descriptor)
        if threading.current_thread() is other:
            inside.set()
            assert go.wait(WATCHDOG_S)
        else:
            assert inside.wait(WATCHDOG_S)
        return real(descriptor, buffers, offset)

    other = threading.Thread(target=store.read, args=(0, pages(1)), daemon=True)
    under_way = Meddling(0)
    under_way.other = other
    monkeypatch.setattr(store, "_under_way", under_way)
    monkeypatch.setattr(os, "preadv", preadv)
    store.read(0, pages(1))
    store.close()
    os.fstat(descriptors[0])  # the other still reads
    go.set()
    other.join(WATCHDOG_S)
    assert not other.is_alive()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


class MeddledClock:
    """A clock that stands still but for sleeps; the first look at the time lets another thread try to read."""

    def __init__(self) -> None:
        self.time = 0.0
        self.other: threading.Thread | None = None
        self._lock = threading.Lock()

    def now(self) -> float:
        time = self.time
        if self.other is not None and self.other.ident is None:
            self.other.start()
            self.other.join(timeout=0.1)  # it waits for us, or it has got through
        return time

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.time += seconds


@pytest.mark.spec("STORE-5")
def test_two_threads_that_read_at_once_stand_in_one_line(file: Path) -> None:
    clock = MeddledClock()
    store = ThrottledStore(FileStore(file), PAGE_BYTES, clock)  # a page a second
    clock.other = threading.Thread(target=store.read, args=(0, pages(1)), daemon=True)
    store.read(0, pages(1))
    clock.other.join(WATCHDOG_S)
    assert not clock.other.is_alive()
    assert clock.now() >= 2
    store.close()
