"""The whole system on one drawing: checkpoint, packed file, the two ways out of it, the seam, the transformer."""

from __future__ import annotations

from typing import Final

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.plan import make_plan

_MODEL: Final = Inventory(SHAPES["storyteller"], "bf16")
_BLUE, _GREEN, _ORANGE, _GREY, _DARK = "#4c78a8", "#59a14f", "#f28e2b", "#bab0ac", "#333333"
_POSITIONS: Final = 64
_SHARE: Final = 0.75


def draw() -> str:
    """Draw it from top to bottom; the chunks are those of the storyteller, and what is locked is a real plan."""
    lines = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 702" width="700" height="702" '
            'font-family="sans-serif" font-size="16" text-anchor="middle">'
        ),
        (
            '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{_DARK}"/></marker></defs>'
        ),
        '<rect width="700" height="702" fill="#ffffff"/>',
        *_checkpoint(),
        *_file(146),
        *_mapped(252),
        *_streamed(252),
        *_below(500),
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _checkpoint() -> list[str]:
    return [
        _box(20, 16, 220, 54, "#f2f0ef"),
        _text(130, 38, "a checkpoint", bold=True),
        _text(130, 59, "matrices row by row"),
        _arrow(130, 72, 130, 142),
        _text(144, 102, "packed once, at the first start", anchor="start"),
        _room(680, 102, "packing: 01 to 03"),
    ]


def _file(y: int) -> list[str]:
    return [
        _text(20, y + 18, "the weight cache file: chunks in order of use", anchor="start", bold=True),
        _room(680, y + 18, "weight_cache: 04 to 06"),
        *_strip(20, y + 30, 660, 34, frozenset(), _GREY),
        _arrow(175, y + 68, 175, y + 104),
        _text(189, y + 90, "mapped", anchor="start"),
        _arrow(515, y + 68, 515, y + 104),
        _text(501, y + 90, "read with direct I/O", anchor="end"),
    ]


def _mapped(y: int) -> list[str]:
    return [
        _box(20, y, 310, 200, "#ffffff"),
        _text(175, y + 24, "enough memory", bold=True),
        *_strip(36, y + 44, 278, 30, frozenset(range(len(_MODEL.cycle)))),
        _text(175, y + 112, "nothing is packed or copied;"),
        _text(175, y + 134, "processes share the pages"),
        _text(175, y + 190, "tutorial 06", "#8a5a00"),
        _arrow(175, y + 202, 175, y + 244),
    ]


def _streamed(y: int) -> list[str]:
    budget = round(_SHARE * _MODEL.streamable_nbytes)
    plan = make_plan("balanced", _MODEL, fixed_of(_MODEL, _POSITIONS), budget, costs_of(_MODEL, HERE))
    slots = [
        f'<rect x="{436 + 34 * i}" y="{y + 104}" width="28" height="24" fill="{_BLUE}"/>'
        for i in range(plan.ring_slots)
    ]
    return [
        _box(350, y, 330, 200, "#ffffff"),
        _text(515, y + 24, "a memory budget", bold=True),
        *_strip(366, y + 44, 298, 30, plan.locked),
        _text(366, y + 94, "green: locked in memory for good", _GREEN_TEXT, anchor="start"),
        _text(366, y + 122, "blue:", _BLUE_TEXT, anchor="start"),
        *slots,
        _text(446 + 34 * plan.ring_slots, y + 122, "a ring,", _BLUE_TEXT, anchor="start"),
        _text(515, y + 146, "filled ahead by threads,", _BLUE_TEXT),
        _text(515, y + 167, "for each token anew", _BLUE_TEXT),
        _text(515, y + 190, "planning, offload: 08 to 12", "#8a5a00"),
        _arrow(515, y + 202, 515, y + 244),
    ]


_GREEN_TEXT: Final = "#3d7a36"
_BLUE_TEXT: Final = "#3b6290"


def _below(y: int) -> list[str]:
    return [
        f'<rect x="20" y="{y}" width="660" height="40" rx="4" fill="{_ORANGE}"/>',
        _text(350, y + 26, "the seam: a weight source gives matrix after matrix", "#222222", bold=True),
        _arrow(350, y + 42, 350, y + 80),
        _box(230, y + 84, 240, 54, "#f2f0ef"),
        _text(350, y + 106, "the transformer", bold=True),
        _text(350, y + 127, "tokens in, logits out"),
        _room(680, y + 70, "model: 07"),
        _arrow(120, y + 112, 226, y + 112),
        _text(66, y + 117, "JULIET:"),
        _arrow(472, y + 112, 540, y + 112),
        _text(612, y + 117, "My lord, ..."),
        _text(350, y + 178, "Both ways give the same logits, bit for bit."),
    ]


def _strip(x: float, y: int, width: int, height: int, locked: frozenset[int], others: str = _BLUE) -> list[str]:
    lines = []
    scale = width / _MODEL.streamable_nbytes
    for number, chunk in enumerate(_MODEL.cycle):
        colour = _GREEN if number in locked else others
        lines.append(
            f'<rect x="{x:.2f}" y="{y}" width="{scale * chunk.padded_nbytes:.2f}" height="{height}" fill="{colour}" '
            f'stroke="#ffffff" stroke-width="0.8"><title>{chunk.kind} of layer {chunk.layer}</title></rect>'
        )
        x += scale * chunk.padded_nbytes
    return lines


def _room(x: int, y: int, text: str) -> str:
    return _text(x, y, text, "#8a5a00", anchor="end")


def _box(x: int, y: int, width: int, height: int, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{_GREY}"/>'


def _text(x: int, y: int, text: str, colour: str = _DARK, *, anchor: str = "", bold: bool = False) -> str:
    more = f' text-anchor="{anchor}"' if anchor else ""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}"{more}{weight}>{text}</text>'


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {ends} stroke="{_DARK}" stroke-width="1.5" marker-end="url(#head)"/>'
