"""What Algorithm 1 leaves unused of the room it is given, on the shape of Llama 2 70B."""

from __future__ import annotations

from typing import Final

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.planning.locks import LOCKS

_STEPS: Final = 500
_LEFT: Final = 64
_TOP: Final = 40
_WIDTH: Final = 600
_HEIGHT: Final = 210
_MOST: Final = 0.3


def draw() -> str:
    """Draw the unused share of the weights over the share there is room for, for two plans."""
    model = Inventory(SHAPES["llama2-70b"], "int4")
    lines = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 310" width="700" height="310" '
            'font-family="sans-serif" font-size="16">'
        ),
        '<rect width="700" height="310" fill="#ffffff"/>',
        (
            f'<text x="{_LEFT}" y="24" font-weight="bold">Room left unused, Llama 2 70B in int4, in % of the weights'
            "</text>"
        ),
    ]
    for tenth in range(0, 11, 2):
        x = _LEFT + _WIDTH * tenth / 10
        lines.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{_TOP + _HEIGHT}" stroke="#e4e0de"/>')
        lines.append(f'<text x="{x}" y="{_TOP + _HEIGHT + 22}" text-anchor="middle">{10 * tenth} %</text>')
    for percent in (0, 10, 20, 30):
        y = _TOP + _HEIGHT * (1 - percent / 100 / _MOST)
        lines.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDTH}" y2="{y:.1f}" stroke="#bab0ac"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    for name, colour in (("flexinfer", "#e15759"), ("balanced", "#59a14f")):
        lines.append(
            f'<polyline points="{_points(model, name)}" fill="none" stroke="{colour}" stroke-width="2.5" '
            'stroke-linejoin="round"/>'
        )
    lines += [
        f'<text x="{_LEFT + 500}" y="{_TOP + 52}" text-anchor="end" fill="#c23b3d">flexinfer: Algorithm 1</text>',
        f'<text x="{_LEFT + 400}" y="{_TOP + _HEIGHT - 10}" text-anchor="middle" fill="#3d7a36">balanced</text>',
        (
            f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 48}" text-anchor="middle">'
            "room for locked chunks, in % of the weights</text>"
        ),
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _points(model: Inventory, plan: str) -> str:
    points = []
    for step in range(_STEPS):
        room = model.streamable_nbytes * step // _STEPS
        unused = room - int(model.sizes[LOCKS[plan](model, room)].sum())
        x = _LEFT + _WIDTH * step / _STEPS
        y = _TOP + _HEIGHT * (1 - unused / model.streamable_nbytes / _MOST)
        points.append(f"{x:.1f},{y:.1f}")
    return " ".join(points)
