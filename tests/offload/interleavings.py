"""A prefetcher whose threads move only when a test lets them, and a search through all orders in which they can.

Each read stops in the middle until the test lets it go on, and after each move the test waits until every thread rests.
So a test chooses the interleaving, sees that what must not happen does not happen, and depends on no time.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Any, ClassVar, Final, NoReturn, Self, TypeAlias

import numpy as np

from refinfer.errors import DamagedWeightsError, GenerationError
from refinfer.labs.check import REPORT
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.readers import Loan
from refinfer.packing.layout import Bytes

WATCHDOG_S: Final = 30.0
POISON: Final = 0xEE
"""What a slot holds while it is read into."""

SLOT_BYTES: Final = 16


@dataclass(eq=False)
class Reading:
    """A read that has begun: what it reads, where to, in which thread, and how it is to end."""

    serial: int
    chunk: int
    slot: Bytes
    thread: int
    runs_in: threading.Thread = field(default_factory=threading.current_thread)
    go: threading.Event = field(default_factory=threading.Event)
    finished: bool = False
    error: BaseException | None = None

    @property
    def content(self) -> bytes:
        """The bytes that this read brings, and no other; their number depends on the chunk."""
        return b"%04d of %04d" % (self.serial, self.chunk) + b"." * (self.chunk % 3)


class WatchedThread(threading.Thread):
    """A thread that reports to its world when it ends, and when it waits for another to end."""

    def __init__(self, world: World, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._world = world

    def start(self) -> None:
        self._world.threads.append(self)
        self._world.wake([self])
        super().start()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._world.ended(self)

    def join(self, timeout: float | None = None) -> None:
        self._world.join(self)
        super().join(WATCHDOG_S if timeout is None else timeout)


class WatchedCondition(threading.Condition):
    """A condition that reports to its world who waits, and can interrupt one of those."""

    def __init__(self, world: World, lock: threading.RLock) -> None:
        super().__init__(lock)
        self._world = world
        self._sleepers: dict[threading.Thread, threading.Event] = {}
        self._interrupted: set[threading.Thread] = set()

    def wait(self, timeout: float | None = None) -> bool:
        me, woken = threading.current_thread(), threading.Event()
        if timeout is not None:
            self._world.wrong.append(f"a thread looks again every {timeout} s, instead of waiting until it is woken")
        self._sleepers[me] = woken
        self._world.rest(me)
        self.release()
        try:
            assert woken.wait(WATCHDOG_S)
        finally:
            self.acquire()
        if me in self._interrupted:
            self._interrupted.discard(me)
            raise KeyboardInterrupt
        return True

    def notify(self, n: int = 1) -> None:
        self._wake(list(self._sleepers)[:n])

    def notify_all(self) -> None:
        self._wake(list(self._sleepers))

    def interrupt(self, thread: threading.Thread) -> None:
        """Raise KeyboardInterrupt in a thread that waits, as a signal does: no other thread wakes."""
        self._interrupted.add(thread)
        self._wake([thread])

    def _wake(self, threads: Iterable[threading.Thread]) -> None:
        for thread in threads:
            self._world.wake([thread])
            self._sleepers.pop(thread).set()


class WatchedQueue:
    """A queue that reports to its world who waits; an item goes to whoever has waited longest."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lock = threading.Lock()
        self._items: deque[int | None] = deque()
        self._sleepers: deque[tuple[threading.Thread, SimpleQueue[int | None]]] = deque()

    def put(self, item: int | None) -> None:
        with self._lock:
            if self._sleepers:
                thread, gets = self._sleepers.popleft()
                self._world.wake([thread])
                gets.put(item)
            else:
                self._items.append(item)

    def get(self) -> int | None:
        me, gets = threading.current_thread(), SimpleQueue[int | None]()
        with self._lock:
            if self._items:
                return self._items.popleft()
            self._sleepers.append((me, gets))
            self._world.rest(me)
        return gets.get(timeout=WATCHDOG_S)


GAVE_UP: Final = "a thread of an earlier test never sleeps"


class Call:
    """Something done in a thread of its own, which may have to wait."""

    def __init__(self, world: World, action: Callable[[], Any]) -> None:
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._action = action
        self.thread = WatchedThread(world, target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error
        self.done = True


def stop(thread: threading.Thread) -> None:
    """Have a thread that runs raise SystemExit: one that looks again and again would slow all others down."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


class World:
    """A prefetcher whose threads rest until they are let go on, and what must be true of it whenever they do."""

    # How long a thread may take to rest. Whoever writes a lab should not wait long for one that never does, and not
    # again in each test.
    patience_s: ClassVar[float] = 2.0 if REPORT in os.environ else WATCHDOG_S
    gave_up: ClassVar[bool] = False

    def __init__(self, order: Sequence[int], slots: int, threads: int) -> None:
        assert not self.gave_up, GAVE_UP
        self.order, self.n_slots, self.n_threads = tuple(order), slots, threads
        self.slots: list[Bytes] = [np.zeros(SLOT_BYTES, np.uint8) for _ in range(slots)]
        self.begun: list[Reading] = []
        self._begins: list[Reading] = []  # as `begun`, since all threads rested
        self.under_way: list[Reading] = []
        self.reads: dict[int, Reading] = {}  # by number, since the last time the order was left
        self.to_read = self.taken = self.released = 0
        self.held: tuple[Reading, Loan] | None = None
        self.seeking: int | None = None
        self.failed = self.closing = False
        self.taking: tuple[int, Call] | None = None
        self.calls: list[Call] = []
        self.threads: list[threading.Thread] = []
        self.wrong: list[str] = []
        self.woken: list[str] = []  # the names of threads, in the order in which they were woken
        self._gated = True
        self._moved = threading.Condition()
        self._awake: set[threading.Thread] = set()
        self._ended: set[threading.Thread] = set()
        self._joiners: dict[threading.Thread, list[threading.Thread]] = {}
        self.prefetcher = Prefetcher(
            order,
            self.slots,
            self._read,
            threads,
            thread=lambda **arguments: WatchedThread(self, **arguments),
            condition=self._watched,
            queue=lambda: WatchedQueue(self),
        )
        self.settle()

    def _watched(self, lock: threading.RLock) -> threading.Condition:
        self._condition = WatchedCondition(self, lock)
        return self._condition

    # What threads report.

    def wake(self, threads: Iterable[threading.Thread]) -> None:
        threads = list(threads)
        self.woken += [thread.name for thread in threads]
        with self._moved:
            self._awake.update(threads)

    def rest(self, thread: threading.Thread) -> None:
        with self._moved:
            self._awake.discard(thread)
            self._moved.notify_all()

    def ended(self, thread: threading.Thread) -> None:
        with self._moved:
            self._ended.add(thread)
            self._awake.update(self._joiners.pop(thread, []))
        self.rest(thread)

    def join(self, thread: threading.Thread) -> None:
        with self._moved:
            if thread not in self._ended:
                self._joiners.setdefault(thread, []).append(threading.current_thread())
                self._awake.discard(threading.current_thread())
                self._moved.notify_all()

    def _read(self, chunk: int, slot: Bytes, thread: int) -> Bytes:
        """What the prefetcher believes to be a disk."""
        with self._moved:
            reading = Reading(len(self.begun) + len(self._begins), chunk, slot, thread)
            self._begins.append(reading)
        slot[:] = POISON
        if self._gated:
            self.rest(threading.current_thread())
            assert reading.go.wait(WATCHDOG_S)
        if reading.error is not None:
            raise reading.error
        content = np.frombuffer(reading.content, np.uint8)
        slot[: content.size] = content
        return slot[: content.size]

    def _note_reads(self) -> None:
        """Write down the reads that have begun since all threads rested, in the order of use where they are in it.

        Threads that were given their chunks in turn may begin to read them in another order.
        """
        while self._begins:
            expected = self.order[self.to_read % len(self.order)]
            reading = next((reading for reading in self._begins if reading.chunk == expected), self._begins[0])
            self._begins.remove(reading)
            self._watch(reading)
            self.begun.append(reading)
            self.under_way.append(reading)
            self.reads[self.to_read] = reading
            self.to_read += 1

    def _watch(self, reading: Reading) -> None:
        """Write down what is wrong with a read that has begun."""
        if self.seeking is not None:
            asked = self.order[self.seeking % len(self.order)]
            self.wrong.append(f"chunk {reading.chunk} is read, although chunk {asked} was asked for")
        elif self.failed or self.closing:
            self.wrong.append(f"chunk {reading.chunk} is read after {'closing' if self.closing else 'an error'}")
        if reading.chunk != (expected := self.order[self.to_read % len(self.order)]):
            self.wrong.append(f"chunk {reading.chunk} is read, and chunk {expected} is next")
        if self.to_read - self.released >= self.n_slots:
            self.wrong.append(
                f"ring of {self.n_slots}: number {self.to_read} is read into the slot of number "
                f"{self.to_read - self.n_slots}, which has not been released"
            )
        in_use = [*self.under_way, *(r for n, r in self.reads.items() if n >= self.taken and r.error is None)]
        if self.held is not None:
            in_use.append(self.held[0])
        if any(reading.slot is other.slot for other in in_use):
            self.wrong.append(f"chunk {reading.chunk} is read into a slot that is in use")
        if reading.thread in [other.thread for other in self.under_way] or not 0 <= reading.thread < self.n_threads:
            self.wrong.append(f"thread {reading.thread} reads twice at once, or does not exist")

    # What a test can do.

    def finish(self, *readings: Reading, error: BaseException | None = None) -> None:
        """Let reads go on to their ends; those of one call may end in any order."""
        with self._moved:
            for reading in readings:
                reading.finished, reading.error = True, error
                self.under_way.remove(reading)
                self._awake.add(reading.runs_in)
            if self.seeking is not None and not self.under_way:
                self._start_over(self.seeking)
        for reading in readings:
            reading.go.set()
        self.settle()
        self.failed = self.failed or error is not None

    def finish_all(self) -> None:
        """Let reads go on until no further one begins."""
        while self.under_way:
            self.finish(*self.under_way)

    def _start_over(self, place: int) -> None:
        self.reads, self.seeking = {}, None
        self.to_read = self.taken = self.released = place

    def call(self, action: Callable[[], Any]) -> Call:
        self.calls.append(Call(self, action))
        self.settle()
        return self.calls[-1]

    @property
    def state(self) -> object:
        """Everything on which depends what may happen from now on."""
        reads = tuple((n, r.finished, r.error is None) for n, r in self.reads.items() if n >= self.taken)
        waits = self.taking and self.taking[0]
        return self.to_read, self.taken, self.released, self.held is None, waits, self.seeking, self.closing, reads

    @property
    def next(self) -> int:
        return self.order[self.taken % len(self.order)]

    def take(self, chunk: int | None = None) -> None:
        """Ask for a chunk, by default the next; `taking` until it is given."""
        chunk = self.next if chunk is None else chunk
        assert self.taking is None
        assert self.held is None
        if chunk != self.next:
            with self._moved:
                if self.under_way:
                    self.seeking = self.order.index(chunk)
                else:
                    self._start_over(self.order.index(chunk))
        self.calls.append(Call(self, lambda: self.prefetcher.take(chunk)))
        self.taking = chunk, self.calls[-1]
        self.settle()

    def release(self) -> None:
        assert self.held is not None
        self._check_held()
        loan, self.held = self.held[1], None
        self.released = self.taken
        self.end(loan)

    def end(self, loan: Loan) -> None:
        """Release a loan, whether or not it has ended before."""
        call = self.call(lambda: self.prefetcher.release(loan))
        if isinstance(call.error, Exception):
            raise call.error
        assert call.done, "a release waits"

    def forget(self) -> Loan:
        """Return the loan that is held, which nobody will release in time."""
        assert self.held is not None
        loan, self.held = self.held[1], None
        return loan

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the take that waits."""
        assert self.taking is not None
        call, self.taking = self.taking[1], None
        with self._condition:
            self.seeking = None
            self._condition.interrupt(call.thread)
        self.settle()
        assert isinstance(call.error, KeyboardInterrupt)

    def close(self) -> Call:
        with self._moved:
            self.closing = True
        return self.call(self.prefetcher.close)

    def interrupt_close(self, call: Call) -> None:
        """Raise KeyboardInterrupt in a close that waits."""
        assert not call.done, "it does not wait"
        with self._condition:
            self._condition.interrupt(call.thread)
        self.settle()
        assert isinstance(call.error, KeyboardInterrupt)

    # What must be true.

    def settle(self) -> None:
        """Wait until every thread rests, then check everything."""
        with self._moved:
            rests = self._moved.wait_for(lambda: not self._awake, self.patience_s)
        if not rests:
            World.gave_up, World.patience_s = REPORT in os.environ, min(World.patience_s, 0.5)
            for thread in self._awake:
                stop(thread)
            what = f"chunk {self.taking[0]} was never handed out: its take" if self.taking else "a thread"
            raise AssertionError(f"{what} never sleeps: it looks again and again, or keeps the lock from the others")
        self._note_reads()
        assert not self.wrong, self.wrong[0]
        self._check_held()
        self._check_taking()
        errors = [r for r in self.begun if r.error is not None]
        if not (self.closing or self.seeking is not None or errors):
            ahead = self.to_read - self.released
            assert len(self.under_way) == self.n_threads or ahead == self.n_slots, (
                f"{self.n_slots - ahead} of {self.n_slots} slots should be free, "
                f"and {len(self.under_way)} of {self.n_threads} threads read"
            )

    def _check_held(self) -> None:
        if self.held is not None:
            reading, loan = self.held
            assert loan.tiles.tobytes() == reading.content, f"chunk {reading.chunk} has changed while it was lent"

    def _check_taking(self) -> None:
        if self.taking is None:
            return
        chunk, call = self.taking
        reading = self.reads.get(self.taken) if self.seeking is None else None
        errors = [r.error for r in self.begun if r.error is not None]
        ended = reading is not None and reading.finished
        if call.done and call.error is not None and (self.closing or call.error not in errors):
            if not (self.closing and (isinstance(call.error, GenerationError) or call.error in errors)):
                self._raise(call.error)
        elif ended and reading is not None and reading.error is None:
            assert call.done, f"chunk {chunk} has been read, and was never handed out: its take waits"
            assert call.error is None, f"chunk {chunk} has been read, and its take raises the error of another one"
            self._check_lent(chunk, call.result, reading)
            self.held = reading, call.result
            self.taken += 1
            self._check_held()
        elif errors and not self.under_way:
            assert call.done, f"a read has failed, and the take of chunk {chunk} waits for ever"
            assert call.error is not None, f"a read has failed, and the take of chunk {chunk} gives {call.result!r}"
            expected = [reading.error] if ended and reading is not None else errors
            assert call.error in expected, f"the take of chunk {chunk} raises {call.error!r}, the error of another one"
        elif errors and call.done:  # when an error becomes known early is not specified
            assert call.error in errors, f"chunk {chunk} was given before it was read"
        elif self.closing and self.seeking is None:
            assert call.done, f"closed, and the take of chunk {chunk} waits for ever"
            assert call.error is not None, f"closed, and the take of chunk {chunk} gives it"
        else:
            assert not call.done, f"chunk {chunk} was given before it was read"
        if call.done:
            self.taking = None

    def _check_lent(self, chunk: int, loan: Any, reading: Reading) -> None:
        """Check that what a take returned is a loan of the slot of that read."""
        assert isinstance(loan, Loan), f"the take of chunk {chunk} returns {loan!r}, which is not a loan"
        others = [r.chunk for r in self.begun if np.shares_memory(loan.tiles, r.slot) and r.slot is not reading.slot]
        assert not others, f"the take of chunk {chunk} gives chunk {others[-1]}"
        assert np.shares_memory(loan.tiles, reading.slot), f"the tiles of chunk {chunk} do not lie in its slot"
        assert reading.chunk == chunk, f"the take of chunk {chunk} gives chunk {reading.chunk}"

    def _raise(self, error: BaseException) -> NoReturn:
        """Raise what nobody expects as it is, unless it would end the tests."""
        if isinstance(error, Exception):
            raise error
        raise AssertionError(f"a take raises {error!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let every read end, and check that every thread does."""
        if kind is not None:  # the test has failed already; only nothing must hang
            self._gated, self.wrong = False, []
            for reading in (*self.begun, *self._begins):
                reading.go.set()
            closer = threading.Thread(target=self.prefetcher.close, daemon=True)
            closer.start()
            closer.join(self.patience_s)
            return
        if self.held is not None:
            self.release()
        closing = self.close()
        assert closing.done == (not self.under_way)
        while self.under_way:
            self.finish(self.under_way[0])
        assert closing.done
        assert closing.error is None
        assert self.taking is None
        assert self.close().done
        for thread in self.threads:
            thread.join(WATCHDOG_S)
            assert not thread.is_alive()


Choose: TypeAlias = Callable[[int, object], int]
"""Chooses one of a number of moves in a state."""


def explore(run: Callable[[Choose], None], *, states: bool = False, at_most: int = 3000) -> int:
    """Run once for each sequence of choices, or for each choice in each state; return the number of runs."""
    path: list[tuple[int, int]] = []
    seen: set[object] = set()
    for runs in range(1, at_most):
        made: list[tuple[int, int]] = []

        def choose(n: int, state: object, path: Any = path, made: Any = made) -> int:
            if len(made) < len(path):
                made.append(path[len(made)])
            else:
                made.append((0, 1 if states and state in seen else n))
                seen.add(state)
            chosen: int = made[-1][0]
            return chosen

        run(choose)
        while made and made[-1][0] + 1 == made[-1][1]:
            made.pop()
        if not made:
            return runs
        made[-1] = made[-1][0] + 1, made[-1][1]
        path = made
    raise AssertionError("there are more interleavings than that")


def interleaved(world: World, wanted: Sequence[int], choose: Choose, once: Sequence[str] = ()) -> None:
    """Take and release the wanted chunks, while `choose` decides what happens next.

    Reads end; and whatever is named in `once` happens at most once: "fail", "interrupt", "close".
    """
    left, may = list(wanted), list(once)
    while (left or world.held is not None or world.taking is not None) and not world.closing:
        moves: list[Callable[[], object]] = []
        if world.held is not None:
            moves.append(world.release)
        elif world.taking is None:
            moves.append(lambda: world.take(left.pop(0)))
        moves += [lambda r=r: world.finish(r) for r in world.under_way]  # type: ignore[misc]
        if "fail" in may:
            moves += [lambda r=r: _fail(world, r, may) for r in world.under_way]  # type: ignore[misc]
        if "interrupt" in may and world.taking is not None:
            moves.append(lambda: _interrupt(world, left, may))
        if "close" in may:
            moves.append(world.close)
        moves[choose(len(moves), (world.state, *left, "may", *may))]()


def _fail(world: World, reading: Reading, may: list[str]) -> None:
    may.remove("fail")
    world.finish(reading, error=DamagedWeightsError(f"{reading.serial}"))


def _interrupt(world: World, left: list[int], may: list[str]) -> None:
    """Interrupt a take, and ask for the same chunk again later."""
    may.remove("interrupt")
    assert world.taking is not None
    left.insert(0, world.taking[0])
    world.interrupt()


def cyclic(n: int, count: int) -> list[int]:
    """Return the first `count` numbers of a cycle of `n`."""
    return [i % n for i in range(count)]
