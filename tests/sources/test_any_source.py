"""Specifies weight sources, wherever the weights are: all of ours, or anybody's own: `pytest --source package:Class`.

`Class(config, folder)` makes a source of the checkpoint in a folder (`config.json`, `model.safetensors`). Its weights
are the checkpoint's, bit for bit, unless the class says otherwise: `rounding = 0.01` says that no weight is wrong by
more than a hundredth of the largest of its row. `--source` may be given several times; with the path of this file,
only these tests run. A source that checks its weights may have a method `damage`, which changes a weight where it lies,
and called again puts it back: then a pass during which that happens must end with an error.

The laws are those at the head of `refinfer.model.weights`. What only ours promise is in `test_same_bits.py`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from refinfer.arrays import Float32Array
from refinfer.errors import RefinferError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer, prefill_block
from refinfer.model.weights import LayerWeights, Matrix, RowMajorMatrix, Weights, WeightSource

sys.path.insert(0, str(Path(__file__).parents[1] / "offload"))
from packed_model import logits_of, threads_and_descriptors

sys.path.insert(0, str(Path(__file__).parent))
from source_kinds import KINDS, POSITIONS, Kind, imported


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        own: list[str] = metafunc.config.getoption("source")
        kinds = {name: imported(name) for name in own} if own else KINDS
        if "damage" in metafunc.fixturenames:
            kinds = {name: kind for name, kind in kinds.items() if kind.damage}
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


@pytest.fixture
def damage(kind: Kind, source: WeightSource, model: Model) -> Callable[[], None]:
    """Change a weight of the source where it lies; again puts it back."""
    assert kind.damage
    return partial(kind.damage, source, model.folder)


PARTS: Final = {
    field.name: ("mlp" if field.name in ("gate_proj", "up_proj", "down_proj") else "self_attn") + f".{field.name}"
    for field in fields(LayerWeights)
    if field.name.endswith("_proj")
}


def matrices_of(weights: Weights) -> Iterator[tuple[str, Matrix]]:
    """Walk over the matrices of a pass, as a transformer does: name, matrix."""
    for i, layer in enumerate(weights.layers):
        for part, name in PARTS.items():
            yield f"model.layers.{i}.{name}", getattr(layer, part)
    yield "lm_head", weights.lm_head


def matrices(source: WeightSource) -> Iterator[tuple[str, Matrix]]:
    """Walk over the matrices in a pass of its own."""
    with source.forward_pass() as weights:
        yield from matrices_of(weights)


def embedded(source: WeightSource, ids: Sequence[int]) -> Float32Array:
    """Return rows of the embedding table, looked up in a pass of its own."""
    with source.forward_pass() as weights:
        return weights.embed_tokens.rows(np.array(ids, np.int64))


def head_of(config: ModelConfig) -> str:
    return "model.embed_tokens" if config.tie_word_embeddings else "lm_head"


def normal(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


Bits = dict[str, npt.NDArray[np.uint32]]


class LeftError(Exception):
    """Raised in the middle of a pass."""


def products(source: WeightSource, M: int = 3, leave_after: int | None = None, *, with_head: bool = True) -> Bits:
    """Return the bits of the product with each matrix.

    In a whole pass, in one that an exception ends after some of them, or in one that ends before the output table.
    """
    found: Bits = {}
    with suppress(LeftError), source.forward_pass() as weights:
        weights.embed_tokens.rows(np.arange(M))
        for n, (name, matrix) in enumerate(matrices_of(weights)):
            if n == leave_after:
                raise LeftError
            if with_head or name != "lm_head":
                found[name] = matrix.matmul(normal(M, matrix.shape[1])).view(np.uint32)
        if leave_after == len(found):
            raise LeftError
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
    with source.forward_pass() as weights:
        assert tuple(weights.embed_tokens.shape) == shapes["model.embed_tokens.weight"]
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
    with source.forward_pass() as weights:
        for i, layer in enumerate(weights.layers):
            for part, place in places.items():
                name, norm = f"model.layers.{i}.{place}.weight", getattr(layer, part)
                assert (norm is None) == (name not in shapes)
                if norm is not None:
                    np.testing.assert_array_equal(bits_of(norm), bits_of(model.tensor(name)), err_msg=name, strict=True)
        np.testing.assert_array_equal(bits_of(weights.norm), bits_of(model.tensor("model.norm.weight")), strict=True)


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
        rows = embedded(source, ids)
        assert (rows.shape, str(rows.dtype)) == ((len(ids), w.shape[1]), "float32")
        allowed = rounding * np.abs(w[ids]).max(axis=1, keepdims=True, initial=0)
        assert (np.abs(rows - w[ids]) <= allowed).all()
        for row, i in zip(rows, ids, strict=True):  # one at a time, the same
            np.testing.assert_array_equal(bits_of(embedded(source, [i]))[0], bits_of(row))


@pytest.mark.spec("SOURCE-1")
def test_rows_are_the_callers_own(source: WeightSource) -> None:
    for ids in ([7], [7, 8], [0, 7]):
        expected = embedded(source, ids).copy()
        embedded(source, ids)[:] = 7
        np.testing.assert_array_equal(embedded(source, ids), expected)


@pytest.mark.spec("SOURCE-6", "ERR-1")
def test_a_row_that_does_not_exist_is_refused(source: WeightSource) -> None:
    V = source.config.vocab_size
    for row in (V, V + 1000, -1, -V):
        for ids in ([row], [1, row], [row, 1]):
            with pytest.raises((RefinferError, IndexError)):
                embedded(source, ids)
    products(source)


@pytest.mark.spec("SOURCE-1", "OFFLOAD-10")
def test_every_matrix_gives_its_rows_and_the_pass_goes_on(source: WeightSource, model: Model, kind: Kind) -> None:
    expected = products(source)
    embedded(source, range(3))
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
    with source.forward_pass() as weights:
        same = np.array_equal(weights.embed_tokens.rows(ids), weights.lm_head.rows(ids))
    assert same == source.config.tie_word_embeddings


# Passes.


@pytest.mark.spec("SOURCE-2", "OFFLOAD-10")
def test_a_pass_can_follow_another_again_and_again(source: WeightSource) -> None:
    expected = products(source)
    for _ in range(3):
        assert_same(products(source), expected)
    one = products(source, 1)
    products(source, 40)
    assert_same(products(source, 1), one)


@pytest.mark.spec("SOURCE-2", "OFFLOAD-10")
def test_a_pass_that_is_left_anywhere_changes_nothing_in_the_next(make: Make) -> None:
    """Also the first pass of all."""
    expected, source = products(make()), make()
    for n in (1, *range(len(expected) + 1)):
        assert_same(products(source, leave_after=n), dict(list(expected.items())[:n]))


@pytest.mark.spec("SOURCE-2", "OFFLOAD-10")
def test_a_pass_may_end_before_the_output_table_is_used(source: WeightSource) -> None:
    """As it does for all blocks of a prompt but the last."""
    expected = products(source)
    for _ in range(2):
        assert_same(products(source, with_head=False), dict(list(expected.items())[:-1]))
    assert_same(products(source), expected)


@pytest.mark.spec("SOURCE-2", "OFFLOAD-10")
def test_layers_of_a_pass_that_was_left_may_be_kept_while_the_next_begins(source: WeightSource) -> None:
    expected = products(source)
    kept = []
    for n in (1, 2, 1):
        with suppress(LeftError), source.forward_pass() as weights:
            walk = iter(weights.layers)
            kept.append((weights, walk))
            for _ in range(min(n, source.config.num_hidden_layers)):
                layer = next(walk)
                layer.q_proj.matmul(normal(2, layer.q_proj.shape[1]))
            raise LeftError
        assert_same(products(source), expected)
    del kept
    assert_same(products(source), expected)


@pytest.mark.spec("OFFLOAD-10")
@pytest.mark.parametrize(
    "error", [LeftError(), RefinferError("no"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_what_is_raised_in_a_pass_reaches_the_caller_as_it_is(source: WeightSource, error: BaseException) -> None:
    expected = products(source)

    def leave() -> None:
        with source.forward_pass() as weights:
            weights.embed_tokens.rows(np.arange(3))
            raise error

    with pytest.raises(type(error)) as caught:
        leave()
    assert caught.value is error
    assert_same(products(source), expected)


@pytest.mark.spec("OFFLOAD-4")
def test_damage_during_a_pass_is_found_when_it_ends_and_not_looked_for_when_it_is_left(
    source: WeightSource, damage: Callable[[], None]
) -> None:
    expected = products(source)

    def use_and_damage(leave: Exception | None = None, *, with_head: bool = True) -> None:
        with source.forward_pass() as weights:
            for name, matrix in matrices_of(weights):
                if with_head or name != "lm_head":
                    matrix.matmul(normal(1, matrix.shape[1]))
            damage()
            if leave:
                raise leave

    for with_head in (True, False):
        with pytest.raises(RefinferError):
            use_and_damage(with_head=with_head)
        damage()
        assert_same(products(source), expected)
    with pytest.raises(LeftError):
        use_and_damage(LeftError())
    damage()
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

        def plain_layer(layer: LayerWeights) -> LayerWeights:
            seen: dict[str, Any] = {part: plain(getattr(layer, part)) for part in PARTS}
            return replace(layer, **seen)

        self.config = source.config
        with source.forward_pass() as weights:
            table = RowMajorMatrix(weights.embed_tokens.rows(np.arange(self.config.vocab_size)))
            layers = [plain_layer(layer) for layer in weights.layers]
            self._weights = Weights(table, layers, weights.norm.copy(), plain(weights.lm_head))

    def forward_pass(self) -> AbstractContextManager[Weights]:
        return nullcontext(self._weights)

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
def test_a_pass_over_a_closed_source_does_not_begin(make: Make, leave_after: int | None) -> None:
    source = make()
    transformer = Transformer(source, POSITIONS)
    products(source, leave_after=leave_after)
    source.close()
    for _ in range(2):
        with pytest.raises(RefinferError), source.forward_pass():
            pass
        with pytest.raises(RefinferError):
            transformer.decode([1])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("OFFLOAD-11")
@pytest.mark.parametrize("leave_after", [3, None])
def test_no_thread_and_no_descriptor_is_left_of_a_closed_source(
    kind: Kind, model: Model, leave_after: int | None
) -> None:
    """Also while somebody still keeps the source."""

    def used() -> WeightSource:
        source = kind.make(model.config, model.folder)
        products(source, leave_after=leave_after)
        source.close()
        return source

    kept = [used()]  # and whatever is opened once
    before = threads_and_descriptors()
    kept.append(used())
    if threads_and_descriptors() - before:
        gc.collect()  # slow
    assert not threads_and_descriptors() - before
    del kept
