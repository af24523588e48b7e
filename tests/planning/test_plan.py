"""Specifies `refinfer.planning.plan`: what is locked and what streams, and which budgets and rings are refused."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer import generate
from refinfer.cli.main import main
from refinfer.errors import BudgetError, RequestError
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.packing.formats import FORMATS
from refinfer.planning.account import Fixed, fixed_of
from refinfer.planning.cost import HERE, PREFETCH_THREADS, Costs, costs_of, ideal_token_s
from refinfer.planning.optimal import locked_array, token_s
from refinfer.planning.plan import PLANS, Plan, Prefetch, make_plan, smallest_budget
from refinfer.units import format_nbytes

MODELS = {
    "equal chunks": replace(SHAPES["tiny"], vocab_size=64, intermediate_size=64),
    "a large table": replace(SHAPES["stories15m"], num_hidden_layers=1),
    "hardly anything but a table": replace(SHAPES["tiny"], vocab_size=9001, hidden_size=8, num_hidden_layers=1),
    "several chunks to a matrix": replace(SHAPES["smollm-135m"], num_hidden_layers=2),
}
INVENTORIES = {(model, name): Inventory(config, name) for model, config in MODELS.items() for name in FORMATS}
USUAL = Prefetch()

fixeds = st.builds(Fixed, st.integers(0, 99_999), st.integers(0, 99_999), st.integers(0, 99_999))
inventories = st.sampled_from(list(INVENTORIES.values()))


def plan_of(name: str, inventory: Inventory, fixed: Fixed, budget: int, prefetch: Prefetch = USUAL) -> Plan:
    """Return a plan for this project's own disk and processor."""
    costs = costs_of(inventory, HERE, prefetch_threads=prefetch.threads)
    return make_plan(name, inventory, fixed, budget, costs, prefetch)


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
    parts = fixed.resident + fixed.kv_cache + fixed.scratch + account.ring + account.locked
    assert parts + account.unused == account.budget == budget
    assert account.unused >= 0
    assert account.fixed == fixed
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
    plan = plan_of(name, inventory, fixed, budget)
    assert plan.name == name
    check(plan, inventory, fixed, budget)
    assert (len(plan.locked) == len(inventory.cycle)) == (budget >= most)


@pytest.mark.spec("PLAN-2")
@given(inventory=inventories, fixed=fixeds, share=st.floats(0, 0.999))
def test_leading_locks_the_first_chunks_that_fit_next_to_the_ring(
    inventory: Inventory, fixed: Fixed, share: float
) -> None:
    smallest, most = smallest_budget(inventory, fixed), fixed.total + inventory.streamable_nbytes
    budget = smallest + int(share * (most - smallest))
    plan = plan_of("leading", inventory, fixed, budget)
    if budget < most:
        assert plan.locked == locked_by_hand(inventory, budget - fixed.total - plan.account.ring)


@pytest.mark.spec("PLAN-2")
@pytest.mark.parametrize("key", INVENTORIES, ids=" ".join)
def test_each_further_chunk_is_locked_as_soon_as_there_is_room_for_it(key: tuple[str, str]) -> None:
    inventory, fixed = INVENTORIES[key], Fixed(4096, 5000, 6000)
    ring, end = 2 * slot_of(inventory), 0
    for n, chunk in enumerate(inventory.cycle):
        end += chunk.padded_nbytes
        budget = fixed.total + ring + end
        if budget >= fixed.total + inventory.streamable_nbytes:
            break  # here everything fits, and no ring is needed
        before, after = (
            plan_of("leading", inventory, fixed, nbytes, Prefetch(ring_nbytes=ring)) for nbytes in (budget - 1, budget)
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
    check(plan_of(name, inventory, fixed, smallest), inventory, fixed, smallest)
    for budget in (smallest - 1, smallest // 2, 1, 0, -5):
        with pytest.raises(BudgetError) as refused:
            plan_of(name, inventory, fixed, budget)
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
def test_if_everything_fits_everything_is_locked_and_there_is_no_ring(key: tuple[str, str], name: str) -> None:
    inventory, fixed = INVENTORIES[key], Fixed(4096, 5000, 6000)
    most = fixed.total + inventory.streamable_nbytes
    for budget in (most, most + 1, 1 << 70):
        plan = plan_of(name, inventory, fixed, budget)
        assert plan.locked == set(range(len(inventory.cycle)))
        assert (plan.ring_slots, plan.account.ring, plan.account.locked) == (0, 0, inventory.streamable_nbytes)
        assert plan.streams is False
        assert plan.account.unused == budget - most
    if most - 1 >= smallest_budget(inventory, fixed):
        plan = plan_of(name, inventory, fixed, most - 1)
        assert len(plan.locked) < len(inventory.cycle)
        assert plan.ring_slots >= 2
        assert plan.streams is True


@pytest.mark.spec("PLAN-1", "ERR-1")
def test_a_plan_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(RequestError, match=r"the plan must be one of .*leading.*, not 'nonsense'"):
        plan_of("nonsense", INVENTORIES["equal chunks", "f32"], Fixed(0, 0, 0), 1 << 40)


@pytest.mark.spec("PLAN-1", "ERR-1")
@pytest.mark.parametrize("threads", [-1, 65, 10**9])
def test_an_impossible_number_of_threads_is_refused(threads: int) -> None:
    with pytest.raises(RequestError, match=f"there can be 0 to 64 prefetch threads, not {threads}"):
        Prefetch(threads)
    assert [Prefetch(n).threads for n in (0, 64)] == [0, 64]


@pytest.mark.spec("PLAN-1", "ERR-1")
@pytest.mark.parametrize("name", list(PLANS))
def test_a_ring_that_holds_no_two_chunks_or_does_not_fit_the_budget_is_refused(name: str) -> None:
    inventory, fixed = INVENTORIES["several chunks to a matrix", "int8"], Fixed(4096, 5000, 6000)
    slot = slot_of(inventory)
    budget = fixed.total + 3 * slot
    for ring_nbytes in (0, 1, 2 * slot - 1, 4 * slot, 5000 * slot):
        with pytest.raises(RequestError, match=r"a ring must hold 2 to 4096 chunks of .* and fit the budget, not "):
            plan_of(name, inventory, fixed, budget, Prefetch(ring_nbytes=ring_nbytes))
    for ring_nbytes, slots in ((2 * slot, 2), (3 * slot - 1, 2), (3 * slot, 3)):
        plan = plan_of(name, inventory, fixed, budget, Prefetch(ring_nbytes=ring_nbytes))
        assert (plan.ring_slots, plan.account.ring) == (slots, slots * slot)


@pytest.mark.spec("PLAN-1", "COST-3")
@pytest.mark.parametrize("threads", [0, 1, 2, 5])
@pytest.mark.parametrize("name", list(PLANS))
def test_a_plan_knows_its_threads_its_token_and_its_bound(name: str, threads: int) -> None:
    inventory, fixed = INVENTORIES["several chunks to a matrix", "f32"], Fixed(4096, 5000, 6000)
    costs: Costs = costs_of(inventory, HERE, prefetch_threads=threads)
    budget = smallest_budget(inventory, fixed) + inventory.streamable_nbytes // 2
    plan = make_plan(name, inventory, fixed, budget, costs, Prefetch(threads))
    assert plan.prefetch_threads == threads
    locked = locked_array(inventory, plan.locked)
    assert plan.token_s == token_s(costs, locked, plan.ring_slots, threads)
    assert plan.ideal_token_s == ideal_token_s(costs, locked, threads) <= plan.token_s * (1 + 1e-9)


@pytest.mark.spec("PLAN-13")
def test_two_threads_read_ahead_unless_told_otherwise() -> None:
    assert PREFETCH_THREADS == 2
    assert Prefetch().threads == PREFETCH_THREADS
    for function in (generate.load, costs_of, ideal_token_s):
        assert inspect.signature(function).parameters["prefetch_threads"].default == PREFETCH_THREADS


@pytest.mark.spec("PLAN-13", "CLI-14", "CLI-15")
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_plan_and_simulate_use_the_threads_that_generate_uses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--shape", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prefetch_threads"] == PREFETCH_THREADS


@pytest.mark.spec("PLAN-13", "CLI-1")
def test_generate_on_the_command_line_uses_those_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, Any]] = []

    def load(*_: object, **options: Any) -> generate.Session:
        loaded.append(options)
        raise RequestError("that is all there was to see")

    monkeypatch.setattr("refinfer.cli.generate.load", load)
    assert main(["generate", "--budget", "60%"]) == 2
    assert loaded[0]["prefetch_threads"] == PREFETCH_THREADS


@pytest.mark.spec("PLAN-1", "ERR-1")
@pytest.mark.parametrize("name", list(PLANS))
def test_a_ring_has_at_most_4096_slots_however_large_the_budget_is(name: str) -> None:
    inventory, fixed = INVENTORIES["several chunks to a matrix", "int8"], Fixed(4096, 5000, 6000)
    slot, budget = slot_of(inventory), 1 << 40
    with pytest.raises(RequestError, match=r"a ring must hold 2 to 4096 chunks"):
        plan_of(name, inventory, fixed, budget, Prefetch(ring_nbytes=4097 * slot))
    for ring_nbytes in (4096 * slot, 4097 * slot - 1, 2 * slot):
        assert plan_of(name, inventory, fixed, budget, Prefetch(ring_nbytes=ring_nbytes)).ring_slots == 0  # all fits


@pytest.mark.spec("PLAN-3")
@pytest.mark.parametrize(("positions", "asked"), [(1, None), (2, 2), (20, 20)])
def test_a_budget_that_is_enough_for_fewer_positions_says_for_how_many(positions: int, asked: int | None) -> None:
    inventory = INVENTORIES["equal chunks", "f32"]
    enough = smallest_budget(inventory, fixed_of(inventory, positions))
    with pytest.raises(BudgetError) as refused:
        plan_of("none", inventory, fixed_of(inventory, 90), enough)
    ending = (
        f"or ask for at most {asked} positions, prompt and text together (max_positions, --positions, --max-tokens)"
    )
    assert str(refused.value).endswith(ending) == (asked is not None)
    assert ("positions" in str(refused.value)) == (asked is not None)


@pytest.mark.spec("PLAN-3")
def test_a_budget_that_is_one_position_short_of_the_longest_request_says_so() -> None:
    inventory = INVENTORIES["equal chunks", "f32"]
    longest = inventory.config.longest_request
    short, enough = (smallest_budget(inventory, fixed_of(inventory, n)) for n in (longest - 1, longest))
    for budget in (short, enough - 1):
        with pytest.raises(BudgetError, match=f"or ask for at most {longest - 1} positions"):
            plan_of("none", inventory, fixed_of(inventory, longest), budget)
