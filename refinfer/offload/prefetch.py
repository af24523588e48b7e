"""The prefetch thread: reads the chunks that will be needed next while the ones before them are multiplied.

Knows: the order in which chunks are needed, a ring of slots, threads. Does not know: what a chunk is, how it is read.
Spec: FETCH-1 to FETCH-11. Tutorial: 10.

Sequence numbers count the streamed chunks from the first one ever needed, over all tokens: number k is chunk
`order[k % n]`, and it is read into slot `k % slots`.

         used          taken      ready                    to read
    ... | k-1 | k  (being multiplied) | k+1 | k+2  (published) | k+3  (being read) | ...
        free slots wait for no one; a slot is free again when its chunk is released

Laws:

1. Chunks are taken in order; releasing one gives back those before it too. `take` waits for that one chunk only.
2. A thread begins to read number k when number `k - slots` has been released, never before.
3. Reading goes on past the end of the order into the next token.
4. Asking for another chunk than the next one (a pass was left, or ended early) drops what was read ahead, waits for
   reads under way, and goes on from there.
5. What a read raises is raised by the `take` of that chunk, and by every one after it; nothing more is read.
6. `close` ends every thread, also one whose read is under way, when that read is done; a `take` that waits then raises.
   Closing again is allowed.
7. Nobody waits by looking again and again: a busy loop in Python beside BLAS was measured to slow it 5.5 times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from refinfer.errors import GenerationError
from refinfer.packing.layout import Bytes

__all__ = ["PREFETCH_THREADS", "Prefetcher", "Read"]

PREFETCH_THREADS: Final = 2
"""How many read ahead unless told otherwise: while one checks what it has read, the other keeps the disk busy."""

Read = Callable[[int, Bytes, int], Bytes]
"""Reads a chunk, by its number in the cycle, into a slot, and returns its bytes; the last argument is the thread's."""


class Prefetcher:
    """Gives the chunks of `order` one after another, for ever, read ahead by `threads` threads into `slots`.

    Raises:
        GenerationError: the system starts fewer threads.
    """

    def __init__(self, order: Sequence[int], slots: Sequence[Bytes], read: Read, threads: int) -> None:
        self._order = tuple(order)
        self._place = {chunk: i for i, chunk in enumerate(self._order)}
        self._slots = tuple(slots)
        self._read = read
        self._changed = threading.Condition()
        self._to_read = self._to_take = self._released = self._under_way = 0
        self._ready: dict[int, Bytes] = {}
        self._held: Bytes | None = None
        self._error: tuple[int, BaseException] | None = None
        self._seeking = self._closed = False
        self._threads: list[threading.Thread] = []
        try:
            for i in range(threads):
                thread = threading.Thread(target=self._run, args=(i,), name=f"prefetch-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # which is what Python says; those that run must not be left behind
            self.close()
            raise GenerationError("this system starts no further thread; use fewer prefetch threads") from None

    # --8<-- [start:take]
    def take(self, chunk: int) -> Bytes:
        """Return a chunk of the order, waiting until it is there; it stays until `release`.

        Raises:
            DamagedWeightsError: it could not be read, or is damaged.
            GenerationError: the prefetcher is closed.
        """
        with self._changed:
            if self._order[self._to_take % len(self._order)] != chunk:
                self._seek(self._place[chunk])
            number = self._to_take
            self._changed.wait_for(lambda: self._closed or number in self._ready or self._failed())
            if self._closed:
                raise GenerationError("the weights were closed while they were in use")
            if number not in self._ready:
                assert self._error is not None
                raise self._error[1]
            self._to_take += 1
            self._held = self._ready.pop(number)
            return self._held

    def release(self, taken: Bytes) -> None:
        """Give back what was taken last: its slot may be read into again. Anything else was given up long ago."""
        with self._changed:
            if taken is self._held:
                self._held = None
                self._released = self._to_take
                self._changed.notify_all()

    # --8<-- [end:take]

    def close(self) -> None:
        """End every thread; again is allowed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _failed(self) -> bool:
        """Tell whether no further chunk will come: a read failed, and those under way then have ended."""
        return self._error is not None and self._under_way == 0

    def _seek(self, place: int) -> None:
        """Go on from another place of the order; the slots of reads under way are not touched before they end."""
        self._seeking = True
        try:
            self._changed.wait_for(lambda: self._under_way == 0)
        finally:
            self._seeking = False
        self._ready.clear()
        self._to_read = self._to_take = self._released = place
        self._changed.notify_all()

    # --8<-- [start:run]
    def _may_read(self) -> bool:
        return not self._seeking and not self._error and self._to_read - self._released < len(self._slots)

    def _run(self, thread: int) -> None:
        """Read what comes next, until closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_read())
                if self._closed:
                    return
                number = self._to_read
                self._to_read += 1
                self._under_way += 1
            chunk: Bytes | None = None
            error: BaseException | None = None
            try:
                slot = self._slots[number % len(self._slots)]
                chunk = self._read(self._order[number % len(self._order)], slot, thread)
            except BaseException as raised:  # whatever it is, it belongs to whoever takes this chunk
                error = raised
            with self._changed:
                self._under_way -= 1
                if chunk is not None:
                    self._ready[number] = chunk
                elif error is not None and (self._error is None or number < self._error[0]):
                    self._error = (number, error)
                self._changed.notify_all()

    # --8<-- [end:run]
