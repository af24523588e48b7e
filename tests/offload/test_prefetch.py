"""Specifies `refinfer.offload.prefetch`: every chunk in order, whatever the threads do, and nothing left behind.

Most tests run in a `World`, whose threads move only when they are let: each read stops in the middle until the test
lets it go on, and after each move the test waits until everybody rests. So every interleaving can be chosen, what must
not happen is seen not to happen, and nothing depends on time.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.cli import main
from refinfer.engine import fixed_of
from refinfer.errors import DamagedWeightsError, GenerationError, RefinferError
from refinfer.generate import Session, load
from refinfer.model.config import ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.offload import prefetch
from refinfer.offload.inventory import Inventory
from refinfer.offload.plan import make_plan, smallest_budget
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.store import FileStore
from refinfer.offload.streamed import StreamedSource
from refinfer.packing import int8
from refinfer.packing.layout import Bytes
from refinfer.trace import Span, Trace

sys.path.insert(0, str(Path(__file__).parent))
from packed_model import WATCHDOG_S, threads_and_descriptors, within

POISON: Final = 0xEE  # what a slot holds while it is read into
SLOT_BYTES: Final = 16


@dataclass(eq=False)
class Reading:
    """A read that has begun: what it reads, where to, and how it is to end."""

    serial: int
    chunk: int
    slot: Bytes
    thread: int
    go: threading.Event = field(default_factory=threading.Event)
    finished: bool = False
    error: BaseException | None = None

    @property
    def content(self) -> bytes:
        """The bytes that this read, and no other, brings; their number depends on the chunk."""
        return b"%04d of %04d" % (self.serial, self.chunk) + b"." * (self.chunk % 3)


class Call:
    """Something done in a thread of its own, which may have to wait."""

    def __init__(self, world: World, action: Callable[[], Any]) -> None:
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._action = action
        self.thread = world.thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error
        self.done = True


class World:
    """A prefetcher whose threads rest until they are let go on, and what must be true of it whenever they do."""

    def __init__(self, order: Sequence[int], slots: int, threads: int) -> None:
        self.order, self.n_slots, self.n_threads = tuple(order), slots, threads
        self.slots: list[Bytes] = [np.zeros(SLOT_BYTES, np.uint8) for _ in range(slots)]
        self.begun: list[Reading] = []
        self.under_way: list[Reading] = []
        self.reads: dict[int, Reading] = {}  # by number, since the last time the order was left
        self.to_read = self.taken = self.released = 0
        self.held: tuple[Reading, Bytes] | None = None
        self.seeking: int | None = None
        self.failed = self.closing = False
        self.taking: tuple[int, Call] | None = None
        self.calls: list[Call] = []
        self.wrong: list[str] = []
        self._free = False
        self._moved = threading.Condition()
        self._awake: set[threading.Thread] = set()
        self._ended: set[threading.Thread] = set()
        self._joiners: dict[threading.Thread, list[threading.Thread]] = {}
        self._sleepers: list[threading.Thread] = []
        self._interrupted: set[threading.Thread] = set()
        self.thread, condition = self._stand_ins()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefetch, "threading", SimpleNamespace(Thread=self.thread, Condition=condition))
            self.prefetcher = Prefetcher(order, self.slots, self._read, threads)
        self._condition: Any = self.prefetcher._changed
        self.settle()

    def _stand_ins(self) -> tuple[type[threading.Thread], type[threading.Condition]]:
        """Return threads that tell when they end, and conditions that tell who waits."""
        world = self

        class Thread(threading.Thread):
            def start(self) -> None:
                world._wake([self])
                super().start()

            def run(self) -> None:
                try:
                    super().run()
                finally:
                    with world._moved:
                        world._ended.add(self)
                        world._awake.update(world._joiners.pop(self, []))
                    world._rest(self)

            def join(self, timeout: float | None = None) -> None:
                with world._moved:
                    if self not in world._ended:
                        world._joiners.setdefault(self, []).append(threading.current_thread())
                        world._awake.discard(threading.current_thread())
                        world._moved.notify_all()
                super().join(WATCHDOG_S if timeout is None else timeout)

        class Condition(threading.Condition):
            def wait(self, timeout: float | None = None) -> bool:
                me = threading.current_thread()
                if timeout is not None:
                    world.wrong.append("somebody looks again and again")
                world._sleepers.append(me)
                world._rest(me)
                super().wait()
                if me in world._interrupted:
                    world._interrupted.discard(me)
                    raise KeyboardInterrupt
                return True

            def notify(self, n: int = 1) -> None:
                world._wake(world._sleepers[:n])
                del world._sleepers[:n]
                super().notify(n)

        return Thread, Condition

    def _wake(self, threads: Sequence[threading.Thread]) -> None:
        with self._moved:
            self._awake.update(threads)

    def _rest(self, thread: threading.Thread) -> None:
        with self._moved:
            self._awake.discard(thread)
            self._moved.notify_all()

    def _read(self, chunk: int, slot: Bytes, thread: int) -> Bytes:
        """What the prefetcher thinks is a disk."""
        with self._moved:
            reading = Reading(len(self.begun), chunk, slot, thread)
            if not self._free:
                self._watch(reading)
            self.begun.append(reading)
            self.under_way.append(reading)
            self.reads[self.to_read] = reading
            self.to_read += 1
        slot[:] = POISON
        if not self._free:
            self._rest(threading.current_thread())
            assert reading.go.wait(WATCHDOG_S)
        if reading.error is not None:
            raise reading.error
        content = np.frombuffer(reading.content, np.uint8)
        slot[: content.size] = content
        return slot[: content.size]

    def _watch(self, reading: Reading) -> None:
        """Write down what is wrong with a read that begins now."""
        if self.seeking is not None or self.failed or self.closing:
            self.wrong.append(f"a read of {reading.chunk} begins after an error, after closing or while seeking")
        if reading.chunk != (expected := self.order[self.to_read % len(self.order)]):
            self.wrong.append(f"{reading.chunk} is read where {expected} is next")
        if self.to_read - self.released >= self.n_slots:
            self.wrong.append(f"number {self.to_read} is read with {self.released} released")
        in_use = [*self.under_way, *(r for n, r in self.reads.items() if n >= self.taken and r.error is None)]
        if self.held is not None:
            in_use.append(self.held[0])
        if any(reading.slot is other.slot for other in in_use):
            self.wrong.append(f"the slot of {reading.chunk} is in use")
        if reading.thread in [other.thread for other in self.under_way] or not 0 <= reading.thread < self.n_threads:
            self.wrong.append(f"thread {reading.thread} reads twice at once, or is none")

    # What a test can do

    def finish(self, *readings: Reading, error: BaseException | None = None) -> None:
        """Let reads go on to their ends; those of one call may end in any order."""
        with self._moved:
            for reading in readings:
                reading.finished, reading.error = True, error
                self.under_way.remove(reading)
                self._awake.add(self._reader(reading))
            if self.seeking is not None and not self.under_way:
                self._start_over(self.seeking)
        for reading in readings:
            reading.go.set()
        self.settle()
        self.failed = self.failed or error is not None

    def _reader(self, reading: Reading) -> threading.Thread:
        return self.prefetcher._threads[reading.thread]

    def _start_over(self, place: int) -> None:
        self.reads, self.seeking = {}, None
        self.to_read = self.taken = self.released = place

    def call(self, action: Callable[[], Any]) -> Call:
        self.calls.append(Call(self, action))
        self.settle()
        return self.calls[-1]

    @property
    def state(self) -> object:
        """All that what may happen from now on depends on."""
        reads = tuple((n, r.finished, r.error is None) for n, r in self.reads.items() if n >= self.taken)
        waits = self.taking and self.taking[0]
        return self.to_read, self.taken, self.released, self.held is None, waits, self.seeking, self.closing, reads

    @property
    def next(self) -> int:
        return self.order[self.taken % len(self.order)]

    def take(self, chunk: int | None = None) -> None:
        """Ask for a chunk; `taking` until it is there."""
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
        view, self.held = self.held[1], None
        self.released = self.taken
        assert self.call(lambda: self.prefetcher.release(view)).done

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the take that waits, as a signal does: nobody else wakes."""
        assert self.taking is not None
        call = self.taking[1]
        with self._condition:
            place = self._sleepers.index(call.thread)
            waiter = self._condition._waiters[place]
            del self._sleepers[place], self._condition._waiters[place]
            self._interrupted.add(call.thread)
            self._wake([call.thread])
            self.seeking = None
            waiter.release()
        self.taking = None
        self.settle()
        assert isinstance(call.error, KeyboardInterrupt)

    def close(self) -> Call:
        with self._moved:
            self.closing = True
        return self.call(self.prefetcher.close)

    # What must be true

    def settle(self) -> None:
        """Wait until everybody rests, then look whether all is as it must be."""
        with self._moved:
            assert self._moved.wait_for(lambda: not self._awake, WATCHDOG_S), f"never rests: {self._awake}"
        assert not self.wrong, self.wrong
        self._check_held()
        self._check_taking()
        errors = [r for r in self.begun if r.error is not None]
        if not (self.closing or self.seeking is not None or errors or not hasattr(self, "prefetcher")):
            ahead = self.to_read - self.released
            assert len(self.under_way) == self.n_threads or ahead == self.n_slots, "there is room, and nobody reads"

    def _check_held(self) -> None:
        if self.held is not None:
            reading, view = self.held
            assert view.tobytes() == reading.content

    def _check_taking(self) -> None:
        if self.taking is None:
            return
        chunk, call = self.taking
        reading = self.reads.get(self.taken) if self.seeking is None else None
        errors = [r.error for r in self.begun if r.error is not None]
        ended = reading is not None and reading.finished
        if self.closing and call.done and call.error is not None:
            assert isinstance(call.error, GenerationError) or call.error in errors
        elif ended and reading is not None and reading.error is None:
            assert call.done, f"{chunk} is there, and its take waits"
            assert call.error is None
            self.held = reading, call.result
            assert np.shares_memory(call.result, reading.slot)
            assert reading.chunk == chunk
            self.taken += 1
            self._check_held()
        elif errors and not self.under_way:
            assert call.done, "nothing more comes, and a take waits"
            assert call.error in ([reading.error] if ended and reading is not None else errors)
        elif errors and call.done:  # when an error is known early is not specified
            assert call.error in errors
        elif self.closing and self.seeking is None:
            assert call.done, "closed, and a take waits"
        else:
            assert not call.done, f"{chunk} was given before it was read"
        if call.done:
            self.taking = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let everything go, and see that every thread ends."""
        self._free = True
        closer = threading.Thread(target=self.prefetcher.close, daemon=True)
        if kind is not None:  # the test has failed already; only nothing must hang
            self.wrong = []
            for reading in self.begun:
                reading.go.set()
            closer.start()
            closer.join(WATCHDOG_S)
            return
        self._free = False
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
        for thread in (*self.prefetcher._threads, *(call.thread for call in self.calls)):
            thread.join(WATCHDOG_S)
            assert not thread.is_alive()


Choose = Callable[[int, object], int]
Made = list[tuple[int, int]]


def explore(run: Callable[[Choose], None], *, states: bool = False, at_most: int = 3000) -> int:
    """Run once for each sequence of choices, or for each choice in each state; return how often."""
    path: Made = []
    seen: set[object] = set()
    for runs in range(1, at_most):
        made: Made = []

        def choose(n: int, state: object, path: Made = path, made: Made = made) -> int:
            if len(made) < len(path):
                made.append(path[len(made)])
            else:
                made.append((0, 1 if states and state in seen else n))
                seen.add(state)
            return made[-1][0]

        run(choose)
        while made and made[-1][0] + 1 == made[-1][1]:
            made.pop()
        if not made:
            return runs
        made[-1] = made[-1][0] + 1, made[-1][1]
        path = made
    raise AssertionError("there are more interleavings than that")


def interleaved(world: World, wanted: Sequence[int], choose: Choose, extras: Sequence[str] = ()) -> None:
    """Take and release what is wanted, while reads end, fail, or the world closes, whenever `choose` says."""
    left, once = list(wanted), list(extras)
    while (left or world.held is not None or world.taking is not None) and not world.closing:
        moves: list[Callable[[], None]] = []
        if world.held is not None:
            moves.append(world.release)
        elif world.taking is None:
            moves.append(lambda: world.take(left.pop(0)))
        moves += [lambda r=r: world.finish(r) for r in world.under_way]  # type: ignore[misc]
        if "fail" in once:
            moves += [lambda r=r: failing(world, r, once) for r in world.under_way]  # type: ignore[misc]
        if "interrupt" in once and world.taking is not None:
            moves.append(lambda: interrupting(world, left, once))
        if "close" in once:
            moves.append(lambda: closing(world))
        moves[choose(len(moves), (world.state, *left, "once", *once))]()


def failing(world: World, reading: Reading, once: list[str]) -> None:
    once.remove("fail")
    world.finish(reading, error=DamagedWeightsError(f"{reading.serial}"))


def closing(world: World) -> None:
    world.close()


def interrupting(world: World, left: list[int], once: list[str]) -> None:
    """Interrupt a take, and ask for the same chunk again."""
    once.remove("interrupt")
    assert world.taking is not None
    left.insert(0, world.taking[0])
    world.interrupt()


def cyclic(n: int, first: int, count: int) -> list[int]:
    return [(first + i) % n for i in range(count)]


def takes_in_order(world: World, takes: int, choose: Choose) -> None:
    interleaved(world, [world.order[chunk] for chunk in cyclic(len(world.order), 0, takes)], choose)


@pytest.mark.spec("FETCH-1", "FETCH-2", "FETCH-3", "FETCH-4")
@pytest.mark.parametrize(
    ("n", "slots", "threads", "takes"),
    [(1, 1, 1, 3), (1, 2, 2, 2), (2, 1, 2, 4), (2, 2, 1, 3), (2, 2, 2, 2), (3, 2, 2, 2), (2, 3, 2, 1), (4, 3, 3, 1)],
)
def test_in_every_interleaving_chunks_are_given_in_order_as_they_were_read(
    n: int, slots: int, threads: int, takes: int
) -> None:
    def run(choose: Choose) -> None:
        with World(range(10, 10 + n), slots, threads) as world:
            takes_in_order(world, takes, choose)

    assert explore(run) > takes


@pytest.mark.spec("FETCH-1", "FETCH-2", "FETCH-3", "FETCH-4")
@pytest.mark.parametrize(("n", "slots", "threads", "takes"), [(1, 3, 2, 4), (3, 3, 2, 4), (5, 3, 3, 2), (5, 2, 2, 7)])
def test_from_every_state_chunks_are_given_in_order_as_they_were_read(
    n: int, slots: int, threads: int, takes: int
) -> None:
    def run(choose: Choose) -> None:
        with World(range(n), slots, threads) as world:
            takes_in_order(world, takes, choose)

    assert explore(run, states=True) > takes


@pytest.mark.spec("FETCH-5", "FETCH-1", "FETCH-2")
@pytest.mark.parametrize("wanted", [[2, 0], [0, 2, 0], [0, 0, 1], [1, 0]], ids=str)
@pytest.mark.parametrize(("slots", "threads"), [(2, 1), (2, 2), (3, 2)])
def test_from_every_state_another_chunk_than_the_next_is_given_as_it_was_read(
    wanted: list[int], slots: int, threads: int
) -> None:
    def run(choose: Choose) -> None:
        with World(range(3), slots, threads) as world:
            interleaved(world, wanted, choose)

    assert explore(run, states=True) >= len(wanted)


@pytest.mark.spec("FETCH-6")
@pytest.mark.parametrize(
    ("slots", "threads", "wanted"),
    [(2, 1, [0, 1, 2]), (2, 2, [0, 1]), (3, 3, [0]), (2, 2, [2])],
    ids=str,
)
def test_an_error_reaches_whoever_takes_that_chunk_at_whatever_read_it_comes(
    slots: int, threads: int, wanted: list[int]
) -> None:
    """And everybody after; what was read before is still given, and nothing more is read: `World` looks."""
    runs: list[bool] = []

    def run(choose: Choose) -> None:
        with World(range(3), slots, threads) as world:
            interleaved(world, wanted, choose, ["fail"])
            runs.append(world.failed)
            if world.failed:
                begun = len(world.begun)
                while world.under_way:
                    world.finish(world.under_way[0])
                for chunk in (world.next, 0, 1, 2):
                    if world.held is not None:  # what was read before the error
                        world.release()
                    world.take(chunk)
                world.release() if world.held is not None else None
                world.take()
                assert world.held is None
                assert len(world.begun) == begun

    explore(run, states=True)
    assert any(runs)
    assert not all(runs)


@pytest.mark.spec("FETCH-7")
@pytest.mark.parametrize(("slots", "threads", "wanted"), [(2, 1, [0, 1, 2]), (2, 2, [0, 1]), (3, 2, [0]), (2, 2, [2])])
def test_closing_at_any_moment_ends_every_thread_and_every_wait(slots: int, threads: int, wanted: list[int]) -> None:
    waiting: list[bool] = []

    def run(choose: Choose) -> None:
        with World(range(3), slots, threads) as world:
            interleaved(world, wanted, choose, ["close"])
            if world.taking is not None:  # left the order, and so waits for the reads that go on
                assert world.under_way
            waiting.append(any(isinstance(call.error, GenerationError) for call in world.calls))

    explore(run, states=True)
    assert any(waiting)
    assert not all(waiting)


@pytest.mark.spec("FETCH-1", "FETCH-7")
@pytest.mark.parametrize(("slots", "threads", "wanted"), [(2, 1, [0, 1, 2]), (2, 2, [0, 1]), (2, 2, [2, 0])], ids=str)
def test_a_take_that_is_interrupted_loses_nothing(slots: int, threads: int, wanted: list[int]) -> None:
    def run(choose: Choose) -> None:
        with World(range(3), slots, threads) as world:
            interleaved(world, wanted, choose, ["interrupt"])

    explore(run, states=True)


@pytest.mark.spec("FETCH-1", "FETCH-2", "FETCH-3", "FETCH-4", "FETCH-5", "FETCH-6", "FETCH-7")
@settings(max_examples=60)
@given(data=st.data())
def test_any_run_with_any_ring_threads_order_seeks_failures_and_closes_keeps_every_law(data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(data.draw(st.integers(1, 5), "n"))), "order")
    slots, threads = data.draw(st.integers(1, 5), "slots"), data.draw(st.integers(1, 4), "threads")
    moves = st.sampled_from(["finish"] * 6 + ["take"] * 5 + ["seek", "all", "fail", "interrupt", "close"])
    with World(order, slots, threads) as world:
        for move in data.draw(st.lists(moves, max_size=40), "moves"):
            idle = world.taking is None
            if move in ("take", "seek") and idle:
                if world.held is not None:
                    world.release()
                world.take(data.draw(st.sampled_from(order)) if move == "seek" else None)
            elif move == "finish" and world.under_way:
                world.finish(data.draw(st.sampled_from(world.under_way)))
            elif move == "all":
                world.finish(*world.under_way)
            elif move == "fail" and world.under_way:
                error = OSError(errno.EIO, "fails")
                world.finish(data.draw(st.sampled_from(world.under_way)), error=error)
            elif move == "interrupt" and not idle:
                world.interrupt()
            elif move == "close":
                world.close()


@pytest.mark.spec("FETCH-1", "FETCH-2", "FETCH-5")
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_threads_that_run_as_they_like_give_the_same_chunks(threads: int, slots: int) -> None:
    """No scheduler: threads are switched far more often than usual."""
    order, rng = (3, 1, 4, 0, 2), np.random.default_rng(slots)
    in_use = [threading.Lock() for _ in range(slots)]
    ring = [np.zeros(64, np.uint8) for _ in range(slots)]
    collisions = []

    def read(chunk: int, slot: Bytes, thread: int) -> Bytes:
        lock = in_use[next(i for i, s in enumerate(ring) if s is slot)]
        if not lock.acquire(blocking=False):
            collisions.append(chunk)
        for i in range(0, 64, 16):
            slot[i : i + 16] = chunk
        lock.release()
        return slot[: 40 + chunk]

    def take_many() -> None:
        at = 0
        for _ in range(200):
            if rng.random() < 0.03:
                at = int(rng.integers(len(order)))
            view = prefetcher.take(order[at % len(order)])
            for _ in range(2):
                assert view.tobytes() == bytes([order[at % len(order)]]) * (40 + order[at % len(order)])
            prefetcher.release(view)
            at += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    prefetcher = Prefetcher(order, ring, read, threads)
    try:
        within(take_many)
    finally:
        within(prefetcher.close)
        sys.setswitchinterval(interval)
    assert not collisions


@pytest.mark.spec("FETCH-3")
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_reading_goes_ahead_as_far_as_the_ring_allows_also_into_the_next_token(
    n: int, slots: int, threads: int
) -> None:
    with World(range(n), slots, threads) as world:
        while world.under_way:
            world.finish(*world.under_way)
        assert [reading.chunk for reading in world.begun] == cyclic(n, 0, slots)
        world.take()
        assert len(world.begun) == slots
        world.release()
        assert [reading.chunk for reading in world.begun] == cyclic(n, 0, slots + 1)
        assert len({id(reading.slot) for reading in world.begun}) == slots


@pytest.mark.spec("FETCH-2")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_is_taken_stays_until_it_is_released_and_its_slot_is_read_into_only_then(threads: int) -> None:
    with World(range(5), 2, threads) as world:
        for _ in range(12):
            while world.under_way:
                world.finish(world.under_way[0])
            world.take()
            assert world.held is not None
            reading, view = world.held
            begun = len(world.begun)
            view[:] = 0x5A  # a sentinel
            while world.under_way:
                world.finish(world.under_way[0])
            assert (view == 0x5A).all()
            assert len(world.begun) == begun
            view[:] = np.frombuffer(reading.content, np.uint8)
            world.release()
            assert world.begun[begun].slot is reading.slot
            assert (reading.slot == POISON).all()


@pytest.mark.spec("FETCH-4")
def test_a_chunk_is_given_while_those_after_it_are_being_read_and_not_before_it_is_threads_and_descriptors() -> None:
    with World(range(3), 3, 3) as world:
        first, second, third = world.under_way
        world.take(0)
        world.finish(second)
        assert world.taking is not None
        world.finish(first)
        assert world.held is not None
        world.release()
        world.take(1)
        assert world.held is not None
        assert third in world.under_way


@pytest.mark.spec("FETCH-5")
def test_another_chunk_waits_for_reads_under_way_drops_them_and_goes_on_from_threads_and_descriptors() -> None:
    with World(range(5), 3, 2) as world:
        first, second = world.under_way
        world.take(3)
        world.finish(second)
        assert world.seeking is not None
        assert len(world.begun) == 2  # no slot is touched before the other read has ended
        world.finish(first)
        assert [reading.chunk for reading in world.under_way] == [3, 4]
        while world.taking is not None:
            world.finish(world.under_way[0])
        world.release()
        for chunk in (4, 0, 1):
            while chunk not in [r.chunk for n, r in world.reads.items() if n >= world.taken and r.finished]:
                world.finish(world.under_way[0])
            world.take(chunk)
            assert world.held is not None
            world.release()


@pytest.mark.spec("FETCH-6")
@pytest.mark.parametrize("early", [True, False])
def test_of_several_errors_the_one_of_the_earliest_chunk_is_raised(early: bool) -> None:
    with World(range(4), 4, 4) as world:
        zeroth, first, second, third = world.under_way
        failures = [(first, KeyError("first")), (third, OSError("third"))]
        for reading, error in failures if early else reversed(failures):
            world.finish(reading, error=error)
        world.finish(second)
        world.take(0)
        assert world.taking is not None
        world.finish(zeroth)
        assert world.held is not None
        world.release()
        for chunk in (1, 1, 2, 3, 0):
            with pytest.raises(KeyError, match="first"):
                within(lambda chunk=chunk: world.prefetcher.take(chunk))  # type: ignore[misc]
        assert len(world.begun) == 4


@pytest.mark.spec("FETCH-6")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), StopIteration()], ids=repr)
def test_whatever_a_read_raises_is_raised_by_the_take(error: BaseException) -> None:
    with World(range(2), 2, 2) as world:
        world.take(0)
        call = world.calls[-1]
        world.finish(world.under_way[1])
        world.finish(world.under_way[0], error=error)
        assert call.error is error


@pytest.mark.spec("FETCH-7")
def test_closing_waits_for_the_read_under_way_and_again_is_allowed_from_several_threads() -> None:
    with World(range(3), 2, 2) as world:
        world.take(0)
        taking = world.calls[-1]
        first, second = world.under_way
        closers = [world.close(), world.close()]
        assert isinstance(taking.error, GenerationError)  # at once, while reads go on
        assert not any(closer.done for closer in closers)
        world.finish(first)
        assert not any(closer.done for closer in closers)
        world.finish(second)
        assert all(closer.done for closer in closers)
        assert not any(thread.is_alive() for thread in world.prefetcher._threads)
        for chunk in (0, 1, 2):
            with pytest.raises(GenerationError, match="closed while they were in use"):
                within(lambda chunk=chunk: world.prefetcher.take(chunk))  # type: ignore[misc]
        world.prefetcher.release(first.slot)


# Sessions: many small chunks, real files.


POSITIONS: Final = 64
PROMPT: Final = np.random.default_rng(5).integers(0, 261, 40).tolist()


@dataclass(frozen=True)
class Model:
    """A tiny model in a format, and a budget that makes most of it stream."""

    folder: Path
    config: ModelConfig
    name: str
    cache: str

    @property
    def inventory(self) -> Inventory:
        return Inventory(self.config, self.name)

    def budget(self, slots: int = 8, share: float = 0.1, positions: int = POSITIONS) -> int:
        """Return a budget for a ring of `slots`, some locks beside it, and all that is fixed."""
        inventory = self.inventory
        smallest = smallest_budget(inventory, fixed_of(inventory, positions))
        return smallest + slots * int(inventory.sizes.max()) + int(share * inventory.streamable_nbytes)

    def ring(self, slots: int) -> int:
        return slots * int(self.inventory.sizes.max())

    def load(self, **options: Any) -> Session:
        given: dict[str, Any] = {
            "budget": self.budget(),
            "plan": "balanced",
            "prefetch_threads": 1,
            "weight_cache": self.cache,
        }
        return load(self.folder, weights=self.name, max_positions=POSITIONS, threads=1, **given | options)


@pytest.fixture(scope="module")
def written(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """A checkpoint of ten layers."""
    folder = tmp_path_factory.mktemp("prefetch") / "m"
    config = replace(tiny_config, num_hidden_layers=10)
    write_checkpoint(folder, config, dtype="f32", seed=3)
    return folder, config


@pytest.fixture
def one(written: tuple[Path, ModelConfig], tmp_path: Path) -> Model:
    model = Model(*written, int8.name, str(tmp_path / "cache"))
    assert len(model.inventory.cycle) == 7 * 10 + 1
    return model


def bits(session: Session, ids: Sequence[int] = PROMPT) -> npt.NDArray[np.uint32]:
    return session.logits(ids).view(np.uint32)


def told(session: Session) -> tuple[int, ...]:
    for _ in session.generate(token_ids=PROMPT, max_tokens=5):
        pass
    assert session.stats is not None
    return session.stats.token_ids


@pytest.mark.spec("FETCH-5", "FETCH-1")
def test_generations_that_are_left_in_the_middle_do_not_change_what_comes_next(one: Model) -> None:
    with one.load(budget=None, weight_cache=":memory") as session:
        expected, text = bits(session), told(session)
    with one.load(prefetch_threads=2) as session:
        for tokens in range(3):
            pieces = session.generate(token_ids=PROMPT, max_tokens=5)
            for _ in range(tokens):
                next(pieces)
            np.testing.assert_array_equal(bits(session), expected, strict=True)
            pieces.close()  # type: ignore[attr-defined]
            assert told(session) == text


def multiplying_fails(patch: pytest.MonkeyPatch, at: int, then: Callable[[], None] = lambda: None) -> None:
    """Let the product with the chunk `at` of all that come fail, once; call `then` at each later one."""
    real, count = int8.multiply, [0]

    def multiply(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == at:
            raise ValueError("a product fails")
        if count[0] > at:
            then()
        real(*arguments)

    patch.setattr(int8, "multiply", multiply)


@pytest.mark.spec("FETCH-5", "FETCH-8")
def test_a_pass_that_fails_while_a_chunk_is_held_does_not_change_the_next(
    one: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one.load(budget=None, weight_cache=":memory") as session:
        expected = bits(session)
    for at in (1, 2, 30, 61):
        with one.load(prefetch_threads=2) as session, monkeypatch.context() as patch:
            multiplying_fails(patch, at)
            with pytest.raises(ValueError, match="a product fails"):
                session.logits(PROMPT)
            np.testing.assert_array_equal(within(lambda s=session: bits(s)), expected, strict=True)  # type: ignore[misc]


def streamed_source(session: Session) -> StreamedSource:
    source = session._transformer.source
    assert isinstance(source, StreamedSource)
    return source


@pytest.mark.spec("FETCH-2")
def test_the_traceback_of_a_failed_pass_may_go_while_another_holds_a_chunk(one: Model) -> None:
    """What Python does when `sys.last_exc` is replaced, or cycles are collected: the generator inside ends late."""
    with one.load(plan="none", prefetch_ring=one.ring(2)) as session:
        source = session._transformer.source
        assert isinstance(source, StreamedSource)
        assert isinstance(source._reader, Prefetcher)
        failed = source.chunks(0, 3)
        next(failed)
        now = source.chunks(0, 3)
        next(now)
        before = source._reader._released
        failed.close()  # type: ignore[attr-defined]
        assert source._reader._released == before
        next(now)
        assert source._reader._released == before + 1


@pytest.mark.spec("FETCH-2")
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_what_was_given_up_long_ago_is_not_given_back_again(wanted: int) -> None:
    with World(range(3), 2, 2) as world:
        world.finish(*world.under_way)
        world.take(0)
        assert world.held is not None
        old, world.held = world.held[1], None
        if wanted == 1:
            world.released = world.taken
            world.call(lambda: world.prefetcher.release(old))
        world.finish(*world.under_way)
        world.take(wanted)
        while world.taking is not None:
            world.finish(world.under_way[0])
        world.finish(*world.under_way)
        begun = len(world.begun)
        world.call(lambda: world.prefetcher.release(old))
        assert len(world.begun) == begun


# Errors from the disk.


class Gate:
    """Stands in the way of the reads of prefetch threads: `before` is called at each, with its number."""

    def __init__(self, patch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
        self.count = 0
        self._lock = threading.Lock()
        real = FileStore.read

        def read(store: FileStore, offset: int, into: Bytes) -> None:
            if threading.current_thread().name.startswith("prefetch-"):
                with self._lock:
                    number, self.count = self.count, self.count + 1
                before(number)
            real(store, offset, into)

        patch.setattr(FileStore, "read", read)


# Nothing is left.


def prefetching() -> int:
    return sum(thread.name.startswith("prefetch-") for thread in threading.enumerate())


def assert_nothing_is_left(before: Counter[str]) -> None:
    if threads_and_descriptors() - before:
        gc.collect()  # slow
    assert not threads_and_descriptors() - before


def ends_normally(session: Session) -> None:
    told(session)


def ends_by_an_exception(session: Session) -> None:
    for _ in session.generate(token_ids=PROMPT, max_tokens=5):
        raise ZeroDivisionError


def ends_before_it_began(session: Session) -> None:
    session.generate(token_ids=PROMPT)


def ends_in_the_middle(session: Session) -> None:
    pieces = session.generate(token_ids=PROMPT, max_tokens=5)
    next(pieces)
    session.close()
    session.close()
    with pytest.raises(RefinferError):
        next(pieces)


def ends_by_a_product_that_fails(session: Session) -> None:
    with pytest.MonkeyPatch.context() as patch:
        multiplying_fails(patch, 40)
        told(session)


def ends_by_an_interrupted_take(session: Session) -> None:
    real, count = Prefetcher.take, [0]

    def take(prefetcher: Prefetcher, chunk: int) -> Bytes:
        count[0] += 1
        if count[0] == 70:
            raise KeyboardInterrupt
        return real(prefetcher, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefetcher, "take", take)
        told(session)


def ends_by_damage(session: Session) -> None:
    """Found before the first token it is mended: by threads and a descriptor of their own."""
    with pytest.MonkeyPatch.context() as patch:
        failed: list[int] = []

        def fail(number: int) -> None:
            if not failed and number > 20:
                failed.append(number)
                raise DamagedWeightsError("damaged")

        Gate(patch, fail)
        told(session)
        assert failed


ENDS = {
    end.__name__: end
    for end in (
        ends_normally,
        ends_by_an_exception,
        ends_before_it_began,
        ends_in_the_middle,
        ends_by_a_product_that_fails,
        ends_by_an_interrupted_take,
        ends_by_damage,
    )
}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-8")
@pytest.mark.parametrize(
    ("end", "threads"),
    [(end, n) for end in ENDS for n in (0, 1, 3) if n or end not in ("ends_by_an_interrupted_take", "ends_by_damage")],
)
def test_no_thread_and_no_descriptor_is_left_after_a_session(one: Model, end: str, threads: int) -> None:
    one.load().close()
    before = threads_and_descriptors()
    expected = {
        "ends_by_an_exception": ZeroDivisionError,
        "ends_by_a_product_that_fails": ValueError,
        "ends_by_an_interrupted_take": KeyboardInterrupt,
    }
    with one.load(prefetch_threads=threads) as session:
        assert prefetching() == threads
        if end in expected:
            with pytest.raises(expected[end]):
                ENDS[end](session)
        else:
            within(lambda: ENDS[end](session))
    assert_nothing_is_left(before)
    session.close()
    assert_nothing_is_left(before)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-8", "FETCH-7")
@pytest.mark.parametrize("threads", [1, 3])
def test_closing_a_session_while_it_waits_for_a_chunk_leaves_nothing(
    one: Model, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.load().close()
    before = threads_and_descriptors()
    waits, begun, go = threading.Event(), threading.Event(), threading.Event()

    class Condition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            if threading.current_thread().name == "telling" and stuck.count >= 30:
                waits.set()
            return super().wait(timeout)

    def stop(number: int) -> None:
        if number >= 30:
            begun.set()
            assert go.wait(WATCHDOG_S)

    stuck = Gate(monkeypatch, stop)
    seen = SimpleNamespace(Thread=threading.Thread, Condition=Condition)
    monkeypatch.setattr(prefetch, "threading", seen)
    errors: list[BaseException] = []

    def tell() -> None:
        try:
            told(session)
        except BaseException as error:
            errors.append(error)

    session = one.load(prefetch_threads=threads, plan="none")
    telling = threading.Thread(target=tell, name="telling", daemon=True)
    closing = threading.Thread(target=session.close, daemon=True)
    telling.start()
    try:
        assert waits.wait(WATCHDOG_S)
        assert begun.wait(WATCHDOG_S)
        closing.start()
        telling.join(WATCHDOG_S)  # while the reads go on
        assert not telling.is_alive()
        assert closing.is_alive()
    finally:
        go.set()
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()
    assert [type(error) for error in errors] == [GenerationError]
    errors.clear()
    assert_nothing_is_left(before)
    assert Path(one.cache).exists()  # nothing was wrong with it


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-8")
def test_a_session_that_could_not_be_opened_leaves_nothing(one: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError

    one.load().close()
    before, source = threads_and_descriptors(), StreamedSource.__init__
    made: list[StreamedSource] = []

    def making(self: StreamedSource, *arguments: Any, **options: Any) -> None:
        made.append(self)
        source(self, *arguments, **options)

    monkeypatch.setattr(StreamedSource, "__init__", making)
    monkeypatch.setattr("refinfer.engine.Transformer", fails)
    with pytest.raises(MemoryError):
        one.load(prefetch_threads=2)
    try:
        assert_nothing_is_left(before)
    finally:
        for each in made:
            each.close()


INTERRUPTED = """
import os, sys, threading
from refinfer.__main__ import main
from refinfer.offload import prefetch
from refinfer.offload.store import FileStore

ready, stuck, go, n = int(sys.argv.pop(1)), int(sys.argv.pop(1)), threading.Event(), [0]
lock = threading.Lock()
real_read, real_close, real_wait = FileStore.read, prefetch.Prefetcher.close, threading.Condition.wait


def read(*arguments):
    if threading.current_thread().name.startswith("prefetch-"):
        with lock:
            n[0] += 1
            stops = n[0] > stuck
        if stops:
            os.write(ready, b"r")
            go.wait()
    real_read(*arguments)


def close(*arguments):
    go.set()
    real_close(*arguments)


class Condition(threading.Condition):
    def wait(self, timeout=None):
        if threading.current_thread() is threading.main_thread() and n[0] >= stuck:
            os.write(ready, b"m")
        return real_wait(self, timeout)


FileStore.read, prefetch.Prefetcher.close, prefetch.threading.Condition = read, close, Condition
sys.exit(main())
"""


def ready_for_it(seen: bytes) -> bool:
    """Tell whether both reads stop, and whoever takes a chunk is about to wait."""
    return seen.count(b"r") == 2 and b"m" in seen


def wait_until_it_rests(program: subprocess.Popen[str]) -> None:
    """Wait until a program's first thread has slept for many looks at it.

    A signal in the moment in which Python begins to wait for a lock is noticed when that wait ends, or leaves the lock
    in disorder: that is Python's, and not to be tested here.
    """
    before, looks = "", 0
    while looks < 300 and program.poll() is None:
        status = Path(f"/proc/{program.pid}/status").read_text()
        looks = looks + 1 if status == before and "State:\tS" in status else 0
        before = status


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-8", "FETCH-7")
@pytest.mark.parametrize("stuck", [0, 25], ids=["first chunk", "later chunk"])
def test_an_interrupt_while_a_chunk_is_waited_for_ends_the_program_in_one_line(one: Model, stuck: int) -> None:
    budget = one.budget(0, 0.0)
    ready, theirs = os.pipe()
    argv = ["generate", "--model", str(one.folder), "--budget", str(budget), "--plan", "none", "--token-ids", "1,2,3"]
    argv += ["--max-tokens", "61", "--weight-cache", one.cache, "--prefetch-threads", "2", "--weights", "int8"]
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(theirs), str(stuck), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[theirs],
    ) as program:
        os.close(theirs)
        watchdog = threading.Timer(WATCHDOG_S, program.kill)
        watchdog.start()
        try:
            seen = b""
            while not ready_for_it(seen) and (some := os.read(ready, 1)):
                seen += some
            wait_until_it_rests(program)
            program.send_signal(signal.SIGINT)
            _, complaint = program.communicate()
        finally:
            watchdog.cancel()
            watchdog.join()
            os.close(ready)
    assert ready_for_it(seen), complaint
    assert program.returncode == 130
    assert complaint == "refinfer: interrupted\n"


# A traced run.


def trace_of(written: dict[str, Any]) -> Trace:
    """Return the trace that a file for Chrome holds."""
    events = written["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    return Trace(
        tuple(Span(lanes[e["tid"]], e["cat"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X")
    )


def of(trace: Trace, kind: str, lane: str | None = None) -> list[Span]:
    return sorted((s for s in trace.spans if s.kind == kind and lane in (None, s.lane)), key=lambda s: s.start)


@pytest.mark.spec("FETCH-1", "FETCH-3", "FETCH-4")
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_traced_run_shows_every_chunk_read_before_it_is_computed(
    one: Model, threads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, slack = 3, 0.01  # times are written in thousandths of a microsecond
    file, budget = tmp_path / "trace.json", one.budget(positions=1 + tokens)
    argv = ["generate", "--model", str(one.folder), "--weights", one.name, "--weight-cache", one.cache]
    argv += ["--threads", "1"]
    argv += ["--budget", str(budget), "--plan", "balanced", "--prefetch-threads", str(threads), "--trace", str(file)]
    argv += ["--token-ids", "7", "--max-tokens", str(tokens), "--json"]
    assert within(lambda: main(argv)) == 0
    stats = json.loads(capsys.readouterr().out)
    trace = trace_of(json.loads(file.read_text()))

    inventory = one.inventory
    fixed = fixed_of(inventory, 1 + tokens)
    plan = make_plan("balanced", inventory, fixed, budget, readers=threads)
    kinds = [chunk.kind for chunk in inventory.cycle]
    streamed = [chunk.kind for n, chunk in enumerate(inventory.cycle) if n not in plan.locked]
    assert 0 < len(streamed) < len(kinds)
    computed, waited, read = of(trace, "compute"), of(trace, "wait"), of(trace, "read")
    assert [span.name for span in computed] == tokens * kinds
    assert [span.name for span in waited] == tokens * streamed
    assert tokens * len(streamed) <= len(read) <= tokens * len(streamed) + (plan.ring_slots if threads else 0)
    lanes = {f"disk {1 + thread}" for thread in range(max(1, threads))}
    assert {span.lane for span in computed + waited} == {"compute"}
    assert {span.lane for span in read} <= lanes
    for lane in ("compute", *lanes):  # on a lane, one thing at a time
        spans = sorted((s for s in trace.spans if s.lane == lane), key=lambda s: (s.start, s.end))
        if lane == "compute" and threads == 0:
            assert all(s.end >= s.start for s in spans)
        assert all(a.end <= b.start + slack for a, b in pairwise(spans))
    for name in set(streamed):  # the n-th wait for a kind ends when at least n chunks of it were read
        ends = sorted(span.end for span in read if span.name == name)
        for end, wait in zip(ends, (w for w in waited if w.name == name), strict=False):
            assert end <= wait.end + slack
    seconds = sum(span.end - span.start for span in waited) / 1e6
    assert seconds == pytest.approx(stats["offload"]["wait_s"], rel=0.5, abs=0.02)
    assert trace.start == 0


@pytest.mark.spec("FETCH-1")
def test_a_run_that_is_not_traced_keeps_nothing(one: Model) -> None:
    with one.load(prefetch_threads=2) as session:
        told(session)
        assert session.trace == Trace(())
    with one.load(prefetch_threads=2, trace=True) as session:
        told(session)
        assert session.trace.spans
