"""Specifies `refinfer.planning.page_cache`: what a page cache misses, against a cache made by hand and formulas."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.planning.page_cache import belady_misses, lru_misses


def cache_by_hand(sizes: Sequence[int], capacity: int, turns: int, *, lru: bool) -> list[int]:
    """Return the bytes missed in each turn by a cache that drops what was used longest ago, or what is needed last."""
    n, held, missed = len(sizes), list[int](), []
    for _ in range(turns):
        missed.append(0)
        for i, size in enumerate(sizes):
            if i in held:
                held.remove(i)
            else:
                missed[-1] += size
                if size > capacity:
                    continue
                while sum(sizes[j] for j in held) + size > capacity:
                    held.remove(held[0] if lru else max(held, key=lambda j: (j - i) % n))
            held.append(i)
    return missed


@pytest.mark.spec("SIM-6")
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9), share=st.floats(0, 1.2))
def test_an_lru_cache_hits_nothing_until_everything_fits(sizes: list[int], share: float) -> None:
    capacity = int(share * sum(sizes))
    expected = 0 if capacity >= sum(sizes) else sum(sizes)
    assert cache_by_hand(sizes, capacity, 9, lru=True)[-1] == lru_misses(sizes, capacity)
    if max(sizes) <= capacity or expected == 0:
        assert lru_misses(sizes, capacity) == expected


@pytest.mark.spec("SIM-6")
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 1), (5, 4), (10, 5), (13, 4)])
def test_beladys_optimum_misses_those_that_do_not_fit_or_one_more(n: int, k: int) -> None:
    turns = cache_by_hand([1] * n, k, 1 + 4 * (n - 1), lru=False)[1:]
    assert set(turns) <= {n - k, n - k + 1}
    assert sum(turns) == 4 * n * (n - k)  # over n - 1 tokens one miss more for each that does not fit
    assert n - k <= belady_misses([1] * n, k) <= n - k + 1
    assert belady_misses([7] * n, 7 * n) == 0
    assert belady_misses([7] * n, 7 * n - 1) >= 7


@pytest.mark.spec("SIM-6")
@pytest.mark.parametrize(("n", "k"), [(10, 5), (13, 4), (9, 7)])
def test_beladys_optimum_is_the_mean_of_whole_turns(n: int, k: int) -> None:
    size = 1_000_000
    assert belady_misses([size] * n, k * size) == round(Fraction(n * (n - k) * size, n - 1))


@pytest.mark.spec("SIM-6")
def test_a_chunk_that_cannot_be_kept_costs_the_best_cache_nothing_else() -> None:
    assert belady_misses([10, 1, 1, 1], capacity=5) == 10


@pytest.mark.spec("SIM-6")
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9), share=st.floats(0, 1.2))
def test_the_best_cache_reads_no_more_than_an_lru_cache_and_no_less_than_what_does_not_fit(
    sizes: list[int], share: float
) -> None:
    capacity = max(int(share * sum(sizes)), *sizes)
    assert max(0, sum(sizes) - capacity) <= belady_misses(sizes, capacity) <= lru_misses(sizes, capacity)
