r"""How the program ends: signals that ask it to stop are answered, and output that cannot be written is dropped.

Python answers Ctrl-C by raising an error wherever its first thread happens to be, at every press, and other signals not
at all. Here the first signal raises `Stopped` once, so that every `finally` runs. Later ones change nothing, because
they would break off the cleaning up. Then the program ends: after Ctrl-C with one line and status 130, after any other
signal by that signal, so that whoever sent it sees it. Ctrl-\ (SIGQUIT) and SIGKILL end it without cleaning up.

Leaves to others: what is cleaned up (each room has its own `finally`). Imports little, so that it is there early.
Read more: tutorial 00; clauses CLI-5, CLI-8, CLI-26, CLI-27.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

__all__ = ["INTERRUPTED", "Stopped", "ends_well", "say_interrupted"]

INTERRUPTED = 130
"""The exit status after Ctrl-C."""

_ASKING = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, `kill`, and a terminal that was closed
_SHORT_STEPS = ("contextlib", "importlib", "refinfer.cli.ending", "rich", "threading")
_WHOLE_CALLS = ("refinfer.weight_cache.publish", "tempfile")
_MOST_DELAYS = 100
_DELAY_S = 0.001


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, when_lost: Callable[[], None]) -> None:
        super().__init__()
        self._when_lost = when_lost

    def __del__(self) -> None:
        """Report that nobody passes this error on any more."""
        self._when_lost()


class _Signals:
    """The handler of the signals: `came` is the signal that the program ends by, if any came."""

    def __init__(self) -> None:
        self.came: int | None = None
        self.is_over = False
        self._answered: list[int] = []
        self._is_told = self._uses_timer = False
        self._delays = 0

    def listen(self) -> None:
        """Answer the signals from now on, except those that the program was started to ignore."""
        for name in _ASKING:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._answered.append(number)
                try:
                    signal.signal(number, self)
                except ValueError:  # this is not the first thread
                    self._answered.clear()
                    return

    def leave(self, interrupt: signal.Handlers) -> None:
        """Let any further signal end the program at once: it has cleaned up. `interrupt` is the answer to Ctrl-C."""
        for number in self._answered:
            signal.signal(number, interrupt if number == signal.SIGINT else signal.SIG_DFL)
        if self._uses_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, and raise `Stopped` if that was not done: now, or in a moment if something is halfway."""
        if number in self._answered and self.came in (None, signal.SIGINT):
            self.came = number
        if self.came is None or self._is_told or self.is_over:
            return
        if self._delays < _MOST_DELAYS and _is_halfway(frame) and self._come_again():
            self._delays += 1
            return
        self._is_told = True
        raise Stopped(self._tell_again)

    def _come_again(self) -> bool:
        """Have this handler called again in a moment; return whether the system can do that."""
        if not self._answered or not hasattr(signal, "setitimer"):  # not on Windows
            return False
        signal.signal(signal.SIGALRM, self)
        signal.setitimer(signal.ITIMER_REAL, _DELAY_S)
        self._uses_timer = True
        return True

    def _tell_again(self) -> None:
        """Raise once more: Python drops what is raised in a destructor, and a library may drop anything."""
        if not self.is_over:
            self._is_told = False
            self._come_again()


def _is_halfway(frame: FrameType | None) -> bool:
    """Return whether an error would come between two steps that belong together.

    So it is in the code of `_SHORT_STEPS`, which takes locks and loads modules, but not in what that calls. It is so in
    all that `_WHOLE_CALLS` calls: a draft or a temporary folder must not exist before somebody is there to remove it.
    """
    names = []
    while frame is not None:
        names.append(str(frame.f_globals.get("__name__")))
        frame = frame.f_back
    return bool(names) and (names[0].startswith(_SHORT_STEPS) or not set(names).isdisjoint(_WHOLE_CALLS))


def ends_well(run: Callable[[], int]) -> int:
    """Run the program and return its exit status; answer a signal that asks it to stop after it has cleaned up."""
    signals = _Signals()
    status = 0
    try:
        try:
            signals.listen()
            sys.unraisablehook = _report_unless_stopped
            status = run()
        finally:
            signals.is_over = True  # from here on, a signal is only noted
    except KeyboardInterrupt:
        signals.came = signals.came or signal.SIGINT
    except BaseException:  # whatever a library made of it
        if signals.came is None:
            raise
    finally:
        came = signals.came  # what comes later is too late
        if came is None:
            signals.leave(signal.SIG_IGN)
            drop_unwritable_output()
    if came is None:
        return status
    if came == signal.SIGINT and not status:  # with another status there has been a line
        say_interrupted()
    signals.leave(signal.SIG_DFL)
    if came != signal.SIGINT:
        os.kill(os.getpid(), came)
    drop_unwritable_output()
    signals.leave(signal.SIG_IGN)  # Ctrl-C while Python shuts down would change the exit status
    return INTERRUPTED


def _report_unless_stopped(unraisable: sys.UnraisableHookArgs) -> None:
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)


def say_interrupted() -> int:
    """Write the line that answers Ctrl-C, and return the exit status."""
    try:
        sys.stderr.write("refinfer: interrupted\n")
        sys.stderr.flush()
    except (AttributeError, OSError):  # it is closed
        pass
    return INTERRUPTED


def drop_unwritable_output() -> None:
    """Send what a stream still holds and cannot write to nowhere: Python would complain again while it shuts down."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
