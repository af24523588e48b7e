"""The kinds of weight cache provider that the suite runs on, and what its tests insert into them.

Imported by tests that put this folder on the path: `test_provider` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refinfer.arrays import PAGE_BYTES
from refinfer.cli.imported import imported as imported_by_name
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey, WeightId
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import padded_nbytes_of, vectors_key
from refinfer.weight_cache.provider import WeightCacheProvider


@dataclass(frozen=True)
class Kind:
    """`begin` returns an empty provider, which may use the folder; `complete` ends the building of one."""

    begin: Callable[[Path], WeightCacheProvider]
    complete: Callable[[WeightCacheProvider], WeightCacheProvider]


def finalized(provider: WeightCacheProvider) -> WeightCacheProvider:
    provider.finalize()
    return provider


def loaded(provider: WeightCacheProvider) -> WeightCacheProvider:
    """Finalize, and load the file into a fresh object."""
    assert isinstance(provider, FileWeightCacheProvider)
    provider.finalize()
    provider.delete_cache()
    return FileWeightCacheProvider.load(provider.path)


def in_file(folder: Path) -> WeightCacheProvider:
    return FileWeightCacheProvider.build(folder / "cache")


KINDS = {
    "memory": Kind(lambda _: MemoryWeightCacheProvider(), finalized),
    "file": Kind(in_file, finalized),
    "loaded file": Kind(in_file, loaded),
}


def imported(name: str) -> Kind:
    """Return the kind of a class `package:Class`, which may be in a file of the current folder."""
    make = imported_by_name(name)
    return Kind(lambda _: make(), finalized)


def key_of(name: str, n_pages: int = 1) -> PackKey:
    """Return the key of a buffer of `n_pages` pages, the last one not quite full."""
    return vectors_key(n_pages * 1024 - 10, WeightId(bytes(DIGEST_BYTES), name))


def noise(key: PackKey, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, padded_nbytes_of(key), np.uint8)


A, B, C, D = key_of("a"), key_of("b", 2), key_of("c"), key_of("d", 3)


def insert(provider: WeightCacheProvider, key: PackKey, data: Bytes) -> int:
    """Commit a copy of `data` by way of reserved space."""
    space = provider.reserve_space(data.size)
    space[:] = data
    return provider.look_up_or_insert(key, space)


def contents(provider: WeightCacheProvider) -> dict[PackKey, bytes]:
    return {key: provider[key].tobytes() for key in provider}


def packing(data: Bytes, calls: list[int]) -> Callable[[Bytes], Iterable[int]]:
    """Return a function that packs `data` in two steps and notes each call."""

    def pack(buffer: Bytes) -> Iterator[int]:
        calls.append(len(calls))
        assert not buffer.any()
        buffer[:PAGE_BYTES] = data[:PAGE_BYTES]
        yield PAGE_BYTES
        buffer[PAGE_BYTES:] = data[PAGE_BYTES:]
        yield data.size

    return pack


def never(buffer: Bytes) -> Iterable[int]:
    raise AssertionError("nothing is packed on a hit")


VIEWS: dict[str, Callable[[Bytes], Bytes]] = {
    "itself": lambda space: space,
    "slice": lambda space: space[:],
    "view": lambda space: space.view(),
    "reshaped": lambda space: space.reshape(2, -1).reshape(-1),
    "memory": lambda space: np.frombuffer(space.data, np.uint8),
}
"""Ways to look at the same space."""

Call = Callable[[WeightCacheProvider, int], object]

EVER = {"building", "complete", "deleted"}
UNTIL_DELETED = {"building", "complete"}

VERBS: dict[str, tuple[Call, str | None, set[str]]] = {
    "look_up": (lambda p, _: p.look_up(A), "look_up", UNTIL_DELETED),
    "look_up of another": (lambda p, _: p.look_up(C), "look_up", UNTIL_DELETED),
    "offset_to_addr": (lambda p, offset: p.offset_to_addr(offset), "offset_to_addr", UNTIL_DELETED),
    "look_up_or_insert": (lambda p, _: p.look_up_or_insert(A, noise(A)), "look_up_or_insert", UNTIL_DELETED),
    "look_up_or_insert of another": (lambda p, _: p.look_up_or_insert(C, noise(C)), "insert", {"building"}),
    "reserve_space": (lambda p, _: p.reserve_space(PAGE_BYTES), "reserve_space", {"building"}),
    "finalize": (lambda p, _: p.finalize(), "finalize", UNTIL_DELETED),
    "is_finalized": (lambda p, _: p.is_finalized(), None, EVER),
    "delete_cache": (lambda p, _: p.delete_cache(), None, EVER),
    "[]": (lambda p, _: p[A], None, UNTIL_DELETED),
    "in": (lambda p, _: A in p, None, UNTIL_DELETED),
    "get_or_pack": (lambda p, _: p.get_or_pack(A, never), None, UNTIL_DELETED),
    "get_or_pack of another": (lambda p, _: p.get_or_pack(C, packing(noise(C), [])), None, UNTIL_DELETED),
}
"""Each verb, what a refusal must name (nothing if it is a part of the dict face), and the states that have it.

A is there, at the given offset, and C is not."""

Begin = Callable[[], WeightCacheProvider]


@contextmanager
def beginning(kind: Kind, folder: Path) -> Iterator[Begin]:
    """Give what begins empty providers, each in a folder of its own; all are deleted in the end."""
    begun: list[WeightCacheProvider] = []

    def begin() -> WeightCacheProvider:
        own = folder / str(len(begun))
        own.mkdir()
        begun.append(kind.begin(own))
        return begun[-1]

    yield begin
    for provider in begun:
        provider.delete_cache()
