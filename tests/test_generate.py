"""Specifies `refinfer.generate`: what a session promises, on the storyteller and on small random models."""

from __future__ import annotations

import gc
import json
import re
import shutil
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

import refinfer
from refinfer.arrays import Float32Array
from refinfer.errors import (
    ConfigError,
    GenerationError,
    InputError,
    PackingError,
    RequestError,
    SafetensorsError,
    TokenizerError,
    WeightsError,
)
from refinfer.generate import STORYTELLER, GenerationStats, Session, load
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.folder import open_folder
from refinfer.model.safetensors import SafetensorsFile, TensorSpec, write_safetensors
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer
from refinfer.offload.run import BudgetedRun
from refinfer.packing.formats import FORMATS
from refinfer.packing.matmul import matmul
from refinfer.sources.packed import PackedSource

EXCERPT = Path(__file__).parent / "data" / "held-out-excerpt.txt"
BLAS = ThreadpoolController()


def stats_of(session: Session, *args: Any, **options: Any) -> GenerationStats:
    "".join(session.generate(*args, **options))
    assert session.stats is not None
    return session.stats


@pytest.mark.spec("GEN-1")
def test_the_pieces_joined_are_the_text(storyteller: Session) -> None:
    pieces = list(storyteller.generate("ROMEO:", max_tokens=50))
    stats = storyteller.stats
    assert stats is not None
    assert stats.text == "".join(pieces)
    assert len(stats.text) == len(stats.token_ids) == 50
    assert storyteller.model.encode(stats.text) == list(stats.token_ids)
    assert stats.prompt_token_ids == tuple(storyteller.model.encode("ROMEO:"))


@pytest.mark.spec("GEN-2")
def test_the_same_greedy_request_gives_the_same_tokens(storyteller: Session) -> None:
    first, second = (stats_of(storyteller, "JULIET:", max_tokens=40) for _ in range(2))
    assert first.token_ids == second.token_ids


@pytest.mark.spec("GEN-2")
def test_the_same_seed_gives_the_same_draws_and_another_seed_others(storyteller: Session) -> None:
    runs = [stats_of(storyteller, "KING", max_tokens=40, temperature=1.0, seed=s).token_ids for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.spec("GEN-2")
def test_seed_0_is_a_seed_like_any_other_and_no_seed_is_a_different_one_each_time(storyteller: Session) -> None:
    def drawn(seed: int | None) -> tuple[int, ...]:
        return stats_of(storyteller, "KING", max_tokens=40, temperature=1.0, seed=seed).token_ids

    zero, none = drawn(0), drawn(None)
    assert drawn(0) == zero
    assert len({zero, none, drawn(None), drawn(1)}) == 4


@pytest.mark.spec("GEN-2", "MODEL-9")
def test_the_storyteller_writes_what_transformers_makes_of_it(storyteller: Session) -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "storyteller.json").read_text())
    stats = stats_of(storyteller, golden["prompt"], max_tokens=len(golden["token_ids"]))
    assert list(stats.prompt_token_ids) == golden["prompt_token_ids"]
    assert stats.text == golden["text"]


@pytest.mark.spec("PACK-28")
@pytest.mark.parametrize("weights", ["auto", "f32", "bf16"])
def test_packed_float_weights_give_the_row_major_models_text(weights: str) -> None:
    with load(weights=weights) as packed, load(weight_cache="off") as row_major:
        texts = [stats_of(session, "ROMEO:", max_tokens=120).text for session in (packed, row_major)]
    assert texts[0] == texts[1]


@pytest.mark.spec("PACK-28")
@pytest.mark.parametrize(("dtype", "own"), [("f32", "f32"), ("f16", "f32"), ("bf16", "bf16")])
def test_auto_keeps_every_weight_whatever_the_config_says_of_its_type(dtype: str, own: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"], dtype=dtype)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    ids = list(range(20))
    folder = tmp_path / "m"
    auto, packed, row_major = (
        logits_of(folder, ids, options) for options in ({}, {"weights": own}, {"weight_cache": "off"})
    )
    np.testing.assert_array_equal(auto, packed)
    np.testing.assert_allclose(auto, row_major, atol=1e-5)


@pytest.mark.spec("PACK-28", "SOURCE-5")
@pytest.mark.parametrize(("dtype", "weights"), [("f32", "f32"), ("f16", "f32"), ("bf16", "f32"), ("bf16", "bf16")])
def test_unpacked_weights_in_a_format_that_loses_nothing_are_the_stored_ones(
    dtype: str, weights: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"], dtype=dtype)
    ids, off = list(range(20)), {"weight_cache": "off"}
    np.testing.assert_array_equal(
        logits_of(tmp_path / "m", ids, off | {"weights": weights}), logits_of(tmp_path / "m", ids, off)
    )


def logits_of(folder: Path, ids: list[int], options: dict[str, str]) -> Float32Array:
    with load(folder, weights=options.get("weights", "auto"), weight_cache=options.get("weight_cache")) as session:
        return session.logits(ids)


@pytest.mark.spec("PACK-28", "PACK-23")
@pytest.mark.parametrize("weights", FORMATS)
def test_packed_logits_are_those_of_the_same_weights_unpacked(weights: str, tiny_folder: Path) -> None:
    """`weight_cache="off"` multiplies the dequantised weights row-major: the oracle."""
    ids = list(range(60))
    with load(tiny_folder, weights=weights) as packed, load(tiny_folder, weights=weights, weight_cache="off") as oracle:
        np.testing.assert_allclose(packed.logits(ids), oracle.logits(ids), atol=2e-4)
        first, second = (stats_of(s, token_ids=ids[:5], max_tokens=20).token_ids for s in (packed, oracle))
    assert first == second


@pytest.mark.spec("PACK-13", "GEN-5")
@pytest.mark.parametrize("weight_cache", [None, ":memory", "off"], ids=["file", "memory", "off"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_that_are_not_finite_are_named_when_they_are_quantised(
    tmp_path: Path, tiny_folder: Path, weights: str, weight_cache: str | None
) -> None:
    bad = damage(tiny_folder, tmp_path, np.inf)
    with pytest.raises(WeightsError, match=f"'{bad}' holds NaN or infinity"):
        load(tmp_path, weights=weights, weight_cache=weight_cache)


@pytest.mark.spec("PACK-16", "ERR-1")
def test_a_finite_weight_too_large_for_bfloat16_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    damage(tiny_folder, tmp_path, 3.4028e38)
    with pytest.raises(PackingError, match="too large for bfloat16; use f32"):
        load(tmp_path, weights="bf16")


@pytest.mark.spec("PACK-26")
def test_packing_into_memory_keeps_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", replace(SHAPES["storyteller"], vocab_size=300), dtype="bf16")
    tracemalloc.start()
    try:
        with load(tmp_path / "m", weights="bf16", weight_cache=":memory", max_positions=8) as session:
            assert isinstance(session.source, PackedSource)
            _, peak = tracemalloc.get_traced_memory()
            assert peak < session.weight_cache.packed_bytes + 3_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.spec("GEN-3")
def test_generation_stops_after_max_tokens(storyteller: Session) -> None:
    stats = stats_of(storyteller, "ROMEO:", max_tokens=3)
    assert (len(stats.token_ids), stats.finish_reason) == (3, "length")


@pytest.mark.spec("GEN-3")
def test_a_single_token_has_no_rate(storyteller: Session) -> None:
    assert stats_of(storyteller, "ROMEO:", max_tokens=1).tokens_per_s is None


@pytest.mark.spec("GEN-3", "CONFIG-9")
def test_generation_stops_at_an_end_of_text_id(tmp_path: Path) -> None:
    folder = shutil.copytree(STORYTELLER, tmp_path / "model")
    newline = open_folder(folder).encode("\n")[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9999, newline]}))
    with load(folder) as session:
        stats = stats_of(session, "ROMEO", max_tokens=100)
    assert stats.finish_reason == "stop"
    assert stats.token_ids.index(newline) == len(stats.token_ids) - 1
    assert "\n" not in stats.text


@pytest.mark.spec("GEN-4")
@pytest.mark.parametrize(
    ("request_", "error", "why"),
    [
        ({"prompt": ""}, RequestError, "the prompt is empty"),
        ({"token_ids": []}, RequestError, "the prompt is empty"),
        ({}, RequestError, "either a prompt or token_ids"),
        ({"prompt": "a", "token_ids": [1]}, RequestError, "either a prompt or token_ids"),
        ({"token_ids": [65]}, RequestError, "token id 65 is not in the vocabulary of 0 to 64"),
        ({"token_ids": [-1]}, RequestError, "token id -1"),
        ({"prompt": "é"}, TokenizerError, "no token for the character 'é'"),
        ({"prompt": "a", "max_tokens": 0}, RequestError, "max-tokens must be a whole number from 1 up"),
        ({"prompt": "a", "max_tokens": -5}, RequestError, "max-tokens must be a whole number from 1 up"),
        ({"prompt": "a" * 513}, RequestError, "context of 512 positions"),
        ({"prompt": "a" * 512}, RequestError, "context of 512 positions"),
        ({"prompt": "a" * 500, "max_tokens": 13}, RequestError, "a prompt of 500 tokens and 13 more do not fit"),
        ({"prompt": "a", "temperature": float("nan")}, RequestError, "temperature"),
        ({"prompt": "a", "seed": -1}, RequestError, "seed"),
    ],
    ids=[
        "empty prompt", "no token ids", "neither", "both", "id too large", "negative id", "unknown character",
        "no tokens wanted", "fewer than none", "prompt longer than the context", "prompt as long as the context",
        "prompt and tokens longer than the context", "temperature nan", "negative seed",
    ],
)  # fmt: skip
def test_a_request_is_refused_when_it_is_made(
    storyteller: Session, request_: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        storyteller.generate(**request_)


@pytest.mark.spec("GEN-4")
def test_a_prompt_fills_the_context_to_the_last_position(storyteller: Session) -> None:
    assert len(stats_of(storyteller, "a" * 500, max_tokens=12).token_ids) == 12
    assert len(stats_of(storyteller, "a" * 500).token_ids) == 12


@pytest.mark.spec("GEN-4")
def test_a_request_beyond_the_reserved_positions_is_refused() -> None:
    with load(max_positions=20) as session, pytest.raises(RequestError, match="20 positions reserved"):
        session.generate("ROMEO:", max_tokens=15)


@pytest.mark.spec("GEN-4")
def test_a_request_beyond_the_sliding_window_is_refused(tmp_path: Path) -> None:
    config = replace(SHAPES["tiny"], model_type="mistral", sliding_window=16)
    write_checkpoint(tmp_path / "m", config)
    with load(tmp_path / "m") as session:
        assert len(stats_of(session, token_ids=[1] * 10, max_tokens=6).token_ids) == 6
        with pytest.raises(RequestError, match="sliding window of 16 positions"):
            session.generate(token_ids=[1] * 10, max_tokens=7)


def damage(healthy: Path, folder: Path, value: float) -> str:
    """Write a copy of a float32 checkpoint with one weight replaced; return the name of its tensor."""
    file = SafetensorsFile(healthy / "model.safetensors")
    bad = "model.layers.1.mlp.up_proj.weight"
    specs = []
    for name, tensor in file.items():
        values = file.view(name).copy()
        if name == bad:
            values[3, 4] = value
        specs.append(TensorSpec(name, "F32", tensor.shape, [values]))
    shutil.copy(healthy / "config.json", folder)
    write_safetensors(folder / "model.safetensors", specs)
    return bad


@pytest.mark.spec("GEN-5")
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["NaN", "infinity"])
def test_damaged_weights_are_found_before_a_token_is_shown(tiny_folder: Path, tmp_path: Path, value: float) -> None:
    bad = damage(tiny_folder, tmp_path, value)
    with load(tmp_path) as session:
        pieces = session.generate(token_ids=[1, 2, 3])
        with pytest.raises(WeightsError, match=f"'{bad}' holds NaN or infinity"):
            next(pieces)
        with pytest.raises(WeightsError, match=bad):
            session.logits([1, 2])


@pytest.mark.spec("GEN-5", "ERR-1")
def test_activations_that_overflow_are_a_failure_of_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    file = SafetensorsFile(tiny_folder / "model.safetensors")
    specs = [
        TensorSpec(n, "F32", t.shape, [np.full(t.shape, 3e38, np.float32) if "down" in n else file.view(n)])
        for n, t in file.items()
    ]
    shutil.copy(tiny_folder / "config.json", tmp_path)
    write_safetensors(tmp_path / "model.safetensors", specs)
    with load(tmp_path) as session, pytest.raises(GenerationError, match="overflowed"), np.errstate(all="ignore"):
        list(session.generate(token_ids=[1, 2, 3]))


@pytest.mark.spec("GEN-6")
def test_logits_do_not_disturb_a_generation(storyteller: Session) -> None:
    plain = "".join(storyteller.generate("ROMEO:", max_tokens=30))
    pieces = storyteller.generate("ROMEO:", max_tokens=30)
    start = next(pieces)
    logits = storyteller.logits(storyteller.model.encode("KING RICHARD"))
    assert logits.shape == (12, 65)
    assert logits.dtype == np.float32
    assert start + "".join(pieces) == plain


@pytest.mark.spec("GEN-6", "GEN-1")
def test_numpy_ids_are_ids(storyteller: Session) -> None:
    ids = np.array(storyteller.model.encode("ROMEO:"))
    np.testing.assert_array_equal(storyteller.logits(ids), storyteller.logits(ids.tolist()))
    stats = stats_of(storyteller, token_ids=ids, max_tokens=3)
    assert json.loads(json.dumps(stats.to_json()))["prompt_token_ids"] == ids.tolist()


@pytest.mark.spec("GEN-6", "MODEL-12")
@pytest.mark.parametrize("ids", [[], [65], [0] * 513], ids=["none", "out of range", "too many"])
def test_logits_of_impossible_tokens_are_refused(storyteller: Session, ids: list[int]) -> None:
    with pytest.raises(RequestError):
        storyteller.logits(ids)


@pytest.mark.spec("GEN-6")
def test_logits_reach_to_the_last_position(storyteller: Session) -> None:
    assert storyteller.logits([0] * 512).shape == (512, 65)


def blas_threads() -> int:
    (number,) = {info["num_threads"] for info in BLAS.info() if info["user_api"] == "blas"}
    assert isinstance(number, int)
    return number


@pytest.mark.spec("GEN-7")
@pytest.mark.parametrize("threads", [1, 3])
def test_every_product_is_computed_with_the_blas_threads_asked_for_and_the_caller_sees_none_of_it(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the prompt, of each token, of their logits, and those of `logits`; BLAS itself is asked, and was set to 2."""
    seen: list[int] = []

    def noted(*arguments: Any) -> Float32Array:
        seen.append(blas_threads())
        return matmul(*arguments)

    def taken() -> set[int]:
        assert len(seen) > 7
        found = set(seen)
        seen.clear()
        return found

    monkeypatch.setattr("refinfer.sources.matrices.matmul", noted)
    with threadpool_limits(2, "blas"):
        with load(threads=threads, weight_cache=":memory") as session:
            assert blas_threads() == 2
            for _ in session.generate("ROMEO:", max_tokens=3):
                assert blas_threads() == 2
                assert taken() == {threads}
            session.logits([1, 2, 3])
            assert taken() == {threads}
            with pytest.raises(RequestError):
                session.logits([65])
        assert blas_threads() == 2


@pytest.mark.spec("CAL-11")
def test_within_a_budget_the_tokens_after_a_prompt_try_one_thread_and_several_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this clock neither is faster, so one thread stays; BLAS itself is asked."""
    seen: list[int] = []

    def noted(self: Transformer, token_ids: Any) -> Float32Array:
        seen.append(blas_threads())
        return decode(self, token_ids)

    decode = Transformer.decode
    monkeypatch.setattr(Transformer, "decode", noted)
    monkeypatch.setattr("refinfer.generate.default_threads", lambda _: 3)
    monkeypatch.setattr(BudgetedRun, "may_try_threads", lambda _, many: many == 3)
    with load(weight_cache=tmp_path / "weights", budget="1GB", clock=SteppingClock()) as session:
        stats_of(session, "ROMEO:", max_tokens=11)
        assert seen == [3, 1] * 3 + [1] * 4
        seen.clear()
        stats_of(session, "JULIET:", max_tokens=4)
        assert seen == [1] * 3


@pytest.mark.spec("GEN-9")
def test_a_later_generation_ends_an_earlier_one(storyteller: Session) -> None:
    expected = "".join(storyteller.generate("JULIET:", max_tokens=12))
    first = storyteller.generate("ROMEO:", max_tokens=12)
    next(first)
    second = storyteller.generate("JULIET:", max_tokens=12)
    start = next(second)
    with pytest.raises(RequestError, match="ended by a later one"):
        next(first)
    assert start + "".join(second) == expected


@pytest.mark.spec("GEN-8")
def test_a_closed_session_refuses_further_work() -> None:
    session = load()
    under_way = session.generate("ROMEO:")
    next(under_way)
    weights = weakref.ref(session.source)
    session.close()
    session.close()
    gc.collect()
    assert weights() is None
    with pytest.raises(RequestError, match="closed"):
        next(under_way)
    for refused in (lambda: session.generate("ROMEO:"), lambda: session.logits([1]), lambda: session.source):
        with pytest.raises(RequestError, match="closed"):
            refused()


@pytest.mark.spec("GEN-11")
def test_the_storyteller_is_small() -> None:
    assert sum(path.stat().st_size for path in STORYTELLER.iterdir()) <= 5_000_000
    config = open_folder(STORYTELLER).config
    assert config.n_parameters <= 2_400_000
    assert replace(config, dtype="float32") == SHAPES["storyteller"]


def loss_of(session: Session, text: str) -> float:
    """Mean nats per character over consecutive windows of the whole context, as the training script measures it."""
    ids = session.model.encode(text)
    total = 0.0
    for start in range(0, len(ids) - 1, 512):
        window = ids[start : start + 513]
        logits = session.logits(window[:-1]).astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        total -= log_p[np.arange(len(window) - 1), window[1:]].sum()
    return total / (len(ids) - 1)


def perplexities(text: str) -> dict[str, float]:
    """Of the storyteller on a text, in every weight format."""
    result = {}
    for weights in FORMATS:
        with load(weights=weights) as session:
            result[weights] = float(np.exp(loss_of(session, text)))
    return result


COSTS_AT_MOST = {"f32": 1.0001, "bf16": 1.0, "int8": 1.001, "int4": 1.02}


@pytest.mark.spec("GEN-11", "PACK-29")
def test_the_storyteller_predicts_the_beginning_of_held_out_text_about_as_well_in_every_format() -> None:
    found = perplexities(EXCERPT.read_text()[:2500])
    assert np.log(found["bf16"]) <= 1.65
    assert all(found[weights] <= at_most * found["bf16"] for weights, at_most in COSTS_AT_MOST.items())


@pytest.mark.slow
@pytest.mark.spec("GEN-11", "PACK-29")
def test_the_storyteller_predicts_held_out_text_as_well_as_its_model_card_says_in_every_format() -> None:
    found = perplexities(EXCERPT.read_text())
    assert np.log(found["bf16"]) <= 1.65
    assert all(found[weights] <= at_most * found["bf16"] for weights, at_most in COSTS_AT_MOST.items())
    card = (STORYTELLER / "MODEL_CARD.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|", card, flags=re.MULTILINE)
    assert {name: float(value) for name, value in rows} == pytest.approx(found, abs=2e-3)


@pytest.mark.spec("GEN-11")
def test_the_storytellers_text_reads_like_a_play(storyteller: Session) -> None:
    text = stats_of(storyteller, "ROMEO:", max_tokens=200).text
    assert text.count("\n") >= 3
    assert all(len(line) < 80 for line in text.splitlines())


@pytest.mark.spec("SYNTH-1")
@pytest.mark.parametrize("name", ["tiny", "qwen2-0.5b", "qwen3-0.6b", "mistral-7b", "llama-1b"])
def test_a_random_checkpoint_of_every_family_generates(name: str, tmp_path: Path) -> None:
    config = replace(
        SHAPES[name], vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    write_checkpoint(tmp_path / "m", config, dtype="f16")
    with load(tmp_path / "m") as session:
        assert len(stats_of(session, "hello", max_tokens=5).token_ids) == 5
        with session.source.forward_pass() as weights:
            norms = [norm for layer in weights.layers for norm in (layer.input_layernorm, layer.q_norm)]
            assert all(np.ptp(norm) > 0 for norm in norms if norm is not None)


@pytest.mark.spec("GEN-4", "ERR-1")
@pytest.mark.parametrize(
    ("damage", "error", "why"),
    [
        (shutil.rmtree, ConfigError, "is not a folder"),
        (lambda m: (m / "config.json").unlink(), ConfigError, "config.json does not exist"),
        (lambda m: (m / "config.json").write_text("{"), ConfigError, "not valid JSON"),
        (
            lambda m: (m / "config.json").write_text('{"model_type": "gpt2"}'),
            ConfigError,
            "llama, mistral, qwen2, qwen3",
        ),
        (lambda m: (m / "model.safetensors").unlink(), SafetensorsError, "has neither model.safetensors nor"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 100), SafetensorsError, "announces a header"),
        (lambda m: (m / "tokenizer.json").write_text("[]"), TokenizerError, "tokenizer"),
    ],
    ids=["no folder", "no config", "broken config", "gpt2", "no weights", "lying weights", "broken tokenizer"],
)
def test_an_unusable_folder_is_refused(
    damage: Callable[[Path], object], error: type[InputError], why: str, tmp_path: Path, tiny_config: ModelConfig
) -> None:
    folder = tmp_path / "m"
    write_checkpoint(folder, tiny_config)
    damage(folder)
    with pytest.raises(error, match=why) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.spec("GEN-4")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weights": "fp8"}, "weights must be one of auto, f32, bf16, int8, int4"),
        ({"weight_cache": ":memoryfoo"}, "neither :memory nor a file"),
        ({"max_positions": 0}, "max_positions"),
        ({"max_positions": 513}, "from 1 to this model's 512"),
        ({"threads": 0}, "threads"),
    ],
    ids=["unknown format", "unknown weight cache", "no positions", "more positions than the model has", "no threads"],
)
def test_impossible_options_of_load_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        load(**options)


@pytest.mark.spec("TOKEN-3", "GEN-1")
def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with load(folder) as session:
        with pytest.raises(TokenizerError, match="give the prompt as --token-ids"):
            session.generate("hello")
        stats = stats_of(session, token_ids=[1, 2], max_tokens=4)
    assert (stats.text, len(stats.token_ids)) == ("", 4)


@pytest.mark.spec("ERR-1")
def test_every_error_is_a_refinfer_error_with_an_exit_status() -> None:
    errors = [v for v in vars(refinfer.errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert all(issubclass(e, refinfer.RefinferError) for e in errors)
    assert {e.exit_status for e in errors if issubclass(e, InputError)} == {2}
    assert GenerationError.exit_status == 1


class SteppingClock:
    """A clock that goes on by one second each time it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        self.seconds += 1
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.mark.spec("ERR-3", "GEN-1")
def test_times_come_from_the_clock_that_load_was_handed() -> None:
    with load(clock=SteppingClock(), weight_cache=":memory") as session:
        first, second = (stats_of(session, "ROMEO:", max_tokens=6) for _ in range(2))
    assert first.tokens_per_s == second.tokens_per_s == 1.0
    assert first.time_to_first_token_s > second.time_to_first_token_s == 1.0
