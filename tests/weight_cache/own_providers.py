"""Weight cache providers that somebody might write, for `pytest --provider own_providers:Right`: one right, some wrong.

`Right` keeps its buffers in a list, and an offset is a place in it. Each wrong one breaks one law, and has its name
from that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import padded_nbytes_of
from refinfer.weight_cache.provider import DictFace, State, require, require_fitting


class Right(DictFace):
    """Keeps every law."""

    def __init__(self) -> None:
        self.state = State.BUILDING
        self.space: Bytes | None = None
        self.listed: list[PackKey] = []
        self.buffers: list[Bytes] = []

    def look_up(self, key: PackKey) -> int | None:
        require("look_up", self.state)
        return self.listed.index(key) if key in self.listed else None

    def reserve_space(self, nbytes: int) -> Bytes:
        require("reserve_space", self.state)
        if nbytes < 1:
            raise PackingError(f"at least one byte, not {nbytes}")
        memory = np.zeros(nbytes + PAGE_BYTES, np.uint8)
        self.space = memory[-memory.ctypes.data % PAGE_BYTES :][:nbytes]
        return self.space

    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        require("look_up_or_insert", self.state)
        if key in self.listed:
            return self.listed.index(key)
        if self.is_finalized():
            raise WeightCacheStateError("finalized: nothing can be inserted")
        require_fitting(key, buffer)
        if self.space is not None and buffer.ctypes.data == self.space.ctypes.data:
            kept = self.space[: buffer.size]
        else:
            kept = buffer.copy()
        kept.flags.writeable, self.space = False, None
        self.listed.append(key)
        self.buffers.append(kept)
        return len(self.listed) - 1

    def offset_to_addr(self, offset: int) -> Bytes:
        require("offset_to_addr", self.state)
        if not 0 <= offset < len(self.buffers):
            raise WeightCacheStateError(f"nothing was ever inserted at {offset}")
        return self.buffers[offset]

    def is_finalized(self) -> bool:
        return self.state is not State.BUILDING

    def finalize(self) -> None:
        require("finalize", self.state)
        self.state = State.FINALIZED

    def delete_cache(self) -> None:
        self.state, self.space, self.listed, self.buffers = State.DELETED, None, [], []

    def __iter__(self) -> Iterator[PackKey]:
        return iter(self.listed)

    def __len__(self) -> int:
        return len(self.listed)


class InOtherWords(Right):
    """Keeps every law, and says in words of its own what breaks one: only the verb is named."""

    def __getitem__(self, key: PackKey) -> Bytes:
        if self.state is State.DELETED:
            raise WeightCacheStateError("gone")
        if key not in self.listed:
            raise KeyError
        return self.buffers[self.listed.index(key)]

    def reserve_space(self, nbytes: int) -> Bytes:
        if self.state is State.BUILDING and nbytes < 1:
            raise PackingError("nothing to reserve")
        return super().reserve_space(nbytes)

    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        try:
            return super().look_up_or_insert(key, buffer)
        except PackingError:
            raise PackingError("that does not fit") from None
        except WeightCacheStateError:
            raise WeightCacheStateError("too late for look_up_or_insert") from None

    def offset_to_addr(self, offset: int) -> Bytes:
        try:
            return super().offset_to_addr(offset)
        except WeightCacheStateError:
            raise WeightCacheStateError("offset_to_addr has nothing there") from None


class LastOneWins(MemoryWeightCacheProvider):
    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        if key in self._offsets and not self.is_finalized():
            self._buffers[self._offsets[key]] = buffer.copy()
        return super().look_up_or_insert(key, buffer)


class ReservesWhatWasThere(MemoryWeightCacheProvider):
    def reserve_space(self, nbytes: int) -> Bytes:
        space = super().reserve_space(nbytes)
        space[nbytes // 2] = len(self._offsets) > 2
        return space


class CopiesNothing(MemoryWeightCacheProvider):
    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        offset = super().look_up_or_insert(key, buffer)
        self._buffers[offset] = buffer.view()
        self._buffers[offset].flags.writeable = False
        return offset


class GivesWritableViews(MemoryWeightCacheProvider):
    def offset_to_addr(self, offset: int) -> Bytes:
        view = super().offset_to_addr(offset)
        view.flags.writeable = self.is_finalized()
        return view


class KnowsNoOrder(MemoryWeightCacheProvider):
    def __iter__(self) -> Iterator[PackKey]:
        return iter(sorted(self._offsets, key=lambda key: key.name))


class ForgetsItsEnd(MemoryWeightCacheProvider):
    def delete_cache(self) -> None:
        self._reserved = None


class TakesAnySize(MemoryWeightCacheProvider):
    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        return super().look_up_or_insert(key, np.resize(buffer, padded_nbytes_of(key)))


WRONG = [
    LastOneWins,
    ReservesWhatWasThere,
    CopiesNothing,
    GivesWritableViews,
    KnowsNoOrder,
    ForgetsItsEnd,
    TakesAnySize,
]
