"""One file, its pages in memory, and two processes that have mapped it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

_BLUE, _GREEN, _ORANGE, _GREY, _INK = "#4c78a8", "#59a14f", "#f28e2b", "#bab0ac", "#333333"
_PAGES: Final = 10
_TOUCHED: Final = {"first process": range(7), "second process": (0, 1, 2, 3, 8)}
_PLACES: Final = ((24, _BLUE), (354, _ORANGE))
_SLOT: Final = 26
_PAGE: Final = 44
_LEFT: Final = 184
_TABLE_Y, _CACHE_Y, _FILE_Y = 64, 236, 336


def draw() -> str:
    """Draw, from the bottom up, the file, the page cache, and both page tables."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 420" width="640" height="420"',
        ' font-family="sans-serif" font-size="17" text-anchor="middle">',
        '<rect width="640" height="420" fill="#ffffff"/>',
    ]
    for (name, touched), (left, colour) in zip(_TOUCHED.items(), _PLACES, strict=True):
        lines += _page_table(name, touched, left, colour)
    here = sorted({page for touched in _TOUCHED.values() for page in touched})
    lines += _row(_CACHE_Y, ("page cache,", "in memory"), here, _GREEN)
    lines += [_line(_LEFT + _PAGE * (n + 0.5), _CACHE_Y + 40, _LEFT + _PAGE * (n + 0.5), _FILE_Y, _GREEN) for n in here]
    lines += _row(_FILE_Y, ("the file,", "on the disk"), range(_PAGES), _GREY)
    lines.append(f'<text x="{_LEFT + _PAGE * _PAGES // 2}" y="{_FILE_Y + 66}">a page of it: 4096 bytes</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _page_table(name: str, touched: Collection[int], left: int, colour: str) -> list[str]:
    lines = [f'<text x="{left + _SLOT * _PAGES // 2}" y="{_TABLE_Y - 36}" font-weight="bold">{name}</text>']
    lines.append(f'<text x="{left + _SLOT * _PAGES // 2}" y="{_TABLE_Y - 12}">addresses of the weights</text>')
    for n in range(_PAGES):
        x, filled = left + _SLOT * n, n in touched
        fill = colour if filled else "#ffffff"
        lines.append(
            f'<rect x="{x}" y="{_TABLE_Y}" width="{_SLOT}" height="30" fill="{fill}" '
            f'stroke="{"#ffffff" if filled else _GREY}"/>'
        )
        if filled:
            lines.append(_line(x + _SLOT / 2, _TABLE_Y + 30, _LEFT + _PAGE * (n + 0.5), _CACHE_Y, colour))
    return lines


def _row(y: int, label: tuple[str, str], present: Collection[int], colour: str) -> list[str]:
    lines = [
        f'<text x="{_LEFT - 14}" y="{y + 16 + 20 * i}" text-anchor="end">{word}</text>' for i, word in enumerate(label)
    ]
    for n in range(_PAGES):
        fill, stroke = (colour, "#ffffff") if n in present else ("#ffffff", _GREY)
        x = _LEFT + _PAGE * n
        lines.append(f'<rect x="{x}" y="{y}" width="{_PAGE}" height="40" fill="{fill}" stroke="{stroke}"/>')
    return lines


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="{colour}" stroke-width="1.6"/>'
