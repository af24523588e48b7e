"""Plans: which chunks stay in memory, and which stream (are read again for each token), within a budget.

A plan is decided before a byte is read. A ring with more slots lets threads read further ahead of use, but leaves fewer
bytes for locked chunks.

Leaves to others: what each byte of a budget is spent on (`account`), the six simple plans (`locks`), the search for
the best one (`optimal`), plans of a person's own (`own_plan`), files, threads, clocks.
Read more: tutorial 09; clauses PLAN-1 to PLAN-4, PLAN-13, PLAN-19, PLAN-22.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

import numpy as np

from refinfer.errors import BudgetError, RequestError
from refinfer.inventory import Inventory
from refinfer.planning.account import THREAD_BYTES, Account, Fixed, fixed_of
from refinfer.planning.cost import PREFETCH_THREADS, Costs, ideal_token_s
from refinfer.planning.locks import LOCKS, Lock
from refinfer.planning.optimal import RINGS, family, search, token_s
from refinfer.units import format_nbytes, is_whole, shown

__all__ = ["MOST_PREFETCH_THREADS", "PLANS", "Plan", "Prefetch", "make_plan", "require_plan", "smallest_budget"]

PLANS: Final = (*LOCKS, "optimal")
"""The names of the seven plans."""

_SMALLEST_RING: Final = 2  # in slots, as the next two
_USUAL_RING: Final = 8
_LARGEST_RING: Final = 4096
_RING_SHARE: Final = 4  # the usual ring takes at most a quarter of the bytes for ring and locked chunks
_LIKELY_SHARE: Final = 100  # who asks for this few bytes means per cent
MOST_PREFETCH_THREADS: Final = 64


@dataclass(frozen=True, slots=True)
class Prefetch:
    """How chunks are read ahead: the number of threads (0 reads each chunk on demand), the bytes of the ring.

    If `ring_nbytes` is None, the plan chooses.

    Raises:
        RequestError: an impossible number of threads or bytes.
    """

    threads: int = PREFETCH_THREADS
    ring_nbytes: int | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.threads, 0, MOST_PREFETCH_THREADS):
            raise RequestError(f"there can be 0 to {MOST_PREFETCH_THREADS} prefetch threads, not {shown(self.threads)}")
        if self.ring_nbytes is not None and not is_whole(self.ring_nbytes, 0):
            raise RequestError(
                f"a prefetch ring must be a whole number of bytes from 0 up, not {shown(self.ring_nbytes)}"
            )
        object.__setattr__(self, "threads", int(self.threads))  # numpy's numbers overflow
        if self.ring_nbytes is not None:
            object.__setattr__(self, "ring_nbytes", int(self.ring_nbytes))


@dataclass(frozen=True, slots=True)
class Plan:
    """Which chunks of the cycle are locked; all others stream, in the order of the cycle, read by `prefetch_threads`.

    `token_s` is the time for a token in the simulator (a run on a virtual clock), `ideal_token_s` the bound that no run
    with these locks can beat; both follow from the costs that `make_plan` was given.
    """

    name: str
    locked: frozenset[int]
    prefetch_threads: int
    ring_slots: int
    slot_nbytes: int
    account: Account
    token_s: float
    ideal_token_s: float

    @property
    def streams(self) -> bool:
        """Whether anything is read for each token."""
        return self.ring_slots > 0


_USUAL_PREFETCH: Final = Prefetch()


def _slot_nbytes(inventory: Inventory) -> int:
    return int(inventory.sizes.max())


def smallest_budget(inventory: Inventory, fixed: Fixed) -> int:
    """Return the smallest budget that works: what every plan needs, and a ring of two chunks; or else packing."""
    ring = min(_SMALLEST_RING * _slot_nbytes(inventory), inventory.streamable_nbytes)
    return max(fixed.total + ring, fixed.packing)


def require_plan(plan: str | Lock) -> None:
    """Check that `plan` is one of `PLANS` or a function; raises RequestError for anything else."""
    if not callable(plan) and plan not in PLANS:
        raise RequestError(f"the plan must be one of {', '.join(PLANS)}, or package:function, not {shown(plan)}")


def make_plan(
    name: str | Lock,
    inventory: Inventory,
    fixed: Fixed,
    budget: int,
    costs: Costs,
    prefetch: Prefetch = _USUAL_PREFETCH,
) -> Plan:
    """Decide what is locked and how many slots the ring has; if everything fits, all is locked, without a ring.

    Args:
        name: one of `PLANS`, or a function such as those of `LOCKS`; `own_plan.OwnPlan` gives it a name and checks it.
        inventory: the model's chunks.
        fixed: the bytes that every plan needs.
        budget: bytes in all.
        costs: the seconds to read and to compute each chunk.
        prefetch: how chunks are read. If the bytes of the ring are None, plans take eight slots, or fewer if those
            would take more than a quarter of the bytes for ring and locked chunks; `optimal` also tries larger rings.

    Raises:
        BudgetError: the budget is too small; the message names the smallest that works.
        RequestError: there is no such plan, a function that gives no mask, or an impossible ring.
    """
    require_plan(name)
    if budget < smallest_budget(inventory, fixed):
        raise BudgetError(_too_small(inventory, fixed, budget))
    slot, left = _slot_nbytes(inventory), budget - fixed.total
    wanted = None if prefetch.ring_nbytes is None else _slots_of(prefetch.ring_nbytes, slot, left)
    usual = max(_SMALLEST_RING, min(_USUAL_RING, left // _RING_SHARE // slot))
    if inventory.streamable_nbytes <= left:
        slots, locked = 0, np.ones(len(inventory.sizes), np.bool_)
    elif name == "optimal":  # tries each simple plan with each ring
        rings = [slots for slots in RINGS if slots >= usual or not prefetch.threads]
        members = list(family(inventory, left, slot, (wanted,) if wanted else rings))
        member = search(inventory, costs, members, prefetch.threads)
        slots, locked = member.slots, member.locked
    else:
        slots = wanted or usual
        lock = name if callable(name) else LOCKS[name]
        locked = lock(inventory, left - slots * slot)
    return Plan(
        name=str(name),
        locked=frozenset(np.flatnonzero(locked).tolist()),
        prefetch_threads=prefetch.threads,
        ring_slots=slots,
        slot_nbytes=slot,
        account=Account(budget, fixed, slots * slot, int(inventory.sizes[locked].sum())),
        token_s=token_s(costs, locked, max(slots, 1), prefetch.threads),
        ideal_token_s=ideal_token_s(costs, locked, prefetch.threads),
    )


def _too_small(inventory: Inventory, fixed: Fixed, budget: int) -> str:
    """Say which budget would work, how many positions this one is enough for, and what a bare number may mean."""
    smallest, threads = smallest_budget(inventory, fixed), fixed.threads // THREAD_BYTES
    counts = range(1, inventory.config.longest_request + 1)
    most = bisect_right(counts, budget, key=lambda n: smallest_budget(inventory, fixed_of(inventory, n, threads)))
    message = (
        f"a budget of {format_nbytes(budget)} is too small for this model and request; the smallest that works "
        f"is {smallest} bytes ({format_nbytes(smallest)})"
    )
    if most > 1:  # a prompt of one token, and one more
        message += f"; or ask for at most {most} positions, prompt and text together "
        message += "(max_positions, --positions, --max-tokens)"
    return message + (f"; for a share of the weights write {budget}%" if 0 < budget <= _LIKELY_SHARE else "")


def _slots_of(ring_nbytes: int, slot: int, left: int) -> int:
    slots = ring_nbytes // slot
    if not _SMALLEST_RING <= slots <= _LARGEST_RING or slots * slot > left:
        raise RequestError(
            f"a ring must hold {_SMALLEST_RING} to {_LARGEST_RING} chunks of {format_nbytes(slot)} and fit the budget, "
            f"not {format_nbytes(ring_nbytes)}"
        )
    return slots
