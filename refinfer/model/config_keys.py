"""Keys of a `config.json` that change a model's numbers and are not implemented: each is refused by its name.

A key that is ignored though it changes the numbers gives wrong text without a word. So the keys that `transformers`
reads for the four families are all known, and so are those that change the numbers in other families. Any other key is
ignored, since fine-tuned models carry private ones. Leaves to others: the keys that are used (`config_json`).
Read more: tutorial 07, docs/config-keys.md; clauses CONFIG-6, CONFIG-10, CONFIG-11.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from refinfer.units import shown

__all__ = ["OF_OTHER_FAMILIES", "OF_THE_FAMILIES", "first_refused"]

OF_THE_FAMILIES: Final[Mapping[str, Any]] = {
    "attention_chunk_size": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "kv_sharing_modes": None,
    "partial_rotary_factor": 1,
    "per_layer_config": None,
    "quantization_config": None,
}
"""Keys that `transformers` reads in the four families too, each with the value that changes nothing."""

OF_OTHER_FAMILIES: Final[Mapping[str, Any]] = {
    "alibi": False,
    "attention_in_multiplier": 1,
    "attention_multiplier": None,
    "attention_out_multiplier": 1,
    "attn_logit_softcapping": None,
    "attn_temperature_tuning": False,
    "clip_qkv": None,
    "cross_attention_layers": None,
    "dim_model_base": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "key_multiplier": 1,
    "kv_lora_rank": None,
    "lm_head_multiplier": 1,
    "logit_scale": 1,
    "logits_scaling": 1,
    "n_routed_experts": None,
    "no_rope_layer_interval": None,
    "no_rope_layers": None,
    "num_experts": None,
    "num_kv_shared_layers": 0,
    "num_local_experts": None,
    "parallel_attn": False,
    "q_lora_rank": None,
    "qk_layernorm": False,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "rotary_pct": 1,
    "scale_depth": None,
    "scale_emb": 1,
    "use_alibi": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_parallel_residual": False,
    "use_qk_norm": False,
}
"""Keys that change the numbers in other families, each with the value that changes nothing."""


def first_refused(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first key whose value asks for something that is not implemented, and why, or None.

    Examples:
        >>> first_refused({"logit_scale": 0.5})
        ('logit_scale', 'is 0.5, which is not implemented for this architecture')
    """
    for key, neutral in {**OF_THE_FAMILIES, **OF_OTHER_FAMILIES}.items():
        if key not in raw or _changes_nothing(raw[key], neutral):
            continue
        value = raw[key]
        if key == "quantization_config":
            method = value.get("quant_method") if isinstance(value, dict) else None
            how = f" with {shown(method, 20)}" if isinstance(method, str) else ""
            return key, f"is set: the weights are quantised{how}; give the model's unquantised checkpoint instead"
        if key == "is_causal":
            return key, f"is {shown(value)}; only attention to earlier tokens is implemented"
        if key == "partial_rotary_factor":
            return key, f"is {shown(value)}; only 1 is implemented"
        return key, f"is {shown(value)}, which is not implemented for this architecture"
    return None


def _changes_nothing(value: object, neutral: object) -> bool:
    """Return whether a value means what an absent key means."""
    if neutral is True:
        return bool(value)  # null is false here, as in `transformers`
    return value is None or value == neutral if neutral == 1 else not value
