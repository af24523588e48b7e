"""Specifies `refinfer.offload.prefetch` when Ctrl-C comes: at any moment, and nothing is lost, lent twice or locked."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import pytest

import refinfer
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.readers import Loan
from refinfer.packing.layout import Bytes, Tiles

sys.path.insert(0, str(Path(__file__).parent))
import interrupts
from interleavings import WATCHDOG_S, World
from interrupts import MOST_MOMENTS, interrupted
from packed_model import threads_and_descriptors

CHUNKS: Final = 4


class Counted:
    """A queue of free slots that counts those that were taken out; as in the usual one, C code puts them in."""

    def __init__(self) -> None:
        self.taken_out = 0
        self._items: SimpleQueue[int | None] = SimpleQueue()
        self.put = self._items.put

    def get(self) -> int | None:
        item = self._items.get()
        self.taken_out += item is not None
        return item


class Disk:
    """Reads chunks: their number, in every byte of the slot. A read of `held` waits until a take has gone to sleep."""

    def __init__(self, n_slots: int = 2, held: int | None = None) -> None:
        self.queue = Counted()
        self.asleep = threading.Event()
        self.begun = threading.Event()
        self._held = held
        slots = [np.full(4, 255, np.uint8) for _ in range(n_slots)]
        self.prefetcher = Prefetcher(range(CHUNKS), slots, self._read, 1, thread=self._thread, queue=lambda: self.queue)

    def _thread(self, **arguments: Any) -> threading.Thread:
        self.thread = threading.Thread(**arguments)
        return self.thread

    def _read(self, chunk: int, slot: Bytes, thread: int) -> Tiles:
        if chunk == self._held:
            self.begun.set()
            assert self.asleep.wait(WATCHDOG_S)
        slot[:] = chunk
        return slot

    def take(self, chunk: int) -> Loan:
        """Take a chunk in a thread of its own: one that never comes must not stop the test."""
        taken: list[Loan] = []
        taking = threading.Thread(target=lambda: taken.append(self.prefetcher.take(chunk)), daemon=True)
        taking.start()
        taking.join(WATCHDOG_S)
        assert taken, f"the take of chunk {chunk} waits for ever"
        assert (np.asarray(taken[0].tiles) == chunk).all(), f"chunk {chunk} is lent with the bytes of another"
        return taken[0]

    def close(self) -> None:
        closing = threading.Thread(target=self.prefetcher.close, daemon=True)
        closing.start()
        closing.join(WATCHDOG_S)
        assert not closing.is_alive(), "it cannot be closed"

    def interrupts(self, action: Callable[[], object], moment: int) -> bool:
        """Interrupt what an action does at a moment; return False if it ends before that."""

        def see(event: str, function: object) -> None:
            if event == "c_return" and getattr(function, "__name__", "") == "_release_save":
                self.asleep.set()

        try:
            return interrupted(action, moment, see)
        finally:
            self.asleep.set()


def every_moment(prepare: Callable[[], tuple[Disk, Callable[[], object]]]) -> Iterator[Disk]:
    """Interrupt an action at each of its moments, always with a new disk; then close that."""
    for moment in range(MOST_MOMENTS):
        disk, action = prepare()
        try:
            if not disk.interrupts(action, moment):
                assert moment > 1, "it was never interrupted"
                return
            yield disk
        finally:
            disk.close()
    raise AssertionError("it does not end")


@pytest.mark.spec("FETCH-11")
@pytest.mark.parametrize(
    ("chunk", "held"),
    [(1, None), (1, 1), (2, None), (2, 1)],
    ids=["the next", "the next, while it is read", "another", "another, while the next is read"],
)
@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_wherever_an_interrupt_meets_a_take_the_next_takes_give_their_chunks(
    n_slots: int, chunk: int, held: int | None
) -> None:
    """Also whatever is taken next: what was interrupted, what follows it, or the first."""
    for after in (chunk, chunk + 1, 0):

        def prepare() -> tuple[Disk, Callable[[], object]]:
            disk = Disk(n_slots, held)
            disk.prefetcher.release(disk.take(0))
            if held is not None:
                assert disk.begun.wait(WATCHDOG_S)
            return disk, lambda: disk.prefetcher.take(chunk)

        for disk in every_moment(prepare):
            for number in range(2 * CHUNKS):
                disk.prefetcher.release(disk.take((after + number) % CHUNKS))


@pytest.mark.spec("FETCH-2", "FETCH-11")
@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_wherever_an_interrupt_meets_a_release_no_slot_is_lost_or_freed_twice(n_slots: int) -> None:
    def prepare() -> tuple[Disk, Callable[[], object]]:
        disk = Disk(n_slots)
        for chunk in range(CHUNKS - 1):
            disk.prefetcher.release(disk.take(chunk))
        loan = disk.take(CHUNKS - 1)
        return disk, lambda: disk.prefetcher.release(loan)

    for disk in every_moment(prepare):
        for chunk in range(CHUNKS):
            disk.prefetcher.release(disk.take(chunk))
        if n_slots > 1:  # a ring whose one slot was lost begins anew
            disk.close()  # the thread has taken all of them out
            assert disk.queue.taken_out == n_slots + 2 * CHUNKS, "slots that were freed, the ring's own first"


@pytest.mark.spec("FETCH-7", "FETCH-11")
def test_wherever_an_interrupt_meets_closing_closing_again_ends_every_thread() -> None:
    def prepare() -> tuple[Disk, Callable[[], object]]:
        disk = Disk()
        return disk, disk.prefetcher.close

    for disk in every_moment(prepare):
        disk.close()
        assert not disk.thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.spec("FETCH-8", "FETCH-11")
def test_wherever_an_interrupt_meets_the_closing_of_a_session_closing_again_leaves_nothing(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"weights": "f32", "budget": "60%", "weight_cache": tmp_path / "w", "max_positions": 16}
    refinfer.load(**asked).close()
    before = threads_and_descriptors()
    sessions: list[refinfer.Session] = []

    def begin() -> Callable[[], object]:
        sessions.append(refinfer.load(**asked))
        return sessions[-1].close

    for moment in interrupts.every_moment(begin):
        sessions.pop().close()
        assert threads_and_descriptors() == before, f"interrupted at moment {moment}"


@pytest.mark.spec("FETCH-7", "FETCH-11")
def test_closing_again_after_an_interrupted_close_still_waits_for_the_reads_under_way() -> None:
    with World(range(3), 2, 1) as world:
        first = world.close()
        world.interrupt_close(first)
        second = world.close()
        assert world.under_way
        assert not second.done, "closed, while a chunk is still read into the ring"
        world.finish_all()
        assert second.done
