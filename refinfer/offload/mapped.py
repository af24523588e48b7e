"""A mapped file as a place of weights: checked at first use, and again after anybody wrote to it.

Knows: when a chunk has to be checked. Does not know: how a matrix is multiplied, how the file came to be.
Spec: OFFLOAD-4, OFFLOAD-5. Tutorial: 06.

Checking everything at each token would cost more than multiplying. So each chunk is checked once, and the file's
times are looked at before and after every pass, which takes a microsecond: whoever writes to the file changes them,
and then everything is checked anew before the token is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from refinfer.arrays import Float32Array, IntArray
from refinfer.model.weights import Matrix, RowTable
from refinfer.offload.matrices import ResidentMatrix, damaged
from refinfer.packing.formats import Bytes
from refinfer.trace import Clock
from refinfer.weight_cache.file import MappedFile
from refinfer.weight_cache.format import Entry

__all__ = ["FirstTable", "LastMatrix", "MappedMatrix", "Watch"]


class Watch:
    """Looks at a mapped file before and after each pass; `epoch` counts how often it was found written to.

    `vectors` is the entry of the block of norms and biases.
    """

    def __init__(self, mapped: MappedFile, vectors: Entry, clock: Clock) -> None:
        self.mapped = mapped
        self._clock = clock
        # The times of a file do not tell a write in the same tick of the system's clock from the one before.
        self._restless_until = self._clock.now() + mapped.tick_s if mapped.age_s < mapped.tick_s else -math.inf
        self.matrices: list[MappedMatrix] = []
        self.epoch = 0
        self._vectors = vectors
        self._vectors_checked_in = -1

    def begin(self) -> None:
        """Look, and check the vectors if need be.

        Raises:
            DamagedWeightsError: they do not agree with their checksum, or the file was cut short.
        """
        if self.mapped.changed():
            self._restless_until = self._clock.now() + self.mapped.tick_s
            self.epoch += 1
        elif self._restless_until > 0:
            self.epoch += 1
            if self._clock.now() >= self._restless_until:  # checked once more, and then at rest
                self._restless_until = -math.inf
        if self._vectors_checked_in != self.epoch:
            if not self.mapped.is_sound(self._vectors.chunks[0]):
                raise damaged(str(self.mapped.path), self._vectors.key)
            self._vectors_checked_in = self.epoch

    def end(self) -> None:
        """Look, and if the file was written to during the pass, check everything.

        Raises:
            DamagedWeightsError: something does not agree with its checksum, or the file was cut short.
        """
        before = self.epoch
        self.begin()
        if self.epoch != before:
            for matrix in self.matrices:
                matrix.check()


class MappedMatrix:
    """A packed matrix in a mapped file: each chunk is checked just before it is first used."""

    def __init__(self, matrix: ResidentMatrix, entry: Entry, watch: Watch) -> None:
        self._matrix = matrix
        self._entry = entry
        self._watch = watch
        self._checked_in = -1

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self._matrix.shape

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        """Return `x @ W.T + bias`, chunk by chunk.

        Raises:
            DamagedWeightsError: a chunk does not agree with its checksum.
        """
        if self._checked_in == self._watch.epoch:
            return self._matrix.matmul(x, out)
        # Checked and multiplied in turn, a chunk is still in the processor's cache when it is multiplied.
        y = self._matrix.matmul_arriving(x, self._checked_buffers(), out)
        self._checked_in = self._watch.epoch
        return y

    def rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as float32 `[len(ids), K]`.

        Raises:
            DamagedWeightsError: a chunk does not agree with its checksum.
        """
        self.check()
        return self._matrix.rows(ids)

    def check(self) -> None:
        """Check all chunks, unless that has been done since the file was last written to."""
        if self._checked_in != self._watch.epoch:
            for _ in self._checked_buffers():
                pass
            self._checked_in = self._watch.epoch

    def _checked_buffers(self) -> Iterator[Bytes]:
        mapped = self._watch.mapped
        for number, (chunk, buffer) in enumerate(zip(self._entry.chunks, self._matrix.packed.buffers, strict=True)):
            if not mapped.is_sound(chunk):
                raise damaged(str(mapped.path), self._entry.key, number)
            yield buffer


class FirstTable:
    """The embedding table, which every pass begins with."""

    def __init__(self, table: RowTable, watch: Watch) -> None:
        self.shape = table.shape
        self._table = table
        self._watch = watch

    def rows(self, ids: IntArray) -> Float32Array:
        """Look at the file, then return the rows."""
        self._watch.begin()
        return self._table.rows(ids)


class LastMatrix:
    """The output table, which every pass that gives logits ends with."""

    def __init__(self, matrix: Matrix, watch: Watch) -> None:
        self.shape = matrix.shape
        self.rows = matrix.rows
        self._matrix = matrix
        self._watch = watch

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        """Return `x @ W.T`, then look at the file."""
        y = self._matrix.matmul(x, out)
        self._watch.end()
        return y
