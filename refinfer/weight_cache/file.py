"""The provider that keeps its buffers in a file: packed once, then mapped by every process, read-only and shared.

Reserves, commits, finalizes, maps and looks up. Leaves to others: what the bytes of the file mean (`format`), the
mapped file (`mapped_file`), how a file is brought safely to disk and gets its name (`publish`), models.
Read more: tutorials 05, 06; clauses CACHE-1 to CACHE-12, FILE-9 to FILE-11.

While it is built, the file is a draft: it has a temporary name. To publish it is to give it its own.

    while it is built                            once finalized
    -----------------                            --------------
    reserve_space     the draft grows, its       finalize writes index and header, publishes the draft
                      new end is mapped          under its name, and maps it read-only
    look_up_or_insert the space is committed

Every reservation is a place of its own in the file. Space that was reserved but never committed stays in the file as
zeros, and is used for nothing else. So a view of it that is still in use can do no harm, even if it is written to.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from refinfer.arrays import PAGE_BYTES, whole_pages
from refinfer.errors import DamagedWeightsError, PackingError, WeightCacheStateError
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.format import (
    Entry,
    Index,
    Provenance,
    StoredChunk,
    encode_file,
    encode_header,
    unfinished,
)
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.packers import chunks_of
from refinfer.weight_cache.provider import DictFace, State, lies_at, require, require_fitting
from refinfer.weight_cache.publish import Draft, Space, named_draft

__all__ = ["FileWeightCacheProvider"]

_UNKNOWN: Final = Provenance("", "", ())


class FileWeightCacheProvider(DictFace):
    """Packed buffers in one file: `build(path)` begins a new one, `load(path)` maps a complete one.

    The file appears under its name when it is finalized, complete. Until then an older file of that name stays as it
    is. A mapped file is never written to, and stays mapped as long as there is a view of it.
    """

    def __init__(self, held: Draft | MappedFile, provenance: Provenance = _UNKNOWN) -> None:
        self.path = held.path
        self.provenance = provenance
        self._entries: dict[PackKey, Entry] = {}
        self._views: dict[int, Bytes] = {}  # of the draft
        self._sizes: dict[int, int] = {}  # of what is mapped
        self._mapped: MappedFile | None = None
        self._draft: Draft | None = None
        self._end = PAGE_BYTES
        self._reserved: Space | None = None
        if isinstance(held, Draft):
            self._state, self._draft = State.BUILDING, held
            held.write(0, encode_header(unfinished(provenance)))
        else:
            self._use(held, State.LOADED)

    @classmethod
    def build(cls, path: Path, provenance: Provenance = _UNKNOWN) -> FileWeightCacheProvider:
        """Begin a new file; waits while another process builds it.

        Raises:
            RequestError: a file lies there that is not a cache file.
            OSError: no file can be made in the folder.
        """
        return cls(named_draft(path), provenance)

    @classmethod
    def load(cls, path: Path) -> FileWeightCacheProvider:
        """Map a cache file.

        Raises:
            CacheFileError: the file cannot be used; `reason` says why.
        """
        return cls(MappedFile(path))

    def _use(self, mapped: MappedFile, state: State) -> None:
        self._mapped = mapped
        self.provenance = mapped.index.provenance
        self._entries = {entry.key: entry for entry in mapped.index.entries}
        self._views = {}
        self._sizes = {entry.offset: entry.padded_nbytes for entry in self.entries}
        self._state = state

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the file holds, in the order of insertion."""
        return tuple(self._entries.values())

    @property
    def mapped(self) -> MappedFile:
        """The mapped file.

        Raises:
            WeightCacheStateError: the cache is being built, or was deleted.
        """
        if self._mapped is None:
            raise WeightCacheStateError(f"a weight cache that is {self._state.value} is not mapped")
        return self._mapped

    def look_up(self, key: PackKey) -> int | None:
        """Return the offset in the file of the buffer of `key`, or None."""
        require("look_up", self._state)
        entry = self._entries.get(key)
        return entry.offset if entry else None

    # --8<-- [start:reserve]
    def reserve_space(self, nbytes: int) -> Bytes:
        """Return a buffer of `nbytes` zeros in the draft, for which space on the disk is reserved too.

        Raises:
            WeightCacheStateError: the file is not being built.
            PackingError: `nbytes` is below one.
            OSError: the disk is full.
        """
        require("reserve_space", self._state)
        assert self._draft is not None
        if nbytes < 1:
            raise PackingError(f"at least one byte can be reserved, not {nbytes}")
        self._reserved = self._draft.grow(self._end, nbytes)
        self._end += whole_pages(nbytes)
        return self._reserved.view

    # --8<-- [end:reserve]

    def drop_pages(self) -> None:
        """Release the memory of the latest reservation; what was packed into it stays in the file."""
        if self._reserved is not None:
            self._reserved.drop_pages()

    # --8<-- [start:commit]
    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        """Return the offset of the buffer of `key`; if the key is new, commit `buffer`. Equal buffers are kept once.

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
        if self._reserved is None or not lies_at(buffer, self._reserved.view):
            np.copyto(self.reserve_space(buffer.size), buffer)
        assert self._reserved is not None
        entry = self._entry_of(key, self._reserved.view[: buffer.size], self._reserved.start)
        self._entries[key] = entry
        if entry.offset == self._reserved.start:
            self._views[entry.offset] = self._reserved.view[: buffer.size]
            self._views[entry.offset].flags.writeable = False
        self.drop_pages()
        self._reserved = None
        return entry.offset

    # --8<-- [end:commit]

    def _entry_of(self, key: PackKey, view: Bytes, start: int) -> Entry:
        """Return the entry of the buffer at `start`, or one with the place of an equal buffer that is there already."""
        digest = hashlib.sha256(view.data).digest()
        places = chunks_of(key)
        chunks = tuple(
            StoredChunk(start + c.offset, c.nbytes, zlib.crc32(view[c.offset : c.offset + c.nbytes].data))
            for c in places
        )
        for twin in self._entries.values():
            if twin.digest == digest and [c.nbytes for c in twin.chunks] == [c.nbytes for c in chunks]:
                return replace(twin, key=key)
        return Entry(key, digest, chunks)

    def offset_to_addr(self, offset: int) -> Bytes:
        """Return the buffer that starts at `offset`, read-only.

        Raises:
            WeightCacheStateError: no buffer starts there.
        """
        require("offset_to_addr", self._state)
        if offset in self._sizes:
            return self.mapped.bytes(offset, self._sizes[offset])
        if offset not in self._views:
            raise WeightCacheStateError(f"no buffer starts at offset {offset}")
        return self._views[offset]

    def is_finalized(self) -> bool:
        """Return whether nothing more can be inserted."""
        return self._state is not State.BUILDING

    # --8<-- [start:finalize]
    def finalize(self) -> None:
        """Write the index and the header, publish the file, map it.

        Raises:
            OSError: the disk is full; nothing is published.
        """
        require("finalize", self._state)
        if self._draft is None:
            return
        for start, end in self._uncommitted():
            self._draft.clear(start, end)
        index, header = encode_file(Index(self.provenance, self.entries), self._end)
        self._draft.write(self._end, index)
        self._draft.write(0, header)
        self._draft.settle(self._end + len(index))
        # opened before it is published: afterwards another process may have put its own file under the name
        mapped = MappedFile(self.path, self._draft.temporary)
        self._draft.publish()
        mapped.changed()  # notes the new times: renaming a file changes them
        self._draft = self._reserved = None
        self._use(mapped, State.FINALIZED)

    # --8<-- [end:finalize]

    def _uncommitted(self) -> Iterator[tuple[int, int]]:
        """Yield the start and the end of each space that was reserved but never committed."""
        end = PAGE_BYTES
        for start, view in sorted(self._views.items()):
            if end < start:
                yield end, start
            end = start + view.size
        if end < self._end:
            yield end, self._end

    def check(self) -> None:
        """Check everything that must hold for a complete cache; reads every byte.

        Raises:
            DamagedWeightsError: something does not hold; the text says what.
            WeightCacheStateError: the cache is being built, or was deleted.
        """
        for problem in self.mapped.problems():
            raise DamagedWeightsError(f"{self.path}: {problem}")

    def delete_cache(self) -> None:
        """Release the mapped file; a draft that was not published is removed, a published file stays."""
        if self._draft is not None:
            self._draft.abandon()
        self._state = State.DELETED
        self._entries, self._views, self._sizes = {}, {}, {}
        self._draft = self._mapped = self._reserved = None

    def __iter__(self) -> Iterator[PackKey]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
