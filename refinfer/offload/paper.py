"""The paper's experiment on the virtual clock: its models, its arms, its published gains beside ours.

Knows: what the paper reports, and what must be assumed where it is silent. Does not know: threads, files.
Spec: PAPER-1 to PAPER-3. Tutorial: 11.

What the extracts at hand give: gains; not the disk's bandwidth, the cores in use, the budgets. So seconds cannot be
compared, but gains can: they depend on one number only, how long a token's products take beside reading all weights,
`compute_share = compute / (weights / bandwidth)`. It is swept. All assumptions:

    weights     4.5 bits each in all matrices (Q4_0); the unit of reading and locking is a tensor, as in the paper
    compute     in proportion to bytes; the same for every arm
    window      3 layers, by distance, their whole bytes taken from the budget first; one reader
    budget      what is left for locks beside the window, swept; the output table is locked in every arm
    synchronous reads each tensor when it is needed; locks nothing
    mmap        an LRU page cache of the whole budget; it reads at that share of the disk's bandwidth that makes
                synchronous reading 2.8 times as fast at the smallest budget, the middle of the published 2.6 to 3
    unbalanced  locks as many bytes as FlexInfer, in the leading layers
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from refinfer.model.config import SHAPES
from refinfer.offload.simulate import Gate, LayerDistance, Synchronous, Unit, lru_misses, simulate

__all__ = ["PAPER_MODELS", "PUBLISHED", "paper_rows"]

PAPER_MODELS: Final = ("llama2-7b", "llama2-13b", "codellama-34b", "llama2-70b")

PUBLISHED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "synchronous / mmap": "2.6 to 3.0, smallest memory",
        "prefetch / synchronous": "1.35 to 1.59, smallest memory; with more 1.70 to 2.19",
        "balanced / unbalanced": "1.09 to 1.11, smallest memory; with ample 1.57 to 1.83",
        "flexinfer / attention-first": "up to 1.22 (7B), 1.08 (13B), about 1 (34B, 70B)",
        "flexinfer / ffn-first": "up to 1.12 (7B), 1.15 (13B)",
        "flexinfer / mmap": "5.2 to 12.5 (7B), 5.0 to 11.8 (13B), 4.2 to 10.6 (34B), 5.0 to 11.0 (70B)",
    }
)
"""What the paper reports of each comparison (EuroMLSys 2025, section 5; second-hand where the text was not at hand)."""

_BITS: Final = 4.5
_WINDOW: Final = 3
_SYNC_OVER_MMAP: Final = 2.8
_BUDGET_SHARES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FFN: Final = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True, slots=True)
class _Tensor:
    kind: str
    layer: int
    nbytes: float


def _tensors(shape: str) -> list[_Tensor]:
    """Return the matrices of all layers; the output table is locked everywhere and left out."""
    config = SHAPES[shape]
    one = [(name, n[0] * n[1]) for name, n in config.layer_shapes().items() if len(n) == 2]
    return [
        _Tensor(name.split(".")[1], layer, weights * _BITS / 8)
        for layer in range(config.num_hidden_layers)
        for name, weights in one
    ]


def _lock(tensors: Sequence[_Tensor], kinds: Sequence[str], room: float) -> frozenset[int]:
    """Lock tensors kind by kind over the layers, one by one, while they fit."""
    locked = []
    for kind in kinds:
        for number, tensor in enumerate(tensors):
            if tensor.kind == kind and tensor.nbytes <= room:
                room -= tensor.nbytes
                locked.append(number)
    return frozenset(locked)


def _flexinfer(tensors: Sequence[_Tensor], attention: Sequence[str], room: float) -> frozenset[int]:
    """Algorithm 1, as `locks` has it for chunks."""
    layers = tensors[-1].layer + 1
    size = {tensor.kind: tensor.nbytes for tensor in tensors}
    size_ffn, size_attn = max(size[kind] for kind in _FFN), max(size[kind] for kind in attention)
    columns = 3 if room >= layers * (3 * size_ffn + 2 * size_attn) else int(min(2, room // (layers * size_ffn)))
    kept = ("gate_proj", "up_proj", "down_proj")[:columns]
    return _lock(tensors, [*kept, *attention], room)


def _leading(tensors: Sequence[_Tensor], nbytes: float) -> frozenset[int]:
    locked, room = [], nbytes
    for number, tensor in enumerate(tensors):
        room -= tensor.nbytes
        if room < -1e-6 * nbytes:
            break
        locked.append(number)
    return frozenset(locked)


def _token_s(tensors: Sequence[_Tensor], locked: frozenset[int], compute_share: float, gate: Gate) -> float:
    """Return the seconds of a token where reading all weights takes one."""
    total = sum(tensor.nbytes for tensor in tensors)
    units = [
        Unit(0.0 if n in locked else t.nbytes / total, compute_share * t.nbytes / total, t.layer)
        for n, t in enumerate(tensors)
    ]
    return simulate(units, gate, tokens=4).token_s


def paper_rows(compute_shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0)) -> Iterator[dict[str, Any]]:
    """Yield, for each model, budget and compute share, the speed of each arm relative to the others.

    `budget_share` is the part of the layers' bytes that may be locked beside the window.
    """
    for shape in PAPER_MODELS:
        tensors = _tensors(shape)
        total = sum(tensor.nbytes for tensor in tensors)
        size = {tensor.kind: tensor.nbytes for tensor in tensors}
        attention = sorted((kind for kind in size if kind not in _FFN), key=lambda kind: size[kind])
        window = _WINDOW * total / (tensors[-1].layer + 1)
        for compute_share in compute_shares:
            for budget_share in _BUDGET_SHARES:
                room = budget_share * total
                kept = _flexinfer(tensors, attention, room)
                locks = {
                    "prefetch": frozenset[int](),
                    "unbalanced": _leading(tensors, sum(tensors[n].nbytes for n in kept)),
                    "attention-first": _lock(tensors, [*attention, "gate_proj", "up_proj", "down_proj"], room),
                    "ffn-first": _lock(tensors, ["gate_proj", "up_proj", "down_proj", *attention], room),
                    "flexinfer": kept,
                }
                seconds = {
                    arm: _token_s(tensors, locked, compute_share, LayerDistance(_WINDOW))
                    for arm, locked in locks.items()
                }
                seconds["synchronous"] = _token_s(tensors, frozenset(), compute_share, Synchronous())
                missed = lru_misses([round(tensor.nbytes) for tensor in tensors], round(room + window)) / total
                seconds["mmap"] = compute_share + missed * _mmap_s(compute_share)
                yield {
                    "shape": shape,
                    "compute_share": compute_share,
                    "budget_share": budget_share,
                    "locked_share": sum(tensors[n].nbytes for n in kept) / total,
                    "synchronous / mmap": seconds["mmap"] / seconds["synchronous"],
                    "prefetch / synchronous": seconds["synchronous"] / seconds["prefetch"],
                    "balanced / unbalanced": seconds["unbalanced"] / seconds["flexinfer"],
                    "flexinfer / attention-first": seconds["attention-first"] / seconds["flexinfer"],
                    "flexinfer / ffn-first": seconds["ffn-first"] / seconds["flexinfer"],
                    "flexinfer / mmap": seconds["mmap"] / seconds["flexinfer"],
                }


def _mmap_s(compute_share: float) -> float:
    """Return how long mmap takes to read all weights, where direct reads take one second."""
    return _SYNC_OVER_MMAP * (1 + compute_share) - compute_share
