"""How many threads BLAS uses: the best number for a model, and limits for the time of a block of code, which nest.

BLAS has one number for the whole process. If each thread restored the number that it found, the last to end could
restore the limit of another. Leaves to others: what is computed (`generate`), runs that wait for a disk (`offload`).
Read more: tutorial 00; clauses GEN-7, GEN-10, GEN-22, CAL-11.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from statistics import median
from typing import Any, Final

from threadpoolctl import LibController, ThreadpoolController, threadpool_info

from refinfer.process import usable_cores

__all__ = ["BlasThreads", "Trial", "blas_libraries", "blas_threads", "default_threads"]

_THREADS_PAY_FROM_BYTES: Final = 64 << 20
_TURNS: Final = 3
_WORTH_IT: Final = 0.95
_LIMITS: Final = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_POSITIVE: Final = re.compile("0*[1-9][0-9]{0,8}")


def default_threads(n_parameters: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return 1 for a small model, which more threads would only slow down, else the number of usable cores.

    It is never above what the environment allows: `OPENBLAS_NUM_THREADS` and `OMP_NUM_THREADS`.
    """
    if n_parameters * 4 < _THREADS_PAY_FROM_BYTES:
        return 1
    # OpenMP's variable may be a list, with a number for each level of nesting.
    allowed = [environment.get(name, "").split(",")[0].strip() for name in _LIMITS]
    return min([usable_cores(), *(int(number) for number in allowed if _POSITIVE.fullmatch(number))])


class Trial:
    """Finds out while a text is generated whether one BLAS thread or `many` compute a token faster.

    Laws: tokens take turns, `_TURNS` with each number; afterwards `threads` is the one with the shorter median, and
    stays. If `many` are not a twentieth faster it is 1, which leaves the other cores to the threads that read.
    """

    def __init__(self, many: int) -> None:
        self.threads = self._many = many
        self._seconds: dict[int, list[float]] = {1: [], many: []}

    @property
    def is_over(self) -> bool:
        """Whether the number was chosen."""
        return min(map(len, self._seconds.values())) == _TURNS

    def took(self, seconds: float) -> None:
        """Note how long a token took with `threads`, and set the number for the next one."""
        if self.is_over:
            return
        self._seconds[self.threads].append(seconds)
        self.threads = 1 if self.threads != 1 else self._many
        if self.is_over:
            one, many = (median(self._seconds[n]) for n in (1, self._many))
            self.threads = self._many if many < _WORTH_IT * one else 1


def blas_libraries() -> list[dict[str, Any]]:
    """Return what is known about each BLAS in this process; nothing if the system lists no libraries (no `/proc`)."""
    try:
        return [library for library in threadpool_info() if library["user_api"] == "blas"]
    except OSError:
        return []


class BlasThreads:
    """The limits that are in force in this process.

    Laws: while there are several, in one thread or in many, the smallest applies to all of them. When the last ends,
    BLAS has the number again that it had before the first. In a forked child no limit is in force. A BLAS built with
    OpenMP has a number for each thread instead, so there each thread has its own limits. If the system does not list
    the libraries of a process, BLAS keeps its number.
    """

    def __init__(self, find: Callable[[], ThreadpoolController] = ThreadpoolController) -> None:
        self._find = find
        self._lock = threading.RLock()
        self._asked: dict[object, int] = {}
        self._before: list[int] = []  # the number of each library before the first limit

    @contextmanager
    def limited(self, n: int) -> Iterator[None]:
        """Let BLAS use `n` threads, or fewer if another limit in force is smaller."""
        mine = object()
        if self._blas is None:
            yield
            return
        with self._of_each_thread.limit(limits=n, user_api="blas"):
            try:
                with self._lock:
                    if not self._asked:
                        self._before = [library.num_threads for library in self._shared]
                    self._asked[mine] = n
                    self._apply()
                yield
            finally:
                with self._lock:
                    if mine in self._asked:  # a forked child has forgotten it
                        del self._asked[mine]
                        try:
                            self._apply()
                        except BaseException:  # Ctrl-C: whoever comes next would take this limit for BLAS's own number
                            self._apply()
                            raise

    @cached_property
    def _blas(self) -> ThreadpoolController | None:
        try:
            found = self._find().select(user_api="blas")
        except OSError:  # there is no /proc
            return None
        if hasattr(os, "register_at_fork"):
            # No other thread has the lock while the process forks: in the child it would never be released.
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._forget
            )
        return found

    @cached_property
    def _of_each_thread(self) -> ThreadpoolController:
        assert self._blas is not None
        return self._blas.select(threading_layer="openmp")

    @cached_property
    def _shared(self) -> list[LibController]:
        assert self._blas is not None
        return [each for each in self._blas.lib_controllers if each not in self._of_each_thread.lib_controllers]

    def _apply(self) -> None:
        smallest = min(self._asked.values(), default=None)
        for library, before in zip(self._shared, self._before, strict=True):
            # From version 3.8 on, threadpoolctl lets one thread alone change the number, until it gives up control.
            give_up_control = getattr(library, "clear_controlling_thread", lambda **_: None)
            give_up_control(force=True)
            library.set_num_threads(smallest or before)
            give_up_control()

    def _forget(self) -> None:
        """Restore the number in a forked child: the threads that asked for another exist in its parent only."""
        if self._asked:
            self._asked.clear()
            self._apply()
        self._lock.release()


blas_threads = BlasThreads()
"""Of this process; there is one, as there is one BLAS."""
