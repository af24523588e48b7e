"""A Hugging Face `config.json`, read into a `ModelConfig` and written from one.

Supports the Llama, Mistral, Qwen2 and Qwen3 families, with their defaults, and both the older and the newer spelling of
their keys. Leaves to others: keys that are refused (`config_keys`), weights, files other than `config.json` and
`generation_config.json`.
Read more: tutorial 07, docs/config-keys.md; clauses CONFIG-3 to CONFIG-12.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from refinfer.errors import ConfigError
from refinfer.model.config import Llama3RopeScaling, ModelConfig
from refinfer.model.config_keys import first_refused
from refinfer.model.other_forms import what_to_do, why_not_a_folder
from refinfer.units import shown
from refinfer.whole_file import read_json

__all__ = ["load_config", "parse_config", "to_json"]

_LARGEST_FILE_BYTES: Final = 1_000_000  # published ones have some thousand bytes
_LARGEST_SIZE: Final = 1 << 31
_SMALLEST_NUMBER: Final = 1e-30
_LARGEST_NUMBER: Final = 1e30
_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, slots=True)
class _Family:
    """The differences between the families; the defaults are those of the `transformers` config classes."""

    num_key_value_heads: int | None = None  # None: one for each query head
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    sliding_window: int | None = None
    eos_token_id: int | None = None
    reads_attention_bias: bool = False
    qkv_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    reads_layer_types: bool = True
    window_has_a_switch: bool = False


_FAMILIES: Final[Mapping[str, _Family]] = MappingProxyType(
    {
        "llama": _Family(max_position_embeddings=2048, eos_token_id=2, reads_attention_bias=True, reads_mlp_bias=True),
        "mistral": _Family(
            num_key_value_heads=8,
            max_position_embeddings=131072,
            sliding_window=4096,
            eos_token_id=2,
            reads_layer_types=False,
        ),
        "qwen2": _Family(num_key_value_heads=32, sliding_window=4096, qkv_bias=True, window_has_a_switch=True),
        "qwen3": _Family(
            num_key_value_heads=32,
            head_dim=128,
            sliding_window=4096,
            reads_attention_bias=True,
            qk_norm=True,
            window_has_a_switch=True,
        ),
    }
)


class _Keys:
    """Typed look-ups in a JSON object; each error names the key, the value found and what is expected."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} {problem}")

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not int or not least <= value < _LARGEST_SIZE:
            raise self.error(key, f"must be a whole number from {least} to {_LARGEST_SIZE - 1}, not {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing")
        # The bounds also exclude numbers that float32 cannot hold.
        if type(value) not in (int, float) or not _SMALLEST_NUMBER < value < _LARGEST_NUMBER:
            limits = f"{_SMALLEST_NUMBER:.0e} and {_LARGEST_NUMBER:.0e}"
            raise self.error(key, f"must be a positive number between {limits}, not {shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(key, f"must be true or false, not {shown(value)}")
        return value


def load_config(folder: Path, warn: Callable[[str], None] = lambda message: None) -> ModelConfig:
    """Read `config.json` in `folder`, and the end-of-text ids of `generation_config.json`, if any.

    A `generation_config.json` that cannot be read is ignored, with one warning.

    Raises:
        ConfigError: the folder or file is missing or unreadable, or `parse_config` refuses it.
    """
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{folder} cannot be read: {error.strerror}") from None
    if not is_folder:
        raise ConfigError(why_not_a_folder(folder))
    config = parse_config(_read_json(folder / "config.json"), str(folder / "config.json"))
    generation = folder / "generation_config.json"
    try:
        if os.path.lexists(generation) and (raw := _read_json(generation)).get("eos_token_id") is not None:
            # transformers' generate() takes its end-of-text ids from here when they are given.
            config = replace(config, eos_token_ids=_eos_token_ids(_Keys(raw, str(generation)), None))
    except ConfigError as error:
        warn(f"{error}; the end-of-text ids are those of config.json")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = read_json(path, _LARGEST_FILE_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; {what_to_do(path.parent)}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(raw).__name__}")
    return raw


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn the object in a `config.json` into a `ModelConfig`.

    Both spellings are understood: `rope_theta`, `rope_scaling`, `torch_dtype` and the newer `rope_parameters`,
    `dtype`. Absent keys get the defaults of the family's config class in `transformers`.

    Raises:
        ConfigError: another architecture, a missing or impossible value, or a feature that is not implemented.

    Examples:
        >>> from refinfer.model.config import SHAPES
        >>> parse_config(to_json(SHAPES["llama2-7b"])) == SHAPES["llama2-7b"]
        True
    """
    keys = _Keys(raw, where)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        supported = ", ".join(_FAMILIES)
        raise keys.error("model_type", f"is {shown(model_type)}, which is not supported; supported are {supported}")
    family = _FAMILIES[model_type]
    _refuse_what_is_not_implemented(keys)

    hidden_size = keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    # Null means one for each query head; an absent key means the family's default.
    default_kv_heads = heads if "num_key_value_heads" in raw else family.num_key_value_heads or heads
    kv_heads = keys.integer("num_key_value_heads", default_kv_heads)
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})")
    head_dim = keys.integer("head_dim", family.head_dim or hidden_size // heads)
    if head_dim % 2:
        raise keys.error("head_dim", f"must be even for rotary embeddings, not {head_dim}")
    attention_bias = family.reads_attention_bias and keys.flag("attention_bias")
    max_position_embeddings = keys.integer("max_position_embeddings", family.max_position_embeddings)
    theta, scaling = _rope(keys, max_position_embeddings)
    n_layers = keys.integer("num_hidden_layers")
    vocab_size = keys.integer("vocab_size")
    dtype = next((raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None), "float32")
    if dtype not in _DTYPES:
        raise keys.error("dtype", f"is {shown(dtype)}; supported are {', '.join(_DTYPES)}")
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=keys.number("rms_norm_eps", family.rms_norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and keys.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        sliding_window=_sliding_window(keys, family, n_layers),
        eos_token_ids=_eos_token_ids(keys, family.eos_token_id),
        dtype=dtype,
    )


def _refuse_what_is_not_implemented(keys: _Keys) -> None:
    if (act := keys.raw.get("hidden_act")) not in (None, "silu", "swish"):
        raise keys.error("hidden_act", f"is {shown(act)}; only silu is implemented")
    if (refused := first_refused(keys.raw)) is not None:
        raise keys.error(*refused)
    kinds = keys.raw.get("layer_types")
    kinds = [] if kinds is None else kinds
    if not isinstance(kinds, list) or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise keys.error("layer_types", "must be a list of full_attention and sliding_attention")


def _rope(keys: _Keys, max_position_embeddings: int) -> tuple[float, Llama3RopeScaling | None]:
    """Return theta and the scaling; if both spellings are given, `rope_scaling` wins, as in `transformers`."""
    name = "rope_scaling" if keys.raw.get("rope_scaling") not in (None, {}) else "rope_parameters"
    raw = keys.raw.get(name)
    if raw is None:
        return keys.number("rope_theta", 10000.0), None
    if not isinstance(raw, dict):
        raise keys.error(name, f"must be an object, not {shown(raw)}")
    rope = _Keys(raw, f"{keys.where}: {name}")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    kind = raw.get("rope_type", raw.get("type", "default"))
    if nested := [key for key, value in raw.items() if isinstance(value, dict)]:
        raise rope.error(nested[0], "is an object; only one rotation for all layers is implemented")
    if (share := raw.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise rope.error("partial_rotary_factor", f"is {shown(share)}; only 1 is implemented")
    if kind == "default" or (kind == "linear" and rope.number("factor") == 1):
        return theta, None
    if kind != "llama3":
        raise rope.error("rope_type", f"is {shown(kind)}; supported are default and llama3, and linear with factor 1")
    # A context given outside the scaling wins, as in `transformers`.
    original = keys if keys.raw.get("original_max_position_embeddings") is not None else rope
    scaling = Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=original.integer("original_max_position_embeddings", max_position_embeddings),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.error("high_freq_factor", "must be larger than low_freq_factor")
    return theta, scaling


def _sliding_window(keys: _Keys, family: _Family, n_layers: int) -> int | None:
    """Return the window in positions, or None if every layer sees all positions.

    In families with a switch, only the layers from `max_window_layers` on have a window, unless `layer_types` lists the
    layers that do.
    """
    if keys.raw.get("sliding_window", family.sliding_window) is None:
        return None
    kinds = keys.raw.get("layer_types") if family.reads_layer_types else None
    if kinds is not None:
        slides = "sliding_attention" in kinds
    elif family.window_has_a_switch:
        slides = keys.flag("use_sliding_window") and keys.integer("max_window_layers", 28, least=0) < n_layers
    else:
        slides = True
    return keys.integer("sliding_window", family.sliding_window) if slides else None


def _eos_token_ids(keys: _Keys, default: int | None) -> tuple[int, ...]:
    value = keys.raw.get("eos_token_id", default)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
        raise keys.error("eos_token_id", f"must be a token id or a list of them, not {shown(value)}")
    return tuple(i for i in ids if i >= 0)  # -1 means that no token ends a text


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` object of `config`, in the older spelling, which any version of `transformers` reads."""
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.model_type]
    eos = config.eos_token_ids
    raw: dict[str, Any] = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        "torch_dtype": config.dtype,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": 0,  # if there is a window, every layer has it
        "rope_scaling": None,
    }
    for key in _PLAIN_KEYS:
        raw[key] = getattr(config, key)
    if (s := config.rope_scaling) is not None:
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position_embeddings,
        }
    return raw


_PLAIN_KEYS: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)
