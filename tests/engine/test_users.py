"""Sessions and their users: two threads, forked children, and whoever drops a session without closing it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import engine_runs
from engine_runs import PROMPT, flip, in_a_child, needs_fork, opened, place_in, smallest_for, tokens_of
from packed_model import WATCHDOG_S, threads_and_descriptors, within
from refinfer.engine import Engine, EngineRequest, open_engine
from refinfer.errors import RefinferError, RequestError, SessionInUseError
from refinfer.generate import Session
from refinfer.model.transformer import Transformer
from refinfer.offload.store import FileStore

folder = engine_runs.folder

KINDS = ["row-major", "in memory", "mapped", "streamed", "streamed on demand"]
every_kind = pytest.mark.parametrize("kind", KINDS)
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")


def session_of(kind: str, folder: Path, cache: Path) -> Session:
    place: dict[str, Path | str] = {"row-major": "off", "in memory": ":memory"}
    options: dict[str, Any] = {}
    if kind.startswith("streamed"):
        threads = 2 if kind == "streamed" else 0
        options = {"plan": "none", "prefetch_threads": threads}
        options["budget"] = smallest_for(folder, cache, **options)
    return opened(folder, place.get(kind, cache), **options)


class Computing:
    """A thread that does `work`, and rests within a pass until it is told to go on."""

    def __init__(self, work: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
        self.result: Any = None
        self._reached, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        real = Transformer._logits

        def rests(*arguments: Any) -> Any:
            if threading.current_thread() is self._thread:
                self._reached.set()
                assert self._go.wait(WATCHDOG_S)
            return real(*arguments)

        patch.setattr(Transformer, "_logits", rests)
        self._thread.start()
        assert self._reached.wait(WATCHDOG_S)

    def _do(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except BaseException as error:
            self.result = error

    def end(self) -> Any:
        self._go.set()
        self._thread.join(WATCHDOG_S)
        assert not self._thread.is_alive()
        return self.result


# Two threads.


@every_kind
@pytest.mark.spec("GEN-19")
def test_while_one_thread_computes_any_other_is_refused_and_disturbs_nothing(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_of(kind, folder, tmp_path / "cache") as session:
        expected, logits = tokens_of(session), session.logits(PROMPT)
        earlier = session.generate(token_ids=PROMPT)
        attempts: list[Callable[[], Any]] = [
            lambda: next(earlier),
            lambda: tokens_of(session),
            lambda: session.logits([1]),
        ]

        def refused_while(work: Callable[[], Any]) -> Any:
            with monkeypatch.context() as patch:
                computing = Computing(work, patch)
                for attempt in attempts:
                    with pytest.raises(SessionInUseError, match="one thread at a time"):
                        attempt()
                return computing.end()

        assert refused_while(lambda: tokens_of(session)) == expected
        np.testing.assert_array_equal(refused_while(lambda: session.logits(PROMPT)), logits)
        assert tokens_of(session) == expected


@every_kind
@pytest.mark.spec("GEN-19", "GEN-9")
def test_threads_may_take_turns_between_the_pieces_of_a_text(kind: str, folder: Path, tmp_path: Path) -> None:
    with session_of(kind, folder, tmp_path / "cache") as session:
        whole = "".join(session.generate(token_ids=PROMPT, max_tokens=8))
        logits = session.logits(PROMPT)
        pieces, got = session.generate(token_ids=PROMPT, max_tokens=8), []
        for turn in range(8):
            got.append(next(pieces) if turn % 2 else within(lambda: next(pieces)))
            np.testing.assert_array_equal(within(lambda: session.logits(PROMPT)), logits)
        assert "".join(got) + "".join(pieces) == whole
        first, second = (session.generate(token_ids=PROMPT) for _ in range(2))
        next(first)
        within(lambda: next(second))
        with pytest.raises(RequestError, match="ended by a later one"):
            next(first)


@every_kind
@pytest.mark.spec("GEN-19", "GEN-8")
def test_another_thread_may_close_while_one_computes(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(kind, folder, tmp_path / "cache")
    computing = Computing(lambda: [tokens_of(session) for _ in range(9)], monkeypatch)
    session.close()
    assert isinstance(error := computing.end(), RefinferError)
    assert "closed" in str(error)
    with pytest.raises(RequestError, match="this session is closed"):
        session.logits([1])


@every_kind
@pytest.mark.parametrize("begun", [False, True], ids=["in its prompt", "later"])
@pytest.mark.spec("GEN-19", "KV-3", "GEN-22")
def test_a_generation_that_ctrl_c_breaks_off_leaves_a_session_for_everyone(
    kind: str, begun: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The position that the pass has added is gone, nobody is inside, and BLAS has its number again."""

    def interrupted(*_: Any) -> None:
        assert transformer.kv_cache.length == len(PROMPT) + begun
        raise KeyboardInterrupt

    with session_of(kind, folder, tmp_path / "cache") as session, threadpool_limits(3, "blas"):
        expected, transformer = tokens_of(session), session._transformer
        transformer.kv_cache.rewind(0)
        pieces = session.generate(token_ids=PROMPT, max_tokens=8)
        if begun:
            next(pieces)
        with monkeypatch.context() as patch:
            patch.setattr(Transformer, "_logits", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(pieces)
        assert transformer.kv_cache.length == len(PROMPT) * begun
        assert {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"} == {3}
        assert within(lambda: tokens_of(session)) == tokens_of(session) == expected


@contextmanager
def during_the_rebuild(patch: pytest.MonkeyPatch, do: Callable[[], Any]) -> Iterator[list[str]]:
    """Do something else just before a damaged cache is opened again; give the reasons of all openings."""
    reasons: list[str] = []

    def opening(request: EngineRequest, reason: str | None = None) -> Engine:
        if reason is not None:
            reasons.append(reason)
            do()
        return open_engine(request, reason)

    patch.setattr("refinfer.generate.open_engine", opening)
    yield reasons


@pytest.mark.parametrize("kind", ["mapped", "streamed"])
@pytest.mark.spec("GEN-19", "GEN-16")
def test_during_a_rebuild_any_other_thread_is_refused(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with session_of(kind, folder, cache) as session:
        expected, earlier = tokens_of(session), session.generate(token_ids=PROMPT)
        flip(cache, place_in(cache, "last layer"))

        def others() -> None:
            for refused in (
                lambda: next(earlier),
                lambda: session.generate(token_ids=PROMPT),
                lambda: session.logits([1]),
                lambda: session.source,
            ):
                with pytest.raises(SessionInUseError):
                    within(refused)

        with during_the_rebuild(monkeypatch, others) as reasons:
            assert tokens_of(session) == expected
        assert len(reasons) == 1


@needs_proc
@pytest.mark.parametrize("kind", ["mapped", "streamed"])
@pytest.mark.spec("GEN-8", "GEN-16", "FETCH-8")
def test_a_session_that_is_closed_during_a_rebuild_stays_closed_and_leaves_nothing(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    session_of(kind, folder, cache).close()
    before = threads_and_descriptors()
    session = session_of(kind, folder, cache)
    flip(cache, place_in(cache, "last layer"))
    with (
        during_the_rebuild(monkeypatch, lambda: within(session.close)) as reasons,
        pytest.raises(RequestError, match="this session is closed"),
    ):
        tokens_of(session)
    assert len(reasons) == 1
    with pytest.raises(RequestError, match="this session is closed"):
        session.logits([1])
    gc.collect()
    assert not threads_and_descriptors() - before


# Forked children.


@needs_fork
@pytest.mark.parametrize("kind", ["row-major", "in memory", "mapped"])
@pytest.mark.spec("GEN-20")
def test_a_child_goes_on_with_weights_in_memory_or_mapped_even_if_it_was_forked_within_a_pass(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_of(kind, folder, tmp_path / "cache") as session:
        expected = tokens_of(session)
        text = "".join(session.generate(token_ids=PROMPT, max_tokens=8))
        under_way = session.generate(token_ids=PROMPT, max_tokens=8)
        start = next(under_way)

        def child() -> list[Any]:
            told = [start + "".join(under_way), list(tokens_of(session))]
            session.close()
            return told

        assert in_a_child(child) == [text, list(expected)]
        computing = Computing(lambda: tokens_of(session), monkeypatch)
        assert in_a_child(lambda: tokens_of(session)) == list(expected)
        assert computing.end() == expected


@needs_fork
@pytest.mark.parametrize("kind", ["streamed", "streamed on demand"])
@pytest.mark.spec("GEN-20")
def test_a_child_is_refused_streamed_weights_but_may_close_them_and_load_its_own(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_of(kind, folder, tmp_path / "cache") as session:
        expected = tokens_of(session)

        def child() -> list[int]:
            for refused in (lambda: tokens_of(session), lambda: session.logits([1])):
                with pytest.raises(SessionInUseError, match="load the model in the child"):
                    refused()
            session.close()
            session.close()
            with pytest.raises(RequestError, match="this session is closed"):
                session.logits([1])
            with session_of(kind, folder, tmp_path / "cache") as own:
                return list(tokens_of(own))

        assert in_a_child(child) == list(expected)
        computing = Computing(lambda: tokens_of(session), monkeypatch)
        assert in_a_child(child) == list(expected)
        assert computing.end() == expected


@needs_fork
@pytest.mark.spec("GEN-20")
def test_a_child_waits_for_no_lock_that_its_parent_had_when_it_was_forked(folder: Path, tmp_path: Path) -> None:
    """Neither for that of the ring nor for that of the file, whoever had them."""
    with session_of("streamed", folder, tmp_path / "cache") as session:
        source: Any = session.source

        def child() -> bool:
            with pytest.raises(SessionInUseError):
                session.logits([1])
            session.close()
            return True

        held, go = threading.Event(), threading.Event()

        def hold() -> None:
            with source._reader._changed, source._file._store._lock:
                held.set()
                assert go.wait(WATCHDOG_S)

        holding = threading.Thread(target=hold)
        holding.start()
        assert held.wait(WATCHDOG_S)
        try:
            assert in_a_child(child) is True
        finally:
            go.set()
            holding.join()
        assert session.logits([1]).shape == (1, 65)


# Sessions that are dropped.


def warnings_of(work: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    assert all(warning.category is ResourceWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@needs_proc
@every_kind
@pytest.mark.parametrize("begun", ["not used", "used", "left in the middle", "in a cycle", "rebuilt"])
@pytest.mark.spec("GEN-21", "FETCH-8")
def test_a_session_that_is_dropped_leaves_no_weights_no_thread_and_no_descriptor(
    kind: str, begun: str, folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    session_of(kind, folder, cache).close()
    before = threads_and_descriptors()
    sessions = [session_of(kind, folder, cache)]
    gc.collect()  # what looking for a budget has left
    if begun == "rebuilt" and cache.exists():
        flip(cache, place_in(cache, "last layer"))
    if begun not in ("not used", "left in the middle"):
        tokens_of(sessions[0])
    if begun == "left in the middle":
        next(sessions[0].generate(token_ids=PROMPT))
    if begun == "in a cycle":
        vars(sessions[0])["itself"] = sessions[0]
    weights = weakref.ref(sessions[0].source)

    def drop() -> None:
        sessions.clear()
        if begun in ("in a cycle", "rebuilt"):  # building leaves garbage that holds whoever called for it
            gc.collect()

    (said,) = warnings_of(drop)
    assert said == f"the session of {folder} was dropped without close(); close it, or load it in a `with` statement"
    assert weights() is None
    assert not threads_and_descriptors() - before


@every_kind
@pytest.mark.spec("GEN-21")
def test_a_generation_that_may_go_on_keeps_its_session(kind: str, folder: Path, tmp_path: Path) -> None:
    sessions = [session_of(kind, folder, tmp_path / "cache")]
    expected = "".join(sessions[0].generate(token_ids=PROMPT, max_tokens=8))
    pieces = [sessions[0].generate(token_ids=PROMPT, max_tokens=8)]

    assert warnings_of(sessions.clear) == []
    assert "".join(pieces[0]) == expected
    assert len(warnings_of(pieces.clear)) == 1


@pytest.mark.spec("GEN-21")
def test_a_closed_session_is_dropped_without_a_warning(folder: Path) -> None:
    sessions = [opened(folder, ":memory")]
    sessions[0].close()
    assert warnings_of(sessions.clear) == []


@needs_proc
@pytest.mark.parametrize("where", ["while it reads", "while it has the lock of the file"])
@pytest.mark.spec("GEN-21", "FETCH-7")
def test_a_dropped_session_may_be_collected_by_one_of_its_own_prefetch_threads(
    where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That thread can neither wait for itself nor for a lock that it has."""
    cache = tmp_path / "cache"
    session_of("streamed", folder, cache).close()
    before = threads_and_descriptors()
    collect, collected = threading.Event(), threading.Event()
    name = "_read" if where == "while it reads" else "_close_if_unused"
    real = getattr(FileStore, name)

    def collecting(*arguments: Any) -> Any:
        if threading.current_thread().name.startswith("prefetch-") and collect.is_set() and not collected.is_set():
            collected.set()
            gc.collect()
        return real(*arguments)

    monkeypatch.setattr(FileStore, name, collecting)
    gc.collect()
    gc.disable()
    try:
        sessions = [session_of("streamed", folder, cache)]
        reader: Any = sessions[0].source._reader  # type: ignore[attr-defined]
        threads = list(reader._threads)
        vars(sessions[0])["itself"] = sessions[0]

        def drop() -> None:
            loan = reader.take(0)
            sessions.clear()
            collect.set()
            reader.release(loan)  # so that a thread reads on
            assert collected.wait(WATCHDOG_S)
            for thread in threads:
                thread.join(WATCHDOG_S)

        said = warnings_of(drop)
    finally:
        gc.enable()
    assert len(said) == 1
    assert not any(thread.is_alive() for thread in threads)
    assert not threads_and_descriptors() - before


@pytest.mark.parametrize("kind", ["in memory", "mapped", "streamed"])
@pytest.mark.spec("GEN-21")
def test_a_program_that_ends_with_an_open_session_ends_at_once_with_a_warning(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    session_of(kind, folder, tmp_path / "cache").close()
    program = f"""
import refinfer, threading
place = {":memory" if kind == "in memory" else str(tmp_path / "cache")!r}
budget = {smallest_for(folder, tmp_path / "cache") + 50_000 if kind == "streamed" else None}
session = refinfer.load({str(folder)!r}, weight_cache=place, budget=budget, max_positions=24)
next(session.generate(token_ids=[1, 2], max_tokens=4))
print(threading.active_count())
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ("3\n" if kind == "streamed" else "1\n")
    assert done.stderr.count("was dropped without close()") == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@needs_fork
@needs_proc
@pytest.mark.parametrize("kind", ["mapped", "streamed"])
@pytest.mark.spec("GEN-21", "GEN-20")
def test_a_child_that_drops_the_session_of_its_parent_neither_waits_nor_warns(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    sessions = [session_of(kind, folder, tmp_path / "cache")]
    expected = tokens_of(sessions[0])

    def child() -> list[str]:
        def drop() -> None:
            sessions.clear()
            gc.collect()

        return warnings_of(drop)

    assert in_a_child(child) == []
    assert tokens_of(sessions[0]) == expected
    sessions[0].close()
