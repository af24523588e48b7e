"""Every key of a `config.json`: used, harmless, refused, or unknown, as docs/config-keys.md says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import refinfer
from command_line import run
from refinfer.errors import ConfigError
from refinfer.model.config_json import load_config, parse_config
from refinfer.model.config_keys import OF_OTHER_FAMILIES, OF_THE_FAMILIES

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "config-keys.md"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FOUND: dict[str, Any] = json.loads((TESTS / "golden" / "config_keys.json").read_text())
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def raw_config(family: str = "llama", /, **keys: object) -> dict[str, Any]:
    sizes = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 2}
    return {"model_type": family, **sizes, "num_attention_heads": 32, "num_key_value_heads": 8, **keys}


def keys_of_page(heading: str) -> list[str]:
    """Return the keys in the first column of the tables under a heading of the page."""
    section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    return [key for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]


USED, REFUSED, HARMLESS = (keys_of_page(heading) for heading in ("Used", "Refused", "Harmless"))
OTHERS = keys_of_page("Of other families")


@pytest.mark.spec("CONFIG-10")
def test_every_key_that_transformers_reads_is_on_the_page_once() -> None:
    read = {key for family in FAMILIES for key in FOUND[family]} | set(FOUND["generation"])
    listed = [*USED, *REFUSED, *HARMLESS]
    assert sorted(listed) == sorted(read)
    assert not set(listed) & set(OTHERS)


@pytest.mark.spec("CONFIG-10", "CONFIG-11")
def test_the_page_lists_the_keys_that_are_refused() -> None:
    assert sorted(REFUSED) == sorted(OF_THE_FAMILIES)
    assert sorted(OTHERS) == sorted(OF_OTHER_FAMILIES)


# For each key that is used: a config without it, or with another value, and the value that makes a difference.
DIFFERENCES: dict[str, tuple[dict[str, Any], object]] = {
    "model_type": (raw_config(), "qwen2"),
    "vocab_size": (raw_config(), 101),
    "hidden_size": (raw_config(), 256),
    "intermediate_size": (raw_config(), 49),
    "num_hidden_layers": (raw_config(), 3),
    "num_attention_heads": (raw_config(), 16),
    "num_key_value_heads": (raw_config(), 4),
    "head_dim": (raw_config(), 6),
    "max_position_embeddings": (raw_config(), 77),
    "hidden_act": (raw_config(), "gelu"),
    "rms_norm_eps": (raw_config(), 1e-3),
    "rope_theta": (raw_config(), 5e5),
    "rope_scaling": (raw_config(), LLAMA3),
    "rope_parameters": (raw_config(), {"rope_theta": 5e5}),
    "original_max_position_embeddings": (raw_config(rope_scaling=LLAMA3), 7),
    "attention_bias": (raw_config(), True),
    "mlp_bias": (raw_config(), True),
    "tie_word_embeddings": (raw_config(), True),
    "sliding_window": (raw_config("mistral"), 7),
    "use_sliding_window": (raw_config("qwen2", max_window_layers=0), True),
    "max_window_layers": (raw_config("qwen2", use_sliding_window=True), 0),
    "layer_types": (raw_config("qwen3"), ["sliding_attention"]),
    "eos_token_id": (raw_config(), 7),
    "dtype": (raw_config(), "bfloat16"),
    "torch_dtype": (raw_config(), "float16"),
}


@pytest.mark.spec("CONFIG-10")
@pytest.mark.parametrize("key", USED)
def test_a_key_that_is_used_makes_a_difference(key: str) -> None:
    raw, value = DIFFERENCES[key]
    if key == "hidden_act":
        with pytest.raises(ConfigError, match="hidden_act"):
            parse_config(raw | {key: value})
    else:
        assert parse_config(raw | {key: value}) != parse_config(raw)


@pytest.mark.spec("CONFIG-10")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", HARMLESS)
def test_a_harmless_key_may_have_any_value(key: str, family: str) -> None:
    for value in (None, True, 7, 0.5, "x", [1], {"x": 1}):
        assert parse_config(raw_config(family, **{key: value})) == parse_config(raw_config(family))


@pytest.mark.spec("CONFIG-6", "CONFIG-10", "CONFIG-11")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", [*REFUSED, *OTHERS])
def test_a_refused_key_may_have_a_value_that_changes_nothing(key: str, family: str) -> None:
    neutral = (OF_THE_FAMILIES | dict(OF_OTHER_FAMILIES))[key]  # type: ignore[operator]
    for value in (neutral, neutral if key == "is_causal" else None):
        assert parse_config(raw_config(family, **{key: value})) == parse_config(raw_config(family))
    for value in (False, None, 0) if key == "is_causal" else (0.5, "x", [7], {"x": 7}):
        with pytest.raises(ConfigError, match=rf"config\.json: {key} is "):
            parse_config(raw_config(family, **{key: value}))


FACTORS = [
    "partial_rotary_factor",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "embedding_multiplier",
    "key_multiplier",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "residual_multiplier",
    "rotary_pct",
    "scale_emb",
]


@pytest.mark.spec("CONFIG-10", "CONFIG-11")
@pytest.mark.parametrize("key", sorted({*REFUSED, *OTHERS} - {"is_causal"}))
def test_a_factor_changes_nothing_if_it_is_1_and_any_other_key_if_it_is_0_or_false(key: str) -> None:
    for value in (0, False, 1, True):
        raw = raw_config(**{key: value})
        if bool(value) == (key in FACTORS):
            assert parse_config(raw) == parse_config(raw_config())
        else:
            with pytest.raises(ConfigError, match=rf"config\.json: {key} is ") as refused:
                parse_config(raw)
            assert ("only 1 is implemented" in str(refused.value)) == (key == "partial_rotary_factor")


@pytest.mark.spec("CONFIG-6")
@pytest.mark.parametrize("value", [{"bits": 4}, {"quant_method": None}, {"quant_method": 7}, "gptq", 8], ids=str)
def test_weights_that_are_quantised_by_no_method_of_a_name_are_refused_without_one(value: object) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config is set: the weights are quantised; give"):
        parse_config(raw_config(quantization_config=value))


PRIVATE = {"unsloth_version": "2025.1", "_name_or_path": "x", "auto_map": {"AutoModel": "x.y"}, "my_key": [1, {}]}


@pytest.mark.spec("CONFIG-11")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", PRIVATE)
def test_a_key_that_nobody_knows_is_ignored(key: str, family: str) -> None:
    assert parse_config(raw_config(family, **{key: PRIVATE[key]})) == parse_config(raw_config(family))


@pytest.mark.spec("CONFIG-12")
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("top", "inner", "context"), [(8, 32, 8), (8, None, 8), (None, 32, 32), (None, None, 2048)], ids=str
)
def test_a_context_at_the_top_wins_over_the_one_in_the_scaling(
    name: str, top: int | None, inner: int | None, context: int
) -> None:
    scaling = LLAMA3 | ({"original_max_position_embeddings": inner} if inner else {})
    raw = raw_config(**{name: scaling}) | ({"original_max_position_embeddings": top} if top else {})
    found = parse_config(raw).rope_scaling
    assert found is not None
    assert found.original_max_position_embeddings == context


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear scaling by 1": ({"rope_scaling": {"type": "linear", "factor": 1.0}}, {}),
    "linear scaling by 1, newer": (
        {"rope_parameters": {"rope_type": "linear", "factor": 1, "rope_theta": 5e5}},
        {"rope_theta": 5e5},
    ),
    "an empty scaling": ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
    "no token ends a text": ({"eos_token_id": -1}, {"eos_token_id": None}),
    "one of several end tokens is none": ({"eos_token_id": [-1, 7]}, {"eos_token_id": 7}),
}


@pytest.mark.spec("CONFIG-6", "CONFIG-9")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("keys", "means"), SAME.values(), ids=SAME)
def test_a_value_that_changes_nothing_is_accepted(family: str, keys: dict[str, Any], means: dict[str, Any]) -> None:
    assert parse_config(raw_config(family, **keys)) == parse_config(raw_config(family, **means))


@pytest.mark.spec("CONFIG-3")
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_model_may_call_itself_a_model_of_doubles(key: str) -> None:
    assert parse_config(raw_config(**{key: "float64"})).dtype == "float64"


@pytest.mark.spec("CONFIG-6")
@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention is an object"),
    ],
    ids=["linear by 2", "linear without a factor", "a rotation for each kind of layer"],
)
def test_a_rotation_that_is_not_implemented_is_refused(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_config(raw_config(**keys))


@pytest.mark.spec("CONFIG-4")
def test_a_llama_with_a_window_serves_requests_that_fit_it() -> None:
    # `transformers` keeps no more positions than the window in its KV cache, also for a Llama.
    assert parse_config(raw_config(sliding_window=16)).longest_request == 16
    full = raw_config(sliding_window=16, layer_types=["full_attention"] * 2)
    assert parse_config(full).longest_request == 2048


DAMAGED: dict[str, bytes] = {
    "cut short": b'{"eos_token_id": [5',
    "an array": b"[]",
    "empty": b"",
    "no text": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "too large": b" " * 1_000_001,
    "a wrong id": b'{"eos_token_id": "end"}',
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.spec("CONFIG-9")
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_generation_config_is_ignored_with_one_warning(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_config(eos_token_id=[2, 3])))
    (tmp_path / "generation_config.json").write_bytes(content)
    said: list[str] = []
    assert load_config(tmp_path, said.append).eos_token_ids == (2, 3)
    (warning,) = said
    assert re.search(r"/generation_config\.json.*; the end-of-text ids are those of config\.json$", warning)


@pytest.mark.spec("CONFIG-9")
@pytest.mark.parametrize("command", ["generate", "plan", "simulate", "pack"])
def test_the_warning_is_printed_once(tmp_path: Path, command: str) -> None:
    folder = Path(shutil.copytree(TESTS / "golden" / "qwen2", tmp_path / "model"))
    (folder / "generation_config.json").write_text("{")
    given = {"generate": ["--model", str(folder), "--token-ids", "1", "--max-tokens", "2"], "pack": [str(folder)]}
    status, _, err = run(command, *given.get(command, ["--model", str(folder)]))
    assert (status, err.count("warning: ")) == (0, 1)


@pytest.mark.spec("CONFIG-9")
def test_the_library_warns_once(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TESTS / "golden" / "qwen2", tmp_path / "model"))
    (folder / "generation_config.json").write_text("{")
    with (
        pytest.warns(RuntimeWarning, match=r"generation_config\.json is not valid JSON") as warned,
        refinfer.load(folder, weight_cache=":memory", max_positions=8) as session,
    ):
        list(session.generate(token_ids=[1], max_tokens=2))
    assert len(warned) == 1
