"""Specifies `refinfer.weight_cache.sources`: a model is known by its content, which is read only where it must be."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES, Float32Array
from refinfer.errors import WeightsError
from refinfer.packing.formats import Bytes, layout_of
from refinfer.trace import RealClock
from refinfer.weight_cache import sources as sources_module
from refinfer.weight_cache.format import Provenance, SourceFile
from refinfer.weight_cache.key import WeightId
from refinfer.weight_cache.load_or_build import Contents, Listener, Opened, load_or_build
from refinfer.weight_cache.packers import matrix_key, nbytes_of, pack_into, packer_fingerprint
from refinfer.weight_cache.sources import Record, SideFile, Stat, believed, identify, side_path, unchanged

HEAD_BYTES = 64 << 10
BLOCK_BYTES = 1 << 20
FAR_FUTURE_NS = 1 << 62
SHAPE = (257, 192)  # reaches beyond the first 64 KiB
NBYTES = 4 * SHAPE[0] * SHAPE[1]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has read")


def ignore(nbytes: int) -> None:
    """Do nothing."""


def no_progress(nbytes: int) -> None:
    raise AssertionError(f"{nbytes} bytes were read")


def write(path: Path, nbytes: int, seed: int = 0) -> bytes:
    data = np.random.default_rng(seed).bytes(nbytes)
    path.write_bytes(data)
    return data


def come_to_rest(*paths: Path) -> None:
    """Wait until the clock of the file system has left the tick in which the files were changed last."""
    ctime = max(path.stat().st_ctime_ns for path in paths)
    tick = 110_000_000 if all(path.stat().st_ctime_ns % 1_000_000_000 for path in paths) else 2_100_000_000
    probe, deadline = paths[0].with_name("probe"), time.monotonic() + 30
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_mtime_ns > ctime + tick:
            probe.unlink()
            return
        assert time.monotonic() < deadline


def noted(*paths: Path) -> SideFile:
    """Return what a side file says of files that are at rest."""
    return SideFile(identify(paths, SideFile(()), FAR_FUTURE_NS, ignore))


def change_one_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def bytes_read() -> int:
    """Return the bytes that this process has read, from wherever."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def resident_pages(path: Path) -> int:
    """Return how many pages of a file are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        pages = np.zeros(-(-view.size // PAGE_BYTES), np.uint8)
        address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size)
        assert not libc.mincore(address, size, ctypes.c_void_p(pages.ctypes.data)), os.strerror(ctypes.get_errno())
        del view
    return int((pages & 1).sum())


def drop_from_memory(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(path):
        pytest.skip("this file system keeps its files in memory")


@dataclass
class Model:
    """A model of one matrix in one file, with a cache file; counts what is hashed and packed."""

    source: Path
    cache: Path
    packed: int = 0
    progress: list[int] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path) -> Model:
        model = cls(folder / "model.safetensors", folder / "cache" / "model.rwc")
        model.fill(0)
        return model

    @property
    def side(self) -> Path:
        return side_path(self.cache)

    def fill(self, seed: int) -> None:
        self.source.write_bytes(np.random.default_rng(seed).standard_normal(SHAPE, np.float32).tobytes())

    def weights(self) -> Float32Array:
        return np.fromfile(self.source, np.float32).reshape(SHAPE)

    def contents(self, sources: tuple[SourceFile, ...]) -> Contents:
        key = matrix_key(layout_of("int8", *SHAPE), WeightId(sources[0].digest, "matrix"))

        def pack(buffer: Bytes) -> Iterator[int]:
            self.packed += 1
            for _ in pack_into(self.weights(), key, buffer):
                yield 0  # so that what is told as progress is what is hashed

        return Contents(Provenance("model", "int8", sources, packer_fingerprint("int8")), {key: pack})

    def open(self) -> Opened:
        """Open the cache file, and check what it holds."""
        self.packed = 0
        self.progress.clear()
        opened = load_or_build(
            self.cache,
            [self.source],
            self.contents,
            clock=RealClock(),
            listener=Listener(progress=self.progress.append),
        )
        (key,) = opened.provider
        assert key.weights.source == hashlib.sha256(self.source.read_bytes()).digest()
        expected = np.zeros(nbytes_of(key), np.uint8)
        list(pack_into(self.weights(), key, expected))
        assert opened.provider[key].tobytes() == expected.tobytes()
        return opened

    @property
    def hashed(self) -> int:
        return sum(self.progress)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model.make(tmp_path)


@pytest.fixture
def model_at_rest(model: Model) -> Model:
    """A model with a cache file, whose side file is believed."""
    come_to_rest(model.source)
    assert model.open().reason is not None
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
def test_files_are_identified_in_the_order_they_are_given(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "cab"]
    digests = [hashlib.sha256(write(path, 100, seed)).digest() for seed, path in enumerate(paths)]
    records = identify(paths, SideFile(()), FAR_FUTURE_NS, ignore)
    assert [(record.name, record.source.digest) for record in records] == list(zip("cab", digests, strict=True))
    assert believed(paths, SideFile(records)) == tuple(record.source for record in records)
    assert believed(paths[::-1], SideFile(records)) == tuple(record.source for record in records[::-1])


@pytest.mark.spec("IDENT-1")
@pytest.mark.parametrize("at", [0, HEAD_BYTES, 2 * BLOCK_BYTES - 1])
def test_a_file_that_changes_while_its_digest_is_taken_is_refused(tmp_path: Path, at: int) -> None:
    path = tmp_path / "w"
    write(path, 2 * BLOCK_BYTES)
    come_to_rest(path)

    def change(_: int) -> None:
        change_one_byte(path, at)

    with pytest.raises(WeightsError, match="changed while it was read"):
        identify([path], SideFile(()), FAR_FUTURE_NS, change)


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
        partial(identify, [path], side, FAR_FUTURE_NS, ignore),
        partial(identify, [path], SideFile(()), FAR_FUTURE_NS, ignore),
        partial(unchanged, [path], side.records),
    ):
        with pytest.raises(WeightsError, match="w cannot be read: "):
            look()


# What is believed.


@pytest.mark.spec("IDENT-2")
@pytest.mark.parametrize("what", ["size", "mtime_ns", "ctime_ns", "inode", "head"])
def test_a_digest_is_believed_only_while_everything_seen_is_the_same(tmp_path: Path, what: str) -> None:
    path = tmp_path / "w"
    write(path, 2 * HEAD_BYTES)
    side = noted(path)
    assert believed([path], side) == (side.records[0].source,)
    stat = side.records[0].stat
    other: Any = stat.head[::-1] if what == "head" else getattr(stat, what) + 1
    record = replace(side.records[0], stat=replace(stat, **{what: other}))
    assert believed([path], SideFile((record,))) is None
    assert not unchanged([path], [record])
    assert unchanged([path], side.records)


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
        assert 0 < resident_pages(path) <= 16 * HEAD_BYTES // PAGE_BYTES


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
    assert believed(paths, SideFile((a,))) is None
    assert believed(paths[:1], SideFile((a, b))) == (a.source,)
    assert believed(paths[:1], SideFile((replace(a, name="b"),))) is None
    assert believed(paths, SideFile((replace(b, name="a"), replace(a, name="b")))) is None
    assert believed(paths, SideFile(())) is None


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
    model: Model, how: Callable[[Path, bytes], None], at: int
) -> None:
    model.source.parent.joinpath("cache").mkdir()
    come_to_rest(model.source)
    side = noted(model.source)
    model.side.write_bytes(side.encode())
    model.open()
    assert model.hashed == 0  # it is believed
    stat, data = model.source.stat(), bytearray(model.source.read_bytes())
    data[at] ^= 1
    how(model.source, bytes(data))
    os.utime(model.source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = model.source.stat()
    assert (now.st_size, now.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert believed([model.source], side) is None
    assert not unchanged([model.source], side.records)
    opened = model.open()
    assert opened.reason == "the model's weights changed"
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
@pytest.mark.parametrize(("ctime_ns", "tick_ns"), [(5_000_000_001, 100_000_000), (5_000_000_000, 2_000_000_000)])
def test_a_record_is_believed_only_if_the_file_had_been_at_rest_for_a_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctime_ns: int, tick_ns: int
) -> None:
    path = tmp_path / "w"
    write(path, 1000)
    seen = replace(Stat.of(path), ctime_ns=ctime_ns)  # a clock of nanoseconds, one of whole seconds
    monkeypatch.setattr(Stat, "of", lambda path: seen)
    for now_ns, at_rest in [
        (0, False),  # where the time is not known, or was turned back
        (ctime_ns, False),
        (ctime_ns + tick_ns, False),
        (ctime_ns + tick_ns + 1, True),
        (ctime_ns + 10 * tick_ns, True),
    ]:
        records = identify([path], SideFile(()), now_ns, ignore)
        assert records[0].at_rest is at_rest
        assert (believed([path], SideFile(records)) is not None) is at_rest
        progress: list[int] = []
        identify([path], SideFile(records), FAR_FUTURE_NS, progress.append)
        assert bool(progress) is not at_rest


def freeze(monkeypatch: pytest.MonkeyPatch, path: Path, tick_ns: int = 3_600_000_000_000) -> None:
    """Let a clock that ticks every hour make the file look as it does now for the rest of the test."""
    seen = Stat.of(path)
    monkeypatch.setattr(sources_module, "_TICK_NS", tick_ns)
    monkeypatch.setattr(sources_module, "_COARSE_TICK_NS", tick_ns)
    monkeypatch.setattr(Stat, "of", lambda path: seen)


@pytest.mark.spec("IDENT-4")
def test_weights_changed_in_the_tick_in_which_they_were_packed_are_packed_anew(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(monkeypatch, model.source)
    for seed in range(3):
        model.fill(seed)
        opened = model.open()
        assert opened.reason == ("the model's weights changed" if seed else "there was no file yet")
        assert model.hashed == NBYTES
        assert json.loads(model.side.read_bytes())["records"][0]["at_rest"] is False
    assert model.open().reason is None
    assert model.hashed == NBYTES  # it still cannot be told by looking


@pytest.mark.spec("IDENT-4", "OPEN-6")
def test_weights_changed_in_the_tick_in_which_they_were_hashed_are_noticed_after_packing(
    model: Model, monkeypatch: pytest.MonkeyPatch
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
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = replace(Stat.of(model.source), ctime_ns=FAR_FUTURE_NS)  # the clock was turned back since
    monkeypatch.setattr(Stat, "of", lambda path: seen)
    for reason in ["there was no file yet", None, None]:
        assert model.open().reason == reason
        assert model.hashed == NBYTES


@pytest.mark.spec("IDENT-4", "IDENT-5")
def test_a_model_that_was_just_written_is_believed_once_it_has_come_to_rest(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sources_module, "_TICK_NS", 3_600_000_000_000)
        patch.setattr(sources_module, "_COARSE_TICK_NS", 3_600_000_000_000)
        model.open()
        model.open()
        assert model.hashed == NBYTES
    come_to_rest(model.source)
    for hashed in [NBYTES, 0, 0]:
        assert model.open().reason is None
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
def test_a_mere_touch_costs_one_hashing_once(model_at_rest: Model, what: Callable[[Path], None]) -> None:
    model, before = model_at_rest, model_at_rest.cache.read_bytes()
    assert model.open().reason is None
    assert model.hashed == 0
    what(model.source)
    come_to_rest(model.source)
    packing_s = SideFile.read(model.side).packing_s
    assert packing_s is not None
    for hashed in [NBYTES, 0, 0]:
        opened = model.open()
        assert (opened.reason, opened.packed_buffers, model.packed) == (None, 0, 0)
        assert opened.packing_s == packing_s
        assert model.hashed == hashed
    assert model.cache.read_bytes() == before


def edited(data: bytes, change: Callable[[Any], object]) -> bytes:
    raw = json.loads(data)
    change(raw)
    return json.dumps(raw).encode()


def in_record(what: str, value: object) -> Callable[[bytes], bytes]:
    """Return what changes a field of a side file's record; those of `Stat` too."""

    def change(raw: Any) -> None:
        record = raw["records"][0]
        (record if what in record else record["stat"])[what] = value

    return lambda data: edited(data, change)


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "cut short": lambda data: data[:-10],
    "half": lambda data: data[: len(data) // 2],
    "no text": lambda data: b"\xff\xfe" + data,
    "two of it": lambda data: data + data,
    "a list": lambda data: b"[]",
    "a number": lambda data: b"1",
    "a string": lambda data: b'"records"',
    "null": lambda data: b"null",
    "an empty object": lambda data: b"{}",
    "nested deeply": lambda data: b"[" * 200_000 + b"]" * 200_000,
    "a number of many digits": lambda data: b'{"records": [], "packing_s": ' + b"1" * 10_000 + b"}",
    "no packing time": lambda data: edited(data, lambda raw: raw.pop("packing_s")),
    "no records": lambda data: edited(data, lambda raw: raw.pop("records")),
    "records are a number": lambda data: edited(data, lambda raw: raw.update(records=1)),
    "records are an object": lambda data: edited(data, lambda raw: raw.update(records={"a": 1})),
    "records are numbers": lambda data: edited(data, lambda raw: raw.update(records=[1, 2])),
    "records are strings": lambda data: edited(data, lambda raw: raw.update(records=["a", "b"])),
    "an empty record": lambda data: edited(data, lambda raw: raw.update(records=[{}])),
    "a record too much": lambda data: edited(data, lambda raw: raw["records"].append({})),
    "a field too few": lambda data: edited(data, lambda raw: raw["records"][0].pop("name")),
    "a field too many": lambda data: edited(data, lambda raw: raw["records"][0].update(more=1)),
    "a field of stat too few": lambda data: edited(data, lambda raw: raw["records"][0]["stat"].pop("head")),
    "a field of stat too many": lambda data: edited(data, lambda raw: raw["records"][0]["stat"].update(more=1)),
    "stat is a list": lambda data: edited(data, lambda raw: raw["records"][0].update(stat=[1, 2, 3, 4, 5])),
    "digest cut short": lambda data: edited(data, lambda raw: raw["records"][0].update(digest="ab" * 31)),
    "digest is no digest": in_record("digest", "xy" * 32),
    "digest is a number": in_record("digest", 1),
    "digest is null": in_record("digest", None),
    "at rest is a string": in_record("at_rest", "yes"),
    "at rest is null": in_record("at_rest", None),
    "at rest is a list": in_record("at_rest", [True]),
    "not at rest": in_record("at_rest", value=False),
    "another name": in_record("name", "other.safetensors"),
    "name is null": in_record("name", None),
    "another size": in_record("size", 1),
    "size is a string": in_record("size", str(NBYTES)),
    "another inode": in_record("inode", 0),
    "another head": in_record("head", "00" * 32),
    "modified never": in_record("mtime_ns", 0),
    "changed never": in_record("ctime_ns", 0),
    "changed at infinity": in_record("ctime_ns", float("inf")),
    "name is a list": in_record("name", ["model.safetensors"]),
    "name is an object": in_record("name", {"a": 1}),
    "size is a fraction": in_record("size", float(NBYTES)),
    "packing time is a string": lambda data: edited(data, lambda raw: raw.update(packing_s="long")),
    "packing time is a list": lambda data: edited(data, lambda raw: raw.update(packing_s=[1.0], records=[])),
}


@pytest.mark.spec("IDENT-6")
@pytest.mark.parametrize("malform", list(MALFORMED.values()), ids=list(MALFORMED))
def test_a_malformed_side_file_costs_one_hashing_and_nothing_else(
    model: Model, malform: Callable[[bytes], bytes]
) -> None:
    model.open()
    good = noted(model.source).encode()
    model.side.write_bytes(good)
    model.open()
    assert model.hashed == 0
    model.side.write_bytes(malform(good))
    opened = model.open()
    assert (opened.reason, opened.packed_buffers, model.packed) == (None, 0, 0)
    assert opened.packing_s is None
    assert model.hashed == NBYTES
    (record,) = SideFile.read(model.side).records
    assert record.source == SourceFile("model.safetensors", NBYTES, record.source.digest)


@pytest.mark.spec("IDENT-6")
def test_a_missing_side_file_costs_one_hashing_and_nothing_else(model_at_rest: Model) -> None:
    model = model_at_rest
    model.side.unlink()
    for hashed in [NBYTES, 0]:
        opened = model.open()
        assert (opened.reason, opened.packed_buffers, model.packed) == (None, 0, 0)
        assert model.hashed == hashed


@pytest.mark.spec("IDENT-6")
def test_where_a_side_file_cannot_be_written_each_start_hashes_and_loads(model_at_rest: Model) -> None:
    model = model_at_rest
    model.side.unlink()
    model.side.mkdir()  # what is in its place cannot be replaced
    for _ in range(2):
        opened = model.open()
        assert (opened.reason, opened.packed_buffers, opened.packing_s) == (None, 0, None)
        assert model.hashed == NBYTES
    assert {path.name for path in model.cache.parent.iterdir()} == {model.cache.name, model.side.name}


names = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["\udcff.bin", "a\nb", "model.safetensors"]
)
sizes = st.integers(0, 1 << 63)


@st.composite
def side_files(draw: st.DrawFn) -> SideFile:
    def record() -> Record:
        numbers = [draw(sizes) for _ in range(4)]
        stat = Stat(numbers[0], numbers[1], numbers[2], numbers[3], draw(st.binary(min_size=32, max_size=32)).hex())
        return Record(draw(names), stat, draw(st.binary(min_size=32, max_size=32)).hex(), draw(st.booleans()))

    packing_s = draw(st.none() | st.floats(0, 1e6))
    return SideFile(tuple(record() for _ in range(draw(st.integers(0, 3)))), packing_s)


@pytest.mark.spec("IDENT-6")
@given(side=side_files())
def test_a_side_file_is_read_as_it_was_written(side: SideFile, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "side.json"
    path.write_bytes(side.encode())
    assert SideFile.read(path) == side


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
WHERE: Sequence[tuple[str | int, ...]] = [
    (),
    ("packing_s",),
    ("records",),
    ("records", 0),
    *(("records", 0, name) for name in ("name", "stat", "digest", "at_rest")),
    *(("records", 0, "stat", name) for name in ("size", "mtime_ns", "ctime_ns", "inode", "head")),
]


@pytest.mark.spec("IDENT-6")
@given(where=st.sampled_from(WHERE), value=json_values)
def test_whatever_a_side_file_says_it_is_believed_as_it_was_written_or_not_at_all(
    where: tuple[str | int, ...], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    source, path = folder / "believed.bin", folder / "believed.json"
    if not source.exists():
        write(source, 1000)
    good = noted(source)
    raw = {"": json.loads(good.encode())}
    inside: Any = raw
    for step in ("", *where)[:-1]:
        inside = inside[step]
    inside[("", *where)[-1]] = value
    path.write_text(json.dumps(raw[""]))
    side = SideFile.read(path)
    assert side.packing_s is None or isinstance(side.packing_s, int | float)
    found = believed([source], side)
    known = good.records[0].source
    assert found is None or where == ("packing_s",) or (found[0].name, found[0].nbytes) == (known.name, known.nbytes)
    for identity in found or ():
        assert isinstance(identity.nbytes, int)
        Provenance("model", "int8", (identity,)).model_digest  # noqa: B018 -- it can be taken


@pytest.mark.spec("IDENT-6")
def test_the_side_file_lies_beside_its_cache_file() -> None:
    assert side_path(Path("folder") / "model-int8.rwc") == Path("folder") / "model-int8.rwc.sources.json"
