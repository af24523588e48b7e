"""A weight source over a provider: packed weights in memory, or in the file it has mapped.

Knows: which buffer is which weight. Does not know: how a file comes to be (`weight_cache`), budgets (`streamed`).
Spec: OFFLOAD-3 to OFFLOAD-6. Tutorial: 06.

Every source multiplies the same chunks by the same calls, so all give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refinfer.arrays import Float32Array
from refinfer.model.weights import LayerWeights, Matrix, RowTable, assemble, walk
from refinfer.offload.inventory import Inventory
from refinfer.offload.mapped import FirstTable, LastMatrix, MappedMatrix, Watch
from refinfer.offload.matrices import RecordTable, ResidentMatrix, Scratch, vectors_of
from refinfer.packing.formats import PackedMatrix
from refinfer.trace import Clock
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.packers import layout_of_key
from refinfer.weight_cache.provider import WeightCacheProvider

__all__ = ["PackedSource"]


class PackedSource:
    """All weights from a provider that holds a model's inventory; closing the source deletes the provider's cache.

    Mapped weights are checked before they are used, unless `verify` is False.
    """

    def __init__(
        self, inventory: Inventory, provider: WeightCacheProvider, most_rows: int, clock: Clock, *, verify: bool = True
    ) -> None:
        self.config = inventory.config
        self._provider = provider
        self._scratch = Scratch(inventory, most_rows)
        keys = {(key.packer, key.name): key for key in provider}
        block = keys["vectors", inventory.vectors_name]
        vectors = vectors_of(provider[block].view(np.float32), inventory)
        entries, watch = {}, None
        if verify and isinstance(provider, FileWeightCacheProvider):
            entries = {entry.key: entry for entry in provider.entries}
            watch = Watch(provider.mapped, entries[block], clock)

        def matrix(name: str, bias: Float32Array | None) -> Matrix:
            key = keys["goi", name]
            layout, buffer = layout_of_key(key), provider[key]
            buffers = [buffer[chunk.offset : chunk.offset + chunk.nbytes] for chunk in layout.chunks]
            resident = ResidentMatrix(PackedMatrix(layout, buffers), bias, self._scratch)
            if watch is None:
                return resident
            watch.matrices.append(MappedMatrix(resident, entries[key], watch))
            return watch.matrices[-1]

        def table(name: str) -> RowTable:
            key = keys["rows", name]
            buffer = provider[key]
            where = str(watch.mapped.path) if watch else "memory"
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
            self._watch.matrices.clear()
