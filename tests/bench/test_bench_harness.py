"""Interleaved timing: who takes turns, and what a ratio is."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from refinfer.bench.harness import Timings, interleave


@pytest.mark.spec("BENCH-1", "BENCH-2")
def test_candidates_warm_up_once_and_then_take_turns() -> None:
    log: list[str] = []

    def candidate(name: str) -> Callable[[], None]:
        return lambda: log.append(name)

    interleave({"a": candidate("a"), "b": candidate("b")}, rounds=3)
    assert "".join(log) == "ab" * 4


@pytest.mark.spec("BENCH-1")
def test_progress_is_told_after_each_round() -> None:
    log: list[str] = []
    interleave({"a": lambda: log.append("a")}, rounds=3, progress=lambda: log.append(","))
    assert "".join(log) == "a" + "a," * 3


@pytest.mark.spec("BENCH-1")
def test_a_turn_is_timed_by_the_clock() -> None:
    ticks = iter(range(100))
    timings = interleave({"a": lambda: next(ticks), "b": lambda: None}, rounds=4, now=lambda: float(next(ticks)))
    assert timings.median("a") == 2.0
    assert timings.median("b") == 1.0


@pytest.mark.spec("BENCH-1")
def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    timings = Timings({"new": (1.0, 1.0, 10.0), "old": (2.0, 3.0, 10.0)})
    assert timings.ratio("new", "old") == 2.0
    assert timings.spread("new", "old") == (1.0, 3.0)


@pytest.mark.spec("BENCH-1")
@pytest.mark.parametrize("n", [1, 5, 9, 41])
def test_a_spread_is_from_the_first_to_the_third_quartile(n: int) -> None:
    ratios = [float(ratio) for ratio in range(10, 10 + n)]
    timings = Timings({"new": (1.0,) * n, "old": tuple(reversed(ratios))})
    first, _, third = statistics.quantiles(ratios, method="inclusive") if n > 1 else ratios * 3
    assert timings.spread("new", "old") == (first, third)
