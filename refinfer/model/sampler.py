"""From logits to the next token: greedy, temperature, top-k, top-p.

Knows: one row of logits and a random generator it is handed. Does not know: the model, tokens' meaning, a seed.
Spec: SAMPLE-1 to SAMPLE-5. Tutorial: 07.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array
from refinfer.errors import RequestError

__all__ = ["Sampling", "probabilities", "sample"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. `temperature` 0 is greedy; `top_k` and `top_p` narrow the choice where they are given.

    Raises:
        RequestError: a temperature that is negative or not finite, a `top_k` below 1, a `top_p` outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature must be a number from 0 (greedy) up, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top-k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RequestError(f"top-p must be above 0 and at most 1, not {self.top_p}")


def probabilities(logits: Float32Array, sampling: Sampling) -> npt.NDArray[np.float64]:
    """Return the distribution `[V]` that `sample` draws from; in float64, because it must add up to one.

    In the order of Hugging Face's `generate`: temperature, then the `top_k` largest, then the smallest set of the
    largest that holds at least `top_p` of what is left. Among equal logits the lower id comes first.

    Examples:
        >>> probabilities(np.log(np.array([1, 2, 5], np.float32)), Sampling(temperature=1.0, top_k=2)).round(3)
        array([0.   , 0.286, 0.714])
    """
    if sampling.temperature == 0:
        one_hot = np.zeros(logits.size)
        one_hot[np.argmax(logits)] = 1.0
        return one_hot
    # The largest logit is taken away before dividing: a tiny temperature must not make infinities.
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = np.exp(scaled[order[: sampling.top_k]])
    kept /= kept.sum()
    if sampling.top_p is not None:
        before = np.cumsum(kept) - kept  # what lies above each: the first that reaches top_p is still kept
        kept = kept[: max(1, np.count_nonzero(before < sampling.top_p))]
        kept /= kept.sum()
    result = np.zeros(logits.size)
    result[order[: kept.size]] = kept
    return result


def sample(logits: Float32Array, sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token id; greedy sampling takes the lowest of equal ids and leaves `rng` untouched."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    return int(rng.choice(logits.size, p=probabilities(logits, sampling)))
