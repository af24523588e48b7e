"""Time, and what happened in it: clocks, spans, and pictures of them.

Knows: seconds, lanes. Does not know: what is timed; real and simulated runs look alike from here.
Spec: ERR-3, TRACE-1 to TRACE-4. Tutorial: 10, 11.

Whoever needs the time is handed a `Clock`, so that a test or a simulation can hand in its own.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol
from xml.sax.saxutils import escape

__all__ = ["KINDS", "Clock", "RealClock", "Span", "Trace", "to_chrome", "to_rows", "to_svg", "wall_time_ns"]


class Clock(Protocol):
    """Something that tells the time and can wait."""

    def now(self) -> float:
        """Return seconds since some fixed instant; never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return once `seconds` have passed on this clock."""
        ...


def wall_time_ns() -> int:
    """Return the time of day in nanoseconds, to compare with the times of files."""
    return time.time_ns()


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Return seconds since some fixed instant, to better than a microsecond."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait for `seconds`, at least."""
        time.sleep(seconds)


KINDS: Final = {"read": "#4c78a8", "compute": "#59a14f", "wait": "#e15759"}
"""The kinds of spans, with the colour each has in a picture; a terminal shows the first letter."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start` to `end`, in seconds: its kind (one of `KINDS`), its lane, what it was."""

    lane: str
    kind: str
    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened, in any order."""

    spans: tuple[Span, ...]

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes: those that read first, by name, then the others in the order of their first spans."""
        reading = sorted({span.lane for span in self.spans if span.kind == "read"}, key=lambda lane: (len(lane), lane))
        return tuple(dict.fromkeys([*reading, *(span.lane for span in self.spans)]))

    @property
    def start(self) -> float:
        """When the first span began; 0 where there is none."""
        return min((span.start for span in self.spans), default=0.0)

    @property
    def end(self) -> float:
        """When the last span ended; 0 where there is none."""
        return max((span.end for span in self.spans), default=0.0)

    def between(self, start: float, end: float) -> Trace:
        """Return what happened between two instants, cut at them."""
        inside = (span for span in self.spans if span.end > start and span.start < end)
        return Trace(tuple(Span(s.lane, s.kind, s.name, max(s.start, start), min(s.end, end)) for s in inside))


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
        f'<text x="{_LEFT}" y="20" font-size="14" font-weight="bold">{_text(title)}</text>',
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
        lines.append(f'<text x="{at:.2f}" y="{bottom + 16}" text-anchor="middle">{tick * 1e3:g} ms</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


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
