"""What share of a core's speed each way to multiply reaches, over the rows of x, from the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

_FIGURES = Path(__file__).parents[2] / "docs" / "figures" / "matmul.json"
_SIDE = 4096
_ROWS_OF_X = (1, 2, 4, 8, 16, 64, 256, 512)
_LINES = (
    ("naive", "#6b6461", "one call, x @ W.T", 2),
    ("f32", "#4c78a8", "refinfer, f32", 3),
    ("f32-nr16", "#e15759", "XNNPACK's tile, in numpy", 2),
)
_LEFT, _TOP, _WIDTH, _HEIGHT, _MOST = 70, 60, 600, 300, 1.2


def draw() -> str:
    """Draw the share of the limit that the same product reaches, called in three ways."""
    rows = json.loads(_FIGURES.read_text())["rows"]
    share = {(row["format"], row["m"]): row["fraction_of_limit"] for row in rows if row["n"] == _SIDE}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 430" width="700" height="430">',
        '<g font-family="sans-serif" font-size="16" fill="#333333">',
        '<rect width="700" height="430" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-weight="bold">share of the speed that one core can reach</text>',
    ]
    for percent in (0, 25, 50, 75, 100):
        y = _y(percent / 100)
        colour = "#333333" if percent == 100 else "#e4e0de"
        parts.append(f'<line x1="{_LEFT}" y1="{y:.0f}" x2="{_LEFT + _WIDTH}" y2="{y:.0f}" stroke="{colour}"/>')
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 5:.0f}" text-anchor="end">{percent} %</text>')
    bottom = _TOP + _HEIGHT
    parts += [f'<text x="{_x(m):.0f}" y="{bottom + 26}" text-anchor="middle">{m}</text>' for m in _ROWS_OF_X]
    parts.append(f'<text x="{_LEFT}" y="{bottom + 54}">rows of x (M); weights of {_SIDE} by {_SIDE}</text>')
    for i, (name, colour, words, width) in enumerate(_LINES):
        points = " ".join(f"{_x(m):.1f},{_y(share[name, m]):.1f}" for m in _ROWS_OF_X)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{_x(m):.1f}" cy="{_y(share[name, m]):.1f}" r="4" fill="{colour}"/>' for m in _ROWS_OF_X]
        x = _LEFT + (0, 190, 350)[i]
        parts.append(f'<rect x="{x}" y="38" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="51">{words}</text>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _x(m: int) -> float:
    return _LEFT + 24 + (_WIDTH - 48) * _ROWS_OF_X.index(m) / (len(_ROWS_OF_X) - 1)


def _y(share: float) -> float:
    return _TOP + _HEIGHT * (1 - share / _MOST)
