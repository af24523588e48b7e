"""Weight sources that somebody might write, for `pytest --source own_sources:Right`: some right, some wrong.

`Right` reads a layer's weights from the checkpoint when the layer is asked for. Each wrong one breaks one law, and has
its name from that.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from refinfer.arrays import Float32Array, IntArray
from refinfer.errors import RefinferError
from refinfer.model.checkpoint import Checkpoint, open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.weights import LayerWeights, Weights


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
        self._checkpoint: Checkpoint | None = open_checkpoint(folder)
        self._shapes = config.tensor_shapes()
        self.embed_tokens = self.matrix("model.embed_tokens")
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else self.matrix("lm_head")
        self.norm = self.tensor("model.norm.weight")
        self.is_closed = False

    def tensor(self, name: str) -> Float32Array:
        assert self._checkpoint is not None
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
        for i in range(self.config.num_hidden_layers):
            yield self.layer(i)

    def weights(self) -> Weights:
        return Weights(self.embed_tokens, self.layers(), self.norm, self.lm_head)

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        if self.is_closed:
            raise RefinferError("this source is closed")
        yield self.weights()

    def close(self) -> None:
        self.is_closed, self._checkpoint = True, None


class Rounded(Right):
    """Right too: it says that it rounds."""

    rounding = 2.0**-8

    def tensor(self, name: str) -> Float32Array:
        exact = super().tensor(name)
        return exact if exact.ndim == 1 else half(exact)


class Checked(Right):
    """Right too: it finds what is written to its weights during a pass. `damage` writes there, and again undoes it."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self._checksum = zlib.crc32(self.norm.data)

    def damage(self) -> None:
        self.norm.view(np.uint32)[0] ^= 1

    def check(self) -> None:
        if zlib.crc32(self.norm.data) != self._checksum:
            raise RefinferError("somebody wrote to the weights")

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        with super().forward_pass() as weights:
            yield weights
        self.check()


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


# What a layer may have wrong.


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


# What a pass may do wrong.


class WalksOnce(Right):
    def __init__(self, config: ModelConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self._walk = super().layers()

    def layers(self) -> Iterator[LayerWeights]:
        return self._walk


class GoesOnWhereAPassWasLeft(Right):
    next = 0

    def layers(self) -> Iterator[LayerWeights]:
        for _ in range(self.config.num_hidden_layers):
            i, self.next = self.next, (self.next + 1) % self.config.num_hidden_layers
            yield self.layer(i)


class GivesTheLayersThatTheFirstPassSaw(Right):
    def __init__(self, config: ModelConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self._seen: list[LayerWeights] = []

    def layers(self) -> Iterator[LayerWeights]:
        if self._seen:
            yield from self._seen
            return
        for layer in super().layers():
            self._seen.append(layer)
            yield layer


class StaysInAPassThatWasLeft(Right):
    in_a_pass = False

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        if self.in_a_pass:
            raise RefinferError("the pass before has not ended")
        with super().forward_pass() as weights:
            self.in_a_pass = True
            yield weights
            self.in_a_pass = False


class SwallowsWhatIsRaised(Right):
    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        with super().forward_pass() as weights, suppress(Exception):
            yield weights


class RaisesAnotherError(Right):
    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        with super().forward_pass() as weights:
            try:
                yield weights
            except BaseException as error:
                raise RefinferError("the pass was left") from error


class _Noted(OwnMatrix):
    is_used = False

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        self.is_used = True
        return super().matmul(x, out)


class WantsTheOutputTableUsed(Right):
    matrix_of = _Noted

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        self.lm_head = self.matrix("model.embed_tokens" if self.config.tie_word_embeddings else "lm_head")
        with super().forward_pass() as weights:
            yield weights
        if isinstance(self.lm_head, _Noted) and not self.lm_head.is_used:
            raise RefinferError("the pass ended early")


class ChecksAPassThatIsLeft(Checked):
    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        with super().forward_pass() as weights:
            try:
                yield weights
            finally:
                self.check()


class ChecksBeforeAPassAlone(Checked):
    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        self.check()
        with Right.forward_pass(self) as weights:
            yield weights


# What a source may do wrong.


_everyones: dict[int, LayerWeights] = {}


class SharesLayersWithEveryOther(Right):
    def layer(self, i: int) -> LayerWeights:
        if i in _everyones and _everyones[i].q_proj.shape == super().layer(i).q_proj.shape:
            return _everyones[i]
        return _everyones.setdefault(i, super().layer(i))


class IsEmptyOnceClosed(Right):
    def weights(self) -> Weights:
        return replace(super().weights(), layers=()) if self.is_closed else super().weights()

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        yield self.weights()


class WorksOnceClosed(Right):
    def close(self) -> None:
        """Do nothing."""


class IsClosedFromTheFirstLayerOn(Right):
    def layers(self) -> Iterator[LayerWeights]:
        if self.is_closed:
            raise RefinferError("this source is closed")
        yield from super().layers()

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        yield self.weights()


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
