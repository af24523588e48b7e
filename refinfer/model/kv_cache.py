"""The KV cache: keys and values of the positions seen so far, reserved up front.

Knows: how keys and values lie in memory. Does not know: how they are computed, which tokens they came from.
Spec: KV-1 to KV-4. Tutorial: 07.

    keys    [L, G, hd, S]   transposed: scores are `q @ keys`, a product along S
    values  [L, G, S, hd]
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

    Laws: memory is reserved once, here. `length` positions are filled in every layer. A forward pass writes behind
    them, layer by layer, with `store`, and only then makes them count with `advance`: a pass that is broken off
    leaves the cache as it was. `rewind` forgets the latest positions; their memory is overwritten by later ones.
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
        """Write M new positions of one layer behind the filled ones; return all of that layer's.

        Args:
            layer: which layer.
            keys: `[M, G, hd]`.
            values: `[M, G, hd]`.

        Returns:
            Views of the keys `[G, 1, hd, P]` and values `[G, 1, P, hd]`, where `P = length + M`.
        """
        start, end = self._length, self._length + keys.shape[0]
        all_keys, all_values = self._keys[layer], self._values[layer]
        all_keys[:, 0, :, start:end] = keys.transpose(1, 2, 0)
        all_values[:, 0, start:end] = values.transpose(1, 0, 2)
        return all_keys[..., :end], all_values[:, :, :end]

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
        """Make the `n` positions just stored in every layer count."""
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
        """Walk every invariant; raises AssertionError where one is broken. For tests."""
        assert 0 <= self._length <= self.max_positions
        assert all(np.isfinite(k[..., : self._length]).all() for k in self._keys)
        assert all(np.isfinite(v[:, :, : self._length]).all() for v in self._values)
