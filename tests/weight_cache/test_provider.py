"""Specifies the weight cache providers, in memory, in a file, or anybody's own: `pytest --provider package:Class`."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.testing import assert_array_equal

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.packing.formats import layout_of
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey, WeightId
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import matrix_key, nbytes_of, pack_into, rows_key, vectors_key
from refinfer.weight_cache.provider import ALLOWED, State, WeightCacheProvider

Bytes = npt.NDArray[np.uint8]
Begin = Callable[[], WeightCacheProvider]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Kind:
    """`begin` gives an empty provider, for which a folder is there; `complete` ends the building of one."""

    begin: Callable[[Path], WeightCacheProvider]
    complete: Callable[[WeightCacheProvider], WeightCacheProvider]


def finalized(provider: WeightCacheProvider) -> WeightCacheProvider:
    provider.finalize()
    return provider


def loaded(provider: WeightCacheProvider) -> WeightCacheProvider:
    """Finalize, and find the file again in a fresh object."""
    assert isinstance(provider, FileWeightCacheProvider)
    provider.finalize()
    provider.delete_cache()
    return FileWeightCacheProvider.load(provider.path)


def in_file(folder: Path) -> WeightCacheProvider:
    return FileWeightCacheProvider.build(folder / "cache")


KINDS = {
    "memory": Kind(lambda _: MemoryWeightCacheProvider(), finalized),
    "file": Kind(in_file, finalized),
    "loaded file": Kind(in_file, loaded),
}


def imported(name: str) -> Kind:
    """Return the kind of a class `package:Class`."""
    module, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--provider {name}: {error}") from None
    return Kind(lambda _: make(), finalized)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        own: str | None = metafunc.config.getoption("provider")
        kinds = {own: imported(own)} if own else KINDS
        metafunc.parametrize("kind", list(kinds.values()), ids=list(kinds))


@pytest.fixture
def begin(kind: Kind, tmp_path: Path) -> Iterator[Begin]:
    """Give empty providers, as many as are asked for."""
    begun: list[WeightCacheProvider] = []

    def begin() -> WeightCacheProvider:
        folder = tmp_path / str(len(begun))
        folder.mkdir()
        begun.append(kind.begin(folder))
        return begun[-1]

    yield begin
    for provider in begun:
        provider.delete_cache()


@pytest.fixture
def building(begin: Begin) -> WeightCacheProvider:
    """One empty provider."""
    return begin()


def key_of(name: str, n_pages: int = 1) -> PackKey:
    """Return the key of a buffer of some pages, the last one not quite full."""
    return vectors_key(n_pages * 1024 - 10, WeightId(bytes(DIGEST_BYTES), name))


def noise(key: PackKey, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes_of(key), np.uint8)


A, B, C, D = key_of("a"), key_of("b", 2), key_of("c"), key_of("d", 3)


def insert(provider: WeightCacheProvider, key: PackKey, data: Bytes) -> int:
    """Commit a copy of `data` by way of reserved space."""
    space = provider.reserve_space(data.size)
    space[:] = data
    return provider.look_up_or_insert(key, space)


def contents(provider: WeightCacheProvider) -> dict[PackKey, bytes]:
    return {key: provider[key].tobytes() for key in provider}


def packing(data: Bytes, calls: list[int]) -> Callable[[Bytes], Iterable[int]]:
    """Return what packs `data` in two steps, and notes each call."""

    def pack(buffer: Bytes) -> Iterator[int]:
        calls.append(len(calls))
        assert not buffer.any()
        buffer[:PAGE_BYTES] = data[:PAGE_BYTES]
        yield PAGE_BYTES
        buffer[PAGE_BYTES:] = data[PAGE_BYTES:]
        yield data.size

    return pack


def never(buffer: Bytes) -> Iterable[int]:
    raise AssertionError("nothing is packed on a hit")


@pytest.mark.spec("CACHE-1")
def test_look_up_gives_the_offset_of_a_buffer_or_none(kind: Kind, building: WeightCacheProvider) -> None:
    assert building.look_up(A) is None
    offsets = {key: insert(building, key, noise(key, i)) for i, key in enumerate((A, B, C))}
    complete = kind.complete(building)
    for provider in (building, complete) if complete is building else (complete,):
        assert {key: provider.look_up(key) for key in (A, B, C)} == offsets
        assert provider.look_up(D) is None
        assert provider.look_up(replace(A, flags=1)) is None
        assert provider.look_up(replace(A, weights=WeightId(b"\1" * DIGEST_BYTES, "a"))) is None
    assert len(set(offsets.values())) == 3


@pytest.mark.spec("CACHE-1")
def test_a_look_up_inserts_nothing(building: WeightCacheProvider) -> None:
    building.look_up(A)
    assert A not in building
    assert len(building) == 0


@pytest.mark.spec("CACHE-2")
@pytest.mark.parametrize("nbytes", [1, 100, 4095, 4096, 4097, 8192, 1_000_000])
def test_reserved_space_is_that_many_zeros_on_a_page(building: WeightCacheProvider, nbytes: int) -> None:
    for _ in range(3):
        space = building.reserve_space(nbytes)
        assert space.dtype == np.uint8
        assert space.shape == (nbytes,)
        assert space.ctypes.data % PAGE_BYTES == 0
        assert space.flags.writeable
        assert space.flags.c_contiguous
        assert not space.any()
        space[:] = 0xA5  # and is never committed


@pytest.mark.spec("CACHE-2")
def test_a_reservation_that_was_never_committed_leaves_no_trace(building: WeightCacheProvider) -> None:
    for nbytes in (20_000, 1, 4096, 8192, 1, 8192, 20_000, 4096, 20_000, 100_000):
        space = building.reserve_space(nbytes)
        assert not space.any()
        space[:] = 0xA5


@pytest.mark.spec("CACHE-2")
def test_what_was_reserved_beyond_a_committed_buffer_leaves_no_trace(building: WeightCacheProvider) -> None:
    space = building.reserve_space(5 * PAGE_BYTES)
    space[:] = 0xA5
    building.look_up_or_insert(A, space[:PAGE_BYTES])
    assert not building.reserve_space(6 * PAGE_BYTES).any()
    assert building[A].tobytes() == b"\xa5" * PAGE_BYTES


@pytest.mark.spec("CACHE-2", "CACHE-3")
def test_data_that_was_dropped_leaves_no_trace(building: WeightCacheProvider) -> None:
    insert(building, A, noise(A))
    insert(building, A, noise(A, 1))  # dropped, since A is there
    assert not building.reserve_space(PAGE_BYTES).any()
    insert(building, C, noise(A))  # perhaps not kept, since A has the same bytes
    assert not building.reserve_space(PAGE_BYTES).any()
    assert contents(building) == {A: noise(A).tobytes(), C: noise(A).tobytes()}


@pytest.mark.spec("CACHE-2")
@pytest.mark.parametrize("nbytes", [0, -1, -4096])
def test_less_than_a_byte_cannot_be_reserved(building: WeightCacheProvider, nbytes: int) -> None:
    with pytest.raises(PackingError, match=f"not {nbytes}$"):
        building.reserve_space(nbytes)


@pytest.mark.spec("CACHE-3")
def test_a_new_key_is_committed(kind: Kind, building: WeightCacheProvider) -> None:
    first, second = insert(building, A, noise(A)), building.look_up_or_insert(B, noise(B))
    assert first != second
    expected = {A: noise(A).tobytes(), B: noise(B).tobytes()}
    assert contents(building) == expected
    assert contents(kind.complete(building)) == expected


@pytest.mark.spec("CACHE-3")
def test_an_existing_key_wins_and_the_data_is_dropped(kind: Kind, building: WeightCacheProvider) -> None:
    offset = insert(building, A, noise(A))
    insert(building, B, noise(B))
    for again in (noise(A, 1), noise(A)):
        assert building.look_up_or_insert(A, again) == offset
        assert insert(building, A, again) == offset
        assert building[A].tobytes() == noise(A).tobytes()
    complete = kind.complete(building)
    assert complete.look_up_or_insert(A, noise(A, 2)) == complete.look_up(A)
    assert contents(complete) == {A: noise(A).tobytes(), B: noise(B).tobytes()}


@pytest.mark.spec("CACHE-3", "CACHE-6")
def test_once_complete_a_new_key_is_refused(kind: Kind, building: WeightCacheProvider) -> None:
    insert(building, A, noise(A))
    complete = kind.complete(building)
    with pytest.raises(WeightCacheStateError, match="finalized"):
        complete.look_up_or_insert(C, noise(C))
    assert contents(complete) == {A: noise(A).tobytes()}


@pytest.mark.spec("CACHE-3")
def test_equal_bytes_under_different_keys_are_found_under_both(kind: Kind, building: WeightCacheProvider) -> None:
    for key in (A, C):
        insert(building, key, noise(A))
    complete = kind.complete(building)
    assert contents(complete) == dict.fromkeys((A, C), noise(A).tobytes())


VIEWS: dict[str, Callable[[Bytes], Bytes]] = {
    "itself": lambda space: space,
    "slice": lambda space: space[:],
    "view": lambda space: space.view(),
    "reshaped": lambda space: space.reshape(2, -1).reshape(-1),
    "memory": lambda space: np.frombuffer(space.data, np.uint8),
}


@pytest.mark.spec("CACHE-4")
@pytest.mark.parametrize("view", list(VIEWS.values()), ids=list(VIEWS))
@pytest.mark.parametrize("beyond", [0, PAGE_BYTES + 1])
def test_a_buffer_in_reserved_space_is_kept_in_place_whichever_view_of_it(
    building: WeightCacheProvider, view: Callable[[Bytes], Bytes], beyond: int
) -> None:
    insert(building, A, noise(A))
    space = building.reserve_space(nbytes_of(B) + beyond)[: nbytes_of(B)]
    space[:] = noise(B)
    kept = building.offset_to_addr(building.look_up_or_insert(B, view(space)))
    assert kept.ctypes.data == space.ctypes.data
    assert_array_equal(kept, noise(B))


@pytest.mark.spec("CACHE-4")
def test_a_buffer_that_does_not_lie_in_reserved_space_is_copied(kind: Kind, building: WeightCacheProvider) -> None:
    foreign = noise(A)
    kept = building.offset_to_addr(building.look_up_or_insert(A, foreign))
    assert not np.shares_memory(kept, foreign)
    foreign[:] = 0
    assert_array_equal(kept, noise(A))
    assert contents(kind.complete(building)) == {A: noise(A).tobytes()}


@pytest.mark.spec("CACHE-4")
def test_a_buffer_that_can_only_be_read_is_copied_like_any(building: WeightCacheProvider) -> None:
    foreign = noise(B)
    foreign.flags.writeable = False
    building.look_up_or_insert(B, foreign)
    building.look_up_or_insert(key_of("e", 2), building[B])
    assert contents(building) == dict.fromkeys((B, key_of("e", 2)), noise(B).tobytes())


@pytest.mark.spec("CACHE-4")
def test_a_buffer_that_was_committed_is_copied_when_it_is_committed_again(building: WeightCacheProvider) -> None:
    space = building.reserve_space(PAGE_BYTES)
    space[:] = noise(A)
    building.look_up_or_insert(A, space)
    building.look_up_or_insert(C, space)
    insert(building, B, noise(B))
    assert contents(building) == {A: noise(A).tobytes(), C: noise(A).tobytes(), B: noise(B).tobytes()}


@pytest.mark.spec("CACHE-4")
@pytest.mark.parametrize("start", [1, 100, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1])
def test_a_buffer_further_on_in_reserved_space_is_committed_as_it_is(
    kind: Kind, building: WeightCacheProvider, start: int
) -> None:
    insert(building, A, noise(A))
    space = building.reserve_space(3 * PAGE_BYTES + 1)
    space[:] = 0xA5
    space[start : start + 2 * PAGE_BYTES] = noise(B)
    building.look_up_or_insert(B, space[start : start + 2 * PAGE_BYTES])
    insert(building, C, noise(C))
    expected = {key: noise(key).tobytes() for key in (A, B, C)}
    assert contents(building) == expected
    assert contents(kind.complete(building)) == expected


def in_the_way(provider: WeightCacheProvider, how: str) -> dict[PackKey, bytes]:
    """Have a provider take the place of what was reserved before, and return what it holds then."""
    if how == "a buffer from elsewhere":
        provider.look_up_or_insert(C, noise(C, 1))
    elif how == "another buffer":
        insert(provider, C, noise(C, 1))
    else:
        provider.reserve_space(PAGE_BYTES)[:] = 0xA5
        return {}
    return {C: noise(C, 1).tobytes()}


WAYS = ["a buffer from elsewhere", "another buffer", "another reservation"]


@pytest.mark.spec("CACHE-4")
@pytest.mark.parametrize("view", ["itself", "slice", "view", "reshaped"])
@pytest.mark.parametrize("way", WAYS)
def test_space_that_lost_its_place_is_committed_as_it_is_or_refused(
    kind: Kind, building: WeightCacheProvider, way: str, view: str
) -> None:
    refuse_or_take_superseded_space(kind, building, way, VIEWS[view])


@pytest.mark.spec("CACHE-4")
@pytest.mark.parametrize("way", WAYS)
def test_space_that_lost_its_place_is_known_through_its_memory(
    kind: Kind, building: WeightCacheProvider, way: str
) -> None:
    refuse_or_take_superseded_space(kind, building, way, VIEWS["memory"])


def refuse_or_take_superseded_space(
    kind: Kind, building: WeightCacheProvider, way: str, view: Callable[[Bytes], Bytes]
) -> None:
    """Check that space whose place another has taken is refused where it is lost, in a file, and else is kept."""
    space = building.reserve_space(PAGE_BYTES)
    space[:] = noise(A)
    expected = in_the_way(building, way)
    if kind.begin is in_file:
        for _ in range(2):
            with pytest.raises(WeightCacheStateError, match=r"not committed before other space was reserved$"):
                building.look_up_or_insert(A, view(space))
        assert A not in building
    else:
        building.look_up_or_insert(A, view(space))
        expected[A] = noise(A).tobytes()
    assert contents(building) == expected
    insert(building, B, noise(B))
    assert contents(kind.complete(building)) == {**expected, B: noise(B).tobytes()}


@pytest.mark.spec("CACHE-4")
def test_the_rest_of_space_whose_beginning_was_committed_is_committed_as_it_is_or_refused(
    kind: Kind, building: WeightCacheProvider
) -> None:
    space = building.reserve_space(3 * PAGE_BYTES)
    space[:PAGE_BYTES], space[PAGE_BYTES:] = noise(A), noise(B)
    building.look_up_or_insert(A, space[:PAGE_BYTES])
    expected = {A: noise(A).tobytes()}
    try:
        building.look_up_or_insert(B, space[PAGE_BYTES:])
    except WeightCacheStateError:
        assert B not in building
    else:
        expected[B] = noise(B).tobytes()
    assert contents(building) == expected


@pytest.mark.spec("CACHE-5")
def test_the_committed_bytes_can_be_read_but_not_written(kind: Kind, building: WeightCacheProvider) -> None:
    for i, key in enumerate((A, B, D)):
        insert(building, key, noise(key, i))

    def check(provider: WeightCacheProvider) -> None:
        for i, key in enumerate((A, B, D)):
            offset = provider.look_up(key)
            assert offset is not None
            for view in (provider.offset_to_addr(offset), provider[key]):
                assert view.dtype == np.uint8
                assert_array_equal(view, noise(key, i))
                with pytest.raises(ValueError, match="read-only"):
                    view[0] = 0

    check(building)
    check(kind.complete(building))


@pytest.mark.spec("CACHE-5")
def test_an_offset_stays_good_when_the_building_ends(building: WeightCacheProvider) -> None:
    offsets = {key: insert(building, key, noise(key)) for key in (A, B, D)}
    building.finalize()
    for key, offset in offsets.items():
        assert_array_equal(building.offset_to_addr(offset), noise(key))


@pytest.mark.spec("CACHE-5")
def test_an_offset_never_given_is_a_named_error(kind: Kind, building: WeightCacheProvider) -> None:
    def check(provider: WeightCacheProvider, offsets: set[int]) -> None:
        for offset in offsets:
            with pytest.raises(WeightCacheStateError, match=f"{offset}$"):
                provider.offset_to_addr(offset)

    check(building, {-1, 0, 1, PAGE_BYTES, 1 << 40, 1 << 70})
    given = {insert(building, key, noise(key)) for key in (A, B)}
    building.reserve_space(PAGE_BYTES)
    around = {offset + by for offset in given for by in (-PAGE_BYTES, -1, 1, PAGE_BYTES, 2 * PAGE_BYTES)}
    check(building, (around | {-1, 1 << 40}) - given)
    check(kind.complete(building), (around | {-1, 1 << 40}) - given)


@pytest.mark.spec("CACHE-6")
def test_a_provider_is_finalized_once_nothing_more_can_be_inserted(kind: Kind, building: WeightCacheProvider) -> None:
    assert building.is_finalized() is False
    insert(building, A, noise(A))
    building.reserve_space(1)
    assert building.is_finalized() is False
    complete = kind.complete(building)
    assert complete.is_finalized() is True
    complete.finalize()
    assert complete.is_finalized() is True
    complete.delete_cache()
    assert complete.is_finalized() is True


@pytest.mark.spec("CACHE-6")
def test_an_empty_provider_can_be_finalized(kind: Kind, building: WeightCacheProvider) -> None:
    complete = kind.complete(building)
    assert complete.is_finalized() is True
    assert contents(complete) == {}


Call = Callable[[WeightCacheProvider, int], object]

EVER = {"building", "complete", "deleted"}
UNTIL_DELETED = {"building", "complete"}

# Each verb, what a refusal says, and the states that have it; A is there, at the given offset, C is not.
VERBS: dict[str, tuple[Call, str, set[str]]] = {
    "look_up": (lambda p, _: p.look_up(A), "look_up", UNTIL_DELETED),
    "look_up of another": (lambda p, _: p.look_up(C), "look_up", UNTIL_DELETED),
    "offset_to_addr": (lambda p, offset: p.offset_to_addr(offset), "offset_to_addr", UNTIL_DELETED),
    "look_up_or_insert": (lambda p, _: p.look_up_or_insert(A, noise(A)), "look_up_or_insert", UNTIL_DELETED),
    "look_up_or_insert of another": (lambda p, _: p.look_up_or_insert(C, noise(C)), "insert", {"building"}),
    "reserve_space": (lambda p, _: p.reserve_space(PAGE_BYTES), "reserve_space", {"building"}),
    "finalize": (lambda p, _: p.finalize(), "finalize", UNTIL_DELETED),
    "is_finalized": (lambda p, _: p.is_finalized(), "", EVER),
    "delete_cache": (lambda p, _: p.delete_cache(), "", EVER),
    "[]": (lambda p, _: p[A], "look_up", UNTIL_DELETED),
    "in": (lambda p, _: A in p, "look_up", UNTIL_DELETED),
    "get_or_pack": (lambda p, _: p.get_or_pack(A, never), "look_up", UNTIL_DELETED),
    "get_or_pack of another": (lambda p, _: p.get_or_pack(C, packing(noise(C), [])), "look_up", UNTIL_DELETED),
}


@pytest.mark.spec("CACHE-7")
@pytest.mark.parametrize("state", ["building", "complete", "deleted", "deleted while building"])
@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_works_in_its_states_and_is_refused_by_name_in_others(
    kind: Kind, building: WeightCacheProvider, verb: str, state: str
) -> None:
    offset = insert(building, A, noise(A))
    provider = kind.complete(building) if state in {"complete", "deleted"} else building
    if state.startswith("deleted"):
        provider.delete_cache()
    call, name, states = VERBS[verb]
    if state.removesuffix(" while building") in states:
        call(provider, offset)
        return
    for _ in range(2):
        with pytest.raises(WeightCacheStateError, match=name):
            call(provider, offset)
    if state == "complete":
        assert contents(provider) == {A: noise(A).tobytes()}


@pytest.mark.spec("CACHE-7")
def test_the_table_of_verbs_and_states_says_the_same() -> None:
    named = {"building": {State.BUILDING}, "complete": {State.FINALIZED, State.LOADED}, "deleted": {State.DELETED}}
    tested = {verb: frozenset(s for state in VERBS[verb][2] for s in named[state]) for verb in ALLOWED}
    assert tested == ALLOWED


@pytest.mark.spec("CACHE-8")
def test_a_provider_is_a_mapping_in_the_order_of_insertion(kind: Kind, building: WeightCacheProvider) -> None:
    keys = [D, A, C, B]
    assert (len(building), list(building)) == (0, [])
    for i, key in enumerate(keys):
        assert key not in building
        insert(building, key, noise(key, i))
        assert key in building
        assert (len(building), list(building)) == (i + 1, keys[: i + 1])
    building.look_up_or_insert(D, noise(D, 9))
    complete = kind.complete(building)
    assert (len(complete), list(complete)) == (4, keys)
    assert contents(complete) == {key: noise(key, i).tobytes() for i, key in enumerate(keys)}


@pytest.mark.spec("CACHE-8")
def test_a_key_that_is_not_there_is_a_key_error(kind: Kind, building: WeightCacheProvider) -> None:
    insert(building, A, noise(A))
    complete = kind.complete(building)
    with pytest.raises(KeyError, match="'c'"):
        complete[C]
    assert C not in complete
    others: list[object] = [None, 0, "a", A.weights, (A,)]
    assert not any(other in complete for other in others)


@pytest.mark.spec("CACHE-8")
def test_two_providers_are_not_one_for_having_equal_buffers(kind: Kind, begin: Begin) -> None:
    one, other = begin(), begin()
    assert one != other  # also while both are empty
    for provider in (one, other):
        insert(provider, A, noise(A))
    complete = [kind.complete(provider) for provider in (one, other)]
    assert contents(complete[0]) == contents(complete[1])
    assert complete[0] != complete[1]
    for provider in complete:
        assert provider == provider
        before = hash(provider)
        provider.delete_cache()
        assert hash(provider) == before
    assert len({*complete, *complete}) == 2


@pytest.mark.spec("CACHE-8")
def test_a_mapping_of_buffers_is_read_only(building: WeightCacheProvider) -> None:
    for name in ("__setitem__", "__delitem__", "pop", "update", "clear", "setdefault"):
        assert not hasattr(building, name)


@pytest.mark.spec("CACHE-8")
def test_buffers_of_every_packer_are_kept(kind: Kind, building: WeightCacheProvider) -> None:
    source = WeightId(bytes(DIGEST_BYTES), "w")
    w = np.random.default_rng(0).standard_normal((37, 21), np.float32)
    keys = [matrix_key(layout_of(name, 37, 21), source) for name in ("f32", "bf16", "int8", "int4")]
    keys += [rows_key((37, 21), "f32", source), vectors_key(37 * 21, source)]
    expected: dict[PackKey, bytes] = {}
    for key in keys:
        pack = partial(pack_into, w.reshape(key.shape), key)
        expected[key] = building.get_or_pack(key, pack).tobytes()
        buffer = np.zeros(nbytes_of(key), np.uint8)
        list(pack(buffer))
        assert expected[key] == buffer.tobytes()
    assert contents(kind.complete(building)) == expected


@pytest.mark.spec("CACHE-9")
def test_a_miss_packs_once_and_hits_pack_nothing(kind: Kind, building: WeightCacheProvider) -> None:
    calls: list[int] = []
    building.reserve_space(4 * PAGE_BYTES)[:] = 0xA5
    for key in (B, D):
        assert_array_equal(building.get_or_pack(key, packing(noise(key), calls)), noise(key))
        assert_array_equal(building.get_or_pack(key, never), noise(key))
    assert calls == [0, 1]
    complete = kind.complete(building)
    assert_array_equal(complete.get_or_pack(B, never), noise(B))
    assert not complete.get_or_pack(B, never).flags.writeable
    assert list(complete) == [B, D]


@pytest.mark.spec("CACHE-9")
def test_packing_that_fails_leaves_no_key_and_no_trace(building: WeightCacheProvider) -> None:
    def fail(buffer: Bytes) -> Iterator[int]:
        buffer[:] = 0xA5
        yield PAGE_BYTES
        raise PackingError("a weight is NaN or infinity")

    with pytest.raises(PackingError, match="NaN"):
        building.get_or_pack(B, fail)
    assert B not in building
    assert_array_equal(building.get_or_pack(B, packing(noise(B), [])), noise(B))


@pytest.mark.spec("CACHE-9")
def test_once_complete_a_miss_is_packed_into_memory_of_the_callers_own(
    kind: Kind, building: WeightCacheProvider
) -> None:
    insert(building, A, noise(A))
    complete = kind.complete(building)
    calls: list[int] = []
    first, second = (complete.get_or_pack(B, packing(noise(B), calls)) for _ in range(2))
    assert calls == [0, 1]
    assert not np.shares_memory(first, second)
    first[:] = 0
    assert_array_equal(second, noise(B))
    assert B not in complete
    assert contents(complete) == {A: noise(A).tobytes()}


NOT_FITTING: dict[str, Callable[[], npt.NDArray[Any]]] = {
    "a byte less": lambda: np.zeros(nbytes_of(B) - 1, np.uint8),
    "a byte more": lambda: np.zeros(nbytes_of(B) + 1, np.uint8),
    "a page less": lambda: np.zeros(nbytes_of(B) - PAGE_BYTES, np.uint8),
    "a page more": lambda: np.zeros(nbytes_of(B) + PAGE_BYTES, np.uint8),
    "without the last page's rest": lambda: np.zeros(4 * B.shape[0], np.uint8),
    "nothing": lambda: np.zeros(0, np.uint8),
    "two rows": lambda: np.zeros((2, PAGE_BYTES), np.uint8),
    "signed bytes": lambda: np.zeros(nbytes_of(B), np.int8),
    "words": lambda: np.zeros(nbytes_of(B) // 4, np.float32),
    "as many words": lambda: np.zeros(nbytes_of(B), np.float32),
    "every second byte": lambda: np.zeros(2 * nbytes_of(B), np.uint8)[::2],
    "backwards": lambda: np.zeros(nbytes_of(B), np.uint8)[::-1],
}


@pytest.mark.spec("CACHE-10")
@pytest.mark.parametrize("buffer", list(NOT_FITTING.values()), ids=list(NOT_FITTING))
def test_a_buffer_of_another_size_or_type_is_refused(
    building: WeightCacheProvider, buffer: Callable[[], npt.NDArray[Any]]
) -> None:
    with pytest.raises(PackingError, match="'b' packs into 8192 bytes"):
        building.look_up_or_insert(B, buffer())
    assert B not in building
    assert len(building) == 0
    insert(building, B, noise(B))
    assert contents(building) == {B: noise(B).tobytes()}


@pytest.mark.spec("CACHE-10")
@pytest.mark.parametrize("nbytes", [1, PAGE_BYTES, 2 * PAGE_BYTES - 1, 2 * PAGE_BYTES + 1, 3 * PAGE_BYTES])
def test_reserved_space_of_another_size_is_refused_as_a_whole(building: WeightCacheProvider, nbytes: int) -> None:
    space = building.reserve_space(nbytes)
    with pytest.raises(PackingError, match="'b' packs into 8192 bytes"):
        building.look_up_or_insert(B, space)
    assert B not in building


@pytest.mark.spec("CACHE-10")
def test_a_key_that_no_packer_makes_is_refused(building: WeightCacheProvider) -> None:
    for key in (replace(A, packer="giu"), replace(A, shape=(1, 1014)), replace(A, packer="goi")):
        with pytest.raises(PackingError):
            building.look_up_or_insert(key, noise(A))
        assert key not in building


@pytest.mark.spec("CACHE-11")
@pytest.mark.parametrize("when", ["building", "complete"])
def test_views_still_held_stay_valid_after_deleting(kind: Kind, building: WeightCacheProvider, when: str) -> None:
    insert(building, A, noise(A))
    provider = building if when == "building" else kind.complete(building)
    late = B if when == "building" else A  # in a buffer that was copied, too
    provider.look_up_or_insert(late, noise(late))
    views = {key: provider[key] for key in provider}
    for _ in range(3):
        provider.delete_cache()
        for key, view in views.items():
            assert_array_equal(view, noise(key))
            assert not view.flags.writeable


@pytest.mark.spec("CACHE-11")
def test_views_held_since_the_building_stay_valid(kind: Kind, building: WeightCacheProvider) -> None:
    insert(building, A, noise(A))
    building.look_up_or_insert(B, noise(B))
    views = {key: building[key] for key in building}
    complete = kind.complete(building)
    complete.delete_cache()
    for key, view in views.items():
        assert_array_equal(view, noise(key))


@pytest.mark.spec("CACHE-11")
def test_a_new_provider_has_nothing_of_a_deleted_one(begin: Begin) -> None:
    first = begin()
    insert(first, A, noise(A))
    first.delete_cache()
    second = begin()
    assert (second.look_up(A), len(second), second.is_finalized()) == (None, 0, False)
    insert(second, A, noise(A, 1))
    assert contents(second) == {A: noise(A, 1).tobytes()}


@pytest.mark.spec("CACHE-12")
def test_any_number_of_threads_may_read_a_complete_provider(kind: Kind, building: WeightCacheProvider) -> None:
    keys = [key_of(f"tensor {i}", 1 + i % 3) for i in range(20)]
    for i, key in enumerate(keys):
        insert(building, key, noise(key, i))
    complete = kind.complete(building)
    missing = key_of("missing")
    n_threads = 16
    barrier, failures = threading.Barrier(n_threads), list[BaseException]()

    def read(seed: int) -> None:
        try:
            barrier.wait()
            for i in np.random.default_rng(seed).integers(0, len(keys), 40).tolist():
                offset = complete.look_up(keys[i])
                assert offset is not None
                expected = noise(keys[i], i)
                assert_array_equal(complete.offset_to_addr(offset), expected)
                assert_array_equal(complete.get_or_pack(keys[i], never), expected)
                assert complete.look_up_or_insert(keys[i], expected) == offset
                packed = complete.get_or_pack(missing, packing(noise(missing, seed), []))
                assert_array_equal(packed, noise(missing, seed))
                assert missing not in complete
                assert list(complete) == keys
                assert complete.is_finalized()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(n_threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


KEYS = {
    **{f"{name}{n_pages}": key_of(name, n_pages) for n_pages in (1, 2) for name in "abc"},
    "rows": rows_key((3, 5), "f16", A.weights),
    "matrix": matrix_key(layout_of("f32", 17, 60), A.weights),
}
a_key = st.sampled_from(list(KEYS))
a_fill = st.integers(1, 3)  # few, so that buffers are often equal


class Life(RuleBasedStateMachine):
    """A provider from its beginning to its end, beside a `dict` that does the same."""

    kind: Kind

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.cache = self.kind.begin(Path(self.folder.name))
        self.state = "building"
        self.model: dict[PackKey, bytes] = {}
        self.offsets: dict[PackKey, int] = {}
        self.space: Bytes | None = None
        self.superseded: list[Bytes] = []  # space of reservations before this one
        self.left: Bytes | None = None  # space that was never committed, once the building is over
        self.held: list[tuple[Bytes, bytes]] = []

    def commit(self, key: PackKey, buffer: Bytes) -> None:
        """Insert, in any state but the last, what may be new."""
        data = buffer.tobytes()
        if key not in self.model and self.state == "complete":
            with pytest.raises(WeightCacheStateError):
                self.cache.look_up_or_insert(key, buffer)
            return
        offset = self.cache.look_up_or_insert(key, buffer)
        if key in self.model:
            assert offset == self.offsets[key]
            return
        assert all(data == self.model[other] for other in self.model if offset == self.offsets[other])
        self.model[key], self.offsets[key], self.space = data, offset, None

    @precondition(lambda self: self.state == "building")
    @rule(nbytes=st.integers(1, 4).map(lambda n: n * PAGE_BYTES) | st.integers(1, 3 * PAGE_BYTES))
    def reserve(self, nbytes: int) -> None:
        if self.space is not None:
            self.superseded = [self.space]
        self.space = self.cache.reserve_space(nbytes)
        assert self.space.shape == (nbytes,)
        assert self.space.ctypes.data % PAGE_BYTES == 0
        assert not self.space.any()
        self.space[:] = 0xA5

    @precondition(lambda self: self.space is not None)
    @rule(name=a_key, fill=a_fill, view=st.sampled_from(list(VIEWS)))
    def commit_reserved(self, name: str, fill: int, view: str) -> None:
        nbytes = nbytes_of(KEYS[name])
        if self.space is not None and self.space.size >= nbytes:
            self.space[:nbytes] = fill
            self.commit(KEYS[name], VIEWS[view](self.space[:nbytes]))

    @precondition(lambda self: self.space is not None)
    @rule(name=a_key, fill=a_fill, start=st.sampled_from([1, 5, PAGE_BYTES - 1, PAGE_BYTES, 2 * PAGE_BYTES]))
    def commit_what_lies_inside(self, name: str, fill: int, start: int) -> None:
        nbytes = nbytes_of(KEYS[name])
        if self.space is not None and self.space.size >= start + nbytes:
            self.space[:] = 0xA5
            self.space[start : start + nbytes] = fill
            self.commit(KEYS[name], self.space[start : start + nbytes])

    @precondition(lambda self: self.superseded and self.state == "building")
    @rule(name=a_key)
    def commit_superseded(self, name: str) -> None:
        key, nbytes = KEYS[name], nbytes_of(KEYS[name])
        space = self.superseded[-1]
        if space.size < nbytes or key in self.model:
            return
        if self.kind.begin is in_file:
            with pytest.raises(WeightCacheStateError, match="other space was reserved"):
                self.cache.look_up_or_insert(key, space[:nbytes])
        else:
            self.commit(key, space[:nbytes])

    @precondition(lambda self: self.left is not None)
    @rule(fill=a_fill)
    def write_to_what_was_never_committed(self, fill: int) -> None:
        if self.left is not None:
            self.left[:] = fill

    @precondition(lambda self: self.state != "deleted")
    @rule(name=a_key, fill=a_fill)
    def commit_foreign(self, name: str, fill: int) -> None:
        buffer = np.full(nbytes_of(KEYS[name]), fill, np.uint8)
        self.commit(KEYS[name], buffer)
        buffer[:] = 0

    @precondition(lambda self: self.state != "deleted")
    @rule(name=a_key, committed=a_key)
    def commit_what_is_there(self, name: str, committed: str) -> None:
        if KEYS[committed] in self.model and nbytes_of(KEYS[name]) == nbytes_of(KEYS[committed]):
            self.commit(KEYS[name], self.cache[KEYS[committed]])

    @precondition(lambda self: self.state == "building")
    @rule(name=a_key, by=st.sampled_from([-PAGE_BYTES, -1, 1, PAGE_BYTES]), reserved=st.booleans())
    def commit_another_size(self, name: str, by: int, reserved: bool) -> None:
        nbytes = nbytes_of(KEYS[name]) + by
        if KEYS[name] not in self.model and nbytes > 0:
            buffer = np.zeros(nbytes, np.uint8)
            if reserved:
                self.space = buffer = self.cache.reserve_space(nbytes)
            with pytest.raises(PackingError):
                self.cache.look_up_or_insert(KEYS[name], buffer)

    @precondition(lambda self: self.state != "deleted")
    @rule(name=a_key, fill=a_fill, fails=st.booleans())
    def get_or_pack(self, name: str, fill: int, fails: bool) -> None:
        key = KEYS[name]
        if key in self.model:
            assert self.cache.get_or_pack(key, never).tobytes() == self.model[key]
            return

        def pack(buffer: Bytes) -> Iterator[int]:
            assert buffer.shape == (nbytes_of(key),)
            assert not buffer.any()
            buffer[:] = fill
            yield 1
            if fails:
                raise PackingError("this cannot be packed")

        self.space = None
        if fails:
            with pytest.raises(PackingError, match="this cannot be packed"):
                self.cache.get_or_pack(key, pack)
            return
        buffer = self.cache.get_or_pack(key, pack)
        assert buffer.tobytes() == bytes([fill]) * nbytes_of(key)
        if self.state == "building":
            offset = self.cache.look_up(key)
            assert offset is not None
            self.model[key], self.offsets[key] = buffer.tobytes(), offset

    @precondition(lambda self: self.state != "deleted")
    @rule(offset=st.integers(-10, 20).map(lambda n: n * PAGE_BYTES // 2))
    def ask_for_an_offset(self, offset: int) -> None:
        if offset not in self.offsets.values():
            with pytest.raises(WeightCacheStateError):
                self.cache.offset_to_addr(offset)

    @precondition(lambda self: self.state != "deleted")
    @rule(name=a_key)
    def hold_a_view(self, name: str) -> None:
        if KEYS[name] in self.model:
            self.held.append((self.cache[KEYS[name]], self.model[KEYS[name]]))

    @precondition(lambda self: self.state == "complete")
    @rule()
    def reserve_once_complete(self) -> None:
        with pytest.raises(WeightCacheStateError):
            self.cache.reserve_space(PAGE_BYTES)

    @precondition(lambda self: self.state == "building" and len(self.model) > 2)
    @rule()
    def complete(self) -> None:
        self.cache = self.kind.complete(self.cache)
        self.state, self.left, self.space = "complete", self.space, None
        self.superseded = []
        self.offsets = {key: offset for key in self.model if (offset := self.cache.look_up(key)) is not None}

    @precondition(lambda self: self.state == "complete")
    @rule()
    def finalize_again(self) -> None:
        self.cache.finalize()

    @precondition(lambda self: len(self.model) > 3)
    @rule()
    def delete(self) -> None:
        self.cache.delete_cache()
        self.state, self.space = "deleted", None
        for call, name, states in VERBS.values():
            if "deleted" not in states:
                with pytest.raises(WeightCacheStateError, match=name):
                    call(self.cache, PAGE_BYTES)

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        assert self.cache.is_finalized() == (self.state != "building")
        for view, data in self.held:
            assert view.tobytes() == data
        if self.state != "deleted":
            assert list(self.cache) == list(self.model)
            assert len(self.cache) == len(self.model)
            for key in KEYS.values():
                assert self.cache.look_up(key) == self.offsets.get(key)
                assert (key in self.cache) == (key in self.model)
            for key, data in self.model.items():
                view = self.cache.offset_to_addr(self.offsets[key])
                assert view.tobytes() == self.cache[key].tobytes() == data
                assert not view.flags.writeable

    def teardown(self) -> None:
        self.cache.delete_cache()
        for view, data in self.held:
            assert view.tobytes() == data
        self.folder.cleanup()


def live(kind: Kind, phases: Sequence[Phase] = (Phase.generate, Phase.shrink)) -> None:
    """Let providers of a kind live many lives, and say in as few steps as possible what went wrong in one."""
    machine = type("Life", (Life,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=30, stateful_step_count=30, phases=phases))


@pytest.mark.spec("CACHE-1", "CACHE-2", "CACHE-3", "CACHE-5", "CACHE-7", "CACHE-8", "CACHE-9", "CACHE-10", "CACHE-11")
def test_whatever_is_done_with_it_a_provider_is_a_dictionary(kind: Kind) -> None:
    live(kind)


class LastOneWins(MemoryWeightCacheProvider):
    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        if key in self._offsets and not self.is_finalized():
            self._buffers[self._offsets[key]] = buffer.copy()
        return super().look_up_or_insert(key, buffer)


class ReservesWhatWasThere(MemoryWeightCacheProvider):
    def reserve_space(self, nbytes: int) -> Bytes:
        space = super().reserve_space(nbytes)
        space[nbytes // 2] = len(self._offsets) > 2
        return space


class CopiesNothing(MemoryWeightCacheProvider):
    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        offset = super().look_up_or_insert(key, buffer)
        self._buffers[offset] = buffer.view()
        self._buffers[offset].flags.writeable = False
        return offset


class GivesWritableViews(MemoryWeightCacheProvider):
    def offset_to_addr(self, offset: int) -> Bytes:
        view = super().offset_to_addr(offset)
        view.flags.writeable = self.is_finalized()
        return view


class KnowsNoOrder(MemoryWeightCacheProvider):
    def __iter__(self) -> Iterator[PackKey]:
        return iter(sorted(self._offsets, key=lambda key: key.name))


class ForgetsItsEnd(MemoryWeightCacheProvider):
    def delete_cache(self) -> None:
        self._reserved = None


class TakesAnySize(MemoryWeightCacheProvider):
    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        return super().look_up_or_insert(key, np.resize(buffer, nbytes_of(key)))


BROKEN = [
    LastOneWins,
    ReservesWhatWasThere,
    CopiesNothing,
    GivesWritableViews,
    KnowsNoOrder,
    ForgetsItsEnd,
    TakesAnySize,
]


@pytest.mark.spec("CACHE-2", "CACHE-3", "CACHE-4", "CACHE-5", "CACHE-7", "CACHE-8", "CACHE-10")
@pytest.mark.parametrize("broken", BROKEN)
def test_a_provider_that_is_no_such_dictionary_is_found_out(broken: type[MemoryWeightCacheProvider]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        live(Kind(lambda _: broken(), finalized), phases=[Phase.generate])


OWN = '''
import numpy as np

from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.weight_cache.provider import DictFace, State, require, require_fitting


class Own(DictFace):
    """Keeps buffers in a list; an offset is a place in it."""

    def __init__(self):
        self.state, self.space, self.keys_, self.buffers = State.BUILDING, None, [], []

    def look_up(self, key):
        require("look_up", self.state)
        return self.keys_.index(key) if key in self.keys_ else None

    def reserve_space(self, nbytes):
        require("reserve_space", self.state)
        if nbytes < 1:
            raise PackingError(f"at least one byte, not {nbytes}")
        memory = np.zeros(nbytes + 4096, np.uint8)
        self.space = memory[-memory.ctypes.data % 4096 :][:nbytes]
        return self.space

    def look_up_or_insert(self, key, buffer):
        require("look_up_or_insert", self.state)
        if key in self.keys_:
            return self.keys_.index(key)
        if self.is_finalized():
            raise WeightCacheStateError("finalized: nothing can be inserted")
        require_fitting(key, buffer)
        in_place = self.space is not None and buffer.ctypes.data == self.space.ctypes.data
        kept = self.space[: buffer.size] if in_place else buffer.copy()
        kept.flags.writeable, self.space = False, None
        self.keys_.append(key)
        self.buffers.append(kept)
        return len(self.keys_) - 1

    def offset_to_addr(self, offset):
        require("offset_to_addr", self.state)
        if not 0 <= offset < len(self.buffers):
            raise WeightCacheStateError(f"nothing was ever inserted at {offset}")
        return self.buffers[offset]

    def is_finalized(self):
        return self.state is not State.BUILDING

    def finalize(self):
        require("finalize", self.state)
        self.state = State.FINALIZED

    def delete_cache(self):
        self.state, self.space, self.keys_, self.buffers = State.DELETED, None, [], []

    def __iter__(self):
        return iter(self.keys_)

    def __len__(self):
        return len(self.keys_)
'''

LAST_ONE_WINS = (
    "            return self.keys_.index(key)",
    "            self.buffers[self.keys_.index(key)] = buffer.copy()\n            return self.keys_.index(key)",
)


def suite_on(folder: Path, source: str, of: str) -> subprocess.CompletedProcess[str]:
    """Run those tests of this file in another process on the class `Own` of a module with that source."""
    (folder / "mine.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--provider", "mine:Own"]
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    return subprocess.run(
        [*command, "-k", of, __file__],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.spec("CACHE-1", "CACHE-3", "CACHE-7", "CACHE-8")
def test_somebody_elses_correct_provider_passes_and_no_other_is_tested(tmp_path: Path) -> None:
    done = suite_on(tmp_path, OWN, "mine or releases")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is_a_dictionary[mine:Own] PASSED" in done.stdout
    assert "existing_key_wins_and_the_data_is_dropped[mine:Own] PASSED" in done.stdout
    assert "deleting_a_provider_in_memory_releases_its_memory PASSED" in done.stdout
    assert not re.search(r"\[(memory|file|loaded file)\b", done.stdout)


@pytest.mark.spec("CACHE-3")
def test_somebody_elses_provider_that_lets_the_last_one_win_fails(tmp_path: Path) -> None:
    assert LAST_ONE_WINS[0] in OWN
    done = suite_on(tmp_path, OWN.replace(*LAST_ONE_WINS), "existing_key or reserved_space")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "existing_key_wins_and_the_data_is_dropped[mine:Own] FAILED" in done.stdout
    assert "reserved_space_is_that_many_zeros_on_a_page[mine:Own-1] PASSED" in done.stdout


@pytest.mark.spec("CACHE-1")
@pytest.mark.parametrize("name", ["mine", "mine:None", "nobody:Own", ":Own"])
def test_somebody_elses_class_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(pytest.UsageError, match=f"--provider {name}: "):
            imported(name)


@pytest.mark.spec("CACHE-11")
def test_deleting_a_provider_in_memory_releases_its_memory() -> None:
    key = key_of("large", 2000)
    tracemalloc.start()
    try:
        provider = MemoryWeightCacheProvider()
        provider.look_up_or_insert(key, np.ones(nbytes_of(key), np.uint8))
        assert tracemalloc.get_traced_memory()[0] > nbytes_of(key)
        provider.delete_cache()
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def is_open(path: Path) -> bool:
    links = Path("/proc/self/fd").iterdir()
    return path in {link.readlink() for link in links if link.is_symlink()}


@pytest.mark.spec("CACHE-11")
@pytest.mark.parametrize("complete", [finalized, loaded])
def test_deleting_a_provider_in_a_file_releases_the_mapping_but_not_the_file(
    tmp_path: Path, complete: Callable[[WeightCacheProvider], WeightCacheProvider]
) -> None:
    path = tmp_path / "cache"
    building = FileWeightCacheProvider.build(path)
    insert(building, A, noise(A))
    provider = complete(building)
    assert is_mapped(path)
    before = path.read_bytes()
    view = provider[A]
    provider.delete_cache()
    assert is_mapped(path)
    assert view.tobytes() == noise(A).tobytes()
    del view
    assert not is_mapped(path)
    assert not is_open(path)
    assert path.read_bytes() == before
    assert contents(FileWeightCacheProvider.load(path)) == {A: noise(A).tobytes()}


@pytest.mark.spec("CACHE-11")
def test_deleting_an_unfinished_provider_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    for before in (None, noise(C).tobytes()):
        if before is not None:
            path.write_bytes(before)
        provider = FileWeightCacheProvider.build(path)
        insert(provider, A, noise(A))
        space = provider.reserve_space(PAGE_BYTES)
        provider.delete_cache()
        space[:] = 1  # nobody's any more, but still memory
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("cache", before)] if before else [])
