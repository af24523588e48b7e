"""The KV cache: reserved once, filled after its end, rewound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from refinfer.arrays import Float32Array
from refinfer.errors import RequestError
from refinfer.model.config import SHAPES
from refinfer.model.kv_cache import KVCache, kv_cache_nbytes
from refinfer.model.transformer import Transformer
from refinfer.model.weights import RowMajorSource
from words import require_equal, require_items, require_near

TINY = SHAPES["tiny"]
ROOM = 12


class KVCacheAgainstAList(RuleBasedStateMachine):
    """Random stores, advances and rewinds, compared with a plain list of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(TINY, ROOM)
        self.model: list[float] = []
        self.next_value = 1.0

    @rule(n=st.integers(1, 4))
    def store_and_advance(self, n: int) -> None:
        if len(self.model) + n > ROOM:
            with pytest.raises(RequestError, match="do not fit"):
                self.cache.require_room(n)
            return
        values = [self.next_value + i for i in range(n)]
        self.next_value += n
        self._store(values)
        self.cache.advance(n)
        self.model += values

    @precondition(lambda self: len(self.model) < ROOM)
    @rule()
    def store_and_break_off(self) -> None:
        self._store([-1.0])

    @rule(share=st.floats(0, 1))
    def rewind(self, share: float) -> None:
        length = int(share * len(self.model))
        self.cache.rewind(length)
        del self.model[length:]

    def _store(self, values: list[float]) -> None:
        block = np.empty((len(values), TINY.num_key_value_heads, TINY.head_dim), np.float32)
        block[:] = np.array(values, np.float32)[:, None, None]
        for layer in range(TINY.num_hidden_layers):
            keys, stored = self.cache.store(layer, block, -block)
            expected = self.model + values
            require_equal(keys.shape[3], len(expected), f"the number of positions of the keys of layer {layer}")
            require_equal(stored.shape[2], len(expected), f"the number of positions of the values of layer {layer}")
            require_items(keys[0, 0, 0].tolist(), expected, f"in layer {layer}, the key at position")
            require_items((-stored[0, 0, :, 0]).tolist(), expected, f"in layer {layer}, the negated value at position")

    @invariant()
    def has_the_length_of_the_list(self) -> None:
        require_equal(self.cache.length, len(self.model), "the length of the cache")
        self.cache.check()


@pytest.mark.spec("KV-3")
def test_store_writes_new_positions_of_a_layer_after_the_filled_ones_and_counts_nothing() -> None:
    G, hd, n_layers = TINY.num_key_value_heads, TINY.head_dim, TINY.num_hidden_layers
    cache = KVCache(TINY, ROOM)
    k = np.arange(n_layers * 5 * G * hd, dtype=np.float32).reshape(n_layers, 5, G, hd)  # 2 positions, then 3 more
    for first, end in ((0, 2), (2, 5)):
        for layer in range(n_layers):
            keys, values = cache.store(layer, k[layer, first:end], -k[layer, first:end])
            require_equal(cache.length, first, "the length of the cache, after `store` and before `advance`,")
            require_equal(keys.shape, (G, 1, hd, end), "the shape of the keys")
            require_equal(values.shape, (G, 1, end, hd), "the shape of the values")
            what = f"in layer {layer}, with {first} positions filled and {end - first} new, the"
            of_heads = k[layer, :end].transpose(1, 0, 2)
            require_near(keys[:, 0], of_heads.transpose(0, 2, 1), f"{what} key", ("head", "number", "position"))
            require_near(values[:, 0], -of_heads, f"{what} value", ("head", "position", "number"))
            assert np.shares_memory(keys, cache._keys[layer]), "the keys are a copy, not a view of the cache"
            assert np.shares_memory(values, cache._values[layer]), "the values are a copy, not a view of the cache"
        cache.advance(end - first)


@pytest.mark.spec("KV-2", "KV-3")
def test_the_kv_cache_behaves_like_a_list_of_positions() -> None:
    run_state_machine_as_test(
        KVCacheAgainstAList, settings=settings(max_examples=25, stateful_step_count=20, deadline=None)
    )


@pytest.mark.spec("KV-4")
@pytest.mark.parametrize("name", ["tiny", "storyteller", "stories15m"])
def test_the_cache_takes_the_bytes_that_kv_cache_nbytes_returns(name: str) -> None:
    assert KVCache(SHAPES[name], 64).nbytes == kv_cache_nbytes(SHAPES[name], 64)


@pytest.mark.spec("KV-2")
@pytest.mark.parametrize("length", [-1, 3], ids=["below zero", "beyond what is filled"])
def test_an_impossible_rewind_is_refused_and_changes_nothing(length: int) -> None:
    cache = KVCache(TINY, ROOM)
    cache.advance(2)
    with pytest.raises(RequestError, match="cannot rewind"):
        cache.rewind(length)
    assert cache.length == 2


@pytest.mark.spec("MODEL-12")
def test_more_positions_than_are_reserved_are_refused_and_change_nothing() -> None:
    cache = KVCache(TINY, ROOM)
    cache.advance(2)
    with pytest.raises(RequestError, match="do not fit: 2 of 12 reserved positions are in use"):
        cache.advance(ROOM - 1)
    assert cache.length == 2
    cache.advance(ROOM - 2)
    assert cache.length == ROOM


def random_ids(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(261, size=n)]


def all_logits(source: RowMajorSource, ids: list[int], cuts: list[int]) -> Float32Array:
    """Compute `ids` in blocks that end at `cuts`."""
    transformer = Transformer(source, 96)
    ends = [*sorted({c for c in cuts if 0 < c < len(ids)}), len(ids)]
    starts = [0, *ends[:-1]]
    return np.concatenate([transformer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)])


@pytest.mark.spec("KV-1")
@pytest.mark.parametrize(
    "cuts",
    [list(range(1, 60)), [1], [59], [7, 8, 30]],
    ids=["one by one", "blocks of 1 and 59", "blocks of 59 and 1", "uneven"],
)
def test_any_cut_of_a_text_into_blocks_gives_the_same_logits(tiny_source: RowMajorSource, cuts: list[int]) -> None:
    ids = random_ids(60)
    blocks, whole = all_logits(tiny_source, ids, cuts), all_logits(tiny_source, ids, [])
    require_near(blocks, whole, "in blocks, the logit", ("position", "token id"), atol=2e-5, rtol=1e-7)


@pytest.mark.spec("KV-1")
def test_prefill_gives_the_logits_of_the_last_token_of_its_blocks(tiny_source: RowMajorSource) -> None:
    transformer = Transformer(tiny_source, 96)
    ids = random_ids(80)
    assert len(ids) > transformer.block
    np.testing.assert_allclose(transformer.prefill(ids), all_logits(tiny_source, ids, [])[-1], atol=2e-5)


@pytest.mark.spec("KV-2")
def test_after_a_rewind_forgotten_tokens_have_no_effect(tiny_source: RowMajorSource) -> None:
    kept, forgotten, later = random_ids(9), random_ids(30, seed=1), random_ids(5, seed=2)
    rewound, plain = Transformer(tiny_source, 96), Transformer(tiny_source, 96)
    rewound.decode(kept)
    rewound.decode(forgotten)
    rewound.kv_cache.rewind(len(kept))
    plain.decode(kept)
    after, expected = rewound.decode(later), plain.decode(later)
    require_near(after, expected, "after a rewind, the logit", ("new position", "token id"))
