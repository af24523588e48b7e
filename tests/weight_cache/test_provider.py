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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.testing import assert_array_equal

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import CacheFileError, PackingError, WeightCacheStateError
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
        assert (space.dtype, space.shape) == (np.uint8, (nbytes,))
        assert space.ctypes.data % PAGE_BYTES == 0
        assert space.flags.writeable
        assert space.flags.c_contiguous
        assert not space.any()
        space[:] = 0xA5  # and is never committed


@pytest.mark.spec("CACHE-2")
@pytest.mark.parametrize("first", [1, 4096, 8192, 20_000])
@pytest.mark.parametrize("then", [1, 4096, 8192, 20_000])
def test_a_reservation_that_was_never_committed_leaves_no_trace(
    building: WeightCacheProvider, first: int, then: int
) -> None:
    building.reserve_space(first)[:] = 0xA5
    assert not building.reserve_space(then).any()


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
    with pytest.raises(WeightCacheStateError, match="finalized|loaded|complete"):
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
    "memory": lambda space: np.frombuffer(memoryview(space), np.uint8),
}


@pytest.mark.spec("CACHE-4")
@pytest.mark.parametrize("view", list(VIEWS.values()), ids=list(VIEWS))
@pytest.mark.parametrize("beyond", [0, 1, PAGE_BYTES, 3 * PAGE_BYTES])
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


@pytest.fixture
def unless_in_a_file(request: pytest.FixtureRequest, kind: Kind) -> None:
    """Expect a failure where reservations share the bytes of the file to come."""
    if kind.begin is in_file:
        reason = "a later reservation clears the file's bytes that an earlier one still shows"
        request.applymarker(pytest.mark.xfail(reason=reason))


@pytest.mark.spec("CACHE-4")
@pytest.mark.usefixtures("unless_in_a_file")
@pytest.mark.parametrize("start", [1, PAGE_BYTES, PAGE_BYTES + 1])
def test_a_buffer_further_on_in_reserved_space_is_committed_as_it_is(building: WeightCacheProvider, start: int) -> None:
    space = building.reserve_space(3 * PAGE_BYTES + 1)
    space[start : start + 2 * PAGE_BYTES] = noise(B)
    building.look_up_or_insert(B, space[start : start + 2 * PAGE_BYTES])
    assert building[B].tobytes() == noise(B).tobytes()


@pytest.mark.spec("CACHE-4")
@pytest.mark.usefixtures("unless_in_a_file")
def test_a_buffer_from_elsewhere_does_not_disturb_one_that_is_being_packed(building: WeightCacheProvider) -> None:
    space = building.reserve_space(PAGE_BYTES)
    space[:] = noise(A)
    building.look_up_or_insert(C, noise(C, 1))
    building.look_up_or_insert(A, space)
    assert contents(building) == {C: noise(C, 1).tobytes(), A: noise(A).tobytes()}


@pytest.mark.spec("CACHE-5")
def test_the_committed_bytes_can_be_read_but_not_written(kind: Kind, building: WeightCacheProvider) -> None:
    for i, key in enumerate((A, B, D)):
        insert(building, key, noise(key, i))

    def check(provider: WeightCacheProvider) -> None:
        for i, key in enumerate((A, B, D)):
            offset = provider.look_up(key)
            assert offset is not None
            for view in (provider.offset_to_addr(offset), provider[key]):
                assert (view.dtype, view.shape) == (np.uint8, (nbytes_of(key),))
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
    with pytest.raises(WeightCacheStateError, match="0"):
        building.offset_to_addr(0)
    given = {insert(building, key, noise(key)) for key in (A, B)}
    building.reserve_space(PAGE_BYTES)
    around = {offset + by for offset in given for by in (-PAGE_BYTES, -1, 1, PAGE_BYTES, 2 * PAGE_BYTES)}
    for provider in (building, kind.complete(building)):
        if State.DELETED in ALLOWED and provider.is_finalized() and provider is building is not None:
            continue
        for offset in (around | {-1, 1 << 40, 1 << 70}) - given:
            with pytest.raises(WeightCacheStateError, match=str(offset)):
                provider.offset_to_addr(offset)


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


Call = Callable[[WeightCacheProvider], object]

# Each verb, what a refusal says, and the states that have it; A is there, C is not.
VERBS: dict[str, tuple[Call, str, set[str]]] = {
    "look_up": (lambda p: p.look_up(A), "look_up", {"building", "complete"}),
    "look_up of another": (lambda p: p.look_up(C), "look_up", {"building", "complete"}),
    "offset_to_addr": (lambda p: p.offset_to_addr(OFFSETS[id(p)]), "offset_to_addr", {"building", "complete"}),
    "insert": (lambda p: p.look_up_or_insert(C, noise(C)), "look_up_or_insert|inserted", {"building"}),
    "insert again": (lambda p: p.look_up_or_insert(A, noise(A)), "look_up_or_insert", {"building", "complete"}),
    "reserve_space": (lambda p: p.reserve_space(PAGE_BYTES), "reserve_space", {"building"}),
    "finalize": (lambda p: p.finalize(), "finalize", {"building", "complete"}),
    "is_finalized": (lambda p: p.is_finalized(), "", {"building", "complete", "deleted"}),
    "delete_cache": (lambda p: p.delete_cache(), "", {"building", "complete", "deleted"}),
    "[]": (lambda p: p[A], "look_up", {"building", "complete"}),
    "in": (lambda p: A in p, "look_up", {"building", "complete"}),
    "get_or_pack": (lambda p: p.get_or_pack(A, never), "look_up", {"building", "complete"}),
    "get_or_pack of another": (
        lambda p: p.get_or_pack(C, packing(noise(C), [])),
        "look_up",
        {"building", "complete"},
    ),
}
OFFSETS: dict[int, int] = {}


@pytest.mark.spec("CACHE-7")
@pytest.mark.parametrize("state", ["building", "complete", "deleted while building", "deleted"])
@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_works_in_its_states_and_is_refused_by_name_in_others(
    kind: Kind, building: WeightCacheProvider, verb: str, state: str
) -> None:
    offset = insert(building, A, noise(A))
    provider = building if state in {"building", "deleted while building"} else kind.complete(building)
    OFFSETS[id(provider)] = offset
    if state.startswith("deleted"):
        provider.delete_cache()
    call, name, states = VERBS[verb]
    if state.split()[0] in states:
        call(provider)
        return
    for _ in range(2):
        with pytest.raises(WeightCacheStateError, match=name):
            call(provider)
    if state == "complete":
        assert contents(provider) == {A: noise(A).tobytes()}


@pytest.mark.spec("CACHE-7")
def test_the_table_of_verbs_and_states_says_the_same() -> None:
    named = {"building": {State.BUILDING}, "complete": {State.FINALIZED, State.LOADED}, "deleted": {State.DELETED}}
    table = {
        verb: set[State]().union(
            *(named[state] for state in VERBS.get(f"{verb} again", VERBS.get(verb, VERBS["insert again"]))[2])
        )
        for verb in ALLOWED
    }
    assert table == ALLOWED


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
            for i in np.random.default_rng(seed).integers(0, len(keys), 100).tolist():
                offset = complete.look_up(keys[i])
                assert offset is not None
                expected = noise(keys[i], i)
                assert_array_equal(complete.offset_to_addr(offset), expected)
                assert_array_equal(complete.get_or_pack(keys[i], never), expected)
                assert complete.look_up_or_insert(keys[i], expected) == offset
                assert_array_equal(
                    complete.get_or_pack(missing, packing(noise(missing, seed), [])), noise(missing, seed)
                )
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


KEYS = [
    *(key_of(name, n_pages) for n_pages in (1, 2) for name in ("a", "b", "c")),
    rows_key((3, 5), "f16", WeightId(bytes(DIGEST_BYTES), "a")),
    matrix_key(layout_of("f32", 17, 60), WeightId(bytes(DIGEST_BYTES), "a")),
]
a_key = st.sampled_from(KEYS)
a_fill = st.integers(1, 3)  # few, so that buffers are often equal


class Life(RuleBasedStateMachine):
    """A provider from its beginning to its end, beside a `dict` that does the same."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.folder = tempfile.TemporaryDirectory()
        self.model: dict[PackKey, bytes] = {}
        self.offsets: dict[PackKey, int] = {}
        self.state = "building"
        self.space: Bytes | None = None
        self.held: list[tuple[Bytes, bytes]] = []

    @initialize()
    def begin(self) -> None:
        self.cache = self.kind.begin(Path(self.folder.name))

    def commit(self, key: PackKey, buffer: Bytes) -> None:
        """Insert, in any state, what may be new."""
        data = buffer.tobytes()
        if key not in self.model and self.state == "complete":
            with pytest.raises(WeightCacheStateError):
                self.cache.look_up_or_insert(key, buffer)
            return
        offset = self.cache.look_up_or_insert(key, buffer)
        if key in self.model:
            assert offset == self.offsets[key]
            return
        assert all(data == self.model[k] for k, other in self.offsets.items() if other == offset)
        self.model[key], self.offsets[key], self.space = data, offset, None

    @precondition(lambda self: self.state == "building")
    @rule(nbytes=st.integers(1, 4).map(lambda n: n * PAGE_BYTES) | st.integers(1, 3 * PAGE_BYTES))
    def reserve(self, nbytes: int) -> None:
        self.space = self.cache.reserve_space(nbytes)
        assert self.space.shape == (nbytes,)
        assert self.space.ctypes.data % PAGE_BYTES == 0
        assert not self.space.any()
        self.space[:] = 0xA5

    @precondition(lambda self: self.space is not None)
    @rule(key=a_key, fill=a_fill, view=st.sampled_from(list(VIEWS)))
    def commit_reserved(self, key: PackKey, fill: int, view: str) -> None:
        assert self.space is not None
        if self.space.size >= nbytes_of(key):
            buffer = self.space[: nbytes_of(key)]
            buffer[:] = fill
            self.commit(key, VIEWS[view](buffer))

    @precondition(lambda self: self.state != "deleted")
    @rule(key=a_key, fill=a_fill)
    def commit_foreign(self, key: PackKey, fill: int) -> None:
        buffer = np.full(nbytes_of(key), fill, np.uint8)
        self.commit(key, buffer)
        buffer[:] = 0

    @precondition(lambda self: self.state != "deleted" and self.model)
    @rule(key=a_key, data=st.data())
    def commit_what_is_there(self, key: PackKey, data: st.DataObject) -> None:
        view = self.cache[data.draw(st.sampled_from(list(self.model)))]
        if view.size == nbytes_of(key):
            self.commit(key, view)

    @precondition(lambda self: self.state == "building")
    @rule(key=a_key, by=st.sampled_from([-PAGE_BYTES, -1, 1, PAGE_BYTES]), reserved=st.booleans())
    def commit_another_size(self, key: PackKey, by: int, reserved: bool) -> None:
        nbytes = nbytes_of(key) + by
        if key in self.model or nbytes < 1:
            return
        if reserved:
            self.reserve(nbytes)
        with pytest.raises(PackingError):
            self.cache.look_up_or_insert(
                key, self.space if reserved and self.space is not None else np.zeros(nbytes, np.uint8)
            )

    @precondition(lambda self: self.state != "deleted")
    @rule(key=a_key, fill=a_fill, fails=st.booleans())
    def get_or_pack(self, key: PackKey, fill: int, fails: bool) -> None:
        calls: list[int] = []

        def pack(buffer: Bytes) -> Iterator[int]:
            calls.append(buffer.size)
            assert not buffer.any()
            buffer[:] = fill
            yield 1
            if fails:
                raise PackingError("this cannot be packed")

        hit, before = key in self.model, list(self.model)
        if not hit:
            self.space = None
        if fails and not hit:
            with pytest.raises(PackingError):
                self.cache.get_or_pack(key, pack)
            assert list(self.cache) == before
            return
        buffer = self.cache.get_or_pack(key, pack)
        assert calls == ([] if hit else [nbytes_of(key)])
        if hit:
            assert buffer.tobytes() == self.model[key]
            return
        assert (buffer == fill).all()
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

    @precondition(lambda self: self.state != "deleted" and self.model)
    @rule(data=st.data())
    def hold_a_view(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.model)))
        self.held.append((self.cache[key], self.model[key]))

    @precondition(lambda self: self.state == "complete")
    @rule()
    def reserve_once_complete(self) -> None:
        with pytest.raises(WeightCacheStateError):
            self.cache.reserve_space(PAGE_BYTES)

    @precondition(lambda self: len(self.model) > 2 or self.state == "complete")
    @rule()
    def complete(self) -> None:
        if self.state == "building":
            self.cache = self.kind.complete(self.cache)
            self.state, self.space = "complete", None
            self.offsets = {key: offset for key in self.model if (offset := self.cache.look_up(key)) is not None}
        self.cache.finalize()

    @precondition(lambda self: len(self.model) > 3)
    @rule()
    def delete(self) -> None:
        self.cache.delete_cache()
        self.state, self.space = "deleted", None
        for call, name, states in VERBS.values():
            if "deleted" not in states and name != "offset_to_addr":
                with pytest.raises(WeightCacheStateError, match=name):
                    call(self.cache)
        with pytest.raises(WeightCacheStateError):
            self.cache.offset_to_addr(PAGE_BYTES)

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        assert self.cache.is_finalized() == (self.state != "building")
        for view, data in self.held:
            assert view.tobytes() == data
        if self.state != "deleted":
            assert list(self.cache) == list(self.model)
            assert len(self.cache) == len(self.model)
            for key in KEYS:
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


@pytest.mark.spec("CACHE-1", "CACHE-2", "CACHE-3", "CACHE-5", "CACHE-7", "CACHE-8", "CACHE-9", "CACHE-10", "CACHE-11")
def test_whatever_is_done_with_it_a_provider_is_a_dictionary(kind: Kind) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        partial(Life, kind), settings=settings(max_examples=40, stateful_step_count=30)
    )
