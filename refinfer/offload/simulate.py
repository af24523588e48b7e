"""A run on a virtual clock: which reads, products and waits a plan leads to, without threads, disks or weights.

Knows: units of work in the order of use, when a read may begin, when a product may. Does not know: where the seconds
come from (`cost`), which units are locked (`plan`).
Spec: SIM-1 to SIM-8. Tutorial: 11.

Each unit, a chunk or anything larger, is computed once a token, in order. A locked unit is simply computed. A streamed
one is read first: by the next free reader, in order, once its gate is open.

    disk      | read 0 | read 1 | read 2 |   (ring full)   | read 3 | ...
    compute   (waits)  | use 0  | locked  | use 1 | use 2  |

Three gates, and none:

    Ring(r)            ours: read k begins when unit k - r, of the streamed ones, has been used
    LayerSlots(w)      w slots of a layer each: a layer is read when the w-th streamed layer before it has been used
    LayerDistance(w)   the paper's window: a layer is read when the layer w before it begins
    Synchronous()      a unit is read when it is needed, by whoever computes
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    "belady_misses",
    "lru_misses",
    "readers_token_s",
    "ring_token_s",
    "simulate",
]

_ROUNDING: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Unit:
    """Work in the order of use: seconds to read (0 if locked), seconds to compute, its layer, its name."""

    read_s: float
    compute_s: float
    layer: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Ring:
    """`slots` slots of a unit each; a slot is used again when its unit has been computed."""

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
    """What a run of some tokens came to, in seconds: for the first, for each further one, and of that waiting."""

    first_token_s: float
    token_s: float
    wait_s: float
    trace: Trace

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second once the run is steady."""
        return 1 / self.token_s if self.token_s > 0 else float("inf")


def simulate(
    units: Sequence[Unit], gate: Gate, *, readers: int = 1, tokens: int | None = None, traced: bool = False
) -> Simulation:
    """Run some tokens, until the run is steady.

    A read takes as long as its unit says, whoever else reads. With several readers tokens may take turns in being
    longer and shorter: what is returned is their mean, and never less than no run can beat.

    Args:
        units: one token's work.
        gate: when a read may begin.
        readers: how many reads may be under way at once.
        tokens: how many tokens to run; the first begins with nothing read. None runs until the room to read into
            has been filled, and a few turns of the readers more.
        traced: keep the spans of the last two tokens.

    Raises:
        RequestError: no units, no readers, or a gate that lets nothing through.
    """
    size = getattr(gate, "slots", getattr(gate, "layers", 1))
    if not units or readers < 1 or size < 1 or (tokens is not None and tokens < 1):
        raise RequestError("a simulation needs units, readers, tokens, and room to read into")
    if isinstance(gate, Synchronous):
        return _synchronous(units, min(tokens or 2, 2) if traced else 0)
    streamed = sum(unit.read_s > 0 for unit in units)
    warm = 2 + (size // streamed if isinstance(gate, Ring) and streamed else size)
    turns = 1 if readers == 1 else 4 * readers
    run = _Run(readers, traced=traced)
    n = tokens if tokens is not None else warm + turns
    beyond = int(traced and tokens is None)  # what the last token reads for the next one belongs in its picture
    if isinstance(gate, Ring):
        _ring(run, units, gate.slots, n + beyond)
    else:
        _layers(run, units, gate, n + beyond)
    bound = max(sum(unit.compute_s for unit in units), sum(unit.read_s for unit in units) / readers)
    return run.result(n, turns if tokens is None else 1, bound)


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
    """The state of a run: when each reader is free, when the computation is, how long it has waited."""

    def __init__(self, readers: int, *, traced: bool) -> None:
        self.free = [(0.0, i) for i in range(readers)]
        self.now = 0.0
        self.waited = 0.0
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.spans: list[Span] | None = [] if traced else None

    def read(self, gate_opens: float, unit: Unit) -> float:
        """Read a unit with the reader that is free first; return when it is there."""
        free, reader = self.free[0]
        start = max(free, gate_opens)
        end = start + unit.read_s
        heapq.heapreplace(self.free, (end, reader))
        if self.spans is not None:
            lane = "disk" if len(self.free) == 1 else f"disk {reader + 1}"
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
        """Note when a token ended, and how long had been waited by then."""
        self.ends.append(self.now)
        self.waits.append(self.waited)

    def result(self, tokens: int, last: int, bound: float) -> Simulation:
        """Return what the `last` of so many tokens came to; tokens run beyond them are there for the picture only."""
        ends, waits = [0.0, *self.ends[:tokens]], [0.0, *self.waits[:tokens]]
        last = min(last, tokens)
        steady, waited = (ends[-1] - ends[-1 - last]) / last, (waits[-1] - waits[-1 - last]) / last
        trace = Trace(tuple(self.spans or ()))
        if len(self.ends) > 2:
            trace = trace.between(ends[max(0, tokens - 2)], ends[-1])
        # A single token is what it was; a mean over turns that did not end where it began may be a little short.
        return Simulation(ends[1], steady if last == 1 else max(steady, bound), waited, trace)


def _ring(run: _Run, units: Sequence[Unit], slots: int, tokens: int) -> None:
    used = [0.0] * slots  # when the slot's unit of last time was computed
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


# --8<-- [start:ring]
def ring_token_s(read_s: Sequence[float], compute_s: Sequence[float], slots: int, tokens: int = 3) -> float:
    """Return what `simulate` says of a steady token with a ring and one reader, in a tenth of the time.

    A search for plans asks for it a thousand times. A unit that is not read takes 0 seconds to read.
    """
    used = [0.0] * slots
    k, read_end, now, before = 0, 0.0, 0.0, 0.0
    for _ in range(tokens):
        before = now
        for reading, computing in zip(read_s, compute_s, strict=True):
            if reading:
                opens = used[k]
                if opens > read_end:
                    read_end = opens
                read_end += reading
                if read_end > now:
                    now = read_end
                now += computing
                used[k] = now
                k = k + 1 if k + 1 < slots else 0
            else:
                now += computing
    return now - before


# --8<-- [end:ring]


def readers_token_s(read_s: Sequence[float], compute_s: Sequence[float], slots: int, readers: int) -> float:
    """Return what `simulate` says of a steady token with a ring and several readers, in a tenth of the time.

    It ends as soon as three tokens took the same time; rounding aside, the result is the same.
    """
    work = [[0.0, 0.0, 0.0]]  # each read, its product, and what is multiplied before the next one
    for reading, computing in zip(read_s, compute_s, strict=True):
        if reading:
            work.append([reading, computing, 0.0])
        else:
            work[-1][2] += computing
    (_, _, before_reads), *units = work
    used, free = [0.0] * slots, [0.0] * readers
    now, k = 0.0, 0
    warm, turns = 2 + (slots // len(units) if units else 0), 4 * readers
    ends = [0.0]
    for token in range(warm + turns):
        now += before_reads
        for reading, computing, others in units:
            opens = used[k]
            if free[0] > opens:
                opens = free[0]
            end = opens + reading
            heapq.heapreplace(free, end)
            if end > now:
                now = end
            used[k] = now + computing
            now = used[k] + others
            k = k + 1 if k + 1 < slots else 0
        ends.append(now)
        if token > warm and _alike(ends[-4:]):
            return max(ends[-1] - ends[-2], sum(compute_s), sum(read_s) / readers)
    return max((ends[-1] - ends[-1 - turns]) / turns, sum(compute_s), sum(read_s) / readers)


def _alike(ends: Sequence[float]) -> bool:
    """Tell whether tokens that ended then took the same time, rounding aside."""
    taken = [end - start for start, end in pairwise(ends)]
    return max(taken) - min(taken) <= _ROUNDING * max(taken)


def _layers(run: _Run, units: Sequence[Unit], gate: LayerSlots | LayerDistance, tokens: int) -> None:
    """Run with a window of whole layers.

    A read may have to wait for a layer that is computed before the one under way, never for a later one; so reads and
    products can be followed in the order of use.
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


def lru_misses(sizes: Sequence[int], capacity: int) -> int:
    """Return the bytes that a page cache which forgets what was used longest ago reads for each token, once steady.

    On a cyclic scan that is everything until everything fits: what is needed next is what was used longest ago, so
    it is what was just forgotten.

    Examples:
        >>> lru_misses([4, 4, 4, 4], capacity=15), lru_misses([4, 4, 4, 4], capacity=16)
        (16, 0)
    """
    *_, steady = _misses(sizes, capacity, tokens=3, forget_last_used=False)
    return steady


def belady_misses(sizes: Sequence[int], capacity: int) -> int:
    """Return the bytes that the best possible page cache reads for each token, once steady: nearly what locking does.

    It forgets what is needed last (Belady 1966); on a cyclic scan that is what was used last. With k of n equal chunks
    held, `n * (n - k) / (n - 1)` are missed, where locking k misses n - k: what it keeps moves round.

    Examples:
        >>> belady_misses([4, 4, 4, 4], capacity=8)
        11
    """
    turn = max(1, len(sizes) - 1)
    history = list(_misses(sizes, capacity, tokens=len(sizes) + turn, forget_last_used=True))
    return round(sum(history[-turn:]) / turn)


# --8<-- [start:misses]
def _misses(sizes: Sequence[int], capacity: int, *, tokens: int, forget_last_used: bool) -> Iterator[int]:
    """Yield the bytes that a page cache misses in each token of a cyclic scan."""
    held: OrderedDict[int, int] = OrderedDict()
    in_use = 0
    for _ in range(tokens):
        missed = 0
        for number, size in enumerate(sizes):
            if number in held:
                held.move_to_end(number)
                continue
            missed += size
            if size > capacity:
                continue
            while in_use + size > capacity:
                in_use -= held.popitem(last=forget_last_used)[1]
            held[number] = size
            in_use += size
        yield missed


# --8<-- [end:misses]
