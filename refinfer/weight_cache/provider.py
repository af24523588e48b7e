"""The seam: a weight cache provider, a dictionary that packing fills and products read.

Knows: the verbs, in which state each may be used, and the dictionary's face. Does not know: where buffers lie;
`memory` and `file` do.
Spec: CACHE-1 to CACHE-12. Tutorial: 04.

The verbs are those of XNNPACK's `xnn_weights_cache_provider` (`include/xnnpack.h`), which "behaves as a dictionary
that XNNPACK will fill and query":

    look_up(key)                      the offset of a buffer, or None
    reserve_space(nbytes)             a buffer of zeros to pack into; one at a time, a later one takes its place
    look_up_or_insert(key, buffer)    an existing key wins and the data is dropped; otherwise commits; the offset
    offset_to_addr(offset)            a read-only view of the buffer
    is_finalized()                    true once nothing more can be inserted
    delete_cache()                    releases memory and mappings; never a file

XNNPACK's `is_finalized` is already true while a file is being built, and means that buffers keep their addresses;
here it means what its name says. What ends the building, `finalize`, XNNPACK leaves to each provider.

    state       what it is                                        leaves it by
    building    buffers are inserted, by one thread               finalize, delete_cache
    finalized   complete; any thread may read without a lock      delete_cache
    loaded      complete, and found that way                      delete_cache
    deleted     nothing but is_finalized and delete_cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.packers import padded_nbytes_of

__all__ = ["ALLOWED", "DictFace", "Pack", "State", "WeightCacheProvider", "lies_at", "require", "require_fitting"]

Pack = Callable[[Bytes], Iterable[int]]
"""Packs into a buffer of zeros step by step, giving the bytes done so far."""


class State(Enum):
    """Where a provider is in its life."""

    BUILDING = "building"
    FINALIZED = "finalized"
    LOADED = "loaded"
    DELETED = "deleted"


_READING: Final = frozenset({State.BUILDING, State.FINALIZED, State.LOADED})

ALLOWED: Final[Mapping[str, frozenset[State]]] = MappingProxyType(
    {
        "look_up": _READING,
        "offset_to_addr": _READING,
        "look_up_or_insert": _READING,  # once finalized, only for keys that are there
        "reserve_space": frozenset({State.BUILDING}),
        "finalize": _READING,
        "is_finalized": frozenset(State),
        "delete_cache": frozenset(State),
    }
)
"""The verbs, and the states that have them."""


class WeightCacheProvider(Protocol):
    """A dictionary of packed buffers; see the head of this module for the verbs and their laws."""

    def look_up(self, key: PackKey) -> int | None:
        """Return the offset of the buffer of `key`, or None; reads no weight."""
        ...

    def reserve_space(self, nbytes: int) -> Bytes:
        """Return `nbytes` zeros to pack into, on a page; valid until the next reservation, or the end of building."""
        ...

    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        """Commit `buffer` under `key` unless there is one; copies what does not lie in reserved space.

        Reserved space is handed over: it must not be written to afterwards.
        """
        ...

    def offset_to_addr(self, offset: int) -> Bytes:
        """Return the buffer at an offset that this provider gave, read-only."""
        ...

    def is_finalized(self) -> bool:
        """Return whether nothing more can be inserted."""
        ...

    def finalize(self) -> None:
        """End the building; again is allowed, and does nothing."""
        ...

    def delete_cache(self) -> None:
        """Release memory and mappings; views that are still held stay valid. Again is allowed."""
        ...

    def __getitem__(self, key: PackKey) -> Bytes: ...
    def __contains__(self, key: object) -> bool: ...
    def __iter__(self) -> Iterator[PackKey]: ...
    def __len__(self) -> int: ...

    def get_or_pack(self, key: PackKey, pack: Pack) -> Bytes:
        """Return the buffer of `key`; where there is none, pack it, and keep it while building."""
        ...


# --8<-- [start:face]
class DictFace(Mapping[PackKey, Bytes]):
    """The face of a dictionary, from the verbs; a provider adds its verbs, `__iter__` and `__len__`."""

    __eq__ = object.__eq__  # two providers are not one for having equal buffers
    __hash__ = object.__hash__

    def __getitem__(self: WeightCacheProvider, key: PackKey) -> Bytes:
        offset = self.look_up(key)
        if offset is None:
            raise KeyError(key)
        return self.offset_to_addr(offset)

    def __contains__(self: WeightCacheProvider, key: object) -> bool:
        return isinstance(key, PackKey) and self.look_up(key) is not None

    def get_or_pack(self: WeightCacheProvider, key: PackKey, pack: Pack) -> Bytes:
        """Return the buffer of `key`: a hit reads no weight and packs nothing.

        A miss packs: into reserved space while building, so that the next call is a hit; once finalized, into memory
        of the caller's own.
        """
        offset = self.look_up(key)
        if offset is None:
            nbytes = padded_nbytes_of(key)
            buffer = np.zeros(nbytes, np.uint8) if self.is_finalized() else self.reserve_space(nbytes)
            for _ in pack(buffer):
                pass
            if self.is_finalized():
                return buffer
            offset = self.look_up_or_insert(key, buffer)
        return self.offset_to_addr(offset)


# --8<-- [end:face]


def require(verb: str, state: State) -> None:
    """Check that `state` has `verb`.

    Raises:
        WeightCacheStateError: it does not.
    """
    if state not in ALLOWED[verb]:
        raise WeightCacheStateError(f"a weight cache that is {state.value} has no {verb}")


def require_fitting(key: PackKey, buffer: Bytes) -> None:
    """Check that a buffer has the size that its key means.

    Raises:
        PackingError: it is not one row of bytes, or of another size.
    """
    if buffer.dtype != np.uint8 or buffer.shape != (padded_nbytes_of(key),) or not buffer.flags.c_contiguous:
        raise PackingError(
            f"{key.name!r} packs into {padded_nbytes_of(key)} bytes in whole pages of {PAGE_BYTES}, "
            f"not into {buffer.dtype} {list(buffer.shape)}"
        )


def lies_at(buffer: Bytes, reserved: Bytes | None) -> bool:
    """Tell whether a buffer is the beginning of reserved space, whichever view of it."""
    return reserved is not None and buffer.size <= reserved.size and buffer.ctypes.data == reserved.ctypes.data
