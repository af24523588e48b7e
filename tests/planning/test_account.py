"""Specifies `refinfer.planning.account`: where every byte of a budget goes, whatever the plan."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from dataclasses import replace
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.model.kv_cache import kv_cache_nbytes
from refinfer.model.sampler import Sampling, sample
from refinfer.model.transformer import prefill_block, scratch_nbytes
from refinfer.packing.formats import FORMATS, packing_nbytes
from refinfer.packing.matmul import UNPACKED_AT_ONCE, scratch_floats
from refinfer.planning.account import (
    SAMPLING_BYTES,
    THREAD_BYTES,
    Account,
    Fixed,
    fixed_of,
    staged_chunk_nbytes,
)
from refinfer.planning.cost import PREFETCH_THREADS
from refinfer.planning.plan import MOST_PREFETCH_THREADS, smallest_budget

PYTHON_BYTES: Final = 8192
"""Room for the objects of Python's own, which tracemalloc counts with the arrays."""

nbytes = st.integers(0, 1 << 40)
fixeds = st.builds(Fixed, nbytes, nbytes, nbytes, nbytes, nbytes)
accounts = st.builds(Account, nbytes, fixeds, nbytes, nbytes)

every_format = pytest.mark.parametrize("name", list(FORMATS))


@pytest.mark.spec("PLAN-1")
@given(account=accounts)
def test_the_parts_and_what_is_left_are_the_budget(account: Account) -> None:
    fixed = account.fixed
    assert fixed.total == fixed.resident + fixed.kv_cache + fixed.scratch + fixed.threads
    assert sum(account.parts.values()) + account.unused == account.budget
    assert sum(account.parts.values()) == fixed.total + account.ring + account.locked


@pytest.mark.spec("PLAN-1")
@given(resident=nbytes, kv_cache=nbytes, scratch=nbytes)
def test_a_run_of_which_no_threads_and_no_packing_are_named_needs_nothing_for_them(
    resident: int, kv_cache: int, scratch: int
) -> None:
    fixed = Fixed(resident, kv_cache, scratch)
    assert fixed.total == resident + kv_cache + scratch
    assert fixed.packing == 0


@pytest.mark.spec("PLAN-1", "PLAN-21", "GEN-18")
def test_people_and_programs_see_the_same_parts_under_the_same_names() -> None:
    account = Account(budget=1000, fixed=Fixed(1, 20, 300, 60, 999), ring=4, locked=500)
    assert account.parts == {
        "locked": 500,
        "resident": 1,
        "ring": 4,
        "KV cache": 20,
        "scratch": 300,
        "threads": 60,
    }
    in_json = account.to_json()
    assert all(in_json[f"{part.lower().replace(' ', '_')}_bytes"] == nbytes for part, nbytes in account.parts.items())
    assert in_json == {
        "budget_bytes": 1000,
        "locked_bytes": 500,
        "resident_bytes": 1,
        "ring_bytes": 4,
        "kv_cache_bytes": 20,
        "scratch_bytes": 300,
        "threads_bytes": 60,
    }
    assert account.unused == 115
    json.dumps(account.to_json())


@pytest.mark.spec("PLAN-1", "PLAN-3")
@every_format
def test_what_is_fixed_follows_from_the_model_and_the_positions(name: str) -> None:
    inventory = Inventory(SHAPES["smollm-135m"], name)
    few, many = fixed_of(inventory, 16), fixed_of(inventory, 2048)
    assert few.resident == many.resident == inventory.resident_nbytes
    L, G, hd = 30, 3, 64
    assert (few.kv_cache, many.kv_cache) == (2 * 4 * L * G * hd * 16, 2 * 4 * L * G * hd * 2048)
    assert few.scratch < many.scratch
    assert few.total == few.resident + few.kv_cache + few.scratch + few.threads
    assert few.packing == many.packing


@pytest.mark.spec("PLAN-14", "PLAN-13")
def test_each_prefetch_thread_is_counted_and_two_are_unless_told_otherwise() -> None:
    inventory = Inventory(SHAPES["smollm-135m"], "int8")
    none = fixed_of(inventory, 16, 0)
    assert fixed_of(inventory, 16) == fixed_of(inventory, 16, PREFETCH_THREADS)
    for threads in range(MOST_PREFETCH_THREADS + 1):
        fixed = fixed_of(inventory, 16, threads)
        assert fixed == replace(none, threads=threads * THREAD_BYTES)
        assert smallest_budget(inventory, fixed) == smallest_budget(inventory, none) + threads * THREAD_BYTES


@pytest.mark.spec("PLAN-14", "PACK-30")
@every_format
def test_packing_has_the_memory_before_the_run_and_the_smallest_budget_is_enough_for_either(name: str) -> None:
    inventory = Inventory(SHAPES["smollm-135m"], name)
    fixed = fixed_of(inventory, 16)
    layouts = {matrix.layout for matrix in inventory.matrices}
    assert fixed.packing == max(packing_nbytes(layouts), 2 * inventory.resident_nbytes)
    run = smallest_budget(inventory, replace(fixed, packing=0))
    assert smallest_budget(inventory, replace(fixed, packing=run)) == run
    assert smallest_budget(inventory, replace(fixed, packing=run + 1)) == run + 1


@pytest.mark.spec("PLAN-15")
@pytest.mark.parametrize("V", [1000, 50_000])
def test_drawing_a_token_takes_at_most_what_is_counted_for_it_and_nearly_that(V: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(V).astype(np.float32)
    taken = []
    for logits in (noise, np.zeros(V, np.float32), np.repeat(noise[: V // 2], 2)):
        for top_k, top_p in itertools.product((None, 1, 40, V // 2, V - 1, V), (None, 0.5, 0.999, 1.0)):
            tracemalloc.start()
            try:
                sample(logits, Sampling(1.0, top_k, top_p), rng)
                taken.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
    assert max(taken) <= SAMPLING_BYTES * V + PYTHON_BYTES
    assert max(taken) >= SAMPLING_BYTES * V / 1.1


@pytest.mark.spec("PLAN-1", "OFFLOAD-8")
@every_format
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", [1, 7, 300])
def test_scratch_has_room_for_activations_products_and_the_rows_of_the_embedding_table(
    name: str, tied: bool, positions: int
) -> None:
    config = replace(SHAPES["smollm-135m"], num_hidden_layers=2, tie_word_embeddings=tied)
    inventory = Inventory(config, name)
    fixed, rows, K = fixed_of(inventory, positions), prefill_block(config, positions), config.hidden_size
    products = 4 * scratch_floats({matrix.layout for matrix in inventory.matrices}, rows)
    needed = scratch_nbytes(config, positions) + products + 4 * rows * K + staged_chunk_nbytes(inventory)
    needed += SAMPLING_BYTES * config.vocab_size
    read_or_unpacked = 4 * UNPACKED_AT_ONCE * 4 * K if tied else 4 * K + 2 * PAGE_BYTES
    assert fixed.scratch == needed + read_or_unpacked
    assert fixed.kv_cache == kv_cache_nbytes(config, positions)


@pytest.mark.spec("PLAN-1", "OFFLOAD-7")
@every_format
@pytest.mark.parametrize("chunk_nbytes", [None, 4096])
def test_a_chunk_of_a_tied_table_has_a_place_of_its_own_to_be_read_into(name: str, chunk_nbytes: int | None) -> None:
    config = replace(SHAPES["stories15m"], tie_word_embeddings=True)
    tied = Inventory(config, name, chunk_nbytes)
    table = [chunk.padded_nbytes for chunk in tied.cycle if chunk.kind == "lm_head"]
    assert staged_chunk_nbytes(tied) == max(table) > 0
    assert staged_chunk_nbytes(Inventory(replace(config, tie_word_embeddings=False), name, chunk_nbytes)) == 0
