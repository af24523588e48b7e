"""A weight cache provider to take apart: packed buffers in a dictionary, an offset is a place in its order.

Knows: its buffers. Does not know: files. Tutorial 04 explains it and runs the tests of providers on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.provider import DictFace, State, lies_at, require, require_fitting


# --8<-- [start:shelf]
class Shelf(DictFace):
    """Keeps buffers in a dictionary, in memory."""

    def __init__(self) -> None:
        self.state, self.space = State.BUILDING, np.zeros(0, np.uint8)
        self.buffers: dict[PackKey, Bytes] = {}

    def look_up(self, key: PackKey) -> int | None:
        require("look_up", self.state)
        return list(self.buffers).index(key) if key in self.buffers else None

    def reserve_space(self, nbytes: int) -> Bytes:
        require("reserve_space", self.state)
        if nbytes < 1:
            raise PackingError(f"at least one byte can be reserved, not {nbytes}")
        memory = np.zeros(nbytes + PAGE_BYTES, np.uint8)
        self.space = memory[-memory.ctypes.data % PAGE_BYTES :][:nbytes]  # begins on a page
        return self.space

    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        require("look_up_or_insert", self.state)
        if key not in self.buffers:
            if self.is_finalized():
                raise WeightCacheStateError(f"finalized: {key.name!r} cannot be inserted")
            require_fitting(key, buffer)
            self.buffers[key] = buffer[:] if lies_at(buffer, self.space) else buffer.copy()
            self.buffers[key].flags.writeable = False
        return list(self.buffers).index(key)

    def offset_to_addr(self, offset: int) -> Bytes:
        require("offset_to_addr", self.state)
        if offset not in range(len(self.buffers)):
            raise WeightCacheStateError(f"no buffer lies at {offset}")
        return list(self.buffers.values())[offset]

    def is_finalized(self) -> bool:
        return self.state is not State.BUILDING

    def finalize(self) -> None:
        require("finalize", self.state)
        self.state = State.FINALIZED

    def delete_cache(self) -> None:
        self.state, self.buffers = State.DELETED, {}

    def __iter__(self) -> Iterator[PackKey]:
        return iter(self.buffers)

    def __len__(self) -> int:
        return len(self.buffers)


# --8<-- [end:shelf]
