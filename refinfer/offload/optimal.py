"""The best plan of a stated family, by the simulator.

Knows: the family, how its members are compared. Does not know: how seconds are measured.
Spec: PLAN-9 to PLAN-11. Tutorial: 09.

The family: each ring of `RINGS` slots that the budget has room for, with each of the six simple plans beside it, filled
up evenly until no further chunk fits. An unfilled plan is in it too, as its filled self: locking more never makes a run
longer. (`balanced` balances bytes; a chunk's products take as long as it has bytes, so that it balances seconds too.)

The best member has the shortest token; among equals it reads least, then its ring is smallest. No run is shorter than
its own bound, so members are tried in the order of their bounds until the next bound is longer than the best run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from refinfer.arrays import BoolArray
from refinfer.offload.cost import Costs, ideal_token_s
from refinfer.offload.inventory import Inventory
from refinfer.offload.locks import LOCKS, fill
from refinfer.offload.simulate import readers_token_s, ring_token_s

__all__ = ["RINGS", "Member", "family", "locked_array", "search", "token_s"]

RINGS: Final = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24)
"""How many chunks a ring may have."""

_AS_GOOD: Final = 1 + 1e-9  # sums of the same seconds in another order


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
    array = np.zeros(len(inventory.cycle), np.bool_)
    array[list(locked)] = True
    return array


def token_s(costs: Costs, locked: BoolArray, slots: int, readers: int) -> float:
    """Return the seconds of a steady token; 0 readers read when a chunk is needed."""
    reads = costs.reads(locked)
    if readers == 0:
        return sum(reads) + sum(costs.compute_s)
    if readers == 1:
        return ring_token_s(reads, costs.compute_s, slots)
    return readers_token_s(reads, costs.compute_s, slots, readers)


# --8<-- [start:search]
def search(inventory: Inventory, costs: Costs, members: Sequence[Member], readers: int) -> Member:
    """Return the best of `members`."""
    ranked = sorted(
        (ideal_token_s(costs, m.locked, readers), int(inventory.sizes[~m.locked].sum()), m.slots, number)
        for number, m in enumerate(members)
    )
    best, found = float("inf"), members[ranked[0][3]]
    for bound, _, _, number in ranked:
        if bound > best * _AS_GOOD:
            break
        seconds = token_s(costs, members[number].locked, members[number].slots, readers)
        if seconds * _AS_GOOD < best:
            best, found = seconds, members[number]
        if best <= bound * _AS_GOOD:
            break
    return found


# --8<-- [end:search]
