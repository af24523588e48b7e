"""The seam to the weights: what a matrix answers, and the laws of a pass."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from refinfer.arrays import Float32Array, IntArray
from refinfer.errors import GenerationError, RequestError, WeightsError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.config_json import load_config
from refinfer.model.safetensors import SafetensorsFile, TensorSpec, write_safetensors
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer
from refinfer.model.weights import (
    LayerWeights,
    Matrix,
    RowMajorMatrix,
    RowMajorSource,
    RowTable,
    StoredRowTable,
    Weights,
    WeightSource,
)

SIX = np.array([[1, 2], [3, 4], [5, 6]])


def normal(*shape: int) -> Float32Array:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.spec("SOURCE-1")
@pytest.mark.parametrize("bias", [None, normal(5)], ids=["no bias", "bias"])
def test_a_matrix_multiplies_and_adds_its_bias(bias: Float32Array | None) -> None:
    w, x = normal(5, 7), normal(3, 7)
    expected = x @ w.T + (0 if bias is None else bias)
    out = np.empty((3, 5), np.float32)
    matrix = RowMajorMatrix(w, bias)
    assert matrix.matmul(x, out) is out
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_array_equal(matrix.matmul(x), out)
    assert matrix.shape == (5, 7)


@pytest.mark.spec("SOURCE-1")
@pytest.mark.parametrize(
    "table",
    [
        RowMajorMatrix(SIX.astype(np.float32)),
        StoredRowTable(SIX.astype(np.float32)),
        StoredRowTable(SIX.astype(np.float16)),
        StoredRowTable((SIX.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)),
    ],
    ids=["float32 matrix", "float32", "float16", "bfloat16"],
)
def test_rows_are_given_as_float32_copies(table: RowTable) -> None:
    rows = table.rows(np.array([2, 0, 2]))
    assert rows.dtype == np.float32
    assert rows.tolist() == [[5, 6], [1, 2], [5, 6]]
    rows[:] = 0
    assert table.rows(np.array([2])).tolist() == [[5, 6]]
    assert table.shape == (3, 2)


@dataclass
class Recorded:
    """A matrix that writes down its uses."""

    inner: Matrix
    name: str
    log: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def matmul(self, x: Float32Array, out: Float32Array | None = None) -> Float32Array:
        self.log.append(self.name)
        return self.inner.matmul(x, out)

    def rows(self, ids: IntArray) -> Float32Array:
        self.log.append(f"{self.name}.rows")
        return self.inner.rows(ids)


class RecordingSource:
    """A source that writes down every use, and takes each layer away when the next one is asked for."""

    def __init__(self, inner: RowMajorSource) -> None:
        self.inner = inner
        self.log: list[str] = []
        self.config: ModelConfig = inner.config

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        self.log.append("begin")
        with self.inner.forward_pass() as weights:
            yield Weights(
                Recorded(cast("Matrix", weights.embed_tokens), "embed_tokens", self.log),
                self.layers(weights.layers),
                weights.norm,
                Recorded(weights.lm_head, "lm_head", self.log),
            )
        self.log.append("end")

    def layers(self, layers: Iterable[LayerWeights]) -> Iterator[LayerWeights]:
        for i, layer in enumerate(layers):
            matrices: dict[str, Any] = {
                name: Recorded(getattr(layer, name), f"{i}.{name}", self.log)
                for name in (f.name for f in fields(LayerWeights))
                if name.endswith("_proj")
            }
            yield replace(layer, **matrices)
            for matrix in matrices.values():
                del matrix.inner

    def close(self) -> None:
        self.inner.close()


@pytest.mark.spec("SOURCE-1")
def test_a_stored_table_converts_the_rows_it_is_asked_for_and_no_others() -> None:
    table = StoredRowTable(np.zeros((50_000, 8), np.uint16))
    tracemalloc.start()
    try:
        table.rows(np.array([7]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000


@pytest.mark.spec("TENSOR-5", "TENSOR-11")
def test_a_config_that_lies_about_its_layers_is_refused_before_anything_is_made(
    tiny_config: ModelConfig, tiny_folder: Path
) -> None:
    lying = replace(tiny_config, num_hidden_layers=2**31 - 1)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match="asks for 2147483647 layers"):
            RowMajorSource(lying, open_checkpoint(tiny_folder))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.spec("TENSOR-11")
def test_a_checkpoint_of_fewer_layers_is_refused_by_their_number(tiny_config: ModelConfig, tiny_folder: Path) -> None:
    checkpoint, n_layers = open_checkpoint(tiny_folder), 2 * tiny_config.num_hidden_layers
    with pytest.raises(WeightsError, match=f"has {len(checkpoint)} tensors, but .* asks for {n_layers} layers"):
        RowMajorSource(replace(tiny_config, num_hidden_layers=n_layers), checkpoint)


@pytest.mark.spec("TENSOR-11")
def test_a_checkpoint_of_nothing_but_layers_is_refused_by_what_is_missing(
    tiny_config: ModelConfig, tiny_folder: Path, tmp_path: Path
) -> None:
    file = SafetensorsFile(tiny_folder / "model.safetensors")
    in_layers = [name for name in file if ".layers." in name]
    specs = [TensorSpec(name, file[name].dtype, file[name].shape, [file.view(name)]) for name in in_layers]
    write_safetensors(tmp_path / "model.safetensors", specs)
    with pytest.raises(WeightsError, match=r"has no tensor 'model\.embed_tokens\.weight'"):
        RowMajorSource(tiny_config, open_checkpoint(tmp_path))


@pytest.mark.spec("CONFIG-1")
@pytest.mark.parametrize("switches", [(), ("qk_norm",), ("qkv_bias", "o_bias", "mlp_bias")], ids=str)
def test_a_layer_has_the_tensors_of_its_config_in_their_places(
    tiny_config: ModelConfig, tmp_path: Path, switches: tuple[str, ...]
) -> None:
    config = replace(tiny_config, **cast("Any", dict.fromkeys(switches, True)))
    write_checkpoint(tmp_path, config, dtype="f32")
    checkpoint = open_checkpoint(tmp_path)
    with RowMajorSource(config, checkpoint).forward_pass() as weights:
        layers = list(weights.layers)
    assert len(layers) == config.num_hidden_layers
    for i, layer in enumerate(layers):
        for name, shape in config.layer_shapes().items():
            part, kind = name.split(".")[-2:]
            held = getattr(layer, part)
            array = getattr(held, kind) if isinstance(held, RowMajorMatrix) else held
            np.testing.assert_array_equal(array, checkpoint.float32(f"model.layers.{i}.{name}", shape))
        parts = {name.split(".")[-2] for name in config.layer_shapes()}
        assert {field.name for field in fields(LayerWeights) if getattr(layer, field.name) is not None} == parts


@pytest.mark.spec("SOURCE-2")
@pytest.mark.parametrize("n_tokens", [1, 5], ids=["one token", "five tokens"])
def test_a_pass_begins_uses_every_matrix_once_in_execution_order_and_ends(
    tiny_source: RowMajorSource, n_tokens: int
) -> None:
    source = RecordingSource(tiny_source)
    as_source: WeightSource = source
    Transformer(as_source, 96).decode(list(range(n_tokens)))
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = [f"{i}.{name}" for i in range(source.config.num_hidden_layers) for name in order]
    assert source.log == ["begin", "embed_tokens.rows", *layers, "lm_head", "end"]


@pytest.mark.spec("SOURCE-2")
def test_a_prompt_of_several_blocks_takes_a_pass_for_each_and_needs_lm_head_once(tiny_source: RowMajorSource) -> None:
    source = RecordingSource(tiny_source)
    transformer = Transformer(source, 96)
    transformer.prefill(list(range(2 * transformer.block + 1)))
    outside_the_layers = [use for use in source.log if "_proj" not in use]
    block = ["begin", "embed_tokens.rows", "end"]
    assert outside_the_layers == [*block, *block, *block[:2], "lm_head", "end"]
    assert source.log.count("2.down_proj") == 3


@pytest.mark.spec("SOURCE-2")
@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([], "there are no tokens to compute"),
        ([261], "token id 261 is not in the vocabulary of 0 to 260"),
        ([-1], "token id -1 is not in the vocabulary of 0 to 260"),
        (list(range(97)), "97 more tokens do not fit"),
    ],
    ids=["none", "too large", "negative", "too many"],
)
def test_impossible_tokens_begin_no_pass(tiny_source: RowMajorSource, ids: list[int], why: str) -> None:
    source = RecordingSource(tiny_source)
    for compute in (Transformer(source, 96).decode, Transformer(source, 96).prefill):
        with pytest.raises(RequestError, match=why):
            compute(ids)
    assert source.log == []


def logits_of(folder: Path) -> Float32Array:
    config = load_config(folder)
    return Transformer(RowMajorSource(config, open_checkpoint(folder)), 24).decode(list(range(24)))


@pytest.mark.spec("SOURCE-3")
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_stored_type_changes_no_logit_where_the_values_are_the_same(
    dtype: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Every weight is rounded to the 8 bits of fraction and the range that all three types share."""
    file = SafetensorsFile(tiny_folder / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    results = []
    for name in ("F32", dtype):
        specs = []
        for tensor in file:
            values = (file.view(tensor).view(np.uint32) & 0xFFFF0000).view(np.float32)
            values = np.where(np.abs(values) < 2**-13, np.float32(0), values)
            stored = {"F32": values, "F16": values.astype("f2"), "BF16": (values.view(np.uint32) >> 16).astype("u2")}
            specs.append(TensorSpec(tensor, name, values.shape, [stored[name]]))
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        write_safetensors(tmp_path / "model.safetensors", specs)
        results.append(logits_of(tmp_path))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.spec("SOURCE-3", "TENSOR-9")
def test_sharding_changes_no_logit(tiny_config: ModelConfig, tiny_folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config, dtype="f32", seed=3, shard_nbytes=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    np.testing.assert_array_equal(logits_of(tmp_path), logits_of(tiny_folder))


@pytest.mark.spec("SOURCE-4")
def test_tied_embeddings_are_one_table(tiny_config: ModelConfig, tmp_path: Path) -> None:
    tied = replace(tiny_config, tie_word_embeddings=True)
    write_checkpoint(tmp_path, tied, dtype="bf16")
    with RowMajorSource(tied, open_checkpoint(tmp_path)).forward_pass() as weights:
        assert weights.embed_tokens is weights.lm_head


@pytest.mark.spec("SOURCE-5")
def test_float32_matrices_stay_in_the_file(tiny_source: RowMajorSource) -> None:
    with tiny_source.forward_pass() as weights:
        matrices = [getattr(layer, f.name) for layer in weights.layers for f in fields(LayerWeights)]
    in_place = [m for m in matrices if isinstance(m, RowMajorMatrix)]
    assert len(in_place) == 7 * tiny_source.config.num_hidden_layers
    assert not any(m.weight.flags.owndata or m.weight.flags.writeable for m in in_place)


@pytest.mark.spec("OFFLOAD-11")
def test_a_closed_source_has_released_its_weights_and_begins_no_pass(tiny_source: RowMajorSource) -> None:
    with tiny_source.forward_pass() as weights:
        released = weakref.ref(weights.lm_head)
    del weights
    tiny_source.close()
    gc.collect()
    assert released() is None
    with pytest.raises(GenerationError, match="the weights are closed; load the model again"):
        tiny_source.forward_pass().__enter__()
    tiny_source.close()
