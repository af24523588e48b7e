"""Plans: which chunks stay in memory and which stream, inside a budget; decided before a byte is read.

Knows: sizes, and what each byte of a budget is spent on. Does not know: files, threads, clocks.
Spec: PLAN-1 to PLAN-4. Tutorial: 09.

    budget = block of vectors + KV cache + scratch + ring + locked chunks + what is left

`locks` has the six simple plans, `optimal` the search for the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from refinfer.errors import BudgetError, RequestError
from refinfer.offload.cost import HERE, Calibration, Costs, costs_of, ideal_token_s
from refinfer.offload.inventory import Inventory
from refinfer.offload.locks import LOCKS
from refinfer.offload.optimal import RINGS, family, search, token_s
from refinfer.process import format_nbytes

__all__ = ["PLANS", "Account", "Fixed", "Plan", "make_plan", "smallest_budget"]

PLANS: Final = (*LOCKS, "optimal")
"""The names of the seven plans."""

_SMALLEST_RING: Final = 2
_USUAL_RING: Final = 8
_LARGEST_RING: Final = 4096
_RING_SHARE: Final = 4  # a usual ring takes at most a quarter of what is left for it and the locks
_MOST_READERS: Final = 64


@dataclass(frozen=True, slots=True)
class Fixed:
    """What a run needs whatever the plan, in bytes."""

    resident: int
    kv_cache: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.resident + self.kv_cache + self.scratch


@dataclass(frozen=True, slots=True)
class Account:
    """Where every byte of a budget goes."""

    budget: int
    resident: int
    kv_cache: int
    scratch: int
    ring: int
    locked: int

    @property
    def unused(self) -> int:
        """What is left."""
        return self.budget - self.resident - self.kv_cache - self.scratch - self.ring - self.locked


@dataclass(frozen=True, slots=True)
class Plan:
    """Which chunks of the cycle are locked; all others stream, in the order of the cycle.

    `token_s` is how long the simulator thinks a token takes, `ideal_token_s` the bound that no run with these locks
    can beat; both with the costs the plan was made for.
    """

    name: str
    locked: frozenset[int]
    ring_slots: int
    slot_nbytes: int
    account: Account
    token_s: float
    ideal_token_s: float

    @property
    def streams(self) -> bool:
        """Whether anything is read for each token."""
        return self.ring_slots > 0


def _slot_nbytes(inventory: Inventory) -> int:
    return int(inventory.sizes.max())


def smallest_budget(inventory: Inventory, fixed: Fixed) -> int:
    """Return the smallest budget that works: what is fixed, and a ring of two chunks."""
    return fixed.total + min(_SMALLEST_RING * _slot_nbytes(inventory), inventory.streamable_nbytes)


def make_plan(
    name: str,
    inventory: Inventory,
    fixed: Fixed,
    budget: int,
    *,
    ring_nbytes: int | None = None,
    readers: int = 1,
    calibration: Calibration = HERE,
    costs: Costs | None = None,
) -> Plan:
    """Decide what is locked.

    Where everything fits, everything is locked, and there is no ring.

    Args:
        name: one of `PLANS`.
        inventory: the model's chunks.
        fixed: what a run needs besides.
        budget: bytes in all.
        ring_nbytes: bytes of the ring; None means eight chunks, or fewer where they would take more than a quarter of
            what is left; `optimal` chooses.
        readers: how many threads read ahead; 0 reads when a chunk is needed.
        calibration: what reading and computing cost.
        costs: the same for each chunk, where the caller knows them already.

    Raises:
        BudgetError: the budget is too small; the message names the smallest that works.
        RequestError: there is no such plan, or an impossible ring or number of readers.
    """
    if name not in PLANS:
        raise RequestError(f"the plan must be one of {', '.join(PLANS)}, not {name!r}")
    if not 0 <= readers <= _MOST_READERS:
        raise RequestError(f"there can be 0 to {_MOST_READERS} prefetch threads, not {readers}")
    smallest = smallest_budget(inventory, fixed)
    if budget < smallest:
        raise BudgetError(
            f"a budget of {format_nbytes(budget)} is too small for this model and request; the smallest that works "
            f"is {smallest} bytes ({format_nbytes(smallest)})"
        )
    slot, left = _slot_nbytes(inventory), budget - fixed.total
    wanted = None if ring_nbytes is None else _slots_of(ring_nbytes, slot, left)
    costs = costs or costs_of(inventory, calibration, readers=readers)
    if inventory.streamable_nbytes <= left:
        slots, locked = 0, np.ones(len(inventory.cycle), np.bool_)
    elif name == "optimal":
        members = list(family(inventory, left, slot, (wanted,) if wanted else RINGS))
        member = search(inventory, costs, members, readers)
        slots, locked = member.slots, member.locked
    else:
        slots = wanted or max(_SMALLEST_RING, min(_USUAL_RING, left // _RING_SHARE // slot))
        locked = LOCKS[name](inventory, left - slots * slot)
    nbytes = int(inventory.sizes[locked].sum())
    return Plan(
        name,
        frozenset(np.flatnonzero(locked).tolist()),
        slots,
        slot,
        Account(budget, fixed.resident, fixed.kv_cache, fixed.scratch, slots * slot, nbytes),
        token_s(costs, locked, max(slots, 1), readers),
        ideal_token_s(costs, locked, readers),
    )


def _slots_of(ring_nbytes: int, slot: int, left: int) -> int:
    slots = ring_nbytes // slot
    if not _SMALLEST_RING <= slots <= _LARGEST_RING or slots * slot > left:
        raise RequestError(
            f"a ring must hold {_SMALLEST_RING} to {_LARGEST_RING} chunks of {format_nbytes(slot)} and fit the budget, "
            f"not {format_nbytes(ring_nbytes)}"
        )
    return slots
