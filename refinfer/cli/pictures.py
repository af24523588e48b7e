"""Pictures of a run and of a plan: for a terminal, as SVG, and for Perfetto.

Draws what it is given; the same value gives the same bytes. Leaves to others: what happened (`trace`), what is locked
(`planning`), where a picture goes.
Read more: tutorials 10, 11; clauses TRACE-2 to TRACE-4, PLAN-12.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final
from xml.sax.saxutils import escape

from refinfer.inventory import Inventory
from refinfer.planning.plan import Plan
from refinfer.planning.report import layer_rows
from refinfer.trace import KINDS, Span, Trace

__all__ = ["CHROME_BEGINS", "SVG_BEGINS", "plan_svg", "to_chrome", "to_rows", "to_svg"]

CHROME_BEGINS: Final = '{"displayTimeUnit": "ms", "traceEvents": ['
SVG_BEGINS: Final = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 '
"""How the texts begin that `to_chrome`, as JSON, and the drawers of SVG make."""


def to_rows(trace: Trace, width: int) -> list[tuple[str, str]]:
    """Return each lane with a line of `width` characters: the kind that took most of a column, or a space for none.

    Examples:
        >>> spans = (Span("disk", "read", "q", 0, 2), Span("cpu", "wait", "", 0, 2), Span("cpu", "compute", "q", 2, 4))
        >>> to_rows(Trace(spans), 8)
        [('disk', 'rrrr    '), ('cpu', 'wwwwcccc')]
    """
    start = trace.start
    step = (trace.end - start) / width if trace.spans and width > 0 else 0.0
    rows = []
    for lane in trace.lanes:
        shares: list[dict[str, float]] = [{} for _ in range(width)]
        for span in trace.spans:
            if span.lane == lane and step > 0:
                for column, seconds in _columns(span, start, step, width):
                    shares[column][span.kind] = shares[column].get(span.kind, 0.0) + seconds
        rows.append((lane, "".join(_letter(share, step) for share in shares)))
    return rows


def _columns(span: Span, origin: float, step: float, width: int) -> Iterator[tuple[int, float]]:
    first = int((span.start - origin) / step)
    for column in range(first, min(width, math.ceil((span.end - origin) / step))):
        begin = origin + column * step
        seconds = min(span.end, begin + step) - max(span.start, begin)
        if seconds > 0:
            yield column, seconds


def _letter(share: dict[str, float], step: float) -> str:
    kind = max(share, key=lambda kind: share[kind], default=None)
    return kind[0] if kind is not None and sum(share.values()) >= step / 2 else " "


def to_chrome(trace: Trace) -> dict[str, Any]:
    """Return the JSON object that `chrome://tracing` and ui.perfetto.dev read: complete events, in microseconds."""
    origin = trace.start
    number = {lane: i for i, lane in enumerate(trace.lanes, start=1)}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": i, "args": {"name": lane}} for lane, i in number.items()
    ]
    events = [
        {
            "ph": "X",
            "name": span.name or span.kind,
            "cat": span.kind,
            "pid": 1,
            "tid": number[span.lane],
            "ts": round((span.start - origin) * 1e6, 3),
            "dur": round((span.end - span.start) * 1e6, 3),
        }
        for span in trace.spans
    ]
    return {"displayTimeUnit": "ms", "traceEvents": names + events}


_WIDTH: Final = 960
_LEFT: Final = 90
_LANE: Final = 34
_TOP: Final = 56
_EDGED: Final = 4
_LETTER: Final = 0.7
"""The average width of a letter in a wide, bold font, as a share of the font's size."""


def to_svg(trace: Trace, title: str) -> str:
    """Return a picture of a trace: a band for each lane, a colour for each kind, a ruler in milliseconds.

    The same trace gives the same bytes. Spans of one kind and name that touch are drawn as one.
    """
    height = _TOP + _LANE * len(trace.lanes) + 40
    start, lasted = trace.start, trace.end - trace.start
    scale = (_WIDTH - _LEFT - 20) / max(lasted, 1e-12)

    def x(seconds: float) -> float:
        return _LEFT + (seconds - start) * scale

    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20" font-size="14" font-weight="bold">{_text(_shortened(title))}</text>',
    ]
    shown = [kind for kind in KINDS if any(span.kind == kind for span in trace.spans)]
    for i, kind in enumerate(shown):
        left = _LEFT + 90 * i
        lines.append(f'<rect x="{left}" y="30" width="12" height="12" fill="{KINDS[kind]}"/>')
        lines.append(f'<text x="{left + 17}" y="40">{kind}</text>')
    for row, lane in enumerate(trace.lanes):
        y = _TOP + row * _LANE
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 18}" text-anchor="end">{_text(lane)}</text>')
        for span in _merged([s for s in trace.spans if s.lane == lane]):
            width = max((span.end - span.start) * scale, 0.2)
            about = _text(f"{span.name} {span.kind}".strip())
            edge = ' stroke="#ffffff" stroke-width="0.5"' if width > _EDGED else ""
            lines.append(
                f'<rect x="{x(span.start):.2f}" y="{y}" width="{width:.2f}" height="26" fill="{KINDS[span.kind]}"'
                f"{edge}><title>{about}: {(span.end - span.start) * 1e3:.3f} ms</title></rect>"
            )
            if span.name and width > 7 * len(span.name):
                middle = x((span.start + span.end) / 2)
                lines.append(
                    f'<text x="{middle:.2f}" y="{y + 17}" text-anchor="middle" fill="#ffffff" font-size="11">'
                    f"{_text(span.name)}</text>"
                )
    bottom = _TOP + _LANE * len(trace.lanes)
    for tick in _ticks(lasted):
        at = x(start + tick)
        lines.append(f'<line x1="{at:.2f}" y1="{_TOP - 4}" x2="{at:.2f}" y2="{bottom}" stroke="#00000022"/>')
        label = f"{tick * 1e3:g} ms"
        middle = min(at, _WIDTH - 12 * _LETTER * len(label) / 2)  # at the right edge it stays inside
        lines.append(f'<text x="{middle:.2f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _shortened(title: str) -> str:
    """Replace the middle of a title by an ellipsis if a wide font would have it leave the picture."""
    most = int((_WIDTH - _LEFT) / (14 * _LETTER))
    return title if len(title) <= most else f"{title[: most // 2]}…{title[len(title) - (most - most // 2 - 1) :]}"


def _text(text: str) -> str:
    """Make a text safe inside XML: what XML cannot hold becomes a question mark."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text))


def _merged(spans: list[Span]) -> Iterator[Span]:
    """Join neighbours of one kind and name."""
    last: Span | None = None
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        if last and (last.kind, last.name) == (span.kind, span.name) and span.start - last.end <= 1e-9:
            last = Span(last.lane, last.kind, last.name, last.start, max(last.end, span.end))
            continue
        if last:
            yield last
        last = span
    if last:
        yield last


def _ticks(seconds: float) -> Iterator[float]:
    """Yield about eight round instants from 0 on."""
    if seconds <= 0:
        return
    step = 10.0 ** math.floor(math.log10(seconds / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if seconds / (step * factor) <= 9)
    for i in range(int(seconds / step + 1e-9) + 1):
        yield i * step


_CELL: Final = 14
_PLAN_LEFT: Final = 96


def plan_svg(inventory: Inventory, plan: Plan) -> str:
    """Return a picture of a plan: a column for each layer, a row for each kind, the locked part of each cell filled.

    The same plan gives the same bytes.
    """
    rows = layer_rows(inventory, plan)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    layers = max(row["layer"] for row in rows) + 1
    width, height = max(_PLAN_LEFT + _CELL * layers + 20, 420), 84 + 22 * len(kinds)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_PLAN_LEFT}" y="20" font-size="14" font-weight="bold">{escape(plan.name)}, layer by layer</text>',
        f'<rect x="{_PLAN_LEFT}" y="30" width="12" height="12" fill="#59a14f"/>',
        f'<text x="{_PLAN_LEFT + 17}" y="40">locked</text>',
        f'<rect x="{_PLAN_LEFT + 80}" y="30" width="12" height="12" fill="#4c78a8" fill-opacity="0.35"/>',
        f'<text x="{_PLAN_LEFT + 97}" y="40">streamed per token</text>',
    ]
    for i, kind in enumerate(kinds):
        lines.append(f'<text x="{_PLAN_LEFT - 8}" y="{68 + 22 * i}" text-anchor="end">{kind}</text>')
    for row in rows:
        x, y = _PLAN_LEFT + _CELL * row["layer"], 54 + 22 * kinds.index(row["kind"])
        filled = 18 * row["locked_bytes"] / row["bytes"]
        about = f"layer {row['layer']}, {row['kind']}: {row['locked_bytes']:,} of {row['bytes']:,} bytes locked"
        lines.append(
            f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="18" fill="#4c78a8" fill-opacity="0.35">'
            f"<title>{about}</title></rect>"
        )
        if filled:
            top = y + 18 - filled
            lines.append(f'<rect x="{x}" y="{top:.2f}" width="{_CELL - 2}" height="{filled:.2f}" fill="#59a14f"/>')
    bottom = 66 + 22 * len(kinds)
    lines += [
        f'<text x="{_PLAN_LEFT + _CELL * layer + 6}" y="{bottom}" text-anchor="middle">{layer}</text>'
        for layer in range(0, layers, 5 if layers <= 60 else 10)
    ]
    lines.append(f'<text x="{_PLAN_LEFT - 8}" y="{bottom}" text-anchor="end">layer</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"
