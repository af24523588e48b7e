"""A weight cache provider: a dictionary of packed buffers, which packing fills and products read.

Defines its methods (the verbs), the states in which each may be called, and how it behaves as a dictionary. Leaves to
others: where buffers are kept (`memory`, `file`).
Read more: tutorial 04; clauses CACHE-1 to CACHE-12.

The verbs are those of XNNPACK's `xnn_weights_cache_provider` (`include/xnnpack.h`), which "behaves as a dictionary
that XNNPACK will fill and query":

    look_up(key)                      returns the offset of a buffer (its place in the cache), or None
    reserve_space(nbytes)             returns a buffer of zeros to pack into
    look_up_or_insert(key, buffer)    commits the buffer (enters it under its key) if the key is new; returns its offset
    offset_to_addr(offset)            returns a read-only view of the buffer
    is_finalized()                    returns true once nothing more can be inserted
    delete_cache()                    releases memory and mapped files, but deletes no file

A buffer is committed without a copy only if it is the latest that was reserved.

XNNPACK's `is_finalized` is already true while a file is being built, and means that buffers keep their addresses; here
it means what its name says. `finalize`, which ends the building, is not one of XNNPACK's verbs: it leaves that to each
provider.

    state       what it is                                        ended by
    building    buffers are inserted, by one thread               finalize, delete_cache
    finalized   complete; any thread may read without a lock      delete_cache
    loaded      complete since an earlier start                   delete_cache
    deleted     only is_finalized and delete_cache may be called
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
"""A function that packs into a buffer of zeros step by step, and yields how many bytes are done so far."""


class State(Enum):
    """The states of a provider; the head of this module explains them."""

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
"""For each verb the states in which it may be called."""


class WeightCacheProvider(Protocol):
    """A dictionary of packed buffers; the head of this module explains its verbs and states."""

    def look_up(self, key: PackKey) -> int | None:
        """Return the offset of the buffer of `key`, or None; reads no weight."""
        ...

    def reserve_space(self, nbytes: int) -> Bytes:
        """Return `nbytes` zeros that begin on a page; valid until the next reservation or the end of building."""
        ...

    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        """Return the offset of the buffer of `key`; if the key is new, commit `buffer` first.

        A buffer is copied unless it lies in the latest reservation. Reserved space that was committed must not be
        written to afterwards.
        """
        ...

    def offset_to_addr(self, offset: int) -> Bytes:
        """Return a read-only view of the buffer at an offset that this provider returned."""
        ...

    def is_finalized(self) -> bool:
        """Return whether nothing more can be inserted."""
        ...

    def finalize(self) -> None:
        """End the building; calling it again does nothing."""
        ...

    def delete_cache(self) -> None:
        """Release memory and mapped files; views that are still in use stay valid. Calling it again does nothing."""
        ...

    def __getitem__(self, key: PackKey) -> Bytes: ...
    def __contains__(self, key: object) -> bool: ...
    def __iter__(self) -> Iterator[PackKey]: ...
    def __len__(self) -> int: ...

    def get_or_pack(self, key: PackKey, pack: Pack) -> Bytes:
        """Return the buffer of `key`; if the key is new, pack it, and while building, commit it."""
        ...


# --8<-- [start:face]
class DictFace(Mapping[PackKey, Bytes]):
    """The methods of a dictionary, made from the verbs; a subclass adds its verbs, `__iter__` and `__len__`."""

    __eq__ = object.__eq__  # providers with equal buffers are still different ones
    __hash__ = object.__hash__

    def __getitem__(self: WeightCacheProvider, key: PackKey) -> Bytes:
        offset = self.look_up(key)
        if offset is None:
            raise KeyError(key)
        return self.offset_to_addr(offset)

    def __contains__(self: WeightCacheProvider, key: object) -> bool:
        return isinstance(key, PackKey) and self.look_up(key) is not None

    def get_or_pack(self: WeightCacheProvider, key: PackKey, pack: Pack) -> Bytes:
        """Return the buffer of `key`; if the key is there, this reads no weight and packs nothing.

        Otherwise it packs: while building, into reserved space, and commits it, so that the next call finds it; once
        finalized, into new memory, which only the caller has.
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
    """Check that `verb` may be called in `state`.

    Raises:
        WeightCacheStateError: it may not.
    """
    if state not in ALLOWED[verb]:
        raise WeightCacheStateError(f"a weight cache that is {state.value} has no {verb}")


def require_fitting(key: PackKey, buffer: Bytes) -> None:
    """Check that a buffer has the size that its key requires.

    Raises:
        PackingError: it has another size, or is not a contiguous array of bytes in one dimension.
    """
    if buffer.dtype != np.uint8 or buffer.shape != (padded_nbytes_of(key),) or not buffer.flags.c_contiguous:
        raise PackingError(
            f"{key.name!r} packs into {padded_nbytes_of(key)} bytes in whole pages of {PAGE_BYTES}, "
            f"not into {buffer.dtype} {list(buffer.shape)}"
        )


def lies_at(buffer: Bytes, reserved: Bytes | None) -> bool:
    """Return whether `buffer` begins where `reserved` begins, and is not longer."""
    return reserved is not None and buffer.size <= reserved.size and buffer.ctypes.data == reserved.ctypes.data
