"""How a file is created: under another name, by one process at a time, and then all at once.

Uses temporary files, locks, fsync and renaming. Leaves to others: what is in a file, what may be written over
(`ownership`).
Read more: tutorial 05; clauses PUBLISH-1 to PUBLISH-7, PUBLISH-12 to PUBLISH-15.

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

Without file locks (Windows, and file systems that have none), builders do not wait for each other: each has a draft of
its own, `name.PID.tmp`, and the last one to publish wins.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

import numpy as np

from refinfer.arrays import whole_pages
from refinfer.clock import Clock
from refinfer.weight_cache.format import MAGIC
from refinfer.weight_cache.ownership import (
    READ_ONLY,
    change_mode,
    is_ours,
    mode_like,
    open_draft,
    open_other_draft,
    require_replaceable,
    taken_by,
)

__all__ = [
    "Draft",
    "Patience",
    "Space",
    "discard",
    "draft_path",
    "named_draft",
    "remove_dead_draft",
    "write_small_file",
]

_LONG_S: Final = 5.0
_LOOK_S: Final = 0.05
_REFUSED: Final = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)  # a service that can be done without
_NO_LOCKS: Final = (*_REFUSED, errno.ENOLCK)
_GRANULE: Final = mmap.ALLOCATIONGRANULARITY  # a mapping begins at a multiple of it
_ZEROS: Final = bytes(1 << 20)


def draft_path(path: Path, *, locks: bool = fcntl is not None) -> Path:
    """Return where the draft of a file is written; without locks, each process has a draft of its own."""
    return path.with_name(f"{path.name}.tmp" if locks else f"{path.name}.{os.getpid()}.tmp")


class Patience:
    """What is reported while a draft is locked by another process, each once.

    `on_wait()` is called at once, and `on_long_wait(draft)` after five seconds.
    """

    def __init__(
        self,
        clock: Clock,
        on_wait: Callable[[], None] = lambda: None,
        on_long_wait: Callable[[Path], None] | None = None,
    ) -> None:
        self._clock = clock
        self._on_wait = on_wait
        self._on_long_wait = on_long_wait or (lambda draft: None)
        self._until: float | None = None

    def wait(self, draft: Path, is_free: Callable[[], bool]) -> bool:
        """Wait until `is_free()`, for five seconds in all, then report; return whether it is free."""
        if self._until is None:
            self._until = self._clock.now() + _LONG_S
            self._on_wait()
        while self._clock.now() < self._until:
            self._clock.sleep(_LOOK_S)
            if is_free():
                return True
        self._on_long_wait(draft)
        self._on_long_wait = lambda draft: None
        return False


class Space:
    """`nbytes` of a draft from `start` on, mapped for writing as `view`; it stays mapped as long as there is a view."""

    def __init__(self, file: IO[bytes], start: int, nbytes: int) -> None:
        before = start % _GRANULE
        self.start = start
        self._map = mmap.mmap(file.fileno(), before + nbytes, offset=start - before)
        self.view = np.frombuffer(self._map, np.uint8)[before:]

    def drop_pages(self) -> None:
        """Release the memory of the mapped pages; their content stays in the file."""
        with contextlib.suppress(AttributeError, OSError):  # a hint
            self._map.madvise(mmap.MADV_DONTNEED)


class Draft:
    """A file under construction, locked: `publish` makes it `path`, `abandon` removes it.

    Making one waits until no other process has a draft of the same file. A draft that a crash has left is taken over if
    it begins with `begin`. `locked` is false if the file system has no locks.

    Raises:
        OSError: no file can be made in the folder, or something else has the draft's name.
    """

    def __init__(self, path: Path, begin: bytes = b"", patience: Patience | None = None) -> None:
        self.path = path
        self.before: Callable[[], None] = lambda: None  # runs just before the file gets its name, and may refuse
        self.then: Callable[[], None] = lambda: None  # runs after publishing and before the lock is released
        self._readable_like: tuple[Sequence[Path], int] = ((), READ_ONLY)
        self.temporary = draft_path(path)
        try:
            self._file = _open_locked(self.temporary, begin, patience)
            self.locked = fcntl is not None
        except _NoLocksError:
            self.temporary = draft_path(path, locks=False)
            self._file = _require_ours(open_draft(self.temporary), self.temporary, begin)
            self.locked = False
        self._file.truncate(0)

    def make_readable_like(self, sources: Sequence[Path], most: int = READ_ONLY) -> None:
        """Have the published file shut out everybody whom one of `sources` does; `most` has the bits it may have."""
        self._readable_like = sources, most

    def now_ns(self) -> int:
        """Return the time by the clock of the file system."""
        with contextlib.suppress(OSError):  # then it is the time when the draft was made
            os.utime(self._file.fileno())
        return os.fstat(self._file.fileno()).st_mtime_ns

    def grow(self, start: int, nbytes: int) -> Space:
        """Append whole pages of zeros at `start`, with space on the disk reserved for them; return them mapped.

        Raises:
            OSError: the disk has no room.
        """
        end = start + whole_pages(nbytes)
        try:
            os.posix_fallocate(self._file.fileno(), start, end - start)
        except (AttributeError, OSError) as error:  # not on macOS, nor on every file system
            if isinstance(error, OSError) and error.errno not in _REFUSED:
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
        """Cut the file to `nbytes`, then give it its mode, then make its bytes, its size and its mode durable.

        Raises:
            OSError: that fails, or a file whose mode it is to have is not there.
        """
        # lab 08: make the draft what it is to be under its name, and durable
        self._file.truncate(nbytes)
        self._take_mode()
        _sync(self._file.fileno())
        # end lab

    def publish(self) -> None:
        """Give the settled file its name, durably, and call `then`; the draft is closed.

        In this order, after `settle`:

        1. `before` runs, and may refuse by raising an error.
        2. If the draft's name, `temporary`, is another file's by now, that file stays, and the error
           `taken_by(self.temporary, "no longer the draft that was written")` is raised.
        3. The draft takes the place of `path` in one step.
        4. The folder is made durable, and the new name with it.
        5. `then` runs.
        6. The lock is released, and the file is closed.

        Raises:
            OSError: the draft's name is another file's, or the system refuses to rename it or to make it durable.
        """
        # lab 08: give the draft its name in one step, durably, and unlock it after all else
        self.before()
        if not _is_at(self.temporary, self._file):
            raise taken_by(self.temporary, "no longer the draft that was written")
        self.temporary.replace(self.path)
        _sync_folder(self.path.parent)
        self.then()
        self._close()
        # end lab

    # --8<-- [end:publish]

    def abandon(self) -> None:
        """Remove the draft and release its lock; after `publish` or `abandon`, do nothing.

        If publishing failed half-way, the draft's name may be gone, or another builder's by now. That file stays. In
        both cases only the lock is released.
        """
        # lab 08: remove the draft if it still has its name, and release the lock
        if not self._file.closed:
            if _is_at(self.temporary, self._file):
                self.temporary.unlink(missing_ok=True)
            self._close()
        # end lab

    def _take_mode(self) -> None:
        """Give the file the mode that it is to have under its name."""
        change_mode(self._file.fileno(), mode_like(*self._readable_like, os.fstat(self._file.fileno()).st_gid))

    def _close(self) -> None:
        """Unlock and close; closing alone would not unlock it, because a mapping keeps the file open."""
        if self.locked:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


class _NoLocksError(Exception):
    """This file system has no file locks, or the system refuses them."""


def _open_locked(path: Path, begin: bytes, patience: Patience | None) -> IO[bytes]:
    while True:
        try:
            file = open_draft(path)
        except PermissionError:  # another user's draft: removed when nobody writes it any more
            if not os.path.lexists(path):
                raise
            _remove_when_unlocked(path, begin, patience)
            continue
        try:
            if fcntl is None or (_lock(file, path, patience) and _is_at(path, file)):
                return _require_ours(file, path, begin)
        except BaseException:
            file.close()
            raise
        file.close()


def _require_ours(file: IO[bytes], path: Path, begin: bytes) -> IO[bytes]:
    """Return a draft that may be one of ours; any other file is closed, and an error names it."""
    if begin and not is_ours(file, begin):
        file.close()
        raise taken_by(path, "not a draft of refinfer")
    return file


def _remove_when_unlocked(path: Path, begin: bytes, patience: Patience | None) -> None:
    try:
        with open_other_draft(path) as file:
            if fcntl and _lock(file, path, patience) and _is_at(path, file):
                _require_ours(file, path, begin)
                path.unlink()
    except FileNotFoundError:
        return
    except PermissionError:
        raise taken_by(path, "another user's") from None


def _lock(file: IO[bytes], path: Path, patience: Patience | None) -> bool:
    """Lock a draft, waiting for whoever has it locked.

    Raises:
        _NoLocksError: there are no locks here; an empty draft, which only we can have made, is removed.
    """

    def is_free() -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        if not is_free() and (patience is None or not patience.wait(path, is_free)):
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if _is_at(path, file) and not os.fstat(file.fileno()).st_size:
            path.unlink(missing_ok=True)
        raise _NoLocksError from None
    return True


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Return whether the open file still has that name: while we waited it may have been published."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
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
            _sync(descriptor)
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Make a file or a folder durable, if the file system can: some do not sync folders, some nothing."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def named_draft(path: Path) -> Draft:
    """Begin the draft of a cache file at a place that a person chose.

    Raises:
        RequestError: a file lies there that is not a cache file; it stays as it is.
        OSError: no file can be made in the folder, or something else has the draft's name.
    """
    require_replaceable(path, MAGIC, "a weight cache")
    draft = Draft(path, MAGIC)
    draft.before = lambda: require_replaceable(path, MAGIC, "a weight cache")
    return draft


def remove_dead_draft(path: Path, begin: bytes) -> None:
    """Remove a draft of `path` that begins with `begin` and that nobody is writing: its builder was killed."""
    temporary = draft_path(path)
    if fcntl is None:
        return
    try:
        with open_other_draft(temporary) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(temporary, file) and is_ours(file, begin):
                temporary.unlink()
    except OSError:
        return  # there is none, or somebody is writing it, or has removed it, or we may not


def discard(path: Path, begin: bytes, is_at: Callable[[Path], bool]) -> bool:
    """Remove a damaged file, unless another process has replaced it meanwhile; return whether it is gone.

    `begin` is how drafts of it begin. `is_at` returns whether a path is still the file that was found damaged.
    """
    try:
        draft = Draft(path, begin)
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


def write_small_file(
    path: Path, data: bytes, *, begin: bytes = b"", prepare: Callable[[Draft], None] | None = None
) -> None:
    """Replace a small file all at once and durably.

    A draft that a crash has left is taken over if it begins with `begin`. `prepare` may set the draft's mode, and what
    happens before it gets its name.

    Raises:
        OSError: the disk is full, or no file can be made in the folder; nothing is left behind.
    """
    draft = Draft(path, begin)
    try:
        if prepare is not None:
            prepare(draft)
        draft.write(0, data)
        draft.settle(len(data))
        draft.publish()
    finally:
        draft.abandon()
