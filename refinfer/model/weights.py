"""What the transformer asks of its weights, wherever they live: Protocols, and the plainest implementation.

Leaves to others: packing, files that hold packed weights, memory budgets; those rooms satisfy these Protocols from
outside, by having the right methods.
Read more: tutorial 07; clauses SOURCE-1 to SOURCE-6.

A pass computes one block of tokens:

    with source.forward_pass() as weights:       begins the pass
        weights.embed_tokens.rows(ids)           once
        for layer in weights.layers:             once, first to last; each matrix is multiplied once, in the order of
            ...                                  the fields of `LayerWeights`
        weights.lm_head.matmul(x)                at most once: not for all but the last block of a prompt
                                                 at the end of the `with` block, the source checks what it must

A layer is valid until the next one is asked for: that lets a source read weights from disk just ahead of their use. An
exception may end a pass at any point; then nothing is checked, and the next pass begins as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, IntArray, require_rows, stored_to_f32
from refinfer.errors import GenerationError, WeightsError
from refinfer.model.checkpoint import Checkpoint
from refinfer.model.config import ModelConfig

__all__ = [
    "LayerWeights",
    "Matrix",
    "RowMajorMatrix",
    "RowMajorSource",
    "RowTable",
    "StoredRowTable",
    "WeightSource",
    "Weights",
    "assemble",
    "require_layers",
    "still_open",
]


class RowTable(Protocol):
    """A matrix `[N, K]` of which single rows can be asked for, such as an embedding table."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        ...

    def rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as a new array `[len(ids), K]`; a row that does not exist is a named error."""
        ...


class Matrix(RowTable, Protocol):
    """A weight matrix `[N, K]`, with its bias if it has one."""

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        """Return `x @ W.T + bias`, `[M, K]` to `[M, N]`, written to `out` (contiguous) if it is given."""
        ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: its seven matrices under Hugging Face's names, in execution order, and its norms `[D]`, `[hd]`."""

    q_proj: Matrix
    k_proj: Matrix
    v_proj: Matrix
    o_proj: Matrix
    gate_proj: Matrix
    up_proj: Matrix
    down_proj: Matrix
    input_layernorm: Float32Array
    post_attention_layernorm: Float32Array
    q_norm: Float32Array | None = None
    k_norm: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one pass.

    The embedding table `[V, D]`, the layers in execution order, the last norm `[D]`, and the output table `[V, D]`,
    which is the embedding table if the two are tied.
    """

    embed_tokens: RowTable
    layers: Iterable[LayerWeights]
    norm: Float32Array
    lm_head: Matrix


# --8<-- [start:source]
class WeightSource(Protocol):
    """Gives a transformer its weights; where they are, and when they get there, is the source's own business."""

    @property
    def config(self) -> ModelConfig:
        """The sizes and switches of the model."""
        ...

    def forward_pass(self) -> AbstractContextManager[Weights]:
        """Begin a pass, and check what must be checked when its block ends without an exception.

        See the head of this module for what happens in between.
        """
        ...

    def close(self) -> None:
        """Release what the source keeps; a pass that begins later is a named error. Closing again is allowed."""
        ...


# --8<-- [end:source]


class RowMajorMatrix:
    """A float32 matrix `[N, K]` as it lies in a checkpoint, multiplied by numpy as a whole."""

    def __init__(self, weight: Float32Array, bias: Float32Array | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._transposed = weight.T  # made once: a view costs as much as a small matmul

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        n, k = self.weight.shape
        return n, k

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        """Return `x @ W.T + bias`; reads each weight once."""
        # The same BLAS call as np.matmul, half a microsecond sooner: of a small model that is a tenth of its time.
        y: Float32Array = x.dot(self._transposed, out)
        if self.bias is not None:
            np.add(y, self.bias, out=y)
        return y

    def rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as a copy `[len(ids), K]`."""
        require_rows(ids, len(self.weight))
        return self.weight[ids]


class StoredRowTable:
    """An embedding table left as it is stored; a row is converted to float32 when it is asked for."""

    def __init__(self, stored: npt.NDArray[Any]) -> None:
        self._stored = stored

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        n, k = self._stored.shape
        return n, k

    def rows(self, ids: IntArray) -> Float32Array:
        """Return the rows `ids` as float32 `[len(ids), K]`."""
        require_rows(ids, len(self._stored))
        return stored_to_f32(self._stored[ids])


class RowMajorSource:
    """All weights of a checkpoint as row-major float32: the simplest source, which every other is compared with.

    float32 tensors stay views of the file; float16 and bfloat16 ones are converted once, here. An untied embedding
    table is left as stored. `widen` turns a stored matrix into float32; another than the default gives
    the weights that some packed format would compute with.

    Raises:
        WeightsError: a tensor that the config asks for is missing, or has another shape or type.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        widen: Callable[[npt.NDArray[Any]], Float32Array] = stored_to_f32,
    ) -> None:
        require_layers(config, checkpoint)
        shapes = config.tensor_shapes()

        def stored(name: str) -> npt.NDArray[Any]:
            return checkpoint.stored(name, shapes[name])

        def vector(name: str) -> Float32Array:
            # Norms and biases are tiny and used for each token: their own memory, not a page of the file.
            return checkpoint.float32(name, shapes[name]).copy()

        self.config = config
        self._weights: Weights | None = assemble(
            config,
            matrix=lambda name, bias: RowMajorMatrix(widen(stored(name)), bias),
            table=lambda name: StoredRowTable(stored(name)),
            vector=vector,
        )

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        """Give the weights; nothing has to be checked.

        Raises:
            GenerationError: the source is closed.
        """
        yield still_open(self._weights)

    def close(self) -> None:
        """Release the weights: the arrays go with the last reference to them."""
        self._weights = None


def still_open(weights: Weights | None) -> Weights:
    """Return the weights of a source, which are None once it is closed.

    Raises:
        GenerationError: it is closed.
    """
    if weights is None:
        raise GenerationError("the weights are closed; load the model again")
    return weights


def require_layers(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint can have as many layers as its config claims, before anything of that length is made.

    Raises:
        WeightsError: the checkpoint has fewer tensors, or not those of the first layer.
    """
    least = config.num_hidden_layers * len(config.layer_shapes())
    if least > len(checkpoint):
        for name, shape in config.layer_shapes().items():
            checkpoint.require(f"model.layers.0.{name}", shape)  # its message says more
        raise WeightsError(
            f"{checkpoint.folder} has {len(checkpoint)} tensors, but its config.json asks for "
            f"{config.num_hidden_layers} layers, which take {least}"
        )


def assemble(
    config: ModelConfig,
    *,
    matrix: Callable[[str, Float32Array | None], Matrix],
    table: Callable[[str], RowTable],
    vector: Callable[[str], Float32Array],
) -> Weights:
    """Put the weights of a model together, in execution order.

    `matrix` makes a matrix from a tensor's name and its bias, `table` an untied embedding table, `vector` a norm or a
    bias.
    """
    shapes = config.tensor_shapes()

    def biased(name: str) -> Matrix:
        bias = f"{name}.bias"
        return matrix(f"{name}.weight", vector(bias) if bias in shapes else None)

    def layer(prefix: str) -> LayerWeights:
        return LayerWeights(
            q_proj=biased(f"{prefix}.self_attn.q_proj"),
            k_proj=biased(f"{prefix}.self_attn.k_proj"),
            v_proj=biased(f"{prefix}.self_attn.v_proj"),
            o_proj=biased(f"{prefix}.self_attn.o_proj"),
            gate_proj=biased(f"{prefix}.mlp.gate_proj"),
            up_proj=biased(f"{prefix}.mlp.up_proj"),
            down_proj=biased(f"{prefix}.mlp.down_proj"),
            input_layernorm=vector(f"{prefix}.input_layernorm.weight"),
            post_attention_layernorm=vector(f"{prefix}.post_attention_layernorm.weight"),
            q_norm=vector(f"{prefix}.self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=vector(f"{prefix}.self_attn.k_norm.weight") if config.qk_norm else None,
        )

    embedding = "model.embed_tokens.weight"
    tied = matrix(embedding, None) if config.tie_word_embeddings else None
    embed_tokens: RowTable = tied or table(embedding)
    layers = tuple(layer(f"model.layers.{i}") for i in range(config.num_hidden_layers))
    norm = vector("model.norm.weight")
    return Weights(embed_tokens, layers, norm, tied or matrix("lm_head.weight", None))
