"""How often a page cache finds a chunk, over the share of the model that there is room for; counted, not measured."""

from __future__ import annotations

from typing import Final

from refinfer.planning.page_cache import belady_misses, lru_misses

_CHUNKS: Final = 64
_CHUNK: Final = 1_000_000
_RING: Final = 1
_LEFT: Final = 92
_TOP: Final = 24
_WIDTH: Final = 574
_HEIGHT: Final = 300


def draw() -> str:
    """Draw three curves: what was used longest ago goes, what is needed last goes, or a fixed set stays."""
    lines = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 410" width="700" height="410" '
            'font-family="sans-serif" font-size="17">'
        ),
        '<rect width="700" height="410" fill="#ffffff"/>',
    ]
    for percent in (0, 25, 50, 75, 100):
        x, y = _x(percent / 100), _y(percent / 100)
        lines.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDTH}" y2="{y:.1f}" stroke="#e4e0de"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 6:.1f}" text-anchor="end">{percent} %</text>')
        lines.append(f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 26}" text-anchor="middle">{percent} %</text>')
    lines += [
        _curve([_hits(_locked(k)) for k in range(_CHUNKS + 1)], "#59a14f", 9, opacity=0.45),
        _curve(
            [_hits(belady_misses([_CHUNK] * _CHUNKS, k * _CHUNK) / _CHUNK) for k in range(_CHUNKS + 1)], "#4c78a8", 2.5
        ),
        _curve([_hits(lru_misses([1] * _CHUNKS, k)) for k in range(_CHUNKS + 1)], "#e15759", 4),
        f'<text x="{_x(0.5)}" y="{_y(0.62):.1f}" text-anchor="end" fill="#3d7a36">a locked set (wide line)</text>',
        f'<text x="{_x(0.5)}" y="{_y(0.69):.1f}" text-anchor="end" fill="#3b6290">Belady\'s optimum (thin line)</text>',
        f'<text x="{_x(0.7)}" y="{_y(0.05):.1f}" text-anchor="middle" fill="#c23b3d">LRU, as under mmap</text>',
        (
            f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 60}" text-anchor="middle">'
            f"memory for weights, in % of all of them ({_CHUNKS} equal chunks)</text>"
        ),
        (
            f'<text x="22" y="{_TOP + _HEIGHT / 2}" text-anchor="middle" '
            f'transform="rotate(-90 22 {_TOP + _HEIGHT / 2})">found in memory</text>'
        ),
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _locked(room: int) -> int:
    return _CHUNKS if room <= _RING else 0 if room == _CHUNKS else _CHUNKS - (room - _RING)


def _hits(missed: float) -> float:
    return 1 - missed / _CHUNKS


def _curve(hits: list[float], colour: str, width: float, opacity: float = 1.0) -> str:
    points = " ".join(f"{_x(k / _CHUNKS):.1f},{_y(hit):.1f}" for k, hit in enumerate(hits))
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}" stroke-linejoin="round"/>'
    )


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share


def _y(share: float) -> float:
    return _TOP + _HEIGHT * (1 - share)
