"""The memory budget: a count of bytes that refuses to exceed its limit.

Knows: how much is in use, how much was at most. Does not know: what for; whoever acquires says so.
Spec: BUDGET-1 to BUDGET-3. Tutorial: 09.
"""

from __future__ import annotations

import re
import threading

from refinfer.errors import BudgetError
from refinfer.process import format_nbytes, parse_nbytes

__all__ = ["Budget", "parse_budget"]


class Budget:
    """Bytes in use against a limit; any thread may acquire and release.

    Law: `in_use` never exceeds `limit`, and `peak` is the most it has been.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_use = self._peak = 0
        self._lock = threading.Lock()

    def acquire(self, nbytes: int, what: str) -> None:
        """Count `nbytes` as in use.

        Raises:
            BudgetError: that would exceed the limit; nothing is counted.
        """
        with self._lock:
            if self._in_use + nbytes > self.limit:
                raise BudgetError(
                    f"{what} needs {format_nbytes(nbytes)}, but of the budget of {format_nbytes(self.limit)} "
                    f"only {format_nbytes(self.limit - self._in_use)} are left"
                )
            self._in_use += nbytes
            self._peak = max(self._peak, self._in_use)

    def release(self, nbytes: int) -> None:
        """Count `nbytes` as free again."""
        with self._lock:
            self._in_use -= nbytes

    @property
    def in_use(self) -> int:
        """The bytes counted now."""
        return self._in_use

    @property
    def peak(self) -> int:
        """The most bytes counted at once."""
        return self._peak


def parse_budget(text: str, streamable_nbytes: int) -> int:
    """Return a budget in bytes: a size such as `300MB`, `1.5GiB`, or a share of the streamable weights such as `40%`.

    Raises:
        BudgetError: it is neither, or not above zero.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip()):
        nbytes = int(float(match[1]) / 100 * streamable_nbytes)
        if nbytes < 1:
            raise BudgetError(f"a budget must be at least one byte, not {text!r}")
        return nbytes
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise BudgetError(f"{error}; a budget is a size or a share of the weights such as 40%") from None
