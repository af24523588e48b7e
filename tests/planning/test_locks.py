"""Specifies `refinfer.planning.locks`: what each of the six simple plans locks in the room it is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.arrays import BoolArray
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.packing.formats import FORMATS
from refinfer.planning.account import Fixed
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.locks import LOCKS, fill
from refinfer.planning.plan import Prefetch, make_plan, smallest_budget

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
FILLING = [name for name in LOCKS if name not in ("none", "flexinfer")]
PUBLISHED = ["tiny", "storyteller", "stories15m", "smollm-135m", "qwen3-0.6b", "llama-1b", "llama2-7b"]


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    """Draw a small model in small chunks: a few pages each, of one size or of many."""
    G = draw(st.integers(1, 2))
    config = replace(
        SHAPES["tiny"],
        vocab_size=draw(st.sampled_from([16, 200, 1000, 5000])),
        hidden_size=draw(st.sampled_from([16, 64, 100])),
        intermediate_size=draw(st.sampled_from([16, 100, 300])),
        num_hidden_layers=draw(st.integers(1, 9)),
        num_attention_heads=G * draw(st.integers(1, 4)),
        num_key_value_heads=G,
        head_dim=draw(st.sampled_from([8, 32])),
    )
    chunk_nbytes = draw(st.sampled_from([4096, 10_000, 1 << 17]))
    return Inventory(config, draw(st.sampled_from(list(FORMATS))), chunk_nbytes)


def nbytes_of(inventory: Inventory, numbers: Iterable[int]) -> int:
    return sum(inventory.cycle[number].padded_nbytes for number in numbers)


def numbers_of(locked: BoolArray) -> set[int]:
    return set(np.flatnonzero(locked).tolist())


def largest_imbalance(inventory: Inventory, locked: BoolArray, among: list[int], share: float) -> float:
    """Return by how many bytes a beginning of `among` has more or less locked than `share` of it."""
    ahead, most = 0.0, 0.0
    for number in among:
        ahead += inventory.cycle[number].padded_nbytes * (bool(locked[number]) - share)
        most = max(most, abs(ahead))
    return most


@pytest.mark.spec("PLAN-5")
@given(inventory=inventories(), share=st.floats(0, 1.5))
def test_none_locks_nothing_however_much_room_there_is(inventory: Inventory, share: float) -> None:
    assert not LOCKS["none"](inventory, int(share * inventory.streamable_nbytes)).any()


def check_balance(inventory: Inventory, share: float) -> None:
    room = int(share * inventory.streamable_nbytes)
    locked = LOCKS["balanced"](inventory, room)
    kept = nbytes_of(inventory, numbers_of(locked))
    assert kept <= room
    one_of_each_size = sum({chunk.padded_nbytes for chunk in inventory.cycle})
    everything = list(range(len(inventory.cycle)))
    # Any stretch lies between two beginnings, so that it is right to within a chunk of each size at either end.
    off = largest_imbalance(inventory, locked, everything, kept / inventory.streamable_nbytes)
    assert off <= one_of_each_size


@pytest.mark.spec("PLAN-5")
@settings(max_examples=150)
@given(inventory=inventories(), share=st.floats(0, 1))
def test_balanced_locks_the_same_share_of_every_beginning_of_the_cycle(inventory: Inventory, share: float) -> None:
    check_balance(inventory, share)


@pytest.mark.spec("PLAN-5")
@pytest.mark.parametrize("shape", PUBLISHED)
@pytest.mark.parametrize("name", ["f32", "int4"])
def test_balanced_locks_evenly_on_published_shapes(shape: str, name: str) -> None:
    inventory = Inventory(SHAPES[shape], name)
    for percent in (1, 8, 25, 50, 67, 90, 99):
        check_balance(inventory, percent / 100)


@pytest.mark.spec("PLAN-5")
def test_of_equal_chunks_every_nth_is_locked() -> None:
    inventory = Inventory(replace(SHAPES["tiny"], vocab_size=64, intermediate_size=64, num_key_value_heads=8), "f32")
    n, size = len(inventory.cycle), inventory.cycle[0].padded_nbytes
    assert {chunk.padded_nbytes for chunk in inventory.cycle} == {size}
    for k in range(n + 1):
        locked = sorted(numbers_of(LOCKS["balanced"](inventory, k * size)))
        assert len(locked) == k
        gaps = {b - a for a, b in itertools.pairwise(locked)}
        assert gaps <= ({n // k, n // k + 1} if k else set())


def order_of(inventory: Inventory, plan: str) -> list[str]:
    """Return the kinds in the order in which they are locked, written from the words of the plan."""
    nbytes: dict[str, int] = {}
    for matrix in inventory.matrices:
        nbytes.setdefault(matrix.kind, matrix.layout.padded_nbytes)
    smallest_first = sorted(ATTENTION, key=lambda kind: (nbytes[kind], ATTENTION.index(kind)))
    groups = (smallest_first, list(FFN)) if plan == "attention-first" else (list(FFN), smallest_first)
    return [*groups[0], *groups[1], "lm_head"]


@pytest.mark.spec("PLAN-6")
@settings(max_examples=100)
@given(inventory=inventories(), plan=st.sampled_from(["attention-first", "ffn-first"]), share=st.floats(0, 1))
def test_kinds_are_locked_one_after_another_and_the_last_of_them_evenly(
    inventory: Inventory, plan: str, share: float
) -> None:
    room = int(share * inventory.streamable_nbytes)
    locked = LOCKS[plan](inventory, room)
    assert nbytes_of(inventory, numbers_of(locked)) <= room
    for at, kind in enumerate(order_of(inventory, plan)):
        of_kind = [number for number, chunk in enumerate(inventory.cycle) if chunk.kind == kind]
        total = nbytes_of(inventory, of_kind)
        if total <= room:
            assert locked[of_kind].all()
            room -= total
            continue
        one_of_each_size = sum({inventory.cycle[number].padded_nbytes for number in of_kind})
        kept = nbytes_of(inventory, (number for number in of_kind if locked[number]))
        assert room - one_of_each_size <= kept <= room
        assert largest_imbalance(inventory, locked, of_kind, kept / total) <= 2 * one_of_each_size
        rest = {
            number
            for number in numbers_of(locked)
            if inventory.cycle[number].kind in order_of(inventory, plan)[at + 1 :]
        }
        assert nbytes_of(inventory, rest) <= room - kept  # crumbs that were too small for another chunk of this kind
        return


@pytest.mark.spec("PLAN-6")
@pytest.mark.parametrize("plan", ["attention-first", "ffn-first"])
def test_the_kind_that_does_not_fit_is_locked_in_every_nth_layer(plan: str) -> None:
    inventory = Inventory(SHAPES["qwen3-0.6b"], "int8")
    first = order_of(inventory, plan)[0]
    of_kind = [number for number, chunk in enumerate(inventory.cycle) if chunk.kind == first]
    room = nbytes_of(inventory, of_kind) // 2
    locked = LOCKS[plan](inventory, room)
    by_layer = [sum(locked[n] for n in of_kind if inventory.cycle[n].layer == layer) for layer in range(28)]
    per_layer = len(of_kind) // 28
    for start in range(0, 28, 2):
        assert abs(sum(by_layer[start : start + 2]) - per_layer) <= 1


def algorithm_1(inventory: Inventory, size_mem: int) -> set[int]:
    """Return the chunks that Algorithm 1 keeps, tensor by tensor, as the paper writes it.

    The output table is kept first where it fits, as the paper's fixed memory has it.
    """
    nbytes = [matrix.layout.padded_nbytes for matrix in inventory.matrices]
    kinds = [matrix.kind for matrix in inventory.matrices]
    N = inventory.config.num_hidden_layers
    kept = []
    table = kinds.index("lm_head")
    if nbytes[table] <= size_mem:
        kept.append(table)
        size_mem -= nbytes[table]
    size_ffn = max(size for size, kind in zip(nbytes, kinds, strict=True) if kind in FFN)
    size_attn = max(size for size, kind in zip(nbytes, kinds, strict=True) if kind in ATTENTION)
    keep_ffn = 0
    if size_mem >= 3 * N * size_ffn + 2 * N * size_attn:
        keep_ffn = 3
    elif size_mem >= 2 * N * size_ffn:
        keep_ffn = 2
    elif size_mem >= N * size_ffn:
        keep_ffn = 1
    for i in range(keep_ffn):
        for tensor, kind in enumerate(kinds):
            if kind == FFN[i]:
                kept.append(tensor)
                size_mem -= nbytes[tensor]
    attention = [tensor for tensor, kind in enumerate(kinds) if kind in ATTENTION]
    for tensor in sorted(attention, key=lambda t: (nbytes[t], ATTENTION.index(kinds[t]), t)):
        if nbytes[tensor] <= size_mem:
            kept.append(tensor)
            size_mem -= nbytes[tensor]
    return {number for number, chunk in enumerate(inventory.cycle) if chunk.matrix in kept}


def guards_of(inventory: Inventory) -> list[int]:
    """Return the rooms at which Algorithm 1 turns, with the output table and without it."""
    nbytes = {matrix.kind: matrix.layout.padded_nbytes for matrix in inventory.matrices}
    N, table = inventory.config.num_hidden_layers, nbytes["lm_head"]
    ffn, attention = max(nbytes[kind] for kind in FFN), max(nbytes[kind] for kind in ATTENTION)
    guards = [0, N * ffn, 2 * N * ffn, 3 * N * ffn, 3 * N * ffn + 2 * N * attention, inventory.streamable_nbytes]
    return [table, *guards, *(table + guard for guard in guards)]


@pytest.mark.spec("PLAN-7")
@settings(max_examples=100)
@given(inventory=inventories(), data=st.data())
def test_flexinfer_keeps_what_algorithm_1_keeps(inventory: Inventory, data: st.DataObject) -> None:
    near = st.builds(lambda guard, by: max(0, guard + by), st.sampled_from(guards_of(inventory)), st.integers(-2, 2))
    room = data.draw(near | st.integers(0, inventory.streamable_nbytes))
    locked = LOCKS["flexinfer"](inventory, room)
    assert numbers_of(locked) == algorithm_1(inventory, room)
    assert nbytes_of(inventory, numbers_of(locked)) <= room


@pytest.mark.spec("PLAN-7")
@pytest.mark.parametrize("shape", [*PUBLISHED, "mistral-7b"])
@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_flexinfer_keeps_what_algorithm_1_keeps_of_published_shapes(shape: str, name: str) -> None:
    inventory = Inventory(SHAPES[shape], name)
    for guard in guards_of(inventory):
        for room in (max(0, guard - 1), guard, guard + 1):
            assert numbers_of(LOCKS["flexinfer"](inventory, room)) == algorithm_1(inventory, room)


@pytest.mark.spec("PLAN-7")
def test_what_flexinfer_leaves_is_reported_and_is_as_much_as_its_guards_leave() -> None:
    inventory, fixed = Inventory(SHAPES["llama2-70b"], "int4"), Fixed(1, 2, 3)
    nbytes = {matrix.kind: matrix.layout.padded_nbytes for matrix in inventory.matrices}
    layers = inventory.config.num_hidden_layers * (sum(nbytes.values()) - nbytes["lm_head"])
    guard = nbytes["lm_head"] + 80 * (3 * nbytes["gate_proj"] + 2 * nbytes["q_proj"])
    ring = 2 * int(inventory.sizes.max())
    costs, prefetch = costs_of(inventory, HERE), Prefetch(ring_nbytes=ring)
    plan = make_plan("flexinfer", inventory, fixed, fixed.total + ring + guard - 1, costs, prefetch)
    assert (
        plan.account.locked
        == nbytes_of(inventory, plan.locked)
        == nbytes_of(inventory, algorithm_1(inventory, guard - 1))
    )
    assert plan.account.unused == guard - 1 - plan.account.locked
    assert plan.account.unused / layers == pytest.approx(0.25, abs=0.01)
    whole = make_plan("flexinfer", inventory, fixed, fixed.total + ring + guard, costs, prefetch)
    assert not whole.streams or whole.account.unused < plan.account.unused


@pytest.mark.spec("PLAN-8")
@settings(max_examples=100)
@given(inventory=inventories(), plan=st.sampled_from(FILLING), share=st.floats(0, 0.9999))
def test_less_than_a_chunk_is_left(inventory: Inventory, plan: str, share: float) -> None:
    room = int(share * inventory.streamable_nbytes)
    locked = LOCKS[plan](inventory, room)
    left = room - nbytes_of(inventory, numbers_of(locked))
    assert 0 <= left < max(chunk.padded_nbytes for chunk in inventory.cycle)
    if plan != "leading":
        assert all(left < chunk.padded_nbytes for n, chunk in enumerate(inventory.cycle) if not locked[n])


@pytest.mark.spec("PLAN-8")
@pytest.mark.parametrize("shape", PUBLISHED)
@pytest.mark.parametrize("plan", FILLING)
def test_less_than_a_chunk_of_a_budget_is_left_on_published_shapes(shape: str, plan: str) -> None:
    for name in ("f32", "int4"):
        inventory, fixed = Inventory(SHAPES[shape], name), Fixed(4096, 1, 0)
        costs = costs_of(inventory, HERE)
        least, most = smallest_budget(inventory, fixed), fixed.total + inventory.streamable_nbytes
        for budget in (least, *(least + (most - least) * i // 9 for i in range(1, 9)), most - 1):
            if budget < most:
                account = make_plan(plan, inventory, fixed, budget, costs).account
                assert 0 <= account.unused < max(chunk.padded_nbytes for chunk in inventory.cycle)


@pytest.mark.spec("PLAN-8", "PLAN-10")
@settings(max_examples=100)
@given(inventory=inventories(), plan=st.sampled_from(list(LOCKS)), share=st.floats(0, 1), more=st.floats(0, 1))
def test_filling_up_keeps_what_is_locked_and_stops_where_nothing_fits(
    inventory: Inventory, plan: str, share: float, more: float
) -> None:
    room = int(share * inventory.streamable_nbytes)
    before = LOCKS[plan](inventory, int(more * room))
    unchanged = before.copy()
    after = fill(inventory, before, room)
    assert (before == unchanged).all()
    assert (after | before == after).all()
    left = room - nbytes_of(inventory, numbers_of(after))
    assert left >= 0
    assert all(left < chunk.padded_nbytes for n, chunk in enumerate(inventory.cycle) if not after[n])


@pytest.mark.spec("PLAN-5", "PLAN-6", "PLAN-7")
def test_there_are_six_simple_plans_and_they_cannot_be_changed() -> None:
    assert list(LOCKS) == ["none", "leading", "balanced", "attention-first", "ffn-first", "flexinfer"]
    assert not hasattr(LOCKS, "__setitem__")
