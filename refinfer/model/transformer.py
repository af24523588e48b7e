"""The transformer: tokens in, logits (a number for each possible next token) out, over any weight source.

Runs the operations of a Llama-shaped model in order, in memory that it reserves once. Leaves to others: where weights
live and how they are multiplied (`weights.WeightSource`), what tokens mean.
Read more: tutorial 07; clauses MODEL-7 to MODEL-12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from refinfer.arrays import Float32Array, IntArray, aligned_empty
from refinfer.errors import RequestError
from refinfer.model.config import ModelConfig
from refinfer.model.kv_cache import KVCache
from refinfer.model.layers import attention, causal_mask, rms_norm, rope, rope_tables, silu_multiply
from refinfer.model.weights import LayerWeights, Weights, WeightSource

__all__ = ["LARGEST_BLOCK", "Transformer", "prefill_block", "scratch_nbytes"]

LARGEST_BLOCK: Final = 256
"""The most tokens of a prompt that are computed together."""

_SMALLEST_BLOCK: Final = 32
_SCRATCH_SHARE: Final = 1 / 64


def prefill_block(config: ModelConfig, max_positions: int) -> int:
    """Return how many tokens of a prompt are computed together.

    Depends on the model and the context only, never on a budget or on where weights live, so that every source
    multiplies the same blocks and gives the same bits. Larger blocks read the weights fewer times; the block is the
    largest power of two up to 256 whose activations take at most 1/64 of the float32 weights, at least 32.
    """
    allowed = _SCRATCH_SHARE * config.n_parameters * 4
    block = LARGEST_BLOCK
    while block > _SMALLEST_BLOCK and block * _row_floats(config, max_positions) * 4 > allowed:
        block //= 2
    return min(block, max_positions)


def scratch_nbytes(config: ModelConfig, max_positions: int) -> int:
    """Return the bytes that a `Transformer` reserves for activations, masks and RoPE tables."""
    block = prefill_block(config, max_positions)
    floats = block * _row_floats(config, max_positions) + block * block + 2 * max_positions * config.head_dim
    return 4 * (floats + config.vocab_size)


def _row_floats(config: ModelConfig, max_positions: int) -> int:
    """Return the numbers that one token's activations take."""
    Q, KV = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    residual_and_parts = 3 * config.hidden_size + 2 * (Q + KV) + KV + Q + 3 * config.intermediate_size
    return residual_and_parts + config.num_attention_heads * max_positions


class _Activations:
    """Views of the scratch memory for M tokens, shaped as each step wants them; made once for each M in use."""

    __slots__ = (
        "down", "gate", "k", "k_heads", "mixed", "mixed_heads", "normed", "o", "q", "q_groups", "q_heads",
        "rotated", "scores", "silu_scratch", "up", "v", "v_heads", "x",
    )  # fmt: skip

    def __init__(self, arena: Float32Array, config: ModelConfig, M: int) -> None:
        D, F, hd = config.hidden_size, config.intermediate_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        used = 0

        def take(*shape: int) -> Float32Array:
            nonlocal used
            size = int(np.prod(shape))
            used += size
            return arena[used - size : used].reshape(shape)

        self.x, self.normed, self.o = take(M, D), take(M, D), take(M, D)
        self.down = self.o
        qk, qk_scratch = take(M * (H + G), hd), take(M * (H + G), hd)
        self.q, self.k = qk[: M * H].reshape(M, H * hd), qk[M * H :].reshape(M, G * hd)
        self.v, self.mixed = take(M, G * hd), take(M, H * hd)
        self.gate, self.up, self.silu_scratch = take(M, F), take(M, F), take(M, F)
        self.scores = arena[used:]

        self.q_heads, self.k_heads = self.q.reshape(M, H, hd), self.k.reshape(M, G, hd)
        self.v_heads = self.v.reshape(M, G, hd)
        # [M, H, hd] seen as [G, R, M, hd], as attention wants its queries and gives its result.
        self.q_groups = self.q.reshape(M, G, H // G, hd).transpose(1, 2, 0, 3)
        self.mixed_heads = self.mixed.reshape(M, G, H // G, hd).transpose(1, 2, 0, 3)
        # One token's queries and keys are neighbours in memory: one rotation does both.
        parts = [(M, H + G)] if M == 1 else [(M, H), (M, G)]
        self.rotated, start = [], 0
        for m, heads in parts:
            shape = (m, heads, 2, hd // 2)
            end = start + m * heads
            self.rotated.append((qk[start:end].reshape(shape), qk_scratch[start:end].reshape(shape)))
            start = end


class Transformer:
    """A Llama-shaped transformer over a weight source, with one KV cache.

    Laws: all large memory is reserved here (`scratch_nbytes` and the KV cache); a pass that fails leaves the KV
    cache as it was; two threads must not use it at once. Returned logits are new arrays. Infinities and NaNs reach the
    logits without a warning from numpy; whoever reads the logits checks them.
    """

    def __init__(self, source: WeightSource, max_positions: int) -> None:
        config = source.config
        self.config = config
        self.source = source
        self.kv_cache = KVCache(config, max_positions)
        self.block = prefill_block(config, max_positions)
        self._rope = rope_tables(config, max_positions)
        self._mask = causal_mask(self.block)
        self._arena = aligned_empty((self.block * _row_floats(config, max_positions),))
        self._activations: dict[int, _Activations] = {}

    def prefill(self, token_ids: Sequence[int]) -> Float32Array:
        """Compute a prompt block by block; return the logits `[V]` that follow its last token.

        Raises:
            RequestError: no tokens, an id out of range, or more than the KV cache has room for.
        """
        last: Float32Array = self._passes(token_ids, every_token=False)[0][0]
        return last

    def decode(self, token_ids: Sequence[int]) -> Float32Array:
        """Compute one or several further tokens; return the logits after each, `[M, V]`.

        Raises:
            RequestError: as `prefill`.
        """
        blocks = self._passes(token_ids, every_token=True)
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    # --8<-- [start:passes]
    def _passes(self, token_ids: Sequence[int], *, every_token: bool) -> list[Float32Array]:
        """Compute block after block, a pass each; return the logits of every block, or of the last token alone."""
        ids, length = self._checked(token_ids), self.kv_cache.length
        logits = []
        try:
            with np.errstate(all="ignore"):
                for start in range(0, len(ids), self.block):
                    with self.source.forward_pass() as weights:
                        a = self._forward(weights, ids[start : start + self.block])
                        if every_token:
                            logits.append(self._logits(weights, a.x, a.normed))
                        elif start + self.block >= len(ids):
                            logits.append(self._logits(weights, a.x[-1:], a.normed[-1:]))
        except BaseException:
            self.kv_cache.rewind(length)
            raise
        return logits

    # --8<-- [end:passes]

    def _checked(self, token_ids: Sequence[int]) -> IntArray:
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.ndim != 1 or not ids.size:
            raise RequestError("there are no tokens to compute: give at least one")
        if (largest := int(ids.max())) >= self.config.vocab_size or (largest := int(ids.min())) < 0:
            raise RequestError(f"token id {largest} is not in the vocabulary of 0 to {self.config.vocab_size - 1}")
        self.kv_cache.require_room(ids.size)
        return ids

    def _forward(self, weights: Weights, ids: IntArray) -> _Activations:
        """Run M tokens through every layer; the residual stream `x` `[M, D]` is not yet normed."""
        M, start = ids.size, self.kv_cache.length
        a = self._activations.get(M)
        if a is None:
            a = self._activations[M] = _Activations(self._arena, self.config, M)
        cos, sin = self._rope.cos[start : start + M], self._rope.sin[start : start + M]
        scores = a.scores[: self.config.num_attention_heads * M * (start + M)].reshape(
            self.config.num_key_value_heads, -1, M, start + M
        )
        mask = self._mask[:M, :M] if M > 1 else None
        np.copyto(a.x, weights.embed_tokens.rows(ids))
        for index, layer in enumerate(weights.layers):
            self._attend(index, layer, a, cos, sin, scores, mask)
            self._feed_forward(layer, a)
        self.kv_cache.advance(M)
        return a

    # --8<-- [start:attend]
    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        a: _Activations,
        cos: Float32Array,
        sin: Float32Array,
        scores: Float32Array,
        mask: Float32Array | None,
    ) -> None:
        """Add the attention half of a layer to the residual stream."""
        eps = self.config.rms_norm_eps
        rms_norm(a.x, layer.input_layernorm, eps, out=a.normed)
        layer.q_proj.matmul(a.normed, a.q)
        layer.k_proj.matmul(a.normed, a.k)
        layer.v_proj.matmul(a.normed, a.v)
        if layer.q_norm is not None and layer.k_norm is not None:
            rms_norm(a.q_heads, layer.q_norm, eps, out=a.q_heads)
            rms_norm(a.k_heads, layer.k_norm, eps, out=a.k_heads)
        for heads, scratch in a.rotated:
            rope(heads, cos, sin, scratch)
        keys, values = self.kv_cache.store(index, a.k_heads, a.v_heads)
        attention(a.q_groups, keys, values, scores, mask, out=a.mixed_heads)
        layer.o_proj.matmul(a.mixed, a.o)
        np.add(a.x, a.o, out=a.x)

    # --8<-- [end:attend]

    def _feed_forward(self, layer: LayerWeights, a: _Activations) -> None:
        """Add the feed-forward half of a layer to the residual stream."""
        rms_norm(a.x, layer.post_attention_layernorm, self.config.rms_norm_eps, out=a.normed)
        layer.gate_proj.matmul(a.normed, a.gate)
        layer.up_proj.matmul(a.normed, a.up)
        silu_multiply(a.gate, a.up, a.silu_scratch)
        layer.down_proj.matmul(a.gate, a.down)
        np.add(a.x, a.down, out=a.x)

    def _logits(self, weights: Weights, x: Float32Array, normed: Float32Array) -> Float32Array:
        """Return the logits `[M, V]` of `x` `[M, D]`, as a new array; `normed` is scratch."""
        rms_norm(x, weights.norm, self.config.rms_norm_eps, out=normed)
        return weights.lm_head.matmul(normed)
