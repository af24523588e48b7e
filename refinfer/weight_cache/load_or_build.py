"""Loads a cache file or builds it: one call decides, and reports the reason.

Decides when to look, wait, hash, pack and publish. Leaves to others: what is packed, and how.
Read more: tutorials 05, 06; clauses OPEN-1 to OPEN-10.

    _load_believed     the side file is believed?  --yes-->  the file is good and whole?  --yes-->  mapped
                            | no                                  | no           (nothing was read but headers)
                            v                                     v
    Draft              take the lock; wait while another process builds
                            |
                            v
    _load_identified   another process may have built it: hash what is not believed; good and whole?  --yes-->  mapped
                            | no
                            v
    _build             pack, or copy what a good file already has; publish; note the digests in the side file
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from refinfer.clock import Clock
from refinfer.errors import CacheFileError, RequestError, WeightCacheError, WeightsError
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import MAGIC, Entry, Provenance, SourceFile
from refinfer.weight_cache.identity import (
    SIDE_FILE_BEGINS,
    Record,
    SideFile,
    believed,
    identify,
    side_path,
    unchanged,
)
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.ownership import belongs_to_a_stranger, make_folder, require_replaceable
from refinfer.weight_cache.packers import padded_nbytes_of
from refinfer.weight_cache.provider import Pack, WeightCacheProvider
from refinfer.weight_cache.publish import Draft, Patience, remove_dead_draft, write_small_file

__all__ = ["SILENT", "CacheOutcome", "Contents", "Listener", "Prepared", "load_or_build"]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a cache file must hold: where it comes from, and how each buffer is packed, in execution order."""

    provenance: Provenance
    packs: dict[PackKey, Pack]

    @property
    def keys(self) -> Mapping[str, PackKey]:
        """The keys by their tensor's name."""
        return {key.name: key for key in self.packs}


@dataclass(frozen=True, slots=True)
class Listener:
    """Callbacks that report progress, waiting and warnings.

    `begin` gets what will be done, and how many bytes that takes. Then `progress` gets the number of bytes that were
    read or packed since its last call. `on_wait` is called when another process is packing, and `on_long_wait` with the
    path of its draft if it still is after five seconds. `warn` gets a sentence about something that does not work as
    asked, but is no reason to stop.
    """

    progress: Callable[[int], None] = lambda nbytes: None
    on_wait: Callable[[], None] = lambda: None
    on_long_wait: Callable[[Path], None] = lambda draft: None
    warn: Callable[[str], None] = lambda message: warnings.warn(message, RuntimeWarning, stacklevel=2)
    begin: Callable[[str, int], None] = lambda what, nbytes: None


SILENT: Final = Listener()
"""Ignores everything but warnings, which go to `warnings`."""


@dataclass(frozen=True, slots=True)
class CacheOutcome:
    """How a start obtained its packed weights: the fields of the command line's JSON.

    `state` is `loaded`, `built`, `memory`, or `off` if nothing was packed; `reason` says why the weights were packed
    although a file was asked for. `packed_buffers` and `packed_bytes` count what was packed now, `held_buffers` and
    `held_bytes` count what the provider has. `packing_s` is how long packing took, now or when the file was built, if
    known.
    """

    state: str
    path: str | None = None
    reason: str | None = None
    packed_buffers: int = 0
    packed_bytes: int = 0
    load_or_build_s: float = 0.0
    held_buffers: int = 0
    held_bytes: int = 0
    packing_s: float | None = None

    @classmethod
    def of(cls, state: str, provider: WeightCacheProvider, packed: Sequence[PackKey], seconds: float) -> Self:
        """Return the outcome of a start that took `seconds` and packed the keys `packed`."""
        return cls(
            state=state,
            packed_buffers=len(packed),
            packed_bytes=sum(map(padded_nbytes_of, packed)),
            load_or_build_s=seconds,
            held_buffers=len(provider),
            held_bytes=sum(map(padded_nbytes_of, provider)),
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A provider that holds every buffer asked for, and how it obtained them.

    `keys` maps the names of tensors to the keys asked for; `mapped` is the file, if any.
    """

    provider: WeightCacheProvider
    keys: Mapping[str, PackKey]
    outcome: CacheOutcome
    mapped: MappedFile | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of `load_or_build`."""

    path: Path
    sources: Sequence[Path]
    contents_of: Callable[[tuple[SourceFile, ...]], Contents]
    clock: Clock
    listener: Listener
    named: bool
    started: float


def load_or_build(
    path: Path,
    sources: Sequence[Path],
    contents_of: Callable[[tuple[SourceFile, ...]], Contents],
    *,
    clock: Clock,
    listener: Listener = SILENT,
    named: bool = False,
) -> Prepared:
    """Map the cache file at `path`, after building it if it is missing, outdated, incomplete or damaged.

    One process builds; others wait for it and map what it built. What is published shuts out
    everybody whom the mode of one of `sources` shuts out.

    Args:
        path: the file.
        sources: the files that weights come from.
        contents_of: returns what the file must hold, given the identities of `sources`.
        clock: the clock that measures the packing.
        listener: callbacks for progress, waiting and warnings.
        named: a person chose the path, so a file there that is not a cache file is theirs, and is not replaced.

    Raises:
        RequestError: a person's file lies there.
        WeightCacheError: the place cannot be written, and holds no file that can be used as it is.
        WeightsError: a source file cannot be read, or changes meanwhile.
        PackingError: the format cannot hold the weights.
    """
    request = _Request(path, sources, contents_of, clock, listener, named, clock.now())
    _require_replaceable(request)
    if (loaded := _load_believed(request)) is not None:
        return loaded
    try:
        make_folder(path.parent)
        draft = Draft(path, MAGIC, Patience(clock, listener.on_wait, listener.on_long_wait))
    except OSError as error:
        if (loaded := _load_identified(request, 0)[0]) is not None:
            return loaded
        raise WeightCacheError(f"{path} cannot be written: {error.strerror}") from None
    try:
        loaded, found, records = _load_identified(request, draft.now_ns())
        if loaded is None:
            return _build(request, draft, found, records)
        if records != SideFile.read(side_path(path)).records:
            _note(request, SideFile(records, loaded.outcome.packing_s))
    except OSError as error:
        raise WeightCacheError(f"{path} cannot be written: {error.strerror}") from None
    else:
        return loaded
    finally:
        draft.abandon()


# --8<-- [start:steps]
def _load_believed(request: _Request) -> Prepared | None:
    """Map the file if the side file is believed and the file is good and whole; no weight is read."""
    side = SideFile.read(side_path(request.path))
    known = believed(request.sources, side)
    if known is None:
        return None
    found = _look(request.path, request.contents_of(known))
    if not found.is_whole:
        return None
    remove_dead_draft(request.path, MAGIC)
    remove_dead_draft(side_path(request.path), SIDE_FILE_BEGINS)
    return found.loaded(request, side)


def _load_identified(request: _Request, now_ns: int) -> tuple[Prepared | None, _Found, tuple[Record, ...]]:
    """Hash the source files without a believed digest, and map the cache file if it is good and whole."""
    side = SideFile.read(side_path(request.path))
    request.listener.begin("reading the weights", sum(map(_nbytes_of, request.sources)))
    records = identify(request.sources, side, now_ns, request.listener.progress)
    found = _look(request.path, request.contents_of(tuple(record.source for record in records)))
    return found.loaded(request, side) if found.is_whole else None, found, records


def _build(request: _Request, draft: Draft, found: _Found, records: tuple[Record, ...]) -> Prepared:
    """Pack the buffers that the file found there does not have, and publish a new file."""
    started = request.clock.now()
    provider = FileWeightCacheProvider(draft, found.contents.provenance)
    packed = _pack(provider, found, request.listener)
    if not unchanged(request.sources, records):
        folder = request.sources[0].parent
        raise WeightsError(f"the files in {folder} changed while they were packed; start again")
    packing_s = request.clock.now() - started
    draft.make_readable_like(request.sources)
    draft.before = lambda: _require_replaceable(request)
    # Before the lock is released: a process that waits for it must not hash again.
    draft.then = lambda: _note(request, SideFile(records, packing_s))
    provider.finalize()
    seconds = request.clock.now() - request.started
    outcome = CacheOutcome.of("built", provider, packed, seconds)
    outcome = replace(outcome, path=str(request.path), reason=found.reason, packing_s=packing_s)
    return Prepared(provider, found.contents.keys, outcome, provider.mapped)


# --8<-- [end:steps]


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found at a path: `provider` has all or some of `contents`, or is None; `reason` says what is wrong."""

    contents: Contents
    provider: FileWeightCacheProvider | None
    reason: str | None = None

    @property
    def is_whole(self) -> bool:
        return self.reason is None

    def loaded(self, request: _Request, side: SideFile) -> Prepared:
        assert self.provider is not None
        if belongs_to_a_stranger(request.path, request.sources):
            request.listener.warn(f"{request.path} belongs to another user, who can change what this model answers")
        seconds = request.clock.now() - request.started
        outcome = CacheOutcome.of("loaded", self.provider, (), seconds)
        outcome = replace(outcome, path=str(request.path), packing_s=side.packing_s)
        return Prepared(self.provider, self.contents.keys, outcome, self.provider.mapped)


# --8<-- [start:look]
def _look(path: Path, contents: Contents) -> _Found:
    """Map the file at `path`, if it was made from these files by this packing code, and compare it with `contents`."""
    try:
        provider = FileWeightCacheProvider.load(path)
    except CacheFileError as error:
        return _Found(contents, None, error.reason)
    made_of, wanted = provider.provenance, contents.provenance
    if made_of.packers != wanted.packers:
        return _Found(contents, None, "the packing code changed")
    if made_of.model_digest != wanted.model_digest:
        return _Found(contents, None, "the model's weights changed")
    if missing := sum(key not in provider for key in contents.packs):
        return _Found(contents, provider, f"{missing} of {len(contents.packs)} buffers were missing")
    return _Found(contents, provider)


# --8<-- [end:look]


def _pack(provider: FileWeightCacheProvider, found: _Found, listener: Listener) -> list[PackKey]:
    """Fill `provider`; what was found is copied. Return the keys that were packed."""
    packs, partial = found.contents.packs, found.provider
    stored = {entry.key: entry for entry in partial.entries} if partial else {}
    packed = []
    keys = [*packs, *(key for key in stored if key not in packs)]
    listener.begin("packing the weights", sum(map(padded_nbytes_of, keys)))
    for key in keys:
        copy = _copy_of(partial.mapped, stored[key]) if partial and key in stored else None
        pack = copy or packs.get(key)
        if pack is None:
            continue  # damaged, and not asked for
        buffer = provider.reserve_space(padded_nbytes_of(key))
        done = 0
        for so_far in pack(buffer):
            listener.progress(so_far - done)
            done = so_far
            provider.drop_pages()
        provider.look_up_or_insert(key, buffer)
        if copy is None:
            packed.append(key)
    return packed


def _nbytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # whoever reads it says why
        return 0


def _copy_of(mapped: MappedFile, entry: Entry) -> Pack | None:
    """Return a function that packs by copying from a file, or None if the file is damaged there."""
    if not all(map(mapped.is_sound, entry.chunks)):
        return None

    def copy(buffer: Bytes) -> Iterator[int]:
        for chunk in entry.chunks:
            start = chunk.offset - entry.offset
            buffer[start : start + chunk.nbytes] = mapped.bytes(chunk.offset, chunk.nbytes)
            yield start + chunk.padded_nbytes

    return copy


def _require_replaceable(request: _Request) -> None:
    """Refuse a place that a person chose, if something there is not refinfer's.

    Raises:
        RequestError: a person's file lies there.
    """
    if request.named:
        require_replaceable(request.path, MAGIC, "a weight cache")
        if not request.path.exists():  # next to a cache file of ours, a side file is ours, however malformed
            require_replaceable(side_path(request.path), SIDE_FILE_BEGINS, "a side file of a weight cache")


def _note(request: _Request, side: SideFile) -> None:
    """Write the side file; without it the next start takes the digests again, and loses nothing else."""

    def prepare(draft: Draft) -> None:
        draft.make_readable_like(request.sources)
        if request.named:
            draft.before = lambda: require_replaceable(side_path(request.path), b"", "a file")

    try:
        write_small_file(side_path(request.path), side.encode(), begin=SIDE_FILE_BEGINS, prepare=prepare)
    except (OSError, RequestError):
        return
