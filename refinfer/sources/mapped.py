"""Weights in a mapped file: checked before their first use, and again after anybody wrote to the file.

Decides when a chunk has to be checked. Leaves to others: multiplying matrices, building the file, the threads that
check ahead (`offload.prefetch`).
Read more: tutorial 06; clauses OFFLOAD-4, OFFLOAD-5, OFFLOAD-13.

Checking everything at each token would cost more than multiplying. So each chunk is checked once, and the file's
times are looked at before and after every pass, which takes a microsecond: any write to the file changes them, and then
everything is checked again before the token is shown.

A pass that finds chunks unchecked has threads check them in the order of use, ahead of the products. To check a chunk
is to touch its pages, so this also brings the file into memory. On two cores there is one such thread, so that the
product keeps a core for itself; and whoever multiplies checks some later chunks before it waits for one that is under
check. The threads end with the pass: between passes a process may fork, and its child would not have them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from refinfer.clock import Clock
from refinfer.errors import DamagedWeightsError, GenerationError
from refinfer.packing.formats import PackedMatrix
from refinfer.packing.layout import Bytes, Tiles
from refinfer.process import usable_cores
from refinfer.sources.matrices import damaged
from refinfer.weight_cache.format import Entry
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.whole_file import will_need

__all__ = ["Ahead", "MakeAhead", "MappedChunks", "Watch"]

_MOST_THREADS: Final = 2
"""How many threads check at most; more were never tried."""

_SLOTS: Final = 8
"""How far the threads may be ahead of the products: enough that they seldom wait, few enough for small memory."""


Taken: TypeAlias = Any
"""What `Ahead.take` returns, to be released."""


class Ahead(Protocol):
    """What checks chunks ahead of their use and gives them in their order: `offload.prefetch.Prefetcher` does."""

    def take(self, chunk: int) -> Taken:
        """Wait until a chunk has been checked, or raise what its check raised."""
        ...

    def release(self, loan: Taken) -> None:
        """Go on: the chunk that was taken counts as used."""
        ...

    def close(self) -> None:
        """End the threads."""
        ...


MakeAhead: TypeAlias = Callable[[Sequence[int], Sequence[Bytes], Callable[[int, Bytes, int], Tiles], int], Ahead]
"""Begins to check: the order of the chunks, a slot for each that may be ahead, what checks one, how many threads."""


class Watch:
    """Examines a mapped file before and after each pass; `epoch` counts the times that a write was noticed.

    `vectors` is the key of the block of norms and biases, `matrices` has those of the matrices in the order of use.
    `ahead` makes what checks chunks ahead of their use; without it each is checked when it is used.
    """

    def __init__(
        self,
        mapped: MappedFile,
        vectors: PackKey,
        matrices: Iterable[PackKey],
        clock: Clock,
        ahead: MakeAhead | None = None,
    ) -> None:
        self.epoch = 0
        self.first_of: dict[PackKey, int] = {}
        self._mapped = mapped
        self._clock = clock
        # Two writes within one clock tick can leave the same times.
        self._restless_until = self._clock.now() + mapped.tick_s if mapped.age_s < mapped.tick_s else -math.inf
        entries = {entry.key: entry for entry in mapped.index.entries}
        self._vectors = entries[vectors]
        self._vectors_checked_in = -1
        self._chunks: list[tuple[Entry, int]] = []  # of all matrices, in the order of use
        for key in matrices:
            self.first_of[key] = len(self._chunks)
            self._chunks += [(entries[key], index) for index in range(len(entries[key].chunks))]
        self._checked_in = [-1] * len(self._chunks)
        self._make_ahead = ahead
        self._ahead: Ahead | None = None
        self._awaited: set[int] = set()  # not yet used in this pass
        self._unclaimed: set[int] = set()  # not yet begun to be checked
        self._helped = 0  # whoever multiplies has claimed what it will of the chunks before this one
        self._process = os.getpid()

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Examine the file before and after a pass, and check what the pass will need ahead of its use.

        Raises:
            DamagedWeightsError: something does not agree with its checksum, or the file was cut short.
        """
        self._begin()
        try:
            self._check_ahead()
            yield
        finally:
            self._stop()
        self._end()

    def _begin(self) -> None:
        """Examine the file, and check the vectors unless they have been checked since the last write."""
        changed = True  # if Ctrl-C comes before it is known
        try:
            changed = self._mapped.changed()
        finally:
            self.epoch += changed
        if changed:
            self._restless_until = self._clock.now() + self._mapped.tick_s
        elif self._restless_until > 0:
            self.epoch += 1
            if self._clock.now() >= self._restless_until:  # the last check until the next write
                self._restless_until = -math.inf
        if self._vectors_checked_in != self.epoch:
            if not self._mapped.is_sound(self._vectors.chunks[0]):
                raise damaged(str(self._mapped.path), self._vectors.key)
            self._vectors_checked_in = self.epoch

    def _end(self) -> None:
        """Examine the file; if it was written to during the pass, check everything."""
        before = self.epoch
        self._begin()
        if self.epoch != before:
            for number in range(len(self._chunks)):
                self.check(number)

    # --8<-- [start:ahead]
    def _check_ahead(self) -> None:
        """Have threads check what has not been checked since the last write."""
        self._stop()  # somebody may have left a pass without ending it
        order = [number for number, epoch in enumerate(self._checked_in) if epoch != self.epoch]
        if self._make_ahead is not None and order:
            slots = [np.empty(0, np.uint8)] * _SLOTS  # nothing is copied: a slot only stands for a chunk that is ahead
            threads = max(1, min(usable_cores() - 1, _MOST_THREADS))
            self._unclaimed, self._helped, self._process = set(order), 0, os.getpid()
            try:
                self._ahead = self._make_ahead(order, slots, self._bring, threads)
            except GenerationError:  # no further thread can be started: each chunk is checked when it is used
                return
            self._awaited = set(order)

    def _bring(self, number: int, slot: Bytes, thread: int) -> Tiles:
        """Check a chunk, while the system begins to read one that comes later."""
        if number + _SLOTS < len(self._chunks):
            entry, index = self._chunks[number + _SLOTS]
            will_need(self._mapped.descriptor, entry.chunks[index].offset, entry.chunks[index].nbytes)
        if self._claim(number):
            self.check(number)

    def _claim(self, number: int) -> bool:
        """Return whether nobody has begun to check a chunk; to the second who asks, somebody has."""
        try:
            self._unclaimed.remove(number)  # one step, in which no other thread can come
        except KeyError:
            return False
        return True

    def require(self, number: int) -> None:
        """Return once a chunk has been checked.

        Raises:
            DamagedWeightsError: it does not agree with its checksum.
        """
        if self._ahead is not None and number in self._awaited and os.getpid() == self._process:
            self._awaited.discard(number)
            self._help(number)
            with suppress(DamagedWeightsError):  # it may be another chunk that is damaged, not needed yet
                self._ahead.release(self._ahead.take(number))
        self.check(number)

    def _help(self, number: int) -> None:
        """Check a few of the chunks that the threads will come to later, until `number` has been checked."""
        first = max(self._helped, number + _SLOTS)
        for later in range(first, min(first + _SLOTS, len(self._chunks))):
            if self._checked_in[number] == self.epoch:
                return
            self._helped = later + 1
            if self._claim(later):
                with suppress(DamagedWeightsError):  # it is found again when the chunk is used, after those before it
                    self.check(later)

    def check(self, number: int) -> None:
        """Check a chunk, unless that has been done since the last write.

        Raises:
            DamagedWeightsError: it does not agree with its checksum.
        """
        epoch = self.epoch  # a thread of a pass that was broken off may end its check in the next one
        if self._checked_in[number] != epoch:
            entry, index = self._chunks[number]
            if not self._mapped.is_sound(entry.chunks[index]):
                raise damaged(str(self._mapped.path), entry.key, index)
            self._checked_in[number] = epoch

    # --8<-- [end:ahead]

    def _stop(self) -> None:
        """End the threads after their checks; a forked child does not have them, and must leave their locks alone."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and os.getpid() == self._process:
            ahead.close()


class MappedChunks:
    """The chunks of a matrix in a mapped file: each is checked before it is first used."""

    def __init__(self, packed: PackedMatrix, key: PackKey, watch: Watch) -> None:
        self._tiles = packed.tiles
        self._watch = watch
        self._first = watch.first_of[key]
        self._checked_in = -1

    def in_order(self) -> Iterable[Tiles]:
        """Return the tiles of every chunk, each checked before it is given.

        Raises:
            DamagedWeightsError: a chunk does not agree with its checksum.
        """
        return self._tiles if self._checked_in == self._watch.epoch else self._checked()

    def some(self, numbers: Sequence[int]) -> Iterable[Tiles]:
        """Return the tiles of the chunks with these numbers, after checking them.

        Raises:
            DamagedWeightsError: a chunk does not agree with its checksum.
        """
        for number in numbers:
            self._watch.check(self._first + number)
        return [self._tiles[number] for number in numbers]

    def _checked(self) -> Iterator[Tiles]:
        epoch = self._watch.epoch
        for number, tiles in enumerate(self._tiles, self._first):
            self._watch.require(number)
            yield tiles
        self._checked_in = epoch
