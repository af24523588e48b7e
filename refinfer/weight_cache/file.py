"""The provider in a file: packed once, then mapped by every process, read-only and shared.

Knows: mappings, and when a file may be used, must be built, or completed. Does not know: what its bytes mean
(`format`), how they become durable (`publish`), models.
Spec: CACHE-1 to CACHE-12, FILE-9 to FILE-15. Tutorial: 05, 06.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import (
    CacheFileError,
    DamagedWeightsError,
    PackingError,
    WeightCacheError,
    WeightCacheStateError,
)
from refinfer.packing.formats import Bytes
from refinfer.trace import wall_time_ns
from refinfer.weight_cache.checksum import checksum
from refinfer.weight_cache.format import (
    Entry,
    Header,
    Index,
    Provenance,
    StoredChunk,
    decode_header,
    decode_index,
    encode_file,
    encode_header,
    unfinished,
)
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.packers import chunks_of
from refinfer.weight_cache.provider import DictFace, State, lies_at, require, require_fitting
from refinfer.weight_cache.publish import Draft, map_behind
from refinfer.weight_cache.sources import tick_ns

__all__ = ["NO_FILE", "FileWeightCacheProvider", "MappedFile", "read_file"]

NO_FILE: Final = "there was no file yet"
"""Why a first start builds."""

_UNKNOWN: Final = Provenance("", "", ())


def read_file(path: Path) -> tuple[Header, Index]:
    """Read header and index of a cache file, but no weights; every rule of the format is checked.

    Raises:
        CacheFileError: the file cannot be used; the text says why.
    """
    with _open(path) as file:
        return _read(file)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise CacheFileError(NO_FILE) from None
    except OSError as error:
        raise CacheFileError(f"it cannot be read: {error.strerror}") from None
    except ValueError:  # of mmap, where the file was cut short meanwhile
        raise CacheFileError("it changed while it was opened") from None


def _read(file: IO[bytes]) -> tuple[Header, Index]:
    header = decode_header(file.read(PAGE_BYTES), os.fstat(file.fileno()).st_size)
    file.seek(header.index_offset)
    return header, decode_index(header, file.read(header.index_nbytes))


class MappedFile:
    """A whole cache file, mapped read-only and shared with every process that maps it.

    `opened` is the name it has now, where that is not yet `path`.

    Raises:
        CacheFileError: it cannot be used; the text says why.
    """

    # --8<-- [start:mapped]
    def __init__(self, path: Path, opened: Path | None = None) -> None:
        self.path = path
        with _open(opened or path) as file:
            self.header, self.index = _read(file)
            self._map = mmap.mmap(file.fileno(), self.header.file_nbytes, access=mmap.ACCESS_READ)
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._seen = self._look()

    def bytes(self, offset: int, nbytes: int) -> Bytes:
        """Return some bytes, read-only."""
        return self._bytes[offset : offset + nbytes]

    def is_sound(self, chunk: StoredChunk) -> bool:
        """Tell whether a chunk agrees with its checksum; reads it."""
        return checksum(self.bytes(chunk.offset, chunk.nbytes)) == chunk.checksum

    # --8<-- [end:mapped]

    def changed(self) -> bool:
        """Tell whether anybody wrote to the file since this was last asked; takes a microsecond.

        Raises:
            DamagedWeightsError: it is shorter than it was; touching what is missing would end the process.
        """
        before, self._seen = self._seen, self._look()
        if self._seen[0] < self.header.file_nbytes:
            raise DamagedWeightsError(f"{self.path} was cut short while it was in use; start again")
        return self._seen != before

    def _look(self) -> tuple[int, int, int]:
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    @property
    def age_s(self) -> float:
        """How long ago the file was last written to, as far as its times tell."""
        return (wall_time_ns() - max(self._seen[1:])) * 1e-9

    @property
    def tick_s(self) -> float:
        """How far apart two writes must be for the file's times to tell; a file system may count whole seconds."""
        return tick_ns(self._seen[2]) * 1e-9

    def is_at(self, path: Path) -> bool:
        """Tell whether `path` is still this file."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def lock_memory(self) -> None:
        """Keep the whole file in memory (`mlock`), as XNNPACK's `weight_cache_lock_memory` does.

        Raises:
            WeightCacheError: the limit on locked memory (`ulimit -l`) does not allow it, or the system cannot.
        """
        libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
        address, nbytes = ctypes.c_void_p(self._bytes.ctypes.data), ctypes.c_size_t(self._bytes.size)
        if libc is None or libc.mlock(address, nbytes):
            why = os.strerror(ctypes.get_errno()) if libc else "this system has no mlock"
            raise WeightCacheError(f"{self.path} cannot be locked in memory: {why}")

    def problems(self) -> Iterator[str]:
        """Read every byte, and say everything that is not as it was written."""
        if self._map[:PAGE_BYTES] != encode_header(self.header):
            yield "the header is not followed by zeros"
        index = self._map[self.header.index_offset : self.header.file_nbytes]
        if hashlib.sha256(index).digest() != self.header.index_digest:
            yield "the index is damaged"
        for entry in self.index.entries:
            for number, chunk in enumerate(entry.chunks):
                if not self.is_sound(chunk):
                    yield f"{entry.key.name}: chunk {number} does not agree with its checksum"
            if hashlib.sha256(self.bytes(entry.offset, entry.nbytes).data).digest() != entry.digest:
                yield f"{entry.key.name}: the buffer does not agree with its SHA-256"


@dataclass(slots=True)
class _Given:
    """A mapping that was given out: where it begins in the file and in memory, how much of it was committed."""

    start: int
    address: int
    committed: int = 0


class FileWeightCacheProvider(DictFace):
    """Packed buffers in one file: `build(path)` begins a new one, `load(path)` maps a whole one.

    Laws: the file appears under its name when it is finalized, whole; until then, and if that never happens, whatever
    lay there stays. A mapped file is never written. The mapping lives as long as a view of it does.
    """

    def __init__(self, held: Draft | MappedFile, provenance: Provenance = _UNKNOWN) -> None:
        self.path = held.path
        self.provenance = provenance
        self._entries: dict[PackKey, Entry] = {}
        self._views: dict[int, Bytes] = {}
        self._end = PAGE_BYTES
        self._reserved: Bytes | None = None
        self._given: weakref.WeakKeyDictionary[Any, _Given] = weakref.WeakKeyDictionary()
        self._draft = held if isinstance(held, Draft) else None
        if isinstance(held, Draft):
            self._state = State.BUILDING
            self._mapped: MappedFile | None = None
            held.write(0, encode_header(unfinished(provenance)))
        else:
            self._use(held, State.LOADED)

    @classmethod
    def build(cls, path: Path, provenance: Provenance = _UNKNOWN) -> FileWeightCacheProvider:
        """Begin a new file; waits while another process builds it.

        Raises:
            OSError: the folder does not let a file be made.
        """
        return cls(Draft(path), provenance)

    @classmethod
    def load(cls, path: Path) -> FileWeightCacheProvider:
        """Map a cache file.

        Raises:
            CacheFileError: it cannot be used; the text says why.
        """
        return cls(MappedFile(path))

    def _use(self, mapped: MappedFile, state: State) -> None:
        self._mapped = mapped
        self.provenance = mapped.index.provenance
        self._entries = {entry.key: entry for entry in mapped.index.entries}
        self._views = {entry.offset: mapped.bytes(entry.offset, entry.nbytes) for entry in mapped.index.entries}
        self._state = state

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the file holds, in the order of insertion."""
        return tuple(self._entries.values())

    @property
    def mapped(self) -> MappedFile:
        """The mapped file, once there is one.

        Raises:
            WeightCacheStateError: it is being built, or deleted.
        """
        if self._mapped is None:
            raise WeightCacheStateError(f"a weight cache that is {self._state.value} is not mapped")
        return self._mapped

    def look_up(self, key: PackKey) -> int | None:
        """Return the offset in the file of the buffer of `key`, or None."""
        require("look_up", self._state)
        entry = self._entries.get(key)
        return entry.offset if entry else None

    def reserve_space(self, nbytes: int) -> Bytes:
        """Return `nbytes` zeros of the file to come, for which the disk has room.

        Raises:
            WeightCacheStateError: the file is not being built.
            PackingError: `nbytes` is below one.
            OSError: the disk is full.
        """
        require("reserve_space", self._state)
        assert self._draft is not None
        if nbytes < 1:
            raise PackingError(f"at least one byte can be reserved, not {nbytes}")
        used = self._draft.nbytes - self._end  # by a reservation that was never committed
        self._draft.secure(self._end, -(-nbytes // PAGE_BYTES) * PAGE_BYTES)
        mapped = self._draft.map(self._end, nbytes)
        self._reserved = np.frombuffer(mapped, np.uint8)
        self._given[mapped.obj] = _Given(self._end, self._reserved.ctypes.data)
        self._reserved[: max(used, 0)] = 0
        return self._reserved

    def let_go(self) -> None:
        """Tell the system that what was packed so far need not stay resident; nothing is lost."""
        if self._reserved is not None and self._draft is not None:
            self._draft.let_go(self._reserved)

    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        """Commit `buffer` under `key`, unless there is one; equal buffers are kept once.

        Raises:
            WeightCacheStateError: the key is new, and the cache is finalized.
            PackingError: the buffer does not have the size of its key.
            OSError: the disk is full.
        """
        require("look_up_or_insert", self._state)
        if (entry := self._entries.get(key)) is not None:
            return entry.offset
        if self._state is not State.BUILDING:
            raise WeightCacheStateError(f"the weight cache is finalized: {key.name!r} cannot be inserted")
        require_fitting(key, buffer)
        if not lies_at(buffer, self._reserved):
            data = self._copied_from_reserved(buffer)
            np.copyto(self.reserve_space(buffer.size), data)
        assert self._reserved is not None
        view = self._reserved[: buffer.size]
        digest = hashlib.sha256(view.data).digest()
        places = tuple((chunk.offset, chunk.nbytes) for chunk in chunks_of(key))
        for twin in self._entries.values():
            if twin.digest == digest and [(c.offset - twin.offset, c.nbytes) for c in twin.chunks] == list(places):
                self._entries[key] = replace(twin, key=key)
                return twin.offset
        chunks = tuple(StoredChunk(self._end + at, n, checksum(view[at : at + n])) for at, n in places)
        self._entries[key] = Entry(key, digest, chunks)
        if (given := self._given.get(map_behind(view))) is not None:
            given.committed = view.size
        self.let_go()
        self._reserved = None
        view.flags.writeable = False
        self._views[self._end] = view
        self._end += view.size
        return chunks[0].offset

    def _copied_from_reserved(self, buffer: Bytes) -> Bytes:
        """Return a buffer that a new reservation will not clear: a copy where it lies in the present one.

        Raises:
            WeightCacheStateError: it lies in space that a later reservation has taken over.
        """
        behind = map_behind(buffer)
        given = self._given.get(behind) if behind is not None else None
        if given is None or buffer.ctypes.data - given.address + buffer.size <= given.committed:
            return buffer
        if self._reserved is None or behind is not map_behind(self._reserved):
            raise WeightCacheStateError("this space was reserved, but not committed before other space was reserved")
        return buffer.copy()

    def offset_to_addr(self, offset: int) -> Bytes:
        """Return the buffer that starts at `offset`, read-only.

        Raises:
            WeightCacheStateError: no buffer starts there.
        """
        require("offset_to_addr", self._state)
        if offset not in self._views:
            raise WeightCacheStateError(f"no buffer starts at offset {offset}")
        return self._views[offset]

    def is_finalized(self) -> bool:
        """Return whether nothing more can be inserted."""
        return self._state is not State.BUILDING

    def finalize(self) -> None:
        """Write the index and the header, publish the file, map it.

        Raises:
            OSError: the disk is full; nothing is published.
        """
        require("finalize", self._state)
        if self._draft is None:
            return
        # Whoever still holds space that was never committed could write to it: then the index comes behind it.
        end = -(-self._draft.nbytes // PAGE_BYTES) * PAGE_BYTES if self._is_held() else self._end
        index, header = encode_file(Index(self.provenance, self.entries), end)
        self._draft.write(end, index)
        self._draft.write(0, header)
        self._draft.settle(end + len(index))
        mapped = MappedFile(self.path, self._draft.temporary)  # once published, the name may already be another's
        self._draft.publish()
        mapped.changed()  # renaming changes a file's times
        self._draft = self._reserved = None
        self._use(mapped, State.FINALIZED)

    def _is_held(self) -> bool:
        """Tell whether anybody still holds space that was never committed."""
        self._reserved = None
        return any(given.start >= self._end for given in self._given.values())

    def check(self) -> None:
        """Walk every invariant of a complete cache; reads every byte.

        Raises:
            DamagedWeightsError: one is broken; the text says which.
            WeightCacheStateError: it is being built, or deleted.
        """
        for problem in self.mapped.problems():
            raise DamagedWeightsError(f"{self.path}: {problem}")

    def delete_cache(self) -> None:
        """Release mapping and memory; an unfinished draft goes, a published file stays."""
        if self._draft is not None:
            self._draft.abandon()
        self._state = State.DELETED
        self._entries, self._views = {}, {}
        self._draft = self._mapped = self._reserved = None

    def __iter__(self) -> Iterator[PackKey]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
