"""Specifies `refinfer.weight_cache.provider`, for any provider: `pytest --provider package:Class`.

Without the option, the suite runs on the providers in memory and in a file.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_array_equal

from provider_kinds import (
    KINDS,
    VERBS,
    VIEWS,
    A,
    B,
    Begin,
    C,
    D,
    Kind,
    beginning,
    contents,
    imported,
    insert,
    key_of,
    never,
    noise,
    packing,
)
from provider_life import live
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.packing.formats import layout_of
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey, WeightId
from refinfer.weight_cache.packers import matrix_key, pack_into, padded_nbytes_of, rows_key, vectors_key
from refinfer.weight_cache.provider import ALLOWED, State, WeightCacheProvider


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        own: str | None = metafunc.config.getoption("provider")
        kinds = {own: imported(own)} if own else KINDS
        metafunc.parametrize("kind", list(kinds.values()), ids=list(kinds))


@pytest.fixture
def begin(kind: Kind, tmp_path: Path) -> Iterator[Begin]:
    """Return what begins empty providers."""
    with beginning(kind, tmp_path) as begin:
        yield begin


@pytest.fixture
def building(begin: Begin) -> WeightCacheProvider:
    """One empty provider."""
    return begin()


@pytest.mark.spec("CACHE-1")
def test_look_up_gives_the_offset_of_a_buffer_or_none(kind: Kind, building: WeightCacheProvider) -> None:
    assert building.look_up(A) is None
    offsets = {key: insert(building, key, noise(key, i)) for i, key in enumerate((A, B, C))}
    complete = kind.complete(building)
    for provider in (building, complete) if complete is building else (complete,):
        assert {key: provider.look_up(key) for key in (A, B, C)} == offsets
        assert provider.look_up(D) is None
        assert provider.look_up(replace(A, chunk_nbytes=PAGE_BYTES)) is None
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


@pytest.mark.spec("CACHE-10")
@pytest.mark.parametrize("nbytes", [0, -1, -4096])
def test_less_than_a_byte_cannot_be_reserved(building: WeightCacheProvider, nbytes: int) -> None:
    with pytest.raises(PackingError):
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
    for again in (noise(A, 1), noise(A), noise(B), noise(A)[:-1]):  # whatever its size
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
    with pytest.raises(WeightCacheStateError):
        complete.look_up_or_insert(C, noise(C))
    assert contents(complete) == {A: noise(A).tobytes()}


@pytest.mark.spec("CACHE-3")
def test_equal_bytes_under_different_keys_are_found_under_both(kind: Kind, building: WeightCacheProvider) -> None:
    for key in (A, C):
        insert(building, key, noise(A))
    complete = kind.complete(building)
    assert contents(complete) == dict.fromkeys((A, C), noise(A).tobytes())


@pytest.mark.spec("CACHE-4")
@pytest.mark.parametrize("view", list(VIEWS.values()), ids=list(VIEWS))
@pytest.mark.parametrize("beyond", [0, PAGE_BYTES + 1])
def test_a_buffer_in_reserved_space_is_kept_in_place_whichever_view_of_it(
    building: WeightCacheProvider, view: Callable[[Bytes], Bytes], beyond: int
) -> None:
    insert(building, A, noise(A))
    space = building.reserve_space(padded_nbytes_of(B) + beyond)[: padded_nbytes_of(B)]
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
def test_a_buffer_that_was_committed_is_copied_when_it_is_committed_again(
    kind: Kind, building: WeightCacheProvider
) -> None:
    space = building.reserve_space(PAGE_BYTES)
    space[:] = noise(A)
    shorter = vectors_key(1000, WeightId(bytes(DIGEST_BYTES), "shorter"))  # in a page, too
    for key in (A, C, shorter):
        building.look_up_or_insert(key, space)
    insert(building, B, noise(B))
    expected = {**dict.fromkeys((A, C, shorter), noise(A).tobytes()), B: noise(B).tobytes()}
    assert contents(building) == expected
    assert contents(kind.complete(building)) == expected


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
    """Have something else take the place of what was reserved before, and return what the provider holds then."""
    if how == "a buffer from elsewhere":
        provider.look_up_or_insert(C, noise(C, 1))
    elif how == "another buffer":
        insert(provider, C, noise(C, 1))
    else:
        provider.reserve_space(PAGE_BYTES)[:] = 0xA5
        return {}
    return {C: noise(C, 1).tobytes()}


@pytest.mark.spec("CACHE-4")
@pytest.mark.parametrize("view", list(VIEWS.values()), ids=list(VIEWS))
@pytest.mark.parametrize("way", ["a buffer from elsewhere", "another buffer", "another reservation"])
def test_space_whose_place_another_reservation_took_is_copied(
    kind: Kind, building: WeightCacheProvider, way: str, view: Callable[[Bytes], Bytes]
) -> None:
    space = building.reserve_space(PAGE_BYTES)
    space[:] = noise(A)
    expected = in_the_way(building, way)
    kept = building.offset_to_addr(building.look_up_or_insert(A, view(space)))
    assert_array_equal(kept, noise(A))
    expected[A] = noise(A).tobytes()
    assert contents(building) == expected
    insert(building, B, noise(B))
    assert contents(kind.complete(building)) == {**expected, B: noise(B).tobytes()}


@pytest.mark.spec("CACHE-4")
def test_the_rest_of_space_whose_beginning_was_committed_is_copied(kind: Kind, building: WeightCacheProvider) -> None:
    space = building.reserve_space(3 * PAGE_BYTES)
    space[:PAGE_BYTES], space[PAGE_BYTES:] = noise(A), noise(B)
    building.look_up_or_insert(A, space[:PAGE_BYTES])
    building.look_up_or_insert(B, space[PAGE_BYTES:])
    expected = {A: noise(A).tobytes(), B: noise(B).tobytes()}
    assert contents(building) == expected
    assert contents(kind.complete(building)) == expected


@pytest.mark.spec("CACHE-4", "CACHE-9")
def test_what_is_packed_on_a_miss_while_building_is_packed_into_reserved_space(
    building: WeightCacheProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, reserved, given = type(building).reserve_space, list[Bytes](), list[Bytes]()

    def reserve_space(self: WeightCacheProvider, nbytes: int) -> Bytes:
        reserved.append(reserve(self, nbytes))
        return reserved[-1]

    def pack(buffer: Bytes) -> Iterable[int]:
        given.append(buffer)
        return ()

    monkeypatch.setattr(type(building), "reserve_space", reserve_space)
    building.get_or_pack(A, pack)
    assert len(reserved) == len(given) == 1
    assert given[0] is reserved[0]


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
            with pytest.raises(WeightCacheStateError):
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
    with pytest.raises(KeyError):
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
        buffer = np.zeros(padded_nbytes_of(key), np.uint8)
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
    "a byte less": lambda: np.zeros(padded_nbytes_of(B) - 1, np.uint8),
    "a byte more": lambda: np.zeros(padded_nbytes_of(B) + 1, np.uint8),
    "a page less": lambda: np.zeros(padded_nbytes_of(B) - PAGE_BYTES, np.uint8),
    "a page more": lambda: np.zeros(padded_nbytes_of(B) + PAGE_BYTES, np.uint8),
    "without the last page's rest": lambda: np.zeros(4 * B.shape[0], np.uint8),
    "nothing": lambda: np.zeros(0, np.uint8),
    "two rows": lambda: np.zeros((2, PAGE_BYTES), np.uint8),
    "signed bytes": lambda: np.zeros(padded_nbytes_of(B), np.int8),
    "words": lambda: np.zeros(padded_nbytes_of(B) // 4, np.float32),
    "as many words": lambda: np.zeros(padded_nbytes_of(B), np.float32),
    "every second byte": lambda: np.zeros(2 * padded_nbytes_of(B), np.uint8)[::2],
    "backwards": lambda: np.zeros(padded_nbytes_of(B), np.uint8)[::-1],
}


@pytest.mark.spec("CACHE-10")
@pytest.mark.parametrize("buffer", list(NOT_FITTING.values()), ids=list(NOT_FITTING))
def test_a_buffer_of_another_size_or_type_is_refused(
    building: WeightCacheProvider, buffer: Callable[[], npt.NDArray[Any]]
) -> None:
    with pytest.raises(PackingError):
        building.look_up_or_insert(B, buffer())
    assert B not in building
    assert len(building) == 0
    insert(building, B, noise(B))
    assert contents(building) == {B: noise(B).tobytes()}


@pytest.mark.spec("CACHE-10")
@pytest.mark.parametrize("nbytes", [1, PAGE_BYTES, 2 * PAGE_BYTES - 1, 2 * PAGE_BYTES + 1, 3 * PAGE_BYTES])
def test_reserved_space_of_another_size_is_refused_as_a_whole(building: WeightCacheProvider, nbytes: int) -> None:
    space = building.reserve_space(nbytes)
    with pytest.raises(PackingError):
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
    barrier = threading.Barrier(n_threads)

    def read(seed: int) -> None:
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

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(read, range(n_threads)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.spec("CACHE-1", "CACHE-2", "CACHE-3", "CACHE-5", "CACHE-7", "CACHE-8", "CACHE-9", "CACHE-10", "CACHE-11")
def test_whatever_is_done_with_it_a_provider_is_a_dictionary(kind: Kind) -> None:
    live(kind)
