"""Load a cache file or build it: one call decides, and says why.

Knows: in which order to look, to wait, to hash, to pack and to publish. Does not know: what is packed, and how.
Spec: OPEN-1 to OPEN-8. Tutorial: 05, 06.

    side file believed?  --yes-->  file good, all keys there?  --yes-->  mapped; nothing was read but headers
            | no                            | no
            v                               v
    lock; someone else may have been here: look again, hash what is not believed, file good?  --yes-->  mapped
            | no
            v
    pack (or copy what a good file already has), publish, note the digests in the side file  -->  mapped
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from refinfer.errors import CacheFileError, WeightCacheError, WeightsError
from refinfer.packing.formats import Bytes
from refinfer.trace import Clock
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import Entry, Provenance, SourceFile
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.packers import nbytes_of
from refinfer.weight_cache.provider import Pack
from refinfer.weight_cache.publish import Draft, remove_dead_draft, write_small_file
from refinfer.weight_cache.sources import Record, SideFile, believed, identify, side_path, unchanged

__all__ = ["SILENT", "Contents", "Listener", "Opened", "load_or_build"]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a cache file must hold: where it comes from, and how each buffer is packed, in execution order."""

    provenance: Provenance
    packs: dict[PackKey, Pack]


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told how it goes.

    `progress` is told how many bytes were read or packed, `on_wait` that another process is packing, `warn` what does
    not work as it was asked for, but is no reason to stop.
    """

    progress: Callable[[int], None] = lambda nbytes: None
    on_wait: Callable[[], None] = lambda: None
    warn: Callable[[str], None] = lambda message: warnings.warn(message, RuntimeWarning, stacklevel=2)


SILENT: Final = Listener()
"""Told nothing but warnings, which become Python's."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A complete cache file, mapped.

    `reason` says why it was built; None if it was there. `packed_buffers` and `packed_bytes` count what was packed
    now; `packing_s` is how long the packing took, now or then, where that is known.
    """

    provider: FileWeightCacheProvider
    reason: str | None
    packed_buffers: int
    packed_bytes: int
    packing_s: float | None


def load_or_build(
    path: Path,
    sources: Sequence[Path],
    contents_of: Callable[[tuple[SourceFile, ...]], Contents],
    *,
    clock: Clock,
    listener: Listener = SILENT,
    reason: str | None = None,
) -> Opened:
    """Map the cache file at `path`, after building it where it is missing, outdated, incomplete or damaged.

    One process builds; others wait for it and map what it built.

    Args:
        path: the file.
        sources: the files that weights come from.
        contents_of: says what the file must hold, given the identities of `sources`.
        clock: what measures the packing.
        listener: who is told how it goes.
        reason: why the caller removed the file before, if it did.

    Raises:
        WeightCacheError: the place cannot be written, and holds no file that can be used as it is.
        WeightsError: a source file cannot be read, or changes meanwhile.
        PackingError: weights that the format cannot hold.
    """
    side = SideFile.read(side_path(path))
    known = believed(sources, side)
    if known is not None and (provider := _load(path, contents_of(known))[0]) is not None:
        remove_dead_draft(path)
        remove_dead_draft(side_path(path))
        return Opened(provider, None, 0, 0, side.packing_s)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Draft(path, listener.on_wait)
    except OSError as error:
        records = identify(sources, side, 0, listener.progress)
        if (provider := _load(path, contents_of(_identities(records)))[0]) is not None:
            return Opened(provider, None, 0, 0, side.packing_s)
        raise WeightCacheError(f"{path} cannot be written: {error.strerror}") from None
    try:
        side = SideFile.read(side_path(path))
        records = identify(sources, side, draft.now_ns(), listener.progress)
        contents = contents_of(_identities(records))
        provider, partial, why = _load(path, contents)
        if provider is not None:
            if records != side.records:
                _note(path, SideFile(records, side.packing_s))
            return Opened(provider, None, 0, 0, side.packing_s)
        started = clock.now()
        provider = FileWeightCacheProvider(draft, contents.provenance)
        packed = _pack(provider, contents, partial, listener)
        if not unchanged(sources, records):
            raise WeightsError(f"the files in {sources[0].parent} changed while they were packed; start again")
        packing_s = clock.now() - started
        draft.then = lambda: _note(path, SideFile(records, packing_s))  # who waits for the lock must not hash again
        provider.finalize()
        return Opened(provider, reason or why, len(packed), sum(map(nbytes_of, packed)), packing_s)
    except OSError as error:
        raise WeightCacheError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        draft.abandon()


def _identities(records: Sequence[Record]) -> tuple[SourceFile, ...]:
    return tuple(record.source for record in records)


# --8<-- [start:load]
def _load(path: Path, contents: Contents) -> tuple[FileWeightCacheProvider | None, FileWeightCacheProvider | None, str]:
    """Return a provider that has all of `contents`; or None, one that has part of it or None, and what is wrong."""
    try:
        provider = FileWeightCacheProvider.load(path)
    except CacheFileError as error:
        return None, None, str(error)
    found, wanted = provider.provenance, contents.provenance
    if found.packers != wanted.packers:
        return None, None, "the packing code changed"
    if found.model_digest != wanted.model_digest:
        return None, None, "the model's weights changed"
    missing = sum(key not in provider for key in contents.packs)
    if missing:
        return None, provider, f"{missing} of {len(contents.packs)} buffers were missing"
    return provider, None, ""


# --8<-- [end:load]


def _pack(
    provider: FileWeightCacheProvider, contents: Contents, partial: FileWeightCacheProvider | None, listener: Listener
) -> list[PackKey]:
    """Fill `provider`; what a partial file has is copied. Return the keys that were packed."""
    stored = {entry.key: entry for entry in partial.entries} if partial else {}
    packed = []
    for key in [*contents.packs, *(key for key in stored if key not in contents.packs)]:
        copy = _copy_of(partial, stored[key]) if partial and key in stored else None
        pack = copy or contents.packs.get(key)
        if pack is None:
            continue  # damaged, and nobody asks for it
        buffer = provider.reserve_space(nbytes_of(key))
        done = 0
        for so_far in pack(buffer):
            listener.progress(so_far - done)
            done = so_far
            provider.let_go()
        provider.look_up_or_insert(key, buffer)
        if copy is None:
            packed.append(key)
    return packed


def _copy_of(partial: FileWeightCacheProvider, entry: Entry) -> Pack | None:
    """Return what packs by copying from another file; None where that is damaged."""
    mapped = partial.mapped
    if not all(map(mapped.is_sound, entry.chunks)):
        return None

    def copy(buffer: Bytes) -> Iterator[int]:
        for chunk in entry.chunks:
            start = chunk.offset - entry.offset
            buffer[start : start + chunk.nbytes] = mapped.bytes(chunk.offset, chunk.nbytes)
            yield start + chunk.padded_nbytes

    return copy


def _note(path: Path, side: SideFile) -> None:
    """Write the side file; without it the next start takes the digests again, no more."""
    try:
        write_small_file(side_path(path), side.encode())
    except OSError:
        return
