"""Ctrl-C at each moment at which CPython can act on it, one after another.

CPython handles a signal when a function begins, and when one written in C has returned. A profiler is called at these
two events, and can raise KeyboardInterrupt there. CPython also handles one when a loop goes back, which adds nothing
new here, and while C code waits for a lock, which `World.interrupt` tries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

MOST_MOMENTS: Final = 2_000


def interrupted(action: Callable[[], object], moment: int, sees: Callable[[str, object], None] | None = None) -> bool:
    """Interrupt an action at a moment, counted from 0; return False if it ends before that.

    `sees` is told of every event, with the function that it is about if that is written in C.
    """
    left = moment

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if sees is not None:
            sees(event, argument)
        left -= event in ("call", "c_return")
        if left < 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return left < 0  # also if a callback of the garbage collector took the interrupt, which Python drops


def every_moment(begin: Callable[[], Callable[[], object]]) -> Iterator[int]:
    """Interrupt what `begin` returns at each of its moments; yield after each interrupt."""
    for moment in range(MOST_MOMENTS):
        if not interrupted(begin(), moment):
            assert moment > 1, "it was never interrupted"
            return
        yield moment
    raise AssertionError("it does not end")
