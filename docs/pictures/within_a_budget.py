"""Tokens per second under memory budgets, as `refinfer bench offload` measured them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

_FIGURES: Final = Path(__file__).parents[2] / "docs" / "figures" / "offload.json"
_ARMS: Final = (  # arm, its colour, what it is called
    ("optimal", "#4c78a8", "refinfer, plan optimal"),
    ("synchronous", "#f28e2b", "same locks, no prefetch thread"),
    ("mmap", "#e15759", "real mmap, real memory limit"),
)
_LEFT: Final = 62
_TOP: Final = 60
_WIDTH: Final = 600
_HEIGHT: Final = 300


def draw() -> str:
    """Draw one line for each arm over the budgets, and the bound of what disk and processor allow."""
    measured = json.loads(_FIGURES.read_text())["rows"]
    rows = [row for row in measured if row["format"] == "f32" and row.get("threads", 1) == 1]
    best = [row for row in rows if row["arm"] == "optimal" and row["prefetch_threads"] > 1]
    most = max(max(row["ideal_tokens_per_s"], row["tokens_per_s"]) for row in best) * 1.05
    lines = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 500" width="700" height="500" '
            'font-family="sans-serif" font-size="16">'
        ),
        '<rect width="700" height="500" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="26" font-weight="bold">Tokens per second, 1.2 GB of float32 weights</text>',
    ]
    step = next(step for step in (0.5, 1, 2, 5, 10) if most / step <= 8)
    for i in range(int(most / step) + 1):
        y = _y(i * step / most)
        lines += [
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDTH}" y2="{y:.1f}" stroke="#e4e0de"/>',
            f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{i * step:g}</text>',
        ]
    lines += [
        f'<text x="{_x(share):.1f}" y="{_TOP + _HEIGHT + 22}" text-anchor="middle">{share:.0%}</text>'
        for share in sorted({row["budget_share"] for row in best})
        if share != 0.9
    ]
    bound = [(row["budget_share"], row["ideal_tokens_per_s"] / most) for row in best]
    lines.append(_line(bound, "#7b6f6a", ' stroke-dasharray="6 5"'))
    for name, colour, _ in _ARMS:
        points = [
            (row["budget_share"], row["tokens_per_s"] / most)
            for row in rows
            if row["arm"] == name and row["prefetch_threads"] != 1
        ]
        lines.append(_line(points, colour, ""))
        lines += [f'<circle cx="{_x(x):.1f}" cy="{_y(y):.1f}" r="4.5" fill="{colour}"/>' for x, y in points]
    lines.append(
        f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 48}" text-anchor="middle">'
        "memory budget, in % of the weights</text>"
    )
    legend: list[tuple[str, str, Any]] = [(colour, what, "") for _, colour, what in _ARMS]
    legend.append(("#7b6f6a", "what disk and processor allow", ' stroke-dasharray="6 5"'))
    for i, (colour, what, dashes) in enumerate(legend):
        x, y = _LEFT + 300 * (i % 2), _TOP + _HEIGHT + 82 + 26 * (i // 2)
        lines += [
            f'<line x1="{x}" y1="{y - 5}" x2="{x + 28}" y2="{y - 5}" stroke="{colour}" stroke-width="3"{dashes}/>',
            f'<text x="{x + 36}" y="{y}" font-size="15">{what}</text>',
        ]
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share


def _y(height: float) -> float:
    return _TOP + _HEIGHT * (1 - height)


def _line(points: list[tuple[float, float]], colour: str, dashes: str) -> str:
    path = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in sorted(points))
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="3"{dashes}/>'
