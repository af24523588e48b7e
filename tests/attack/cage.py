"""A cage for attacks: a forked process with limits on time and memory, which may write into one folder only.

Leaves to others: what is attacked, and with what.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

ESCAPED: Final = 86
"""The exit status of a process that tried to write outside its folder."""

_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES: Final = {
    "os.chmod": 1, "os.chown": 1, "os.link": 2, "os.mkdir": 1, "os.mkfifo": 1, "os.mknod": 1, "os.remove": 1,
    "os.rename": 2, "os.rmdir": 1, "os.symlink": 2, "os.truncate": 1, "os.utime": 1, "shutil.rmtree": 1,
}  # fmt: skip
"""Audit events that change the file system, and how many of their arguments are paths."""


@dataclass(frozen=True)
class Ran:
    """How a caged process ended: its exit status, or minus the signal that ended it, and what it wrote."""

    status: int
    out: str
    err: str

    def require_civil(self) -> None:
        """Require an end that a person can live with: a promised status, one line about a failure, no traceback."""
        said = self.err[-2000:]
        assert self.status != ESCAPED, f"it wrote outside its folder: {said}"
        assert self.status in (0, 1, 2), f"it ended with {self.status}: {said}"
        assert "Traceback" not in self.err, said
        assert "Exception ignored" not in self.err, said
        assert "Error:" not in self.err.split("refinfer:")[0], said
        if self.status:
            complaints = [line for line in self.err.splitlines() if not line.startswith("refinfer: warning: ")]
            assert len(complaints) == 1, f"not one line: {said}"
            assert complaints[0].startswith("refinfer: "), said
            assert len(complaints[0]) < 2000, f"a line of {len(complaints[0])} characters: {said}"


def command(folder: Path, *argv: object, memory: int | None = 256 << 20, seconds: int = 20) -> Ran:
    """Run a command of refinfer in a cage: it may write into `folder`, where its cache directory lies, too."""

    def work() -> int:
        from refinfer.__main__ import main  # here: who gives a cage other work may want refinfer imported inside it

        os.environ["XDG_CACHE_HOME"] = str(folder / "cache-home")
        sys.argv = ["refinfer", *map(str, argv)]
        try:
            return main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)

    return caged(folder, work, memory=memory, seconds=seconds)


def caged(
    folder: Path,
    work: Callable[[], int],
    *,
    memory: int | None = 256 << 20,
    seconds: int = 20,
    elsewhere: Sequence[Path] = (),
) -> Ran:
    """Do `work` in a forked process that gets `memory` more bytes of address space and `seconds` of time.

    It may write into `folder`, and into the folders `elsewhere`.
    """
    out, err = os.memfd_create("out"), os.memfd_create("err")
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # BLAS has threads, and mends itself after a fork
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _enter((folder.resolve(), *elsewhere), out, err, memory)
            status = work()
        except BaseException:  # noqa: BLE001, RUF100 -- the child must not return into pytest
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    try:
        status = _wait(pid, seconds)
        return Ran(status, _read(out), _read(err))
    finally:
        os.close(out)
        os.close(err)


def _enter(folders: Sequence[Path], out: int, err: int, memory: int | None) -> None:
    os.setpgid(0, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "wb", closefd=False), encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "wb", closefd=False), encoding="utf-8", write_through=True)
    warnings.resetwarnings()
    os.environ["TMPDIR"] = str(folders[0])
    if memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also if whoever started it ignores it, as `nohup` does
    sys.addaudithook(guard(*folders))


def guard(*folders: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that ends the process when it writes to a path outside all of `folders`.

    A device such as /dev/null may be written to, but not removed, and so may a pipe, which may be opened by the number
    of its descriptor.
    """

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            by_mode = isinstance(mode, str) and set(mode) & set("wax+")
            writes = by_mode or (isinstance(flags, int) and flags & _WRITING)
            paths: tuple[Any, ...] = (path,) if writes else ()
        else:
            paths = args[: _CHANGES.get(event, 0)]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                whole = Path(os.fsdecode(path))
                where = whole.parent.resolve()
                inside = any(map(where.is_relative_to, folders))
                no_file = event == "open" and (whole.is_char_device() or whole.is_fifo())
                if where.is_dir() and not inside and not no_file:
                    os.write(2, f"{event} {path!r}\n".encode())
                    os._exit(ESCAPED)

    return hook


def _wait(pid: int, seconds: int) -> int:
    """Return how the process ended; after `seconds` it is killed. What it started and left running is killed, too."""
    end = time.monotonic() + seconds
    pidfd = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([pidfd], [], [], max(0.0, end - time.monotonic()))
    finally:
        os.close(pidfd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if ended else -signal.SIGALRM  # it took too long


def _read(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    with open(file, "rb", closefd=False) as stream:
        return stream.read().decode(errors="replace")


class Cases:
    """The random numbers of one attack, case after case, until its time is up; a case is replayed by its seed."""

    def __init__(self, first: int, most: int | None, seconds: float) -> None:
        self.seed = first
        self.n = 0
        self._most = most
        self._ends = time.monotonic() + seconds

    def __iter__(self) -> Iterator[Random]:
        while self.n == 0 or (time.monotonic() < self._ends and self.n != self._most):
            self.n += 1
            yield Random(self.seed)
            self.seed += 1
