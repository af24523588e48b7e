"""Who reads the chunks that stream: the seam that prefetching fills, and what it is compared with.

Knows: slots, and the order of use. Does not know: threads (`prefetch`), files.
Spec: OFFLOAD-7, READ-1, READ-2. Tutorial: 08, 10.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from refinfer.errors import GenerationError
from refinfer.offload.prefetch import Read
from refinfer.packing.layout import Bytes

__all__ = ["Closed", "LruPages", "OnDemand", "Reader"]


class Reader(Protocol):
    """Gives streamed chunks in the order of the cycle; each is valid until it is released."""

    def take(self, chunk: int) -> Bytes:
        """Return a chunk, by its number in the cycle."""
        ...

    def release(self, taken: Bytes) -> None:
        """Give back what was taken last."""
        ...

    def close(self) -> None:
        """Stop reading; again is allowed."""
        ...


class Closed:
    """What a closed source reads with: nothing."""

    def take(self, chunk: int) -> Bytes:
        """Say that the source is closed.

        Raises:
            GenerationError: always.
        """
        raise GenerationError("the weights were closed while they were in use")

    def release(self, taken: Bytes) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class OnDemand:
    """Reads each chunk when it is taken: what prefetching is compared with."""

    def __init__(self, slots: Sequence[Bytes], read: Read) -> None:
        self._slot = slots[0]
        self._read = read

    def take(self, chunk: int) -> Bytes:
        """Read a chunk."""
        return self._read(chunk, self._slot, 0)

    def release(self, taken: Bytes) -> None:
        """Do nothing: the next chunk takes its place."""

    def close(self) -> None:
        """Do nothing."""


# --8<-- [start:pages]
class LruPages:
    """An explicit page cache of all the memory a plan would have for locks and ring, which forgets what is oldest.

    What mmap does within a memory limit, without needing the limit: on a cyclic scan every chunk is forgotten just
    before it is needed again, until all of them fit.
    """

    def __init__(self, slots: Sequence[Bytes], read: Read) -> None:
        self._free = list(slots)
        self._held: OrderedDict[int, tuple[Bytes, Bytes]] = OrderedDict()
        self._read = read

    def take(self, chunk: int) -> Bytes:
        """Return a chunk, reading it unless it is held."""
        if chunk in self._held:
            self._held.move_to_end(chunk)
            return self._held[chunk][1]
        slot = self._free.pop() if self._free else self._held.popitem(last=False)[1][0]
        try:
            self._held[chunk] = slot, self._read(chunk, slot, 0)
        except BaseException:
            self._free.append(slot)
            raise
        return self._held[chunk][1]

    def release(self, taken: Bytes) -> None:
        """Do nothing: chunks stay until they are the oldest."""

    def close(self) -> None:
        """Do nothing."""


# --8<-- [end:pages]
