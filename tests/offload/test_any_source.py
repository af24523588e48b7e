"""Specifies weight sources, wherever the weights are: all of ours, or anybody's own: `pytest --source package:Class`.

`Class(config, folder)` makes a source of the checkpoint in a folder (`config.json`, `model.safetensors`). Its weights
are the checkpoint's, bit for bit, unless the class says otherwise: `rounding = 0.01` says that no weight is wrong by
more than a hundredth of the largest of its row. `--source` may be given several times; with the path of this file,
only these tests run.

The laws are those at the head of `refinfer.model.weights`. What only ours promise, that all packed sources give the
same bits, is at the end.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.arrays import Float32Array
from refinfer.errors import RefinferError
from refinfer.generate import STORYTELLER
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer, prefill_block
from refinfer.model.weights import LayerWeights, Matrix, RowMajorMatrix, RowMajorSource, WeightSource
from refinfer.offload.plan import PLANS, make_plan
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS

sys.path.insert(0, str(Path(__file__).parent))
from packed_model import Logits, PackedModel, assert_same_logits, logits_of, threads_and_descriptors

ROOT: Final = Path(__file__).parents[2]
POSITIONS: Final = 64
ROUNDING: Final = {"f32": 0.0, "bf16": 2.0**-8, "int8": 0.51 / 127, "int4": 0.51 / 7}
"""How wrong a weight may be, as a share of the largest of its row."""


# Our own sources.


class Packed(PackedModel):
    """A model in a format, and its cache file."""

    def within_a_budget(
        self, share: float = 0.5, plan: str = "balanced", ring: int | None = None, *, threads: int, paged: bool = False
    ) -> StreamedSource:
        """Return the weights within a budget: a share of the way from the smallest that works to all of them."""
        inventory, slot = self.inventory, int(self.inventory.sizes.max())
        smallest = self.smallest + max(0, (ring or 2) - 2) * slot
        budget = smallest + round(share * (max(smallest, self.most) - smallest))
        ring_nbytes = None if ring is None else ring * slot
        made = make_plan(plan, inventory, self.fixed, budget, ring_nbytes=ring_nbytes, readers=threads)
        return self.streamed(made, threads=threads, paged=paged)


@lru_cache(maxsize=32)
def packed(config: ModelConfig, folder: Path, name: str) -> Packed:
    return Packed(config, folder, name, folder.parent / f"{folder.name} {name}", POSITIONS)


PLACES: Final[dict[str, Callable[[Packed], WeightSource]]] = {
    "in memory": Packed.in_memory,
    "mapped": Packed.packed,
    "streamed": partial(Packed.within_a_budget, threads=0),
    "streamed by one thread": partial(Packed.within_a_budget, threads=1),
    "streamed by two threads": partial(Packed.within_a_budget, threads=2),
    "LRU-paged": partial(Packed.within_a_budget, threads=0, paged=True),
}


# The suite.


@dataclass(frozen=True)
class Kind:
    """`make` gives a source of the checkpoint in a folder; `rounding` says how wrong its weights may be.

    An embedding table that is not the output table is never rounded by ours.
    """

    make: Callable[[ModelConfig, Path], WeightSource]
    rounding: float = 0.0
    is_ours: bool = True


def ours(place: str, name: str) -> Kind:
    return Kind(lambda config, folder: PLACES[place](packed(config, folder, name)), ROUNDING[name])


KINDS: Final = {"row-major": Kind(lambda config, folder: RowMajorSource(config, open_checkpoint(folder)))} | {
    f"{place}, {name}": ours(place, name)
    for place, name in [
        ("in memory", "int4"),
        ("mapped", "bf16"),
        ("streamed", "int8"),
        ("streamed by one thread", "f32"),
        ("streamed by two threads", "int4"),
        ("LRU-paged", "int8"),
    ]
}


def imported(name: str) -> Kind:
    """Return the kind of a class `package:Class`."""
    module, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--source {name}: {error}") from None
    return Kind(make, getattr(make, "rounding", 0.0), is_ours=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        own: list[str] = metafunc.config.getoption("source")
        kinds = {name: imported(name) for name in own} if own else KINDS
        metafunc.parametrize("kind", list(kinds.values()), ids=list(kinds))


@dataclass(frozen=True)
class Model:
    """A checkpoint, and another one of the same shapes; `tensor` gives what is stored under a name in the first."""

    config: ModelConfig
    folder: Path
    another: Path

    def tensor(self, name: str) -> Float32Array:
        return open_checkpoint(self.folder).float32(name, self.config.tensor_shapes()[name])


EVERYTHING: Final = replace(
    SHAPES["tiny"],
    model_type="qwen3",
    vocab_size=45,
    hidden_size=20,
    intermediate_size=530,  # more than a chunk also in int4
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=96,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
    tie_word_embeddings=False,
)
LITTLE: Final = replace(
    SHAPES["tiny"], vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, tie_word_embeddings=True
)


@pytest.fixture(scope="module", params=["two tables", "one table"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model with two tables and everything that a layer may have, and one with neither."""
    folder = tmp_path_factory.mktemp("any")
    config = EVERYTHING if request.param == "two tables" else LITTLE
    for name in ("one", "another"):
        write_checkpoint(folder / name, config, dtype="f32", seed=len(name))
    return Model(config, folder / "one", folder / "another")


Make = Callable[[], WeightSource]


@pytest.fixture
def make(kind: Kind, model: Model) -> Iterator[Make]:
    """Give sources, as many as are asked for."""
    made: list[WeightSource] = []

    def make() -> WeightSource:
        made.append(kind.make(model.config, model.folder))
        return made[-1]

    yield make
    for source in made:
        source.close()


@pytest.fixture
def source(make: Make) -> WeightSource:
    """One source."""
    return make()


PARTS: Final = {
    field.name: ("mlp" if field.name in ("gate_proj", "up_proj", "down_proj") else "self_attn") + f".{field.name}"
    for field in fields(LayerWeights)
    if field.name.endswith("_proj")
}


def matrices(source: WeightSource) -> Iterator[tuple[str, Matrix]]:
    """Walk over the matrices of a pass, as a transformer does: name, matrix."""
    for i, layer in enumerate(source.layers()):
        for part, name in PARTS.items():
            yield f"model.layers.{i}.{name}", getattr(layer, part)
    yield "lm_head", source.lm_head


def head_of(config: ModelConfig) -> str:
    return "model.embed_tokens" if config.tie_word_embeddings else "lm_head"


def normal(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


Bits = dict[str, npt.NDArray[np.uint32]]


def products(source: WeightSource, M: int = 3, leave_after: int | None = None) -> Bits:
    """Return the bits of the product with each matrix, in a whole pass or in its beginning."""
    source.embed_tokens.rows(np.arange(M))
    found: Bits = {}
    for n, (name, matrix) in enumerate(matrices(source)):
        if n == leave_after:
            break
        found[name] = matrix.matmul(normal(M, matrix.shape[1])).view(np.uint32)
    return found


def assert_same(got: Bits, expected: Bits) -> None:
    assert list(got) == list(expected)
    for name, bits in got.items():
        np.testing.assert_array_equal(bits, expected[name], err_msg=name, strict=True)


def bits_of(array: Float32Array) -> npt.NDArray[np.uint32]:
    assert array.dtype == np.float32
    return array.view(np.uint32)


@pytest.mark.spec("SOURCE-1", "SOURCE-2")
def test_every_part_has_the_shape_that_the_config_says(source: WeightSource, model: Model) -> None:
    shapes = model.config.tensor_shapes()
    assert source.config == model.config
    assert tuple(source.embed_tokens.shape) == shapes["model.embed_tokens.weight"]
    for name, matrix in matrices(source):
        assert tuple(matrix.shape) == shapes[f"{head_of(model.config) if name == 'lm_head' else name}.weight"]
    assert [name.removesuffix(".self_attn.q_proj") for name, _ in matrices(source) if name.endswith("q_proj")] == [
        f"model.layers.{i}" for i in range(model.config.num_hidden_layers)
    ]


@pytest.mark.spec("SOURCE-1", "SOURCE-2")
def test_norms_are_the_checkpoints_bit_for_bit(source: WeightSource, model: Model) -> None:
    places = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }
    shapes = model.config.tensor_shapes()
    for i, layer in enumerate(source.layers()):
        for part, place in places.items():
            name, norm = f"model.layers.{i}.{place}.weight", getattr(layer, part)
            assert (norm is None) == (name not in shapes)
            if norm is not None:
                np.testing.assert_array_equal(bits_of(norm), bits_of(model.tensor(name)), err_msg=name, strict=True)
    np.testing.assert_array_equal(bits_of(source.norm), bits_of(model.tensor("model.norm.weight")), strict=True)


@pytest.mark.spec("SOURCE-1", "SOURCE-2", "PACK-16")
def test_matrices_come_in_execution_order_each_with_the_weights_and_the_bias_of_its_name(
    source: WeightSource, kind: Kind, model: Model
) -> None:
    """Seen by multiplying with ones, each alone."""
    names = []
    for name, matrix in matrices(source):
        stored = head_of(model.config) if name == "lm_head" else name
        w, bias = model.tensor(f"{stored}.weight"), np.float32(0)
        if f"{stored}.bias" in model.config.tensor_shapes():
            bias = model.tensor(f"{stored}.bias")  # type: ignore[assignment]
        allowed = kind.rounding * np.abs(w).max(axis=1) + (1e-6 * (np.abs(w) + np.abs(bias)[..., None]).max(axis=1))
        difference = matrix.matmul(np.eye(w.shape[1], dtype=np.float32)) - (w.T + bias)
        assert (np.abs(difference) <= (allowed if kind.rounding else 0)).all(), name
        np.testing.assert_array_equal(matrix.matmul(np.zeros((1, w.shape[1]), np.float32))[0], bias + np.zeros(len(w)))
        names.append(name)
    assert len(names) == 7 * model.config.num_hidden_layers + 1


@pytest.mark.spec("SOURCE-1")
def test_a_product_is_that_of_the_weights_to_the_rounding_of_a_sum_for_one_row_and_for_many(
    source: WeightSource,
) -> None:
    for name, matrix in matrices(source):
        N, K = matrix.shape
        w = matrix.rows(np.arange(N)).astype(np.float64)
        bias = matrix.matmul(np.zeros((1, K), np.float32)).astype(np.float64)
        for M in (1, 3, 100):
            x = normal(M, K, seed=M)
            y = matrix.matmul(x)
            assert (y.shape, str(y.dtype)) == ((M, N), "float32")
            allowed = (K + 8) * 2.0**-23 * (np.abs(x) @ np.abs(w).T + np.abs(bias))
            assert (np.abs(y - (x @ w.T + bias)) <= allowed).all(), name


@pytest.mark.spec("SOURCE-1")
def test_a_product_is_written_to_out_whatever_that_held_and_x_stays_as_it_was(source: WeightSource) -> None:
    for name, matrix in matrices(source):
        N, K = matrix.shape
        for M in (1, 5):
            x, out = normal(M, K), np.full((M, N), np.nan, np.float32)
            expected = matrix.matmul(x).copy()
            assert matrix.matmul(x, out) is out
            np.testing.assert_array_equal(bits_of(out), bits_of(expected), err_msg=name)
            np.testing.assert_array_equal(x, normal(M, K), err_msg=name)


@pytest.mark.spec("SOURCE-1")
def test_a_product_without_out_is_an_array_of_the_callers_own(source: WeightSource) -> None:
    for name, matrix in matrices(source):
        for M in (1, 5):
            first = matrix.matmul(normal(M, matrix.shape[1]))
            kept = first.copy()
            matrix.matmul(normal(M, matrix.shape[1], seed=1))
            np.testing.assert_array_equal(first, kept, err_msg=name)
            first[:] = 7
            np.testing.assert_array_equal(matrix.matmul(normal(M, matrix.shape[1])), kept, err_msg=name)


@pytest.mark.spec("SOURCE-1", "OFFLOAD-6")
def test_rows_are_given_in_the_order_asked_for_also_repeated_and_also_none(
    source: WeightSource, kind: Kind, model: Model
) -> None:
    w = model.tensor("model.embed_tokens.weight")
    V, rounding = len(w), 0 if kind.is_ours and not model.config.tie_word_embeddings else kind.rounding
    for ids in ([V - 1, 0, 7, 7, 33, 7], [0], [5] * 40, list(range(V)), []):
        rows = source.embed_tokens.rows(np.array(ids, np.int64))
        assert (rows.shape, str(rows.dtype)) == ((len(ids), w.shape[1]), "float32")
        allowed = rounding * np.abs(w[ids]).max(axis=1, keepdims=True, initial=0)
        assert (np.abs(rows - w[ids]) <= allowed).all()
        for row, i in zip(rows, ids, strict=True):  # one at a time, the same
            np.testing.assert_array_equal(bits_of(source.embed_tokens.rows(np.array([i])))[0], bits_of(row))


@pytest.mark.spec("SOURCE-1")
def test_rows_are_the_callers_own(source: WeightSource) -> None:
    for ids in ([7], [7, 8], [0, 7]):
        expected = source.embed_tokens.rows(np.array(ids)).copy()
        source.embed_tokens.rows(np.array(ids))[:] = 7
        np.testing.assert_array_equal(source.embed_tokens.rows(np.array(ids)), expected)


@pytest.mark.spec("SOURCE-6", "ERR-1")
def test_a_row_that_does_not_exist_is_refused(source: WeightSource) -> None:
    V = source.config.vocab_size
    for row in (V, V + 1000, -1, -V):
        for ids in ([row], [1, row], [row, 1]):
            with pytest.raises((RefinferError, IndexError)):
                source.embed_tokens.rows(np.array(ids))
    products(source)


@pytest.mark.spec("SOURCE-1", "OFFLOAD-10")
def test_every_matrix_gives_its_rows_and_the_pass_goes_on(source: WeightSource, model: Model, kind: Kind) -> None:
    expected = products(source)
    source.embed_tokens.rows(np.arange(3))
    for name, matrix in matrices(source):
        w = model.tensor(f"{head_of(model.config) if name == 'lm_head' else name}.weight")
        ids = np.array([len(w) - 1, 0, 3, 3])
        assert (np.abs(matrix.rows(ids) - w[ids]) <= kind.rounding * np.abs(w[ids]).max(axis=1, keepdims=True)).all()
        np.testing.assert_array_equal(bits_of(matrix.matmul(normal(3, w.shape[1]))), expected[name], err_msg=name)
        np.testing.assert_array_equal(matrix.rows(ids[:1]), matrix.rows(ids)[:1])
    assert_same(products(source), expected)


@pytest.mark.spec("SOURCE-4", "OFFLOAD-6")
def test_tied_tables_are_one(source: WeightSource) -> None:
    ids = np.arange(source.config.vocab_size)
    same = np.array_equal(source.embed_tokens.rows(ids), source.lm_head.rows(ids))
    assert same == source.config.tie_word_embeddings


@pytest.mark.spec("SOURCE-2", "OFFLOAD-10")
def test_the_layers_can_be_walked_again_and_again(source: WeightSource) -> None:
    expected = products(source)
    for _ in range(3):
        assert_same(products(source), expected)
    one = products(source, 1)
    products(source, 40)
    assert_same(products(source, 1), one)


@pytest.mark.spec("SOURCE-2", "OFFLOAD-10")
def test_a_pass_that_is_left_anywhere_changes_nothing_in_the_next(source: WeightSource) -> None:
    """As the blocks of a prompt are left, all but the last, before the output table."""
    expected = products(source)
    for n in (*range(len(expected)), len(expected)):
        assert_same(products(source, leave_after=n), dict(list(expected.items())[:n]))


@pytest.mark.spec("SOURCE-2", "OFFLOAD-10")
def test_a_walk_that_was_left_may_be_kept_while_the_next_begins(source: WeightSource) -> None:
    expected = products(source)
    kept = []
    for n in (1, 2, 1):
        walk = source.layers()
        for _ in range(min(n, source.config.num_hidden_layers)):
            layer = next(walk)
            layer.q_proj.matmul(normal(2, layer.q_proj.shape[1]))
        kept.append(walk)
        assert_same(products(source), expected)
    del kept
    assert_same(products(source), expected)


@pytest.mark.spec("OFFLOAD-10")
def test_two_sources_do_not_disturb_each_other(make: Make, kind: Kind, model: Model) -> None:
    """Of one checkpoint, and of another one whose matrices have the same shapes."""
    one, two, other = make(), make(), kind.make(model.config, model.another)
    expected, others = products(one), products(other)
    for matrix, same in zip(matrices(one), matrices(two), strict=True):
        x = normal(3, matrix[1].shape[1])
        np.testing.assert_array_equal(matrix[1].matmul(x), same[1].matmul(x))
    assert not np.array_equal(others["model.layers.0.self_attn.q_proj"], expected["model.layers.0.self_attn.q_proj"])
    two.close()
    other.close()
    assert_same(products(one), expected)


class Plain:
    """What a source gives, as it was seen once: the plainest one with these weights."""

    def __init__(self, source: WeightSource) -> None:
        def plain(matrix: Matrix) -> RowMajorMatrix:
            N, K = matrix.shape
            return RowMajorMatrix(matrix.rows(np.arange(N)), matrix.matmul(np.zeros((1, K), np.float32))[0])

        self.config, self.norm = source.config, source.norm.copy()
        table = source.embed_tokens.rows(np.arange(self.config.vocab_size))
        self.embed_tokens = RowMajorMatrix(table)
        self._layers = []
        for layer in source.layers():
            seen: dict[str, Any] = {part: plain(getattr(layer, part)) for part in PARTS}
            self._layers.append(replace(layer, **seen))
        self.lm_head = plain(source.lm_head)

    def layers(self) -> Iterator[LayerWeights]:
        return iter(self._layers)

    def close(self) -> None:
        """Do nothing."""


@pytest.mark.spec("SOURCE-2", "OFFLOAD-3")
def test_a_transformer_makes_of_it_what_it_makes_of_the_same_weights_row_by_row(source: WeightSource) -> None:
    assert prefill_block(source.config, POSITIONS) < 40
    for got, plain in zip(logits_of(source, POSITIONS), logits_of(Plain(source), POSITIONS), strict=True):
        np.testing.assert_allclose(got.view(np.float32), plain.view(np.float32), atol=2e-4)


@pytest.mark.spec("OFFLOAD-11")
def test_closing_again_is_allowed(make: Make) -> None:
    for use in (lambda source: None, products):
        source = make()
        use(source)
        source.close()
        source.close()


@pytest.mark.spec("OFFLOAD-11", "ERR-1")
@pytest.mark.parametrize("leave_after", [3, None])
def test_a_closed_source_says_so_when_it_is_used(make: Make, leave_after: int | None) -> None:
    source = make()
    transformer = Transformer(source, POSITIONS)
    products(source, leave_after=leave_after)
    source.close()
    for _ in range(2):
        with pytest.raises(RefinferError):
            next(source.layers())
        with pytest.raises(RefinferError):
            transformer.decode([1])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("OFFLOAD-11")
@pytest.mark.parametrize("leave_after", [3, None])
def test_no_thread_and_no_descriptor_is_left_of_a_closed_source(
    kind: Kind, model: Model, leave_after: int | None
) -> None:
    def use() -> None:
        source = kind.make(model.config, model.folder)
        products(source, leave_after=leave_after)
        source.close()

    use()  # whatever is opened once
    before = threads_and_descriptors()
    use()
    if threads_and_descriptors() - before:
        gc.collect()  # slow
    assert not threads_and_descriptors() - before


# What only ours promise: the same bits.


@dataclass(frozen=True)
class Way:
    """How weights are streamed."""

    plan: str
    share: float
    ring: int | None
    threads: int
    paged: bool

    def source_of(self, model: Packed) -> StreamedSource:
        return model.within_a_budget(self.share, self.plan, self.ring, threads=self.threads, paged=self.paged)


ways = st.builds(
    Way,
    plan=st.sampled_from(PLANS),
    share=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    ring=st.none() | st.integers(2, 9),
    threads=st.integers(0, 4),
    paged=st.booleans(),
)


@dataclass(frozen=True)
class Request:
    """A prompt of so many tokens, and further ones."""

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


def check_all_agree(model: Packed, how: Sequence[Way], request: Request) -> None:
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
    check_all_agree(Packed(config, folder / "m", name, folder / "cache", POSITIONS), how, request)


FAMILIES: Final = ["llama", "llama3-rope", "llama-bias", "mistral", "qwen2", "qwen3"]


@pytest.mark.spec("OFFLOAD-3")
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_bits_from_every_source(family: str, name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "golden" / family
    n = FAMILIES.index(family) + list(FORMATS).index(name)
    model, request = Packed(open_folder(folder).config, folder, name, tmp_path / "cache", POSITIONS), Request(33, [2])
    expected = run(model.in_memory(), request)
    assert_same_logits(run(model.packed(), request), expected)
    way = Way(PLANS[n % len(PLANS)], n % 2 / 2, None, n % 3, paged=False)
    assert_same_logits(run(way.source_of(model), request), expected)


SHORT: Final = Request(9, [1, 3])


@pytest.fixture(scope="module")
def storytellers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Packed, Logits]]:
    """Return what gives the storyteller in a format, and its logits from memory, which are those from a mapped file."""

    @cache
    def storyteller(name: str) -> tuple[Packed, Logits]:
        folder = tmp_path_factory.mktemp("storyteller")
        config = open_folder(STORYTELLER).config
        model = Packed(config, STORYTELLER, name, folder / "cache", POSITIONS, chunk_nbytes=None)
        check_all_agree(model, [], SHORT)
        return model, run(model.packed(), SHORT)

    return storyteller


@pytest.mark.spec("OFFLOAD-3")
@settings(max_examples=8)
@given(name=st.sampled_from(list(FORMATS)), way=ways)
def test_the_storyteller_has_the_same_bits_from_every_source(
    name: str, way: Way, storytellers: Callable[[str], tuple[Packed, Logits]]
) -> None:
    model, expected = storytellers(name)
    assert_same_logits(run(way.source_of(model), SHORT), expected)


# The suite itself: it tells right from wrong.


FOUND_BY: Final = {
    "SilentlyRounded": "execution_order",
    "ForgetsBiases": "execution_order",
    "AddsToOut": "written_to_out",
    "LeavesOutAlone": "written_to_out",
    "GivesTheSameResultAgain": "callers_own",
    "ScalesX": "x_stays_as_it_was",
    "MultipliesNoMoreThan64Rows": "for_many",
    "RoundsX": "rounding_of_a_sum",
    "CountsRowsFromTheEnd": "row_that_does_not_exist",
    "ReadsEachRowOnce": "also_repeated",
    "GivesViewsOfRows": "rows_are_the_callers_own",
    "SwapsGateAndUp": "execution_order",
    "SwapsNorms": "norms_are",
    "BeginsWithTheLastLayer": "execution_order",
    "LeavesOutALayer": "shape_that_the_config_says",
    "WalksOnce": "again_and_again",
    "GoesOnWhereAPassWasLeft": "left_anywhere",
    "SharesLayersWithEveryOther": "disturb_each_other",
    "IsEmptyOnceClosed": "says_so",
    "ClosesOnce": "closing_again",
    "LeavesAThread": "no_thread",
    "LeavesADescriptor": "no_descriptor",
}
"""The wrong sources of `own_sources`, and a word of a test that finds each."""


def suite_on(classes: Sequence[str], of: str) -> subprocess.CompletedProcess[str]:
    """Run those tests of this file in another process on classes of `own_sources`."""
    options = [option for name in classes for option in ("--source", f"own_sources:{name}")]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "--tb=no", "-p", "no:cacheprovider", *options, "-k", of, __file__],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.spec("OFFLOAD-12")
def test_somebody_elses_right_sources_pass_and_each_wrong_one_is_found_out() -> None:
    """In one run: all tests of those that are right, of each other one only what must find it."""
    right = ["Right", "Rounded"]
    wanted = [f":{name}-" for name in right] + [f"(:{name}- and {test})" for name, test in FOUND_BY.items()]
    done = suite_on([*right, *FOUND_BY], " or ".join(wanted))
    assert done.returncode == 1, done.stdout + done.stderr
    told = re.findall(r"::(\w+)\[own_sources:(\w+)-.*\] (\w+)", done.stdout)
    assert {name for _, name, _ in told} == {*right, *FOUND_BY}
    assert {name for _, name, how in told if how == "FAILED"} == set(FOUND_BY)
    assert sum(name == "Right" for _, name, _ in told) > 40
    assert not re.search(r"\[(row-major|mapped)", done.stdout)


@pytest.mark.spec("OFFLOAD-12")
@pytest.mark.parametrize("name", ["own_sources", "own_sources:None", "nobody:Own", ":Own"])
def test_somebody_elses_class_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with pytest.raises(pytest.UsageError, match=f"--source {name}: "):
        imported(name)
