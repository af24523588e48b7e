"""Specifies `refinfer.weight_cache.memory`, beyond the laws of every provider in `test_provider`."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from provider_kinds import KINDS, VIEWS, A, B, C, D, Kind, insert, key_of, noise
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import padded_nbytes_of
from words import require_equal


def require_bytes(provider: MemoryWeightCacheProvider, key: PackKey, data: Bytes) -> None:
    """Require that the buffer of a key can be looked up and has these bytes."""
    offset = provider.look_up(key)
    assert offset is not None, f"after key {key.name!r} was inserted, look_up does not find it"
    kept = provider.offset_to_addr(offset)
    require_equal(kept.size, data.size, f"the number of bytes under key {key.name!r}")
    n_wrong = int(np.count_nonzero(kept != data))
    assert not n_wrong, (
        f"{n_wrong:,} of the {data.size:,} bytes under key {key.name!r} are not those that were inserted"
    )


@pytest.mark.spec("CACHE-1", "CACHE-3", "CACHE-5")
def test_a_buffer_in_memory_is_found_under_its_key_and_can_only_be_read() -> None:
    provider = MemoryWeightCacheProvider()
    for i, key in enumerate((A, B)):
        offset = insert(provider, key, noise(key, i))
        require_equal(provider.look_up(key), offset, f"what look_up returns for key {key.name!r}")
    for i, key in enumerate((A, B)):
        require_bytes(provider, key, noise(key, i))
        assert not provider[key].flags.writeable, f"the buffer under key {key.name!r} can be written to"
    require_equal(len(provider), 2, "the number of keys")


@pytest.mark.spec("CACHE-14")
def test_each_offset_in_memory_is_where_the_buffer_before_it_ends() -> None:
    provider, end = MemoryWeightCacheProvider(), PAGE_BYTES
    for key in (A, B, D, C):
        found = provider.look_up_or_insert(key, noise(key))
        nbytes = padded_nbytes_of(key)
        require_equal(found, end, f"the offset of key {key.name!r}, which has {nbytes:,} bytes,")
        end += nbytes


@pytest.mark.spec("CACHE-3")
def test_an_existing_key_in_memory_wins_whatever_the_new_data_is() -> None:
    provider = MemoryWeightCacheProvider()
    offset = insert(provider, A, noise(A))
    insert(provider, B, noise(B))
    others = {
        "other bytes": noise(A, 1),
        "a byte less": np.ones(PAGE_BYTES - 1, np.uint8),
        "a page more": np.ones(2 * PAGE_BYTES, np.uint8),
    }
    for what, data in others.items():
        try:
            found = provider.look_up_or_insert(A, data)
        except PackingError as error:
            raise AssertionError(f"key 'a' is there, but with {what} it is refused: {error}") from None
        require_equal(found, offset, f"with {what}, the offset of key 'a', which is there,")
        require_bytes(provider, A, noise(A))
    require_equal(len(provider), 2, "the number of keys")


@pytest.mark.spec("CACHE-4")
def test_what_was_packed_into_reserved_memory_stays_in_its_place() -> None:
    for what, view in VIEWS.items():
        for beyond in (0, PAGE_BYTES):
            provider = MemoryWeightCacheProvider()
            space = provider.reserve_space(padded_nbytes_of(B) + beyond)[: padded_nbytes_of(B)]
            space[:] = noise(B)
            kept = provider.offset_to_addr(provider.look_up_or_insert(B, view(space)))
            assert kept.ctypes.data == space.ctypes.data, (
                f"reserved space of {space.size + beyond:,} bytes, of which {space.size:,} are committed "
                f"(given as: {what}), was copied, and should be kept in its place"
            )
            require_bytes(provider, B, noise(B))


@pytest.mark.spec("CACHE-4", "CACHE-14")
def test_a_buffer_from_elsewhere_is_copied_to_a_page_of_memory() -> None:
    for is_reserved in (False, True):
        provider = MemoryWeightCacheProvider()
        for key in (A, B, D, C):
            foreign = noise(key)
            if is_reserved:
                provider.reserve_space(padded_nbytes_of(key))  # but something else is inserted
            kept = provider.offset_to_addr(provider.look_up_or_insert(key, foreign))
            assert not np.shares_memory(kept, foreign), f"key {key.name!r} keeps the caller's memory, not a copy"
            by = kept.ctypes.data % PAGE_BYTES
            assert not by, f"the copy under key {key.name!r} starts {by:,} bytes after the start of a page"
            foreign[:] = 0
            require_bytes(provider, key, noise(key))


@pytest.mark.spec("CACHE-4", "CACHE-14")
def test_reserved_memory_belongs_to_the_one_key_under_which_it_was_committed() -> None:
    provider = MemoryWeightCacheProvider()
    space = provider.reserve_space(PAGE_BYTES)
    space[:] = noise(A)
    offsets = [provider.look_up_or_insert(key, space) for key in (A, C)]
    assert offsets[0] != offsets[1], f"keys 'a' and 'c' have one offset, {offsets[0]:,}"
    assert not np.shares_memory(provider[A], provider[C]), (
        "space that was committed under key 'a' was committed once more under key 'c', and both have the same memory"
    )
    for key in (A, C):
        require_bytes(provider, key, noise(A))


@pytest.mark.spec("CACHE-10", "CACHE-14")
def test_a_buffer_in_memory_that_does_not_fit_its_key_is_refused_and_nothing_of_it_is_kept() -> None:
    provider = MemoryWeightCacheProvider()
    for nbytes in (PAGE_BYTES, 2 * PAGE_BYTES - 1, 2 * PAGE_BYTES + 1, 3 * PAGE_BYTES):
        for what, buffer in (
            ("foreign", np.zeros(nbytes, np.uint8)),
            ("reserved", provider.reserve_space(nbytes)),
        ):
            try:
                provider.look_up_or_insert(B, buffer)
            except PackingError:
                require_equal(provider.look_up(B), None, f"after {nbytes:,} bytes were refused, the offset of key 'b'")
            else:
                raise AssertionError(f"{nbytes:,} {what} bytes are taken for key 'b', which has 8,192")
    require_equal(len(provider), 0, "the number of keys")
    require_equal(insert(provider, B, noise(B)), PAGE_BYTES, "the offset of the first buffer that fits")


@pytest.mark.spec("CACHE-3", "CACHE-6", "CACHE-7")
def test_once_finalized_a_provider_in_memory_finds_its_keys_and_refuses_new_ones() -> None:
    provider = MemoryWeightCacheProvider()
    offset = insert(provider, A, noise(A))
    provider.finalize()
    try:
        found = provider.look_up_or_insert(A, noise(A, 1))
    except WeightCacheStateError as error:
        raise AssertionError(f"key 'a' is there, but once finalized it is refused: {error}") from None
    require_equal(found, offset, "once finalized, the offset of key 'a'")
    require_bytes(provider, A, noise(A))
    with pytest.raises(WeightCacheStateError, match="the weight cache is finalized: 'c' cannot be inserted"):
        provider.look_up_or_insert(C, noise(C))
    require_equal(len(provider), 1, "once finalized, the number of keys")
    provider.delete_cache()
    with pytest.raises(WeightCacheStateError, match="a weight cache that is deleted has no look_up_or_insert"):
        provider.look_up_or_insert(A, noise(A))


@pytest.mark.spec("CACHE-5", "CACHE-7", "CACHE-8", "CACHE-10")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_our_own_refusals_say_what_was_wrong(kind: Kind, tmp_path: Path) -> None:
    building = kind.begin(tmp_path)
    insert(building, A, noise(A))
    for nbytes in (0, -4096):
        with pytest.raises(PackingError, match=f"not {nbytes}$"):
            building.reserve_space(nbytes)
    for n_bytes in (1, 8191, 8193):
        with pytest.raises(PackingError, match="'b' packs into 8192 bytes"):
            building.look_up_or_insert(B, np.zeros(n_bytes, np.uint8))
    for key, why in (
        (replace(A, packer="giu"), "'giu' is not a packer"),
        (replace(A, shape=(1, 1014)), "'a' is not a block of vectors"),
        (replace(A, packer="goi"), "'a' is not a packed matrix"),
    ):
        with pytest.raises(PackingError, match=why):
            building.look_up_or_insert(key, noise(A))
    complete = kind.complete(building)
    with pytest.raises(WeightCacheStateError, match="finalized"):
        complete.look_up_or_insert(C, noise(C))
    with pytest.raises(WeightCacheStateError, match=r"-1$"):
        complete.offset_to_addr(-1)
    with pytest.raises(KeyError, match="'c'"):
        complete[C]
    complete.delete_cache()
    with pytest.raises(WeightCacheStateError, match="look_up"):
        complete[A]


@pytest.mark.spec("CACHE-11")
def test_deleting_a_provider_in_memory_releases_its_memory() -> None:
    key = key_of("large", 2000)
    tracemalloc.start()
    try:
        provider = MemoryWeightCacheProvider()
        provider.look_up_or_insert(key, np.ones(padded_nbytes_of(key), np.uint8))
        assert tracemalloc.get_traced_memory()[0] > padded_nbytes_of(key)
        provider.delete_cache()
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
