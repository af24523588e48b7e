"""A weight source over a provider: packed weights in memory, or in the file it has mapped.

Finds the buffer of each weight. Leaves to others: building files (`weight_cache`), budgets (`offload`).
Read more: tutorial 06; clauses OFFLOAD-3 to OFFLOAD-6.

Every source multiplies the same chunks by the same calls, so all give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np

from refinfer.arrays import Float32Array
from refinfer.clock import Clock
from refinfer.inventory import Inventory
from refinfer.model.weights import Matrix, RowTable, Weights, assemble, still_open
from refinfer.packing.formats import PackedMatrix
from refinfer.sources.mapped import MakeAhead, MappedChunks, Watch
from refinfer.sources.matrices import ChunkedMatrix, RecordTable, ResidentChunks, Scratch, vectors_of
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.packers import layout_of_key
from refinfer.weight_cache.provider import WeightCacheProvider

__all__ = ["PackedSource"]


class PackedSource:
    """All weights of a model, from a provider that holds them; closing the source deletes the provider's cache.

    `keys` maps the names of tensors to the keys of their buffers. `mapped` is the file that the provider has mapped, if
    its chunks are to be checked before they are used; `ahead` makes the threads that do so ahead of the products.
    """

    def __init__(
        self,
        inventory: Inventory,
        provider: WeightCacheProvider,
        keys: Mapping[str, PackKey],
        most_rows: int,
        clock: Clock,
        mapped: MappedFile | None = None,
        ahead: MakeAhead | None = None,
    ) -> None:
        self.config = inventory.config
        self._provider = provider
        scratch = Scratch(inventory, most_rows)
        block = keys[inventory.vectors_name]
        vectors = vectors_of(provider[block].view(np.float32), inventory)
        order = (keys[matrix.name] for matrix in inventory.matrices)
        watch = Watch(mapped, block, order, clock, ahead) if mapped else None

        def matrix(name: str, bias: Float32Array | None) -> Matrix:
            key = keys[name]
            layout, buffer = layout_of_key(key), provider[key]
            packed = PackedMatrix(layout, [buffer[c.offset : c.offset + c.nbytes] for c in layout.chunks])
            if watch is None:
                return ChunkedMatrix(layout, ResidentChunks(packed), bias, scratch)
            return ChunkedMatrix(layout, MappedChunks(packed, key, watch), bias, scratch)

        def table(name: str) -> RowTable:
            key = keys[name]
            buffer = provider[key]
            where = str(mapped.path) if mapped else "memory"
            return RecordTable(key, where, lambda start, nbytes: buffer[start : start + nbytes])

        self._watch = watch
        self._weights: Weights | None = assemble(self.config, matrix=matrix, table=table, vector=vectors.__getitem__)

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        """Yield the weights of a pass; a mapped file is examined before and after it.

        Raises:
            DamagedWeightsError: weights of the file do not agree with their checksums.
            GenerationError: the source is closed.
        """
        weights = still_open(self._weights)
        with self._watch.forward_pass() if self._watch else nullcontext():
            yield weights

    def close(self) -> None:
        """Release the provider's memory or mapping, and every matrix over it."""
        self._provider.delete_cache()
        self._weights = self._watch = None
