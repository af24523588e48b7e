"""A model's file and its cache file, built with what `load_or_build` offers, and ways to look at what that costs."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from refinfer.arrays import PAGE_BYTES, Float32Array
from refinfer.clock import RealClock
from refinfer.packing.formats import layout_of
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import Entry, Provenance, SourceFile
from refinfer.weight_cache.identity import SideFile, identify, side_path
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.load_or_build import Contents, Listener, Prepared, load_or_build
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.packers import (
    matrix_key,
    pack_into,
    packer_fingerprint,
    padded_nbytes_of,
    rows_key,
    vectors_key,
)

NAMES = ("a", "b", "table", "norm")
PATIENCE_S = 30
FAR_FUTURE_NS = 1 << 62


def nothing(*_: object) -> None:
    """Do nothing."""


@dataclass
class Site:
    """A model's file, and where its cache file belongs; `step` is called before and after each packing step.

    Its tensors have the names `names`: a table of rows, a vector, else matrices, packed in chunks of `chunk_nbytes`.
    `named` means that a person chose where the cache file belongs.
    """

    source: Path
    cache: Path
    step: Callable[[str], None] = nothing
    shape: tuple[int, int] = (300, 96)  # beyond the first 64 KiB of the source
    names: tuple[str, ...] = NAMES
    chunk_nbytes: int | None = None
    named: bool = False
    fingerprint: bytes = field(default_factory=lambda: packer_fingerprint("int8"))
    packed: list[str] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    waited: list[Path] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path, shape: tuple[int, int] = (300, 96), names: tuple[str, ...] = NAMES) -> Site:
        (folder / "model").mkdir()
        site = cls(folder / "model" / "model.safetensors", folder / "cache" / "model.rwc", shape=shape, names=names)
        site.fill(0)
        return site

    @property
    def nbytes(self) -> int:
        """The bytes of the model's file."""
        return 4 * self.shape[0] * self.shape[1]

    def fill(self, seed: int) -> None:
        w = np.random.default_rng(seed).standard_normal(self.shape, np.float32)
        self.source.write_bytes(w.tobytes())

    def with_model(self, seed: int) -> Site:
        """Return a site for the same cache file with another model's file."""
        other = replace(self, source=self.source.with_name(f"{seed}.safetensors"))
        other.fill(seed)
        return other

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
                key = matrix_key(layout_of("int8", *self.shape, self.chunk_nbytes), weight)
                found[key] = w * np.float32(1 + ord(name))
        return found

    def pack(self, w: Float32Array, key: PackKey, buffer: Bytes) -> Iterator[int]:
        self.packed.append(key.name)
        self.step(key.name)
        for _ in pack_into(w, key, buffer):
            yield 0  # so that what is reported as progress is what is hashed
            self.step(key.name)

    def contents(self, sources: tuple[SourceFile, ...]) -> Contents:
        packs = {key: partial(self.pack, w, key) for key, w in self.tensors(sources[0].digest).items()}
        return Contents(Provenance(str(self.source.parent), "int8", sources, self.fingerprint), dict(packs))

    def open(self, on_wait: Callable[[], None] = nothing) -> Prepared:
        self.packed.clear()
        self.progress.clear()
        listener = Listener(
            progress=self.progress.append, on_wait=on_wait, on_long_wait=self.waited.append, warn=self.warned.append
        )
        clock = RealClock()
        return load_or_build(self.cache, [self.source], self.contents, clock=clock, listener=listener, named=self.named)

    def open_checked(self) -> Prepared:
        """Open the cache file, and check what it holds."""
        prepared = self.open()
        self.check(prepared)
        return prepared

    @property
    def hashed(self) -> int:
        """The bytes that were hashed when it was opened last."""
        return sum(self.progress)

    def check(self, prepared: Prepared) -> None:
        """Check that every buffer of the file has the bytes that packing its tensor gives, and all of it is sound."""
        assert not list(mapped_of(prepared).problems())
        tensors = self.tensors(hashlib.sha256(self.source.read_bytes()).digest())
        assert prepared.keys == {key.name: key for key in tensors}
        for key, w in tensors.items():
            expected = np.zeros(padded_nbytes_of(key), np.uint8)
            list(pack_into(w, key, expected))
            assert prepared.provider[key].tobytes() == expected.tobytes(), key.name

    def check_alone(self, prepared: Prepared) -> None:
        """Check that too, and that what was just packed is reported, and that there are no other files."""
        self.check(prepared)
        outcome = prepared.outcome
        assert (outcome.state, outcome.path) == ("built" if outcome.reason else "loaded", str(self.cache))
        assert outcome.packed_buffers == len(self.packed)
        assert outcome.packed_bytes == sum(padded_nbytes_of(prepared.keys[name]) for name in self.packed)
        assert outcome.held_buffers == len(prepared.provider)
        assert outcome.held_bytes == sum(map(padded_nbytes_of, prepared.provider))
        assert mapped_of(prepared).path == self.cache
        assert self.folder <= self.own_names

    @property
    def own_names(self) -> set[str]:
        return {self.cache.name, side_path(self.cache).name}

    @property
    def folder(self) -> set[str]:
        """The names of what lies where the cache file belongs."""
        return {path.name for path in self.cache.parent.iterdir()}

    @property
    def files(self) -> dict[str, bytes]:
        """What lies where the cache file belongs."""
        return taken(self.cache.parent)


def mapped_of(prepared: Prepared) -> MappedFile:
    """Return the file that was mapped."""
    assert prepared.mapped is not None
    return prepared.mapped


def entries_of(prepared: Prepared) -> tuple[Entry, ...]:
    assert isinstance(prepared.provider, FileWeightCacheProvider)
    return prepared.provider.entries


def put(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder hold exactly these files; drafts have the mode of drafts."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
        if name.endswith(".tmp"):
            (folder / name).chmod(0o600)  # as drafts are


def taken(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def come_to_rest(*paths: Path) -> None:
    """Wait until the clock of the file system has left the tick in which the files were changed last."""
    ctime = max(path.stat().st_ctime_ns for path in paths)
    tick = 110_000_000 if all(path.stat().st_ctime_ns % 1_000_000_000 for path in paths) else 2_100_000_000
    probe, deadline = paths[0].with_name("probe"), time.monotonic() + PATIENCE_S
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_mtime_ns > ctime + tick:
            probe.unlink()
            return
        assert time.monotonic() < deadline


def noted(*paths: Path) -> SideFile:
    """Return what the side file of files that are at rest holds."""
    return SideFile(identify(paths, SideFile(()), FAR_FUTURE_NS, nothing))


# What is read and held, on Linux.

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has read and holds")


def bytes_read() -> int:
    """Return the bytes that this process has read, from wherever."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def resident_bytes(path: Path) -> int:
    """Return how many bytes of a file are in memory, in whole pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        pages = np.zeros(-(-view.size // PAGE_BYTES), np.uint8)
        address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size)
        assert not libc.mincore(address, size, ctypes.c_void_p(pages.ctypes.data)), os.strerror(ctypes.get_errno())
        del view
    return int((pages & 1).sum()) * PAGE_BYTES


def resident_bytes_of_mapping(path: Path) -> int:
    """Return how much of its mappings of a file this process holds."""
    regions = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    of_file = [region for region in regions if region.partition("\n")[0].endswith(str(path))]
    return 1024 * sum(int(re.findall(r"^Rss:\s*(\d+)", region, flags=re.MULTILINE)[0]) for region in of_file)


def drop_from_memory(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_bytes(path):
        pytest.skip("this file system keeps its files in memory")
