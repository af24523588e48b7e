"""Turns a checkpoint into a provider that holds all its packed weights: loaded, built, or packed into memory.

Decides which tensor goes into which buffer, and where the file lies. Leaves to others: transformers, budgets,
terminals.
Read more: tutorial 06; clauses PREP-1 to PREP-8.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.clock import Clock
from refinfer.errors import RequestError
from refinfer.inventory import Inventory
from refinfer.model.checkpoint import Checkpoint
from refinfer.model.hub import called
from refinfer.model.weights import require_layers
from refinfer.packing.formats import FORMATS
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.directory import path_for
from refinfer.weight_cache.format import Provenance, SourceFile
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.load_or_build import SILENT, CacheOutcome, Contents, Listener, Prepared, load_or_build
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import (
    matrix_key,
    pack_into,
    packer_fingerprint,
    padded_nbytes_of,
    rows_key,
    vectors_key,
)
from refinfer.weight_cache.provider import Pack

__all__ = ["IN_MEMORY", "OFF", "cache_path", "choose_format", "contents_of", "prepare"]

IN_MEMORY: Final = ":memory"
OFF: Final = "off"
_STORED: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def choose_format(checkpoint: Checkpoint, weights: str) -> str:
    """Return the weight format: `auto` is bf16 if all matrices are stored in bfloat16, else f32, so nothing is lost.

    Raises:
        RequestError: there is no such format.
    """
    if weights not in ("auto", *FORMATS):
        raise RequestError(f"weights must be one of auto, {', '.join(FORMATS)}, not {weights!r}")
    if weights != "auto":
        return weights
    stored = {tensor.dtype for tensor in checkpoint.values() if len(tensor.shape) == 2}
    return "bf16" if stored == {"BF16"} else "f32"


def cache_path(checkpoint: Checkpoint, format: str, weight_cache: str | None) -> Path:
    """Return the path of a checkpoint's cache file; `weight_cache` may name another place.

    Raises:
        RequestError: `weight_cache` names something that a cache file must not replace.
    """
    if weight_cache is None:
        return path_for(checkpoint.folder, format, packer_fingerprint(format), called=called(checkpoint.folder))
    if weight_cache.startswith(":"):
        raise RequestError(f"--weight-cache {weight_cache} is neither {IN_MEMORY} nor a file; give one of them")
    try:
        path = Path(os.path.realpath(weight_cache))
        if not weight_cache or (path.exists() and not path.is_file()):
            raise RequestError(f"--weight-cache {weight_cache!r} is not a file; give a file name")
    except (OSError, ValueError) as error:
        raise RequestError(f"--weight-cache {weight_cache!r} cannot be used: {error}") from None
    if path.suffix in {".safetensors", ".json"}:
        raise RequestError(f"--weight-cache {weight_cache} is a file of a model; name another one")
    return path


def contents_of(inventory: Inventory, checkpoint: Checkpoint, sources: tuple[SourceFile, ...]) -> Contents:
    """Return the contents of a model's cache file: each buffer, and how it is packed from the checkpoint.

    Args:
        inventory: what the model needs.
        checkpoint: its tensors.
        sources: the identities of the checkpoint's files.

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
        return key, lambda buffer: _pack(checkpoint, checkpoint.stored(name, shapes[name]), key, buffer)

    for name, shape in shapes.items():
        checkpoint.require(name, shape)  # every tensor is looked up before anything is packed
    block_key = vectors_key(sum(inventory.vectors.values()), WeightId(provenance.model_digest, inventory.vectors_name))
    packs: dict[PackKey, Pack] = {block_key: lambda buffer: _pack_vectors(inventory, checkpoint, block_key, buffer)}
    if inventory.table is not None:
        N, K = shapes[inventory.table]
        stored = _STORED[checkpoint[inventory.table].dtype]
        packs |= [packing(inventory.table, rows_key((N, K), stored, weight(inventory.table)))]
    *layers, output = inventory.matrices
    # A tied table lies at its first use, before the layers; another output table after them.
    for matrix in [*layers, output] if inventory.table else [output, *layers]:
        packs |= [packing(matrix.name, matrix_key(matrix.layout, weight(matrix.name)))]
    return Contents(provenance, packs)


def _pack(checkpoint: Checkpoint, stored: npt.NDArray[Any], key: PackKey, buffer: Bytes) -> Iterator[int]:
    for done in pack_into(stored, key, buffer):
        checkpoint.drop_pages()
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
) -> Prepared:
    """Return a provider that holds every weight of a model.

    Args:
        inventory: what the model needs.
        checkpoint: its tensors.
        weight_cache: a file, `:memory`, or None for the file in the user's cache directory.
        clock: the clock that measures the packing.
        listener: callbacks for progress, waiting and warnings.

    Raises:
        WeightCacheError: the file cannot be written.
        RequestError: `weight_cache` names something that a cache file must not replace.
        WeightsError: a tensor is missing, or has another shape or type, or a file cannot be read.
        PackingError: the format cannot hold the weights.
    """
    require_layers(inventory.config, checkpoint)
    if weight_cache == IN_MEMORY:
        return _in_memory(inventory, checkpoint, clock, listener)
    path = cache_path(checkpoint, inventory.format, weight_cache)
    return load_or_build(
        path,
        checkpoint.paths,
        lambda sources: contents_of(inventory, checkpoint, sources),
        clock=clock,
        listener=listener,
        named=weight_cache is not None,
    )


def _in_memory(inventory: Inventory, checkpoint: Checkpoint, clock: Clock, listener: Listener) -> Prepared:
    """Pack everything into memory; within one process, names and sizes are enough to identify the source files."""
    started = clock.now()
    sources = tuple(
        SourceFile(path.name, path.stat().st_size, hashlib.sha256(str(path).encode()).digest())
        for path in checkpoint.paths
    )
    provider, contents = MemoryWeightCacheProvider(), contents_of(inventory, checkpoint, sources)
    listener.begin("packing the weights", sum(map(padded_nbytes_of, contents.packs)))
    for key, pack in contents.packs.items():
        provider.get_or_pack(key, _reporting(pack, listener.progress))
    provider.finalize()
    seconds = clock.now() - started
    outcome = CacheOutcome.of("memory", provider, tuple(provider), seconds)
    return Prepared(provider, contents.keys, replace(outcome, packing_s=seconds))


def _reporting(pack: Pack, progress: Callable[[int], None]) -> Pack:
    def packing(buffer: Bytes) -> Iterator[int]:
        before = 0
        for done in pack(buffer):
            progress(done - before)
            before = done
            yield done

    return packing
