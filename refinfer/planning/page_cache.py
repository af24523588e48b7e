"""What a page cache misses when a model is read chunk by chunk, over and over: why mmap collapses below a model's size.

Leaves to others: how long a miss takes (`report`, `paper`), locking chunks instead of caching them (`locks`).
Read more: tutorial 08; clause SIM-6.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

__all__ = ["belady_misses", "lru_misses"]


def lru_misses(sizes: Sequence[int], capacity: int) -> int:
    """Return the bytes that a page cache which drops the least recently used chunk reads for each token, once steady.

    On a cyclic scan that is everything until everything fits: the chunk that is needed next is the one that was used
    longest ago, so it has just been dropped.

    Examples:
        >>> lru_misses([4, 4, 4, 4], capacity=15), lru_misses([4, 4, 4, 4], capacity=16)
        (16, 0)
    """
    *_, steady = _misses(sizes, capacity, tokens=2, drop_last_used=False)
    return steady


def belady_misses(sizes: Sequence[int], capacity: int) -> int:
    """Return the bytes that the best possible page cache reads for each token, once steady: nearly what locking reads.

    It drops the chunk that will not be needed for the longest time (Belady 1966); on a cyclic scan that is the chunk
    that was used last. If k of n equal chunks fit, it misses `n * (n - k) / (n - 1)`, while locking k misses n - k: the
    chunks it keeps change from token to token.

    Examples:
        >>> belady_misses([4, 4, 4, 4], capacity=8)
        11
    """
    turn = max(1, len(sizes) - 1)
    history = list(_misses(sizes, capacity, tokens=len(sizes) + turn, drop_last_used=True))
    return round(sum(history[-turn:]) / turn)


# --8<-- [start:misses]
def _misses(sizes: Sequence[int], capacity: int, *, tokens: int, drop_last_used: bool) -> Iterator[int]:
    """Yield the bytes that a page cache misses in each token of a cyclic scan."""
    held: OrderedDict[int, int] = OrderedDict()
    in_use = 0
    for _ in range(tokens):
        missed = 0
        for number, size in enumerate(sizes):
            if number in held:
                held.move_to_end(number)
                continue
            missed += size
            if size > capacity:
                continue
            while in_use + size > capacity:
                in_use -= held.popitem(last=drop_last_used)[1]
            held[number] = size
            in_use += size
        yield missed


# --8<-- [end:misses]
