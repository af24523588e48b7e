"""A run on a virtual clock: the reads, products and waits that a plan leads to, without threads, disks or weights.

Leaves to others: where the seconds come from (`cost`), which units are locked (`plan`), page caches (`page_cache`).
Read more: tutorial 11; clauses SIM-1 to SIM-5, SIM-7, SIM-8.

Each unit, a chunk or anything larger, is computed once a token, in order. A locked unit is simply computed. A streamed
unit is read first: in order, by the next free prefetch thread, as soon as the gate allows it.

    disk      | read 0 | read 1 | read 2 |   (ring full)   | read 3 | ...
    compute   (waits)  | use 0  | locked  | use 1 | use 2  |

There are four gates:

    Ring(r)            ours: read k begins when streamed unit k - r has been used
    LayerSlots(w)      w slots of a layer each: a layer is read when the w-th streamed layer before it has been used
    LayerDistance(w)   the paper's window: a layer is read when the layer w before it begins
    Synchronous()      a unit is read when it is needed, by the thread that computes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import compress, islice
from math import inf
from typing import Final

from refinfer.errors import RequestError
from refinfer.trace import Span, Trace

__all__ = [
    "Gate",
    "LayerDistance",
    "LayerSlots",
    "Ring",
    "Simulation",
    "Synchronous",
    "Unit",
    "ring_token_s",
    "simulate",
]

_ROUNDING: Final = 1e-10  # two times are equal if they differ by less than this share of a token


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work: its seconds to read (0 if locked), its seconds to compute, its layer and its name."""

    read_s: float
    compute_s: float
    layer: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Ring:
    """`slots` slots of a unit each; a slot is reused once its unit has been computed."""

    slots: int


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """`layers` slots of a layer each; only layers that stream take one, until they have been computed."""

    layers: int


@dataclass(frozen=True, slots=True)
class LayerDistance:
    """A layer may be read once the layer `layers` before it has begun to compute."""

    layers: int


@dataclass(frozen=True, slots=True)
class Synchronous:
    """Nothing is read ahead."""


Gate = Ring | LayerSlots | LayerDistance | Synchronous


@dataclass(frozen=True, slots=True)
class Simulation:
    """The seconds of a run: of its first token, of a token once the run is steady, and of the waiting in the latter."""

    first_token_s: float
    token_s: float
    wait_s: float
    trace: Trace


def simulate(
    units: Sequence[Unit], gate: Gate, *, prefetch_threads: int = 1, tokens: int | None = None, traced: bool = False
) -> Simulation:
    """Run some tokens, until the run is steady.

    A read takes the seconds of its unit, however many other reads are under way. With several threads, longer and
    shorter tokens may alternate: the result is their mean, and never less than the bound that no run can beat.

    Args:
        units: one token's work.
        gate: when a read may begin.
        prefetch_threads: number of reads that may be under way at once.
        tokens: number of tokens to run; the first begins with nothing read. None runs until the room to read into
            has been filled, and a few more tokens for each thread.
        traced: keep the spans of the last two tokens.

    Raises:
        RequestError: there are no units, no threads or no tokens, or the gate never lets a read begin.
    """
    size = getattr(gate, "slots", getattr(gate, "layers", 1))
    if not units or prefetch_threads < 1 or size < 1 or (tokens is not None and tokens < 1):
        raise RequestError("a simulation needs units, prefetch threads, tokens, and room to read into")
    if isinstance(gate, Synchronous):
        return _synchronous(units, min(tokens or 2, 2) if traced else 0)
    streamed = sum(unit.read_s > 0 for unit in units)
    warm = 2 + (size // streamed if isinstance(gate, Ring) and streamed else size)
    turns = 1 if prefetch_threads == 1 else 4 * prefetch_threads
    run = _Run(prefetch_threads, traced=traced)
    n = tokens if tokens is not None else warm + turns
    beyond = int(traced and tokens is None)  # the last token also reads for the next one, which shows in its picture
    if isinstance(gate, Ring):
        _ring(run, units, gate.slots, n + beyond)
    else:
        _layers(run, units, gate, n + beyond)
    slots = gate.slots if isinstance(gate, Ring) else inf
    bound = _bound([unit.read_s for unit in units], [unit.compute_s for unit in units], slots, prefetch_threads)
    return run.result(n, turns if tokens is None else 1, bound)


def _bound(read_s: Sequence[float], compute_s: Sequence[float], slots: float, prefetch_threads: int) -> float:
    """Return a lower bound for the seconds of a steady token: its products, its reads, or the use of its slots."""
    reading, computing = sum(read_s), sum(compute_s)
    return max(computing, reading / prefetch_threads, (reading + sum(compress(compute_s, read_s))) / slots)


def _synchronous(units: Sequence[Unit], traced_tokens: int) -> Simulation:
    reading, computing = sum(u.read_s for u in units), sum(u.compute_s for u in units)
    spans: list[Span] = []
    now = 0.0
    for _ in range(traced_tokens):
        for unit in units:
            if unit.read_s:
                spans.append(Span("disk", "read", unit.name, now, now + unit.read_s))
                spans.append(Span("compute", "wait", "", now, now + unit.read_s))
                now += unit.read_s
            spans.append(Span("compute", "compute", unit.name, now, now + unit.compute_s))
            now += unit.compute_s
    total = reading + computing
    return Simulation(total, total, reading, Trace(tuple(spans)))


class _Run:
    """The state of a run: when each thread and the computation will be free, and how long the run has waited."""

    def __init__(self, prefetch_threads: int, *, traced: bool) -> None:
        self.free = [(0.0, i) for i in range(prefetch_threads)]
        self.now = 0.0
        self.waited = 0.0
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.spans: list[Span] | None = [] if traced else None

    def read(self, gate_opens: float, unit: Unit) -> float:
        """Read a unit with the thread that is free first; return the time at which it has been read."""
        free, thread = self.free[0]
        start = max(free, gate_opens)
        end = start + unit.read_s
        heapreplace(self.free, (end, thread))
        if self.spans is not None:
            lane = "disk" if len(self.free) == 1 else f"disk {thread + 1}"
            self.spans.append(Span(lane, "read", unit.name, start, end))
        return end

    def use(self, ready: float, unit: Unit) -> None:
        """Wait until a unit is ready, and compute it."""
        if ready > self.now:
            self.waited += ready - self.now
            if self.spans is not None:
                self.spans.append(Span("compute", "wait", "", self.now, ready))
            self.now = ready
        if self.spans is not None:
            self.spans.append(Span("compute", "compute", unit.name, self.now, self.now + unit.compute_s))
        self.now += unit.compute_s

    def end_token(self) -> None:
        """Record when a token ends, and how long the run has waited by then."""
        self.ends.append(self.now)
        self.waits.append(self.waited)

    def result(self, tokens: int, last: int, bound: float) -> Simulation:
        """Return the mean of the `last` of these tokens; any token after them was run for the picture only."""
        ends, waits = [0.0, *self.ends[:tokens]], [0.0, *self.waits[:tokens]]
        last = min(last, tokens)
        steady, waited = (ends[-1] - ends[-1 - last]) / last, (waits[-1] - waits[-1 - last]) / last
        trace = Trace(tuple(self.spans or ()))
        if len(self.ends) > 2:
            trace = trace.between(ends[max(0, tokens - 2)], ends[-1])
        # A single token is exact; a mean over tokens that did not end in the state they began in may be a little short.
        return Simulation(ends[1], steady if last == 1 else max(steady, bound), waited, trace)


def _ring(run: _Run, units: Sequence[Unit], slots: int, tokens: int) -> None:
    used = [0.0] * slots  # when the last unit in each slot was computed
    k = 0
    for _ in range(tokens):
        for unit in units:
            if not unit.read_s:
                run.use(0.0, unit)
                continue
            run.use(run.read(used[k % slots], unit), unit)
            used[k % slots] = run.now
            k += 1
        run.end_token()


def ring_token_s(read_s: Sequence[float], compute_s: Sequence[float], slots: int, prefetch_threads: int = 1) -> float:
    """Return the `token_s` of `simulate` with a ring, in a fraction of the time: a search for plans needs many of them.

    A unit that is not read takes 0 seconds to read. With one thread the third token is steady. With several threads, a
    run that comes back to an earlier state repeats itself, so the tokens after that need not be run; the result differs
    from that of `simulate` by rounding only.
    """
    run = _ring_tokens(read_s, compute_s, slots, prefetch_threads)
    if prefetch_threads == 1:
        _, (second, _), (third, _) = islice(run, 3)
        return third - second
    streamed = sum(reading > 0 for reading in read_s)
    warm, turns = 2 + (slots // streamed if streamed else 0), 4 * prefetch_threads
    ends, states = [0.0], list[list[float]]()
    while len(ends) <= warm + turns:
        end, state = next(run)
        ends.append(end)
        states.append(state)
        if period := _period(states, _ROUNDING * (end - ends[-2])):
            seconds = end - ends[-1 - period]
            while len(ends) <= warm + turns:
                ends.append(ends[-period] + seconds)
    return max((ends[-1] - ends[warm]) / turns, _bound(read_s, compute_s, slots, prefetch_threads))


# --8<-- [start:ring]
def _ring_tokens(
    read_s: Sequence[float], compute_s: Sequence[float], slots: int, prefetch_threads: int
) -> Iterator[tuple[float, list[float]]]:
    """Yield the end of each token and the state after it: when each thread and slot is free, counted from that end."""
    free, used = [0.0] * prefetch_threads, [0.0] * slots
    k, now = 0, 0.0
    while True:
        for reading, computing in zip(read_s, compute_s, strict=True):
            if reading:
                read_end = used[k]
                if free[0] > read_end:
                    read_end = free[0]
                read_end += reading
                heapreplace(free, read_end)
                if read_end > now:
                    now = read_end
                now += computing
                used[k] = now
                k = k + 1 if k + 1 < slots else 0
            else:
                now += computing
        yield now, [at - now for at in (*sorted(free), *used[k:], *used[:k])]


# --8<-- [end:ring]


def _period(states: Sequence[Sequence[float]], rounding: float) -> int:
    """Return how many tokens ago a run was in its present state, or 0 if it never was."""
    *earlier, now = states
    for period, before in enumerate(reversed(earlier), 1):
        if all(abs(a - b) <= rounding for a, b in zip(before, now, strict=True)):
            return period
    return 0


def _layers(run: _Run, units: Sequence[Unit], gate: LayerSlots | LayerDistance, tokens: int) -> None:
    """Run with a window of whole layers.

    A read only ever waits for a layer before its own, so reads and products can be followed in the order of use.
    """
    layers = _by_layer(units)
    begun: list[float] = []  # when each layer began, over all tokens
    done: list[float] = []  # when each streamed layer was computed, over all tokens
    for _ in range(tokens):
        for layer in layers:
            streams = any(unit.read_s for unit in layer)
            back = done if isinstance(gate, LayerSlots) else begun
            opens = back[-gate.layers] if len(back) >= gate.layers else 0.0
            ready = [run.read(opens, unit) if unit.read_s else 0.0 for unit in layer]
            begun.append(max(run.now, ready[0]))
            for at, unit in zip(ready, layer, strict=True):
                run.use(at, unit)
            if streams:
                done.append(run.now)
        run.end_token()


def _by_layer(units: Sequence[Unit]) -> list[list[Unit]]:
    layers: list[list[Unit]] = []
    for unit in units:
        if not layers or layers[-1][-1].layer != unit.layer:
            layers.append([])
        layers[-1].append(unit)
    return layers
