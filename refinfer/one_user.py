"""One user at a time: a second one is refused, and what was dropped without `close` is closed all the same.

Knows neither models nor weights. Leaves to others: what is computed and closed (`generate`), whose threads read weights
(`offload.streamed`).
Read more: tutorial 00; clauses GEN-8, GEN-19, GEN-21.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Generic, Protocol, TypeVar

from refinfer.errors import RequestError, SessionInUseError

__all__ = ["InTurn", "Kept", "OneUser"]

_IN_USE = "this session is computing already; use it from one thread at a time, or load the model once more"


class OneUser:
    """Lets one user in at a time; refuses any other at once.

    Nobody waits for a lock. Who is inside is kept for each process, so that a forked child finds nobody there.
    """

    def __init__(self) -> None:
        self._inside: dict[int, object] = {}

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be the one user for the time of a block.

        Raises:
            SessionInUseError: another thread is inside, or this one is already.
        """
        process, me = os.getpid(), object()
        try:
            if self._inside.setdefault(process, me) is not me:  # one step: no other thread comes in between
                raise SessionInUseError(_IN_USE)
            yield
        finally:
            if process in self._inside and self._inside[process] is me:  # no call, after which Ctrl-C could come
                del self._inside[process]


_Item = TypeVar("_Item")


class InTurn(Iterator[_Item]):
    """The items of a generator, each of which is computed within a context, such as `OneUser.enter`."""

    def __init__(
        self, items: Generator[_Item, None, None], context: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._items = items
        self._context = context

    def __next__(self) -> _Item:
        """Compute the next item.

        Raises:
            SessionInUseError: another thread is computing; in a forked child, also if one was when it was forked.
        """
        with self._context():
            if getgeneratorstate(self._items) == GEN_RUNNING:  # by a thread that a forked child does not have
                raise SessionInUseError("the process was forked while this was being computed; begin again")
            return next(self._items)

    def close(self) -> None:
        """Compute no further item."""
        with self._context():
            self._items.close()


class _Closable(Protocol):
    def close(self) -> None: ...


_Thing = TypeVar("_Thing", bound=_Closable)


class Kept(Generic[_Thing]):
    """The one thing that an owner keeps open until `close`, or until the owner is dropped; `name` is for messages.

    An owner that is dropped without `close`, or not closed when the program ends, gets a ResourceWarning. A forked
    child is not warned and closes nothing of its parent's. Any thread may close, even while another renews.
    """

    def __init__(self, owner: object, thing: _Thing, name: str) -> None:
        self._thing: _Thing | None = thing
        self._closed = False
        self._name = name
        self._process = os.getpid()
        self._finalizer = weakref.finalize(owner, self._drop)

    def now(self) -> _Thing:
        """Return what is kept.

        Raises:
            RequestError: it is closed.
            SessionInUseError: another thread is renewing it.
        """
        if self._closed:
            raise RequestError("this session is closed; load the model again")
        if (thing := self._thing) is not None:
            return thing
        raise SessionInUseError(_IN_USE)

    def renew(self, make: Callable[[], _Thing]) -> None:
        """Close what is kept, and keep what `make` returns; if that fails, nothing is kept any more."""
        thing, self._thing = self.now(), None
        try:
            thing.close()
            self._thing = make()
        finally:
            if self._thing is None or self._closed:  # it failed, or another thread has closed this meanwhile
                self.close()

    def close(self) -> None:
        """Close what is kept; closing again is allowed."""
        self._closed = True
        if (thing := self._thing) is not None:
            thing.close()
            self._thing = None  # last: if Ctrl-C comes before, closing again closes it
        self._finalizer.detach()

    def _drop(self) -> None:
        if os.getpid() == self._process:
            self.close()
            why = f"{self._name} was dropped without close(); close it, or load it in a `with` statement"
            warnings.warn(why, ResourceWarning, stacklevel=3, source=self)  # 2 is the finaliser's own line
