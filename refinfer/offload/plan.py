"""Plans: which chunks stay in memory and which stream, inside a budget; decided before a byte is read.

Knows: sizes, and what each byte of a budget is spent on. Does not know: files, threads, clocks.
Spec: PLAN-1 to PLAN-4. Tutorial: 09.

    budget = block of vectors + KV cache + scratch + ring + locked chunks + what is left, less than a chunk
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from refinfer.errors import BudgetError
from refinfer.offload.inventory import Inventory
from refinfer.process import format_nbytes

__all__ = ["PLANS", "Account", "Fixed", "Plan", "make_plan", "smallest_budget"]

_SMALLEST_RING: Final = 2


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
    """Which chunks of the cycle are locked; all others stream, in the order of the cycle."""

    name: str
    locked: frozenset[int]
    ring_slots: int
    slot_nbytes: int
    account: Account


def _leading(inventory: Inventory, room: int) -> frozenset[int]:
    """Lock the first chunks of the cycle: what there is room for, layer by layer from the first."""
    locked = []
    for number, chunk in enumerate(inventory.cycle):
        room -= chunk.nbytes
        if room < 0:
            break
        locked.append(number)
    return frozenset(locked)


PLANS: Final[Mapping[str, Callable[[Inventory, int], frozenset[int]]]] = MappingProxyType({"leading": _leading})
"""Each plan by name: what it locks, given the bytes there are for that."""


def _slot_nbytes(inventory: Inventory) -> int:
    return max(chunk.nbytes for chunk in inventory.cycle)


def smallest_budget(inventory: Inventory, fixed: Fixed) -> int:
    """Return the smallest budget that works: what is fixed, and a ring of two chunks."""
    return fixed.total + min(_SMALLEST_RING * _slot_nbytes(inventory), inventory.streamable_nbytes)


def make_plan(name: str, inventory: Inventory, fixed: Fixed, budget: int) -> Plan:
    """Decide what is locked.

    Where everything fits, everything is locked, and there is no ring.

    Raises:
        BudgetError: the budget is too small; the message names the smallest that works.
    """
    smallest = smallest_budget(inventory, fixed)
    if budget < smallest:
        raise BudgetError(
            f"a budget of {format_nbytes(budget)} is too small for this model and request; the smallest that works "
            f"is {smallest} bytes ({format_nbytes(smallest)})"
        )
    cycle, slot = inventory.cycle, _slot_nbytes(inventory)
    if fixed.total + inventory.streamable_nbytes <= budget:
        slots, locked = 0, frozenset(range(len(cycle)))
    else:
        slots = _SMALLEST_RING
        locked = PLANS[name](inventory, budget - fixed.total - slots * slot)
    nbytes = sum(cycle[number].nbytes for number in locked)
    account = Account(budget, fixed.resident, fixed.kv_cache, fixed.scratch, slots * slot, nbytes)
    return Plan(name, locked, slots, slot, account)
