"""Specifies `refinfer.weight_cache.memory`, beyond the laws of every provider in `test_provider`."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from provider_kinds import KINDS, A, B, C, Kind, insert, key_of, noise
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import padded_nbytes_of


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
