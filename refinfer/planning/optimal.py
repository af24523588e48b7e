"""The best of a fixed family of plans: the one that the simulator, a run on a virtual clock, finds fastest.

Leaves to others: the simple plans (`locks`), what reads and products cost (`cost`), the virtual clock (`simulate`).
Read more: tutorial 09; clauses PLAN-9 to PLAN-11.

The family: each ring of `RINGS` slots that the budget has room for, with each of the six simple plans, filled up evenly
until no further chunk fits. Plans that are not filled up need no try: locking more never makes a run longer.
(`balanced` balances bytes. A chunk's products take time in proportion to its bytes, so seconds are balanced too.)
Whoever reads ahead leaves out the rings that are smaller than the usual one (`plan`): on the virtual clock three slots
are often enough, since no read there ever takes longer than another; a real disk is not as even.

The best member has the shortest time for a token; among equals it reads the least, then it has the smallest ring. No
run is shorter than its bound, the longest of three times: all products one after another; all reads with every thread
busy; all uses of slots, each from the start of a read to the end of a product, with every slot busy. A run that waits
has its bound rise as it goes on. So the member with the lowest bound always goes on, until a run is over and no bound
is lower than its time: nearly all others are left after a small part of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final

import numpy as np

from refinfer.arrays import BoolArray
from refinfer.inventory import Inventory
from refinfer.planning.cost import Costs, ideal_token_s
from refinfer.planning.locks import LOCKS, fill
from refinfer.planning.simulate import ring_bounds

__all__ = ["RINGS", "Member", "family", "locked_array", "search", "token_s"]

RINGS: Final = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24)
"""How many chunks a ring may have."""

_AS_GOOD: Final = 1 + 1e-9  # times within this factor are equal: adding in another order rounds differently


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A plan of the family: the simple plan it grew from, the slots of its ring, what it locks."""

    name: str
    slots: int
    locked: BoolArray


def family(inventory: Inventory, left: int, slot_nbytes: int, rings: Sequence[int] = RINGS) -> Iterator[Member]:
    """Yield every member that rings and locks in `left` bytes allow, with slots of `slot_nbytes`."""
    for slots in rings:
        room = left - slots * slot_nbytes
        if room >= 0:
            for name, lock in LOCKS.items():
                yield Member(name, slots, fill(inventory, lock(inventory, room), room))


def locked_array(inventory: Inventory, locked: Iterable[int]) -> BoolArray:
    """Return a set of chunk numbers as one truth value for each chunk."""
    array = np.zeros(len(inventory.sizes), np.bool_)
    array[list(locked)] = True
    return array


def token_s(costs: Costs, locked: BoolArray, slots: int, prefetch_threads: int) -> float:
    """Return the seconds of a token once the first ones are over; 0 threads read each chunk on demand."""
    *_, seconds = _bounds(costs, locked, slots, prefetch_threads)
    return seconds


def _bounds(costs: Costs, locked: BoolArray, slots: int, prefetch_threads: int) -> Iterator[float]:
    """Yield lower bounds for `token_s`, and at last `token_s`."""
    reads = costs.reads(locked)
    if prefetch_threads == 0:
        yield float(reads.sum() + costs.compute_s.sum())
    else:
        yield from ring_bounds(reads, costs.compute_s, slots, prefetch_threads)


# --8<-- [start:search]
def search(inventory: Inventory, costs: Costs, members: Sequence[Member], prefetch_threads: int) -> Member:
    """Return the best of `members`."""
    different: dict[tuple[int, bytes], Member] = {}
    for member in members:
        different.setdefault((member.slots, member.locked.tobytes()), member)
    taken_s = costs.read_s + costs.compute_s  # how long a chunk needs its slot
    tries = []
    for number, member in enumerate(different.values()):
        ideal = ideal_token_s(costs, member.locked, prefetch_threads)
        bound = max(ideal, float(taken_s[~member.locked].sum()) / member.slots)
        rank = ideal, int(inventory.sizes[~member.locked].sum()), member.slots, number  # among equals the lowest wins
        tries.append((bound, rank, member, _bounds(costs, member.locked, member.slots, prefetch_threads)))
    heapify(tries)
    best, best_rank, found = float("inf"), tries[0][1], tries[0][2]
    while tries and tries[0][0] <= best * _AS_GOOD:
        bound, rank, member, run = heappop(tries)
        if best <= bound * _AS_GOOD and rank > best_rank:
            continue
        for higher in run:
            bound = max(bound, higher)
            if tries and bound > tries[0][0] * _AS_GOOD:
                heappush(tries, (bound, rank, member, run))
                break
        else:  # the run is over, so its bound is its time
            if bound * _AS_GOOD < best or (bound <= best * _AS_GOOD and rank < best_rank):
                best, best_rank, found = bound, rank, member
    return found


# --8<-- [end:search]
