"""Draws a ring of three slots over time: what the disk reads, what is multiplied, and what each slot holds."""

from __future__ import annotations

from refinfer.planning.simulate import Ring, Unit, simulate
from refinfer.trace import Span

_COMPUTE = (1, 1, 5, 1, 1)
_SLOTS = 3
_LEFT, _STEP, _LANE = 92, 30, 44
_READ, _READY, _USED, _WAIT = "#4c78a8", "#bab0ac", "#59a14f", "#e15759"


def draw() -> str:
    """Run five chunks twice on the virtual clock, each read as long as the next, and draw the slots of the ring."""
    units = [Unit(1.5, seconds, name=str(chunk)) for chunk, seconds in enumerate(_COMPUTE)]
    trace = simulate(units, Ring(_SLOTS), tokens=2, traced=True).trace
    end = trace.end
    reads = [span for span in trace.spans if span.kind == "read"]
    uses = [span for span in trace.spans if span.kind == "compute"]
    width, height = round(_LEFT + _STEP * end) + 16, 76 + _LANE * (2 + _SLOTS) + 44
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="17">'
        ),
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="14" y="24" font-size="19" font-weight="bold">Five chunks through three slots, for two tokens</text>',
    ]
    left = 14
    for colour, text in ((_READ, "read"), (_READY, "ready"), (_USED, "multiplied"), (_WAIT, "waited for")):
        lines.append(f'<rect x="{left}" y="38" width="14" height="14" fill="{colour}"/>')
        lines.append(f'<text x="{left + 20}" y="50">{text}</text>')
        left += 48 + 9 * len(text)
    for row, lane in enumerate(("disk", "compute", *(f"slot {i}" for i in range(_SLOTS)))):
        y = 70 + _LANE * row
        lines.append(f'<text x="{_LEFT - 12}" y="{y + 23}" text-anchor="end">{lane}</text>')
        lines.append(f'<line x1="{_LEFT}" y1="{y + 34}" x2="{width - 16}" y2="{y + 34}" stroke="#dddddd"/>')
    for span in trace.spans:
        lines += _box(span, {"read": _READ, "compute": _USED, "wait": _WAIT}[span.kind], int(span.kind != "read"))
    for k, (read, used) in enumerate(zip(reads, uses, strict=True)):
        row = 2 + k % _SLOTS
        lines += _box(read, _READ, row)
        if used.start > read.end:
            lines += _box(Span("", "", "", read.end, used.start), _READY, row)
        lines += _box(used, _USED, row)
    turn = _LEFT + _STEP * uses[len(units) - 1].end
    bottom = height - 30
    lines.append(
        f'<line x1="{turn:.1f}" y1="60" x2="{turn:.1f}" y2="{bottom}" stroke="#f28e2b" stroke-width="2" '
        'stroke-dasharray="5 4"/>'
    )
    lines.append(f'<text x="{turn:.1f}" y="{bottom + 18}" text-anchor="middle">the second token begins</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _box(span: Span, colour: str, row: int) -> list[str]:
    """Return the box of a span in a row, with its name where there is room."""
    x, width = _LEFT + _STEP * span.start, _STEP * (span.end - span.start)
    y = 70 + _LANE * row
    return [
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="32" fill="{colour}" stroke="#ffffff"/>',
        f'<text x="{x + width / 2:.1f}" y="{y + 22}" text-anchor="middle" fill="#ffffff">{span.name}</text>',
    ]
