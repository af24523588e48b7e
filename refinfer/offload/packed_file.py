"""A model's packed weights in a cache file that is read, not mapped as in the first evening.

Finds each chunk, vector and row in the file, and checks every read. Leaves to others: how bytes are read (`store`),
when and into which memory (`streamed`).
Read more: tutorial 12; clauses OFFLOAD-7 to OFFLOAD-11.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refinfer.arrays import PAGE_BYTES, Float32Array, aligned_empty, whole_pages
from refinfer.errors import CacheFileError, DamagedWeightsError
from refinfer.inventory import Inventory
from refinfer.offload.store import Store
from refinfer.packing.layout import Bytes
from refinfer.sources.matrices import RecordTable, damaged, vectors_of
from refinfer.weight_cache.format import Entry
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.mapped_file import read_file

__all__ = ["PackedFile", "pages"]


def pages(nbytes: int) -> Bytes:
    """Return `nbytes` uninitialised bytes, a multiple of 4, of which the first lies on a page boundary."""
    return aligned_empty((nbytes // 4,), PAGE_BYTES).view(np.uint8)


class PackedFile:
    """A model's buffers in the cache file at `path`; `store` reads its bytes, `keys` has each buffer's key by its name.

    Raises:
        DamagedWeightsError: the file cannot be used, or does not hold these buffers.
    """

    def __init__(self, path: Path, inventory: Inventory, keys: Mapping[str, PackKey], store: Store) -> None:
        self.inventory = inventory
        self._path = path
        self._store = store
        try:
            entries = {entry.key: entry for entry in read_file(path)[1].entries}
        except CacheFileError as error:
            raise DamagedWeightsError(f"{path} cannot be used: {error.reason}") from None
        if not entries.keys() >= set(keys.values()):
            raise DamagedWeightsError(f"{path} was replaced while it was opened")
        self._entries = {name: entries[key] for name, key in keys.items()}
        of_matrix = [self._entries[matrix.name] for matrix in inventory.matrices]
        # For each chunk of the cycle: the index entry of its buffer (where its chunks lie), and its number there.
        self._cycle = [(of_matrix[chunk.matrix], chunk.index) for chunk in inventory.cycle]

    # --8<-- [start:read]
    def read(self, number: int, into: Bytes) -> Bytes:
        """Read chunk `number` of the cycle into `into`, as whole pages; return its bytes without the padding.

        Raises:
            DamagedWeightsError: it cannot be read, or does not agree with its checksum.
        """
        return self._read(*self._cycle[number], into)

    def _read(self, entry: Entry, index: int, into: Bytes) -> Bytes:
        chunk = entry.chunks[index]
        self._store.read(chunk.offset, into[: chunk.padded_nbytes])
        if zlib.crc32(into[: chunk.nbytes].data) != chunk.checksum:
            raise damaged(str(self._path), entry.key, index)
        return into[: chunk.nbytes]

    # --8<-- [end:read]

    def vectors(self) -> dict[str, Float32Array]:
        """Read the block of norms and biases.

        Raises:
            DamagedWeightsError: it cannot be read, or does not agree with its checksum.
        """
        entry = self._entries[self.inventory.vectors_name]
        block = self._read(entry, 0, pages(entry.padded_nbytes))
        return vectors_of(block.view(np.float32), self.inventory)

    def table(self, name: str) -> RecordTable:
        """Return an embedding table whose rows are read one at a time."""
        entry = self._entries[name]

        def read(start: int, nbytes: int) -> Bytes:
            before = start % PAGE_BYTES  # a store reads whole pages only
            whole = pages(whole_pages(before + nbytes))
            self._store.read(entry.offset + start - before, whole)
            return whole[before : before + nbytes]

        return RecordTable(entry.key, str(self._path), read)

    def close(self) -> None:
        """Close the store; closing again is allowed."""
        self._store.close()
