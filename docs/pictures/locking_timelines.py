"""The same bytes locked in two places: the first half of a model, and every other chunk of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from refinfer.planning.simulate import Ring, Simulation, Unit, simulate
from refinfer.trace import Span

_CHUNKS: Final = 12
_COLOURS: Final = {"read": "#4c78a8", "compute": "#59a14f", "wait": "#e15759"}
_LEFT: Final = 84
_SECOND: Final = 18.5


def draw() -> str:
    """Draw two tokens of either."""
    panels = (
        ("Locked: the first six chunks", range(6)),
        ("Locked: every other chunk", range(0, _CHUNKS, 2)),
    )
    lines = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 372" width="700" height="372" '
            'font-family="sans-serif" font-size="15">'
        ),
        '<rect width="700" height="372" fill="#ffffff"/>',
    ]
    legend = (
        (_COLOURS["read"], "1", "read"),
        (_COLOURS["compute"], "1", "product of a chunk just read"),
        (_COLOURS["compute"], "0.45", "of a locked chunk"),
        (_COLOURS["wait"], "1", "wait"),
    )
    for (colour, opacity, what), left in zip(legend, (84, 152, 438, 624), strict=True):
        lines.append(f'<rect x="{left}" y="12" width="13" height="13" fill="{colour}" fill-opacity="{opacity}"/>')
        lines.append(f'<text x="{left + 19}" y="23">{what}</text>')
    for (title, locked), top in zip(panels, (44, 198), strict=True):
        units = [Unit(0 if n in locked else 2, 1, name=str(n)) for n in range(_CHUNKS)]
        lines += _panel(title, simulate(units, Ring(2), traced=True), locked, top)
    lines.append('<text x="84" y="360">seconds; a read takes two, a product one; the ring has two slots</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(title: str, run: Simulation, locked: Collection[int], top: int) -> list[str]:
    start = run.trace.start
    lines = [f'<text x="{_LEFT}" y="{top + 14}" font-weight="bold">{title}: {run.token_s:g} seconds a token</text>']
    for lane, y in (("disk", top + 26), ("compute", top + 66)):
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 22}" text-anchor="end">{lane}</text>')
        for span in run.trace.spans:
            if span.lane == lane and span.start < start + 2 * run.token_s:
                lines += _box(span, start, y, span.kind == "compute" and int(span.name) in locked)
    for token in range(3):
        x = _LEFT + token * run.token_s * _SECOND
        for first, last in ((22, 26), (62, 114)):  # not through the numbers of the reads
            ends = f'x1="{x:.1f}" y1="{top + first}" x2="{x:.1f}" y2="{top + last}"'
            lines.append(f'<line {ends} stroke="#333333" stroke-dasharray="4 3"/>')
        lines.append(f'<text x="{x:.1f}" y="{top + 131}" text-anchor="middle">{token * run.token_s:g}</text>')
    return lines


def _box(span: Span, start: float, y: int, pale: bool) -> list[str]:
    x, width = _LEFT + (span.start - start) * _SECOND, (span.end - span.start) * _SECOND
    opacity = ' fill-opacity="0.45"' if pale else ""
    colour = "#222222" if pale else "#ffffff"
    return [
        (
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="34" fill="{_COLOURS[span.kind]}"{opacity} '
            'stroke="#ffffff"/>'
        ),
        (
            f'<text x="{x + width / 2:.1f}" y="{y + 22}" text-anchor="middle" font-size="12" fill="{colour}">'
            f"{span.name}</text>"
        ),
    ]
