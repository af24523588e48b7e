"""Time: the one place besides `bench` that reads a clock.

Knows: seconds. Does not know: what is timed.
Spec: ERR-3. Tutorial: 10.

Whoever needs the time is handed a `Clock`, so that a test or a simulation can hand in its own.
"""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "RealClock"]


class Clock(Protocol):
    """Something that tells the time and can wait."""

    def now(self) -> float:
        """Return seconds since some fixed instant; never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return once `seconds` have passed on this clock."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Return seconds since some fixed instant, to better than a microsecond."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait for `seconds`, at least."""
        time.sleep(seconds)
