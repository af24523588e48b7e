"""Specifies `refinfer.model.config_json`: what a `config.json` means, and what is refused in it."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.errors import ConfigError
from refinfer.model.config import SHAPES, Llama3RopeScaling, ModelConfig
from refinfer.model.config_json import load_config, parse_config, to_json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def raw_config(model_type: str = "llama", /, **keys: object) -> dict[str, Any]:
    """Return the object of a `config.json` that has the sizes every model must give, no end-of-text id, and `keys`."""
    return {"model_type": model_type, **SIZES, "eos_token_id": None, **keys}


def without(key: str, raw: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if k != key}


def write_folder(folder: Path, **files: object) -> Path:
    """Write each keyword as a JSON file of that name into `folder`."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.mark.spec("CONFIG-3")
@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
        ({"rope_scaling": without("rope_type", LLAMA3) | {"type": "llama3"}}, {"rope_parameters": LLAMA3}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
    ids=["theta", "no scaling", "scaling", "type", "dtype"],
)
def test_older_and_newer_keys_have_the_same_effect(older: dict[str, Any], newer: dict[str, Any]) -> None:
    assert parse_config(raw_config(**older)) == parse_config(raw_config(**newer)) != parse_config(raw_config())


@pytest.mark.spec("CONFIG-3")
def test_rope_keys_arrive_in_the_config() -> None:
    config = parse_config(raw_config(rope_parameters=LLAMA3 | {"rope_theta": 5e5}))
    assert (config.rope_theta, config.rope_scaling) == (5e5, Llama3RopeScaling(8.0, 1.0, 4.0, 8192))


FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 32, "head_dim": 4, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "head_dim": 4, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "head_dim": 4, "max_position_embeddings": 32768, "qkv_bias": True},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "qk_norm": True},
}


@pytest.mark.spec("CONFIG-4")
@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_defaults_of_the_family(family: str) -> None:
    defaults = FAMILY_DEFAULTS[family] | {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "dtype": "float32"}
    assert parse_config(raw_config(family)) == ModelConfig(model_type=family, **SIZES, **defaults)


@pytest.mark.spec("CONFIG-4", "CONFIG-9")
@pytest.mark.parametrize(
    ("family", "ids"), [("llama", (2,)), ("mistral", (2,)), ("qwen2", ()), ("qwen3", ())], ids=FAMILIES
)
def test_an_absent_end_of_text_id_takes_the_default_of_the_family(family: str, ids: tuple[int, ...]) -> None:
    assert parse_config(without("eos_token_id", raw_config(family))).eos_token_ids == ids


@pytest.mark.spec("CONFIG-4")
@pytest.mark.parametrize("family", FAMILIES)
def test_null_key_value_heads_mean_one_for_each_query_head(family: str) -> None:
    assert parse_config(raw_config(family, num_key_value_heads=None)).num_key_value_heads == 32


@pytest.mark.spec("CONFIG-4")
@pytest.mark.parametrize(
    ("family", "kv_heads"), [("llama", 64), ("mistral", 8), ("qwen2", 32), ("qwen3", 32)], ids=FAMILIES
)
def test_absent_key_value_heads_follow_the_query_heads_in_a_llama_only(family: str, kv_heads: int) -> None:
    assert parse_config(raw_config(family, num_attention_heads=64)).num_key_value_heads == kv_heads


@pytest.mark.spec("CONFIG-4")
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_qwen_window_needs_its_switch_and_a_layer_that_slides(family: str) -> None:
    slides = {"use_sliding_window": True, "max_window_layers": 1}
    assert parse_config(raw_config(family, sliding_window=512)).sliding_window is None
    assert parse_config(raw_config(family, sliding_window=512, **slides)).sliding_window == 512
    assert parse_config(raw_config(family, **slides)).sliding_window == 4096
    all_layers_see_everything = slides | {"max_window_layers": SIZES["num_hidden_layers"]}
    assert parse_config(raw_config(family, sliding_window=512, **all_layers_see_everything)).sliding_window is None
    for n_layers, window in ((28, None), (29, 4096)):  # 28 is the default of `max_window_layers`
        deep = raw_config(family, num_hidden_layers=n_layers, use_sliding_window=True)
        assert parse_config(deep).sliding_window == window


@pytest.mark.spec("CONFIG-4")
def test_llama3_scaling_without_an_original_context_takes_the_models_own() -> None:
    raw = raw_config(rope_scaling=without("original_max_position_embeddings", LLAMA3), max_position_embeddings=4096)
    scaling = parse_config(raw).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 4096


@pytest.mark.spec("CONFIG-6")
def test_the_older_scaling_counts_even_if_the_newer_key_is_there() -> None:
    raw = raw_config(rope_scaling={"rope_type": "yarn"}, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    with pytest.raises(ConfigError, match="'yarn'"):
        parse_config(raw)


@pytest.mark.spec("CONFIG-4")
@pytest.mark.parametrize("window", [None, 512])
def test_a_mistral_window_is_what_the_file_says(window: int | None) -> None:
    assert parse_config(raw_config("mistral", sliding_window=window)).sliding_window == window


@pytest.mark.spec("CONFIG-4")
@pytest.mark.parametrize(
    ("family", "qkv_bias", "o_bias", "mlp_bias"),
    [
        ("llama", True, True, True),
        ("mistral", False, False, False),
        ("qwen2", True, False, False),
        ("qwen3", True, True, False),
    ],
)
def test_bias_keys_count_only_in_families_that_read_them(
    family: str, qkv_bias: bool, o_bias: bool, mlp_bias: bool
) -> None:
    config = parse_config(raw_config(family, attention_bias=True, mlp_bias=True))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (qkv_bias, o_bias, mlp_bias)


@pytest.mark.spec("CONFIG-5")
@pytest.mark.parametrize("model_type", ["gpt2", "Llama", "qwen2_moe", "", None, 7, ["llama"]], ids=repr)
def test_another_architecture_is_refused_with_the_list_of_those_supported(model_type: object) -> None:
    with pytest.raises(ConfigError, match="supported are llama, mistral, qwen2, qwen3") as refusal:
        parse_config(raw_config() | {"model_type": model_type})
    assert f"model_type is {model_type!r}" in str(refusal.value)


@pytest.mark.spec("CONFIG-5")
def test_a_config_that_names_no_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_type is None"):
        parse_config(without("model_type", raw_config()))


@pytest.mark.spec("CONFIG-6")
@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2.0"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor is 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 2.0}}, "rope_parameters: partial_rotary_factor is 2.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0}}, "rope_parameters: partial_rotary_factor is 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters: rope_type is 'dynamic'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_a_feature_that_is_not_implemented_is_refused_by_name(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        parse_config(raw_config(**keys))


@pytest.mark.spec("CONFIG-7")
@pytest.mark.parametrize("key", SIZES)
def test_a_missing_size_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        parse_config(without(key, raw_config()))


NO_SIZES = {
    "text": "32",
    "fraction": 32.0,
    "flag": True,
    "list": [32],
    "zero": 0,
    "negative": -1,
    "large": 1 << 31,
    "beyond float": 10**400,
}
NO_POSITIVE_NUMBERS = {
    "text": "1",
    "flag": True,
    "list": [1.0],
    "zero": 0,
    "negative": -1e-5,
    "nan": math.nan,
    "infinity": math.inf,
    "beyond float32": 1e39,
    "beyond float": 10**400,
}


@pytest.mark.spec("CONFIG-7")
@pytest.mark.parametrize("value", NO_SIZES.values(), ids=NO_SIZES)
@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_an_impossible_size_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be a whole number from 1 to"):
        parse_config(raw_config(**{key: value}))


@pytest.mark.spec("CONFIG-7")
@pytest.mark.parametrize("value", NO_POSITIVE_NUMBERS.values(), ids=NO_POSITIVE_NUMBERS)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_number_that_is_not_positive_and_finite_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be a positive number"):
        parse_config(raw_config(**{key: value}))


@pytest.mark.spec("CONFIG-7")
@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads (5) must divide num_attention_heads (32)"),
        ({"head_dim": 7}, "head_dim must be even for rotary embeddings, not 7"),
        ({"hidden_size": 96}, "head_dim must be even for rotary embeddings, not 3"),
        ({"hidden_size": 31}, "head_dim must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"mlp_bias": 0}, "mlp_bias must be true or false"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
        ({"rope_parameters": [8.0]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters: rope_theta must be a positive number"),
        ({"rope_scaling": without("factor", LLAMA3)}, "rope_scaling: factor is missing"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0.5}}, "original_max_position_embeddings must"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be larger"),
    ],
    ids=lambda value: value if isinstance(value, str) else "_".join(value),
)
def test_an_impossible_value_is_refused_naming_the_key(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        parse_config(raw_config(**keys))


@pytest.mark.spec("CONFIG-7")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [0, 1, "", "full_attention", False, True, {}, [0], [[]], ["other"]], ids=repr)
def test_layer_types_that_are_no_list_of_the_two_kinds_are_refused(family: str, value: object) -> None:
    with pytest.raises(ConfigError, match="layer_types must be a list of full_attention and sliding_attention"):
        parse_config(raw_config(model_type=family, layer_types=value, num_key_value_heads=8))


@pytest.mark.spec("INPUT-3")
@pytest.mark.parametrize("value", ["x" * 70_000, ["x"] * 70_000, 10**4000], ids=["text", "list", "number"])
@pytest.mark.parametrize("key", ["model_type", "vocab_size", "rms_norm_eps", "dtype", "rope_scaling", "hidden_act"])
def test_only_a_part_of_a_long_value_is_repeated(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)) as refused:
        parse_config(raw_config(**{key: value}))
    assert len(str(refused.value)) < 250


@pytest.mark.spec("INPUT-1")
def test_a_config_that_is_no_regular_file_or_too_large_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"/config\.json cannot be read: it is not a regular file"):
        load_config(tmp_path)
    path.unlink()
    path.write_bytes(b" " * 1_000_001)
    with pytest.raises(ConfigError, match=r"/config\.json cannot be read: it is larger than the 1 MB"):
        load_config(tmp_path)


@pytest.mark.spec("CONFIG-7", "ERR-1", "INPUT-2")
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xef\xbb\xbf{}", "is not valid JSON"),
        (b"1" * 5000, "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"model_type": "\xff"}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
    ],
    ids=["byte order mark", "long number", "cut short", "not UTF-8", "too deep", "array", "null"],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"config.json {why}"):
        load_config(tmp_path)


@pytest.mark.spec("CONFIG-7", "ERR-1")
def test_a_folder_or_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        load_config(tmp_path)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Draw any config that a `config.json` of its family can express."""
    family = draw(st.sampled_from(FAMILIES))
    size = st.integers(1, (1 << 31) - 1)
    positive = st.floats(min_value=1e-29, max_value=1e29)
    heads = draw(st.integers(1, 64))
    attention_bias = family in {"llama", "qwen3"} and draw(st.booleans())
    low, high = sorted(draw(st.tuples(positive, positive).filter(lambda pair: pair[0] != pair[1])))
    return ModelConfig(
        model_type=family,
        vocab_size=draw(size),
        hidden_size=draw(size),
        intermediate_size=draw(size),
        num_hidden_layers=draw(size),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        head_dim=2 * draw(st.integers(1, 512)),
        max_position_embeddings=draw(size),
        rms_norm_eps=draw(positive),
        rope_theta=draw(positive),
        rope_scaling=draw(st.none() | st.builds(Llama3RopeScaling, positive, st.just(low), st.just(high), size)),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family == "llama" and draw(st.booleans()),
        qk_norm=family == "qwen3",
        tie_word_embeddings=draw(st.booleans()),
        sliding_window=None if family == "llama" else draw(st.none() | size),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 1 << 20), max_size=3))),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    )


@pytest.mark.spec("CONFIG-8")
@given(configs())
def test_a_written_config_reads_back_equal(config: ModelConfig) -> None:
    assert parse_config(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.spec("CONFIG-8")
@pytest.mark.parametrize("name", SHAPES)
def test_a_named_shape_reads_back_equal_from_a_folder(tmp_path: Path, name: str) -> None:
    assert load_config(write_folder(tmp_path, config=to_json(SHAPES[name]))) == SHAPES[name]


@pytest.mark.spec("CONFIG-9")
@pytest.mark.parametrize(
    ("given_ids", "ids"),
    [(None, ()), ([], ()), (0, (0,)), ([7], (7,)), ([128001, 128009], (128001, 128009))],
    ids=["null", "no", "zero", "one", "two"],
)
def test_end_of_text_ids_may_be_none_one_or_several(given_ids: object, ids: tuple[int, ...]) -> None:
    assert parse_config(raw_config(eos_token_id=given_ids)).eos_token_ids == ids


@pytest.mark.spec("CONFIG-7", "CONFIG-9")
@pytest.mark.parametrize("value", ["2", 2.0, True, [2, "3"], [[2]], {}], ids=repr)
def test_an_end_of_text_id_that_is_no_token_id_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="eos_token_id must be a token id or a list of them"):
        parse_config(raw_config(eos_token_id=value))


@pytest.mark.spec("CONFIG-9")
@pytest.mark.parametrize(
    ("generation", "ids"),
    [({"eos_token_id": [5, 6]}, (5, 6)), ({"eos_token_id": 5}, (5,)), ({"eos_token_id": None}, (2,)), ({}, (2,))],
    ids=["several", "one", "null", "absent"],
)
def test_end_of_text_ids_come_from_the_generation_config_where_it_gives_them(
    tmp_path: Path, generation: dict[str, Any], ids: tuple[int, ...]
) -> None:
    write_folder(tmp_path, config=raw_config(eos_token_id=2), generation_config=generation)
    assert load_config(tmp_path).eos_token_ids == ids


@pytest.mark.spec("CONFIG-9")
def test_the_generation_config_gives_nothing_but_end_of_text_ids(tmp_path: Path) -> None:
    raw = raw_config(eos_token_id=2)
    write_folder(tmp_path, config=raw, generation_config={"eos_token_id": 5, "vocab_size": 7, "rope_theta": 1.0})
    assert load_config(tmp_path) == replace(parse_config(raw), eos_token_ids=(5,))


@pytest.mark.spec("CONFIG-6")
def test_layers_that_do_not_attend_are_refused() -> None:
    raw = raw_config("qwen3", layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ConfigError, match="layer_types must be a list of full_attention and sliding_attention"):
        parse_config(raw)


@pytest.mark.spec("CONFIG-6")
def test_sliding_layers_have_a_window_whatever_the_switch_says() -> None:
    raw = raw_config("qwen3", layer_types=["full_attention", "sliding_attention"], sliding_window=16)
    assert parse_config(raw).sliding_window == 16
    assert parse_config(raw | {"layer_types": ["full_attention"]}).sliding_window is None
