"""Opens regular files without waiting, reads small ones whole, and asks for parts of large ones in advance.

Refuses what is not a regular file, what is larger than its kind can be, and JSON that cannot be read. Leaves to others:
what is in the files, and which error a user gets.
Read more: tutorial 07; clauses INPUT-1, INPUT-2.

A name may lead to anything: opening a FIFO (a pipe with a name) waits for somebody who writes to it, and `/dev/zero`
never ends. So a name is looked at before it is opened, it is opened without waiting, and what was opened is looked at
again, because the name may have been given to something else in between.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

__all__ = ["GIT_LFS_POINTER", "LFS_PROBLEM", "open_regular", "parse_json", "read_json", "read_whole", "will_need"]

GIT_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
"""How the small text begins that Git puts in place of a large file until `git lfs pull` fetches it."""

LFS_PROBLEM: Final = "it is a Git LFS pointer, not the file itself; fetch the file with git lfs pull"

_FLAGS: Final = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file to read its bytes; links are followed.

    Raises:
        OSError: it is not a regular file, or cannot be opened; `strerror` says why.
    """
    _require_regular(path.stat().st_mode, path)
    descriptor = os.open(path, _FLAGS)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def will_need(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the system to begin to read a part of a file into memory."""
    with suppress(AttributeError, OSError):  # a hint, which not every system knows
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


def read_whole(path: Path, most_nbytes: int) -> bytes:
    """Return the contents of a regular file of at most `most_nbytes`.

    Raises:
        OSError: it is larger, not a regular file, a Git LFS pointer, or cannot be read; `strerror` says why.
    """
    with open_regular(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > most_nbytes:
            most = f"{most_nbytes / 1e6:.0f} MB"
            raise OSError(errno.EFBIG, f"it is larger than the {most} that such a file may have", str(path))
        data = file.read(nbytes)
    if data.startswith(GIT_LFS_POINTER):
        raise OSError(errno.EINVAL, LFS_PROBLEM, str(path))
    return data


def read_json(path: Path, most_nbytes: int) -> Any:  # noqa: ANN401  (any JSON value)
    """Return the JSON value in a file of at most `most_nbytes`.

    Raises:
        OSError: as `read_whole`.
        ValueError: as `parse_json`.
    """
    return parse_json(read_whole(path, most_nbytes))


def parse_json(data: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:  # noqa: ANN401
    """Return the JSON value that `data` holds in UTF-8; `pairs` makes objects of their names and values.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
