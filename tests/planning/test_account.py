"""Specifies `refinfer.planning.account`: where every byte of a budget goes, whatever the plan."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.model.kv_cache import kv_cache_nbytes
from refinfer.model.transformer import prefill_block, scratch_nbytes
from refinfer.packing.formats import FORMATS
from refinfer.packing.matmul import UNPACKED_AT_ONCE, scratch_floats
from refinfer.planning.account import Account, Fixed, fixed_of, staged_chunk_nbytes

nbytes = st.integers(0, 1 << 40)
fixeds = st.builds(Fixed, nbytes, nbytes, nbytes)
accounts = st.builds(Account, nbytes, fixeds, nbytes, nbytes)

every_format = pytest.mark.parametrize("name", list(FORMATS))


@pytest.mark.spec("PLAN-1")
@given(account=accounts)
def test_the_parts_and_what_is_left_are_the_budget(account: Account) -> None:
    fixed = account.fixed
    assert fixed.total == fixed.resident + fixed.kv_cache + fixed.scratch
    assert sum(account.parts.values()) + account.unused == account.budget
    assert sum(account.parts.values()) == fixed.total + account.ring + account.locked


@pytest.mark.spec("PLAN-1", "GEN-18")
def test_people_and_programs_see_the_same_parts_under_their_own_names() -> None:
    account = Account(budget=1000, fixed=Fixed(resident=1, kv_cache=20, scratch=300), ring=4, locked=500)
    assert account.parts == {
        "locked chunks": 500,
        "norms and biases": 1,
        "ring": 4,
        "KV cache": 20,
        "scratch": 300,
    }
    assert account.to_json() == {
        "budget_bytes": 1000,
        "locked_bytes": 500,
        "resident_bytes": 1,
        "ring_bytes": 4,
        "kv_cache_bytes": 20,
        "scratch_bytes": 300,
    }
    assert account.unused == 175
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
    assert few.total == few.resident + few.kv_cache + few.scratch


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
    read_or_unpacked = 4 * UNPACKED_AT_ONCE * 4 * K if tied else 4 * K + 2 * PAGE_BYTES
    assert needed < fixed.scratch <= needed + read_or_unpacked
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
