"""A checksum that is cheap enough to be checked at every start: a position-weighted sum of 64-bit words.

Knows: bytes. Does not know: what they mean.
Spec: SUM-1 to SUM-3. Tutorial: 05.

The upper half of each word is mixed into its lower half; the words of each page of 4096 bytes are summed with odd
weights, modulo 2^64; the sums of the pages are stirred, and summed with odd weights in turn:

    word     x = w ^ (w >> 32)
    page j   s = x0 * a0 + x1 * a1 + ... + x511 * a511
    whole    sum over j of (s ^ (s >> 31)) * bj

Mixing and stirring can be undone, and an odd number has an inverse modulo 2^64, so that a single changed word always
changes the result, and so does any change within a page that changes the page's sum. Two changed bits of a page cancel
only where the sum or difference of their weights happens to be a multiple of 2^33; without the mixing, two flips of the
highest bits would cancel every second time. It is no protection against somebody who wants to deceive: a SHA-256 of
each buffer is kept beside it for `verify`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["checksum", "checksum_scratch", "checksums", "scrambled"]

_WORDS: Final = 512  # of a page
_BLOCK: Final = 128 * _WORDS
_WORD: Final = np.dtype("<u8")
_HALF: Final = np.uint64(32)
_STIR: Final = np.uint64(31)


def scrambled(n: int, stream: int) -> npt.NDArray[np.uint64]:
    """Return `n` fixed pseudo-random words: number i is splitmix64's of `i + 2^32 * stream`.

    Written out here because they are part of the file format, and numpy does not promise its own streams.
    """
    z = (np.arange(1, n + 1, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=64)
def _odd(n: int, stream: int) -> npt.NDArray[np.uint64]:
    return scrambled(n, stream) | np.uint64(1)


def checksum_scratch() -> npt.NDArray[np.uint64]:
    """Return memory for `checksum` to work in again and again; without, each call takes its own and gives it back."""
    return np.empty(_BLOCK, np.uint64)


def checksum(data: npt.NDArray[np.uint8], scratch: npt.NDArray[np.uint64] | None = None) -> int:
    """Return the checksum of contiguous bytes; a last word or page that is not full counts as if zeros followed.

    Examples:
        >>> checksum(np.zeros(4096, np.uint8))
        0
        >>> a, b = np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8)
        >>> b[0], b[8] = a[8], a[0]
        >>> checksum(a) == checksum(b)
        False
    """
    if rest := data.size % _WORD.itemsize:
        data = np.concatenate((data, np.zeros(_WORD.itemsize - rest, np.uint8)))
    words = data.view(_WORD)
    sums = np.empty(-(-words.size // _WORDS), np.uint64)
    if scratch is None:
        scratch = np.empty(min(words.size, _BLOCK), np.uint64)
    for start in range(0, words.size, _BLOCK):  # a block and its scratch stay in the processor's second cache
        block = words[start : start + _BLOCK]
        mixed = np.right_shift(block, _HALF, out=scratch[: block.size])
        np.bitwise_xor(mixed, block, out=mixed)
        whole = mixed.size // _WORDS
        first = start // _WORDS
        # einsum, because numpy has no other product of integer vectors that runs at the speed of vector instructions.
        pages = mixed[: whole * _WORDS].reshape(whole, _WORDS)
        np.einsum("ij,j->i", pages, _odd(_WORDS, 0), out=sums[first : first + whole])
        if rest := mixed[whole * _WORDS :].size:
            sums[-1] = np.einsum("j,j->", mixed[whole * _WORDS :], _odd(_WORDS, 0)[:rest])
    return int(np.einsum("i,i->", sums ^ (sums >> _STIR), _odd(sums.size, 1)))


def checksums(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return the checksum of each row of `rows` `[R, n]`, n a multiple of 8; rows may lie apart."""
    words = rows.view(_WORD)
    mixed = words ^ (words >> _HALF)
    pages = [mixed[:, start : start + _WORDS] for start in range(0, mixed.shape[1], _WORDS)]
    sums = np.stack([np.einsum("ij,j->i", page, _odd(_WORDS, 0)[: page.shape[1]]) for page in pages], axis=1)
    total: npt.NDArray[np.uint64] = np.einsum("ij,j->i", sums ^ (sums >> _STIR), _odd(len(pages), 1))
    return total
