"""Specifies `refinfer.offload.prefetch` when the order is left: seeks, interrupted waits, and loans that end late.

Tests run in a `World` (`interleavings`), in which the test decides which thread moves.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from interleavings import Choose, World, explore, interleaved
from words import require_equal


@pytest.mark.slow
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


@pytest.mark.spec("FETCH-5")
def test_a_seek_waits_for_reads_under_way_drops_what_was_read_ahead_and_goes_on_from_there() -> None:
    with World(range(5), 3, 2) as world:
        first, second = world.under_way
        world.take(3)
        world.finish(second)
        assert world.seeking is not None
        require_equal(len(world.begun), 2, "the number of reads")  # no slot is touched before the other read has ended
        world.finish(first)
        require_equal([reading.chunk for reading in world.under_way], [3, 4], "what two threads read after take(3)")
        while world.taking is not None:
            world.finish(world.under_way[0])
        world.release()
        for chunk in (4, 0, 1):
            while chunk not in [r.chunk for n, r in world.reads.items() if n >= world.taken and r.finished]:
                world.finish(world.under_way[0])
            world.take(chunk)
            assert world.held is not None
            world.release()


@pytest.mark.spec("FETCH-1", "FETCH-5", "FETCH-7")
@pytest.mark.parametrize(
    ("slots", "threads", "wanted"), [(2, 1, [0, 1, 2]), (2, 2, [0, 1]), (2, 2, [2, 0]), (4, 2, [2])], ids=str
)
def test_a_take_that_is_interrupted_loses_nothing_and_reading_goes_on(
    slots: int, threads: int, wanted: list[int]
) -> None:
    """Also while it seeks: threads that waited for the end of the seek read on at once."""

    def run(choose: Choose) -> None:
        with World(range(3), slots, threads) as world:
            interleaved(world, wanted, choose, ["interrupt"])

    explore(run, states=True)


@pytest.mark.spec("FETCH-2")
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_loan_of_a_pass_that_was_left_long_ago_releases_nothing(wanted: int, released: bool) -> None:
    """What ends late, such as the generator of a pass that failed, may release a loan that has ended before."""
    with World(range(3), 2, 2) as world:
        world.finish(*world.under_way)
        world.take(0)
        old = world.forget()
        if released:
            world.released = world.taken
            world.end(old)
        world.finish_all()
        world.take(wanted)
        while world.taking is not None:
            world.finish(world.under_way[0])
        world.finish_all()
        begun = len(world.begun)
        world.end(old)
        assert len(world.begun) == begun, "a loan that had ended was released, and another chunk is read"
        assert world.held is not None


@pytest.mark.spec("FETCH-2")
def test_a_loan_that_ends_during_a_seek_or_after_an_interrupted_one_touches_no_slot() -> None:
    with World(range(4), 3, 1) as world:
        world.finish(*world.under_way)
        world.take(0)
        old = world.forget()
        world.take(2)
        assert world.seeking is not None
        world.call(lambda: world.prefetcher.release(old))
        assert len(world.under_way) == 1
        world.interrupt()
        world.released = world.taken  # the old loan was still the latest, and has ended
        world.finish_all()
        world.call(lambda: world.prefetcher.release(old))
        world.take(3)
        world.finish_all()
        assert world.held is not None
