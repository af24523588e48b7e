"""A weight source over a provider: packed weights in memory, or in the file it has mapped.

Which buffer is which weight. Leaves to others: how a file comes to be (`weight_cache`), budgets (`streamed`).
Read more: tutorial 06; clauses OFFLOAD-3 to OFFLOAD-6.

Every source multiplies the same chunks by the same calls, so all give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from refinfer.arrays import Float32Array
from refinfer.model.weights import LayerWeights, Matrix, RowTable, assemble, walk
from refinfer.offload.inventory import Inventory
from refinfer.offload.mapped import FirstTable, LastMatrix, MappedChunks, Watch
from refinfer.offload.matrices import ChunkedMatrix, RecordTable, ResidentChunks, Scratch, vectors_of
from refinfer.packing.formats import PackedMatrix
from refinfer.trace import Clock
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.packers import layout_of_key
from refinfer.weight_cache.provider import WeightCacheProvider

__all__ = ["PackedSource"]


class PackedSource:
    """All weights of a model, from a provider that holds them; closing the source deletes the provider's cache.

    `keys` are the keys of all buffers by their tensor's name. `mapped` is the file that the provider has mapped, if
    its chunks are to be checked before they are used.
    """

    def __init__(
        self,
        inventory: Inventory,
        provider: WeightCacheProvider,
        keys: Mapping[str, PackKey],
        most_rows: int,
        clock: Clock,
        mapped: MappedFile | None = None,
    ) -> None:
        self.config = inventory.config
        self._provider = provider
        scratch = Scratch(inventory, most_rows)
        block = keys[inventory.vectors_name]
        vectors = vectors_of(provider[block].view(np.float32), inventory)
        entries = {entry.key: entry for entry in mapped.index.entries} if mapped else {}
        watch = Watch(mapped, entries[block], clock) if mapped else None

        def matrix(name: str, bias: Float32Array | None) -> Matrix:
            key = keys[name]
            layout, buffer = layout_of_key(key), provider[key]
            packed = PackedMatrix(layout, [buffer[c.offset : c.offset + c.nbytes] for c in layout.chunks])
            if watch is None:
                return ChunkedMatrix(layout, ResidentChunks(packed), bias, scratch)
            watch.chunks.append(MappedChunks(packed, entries[key], watch))
            return ChunkedMatrix(layout, watch.chunks[-1], bias, scratch)

        def table(name: str) -> RowTable:
            key = keys[name]
            buffer = provider[key]
            where = str(mapped.path) if mapped else "memory"
            return RecordTable(key, where, lambda start, nbytes: buffer[start : start + nbytes])

        self._watch = watch
        first, self._layers, self.norm, last = assemble(
            self.config, matrix=matrix, table=table, vector=vectors.__getitem__
        )
        self.embed_tokens: RowTable = FirstTable(first, watch) if watch else first
        self.lm_head: Matrix = LastMatrix(last, watch) if watch else last

    def layers(self) -> Iterator[LayerWeights]:
        """Walk over the layers in execution order."""
        return walk(self._layers)

    def close(self) -> None:
        """Release the provider's memory or mapping, and every matrix over it."""
        self._provider.delete_cache()
        self._layers = ()
        if self._watch is not None:
            self._watch.chunks.clear()
