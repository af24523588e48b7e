"""Specifies what only our own sources promise: the same bits, wherever the packed weights are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.generate import STORYTELLER
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.model.weights import WeightSource
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS
from refinfer.planning.plan import PLANS

sys.path.insert(0, str(Path(__file__).parents[1] / "offload"))
from packed_model import Logits, PackedModel, assert_same_logits, logits_of

POSITIONS: Final = 64


@dataclass(frozen=True)
class Way:
    """How weights are streamed."""

    plan: str
    share: float
    ring: int | None
    prefetch_threads: int
    paged: bool

    def source_of(self, model: PackedModel) -> StreamedSource:
        return model.within_a_budget(
            self.share, self.plan, self.ring, prefetch_threads=self.prefetch_threads, paged=self.paged
        )


ways = st.builds(
    Way,
    plan=st.sampled_from(PLANS),
    share=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    ring=st.none() | st.integers(2, 9),
    prefetch_threads=st.integers(0, 4),
    paged=st.booleans(),
)


@dataclass(frozen=True)
class Request:
    """The number of tokens of a prompt, and those of each step after it."""

    prompt: int
    steps: list[int]


requests = st.builds(
    Request, prompt=st.sampled_from([1, 2, 33, 40]) | st.integers(1, 45), steps=st.lists(st.integers(1, 6), max_size=3)
)


def run(source: WeightSource, request: Request) -> Logits:
    """Return the bits of a request's logits, and close the source."""
    try:
        return logits_of(source, POSITIONS, request.prompt, request.steps)
    finally:
        source.close()


def check_all_agree(model: PackedModel, how: Sequence[Way], request: Request) -> None:
    """Hold that weights in memory, in a file just built, found and streamed in some ways give the same bits."""
    expected = run(model.in_memory(), request)
    assert_same_logits(run(model.packed(), request), expected)  # just built
    assert_same_logits(run(model.packed(), request), expected)  # and found
    for way in how:
        assert_same_logits(run(way.source_of(model), request), expected)


more_than_an_int4_tile = st.integers(513, 1100)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Draw a small model, with and without everything that a model may have."""
    G = draw(st.integers(1, 2))
    return replace(
        SHAPES["tiny"],
        vocab_size=draw(st.integers(2, 150) | more_than_an_int4_tile),
        hidden_size=draw(st.integers(3, 70)),
        intermediate_size=draw(st.integers(1, 130) | more_than_an_int4_tile),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=G * draw(st.integers(1, 3)),
        num_key_value_heads=G,
        head_dim=2 * draw(st.integers(1, 6)),
        max_position_embeddings=96,
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@pytest.mark.spec("OFFLOAD-3", "FETCH-1", "READ-1", "READ-2", "PLAN-3", "PLAN-4")
@settings(max_examples=12)
@given(
    config=configs(),
    name=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(["f32", "f16", "bf16"]),
    how=st.lists(ways, min_size=2, max_size=2),
    request=requests,
)
def test_any_model_has_the_same_bits_from_every_source(
    config: ModelConfig,
    name: str,
    dtype: str,
    how: list[Way],
    request: Request,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    write_checkpoint(folder / "m", config, dtype=dtype, seed=1)
    check_all_agree(PackedModel(config, folder / "m", name, folder / "cache", POSITIONS), how, request)


FAMILIES: Final = ["llama", "llama3-rope", "llama-bias", "mistral", "qwen2", "qwen3"]


@pytest.mark.spec("OFFLOAD-3")
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_bits_from_every_source(family: str, name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "golden" / family
    n = FAMILIES.index(family) + list(FORMATS).index(name)
    model = PackedModel(open_folder(folder).config, folder, name, tmp_path / "cache", POSITIONS)
    request = Request(33, [2])
    expected = run(model.in_memory(), request)
    assert_same_logits(run(model.packed(), request), expected)
    way = Way(PLANS[n % len(PLANS)], share=n % 2 / 2, ring=None, prefetch_threads=n % 3, paged=False)
    assert_same_logits(run(way.source_of(model), request), expected)


SHORT: Final = Request(9, [1, 3])


@pytest.fixture(scope="module")
def storytellers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PackedModel, Logits]]:
    """Return what gives the storyteller in a format, and its logits from memory, which are those from a mapped file."""

    @cache
    def storyteller(name: str) -> tuple[PackedModel, Logits]:
        folder = tmp_path_factory.mktemp("storyteller")
        config = open_folder(STORYTELLER).config
        model = PackedModel(config, STORYTELLER, name, folder / "cache", POSITIONS, chunk_nbytes=None)
        check_all_agree(model, [], SHORT)
        return model, run(model.packed(), SHORT)

    return storyteller


@pytest.mark.slow
@pytest.mark.spec("OFFLOAD-3")
@settings(max_examples=8)
@given(name=st.sampled_from(list(FORMATS)), way=ways)
def test_the_storyteller_has_the_same_bits_from_every_source(
    name: str, way: Way, storytellers: Callable[[str], tuple[PackedModel, Logits]]
) -> None:
    model, expected = storytellers(name)
    assert_same_logits(run(way.source_of(model), SHORT), expected)
