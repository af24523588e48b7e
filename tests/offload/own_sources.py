"""Weight sources that somebody might write, for `pytest --source own_sources:Right`: some right, some wrong.

`Right` reads a layer's weights from the checkpoint when the layer is asked for. Each wrong one breaks one law, and has
its name from that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from refinfer.arrays import Float32Array, IntArray
from refinfer.errors import RefinferError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.weights import LayerWeights, Matrix


class OwnMatrix:
    """A matrix that is multiplied column by column of the result."""

    def __init__(self, weight: Float32Array, bias: Float32Array | None) -> None:
        self.weight = weight
        self.bias = np.zeros(len(weight), np.float32) if bias is None else bias
        self.shape = weight.shape[0], weight.shape[1]

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        y = np.empty((len(x), len(self.weight)), np.float32) if out is None else out
        np.matmul(x, self.weight.T, out=y)
        y += self.bias
        return y

    def rows(self, ids: IntArray) -> Float32Array:
        if ids.size and (ids.min() < 0 or ids.max() >= len(self.weight)):
            raise IndexError(f"there are {len(self.weight)} rows")
        return self.weight[ids]


class Right:
    """Keeps every law."""

    matrix_of: type[OwnMatrix] = OwnMatrix

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.config = config
        self._checkpoint = open_checkpoint(folder)
        self._shapes = config.tensor_shapes()
        self.embed_tokens: Matrix = self.matrix("model.embed_tokens")
        self.lm_head: Matrix = self.embed_tokens if config.tie_word_embeddings else self.matrix("lm_head")
        self.norm = self.tensor("model.norm.weight")
        self.is_closed = False

    def tensor(self, name: str) -> Float32Array:
        return self._checkpoint.float32(name, self._shapes[name]).copy()

    def matrix(self, name: str) -> OwnMatrix:
        bias = f"{name}.bias"
        return self.matrix_of(self.tensor(f"{name}.weight"), self.tensor(bias) if bias in self._shapes else None)

    def layer(self, i: int) -> LayerWeights:
        at = f"model.layers.{i}"
        return LayerWeights(
            q_proj=self.matrix(f"{at}.self_attn.q_proj"),
            k_proj=self.matrix(f"{at}.self_attn.k_proj"),
            v_proj=self.matrix(f"{at}.self_attn.v_proj"),
            o_proj=self.matrix(f"{at}.self_attn.o_proj"),
            gate_proj=self.matrix(f"{at}.mlp.gate_proj"),
            up_proj=self.matrix(f"{at}.mlp.up_proj"),
            down_proj=self.matrix(f"{at}.mlp.down_proj"),
            input_layernorm=self.tensor(f"{at}.input_layernorm.weight"),
            post_attention_layernorm=self.tensor(f"{at}.post_attention_layernorm.weight"),
            q_norm=self.tensor(f"{at}.self_attn.q_norm.weight") if self.config.qk_norm else None,
            k_norm=self.tensor(f"{at}.self_attn.k_norm.weight") if self.config.qk_norm else None,
        )

    def layers(self) -> Iterator[LayerWeights]:
        if self.is_closed:
            raise RefinferError("this source is closed")
        for i in range(self.config.num_hidden_layers):
            yield self.layer(i)

    def close(self) -> None:
        self.is_closed = True


class Rounded(Right):
    """Right too: it says that it rounds."""

    rounding = 2.0**-8

    def tensor(self, name: str) -> Float32Array:
        exact = super().tensor(name)
        return exact if exact.ndim == 1 else half(exact)


def half(w: Float32Array) -> Float32Array:
    """Return the nearest numbers with 8 bits of fraction."""
    scale = np.exp2(np.floor(np.log2(np.abs(w) + 1e-30)) - 7).astype(np.float32)
    rounded: Float32Array = np.round(w / scale) * scale
    return rounded


# What a matrix may do wrong.


class SilentlyRounded(Right):
    def tensor(self, name: str) -> Float32Array:
        exact = super().tensor(name)
        return exact if exact.ndim == 1 else half(exact)


class _WithoutBias(OwnMatrix):
    def __init__(self, weight: Float32Array, bias: Float32Array | None) -> None:
        super().__init__(weight, None)


class ForgetsBiases(Right):
    matrix_of = _WithoutBias


class _AddsToOut(OwnMatrix):
    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        y = np.zeros((len(x), len(self.weight)), np.float32) if out is None else out
        y += super().matmul(x)
        return y


class AddsToOut(Right):
    matrix_of = _AddsToOut


class _LeavesOut(OwnMatrix):
    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        return super().matmul(x)


class LeavesOutAlone(Right):
    matrix_of = _LeavesOut


class _OneResult(OwnMatrix):
    def __init__(self, weight: Float32Array, bias: Float32Array | None) -> None:
        super().__init__(weight, bias)
        self._result = np.empty((512, len(weight)), np.float32)

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        return super().matmul(x, self._result[: len(x)] if out is None else out)


class GivesTheSameResultAgain(Right):
    matrix_of = _OneResult


class _ScalesX(OwnMatrix):
    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        x *= np.float32(2)
        return super().matmul(x * np.float32(0.5), out)


class ScalesX(Right):
    matrix_of = _ScalesX


class _FewRows(OwnMatrix):
    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        y = super().matmul(x, out)
        y[64:] = 0
        return y


class MultipliesNoMoreThan64Rows(Right):
    matrix_of = _FewRows


class _Coarse(OwnMatrix):
    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        return super().matmul(x.astype(np.float16).astype(np.float32), out)


class RoundsX(Right):
    matrix_of = _Coarse


class _FromTheEnd(OwnMatrix):
    def rows(self, ids: IntArray) -> Float32Array:
        return self.weight[ids]


class CountsRowsFromTheEnd(Right):
    matrix_of = _FromTheEnd


class _SortedRows(OwnMatrix):
    def rows(self, ids: IntArray) -> Float32Array:
        return super().rows(np.unique(ids))


class ReadsEachRowOnce(Right):
    matrix_of = _SortedRows


class _Views(OwnMatrix):
    def rows(self, ids: IntArray) -> Float32Array:
        rows = super().rows(ids)
        return self.weight[ids[0] : ids[0] + 1] if len(ids) == 1 else rows


class GivesViewsOfRows(Right):
    matrix_of = _Views


# What a source may do wrong.


class SwapsGateAndUp(Right):
    def layer(self, i: int) -> LayerWeights:
        right = super().layer(i)
        return replace(right, gate_proj=right.up_proj, up_proj=right.gate_proj)


class SwapsNorms(Right):
    def layer(self, i: int) -> LayerWeights:
        right = super().layer(i)
        return replace(
            right, input_layernorm=right.post_attention_layernorm, post_attention_layernorm=right.input_layernorm
        )


class BeginsWithTheLastLayer(Right):
    def layer(self, i: int) -> LayerWeights:
        return super().layer(self.config.num_hidden_layers - 1 - i)


class LeavesOutALayer(Right):
    def layers(self) -> Iterator[LayerWeights]:
        return iter(list(super().layers())[:-1])


class WalksOnce(Right):
    def __init__(self, config: ModelConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self._walk = super().layers()

    def layers(self) -> Iterator[LayerWeights]:
        return self._walk


class GoesOnWhereAPassWasLeft(Right):
    next = 0

    def layers(self) -> Iterator[LayerWeights]:
        if self.is_closed:
            raise RefinferError("this source is closed")
        for _ in range(self.config.num_hidden_layers):
            i, self.next = self.next, (self.next + 1) % self.config.num_hidden_layers
            yield self.layer(i)


_everyones: dict[int, LayerWeights] = {}


class SharesLayersWithEveryOther(Right):
    def layer(self, i: int) -> LayerWeights:
        if i in _everyones and _everyones[i].q_proj.shape == super().layer(i).q_proj.shape:
            return _everyones[i]
        return _everyones.setdefault(i, super().layer(i))


class IsEmptyOnceClosed(Right):
    def layers(self) -> Iterator[LayerWeights]:
        return iter(()) if self.is_closed else super().layers()


class ClosesOnce(Right):
    def close(self) -> None:
        if self.is_closed:
            raise RefinferError("this source is closed already")
        super().close()


class LeavesAThread(Right):
    def __init__(self, config: ModelConfig, folder: Path) -> None:
        super().__init__(config, folder)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class LeavesADescriptor(Right):
    def __init__(self, config: ModelConfig, folder: Path) -> None:
        super().__init__(config, folder)
        os.open(folder / "config.json", os.O_RDONLY)
