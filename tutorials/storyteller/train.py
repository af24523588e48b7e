"""Train the storyteller: a character-level Llama of 2.4 million parameters that writes like a play.

Knows: PyTorch, and the Hugging Face names of a Llama's weights. Does not know: how refinfer runs the model; of refinfer
it uses only the shape, the config, the tokenizer file and the safetensors writer.

    pip install . torch==2.13.0
    python tutorials/storyteller/train.py --corpus tinyshakespeare.txt --out storyteller

The corpus is the public-domain text "tinyshakespeare": 1,115,394 characters, 65 different ones; its sha256 is checked.
The first 90 % is trained on, the last 10 % is only measured. About 19 minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own short name)

from refinfer.model.config import SHAPES
from refinfer.model.config_json import to_json
from refinfer.model.safetensors import TensorSpec, write_safetensors
from refinfer.model.tokenizer import character_tokenizer_json

CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CONFIG = replace(SHAPES["storyteller"], dtype="bfloat16")
D, FFN, LAYERS, VOCAB = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_hidden_layers, CONFIG.vocab_size
HEADS, KV_HEADS, HEAD_DIM = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
CONTEXT, EPS = CONFIG.max_position_embeddings, CONFIG.rms_norm_eps

STEPS = 800
BATCH = 16
DROPOUT = 0.15
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARM_UP_STEPS = 50
CONSTANT_SHARE = 0.3  # of all steps at the full rate; then it falls in a straight line to zero


def rope(x: Tensor) -> Tensor:
    """Rotate `[B, H, S, hd]` by position; the halves of a head form the pairs, as in Hugging Face's Llama."""
    S, half = x.shape[-2], HEAD_DIM // 2
    frequency = CONFIG.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(S, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: six query heads share two key and value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(D, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(D, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = (p(x).view(B, S, -1, HEAD_DIM).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, S, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, FFN, bias=False)
        self.up_proj = nn.Linear(D, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer, normalised before each half; dropout on what each half adds."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm = nn.RMSNorm(D, eps=EPS)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=EPS)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x)))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


class Storyteller(nn.Module):
    """Modules are named so that `state_dict()` has Hugging Face's names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, D)
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.model.norm = nn.RMSNorm(D, eps=EPS)
        for name, p in self.named_parameters():
            if name.endswith("embed_tokens.weight"):
                nn.init.normal_(p, std=0.05)
            elif p.ndim == 2:  # what adds to the residual stream starts smaller, the deeper the model
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(2 * LAYERS) ** -0.5 * p.shape[1] ** -0.5 if adds else p.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


@torch.inference_mode()
def loss_on(model: Storyteller, ids: Tensor) -> float:
    """Mean loss in nats per character over consecutive windows of the whole context."""
    model.eval()
    total = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        y = ids[start + 1 : start + CONTEXT + 1]
        x = ids[start : start + len(y)]
        total += F.cross_entropy(model(x[None])[0], y, reduction="sum").item()
    model.train()
    return total / (len(ids) - 1)


def rate_at(step: int) -> float:
    """The learning rate at `step`, as a share of its peak."""
    warm_up = (step + 1) / WARM_UP_STEPS
    fall = (1 - step / STEPS) / (1 - CONSTANT_SHARE)
    return min(1.0, warm_up, fall)


def train(model: Storyteller, ids: Tensor, held_out: Tensor) -> None:
    """Muon for the matrices inside the layers (it needs far fewer steps than Adam here), Adam for the rest."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        (MUON_RATE, torch.optim.Muon(inner, lr=MUON_RATE, weight_decay=0.1, momentum=0.95)),
        (ADAM_RATE, torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)),
    )
    start = time.monotonic()
    for step in range(STEPS):
        for peak, optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = peak * rate_at(step)
        at = torch.randint(len(ids) - CONTEXT - 1, (BATCH,))
        x = torch.stack([ids[i : i + CONTEXT] for i in at])
        y = torch.stack([ids[i + 1 : i + 1 + CONTEXT] for i in at])
        loss = F.cross_entropy(model(x).view(-1, VOCAB), y.view(-1))
        model.zero_grad()
        loss.backward()
        for _, optimizer in optimizers:
            optimizer.step()
        if step % 100 == 99:
            minutes = (time.monotonic() - start) / 60
            print(
                f"step {step + 1}: train {loss.item():.3f}, held out {loss_on(model, held_out):.3f}, {minutes:.1f} min"
            )


def save(model: Storyteller, characters: list[str], folder: Path) -> None:
    """Write a folder that refinfer and `transformers` both read."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    specs = [
        TensorSpec(name, "BF16", shape, [state[name].bfloat16().contiguous().view(torch.uint16).numpy()])
        for name, shape in CONFIG.tensor_shapes().items()
    ]
    (folder / "model.safetensors").unlink(missing_ok=True)
    write_safetensors(folder / "model.safetensors", specs, {"format": "pt"})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    for name, value in (
        ("config.json", to_json(CONFIG)),
        ("tokenizer.json", character_tokenizer_json(characters)),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Train, measure on the stored weights, save."""
    parser = argparse.ArgumentParser(description="Train the storyteller.")
    parser.add_argument("--corpus", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the model to")
    args = parser.parse_args()
    raw = args.corpus.read_bytes()
    if hashlib.sha256(raw).hexdigest() != CORPUS_SHA256:
        sys.exit(f"{args.corpus} is not the tinyshakespeare text this model is trained on: its sha256 differs")
    text = raw.decode()
    characters = sorted(set(text))
    index = {c: i for i, c in enumerate(characters)}
    ids = torch.tensor([index[c] for c in text])
    cut = int(0.9 * len(ids))

    torch.manual_seed(1337)
    model = Storyteller()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, ids[:cut], ids[cut:])
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    loss = loss_on(model, ids[cut:])
    print(f"held out, on the bfloat16 weights: {loss:.4f} nats per character, perplexity {math.exp(loss):.3f}")
    save(model, characters, args.out)


if __name__ == "__main__":
    main()
