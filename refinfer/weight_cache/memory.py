"""The provider in memory: packed buffers that live as long as the process.

Keeps each buffer in memory of its own. Leaves to others: files.
Read more: tutorial 04; clauses CACHE-1 to CACHE-12, CACHE-14.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.packing.layout import Bytes
from refinfer.weight_cache import provider
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.provider import DictFace, State

__all__ = ["MemoryWeightCacheProvider"]


class MemoryWeightCacheProvider(DictFace):
    """Keeps each buffer in anonymous memory of its own, on a page."""

    def __init__(self) -> None:
        self._state = State.BUILDING
        self._offsets: dict[PackKey, int] = {}
        self._buffers: dict[int, Bytes] = {}
        self._end = PAGE_BYTES
        self._reserved: Bytes | None = None

    def look_up(self, key: PackKey) -> int | None:
        """Return the offset of the buffer of `key`, or None."""
        provider.require("look_up", self._state)
        return self._offsets.get(key)

    def reserve_space(self, nbytes: int) -> Bytes:
        """Return a buffer of `nbytes` zeros that starts on a page.

        Raises:
            WeightCacheStateError: the cache is not being built.
            PackingError: `nbytes` is below one.
        """
        provider.require("reserve_space", self._state)
        if nbytes < 1:
            raise PackingError(f"at least one byte can be reserved, not {nbytes}")
        memory = np.zeros(nbytes + PAGE_BYTES, np.uint8)
        start = -memory.ctypes.data % PAGE_BYTES
        self._reserved = memory[start : start + nbytes]
        return self._reserved

    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        """Keep `buffer` under `key`, unless that key has a buffer already; return the offset.

        These laws apply in their order:

        1. The verb works in the states that `provider.require` allows.
        2. An existing key wins, even once the cache is finalized: its offset is returned, and `buffer` is dropped
           without a look at its size. Two keys are the same if all their fields are equal, as `==` and the dict
           `_offsets` compare them; they need not be one object.
        3. Once the cache is finalized, a new key is refused: `the weight cache is finalized: 'w' cannot be inserted`.
        4. A buffer that does not fit its key is refused (`provider.require_fitting`), and nothing is kept of it.
        5. A buffer that lies in the latest reservation (`provider.lies_at`) is kept in place. Any other buffer is
           copied to space that is reserved for it, so every buffer starts on a page.
        6. Space belongs to one key. Once it is committed, it is no longer the latest reservation.
        7. The first offset is `PAGE_BYTES`. Each later one is where the buffer before it ends.
        8. What is kept can be read, but not written to.

        Raises:
            WeightCacheStateError: the key is new, and the cache is finalized, or the cache was deleted.
            PackingError: the buffer does not have the size of its key.
        """
        # lab 05: return the offset of the key, and first keep the buffer if the key is new
        provider.require("look_up_or_insert", self._state)
        if (offset := self._offsets.get(key)) is not None:
            return offset
        if self._state is not State.BUILDING:
            raise WeightCacheStateError(f"the weight cache is finalized: {key.name!r} cannot be inserted")
        provider.require_fitting(key, buffer)
        if not provider.lies_at(buffer, self._reserved):
            np.copyto(self.reserve_space(buffer.size), buffer)
        assert self._reserved is not None
        offset, kept = self._end, self._reserved[: buffer.size]
        self._reserved = None
        kept.flags.writeable = False
        self._offsets[key], self._buffers[offset] = offset, kept
        self._end += kept.size
        return offset
        # end lab

    def offset_to_addr(self, offset: int) -> Bytes:
        """Return the buffer at `offset`, read-only.

        Raises:
            WeightCacheStateError: no buffer starts there.
        """
        provider.require("offset_to_addr", self._state)
        if offset not in self._buffers:
            raise WeightCacheStateError(f"no buffer starts at offset {offset}")
        return self._buffers[offset]

    def is_finalized(self) -> bool:
        """Return whether nothing more can be inserted."""
        return self._state is not State.BUILDING

    def finalize(self) -> None:
        """Finish building; nothing can be inserted afterwards."""
        provider.require("finalize", self._state)
        self._state = State.FINALIZED

    def delete_cache(self) -> None:
        """Release every buffer; views that are still held stay valid."""
        self._state = State.DELETED
        self._offsets, self._buffers, self._reserved = {}, {}, None

    def __iter__(self) -> Iterator[PackKey]:
        return iter(self._offsets)

    def __len__(self) -> int:
        return len(self._offsets)
