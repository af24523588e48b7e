"""How a file comes into being: under another name, by one process at a time, and then all at once.

Temporary files, locks, fsync, renaming. Leaves to others: what is in a file.
Read more: tutorial 05; clauses PUBLISH-1 to PUBLISH-7.

A draft of `name` is `name.tmp`, and whoever holds its lock may write it. Publishing makes its bytes durable, then
gives it its name, then makes the name durable. So whoever opens `name` finds the old file or the new one, whole, at
every instant, also after a crash; and whoever has mapped the old one keeps it.

    one process               another                       a crashed one leaves
    -----------               -------                       --------------------
    lock name.tmp             waits for the lock            name.tmp, unlocked: the next
    write, fsync                                            builder takes it over
    rename to name, fsync
    unlock                    looks: name is there

Without file locks (Windows), builders do not wait for each other: each has a draft of its own, and the
last one to publish wins.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

import numpy as np

from refinfer.arrays import PAGE_BYTES

__all__ = ["Draft", "Space", "draft_path", "remove_dead_draft", "write_small_file"]

_GRANULE: Final = mmap.ALLOCATIONGRANULARITY
_ZEROS: Final = bytes(1 << 20)


def draft_path(path: Path) -> Path:
    """Return where the draft of a file is written."""
    return path.with_name(f"{path.name}.tmp" if fcntl else f"{path.name}.{os.getpid()}.tmp")


class Space:
    """`nbytes` of a draft from `start` on, mapped for writing: `view`. The mapping lives as long as a view of it."""

    def __init__(self, file: IO[bytes], start: int, nbytes: int) -> None:
        before = start % _GRANULE
        self.start = start
        self._map = mmap.mmap(file.fileno(), before + nbytes, offset=start - before)
        self.view = np.frombuffer(self._map, np.uint8)[before:]

    def drop_pages(self) -> None:
        """Take the pages out of this process; their content stays in the file."""
        if hasattr(mmap.mmap, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Draft:
    """A file under construction, locked: `publish` makes it `path`, `abandon` removes it.

    Making one waits until no other process has a draft of the same file; `on_wait` is called first when it must.

    Raises:
        OSError: the folder does not let a file be made.
    """

    def __init__(self, path: Path, on_wait: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.then: Callable[[], None] = lambda: None  # what others who wait for the lock must find done
        self.temporary = draft_path(path)
        self._file = _open_locked(self.temporary, on_wait)
        self._file.truncate(0)

    def now_ns(self) -> int:
        """Return the time by the clock of the file system."""
        os.utime(self._file.fileno())
        return os.fstat(self._file.fileno()).st_mtime_ns

    def grow(self, start: int, nbytes: int) -> Space:
        """Make the file reach from `start` over whole pages of zeros for which the disk has room; return them mapped.

        Raises:
            OSError: the disk has no room.
        """
        end = start + -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        try:
            os.posix_fallocate(self._file.fileno(), start, end - start)
        except (AttributeError, OSError) as error:  # not on macOS, nor on every file system
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self.clear(start, end)
        return Space(self._file, start, nbytes)

    def clear(self, start: int, end: int) -> None:
        """Write zeros from `start` to `end`."""
        for at in range(start, end, len(_ZEROS)):
            self.write(at, _ZEROS[: end - at])

    def write(self, start: int, data: bytes) -> None:
        """Write `data` at `start`."""
        rest = memoryview(data)
        self._file.seek(start)
        while rest:
            rest = rest[self._file.write(rest) :]

    # --8<-- [start:publish]
    def settle(self, nbytes: int) -> None:
        """Cut the file to `nbytes` and make them durable."""
        self._file.truncate(nbytes)
        os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Give the settled file its name, durably, and call `then`; the draft is closed."""
        self.temporary.replace(self.path)
        _sync_folder(self.path.parent)
        self.then()
        self._close()

    # --8<-- [end:publish]

    def abandon(self) -> None:
        """Remove the draft, unless it was published."""
        if not self._file.closed:
            if _is_at(self.temporary, self._file):
                self.temporary.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        """Unlock and close: whatever is still mapped holds the file, and would hold its lock."""
        if fcntl:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _open_locked(path: Path, on_wait: Callable[[], None]) -> IO[bytes]:
    while True:
        try:
            path.touch()
        except PermissionError:
            if not path.exists() and not os.access(path.parent, os.W_OK | os.X_OK):
                raise
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError:  # published or removed since
            continue
        except PermissionError:  # another user's: once it is dead it is in the way, if the folder lets us
            _remove_when_unlocked(path, on_wait)
            continue
        try:
            if fcntl is None or (_lock(file, on_wait) and _is_at(path, file)):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _remove_when_unlocked(path: Path, on_wait: Callable[[], None]) -> None:
    if fcntl is None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
        if _lock(file, on_wait) and _is_at(path, file):
            path.unlink()


def _lock(file: IO[bytes], on_wait: Callable[[], None]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait()
        fcntl.flock(file, fcntl.LOCK_EX)
    return True


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Tell whether the open file is the one with that name: while we waited it may have been published."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make a new name durable; not needed, and not possible, on Windows."""
    if os.name == "posix":
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except PermissionError:  # a folder that may be written but not read cannot be made durable from here
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some file systems do not sync folders
                raise
        finally:
            os.close(descriptor)


def remove_dead_draft(path: Path) -> None:
    """Remove a draft of `path` that nobody is writing, such as one whose builder was killed."""
    temporary = draft_path(path)
    if fcntl is None or not temporary.exists():
        return
    try:
        with temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(temporary, file):
                temporary.unlink()
    except OSError:
        return  # somebody is writing it, or has removed it, or we may not


def write_small_file(path: Path, data: bytes) -> None:
    """Replace a small file at once, durably.

    Raises:
        OSError: the disk is full, or the folder does not let a file be made; nothing is left behind.
    """
    draft = Draft(path)
    try:
        draft.write(0, data)
        draft.settle(len(data))
        draft.publish()
    finally:
        draft.abandon()
