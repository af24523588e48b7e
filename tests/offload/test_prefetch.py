"""Specifies `refinfer.offload.prefetch`: every chunk in order, whatever the threads do, and no slot used twice at once.

Most tests run in a `World` (`interleavings`), in which the test decides which thread moves. Seeking, errors, closing
and whole sessions have files of their own next to this one.
"""

from __future__ import annotations

import errno
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.offload.prefetch import Prefetcher
from refinfer.packing.layout import Bytes

sys.path.insert(0, str(Path(__file__).parent))
from interleavings import GAVE_UP, POISON, Choose, World, cyclic, explore, interleaved
from packed_model import within
from words import require_equal


def takes_in_order(world: World, takes: int, choose: Choose) -> None:
    interleaved(world, [world.order[place] for place in cyclic(len(world.order), takes)], choose)


@pytest.mark.spec("FETCH-1", "FETCH-2", "FETCH-3", "FETCH-4")
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 3), (1, 2, 2, 2), (2, 1, 2, 4), (2, 2, 1, 3), (2, 2, 2, 2), (3, 2, 2, 2), (2, 3, 2, 1), (4, 3, 3, 1)],
    ids="chunks {0[0]}, slots {0[1]}, threads {0[2]}, takes {0[3]}".format,
)
def test_in_every_interleaving_chunks_are_given_in_order_as_they_were_read(size: tuple[int, int, int, int]) -> None:
    n, slots, threads, takes = size

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
    """No test decides here who moves: threads are switched far more often than usual."""
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
            chunk = order[at % len(order)]
            loan = prefetcher.take(chunk)
            for _ in range(2):
                assert loan.tiles.tobytes() == bytes([chunk]) * (40 + chunk)
            prefetcher.release(loan)
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
        world.finish_all()
        assert [reading.chunk for reading in world.begun] == cyclic(n, slots)
        world.take()
        assert len(world.begun) == slots
        world.release()
        assert [reading.chunk for reading in world.begun] == cyclic(n, slots + 1)
        assert len({id(reading.slot) for reading in world.begun}) == slots


@pytest.mark.spec("FETCH-2")
@pytest.mark.parametrize("threads", [1, 2, 3], ids="threads {}".format)
def test_a_taken_chunk_stays_as_it_is_until_it_is_released_and_only_then_its_slot_is_read_into(threads: int) -> None:
    with World(range(5), 2, threads) as world:
        for _ in range(12):
            world.finish_all()
            world.take()
            assert world.held is not None
            reading, loan = world.held
            begun = len(world.begun)
            loan.tiles[:] = 0x5A  # a sentinel
            world.finish_all()
            assert (loan.tiles == 0x5A).all(), f"chunk {reading.chunk} has changed while it was lent"
            assert len(world.begun) == begun, f"chunk {reading.chunk} is lent, and its slot is read into"
            loan.tiles[:] = np.frombuffer(reading.content, np.uint8)
            world.release()
            assert world.begun[begun].slot is reading.slot, f"the slot of chunk {reading.chunk} is not the next one"
            assert (reading.slot == POISON).all(), f"the slot of chunk {reading.chunk} is not read into"


@pytest.mark.spec("FETCH-12")
@pytest.mark.parametrize("threads", [2, 4])
def test_a_free_slot_wakes_one_thread_and_a_chunk_that_was_read_wakes_none(threads: int) -> None:
    with World(range(9), 4, threads) as world:
        world.finish_all()  # the ring is full, and every thread sleeps
        for _ in range(5):
            world.take()
            world.woken.clear()
            world.release()
            assert sum(name.startswith("prefetch-") for name in world.woken) == 1
            world.woken.clear()
            world.finish(*world.under_way)
            assert not [name for name in world.woken if name.startswith("prefetch-")]


@pytest.mark.spec("FETCH-4")
def test_a_chunk_is_given_once_it_is_read_while_those_after_it_are_still_being_read() -> None:
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


@pytest.mark.spec("FETCH-4", "FETCH-1")
@pytest.mark.parametrize("earlier", [0, 1], ids=["read, then taken", "taken, then read after chunk 1"])
def test_take_waits_for_its_own_chunk_and_for_no_other(earlier: int) -> None:
    """Chunk 0 is taken, and read before chunk 1 or after it; the world checks after each step what it should."""
    with World(range(5), 4, 2) as world:
        reads = list(world.under_way)
        if earlier == 0:
            world.finish(reads[0])
            world.finish(reads[1])
            world.take(0)
        else:
            world.take(0)
            world.finish(reads[1])
            world.finish(reads[0])
        assert world.held is not None, "chunk 0 has been read, and was never handed out"
        world.forget()


@pytest.mark.spec("FETCH-13")
@pytest.mark.parametrize("forgotten", [1, 2], ids="loans that nobody released {}".format)
def test_a_release_also_ends_the_loans_before_it_that_nobody_released(forgotten: int) -> None:
    with World(range(9), 3, 1) as world:
        for _ in range(3):
            world.finish_all()
            for _ in range(forgotten):
                world.take()
                world.forget()
            world.take()
            world.release()


@pytest.mark.spec("FETCH-2")
@pytest.mark.parametrize("slots", [1, 2], ids="slots {}".format)
def test_a_loan_that_ended_releases_nothing_when_the_same_tiles_are_lent_again(slots: int) -> None:
    """Typed views are made once for each slot, so two loans of one slot have the very same tiles."""
    assert not World.gave_up, GAVE_UP
    ring = [np.zeros(8, np.uint8) for _ in range(slots)]
    begun: list[int] = []

    def read(chunk: int, slot: Bytes, thread: int) -> Bytes:
        begun.append(chunk)
        return slot

    prefetcher = Prefetcher(range(slots), ring, read, 1)
    try:
        for _ in range(3):
            loans = []
            for chunk in range(slots):
                loans.append(within(lambda chunk=chunk: prefetcher.take(chunk), World.patience_s))  # type: ignore[misc]
                prefetcher.release(loans[-1])
            again = within(lambda: prefetcher.take(0), World.patience_s)
            assert again.tiles is loans[0].tiles, "chunk 0 does not lie in the slot it was read into before"
            assert again is not loans[0], "the take of chunk 0 gives a loan that has ended"
            before = prefetcher._released
            for loan in loans:
                prefetcher.release(loan)
                assert prefetcher._released == before, "a loan that had ended has freed a slot"
            prefetcher.release(again)
            require_equal(prefetcher._released - before, 1, "the number of slots that the latest loan frees")
    finally:
        within(prefetcher.close, World.patience_s)
    assert begun
