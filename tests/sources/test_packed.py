"""Specifies `refinfer.sources.packed`: the packed weights of a provider, in memory or mapped, as a weight source."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refinfer.arrays import Float32Array
from refinfer.clock import RealClock
from refinfer.errors import DamagedWeightsError, GenerationError, WeightCacheStateError
from refinfer.model.config import SHAPES
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer
from refinfer.model.weights import WeightSource
from refinfer.prepare import IN_MEMORY
from refinfer.sources.packed import PackedSource
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.packers import record_nbytes

sys.path.insert(0, str(Path(__file__).parents[1] / "offload"))
from packed_model import PackedModel, assert_same_logits, change, logits_of

POSITIONS = 48


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding table is the output table, and one with two tables."""
    folder = tmp_path_factory.mktemp("packed") / "m"
    config = replace(SHAPES["tiny"], vocab_size=70, hidden_size=40, intermediate_size=52, num_hidden_layers=2)
    write_checkpoint(folder, replace(config, tie_word_embeddings=request.param == "tied"), dtype="f32")
    return folder


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> PackedModel:
    return PackedModel(open_folder(folder).config, folder, "f32", tmp_path / "cache", POSITIONS)


def embedded(source: WeightSource, ids: list[int]) -> Float32Array:
    with source.forward_pass() as weights:
        return weights.embed_tokens.rows(np.array(ids))


@pytest.mark.spec("OFFLOAD-11", "CACHE-11")
@pytest.mark.parametrize("where", [IN_MEMORY, None], ids=["in memory", "mapped"])
def test_a_closed_source_has_deleted_its_providers_cache_and_released_every_matrix(
    model: PackedModel, where: str | None
) -> None:
    prepared = model.prepared(where)
    provider, keys, mapped = prepared.provider, prepared.keys, prepared.mapped
    source = PackedSource(model.inventory, provider, keys, model.rows, RealClock(), mapped)
    with source.forward_pass() as weights:
        released = [weakref.ref(layer.q_proj) for layer in weights.layers] + [weakref.ref(weights.lm_head)]
    files = [weakref.ref(mapped)] if mapped else []
    del weights, mapped, prepared
    gc.collect()
    gc.disable()
    try:
        source.close()
        assert [matrix() for matrix in released] == [None] * 3
        assert [file() for file in files] == [None] * (where is None)
    finally:
        gc.enable()
    with pytest.raises(WeightCacheStateError, match="that is deleted has no look_up"):
        provider.look_up(keys[model.inventory.vectors_name])
    with pytest.raises(GenerationError, match="the weights are closed; load the model again"), source.forward_pass():
        pass


@pytest.mark.spec("OFFLOAD-3", "KEY-1")
def test_one_file_serves_sources_whose_chunks_have_other_sizes(model: PackedModel) -> None:
    """Each finds its own chunks by its keys, mapped and streamed."""
    large = replace(model, chunk_nbytes=None)
    assert len(large.inventory.cycle) < len(model.inventory.cycle)
    model.packed().close()
    assert large.prepared().outcome.packed_buffers > 0
    for each in (model, large, model):
        found = each.prepared()
        assert (found.outcome.state, found.outcome.packed_buffers) == ("loaded", 0)
        expected = logits_of(each.in_memory(), POSITIONS, 10)
        assert_same_logits(logits_of(each.packed(), POSITIONS, 10), expected)
        assert_same_logits(logits_of(each.within_a_budget(prefetch_threads=1), POSITIONS, 10), expected)


@pytest.mark.spec("OFFLOAD-4")
def test_without_a_file_to_check_no_chunk_is_checked(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = model.prepared()
    source = PackedSource(model.inventory, prepared.provider, prepared.keys, model.rows, RealClock())
    checked: list[int] = []
    monkeypatch.setattr(MappedFile, "is_sound", lambda _, chunk: checked.append(chunk.offset))
    transformer = Transformer(source, POSITIONS)
    before = transformer.decode([7])
    change(model.file, model.chunks[-1].offset + 3, by=0x80)  # the sign of a weight of the output table
    transformer.kv_cache.rewind(0)
    assert not np.array_equal(transformer.decode([7]), before)
    assert not checked


@pytest.mark.spec("OFFLOAD-4", "OFFLOAD-6")
def test_a_damaged_embedding_row_is_found_when_its_token_comes(model: PackedModel) -> None:
    source = model.packed()
    transformer = Transformer(source, POSITIONS)

    def token(token_id: int) -> Float32Array:
        transformer.kv_cache.rewind(0)
        return transformer.decode([token_id])

    expected = [token(7), token(8)]
    entry = model.entries["model.embed_tokens.weight"]
    nbytes = record_nbytes(entry.key) if model.inventory.table else 4 * 40
    for at in (entry.offset + 7 * nbytes, entry.offset + 8 * nbytes - 1):
        change(model.file, at)
        with pytest.raises(
            DamagedWeightsError, match=f"^{re.escape(str(model.file))}: model.embed_tokens.weight.*does not agree"
        ):
            token(7)
        with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
            embedded(source, [7])
        if model.inventory.table:  # a tied table is used whole for each token, rows of another are checked alone
            np.testing.assert_array_equal(token(8), expected[1])
        change(model.file, at)
    np.testing.assert_array_equal(token(7), expected[0])


@pytest.mark.spec("OFFLOAD-6")
def test_another_row_that_is_damaged_is_nothing_to_a_look_up(tmp_path: Path, tiny_folder: Path) -> None:
    model = PackedModel(open_folder(tiny_folder).config, tiny_folder, "int8", tmp_path / "cache", POSITIONS)
    source = model.packed()
    entry = model.entries["model.embed_tokens.weight"]
    nbytes = record_nbytes(entry.key)
    expected = embedded(source, list(range(261)))
    for row in (0, 130, 260):
        change(model.file, entry.offset + row * nbytes + 5)
        with pytest.raises(DamagedWeightsError, match="does not agree"):
            embedded(source, [row])
        others = [other for other in range(261) if other != row]
        np.testing.assert_array_equal(embedded(source, others), expected[others])
        change(model.file, entry.offset + row * nbytes + 5)


@pytest.mark.spec("OFFLOAD-4", "OFFLOAD-6")
def test_damage_from_before_the_first_pass_is_found_when_a_row_is_looked_up(model: PackedModel) -> None:
    """Not only when the pass ends: what is looked up is right, or an error."""
    entry = model.entries["model.embed_tokens.weight"]
    change(model.file, entry.offset + 7)  # in row 0, whether it is a record or lies in a tile
    found = []
    with (
        pytest.raises(DamagedWeightsError, match="does not agree with its checksum"),
        model.packed().forward_pass() as weights,
    ):
        found.append(weights.embed_tokens.rows(np.array([0])))
    assert not found
