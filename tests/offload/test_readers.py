"""Specifies `refinfer.offload.readers`, and stores that read no faster than a rate."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.errors import DamagedWeightsError, GenerationError
from refinfer.generate import load
from refinfer.offload.readers import Closed, Loan, LruPages, OnDemand
from refinfer.offload.store import ThrottledStore
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.layout import Bytes
from words import require_equal

WATCHDOG_S: Final = 30.0


class Disk:
    """A `read` that writes down its calls; each brings other bytes, and those in `broken` fail."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.broken: set[int] = set()
        self.error: BaseException | None = None

    def read(self, chunk: int, slot: Bytes, thread: int) -> Bytes:
        require_equal(thread, 0, "the number of the thread that reads")
        self.reads.append(chunk)
        slot[:] = 0xEE
        if chunk in self.broken:
            raise self.error or DamagedWeightsError(f"chunk {chunk}")
        slot[: 4 + chunk % 3] = chunk
        return slot[: 4 + chunk % 3]

    def taken(self) -> list[int]:
        """Return what was read since this was last asked."""
        reads, self.reads = self.reads, []
        return reads


def slots(n: int) -> list[Bytes]:
    return [np.zeros(8, np.uint8) for _ in range(n)]


def content(chunk: int) -> list[int]:
    return [chunk] * (4 + chunk % 3)


@pytest.mark.spec("READ-1")
def test_on_demand_a_chunk_is_read_when_it_is_taken_and_only_then() -> None:
    disk = Disk()
    reader = OnDemand(slots(2), disk.read)
    assert disk.taken() == []
    for chunk in (0, 1, 2, 0, 0, 2):
        loan = reader.take(chunk)
        assert loan.tiles.tolist() == content(chunk)
        assert disk.taken() == [chunk]
        reader.release(loan)
        assert disk.taken() == []
    reader.close()
    reader.close()
    assert disk.taken() == []


@pytest.mark.spec("READ-1")
def test_on_demand_a_read_that_fails_fails_the_take_and_the_next_may_work() -> None:
    disk = Disk()
    reader = OnDemand(slots(1), disk.read)
    disk.broken = {1}
    assert reader.take(0).tiles.tolist() == content(0)
    with pytest.raises(DamagedWeightsError, match="chunk 1"):
        reader.take(1)
    disk.broken = set()
    assert reader.take(1).tiles.tolist() == content(1)


@pytest.mark.spec("READ-1", "READ-2")
@pytest.mark.parametrize(
    "make", [lambda d: OnDemand(slots(1), d.read), lambda d: LruPages(slots(2), d.read)], ids=["demand", "lru"]
)
def test_readers_without_threads_start_no_thread(make: Callable[[Disk], OnDemand | LruPages]) -> None:
    before = threading.active_count()
    reader = make(Disk())
    reader.take(0)
    assert threading.active_count() == before


class Pages:
    """LRU pages in some slots; each take is compared with what it should do, in words."""

    def __init__(self, n_slots: int) -> None:
        self.slots = slots(n_slots)
        self.disk = Disk()
        self._reader = LruPages(self.slots, self.disk.read)
        self._takes: list[str] = []

    @property
    def story(self) -> str:
        """What has happened so far."""
        latest = ", ".join(self._takes[-16:])
        return f"slots: {len(self.slots)}; takes: {'..., ' if len(self._takes) > 16 else ''}{latest}"

    def take(self, chunk: int, *, kept: bool) -> Bytes:
        """Take a chunk that is kept, or one that has to be read; return its tiles."""
        self._takes.append(str(chunk))
        loan = self._reader.take(chunk)
        reads = self.disk.taken()
        if kept:
            assert not reads, f"{self.story}; the last one reads chunk {reads[0]}, although chunk {chunk} is kept"
        else:
            assert reads, f"{self.story}; the last one reads nothing, although chunk {chunk} is not kept"
            assert reads == [chunk], f"{self.story}; the last one reads {reads}"
        assert isinstance(loan, Loan), f"`take` returns a {type(loan).__name__}, not a Loan of the tiles"
        tiles: Bytes = loan.tiles
        is_read = isinstance(tiles, np.ndarray)
        what = "a tuple (slot, tiles)" if isinstance(tiles, tuple) else f"a {type(tiles).__name__}"
        assert is_read, f"the loan's `tiles` is {what}, not what `_read` returned"
        assert tiles.tolist() == content(chunk), f"{self.story}; the last one gives the bytes of chunk {tiles[0]}"
        self._reader.release(loan)
        return tiles

    def fail(self, chunk: int, error: BaseException | None = None) -> None:
        """Take a chunk of which the read ends in an error."""
        error = error or DamagedWeightsError(f"chunk {chunk}")
        self._takes.append(f"{chunk} (its read ends in {type(error).__name__})")
        self.disk.broken, self.disk.error = {chunk}, error
        with suppress(type(error)):
            self._reader.take(chunk)
            raise AssertionError(f"{self.story}; no error is raised")
        self.disk.broken, self.disk.error = set(), None
        require_equal(self.disk.taken(), [chunk], f"{self.story}; what is read")

    def slot_of(self, tiles: Bytes) -> int:
        """Return the number of the slot that a chunk lies in."""
        found = [number for number, slot in enumerate(self.slots) if np.shares_memory(slot, tiles)]
        assert found, f"{self.story}; chunk {tiles[0]} does not lie in a slot"
        return found[0]


@pytest.mark.spec("READ-2")
def test_a_chunk_is_read_when_it_is_first_taken_and_not_again_while_it_is_kept() -> None:
    pages = Pages(3)
    for chunk in (0, 1):
        pages.take(chunk, kept=False)
        for _ in range(2):
            pages.take(chunk, kept=True)


@pytest.mark.spec("READ-2")
def test_each_chunk_that_is_kept_lies_in_a_slot_of_its_own() -> None:
    pages = Pages(3)
    chunks: dict[int, int] = {}
    for chunk in range(3):
        slot = pages.slot_of(pages.take(chunk, kept=False))
        assert slot not in chunks, f"{pages.story}; chunks {chunks[slot]} and {chunk} lie in the same slot"
        chunks[slot] = chunk
    for chunk in range(3):
        pages.slot_of(pages.take(chunk, kept=True))


@pytest.mark.spec("READ-2")
def test_a_chunk_that_was_forgotten_is_read_again_into_a_slot() -> None:
    pages = Pages(1)
    for chunk in (0, 1, 0, 2):
        pages.slot_of(pages.take(chunk, kept=False))


@pytest.mark.spec("READ-2")
def test_the_chunk_that_was_used_longest_ago_is_forgotten() -> None:
    """Chunk 0 is used again before chunk 3 needs a slot, so that chunk 1 has to go."""
    pages = Pages(3)
    for chunk, kept in ((0, False), (1, False), (2, False), (0, True), (3, False)):
        pages.take(chunk, kept=kept)
    for chunk, kept in ((0, True), (2, True), (1, False), (2, True), (3, False)):
        pages.take(chunk, kept=kept)


@pytest.mark.spec("READ-4")
@pytest.mark.parametrize("n_slots", [2, 3, 1], ids="slots {}".format)
def test_a_read_that_fails_keeps_nothing_and_loses_no_slot(n_slots: int) -> None:
    pages = Pages(n_slots)
    for chunk in range(n_slots):
        pages.take(chunk, kept=False)
    pages.fail(9)  # chunk 0 has been forgotten for it
    for chunk in range(1, n_slots):
        pages.take(chunk, kept=True)
    pages.take(9, kept=False)  # it takes the slot that is free: no other chunk is forgotten
    chunks = [*range(1, n_slots), 9]
    for chunk in chunks:
        pages.take(chunk, kept=True)
    for _ in range(n_slots + 1):
        pages.fail(8)  # one chunk is forgotten for all of these
    for chunk in chunks[1:]:
        pages.take(chunk, kept=True)


@pytest.mark.spec("READ-4")
def test_a_read_that_is_interrupted_loses_no_slot_either() -> None:
    pages = Pages(2)
    for chunk in (0, 1):
        pages.take(chunk, kept=False)
    pages.fail(9, KeyboardInterrupt())  # chunk 0 has been forgotten for it, and its slot is free
    pages.take(9, kept=False)
    for chunk in (1, 9):
        pages.take(chunk, kept=True)


@pytest.mark.spec("READ-2")
@given(n_slots=st.integers(1, 4), takes=st.lists(st.integers(0, 5), max_size=16))
def test_a_chunk_is_kept_until_as_many_others_as_there_are_slots_have_been_used(n_slots: int, takes: list[int]) -> None:
    pages = Pages(n_slots)
    for now, chunk in enumerate(takes):
        since = [then for then in range(now) if takes[then] == chunk]
        others = set(takes[since[-1] + 1 : now]) if since else set()
        pages.take(chunk, kept=bool(since) and len(others) < n_slots)


@pytest.mark.spec("READ-2")
@pytest.mark.parametrize("n", [1, 2, 3, 6], ids="chunks {}".format)
@pytest.mark.parametrize("n_slots", [1, 2, 3, 5], ids="slots {}".format)
def test_a_cyclic_scan_reads_everything_again_unless_all_of_it_fits(n: int, n_slots: int) -> None:
    pages = Pages(n_slots)
    for scan in range(4):
        for chunk in range(n):
            pages.take(chunk, kept=n <= n_slots and scan > 0)


@pytest.mark.spec("READ-2")
def test_lru_pages_can_be_closed_again_and_again() -> None:
    reader = LruPages(slots(1), Disk().read)
    reader.close()
    reader.close()


@pytest.mark.spec("READ-2", "READ-4")
@given(
    n_slots=st.integers(1, 5),
    wanted=st.lists(st.tuples(st.integers(0, 6), st.sets(st.integers(0, 6), max_size=2)), max_size=60),
)
def test_lru_pages_keep_a_chunk_in_each_slot_and_forget_the_one_that_was_not_used_for_longest(
    n_slots: int, wanted: list[tuple[int, set[int]]]
) -> None:
    """Also when reads fail: a slot is never lost, and what failed is not kept."""
    disk, memory = Disk(), slots(n_slots)
    reader = LruPages(memory, disk.read)
    held: OrderedDict[int, Bytes] = OrderedDict()
    for chunk, broken in wanted:
        disk.broken = broken
        if chunk not in held:
            if len(held) == n_slots:
                held.popitem(last=False)
            if chunk in broken:
                with pytest.raises(DamagedWeightsError, match=f"chunk {chunk}"):
                    reader.take(chunk)
                assert disk.taken() == [chunk]
                continue
        expected = [] if chunk in held else [chunk]
        loan = reader.take(chunk)
        held[chunk] = loan.tiles
        held.move_to_end(chunk)
        assert disk.taken() == expected
        reader.release(loan)
        assert all(view.tolist() == content(number) for number, view in held.items())  # none overwrites another
        assert len({view.ctypes.data for view in held.values()}) == len(held)


@pytest.mark.spec("READ-1")
def test_a_closed_reader_gives_no_chunk_and_closing_again_is_allowed() -> None:
    reader = Closed()
    with pytest.raises(GenerationError, match="were closed while they were in use"):
        reader.take(0)
    reader.release(Loan(None))
    reader.close()
    reader.close()


@pytest.mark.spec("FETCH-2")
def test_two_loans_are_never_equal_although_they_lend_the_same_tiles() -> None:
    tiles = slots(1)[0]
    assert Loan(tiles) != Loan(tiles)


# Throttled stores, on a clock of their own.


class FakeClock:
    """A clock that moves when everybody sleeps: to the first instant at which somebody wakes."""

    def __init__(self, sleepers: int = 1) -> None:
        self.time = 0.0
        self._moved = threading.Condition()
        self._running = sleepers
        self._wakes: list[float] = []

    def now(self) -> float:
        with self._moved:
            return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        with self._moved:
            wakes = self.time + seconds
            self._wakes.append(wakes)
            self._running -= 1
            self._advance()
            assert self._moved.wait_for(lambda: wakes <= self.time and wakes not in self._wakes, WATCHDOG_S)

    def leave(self) -> None:
        """Count one sleeper less."""
        with self._moved:
            self._running -= 1
            self._advance()

    def _advance(self) -> None:
        if self._running == 0 and self._wakes:
            self.time = min(self._wakes)
            self._running = sum(wakes <= self.time for wakes in self._wakes)
            self._wakes = [wakes for wakes in self._wakes if wakes > self.time]
            self._moved.notify_all()


class Memory:
    """A store that takes `seconds` for each read on the clock, and fails at the offsets `broken`."""

    def __init__(self, clock: FakeClock, seconds: float = 0.0, broken: frozenset[int] = frozenset()) -> None:
        self.reads: list[tuple[int, int]] = []
        self.closed = 0
        self._clock, self._seconds, self._broken = clock, seconds, broken

    def read(self, offset: int, into: Bytes) -> None:
        self.reads.append((offset, into.size))
        if self._seconds:
            self._clock.sleep(self._seconds)
        if offset in self._broken:
            raise DamagedWeightsError("broken")
        into[:] = offset % 251

    def close(self) -> None:
        self.closed += 1


RATE: Final = 1024.0  # powers of two, so that times are exact


@pytest.mark.spec("STORE-5")
def test_a_throttled_store_takes_the_time_of_its_bytes_and_reads_the_same() -> None:
    clock = FakeClock()
    memory = Memory(clock)
    store = ThrottledStore(memory, RATE, clock)
    ends = []
    for offset, nbytes in ((3, 1024), (4, 512), (5, 4096)):
        into = np.zeros(nbytes, np.uint8)
        store.read(offset, into)
        assert (into == offset).all()
        ends.append(clock.now())
    assert ends == [1.0, 1.5, 5.5]
    assert memory.reads == [(3, 1024), (4, 512), (5, 4096)]
    store.close()
    store.close()
    assert memory.closed == 2


@pytest.mark.spec("STORE-5")
def test_an_idle_throttled_store_saves_nothing_up_for_later() -> None:
    clock = FakeClock()
    store = ThrottledStore(Memory(clock), RATE, clock)
    clock.sleep(100)
    for i in range(1, 4):
        store.read(0, np.zeros(2048, np.uint8))
        assert clock.now() == 100 + 2 * i


@pytest.mark.spec("STORE-5")
def test_a_store_that_is_slower_than_its_rate_is_not_made_slower() -> None:
    clock = FakeClock()
    store = ThrottledStore(Memory(clock, seconds=4.0), RATE, clock)
    for i in range(1, 4):
        store.read(0, np.zeros(1024, np.uint8))
        assert clock.now() == 4.0 * i


@pytest.mark.spec("STORE-5")
def test_a_read_that_fails_fails_as_without_a_rate() -> None:
    clock = FakeClock()
    store = ThrottledStore(Memory(clock, broken=frozenset({4096})), RATE, clock)
    with pytest.raises(DamagedWeightsError, match="broken"):
        store.read(4096, np.zeros(64, np.uint8))
    store.read(0, np.zeros(64, np.uint8))
    assert clock.now() > 0


@pytest.mark.spec("FETCH-11", "STORE-5")
def test_closing_a_throttled_store_ends_a_wait_and_the_reader_gets_what_was_read() -> None:
    class ClosingClock(FakeClock):
        """A clock during whose third sleep the store is closed."""

        slept = 0

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            self.slept += 1
            if self.slept == 3:
                store.close()

    clock = ClosingClock()
    memory = Memory(clock)
    store = ThrottledStore(memory, RATE, clock)
    into = np.zeros(1 << 20, np.uint8)  # a quarter of an hour
    store.read(7, into)
    assert (into == 7).all()
    assert (clock.slept, memory.closed) == (3, 1)
    assert clock.now() < 1


@pytest.mark.spec("STORE-5")
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("seconds", [0.0, 0.25, 3.0])
def test_the_rate_holds_for_all_threads_together(threads: int, seconds: float) -> None:
    clock = FakeClock(threads)
    store = ThrottledStore(Memory(clock, seconds), RATE, clock)
    rng = np.random.default_rng(threads)
    sizes = [[int(n) for n in 256 * rng.integers(1, 9, 20)] for _ in range(threads)]
    ends: list[tuple[float, int]] = []

    def reads(mine: list[int]) -> None:
        for nbytes in mine:
            store.read(0, np.zeros(nbytes, np.uint8))
            ends.append((clock.now(), nbytes))
        clock.leave()

    workers = [threading.Thread(target=reads, args=(mine,), daemon=True) for mine in sizes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WATCHDOG_S)
        assert not worker.is_alive()
    total = sum(map(sum, sizes))
    ends.sort()
    read = 0
    for end, nbytes in ends:
        read += nbytes
        assert read <= RATE * end
    assert len(ends) == 20 * threads
    if seconds == 0.0:
        assert ends[-1][0] == total / RATE  # the rate is also reached


@pytest.mark.spec("FETCH-7", "GEN-8")
def test_a_closed_source_says_so_and_does_not_suspect_its_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with load(budget="90%", weight_cache=cache) as session:
        source = session.source
        assert isinstance(source, StreamedSource)
        with source.forward_pass() as weights:
            source.close()
            for number in (0, 1):
                with pytest.raises(GenerationError, match="were closed"):
                    next(source.chunks(number, 1))
            with pytest.raises(GenerationError, match="were closed"):
                weights.lm_head.matmul(np.ones((1, weights.lm_head.shape[1]), np.float32))
            with pytest.raises(GenerationError, match="were closed"):
                weights.embed_tokens.rows(np.array([0]))
        with pytest.raises(GenerationError, match="are closed; load the model again"), source.forward_pass():
            pass
    assert cache.exists()
