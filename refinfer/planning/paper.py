"""The paper's experiment on the virtual clock: its models, its arms, its published gains next to ours.

Leaves to others: locking (`locks`), the virtual clock (`simulate`), the page cache (`page_cache`).
Read more: tutorial 11; clauses PAPER-1 to PAPER-3.

The extracts of the paper used here report gains, but not the disk's bandwidth, the cores in use or the budgets. So
gains can be compared and seconds cannot. The gains depend on one number only: how long a token's products take compared
with reading all weights, `compute_share = compute / (weights / bandwidth)`. It is swept. All assumptions:

    weights     the same number of bits per weight in all matrices (4.5 in Q4_0), so that it has no influence; the
                unit of reading and locking is a tensor, as in the paper
    compute     in proportion to bytes; the same for every arm
    window      3 layers, by distance, their whole bytes taken from the budget first; one prefetch thread
    budget      what is left for locks next to the window, swept; the output table is locked in every arm
    synchronous reads each tensor when it is needed; locks nothing
    mmap        an LRU page cache of the whole budget; it reads at that share of the disk's bandwidth that makes
                synchronous reading 2.8 times as fast at the smallest budget, the middle of the published 2.6 to 3
    unbalanced  locks the same number of bytes as FlexInfer, in the leading layers

Two arms do not use `locks`: the paper's attention-first and FFN-first lock tensors one by one in the order of the
layers, where ours spread a kind that does not fit evenly over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refinfer.arrays import BoolArray
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.planning.locks import LOCKS
from refinfer.planning.page_cache import lru_misses
from refinfer.planning.simulate import Gate, LayerDistance, Synchronous, Unit, simulate

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
"""The gains that the paper reports (EuroMLSys 2025, section 5); some are taken from summaries by others."""

_WINDOW: Final = 3
_SYNC_OVER_MMAP: Final = 2.8
_BUDGET_SHARES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_WHOLE_TENSORS: Final = 1 << 40  # the aim for a chunk's bytes


def paper_rows(compute_shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0)) -> Iterator[dict[str, Any]]:
    """Yield, for each model, compute share and budget, the speed of each arm relative to the others.

    `budget_share` is the part of the layers' bytes that may be locked next to the window.
    """
    for shape in PAPER_MODELS:
        inventory = Inventory(SHAPES[shape], "f32", _WHOLE_TENSORS)
        sizes = inventory.sizes[:-1].tolist()  # of all layers, without the output table
        total = sum(sizes)
        window = _WINDOW * total / inventory.config.num_hidden_layers
        for compute_share in compute_shares:
            for budget_share in _BUDGET_SHARES:
                room = int(budget_share * total)
                locks = _locks(inventory, room)
                seconds = {
                    arm: _token_s(inventory, locked, compute_share, LayerDistance(_WINDOW))
                    for arm, locked in locks.items()
                }
                seconds["synchronous"] = _token_s(inventory, locks["prefetch"], compute_share, Synchronous())
                missed = lru_misses(sizes, round(room + window)) / total
                seconds["mmap"] = compute_share + missed * _mmap_s(compute_share)
                yield {
                    "shape": shape,
                    "compute_share": compute_share,
                    "budget_share": budget_share,
                    "locked_share": _nbytes(inventory, locks["flexinfer"]) / total,
                    "synchronous / mmap": seconds["mmap"] / seconds["synchronous"],
                    "prefetch / synchronous": seconds["synchronous"] / seconds["prefetch"],
                    "balanced / unbalanced": seconds["unbalanced"] / seconds["flexinfer"],
                    "flexinfer / attention-first": seconds["attention-first"] / seconds["flexinfer"],
                    "flexinfer / ffn-first": seconds["ffn-first"] / seconds["flexinfer"],
                    "flexinfer / mmap": seconds["mmap"] / seconds["flexinfer"],
                }


def _locks(inventory: Inventory, room: int) -> dict[str, BoolArray]:
    """Return what each arm locks of the layers in `room` bytes."""
    sizes = inventory.kind_sizes
    *kinds, table = sizes
    attention, ffn = sorted(kinds[:-3], key=lambda kind: sizes[kind]), kinds[-3:]
    kept = LOCKS["flexinfer"](inventory, sizes[table] + room)[:-1]  # it locks the output table first
    return {
        "prefetch": LOCKS["none"](inventory, room)[:-1],
        "unbalanced": LOCKS["leading"](inventory, _nbytes(inventory, kept))[:-1],
        "attention-first": _one_by_one(inventory, [*attention, *ffn], room),
        "ffn-first": _one_by_one(inventory, [*ffn, *attention], room),
        "flexinfer": kept,
    }


def _one_by_one(inventory: Inventory, kinds: Iterable[str], room: int) -> BoolArray:
    """Lock tensors kind by kind, one by one in the order of the layers, while they fit."""
    locked = np.zeros(len(inventory.cycle) - 1, np.bool_)
    for kind in kinds:
        nbytes = inventory.kind_sizes[kind]
        taken = inventory.chunks_of_kind[kind][: room // nbytes]
        locked[taken] = True
        room -= len(taken) * nbytes
    return locked


def _nbytes(inventory: Inventory, locked: BoolArray) -> int:
    return int(inventory.sizes[:-1][locked].sum())


def _token_s(inventory: Inventory, locked: BoolArray, compute_share: float, gate: Gate) -> float:
    """Return the seconds of a token if reading all layers takes one second."""
    shares = (inventory.sizes[:-1] / inventory.sizes[:-1].sum()).tolist()
    units = [
        Unit(0.0 if kept else share, compute_share * share, chunk.layer)
        for kept, share, chunk in zip(locked.tolist(), shares, inventory.cycle, strict=False)
    ]
    return simulate(units, gate, tokens=4).token_s


def _mmap_s(compute_share: float) -> float:
    """Return the seconds that mmap takes to read all weights, if direct reads take one second."""
    return _SYNC_OVER_MMAP * (1 + compute_share) - compute_share
