"""A weight source within a memory budget: locked chunks stay in memory, all others are read when a token needs them.

Keeps the locked chunks, and lends each of the others for one product. Leaves to others: which chunks are locked
(`planning.plan`), reading ahead (`prefetch`), where a chunk lies and how it is checked (`packed_file`), counting bytes
(`budget`).
Read more: tutorial 12; clauses OFFLOAD-7 to OFFLOAD-11, OFFLOAD-14, OFFLOAD-15, GEN-20.

The file is never mapped: a mapping brings pages into memory that no account counts. Here q 0 is chunk 0 of `q_proj`:

    cycle    | q 0 | q 1 | k 0 | v 0 | o 0 | ... | lm_head n |   then the next token begins
               locked      locked
    ring           | slot 0 |  | slot 1 | slot 2 | ...           filled ahead, or when they are needed
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import accumulate, pairwise

from refinfer.arrays import PAGE_BYTES, Float32Array
from refinfer.errors import SessionInUseError
from refinfer.model.weights import Matrix, Weights, assemble, still_open
from refinfer.offload.packed_file import PackedFile, pages
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.readers import Closed, LruPages, OnDemand, Reader
from refinfer.packing.layout import Bytes, Tiles
from refinfer.planning.account import staged_chunk_nbytes
from refinfer.planning.plan import Plan
from refinfer.sources.matrices import ChunkedMatrix, Scratch
from refinfer.trace import Recorder

__all__ = ["StreamedChunks", "StreamedSource"]


class StreamedChunks:
    """The `n` chunks of one matrix, given by its source; `first` is the number of the first one in the cycle."""

    def __init__(self, source: StreamedSource, first: int, n: int) -> None:
        self._source = source
        self._first = first
        self._n = n

    def in_order(self) -> Iterable[Tiles]:
        """Give the tiles of every chunk; each is valid until the next is asked for.

        Raises:
            DamagedWeightsError: a chunk cannot be read, or does not agree with its checksum.
        """
        return self._source.chunks(self._first, self._n)

    def some(self, numbers: Sequence[int]) -> Iterator[Tiles]:
        """Give the tiles of the chunks with these numbers, to look up rows; each valid until the next is asked for.

        Raises:
            DamagedWeightsError: a chunk cannot be read, or does not agree with its checksum.
        """
        for number in numbers:
            yield from self._source.out_of_turn(self._first + number)


class StreamedSource:
    """All weights of a packed file, in the memory that a plan gives them.

    Every chunk that is read is checked before it is given. Without prefetch threads a chunk is read when it is needed.
    `most_rows` is the most tokens in a pass (one block of tokens through all layers). `paged` replaces locked chunks
    and ring by a page cache (`LruPages`), for comparison.

    Raises:
        DamagedWeightsError: a locked chunk or the vectors cannot be read, or do not agree with their checksum.
    """

    def __init__(
        self, file: PackedFile, plan: Plan, recorder: Recorder, most_rows: int, *, paged: bool = False
    ) -> None:
        inventory = file.inventory
        self.config = inventory.config
        self.scratch = Scratch(inventory, most_rows)
        self.locked: dict[int, Tiles] = {}
        self.lock_s = 0.0
        self._process = os.getpid()
        self._inventory = inventory
        self._file = file
        self._recorder = recorder
        self._views: dict[tuple[int, int, int, int], Tiles] = {}
        vectors = file.vectors()
        # A chunk of a tied table is read into here, outside the ring, when a row of it is looked up.
        self._staging = pages(staged_chunk_nbytes(inventory))
        if not paged:
            self._lock(plan)
        firsts: dict[str, int] = {}
        for number, chunk in enumerate(inventory.cycle):
            firsts.setdefault(inventory.matrices[chunk.matrix].name, number)
        layouts = {matrix.name: matrix.layout for matrix in inventory.matrices}

        def matrix(name: str, bias: Float32Array | None) -> Matrix:
            layout = layouts[name]
            return ChunkedMatrix(layout, StreamedChunks(self, firsts[name], len(layout.chunks)), bias, self.scratch)

        self._weights: Weights | None = assemble(
            self.config, matrix=matrix, table=file.table, vector=vectors.__getitem__
        )
        self._reader = self._reader_of(plan, paged=paged)  # last, because it starts threads: nothing after it can fail

    def _reader_of(self, plan: Plan, *, paged: bool) -> Reader:
        if paged:
            n_slots = max(1, (plan.account.locked + plan.account.ring) // plan.slot_nbytes)
            self._slots = _cut_slots(n_slots, plan.slot_nbytes)
            return LruPages(self._slots, self._read)
        order = [number for number in range(len(self._inventory.cycle)) if number not in self.locked]
        self._slots = _cut_slots(plan.ring_slots, plan.slot_nbytes) or [self._staging]
        if plan.prefetch_threads and order:
            return Prefetcher(order, self._slots, self._read, plan.prefetch_threads)
        return OnDemand(self._slots, self._read)

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        """Give the weights. The reader needs no sign of a new pass: it goes on from whichever chunk is taken.

        Raises:
            GenerationError: the source is closed.
            SessionInUseError: the process was forked, and the threads and locks belong to its parent.
        """
        if os.getpid() != self._process:
            raise SessionInUseError("weights that are read from disk cannot follow a fork; load the model in the child")
        yield still_open(self._weights)

    # --8<-- [start:chunks]
    def chunks(self, first: int, n: int) -> Iterator[Tiles]:
        """Give the tiles of `n` chunks of the cycle one by one, each valid until the next is asked for.

        `first` is a number in the cycle. A chunk that is in `locked`, by its number, is given from there. Any other is
        taken from `_reader`, when it is asked for. Its loan is released when the caller asks for the next chunk, and
        also if the caller leaves, or an exception does: the `finally` of a `try` around a `yield` runs then too.

        `_recorder` notes the times. The time of a `take` is waiting: `waited(kind, started)`. The caller
        multiplies a chunk during its `yield`, so the time of every `yield`, also of a locked chunk, is computing:
        `note("compute", "compute", kind, started)`. `_recorder.clock.now()` is the time, `_kind(number)` the kind.
        Whether a product that the caller leaves is noted too does not matter.

        Raises:
            DamagedWeightsError: one cannot be read, or does not agree with its checksum.
        """
        # lab 12: give locked chunks from memory, and all others from the reader
        recorder = self._recorder
        for number in range(first, first + n):
            if (tiles := self.locked.get(number)) is not None:
                started = recorder.clock.now()
                yield tiles
                recorder.note("compute", "compute", self._kind(number), started)
                continue
            started = recorder.clock.now()
            loan = self._reader.take(number)
            recorder.waited(self._kind(number), started)
            started = recorder.clock.now()
            try:
                yield loan.tiles
                recorder.note("compute", "compute", self._kind(number), started)
            finally:
                self._reader.release(loan)
        # end lab

    # --8<-- [end:chunks]

    def out_of_turn(self, number: int) -> Iterator[Tiles]:
        """Give the tiles of a chunk, to look up rows in it; the ring may be reading other chunks at that moment.

        Unless it is locked, a chunk of a tied table is read into `_staging`. Any other is taken through the ring.

        Raises:
            DamagedWeightsError: it cannot be read, or does not agree with its checksum.
        """
        if (locked := self.locked.get(number)) is not None:
            yield locked
        elif self._inventory.cycle[number].padded_nbytes > self._staging.size:
            yield from self.chunks(number, 1)
        else:
            started = self._recorder.clock.now()
            tiles = self._tiles(number, self._staging)
            self._recorder.waited(self._kind(number), started)
            yield tiles

    def _kind(self, number: int) -> str:
        return self._inventory.cycle[number].kind

    def _read(self, number: int, slot: Bytes, thread: int) -> Tiles:
        """Read and check a chunk, and note how long it took; prefetch threads run this."""
        with self._recorder.reading(thread, self._kind(number)):
            return self._tiles(number, slot)

    def _tiles(self, number: int, slot: Bytes) -> Tiles:
        """Read a chunk into a slot, and view it as tiles; views are made once for each slot and shape of chunk."""
        chunk = self._file.read(number, slot)
        used = self._inventory.cycle[number]
        layout = self._inventory.matrices[used.matrix].layout
        kind = id(slot), layout.tile.nr, layout.K, len(chunk)
        if (tiles := self._views.get(kind)) is None:
            tiles = self._views[kind] = layout.tiles(chunk, layout.chunks[used.index])
        return tiles

    def _lock(self, plan: Plan) -> None:
        """Read the locked chunks, by as many threads as a plan has for reading ahead. No loan of theirs is released."""
        numbers, memory = sorted(plan.locked), pages(plan.account.locked)
        ends = accumulate((self._inventory.cycle[number].padded_nbytes for number in numbers), initial=0)
        places = [memory[start:end] for start, end in pairwise(ends)]

        def read(number: int, place: Bytes, thread: int) -> Tiles:
            used = self._inventory.cycle[number]
            layout = self._inventory.matrices[used.matrix].layout
            return layout.tiles(self._file.read(number, place), layout.chunks[used.index])

        memory[::PAGE_BYTES] = 0  # a first write makes the system provide a page: now, not while reading is timed
        started = self._recorder.clock.now()
        if plan.prefetch_threads and numbers:
            with closing(Prefetcher(numbers, places, read, plan.prefetch_threads)) as reader:
                try:
                    self.locked = {number: reader.take(number).tiles for number in numbers}
                except BaseException:
                    self._file.close()  # before `reader` waits for its threads: a throttled store makes them sleep
                    raise
        else:
            self.locked = {number: read(number, place, 0) for number, place in zip(numbers, places, strict=True)}
        self.lock_s = self._recorder.clock.now() - started

    def close(self) -> None:
        """End the threads and close the file; closing again is allowed. A forked child only releases memory."""
        if os.getpid() == self._process:
            self._file.close()  # first: it ends the sleep of a throttled store; reads under way still end by themselves
            self._reader.close()
        self._reader = Closed()  # last: if Ctrl-C comes before, closing again closes it
        self._weights, self._staging, self._slots = None, pages(0), []
        self.locked.clear()
        self._views.clear()


def _cut_slots(n: int, nbytes: int) -> list[Bytes]:
    memory = pages(n * nbytes)
    return [memory[i * nbytes : (i + 1) * nbytes] for i in range(n)]
