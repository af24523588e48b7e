"""Matrices and tables over packed chunks, wherever those lie.

A weight source gives the transformer its matrices. Sources differ in where chunks are: in memory, in a mapped file, or
on a disk until they are needed. They share what is here: one matrix class over anything that gives chunks, and a table
that is read row by row. Leaves to others: files, plans.
Read more: tutorial 06; clauses OFFLOAD-3, OFFLOAD-6.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from refinfer.arrays import Float32Array, IntArray, require_rows, stored_to_f32
from refinfer.errors import DamagedWeightsError
from refinfer.inventory import Inventory
from refinfer.packing.formats import PackedMatrix
from refinfer.packing.layout import Bytes, PackedLayout, Tiles
from refinfer.packing.matmul import matmul, scratch_floats, unpack_rows
from refinfer.packing.product import GemmScratch
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.packers import chunks_of, record_nbytes, row_of_record

__all__ = [
    "ChunkedMatrix",
    "Chunks",
    "RecordTable",
    "ResidentChunks",
    "Scratch",
    "damaged",
    "vectors_of",
]


class Scratch:
    """Memory for intermediate results that all matrices of a source share, enough for x of `most_rows` rows."""

    def __init__(self, inventory: Inventory, most_rows: int) -> None:
        self._layouts = {m.layout for m in inventory.matrices}
        self._most_rows = most_rows
        self._reserved = GemmScratch(scratch_floats(self._layouts, most_rows))

    def of(self, M: int) -> GemmScratch:
        """Return scratch for a product of M rows: what is reserved or, for more than `most_rows`, larger scratch."""
        return self._reserved if self._most_rows >= M else GemmScratch(scratch_floats(self._layouts, M))


def vectors_of(block: Float32Array, inventory: Inventory) -> dict[str, Float32Array]:
    """Cut the block of norms and biases into its vectors."""
    vectors, end = {}, 0
    for name, n in inventory.vectors.items():
        vectors[name] = block[end : end + n]
        end += n
    return vectors


class Chunks(Protocol):
    """The chunks of one packed matrix, wherever they are: in memory, in a mapped file, or still to be read."""

    def in_order(self) -> Iterable[Tiles]:
        """Give the tiles of every chunk, each valid until the next is asked for."""
        ...

    def some(self, numbers: Sequence[int]) -> Iterable[Tiles]:
        """Give the tiles of the chunks with these numbers, to look up rows; each valid until the next is asked for."""
        ...


class ResidentChunks:
    """Chunks that stay in memory."""

    def __init__(self, packed: PackedMatrix) -> None:
        self._tiles = packed.tiles

    def in_order(self) -> Iterable[Tiles]:
        """Give the tiles of every chunk."""
        return self._tiles

    def some(self, numbers: Sequence[int]) -> Iterable[Tiles]:
        """Give the tiles of the chunks with these numbers."""
        return [self._tiles[number] for number in numbers]


class ChunkedMatrix:
    """A matrix `[N, K]` over packed chunks, with its bias if it has one; `scratch` is shared with other matrices."""

    def __init__(self, layout: PackedLayout, chunks: Chunks, bias: Float32Array | None, scratch: Scratch) -> None:
        self.shape = layout.N, layout.K
        self._layout = layout
        self._chunks = chunks
        self._bias = bias
        self._scratch = scratch

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        """Return `x @ W.T + bias`, chunk by chunk.

        Raises:
            DamagedWeightsError: a chunk cannot be read, or does not agree with its checksum.
        """
        y = matmul(x, self._layout, self._chunks.in_order(), out, self._scratch.of(len(x)))
        if self._bias is not None:
            np.add(y, self._bias, out=y)
        return y

    def rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as float32 `[len(ids), K]`.

        Raises:
            RequestError: there is no such row.
            DamagedWeightsError: a chunk cannot be read, or does not agree with its checksum.
        """
        return unpack_rows(ids, self._layout, self._chunks.some)


def damaged(where: str, key: PackKey, chunk: int | None = None) -> DamagedWeightsError:
    """Return the error for a buffer or chunk that does not agree with its checksum; `where` names the file."""
    part = key.name if chunk is None else f"{key.name}, chunk {chunk},"
    return DamagedWeightsError(f"{where}: {part} does not agree with its checksum: the file is damaged")


class RecordTable:
    """An embedding table left as it is stored, read one record at a time: a row, with its own checksum before it.

    `read(start, nbytes)` returns bytes of the table's buffer; `where` names the file in errors.
    """

    def __init__(self, key: PackKey, where: str, read: Callable[[int, int], Bytes]) -> None:
        self.shape = key.shape[0], key.shape[1]
        self._key = key
        self._where = where
        self._read = read
        self._first_rows = [chunk.first_row for chunk in chunks_of(key)]

    def rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as float32 `[len(ids), K]`.

        Raises:
            DamagedWeightsError: a row does not agree with its checksum.
        """
        require_rows(ids, self.shape[0])
        nbytes = record_nbytes(self._key)
        out = np.empty((len(ids), self.shape[1]), np.float32)
        for i, row in enumerate(ids.tolist()):
            chunk = chunks_of(self._key)[bisect_right(self._first_rows, row) - 1]
            record = self._read(chunk.offset + (row - chunk.first_row) * nbytes, nbytes)
            stored = row_of_record(record, self._key, row)
            if stored is None:
                raise damaged(self._where, self._key)
            out[i] = stored_to_f32(stored)
        return out
