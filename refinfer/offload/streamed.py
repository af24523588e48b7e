"""A weight source within a memory budget: locked chunks in memory, all others read from the file around their use.

Knows: which chunks its plan locks, its slots, its account. Does not know: how chunks were chosen (`plan`), who reads
ahead (`prefetch`), how bytes are read (`store`).
Spec: OFFLOAD-7 to OFFLOAD-11. Tutorial: 12.

The file is never mapped: what is not counted in the account is not in memory.

    cycle    | q 0 | q 1 | k 0 | v 0 | o 0 | ... | lm_head n |   then the next token begins
               locked      locked
    ring           | slot 0 |  | slot 1 | slot 2 | ...           filled ahead, or when they are needed
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import accumulate, pairwise

import numpy as np

from refinfer.arrays import PAGE_BYTES, Float32Array, aligned_empty
from refinfer.model.weights import LayerWeights, Matrix, RowTable, assemble, walk
from refinfer.offload.budget import Budget
from refinfer.offload.inventory import Inventory
from refinfer.offload.matrices import ChunkedMatrix, RecordTable, Scratch, damaged, vectors_of
from refinfer.offload.plan import Plan
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.readers import Closed, LruPages, OnDemand, Reader
from refinfer.offload.store import Store
from refinfer.packing.layout import Bytes, PackedLayout, Tiles
from refinfer.packing.matmul import UNPACKED_AT_ONCE
from refinfer.trace import Clock, Span, Trace
from refinfer.weight_cache.format import Entry
from refinfer.weight_cache.packers import layout_of_key

__all__ = ["StreamedChunks", "StreamedSource", "staging_nbytes"]


def staging_nbytes(inventory: Inventory, most_rows: int) -> int:
    """Return the bytes that looking up the embeddings of `most_rows` tokens takes for a moment: result and staging."""
    K = inventory.config.hidden_size
    result = 4 * most_rows * K
    if inventory.table is None:  # a chunk of the tied table; its rows as bytes, as float32, and what comes between
        return result + 4 * UNPACKED_AT_ONCE * 4 * K + _table_chunk_nbytes(inventory)
    return result + 4 * K + 2 * PAGE_BYTES


def _table_chunk_nbytes(inventory: Inventory) -> int:
    return max(chunk.padded_nbytes for chunk in inventory.matrices[-1].layout.chunks)


class StreamedChunks:
    """The chunks of a matrix that come one by one from its source; `first` is the number of the first in the cycle."""

    def __init__(self, layout: PackedLayout, first: int, source: StreamedSource) -> None:
        self._layout = layout
        self._first = first
        self._source = source

    def in_order(self) -> Iterator[Tiles]:
        """Give the tiles of every chunk; each is released when the next is asked for.

        Raises:
            DamagedWeightsError: a chunk cannot be read, or does not agree with its checksum.
        """
        for chunk, buffer in zip(
            self._layout.chunks, self._source.chunks(self._first, len(self._layout.chunks)), strict=True
        ):
            yield self._layout.tiles(buffer, chunk)

    def some(self, numbers: Sequence[int]) -> Iterator[Tiles]:
        """Give the tiles of the chunks with these numbers, read out of turn.

        Raises:
            DamagedWeightsError: a chunk cannot be read, or does not agree with its checksum.
        """
        for number in numbers:
            for buffer in self._source.out_of_turn(self._first + number):
                yield self._layout.tiles(buffer, self._layout.chunks[number])


class StreamedSource:
    """All weights of a cache file, within a budget and as a plan says.

    Laws: every large buffer is acquired from the budget before it is made; every chunk that is read is checked before
    it is given; with `threads` of 0 a chunk is read when it is needed; `paged` puts `LruPages` in the place of locks
    and ring.

    Raises:
        BudgetError: the plan does not fit the budget.
        DamagedWeightsError: a locked chunk or the vectors cannot be read, or do not agree with their checksum.
    """

    def __init__(
        self,
        inventory: Inventory,
        entries: Mapping[str, Entry],
        store: Store,
        plan: Plan,
        budget: Budget,
        *,
        most_rows: int,
        clock: Clock,
        threads: int = 0,
        paged: bool = False,
        traced: bool = False,
        where: str = "the weight cache",
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
        self._spans: list[Span] | None = [] if traced else None
        self._inventory = inventory
        self._where = where
        self._store = store
        self._clock = clock
        of_matrix = [entries[matrix.name] for matrix in inventory.matrices]
        self._chunks = [(of_matrix[c.matrix], c.index) for c in inventory.cycle]
        block = entries[inventory.vectors_name]
        vectors = vectors_of(self._checked(block, 0, _pages(block.padded_nbytes)).view(np.float32), inventory)
        self._locked: dict[int, Bytes] = {}
        self._staging = _pages(_table_chunk_nbytes(inventory) if inventory.table is None else 0)
        self.lock_s = 0.0
        if not paged:
            self._lock(sorted(plan.locked), _pages(account.locked), threads)
        firsts: dict[str, int] = {}
        for number, chunk in enumerate(inventory.cycle):
            firsts.setdefault(inventory.matrices[chunk.matrix].name, number)

        def matrix(name: str, bias: Float32Array | None) -> Matrix:
            layout = layout_of_key(entries[name].key)
            return ChunkedMatrix(layout, StreamedChunks(layout, firsts[name], self), bias, self.scratch)

        def table(name: str) -> RowTable:
            entry = entries[name]
            return RecordTable(entry.key, where, _RecordReader(entry, store).read)

        self.embed_tokens, self._layers, self.norm, self.lm_head = assemble(
            self.config, matrix=matrix, table=table, vector=vectors.__getitem__
        )
        self._reader = self._reader_of(plan, threads, paged=paged)  # last: what fails before leaves no thread

    def _reader_of(self, plan: Plan, threads: int, *, paged: bool) -> Reader:
        if paged:
            n_slots = max(1, (plan.account.locked + plan.account.ring) // plan.slot_nbytes)
            return LruPages(_slots(n_slots, plan.slot_nbytes), self._read)
        order = [number for number in range(len(self._chunks)) if number not in self._locked]
        slots = _slots(plan.ring_slots, plan.slot_nbytes)
        if threads and order:
            return Prefetcher(order, slots, self._read, threads)
        return OnDemand(slots or [self._staging], self._read)

    @property
    def trace(self) -> Trace:
        """What was read, computed and waited for so far, where that is traced."""
        return Trace(tuple(self._spans or ()))

    @property
    def locked(self) -> Mapping[int, Bytes]:
        """The locked chunks, by their number in the cycle."""
        return self._locked

    @property
    def n_chunks(self) -> int:
        """How many chunks the cycle has."""
        return len(self._chunks)

    # --8<-- [start:chunks]
    def chunks(self, first: int, n: int) -> Iterator[Bytes]:
        """Give `n` chunks of the cycle one by one, each until the next is asked for.

        Raises:
            DamagedWeightsError: one cannot be read, or does not agree with its checksum.
        """
        for number in range(first, first + n):
            locked = self._locked.get(number)
            chunk = locked if locked is not None else self._take(number)
            started = self._clock.now() if self._spans is not None else 0.0
            try:
                yield chunk
            finally:
                self._note("compute", "compute", number, started)
                if locked is None:
                    self._reader.release(chunk)

    # --8<-- [end:chunks]

    def out_of_turn(self, number: int) -> Iterator[Bytes]:
        """Give a chunk for the rows in it: one of the tied table is read beside the ring, any other through it.

        Raises:
            DamagedWeightsError: it cannot be read, or does not agree with its checksum.
        """
        entry, index = self._chunks[number]
        if (locked := self._locked.get(number)) is not None:
            yield locked
        elif entry.chunks[index].padded_nbytes > self._staging.size:
            yield from self.chunks(number, 1)
        else:
            started = self._clock.now()
            chunk = self._checked(entry, index, self._staging)
            self._waited(number, started)
            yield chunk

    def _take(self, number: int) -> Bytes:
        started = self._clock.now()
        chunk = self._reader.take(number)
        self._waited(number, started)
        return chunk

    def _waited(self, number: int, started: float) -> None:
        self.wait_s += self._clock.now() - started
        self._note("compute", "wait", number, started)

    def _note(self, lane: str, kind: str, number: int, started: float) -> None:
        if self._spans is not None:
            self._spans.append(Span(lane, kind, self._inventory.cycle[number].kind, started, self._clock.now()))

    def _read(self, number: int, slot: Bytes, thread: int) -> Bytes:
        """Read and check a chunk; a prefetch thread runs this."""
        started = self._clock.now() if self._spans is not None else 0.0
        chunk = self._checked(*self._chunks[number], slot)
        self._note(f"disk {thread + 1}", "read", number, started)
        return chunk

    def _checked(self, entry: Entry, number: int, into: Bytes) -> Bytes:
        chunk = entry.chunks[number]
        self._store.read(chunk.offset, into[: chunk.padded_nbytes])
        if zlib.crc32(into[: chunk.nbytes].data) != chunk.checksum:
            raise damaged(self._where, entry.key, number)
        return into[: chunk.nbytes]

    def _lock(self, numbers: Sequence[int], memory: Bytes, threads: int) -> None:
        """Read what is locked into its places, with as many threads as read ahead later; nothing is released."""
        ends = accumulate((self._inventory.cycle[number].padded_nbytes for number in numbers), initial=0)
        slots = [memory[start:end] for start, end in pairwise(ends)]

        def read(number: int, slot: Bytes, thread: int) -> Bytes:
            return self._checked(*self._chunks[number], slot)

        memory[::PAGE_BYTES] = 0  # the kernel gives the pages now, not while reading is timed
        started = self._clock.now()
        if threads and numbers:
            with closing(Prefetcher(numbers, slots, read, threads)) as reader:
                try:
                    self._locked = {number: reader.take(number) for number in numbers}
                except BaseException:
                    self._store.close()  # before threads are waited for: they may wait for a rate
                    raise
        else:
            self._locked = {number: read(number, slot, 0) for number, slot in zip(numbers, slots, strict=True)}
        self.lock_s = self._clock.now() - started

    def layers(self) -> Iterator[LayerWeights]:
        """Walk over the layers in execution order."""
        return walk(self._layers)

    def close(self) -> None:
        """End the threads and close the store; again is allowed."""
        reader, self._reader = self._reader, Closed()
        self._store.close()  # first: whoever waits for a rate waits no longer, and a read under way goes on to its end
        reader.close()
        self._layers, self._locked, self._staging = (), {}, _pages(0)


class _RecordReader:
    """Reads single records of a table: the pages that hold one."""

    def __init__(self, entry: Entry, store: Store) -> None:
        self._start = entry.offset
        self._store = store

    def read(self, start: int, nbytes: int) -> Bytes:
        """Return `nbytes` from `start` of the table."""
        before = start % PAGE_BYTES
        pages = _pages(-(-(before + nbytes) // PAGE_BYTES) * PAGE_BYTES)
        self._store.read(self._start + start - before, pages)
        return pages[before : before + nbytes]


def _pages(nbytes: int) -> Bytes:
    """Return uninitialised bytes on a page."""
    return aligned_empty((nbytes // 4,), PAGE_BYTES).reshape(-1).view(np.uint8)


def _slots(n: int, nbytes: int) -> list[Bytes]:
    memory = _pages(n * nbytes)
    return [memory[i * nbytes : (i + 1) * nbytes] for i in range(n)]
