"""What a model is: its sizes and its few switches, and a table of published sizes by name.

Lists which tensors such a model has, and their shapes. Leaves to others: files (`config_json`), weights, arithmetic.
Read more: tutorial 07; clauses CONFIG-1, CONFIG-2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

__all__ = ["SHAPES", "Llama3RopeScaling", "ModelConfig"]


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """How Llama 3.1 and later stretch RoPE's slow frequencies for a longer context (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and switches of one model, under Hugging Face's names.

    `head_dim` need not be `hidden_size / num_attention_heads`. With a `sliding_window`, layers may attend to that
    many latest positions only; here a longer request is refused. `eos_token_ids`, which end a text, may be empty.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def longest_request(self) -> int:
        """The number of positions, prompt and generated tokens together, that this model can serve."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def n_parameters(self) -> int:
        """How many numbers the model's tensors hold; a tied embedding table counts once."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values())
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + tables + self.hidden_size

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of one layer, by name without the layer's prefix, in execution order.

        Matrices are `[N, K]`, norms and biases `[N]`.
        """
        D, F = self.hidden_size, self.intermediate_size
        Q, KV = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,)}
        for name, n, k, bias in (
            ("self_attn.q_proj", Q, D, self.qkv_bias),
            ("self_attn.k_proj", KV, D, self.qkv_bias),
            ("self_attn.v_proj", KV, D, self.qkv_bias),
            ("self_attn.o_proj", D, Q, self.o_bias),
            ("mlp.gate_proj", F, D, self.mlp_bias),
            ("mlp.up_proj", F, D, self.mlp_bias),
            ("mlp.down_proj", D, F, self.mlp_bias),
        ):
            if name == "self_attn.o_proj" and self.qk_norm:
                shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (self.head_dim,)
            if name == "mlp.gate_proj":
                shapes["post_attention_layernorm.weight"] = (D,)
            shapes[f"{name}.weight"] = (n, k)
            if bias:
                shapes[f"{name}.bias"] = (n,)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of the checkpoint under its Hugging Face name, in execution order."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        layer = self.layer_shapes()
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


def _shape(V: int, D: int, F: int, L: int, heads: tuple[int, int, int], positions: int) -> ModelConfig:
    """Return a Llama without anything special; `heads` is (query heads, key and value heads, size of one head)."""
    return ModelConfig("llama", V, D, F, L, *heads, positions)


# fmt: off
_LLAMAS: Final = {
    # name                  V       D      F      L   (H, G, hd)     positions
    "tiny":          _shape(512,    64,    172,   4,  (8, 4, 8),     512),
    "storyteller":   _shape(65,     192,   512,   6,  (6, 2, 32),    512),
    "stories15m":    _shape(32000,  288,   768,   6,  (6, 6, 48),    256),
    "smollm-135m":   _shape(49152,  576,   1536,  30, (9, 3, 64),    2048),
    "qwen2-0.5b":    _shape(151936, 896,   4864,  24, (14, 2, 64),   131072),
    "qwen3-0.6b":    _shape(151936, 1024,  3072,  28, (16, 8, 128),  40960),
    "tinyllama-1.1b": _shape(32000, 2048,  5632,  22, (32, 4, 64),   2048),
    "llama-1b":      _shape(128256, 2048,  8192,  16, (32, 8, 64),   131072),
    "mistral-7b":    _shape(32768,  4096,  14336, 32, (32, 8, 128),  32768),
    "llama2-7b":     _shape(32000,  4096,  11008, 32, (32, 32, 128), 4096),
    "llama3-8b":     _shape(128256, 4096,  14336, 32, (32, 8, 128),  8192),
    "llama2-13b":    _shape(32000,  5120,  13824, 40, (40, 40, 128), 4096),
    "codellama-34b": _shape(32000,  8192,  22016, 48, (64, 8, 128),  16384),
    "llama2-70b":    _shape(32000,  8192,  28672, 80, (64, 8, 128),  4096),
}
_SPECIAL: Final[Mapping[str, dict[str, Any]]] = {
    "tiny":          {"tie_word_embeddings": True},
    "storyteller":   {"tie_word_embeddings": True},
    "stories15m":    {"tie_word_embeddings": True},
    "smollm-135m":   {"tie_word_embeddings": True},
    "qwen2-0.5b":    {"model_type": "qwen2", "qkv_bias": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                      "tie_word_embeddings": True},
    "qwen3-0.6b":    {"model_type": "qwen3", "qk_norm": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                      "tie_word_embeddings": True},
    "llama-1b":      {"rope_theta": 5e5, "rope_scaling": Llama3RopeScaling(32.0, 1.0, 4.0, 8192),
                      "tie_word_embeddings": True},
    "mistral-7b":    {"model_type": "mistral", "rope_theta": 1e6},
    "llama3-8b":     {"rope_theta": 5e5},
    "codellama-34b": {"rope_theta": 1e6},
}
# fmt: on

SHAPES: Final[Mapping[str, ModelConfig]] = MappingProxyType(
    {name: replace(llama, **_SPECIAL.get(name, {})) for name, llama in _LLAMAS.items()}
)
"""Published sizes by name: `llama-1b` is Llama 3.2 1B, `mistral-7b` version 0.3, `stories15m` of llama2.c."""
