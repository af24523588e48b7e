"""From logits to a token: the distribution, and the sets that top-k and top-p keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import Float32Array
from refinfer.errors import RequestError
from refinfer.model.sampler import Sampling, probabilities, sample

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(lambda v: np.array(v, np.float32))


def softmax(logits: Float32Array, temperature: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    e = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    shares: np.ndarray[tuple[int], np.dtype[np.float64]] = e / e.sum()
    return shares


@pytest.mark.spec("SAMPLE-1")
@given(LOGITS)
def test_greedy_takes_the_lowest_of_the_likeliest_ids_and_draws_nothing(logits: Float32Array) -> None:
    rng = np.random.default_rng(5)
    assert sample(logits, Sampling(), rng) == logits.tolist().index(logits.max())
    assert rng.random() == np.random.default_rng(5).random()


@pytest.mark.spec("SAMPLE-2")
@given(LOGITS, st.floats(0.05, 5))
def test_the_distribution_is_the_softmax_at_the_temperature(logits: Float32Array, temperature: float) -> None:
    np.testing.assert_allclose(
        probabilities(logits, Sampling(temperature)), softmax(logits, temperature), rtol=1e-9, atol=1e-300
    )


@pytest.mark.spec("SAMPLE-2")
def test_draws_follow_the_distribution() -> None:
    """A chi-squared statistic of 20,000 draws with a fixed seed; 3 degrees of freedom exceed 16.3 once in 1,000."""
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    rng, n = np.random.default_rng(0), 20_000
    counts = np.bincount([sample(logits, Sampling(0.7), rng) for _ in range(n)], minlength=4)
    expected = softmax(logits, 0.7) * n
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


@pytest.mark.spec("SAMPLE-2")
@pytest.mark.parametrize("temperature", [1e-310, 1e-300, 1e-30, 1e30], ids=str)
def test_an_extreme_temperature_still_gives_a_distribution(temperature: float) -> None:
    p = probabilities(np.array([3, 1, 2], np.float32), Sampling(temperature, top_k=2, top_p=0.9))
    assert p.sum() == pytest.approx(1)
    assert p[0] == p.max()


@pytest.mark.spec("SAMPLE-3")
@given(LOGITS, st.integers(1, 40))
def test_top_k_keeps_exactly_the_k_likeliest(logits: Float32Array, k: int) -> None:
    kept = probabilities(logits, Sampling(1.0, top_k=k)) > 0
    assert kept.sum() == min(k, logits.size)
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()


@pytest.mark.spec("SAMPLE-4")
@given(LOGITS, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_likeliest_set_that_holds_p(logits: Float32Array, p: float) -> None:
    full = softmax(logits, 1.0)
    kept = probabilities(logits, Sampling(1.0, top_p=p)) > 0
    assert full[kept].sum() >= p - 1e-9
    assert full[kept].sum() - full[kept].min() < p + 1e-9  # without its least likely member it holds less
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()


@pytest.mark.spec("SAMPLE-4")
@given(st.integers(100, 2000), st.floats(0.01, 1), st.floats(0.1, 3), st.integers(0, 99))
def test_top_p_finds_the_same_set_in_a_large_vocabulary_without_sorting_it(
    V: int, p: float, temperature: float, seed: int
) -> None:
    logits = np.random.default_rng(seed).standard_normal(V, dtype=np.float32) * 3
    order = np.argsort(-logits, kind="stable")
    sorted_shares = softmax(logits, temperature)[order]
    n = int(np.count_nonzero(np.cumsum(sorted_shares) - sorted_shares < p))
    kept = np.flatnonzero(probabilities(logits, Sampling(temperature, top_p=p)))
    assert abs(len(kept) - n) <= 1  # a sum within a rounding of p may fall on either side
    assert set(kept) == set(order[: len(kept)])


@pytest.mark.spec("SAMPLE-3")
def test_among_equal_logits_top_k_keeps_the_lowest_ids() -> None:
    logits = np.array([1, 3, 2, 3, 2, 2], np.float32)
    assert np.flatnonzero(probabilities(logits, Sampling(1.0, top_k=4))).tolist() == [1, 2, 3, 4]


@pytest.mark.spec("SAMPLE-4")
@pytest.mark.parametrize("V", [40, 400])
def test_among_equal_logits_top_p_keeps_the_lowest_ids(V: int) -> None:
    likely = np.random.default_rng(0).random(V) < 0.5
    kept = probabilities(likely.astype(np.float32) * 9, Sampling(1.0, top_k=V, top_p=0.5)) > 0
    ids = np.flatnonzero(likely)
    assert np.flatnonzero(kept).tolist() == ids[: kept.sum()].tolist()
    assert 0 < kept.sum() < len(ids)


@pytest.mark.spec("SAMPLE-4", "SAMPLE-5")
def test_a_top_p_of_1_keeps_every_token() -> None:
    logits = np.array([3, 1, 2], np.float32)
    np.testing.assert_array_equal(probabilities(logits, Sampling(1.0, top_p=1.0)), softmax(logits, 1.0))


@pytest.mark.spec("SAMPLE-3", "SAMPLE-4")
@given(LOGITS, st.integers(1, 10), st.floats(0.05, 1))
def test_top_p_counts_among_what_top_k_left(logits: Float32Array, k: int, p: float) -> None:
    after_k = probabilities(logits, Sampling(1.0, top_k=k))
    both = probabilities(logits, Sampling(1.0, top_k=k, top_p=p))
    kept = both > 0
    np.testing.assert_allclose(both[kept], after_k[kept] / after_k[kept].sum())
    assert after_k[kept].sum() >= p - 1e-9
    assert after_k[kept].sum() - after_k[kept].min() < p + 1e-9  # without its least likely member it holds less


@pytest.mark.spec("SAMPLE-4")
def test_top_p_narrows_what_top_k_left() -> None:
    logits = np.log(np.array([1, 5, 2, 8], np.float32))
    both = probabilities(logits, Sampling(1.0, top_k=3, top_p=0.8))  # of 8, 5 and 2 in 15, the first two hold 0.87
    np.testing.assert_allclose(both, [0, 5 / 13, 0, 8 / 13], rtol=1e-6)


@pytest.mark.spec("SAMPLE-1")
@given(LOGITS, st.none() | st.integers(1, 5), st.none() | st.floats(0.05, 1))
def test_at_temperature_0_the_token_that_is_taken_has_the_whole_probability(
    logits: Float32Array, k: int | None, p: float | None
) -> None:
    greedy = Sampling(0.0, k, p)
    shares = probabilities(logits, greedy)
    assert np.flatnonzero(shares).tolist() == [sample(logits, greedy, np.random.default_rng(1))]
    assert shares.sum() == 1


@pytest.mark.spec("SAMPLE-5")
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "why"),
    [
        (math.nan, None, None, "temperature"),
        (math.inf, None, None, "temperature"),
        (-0.1, None, None, "temperature"),
        (1.0, 0, None, "top-k"),
        (1.0, None, 0.0, "top-p"),
        (1.0, None, 1.5, "top-p"),
        (1.0, None, math.nan, "top-p"),
    ],
    ids=["nan", "infinite", "negative", "k of 0", "p of 0", "p above 1", "p of nan"],
)
def test_options_out_of_range_are_refused(temperature: float, top_k: int | None, top_p: float | None, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        Sampling(temperature, top_k, top_p)
