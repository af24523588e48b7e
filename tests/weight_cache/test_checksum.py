"""Specifies `refinfer.weight_cache.checksum`: the documented sum over words, and which changes it must notice."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refinfer.weight_cache.checksum import checksum, checksum_scratch, checksums, scrambled

Bytes = npt.NDArray[np.uint8]

MASK = (1 << 64) - 1
EDGES = [0, 1, 7, 8, 9, 15, 16, 4087, 4088, 4089, 4095, 4096, 4097, 4104, 8191, 8192, 8193, 12_287, 12_288, 12_300]

sizes = st.integers(0, 3 * 4096 + 50) | st.sampled_from(EDGES)
seeds = st.integers(0, 1 << 32)
SCRATCH = checksum_scratch()


def noise(n: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


@cache
def splitmix64(i: int) -> int:
    """Return number i, from 0, of the generator of Steele, Lea and Flood 2014 that starts at 0."""
    z = (i + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def by_formula(data: bytes) -> int:
    """Sum as the head of the module says, one word after another, in Python's own numbers."""
    words = [int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little") for i in range(0, len(data), 8)]
    words = [w ^ w >> 32 for w in words]
    total = 0
    for j, first in enumerate(range(0, len(words), 512)):
        s = sum((splitmix64(i) | 1) * a for i, a in enumerate(words[first : first + 512])) & MASK
        total += (s ^ s >> 31) * (splitmix64(j + (1 << 32)) | 1)
    return total & MASK


@pytest.mark.spec("SUM-2")
def test_the_words_are_those_of_splitmix64() -> None:
    # The first numbers of the reference implementation in C, https://prng.di.unimi.it/splitmix64.c, from seed 0.
    assert scrambled(3, 0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for stream in (0, 1, 2, 1000):
        assert scrambled(600, stream).tolist() == [splitmix64(i + (stream << 32)) for i in range(600)]


@pytest.mark.spec("SUM-2")
@pytest.mark.parametrize("n", EDGES)
def test_the_checksum_is_the_documented_sum_at_every_edge_of_words_and_pages(n: int) -> None:
    data = noise(n)
    assert checksum(data) == by_formula(data.tobytes())
    full = np.full(n, 255, np.uint8)
    assert checksum(full) == by_formula(full.tobytes())


@pytest.mark.spec("SUM-2")
@given(n=sizes, seed=seeds, start=st.integers(0, 8))
def test_the_checksum_is_the_documented_sum_whatever_the_length_and_the_address(n: int, seed: int, start: int) -> None:
    data = noise(start + n, seed)[start:]
    data.flags.writeable = False
    assert checksum(data) == by_formula(data.tobytes())


@pytest.mark.spec("SUM-2")
@given(n=sizes | st.sampled_from([(1 << 19) - 1, 1 << 19, (1 << 20) + 9]), seed=seeds)
def test_memory_to_work_in_that_is_used_again_changes_nothing(n: int, seed: int) -> None:
    data = noise(n, seed)
    assert checksum(data, SCRATCH) == checksum(data)


@pytest.mark.spec("SUM-2")
@given(n=sizes, zeros=st.integers(0, 9000))
def test_what_is_not_full_counts_as_if_zeros_followed(n: int, zeros: int) -> None:
    data = noise(n)
    followed = np.concatenate((data, np.zeros(-n % 8, np.uint8)))
    assert checksum(data) == checksum(followed)
    assert checksum(followed) == checksum(np.concatenate((followed, np.zeros(zeros, np.uint8))))


@pytest.mark.spec("SUM-2")
@given(seed=seeds, data=st.data())
def test_two_words_or_two_pages_cannot_change_places_unnoticed(seed: int, data: st.DataObject) -> None:
    before = noise(3 * 4096, seed)
    step = data.draw(st.sampled_from([8, 4096]))
    parts = before.reshape(-1, step)
    i, j = data.draw(st.lists(st.integers(0, len(parts) - 1), min_size=2, max_size=2, unique=True))
    after = parts.copy()
    after[[i, j]] = parts[[j, i]]
    assert checksum(after.reshape(-1)) != checksum(before)


@pytest.mark.spec("SUM-1")
@given(n=st.integers(1, 3 * 4096 + 50), seed=seeds, at=st.integers(0), word=st.integers(0, MASK))
@example(n=4096, seed=0, at=511, word=0)
@example(n=4097, seed=0, at=512, word=1)
def test_another_word_anywhere_gives_another_checksum(n: int, seed: int, at: int, word: int) -> None:
    before = noise(n, seed)
    after, start = before.copy(), at % -(-n // 8) * 8
    new = np.frombuffer(word.to_bytes(8, "little"), np.uint8)
    after[start : start + 8] = new[: n - start]
    assert (checksum(after) == checksum(before)) == np.array_equal(after, before)


@pytest.mark.spec("SUM-1")
@pytest.mark.parametrize("data", [noise(4096 + 24), np.zeros(4096 + 24, np.uint8)], ids=["noise", "zeros"])
def test_a_flip_of_any_bit_of_any_word_gives_another_checksum(data: Bytes) -> None:
    before = checksum(data)
    words = data.view("<u8")
    for i in range(words.size):
        for bit in (0, 31, 32, 63, i % 64):  # the highest bit is lost first in a product that wraps
            words[i] ^= np.uint64(1 << bit)
            assert checksum(data) != before
            words[i] ^= np.uint64(1 << bit)
    assert checksum(data) == before


def escapes(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> int:
    """Count the pairs of words of a page that can be changed by these bits, and the page's checksum stays."""
    page = noise(4096).view("<u8")
    before, missed = checksum(page.view(np.uint8)), 0
    for i in range(0, page.size, 8):
        others = np.arange(i + 1, page.size)
        rows = np.tile(page, (others.size, 1))
        rows[:, i] ^= first[i + 1 :]
        rows[np.arange(others.size), others] ^= second[i + 1 :]
        missed += int((checksums(rows.view(np.uint8)) == before).sum())
    return missed


@pytest.mark.spec("SUM-1")
@pytest.mark.parametrize("bit", [63, 62, 61, 60, 56, 48, 32, 0])
def test_no_two_flips_of_the_same_bit_of_two_words_cancel_out(bit: int) -> None:
    flip = np.full(512, 1 << bit, np.uint64)
    assert escapes(flip, flip) == 0


@pytest.mark.spec("SUM-1")
@pytest.mark.parametrize("seed", range(4))
def test_no_two_flips_of_any_bits_of_two_words_cancel_out(seed: int) -> None:
    one, other = np.uint64(1) << np.random.default_rng(seed).integers(0, 64, (2, 512), np.uint64)
    assert escapes(one, other) == 0


@pytest.mark.spec("SUM-3")
@given(n_rows=st.integers(0, 9), n_words=st.integers(1, 1100), gap=st.sampled_from([0, 1, 8, 24]), seed=seeds)
@example(n_rows=3, n_words=512, gap=8, seed=0)
@example(n_rows=3, n_words=1024, gap=0, seed=0)
def test_the_checksums_of_many_rows_are_those_of_each(n_rows: int, n_words: int, gap: int, seed: int) -> None:
    rows = noise(n_rows * (8 * n_words + gap), seed).reshape(n_rows, 8 * n_words + gap)[:, : 8 * n_words]
    together = checksums(rows)
    assert together.dtype == np.uint64
    assert together.tolist() == [checksum(row) for row in rows] == [by_formula(row.tobytes()) for row in rows]
