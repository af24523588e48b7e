"""Processes that a test forks: they report to it line by line, wait at gates, and are killed if it fails."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, ClassVar, Self

import pytest

WATCHDOG_S = 40
NOBODY = 65534

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else"
)

Say = Callable[[str], None]


@contextmanager
def watched() -> Iterator[None]:
    """Let nothing wait for ever; children inherit the handler but not the timer."""

    def bark(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(WATCHDOG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        for child in Child.living.copy():  # of a test that failed
            os.kill(child.pid, signal.SIGKILL)
            child.end()


def _say(writer: int, text: str) -> None:
    os.write(writer, f"{text}\n".encode())


class Child:
    """A forked process: does `work`, which may say lines to its parent, and ends; a watchdog ends it too."""

    living: ClassVar[set[Child]] = set()

    def __init__(self, work: Callable[[Say], object]) -> None:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # BLAS has threads; the child calls none of it
            self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.alarm(WATCHDOG_S)
                os.close(reader)
                work(partial(_say, writer))
                status = 0
            except BaseException:  # noqa: BLE001, RUF100 -- the child must not return into pytest
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        os.close(writer)
        self.lines: IO[str] = os.fdopen(reader)
        self._status: int | None = None
        self.living.add(self)

    def hear(self) -> str:
        """Return the next line that the child says, or "" at its end."""
        return self.lines.readline().rstrip("\n")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL

    def end(self) -> int:
        """Wait for the end; return the exit status, or minus the signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.lines.close()
            self.living.remove(self)
        return self._status


def in_child(work: Callable[[], object], user: int | None = None) -> None:
    """Do `work` in a process of its own, as another user if one is given; if it fails there, fail here."""

    def as_user(_: Say) -> None:
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        work()

    assert Child(as_user).end() == 0


class Gate:
    """Several processes wait before it until it is opened."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()

    def wait(self) -> None:
        assert os.read(self.reader, 1)

    def open(self) -> None:
        os.write(self._writer, bytes(64))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)
        os.close(self._writer)
