"""The memory budget: a count of bytes that refuses to exceed its limit.

Counts the bytes that are in use and the most that were in use at once, and reads a budget as people write it. Leaves to
others: what the bytes are for.
Read more: tutorial 09; clauses BUDGET-1 to BUDGET-4.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Final

from refinfer.errors import BudgetError
from refinfer.process import available_bytes
from refinfer.units import format_nbytes, parse_nbytes, shown

__all__ = ["Budget", "parse_budget"]

_AUTO_SHARE: Final = 0.9
_MOST_BYTES: Final = 2.0**63


class Budget:
    """Bytes in use against a limit; any thread may acquire and release.

    Law: `in_use` never exceeds `limit`, and `peak` is the most it has been.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_use = self._peak = 0
        self._lock = threading.Lock()

    # --8<-- [start:acquire]
    def acquire(self, nbytes: int, what: str) -> None:
        """Count `nbytes` as in use.

        Raises:
            BudgetError: that would exceed the limit; nothing is counted.
        """
        self.acquire_all({what: nbytes})

    def acquire_all(self, parts: Mapping[str, int]) -> None:
        """Count the named parts as in use: all of them or, if they do not fit together, none.

        Raises:
            BudgetError: they would exceed the limit; the message names the first that does not fit.
        """
        with self._lock:
            in_use = self._in_use
            for what, nbytes in parts.items():
                if in_use + nbytes > self.limit:
                    raise BudgetError(
                        f"{what} needs {format_nbytes(nbytes)}, but of the budget of {format_nbytes(self.limit)} "
                        f"only {format_nbytes(self.limit - in_use)} are left"
                    )
                in_use += nbytes
            self._in_use = in_use
            self._peak = max(self._peak, in_use)

    # --8<-- [end:acquire]

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


def parse_budget(budget: float | str, streamable_nbytes: int) -> int:
    """Return a budget in bytes.

    `budget` is a number of bytes, a size such as `300MB` or `1.5GiB`, a share of `streamable_nbytes` (all matrices)
    such as `40%`, or `auto`, which is nine tenths of the memory that is available both in the system and in the control
    group, the set of processes (such as a container) whose memory Linux limits together.

    Raises:
        BudgetError: `budget` is not one of these, it is not above zero, or the system does not report its memory.
    """
    text = str(budget).strip()
    if text == "auto":
        available = available_bytes()
        if available is None:
            raise BudgetError("this system does not report how much memory is left; give the budget as a size")
        return int(available * _AUTO_SHARE)
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text):
        share = float(match[1]) / 100
        if not 1 <= share * streamable_nbytes < _MOST_BYTES:
            raise BudgetError(f"a budget must be at least one byte and less than 2^63, not {shown(budget)}")
        return int(share * streamable_nbytes)
    try:
        return parse_nbytes(str(budget))
    except ValueError as error:
        if re.fullmatch(r"0\.[0-9]*[1-9][0-9]*", text):  # nobody means less than a byte
            meant = f"for a share of the weights write {100 * float(text):g}%"
        else:
            meant = "a budget is a size, a share of the weights such as 40%, or auto"
        raise BudgetError(f"budget {error}; {meant}") from None
