"""Specifies `refinfer.offload.prefetch` when reads fail: an error reaches whoever takes that chunk or a later one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from refinfer.errors import DamagedWeightsError

sys.path.insert(0, str(Path(__file__).parent))
from interleavings import Choose, World, explore, interleaved
from packed_model import within


@pytest.mark.spec("FETCH-6")
@pytest.mark.parametrize("threads", [1, 2], ids="threads {}".format)
def test_an_error_is_raised_by_the_take_of_its_chunk_and_by_every_later_one(threads: int) -> None:
    """The world checks that no take waits for ever, and that chunk 0, which was read before, is still given."""
    with World(range(4), 3, threads) as world:
        world.finish(world.under_way[0])
        failed = next(reading for reading in world.under_way if reading.chunk == 1)
        world.finish(failed, error=DamagedWeightsError("chunk 1 is damaged"))
        world.finish_all()
        world.take(0)
        world.release()
        for chunk in (1, 1, 2, 3, 0):
            world.take(chunk)
            assert world.held is None, f"chunk 1 could not be read, and the take of chunk {chunk} gives it"


@pytest.mark.spec("FETCH-6")
@pytest.mark.parametrize(
    ("slots", "threads", "wanted"),
    [(2, 1, [0, 1, 2]), (2, 2, [0, 1]), (3, 3, [0]), (2, 2, [2])],
    ids=str,
)
def test_an_error_reaches_whoever_takes_that_chunk_at_whatever_read_it_comes(
    slots: int, threads: int, wanted: list[int]
) -> None:
    """It is raised by every later take too. What was read before is still given, and nothing more is read."""
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
                if world.held is not None:
                    world.release()
                world.take()
                assert world.held is None
                assert len(world.begun) == begun

    explore(run, states=True)
    assert any(runs)
    assert not all(runs)


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
