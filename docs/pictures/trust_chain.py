"""What vouches for what in a cache file: the storyteller's, its buffers to scale."""

from __future__ import annotations

from typing import Final

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES

_BLUE, _GREEN, _ORANGE, _GREY, _INK = "#4c78a8", "#59a14f", "#f28e2b", "#bab0ac", "#333333"
_LEFT: Final = 20
_HEADER: Final = 88
_INDEX: Final = 88
_CHUNKS: Final = 424
_TOP: Final = 148
_TALL: Final = 46


def draw() -> str:
    """Draw the file as a strip, and an arrow from each digest to the bytes it vouches for."""
    first = _LEFT + _HEADER
    index = first + _CHUNKS
    middle = _TOP + _TALL // 2 + 6
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 372" width="640" height="372"',
        ' font-family="sans-serif" font-size="17" text-anchor="middle">',
        '<defs><marker id="head" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">',
        f'<path d="M0,0 L9,4 L0,8 z" fill="{_INK}"/></marker></defs>',
        '<rect width="640" height="372" fill="#ffffff"/>',
        _box(_LEFT, _HEADER, _GREEN),
        *_chunks(first),
        _box(index, _INDEX, _ORANGE),
        f'<text x="{_LEFT + _HEADER // 2}" y="{middle}" fill="#ffffff">header</text>',
        f'<text x="{index + _INDEX // 2}" y="{middle}" fill="#222222">index</text>',
        # Above: the header vouches for itself and for the index.
        _arrow(f"M{_LEFT + 22},{_TOP} C{_LEFT + 2},{_TOP - 48} {_LEFT + 70},{_TOP - 48} {_LEFT + 54},{_TOP - 3}"),
        f'<text x="{_LEFT + 38}" y="{_TOP - 66}">SHA-256</text>',
        f'<text x="{_LEFT + 38}" y="{_TOP - 46}">of itself</text>',
        _arrow(f"M{first - 8},{_TOP} C{first + 24},24 {index},24 {index + 44},{_TOP - 3}"),
        f'<text x="{first + _CHUNKS // 2}" y="44">SHA-256 of the index</text>',
        # Below: the index vouches for the chunks.
        *(_arrow(_from_index(index + 30, first + _CHUNKS * part // 8)) for part in (1, 3, 5, 7)),
        f'<text x="{first + 345}" y="{_TOP + _TALL + 86}">a checksum of every chunk,</text>',
        f'<text x="{first + 345}" y="{_TOP + _TALL + 106}">a SHA-256 of every buffer</text>',
        # Below the header: what the file was made of, and by what.
        *_outside(_LEFT + 34, "SHA-256 of", "the model's files", _TOP + _TALL + 146, 104),
        *_outside(_LEFT + 70, "fingerprint of", "the packing code", _TOP + _TALL + 146, 300),
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _box(x: float, width: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{_TOP}" width="{width:.1f}" height="{_TALL}" fill="{colour}" stroke="#ffffff"/>'


def _chunks(first: int) -> list[str]:
    """Draw the block of vectors, the tied table, and the matrices of each layer."""
    inventory = Inventory(SHAPES["storyteller"], "bf16")
    *layers, table = (matrix.layout.padded_nbytes for matrix in inventory.matrices)
    sizes = [inventory.resident_nbytes, table, *layers]
    scale = _CHUNKS / sum(sizes)
    boxes, at = [], 0
    for nbytes in sizes:
        boxes.append(_box(first + at * scale, nbytes * scale, _BLUE))
        at += nbytes
    return boxes


def _arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{_INK}" stroke-width="1.4" marker-end="url(#head)"/>'


def _from_index(start: int, end: int) -> str:
    base = _TOP + _TALL
    return f"M{start},{base} C{start - 20},{base + 76} {end},{base + 76} {end},{base + 3}"


def _outside(x: int, what: str, of: str, y: int, centre: int) -> list[str]:
    base = _TOP + _TALL
    return [
        _arrow(f"M{x},{base} C{x},{base + 70} {centre},{base + 40} {centre},{y - 27}"),
        f'<rect x="{centre - 89}" y="{y - 24}" width="178" height="48" rx="6" fill="{_GREY}"/>',
        f'<text x="{centre}" y="{y - 4}">{what}</text>',
        f'<text x="{centre}" y="{y + 16}">{of}</text>',
    ]
