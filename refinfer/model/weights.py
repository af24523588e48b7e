"""The seam between the transformer and wherever its weights live: three Protocols, and the plainest implementation.

Knows: what a weight source must give, in which order and for how long. Does not know: packing, files that hold packed
weights, memory budgets; those rooms satisfy these Protocols from outside, by having the right methods.
Spec: SOURCE-1 to SOURCE-6. Tutorial: 07.

Laws of one pass (one block of tokens in `Transformer.prefill` or `decode`):

1. `embed_tokens.rows(ids)` comes first.
2. Then `layers()` is walked once, from the first layer to the last. In each layer every matrix is multiplied exactly
   once, in the order of the fields of `LayerWeights`.
3. A layer is valid until the next one is asked for. What it was made of may be gone afterwards.
4. `norm` and one multiplication by `lm_head` end the pass, or nothing does (all blocks of a prompt but the last);
   the next pass starts again at 1.
5. A pass may be left at any point (an error, Ctrl-C); the next one starts at 1 all the same.

These laws are what lets a source read weights from disk just ahead of their use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    "assemble",
    "require_layers",
    "walk",
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
    """A weight matrix `[N, K]`, with its bias where it has one."""

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        """Return `x @ W.T + bias`, `[M, K]` to `[M, N]`, written to `out` (contiguous) where it is given."""
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


# --8<-- [start:source]
class WeightSource(Protocol):
    """Gives a transformer its weights; where they are, and when they get there, is the source's own business."""

    @property
    def config(self) -> ModelConfig:
        """What model these are the weights of."""
        ...

    @property
    def embed_tokens(self) -> RowTable:
        """The embedding table `[V, D]`."""
        ...

    @property
    def norm(self) -> Float32Array:
        """The weight `[D]` of the last norm."""
        ...

    @property
    def lm_head(self) -> Matrix:
        """The output table `[V, D]`; the same weights as `embed_tokens` where they are tied."""
        ...

    def layers(self) -> Iterator[LayerWeights]:
        """Walk over the layers in execution order; see the laws at the head of this module."""
        ...

    def close(self) -> None:
        """Release what the source holds; whoever asks for its layers then gets a named error. Again is allowed."""
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
    """All weights of a checkpoint as row-major float32: the simplest source, and the oracle for every other.

    float32 tensors stay views of the file; float16 and bfloat16 ones are converted once, here. An untied embedding
    table is left as stored. `widen` turns a matrix as stored into float32; another one than the default gives the
    weights that some packed format would compute with.

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
        self.embed_tokens, self._layers, self.norm, self.lm_head = assemble(
            config,
            matrix=lambda name, bias: RowMajorMatrix(widen(stored(name)), bias),
            table=lambda name: StoredRowTable(stored(name)),
            vector=vector,
        )

    def layers(self) -> Iterator[LayerWeights]:
        """Walk over the layers in execution order."""
        return walk(self._layers)

    def close(self) -> None:
        """Let go of the layers: the arrays go with the last reference to them."""
        self._layers = ()


def walk(layers: tuple[LayerWeights, ...]) -> Iterator[LayerWeights]:
    """Walk over the layers of a source, which has none once it is closed.

    Raises:
        GenerationError: it is closed.
    """
    if not layers:
        raise GenerationError("the weights are closed; load the model again")
    return iter(layers)


def require_layers(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Check, before anything as long as a lying config says is made, that there may be so many layers.

    Raises:
        WeightsError: the checkpoint has fewer tensors.
    """
    least = config.num_hidden_layers * len(config.layer_shapes())
    if least > len(checkpoint):
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
) -> tuple[RowTable, tuple[LayerWeights, ...], Float32Array, Matrix]:
    """Return all parts of a source: the embedding table, the layers, the last norm, the output table.

    `matrix` makes a matrix of a tensor's name and its bias, `table` an untied embedding table, `vector` a norm or a
    bias; they are asked in execution order.
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
    return embed_tokens, layers, norm, tied or matrix("lm_head.weight", None)
