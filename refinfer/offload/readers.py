"""Readers give a source the chunks that stream: the interface, and two readers that prefetching is compared with.

Leaves to others: reading ahead with threads (`prefetch`), files (`packed_file`).
Read more: tutorials 08, 10; clauses OFFLOAD-7, READ-1 to READ-4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from refinfer.errors import GenerationError
from refinfer.packing.layout import Bytes, Tiles

__all__ = ["Closed", "Loan", "LruPages", "OnDemand", "Read", "Reader"]

Read: TypeAlias = Callable[[int, Bytes, int], Tiles]
"""Reads a chunk, by its number in the cycle, into a slot; returns its tiles. The last argument numbers the thread."""


@dataclass(slots=True, eq=False)
class Loan:
    """A chunk that was taken: its tiles are valid until the loan is released."""

    tiles: Tiles


class Reader(Protocol):
    """Gives streamed chunks in the order of the cycle."""

    def take(self, chunk: int) -> Loan:
        """Return a chunk, by its number in the cycle."""
        ...

    def release(self, loan: Loan) -> None:
        """End the latest loan; any other has ended already, and is ignored."""
        ...

    def close(self) -> None:
        """Stop reading; closing again is allowed."""
        ...


class Closed:
    """The reader of a closed source: taking a chunk is an error."""

    def take(self, chunk: int) -> Loan:
        """Refuse: the source is closed.

        Raises:
            GenerationError: always.
        """
        raise GenerationError("the weights were closed while they were in use")

    def release(self, loan: Loan) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class OnDemand:
    """Reads each chunk when it is taken."""

    def __init__(self, slots: Sequence[Bytes], read: Read) -> None:
        self._slot = slots[0]
        self._read = read

    def take(self, chunk: int) -> Loan:
        """Read a chunk."""
        return Loan(self._read(chunk, self._slot, 0))

    def release(self, loan: Loan) -> None:
        """Do nothing: the next chunk replaces it."""

    def close(self) -> None:
        """Do nothing."""


# --8<-- [start:pages]
class LruPages:
    """A page cache in all the memory that a plan has for locks and ring; it forgets the chunk used longest ago (LRU).

    It does what mmap does within a memory limit. Chunks are used in the same order again and again, so each is
    forgotten just before it is needed again, unless all of them fit.
    """

    def __init__(self, slots: Sequence[Bytes], read: Read) -> None:
        self._free = list(slots)
        self._kept: OrderedDict[int, tuple[Bytes, Tiles]] = OrderedDict()
        self._read = read

    def take(self, chunk: int) -> Loan:
        """Return a chunk, reading it unless it is kept.

        `_free` has the slots that hold no chunk. `_kept` has the slot and the tiles of every chunk that is kept, by its
        number, in the order of use: the one that was used longest ago is the first.

        A chunk that is kept is not read, and counts as used now. Any other is read into a free slot by
        `_read(chunk, slot, 0)`, which returns its tiles. If no slot is free, the chunk that was used longest ago is
        forgotten, and its slot is taken. The loan has the tiles alone.

        If the read fails, or is interrupted by Ctrl-C (a `KeyboardInterrupt`, which is no `Exception`), its error is
        raised, the slot is free, and the chunk is not kept.
        """
        # lab 09: give a chunk that is kept, or read it into a slot
        if chunk in self._kept:
            self._kept.move_to_end(chunk)
            return Loan(self._kept[chunk][1])
        slot = self._free.pop() if self._free else self._kept.popitem(last=False)[1][0]
        try:
            self._kept[chunk] = slot, self._read(chunk, slot, 0)
        except BaseException:
            self._free.append(slot)
            raise
        return Loan(self._kept[chunk][1])
        # end lab

    def release(self, loan: Loan) -> None:
        """Do nothing: a chunk stays until its slot is needed."""

    def close(self) -> None:
        """Do nothing."""


# --8<-- [end:pages]
