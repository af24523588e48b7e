"""The number of BLAS threads: which is best, and limits that nest, in one thread and in many, and after a fork."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController, threadpool_limits

from engine_runs import in_a_child, needs_fork
from interrupts import every_moment
from packed_model import within
from refinfer import blas_threads as module
from refinfer.blas_threads import BlasThreads, Trial, blas_libraries, blas_threads, default_threads
from refinfer.model.config import SHAPES

BLAS = ThreadpoolController()
FOUND = 5
"""What BLAS is set to before any limit; no limit asks for it."""


def in_force() -> int:
    (number,) = {info["num_threads"] for info in BLAS.info() if info["user_api"] == "blas"}
    assert isinstance(number, int)
    return number


@pytest.fixture(autouse=True)
def found() -> Iterator[None]:
    with threadpool_limits(FOUND, "blas"):
        yield
        assert in_force() == FOUND


@pytest.mark.spec("GEN-10")
@pytest.mark.parametrize(("name", "small"), [("storyteller", True), ("stories15m", True), ("smollm-135m", False)])
def test_small_models_use_one_blas_thread_and_larger_ones_every_usable_core(
    name: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinfer.blas_threads.usable_cores", lambda: 7)
    assert default_threads(SHAPES[name].n_parameters, {}) == (1 if small else 7)


@pytest.mark.spec("GEN-10")
def test_a_model_is_small_below_64_mib_of_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinfer.blas_threads.usable_cores", lambda: 7)
    bound = (64 << 20) // 4
    assert (default_threads(bound - 1, {}), default_threads(bound, {})) == (1, 7)


@pytest.mark.spec("GEN-10")
@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 7),
        ({"OPENBLAS_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OPENBLAS_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": " 4,2 "}, 4),
        ({"OPENBLAS_NUM_THREADS": "64"}, 7),
        ({"OPENBLAS_NUM_THREADS": "0", "OMP_NUM_THREADS": "-1"}, 7),
        ({"OPENBLAS_NUM_THREADS": "many", "OMP_NUM_THREADS": ""}, 7),
        ({"OPENBLAS_NUM_THREADS": "9" * 5000, "OMP_NUM_THREADS": "²"}, 7),
    ],
    ids=str,
)
def test_the_environment_limits_the_default_number_of_threads(
    environment: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinfer.blas_threads.usable_cores", lambda: 7)
    assert default_threads(1 << 30, environment) == threads


@pytest.mark.spec("GEN-22")
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5))))
def test_the_smallest_limit_in_force_applies_in_whatever_order_they_end(steps: list[tuple[int, int]]) -> None:
    """Each step begins a limit, or ends one of those in force."""
    limits: list[tuple[int, AbstractContextManager[None]]] = []
    for n, ends in steps:
        if ends < len(limits):
            limits.pop(ends)[1].__exit__(None, None, None)
        else:
            limits.append((n, blas_threads.limited(n)))
            limits[-1][1].__enter__()
        assert in_force() == min((n for n, _ in limits), default=FOUND)
    for _, limit in limits:
        limit.__exit__(None, None, None)
    assert in_force() == FOUND


@pytest.mark.spec("GEN-22")
def test_a_thread_that_ends_its_limit_leaves_that_of_another_and_the_last_restores_what_the_first_found() -> None:
    mine, begun, go = blas_threads.limited(2), threading.Event(), threading.Event()
    seen: list[int] = []

    def other() -> None:
        with blas_threads.limited(1):
            begun.set()
            assert go.wait(10)
            seen.append(in_force())

    thread = threading.Thread(target=other)
    mine.__enter__()
    thread.start()
    assert begun.wait(10)
    assert in_force() == 1
    mine.__exit__(None, None, None)  # in the order in which each would restore the limit of the other
    go.set()
    thread.join()
    assert seen == [1]
    assert in_force() == FOUND


@pytest.mark.spec("GEN-22", "GEN-7")
def test_a_limit_applies_in_a_thread_other_than_the_one_that_set_the_number_before() -> None:
    def other() -> int:
        with blas_threads.limited(1):
            return in_force()

    assert within(other) == 1
    assert in_force() == FOUND


@pytest.mark.spec("GEN-22")
def test_after_a_limit_any_other_thread_may_change_the_number() -> None:
    """Also one that knows nothing of this module, while the thread that had the limit still runs."""

    def other() -> int:
        with threadpool_limits(3, "blas"):
            return in_force()

    with blas_threads.limited(1):
        pass
    assert within(other) == 3
    assert in_force() == FOUND


@pytest.mark.spec("GEN-22")
def test_a_limit_ends_with_the_block_that_fails() -> None:
    with pytest.raises(AssertionError, match="inside"), blas_threads.limited(1):
        assert in_force() != 1, "inside"
    assert in_force() == FOUND


class OpenMPLibrary:
    """A BLAS whose number of threads belongs to the thread that sets it."""

    user_api, threading_layer, filepath, prefix = "blas", "openmp", "/nowhere", "libnone"

    def __init__(self) -> None:
        self._of_this_thread = threading.local()

    @property
    def num_threads(self) -> int:
        return getattr(self._of_this_thread, "number", FOUND)

    def set_num_threads(self, n: int) -> None:
        self._of_this_thread.number = n

    def info(self, **_: object) -> dict[str, object]:
        return {"num_threads": self.num_threads, "user_api": self.user_api}


@pytest.mark.spec("GEN-22")
def test_where_each_thread_has_its_own_number_each_has_its_own_limits() -> None:
    library, begun, go = OpenMPLibrary(), threading.Event(), threading.Event()
    limits = BlasThreads(lambda: ThreadpoolController._from_controllers([library]))
    seen: list[int] = []

    def other() -> None:
        with limits.limited(1):
            begun.set()
            assert go.wait(10)
            seen.append(library.num_threads)
        seen.append(library.num_threads)

    thread = threading.Thread(target=other)
    with limits.limited(2):
        thread.start()
        assert begun.wait(10)
        assert library.num_threads == 2
    assert library.num_threads == FOUND
    go.set()
    thread.join()
    assert seen == [1, FOUND]


@needs_fork
@pytest.mark.spec("GEN-22")
def test_a_child_that_is_forked_while_limits_are_in_force_has_the_number_from_before_them() -> None:
    x = np.ones((300, 300), np.float32)

    def child() -> list[int]:
        numbers = [in_force()]
        with blas_threads.limited(2):
            numbers.append(in_force())
            assert (x @ x == 300).all()
        return [*numbers, in_force()]

    with blas_threads.limited(1):
        assert in_a_child(child) == [FOUND, 2, FOUND]
        assert in_force() == 1


@needs_fork
@pytest.mark.spec("GEN-22")
def test_a_child_that_is_forked_within_a_limit_may_leave_it() -> None:
    limit = blas_threads.limited(1)
    limit.__enter__()

    def child() -> int:
        limit.__exit__(None, None, None)
        return in_force()

    assert in_a_child(child) == FOUND
    limit.__exit__(None, None, None)


@needs_fork
@pytest.mark.spec("GEN-22")
def test_any_thread_of_a_forked_child_may_set_a_limit() -> None:
    with blas_threads.limited(3):  # so that the process knows what to do when it forks
        pass

    def other() -> int:
        with blas_threads.limited(2):
            return in_force()

    assert in_a_child(lambda: within(other)) == 2


@needs_fork
@pytest.mark.spec("GEN-22")
def test_a_child_that_is_forked_while_another_thread_changes_the_number_waits_for_no_lock_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fork waits until the other thread has changed it."""
    changing = threading.Event()
    with blas_threads.limited(3):  # so that the process knows what to do when it forks
        pass
    real = ThreadpoolController.limit

    def limit(*arguments: object, **options: object) -> object:
        if threading.current_thread() is thread:
            changing.set()
        return real(*arguments, **options)

    def other() -> None:
        with blas_threads.limited(1):
            pass

    def child() -> int:
        with blas_threads.limited(2):
            return in_force()

    monkeypatch.setattr(ThreadpoolController, "limit", limit)
    thread = threading.Thread(target=other)
    with blas_threads._lock:
        thread.start()
    assert changing.wait(10)
    assert in_a_child(child) == 2
    thread.join()


@pytest.mark.spec("CLI-25")
def test_the_blas_libraries_are_listed_and_no_other_library_that_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    blas, openmp = {"user_api": "blas", "num_threads": 4}, {"user_api": "openmp", "num_threads": 8}
    monkeypatch.setattr(module, "threadpool_info", lambda: [openmp, blas])
    assert blas_libraries() == [blas]


@pytest.mark.spec("CLI-25")
def test_where_the_libraries_of_a_process_are_not_listed_blas_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> ThreadpoolController:
        raise FileNotFoundError("/proc/self/maps")

    before = [library["num_threads"] for library in blas_libraries()]
    limits = BlasThreads(refuse)
    for _ in range(2):
        with limits.limited(1):
            assert [library["num_threads"] for library in blas_libraries()] == before
    monkeypatch.setattr(module, "threadpool_info", refuse)
    assert blas_libraries() == []


@pytest.mark.spec("CAL-11")
@pytest.mark.parametrize(
    ("one", "many", "chosen"),
    [
        ([1.0, 1.0, 1.0], [0.5, 0.6, 9.0], 4),
        ([1.0, 1.0, 1.0], [1.1, 0.9, 1.2], 1),
        ([1.0, 1.0, 1.0], [0.96, 0.96, 0.96], 1),
        ([1.0, 1.0, 1.0], [0.94, 0.94, 0.94], 4),
    ],
    ids=["faster", "slower", "hardly faster", "a twentieth faster"],
)
def test_a_trial_takes_turns_and_keeps_the_number_with_the_shorter_median(
    one: list[float], many: list[float], chosen: int
) -> None:
    trial = Trial(4)
    turns = []
    for pair in zip(many, one, strict=True):
        for seconds in pair:
            assert not trial.is_over
            turns.append(trial.threads)
            trial.took(seconds)
    assert turns == [4, 1] * 3
    assert (trial.is_over, trial.threads) == (True, chosen)
    trial.took(99.0)
    assert trial.threads == chosen


@pytest.mark.spec("GEN-22")
def test_a_limit_that_is_interrupted_at_any_moment_leaves_the_number_from_before_it() -> None:
    threads = BlasThreads()

    def limit() -> None:
        with threads.limited(1):
            pass

    limit()  # what is looked up once
    for moment in every_moment(lambda: limit):
        assert in_force() == FOUND, f"interrupted at moment {moment}"
        limit()
        assert in_force() == FOUND, f"interrupted at moment {moment}, and limited again"
