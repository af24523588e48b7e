"""Specifies `refinfer.planning.own_plan`: a plan of a person's own is checked, and does no harm."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from refinfer.arrays import BoolArray
from refinfer.errors import BudgetError, PlanFunctionError
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.locks import LOCKS
from refinfer.planning.own_plan import OwnPlan, own_plan
from refinfer.planning.plan import make_plan, smallest_budget

INVENTORY = Inventory(SHAPES["stories15m"], "int8")
N = len(INVENTORY.cycle)
ROOM = 3_000_000


def even(inventory: Inventory, room: int) -> BoolArray:
    """Lock every chunk with an even number, as long as there is room."""
    mask: BoolArray = np.arange(len(inventory.cycle)) % 2 == 0
    mask &= np.cumsum(inventory.sizes * mask) <= room
    return mask


@pytest.mark.spec("PLAN-16", "PLAN-1")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_persons_own_plan_is_made_like_the_others(share: float) -> None:
    fixed = fixed_of(INVENTORY, 64)
    smallest, most = smallest_budget(INVENTORY, fixed), fixed.total + INVENTORY.streamable_nbytes
    budget = int(smallest + share * (most - smallest))
    plan = make_plan(OwnPlan("mine:even", even), INVENTORY, fixed, budget, costs_of(INVENTORY, HERE))
    room = budget - fixed.total - plan.account.ring
    expected = even(INVENTORY, room) if share < 1 else np.ones(N, np.bool_)
    assert plan.name == "mine:even"
    assert plan.locked == frozenset(np.flatnonzero(expected).tolist())
    assert plan.account.locked == INVENTORY.sizes[expected].sum()
    simple = make_plan("balanced", INVENTORY, fixed, budget, costs_of(INVENTORY, HERE))
    assert (plan.ring_slots, plan.account.ring) == (simple.ring_slots, simple.account.ring)


@pytest.mark.spec("PLAN-16")
@pytest.mark.parametrize("name", LOCKS)
def test_a_simple_plan_given_as_a_function_locks_the_same(name: str) -> None:
    np.testing.assert_array_equal(OwnPlan("mine", LOCKS[name])(INVENTORY, ROOM), LOCKS[name](INVENTORY, ROOM))


@pytest.mark.spec("PLAN-16")
def test_a_function_is_named_as_the_command_line_names_it_and_a_name_stays_one() -> None:
    class Deep:
        def __call__(self, inventory: Inventory, room: int) -> BoolArray:
            return even(inventory, room)

    own = own_plan(even)
    assert str(own) == f"{__name__}:even"
    assert own_plan(own) is own
    assert own_plan("balanced") == "balanced"
    assert str(own_plan(partial(even))) == "functools:partial"
    assert str(own_plan(Deep())).endswith(":test_a_function_is_named_as_the_command_line_names_it_and_a_name_stays_one"
                                          ".<locals>.Deep")  # fmt: skip


def raises(inventory: Inventory, room: int) -> BoolArray:
    raise KeyError("q_proj")


def one_too_many(inventory: Inventory, room: int) -> BoolArray:
    mask = LOCKS["leading"](inventory, room)
    mask[np.argmin(mask)] = True
    return mask


def refuses(inventory: Inventory, room: int) -> BoolArray:
    raise BudgetError("not with me")


MISTAKES: dict[str, tuple[Callable[..., Any], str]] = {
    "it raises an error": (raises, "raised KeyError: \"'q_proj'\"; it is called with an inventory and a room in bytes"),
    "it raises one of ours": (refuses, "raised BudgetError: 'not with me'"),
    "it takes other arguments": (lambda _: None, "raised TypeError: "),
    "it returns nothing": (lambda *_: None, f"an array of object []; .* one truth value for each of the {N} chunks"),
    "it returns numbers of chunks": (lambda i, _: np.flatnonzero(i.sizes < 9), r"an array of int64 \[0\]; "),
    "it returns numbers": (lambda *_: [0] * N, rf"an array of int64 \[{N}\]; .* an array of bool \[{N}\]$"),
    "its mask is too short": (lambda *_: [True] * (N - 1), rf"an array of bool \[{N - 1}\]; "),
    "its mask is too long": (lambda *_: [True] * (N + 1), rf"an array of bool \[{N + 1}\]; "),
    "its mask has two dimensions": (lambda *_: np.ones((1, N), np.bool_), rf"an array of bool \[1, {N}\]; "),
    "it ends the program": (lambda *_: sys.exit(3), "raised SystemExit: "),
    "its list is ragged": (lambda *_: [[True], [True, False]], "raised ValueError: "),
    "it locks everything": (lambda *_: np.ones(N, np.bool_), "it must lock at least .* bytes less$"),
    "it locks a chunk too much": (one_too_many, "locks .* MB, but its room is 3.0 MB; "),
}


@pytest.mark.spec("PLAN-17", "ERR-1")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_named_error_that_names_the_plan(mistake: str) -> None:
    function, why = MISTAKES[mistake]
    with pytest.raises(PlanFunctionError) as refused:
        OwnPlan("mine:plan", function)(INVENTORY, ROOM)
    assert re.search(why.replace("object []", r"object \[\]"), str(refused.value))
    assert "mine:plan" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.spec("PLAN-17")
def test_the_message_says_how_many_bytes_are_too_many_and_locking_those_less_fits() -> None:
    for over in (0, 1):
        first = int(INVENTORY.sizes[0])
        mask = np.arange(N) == 0
        own = OwnPlan("mine", lambda *_: mask)  # noqa: B023
        if not over:
            assert own(INVENTORY, first).sum() == 1
            continue
        with pytest.raises(PlanFunctionError, match="it must lock at least 1 bytes less"):
            own(INVENTORY, first - 1)


@pytest.mark.spec("PLAN-17")
def test_what_a_function_raised_is_kept_as_the_cause() -> None:
    with pytest.raises(PlanFunctionError) as refused:
        OwnPlan("mine", raises)(INVENTORY, ROOM)
    assert isinstance(refused.value.__cause__, KeyError)


@pytest.mark.spec("PLAN-18")
def test_a_plan_that_changes_its_mind_is_refused() -> None:
    masks = iter([np.arange(N) == 0, np.arange(N) == 1])
    with pytest.raises(PlanFunctionError, match="another mask when it was asked again"):
        OwnPlan("mine", lambda *_: next(masks))(INVENTORY, ROOM)


@pytest.mark.spec("PLAN-18")
def test_a_mask_that_is_changed_afterwards_changes_no_plan() -> None:
    mask = np.arange(N) == 3
    locked = OwnPlan("mine", lambda *_: mask)(INVENTORY, ROOM)
    mask[:] = True
    assert np.flatnonzero(locked).tolist() == [3]


@pytest.mark.spec("PLAN-18", "PLAN-17")
def test_what_a_function_does_to_its_inventory_harms_no_other() -> None:
    before = INVENTORY.sizes.copy()

    def vandal(inventory: Inventory, room: int) -> BoolArray:
        inventory.sizes[:] = 1
        inventory.chunks_of_kind.clear()
        return np.cumsum(inventory.sizes) <= room  # with these sizes everything seems to fit

    with pytest.raises(PlanFunctionError, match="bytes less"):
        OwnPlan("mine", vandal)(INVENTORY, ROOM)
    np.testing.assert_array_equal(INVENTORY.sizes, before)
    assert INVENTORY.chunks_of_kind
