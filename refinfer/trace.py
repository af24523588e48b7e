"""What happened during a run: spans of reading, computing and waiting, on lanes (one for each thread).

Leaves to others: what is timed, and by which clock, since real and simulated runs look alike from here; pictures
(`cli.pictures`).
Read more: tutorials 10, 11; clauses TRACE-1, TRACE-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from refinfer.clock import Clock

__all__ = ["KINDS", "Recorder", "Span", "Trace"]


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
        """When the first span began; 0 if there is no span."""
        return min((span.start for span in self.spans), default=0.0)

    @property
    def end(self) -> float:
        """When the last span ended; 0 if there is no span."""
        return max((span.end for span in self.spans), default=0.0)

    def between(self, start: float, end: float) -> Trace:
        """Return what happened between two instants, cut at them."""
        inside = (span for span in self.spans if span.end > start and span.start < end)
        return Trace(
            tuple(
                s if start <= s.start and s.end <= end else replace(s, start=max(s.start, start), end=min(s.end, end))
                for s in inside
            )
        )


class Recorder:
    """Adds up how long a run waited for chunks and read them, and keeps its spans if it is traced.

    Any thread may read or note a span.
    """

    def __init__(self, clock: Clock, *, traced: bool = False) -> None:
        self.clock = clock
        self.wait_s = 0.0
        self._read_s: dict[int, float] = {}  # by thread, as the next: no two threads change the same number
        self._began: dict[int, float] = {}
        self._spans: list[Span] | None = [] if traced else None

    @property
    def trace(self) -> Trace:
        """What was noted so far; empty unless the run is traced."""
        return Trace(tuple(self._spans or ()))

    def read_s(self, now: float) -> float:
        """Return the seconds that all threads together have been reading, until `now`."""
        began = list(self._began.values())
        return sum(list(self._read_s.values())) + len(began) * now - sum(began)

    @contextmanager
    def reading(self, thread: int, name: str) -> Iterator[None]:
        """Count the time of a block as reading, and keep it as a span."""
        started = self._began[thread] = self.clock.now()
        try:
            yield
            self.note(f"disk {thread + 1}", "read", name, started)
        finally:
            del self._began[thread]
            self._read_s[thread] = self._read_s.get(thread, 0.0) + self.clock.now() - started

    def note(self, lane: str, kind: str, name: str, started: float) -> None:
        """Keep a span that ends now."""
        if self._spans is not None:
            self._spans.append(Span(lane, kind, name, started, self.clock.now()))

    def waited(self, name: str, started: float) -> None:
        """Count the time since `started` as waiting."""
        self.wait_s += self.clock.now() - started
        self.note("compute", "wait", name, started)
