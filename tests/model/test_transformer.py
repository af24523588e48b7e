"""The whole model: against `transformers`, and the properties every causal model has."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.errors import RequestError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.config_json import load_config
from refinfer.model.transformer import Transformer, prefill_block, scratch_nbytes
from refinfer.model.weights import LayerWeights, RowMajorSource, Weights, WeightSource


class RandomMatrix:
    def __init__(self, rng: np.random.Generator, *shape: int) -> None:
        self.shape: tuple[int, int] = shape[0], shape[1]
        self.weight = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[1] ** 0.5)

    def matmul(self, x: Any, out: Any = None) -> Any:
        return np.matmul(x, self.weight.T, out=out)

    def rows(self, ids: Any) -> Any:
        return self.weight[ids]


class RandomSource:
    """A weight source of its own making: the Protocols need no base class."""

    def __init__(self, config: ModelConfig) -> None:
        rng = np.random.default_rng(0)
        self.config = c = config
        table = RandomMatrix(rng, c.vocab_size, c.hidden_size)
        norm = np.ones(c.hidden_size, np.float32)
        shapes = {name.split(".")[1]: s for name, s in c.layer_shapes().items() if name.endswith("_proj.weight")}
        matrices: list[dict[str, Any]] = [
            {name: RandomMatrix(rng, *shape) for name, shape in shapes.items()} for _ in range(c.num_hidden_layers)
        ]
        norms: dict[str, Any] = {"input_layernorm": norm, "post_attention_layernorm": norm}
        self._weights = Weights(table, [LayerWeights(**layer, **norms) for layer in matrices], norm, table)

    def forward_pass(self) -> AbstractContextManager[Weights]:
        return nullcontext(self._weights)

    def close(self) -> None:
        pass


class Golden(Protocol):
    """What the fixture of that name gives; see conftest."""

    folder: Path
    prompt: list[int]
    logits: list[list[float]]
    greedy: list[int]


def golden_transformer(golden: Golden) -> Transformer:
    return Transformer(RowMajorSource(load_config(golden.folder), open_checkpoint(golden.folder)), 96)


@pytest.mark.spec("MODEL-8")
def test_logits_agree_with_transformers(golden: Golden) -> None:
    logits = golden_transformer(golden).decode(golden.prompt)
    np.testing.assert_allclose(logits, np.array(golden.logits), rtol=0, atol=1e-4)


@pytest.mark.spec("MODEL-9")
def test_64_greedy_tokens_agree_with_transformers(golden: Golden) -> None:
    transformer = golden_transformer(golden)
    ids = [int(transformer.prefill(golden.prompt).argmax())]
    while len(ids) < 64:
        ids.append(int(transformer.decode(ids[-1:])[0].argmax()))
    assert ids == golden.greedy


@pytest.mark.spec("MODEL-7")
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 9))
def test_a_later_token_never_changes_an_earlier_logit(before: int, after: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = RandomSource(replace(SHAPES["tiny"], num_hidden_layers=2, vocab_size=60))
    ids = rng.integers(60, size=before + after)
    changed = ids.copy()
    changed[before:] = (changed[before:] + 1) % 60
    first, second = (Transformer(source, 64).decode(i.tolist()) for i in (ids, changed))
    np.testing.assert_array_equal(first[:before], second[:before])
    assert not np.array_equal(first[before], second[before])


@pytest.mark.spec("MODEL-5")
def test_everything_computed_is_float32(tiny_source: RowMajorSource) -> None:
    transformer = Transformer(tiny_source, 96)
    assert transformer.prefill([1, 2, 3]).dtype == np.float32
    assert transformer.decode([4]).dtype == np.float32
    arrays = [transformer._arena, transformer._mask, transformer._rope.cos, transformer._rope.sin]
    assert {a.dtype for a in arrays} == {np.dtype(np.float32)}


@pytest.mark.spec("MODEL-10")
@pytest.mark.parametrize("name", SHAPES)
def test_the_prefill_block_is_a_power_of_two_whose_scratch_is_small(name: str) -> None:
    config = SHAPES[name]
    positions = min(512, config.max_position_embeddings)
    block = prefill_block(config, positions)
    assert block in (32, 64, 128, 256)
    assert prefill_block(config, 7) == 7


@pytest.mark.spec("MODEL-10")
def test_published_shapes_have_these_prefill_blocks() -> None:
    blocks = {
        name: prefill_block(SHAPES[name], 512) for name in ("storyteller", "smollm-135m", "llama-1b", "llama2-7b")
    }
    assert blocks == {"storyteller": 32, "smollm-135m": 128, "llama-1b": 256, "llama2-7b": 256}


@pytest.mark.spec("KV-1")
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_prompt_may_end_with_a_block_or_next_to_its_end(tiny_source: RowMajorSource, blocks: int, more: int) -> None:
    prompt, whole = Transformer(tiny_source, 96), Transformer(tiny_source, 96)
    ids = [(7 * i + 3) % 261 for i in range(blocks * prompt.block + more)]
    np.testing.assert_allclose(prompt.prefill(ids), whole.decode(ids)[-1], atol=2e-5)


@pytest.mark.spec("KV-4", "MODEL-11")
def test_a_transformer_reserves_the_scratch_that_it_reports(tiny_source: RowMajorSource) -> None:
    transformer = Transformer(tiny_source, 96)
    arrays = [transformer._arena, transformer._mask, transformer._rope.cos, transformer._rope.sin]
    logits = 4 * tiny_source.config.vocab_size
    assert sum(a.nbytes for a in arrays) + logits == scratch_nbytes(tiny_source.config, 96)


@pytest.mark.spec("MODEL-11")
def test_decoding_allocates_nothing_of_the_size_of_a_weight() -> None:
    config = replace(SHAPES["storyteller"], num_hidden_layers=2, hidden_size=1024, intermediate_size=1536)
    transformer = Transformer(RandomSource(config), 96)
    transformer.prefill([1, 2, 3])
    transformer.decode([4])
    peaks = []
    for _ in range(3):  # what Python allocates once, for itself, may fall into one of them
        transformer.kv_cache.rewind(4)
        tracemalloc.start()
        try:
            for i in range(20):
                transformer.decode([i])
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    row, logits = 4 * config.hidden_size, 4 * config.vocab_size
    views_and_numbers = 5_000  # bytes; one more row or activation would not fit in with them
    assert min(peaks) < row + logits + views_and_numbers


@pytest.mark.spec("MODEL-12")
@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([], "no tokens"),
        ([0, 261], "token id 261 is not in the vocabulary of 0 to 260"),
        ([0, -1], "token id -1"),
        (list(range(97)), "97 more tokens do not fit"),
    ],
    ids=["none", "too large", "negative", "too many"],
)
@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_impossible_tokens_are_refused_before_anything_is_computed(
    tiny_source: RowMajorSource, method: str, ids: list[int], why: str
) -> None:
    transformer = Transformer(tiny_source, 96)
    with pytest.raises(RequestError, match=why):
        getattr(transformer, method)(ids)
    assert transformer.kv_cache.length == 0


class FailingSource:
    """A source that fails during one pass: in a layer, at the output table, or when the pass ends."""

    def __init__(self, inner: WeightSource, where: str, in_pass: int) -> None:
        self.inner, self.config = inner, inner.config
        self.where, self.left = where, in_pass

    def layers(self, weights: Weights, where: str) -> Iterator[LayerWeights]:
        for layer in weights.layers:
            yield layer
            if where == "in a layer":
                raise KeyboardInterrupt

    @contextmanager
    def forward_pass(self) -> Iterator[Weights]:
        where, self.left = self.where if self.left == 0 else "nowhere", self.left - 1
        with self.inner.forward_pass() as weights:
            failing = replace(weights, layers=self.layers(weights, where))
            if where == "at the output table":
                failing = replace(failing, lm_head=FailingMatrix())
            yield failing
            if where == "at the end of the pass":
                raise KeyboardInterrupt

    def close(self) -> None:
        self.inner.close()


class FailingMatrix:
    shape = (261, 40)

    def matmul(self, x: Any, out: Any = None) -> Any:
        raise KeyboardInterrupt

    def rows(self, ids: Any) -> Any:
        raise KeyboardInterrupt


@pytest.mark.spec("KV-3")
@pytest.mark.parametrize("where", ["in a layer", "at the output table", "at the end of the pass"])
@pytest.mark.parametrize(("n", "passes"), [(1, 1), (5, 1), (70, 3)])
@pytest.mark.parametrize("method", ["decode", "prefill"])
def test_tokens_whose_computation_breaks_off_leave_no_position_and_can_be_repeated(
    tiny_source: RowMajorSource, method: str, n: int, passes: int, where: str
) -> None:
    """In the last of the passes that they take, so that those before have added their positions already."""
    ids = [(7 * i + 3) % 261 for i in range(n)]
    source = FailingSource(tiny_source, where, in_pass=passes)
    transformer, plain = Transformer(source, 96), Transformer(tiny_source, 96)
    assert -(-n // transformer.block) == passes
    for each in (transformer, plain):
        each.prefill([1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        getattr(transformer, method)(ids)
    assert source.left < 0  # it did fail in the last pass
    assert transformer.kv_cache.length == 3
    np.testing.assert_array_equal(getattr(transformer, method)(ids), getattr(plain, method)(ids))
