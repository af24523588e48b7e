"""A plan of a person's own: a function from an inventory and a room in bytes to a mask, checked each time it is asked.

The mask has one truth value for each chunk of the cycle: whether the chunk is locked. Leaves to others: finding the
function that a command line names (`cli.imported`), rings and budgets (`plan`).
Read more: tutorial 09; clauses PLAN-16 to PLAN-18.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refinfer.arrays import BoolArray
from refinfer.errors import PlanFunctionError
from refinfer.inventory import Inventory
from refinfer.planning.locks import Lock
from refinfer.units import format_nbytes, shown

__all__ = ["OwnPlan", "own_plan"]


@dataclass(frozen=True, slots=True)
class OwnPlan:
    """A function that decides what is locked, under the name that rows, tables and messages give it."""

    name: str
    function: Lock

    def __str__(self) -> str:
        return self.name

    def __call__(self, inventory: Inventory, room: int) -> BoolArray:
        """Return the function's mask; the function is asked twice, since its answer must not change.

        Raises:
            PlanFunctionError: it raised an error, returned no mask, locked too much, or changed its mind.
        """
        own = replace(inventory)  # whatever the function does to it
        locked = self._mask(own, room)
        nbytes = int(inventory.sizes[locked].sum())
        if nbytes > room:
            raise PlanFunctionError(
                f"the plan {self.name} locks {format_nbytes(nbytes)}, but its room is {format_nbytes(room)}; "
                f"it must lock at least {nbytes - room} bytes less"
            )
        if not np.array_equal(locked, self._mask(own, room)):
            raise PlanFunctionError(
                f"the plan {self.name} gave another mask when it was asked again; "
                "what it locks must follow from the inventory and the room alone"
            )
        return locked

    def _mask(self, inventory: Inventory, room: int) -> BoolArray:
        n = len(inventory.sizes)
        try:
            mask = np.array(self.function(inventory, room))
        except (Exception, SystemExit) as error:
            raise PlanFunctionError(
                f"the plan {self.name} raised {type(error).__name__}: {shown(str(error))}; "
                "it is called with an inventory and a room in bytes"
            ) from error
        if mask.dtype != np.bool_ or mask.shape != (n,):
            raise PlanFunctionError(
                f"the plan {self.name} returned an array of {mask.dtype} {list(mask.shape)}; "
                f"it must return one truth value for each of the {n} chunks, an array of bool [{n}]"
            )
        return mask


def own_plan(plan: str | Lock) -> str | Lock:
    """Return a function as an `OwnPlan`, named as the command line names it, and everything else as it is."""
    if isinstance(plan, OwnPlan) or not callable(plan):
        return plan
    named = plan if hasattr(plan, "__qualname__") else type(plan)  # a partial, or an object that can be called
    return OwnPlan(f"{named.__module__}:{named.__qualname__}", plan)
