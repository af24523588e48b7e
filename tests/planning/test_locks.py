"""Specifies `refinfer.planning.locks`: what each of the six simple plans locks in the room it is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refinfer.arrays import BoolArray
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.packing.formats import FORMATS
from refinfer.planning.account import Fixed
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.locks import LOCKS, _spread, fill
from refinfer.planning.plan import Prefetch, make_plan, smallest_budget
from words import require_equal

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


def require_balance(sizes: Sequence[int], locked: Sequence[bool], what: str) -> None:
    """Require that the same share of every beginning is locked, to within a chunk of each size."""
    within, total = sum(set(sizes)), sum(sizes)
    share = sum(size for size, kept in zip(sizes, locked, strict=True) if kept) / total
    kept = seen = 0
    for n, (size, is_kept) in enumerate(zip(sizes, locked, strict=True), 1):
        kept, seen = kept + size * bool(is_kept), seen + size
        assert abs(kept - share * seen) <= within, (
            f"{what}: you lock {share:.0%} of all bytes, but {kept:,} of the {seen:,} bytes of the first {n} chunks"
        )


# Spreads, of chunks that are nothing but their sizes.

few_sizes = st.lists(st.sampled_from([2, 3, 7]), min_size=1, max_size=40)


def spread_of(sizes: list[int], room: int, among: Sequence[int] | None = None) -> tuple[list[int], str]:
    """Return the chunks that are chosen, by default among all of them, and words for what was asked."""
    among = range(len(sizes)) if among is None else among
    inventory = SimpleNamespace(sizes=np.array(sizes, np.int64), different_sizes=tuple(sorted(set(sizes))))
    found = np.asarray(_spread(cast("Inventory", inventory), np.array(among, np.int64), room))
    asked = f"chunks of {' '.join(map(str, sizes))} bytes, room {room}"
    assert found.dtype.kind in "iu" or not found.size, f"{asked}: you return {found.dtype}, not the numbers of chunks"
    chosen: list[int] = sorted(found.tolist())
    for number in chosen:
        assert number in among, f"{asked}, among {list(among)}: you choose chunk {number}"
    assert len(chosen) == len(set(chosen)), f"{asked}: you choose a chunk twice: {chosen}"
    return chosen, asked


@pytest.mark.spec("PLAN-23")
def test_a_spread_chooses_among_the_chunks_it_is_given() -> None:
    for room in range(13):
        spread_of([3] * 8, room, [1, 4, 5, 7])


@pytest.mark.spec("PLAN-23")
def test_a_spread_of_chunks_that_all_fit_is_all_of_them() -> None:
    for sizes in ([3], [3, 3, 3], [3, 7, 2, 3]):
        for more in (0, 1, 50):
            chosen, asked = spread_of(sizes, sum(sizes) + more)
            assert len(chosen) == len(sizes), f"{asked}: you choose {len(chosen)} of {len(sizes)}, and all of them fit"


@pytest.mark.spec("PLAN-23")
@settings(max_examples=200)
@given(sizes=few_sizes, room=st.integers(0, 160))
def test_a_spread_takes_at_most_its_room(sizes: list[int], room: int) -> None:
    chosen, asked = spread_of(sizes, room)
    nbytes = sum(sizes[number] for number in chosen)
    assert nbytes <= room, f"{asked}: you choose the chunks {chosen}, {nbytes} bytes"


@pytest.mark.spec("PLAN-23")
@settings(max_examples=200)
@given(sizes=few_sizes, room=st.integers(0, 160))
def test_a_spread_leaves_at_most_a_chunk_of_each_size(sizes: list[int], room: int) -> None:
    chosen, asked = spread_of(sizes, room)
    left = room - sum(sizes[number] for number in chosen)
    assert len(chosen) == len(sizes) or left <= sum(set(sizes)), f"{asked}: you choose the chunks {chosen}, {left} left"


@pytest.mark.spec("PLAN-23")
def test_a_spread_of_equal_chunks_takes_every_nth() -> None:
    for n, k in ((6, 3), (12, 4), (12, 5), (7, 2)):
        chosen, asked = spread_of([2] * n, 2 * k)
        for one, other in itertools.pairwise(chosen):
            assert n // k <= other - one <= -(-n // k), f"{asked}: you choose the chunks {chosen}, not evenly"


@pytest.mark.spec("PLAN-23", "PLAN-5")
@settings(max_examples=300)
@given(sizes=few_sizes, room=st.integers(0, 160))
@example(sizes=[2] * 30 + [7] * 10, room=65)
def test_a_spread_takes_the_same_share_of_every_beginning(sizes: list[int], room: int) -> None:
    chosen, asked = spread_of(sizes, room)
    require_balance(sizes, [number in chosen for number in range(len(sizes))], asked)


@pytest.mark.spec("PLAN-5")
@given(inventory=inventories(), share=st.floats(0, 1.5))
def test_none_locks_nothing_however_much_room_there_is(inventory: Inventory, share: float) -> None:
    assert not LOCKS["none"](inventory, int(share * inventory.streamable_nbytes)).any()


@pytest.mark.spec("PLAN-2")
@given(inventory=inventories())
def test_leading_locks_a_chunk_as_soon_as_it_fits_to_the_byte(inventory: Inventory) -> None:
    room = 0
    for number, chunk in enumerate(inventory.cycle):
        room += chunk.padded_nbytes
        assert numbers_of(LOCKS["leading"](inventory, room - 1)) == set(range(number))
        assert numbers_of(LOCKS["leading"](inventory, room)) == set(range(number + 1))


def check_balance(inventory: Inventory, share: float) -> None:
    room = int(share * inventory.streamable_nbytes)
    locked = LOCKS["balanced"](inventory, room)
    kept = nbytes_of(inventory, numbers_of(locked))
    assert kept <= room
    # Any stretch lies between two beginnings, so that it is right to within a chunk of each size at either end.
    require_balance(inventory.sizes.tolist(), locked.tolist(), f"room {room:,}")


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
        n = sum(by_layer[start : start + 2])
        assert abs(n - per_layer) <= 1, f"{first}, room for half: you lock {n} chunks of layers {start} and {start + 1}"


# Algorithm 1, by what is true of its answer: each of these checks looks at one step of it.

Tensors: TypeAlias = set[tuple[str, int]]
"""Some tensors, by kind and layer; the output table counts as a layer after the last one."""


def named(tensor: tuple[str, int]) -> str:
    kind, layer = tensor
    return "the output table" if kind == "lm_head" else f"{kind} of layer {layer}"


def kept_tensors(inventory: Inventory, room: int) -> Tensors:
    """Return what `flexinfer` locks, which has to be whole tensors within the room."""
    locked = LOCKS["flexinfer"](inventory, room)
    require_equal(len(locked), len(inventory.cycle), f"room {room:,}: the length of the mask")
    kept: Tensors = set()
    for matrix, numbers in zip(inventory.matrices, inventory.chunks_of_matrix, strict=True):
        n, name = sum(bool(locked[number]) for number in numbers), named((matrix.kind, matrix.layer))
        assert n in (0, len(numbers)), (
            f"room {room:,}: you lock {n} of {len(numbers)} chunks of {name}; Algorithm 1 locks whole tensors"
        )
        if n:
            kept.add((matrix.kind, matrix.layer))
    nbytes = sum(inventory.kind_sizes[kind] for kind, _ in kept)
    assert nbytes <= room, f"room {room:,}: you lock {nbytes:,} bytes, which is more"
    return kept


def room_for_layers(inventory: Inventory, room: int, kept: Tensors) -> int:
    """Return the room after the output table, which is locked first if it fits."""
    table = inventory.kind_sizes["lm_head"]
    is_kept = ("lm_head", inventory.config.num_hidden_layers) in kept
    does, should = "lock" if is_kept else "do not lock", "fits" if table <= room else "does not fit"
    assert is_kept == (table <= room), (
        f"room {room:,}: the output table takes {table:,} bytes, so it {should}; you {does} it"
    )
    return room - table if is_kept else room


def guards_of_columns(inventory: Inventory) -> tuple[int, int, int, int]:
    """Return the least room for none, one, two and three FFN tensors of every layer."""
    sizes, N = inventory.kind_sizes, inventory.config.num_hidden_layers
    ffn, attention = max(sizes[kind] for kind in FFN), max(sizes[kind] for kind in ATTENTION)
    return 0, N * ffn, 2 * N * ffn, 3 * N * ffn + 2 * N * attention


def room_for_attention(inventory: Inventory, room: int, kept: Tensors) -> int:
    """Return the room after the FFN tensors, of which whole columns are kept: as many as the guards allow."""
    left, N = room_for_layers(inventory, room, kept), inventory.config.num_hidden_layers
    guards = guards_of_columns(inventory)
    columns = max(n for n, guard in enumerate(guards) if guard <= left)
    for n, kind in enumerate(FFN):
        layers, right = sum((kind, layer) in kept for layer in range(N)), N if n < columns else 0
        assert layers == right, (
            f"room {room:,}, of which {left:,} are for layers: you lock {kind} in {layers} of {N} layers, Algorithm 1 "
            f"in {right}; its guards are {', '.join(f'{guard:,}' for guard in guards[1:])}"
        )
    return left - N * sum(inventory.kind_sizes[kind] for kind in FFN[:columns])


def check_attention(inventory: Inventory, room: int, kept: Tensors) -> None:
    """Require that attention tensors are kept one after another, until the next one does not fit."""
    sizes, N = inventory.kind_sizes, inventory.config.num_hidden_layers
    left = room_for_attention(inventory, room, kept)
    kinds = sorted(ATTENTION, key=lambda kind: (sizes[kind], ATTENTION.index(kind)))
    missing = None
    for tensor in itertools.product(kinds, range(N)):
        if tensor not in kept:
            missing = missing or tensor
        elif missing:
            right = named(missing) if sizes[missing[0]] <= left else "nothing more, as that one does not fit"
            raise AssertionError(f"room {room:,}: you lock {named(tensor)}, Algorithm 1 locks {right}")
        else:
            left -= sizes[tensor[0]]
    assert missing is None or sizes[missing[0]] > left, (
        f"room {room:,}: {left:,} bytes are left; {named(missing)} fits into them, and you do not lock it"
    )


def check_algorithm_1(inventory: Inventory, room: int) -> None:
    check_attention(inventory, room, kept_tensors(inventory, room))


def in_pages(N: int, k: int, q: int, ffn: int, table: int, chunk_nbytes: int) -> Inventory:
    """Return a model of N layers in which the tensors take this many pages: each of k and v, of q and o, of the FFN."""
    config = replace(SHAPES["tiny"], num_hidden_layers=N, hidden_size=32, head_dim=32)
    config = replace(config, num_key_value_heads=k, num_attention_heads=q)
    config = replace(config, intermediate_size=32 * ffn, vocab_size=32 * table)
    return Inventory(config, "f32", chunk_nbytes)


GUARDS = ("nothing", "1 FFN", "2 FFN", "3 FFN", "3 FFN and 2 attention", "everything")


def room_of(inventory: Inventory, guard: str, more: int, *, with_table: bool) -> int:
    """Return the room that a guard asks for, and some bytes more, with the output table's or without."""
    guards = list(guards_of_columns(inventory))
    N, sizes = inventory.config.num_hidden_layers, inventory.kind_sizes
    everything = inventory.streamable_nbytes - sizes["lm_head"]
    rooms = dict(zip(GUARDS, [*guards[:3], 3 * N * sizes["gate_proj"], guards[3], everything], strict=True))
    return max(0, rooms[guard] + more + (sizes["lm_head"] if with_table else 0))


small_models = given(
    N=st.integers(1, 3),
    k=st.integers(1, 2),
    heads=st.integers(1, 3),
    ffn=st.integers(1, 5),
    table=st.integers(1, 6),
    guard=st.sampled_from(GUARDS),
    more=st.integers(-1, 1) | st.integers(1, 24).map(lambda pages: 4096 * pages),
    with_table=st.booleans(),
)
"""Layers, and pages of k and v, of an FFN tensor and of the output table; q and o have `heads` times those of k."""


def small_model(
    N: int, k: int, heads: int, ffn: int, table: int, guard: str, more: int, with_table: bool
) -> tuple[Inventory, int]:
    """Return a model of which every page is a chunk, and a room in bytes."""
    inventory = in_pages(N, k, k * heads, ffn, table, 4096)
    return inventory, room_of(inventory, guard, more, with_table=with_table)


@pytest.mark.spec("PLAN-7")
@small_models
def test_algorithm_1_locks_whole_tensors_within_its_room(**drawn: Any) -> None:
    kept_tensors(*small_model(**drawn))


@pytest.mark.spec("PLAN-7")
@small_models
def test_algorithm_1_locks_the_output_table_first_if_it_fits(**drawn: Any) -> None:
    inventory, room = small_model(**drawn)
    room_for_layers(inventory, room, kept_tensors(inventory, room))


@pytest.mark.spec("PLAN-7")
@settings(max_examples=150)
@small_models
def test_algorithm_1_keeps_ffn_tensors_in_every_layer_or_in_none_as_its_guards_allow(**drawn: Any) -> None:
    inventory, room = small_model(**drawn)
    room_for_attention(inventory, room, kept_tensors(inventory, room))


@pytest.mark.spec("PLAN-7")
@settings(max_examples=150)
@small_models
def test_algorithm_1_then_keeps_attention_tensors_one_by_one_until_the_next_does_not_fit(**drawn: Any) -> None:
    check_algorithm_1(*small_model(**drawn))


WORKED = {  # two layers; k and v take a page each, q and o two, an FFN tensor four, the output table three
    0: "",
    1: "k0",
    2: "k0 k1",
    3: "table",
    4: "table k0",
    8: "table k0 k1 v0 v1",  # a page is left, and q takes two
    9: "table k0 k1 v0 v1 q0",
    10: "table k0 k1 v0 v1 q0",
    11: "table gate",  # 2 layers of 4 pages: the first guard
    12: "table gate k0",
    18: "table gate k0 k1 v0 v1 q0",
    19: "table gate up",
    34: "table gate up k0 k1 v0 v1 q0 q1 o0 o1",  # three pages are left
    35: "table gate up down k0 k1 v0 v1 q0 q1",  # 3 * 2 * 4 + 2 * 2 * 2 = 32
    38: "table gate up down k0 k1 v0 v1 q0 q1 o0",
    39: "table gate up down k0 k1 v0 v1 q0 q1 o0 o1",
}


def written(words: str) -> Tensors:
    """Return the tensors that a row of `WORKED` names."""
    found: Tensors = set()
    for word in words.split():
        if word == "table":
            found.add(("lm_head", 2))
        elif word[-1].isdecimal():
            found.add((f"{word[:-1]}_proj", int(word[-1])))
        else:
            found |= {(f"{word}_proj", layer) for layer in range(2)}
    return found


@pytest.mark.spec("PLAN-7")
def test_algorithm_1_keeps_what_was_worked_out_by_hand() -> None:
    inventory = in_pages(2, 1, 2, 4, 3, 1 << 20)
    for pages, words in WORKED.items():
        kept, right = kept_tensors(inventory, 4096 * pages), written(words)
        yours, ours = sorted(kept - right), sorted(right - kept)
        assert kept == right, (
            f"room {4096 * pages:,} ({pages} pages): you lock {named(yours[0]) if yours else 'less'}, "
            f"Algorithm 1 locks {named(ours[0]) if ours else 'less'}"
        )


@pytest.mark.spec("PLAN-7")
@settings(max_examples=100)
@given(inventory=inventories(), data=st.data())
def test_flexinfer_keeps_what_algorithm_1_keeps(inventory: Inventory, data: st.DataObject) -> None:
    guard, with_table = data.draw(st.sampled_from(GUARDS)), data.draw(st.booleans())
    near = st.integers(-2, 2).map(lambda more: room_of(inventory, guard, more, with_table=with_table))
    check_algorithm_1(inventory, data.draw(near | st.integers(0, inventory.streamable_nbytes)))


@pytest.mark.spec("PLAN-7")
@pytest.mark.parametrize("shape", [*PUBLISHED, "mistral-7b"])
@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_flexinfer_keeps_what_algorithm_1_keeps_of_published_shapes(shape: str, name: str) -> None:
    inventory = Inventory(SHAPES[shape], name)
    for guard, more, with_table in itertools.product(GUARDS, (-1, 0, 1), (True, False)):
        check_algorithm_1(inventory, room_of(inventory, guard, more, with_table=with_table))


@pytest.mark.spec("PLAN-7")
def test_algorithm_1_leaves_what_is_between_its_guards_unused() -> None:
    """Llama 2 70B in int4: just below the last guard, a quarter of the layers' bytes."""
    inventory, fixed = Inventory(SHAPES["llama2-70b"], "int4"), Fixed(1, 2, 3)
    sizes = inventory.kind_sizes
    layers = 80 * (sum(sizes.values()) - sizes["lm_head"])
    guard = sizes["lm_head"] + 80 * (3 * sizes["gate_proj"] + 2 * sizes["q_proj"])
    ring = 2 * int(inventory.sizes.max())
    costs, prefetch = costs_of(inventory, HERE), Prefetch(ring_nbytes=ring)
    plan = make_plan("flexinfer", inventory, fixed, fixed.total + ring + guard - 1, costs, prefetch)
    two_columns = sizes["lm_head"] + 80 * (2 * sizes["gate_proj"] + 2 * sizes["q_proj"] + 2 * sizes["k_proj"])
    require_equal(plan.account.locked, two_columns, f"room {guard - 1:,}: the bytes of what is locked")
    assert plan.account.locked == nbytes_of(inventory, plan.locked)
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
