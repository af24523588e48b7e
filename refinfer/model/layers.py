"""The arithmetic of a layer: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

Works on arrays that it is given. Leaves to others: products with weight matrices (`transformer`), where weights are,
tokens.
Read more: tutorial 07; clauses MODEL-1 to MODEL-6.

Every function that is called for each token writes into arrays it is given, so that decoding allocates little.
All inputs and outputs are float32, which a test checks: one float64 table would make every later step twice as slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from refinfer.arrays import Float32Array
from refinfer.model.config import Llama3RopeScaling, ModelConfig

__all__ = [
    "RopeTables",
    "attention",
    "causal_mask",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "silu_multiply",
]


_ONE: Final = np.array(1.0, dtype=np.float32)  # ufuncs are faster with an array than with a Python number


def rms_norm(x: Float32Array, weight: Float32Array, eps: float, out: Float32Array) -> None:
    """Scale each row of `x` to a root mean square of one, then by `weight`: `[..., D]` to `out` `[..., D]`.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    if x.shape[0] == 1 and x.ndim == 2:  # one token: a Python number is cheaper than arrays of one element
        row = x[0]
        np.multiply(x, (float(row.dot(row)) / row.size + eps) ** -0.5, out=out)
    else:
        mean_square = np.vecdot(x, x)[..., None] / np.float32(x.shape[-1])
        np.divide(x, np.sqrt(mean_square + np.float32(eps)), out=out)
    np.multiply(out, weight, out=out)


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Cosines and sines by position, shaped for `rope`: `cos` and `sin` are `[S, 1, 2, hd/2]`.

    The sine of the first half is negated: that is the minus sign of a rotation.
    """

    cos: Float32Array
    sin: Float32Array


def rope_tables(config: ModelConfig, n_positions: int) -> RopeTables:
    """Compute the tables for positions 0 to `n_positions - 1`; sines and cosines are computed only here.

    Frequencies and angles are float32 because those of `transformers` are: at position 4,000 the rounding of a
    frequency already shows in the fourth digit of a cosine.
    """
    angle = np.arange(n_positions, dtype=np.float32)[:, None] * rope_frequencies(config)
    cos, sin = np.cos(angle), np.sin(angle)
    return RopeTables(
        cos=np.stack((cos, cos), axis=1)[:, None],
        sin=np.stack((-sin, sin), axis=1)[:, None],
    )


def rope_frequencies(config: ModelConfig) -> Float32Array:
    """Return the angle `[hd/2]` that each pair of a head turns by from one position to the next."""
    exponent = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    power = np.power(config.rope_theta, exponent.astype(np.float64)).astype(np.float32)
    frequency: Float32Array = np.float32(1) / power
    if config.rope_scaling is not None:
        frequency = _llama3_frequencies(frequency, config.rope_scaling)
    return frequency


def _llama3_frequencies(frequency: Float32Array, scaling: Llama3RopeScaling) -> Float32Array:
    """Slow down the slow rotations by `factor`, leave the fast ones, and blend between (Llama 3.1).

    Computes in float32 and in the order of `transformers`, so that the same bits come out.
    """
    wavelength = np.float32(2 * math.pi) / frequency
    turns = np.float32(scaling.original_max_position_embeddings) / wavelength
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    factor = np.float32(scaling.factor)
    keep = (turns - low) / (high - low)
    blended = (1 - keep) * frequency / factor + keep * frequency
    result: Float32Array = np.where(turns < low, frequency / factor, np.where(turns > high, frequency, blended))
    return result


def rope(x: Float32Array, cos: Float32Array, sin: Float32Array, scratch: Float32Array) -> None:
    """Rotate heads in place by their positions: `x` `[M, H, 2, hd/2]`, tables `[M, 1, 2, hd/2]`.

    The pairs that rotate together are the two halves of a head, as in Hugging Face's Llama:
    `(a, b)` becomes `(a cos - b sin, b cos + a sin)`. `scratch` is as large as `x`.
    Su et al., "RoFormer", 2021.
    """
    np.multiply(x[:, :, ::-1], sin, out=scratch)
    np.multiply(x, cos, out=x)
    np.add(x, scratch, out=x)


def causal_mask(n: int) -> Float32Array:
    """Return `[n, n]`: minus infinity above the diagonal, where a token would see a later one, else zero."""
    return np.triu(np.full((n, n), -np.inf, dtype=np.float32), 1)


def attention(
    q: Float32Array,
    keys: Float32Array,
    values: Float32Array,
    scores: Float32Array,
    mask: Float32Array | None,
    out: Float32Array,
) -> None:
    """Grouped-query attention: each key and value head serves `R` query heads.

    An output is the mean of the values of all P positions, weighted by `softmax(q @ k / sqrt(hd) + mask)`. Scores may
    be so large that their exponential overflows; a softmax stays the same if each row's largest score is subtracted.

    Args:
        q: queries `[G, R, M, hd]`.
        keys: all keys so far, `[G, 1, hd, P]`: transposed, so that the product below walks along memory.
        values: all values so far, `[G, 1, P, hd]`.
        scores: scratch `[G, R, M, P]`, which holds anything.
        mask: `causal_mask` `[M, M]` for the last M positions; None for a single token, which sees everything.
        out: `[G, R, M, hd]`; the outputs are written into it.

    Ainslie et al., "GQA", 2023. No `np.repeat`: the broadcast over R costs nothing.
    """
    # lab 01: mix the values of all positions by how well their keys agree with the queries
    np.matmul(q, keys, out=scores)
    if mask is not None:
        tail = scores[..., -mask.shape[0] :]
        np.add(tail, mask, out=tail)
    # softmax(scores / sqrt(hd)): the largest score is subtracted first, so that exp cannot overflow, and the
    # division by the sum waits until after the product with the values, when there is less to divide.
    np.subtract(scores, np.maximum.reduce(scores, axis=-1, keepdims=True), out=scores)
    np.multiply(scores, q.shape[-1] ** -0.5, out=scores)
    np.exp(scores, out=scores)
    np.matmul(scores, values, out=out)
    np.divide(out, np.add.reduce(scores, axis=-1, keepdims=True), out=out)
    # end lab


def silu_multiply(gate: Float32Array, up: Float32Array, scratch: Float32Array) -> None:
    """SwiGLU's product: `gate` becomes `silu(gate) * up`, where `silu(g) = g / (1 + exp(-g))`; all `[M, F]`.

    Shazeer, "GLU Variants Improve Transformer", 2020. For a very negative gate the exponential is infinite and the
    quotient is zero, as it should be; the caller silences numpy's overflow warning.
    """
    np.negative(gate, out=scratch)
    np.exp(scratch, out=scratch)
    np.add(scratch, _ONE, out=scratch)
    np.divide(gate, scratch, out=gate)
    np.multiply(gate, up, out=gate)
