"""The roof over tokens per second: what the disk allows and what the processor allows, by how much is locked."""

from __future__ import annotations

from typing import Final

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.planning.account import Fixed
from refinfer.planning.cost import Costs, calibration_of, costs_of
from refinfer.planning.plan import Prefetch, make_plan

_LEFT: Final = 56
_TOP: Final = 44
_WIDTH: Final = 600
_HEIGHT: Final = 280
_MOST: Final = 4.0
_DEVICES: Final = (  # name, colour, where along the curve its name stands, and how far below
    ("nvme", "#f28e2b", 0.15, 30),
    ("ufs-3.1", "#4c78a8", 0.15, 26),
    ("sata-ssd", "#e15759", 0.15, -12),
    ("emmc", "#7b6f6a", 0.6, 24),
)


def draw() -> str:
    """Draw the roof for four disks, and the best plan of the family under it."""
    model = Inventory(SHAPES["llama-1b"], "int8")
    lines = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 392" width="700" height="392" '
            'font-family="sans-serif" font-size="16">'
        ),
        '<rect width="700" height="392" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-weight="bold">Tokens per second, Llama 3.2 1B in int8</text>',
    ]
    for rate in range(int(_MOST) + 1):
        y = _y(rate)
        lines.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDTH}" y2="{y:.1f}" stroke="#e4e0de"/>')
        lines.append(f'<text x="{_LEFT - 10}" y="{y + 5:.1f}" text-anchor="end">{rate}</text>')
    lines += [
        f'<text x="{_x(tenth / 10):.1f}" y="{_TOP + _HEIGHT + 24}" text-anchor="middle">{10 * tenth} %</text>'
        for tenth in range(0, 11, 2)
    ]
    lines.append(
        f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 52}" text-anchor="middle">'
        "locked, in % of the weights</text>"
    )
    roof = 1 / sum(costs_of(model, calibration_of("nvme")).compute_s)
    lines += [
        (
            f'<line x1="{_LEFT}" y1="{_y(roof):.1f}" x2="{_LEFT + _WIDTH}" y2="{_y(roof):.1f}" stroke="#59a14f" '
            'stroke-width="2.5"/>'
        ),
        (
            f'<text x="{_LEFT + 8}" y="{_y(roof) - 10:.1f}" fill="#3d7a36">'
            "what the processor allows: all products of a token</text>"
        ),
    ]
    for device, colour, along, below in _DEVICES:
        costs = costs_of(model, calibration_of(device), prefetch_threads=1)
        lines += [*_curve(device, colour, along, below, costs), *_plans(model, colour, costs)]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share


def _y(rate: float) -> float:
    return _TOP + _HEIGHT * (1 - rate / _MOST)


def _curve(device: str, colour: str, along: float, below: int, costs: Costs) -> list[str]:
    """Draw what a disk allows, up to the ridge."""
    reading, computing = sum(costs.read_s), sum(costs.compute_s)
    ridge = 1 - computing / reading
    shares = [ridge * i / 60 for i in range(61)]
    points = " ".join(f"{_x(s):.1f},{_y(1 / (reading * (1 - s))):.1f}" for s in shares)
    at = ridge * along
    ink = "#a85400" if device == "nvme" else colour  # orange is too pale for letters
    return [
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>',
        f'<text x="{_x(at):.1f}" y="{_y(1 / (reading * (1 - at))) + below:.1f}" fill="{ink}">{device}</text>',
    ]


def _plans(model: Inventory, colour: str, costs: Costs) -> list[str]:
    """Draw `optimal` as dots, for each tenth of the weights."""
    dots = []
    ridge = 1 - sum(costs.compute_s) / sum(costs.read_s)
    for tenth in range(1, 10):
        budget = model.streamable_nbytes * tenth // 10
        plan = make_plan("optimal", model, Fixed(0, 0, 0), budget, costs, Prefetch(threads=1))
        x, y = _x(plan.account.locked / model.streamable_nbytes), _y(1 / plan.token_s)
        fill = colour if plan.account.locked / model.streamable_nbytes < ridge else "#59a14f"
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="#ffffff"/>')
    return dots
