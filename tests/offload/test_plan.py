"""Specifies `refinfer.offload.plan`: what is locked and what streams, and where each byte of a budget goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.engine import fixed_of
from refinfer.errors import BudgetError, RequestError
from refinfer.model.config import SHAPES
from refinfer.offload.inventory import Inventory
from refinfer.offload.plan import PLANS, Fixed, Plan, make_plan, smallest_budget
from refinfer.packing.formats import FORMATS
from refinfer.process import format_nbytes

MODELS = {
    "equal chunks": replace(SHAPES["tiny"], vocab_size=64, intermediate_size=64),
    "a large table": replace(SHAPES["stories15m"], num_hidden_layers=1),
    "hardly anything but a table": replace(SHAPES["tiny"], vocab_size=9001, hidden_size=8, num_hidden_layers=1),
    "several chunks to a matrix": replace(SHAPES["smollm-135m"], num_hidden_layers=2),
}
INVENTORIES = {(model, name): Inventory(config, name) for model, config in MODELS.items() for name in FORMATS}

fixeds = st.builds(Fixed, st.integers(0, 99_999), st.integers(0, 99_999), st.integers(0, 99_999))
inventories = st.sampled_from(list(INVENTORIES.values()))


def slot_of(inventory: Inventory) -> int:
    return max(chunk.padded_nbytes for chunk in inventory.cycle)


def locked_by_hand(inventory: Inventory, room: int) -> set[int]:
    """Take chunks from the first on until one does not fit."""
    locked: set[int] = set()
    for number, chunk in enumerate(inventory.cycle):
        if sum(inventory.cycle[n].padded_nbytes for n in locked) + chunk.padded_nbytes > room:
            return locked
        locked.add(number)
    return locked


def check(plan: Plan, inventory: Inventory, fixed: Fixed, budget: int) -> None:
    """Check every rule that all plans keep."""
    account = plan.account
    parts = account.resident + account.kv_cache + account.scratch + account.ring + account.locked
    assert parts + account.unused == account.budget == budget
    assert account.unused >= 0
    assert (account.resident, account.kv_cache, account.scratch) == (fixed.resident, fixed.kv_cache, fixed.scratch)
    assert account.locked == sum(inventory.cycle[number].padded_nbytes for number in plan.locked)
    assert account.ring == plan.ring_slots * plan.slot_nbytes
    streaming = set(range(len(inventory.cycle))) - plan.locked
    assert all(inventory.cycle[number].padded_nbytes <= plan.slot_nbytes for number in streaming)
    assert plan.ring_slots >= (2 if streaming else 0)


@pytest.mark.spec("PLAN-1", "PLAN-4")
@pytest.mark.parametrize("name", list(PLANS))
@settings(max_examples=15)
@given(inventory=inventories, fixed=fixeds, share=st.floats(0, 1.2))
def test_every_byte_of_a_budget_goes_somewhere(name: str, inventory: Inventory, fixed: Fixed, share: float) -> None:
    smallest, most = smallest_budget(inventory, fixed), fixed.total + inventory.streamable_nbytes
    budget = smallest + int(share * (most - smallest))
    plan = make_plan(name, inventory, fixed, budget)
    assert plan.name == name
    check(plan, inventory, fixed, budget)
    assert (len(plan.locked) == len(inventory.cycle)) == (budget >= most)


@pytest.mark.spec("PLAN-2")
@given(inventory=inventories, fixed=fixeds, share=st.floats(0, 0.999))
def test_leading_locks_the_first_chunks_as_many_as_fit_beside_the_ring(
    inventory: Inventory, fixed: Fixed, share: float
) -> None:
    smallest, most = smallest_budget(inventory, fixed), fixed.total + inventory.streamable_nbytes
    budget = smallest + int(share * (most - smallest))
    plan = make_plan("leading", inventory, fixed, budget)
    if budget < most:
        assert plan.locked == locked_by_hand(inventory, budget - fixed.total - plan.account.ring)


@pytest.mark.spec("PLAN-2")
@pytest.mark.parametrize("key", INVENTORIES, ids=" ".join)
def test_each_chunk_more_is_locked_as_soon_as_there_is_room_for_it(key: tuple[str, str]) -> None:
    inventory, fixed = INVENTORIES[key], Fixed(4096, 5000, 6000)
    ring, end = 2 * slot_of(inventory), 0
    for n, chunk in enumerate(inventory.cycle):
        end += chunk.padded_nbytes
        budget = fixed.total + ring + end
        if budget >= fixed.total + inventory.streamable_nbytes:
            break  # here everything fits, and no ring is needed
        before, after = (
            make_plan("leading", inventory, fixed, nbytes, ring_nbytes=ring) for nbytes in (budget - 1, budget)
        )
        assert before.locked == set(range(n))
        assert after.locked == set(range(n + 1))
        assert before.account.unused == chunk.padded_nbytes - 1
        assert after.account.unused == 0


@pytest.mark.spec("PLAN-3", "ERR-1")
@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("key", INVENTORIES, ids=" ".join)
def test_the_smallest_budget_works_and_one_byte_less_is_refused_with_it(key: tuple[str, str], name: str) -> None:
    inventory, fixed = INVENTORIES[key], Fixed(4096, 5000, 6000)
    smallest = smallest_budget(inventory, fixed)
    check(make_plan(name, inventory, fixed, smallest), inventory, fixed, smallest)
    for budget in (smallest - 1, smallest // 2, 1, 0, -5):
        with pytest.raises(BudgetError) as refused:
            make_plan(name, inventory, fixed, budget)
        assert f"the smallest that works is {smallest} bytes ({format_nbytes(smallest)})" in str(refused.value)


@pytest.mark.spec("PLAN-3")
@pytest.mark.parametrize("key", INVENTORIES, ids=" ".join)
def test_the_smallest_budget_holds_what_is_fixed_and_a_ring_of_two_chunks_and_no_more(key: tuple[str, str]) -> None:
    inventory, fixed = INVENTORIES[key], Fixed(4096, 5000, 6000)
    ring = 2 * slot_of(inventory)
    assert smallest_budget(inventory, fixed) == fixed.total + min(ring, inventory.streamable_nbytes)


@pytest.mark.spec("PLAN-4")
@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("key", INVENTORIES, ids=" ".join)
def test_where_everything_fits_everything_is_locked_and_there_is_no_ring(key: tuple[str, str], name: str) -> None:
    inventory, fixed = INVENTORIES[key], Fixed(4096, 5000, 6000)
    most = fixed.total + inventory.streamable_nbytes
    for budget in (most, most + 1, 1 << 70):
        plan = make_plan(name, inventory, fixed, budget)
        assert plan.locked == set(range(len(inventory.cycle)))
        assert (plan.ring_slots, plan.account.ring, plan.account.locked) == (0, 0, inventory.streamable_nbytes)
        assert plan.account.unused == budget - most
    if most - 1 >= smallest_budget(inventory, fixed):
        plan = make_plan(name, inventory, fixed, most - 1)
        assert len(plan.locked) < len(inventory.cycle)
        assert plan.ring_slots >= 2


@pytest.mark.spec("PLAN-1", "PLAN-3")
@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_fixed_follows_from_the_model_and_the_positions(name: str) -> None:
    inventory = Inventory(SHAPES["smollm-135m"], name)
    few, many = fixed_of(inventory, 16), fixed_of(inventory, 2048)
    assert few.resident == many.resident == inventory.resident_nbytes
    L, G, hd = 30, 3, 64
    assert (few.kv_cache, many.kv_cache) == (2 * 4 * L * G * hd * 16, 2 * 4 * L * G * hd * 2048)
    assert few.scratch < many.scratch
    assert few.total == few.resident + few.kv_cache + few.scratch


@pytest.mark.spec("PLAN-1", "ERR-1")
def test_a_plan_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(RequestError, match=r"the plan must be one of .*leading.*, not 'nonsense'"):
        make_plan("nonsense", INVENTORIES["equal chunks", "f32"], Fixed(0, 0, 0), 1 << 40)
