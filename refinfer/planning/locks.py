"""Which chunks to lock, that is, to keep in memory for the whole run, in a given number of bytes: six simple answers.

Chooses by sizes and kinds of chunks alone. Leaves to others: budgets (`plan`), seconds (`cost`), the best answer
(`optimal`).
Read more: tutorial 09; clauses PLAN-2, PLAN-5 to PLAN-8, PLAN-23.

    none               nothing
    leading            the first chunks of the cycle: the unbalanced baseline of the paper, FlexInfer
    balanced           the same share of every stretch of the cycle
    attention-first    kind by kind, each in all layers: the attention matrices, the smallest first; then the FFN's
    ffn-first          the same, but the FFN's matrices (gate, up, down) before those of attention
    flexinfer          the paper's Algorithm 1, literally

The paper locks whole tensors, and so does `flexinfer`. The others lock chunks: except for `none`, they leave less than
a chunk of `room`, the bytes for locked chunks, unused. A kind that does not fit as a whole is locked evenly over the
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from refinfer.arrays import BoolArray, IntArray
from refinfer.inventory import Inventory

__all__ = ["LOCKS", "Lock", "fill"]

_FFN: Final = ("gate_proj", "up_proj", "down_proj")
_GOLDEN: Final = 0.6180339887498949  # shifts the steps of each size, so that they do not meet those of the next

Lock = Callable[[Inventory, int], BoolArray]


# --8<-- [start:spread]
def _spread(inventory: Inventory, numbers: IntArray, room: int) -> IntArray:
    """Choose from the chunks `numbers` those to lock: at most `room` bytes, spread as evenly as possible.

    `numbers` are in the order of the cycle, `inventory.sizes` has the bytes of every chunk of the cycle, and
    `inventory.different_sizes` the few sizes there are. If all of `numbers` fit, all are chosen. Otherwise at most a
    chunk of each size is left of `room`, and of every beginning of `numbers` the same share of its bytes is chosen,
    exact to within a chunk of each size.

    The same share is taken of the chunks of each size: the k-th of them if `floor(k * share)` steps up to the next
    integer there. (So does Bresenham's algorithm choose the pixels of a sloped line.)
    """
    # lab 10b: choose chunks evenly, of each size the same share
    sizes = inventory.sizes[numbers]
    total = int(sizes.sum())
    if total <= room:
        return numbers
    share = room / total
    taken: dict[int, IntArray] = {}
    for size in inventory.different_sizes:
        alike = numbers[sizes == size]
        if len(alike):
            steps = np.floor(np.arange(len(alike) + 1) * share + len(taken) * _GOLDEN % 1)
            taken[size] = alike[steps[1:] > steps[:-1]]
    while sum(size * len(part) for size, part in taken.items()) > room:
        largest = max(taken, key=lambda size: size * len(taken[size]))
        taken[largest] = taken[largest][:-1]
    return np.concatenate(list(taken.values()))
    # end lab


# --8<-- [end:spread]


def fill(inventory: Inventory, locked: BoolArray, room: int) -> BoolArray:
    """Lock further chunks besides `locked`, spread over the others, until no other one fits into `room`."""
    sizes = inventory.sizes
    locked = locked.copy()
    locked[_spread(inventory, np.flatnonzero(~locked), room - int(sizes[locked].sum()))] = True
    room -= int(sizes[locked].sum())
    for size in reversed(inventory.different_sizes):
        if size <= room:
            others = np.flatnonzero(~locked & (sizes == size))
            n = min(len(others), room // size)
            locked[others[np.arange(n) * len(others) // max(n, 1)]] = True
            room -= n * size
    return locked


def _nothing(inventory: Inventory) -> BoolArray:
    return np.zeros(len(inventory.sizes), np.bool_)


def _none(inventory: Inventory, room: int) -> BoolArray:
    return _nothing(inventory)


def _leading(inventory: Inventory, room: int) -> BoolArray:
    return np.cumsum(inventory.sizes) <= room


def _balanced(inventory: Inventory, room: int) -> BoolArray:
    return fill(inventory, _nothing(inventory), room)


def _columns(inventory: Inventory, kinds: Iterable[str], room: int) -> BoolArray:
    """Lock kind after kind, each in all layers; the first that does not fit as a whole is locked evenly."""
    locked, left = _nothing(inventory), room
    for kind in kinds:
        taken = _spread(inventory, inventory.chunks_of_kind[kind], left)
        locked[taken] = True
        left -= int(inventory.sizes[taken].sum())
    return fill(inventory, locked, room)


def _attention(inventory: Inventory) -> list[str]:
    """Return the kinds of attention matrices, the smallest first: k and v if several query heads share a key."""
    sizes = inventory.kind_sizes
    return sorted((kind for kind in sizes if kind not in (*_FFN, "lm_head")), key=lambda kind: sizes[kind])


def _attention_first(inventory: Inventory, room: int) -> BoolArray:
    return _columns(inventory, [*_attention(inventory), *_FFN, "lm_head"], room)


def _ffn_first(inventory: Inventory, room: int) -> BoolArray:
    return _columns(inventory, [*_FFN, *_attention(inventory), "lm_head"], room)


# --8<-- [start:algorithm-1]
def _flexinfer(inventory: Inventory, room: int) -> BoolArray:
    """Algorithm 1 of the paper.

    With N layers, `size_FFN` the bytes of one FFN tensor, `size_attn` of one attention tensor:

        if      size_mem >= 3 N size_FFN + 2 N size_attn   keep all three FFN tensors of all layers
        else if size_mem >= 2 N size_FFN                   keep two
        else if size_mem >= N size_FFN                     keep one
        then keep as many attention tensors as possible, one by one

    The paper leaves some points open. Here `size_mem` is `room` less the output table, which the paper keeps in memory
    with the embedding: it is locked first, if there is room. FFN tensors are kept in execution order: gate, up, down.
    `size_FFN` is the largest FFN tensor, `size_attn` the largest attention tensor. Attention tensors are kept kind by
    kind in all layers, the smallest kind first and the first layer first, until the next one does not fit. A tensor is
    kept as a whole, with all of its chunks. Bytes that are left after that stay unused.

    `inventory.kind_sizes` has the bytes of one tensor of each kind, and `inventory.chunks_of_kind` the numbers of all
    chunks of a kind, layer after layer, the same number for each layer. `_FFN` has the FFN kinds in execution order,
    `_attention(inventory)` the attention kinds, the smallest first. The result is a mask, made by `_nothing`: for each
    chunk of the cycle whether it is locked.
    """
    # lab 10: lock what Algorithm 1 keeps in the given room
    sizes, layers = inventory.kind_sizes, inventory.config.num_hidden_layers
    locked = _nothing(inventory)

    def keep(kind: str, tensors: int) -> int:
        """Lock a kind in the first `tensors` layers; return its bytes."""
        chunks = inventory.chunks_of_kind[kind]
        locked[chunks[: tensors * len(chunks) // (1 if kind == "lm_head" else layers)]] = True
        return tensors * sizes[kind]

    if sizes["lm_head"] <= room:
        room -= keep("lm_head", 1)
    size_ffn = max(sizes[kind] for kind in _FFN)
    size_attn = max(sizes[kind] for kind in _attention(inventory))
    if room >= 3 * layers * size_ffn + 2 * layers * size_attn:
        columns = 3
    elif room >= 2 * layers * size_ffn:
        columns = 2
    else:
        columns = int(room >= layers * size_ffn)
    for kind in _FFN[:columns]:
        room -= keep(kind, layers)
    for kind in _attention(inventory):
        room -= keep(kind, min(layers, room // sizes[kind]))
    return locked
    # end lab


# --8<-- [end:algorithm-1]


LOCKS: Final[Mapping[str, Lock]] = MappingProxyType(
    {
        "none": _none,
        "leading": _leading,
        "balanced": _balanced,
        "attention-first": _attention_first,
        "ffn-first": _ffn_first,
        "flexinfer": _flexinfer,
    }
)
"""The answers by the plan's name: functions of an inventory and `room` that return for each chunk if it is locked."""
