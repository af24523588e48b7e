"""From a checkpoint to a provider that holds all its packed weights: loaded, built, or packed into memory.

Which tensor goes into which buffer, and where the file lies. Leaves to others: transformers, budgets, terminals.
Read more: tutorial 06; clauses PREP-1 to PREP-6.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.errors import RequestError
from refinfer.model.checkpoint import Checkpoint
from refinfer.model.weights import require_layers
from refinfer.offload.inventory import Inventory
from refinfer.packing.formats import FORMATS
from refinfer.packing.layout import Bytes
from refinfer.trace import Clock
from refinfer.weight_cache.directory import SUFFIX, is_cache_file, path_for
from refinfer.weight_cache.format import Provenance, SourceFile
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.load_or_build import SILENT, Contents, Listener, Prepared, load_or_build
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import (
    LARGEST_BLOCK_BYTES,
    matrix_key,
    pack_into,
    packer_fingerprint,
    rows_key,
    vectors_key,
)
from refinfer.weight_cache.provider import Pack

__all__ = ["IN_MEMORY", "cache_path", "choose_format", "contents_of", "prepare"]

IN_MEMORY: Final = ":memory"
_STORED: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def choose_format(checkpoint: Checkpoint, weights: str) -> str:
    """Return the weight format: `auto` is bf16 where all matrices are stored so, else f32; nothing is lost.

    Raises:
        RequestError: there is no such format.
    """
    if weights not in ("auto", *FORMATS):
        raise RequestError(f"weights must be auto, {', '.join(FORMATS)}, not {weights!r}")
    if weights != "auto":
        return weights
    stored = {tensor.dtype for tensor in checkpoint.values() if len(tensor.shape) == 2}
    return "bf16" if stored == {"BF16"} else "f32"


def cache_path(checkpoint: Checkpoint, name: str, weight_cache: str | None) -> Path:
    """Return where the cache file of a checkpoint in the format `name` lies; `weight_cache` may say another place.

    Raises:
        RequestError: it says something that a cache file must not replace.
    """
    if weight_cache is None:
        return path_for(checkpoint.folder, name, packer_fingerprint(name))
    if weight_cache.startswith(":"):
        raise RequestError(f"--weight-cache {weight_cache} is neither {IN_MEMORY} nor a file")
    try:
        path = Path(os.path.realpath(weight_cache))
        if not weight_cache or (path.exists() and not path.is_file()):
            raise RequestError(f"--weight-cache must name a file, which {weight_cache!r} is not")
        of_the_model = path.parent == checkpoint.folder.resolve() and path.suffix != SUFFIX and path.exists()
    except (OSError, ValueError) as error:
        raise RequestError(f"--weight-cache {weight_cache!r} cannot be used: {error}") from None
    weights = {source.resolve() for source in checkpoint.paths}
    if path in weights or (of_the_model and not is_cache_file(path)) or path.suffix in {".safetensors", ".json"}:
        raise RequestError(f"--weight-cache {weight_cache} is a file of a model; name another one")
    return path


def contents_of(
    inventory: Inventory, checkpoint: Checkpoint, sources: tuple[SourceFile, ...], block: int = LARGEST_BLOCK_BYTES
) -> Contents:
    """Return what the cache file of a model holds, and how each buffer is packed from the checkpoint.

    Args:
        inventory: what the model needs.
        checkpoint: its tensors.
        sources: the identities of its files.
        block: how many bytes of weights, as float32, are packed at a time.

    Raises:
        WeightsError: a tensor is missing, or has another shape or type.
    """
    digests = {source.name: source.digest for source in sources}
    shapes = inventory.config.tensor_shapes()
    provenance = Provenance(
        str(checkpoint.folder.resolve()), inventory.format, sources, packer_fingerprint(inventory.format)
    )

    def weight(name: str) -> WeightId:
        return WeightId(digests[checkpoint.path_of(name).name], name)

    def packing(name: str, key: PackKey) -> tuple[PackKey, Pack]:
        return key, lambda buffer: _pack(checkpoint, checkpoint.stored(name, shapes[name]), key, buffer, block)

    for name, shape in shapes.items():
        checkpoint.stored(name, shape)  # all of them are there, before anything is packed
    block_key = vectors_key(sum(inventory.vectors.values()), WeightId(provenance.model_digest, inventory.vectors_name))
    packs: dict[PackKey, Pack] = {block_key: lambda buffer: _pack_vectors(inventory, checkpoint, block_key, buffer)}
    if inventory.table is not None:
        N, K = shapes[inventory.table]
        stored = _STORED[checkpoint[inventory.table].dtype]
        packs |= [packing(inventory.table, rows_key((N, K), stored, weight(inventory.table)))]
    *layers, output = inventory.matrices
    # A tied table lies at its first use, before the layers; another output table behind them.
    for matrix in [*layers, output] if inventory.table else [output, *layers]:
        packs |= [packing(matrix.name, matrix_key(matrix.layout, weight(matrix.name)))]
    return Contents(provenance, packs)


def _pack(checkpoint: Checkpoint, stored: npt.NDArray[Any], key: PackKey, buffer: Bytes, block: int) -> Iterator[int]:
    for done in pack_into(stored, key, buffer, block):
        checkpoint.let_go()
        yield done


def _pack_vectors(inventory: Inventory, checkpoint: Checkpoint, key: PackKey, buffer: Bytes) -> Iterator[int]:
    parts = [checkpoint.float32(name, (n,)) for name, n in inventory.vectors.items()]
    return pack_into(np.concatenate(parts), key, buffer)


def prepare(
    inventory: Inventory,
    checkpoint: Checkpoint,
    weight_cache: str | None,
    *,
    clock: Clock,
    listener: Listener = SILENT,
    block: int = LARGEST_BLOCK_BYTES,
    reason: str | None = None,
) -> Prepared:
    """Return a provider that holds every weight of a model.

    Args:
        inventory: what the model needs.
        checkpoint: its tensors.
        weight_cache: a file, `:memory`, or None for the file in the user's cache directory.
        clock: what measures the packing.
        listener: who is told how it goes.
        block: how many bytes of weights, as float32, are packed at a time.
        reason: why it has to be built, where the caller knows.

    Raises:
        WeightCacheError: the file cannot be written.
        RequestError: `weight_cache` names something that a cache file must not replace.
        WeightsError: a tensor is missing, or has another shape or type, or a file cannot be read.
        PackingError: weights that the format cannot hold.
    """
    require_layers(inventory.config, checkpoint)
    if weight_cache == IN_MEMORY:
        return _in_memory(inventory, checkpoint, clock, listener, reason)
    path = cache_path(checkpoint, inventory.format, weight_cache)
    return load_or_build(
        path,
        checkpoint.paths,
        lambda sources: contents_of(inventory, checkpoint, sources, block),
        clock=clock,
        listener=listener,
        reason=reason,
    )


def _in_memory(
    inventory: Inventory, checkpoint: Checkpoint, clock: Clock, listener: Listener, reason: str | None
) -> Prepared:
    """Pack everything into memory; the files' names and sizes identify them for as long as this process lives."""
    started = clock.now()
    sources = tuple(
        SourceFile(path.name, path.stat().st_size, hashlib.sha256(str(path).encode()).digest())
        for path in checkpoint.paths
    )
    provider, contents = MemoryWeightCacheProvider(), contents_of(inventory, checkpoint, sources)
    for key, pack in contents.packs.items():
        provider.get_or_pack(key, _reporting(pack, listener.progress))
    provider.finalize()
    return Prepared(provider, contents.keys, "memory", reason, tuple(provider), clock.now() - started)


def _reporting(pack: Pack, progress: Callable[[int], None]) -> Pack:
    def packing(buffer: Bytes) -> Iterator[int]:
        before = 0
        for done in pack(buffer):
            progress(done - before)
            before = done
            yield done

    return packing
