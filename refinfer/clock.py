"""The time: code that needs it is given a `Clock`, so that a test or a simulation can give its own.

Leaves to others: what happened when (`trace`).
Read more: tutorial 10; clause ERR-3.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Protocol

__all__ = ["Clock", "RealClock", "wall_time_ns"]


class Clock(Protocol):
    """A source of time that can also wait."""

    def now(self) -> float:
        """Return seconds since some fixed instant; never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return once `seconds` have passed on this clock."""
        ...


def wall_time_ns() -> int:
    """Return the time of day in nanoseconds, to compare with the times of files."""
    return time.time_ns()


class RealClock:
    """The machine's own clock, which never goes back."""

    def now(self) -> float:
        """Return seconds since some fixed instant, to better than a microsecond."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait for `seconds`, at least."""
        time.sleep(seconds)

    def local_time(self, form: str) -> str:
        """Return the time of day where this machine is, in a form such as `%d %b %Y`."""
        return datetime.now().strftime(form)  # noqa: DTZ005  (without a zone, as templates of chats expect it)
