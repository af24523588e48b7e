"""Specifies `refinfer.weight_cache.memory`, beyond the laws of every provider in `test_provider`."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from provider_kinds import key_of
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import padded_nbytes_of


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
