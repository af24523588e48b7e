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
from itertools import cycle
from math import inf
from typing import Final, TypeAlias

import numpy as np

from refinfer.arrays import Float64Array
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
    "ring_bounds",
    "ring_token_s",
    "simulate",
]

Seconds: TypeAlias = Sequence[float] | Float64Array

_ROUNDING: Final = 1e-10  # two times are equal if they differ by less than this share of a token
_ROUNDS: Final = 100  # rounds of the ring in a part of a run; a search looks at the run after each part


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
    n = tokens if tokens is not None else warm + turns
    run = _Run(prefetch_threads, first_traced=max(0, n - 2) if traced else None)
    beyond = int(traced and tokens is None)  # the last token also reads for the next one, which shows in its picture
    if isinstance(gate, Ring):
        _ring(run, units, gate.slots, n + beyond)
    else:
        _layers(run, units, gate, n + beyond)
    slots = gate.slots if isinstance(gate, Ring) else inf
    reading, computing = sum(unit.read_s for unit in units), sum(unit.compute_s for unit in units)
    taken = sum(unit.read_s + unit.compute_s for unit in units if unit.read_s)
    bound = _bound(reading, computing, taken, slots, prefetch_threads)
    return run.result(n, turns if tokens is None else 1, bound)


def _bound(reading: float, computing: float, taken: float, slots: float, prefetch_threads: int) -> float:
    """Return the least time for these seconds of reading, by all threads, of computing, and of taking slots."""
    return max(computing, reading / prefetch_threads, taken / slots)


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

    def __init__(self, prefetch_threads: int, *, first_traced: int | None) -> None:
        self.free = [(0.0, i) for i in range(prefetch_threads)]
        self.now = 0.0
        self.waited = 0.0
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.first_traced = first_traced
        self.spans: list[Span] | None = [] if first_traced == 0 else None

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
        if len(self.ends) == self.first_traced:
            self.spans = []  # all that belongs to earlier tokens is over by now

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
    """Run some tokens with a ring.

    The units that stream, those with seconds to read, are numbered over all tokens: 0, 1, 2 and so on. Number k goes
    into slot `k % slots`. Its read may begin as soon as number k - slots, which was in that slot, has been computed;
    the first reads may begin at 0. A locked unit takes no slot, and is ready at any time.

    `run.read(gate_opens, unit)` reads a unit and returns when it is ready. `run.use(ready, unit)` waits until then and
    computes it; afterwards `run.now` is the time at which it has been computed. `run.end_token()` ends a token.
    """
    # lab 12b: read and compute every unit of every token through a ring
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
    # end lab


def ring_token_s(read_s: Seconds, compute_s: Seconds, slots: int, prefetch_threads: int = 1) -> float:
    """Return the `token_s` of `simulate` with a ring, in a fraction of the time; it differs by rounding only.

    A unit that is not read takes 0 seconds to read.
    """
    *_, token_s = ring_bounds(read_s, compute_s, slots, prefetch_threads)
    return token_s


def ring_bounds(read_s: Seconds, compute_s: Seconds, slots: int, prefetch_threads: int = 1) -> Iterator[float]:
    """Yield lower bounds of `ring_token_s` while the run goes on, and at last `ring_token_s` itself.

    There is a bound after each part of the first token: the time until then, and the least that the rest takes. The
    time to fill the ring is taken off, as later tokens may find it full. A run that comes back to the state that it had
    at the same place of an earlier token repeats itself, so the units after that need not be run.
    """
    reads, products = np.asarray(read_s, np.float64), np.asarray(compute_s, np.float64)
    step = _ROUNDS * slots
    left = _left(reads, products, step)
    parts = len(left) - 1
    bound, filling = _bound(*left[0], slots, prefetch_threads), slots * float(reads.max())
    streamed = int(np.count_nonzero(reads))
    warm, turns = 2 + (slots // streamed if streamed else 0), 1 if prefetch_threads == 1 else 4 * prefetch_threads
    ends, states = [0.0], list[list[float]]()
    run = _ring_parts(reads, products, slots, prefetch_threads, step)
    while len(ends) <= (warm + turns) * parts:
        end, state = next(run)
        ends.append(end)
        states.append(state)
        if len(states) <= parts:
            reading, computing, taken = left[len(states)]
            reading, taken = reading + sum(state[:prefetch_threads]), taken + sum(state[prefetch_threads:])
            yield max(bound, end + _bound(reading, computing, taken, slots, prefetch_threads) - filling)
            continue
        token_s = end - ends[-1 - parts]
        if period := parts * _period(states[(len(states) - 1) % parts :: parts], _ROUNDING * token_s):
            seconds = end - ends[-1 - period]
            while len(ends) <= (warm + turns) * parts:
                ends.append(ends[-period] + seconds)
    yield max((ends[-1] - ends[warm * parts]) / turns, bound)


def _left(reads: Float64Array, products: Float64Array, step: int) -> list[tuple[float, float, float]]:
    """Return for how long threads read, products are computed and slots are taken: in all, and after each part."""
    seconds = np.array([reads, products, np.where(reads > 0, reads + products, 0.0)])
    sums = np.add.reduceat(seconds, np.arange(0, len(reads), step), axis=1)
    return [*zip(*np.cumsum(sums[:, ::-1], axis=1)[:, ::-1].tolist(), strict=True), (0.0, 0.0, 0.0)]


# --8<-- [start:ring]
def _ring_parts(
    read_s: Float64Array, compute_s: Float64Array, slots: int, prefetch_threads: int, step: int
) -> Iterator[tuple[float, list[float]]]:
    """Yield the end of each part of a token, `step` units, and the state after it.

    The state is when each thread and slot is free, counted from that end.
    """
    free, used = [0.0] * prefetch_threads, [0.0] * slots
    k, now = 0, 0.0
    for start in cycle(range(0, len(read_s), step)):
        part = slice(start, start + step)
        for reading, computing in zip(read_s[part].tolist(), compute_s[part].tolist(), strict=True):
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
    """Return how many states ago a run was in its present state, or 0 if it never was."""
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
