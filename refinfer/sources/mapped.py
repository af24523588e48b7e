"""Weights in a mapped file: checked at first use, and again after anybody wrote to the file.

Decides when a chunk has to be checked. Leaves to others: multiplying matrices, building the file.
Read more: tutorial 06; clauses OFFLOAD-4, OFFLOAD-5.

Checking everything at each token would cost more than multiplying. So each chunk is checked once, and the file's
times are looked at before and after every pass, which takes a microsecond: any write to the file changes them, and then
everything is checked again before the token is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from refinfer.clock import Clock
from refinfer.packing.formats import PackedMatrix
from refinfer.packing.layout import Tiles
from refinfer.sources.matrices import damaged
from refinfer.weight_cache.format import Entry
from refinfer.weight_cache.mapped_file import MappedFile

__all__ = ["MappedChunks", "Watch"]


class Watch:
    """Examines a mapped file before and after each pass; `epoch` counts the times that a write was noticed.

    `vectors` is the entry of the block of norms and biases.
    """

    def __init__(self, mapped: MappedFile, vectors: Entry, clock: Clock) -> None:
        self.mapped = mapped
        self._clock = clock
        # Two writes within one clock tick can leave the same times.
        self._restless_until = self._clock.now() + mapped.tick_s if mapped.age_s < mapped.tick_s else -math.inf
        self.chunks: list[MappedChunks] = []
        self.epoch = 0
        self._vectors = vectors
        self._vectors_checked_in = -1

    def begin(self) -> None:
        """Examine the file before a pass, and check the vectors unless they have been checked since the last write.

        Raises:
            DamagedWeightsError: the vectors do not agree with their checksum, or the file was cut short.
        """
        if self.mapped.changed():
            self._restless_until = self._clock.now() + self.mapped.tick_s
            self.epoch += 1
        elif self._restless_until > 0:
            self.epoch += 1
            if self._clock.now() >= self._restless_until:  # the last check until the next write
                self._restless_until = -math.inf
        if self._vectors_checked_in != self.epoch:
            if not self.mapped.is_sound(self._vectors.chunks[0]):
                raise damaged(str(self.mapped.path), self._vectors.key)
            self._vectors_checked_in = self.epoch

    def end(self) -> None:
        """Examine the file after a pass; if it was written to during the pass, check everything.

        Raises:
            DamagedWeightsError: something does not agree with its checksum, or the file was cut short.
        """
        before = self.epoch
        self.begin()
        if self.epoch != before:
            for chunks in self.chunks:
                chunks.check()


class MappedChunks:
    """The chunks of a matrix in a mapped file: each is checked just before it is first used."""

    def __init__(self, packed: PackedMatrix, entry: Entry, watch: Watch) -> None:
        self._tiles = packed.tiles
        self._entry = entry
        self._watch = watch
        self._checked_in = -1

    def in_order(self) -> Iterable[Tiles]:
        """Return the tiles of every chunk; a check brings each into the processor's cache just before it is multiplied.

        Raises:
            DamagedWeightsError: a chunk does not agree with its checksum.
        """
        return self._tiles if self._checked_in == self._watch.epoch else self._checked()

    def some(self, numbers: Sequence[int]) -> Iterable[Tiles]:
        """Return the tiles of the chunks with these numbers, after checking all chunks.

        Raises:
            DamagedWeightsError: a chunk does not agree with its checksum.
        """
        self.check()
        return [self._tiles[number] for number in numbers]

    def check(self) -> None:
        """Check all chunks, unless that has been done since the file was last written to."""
        for _ in self.in_order():
            pass

    def _checked(self) -> Iterator[Tiles]:
        mapped, epoch = self._watch.mapped, self._watch.epoch
        for number, (chunk, tiles) in enumerate(zip(self._entry.chunks, self._tiles, strict=True)):
            if not mapped.is_sound(chunk):
                raise damaged(str(mapped.path), self._entry.key, number)
            yield tiles
        self._checked_in = epoch
