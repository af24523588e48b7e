"""Specifies `refinfer.offload.prefetch` when it is closed: every thread ends, every wait ends, nothing more is read."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from refinfer.errors import GenerationError
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.readers import Loan
from refinfer.packing.layout import Bytes, Tiles

sys.path.insert(0, str(Path(__file__).parent))
from interleavings import WATCHDOG_S, Choose, World, explore, interleaved
from packed_model import within
from words import require_equal


@pytest.mark.spec("FETCH-7")
def test_an_interrupt_while_threads_are_started_ends_those_that_were() -> None:
    started: list[threading.Thread] = []

    class Interrupted(threading.Thread):
        def start(self) -> None:
            if started:
                raise KeyboardInterrupt
            started.append(self)
            super().start()

    with pytest.raises(KeyboardInterrupt):
        Prefetcher([0], [np.zeros(4, np.uint8)], lambda chunk, slot, thread: slot, 2, thread=Interrupted)
    assert not started[0].is_alive()


@pytest.mark.spec("FETCH-7")
@pytest.mark.parametrize(("slots", "threads", "wanted"), [(2, 1, [0, 1, 2]), (2, 2, [0, 1]), (3, 2, [0]), (2, 2, [2])])
def test_closing_at_any_moment_ends_every_thread_and_every_wait(slots: int, threads: int, wanted: list[int]) -> None:
    waiting: list[bool] = []

    def run(choose: Choose) -> None:
        with World(range(3), slots, threads) as world:
            interleaved(world, wanted, choose, ["close"])
            if world.taking is not None:  # it left the order, and so waits for the reads that go on
                assert world.under_way
            waiting.append(any(isinstance(call.error, GenerationError) for call in world.calls))

    explore(run, states=True)
    assert any(waiting)
    assert not all(waiting)


@pytest.mark.spec("FETCH-7")
@pytest.mark.parametrize("is_read", [False, True], ids=["a take that waits", "a chunk that has been read"])
def test_a_take_of_a_closed_prefetcher_raises_an_error_also_if_it_was_waiting(*, is_read: bool) -> None:
    with World(range(3), 2, 1) as world:
        if is_read:
            world.finish_all()
        else:
            world.take(0)
        waiting = world.calls[-1] if not is_read else None
        world.close()
        calls = [waiting] if waiting else []
        for _ in range(2):
            call = world.call(lambda: world.prefetcher.take(0))
            assert call.done, "closed, and the take of chunk 0 waits for ever"
            calls.append(call)
        for call in calls:
            assert call.error is not None, "closed, and the take of chunk 0 gives it"
            if not isinstance(call.error, GenerationError):
                raise call.error
            require_equal(str(call.error), "the weights were closed while they were in use", "what it says")


@pytest.mark.spec("FETCH-7")
def test_closing_waits_for_the_reads_under_way_and_again_is_allowed_from_several_threads() -> None:
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
        assert not any(reading.runs_in.is_alive() for reading in (first, second))
        for chunk in (0, 1, 2):
            with pytest.raises(GenerationError, match="closed while they were in use"):
                within(lambda chunk=chunk: world.prefetcher.take(chunk))  # type: ignore[misc]
        world.prefetcher.release(Loan(first.slot))


FEWER_THREADS: Final = """
import resource, sys, threading
from pathlib import Path
import numpy as np
from refinfer.errors import GenerationError
from refinfer.offload.prefetch import Prefetcher

STACK = 1 << 28
threading.stack_size(STACK)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
most = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (size + 2 * STACK + STACK // 2, most))
try:
    Prefetcher(range(3), [np.zeros(8, np.uint8)] * 8, lambda chunk, slot, thread: slot, 8)
except GenerationError as error:
    print(error)
print([thread.name for thread in threading.enumerate()])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc and its limits, as Linux has them")
@pytest.mark.spec("FETCH-8")
def test_if_the_system_starts_fewer_threads_than_were_asked_for_those_that_run_are_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FEWER_THREADS], capture_output=True, text=True, timeout=WATCHDOG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "this system starts no further thread; use fewer prefetch threads",
        "['MainThread']",
    ]


@pytest.mark.spec("FETCH-7", "GEN-21")
@pytest.mark.parametrize("when", ["before it is closed", "while it is closed"])
def test_a_closed_prefetcher_whose_read_failed_is_no_garbage_that_somebody_has_to_collect(when: str) -> None:
    """It is freed with the last reference, and so is whoever asked for the chunk: an error holds the frames it left."""
    begun, go = threading.Event(), threading.Event()

    def read(chunk: int, slot: Bytes, thread: int) -> Tiles:
        begun.set()
        assert go.wait(WATCHDOG_S)
        raise ValueError("it fails")

    class Asks:
        def __init__(self, reader: Prefetcher) -> None:
            self.reader = reader
            with suppress(ValueError, GenerationError):
                reader.take(0)

    gc.collect()
    gc.disable()
    try:
        reader = Prefetcher([0], [np.zeros(1, np.uint8)], read, 1)
        assert begun.wait(WATCHDOG_S)
        if when == "before it is closed":
            go.set()
            asks = weakref.ref(Asks(reader))
            reader.close()
        else:
            closing = threading.Thread(target=reader.close)
            closing.start()
            asks = weakref.ref(Asks(reader))  # ends when it is closed, which waits for the read
            go.set()
            closing.join(WATCHDOG_S)
            del closing
        alive = weakref.ref(reader)
        del reader
        assert alive() is None
        assert asks() is None
    finally:
        gc.enable()
