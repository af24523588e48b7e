"""What is asked of a weight cache, and what it answers, when a buffer is not there yet and when it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from refinfer.packing.formats import layout_of
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.memory import MemoryWeightCacheProvider
from refinfer.weight_cache.packers import matrix_key, pack_into

_WIDTH: Final = 600
_LEFT: Final = 120
_RIGHT: Final = 490
_STEP: Final = 58
_BLUE, _GREEN, _ORANGE, _GREY = "#4c78a8", "#59a14f", "#f28e2b", "#bab0ac"


class _Recording(MemoryWeightCacheProvider):
    """Notes every verb with its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def look_up(self, key: PackKey) -> int | None:
        offset = super().look_up(key)
        self.calls.append(("look_up(key)", f"{offset}"))
        return offset

    def reserve_space(self, nbytes: int) -> Bytes:
        space = super().reserve_space(nbytes)
        self.calls.append((f"reserve_space({nbytes})", f"{len(space)} zeros, writable"))
        return space

    def look_up_or_insert(self, key: PackKey, buffer: Bytes) -> int:
        offset = super().look_up_or_insert(key, buffer)
        self.calls.append(("look_up_or_insert(key, space)", f"{offset}"))
        return offset

    def offset_to_addr(self, offset: int) -> Bytes:
        view = super().offset_to_addr(offset)
        self.calls.append((f"offset_to_addr({offset})", f"{len(view)} bytes, read-only"))
        return view


def draw() -> str:
    """Draw both, one below the other, as they happened."""
    weight_cache = _Recording()
    key = matrix_key(layout_of("f32", 40, 32), WeightId(bytes(32), "w"))

    def pack(buffer: Bytes) -> Iterator[int]:
        weight_cache.calls.append(("pack", ""))
        yield from pack_into(np.zeros((40, 32), np.float32), key, buffer)

    panels = []
    for title in ("A miss: the buffer is not there yet", "A hit: it is there, nothing is packed"):
        weight_cache.get_or_pack(key, pack)
        panels.append((title, weight_cache.calls))
        weight_cache.calls = []
    heights = [78 + _STEP * len(calls) for _, calls in panels]
    height = sum(heights) + 34
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="17" text-anchor="middle">',
        '<defs><marker id="head" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">',
        '<path d="M0,0 L9,4 L0,8 z" fill="#333333"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    top = 14
    for (title, calls), tall in zip(panels, heights, strict=True):
        lines += _panel(title, calls, top, tall)
        top += tall + 6
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(title: str, calls: list[tuple[str, str]], top: int, height: int) -> list[str]:
    lines = [f'<text x="{_WIDTH // 2}" y="{top + 16}" font-weight="bold">{title}</text>']
    for x, who, colour, ink in (
        (_LEFT, "who needs it", _BLUE, "#ffffff"),
        (_RIGHT, "the weight cache", _ORANGE, "#222222"),
    ):
        lines.append(f'<line x1="{x}" y1="{top + 58}" x2="{x}" y2="{top + height - 8}" stroke="{_GREY}"/>')
        lines.append(f'<rect x="{x - 88}" y="{top + 28}" width="176" height="30" rx="5" fill="{colour}"/>')
        lines.append(f'<text x="{x}" y="{top + 49}" fill="{ink}">{who}</text>')
    y = top + 84
    for verb, answer in calls:
        if verb == "pack":
            lines.append(f'<rect x="{_LEFT - 88}" y="{y - 14}" width="270" height="36" rx="5" fill="{_GREEN}"/>')
            lines.append(f'<text x="{_LEFT + 47}" y="{y + 10}" fill="#ffffff">packs, into that space</text>')
        else:
            lines += _arrow(verb, y, _LEFT, _RIGHT, "")
            lines += _arrow(answer, y + 25, _RIGHT, _LEFT, ' stroke-dasharray="5 4"')
        y += _STEP
    return lines


def _arrow(text: str, y: int, start: int, end: int, dash: str) -> list[str]:
    return [
        f'<line x1="{start}" y1="{y}" x2="{end}" y2="{y}" stroke="#333333"{dash} marker-end="url(#head)"/>',
        f'<text x="{(_LEFT + _RIGHT) // 2}" y="{y - 5}">{text}</text>',
    ]
