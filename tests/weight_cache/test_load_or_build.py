"""Specifies `refinfer.weight_cache.load_or_build`: a file is mapped if it is good, else built or completed, or told."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinfer.arrays import PAGE_BYTES, Float32Array
from refinfer.errors import PackingError, WeightCacheError, WeightsError
from refinfer.packing.formats import Bytes, layout_of
from refinfer.trace import RealClock
from refinfer.weight_cache import directory
from refinfer.weight_cache.directory import discard
from refinfer.weight_cache.file import FileWeightCacheProvider
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
from refinfer.weight_cache.publish import Draft, draft_path
from refinfer.weight_cache.sources import side_path

N, K = 300, 96  # beyond the first 64 KiB of the source
NBYTES = 4 * N * K
NAMES = ("a", "b", "table", "norm")
NO_FILE, OTHER_WEIGHTS = "there was no file yet", "the model's weights changed"

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has read and holds")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else"
)


def nothing(*_: object) -> None:
    """Do nothing."""


@dataclass
class Site:
    """A model's file, and where its cache file belongs; `step` is called before and after each packing step."""

    source: Path
    cache: Path
    step: Callable[[str], None] = nothing
    shape: tuple[int, int] = (N, K)
    names: tuple[str, ...] = NAMES
    fingerprint: bytes = field(default_factory=lambda: packer_fingerprint("int8"))
    packed: list[str] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)

    def fill(self, seed: int) -> None:
        w = np.random.default_rng(seed).standard_normal((N, K), np.float32)
        self.source.write_bytes(w.tobytes())

    def tensors(self, digest: bytes) -> dict[PackKey, Float32Array]:
        w = np.fromfile(self.source, np.float32).reshape(self.shape)
        found: dict[PackKey, Float32Array] = {}
        for name in self.names:
            weight = WeightId(digest, name)
            if name == "table":
                found[rows_key(self.shape, "f32", weight)] = w
            elif name == "norm":
                found[vectors_key(self.shape[0], weight)] = w[:, 0].copy()
            else:
                found[matrix_key(layout_of("int8", *self.shape), weight)] = w * np.float32(1 + ord(name))
        return found

    def pack(self, w: Float32Array, key: PackKey, buffer: Bytes) -> Iterator[int]:
        self.packed.append(key.name)
        self.step(key.name)
        for _ in pack_into(w, key, buffer):
            yield 0  # so that what is told as progress is what is hashed
            self.step(key.name)

    def contents(self, sources: tuple[SourceFile, ...]) -> Contents:
        packs = {key: partial(self.pack, w, key) for key, w in self.tensors(sources[0].digest).items()}
        return Contents(Provenance(str(self.source.parent), "int8", sources, self.fingerprint), dict(packs))

    def open(self, **more: Any) -> Opened:
        self.packed.clear()
        self.progress.clear()
        listener = Listener(progress=self.progress.append)
        return load_or_build(self.cache, [self.source], self.contents, clock=RealClock(), listener=listener, **more)

    @property
    def hashed(self) -> int:
        return sum(self.progress)

    def check(self, opened: Opened) -> None:
        """Check that the file holds what packing gives, that all that is in it is sound, and nothing else is there."""
        assert not list(opened.provider.mapped.problems())
        for key, w in self.tensors(hashlib.sha256(self.source.read_bytes()).digest()).items():
            expected = np.zeros(nbytes_of(key), np.uint8)
            list(pack_into(w, key, expected))
            assert opened.provider[key].tobytes() == expected.tobytes(), key.name
        assert opened.packed_buffers == len(self.packed)
        assert opened.packed_bytes == sum(nbytes_of(key) for key in opened.provider if key.name in self.packed)
        assert self.folder <= {self.cache.name, side_path(self.cache).name}

    @property
    def folder(self) -> set[str]:
        return {path.name for path in self.cache.parent.iterdir()}

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.cache.parent.iterdir()}


def make(folder: Path) -> Site:
    (folder / "model").mkdir()
    site = Site(folder / "model" / "model.safetensors", folder / "cache" / "model.rwc")
    site.fill(0)
    return site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make(tmp_path)


@pytest.fixture
def built(site: Site) -> Site:
    """A site with a good file."""
    assert site.open().reason == NO_FILE
    return site


def come_to_rest(path: Path) -> None:
    """Wait until the clock of the file system has left the tick in which a file was changed last."""
    ctime = path.stat().st_ctime_ns
    tick = 110_000_000 if ctime % 1_000_000_000 else 2_100_000_000
    probe, deadline = path.with_name("probe"), time.monotonic() + 30
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_mtime_ns > ctime + tick:
            probe.unlink()
            return
        assert time.monotonic() < deadline


def in_child(work: Callable[[], object], user: int | None = None) -> None:
    """Do `work` in a process of its own, as another user; what fails there fails here. A watchdog ends it."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # BLAS has threads; the child calls none of it
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(10)
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            work()
            status = 0
        except BaseException:  # noqa: BLE001, RUF100 -- the child must not return into pytest
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as lines:
        text = lines.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, text or f"ended with {status}"


# Mapped, or built, and why.


@pytest.mark.spec("OPEN-1")
def test_a_missing_file_is_built_and_then_mapped(site: Site) -> None:
    opened = site.open()
    site.check(opened)
    assert opened.reason == NO_FILE
    assert site.packed == list(NAMES)
    assert opened.provider.is_finalized()
    assert [key.name for key in opened.provider] == list(NAMES)  # in execution order
    again = site.open()
    site.check(again)
    assert (again.reason, again.packed_buffers, again.packed_bytes) == (None, 0, 0)
    assert again.packing_s == opened.packing_s is not None
    assert again.provider.provenance == opened.provider.provenance


def damage_at(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)

    return damage


def cut_to(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def fill_with(data: bytes) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        path.write_bytes(data)

    return fill


def make_it_of_version(version: int) -> Callable[[Path], None]:
    """Return what changes the format version, and makes the header agree with it."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        assert hashlib.sha256(data[:160]).digest() == data[160:192]
        data[8:12] = version.to_bytes(4, "little")
        data[160:192] = hashlib.sha256(data[:160]).digest()
        path.write_bytes(data)

    return change


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, NO_FILE),
    "empty": (lambda path: os.truncate(path, 0), "it is not a refinfer weight cache"),
    "one page": (lambda path: os.truncate(path, PAGE_BYTES), "it has 4096 bytes instead of "),
    "cut short": (cut_to(0.6), "bytes instead of "),
    "cut to half a header": (lambda path: os.truncate(path, 100), "it is cut short"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 1), "bytes instead of "),
    "garbage": (fill_with(os.urandom(50_000)), "it is not a refinfer weight cache"),
    "zeros": (fill_with(bytes(50_000)), "it is not a refinfer weight cache"),
    "a text": (fill_with(b"weights"), "it is not a refinfer weight cache"),
    "magic damaged": (damage_at(0), "it is not a refinfer weight cache"),
    "header damaged": (damage_at(20), "its header is damaged"),
    "index damaged": (damage_at(-1), "its index is damaged"),
    "of version 0": (make_it_of_version(0), "it has the format version 0, and this is version 1"),
    "of version 2": (make_it_of_version(2), "it has the format version 2, and this is version 1"),
}


@pytest.mark.spec("OPEN-1", "OPEN-3")
@pytest.mark.parametrize(("damage", "why"), list(DAMAGED.values()), ids=list(DAMAGED))
@pytest.mark.parametrize("believed", [True, False], ids=["side file believed", "hashed"])
def test_a_file_that_cannot_be_used_is_rebuilt_with_the_reason(
    built: Site, damage: Callable[[Path], None], why: str, believed: bool
) -> None:
    if believed:
        come_to_rest(built.source)
        built.open()
    before = built.cache.read_bytes()
    damage(built.cache)
    opened = built.open()
    built.check(opened)
    assert opened.reason is not None
    assert why in opened.reason
    assert built.packed == list(NAMES)
    assert built.cache.read_bytes() == before
    assert built.open().reason is None


@pytest.mark.spec("OPEN-1")
def test_the_callers_reason_is_given_where_the_file_is_built(site: Site) -> None:
    assert site.open(reason="it was damaged").reason == "it was damaged"
    assert site.open(reason="it was damaged").reason is None


@pytest.mark.spec("OPEN-1")
def test_folders_are_made_where_the_cache_belongs(site: Site) -> None:
    site.cache = site.cache.parent / "far" / "away" / "model.rwc"
    site.check(site.open())


@pytest.mark.spec("OPEN-1", "OPEN-5")
@needs_fork
@needs_root
def test_a_file_that_may_not_be_read_is_rebuilt_where_it_can_be(open_site: Site) -> None:
    site = open_site
    site.open()
    site.cache.chmod(0)
    site.cache.parent.chmod(0o777)

    def work() -> None:
        opened = site.open()
        site.check(opened)
        assert opened.reason == "it cannot be read: Permission denied"

    in_child(work, user=NOBODY)


# A second start.


def bytes_read() -> int:
    """Return the bytes that this process has read, from wherever."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def resident_bytes(path: Path, first: int = 0) -> int:
    """Return how many bytes of a file from `first` are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        pages = np.zeros(-(-view.size // PAGE_BYTES), np.uint8)
        address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size)
        assert not libc.mincore(address, size, ctypes.c_void_p(pages.ctypes.data)), os.strerror(ctypes.get_errno())
        del view
    return int((pages[first // PAGE_BYTES :] & 1).sum()) * PAGE_BYTES


def drop_from_memory(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_bytes(path):
        pytest.skip("this file system keeps its files in memory")


@pytest.mark.spec("OPEN-2")
@on_linux
def test_a_second_start_packs_nothing_and_reads_no_weight(tmp_path: Path) -> None:
    source, cache = tmp_path / "model.safetensors", tmp_path / "model.rwc"
    w = np.random.default_rng(0).standard_normal((8192, 512), np.float32)
    source.write_bytes(w.tobytes())

    def contents(pack: Callable[[Float32Array, PackKey, Bytes], Iterator[int]]) -> Any:
        def contents_of(sources: tuple[SourceFile, ...]) -> Contents:
            keys = [matrix_key(layout_of("f32", *w.shape), WeightId(sources[0].digest, name)) for name in "abc"]
            packs = {key: partial(pack, w * np.float32(n + 1), key) for n, key in enumerate(keys)}
            return Contents(Provenance("model", "f32", sources, packer_fingerprint("f32")), dict(packs))

        return contents_of

    def refuse(*_: object) -> Iterator[int]:
        raise AssertionError("a second start packs nothing")

    come_to_rest(source)
    assert load_or_build(cache, [source], contents(pack_into), clock=RealClock()).packed_buffers == 3
    drop_from_memory(source)
    drop_from_memory(cache)
    again = contents(refuse)
    refused = Listener(progress=lambda nbytes: pytest.fail(f"{nbytes} bytes were read"))
    bytes_read()
    before = bytes_read()
    opened = load_or_build(cache, [source], again, clock=RealClock(), listener=refused)
    assert bytes_read() - before < (64 << 10) + 16_384  # the head of the source; header, index and side file
    assert (opened.reason, opened.packed_buffers, opened.packed_bytes) == (None, 0, 0)
    for path in (source, cache):  # what is read through a mapping; the system may read ahead at the ends
        assert resident_bytes(path) <= 1 << 20 < path.stat().st_size / 8


# Outdated.


@pytest.mark.spec("OPEN-3")
def test_other_weights_of_the_same_size_rebuild_the_file(built: Site) -> None:
    old = built.open()
    sums = [old.provider[key].tobytes() for key in old.provider]
    built.fill(1)
    opened = built.open()
    built.check(opened)
    assert opened.reason == OTHER_WEIGHTS
    assert built.packed == list(NAMES)  # nothing of another model is copied
    assert [key.name for key in opened.provider] == list(NAMES)
    assert [old.provider[key].tobytes() for key in old.provider] == sums  # who has the old one keeps it


@pytest.mark.spec("OPEN-3")
def test_a_source_file_of_another_name_rebuilds_the_file(built: Site) -> None:
    built.source = built.source.rename(built.source.with_name("other.safetensors"))
    opened = built.open()
    built.check(opened)
    assert opened.reason == OTHER_WEIGHTS


@pytest.mark.spec("OPEN-3")
@pytest.mark.parametrize("believed", [True, False], ids=["side file believed", "hashed"])
def test_another_packer_fingerprint_rebuilds_the_file(built: Site, believed: bool) -> None:
    if believed:
        come_to_rest(built.source)
        built.open()
    for fingerprint in (bytes(32), built.fingerprint):
        built.fingerprint = fingerprint
        opened = built.open()
        built.check(opened)
        assert opened.reason == "the packing code changed"
        assert built.packed == list(NAMES)
        assert opened.provider.provenance.packers == fingerprint


@pytest.mark.spec("OPEN-3")
def test_a_copy_of_the_model_in_another_folder_is_the_same_model(built: Site) -> None:
    shutil.copytree(built.source.parent, built.source.parent.with_name("copy"))
    shutil.rmtree(built.source.parent)
    built.source = built.source.parent.with_name("copy") / built.source.name
    opened = built.open()
    built.check(opened)
    assert (opened.reason, built.packed, built.hashed) == (None, [], NBYTES)


@pytest.mark.spec("OPEN-3", "OPEN-4")
def test_the_same_bytes_in_another_shape_are_other_buffers(built: Site) -> None:
    built.shape = (K, N)
    opened = built.open()
    assert not list(opened.provider.mapped.problems())
    assert opened.reason == "4 of 4 buffers were missing"
    assert built.packed == list(NAMES)
    both = [opened.provider[key].tobytes() for key in opened.provider]
    assert len(both) == 8
    built.open()
    for shape in [(K, N), (N, K)]:
        built.shape = shape
        again = built.open()
        built.check(again)
        assert again.reason is None


# Incomplete.


def flip(path: Path, at: int) -> None:
    """Change a byte of a file, as a failing disk does."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.spec("OPEN-4")
@pytest.mark.parametrize("there", [("a",), ("b", "norm"), ("table", "b", "a")])
def test_a_file_that_lacks_buffers_is_completed(site: Site, there: tuple[str, ...]) -> None:
    site.names = there
    first = site.open()
    site.names = NAMES
    opened = site.open()
    site.check(opened)
    missing = [name for name in NAMES if name not in there]
    assert opened.reason == f"{len(missing)} of 4 buffers were missing"
    assert site.packed == missing
    assert [key.name for key in opened.provider] == list(NAMES)  # in execution order all the same
    for key in first.provider:
        assert opened.provider[key].tobytes() == first.provider[key].tobytes()
    again = site.open()
    site.check(again)
    assert (again.reason, site.packed) == (None, [])


@pytest.mark.spec("OPEN-4")
def test_buffers_that_are_not_asked_for_are_kept(site: Site) -> None:
    for names, packed in [(("a", "b"), ["a", "b"]), (("c", "b"), ["c"]), (("table",), ["table"]), (("b",), [])]:
        site.names = names
        opened = site.open()
        site.check(opened)
        assert site.packed == packed
    assert [key.name for key in opened.provider] == ["table", "c", "b", "a"]
    site.names = ("a", "b", "c", "table")
    assert site.open().reason is None


@pytest.mark.spec("OPEN-4")
@pytest.mark.parametrize("damaged", ["a", "b", "table"])
def test_a_damaged_buffer_is_not_copied_but_packed_anew(site: Site, damaged: str) -> None:
    site.names = ("a", "b", "table")
    first = site.open()
    (entry,) = (entry for entry in first.provider.entries if entry.key.name == damaged)
    flip(site.cache, entry.chunks[-1].offset + 5)
    site.names = NAMES
    opened = site.open()
    site.check(opened)
    assert opened.reason == "1 of 4 buffers were missing"
    assert sorted(site.packed) == sorted([damaged, "norm"])


@pytest.mark.spec("OPEN-4")
def test_a_damaged_buffer_that_is_not_asked_for_is_dropped(site: Site) -> None:
    site.names = ("a", "b")
    entry = site.open().provider.entries[0]
    flip(site.cache, entry.offset)
    site.names = ("b", "norm")
    opened = site.open()
    site.check(opened)
    assert [key.name for key in opened.provider] == ["b", "norm"]
    assert site.packed == ["norm"]


@pytest.mark.spec("OPEN-4", "OPEN-3")
@pytest.mark.parametrize("change", ["weights", "fingerprint"])
def test_nothing_outdated_is_copied(site: Site, change: str) -> None:
    site.names = ("a", "b")
    site.open()
    site.names = NAMES
    if change == "weights":
        site.fill(1)
    else:
        site.fingerprint = bytes(32)
    opened = site.open()
    site.check(opened)
    assert site.packed == list(NAMES)
    assert [key.name for key in opened.provider] == list(NAMES)


# Places that cannot be written.

NOBODY = 65534


@pytest.fixture
def open_site() -> Iterator[Site]:
    """A site in a folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        yield make(folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.spec("OPEN-5")
@needs_fork
@needs_root
def test_a_good_file_is_used_where_it_cannot_be_written(open_site: Site) -> None:
    site = open_site
    site.open()
    come_to_rest(site.source)
    site.open()  # now the side file is believed
    before = site.files

    def work(hashed: int) -> None:
        opened = site.open()
        site.check(opened)
        assert (opened.reason, opened.packed_buffers, site.hashed) == (None, 0, hashed)
        assert opened.packing_s is not None

    in_child(partial(work, 0), user=NOBODY)
    site.source.touch()
    in_child(partial(work, NBYTES), user=NOBODY)  # hashed, and used
    in_child(partial(work, NBYTES), user=NOBODY)  # and again: that cannot be noted
    assert site.files == before


@pytest.mark.spec("OPEN-5")
@needs_fork
@needs_root
@pytest.mark.parametrize("side", ["missing", "unreadable"])
def test_a_good_file_is_used_without_its_side_file_where_it_cannot_be_written(open_site: Site, side: str) -> None:
    site = open_site
    site.open()
    if side == "missing":
        side_path(site.cache).unlink()
    else:
        side_path(site.cache).chmod(0)

    def work() -> None:
        opened = site.open()
        assert (opened.reason, opened.packed_buffers, opened.packing_s) == (None, 0, None)
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
        assert site.open().reason == NO_FILE
        assert site.open().reason is None

    in_child(work, user=NOBODY)


@pytest.mark.spec("OPEN-5")
@needs_fork
@needs_root
def test_a_dead_draft_of_another_user_does_not_stop_a_build(open_site: Site) -> None:
    site = open_site
    site.cache.parent.mkdir()
    site.cache.parent.chmod(0o777)
    draft_path(site.cache).write_bytes(b"half")  # by root, who was killed

    def work() -> None:
        assert site.open().reason == NO_FILE

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


def put(site: Site, files: dict[str, bytes]) -> None:
    shutil.rmtree(site.cache.parent, ignore_errors=True)
    site.cache.parent.mkdir()
    for name, data in files.items():
        (site.cache.parent / name).write_bytes(data)


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


@pytest.mark.spec("OPEN-6")
@every_start
@pytest.mark.parametrize("when", ["a", "norm"])
@pytest.mark.parametrize("change", [in_place, by_renaming, with_its_time_put_back, removing_it])
def test_sources_that_change_while_they_are_packed_are_noticed_and_nothing_is_published(
    site: Site, old: bool, when: str, change: Callable[[Site], None]
) -> None:
    files = files_at_start(site, old=old)
    put(site, files)
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
    put(site, files)

    def fail() -> None:
        raise what("why")

    fail_at(site, when, fail)
    with pytest.raises(what, match="why"):
        site.open()
    assert site.files == files
    opened = site.open()
    site.check(opened)
    assert opened.reason == (OTHER_WEIGHTS if files else NO_FILE)


@pytest.mark.spec("OPEN-6")
@every_start
@needs_fork
def test_ctrl_c_while_packing_leaves_what_was_there(site: Site, old: bool) -> None:
    files = files_at_start(site, old=old)
    put(site, files)

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
    found = built.open().provider
    assert discard(built.cache, found.mapped.is_at)
    assert built.folder == {side_path(built.cache).name}
    opened = built.open(reason="it was damaged")
    built.check(opened)
    assert opened.reason == "it was damaged"


@pytest.mark.spec("OPEN-7")
@pytest.mark.parametrize("how", ["rebuilt", "replaced by a copy"])
def test_a_file_that_was_replaced_meanwhile_is_not_removed(built: Site, how: str) -> None:
    found = built.open().provider
    if how == "rebuilt":
        built.fill(1)
        built.open()
    else:
        copy = built.cache.with_name("copy")
        copy.write_bytes(built.cache.read_bytes())
        copy.replace(built.cache)
    before = built.files
    assert discard(built.cache, found.mapped.is_at)  # what was damaged is gone
    assert built.files == before


@pytest.mark.spec("OPEN-7")
def test_a_file_that_is_gone_already_is_gone(built: Site) -> None:
    found = built.open().provider
    built.cache.unlink()
    assert discard(built.cache, found.mapped.is_at)
    assert not built.cache.exists()


@pytest.mark.spec("OPEN-7")
def test_a_file_is_compared_and_removed_while_nobody_can_publish(built: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Watched(Draft):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            held.append(self)

    monkeypatch.setattr(directory, "Draft", Watched)
    found = built.open().provider

    def is_at(path: Path) -> bool:
        assert held[-1].temporary.exists()
        return found.mapped.is_at(path)

    assert discard(built.cache, is_at)
    assert not draft_path(built.cache).exists()


@pytest.mark.spec("OPEN-7", "OPEN-5")
@needs_fork
@needs_root
def test_a_damaged_file_that_cannot_be_removed_stays_and_is_told(open_site: Site) -> None:
    site = open_site
    site.open()
    before = site.files

    def work() -> None:
        found = FileWeightCacheProvider.load(site.cache)
        assert not discard(site.cache, found.mapped.is_at)

    in_child(work, user=NOBODY)
    assert site.files == before


# Memory.


def anonymous_bytes() -> int:
    """Return the private memory of this process, files aside."""
    return 1024 * int(re.findall(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[0])


def resident_bytes_of_mapping(path: Path) -> int:
    """Return how much of its mappings of a file this process holds."""
    regions = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    of_file = [region for region in regions if region.partition("\n")[0].endswith(str(path))]
    return 1024 * sum(int(re.findall(r"^Rss:\s*(\d+)", region, flags=re.MULTILINE)[0]) for region in of_file)


@pytest.mark.spec("OPEN-8")
@on_linux
def test_packing_holds_neither_the_packed_weights_nor_a_second_copy_of_a_tensor(tmp_path: Path) -> None:
    source, cache = tmp_path / "model.safetensors", tmp_path / "model.rwc"
    N, K, limit = 8192, 2560, 64 << 20
    nbytes = 4 * N * K  # 80 MiB
    with source.open("wb") as file:
        for n in range(2):
            file.seek(n * nbytes)
            file.write(bytes([n + 1]))  # so that the tensors are not one; of the rest the disk keeps nothing
        file.truncate(2 * nbytes)
    tensors = np.memmap(source, np.float32, "r").reshape(2, N, K)
    grown: list[int] = []
    drafted: list[int] = []

    def contents(sources: tuple[SourceFile, ...]) -> Contents:
        keys = [matrix_key(layout_of("f32", N, K), WeightId(sources[0].digest, name)) for name in "ab"]
        packs = {key: partial(pack, w, key) for w, key in zip(tensors, keys, strict=True)}
        return Contents(Provenance("model", "f32", sources, packer_fingerprint("f32")), dict(packs))

    def pack(w: Float32Array, key: PackKey, buffer: Bytes) -> Iterator[int]:
        for done in pack_into(w, key, buffer):
            grown.append(anonymous_bytes() - before)
            drafted.append(resident_bytes_of_mapping(draft_path(cache)))
            yield done

    packer_fingerprint("f32")
    tracemalloc.start()
    try:
        before = anonymous_bytes()
        opened = load_or_build(cache, [source], contents, clock=RealClock())
        grown.append(anonymous_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.stat().st_size > opened.packed_bytes == 2 * nbytes
    assert len(grown) > 9
    assert max(grown) < limit  # between the steps of packing
    assert peak < limit  # and within them
    assert 0 < max(drafted) < limit / 2  # nor does what was packed stay in this process, to be counted as its own
