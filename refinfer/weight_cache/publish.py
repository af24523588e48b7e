"""How a file is created: under another name, by one process at a time, and then all at once.

Uses temporary files, locks, fsync and renaming. Leaves to others: what is in a file.
Read more: tutorial 05; clauses PUBLISH-1 to PUBLISH-7.

The draft of `name` is `name.tmp`; only the process that has its lock may write to it. Publishing makes its bytes
durable (they are on the disk when `fsync` returns, and survive a power cut), then gives it its name, then makes the
name durable. So a process that opens `name` finds the old file or the new one, always complete, even after a crash. A
process that has mapped the old one keeps it.

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

__all__ = ["Draft", "Space", "discard", "draft_path", "remove_dead_draft", "write_small_file"]

_GRANULE: Final = mmap.ALLOCATIONGRANULARITY  # a mapping begins at a multiple of it
_ZEROS: Final = bytes(1 << 20)


def draft_path(path: Path) -> Path:
    """Return where the draft of a file is written."""
    return path.with_name(f"{path.name}.tmp" if fcntl else f"{path.name}.{os.getpid()}.tmp")


class Space:
    """`nbytes` of a draft from `start` on, mapped for writing as `view`; it stays mapped as long as there is a view."""

    def __init__(self, file: IO[bytes], start: int, nbytes: int) -> None:
        before = start % _GRANULE
        self.start = start
        self._map = mmap.mmap(file.fileno(), before + nbytes, offset=start - before)
        self.view = np.frombuffer(self._map, np.uint8)[before:]

    def drop_pages(self) -> None:
        """Release the memory of the mapped pages; their content stays in the file."""
        if hasattr(mmap.mmap, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Draft:
    """A file under construction, locked: `publish` makes it `path`, `abandon` removes it.

    Making one waits until no other process has a draft of the same file; if it has to wait, it calls `on_wait` first.

    Raises:
        OSError: no file can be made in the folder.
    """

    def __init__(self, path: Path, on_wait: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.then: Callable[[], None] = lambda: None  # runs after publishing and before the lock is released
        self.temporary = draft_path(path)
        self._file = _open_locked(self.temporary, on_wait)
        self._file.truncate(0)

    def now_ns(self) -> int:
        """Return the time by the clock of the file system."""
        os.utime(self._file.fileno())
        return os.fstat(self._file.fileno()).st_mtime_ns

    def grow(self, start: int, nbytes: int) -> Space:
        """Append whole pages of zeros at `start`, with space on the disk reserved for them; return them mapped.

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
        """Unlock and close; closing alone would not unlock it, because a mapping keeps the file open."""
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
        except PermissionError:  # another user's draft: removed when nobody writes it any more
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
    """Return whether the open file still has that name: while we waited it may have been published."""
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


def discard(path: Path, is_at: Callable[[Path], bool]) -> bool:
    """Remove a damaged file, unless another process has replaced it meanwhile; return whether it is gone.

    `is_at` returns whether a path is still the file that was found damaged.
    """
    try:
        draft = Draft(path)
    except OSError:
        return False
    try:
        if is_at(path):
            path.unlink()
    except OSError:
        return False
    else:
        return True
    finally:
        draft.abandon()


def write_small_file(path: Path, data: bytes) -> None:
    """Replace a small file all at once and durably.

    Raises:
        OSError: the disk is full, or no file can be made in the folder; nothing is left behind.
    """
    draft = Draft(path)
    try:
        draft.write(0, data)
        draft.settle(len(data))
        draft.publish()
    finally:
        draft.abandon()
