"""The prefetch threads: they read the chunks that will be needed next while the ones before them are multiplied.

Chunks are read in the order of use into a ring: slots of memory for one chunk each, filled in turn. Leaves to others:
what a chunk is, and how it is read.
Read more: tutorial 10; clauses FETCH-1 to FETCH-13.

`order` has the n chunks that one token streams. Sequence numbers count them over all tokens: number k is chunk
`order[k % n]`, read into slot `k % r` of a ring of r slots. Whoever multiplies takes a chunk, as a `Loan`, and releases
it when its slot may be overwritten:

    | ..., k-1 | k                | k+1, k+2 | k+3, k+4   | k+5, ...  |
    | released | taken            | ready    | under way  | not begun |
    |          | being multiplied | read     | being read |           |

Laws:

1. Chunks are taken in order. Releasing a chunk also releases those before it. `take` waits for its own chunk only.
2. A thread begins to read number k only after number k - r, which was in the same slot, has been released.
3. Reading goes on past the end of the order into the next token.
4. Taking another chunk than the next (the token before was not computed to its end) drops what was read ahead, waits
   for the reads under way, and goes on from that chunk.
5. An error from a read is raised by the `take` of that chunk and by every later one. No further read begins.
6. `close` waits for the reads under way and ends every thread. A `take` that is waiting raises an error. Closing again
   is allowed.
7. No thread waits in a busy loop: one such Python thread makes numpy's products several times as slow.
   Nor is any woken in vain: a free slot wakes one thread, a chunk that was read wakes whoever waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Protocol

from refinfer.errors import GenerationError
from refinfer.offload.readers import Loan, Read
from refinfer.packing.layout import Bytes

__all__ = ["Prefetcher"]


class FreeSlots(Protocol):
    """A queue with an item for each slot that may be read into; None ends a thread that gets it."""

    def put(self, item: int | None, /) -> None:
        """Add an item, and wake one thread that waits."""
        ...

    def get(self) -> int | None:
        """Wait for an item, and take it."""
        ...


class Prefetcher:
    """Gives the chunks of `order` one after another, again and again, read ahead by `threads` threads into `slots`.

    `read(chunk, slot, thread)` reads one chunk, in a prefetch thread. `thread`, `condition` and `queue` make threads
    and what is waited for; tests pass ones that they control.

    Raises:
        GenerationError: the system does not start that many threads.
    """

    def __init__(
        self,
        order: Sequence[int],
        slots: Sequence[Bytes],
        read: Read,
        threads: int,
        *,
        thread: Callable[..., threading.Thread] = threading.Thread,
        condition: Callable[[threading.RLock], threading.Condition] = threading.Condition,
        queue: Callable[[], FreeSlots] = SimpleQueue,
    ) -> None:
        self._order = tuple(order)
        self._place = {chunk: i for i, chunk in enumerate(self._order)}
        self._slots = tuple(slots)
        self._read = read
        # Threads wait for a free slot, whoever takes chunks for a chunk that was read, or for all reads to end.
        self._free = queue()
        # Taken by `with self._lock`, never by `with self._changed`: that runs Python code which holds the lock before
        # the block begins, and Ctrl-C in there would leave it locked.
        self._lock = threading.RLock()
        self._changed = condition(self._lock)
        # The next number to read, the next to take, the first that is not released; and how many reads are under way.
        self._to_read = self._to_take = self._released = self._under_way = 0
        self._turn = 0  # counts how often the order was left: free slots of an earlier turn are void
        self._ready: dict[int, Loan] = {}
        self._taken: Loan | None = None
        self._error: tuple[int, BaseException] | None = None
        self._is_lost = False  # a seek has begun and has not freed its slots yet: the next take must seek again
        self._closed = False
        self._threads: list[threading.Thread] = []
        for _ in self._slots:
            self._free.put(self._turn)
        try:
            for i in range(threads):
                self._threads.append(thread(target=self._run, args=(i,), name=f"prefetch-{i}", daemon=True))
                self._threads[-1].start()
        except BaseException as error:  # also Ctrl-C: threads that were started must be ended
            self.close()
            # Python's error for a thread that cannot be started; one with a context comes of Ctrl-C in `start`.
            if isinstance(error, RuntimeError) and error.__context__ is None:
                raise GenerationError("this system starts no further thread; use fewer prefetch threads") from None
            raise

    # --8<-- [start:take]
    def take(self, chunk: int) -> Loan:
        """Return a chunk of the order, once it has been read; its slot is not overwritten until `release`.

        All of this is done while `_lock` is held. Only number `_to_take` can be taken: unless `_is_next(chunk)`,
        `_seek` goes to its place first (`_place[chunk]`), which changes `_to_take`.

        Then `_wait_for` sleeps, while others have the lock, until something is known about that number, the first of
        these that holds:

            _closed            raises GenerationError("the weights were closed while they were in use")
            it is in _ready    counts `_to_take` on, takes its loan out of there, keeps it in `_taken`, and returns it
            _failed()          raises the error, `_error[1]`; it stays, so that every later take raises it too

        Raises:
            DamagedWeightsError: it could not be read, or is damaged.
            GenerationError: the prefetcher is closed.
        """
        # lab 11: wait until the chunk has been read, and lend it
        with self._lock:
            if not self._is_next(chunk):
                self._seek(self._place[chunk])
            number = self._to_take
            self._wait_for(lambda: self._closed or number in self._ready or self._failed())
            if self._closed:
                raise GenerationError("the weights were closed while they were in use")
            if number not in self._ready:
                assert self._error is not None
                raise self._error[1]
            self._to_take += 1  # first: if Ctrl-C comes after `pop`, nobody waits for a number that is gone
            self._taken = self._ready.pop(number)
            return self._taken
        # end lab

    def release(self, loan: Loan) -> None:
        """End the latest loan: its slot may be read into again. Any other loan has ended already, and is ignored.

        `_taken` is the latest loan, or None if it has ended. Loans before it that were never released end too: the
        numbers from `_released` up to, but not including, `_to_take`. For each of them, first add one to `_released`,
        then put `_turn` into `_free`: Ctrl-C may come after any call, and no slot must be freed twice. All of this is
        done while `_lock` is held: garbage that releases may be collected in any thread.
        """
        # lab 11: end the latest loan, and free the slots of all that was taken so far
        with self._lock:
            if loan is self._taken:
                while self._released < self._to_take:
                    self._released += 1
                    self._free.put(self._turn)
                self._taken = None
        # end lab

    # --8<-- [end:take]

    def close(self) -> None:
        """End every thread; closing again is allowed."""
        with self._lock:
            self._closed = True
            self._error = None  # with it go the frames of its traceback, and whatever they hold
            self._changed.notify_all()
        for _ in self._threads:
            self._free.put(None)
        if threading.current_thread() not in self._threads:  # garbage that holds this may be collected in any thread
            with self._lock:  # after a `join` that Ctrl-C interrupted, Python takes the thread for one that has ended
                self._wait_for(lambda: self._under_way == 0 or not any(t.is_alive() for t in self._threads))
            for thread in self._threads:
                with suppress(RuntimeError):  # it was not started
                    thread.join()

    def _is_next(self, chunk: int) -> bool:
        if self._is_lost or self._to_take - self._released == len(self._slots):
            return False  # a seek was interrupted; or whoever has all the slots was, and no read could come
        return self._order[self._to_take % len(self._order)] == chunk

    def _wait_for(self, happens: Callable[[], bool]) -> None:
        """Sleep until `happens()` is true; the lock is held before and after, and given up while this sleeps."""
        try:
            self._changed.wait_for(happens)
        except BaseException:
            # Ctrl-C may come just after the condition has given the lock up: then it is not held, else it is, once.
            with suppress(RuntimeError):
                self._lock.release()
            self._lock.acquire()
            raise

    def _failed(self) -> bool:
        """Return whether a read has failed and no other is under way, so that no further chunk will come."""
        return self._error is not None and self._under_way == 0

    def _seek(self, place: int) -> None:
        """Go on from another place of the order, after the reads under way: they still write to their slots."""
        self._is_lost = True
        self._turn += 1
        self._taken, self._released = None, self._to_take
        try:
            self._wait_for(lambda: self._under_way == 0)
            self._ready = {}
            self._to_read = self._to_take = self._released = place
        finally:
            for _ in range(self._to_read - self._released, len(self._slots)):
                self._free.put(self._turn)
            self._is_lost = False

    # --8<-- [start:run]
    def _run(self, thread: int) -> None:
        """Read what comes next whenever a slot is free, until closed."""
        while (turn := self._free.get()) is not None:
            with self._lock:
                if self._closed or self._error or turn != self._turn:
                    continue
                number = self._to_read
                self._to_read += 1
                self._under_way += 1
            loan: Loan | None = None
            error: BaseException | None = None
            try:
                slot = self._slots[number % len(self._slots)]
                loan = Loan(self._read(self._order[number % len(self._order)], slot, thread))
            except BaseException as raised:  # whatever it is: the `take` of this chunk raises it
                error = raised
            with self._lock:
                self._under_way -= 1
                if loan is not None:
                    self._ready[number] = loan
                elif error is not None and not self._closed and (self._error is None or number < self._error[0]):
                    self._error = (number, error)
                self._changed.notify_all()
            del loan, error  # a thread that waits keeps nothing alive

    # --8<-- [end:run]
