"""Specifies `refinfer.planning.simulate`: timelines drawn by hand, closed formulas, and another simulator."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.errors import RequestError
from refinfer.planning import simulate as simulate_module
from refinfer.planning.simulate import (
    Gate,
    LayerDistance,
    LayerSlots,
    Ring,
    Simulation,
    Synchronous,
    Unit,
    ring_bounds,
    ring_token_s,
    simulate,
)
from refinfer.trace import Span
from words import require_equal, require_items


def one_larger(gate: Gate) -> Gate:
    match gate:
        case Ring(slots):
            return Ring(slots + 1)
        case LayerSlots(layers):
            return LayerSlots(layers + 1)
        case LayerDistance(layers):
            return LayerDistance(layers + 1)
    raise AssertionError(gate)


units_of_work = st.lists(
    st.builds(
        Unit,
        read_s=st.integers(0, 20) | st.just(0),
        compute_s=st.integers(0, 20),
        layer=st.integers(0, 1),
        name=st.sampled_from(["a", "b"]),
    ),
    min_size=1,
    max_size=8,
)
gates = (
    st.builds(Ring, st.integers(1, 12))
    | st.builds(LayerSlots, st.integers(1, 4))
    | st.builds(LayerDistance, st.integers(1, 4))
)


class Events(NamedTuple):
    """When each token ends, and when each product and each read begins and ends, over all tokens."""

    token_ends: list[float]
    uses: list[tuple[float, float]]
    reads: list[tuple[float, float]]


def events_by_hand(units: Sequence[Unit], gate: Gate, threads: int, tokens: int) -> Events:
    """Return the earliest ends that every rule allows: rules are applied in any order until nothing changes."""
    n = len(units)
    total = n * tokens
    streamed = [i for i in range(total) if units[i % n].read_s]
    turn_of = {i: k for k, i in enumerate(streamed)}
    layers: list[list[int]] = []  # runs of units of one layer; each token begins one
    for i in range(total):
        if i % n == 0 or units[i % n].layer != units[(i - 1) % n].layer:
            layers.append([])
        layers[-1].append(i)
    layer_of = {i: number for number, layer in enumerate(layers) for i in layer}
    streaming = [number for number, layer in enumerate(layers) if any(i in turn_of for i in layer)]
    use_begin, use_end = [0.0] * total, [0.0] * total
    read_begin, read_end = [0.0] * len(streamed), [0.0] * len(streamed)

    def opens(k: int) -> float:
        layer = layer_of[streamed[k]]
        match gate:
            case Ring(slots):
                return use_end[streamed[k - slots]] if k >= slots else 0.0
            case LayerSlots(w):
                at = streaming.index(layer)
                return use_end[layers[streaming[at - w]][-1]] if at >= w else 0.0
            case LayerDistance(w):
                return use_begin[layers[layer - w][0]] if layer >= w else 0.0
        raise AssertionError(gate)

    changed = True
    while changed:
        before = [*use_begin, *use_end, *read_begin, *read_end]
        for i in reversed(range(total)):
            ready = read_end[turn_of[i]] if i in turn_of else 0.0
            use_begin[i] = max(ready, use_end[i - 1] if i else 0.0)
            use_end[i] = use_begin[i] + units[i % n].compute_s
        for k, i in enumerate(streamed):
            # A thread is free as soon as fewer than `threads` of the reads before this one are under way.
            under_way = sorted(read_end[:k], reverse=True)
            free = under_way[threads - 1] if k >= threads else 0.0
            read_begin[k] = max(free, opens(k))
            read_end[k] = read_begin[k] + units[i % n].read_s
        changed = before != [*use_begin, *use_end, *read_begin, *read_end]
    ends = [use_end[(t + 1) * n - 1] for t in range(tokens)]
    uses, reads = zip(use_begin, use_end, strict=True), zip(read_begin, read_end, strict=True)
    return Events(ends, list(uses), list(reads))


# Rings of units that are nothing but their seconds: to read, and to compute.


def require_ends(seconds: Sequence[tuple[int, int]], slots: int, expected: Sequence[float], threads: int = 1) -> None:
    """Require that tokens of these units end when they should."""
    units = [Unit(read_s, compute_s) for read_s, compute_s in seconds]
    listed = ", ".join(f"{read_s}+{compute_s}" if read_s else f"locked+{compute_s}" for read_s, compute_s in seconds)
    asked = (
        f"ring of {slots}, {threads} thread{'s' if threads > 1 else ''}, units (s to read + s to compute) {listed}: "
    )
    names = ("token 0 (the first)", "token 1 (the second)", "token 2 (the third)")
    ends = [0.0, *expected]
    for tokens in range(1, len(ends)):
        run = simulate(units, Ring(slots), prefetch_threads=threads, tokens=tokens)
        if tokens == 1:
            require_equal(run.first_token_s, ends[1], f"{asked}the end of {names[0]}, in s,")
        end = ends[tokens - 1] + run.token_s
        require_equal(end, ends[tokens], f"{asked}the end of {names[tokens - 1]}, in s,")


@pytest.mark.spec("SIM-1")
def test_a_locked_unit_is_computed_at_once_and_takes_no_slot() -> None:
    require_ends([(0, 3), (0, 4)], 1, [7, 14])
    # read 0-2, used 2-3; locked 3-4; the slot is free from 3 on: read 3-5, used 5-6. Then read 6-8, used 8-9, ...
    require_ends([(2, 1), (0, 1), (2, 1)], 1, [6, 12])


@pytest.mark.spec("SIM-1")
def test_a_read_begins_when_the_unit_that_was_in_its_slot_has_been_computed() -> None:
    # One slot: reads and products take turns. Two: b is read 2-4, while a is used 2-5; b is used 5-8.
    require_ends([(2, 3), (2, 3)], 1, [10])
    require_ends([(2, 3), (2, 3)], 2, [8])
    # Of three units the third is read into the first one's slot, from 5 on: 5-7; the second is used 5-8.
    require_ends([(2, 3), (2, 3), (2, 3)], 2, [11])
    # With another product it shows: a is used 2-8, b 8-9, c is read 8-10.
    require_ends([(2, 6), (2, 1), (2, 3)], 2, [13])


@pytest.mark.spec("SIM-1")
def test_a_ring_goes_on_into_the_next_token() -> None:
    # Token 0: a is read 0-1, used 1-9; b is read 1-2, used 9-17. Token 1: a is read 9-10, before token 0 ends.
    require_ends([(1, 8), (1, 8)], 2, [17, 33])
    # Three units and two slots: number 3, the first of token 1, is in slot 1, which b has left at 9.
    # a is read 0-4, used 4-5; b 4-8, 8-9; c 8-12, 12-13. Token 1: a 12-16, 16-17; b 16-20, 20-21; c 20-24, 24-25.
    require_ends([(4, 1), (4, 1), (4, 1)], 2, [13, 25])
    # a is read 0-4, used 4-5; b is read 4-5, used 5-15; c is read 5-6, used 15-16. Token 1: a waits for b, read 15-19.
    require_ends([(4, 1), (1, 10), (1, 1)], 2, [16, 31])


@pytest.mark.spec("SIM-1")
@settings(max_examples=200)
@given(
    seconds=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    slots=st.integers(1, 5),
    threads=st.integers(1, 3),
)
def test_a_ring_ends_every_token_when_the_rules_allow_it_at_the_earliest(
    seconds: list[tuple[int, int]], slots: int, threads: int
) -> None:
    units = [Unit(read_s, compute_s) for read_s, compute_s in seconds]
    require_ends(seconds, slots, events_by_hand(units, Ring(slots), threads, 3).token_ends, threads)


@pytest.mark.spec("SIM-1")
@settings(max_examples=200)
@given(units=units_of_work, gate=gates, threads=st.integers(1, 3), tokens=st.integers(1, 4))
def test_a_simulation_gives_what_the_rules_allow_at_the_earliest(
    units: list[Unit], gate: Gate, threads: int, tokens: int
) -> None:
    run = simulate(units, gate, prefetch_threads=threads, tokens=tokens)
    ends = [0.0, *events_by_hand(units, gate, threads, tokens).token_ends]
    assert run.first_token_s == ends[1]
    assert run.token_s == ends[-1] - ends[-2]
    assert run.wait_s == run.token_s - sum(unit.compute_s for unit in units)
    assert run.trace.spans == ()


@pytest.mark.spec("SIM-1")
@settings(max_examples=100)
@given(units=units_of_work, gate=gates, threads=st.integers(1, 3))
def test_the_spans_of_two_tokens_are_the_events_of_those_tokens(units: list[Unit], gate: Gate, threads: int) -> None:
    run = simulate(units, gate, prefetch_threads=threads, tokens=2, traced=True)
    events = events_by_hand(units, gate, threads, 2)
    computed = [(s.start, s.end) for s in run.trace.spans if s.kind == "compute"]
    read = sorted((s.start, s.end) for s in run.trace.spans if s.kind == "read")
    assert computed == events.uses
    assert read == sorted(events.reads)


def timeline(run: Simulation) -> list[tuple[str, str, str, float, float]]:
    return [(s.lane, s.kind, s.name, s.start, s.end) for s in run.trace.spans]


def in_words(spans: Sequence[tuple[str, str, str, float, float]]) -> list[str]:
    return [f"{lane}: {kind} {name or 'nothing'} from {start:g} to {end:g} s" for lane, kind, name, start, end in spans]


TWO = [Unit(2, 1, 0, "a"), Unit(2, 3, 1, "b")]


@pytest.mark.spec("SIM-1")
def test_a_ring_of_two_is_as_drawn_by_hand() -> None:
    """Two tokens, a read in 2 s and used in 1, b read in 2 s and used in 3.

    disk     | a 0-2 | b 2-4 | a 4-6 (a used at 3) |         | b 7-9 (b used at 7) |
    compute  | wait  | a 2-3 | w 3-4 | b 4-7 | a 7-8 | w 8-9 | b 9-12
    """
    run = simulate(TWO, Ring(2), tokens=2, traced=True)
    expected = [
        ("compute", "wait", "", 0, 2),
        ("compute", "compute", "a", 2, 3),
        ("compute", "wait", "", 3, 4),
        ("compute", "compute", "b", 4, 7),
        ("compute", "compute", "a", 7, 8),
        ("compute", "wait", "", 8, 9),
        ("compute", "compute", "b", 9, 12),
        ("disk", "read", "a", 0, 2),
        ("disk", "read", "b", 2, 4),
        ("disk", "read", "a", 4, 6),
        ("disk", "read", "b", 7, 9),
    ]
    require_items(in_words(sorted(timeline(run), key=lambda span: (span[0], span[3]))), in_words(expected), "span")
    require_equal(run.first_token_s, 7, "the seconds of the first token")
    require_equal(run.token_s, 5, "the seconds of the second token")
    require_equal(run.wait_s, 1, "the seconds of waiting in the second token")


@pytest.mark.spec("SIM-1")
def test_windows_and_synchronous_reads_are_as_drawn_by_hand() -> None:
    # One slot of a layer: nothing overlaps. Two: like the ring above, as each layer is one unit.
    assert simulate(TWO, LayerSlots(1)).token_s == 8
    assert simulate(TWO, LayerSlots(2), tokens=2).token_s == 5
    # By distance 1, b is read as a begins, at 2, and a as b begins, at 4: it has 3 s for it, b only 1 of its 2.
    by_distance = simulate(TWO, LayerDistance(1), tokens=2, traced=True)
    reads = [(s.name, s.start, s.end) for s in by_distance.trace.spans if s.kind == "read"]
    assert reads == [("a", 0, 2), ("b", 2, 4), ("a", 4, 6), ("b", 7, 9)]
    assert by_distance.token_s == 5
    run = simulate(TWO, Synchronous(), traced=True)
    assert (run.first_token_s, run.token_s, run.wait_s) == (8, 8, 4)
    assert [span[1:] for span in timeline(run) if span[0] == "compute"][:4] == [
        ("wait", "", 0, 2),
        ("compute", "a", 2, 3),
        ("wait", "", 3, 5),
        ("compute", "b", 5, 8),
    ]


@pytest.mark.spec("SIM-7")
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, None])
@pytest.mark.parametrize("gate", [Ring(2), LayerDistance(1), Synchronous()], ids=str)
def test_the_spans_of_the_last_two_tokens_are_kept(gate: Gate, tokens: int | None) -> None:
    spans = simulate(TWO, gate, tokens=tokens, traced=True).trace.spans
    assert sum(span.kind == "compute" for span in spans) == len(TWO) * (1 if tokens == 1 else 2)


@pytest.mark.spec("SIM-1")
def test_two_threads_read_two_units_at_once_on_lanes_of_their_own() -> None:
    units = [Unit(4, 1, 0, "a"), Unit(4, 1, 0, "b"), Unit(0, 2, 0, "locked")]
    run = simulate(units, Ring(2), prefetch_threads=2, tokens=2, traced=True)
    expected = [
        ("disk 1", "read", "a", 0, 4),
        ("disk 1", "read", "a", 5, 9),
        ("disk 2", "read", "b", 0, 4),
        ("disk 2", "read", "b", 6, 10),
    ]
    reads = sorted(span for span in timeline(run) if span[1] == "read")
    require_items(in_words(reads), in_words(expected), "read")
    require_equal(run.first_token_s, 8, "the seconds of the first token")
    require_equal(run.token_s, 5, "the seconds of the second token")


def layers_of_one_unit(N: int, c: float, read_s: float, locked: Sequence[int] = ()) -> list[Unit]:
    return [Unit(0.0 if layer in locked else read_s, c, layer) for layer in range(N)]


TABLE = {  # the reference's example: 8 layers of 20 MB, 10 ms each, 1 MB a ms, 80 MB locked; windows of 1 to 4
    "balanced": ([Unit(10, 10, layer) for layer in range(8)], [80, 80, 80, 80], [160, 80, 80, 80]),
    "leading": (layers_of_one_unit(8, 10, 20, range(4)), [120, 110, 100, 90], [140, 100, 80, 80]),
    "alternating": (layers_of_one_unit(8, 10, 20, range(0, 8, 2)), [120, 80, 80, 80], [120, 80, 80, 80]),
}


@pytest.mark.spec("SIM-2")
@pytest.mark.parametrize("locks", TABLE)
def test_windows_of_one_to_four_layers_take_what_the_reference_gives(locks: str) -> None:
    units, distance, slots = TABLE[locks]
    assert [simulate(units, LayerDistance(w), tokens=5).token_s for w in (1, 2, 3, 4)] == distance
    assert [simulate(units, LayerSlots(w), tokens=5).token_s for w in (1, 2, 3, 4)] == slots
    assert [simulate(units, Ring(w), tokens=5).token_s for w in (1, 2, 3, 4)] == slots  # a layer is a unit
    assert simulate(units, Synchronous()).token_s == 160


@pytest.mark.spec("SIM-2")
@given(N=st.integers(2, 20), c=st.integers(1, 30), read_s=st.integers(1, 30), w=st.integers(1, 4))
def test_balanced_locks_take_the_longer_of_reading_and_computing(N: int, c: int, read_s: int, w: int) -> None:
    units = layers_of_one_unit(N, c, read_s)
    assert simulate(units, LayerDistance(w), tokens=4).token_s == N * max(c, read_s)
    assert simulate(units, LayerSlots(w), tokens=4).token_s == N * (max(c, read_s) if w > 1 else c + read_s)


@pytest.mark.spec("SIM-2")
@given(
    streamed=st.integers(4, 20),
    k=st.integers(3, 20),
    c=st.integers(1, 30),
    more=st.integers(0, 40),
    w=st.integers(1, 4),
)
def test_leading_locks_by_distance_leave_the_disk_idle_while_locked_layers_are_computed(
    streamed: int, k: int, c: int, more: int, w: int
) -> None:
    """With reads no shorter than products: `(N - k) L / b + (k - w + 1) c`, and never less than `C`."""
    read_s = c + more
    units = layers_of_one_unit(streamed + k, c, read_s, range(k))
    expected = max((streamed + k) * c, streamed * read_s + (k - w + 1) * c)
    assert simulate(units, LayerDistance(w), tokens=5).token_s == expected


@pytest.mark.spec("SIM-2")
@given(
    streamed=st.integers(5, 20),
    k=st.integers(1, 20),
    c=st.integers(1, 30),
    more=st.integers(0, 40),
    w=st.integers(2, 4),
)
def test_leading_locks_with_slots_hide_as_many_layers_as_there_are_slots(
    streamed: int, k: int, c: int, more: int, w: int
) -> None:
    """With reads no shorter than products: `max(C, (N - k) L / b + max(0, (k + 2) c - w L / b))`."""
    read_s = c + more
    units = layers_of_one_unit(streamed + k, c, read_s, range(k))
    expected = max((streamed + k) * c, streamed * read_s + max(0, (k + 2) * c - w * read_s))
    assert simulate(units, LayerSlots(w), tokens=8).token_s == expected


@pytest.mark.spec("SIM-3")
@given(units=units_of_work, threads=st.integers(1, 4))
def test_synchronous_reads_take_the_sum_and_reads_with_enough_room_the_longer(units: list[Unit], threads: int) -> None:
    reading, computing = sum(u.read_s for u in units), sum(u.compute_s for u in units)
    run = simulate(units, Synchronous(), prefetch_threads=threads)
    assert (run.first_token_s, run.token_s, run.wait_s) == (reading + computing, reading + computing, reading)
    assert simulate(units, Ring(4 * len(units)), tokens=3).token_s == max(reading, computing)


@pytest.mark.spec("SIM-3")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_token_without_reads_and_products_takes_no_time(threads: int) -> None:
    assert simulate([Unit(0, 0)], Ring(1), prefetch_threads=threads).token_s == 0
    assert ring_token_s([0], [0], 1, threads) == 0


def total_s(units: Sequence[Unit], gate: Gate, threads: int, tokens: int) -> float:
    """Return when the last token ends."""
    return simulate(units, gate, prefetch_threads=threads, tokens=tokens, traced=True).trace.end


@pytest.mark.spec("SIM-4")
@settings(max_examples=150)
@given(units=units_of_work, gate=gates, which=st.integers(0, 7), tokens=st.integers(3, 5))
def test_with_one_thread_locking_more_or_a_larger_window_never_makes_a_token_longer(
    units: list[Unit], gate: Gate, which: int, tokens: int
) -> None:
    seconds = simulate(units, gate, tokens=tokens).token_s
    larger = one_larger(gate)
    assert simulate(units, larger, tokens=tokens).token_s <= seconds
    i = which % len(units)
    more = [*units[:i], Unit(0, units[i].compute_s, units[i].layer), *units[i + 1 :]]
    assert simulate(more, gate, tokens=tokens).token_s <= seconds


@pytest.mark.spec("SIM-4")
@settings(max_examples=150)
@given(units=units_of_work, gate=gates, threads=st.integers(1, 3), which=st.integers(0, 7), tokens=st.integers(1, 3))
def test_no_token_ends_later_for_locking_more_a_larger_window_or_another_thread(
    units: list[Unit], gate: Gate, threads: int, which: int, tokens: int
) -> None:
    end = total_s(units, gate, threads, min(tokens, 2))
    larger = one_larger(gate)
    i = which % len(units)
    more = [*units[:i], Unit(0, units[i].compute_s, units[i].layer), *units[i + 1 :]]
    assert total_s(units, larger, threads, min(tokens, 2)) <= end
    assert total_s(units, gate, threads + 1, min(tokens, 2)) <= end
    assert total_s(more, gate, threads, min(tokens, 2)) <= end


LONGER = {
    "another thread": (([Unit(17, 2), Unit(17, 1)], Ring(17), 3), ([Unit(17, 2), Unit(17, 1)], Ring(17), 4)),
    "a larger ring": (([Unit(20, 2), Unit(16, 0)], Ring(3), 3), ([Unit(20, 2), Unit(16, 0)], Ring(4), 3)),
    "locking more": (([Unit(5, 1), Unit(11, 0)], Ring(11), 2), ([Unit(0, 1), Unit(11, 0)], Ring(11), 2)),
}


@pytest.mark.spec("SIM-4")
@pytest.mark.parametrize("change", LONGER)
def test_with_several_threads_nothing_that_helps_makes_a_token_longer(change: str) -> None:
    (units, gate, threads), (other, other_gate, other_threads) = LONGER[change]
    before = simulate(units, gate, prefetch_threads=threads)
    after = simulate(other, other_gate, prefetch_threads=other_threads)
    assert after.token_s <= before.token_s


@pytest.mark.spec("SIM-4")
@settings(max_examples=100)
@given(units=units_of_work, gate=gates)
def test_with_one_thread_the_third_token_is_steady(units: list[Unit], gate: Gate) -> None:
    assert simulate(units, gate).token_s == simulate(units, gate, tokens=40).token_s


@pytest.mark.spec("SIM-5")
@settings(max_examples=200)
@given(units=units_of_work, slots=st.integers(1, 12))
def test_the_shortcut_with_one_thread_gives_the_third_token_of_the_simulation(units: list[Unit], slots: int) -> None:
    reads, products = [u.read_s for u in units], [u.compute_s for u in units]
    assert ring_token_s(reads, products, slots) == simulate(units, Ring(slots)).token_s
    tenths = simulate([Unit(u.read_s / 10, u.compute_s / 10) for u in units], Ring(slots), tokens=3).token_s
    shortcut = ring_token_s([r / 10 for r in reads], [c / 10 for c in products], slots)
    assert shortcut == pytest.approx(tenths, rel=1e-9)


@pytest.mark.spec("SIM-5")
@settings(max_examples=300)
@given(units=units_of_work, slots=st.integers(1, 12), threads=st.integers(2, 5), tenths=st.booleans())
def test_the_shortcut_with_several_threads_gives_what_the_simulation_gives(
    units: list[Unit], slots: int, threads: int, tenths: bool
) -> None:
    if tenths:
        units = [Unit(u.read_s / 10, u.compute_s / 10) for u in units]
    whole = simulate(units, Ring(slots), prefetch_threads=threads).token_s
    shortcut = ring_token_s([u.read_s for u in units], [u.compute_s for u in units], slots, threads)
    assert shortcut == pytest.approx(whole, rel=1e-9)


@pytest.mark.spec("SIM-5")
@settings(max_examples=300)
@given(units=units_of_work, slots=st.integers(1, 12), threads=st.integers(1, 5), rounds=st.integers(1, 4))
def test_a_run_in_parts_gives_bounds_that_its_tokens_keep_to_and_then_what_the_simulation_gives(
    units: list[Unit], slots: int, threads: int, rounds: int
) -> None:
    units = units * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate_module, "_ROUNDS", rounds)
        *bounds, token_s = ring_bounds([u.read_s for u in units], [u.compute_s for u in units], slots, threads)
    whole = simulate(units, Ring(slots), prefetch_threads=threads)
    assert token_s == pytest.approx(whole.token_s, rel=1e-9)
    assert len(bounds) == -(-len(units) // (rounds * slots))
    assert all(bound <= token_s * (1 + 1e-9) for bound in bounds)


UNEVEN = [  # seconds of the reads and the products, slots, threads
    ([9], [2], 4, 4),
    ([4, 8], [2, 0], 5, 2),
    ([8, 5, 6], [1, 2, 1], 7, 4),
    ([7, 8, 3, 6], [0, 0, 1, 3], 5, 4),
]


@pytest.mark.spec("SIM-5")
@pytest.mark.parametrize(("reads", "products", "slots", "threads"), UNEVEN)
def test_the_shortcut_follows_longer_and_shorter_tokens_that_alternate(
    reads: list[int], products: list[int], slots: int, threads: int
) -> None:
    units = [Unit(read, product) for read, product in zip(reads, products, strict=True)]
    ends = events_by_hand(units, Ring(slots), threads, 30).token_ends
    assert len({after - before for before, after in itertools.pairwise(ends[-12:])}) > 1
    whole = simulate(units, Ring(slots), prefetch_threads=threads).token_s
    assert ring_token_s(reads, products, slots, threads) == pytest.approx(whole, rel=1e-9)


@pytest.mark.spec("SIM-5")
@pytest.mark.parametrize("slots", [3, 4])
def test_a_unit_that_takes_each_slot_for_eleven_seconds_gives_a_token_in_their_share_of_that(slots: int) -> None:
    assert ring_token_s([9], [2], slots, 4) == simulate([Unit(9, 2)], Ring(slots), prefetch_threads=4).token_s
    assert ring_token_s([9], [2], slots, 4) == 11 / slots


@pytest.mark.spec("SIM-5")
@given(units=units_of_work, slots=st.integers(1, 12), threads=st.integers(1, 5))
def test_no_token_is_shorter_than_its_products_its_reads_or_the_time_it_takes_slots(
    units: list[Unit], slots: int, threads: int
) -> None:
    token_s = simulate(units, Ring(slots), prefetch_threads=threads).token_s
    streamed = [unit for unit in units if unit.read_s]
    assert token_s >= sum(unit.compute_s for unit in units)
    assert token_s >= sum(unit.read_s for unit in units) / threads
    assert token_s >= sum(unit.read_s + unit.compute_s for unit in streamed) / slots


def check_trace(run: Simulation, start: float, end: float) -> None:
    for span in run.trace.spans:
        assert start <= span.start <= span.end <= end
        assert span.kind == ("read" if span.lane.startswith("disk") else span.kind)
    for lane in run.trace.lanes:
        spans: list[Span] = sorted((s for s in run.trace.spans if s.lane == lane), key=lambda s: (s.start, s.end))
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))


@pytest.mark.spec("SIM-7")
@settings(max_examples=150)
@given(
    units=units_of_work,
    gate=gates | st.just(Synchronous()),
    threads=st.integers(1, 3),
    tokens=st.integers(1, 5),
)
def test_spans_lie_within_the_run_and_one_after_another_and_waits_add_up(
    units: list[Unit], gate: Gate, threads: int, tokens: int
) -> None:
    run = simulate(units, gate, prefetch_threads=threads, tokens=tokens, traced=True)
    plain = simulate(units, gate, prefetch_threads=threads, tokens=tokens)
    assert (run.first_token_s, run.token_s, run.wait_s) == (plain.first_token_s, plain.token_s, plain.wait_s)
    ends = [0.0]
    if isinstance(gate, Synchronous):
        ends = [token * run.token_s for token in range(min(tokens, 2) + 1)]
    else:
        ends += events_by_hand(units, gate, threads, tokens).token_ends
    first, last = ends[max(0, len(ends) - 3)], ends[-1]
    check_trace(run, first, last)
    token = run.trace.between(ends[-2], last)
    assert sum(s.end - s.start for s in token.spans if s.kind == "wait") == run.wait_s
    assert sum(s.end - s.start for s in token.spans if s.kind == "compute") == sum(u.compute_s for u in units)
    busy = sum(s.end - s.start for s in token.spans if s.lane == "compute")
    assert busy == run.token_s == last - ends[-2]


@pytest.mark.spec("SIM-7")
def test_both_tokens_of_a_steady_run_show_the_same_number_of_reads() -> None:
    units = [Unit(2, 1, 0, "a"), Unit(0, 9, 0, "locked"), Unit(2, 1, 0, "b"), Unit(0, 9, 0, "locked")]
    trace = simulate(units, Ring(2), traced=True).trace
    middle = (trace.start + trace.end) / 2
    first, second = trace.between(trace.start, middle), trace.between(middle, trace.end)
    reading = [sum(s.end - s.start for s in part.spans if s.kind == "read") for part in (first, second)]
    assert reading[0] == reading[1]


@pytest.mark.spec("SIM-8")
@pytest.mark.parametrize("gate", [Ring(1), LayerSlots(1), LayerDistance(1), Synchronous()], ids=repr)
def test_a_simulation_without_units_threads_or_tokens_is_refused(gate: Gate) -> None:
    for units, threads, tokens in (([], 1, 3), (TWO, 0, 3), (TWO, -1, 3), (TWO, 1, 0)):
        with pytest.raises(RequestError, match="needs units, prefetch threads, tokens, and room to read into"):
            simulate(units, gate, prefetch_threads=threads, tokens=tokens)


@pytest.mark.spec("SIM-8")
@pytest.mark.parametrize("gate", [Ring(0), LayerSlots(0), LayerDistance(0), Ring(-3)], ids=repr)
def test_a_simulation_without_room_is_refused(gate: Gate) -> None:
    with pytest.raises(RequestError, match="room to read into"):
        simulate(TWO, gate)
