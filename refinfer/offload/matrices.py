"""Matrices and tables over packed chunks, wherever those lie.

Knows: how a product walks over chunks, how single rows are read. Does not know: files, plans.
Spec: OFFLOAD-3, OFFLOAD-6. Tutorial: 06.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator

import numpy as np

from refinfer.arrays import Float32Array, IntArray
from refinfer.errors import DamagedWeightsError
from refinfer.model.checkpoint import stored_to_f32
from refinfer.offload.inventory import Inventory
from refinfer.packing.formats import Bytes, PackedLayout, PackedMatrix
from refinfer.packing.gemm import require_rows
from refinfer.packing.matmul import matmul, multiply_chunk, scratch_floats, start_product
from refinfer.packing.product import GemmScratch
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.packers import chunks_of, record_nbytes, rows_of_records

__all__ = [
    "RecordTable",
    "ResidentMatrix",
    "Scratch",
    "damaged",
    "gemm_scratch_nbytes",
    "product_of_chunks",
    "vectors_of",
]


def gemm_scratch_nbytes(inventory: Inventory, most_rows: int) -> int:
    """Return the bytes of scratch that products of up to `most_rows` rows with a model's matrices take."""
    return 4 * scratch_floats({matrix.layout for matrix in inventory.matrices}, most_rows)


class Scratch:
    """The scratch that all matrices of a source share; a larger one is made where more rows come than were reserved."""

    def __init__(self, inventory: Inventory, most_rows: int) -> None:
        self._layouts = {m.layout for m in inventory.matrices}
        self._most_rows = most_rows
        self._reserved = GemmScratch(scratch_floats(self._layouts, most_rows))

    def of(self, M: int) -> GemmScratch:
        """Return scratch for a product of M rows."""
        return self._reserved if self._most_rows >= M else GemmScratch(scratch_floats(self._layouts, M))


def product_of_chunks(
    x: Float32Array,
    layout: PackedLayout,
    buffers: Iterator[Bytes],
    bias: Float32Array | None,
    out: Float32Array | None,
    scratch: GemmScratch,
) -> Float32Array:
    """Return `x @ W.T + bias`, taking each chunk as it arrives."""
    if out is None:
        out = np.empty((len(x), layout.N), np.float32)
    product = start_product(x, layout, scratch)
    for chunk, buffer in zip(layout.chunks, buffers, strict=True):
        multiply_chunk(product, layout, chunk, buffer, out)
    if bias is not None:
        np.add(out, bias, out=out)
    return out


def vectors_of(block: Float32Array, inventory: Inventory) -> dict[str, Float32Array]:
    """Cut the block of norms and biases into its vectors."""
    vectors, end = {}, 0
    for name, n in inventory.vectors.items():
        vectors[name] = block[end : end + n]
        end += n
    return vectors


class ResidentMatrix:
    """A packed matrix in memory, with its bias and the scratch it shares with the others of its source."""

    def __init__(self, packed: PackedMatrix, bias: Float32Array | None, scratch: Scratch) -> None:
        self.packed = packed
        self._bias = bias
        self._scratch = scratch

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.packed.layout.N, self.packed.layout.K

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        """Return `x @ W.T + bias`, chunk by chunk."""
        y = matmul(x, self.packed, out, self._scratch.of(len(x)))
        if self._bias is not None:
            np.add(y, self._bias, out=y)
        return y

    def matmul_arriving(self, x: Float32Array, buffers: Iterator[Bytes], out: Float32Array | None) -> Float32Array:
        """Return the same bits, taking each chunk from `buffers`."""
        return product_of_chunks(x, self.packed.layout, buffers, self._bias, out, self._scratch.of(len(x)))

    def rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as float32 `[len(ids), K]`."""
        return self.packed.unpack_rows(ids)


def damaged(where: str, key: PackKey, chunk: int | None = None) -> DamagedWeightsError:
    """Return the error of a buffer or chunk that does not agree with its checksum."""
    part = key.name if chunk is None else f"{key.name}, chunk {chunk},"
    return DamagedWeightsError(f"{where}: {part} does not agree with its checksum: the file is damaged; start again")


class RecordTable:
    """An embedding table left as it is stored, its rows read one at a time, each checked against its own checksum."""

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
            stored = rows_of_records(record[None], self._key, ids[i : i + 1])
            if stored is None:
                raise damaged(self._where, self._key)
            out[i] = stored_to_f32(stored[0])
        return out
