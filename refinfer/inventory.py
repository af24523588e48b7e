"""What a model's cache file holds, and the order in which a token uses it, from config and weight format alone.

No weights are needed. Leaves to others: where buffers lie in the file, budgets.
Read more: tutorial 09; clauses OFFLOAD-1, OFFLOAD-2.

The numbers of a token are multiplied with every matrix once. The chunks of all matrices in that order are the cycle;
the next token goes through it again:

    each layer      attention: q_proj, k_proj, v_proj, o_proj; feed-forward part (FFN): gate_proj, up_proj, down_proj
    output table    lm_head, a row for each token of the vocabulary: how likely that token is the next one

Two things are outside the cycle. The embedding table has the numbers that a token begins with, and one row of it is
read for each token; tied, it is the output table too. Norms and biases are short vectors, kept as one block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refinfer.arrays import IntArray, whole_pages
from refinfer.model.config import ModelConfig
from refinfer.packing.formats import layout_of
from refinfer.packing.layout import PackedLayout

__all__ = ["CycleChunk", "Inventory", "InventoryMatrix"]

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class InventoryMatrix:
    """A packed matrix: its tensor's name, its layer, its kind (`q_proj`, ..., `lm_head`), its layout.

    The output table counts as a layer after the last one.
    """

    name: str
    layer: int
    kind: str
    layout: PackedLayout


@dataclass(frozen=True, slots=True)
class CycleChunk:
    """A chunk of the cycle: it is chunk `index` of `Inventory.matrices[matrix]`; its bytes are those of whole pages."""

    matrix: int
    index: int
    layer: int
    kind: str
    padded_nbytes: int


@dataclass(frozen=True)
class Inventory:
    """The buffers of one model in one format; `chunk_nbytes` is the size aimed at for a chunk, None the usual one."""

    config: ModelConfig
    format: str
    chunk_nbytes: int | None = None

    @cached_property
    def layouts(self) -> dict[str, PackedLayout]:
        """How each kind of matrix is packed, the same in every layer, in execution order; the output table last."""
        config = self.config
        shapes = {_kind_of(name): shape for name, shape in config.layer_shapes().items() if len(shape) == 2}
        shapes["lm_head"] = config.vocab_size, config.hidden_size
        return {kind: layout_of(self.format, N, K, self.chunk_nbytes) for kind, (N, K) in shapes.items()}

    @cached_property
    def matrices(self) -> tuple[InventoryMatrix, ...]:
        """Every matrix that is multiplied, in execution order; the output table, tied or not, is the last."""
        return tuple(self._matrices())

    def _matrices(self) -> Iterator[InventoryMatrix]:
        config = self.config
        names = [name for name, shape in config.layer_shapes().items() if len(shape) == 2]
        for layer in range(config.num_hidden_layers):
            for name in names:
                kind = _kind_of(name)
                yield InventoryMatrix(f"model.layers.{layer}.{name}", layer, kind, self.layouts[kind])
        output = _EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
        yield InventoryMatrix(output, config.num_hidden_layers, "lm_head", self.layouts["lm_head"])

    @cached_property
    def cycle(self) -> tuple[CycleChunk, ...]:
        """Every chunk of every matrix, in the order in which one token uses them."""
        return tuple(
            CycleChunk(number, index, matrix.layer, matrix.kind, chunk.padded_nbytes)
            for number, matrix in enumerate(self.matrices)
            for index, chunk in enumerate(matrix.layout.chunks)
        )

    @cached_property
    def sizes(self) -> IntArray:
        """The bytes of every chunk of the cycle, in whole pages."""
        sizes = {
            kind: np.array([chunk.padded_nbytes for chunk in layout.chunks], np.int64)
            for kind, layout in self.layouts.items()
        }
        return np.concatenate([sizes[matrix.kind] for matrix in self.matrices])

    @cached_property
    def different_sizes(self) -> tuple[int, ...]:
        """The bytes that a chunk may have, the least first."""
        return tuple(np.unique(self.sizes).tolist())

    @cached_property
    def chunks_of_matrix(self) -> tuple[IntArray, ...]:
        """The numbers of the chunks of each matrix."""
        ends = np.cumsum([len(matrix.layout.chunks) for matrix in self.matrices])
        return tuple(np.split(np.arange(ends[-1]), ends[:-1]))

    @cached_property
    def chunks_of_kind(self) -> dict[str, IntArray]:
        """The numbers of the chunks of each kind of matrix, in the order of the cycle."""
        numbers: dict[str, list[IntArray]] = {}
        for matrix, of_matrix in zip(self.matrices, self.chunks_of_matrix, strict=True):
            numbers.setdefault(matrix.kind, []).append(of_matrix)
        return {kind: np.concatenate(of_kind) for kind, of_kind in numbers.items()}

    @cached_property
    def kind_sizes(self) -> dict[str, int]:
        """The packed bytes of one matrix of each kind in a layer, in execution order; the output table last."""
        return {kind: layout.padded_nbytes for kind, layout in self.layouts.items()}

    @cached_property
    def vectors(self) -> dict[str, int]:
        """Norms and biases: their names and sizes, in execution order."""
        return {name: shape[0] for name, shape in self.config.tensor_shapes().items() if len(shape) == 1}

    @property
    def vectors_name(self) -> str:
        """The name of the block of all vectors; it changes with their names and sizes."""
        listed = "\n".join(f"{name} {n}" for name, n in self.vectors.items())
        return f"{len(self.vectors)} vectors {hashlib.sha256(listed.encode()).hexdigest()[:16]}"

    @property
    def table(self) -> str | None:
        """The name of the embedding table, or None if it is the output table too."""
        return None if self.config.tie_word_embeddings else _EMBEDDING

    @property
    def streamable_nbytes(self) -> int:
        """The packed bytes of all matrices, which one token uses once; a budget of 60% is 60% of them."""
        return int(self.sizes.sum())

    @property
    def resident_nbytes(self) -> int:
        """The bytes of the block of vectors, in whole pages; it stays in memory under every plan."""
        return whole_pages(4 * sum(self.vectors.values()))


def _kind_of(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
