r"""Where every byte of a memory budget goes: one account, made by the plan and printed by the commands as JSON.

Leaves to others: which chunks are locked (`locks`, `plan`), counting bytes while a run goes on (`offload.budget`).
Read more: tutorial 09; clauses PLAN-1, PLAN-14, PLAN-15, OFFLOAD-8.

    budget = resident + KV cache + scratch + threads + ring + locked + unused
             \--------------- fixed ---------------/

    resident            the block of vectors: norms and biases
    scratch             intermediate results: the numbers of the tokens being computed (activations), of products, and
                        of drawing the next token
    threads             what the system and Python keep for each prefetch thread
    ring                slots for one chunk each; chunks that are not locked are read into them, again for each token
    locked              chunks that are read at the start, and kept for the whole run
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from refinfer.arrays import PAGE_BYTES
from refinfer.inventory import Inventory
from refinfer.model.kv_cache import kv_cache_nbytes
from refinfer.model.transformer import prefill_block, scratch_nbytes
from refinfer.packing.formats import packing_nbytes
from refinfer.packing.matmul import UNPACKED_AT_ONCE, scratch_floats
from refinfer.planning.cost import PREFETCH_THREADS

__all__ = ["SAMPLING_BYTES", "THREAD_BYTES", "Account", "Fixed", "fixed_of", "staged_chunk_nbytes"]

SAMPLING_BYTES: Final = 56
"""What drawing a token takes for each number that the model computed: 54 bytes at most, as measured."""

THREAD_BYTES: Final = 80 << 10
"""What a thread that reads takes: its stack and the system's own records; 50 to 67 kB as measured, rounded up."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """What a run needs under every plan, in bytes: the block of vectors (`resident`), the KV cache, scratch, threads.

    `packing` is what packing the cache file takes before that, when nothing else of the budget is in use.
    """

    resident: int
    kv_cache: int
    scratch: int
    threads: int = 0
    packing: int = 0

    @property
    def total(self) -> int:
        """What the run itself needs: all of it but `packing`."""
        return self.resident + self.kv_cache + self.scratch + self.threads


# --8<-- [start:account]
@dataclass(frozen=True, slots=True)
class Account:
    """Where every byte of a budget goes."""

    budget: int
    fixed: Fixed
    ring: int
    locked: int

    @property
    def unused(self) -> int:
        """The bytes that are left."""
        return self.budget - self.fixed.total - self.ring - self.locked

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part that is in use, under the names that the JSON has, as people read them."""
        return {
            "locked": self.locked,
            "resident": self.fixed.resident,
            "ring": self.ring,
            "KV cache": self.fixed.kv_cache,
            "scratch": self.fixed.scratch,
            "threads": self.fixed.threads,
        }

    def to_json(self) -> dict[str, int]:
        """Return the fields that `generate`, `plan` and `simulate` print."""
        return {
            "budget_bytes": self.budget,
            "locked_bytes": self.locked,
            "resident_bytes": self.fixed.resident,
            "ring_bytes": self.ring,
            "kv_cache_bytes": self.fixed.kv_cache,
            "scratch_bytes": self.fixed.scratch,
            "threads_bytes": self.fixed.threads,
        }


# --8<-- [end:account]


def fixed_of(inventory: Inventory, max_positions: int, prefetch_threads: int = PREFETCH_THREADS) -> Fixed:
    """Return what a run with room for `max_positions` in its KV cache needs under every plan."""
    config, layouts = inventory.config, inventory.layouts.values()
    rows = prefill_block(config, max_positions)
    computing = scratch_nbytes(config, max_positions) + 4 * scratch_floats(layouts, rows)
    return Fixed(
        resident=inventory.resident_nbytes,
        kv_cache=kv_cache_nbytes(config, max_positions),
        scratch=computing + _look_up_nbytes(inventory, rows) + SAMPLING_BYTES * config.vocab_size,
        threads=THREAD_BYTES * prefetch_threads,
        packing=max(packing_nbytes(layouts), 2 * inventory.resident_nbytes),  # vectors are converted, then joined
    )


def _look_up_nbytes(inventory: Inventory, rows: int) -> int:
    """Return the bytes in use while `rows` rows of the embedding table are looked up."""
    K = inventory.config.hidden_size
    result = 4 * rows * K
    if inventory.table is None:  # tied: rows of a chunk are unpacked, some at a time, with room for four float32 copies
        return result + 4 * UNPACKED_AT_ONCE * 4 * K + staged_chunk_nbytes(inventory)
    return result + 4 * K + 2 * PAGE_BYTES  # one row, and the rest of the pages that it begins and ends in


def staged_chunk_nbytes(inventory: Inventory) -> int:
    """Return the bytes for one chunk of a tied table, read outside the ring to look up rows; 0 if it is not tied."""
    if inventory.table is not None:
        return 0
    return max(chunk.padded_nbytes for chunk in inventory.matrices[-1].layout.chunks)
