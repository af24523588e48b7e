"""A cache file as a process sees it: mapped read-only, and shared with every process that maps it.

A mapped file can be used as if its bytes were in memory; the system reads a page of it when it is first touched. Checks
every rule of the format on opening, compares checksums, and notices if somebody wrote to the file since.
Leaves to others: what its bytes mean (`format`), how it comes into being (`file`, `publish`), when to check
(`sources`).
Read more: tutorial 05; clauses FILE-9, FILE-12 to FILE-15.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Final

import numpy as np

from refinfer.arrays import PAGE_BYTES
from refinfer.clock import wall_time_ns
from refinfer.errors import CacheFileError, DamagedWeightsError, WeightCacheError
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.format import Header, Index, StoredChunk, decode_header, decode_index, encode_header
from refinfer.weight_cache.identity import tick_ns
from refinfer.weight_cache.packers import first_wrong_row
from refinfer.whole_file import open_regular

__all__ = ["NO_FILE", "MappedFile", "read_file"]

NO_FILE: Final = "there was no file yet"
"""The reason why a first start builds the file."""


def read_file(path: Path) -> tuple[Header, Index]:
    """Read header and index of a cache file, but no weights; every rule of the format is checked.

    Raises:
        CacheFileError: the file cannot be used; the text says why.
    """
    with _open(path) as file:
        return _read(file)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise CacheFileError(NO_FILE) from None
    except OSError as error:
        raise CacheFileError(f"it cannot be read: {error.strerror}") from None


def _read(file: IO[bytes]) -> tuple[Header, Index]:
    header = decode_header(file.read(PAGE_BYTES), os.fstat(file.fileno()).st_size)
    file.seek(header.index_offset)
    return header, decode_index(header, file.read(header.index_nbytes))


class MappedFile:
    """A whole cache file, mapped read-only and shared with every process that maps it, when it is first used.

    `path` is its name. `opened` is the name that it has now, if it has not been given its own yet.

    Raises:
        CacheFileError: the file cannot be used; the text says why.
    """

    # --8<-- [start:mapped]
    def __init__(self, path: Path, opened: Path | None = None) -> None:
        self.path = path
        with _open(opened or path) as file:
            self.header, self.index = _read(file)
            self.descriptor = os.dup(file.fileno())  # stays this file's, even if its name becomes another's
        weakref.finalize(self, os.close, self.descriptor)
        self._seen = self._look()

    @cached_property
    def _bytes(self) -> Bytes:
        try:
            mapped = mmap.mmap(self.descriptor, self.header.file_nbytes, access=mmap.ACCESS_READ)
        except ValueError:  # shorter than its header says
            raise DamagedWeightsError(f"{self.path} was cut short while it was in use") from None
        except OSError as error:
            raise WeightCacheError(
                f"{self.path} cannot be mapped: {error.strerror}; a run with --budget maps nothing"
            ) from None
        return np.frombuffer(mapped, np.uint8)

    def bytes(self, offset: int, nbytes: int) -> Bytes:
        """Return a read-only view of `nbytes` bytes of the file, from `offset` on."""
        return self._bytes[offset : offset + nbytes]

    def is_sound(self, chunk: StoredChunk) -> bool:
        """Return whether a chunk agrees with its checksum; reads the whole chunk."""
        return zlib.crc32(self.bytes(chunk.offset, chunk.nbytes).data) == chunk.checksum

    # --8<-- [end:mapped]

    def changed(self) -> bool:
        """Return whether the size or the times of the file changed since the last call; takes a microsecond.

        Raises:
            DamagedWeightsError: the file is too short; the system ends a process that reads mapped bytes that are gone.
        """
        before, self._seen = self._seen, self._look()
        if self._seen[0] < self.header.file_nbytes:
            raise DamagedWeightsError(f"{self.path} was cut short while it was in use")
        return self._seen != before

    def _look(self) -> tuple[int, int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    @property
    def age_s(self) -> float:
        """The seconds since the file was last written to, according to its times."""
        return (wall_time_ns() - max(self._seen[1:])) * 1e-9

    @property
    def tick_s(self) -> float:
        """The seconds within which two writes may leave the same times; some file systems count only whole seconds."""
        return tick_ns(self._seen[2]) * 1e-9

    def is_at(self, path: Path) -> bool:
        """Return whether `path` still names this file, and not one that replaced it."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self.descriptor))
        except OSError:
            return False

    def lock_memory(self) -> None:
        """Forbid the system to remove the file from memory (`mlock`), as XNNPACK's `weight_cache_lock_memory` does.

        Raises:
            WeightCacheError: the limit on locked memory (`ulimit -l`) does not allow it, or the system cannot.
        """
        libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
        address, nbytes = ctypes.c_void_p(self._bytes.ctypes.data), ctypes.c_size_t(self._bytes.size)
        if libc is None or libc.mlock(address, nbytes):
            why = os.strerror(ctypes.get_errno()) if libc else "this system has no mlock"
            raise WeightCacheError(f"{self.path} cannot be locked in memory: {why}")

    def problems(self) -> Iterator[str]:
        """Read every byte, and yield a sentence for each thing that is not as it was written."""
        if self.bytes(0, PAGE_BYTES).tobytes() != encode_header(self.header):
            yield "the header is not followed by zeros"
        index = self._bytes[self.header.index_offset : self.header.file_nbytes]
        if hashlib.sha256(index.data).digest() != self.header.index_digest:
            yield "the index is damaged"
        for entry in self.index.entries:
            for number, chunk in enumerate(entry.chunks):
                if not self.is_sound(chunk):
                    yield f"{entry.key.name}: chunk {number} does not agree with its checksum"
            buffer = self.bytes(entry.offset, entry.padded_nbytes)
            if hashlib.sha256(buffer.data).digest() != entry.digest:
                yield f"{entry.key.name}: the buffer does not agree with its SHA-256"
            elif (row := first_wrong_row(buffer, entry.key)) is not None:
                yield f"{entry.key.name}: row {row} does not agree with its checksum"
