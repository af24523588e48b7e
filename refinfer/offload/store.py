"""Reads packed weights from disk, straight into the memory that the matmul uses.

Leaves to others: chunks, plans, checksums.
Read more: tutorials 10, 12; clauses STORE-1 to STORE-7.

Direct I/O (`O_DIRECT`) bypasses the page cache, where the system keeps copies of what was read, so that the budget
counts every byte that is in memory. It needs offset, length and address on page boundaries, which is why everything in
the file starts on one. If the file system does not support it, reads are ordinary ones, and the page cache is asked to
forget their pages.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol, Self

try:
    import fcntl
except ImportError:  # not on Windows, which has no direct I/O either
    fcntl = None  # type: ignore[assignment]

from refinfer.arrays import PAGE_BYTES, aligned_empty
from refinfer.clock import Clock
from refinfer.errors import CacheFileError, DamagedWeightsError, GenerationError
from refinfer.packing.layout import Bytes

__all__ = ["FileStore", "Store", "ThrottledStore"]

_LONGEST_SLEEP_S: Final = 1 / 8
_REFUSED: Final = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # never waits for a pipe


class Store(Protocol):
    """Something that whole pages can be read from."""

    def read(self, offset: int, into: Bytes) -> None:
        """Fill `into` with the bytes from `offset`."""
        ...

    def close(self) -> None:
        """Release what the store keeps open; closing again is allowed."""
        ...


# --8<-- [start:throttled]
class ThrottledStore:
    """Reads no faster than a rate: a phone's storage on a laptop.

    All threads stand in one line. Each read adds the time of its bytes to the end of the line, and returns when the
    clock gets there, or when the store is closed.
    """

    def __init__(self, store: Store, bytes_per_s: float, clock: Clock) -> None:
        self._store = store
        self._rate = bytes_per_s
        self._clock = clock
        self._line_ends = clock.now()
        self._lock = threading.Lock()
        self._closed = False

    def read(self, offset: int, into: Bytes) -> None:
        """Read, and return no sooner than the rate allows."""
        with self._lock:
            self._line_ends = max(self._line_ends, self._clock.now()) + len(into) / self._rate
            mine = self._line_ends
        self._store.read(offset, into)
        while not self._closed and (rest := mine - self._clock.now()) > 0:
            self._clock.sleep(min(rest, _LONGEST_SLEEP_S))

    def close(self) -> None:
        """Close the underlying store, and end all waiting."""
        self._closed = True
        self._store.close()


# --8<-- [end:throttled]


class FileStore:
    """Reads pages of a file, with direct I/O if that is supported; any thread may read or close.

    Raises:
        CacheFileError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._lock = threading.RLock()  # a reading thread that collects garbage may find this and close it
        try:
            descriptor = _open_direct(path)
            self.direct = descriptor is not None
            if descriptor is None:
                descriptor = os.open(path, _FLAGS)
        except OSError as error:
            raise CacheFileError(f"{path} cannot be read: {error.strerror}") from None
        self._identity = os.fstat(descriptor)
        self._descriptor: int | None = descriptor
        self._under_way = 0
        self._closed = False

    def read(self, offset: int, into: Bytes) -> None:
        """Fill `into` with the bytes from `offset` on; both start on page boundaries.

        Raises:
            DamagedWeightsError: the file is too short.
            GenerationError: the file cannot be read, or the store is closed.
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
            except OSError as error:  # no proof of damage, so the file stays
                raise GenerationError(
                    f"{self.path} cannot be read: {error.strerror}; if that lasts, remove it with refinfer cache rm"
                ) from None
            with self._lock:
                self.bytes_read += done

    @contextmanager
    def _in_use(self) -> Iterator[int]:
        """Keep the descriptor open during a read: once it is closed, its number may belong to another file."""
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
                self._close_if_unused()

    def _read(self, descriptor: int, offset: int, view: memoryview) -> int:
        if not hasattr(os, "preadv"):  # Windows
            with self._lock:  # the place in the file belongs to all threads
                os.lseek(descriptor, offset, os.SEEK_SET)
                data = os.read(descriptor, len(view))
            view[: len(data)] = data
            return len(data)
        was_direct = self.direct  # another thread may be refused at the same time
        try:
            n = os.preadv(descriptor, [view], offset)
        except OSError as error:
            if not was_direct or error.errno not in _REFUSED:
                raise
            self._end_direct(descriptor)  # what worked at first is refused now
            n = os.preadv(descriptor, [view], offset)
        if not self.direct:
            with suppress(AttributeError, OSError):  # a hint
                os.posix_fadvise(descriptor, offset, n, os.POSIX_FADV_DONTNEED)
        return n

    def _end_direct(self, descriptor: int) -> None:
        """Go on with ordinary reads of the same open file."""
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.direct = False

    def is_at(self, path: Path) -> bool:
        """Return whether `path` is still the file that is open here."""
        try:
            return os.path.samestat(path.stat(), self._identity)
        except OSError:
            return False

    def close(self) -> None:
        """Close the file, after the reads that are under way; closing again is allowed."""
        with self._lock:
            self._closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and not self._under_way:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# --8<-- [start:direct]
def _open_direct(path: Path) -> int | None:
    """Open for direct I/O, or return None if the file system lacks it; some report that only at the first read."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, _FLAGS | flag)
        os.preadv(descriptor, [aligned_empty((PAGE_BYTES // 4,), PAGE_BYTES).data], 0)
    except OSError:  # ordinary reads will show whether the file itself can be read
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


# --8<-- [end:direct]
