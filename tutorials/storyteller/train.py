"""Train the storyteller: a character-level Llama of 2.4 million parameters that writes like a play.

Knows: PyTorch, and the Hugging Face names of a Llama's weights.
Does not know: how refinfer runs the model; only its safetensors writer is used, so that the file is our own.

    pip install torch==2.13.0
    python tutorials/storyteller/train.py --corpus tinyshakespeare.txt --out refinfer/storyteller

The corpus is the public-domain text "tinyshakespeare" (1,115,394 characters, 65 different ones); its sha256 is
checked. The first 90 % is trained on, the last 10 % is only measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 65,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
}
D, HEADS, KV_HEADS, HEAD_DIM = (
    CONFIG[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
)
FFN, LAYERS, VOCAB, CONTEXT, EPS, THETA = (
    CONFIG[k]
    for k in (
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    )
)


def rope(x: Tensor) -> Tensor:
    """Rotate `[B, H, S, hd]` by position; the halves of a head form the pairs, as in Hugging Face's Llama."""
    S, half = x.shape[-2], HEAD_DIM // 2
    frequency = THETA ** (-torch.arange(half, dtype=torch.float32) / half)
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
        q, k, v = (
            p(x).view(B, S, -1, HEAD_DIM).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
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

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm = nn.RMSNorm(D, eps=EPS)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=EPS)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x)))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


class Storyteller(nn.Module):
    """Modules are named so that `state_dict()` has Hugging Face's names."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, D)
        self.model.layers = nn.ModuleList(Layer(dropout) for _ in range(LAYERS))
        self.model.norm = nn.RMSNorm(D, eps=EPS)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = 1 / math.sqrt(2 * LAYERS) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(p, std=scale / math.sqrt(p.shape[1]) if "embed" not in name else 0.05)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


@torch.inference_mode()
def loss_on(model: Storyteller, ids: Tensor, windows: int | None = None) -> float:
    """Mean loss in nats per character over consecutive windows of the whole context."""
    model.eval()
    starts = list(range(0, len(ids) - 1, CONTEXT))[:windows]
    total = count = 0.0
    for s in starts:
        x, y = ids[s : s + CONTEXT], ids[s + 1 : s + CONTEXT + 1]
        x = x[: len(y)]
        total += F.cross_entropy(model(x[None])[0], y, reduction="sum").item()
        count += len(y)
    model.train()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--adam", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--stop", type=int, default=10**9)
    args = parser.parse_args()

    raw = args.corpus.read_bytes()
    text = raw.decode()
    assert hashlib.sha256(raw).hexdigest() == CORPUS_SHA256
    characters = sorted(set(text))
    index = {c: i for i, c in enumerate(characters)}
    ids = torch.tensor([index[c] for c in text])
    cut = int(0.9 * len(ids))
    train, held_out = ids[:cut], ids[cut:]

    torch.manual_seed(1337)
    torch.set_num_threads(2)
    model = Storyteller(args.dropout)
    n = sum(p.numel() for p in model.parameters())
    print(f"{n:,} parameters", flush=True)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon, weight_decay=args.decay, momentum=0.95),
        torch.optim.AdamW(others, lr=args.adam, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peak = [group["lr"] for o in optimizers for group in o.param_groups]
    start = time.time()
    for step in range(args.steps):
        share = step / args.steps
        factor = min(1.0, (step + 1) / 50) * (1.0 if share < 0.3 else max(0.0, (1 - share) / 0.7))
        for lr, o in zip(peak, optimizers, strict=True):
            o.param_groups[0]["lr"] = lr * factor
        at = torch.randint(len(train) - args.context - 1, (args.batch,))
        x = torch.stack([train[i : i + args.context] for i in at])
        y = torch.stack([train[i + 1 : i + 1 + args.context] for i in at])
        loss = F.cross_entropy(model(x).view(-1, VOCAB), y.view(-1))
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o in optimizers:
            o.step()
        if step % 100 == 99 or step + 1 in (args.steps, args.stop):
            v = loss_on(model, held_out, 60)
            print(f"{step + 1:5d} train {loss.item():.4f} held-out {v:.4f} {time.time() - start:.0f} s", flush=True)
        if step + 1 == args.stop:
            return
    minutes = (time.time() - start) / 60
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    print(f"held-out, bf16 weights: {loss_on(model, held_out):.4f}, {minutes:.1f} min", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.out / "state.pt")
    (args.out / "characters.json").write_text(json.dumps(characters))


if __name__ == "__main__":
    main()
