"""Reads of packed weights from disk, straight into the memory that the matmul uses.

Knows: direct I/O, and what to do where there is none. Does not know: chunks, plans, checksums.
Spec: STORE-1 to STORE-6. Tutorial: 10, 12.

Direct I/O (`O_DIRECT`) goes past the page cache, so that a budget's bytes are all the bytes there are; it wants
offset, length and address on pages, which is why the file has everything there. Where a file system has none, reads
are ordinary ones, and the page cache is asked to forget them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from refinfer.arrays import PAGE_BYTES, aligned_empty
from refinfer.errors import CacheFileError, DamagedWeightsError, GenerationError
from refinfer.packing.layout import Bytes
from refinfer.trace import Clock

__all__ = ["FileStore", "Store", "ThrottledStore"]

_LONGEST_SLEEP_S: Final = 1 / 8


class Store(Protocol):
    """Something that whole pages can be read from."""

    def read(self, offset: int, into: Bytes) -> None:
        """Fill `into` with the bytes from `offset`."""
        ...

    def close(self) -> None:
        """Give back what the store holds; again is allowed."""
        ...


# --8<-- [start:throttled]
class ThrottledStore:
    """Reads no faster than a rate: a phone's storage on a laptop.

    A token bucket: each read takes its bytes' time of the one line that all threads stand in, and waits for the end
    of it on `clock`; not once the store is closed.
    """

    def __init__(self, store: Store, bytes_per_s: float, clock: Clock) -> None:
        self._store = store
        self._rate = bytes_per_s
        self._clock = clock
        self._line_ends = clock.now()
        self._lock = threading.Lock()
        self._closed = False

    def read(self, offset: int, into: Bytes) -> None:
        """Read, and return when the rate allows it."""
        with self._lock:
            self._line_ends = max(self._line_ends, self._clock.now()) + len(into) / self._rate
            mine = self._line_ends
        self._store.read(offset, into)
        while not self._closed and (rest := mine - self._clock.now()) > 0:
            self._clock.sleep(min(rest, _LONGEST_SLEEP_S))

    def close(self) -> None:
        """Close the store behind, and let everybody go who waits."""
        self._closed = True
        self._store.close()


# --8<-- [end:throttled]


class FileStore:
    """Reads pages of a file with direct I/O, or without where that is not supported; any thread may read or close.

    Raises:
        CacheFileError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._lock = threading.Lock()
        try:
            direct = _open_direct(path)
            buffered = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)) if direct is None else None
        except OSError as error:
            raise CacheFileError(f"{path} cannot be read: {error.strerror}") from None
        self.direct = direct is not None
        descriptor = buffered if direct is None else direct
        assert descriptor is not None
        self._identity = os.fstat(descriptor)
        self._descriptor: int | None = descriptor
        self._under_way = 0
        self._closed = False

    def read(self, offset: int, into: Bytes) -> None:
        """Fill `into` with the bytes from `offset`; both on pages.

        Raises:
            DamagedWeightsError: the file ends before, or cannot be read.
            GenerationError: the store is closed.
        """
        view = memoryview(into.data)
        done = 0
        with self._in_use() as descriptor:
            try:
                while done < len(view):
                    n = self._read(descriptor, offset + done, view[done:])
                    if n == 0:
                        raise DamagedWeightsError(f"{self.path} was cut short while it was in use")
                    done += n
            except OSError as error:
                raise DamagedWeightsError(f"{self.path} cannot be read: {error.strerror}") from None
            with self._lock:
                self.bytes_read += done

    @contextmanager
    def _in_use(self) -> Iterator[int]:
        """Give the descriptor, which stays open meanwhile: another file might get its number, and be read."""
        with self._lock:
            if self._closed or self._descriptor is None:
                raise GenerationError(f"{self.path} is closed")
            descriptor = self._descriptor
            self._under_way += 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._under_way -= 1
                self._let_go()

    def _read(self, descriptor: int, offset: int, view: memoryview) -> int:
        if not hasattr(os, "preadv"):  # Windows
            with self._lock:  # the place in the file belongs to all threads
                os.lseek(descriptor, offset, os.SEEK_SET)
                data = os.read(descriptor, len(view))
            view[: len(data)] = data
            return len(data)
        n = os.preadv(descriptor, [view], offset)
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, n, os.POSIX_FADV_DONTNEED)
        return n

    def is_at(self, path: Path) -> bool:
        """Tell whether `path` is still this file."""
        try:
            return os.path.samestat(path.stat(), self._identity)
        except OSError:
            return False

    def close(self) -> None:
        """Close the file, after the reads that are under way; again is allowed."""
        with self._lock:
            self._closed = True
            self._let_go()

    def _let_go(self) -> None:
        if self._closed and not self._under_way:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# --8<-- [start:direct]
def _open_direct(path: Path) -> int | None:
    """Open for direct I/O; None where the file system has none, which some say only at the first read."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY | flag)
        os.preadv(descriptor, [aligned_empty((PAGE_BYTES // 4,), PAGE_BYTES).data], 0)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    return descriptor


# --8<-- [end:direct]
