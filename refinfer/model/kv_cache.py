"""The KV cache: keys and values of the positions seen so far, reserved up front.

Decides how keys and values lie in memory. Leaves to others: how they are computed, which tokens they came from.
Read more: tutorial 07; clauses KV-1 to KV-4.

A position is the place of a token in the text. Attention compares a token's query with the keys of all positions so
far, and mixes their values by these scores; kept here, they are not computed again for each token.

    keys    [L, G, hd, S]   transposed: one product `q @ keys` gives the scores of all positions
    values  [L, G, S, hd]

L layers, G heads, hd numbers for each head, S positions. The arrays have a 1 after G: there numpy repeats keys and
values for the query heads that share them.
"""

from __future__ import annotations

import numpy as np

from refinfer.arrays import Float32Array, aligned_empty
from refinfer.errors import RequestError
from refinfer.model.config import ModelConfig

__all__ = ["KVCache", "kv_cache_nbytes"]


def kv_cache_nbytes(config: ModelConfig, max_positions: int) -> int:
    """Return the bytes that a KV cache for `max_positions` reserves."""
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return per_position * max_positions


class KVCache:
    """Keys and values for up to `max_positions` tokens of one text.

    Laws: memory is reserved once, here. `length` positions are filled in every layer. A pass (one block of tokens
    through all layers) writes new positions after them with `store`, layer by layer; `advance` counts them at its end.
    So a pass that fails leaves the cache as it was. `rewind` forgets the latest positions; later ones overwrite them.
    """

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        L, G, hd, S = config.num_hidden_layers, config.num_key_value_heads, config.head_dim, max_positions
        self.max_positions = max_positions
        self._length = 0
        keys, values = aligned_empty((L, G, 1, hd, S)), aligned_empty((L, G, 1, S, hd))
        self._keys, self._values = tuple(keys), tuple(values)
        self.nbytes = keys.nbytes + values.nbytes

    @property
    def length(self) -> int:
        """The number of positions filled."""
        return self._length

    def store(self, layer: int, keys: Float32Array, values: Float32Array) -> tuple[Float32Array, Float32Array]:
        """Write M new positions of one layer after the filled ones; return all positions of that layer.

        The length stays as it is: every layer stores at the same place, and `advance` counts at the end of the pass.

        Args:
            layer: which layer.
            keys: `[M, G, hd]`.
            values: `[M, G, hd]`.

        Returns:
            Views of the keys `[G, 1, hd, P]` and values `[G, 1, P, hd]`, with `P = length + M`.
        """
        # lab 01: write the new positions after the filled ones, and return views of all
        start, end = self._length, self._length + keys.shape[0]
        all_keys, all_values = self._keys[layer], self._values[layer]
        all_keys[:, 0, :, start:end] = keys.transpose(1, 2, 0)
        all_values[:, 0, start:end] = values.transpose(1, 0, 2)
        return all_keys[..., :end], all_values[:, :, :end]
        # end lab

    def require_room(self, n: int) -> None:
        """Check that `n` more positions fit.

        Raises:
            RequestError: they do not.
        """
        if self._length + n > self.max_positions:
            raise RequestError(
                f"{n} more tokens do not fit: {self._length} of {self.max_positions} reserved positions are in use"
            )

    def advance(self, n: int) -> None:
        """Count the `n` positions just stored in every layer as filled."""
        self.require_room(n)
        self._length += n

    def rewind(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            RequestError: `length` is negative or more than is filled.
        """
        if not 0 <= length <= self._length:
            raise RequestError(f"cannot rewind to {length} positions: {self._length} are filled")
        self._length = length

    def check(self) -> None:
        """Check every invariant; raises AssertionError if one is broken. For tests."""
        assert 0 <= self._length <= self.max_positions
        assert all(np.isfinite(k[..., : self._length]).all() for k in self._keys)
        assert all(np.isfinite(v[:, :, : self._length]).all() for v in self._values)
