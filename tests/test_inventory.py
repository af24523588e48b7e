"""Specifies `refinfer.inventory`: the contents of a cache file, known before it is built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES
from refinfer.clock import RealClock
from refinfer.errors import PackingError
from refinfer.inventory import Inventory
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.folder import open_folder
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.prepare import prepare
from refinfer.weight_cache.key import WeightId
from refinfer.weight_cache.mapped_file import read_file
from refinfer.weight_cache.packers import padded_nbytes_of, vectors_key

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

every_format = pytest.mark.parametrize("name", list(FORMATS))


def tensors_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a checkpoint really has."""
    return {name: tensor.shape for name, tensor in open_checkpoint(folder).items()}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Draw a small model, with and without everything that a model may have."""
    G, hd = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    return replace(
        SHAPES["tiny"],
        vocab_size=draw(st.integers(1, 300)),
        hidden_size=draw(st.integers(1, 90)),
        intermediate_size=draw(st.integers(1, 90)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=G * draw(st.integers(1, 3)),
        num_key_value_heads=G,
        head_dim=hd,
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@pytest.mark.spec("OFFLOAD-1")
@given(config=configs(), name=st.sampled_from(list(FORMATS)), chunk_nbytes=st.none() | st.integers(1, 1 << 20))
def test_matrices_are_listed_layer_by_layer_and_the_output_table_comes_last(
    config: ModelConfig, name: str, chunk_nbytes: int | None
) -> None:
    inventory = Inventory(config, name, chunk_nbytes)
    L = config.num_hidden_layers
    listed = [(matrix.layer, matrix.kind) for matrix in inventory.matrices]
    assert listed == [(layer, kind) for layer in range(L) for kind in KINDS] + [(L, "lm_head")]
    shapes = config.tensor_shapes()
    for matrix in inventory.matrices:
        N, K = shapes[matrix.name]
        assert matrix.layout == layout_of(name, N, K, chunk_nbytes)
        if matrix.kind != "lm_head":
            block = "self_attn" if matrix.kind in KINDS[:4] else "mlp"
            assert matrix.name == f"model.layers.{matrix.layer}.{block}.{matrix.kind}.weight"
    output = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    assert inventory.matrices[-1].name == output


@pytest.mark.spec("OFFLOAD-2")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_block_of_vectors_takes_what_it_takes_in_the_file(shape: str) -> None:
    inventory = Inventory(SHAPES[shape], "f32")
    key = vectors_key(sum(inventory.vectors.values()), WeightId(bytes(32), inventory.vectors_name))
    assert inventory.resident_nbytes == padded_nbytes_of(key)


@pytest.mark.spec("OFFLOAD-1")
@given(config=configs(), name=st.sampled_from(list(FORMATS)))
def test_every_tensor_of_a_model_is_listed_once(config: ModelConfig, name: str) -> None:
    inventory = Inventory(config, name)
    listed = [matrix.name for matrix in inventory.matrices] + list(inventory.vectors)
    listed += [inventory.table] if inventory.table else []
    assert sorted(listed) == sorted(config.tensor_shapes())
    assert (inventory.table is None) == config.tie_word_embeddings


@pytest.mark.spec("OFFLOAD-1")
@given(config=configs(), name=st.sampled_from(list(FORMATS)))
def test_the_cycle_is_every_chunk_of_every_matrix_in_order(config: ModelConfig, name: str) -> None:
    inventory = Inventory(config, name)
    expected = [
        (number, index, matrix.layer, matrix.kind, chunk.padded_nbytes)
        for number, matrix in enumerate(inventory.matrices)
        for index, chunk in enumerate(matrix.layout.chunks)
    ]
    assert [(c.matrix, c.index, c.layer, c.kind, c.padded_nbytes) for c in inventory.cycle] == expected
    assert inventory.streamable_nbytes == sum(matrix.layout.padded_nbytes for matrix in inventory.matrices)


@pytest.mark.spec("OFFLOAD-1")
@given(config=configs(), name=st.sampled_from(list(FORMATS)), chunk_nbytes=st.none() | st.integers(1, 1 << 14))
def test_the_chunks_of_a_matrix_and_of_a_kind_are_numbered_by_their_places_in_the_cycle(
    config: ModelConfig, name: str, chunk_nbytes: int | None
) -> None:
    inventory = Inventory(config, name, chunk_nbytes)
    cycle = list(enumerate(inventory.cycle))
    of_matrix = [[c for c, chunk in cycle if chunk.matrix == i] for i in range(len(inventory.matrices))]
    assert [numbers.tolist() for numbers in inventory.chunks_of_matrix] == of_matrix
    of_kind = {kind: [c for c, chunk in cycle if chunk.kind == kind] for kind in [*KINDS, "lm_head"]}
    assert {kind: numbers.tolist() for kind, numbers in inventory.chunks_of_kind.items()} == of_kind


@pytest.mark.spec("OFFLOAD-1")
def test_a_large_matrix_has_several_chunks_in_the_cycle() -> None:
    inventory = Inventory(SHAPES["llama-1b"], "bf16")
    last = [chunk for chunk in inventory.cycle if chunk.kind == "lm_head"]
    assert len(last) > 100
    assert [chunk.index for chunk in last] == list(range(len(last)))
    assert {chunk.layer for chunk in last} == {16}
    assert inventory.cycle[-1] == last[-1]


@pytest.mark.spec("OFFLOAD-2")
def test_an_inventory_of_a_model_larger_than_any_disk_here_needs_no_weights() -> None:
    inventory = Inventory(SHAPES["llama2-70b"], "bf16")
    weights = SHAPES["llama2-70b"].n_parameters - 32000 * 8192  # the embedding table is not multiplied
    assert 2 * weights <= inventory.streamable_nbytes + inventory.resident_nbytes <= 2.01 * weights


@pytest.mark.spec("OFFLOAD-2")
@every_format
@pytest.mark.parametrize("chunk_nbytes", [None, 512])
def test_an_inventory_agrees_with_the_file_that_is_built(
    golden_folder: Path, name: str, chunk_nbytes: int | None, tmp_path: Path
) -> None:
    inventory = Inventory(open_folder(golden_folder).config, name, chunk_nbytes)
    path = tmp_path / "cache"
    prepare(inventory, open_checkpoint(golden_folder), str(path), clock=RealClock())
    _, index = read_file(path)
    entries = {(entry.key.packer, entry.key.name): entry for entry in index.entries}

    matrices = [("goi", matrix.name) for matrix in inventory.matrices]
    tables = [("rows", inventory.table)] if inventory.table else []
    assert sorted(entries) == sorted([*matrices, *tables, ("vectors", inventory.vectors_name)])
    stored = [chunk.padded_nbytes for key in matrices for chunk in entries[key].chunks]
    assert stored == [chunk.padded_nbytes for chunk in inventory.cycle]
    for matrix in inventory.matrices:
        key = entries["goi", matrix.name].key
        layout = matrix.layout
        assert (key.shape, key.format, key.tile) == ((layout.N, layout.K), name, layout.tile)
        assert key.chunk_nbytes == layout.chunk_nbytes == (chunk_nbytes or FORMATS[name].chunk_nbytes)
    assert entries["vectors", inventory.vectors_name].padded_nbytes == inventory.resident_nbytes
    assert inventory.resident_nbytes % PAGE_BYTES == 0


@pytest.mark.spec("OFFLOAD-2", "PREP-1")
def test_the_vectors_are_those_of_the_checkpoint_in_execution_order(golden_folder: Path) -> None:
    inventory = Inventory(open_folder(golden_folder).config, "f32")
    stored = {name: shape[0] for name, shape in tensors_of(golden_folder).items() if len(shape) == 1}
    assert inventory.vectors == stored
    names = list(inventory.vectors)
    assert names[0] == "model.layers.0.input_layernorm.weight"
    assert names[-1] == "model.norm.weight"
    layers = [int(name.split(".")[2]) for name in names[:-1]]
    assert layers == sorted(layers)


@pytest.mark.spec("OFFLOAD-2")
def test_the_name_of_the_block_of_vectors_depends_on_which_they_are() -> None:
    plain = Inventory(SHAPES["tiny"], "f32")
    tiny = SHAPES["tiny"]
    others = [
        replace(tiny, num_hidden_layers=5),
        replace(tiny, hidden_size=72),
        replace(tiny, qk_norm=True),
        replace(tiny, qkv_bias=True),
    ]
    names = [plain.vectors_name, *(Inventory(config, "f32").vectors_name for config in others)]
    assert len(set(names)) == len(names)
    assert Inventory(SHAPES["tiny"], "int8").vectors_name == plain.vectors_name


@pytest.mark.spec("OFFLOAD-2")
def test_the_sizes_of_the_kinds_are_those_of_the_matrices_of_one_layer_and_of_the_output_table() -> None:
    for layers in (1, 2):
        inventory = Inventory(replace(SHAPES["tiny"], num_hidden_layers=layers), "f32")
        matrices = [*inventory.matrices[:7], inventory.matrices[-1]]
        sizes = [(matrix.kind, matrix.layout.padded_nbytes) for matrix in matrices]
        assert list(inventory.kind_sizes.items()) == sizes


@pytest.mark.spec("OFFLOAD-2", "ERR-1")
def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(PackingError, match="'fp8' is not a weight format"):
        _ = Inventory(SHAPES["tiny"], "fp8").matrices


@pytest.fixture(params=["llama", "llama3-rope", "llama-bias", "mistral", "qwen2", "qwen3"])
def golden_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of each family's tiny checkpoint."""
    folder = Path(__file__).parent / "golden" / str(request.param)
    assert json.loads((folder / "config.json").read_text())
    return folder
