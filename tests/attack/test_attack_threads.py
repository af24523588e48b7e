"""Sessions under threads, forks and carelessness: right results or named errors, and nothing is left."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from cage import Cases, caged
from engine_runs import PROMPT, WEIGHTS, flip, opened, place_in, smallest_for
from packed_model import threads_and_descriptors
from refinfer.arrays import Float32Array
from refinfer.errors import RefinferError, SessionInUseError
from refinfer.generate import Session

pytestmark = pytest.mark.attack

KINDS: Final = ("row-major", "in memory", "mapped", "streamed")
TOKENS: Final = 6
SLOW_S: Final = 20


def session_of(kind: str, folder: Path, cache: Path, rng: random.Random) -> Session:
    options: dict[str, Any] = {}
    if kind == "streamed":
        options = {"plan": "none", "prefetch_threads": rng.choice([0, 1, 2, 4])}
        options["budget"] = smallest_for(folder, cache, **options) + rng.choice([0, 40_000])
    return opened(folder, {"row-major": "off", "in memory": ":memory"}.get(kind, cache), **options)


def blas_threads() -> list[int]:
    return [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]


@dataclass
class Expected:
    """What a session answers if nobody disturbs it."""

    tokens: tuple[int, ...]
    logits: Float32Array

    @classmethod
    def of(cls, session: Session) -> Expected:
        return cls(told(session), session.logits(PROMPT))


def told(session: Session) -> tuple[int, ...]:
    """Return the tokens of a generation; the ids of another thread's generation if that ended between."""
    for _ in session.generate(token_ids=PROMPT, max_tokens=TOKENS):
        pass
    assert session.stats is not None
    return session.stats.token_ids


@dataclass
class User:
    """A thread that asks a session for this and that, and whatever went wrong in it."""

    session: Session
    expected: Expected
    rng: random.Random
    between: threading.Lock = field(default_factory=threading.Lock)
    answers: int = 0
    wrong: list[BaseException] = field(default_factory=list)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._ask, daemon=True)
        thread.start()
        return thread

    def _ask(self) -> None:
        try:
            for _ in range(self.rng.randrange(5, 25)):
                try:
                    with self.between:
                        self.rng.choice([self._logits, self._tokens, self._a_piece])()
                        self.answers += 1
                except RefinferError:
                    time.sleep(self.rng.random() / 1000)  # somebody else computes, or has ended this generation
        except BaseException as error:
            self.wrong.append(error)

    def _logits(self) -> None:
        np.testing.assert_array_equal(self.session.logits(PROMPT), self.expected.logits, strict=True)

    def _tokens(self) -> None:
        assert told(self.session) == self.expected.tokens

    def _a_piece(self) -> None:
        next(self.session.generate(token_ids=PROMPT, max_tokens=TOKENS))


def require(work: Callable[[], None], folder: Path) -> None:
    """Do something in a cage, and require that it ends well and in time."""

    def run() -> int:
        warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads forks
        work()
        return 0

    ran = caged(folder, run, memory=None, seconds=60)
    assert ran.status == 0, f"it ended with {ran.status}: {ran.err[-3000:]}"
    assert "Exception ignored" not in ran.err, ran.err[-3000:]


def folder_of(tmp_path: Path, cases: Cases) -> Path:
    folder = tmp_path / str(cases.n)
    folder.mkdir()
    return folder


def test_threads_on_one_session_get_right_answers_or_named_errors_and_leave_nothing(
    tiny_folder: Path, tmp_path: Path, cases: Cases
) -> None:
    """Some cases damage the cache meanwhile, or close the session under its users."""
    for rng in cases:
        kind, spoils = rng.choice(KINDS), rng.choice(["nothing", "damage", "close"])
        folder = folder_of(tmp_path, cases)
        cache = folder / "kept" / "cache"

        def attack(rng: random.Random = rng, kind: str = kind, spoils: str = spoils, cache: Path = cache) -> None:
            sys.setswitchinterval(rng.choice([1e-6, 1e-4, 5e-3]))
            session_of(kind, tiny_folder, cache, rng).close()
            gc.collect()
            before, blas = threads_and_descriptors(), blas_threads()
            with session_of(kind, tiny_folder, cache, rng) as session:
                expected = Expected.of(session)
                users = [User(session, expected, random.Random(rng.random())) for _ in range(rng.choice([2, 2, 3, 8]))]
                threads = [user.start() for user in users]
                time.sleep(rng.random() / 20)
                if spoils == "damage" and cache.exists():
                    flip(cache, place_in(cache, rng.choice(WEIGHTS)))
                if spoils == "close":
                    session.close()
                for thread in threads:
                    thread.join(SLOW_S)
                    assert not thread.is_alive(), "it hangs"
                for user in users:
                    if user.wrong:
                        raise user.wrong[0]
                if spoils == "nothing":
                    assert sum(user.answers for user in users) > 0
                    assert told(session) == expected.tokens
            del users, session
            gc.collect()
            assert blas_threads() == blas
            assert not threads_and_descriptors() - before

        require(attack, folder)


def test_children_that_are_forked_while_a_session_computes_go_on_or_are_refused_and_disturb_nothing(
    tiny_folder: Path, tmp_path: Path, cases: Cases
) -> None:
    for rng in cases:
        kind = rng.choice(KINDS)
        folder = folder_of(tmp_path, cases)

        def attack(rng: random.Random = rng, kind: str = kind, cache: Path = folder / "kept" / "cache") -> None:
            with session_of(kind, tiny_folder, cache, rng) as session:
                expected, blas = Expected.of(session), blas_threads()
                user = User(session, expected, random.Random(rng.random()))
                thread = user.start()
                while thread.is_alive():
                    time.sleep(rng.random() / 200)
                    # BLAS has locks of its own, which a child that is forked within a product may never get.
                    with nullcontext() if kind == "streamed" else user.between:
                        pid = os.fork()
                    if pid == 0:
                        in_the_child(session, kind, expected, blas)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    assert status == 0, f"a child ended with {status}"
                if user.wrong:
                    raise user.wrong[0]
                assert user.answers > 0
                assert told(session) == expected.tokens

        require(attack, folder)


def in_the_child(session: Session, kind: str, expected: Expected, blas: list[int]) -> None:
    status = 1
    try:
        signal.alarm(SLOW_S)
        assert blas_threads() == blas
        if kind == "streamed":
            for refused in (lambda: told(session), lambda: session.logits([1])):
                with pytest.raises(SessionInUseError):
                    refused()
        else:
            assert told(session) == expected.tokens
            np.testing.assert_array_equal(session.logits(PROMPT), expected.logits, strict=True)
        session.close()
        assert blas_threads() == blas
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def test_sessions_that_are_dropped_in_every_way_leave_nothing(tiny_folder: Path, tmp_path: Path, cases: Cases) -> None:
    for rng in cases:
        folder = folder_of(tmp_path, cases)

        def attack(rng: random.Random = rng, cache: Path = folder / "kept" / "cache") -> None:
            session_of("streamed", tiny_folder, cache, rng).close()
            gc.collect()
            before = threads_and_descriptors()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                n = rng.randrange(1, 8)
                for _ in range(n):
                    threads = [threading.Thread(target=drop, args=(tiny_folder, cache, rng.random()))]
                    threads += [threading.Thread(target=gc.collect) for _ in range(rng.randrange(3))]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join(SLOW_S)
                        assert not thread.is_alive(), "it hangs"
                gc.collect()
            assert len([each for each in caught if each.category is ResourceWarning]) == n
            assert not threads_and_descriptors() - before

        require(attack, folder)


def drop(folder: Path, cache: Path, seed: float) -> None:
    rng = random.Random(seed)
    session = session_of(rng.choice(KINDS), folder, cache, rng)
    how = rng.choice(["unused", "used", "in the middle", "in a cycle", "damaged"])
    if how == "damaged" and cache.exists():
        flip(cache, place_in(cache, rng.choice(WEIGHTS)))
    if how not in ("unused", "in the middle"):
        told(session)
    if how == "in the middle":
        next(session.generate(token_ids=PROMPT))
    if how == "in a cycle":
        vars(session)["itself"] = session
