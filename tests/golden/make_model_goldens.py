"""Make the golden files of the model room with `transformers`, in float32 with eager attention.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/make_model_goldens.py

Writes, next to itself, one folder for each family: a tiny random checkpoint (`config.json` in the spelling of
`transformers` 5, `model.safetensors` in bfloat16) and `golden.json` (a prompt, the logits after each of its tokens, 64
greedy tokens). Sizes are odd on purpose: `head_dim` is not `hidden_size / heads`, the vocabulary is a prime. Weights
are chosen so that float32, float16 and bfloat16 hold the very same values. Also writes
`storyteller.json`, the text that `transformers` makes of the storyteller, and `rope_frequencies.json`, the rotary
frequencies of published shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).parent
STORYTELLER = HERE.parents[1] / "refinfer" / "storyteller"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama3-rope": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter, norms and biases too, values that bfloat16 and float16 both hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        values = noise * p.shape[1] ** -0.5 * 1.5 if p.ndim == 2 else noise * 0.2 + (0 if "bias" in name else 1)
        values = values.bfloat16().float()
        p.data = torch.where(values.abs() < 2**-13, torch.zeros_like(values), values)


@torch.inference_mode()
def greedy(model: Any, ids: list[int], n: int) -> tuple[list[int], float]:
    """Return `n` greedy tokens, and the smallest lead of a chosen token over the second."""
    out: list[int] = []
    lead = float("inf")
    for _ in range(n):
        best = model(torch.tensor([ids + out])).logits[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        out.append(int(best.indices[0]))
    return out, lead


ROPE: dict[str, dict[str, Any]] = {
    "llama2-7b": {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "codellama-34b": {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama3-8b": {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama-1b": {
        "head_dim": 64,
        "rope_parameters": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "storyteller": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


def rope_frequencies() -> dict[str, list[float]]:
    """Return the rotary frequencies that `transformers` computes; float32 values print and read back exactly."""
    return {
        name: LlamaRotaryEmbedding(AutoConfig.for_model("llama", **keys)).inv_freq.tolist()
        for name, keys in ROPE.items()
    }


def main() -> None:
    (HERE / "rope_frequencies.json").write_text(json.dumps(rope_frequencies(), indent=1) + "\n")
    torch.manual_seed(0)
    for index, (family, special) in enumerate(FAMILIES.items()):
        folder = HERE / family
        folder.mkdir(exist_ok=True)
        config = AutoConfig.for_model(**{**SIZES, **special})
        seed = 100 * index
        while True:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            randomise(model, seed)
            prompt = torch.randint(53, (24,), generator=torch.Generator().manual_seed(seed)).tolist()
            tokens, lead = greedy(model, prompt, 64)
            if lead > 3e-3 and len(set(tokens)) > 8:  # no near-ties, and a text that is not one word for ever
                break
            seed += 1
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0]
        state = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items()}
        if config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        raw = config.to_dict() | {"dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        golden = {
            "prompt": prompt,
            "greedy": tokens,
            "smallest_lead": lead,
            "logits": [[round(v, 6) for v in row] for row in logits.tolist()],
        }
        (folder / "golden.json").write_text(json.dumps(golden) + "\n")
        print(family, "seed", seed, "smallest lead", lead)
    if (STORYTELLER / "model.safetensors").exists():
        tokenizer = AutoTokenizer.from_pretrained(STORYTELLER)
        model = AutoModelForCausalLM.from_pretrained(STORYTELLER, attn_implementation="eager", dtype=torch.float32)
        ids = tokenizer.encode("ROMEO:")
        tokens, lead = greedy(model.eval(), ids, 120)
        golden = {"prompt": "ROMEO:", "prompt_token_ids": ids, "token_ids": tokens, "text": tokenizer.decode(tokens)}
        (HERE / "storyteller.json").write_text(json.dumps(golden | {"smallest_lead": lead}, indent=1) + "\n")
        print("storyteller: smallest lead", lead, repr(golden["text"]))


if __name__ == "__main__":
    main()
