"""From logits to the next token: greedy, temperature, top-k, top-p.

Works on one row of logits and a random generator that it is given. Leaves to others: the model, what tokens mean, the
seed.
Read more: tutorial 07; clauses SAMPLE-1 to SAMPLE-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array
from refinfer.errors import RequestError
from refinfer.units import is_number, is_whole, shown

__all__ = ["Sampling", "probabilities", "sample"]


_FIRST_SORTED: Final = 64  # top-p seldom keeps more


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token. `temperature` 0 is greedy; `top_k` and `top_p` narrow the choice if they are given.

    Raises:
        RequestError: a temperature that is negative or not finite, a `top_k` below 1, a `top_p` outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature must be a number from 0 (greedy) up, not {shown(self.temperature)}")
        if self.top_k is not None and not is_whole(self.top_k, 1):
            raise RequestError(f"top-k must be a whole number from 1 up, not {shown(self.top_k)}")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise RequestError(f"top-p must be above 0 and at most 1, not {shown(self.top_p)}")
        object.__setattr__(self, "temperature", float(self.temperature))  # numpy's small numbers overflow
        if self.top_k is not None:
            object.__setattr__(self, "top_k", int(self.top_k))
        if self.top_p is not None:
            object.__setattr__(self, "top_p", float(self.top_p))


def probabilities(logits: Float32Array, sampling: Sampling) -> npt.NDArray[np.float64]:
    """Return the distribution `[V]` that `sample` draws from; in float64, because it must add up to one.

    In the order of Hugging Face's `generate`: temperature, then the `top_k` largest, then the smallest set of the
    largest that holds at least `top_p` of what is left. Among equal logits the lower id comes first. Sorts only the
    logits that it keeps.

    Examples:
        >>> probabilities(np.log(np.array([1, 2, 5], np.float32)), Sampling(temperature=1.0, top_k=2)).round(3)
        array([0.   , 0.286, 0.714])
    """
    result = np.zeros(logits.size)
    if sampling.temperature == 0:
        result[np.argmax(logits)] = 1.0
        return result
    # The largest logit is subtracted before dividing, so that it becomes 0 at any temperature; at a tiny one the others
    # become minus infinity, and their exponential is zero, as it should be.
    with np.errstate(over="ignore"):
        weights = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    kept = np.arange(logits.size)
    if sampling.top_k is not None:
        kept = _largest(logits, sampling.top_k)
    if sampling.top_p is not None:
        total = weights[kept].sum()
        n = min(_FIRST_SORTED, kept.size)
        while True:
            candidates = _largest(logits, n) if sampling.top_k is None else kept
            before = np.cumsum(weights[candidates]) - weights[candidates]  # what lies above each
            keep = max(1, int(np.count_nonzero(before < sampling.top_p * total)))  # the first that reaches p is kept
            if keep < candidates.size or candidates.size == kept.size:
                break
            n = min(8 * n, kept.size)
        kept = candidates[:keep]
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def _largest(logits: Float32Array, n: int) -> npt.NDArray[np.int64]:
    """Return the ids of the `n` largest logits, largest first, the lower id first among equals."""
    if n >= logits.size:
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, logits.size - n)[logits.size - n]
    above, equal = np.flatnonzero(logits > least), np.flatnonzero(logits == least)
    above = above[np.argsort(-logits[above], kind="stable")]
    return np.concatenate((above, equal[: n - above.size]))


def sample(logits: Float32Array, sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token id; greedy sampling takes the lowest of equal ids and leaves `rng` untouched."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    cumulative = np.cumsum(probabilities(logits, sampling))
    # The last sum may fall short of one by a rounding; drawing below it keeps the id in range.
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
