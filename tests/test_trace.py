"""Specifies `refinfer.trace`: spans on lanes, the three ways to look at them, and what records them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.cli.pictures import to_chrome, to_rows, to_svg
from refinfer.clock import RealClock
from refinfer.trace import KINDS, Recorder, Span, Trace

GOLDEN = Path(__file__).parent / "golden" / "trace.svg"
SVG = "{http://www.w3.org/2000/svg}"

SMALL = Trace(
    (
        Span("compute", "wait", "", 1.000, 1.004),
        Span("disk", "read", "q_proj", 1.000, 1.004),
        Span("disk", "read", "gate_proj", 1.004, 1.008),
        Span("disk", "read", "gate_proj", 1.008, 1.011),  # touches the last one, of the same name: drawn as one
        Span("compute", "compute", "q_proj", 1.004, 1.006),
        Span("compute", "wait", "", 1.006, 1.008),
        Span("compute", "compute", "gate_proj", 1.008, 1.0155),
        Span("compute", "compute", "o_proj", 1.0155, 1.015501),  # too small to see, and yet drawn
    )
)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Draw lanes that each do one thing after another, at whole milliseconds."""
    spans: list[Span] = []
    for lane in draw(st.lists(st.sampled_from(["disk 1", "disk 2", "compute", "other"]), unique=True, max_size=3)):
        now = draw(st.integers(0, 9))
        for _ in range(draw(st.integers(0, 5))):
            now += draw(st.sampled_from([0, 0, 1, 3]))
            end = now + draw(st.integers(1, 6))
            spans.append(
                Span(lane, draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(["", "a", "b"])), now, end)
            )
            now = end
    return Trace(tuple(draw(st.permutations(spans))))


def seconds_of(trace: Trace) -> Counter[tuple[str, str, str]]:
    """Return the seconds of each lane, kind and name."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for span in trace.spans:
        counted[span.lane, span.kind, span.name] += round(span.end - span.start)
    return counted


@pytest.mark.spec("TRACE-1")
def test_lanes_that_read_come_first_by_name_and_the_others_as_they_began() -> None:
    spans = (
        Span("z", "compute", "", 5, 6),
        Span("disk 10", "read", "", 0, 1),
        Span("disk 2", "read", "", 0, 1),
        Span("a", "wait", "", 2, 3),
        Span("disk 1", "read", "", 3, 4),
        Span("z", "wait", "", 6, 7),
    )
    trace = Trace(spans)
    assert trace.lanes == ("disk 1", "disk 2", "disk 10", "z", "a")
    assert (trace.start, trace.end) == (0, 7)
    assert (Trace(()).lanes, Trace(()).start, Trace(()).end) == ((), 0.0, 0.0)


@pytest.mark.spec("TRACE-1")
@given(trace=traces(), start=st.integers(-1, 30), length=st.integers(1, 30))
def test_a_part_of_a_trace_is_cut_at_its_ends_and_keeps_all_within(trace: Trace, start: int, length: int) -> None:
    end = start + length
    part = trace.between(start, end)
    assert all(start <= span.start < span.end <= end for span in part.spans)
    by_hand: Counter[tuple[str, str, str]] = Counter()
    for span in trace.spans:
        by_hand[span.lane, span.kind, span.name] += sum(span.start <= t < span.end for t in range(start, end))
    assert seconds_of(part) == +by_hand
    assert part.between(start, end) == part
    assert seconds_of(trace.between(-1, start)) + seconds_of(trace.between(start, 99)) == seconds_of(trace)


@pytest.mark.spec("TRACE-2")
@given(trace=traces(), width=st.integers(1, 40))
def test_a_column_shows_what_took_most_of_it(trace: Trace, width: int) -> None:
    rows = to_rows(trace, width)
    assert tuple(lane for lane, _ in rows) == trace.lanes
    origin, step = Fraction(trace.start), Fraction(trace.end) - Fraction(trace.start)
    for lane, row in rows:
        assert len(row) == width
        for column, letter in enumerate(row):
            begin, end = origin + step * column / width, origin + step * (column + 1) / width
            shares: Counter[str] = Counter()
            for span in trace.spans:
                if span.lane == lane:
                    overlap = min(Fraction(span.end), end) - max(Fraction(span.start), begin)
                    shares[span.kind[0]] += max(overlap, Fraction(0))  # type: ignore[assignment]
            shown, empty = sum(shares.values()), (end - begin) - sum(shares.values())
            if shown == empty:
                continue  # as well this as that, and floats decide
            if shown < empty:
                assert letter == " "
            else:
                assert float(shares[letter]) >= float(max(shares.values())) * (1 - 1e-9)


@pytest.mark.spec("TRACE-2")
def test_a_trace_without_spans_has_no_rows_and_gaps_are_spaces() -> None:
    assert to_rows(Trace(()), 10) == []
    gap = (Span("cpu", "compute", "", 0, 1), Span("cpu", "wait", "", 3, 4))
    assert to_rows(Trace(gap), 8) == [("cpu", "cc    ww")]
    assert to_rows(Trace((Span("cpu", "compute", "", 2, 2),)), 4) == [("cpu", "    ")]


@pytest.mark.spec("TRACE-2")
def test_a_chart_without_room_is_empty() -> None:
    assert to_rows(SMALL, 0) == [("disk", ""), ("compute", "")]


@pytest.mark.spec("TRACE-3")
def test_a_small_trace_gives_this_picture_byte_for_byte() -> None:
    picture = to_svg(SMALL, "two <chunks> & more")
    assert picture.encode() == GOLDEN.read_bytes()
    assert to_svg(Trace(tuple(SMALL.spans)), "two <chunks> & more") == picture


def drawn(picture: str) -> list[ET.Element]:
    """Return the rectangles that stand for spans: those with a title."""
    return [rect for rect in ET.fromstring(picture).iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]


@pytest.mark.spec("TRACE-3")
@given(trace=traces())
def test_every_span_is_in_the_picture_in_its_colour_and_inside_the_frame(trace: Trace) -> None:
    picture = to_svg(trace, "any")
    assert picture == to_svg(Trace(tuple(sorted(trace.spans, key=repr, reverse=True))), "any") or len(trace.lanes) > 1
    root = ET.fromstring(picture)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    shown: Counter[tuple[str, str]] = Counter()
    for rect in drawn(picture):
        title = rect.find(f"{SVG}title")
        assert title is not None
        assert title.text is not None
        about, _, took = title.text.rpartition(": ")
        name, _, kind = about.rpartition(" ")
        assert rect.attrib["fill"] == KINDS[kind]
        shown[kind, name] += round(float(took.removesuffix(" ms")) / 1e3)
        x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    expected: Counter[tuple[str, str]] = Counter()
    for span in trace.spans:
        expected[span.kind, span.name] += round(span.end - span.start)
    assert shown == expected


@pytest.mark.spec("TRACE-3")
def test_where_a_span_lies_in_the_picture_is_when_it_was() -> None:
    spans = (
        Span("cpu", "compute", "a", 2.0, 3.0),
        Span("cpu", "wait", "", 3.0, 3.5),
        Span("cpu", "read", "b", 5.5, 6.0),
    )
    first, second, third = (
        (float(rect.attrib["x"]), float(rect.attrib["width"])) for rect in drawn(to_svg(Trace(spans), "t"))
    )
    scale = first[1]
    assert second[0] == pytest.approx(first[0] + scale, abs=0.02)
    assert third[0] == pytest.approx(first[0] + 3.5 * scale, abs=0.02)
    assert [second[1], third[1]] == pytest.approx([scale / 2] * 2, abs=0.02)


@pytest.mark.spec("TRACE-3")
def test_only_spans_that_touch_and_are_alike_are_drawn_as_one() -> None:
    def number(*spans: tuple[str, str, float, float]) -> int:
        return len(drawn(to_svg(Trace(tuple(Span("cpu", *span) for span in spans)), "t")))

    assert number(("wait", "", 0, 1), ("wait", "", 1, 2), ("wait", "", 2, 3)) == 1
    assert number(("wait", "", 0, 1), ("wait", "", 1.00001, 2)) == 2
    assert number(("wait", "", 0, 1), ("read", "", 1, 2)) == 2
    assert number(("read", "a", 0, 1), ("read", "b", 1, 2), ("read", "a", 2, 3)) == 3


HOSTILE = ["<script>alert(1)</script>", "a & b &amp; c", 'say "no"', "it's", "]]>", "-->", "größe 🐍 مرحبا", "", " "]


@pytest.mark.spec("TRACE-3")
@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_names_lanes_and_titles_are_text_and_never_markup(text: str) -> None:
    trace = Trace((Span(text, "read", text, 0.0, 1.0), Span("compute", "wait", text, 0.0, 1.0)))
    root = ET.fromstring(to_svg(trace, text))
    assert {element.tag for element in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "rect", "text", "title", "line")
    }
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert texts.count(text) >= 2  # the title and the lane


@pytest.mark.spec("TRACE-3")
@pytest.mark.parametrize("text", ["\x00", "\x01", "\x1b[31m", "\x0b", "\ufffe"], ids=repr)
def test_control_characters_do_not_break_the_picture(text: str) -> None:
    ET.fromstring(to_svg(Trace((Span("a", "read", text, 0.0, 1.0),)), text))


@pytest.mark.spec("TRACE-3")
def test_a_picture_can_always_be_written() -> None:
    to_svg(SMALL, "model \udcff").encode()


@pytest.mark.spec("TRACE-3")
def test_a_long_title_keeps_its_beginning_and_its_end() -> None:
    title = f"a model {'in a folder ' * 30}within 1.2 GB: two tokens"
    shown = next(ET.fromstring(to_svg(SMALL, title)).iter(f"{SVG}text")).text or ""
    assert len(shown) < 100
    assert shown.startswith("a model in a folder")
    assert "…" in shown
    assert shown.endswith("within 1.2 GB: two tokens")


@pytest.mark.spec("TRACE-3")
@pytest.mark.parametrize("seconds", [0.0, 1e-13, 3e-7, 0.04, 1.0, 7e5], ids=str)
def test_a_trace_of_any_length_has_a_ruler_of_few_round_steps_from_zero(seconds: float) -> None:
    root = ET.fromstring(to_svg(Trace((Span("a", "wait", "", 9.0, 9.0 + seconds),)), "t"))
    labels = [e.text or "" for e in root.iter(f"{SVG}text") if (e.text or "").endswith(" ms")]
    took = (9.0 + seconds) - 9.0
    assert len(labels) <= 10
    assert len(labels) >= (3 if took > 0 else 0)
    assert all(float(label.removesuffix(" ms")) <= took * 1e3 * (1 + 1e-5) for label in labels)
    if labels:
        assert labels[0] == "0 ms"


@pytest.mark.spec("TRACE-4")
def test_chrome_gets_complete_events_in_microseconds_from_zero() -> None:
    got = to_chrome(SMALL)
    json.dumps(got)
    assert got["displayTimeUnit"] == "ms"
    names = {event["tid"]: event["args"]["name"] for event in got["traceEvents"] if event["ph"] == "M"}
    assert list(names.values()) == ["disk", "compute"]
    events = [event for event in got["traceEvents"] if event["ph"] == "X"]
    assert {event["ph"] for event in got["traceEvents"]} == {"M", "X"}
    assert len(events) == len(SMALL.spans)
    for event, span in zip(events, SMALL.spans, strict=True):
        assert event["name"] == (span.name or "wait")
        assert event["cat"] == span.kind
        assert names[event["tid"]] == span.lane
        assert event["ts"] == pytest.approx((span.start - 1.0) * 1e6, abs=0.001)
        assert event["dur"] == pytest.approx((span.end - span.start) * 1e6, abs=0.001)
        assert event["pid"] == 1


@pytest.mark.spec("TRACE-4")
@given(traces())
def test_chrome_gets_every_span_of_any_trace(trace: Trace) -> None:
    events = to_chrome(trace)["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    got = Counter((lanes[e["tid"]], e["cat"], e["ts"], e["dur"]) for e in events if e["ph"] == "X")
    expected = Counter((s.lane, s.kind, (s.start - trace.start) * 1e6, (s.end - s.start) * 1e6) for s in trace.spans)
    assert got == expected


class ManualClock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def record(recorder: Recorder, clock: ManualClock) -> None:
    """Read a chunk for 2 seconds, wait for it for half a second, compute with it for 1."""
    read = recorder.clock.now()
    clock.sleep(1.5)
    waited = recorder.clock.now()
    clock.sleep(0.5)
    recorder.note("disk 1", "read", "q_proj", read)
    recorder.waited("q_proj", waited)
    computed = recorder.clock.now()
    clock.sleep(1)
    recorder.note("compute", "compute", "q_proj", computed)


@pytest.mark.spec("TRACE-5")
def test_a_traced_recorder_keeps_every_span_and_adds_up_the_waits() -> None:
    clock = ManualClock()
    recorder = Recorder(clock, traced=True)
    assert (recorder.trace, recorder.wait_s) == (Trace(()), 0.0)
    record(recorder, clock)
    assert recorder.trace.spans == (
        Span("disk 1", "read", "q_proj", 100, 102),
        Span("compute", "wait", "q_proj", 101.5, 102),
        Span("compute", "compute", "q_proj", 102, 103),
    )
    assert recorder.wait_s == 0.5
    before = recorder.trace
    record(recorder, clock)
    assert recorder.wait_s == 1.0
    assert recorder.trace.spans[:3] == before.spans  # what was taken before does not change


@pytest.mark.spec("TRACE-5")
def test_a_recorder_that_is_not_traced_keeps_no_span_and_still_adds_up_the_waits() -> None:
    clock = ManualClock()
    recorder = Recorder(clock)
    record(recorder, clock)
    assert (recorder.trace, recorder.wait_s) == (Trace(()), 0.5)


def test_the_seconds_of_reading_are_those_of_all_threads_and_of_reads_that_go_on() -> None:
    clock = ManualClock()
    recorder = Recorder(clock, traced=True)
    assert recorder.read_s(clock.now()) == 0
    with recorder.reading(0, "q_proj"):
        clock.sleep(2)
        with recorder.reading(1, "k_proj"):
            clock.sleep(1)
            assert recorder.read_s(clock.now()) == 3 + 1
        clock.sleep(0.5)
        assert recorder.read_s(clock.now()) == 3.5 + 1
    clock.sleep(7)
    with recorder.reading(1, "v_proj"):
        clock.sleep(4)
    assert recorder.read_s(clock.now()) == 3.5 + 1 + 4
    assert recorder.trace.spans == (
        Span("disk 2", "read", "k_proj", 102, 103),
        Span("disk 1", "read", "q_proj", 100, 103.5),
        Span("disk 2", "read", "v_proj", 110.5, 114.5),
    )


@pytest.mark.spec("TRACE-5")
def test_spans_of_many_threads_are_all_kept() -> None:
    recorder = Recorder(RealClock(), traced=True)

    def note(lane: int) -> None:
        for _ in range(500):
            recorder.note(f"disk {lane}", "read", "", recorder.clock.now())

    threads = [threading.Thread(target=note, args=(lane,)) for lane in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(span.lane for span in recorder.trace.spans) == {f"disk {lane}": 500 for lane in range(8)}
