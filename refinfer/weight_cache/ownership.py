"""What may be written over, and who may read what is written.

Others can guess the names that a build writes to, and may be able to write into the same folder. So nothing is written
through a link, into a special file or over a file that refinfer did not write, and a cache file is no more readable
than the weights in it. Leaves to others: when something is written (`publish`), and what.
Read more: tutorial 05; clauses PUBLISH-8 to PUBLISH-11, OPEN-9, OPEN-10.

    what lies at the name of a draft              what a build does
    --------------------------------              -----------------
    nothing                                       creates it, for this user alone (mode 0600)
    a draft of this user                          waits until nobody writes it, and takes it over
    a draft of another user                       waits until nobody writes it, and removes it; if that
                                                  cannot be seen: an error that names it
    a link, a special file, any other file        leaves it as it is: an error that names it
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from refinfer.errors import RequestError
from refinfer.process import umask
from refinfer.whole_file import open_regular

__all__ = [
    "READ_ONLY",
    "belongs_to_a_stranger",
    "change_mode",
    "is_ours",
    "make_folder",
    "mode_like",
    "open_draft",
    "open_other_draft",
    "require_replaceable",
    "taken_by",
    "write_to_device",
]

READ_ONLY: Final = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
"""The mode of a published cache file, as far as its sources and the umask allow."""

_PRIVATE: Final = stat.S_IRUSR | stat.S_IWUSR

# O_NONBLOCK, so that opening a pipe does not wait for its other end.
_CAREFUL: Final = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def taken_by(path: Path, what: str) -> OSError:
    """Return the error for a name that cannot be used, because of `what` lies there."""
    return OSError(errno.EEXIST, f"{path} is {what}, and stays as it is; remove it, or name another place")


def require_replaceable(path: Path, begin: bytes, what: str) -> None:
    """Require that nothing is lost if a file of ours replaces `path`: it is missing or empty, or begins with `begin`.

    Raises:
        RequestError: another file lies there, or one that cannot be read; `what` says what it is not.
    """
    try:
        with open_regular(path) as file:
            ours = file.read(len(begin)) in (begin, b"")
    except (FileNotFoundError, NotADirectoryError):
        ours = True
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    if not ours or path.is_symlink():
        raise RequestError(f"{path} is not {what}, and stays as it is; name another file")


# --8<-- [start:open]
def open_draft(path: Path) -> IO[bytes]:
    """Open a draft for reading and writing, or create it; a link is not followed, and nothing in the file changes.

    Raises:
        PermissionError: it is another user's, or the folder cannot be written.
        OSError: there is no folder, or what lies there is not a regular file, or has a second name.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CAREFUL, _PRIVATE)
            change_mode(descriptor, _PRIVATE)  # whatever the umask is
            return os.fdopen(descriptor, "r+b", 0)
        with contextlib.suppress(FileNotFoundError):  # published or removed at this moment
            return _open_own_draft(path)


def _open_own_draft(path: Path) -> IO[bytes]:
    _require_plain(path)
    file = os.fdopen(os.open(path, os.O_RDWR | _CAREFUL), "r+b", 0)
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise taken_by(path, "a link or a special file")
        if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
            raise PermissionError(errno.EACCES, f"{path} belongs to another user")
    except BaseException:
        file.close()
        raise
    return file


# --8<-- [end:open]


def open_other_draft(path: Path) -> IO[bytes]:
    """Open a draft for reading, such as another user's; a link is not followed.

    Raises:
        OSError: it is not a regular file, or cannot be read.
    """
    _require_plain(path)
    return os.fdopen(os.open(path, os.O_RDONLY | _CAREFUL), "rb", 0)


def _require_plain(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise taken_by(path, "a link or a special file")


def change_mode(descriptor: int, mode: int) -> None:
    """Change the mode of an open file, if the file system has modes."""
    with contextlib.suppress(AttributeError, OSError):
        os.fchmod(descriptor, mode)


def is_ours(file: IO[bytes], begin: bytes) -> bool:
    """Return whether a draft may be one of ours: it begins with `begin`, or a crash has left nothing or zeros of it.

    Others' files may begin with zeros, too, such as images of disks. A draft has the mode of one.
    """
    file.seek(0)
    head = file.read(len(begin))
    if head and not head.strip(b"\0"):
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode) == _PRIVATE
    return head == begin[: len(head)]


def write_to_device(path: Path, data: bytes) -> None:
    """Write to a device or a pipe.

    Raises:
        OSError: it cannot be written, or nobody reads from the pipe.
    """
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, for this user alone; a folder that is there already stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    try:
        folder.mkdir(stat.S_IRWXU)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return  # another process was quicker
    folder.chmod(stat.S_IRWXU)  # whatever the umask is


def mode_like(sources: Sequence[Path], most: int, gid: int) -> int:
    """Return the mode of a file of group `gid` that nobody may read whom the mode of one of `sources` shuts out.

    The user may always read it. Others get at most the bits of `most`, without those that the umask takes away.

    Raises:
        OSError: a source is not there.
    """
    mode = most & ~umask()
    for found in map(os.stat, sources):
        mode &= found.st_mode | stat.S_IWUSR
        if found.st_gid != gid:
            mode &= ~stat.S_IRWXG
            if not found.st_mode & stat.S_IRGRP:  # its group would be among the others
                mode &= ~stat.S_IRWXO
    return mode | stat.S_IRUSR


def belongs_to_a_stranger(path: Path, sources: Sequence[Path]) -> bool:
    """Return whether a file's owner is neither this user, nor root, nor the owner of a source; false if it is gone."""
    if not hasattr(os, "geteuid"):
        return False
    try:
        trusted = {os.geteuid(), 0, *(source.stat().st_uid for source in sources)}
        return path.stat().st_uid not in trusted
    except OSError:
        return False
