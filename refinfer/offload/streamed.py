"""A weight source within a memory budget: locked chunks in memory, all others read from the file when they are used.

Knows: which chunks its plan locks, its ring, its account. Does not know: how chunks were chosen (`plan`), how bytes are
read (`store`).
Spec: OFFLOAD-7 to OFFLOAD-9. Tutorial: 12.

The file is never mapped: what is not counted in the account is not in memory.

    cycle    | q 0 | q 1 | k 0 | v 0 | o 0 | ... | lm_head n |   then the next token begins
               locked      locked
    ring           | slot 0 |  | slot 1 | slot 0 | ...           used again two reads later
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from refinfer.arrays import PAGE_BYTES, Float32Array, IntArray, aligned_empty
from refinfer.model.weights import LayerWeights, Matrix, RowTable, assemble
from refinfer.offload.budget import Budget
from refinfer.offload.inventory import Inventory
from refinfer.offload.matrices import RecordTable, Scratch, damaged, product_of_chunks, vectors_of
from refinfer.offload.plan import Plan
from refinfer.offload.store import Store
from refinfer.packing.formats import Bytes, PackedLayout
from refinfer.packing.gemm import require_rows
from refinfer.trace import Clock
from refinfer.weight_cache.checksum import checksum
from refinfer.weight_cache.format import Entry, Index
from refinfer.weight_cache.packers import layout_of_key

__all__ = ["StreamedMatrix", "StreamedSource", "staging_nbytes"]

_ROWS_AT_ONCE: Final = 16  # of a tied table, unpacked together


def staging_nbytes(inventory: Inventory, most_rows: int) -> int:
    """Return the bytes that looking up the embeddings of `most_rows` tokens takes for a moment: result and staging."""
    K = inventory.config.hidden_size
    result = 4 * most_rows * K
    if inventory.table is None:
        return result + 4 * _ROWS_AT_ONCE * 4 * K  # as bytes, as float32, and what comes between
    return result + 4 * K + 2 * PAGE_BYTES


class StreamedMatrix:
    """A packed matrix whose chunks come one by one from its source."""

    def __init__(self, layout: PackedLayout, bias: Float32Array | None, first: int, source: StreamedSource) -> None:
        self.shape = layout.N, layout.K
        self._layout = layout
        self._bias = bias
        self._first = first
        self._source = source

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        """Return `x @ W.T + bias`, chunk by chunk.

        Raises:
            DamagedWeightsError: a chunk cannot be read, or does not agree with its checksum.
        """
        buffers = (self._source.chunk(self._first + i) for i in range(len(self._layout.chunks)))
        return product_of_chunks(x, self._layout, buffers, self._bias, out, self._source.scratch.of(len(x)))

    def rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as float32 `[len(ids), K]`; reads each chunk that holds one once.

        Raises:
            DamagedWeightsError: a chunk cannot be read, or does not agree with its checksum.
        """
        layout = self._layout
        require_rows(ids, layout.N)
        out = np.empty((len(ids), layout.K), np.float32)
        chunk_of = np.searchsorted([chunk.first_row for chunk in layout.chunks], ids, side="right") - 1
        for c in np.unique(chunk_of):
            tiles = layout.tiles(self._source.chunk(self._first + int(c)), layout.chunks[c])
            here = np.flatnonzero(chunk_of == c)
            for some in np.split(here, range(_ROWS_AT_ONCE, len(here), _ROWS_AT_ONCE)):
                which, lane = np.divmod(ids[some] - layout.chunks[c].first_row, layout.tile.nr)
                out[some] = layout.format.unpack_rows(tiles, which, lane)
        return out


class StreamedSource:
    """All weights of a cache file, within a budget and as a plan says.

    Laws: every large buffer is acquired from the budget before it is made; a chunk given by `chunk` is valid until
    the second next one is asked for; every chunk that is read is checked before it is given.

    Raises:
        BudgetError: the plan does not fit the budget.
        DamagedWeightsError: a locked chunk or the vectors cannot be read, or do not agree with their checksum.
    """

    def __init__(
        self, inventory: Inventory, index: Index, store: Store, plan: Plan, budget: Budget, most_rows: int, clock: Clock
    ) -> None:
        account = plan.account
        for nbytes, what in (
            (account.resident, "the block of norms and biases"),
            (account.kv_cache, "the KV cache"),
            (account.scratch, "scratch memory"),
            (account.ring, "the ring"),
            (account.locked, "the locked chunks"),
        ):
            budget.acquire(nbytes, what)
        self.config = inventory.config
        self.scratch = Scratch(inventory, most_rows)
        self.wait_s = 0.0
        self._store = store
        self._clock = clock
        entries = {(entry.key.packer, entry.key.name): entry for entry in index.entries}
        of_matrix = [entries["goi", matrix.name] for matrix in inventory.matrices]
        self._chunks = [(of_matrix[c.matrix], c.index) for c in inventory.cycle]
        self._slots = [_pages(plan.slot_nbytes) for _ in range(plan.ring_slots)]
        self._next_slot = 0
        self._locked: dict[int, Bytes] = {}
        block = entries["vectors", inventory.vectors_name]
        vectors = vectors_of(self._read(block, 0, _pages(block.nbytes)).view(np.float32), inventory)
        memory, end = _pages(account.locked), 0
        for number in sorted(plan.locked):
            nbytes = inventory.cycle[number].nbytes
            self._locked[number] = self._read(*self._chunks[number], memory[end : end + nbytes])
            end += nbytes
        firsts: dict[str, int] = {}
        for number, chunk in enumerate(inventory.cycle):
            firsts.setdefault(inventory.matrices[chunk.matrix].name, number)

        def matrix(name: str, bias: Float32Array | None) -> Matrix:
            return StreamedMatrix(layout_of_key(entries["goi", name].key), bias, firsts[name], self)

        def table(name: str) -> RowTable:
            entry = entries["rows", name]
            return RecordTable(entry.key, "the weight cache", _RecordReader(entry, store).read)

        self.embed_tokens, self._layers, self.norm, self.lm_head = assemble(
            self.config, matrix=matrix, table=table, vector=vectors.__getitem__
        )

    def chunk(self, number: int) -> Bytes:
        """Return a chunk of the cycle: locked, or read now.

        Raises:
            DamagedWeightsError: it cannot be read, or does not agree with its checksum.
        """
        if (locked := self._locked.get(number)) is not None:
            return locked
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        started = self._clock.now()
        chunk = self._read(*self._chunks[number], self._slots[self._next_slot])
        self.wait_s += self._clock.now() - started
        return chunk

    def _read(self, entry: Entry, number: int, into: Bytes) -> Bytes:
        chunk = entry.chunks[number]
        self._store.read(chunk.offset, into[: chunk.padded_nbytes])
        if checksum(into[: chunk.nbytes]) != chunk.checksum:
            raise damaged("the weight cache", entry.key, number)
        return into[: chunk.nbytes]

    def layers(self) -> Iterator[LayerWeights]:
        """Walk over the layers in execution order."""
        return iter(self._layers)

    def close(self) -> None:
        """Close the store."""
        self._store.close()


class _RecordReader:
    """Reads single records of a table: the pages that hold one."""

    def __init__(self, entry: Entry, store: Store) -> None:
        self._start = entry.offset
        self._store = store

    def read(self, start: int, nbytes: int) -> Bytes:
        before = start % PAGE_BYTES
        pages = _pages(-(-(before + nbytes) // PAGE_BYTES) * PAGE_BYTES)
        self._store.read(self._start + start - before, pages)
        return pages[before : before + nbytes]


def _pages(nbytes: int) -> Bytes:
    """Return uninitialised bytes on a page."""
    return aligned_empty((nbytes // 4,), PAGE_BYTES).reshape(-1).view(np.uint8)
