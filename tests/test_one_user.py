"""One user at a time, items computed in turn, and a thing that is closed however its owner ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from engine_runs import in_a_child, needs_fork
from interrupts import every_moment
from packed_model import within
from refinfer.errors import RequestError, SessionInUseError
from refinfer.one_user import InTurn, Kept, OneUser


def enter(user: OneUser) -> str:
    with user.enter():
        return "inside"


@contextmanager
def elsewhere(user: OneUser) -> Iterator[None]:
    """Another thread is inside for the time of the block."""
    inside, go = threading.Event(), threading.Event()

    def stay() -> None:
        with user.enter():
            inside.set()
            assert go.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    try:
        assert inside.wait(30)
        yield
    finally:
        go.set()
        thread.join()


@pytest.mark.spec("GEN-19")
def test_a_second_thread_is_refused_until_the_first_has_left() -> None:
    user = OneUser()
    with elsewhere(user):
        for _ in range(2):
            with pytest.raises(SessionInUseError, match="computing already; use it from one thread at a time"):
                enter(user)
    assert enter(user) == within(lambda: enter(user)) == "inside"


@pytest.mark.spec("GEN-19")
def test_whoever_is_inside_cannot_enter_again_but_stays_inside() -> None:
    user = OneUser()
    with user.enter():
        for _ in range(2):
            with pytest.raises(SessionInUseError):
                enter(user)
            with pytest.raises(SessionInUseError):
                within(lambda: enter(user))
    assert enter(user) == "inside"


@pytest.mark.spec("GEN-19")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_whoever_leaves_by_an_error_makes_room(error: type[BaseException]) -> None:
    user = OneUser()
    with pytest.raises(error), user.enter():
        raise error
    assert enter(user) == "inside"


@pytest.mark.spec("GEN-19")
def test_whoever_is_interrupted_at_any_moment_makes_room() -> None:
    user = OneUser()
    for moment in every_moment(lambda: lambda: enter(user)):
        assert enter(user) == "inside", f"interrupted at moment {moment}"


@needs_fork
@pytest.mark.spec("GEN-20")
def test_a_forked_child_finds_nobody_inside() -> None:
    user = OneUser()

    def child() -> list[str]:
        said = [enter(user)]
        with elsewhere(user), pytest.raises(SessionInUseError):
            enter(user)
        return [*said, enter(user)]

    with elsewhere(user):
        assert in_a_child(child) == ["inside", "inside"]


def counted(ends: list[str]) -> Generator[int, None, None]:
    try:
        yield from range(3)
    finally:
        ends.append("ended")


@pytest.mark.spec("GEN-19")
def test_items_are_computed_in_turn_and_whoever_holds_one_is_outside() -> None:
    user, ends = OneUser(), list[str]()
    items = InTurn(counted(ends), user.enter)
    for expected, item in enumerate(items):
        assert item == expected
        assert within(lambda: enter(user)) == "inside"
    assert list(items) == []
    assert ends == ["ended"]


@pytest.mark.spec("GEN-19")
def test_no_item_is_computed_or_lost_while_another_thread_is_inside() -> None:
    user, ends = OneUser(), list[str]()
    items = InTurn(counted(ends), user.enter)
    with elsewhere(user):
        for refused in (lambda: next(items), items.close):
            with pytest.raises(SessionInUseError):
                refused()
    assert next(items) == 0
    assert not ends
    items.close()
    assert ends == ["ended"]
    assert list(items) == []


@needs_fork
@pytest.mark.spec("GEN-20")
def test_an_item_that_another_thread_was_computing_when_a_child_was_forked_is_refused_there() -> None:
    begun, go = threading.Event(), threading.Event()

    def slowly() -> Generator[int, None, None]:
        begun.set()
        assert go.wait(30)
        yield 1

    def child() -> str:
        with pytest.raises(SessionInUseError) as refused:
            next(items)
        return str(refused.value)

    items, got = InTurn(slowly(), OneUser().enter), list[int]()
    thread = threading.Thread(target=lambda: got.extend(items))
    thread.start()
    assert begun.wait(30)
    assert "forked" in in_a_child(child)
    go.set()
    thread.join()
    assert got == [1]


class Thing:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Owner:
    def __init__(self, thing: Thing) -> None:
        self.kept = Kept(self, thing, "the thing")


def dropped(owners: list[Owner]) -> list[str]:
    """Drop the only reference to an owner; return the warnings that its end gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        owners.clear()
    assert all(warning.category is ResourceWarning for warning in caught)
    return [str(warning.message) for warning in caught]


DROPPED = "the thing was dropped without close(); close it, or load it in a `with` statement"


@pytest.mark.spec("GEN-21")
def test_what_a_dropped_owner_kept_is_closed_at_once_and_a_warning_says_what_to_do() -> None:
    thing = Thing()
    assert dropped([Owner(thing)]) == [DROPPED]
    assert thing.closed == 1


@pytest.mark.spec("GEN-21")
def test_the_warning_names_the_line_that_dropped_the_owner() -> None:
    owners = [Owner(Thing())]
    with pytest.warns(ResourceWarning) as caught:
        owners.clear()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.spec("GEN-21")
def test_the_warning_as_an_error_does_not_prevent_closing() -> None:
    thing, owners = Thing(), [Owner(Thing())]
    owners[0].kept.renew(lambda: thing)
    seen: list[Any] = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", seen.append)
        patch.setattr(sys, "excepthook", lambda *error: seen.append(error))
        warnings.simplefilter("error")
        owners.clear()
    assert len(seen) == 1
    assert thing.closed == 1


@pytest.mark.spec("GEN-21", "GEN-8")
def test_what_was_closed_is_closed_once_and_its_owner_goes_without_a_warning() -> None:
    thing = Thing()
    owners = [Owner(thing)]
    owners[0].kept.close()
    owners[0].kept.close()
    assert thing.closed == 1
    with pytest.raises(RequestError, match="closed; load the model again"):
        owners[0].kept.now()
    assert dropped(owners) == []
    assert thing.closed == 1


@pytest.mark.spec("GEN-21")
def test_what_was_renewed_is_closed_when_it_is_and_the_new_one_with_its_owner() -> None:
    old, new = Thing(), Thing()
    owners = [Owner(old)]
    owners[0].kept.renew(lambda: new)
    assert owners[0].kept.now() is new
    assert (old.closed, new.closed) == (1, 0)
    assert dropped(owners) == [DROPPED]
    assert (old.closed, new.closed) == (1, 1)


def fails() -> Thing:
    raise ZeroDivisionError


@pytest.mark.spec("GEN-8", "GEN-21")
def test_after_a_renewal_that_fails_nothing_is_kept() -> None:
    owners = [Owner(Thing())]
    with pytest.raises(ZeroDivisionError):
        owners[0].kept.renew(fails)
    with pytest.raises(RequestError, match="closed"):
        owners[0].kept.now()
    assert dropped(owners) == []


@pytest.mark.spec("GEN-8")
def test_closing_during_a_renewal_is_final() -> None:
    old, new = Thing(), Thing()
    owner = Owner(old)

    def make() -> Thing:
        owner.kept.close()
        return new

    owner.kept.renew(make)
    assert (old.closed, new.closed) == (1, 1)
    with pytest.raises(RequestError, match="closed"):
        owner.kept.now()


@pytest.mark.spec("GEN-19")
def test_during_a_renewal_there_is_nothing_to_use_but_nothing_is_called_closed() -> None:
    owner = Owner(Thing())

    def make() -> Thing:
        with pytest.raises(SessionInUseError, match="computing already"):
            owner.kept.now()
        return Thing()

    owner.kept.renew(make)
    assert owner.kept.now().closed == 0
    owner.kept.close()


@needs_fork
@pytest.mark.spec("GEN-21")
def test_a_child_that_drops_its_parents_owner_closes_nothing_and_warns_of_nothing() -> None:
    thing = Thing()
    owners = [Owner(thing)]

    def child() -> list[object]:
        return [dropped(owners), thing.closed]

    assert in_a_child(child) == [[], 0]
    owners[0].kept.close()


@pytest.mark.spec("GEN-21")
@pytest.mark.parametrize("forked", [False, pytest.param(True, marks=needs_fork)], ids=["itself", "a child"])
def test_what_is_open_when_the_program_ends_is_closed_with_a_warning_but_not_in_a_child(forked: bool) -> None:
    program = f"""
import os, sys
from refinfer.one_user import Kept
class Thing:
    def close(self): print("closed", flush=True)
class Owner: pass
owner = Owner()
owner.kept = Kept(owner, Thing(), "the thing")
if {forked}:
    if os.fork():
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == ("" if forked else "closed\n")
    assert (DROPPED in done.stderr) is not forked


@pytest.mark.spec("GEN-21")
def test_keeping_a_thing_does_not_keep_its_owner() -> None:
    owners = [Owner(Thing())]
    alive = weakref.ref(owners[0])
    assert len(dropped(owners)) == 1
    assert alive() is None


@pytest.mark.spec("GEN-19")
def test_a_context_that_refuses_leaves_the_items_as_they_were() -> None:
    contexts: list[Callable[[], Any]] = [nullcontext, fails, nullcontext]

    def context() -> Any:
        return contexts.pop(0)()

    items = InTurn(counted([]), context)
    assert next(items) == 0
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert next(items) == 1
