"""Interleaved timing: the candidates of a comparison take turns, so that a slow moment hits them all.

Leaves to others: what is measured, and how many rounds are enough.
Read more: tutorial 02; clauses BENCH-1, BENCH-2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Timings", "interleave"]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each candidate in each round, under its name."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Return the median seconds of one candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, faster: str, baseline: str) -> float:
        """Return how many times as fast `faster` is as `baseline`: the median of the ratios of each round."""
        return statistics.median(self._ratios(faster, baseline))

    def spread(self, faster: str, baseline: str) -> tuple[float, float]:
        """Return the first and third quartile of the ratios of each round."""
        ratios = sorted(self._ratios(faster, baseline))
        return ratios[len(ratios) // 4], ratios[(3 * (len(ratios) - 1) + 3) // 4]

    def _ratios(self, faster: str, baseline: str) -> list[float]:
        return [b / f for f, b in zip(self.seconds[faster], self.seconds[baseline], strict=True)]


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    now: Callable[[], float] = time.perf_counter,
    progress: Callable[[], None] = lambda: None,
) -> Timings:
    """Run every candidate once to warm up, then `rounds` times in turn, always in the same order.

    If the order alternated, the last candidate would run twice in a row and find its data in a cache.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = now()
            run()
            seconds[name].append(now() - start)
        progress()
    return Timings({name: tuple(values) for name, values in seconds.items()})
