"""Specifies `refinfer.model.config`: which tensors a model has, and the table of published sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.config_json import load_config, parse_config

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = ModelConfig(
    model_type="llama",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
)
EVERY_SWITCH = replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)

PUBLISHED_COUNTS = {
    "stories15m": 15_191_712,
    "smollm-135m": 134_515_008,
    "qwen2-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama2-13b": 13_015_864_320,
    "codellama-34b": 33_743_970_304,
    "llama2-70b": 68_976_648_192,
}
OUR_OWN = {"tiny", "storyteller"}

LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
LLAMA2 = LLAMA | {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_scaling": None}
LLAMA3 = LLAMA | {"vocab_size": 128256, "rope_theta": 500000.0, "attention_bias": False, "num_key_value_heads": 8}
QWEN = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}


def sizes(D: int, F: int, L: int, heads: int, kv_heads: int, **others: object) -> dict[str, Any]:
    """Return keys of a `config.json`."""
    return {
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


PUBLISHED = {
    "stories15m": LLAMA2 | sizes(288, 768, 6, 6, 6, max_position_embeddings=256, tie_word_embeddings=True),
    "smollm-135m": LLAMA
    | sizes(576, 1536, 30, 9, 3, max_position_embeddings=2048, tie_word_embeddings=True)
    | {"vocab_size": 49152, "rope_theta": 10000.0},
    "qwen2-0.5b": QWEN
    | sizes(896, 4864, 24, 14, 2, max_position_embeddings=131072, tie_word_embeddings=True)
    | {"model_type": "qwen2", "sliding_window": 131072, "max_window_layers": 24},
    "qwen3-0.6b": QWEN
    | sizes(1024, 3072, 28, 16, 8, max_position_embeddings=40960, tie_word_embeddings=True)
    | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "sliding_window": None},
    "tinyllama-1.1b": LLAMA2 | sizes(2048, 5632, 22, 32, 4, max_position_embeddings=2048),
    "llama-1b": LLAMA3
    | sizes(2048, 8192, 16, 32, 8, max_position_embeddings=131072, tie_word_embeddings=True, head_dim=64)
    | {
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    },
    "mistral-7b": LLAMA
    | sizes(4096, 14336, 32, 32, 8, max_position_embeddings=32768)
    | {"model_type": "mistral", "vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None},
    "llama2-7b": LLAMA2 | sizes(4096, 11008, 32, 32, 32),
    "llama3-8b": LLAMA3 | sizes(4096, 14336, 32, 32, 8, max_position_embeddings=8192),
    "llama2-13b": LLAMA2 | sizes(5120, 13824, 40, 40, 40),
    "codellama-34b": LLAMA2 | sizes(8192, 22016, 48, 64, 8, max_position_embeddings=16384, rope_theta=1000000),
    "llama2-70b": LLAMA2 | sizes(8192, 28672, 80, 64, 8),
}
"""What the published `config.json` says, without end-of-text ids and the type of the weights.

Compared with copies of the files of Qwen, TinyLlama, Llama 2 7B and 70B, and Llama 3. Of the others no whole copy was
at hand: what their number of parameters does not decide (positions, angles, norms) is as they are generally described.
"""


@pytest.mark.spec("CONFIG-1")
def test_a_plain_model_has_these_tensors_in_this_order() -> None:
    assert list(SMALL.tensor_shapes().items()) == [
        ("model.embed_tokens.weight", (11, 8)),
        ("model.layers.0.input_layernorm.weight", (8,)),
        ("model.layers.0.self_attn.q_proj.weight", (24, 8)),
        ("model.layers.0.self_attn.k_proj.weight", (12, 8)),
        ("model.layers.0.self_attn.v_proj.weight", (12, 8)),
        ("model.layers.0.self_attn.o_proj.weight", (8, 24)),
        ("model.layers.0.post_attention_layernorm.weight", (8,)),
        ("model.layers.0.mlp.gate_proj.weight", (20, 8)),
        ("model.layers.0.mlp.up_proj.weight", (20, 8)),
        ("model.layers.0.mlp.down_proj.weight", (8, 20)),
        ("model.norm.weight", (8,)),
        ("lm_head.weight", (11, 8)),
    ]


@pytest.mark.spec("CONFIG-1")
def test_a_layer_with_every_switch_on_has_these_tensors_in_this_order() -> None:
    assert list(EVERY_SWITCH.layer_shapes().items()) == [
        ("input_layernorm.weight", (8,)),
        ("self_attn.q_proj.weight", (24, 8)),
        ("self_attn.q_proj.bias", (24,)),
        ("self_attn.k_proj.weight", (12, 8)),
        ("self_attn.k_proj.bias", (12,)),
        ("self_attn.v_proj.weight", (12, 8)),
        ("self_attn.v_proj.bias", (12,)),
        ("self_attn.q_norm.weight", (6,)),
        ("self_attn.k_norm.weight", (6,)),
        ("self_attn.o_proj.weight", (8, 24)),
        ("self_attn.o_proj.bias", (8,)),
        ("post_attention_layernorm.weight", (8,)),
        ("mlp.gate_proj.weight", (20, 8)),
        ("mlp.gate_proj.bias", (20,)),
        ("mlp.up_proj.weight", (20, 8)),
        ("mlp.up_proj.bias", (20,)),
        ("mlp.down_proj.weight", (8, 20)),
        ("mlp.down_proj.bias", (8,)),
    ]


@pytest.mark.spec("CONFIG-1")
@pytest.mark.parametrize(
    ("config", "added"),
    [
        (replace(SMALL, qkv_bias=True), {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}),
        (replace(SMALL, o_bias=True), {"self_attn.o_proj.bias"}),
        (replace(SMALL, mlp_bias=True), {"mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"}),
        (replace(SMALL, qk_norm=True), {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}),
    ],
    ids=["qkv_bias", "o_bias", "mlp_bias", "qk_norm"],
)
def test_a_switch_adds_its_own_tensors_and_no_others(config: ModelConfig, added: set[str]) -> None:
    assert set(config.layer_shapes()) - set(SMALL.layer_shapes()) == added


@pytest.mark.spec("CONFIG-1")
def test_layers_stand_one_after_another_between_embeddings_and_norm() -> None:
    names = list(replace(SMALL, num_hidden_layers=3).tensor_shapes())
    layers = [f"model.layers.{i}.{name}" for i in range(3) for name in SMALL.layer_shapes()]
    assert names == ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]


@pytest.mark.spec("CONFIG-1")
def test_tied_embeddings_leave_out_the_head_and_nothing_else() -> None:
    tied = replace(SMALL, tie_word_embeddings=True).tensor_shapes()
    assert tied | {"lm_head.weight": (11, 8)} == SMALL.tensor_shapes()
    assert "lm_head.weight" not in tied


@pytest.mark.spec("CONFIG-1")
@pytest.mark.parametrize("family", ["llama", "llama3-rope", "llama-bias", "mistral", "qwen2", "qwen3"])
def test_a_config_asks_for_exactly_the_tensors_that_transformers_saves(family: str) -> None:
    saved = {name: tensor.shape for name, tensor in open_checkpoint(GOLDEN / family).items()}
    assert load_config(GOLDEN / family).tensor_shapes() == saved


@pytest.mark.spec("CONFIG-1", "CONFIG-2")
def test_the_parameter_count_is_the_sum_over_all_tensors() -> None:
    assert EVERY_SWITCH.n_parameters == sum(math.prod(shape) for shape in EVERY_SWITCH.tensor_shapes().values())
    assert SMALL.n_parameters == 11 * 8 + (8 + 24 * 8 + 2 * 12 * 8 + 8 * 24 + 8 + 3 * 20 * 8) + 8 + 11 * 8


@pytest.mark.spec("CONFIG-2")
@pytest.mark.parametrize(("name", "count"), PUBLISHED_COUNTS.items(), ids=PUBLISHED_COUNTS)
def test_a_named_shape_has_the_published_parameter_count(name: str, count: int) -> None:
    assert SHAPES[name].n_parameters == count


@pytest.mark.spec("CONFIG-2")
@pytest.mark.parametrize(("name", "raw"), PUBLISHED.items(), ids=PUBLISHED)
def test_a_named_shape_is_what_its_published_config_says(name: str, raw: dict[str, Any]) -> None:
    assert parse_config({**raw, "eos_token_id": None}) == SHAPES[name]


@pytest.mark.spec("CONFIG-2")
def test_no_named_shape_goes_uncounted() -> None:
    assert set(SHAPES) == set(PUBLISHED_COUNTS) | OUR_OWN
    assert PUBLISHED.keys() == PUBLISHED_COUNTS.keys()


@pytest.mark.spec("CONFIG-4")
@pytest.mark.parametrize(("window", "longest"), [(None, 32), (7, 7), (32, 32), (100, 32)], ids=str)
def test_a_request_fits_the_positions_and_the_window_if_there_is_one(window: int | None, longest: int) -> None:
    assert replace(SMALL, sliding_window=window).longest_request == longest
