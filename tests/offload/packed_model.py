"""A model and its cache file, its weights wherever a test wants them: what the tests of weight sources share."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.clock import RealClock
from refinfer.inventory import Inventory
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.transformer import Transformer, prefill_block
from refinfer.model.weights import WeightSource
from refinfer.offload.packed_file import PackedFile
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.store import FileStore, Store
from refinfer.offload.streamed import StreamedSource
from refinfer.planning.account import Fixed, fixed_of
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.plan import Plan, Prefetch, make_plan, smallest_budget
from refinfer.prepare import IN_MEMORY, prepare
from refinfer.sources.mapped import MakeAhead
from refinfer.sources.packed import PackedSource
from refinfer.trace import Recorder
from refinfer.weight_cache.format import Entry, StoredChunk
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.load_or_build import Prepared
from refinfer.weight_cache.mapped_file import read_file

SMALL_CHUNKS: Final = 512
"""Less than a tile, so that each tile is a chunk: several to a tiny matrix, in int4 to one of more than 512 rows."""

WATCHDOG_S: Final = 30.0


@dataclass(frozen=True)
class PackedModel:
    """A model in a format, and its cache file, built at first use; `chunk_nbytes` is the aim for a chunk.

    `ahead` makes what checks mapped chunks ahead of their use.
    """

    config: ModelConfig
    folder: Path
    format: str
    file: Path
    positions: int
    chunk_nbytes: int | None = SMALL_CHUNKS
    ahead: MakeAhead | None = Prefetcher

    @cached_property
    def inventory(self) -> Inventory:
        return Inventory(self.config, self.format, self.chunk_nbytes)

    @cached_property
    def fixed(self) -> Fixed:
        return fixed_of(self.inventory, self.positions, 0)

    @property
    def smallest(self) -> int:
        """The smallest budget that works without prefetch threads."""
        return smallest_budget(self.inventory, self.fixed)

    @property
    def most(self) -> int:
        """The budget that locks everything, without prefetch threads."""
        return self.fixed.total + self.inventory.streamable_nbytes

    @property
    def rows(self) -> int:
        return prefill_block(self.config, self.positions)

    def prepared(self, where: str | None = None) -> Prepared:
        return prepare(self.inventory, open_checkpoint(self.folder), where or str(self.file), clock=RealClock())

    def packed(self, where: str | None = None) -> PackedSource:
        """Return the weights in the mapped file, just built or as it is found, or wherever else."""
        found = self.prepared(where)
        found_by = self.inventory, found.provider, found.keys, self.rows
        return PackedSource(*found_by, RealClock(), found.mapped, self.ahead)

    def in_memory(self) -> PackedSource:
        return self.packed(IN_MEMORY)

    @cached_property
    def keys(self) -> Mapping[str, PackKey]:
        """The keys of the buffers, by name; the file is built if need be."""
        found = self.prepared()
        found.provider.delete_cache()
        return found.keys

    @cached_property
    def built(self) -> Path:
        assert self.keys
        return self.file

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The buffers of the file, by name."""
        entries = {entry.key: entry for entry in read_file(self.built)[1].entries}
        return {name: entries[key] for name, key in self.keys.items()}

    @property
    def vectors(self) -> Entry:
        """The block of norms and biases."""
        return self.entries[self.inventory.vectors_name]

    @cached_property
    def chunks(self) -> list[StoredChunk]:
        """Where the chunks of the cycle lie in the file."""
        matrices = self.inventory.matrices
        return [self.entries[matrices[c.matrix].name].chunks[c.index] for c in self.inventory.cycle]

    def plan(self, name: str, budget: int, *, prefetch_threads: int = 0, ring_nbytes: int | None = None) -> Plan:
        costs = costs_of(self.inventory, HERE, prefetch_threads=prefetch_threads)
        prefetch = Prefetch(prefetch_threads, ring_nbytes)
        return make_plan(name, self.inventory, self.fixed, budget, costs, prefetch)

    def streamed(self, plan: Plan, store: Store | None = None, *, paged: bool = False) -> StreamedSource:
        """Return the weights as a plan says, by default read from the file."""
        read_from = store or FileStore(self.built)
        try:
            file = PackedFile(self.built, self.inventory, self.keys, read_from)
            return StreamedSource(file, plan, Recorder(RealClock()), self.rows, paged=paged)
        except BaseException:
            if store is None:
                read_from.close()
            raise

    def within_a_budget(
        self,
        share: float = 0.5,
        plan: str = "balanced",
        ring: int | None = None,
        *,
        prefetch_threads: int,
        paged: bool = False,
    ) -> StreamedSource:
        """Return the weights within a budget: a share of the way from the smallest that works to all of them."""
        slot = int(self.inventory.sizes.max())
        smallest = self.smallest + max(0, (ring or 2) - 2) * slot
        budget = smallest + round(share * (max(smallest, self.most) - smallest))
        ring_nbytes = None if ring is None else ring * slot
        made = self.plan(plan, budget, prefetch_threads=prefetch_threads, ring_nbytes=ring_nbytes)
        return self.streamed(made, paged=paged)


Logits = list[npt.NDArray[np.uint32]]


def drawn_ids(vocab_size: int, n: int, seed: int = 0) -> list[int]:
    """Return some token ids."""
    ids: list[int] = np.random.default_rng(seed).integers(0, vocab_size, n).tolist()
    return ids


def logits_of(
    source: WeightSource, positions: int, prompt: int = 40, steps: Sequence[int] = (1, 3), seed: int = 0
) -> Logits:
    """Return the bits of the logits of a prompt, of further tokens in steps, and of a text that begins again."""
    ids = drawn_ids(source.config.vocab_size, prompt + sum(steps), seed)
    transformer = Transformer(source, positions)
    logits, at = [transformer.prefill(ids[:prompt])], prompt
    for n in steps:
        logits.append(transformer.decode(ids[at : at + n]))
        at += n
    transformer.kv_cache.rewind(0)
    logits.append(transformer.prefill(ids[:1]))
    return [part.view(np.uint32) for part in logits]


def assert_same_logits(got: Logits, expected: Logits) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def change(path: Path, offset: int, by: int = 0x10) -> None:
    """Change a byte of a file, in place; again puts it back."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, offset)[0]
        os.pwrite(descriptor, bytes([byte ^ by]), offset)
    finally:
        os.close(descriptor)


def threads_and_descriptors() -> Counter[str]:
    """Return the names of all threads of this process, and what its descriptors are open on."""
    descriptors = Path("/proc/self/fd")
    links = [link for link in descriptors.iterdir() if link.is_symlink()] if descriptors.exists() else []
    return Counter(thread.name for thread in threading.enumerate()) + Counter(str(link.readlink()) for link in links)


def within(action: Callable[[], Any], seconds: float = WATCHDOG_S, what: str = "it hangs") -> Any:
    """Do something in a helper thread; fail if it takes too long, raise what it raises."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), what
    if errors:
        raise errors[0]
    return results[0]
