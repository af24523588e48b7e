"""A clean, naive Llama decode in numpy: the baseline that `refinfer bench decode` compares with.

The same weights, one token at a time, in float32 throughout, with rotary tables made once and a KV cache reserved up
front. Leaves to others: preallocated buffers, views and tricks (`model.transformer`); this is the straightforward
version.
Read more: tutorial 02; clause BENCH-4.
"""

from __future__ import annotations

import numpy as np

from refinfer.arrays import Float32Array
from refinfer.model.config import ModelConfig
from refinfer.model.weights import LayerWeights, Matrix, RowMajorMatrix, Weights

__all__ = ["NaiveDecoder"]


def _rms_norm(x: Float32Array, weight: Float32Array, eps: float) -> Float32Array:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    normed: Float32Array = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return normed


def _softmax(x: Float32Array) -> Float32Array:
    e: Float32Array = np.exp(x - np.max(x, axis=-1, keepdims=True))
    shares: Float32Array = e / np.sum(e, axis=-1, keepdims=True)
    return shares


def _silu(x: Float32Array) -> Float32Array:
    y: Float32Array = x / (1 + np.exp(-x))
    return y


def _linear(x: Float32Array, matrix: Matrix) -> Float32Array:
    assert isinstance(matrix, RowMajorMatrix)
    return x @ matrix.weight.T


def _rotate(x: Float32Array, cos: Float32Array, sin: Float32Array) -> Float32Array:
    a, b = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate((-b, a), axis=-1) * sin


class NaiveDecoder:
    """Decodes one token after another, with the weights of a pass of a `RowMajorSource`."""

    def __init__(self, config: ModelConfig, weights: Weights, max_positions: int) -> None:
        c = self.config = config
        self.weights = weights
        frequency = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim)
        angle = np.outer(np.arange(max_positions, dtype=np.float32), frequency).astype(np.float32)
        self.cos = np.concatenate((np.cos(angle), np.cos(angle)), axis=-1)
        self.sin = np.concatenate((np.sin(angle), np.sin(angle)), axis=-1)
        shape = (c.num_hidden_layers, max_positions, c.num_key_value_heads, c.head_dim)
        self.keys, self.values = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        self.length = 0

    def decode(self, token_id: int) -> Float32Array:
        """Compute one more token; return the logits `[V]`."""
        x = self.weights.embed_tokens.rows(np.array([token_id]))[0]
        for index, layer in enumerate(self.weights.layers):
            x = x + self._attention(index, layer, _rms_norm(x, layer.input_layernorm, self.config.rms_norm_eps))
            h = _rms_norm(x, layer.post_attention_layernorm, self.config.rms_norm_eps)
            x = x + _linear(_silu(_linear(h, layer.gate_proj)) * _linear(h, layer.up_proj), layer.down_proj)
        self.length += 1
        return _linear(_rms_norm(x, self.weights.norm, self.config.rms_norm_eps), self.weights.lm_head)

    def _attention(self, index: int, layer: LayerWeights, x: Float32Array) -> Float32Array:
        c, position = self.config, self.length
        cos, sin = self.cos[position], self.sin[position]
        q = _rotate(_linear(x, layer.q_proj).reshape(c.num_attention_heads, c.head_dim), cos, sin)
        k = _rotate(_linear(x, layer.k_proj).reshape(c.num_key_value_heads, c.head_dim), cos, sin)
        self.keys[index, position] = k
        self.values[index, position] = _linear(x, layer.v_proj).reshape(c.num_key_value_heads, c.head_dim)
        repeats = c.num_attention_heads // c.num_key_value_heads
        keys = np.repeat(self.keys[index, : position + 1], repeats, axis=1)  # [P, H, hd]
        values = np.repeat(self.values[index, : position + 1], repeats, axis=1)
        scores = q[:, None] @ keys.transpose(1, 2, 0) / np.float32(np.sqrt(c.head_dim))  # [H, 1, P]
        mixed = _softmax(scores) @ values.transpose(1, 0, 2)  # [H, 1, hd]
        return _linear(mixed.reshape(-1), layer.o_proj)
