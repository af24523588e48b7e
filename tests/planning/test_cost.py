"""Specifies `refinfer.planning.cost`: what reading and multiplying are assumed to cost, and the bounds that follow."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.errors import RequestError
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.planning.account import Fixed, fixed_of
from refinfer.planning.cost import (
    DEVICES,
    HERE,
    PREFETCH_THREADS,
    Calibration,
    Costs,
    Device,
    Processor,
    calibration_of,
    costs_of,
    ideal_token_s,
    units_of,
    window_tax,
)
from refinfer.planning.optimal import token_s
from refinfer.planning.plan import PLANS, Prefetch, make_plan, smallest_budget

FIGURES = Path(__file__).parents[2] / "docs" / "figures" / "matmul.json"

DISK = Device("disk", {1: 1e9, 2: 1.5e9, 8: 2e9}, 1e-4, "made up")
PROCESSOR = Processor("processor", {"f32": {1: 1e-9, 8: 3e-9, 64: 4e-9}}, 5e-6, "made up")


@pytest.mark.spec("COST-1")
@pytest.mark.parametrize(
    ("nbytes", "threads", "seconds"),
    [
        (0, 1, 1e-4),
        (1_000_000, 1, 1e-4 + 1e-3),
        (1_000_000, 2, 1e-4 + 2e-3 / 1.5),
        (1_000_000, 3, 1e-4 + 3e-3 / 1.5),  # as known for two
        (1_000_000, 8, 1e-4 + 8e-3 / 2),
        (1_000_000, 16, 1e-4 + 16e-3 / 2),
    ],
)
def test_a_read_takes_its_latency_and_its_share_of_the_bandwidth(nbytes: int, threads: int, seconds: float) -> None:
    assert DISK.read_s(nbytes, threads) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.spec("COST-1")
@pytest.mark.parametrize(
    ("M", "ns_a_byte"), [(1, 1), (8, 3), (64, 4), (2, 1 + 2 / 7), (36, 3.5), (120, 5), (1000, 4 + 936 / 56)]
)
def test_a_product_takes_the_bytes_of_its_chunk_at_the_rate_of_its_rows(M: int, ns_a_byte: float) -> None:
    assert PROCESSOR.product_s("f32", 1_000_000, M) == pytest.approx(5e-6 + ns_a_byte * 1e-3, rel=1e-12)


@pytest.mark.spec("COST-1")
def test_a_product_never_takes_less_than_its_call() -> None:
    falling = Processor("p", {"f32": {1: 3e-9, 8: 1e-9}}, 5e-6, "made up")
    assert falling.product_s("f32", 1000, 100) == 5e-6


@pytest.mark.spec("COST-1")
def test_a_rate_known_at_one_number_of_rows_is_a_rate() -> None:
    assert Processor("p", {"f32": {1: 1e-9}}, 0.0, "made up").product_s("f32", 1000, 1) == pytest.approx(1e-6)


@pytest.mark.spec("COST-1")
@pytest.mark.parametrize("name", list(FORMATS))
def test_each_chunk_of_a_cycle_costs_its_read_and_its_product(name: str) -> None:
    inventory = Inventory(SHAPES["stories15m"], name)
    for M, threads in ((1, 0), (1, 1), (5, 4)):
        costs = costs_of(inventory, HERE, M=M, prefetch_threads=threads)
        for chunk, read_s, compute_s in zip(inventory.cycle, costs.read_s, costs.compute_s, strict=True):
            assert read_s == HERE.device.read_s(chunk.padded_nbytes, max(1, threads))
            assert compute_s == HERE.processor.product_s(name, chunk.padded_nbytes, M)


@pytest.mark.spec("COST-1")
def test_locked_chunks_are_computed_and_not_read() -> None:
    inventory = Inventory(SHAPES["tiny"], "f32")
    costs = costs_of(inventory, HERE)
    locked = np.arange(len(inventory.cycle)) % 3 == 0
    assert costs.reads(locked).tolist() == [0.0 if n % 3 == 0 else s for n, s in enumerate(costs.read_s)]
    for n, (unit, chunk) in enumerate(zip(units_of(inventory, costs, locked), inventory.cycle, strict=True)):
        assert (unit.layer, unit.name, unit.compute_s) == (chunk.layer, chunk.kind, costs.compute_s[n])
        assert (unit.read_s == 0) == (n % 3 == 0)


@pytest.mark.spec("COST-2")
def test_every_device_and_processor_names_where_its_figures_come_from() -> None:
    assert len(DEVICES) >= 5
    for name, device in DEVICES.items():
        assert device.name == name
        assert len(device.source) > 20
        assert any(digit in device.source for digit in "0123456789")
        assert min(device.bandwidth.values()) > 1e8
        assert min(device.bandwidth) == 1
        assert 0 < device.latency_s < 1e-3
    assert "matmul.json" in HERE.processor.source
    assert 0 < HERE.processor.call_s < 1e-3
    assert (HERE.device, HERE.measured) == (DEVICES["virtual-disk"], False)
    assert PREFETCH_THREADS in HERE.device.bandwidth  # as many reads as there usually are have a figure of their own
    assert not hasattr(DEVICES, "__setitem__")


@pytest.mark.spec("COST-2")
@pytest.mark.parametrize("name", sorted(set(DEVICES) - {"virtual-disk"}))
def test_the_rate_of_a_device_is_the_one_that_its_source_states(name: str) -> None:
    stated = [float(text.replace(",", "")) for text in re.findall(r"\d[\d,.]*", DEVICES[name].source)]
    assert any(DEVICES[name].bandwidth[1] == pytest.approx(rate * 1e6) for rate in stated)


@pytest.mark.spec("COST-2", "CLI-15")
def test_another_disk_keeps_the_processor_and_no_such_disk_is_refused_with_those_there_are() -> None:
    assert calibration_of(None) is HERE
    assert calibration_of("nvme") == Calibration(DEVICES["nvme"], HERE.processor, measured=False)
    with pytest.raises(RequestError, match=r"must be one of emmc, .*virtual-disk, not 'floppy'"):
        calibration_of("floppy")


@st.composite
def models(draw: st.DrawFn) -> tuple[Inventory, Calibration]:
    config = replace(
        SHAPES["tiny"],
        vocab_size=draw(st.sampled_from([16, 1000, 9000])),
        hidden_size=draw(st.sampled_from([16, 64, 512])),
        num_hidden_layers=draw(st.integers(1, 6)),
    )
    bandwidth = draw(st.floats(1e8, 1e11))
    disk = Device("disk", {1: bandwidth, 2: 1.2 * bandwidth}, draw(st.sampled_from([0, 1e-5, 1e-3])), "made up")
    return Inventory(config, draw(st.sampled_from(list(FORMATS)))), Calibration(disk, HERE.processor)


@pytest.mark.spec("COST-3")
@settings(max_examples=80)
@given(model=models(), share=st.floats(0, 1.1), threads=st.integers(0, 1))
def test_no_plan_is_faster_than_its_bound(model: tuple[Inventory, Calibration], share: float, threads: int) -> None:
    inventory, calibration = model
    nothing = Fixed(0, 0, 0)
    least, most = smallest_budget(inventory, nothing), inventory.streamable_nbytes
    costs, budget = costs_of(inventory, calibration, prefetch_threads=threads), least + int(share * (most - least))
    for name in PLANS:
        plan = make_plan(name, inventory, nothing, budget, costs, Prefetch(threads))
        assert plan.token_s >= plan.ideal_token_s * (1 - 1e-9)


@pytest.mark.spec("COST-3")
@given(
    chunks=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), st.booleans()), min_size=1, max_size=9),
    slots=st.integers(1, 30),
    threads=st.integers(0, 1),
)
def test_no_token_is_shorter_than_all_products_or_all_reads(
    chunks: list[tuple[int, int, bool]], slots: int, threads: int
) -> None:
    costs = Costs(np.array([float(r) for r, _, _ in chunks]), np.array([float(c) for _, c, _ in chunks]))
    locked = np.array([kept for _, _, kept in chunks])
    reading = sum(r for r, _, kept in chunks if not kept)
    bound = max(sum(c for _, c, _ in chunks), reading)
    assert ideal_token_s(costs, locked, threads) == bound
    assert token_s(costs, locked, slots, threads) >= bound - 1e-9


@pytest.mark.spec("COST-3")
def test_the_bound_shares_the_reads_among_the_prefetch_threads() -> None:
    costs = Costs(np.array([8.0, 4.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    nothing, all_but_one = np.zeros(3, np.bool_), np.array([False, True, True])
    assert [ideal_token_s(costs, nothing, threads) for threads in (0, 1, 2, 4, 16)] == [16, 16, 8, 4, 3]
    assert ideal_token_s(costs, all_but_one, 2) == 4
    assert ideal_token_s(costs, np.ones(3, np.bool_)) == 3


@pytest.mark.spec("COST-3")
@pytest.mark.parametrize(("slots", "threads"), [(16, 3), (16, 8)])
def test_no_token_of_several_threads_is_shorter_than_its_bound(slots: int, threads: int) -> None:
    costs, nothing = Costs(np.array([10.0]), np.array([0.0])), np.zeros(1, np.bool_)
    assert token_s(costs, nothing, slots, threads) >= ideal_token_s(costs, nothing, threads) * (1 - 1e-9)


@pytest.mark.spec("COST-3")
def test_no_plan_with_several_threads_is_faster_than_its_bound() -> None:
    inventory = Inventory(SHAPES["storyteller"], "int8")
    costs = costs_of(inventory, calibration_of("emmc"), prefetch_threads=8)
    plan = make_plan("optimal", inventory, fixed_of(inventory, 256), 4_086_557, costs, Prefetch(8))
    assert plan.token_s >= plan.ideal_token_s * (1 - 1e-9)


@pytest.mark.spec("COST-4")
@given(layers=st.integers(2, 90), window=st.integers(0, 8), layer_nbytes=st.integers(1, 10**6), data=st.data())
def test_a_window_of_layers_makes_more_stream_than_does_not_fit(
    layers: int, window: int, layer_nbytes: int, data: st.DataObject
) -> None:
    if window >= layers:
        return
    whole = layers * layer_nbytes
    budget = data.draw(st.integers(window * layer_nbytes, whole))
    # window slots of what streams of a layer, and what is locked of every layer, are the budget:
    #     window * streamed + layers * (layer_nbytes - streamed) = budget
    streamed = (whole - budget) / (layers - window)
    assert layers * streamed == pytest.approx((whole - budget) * window_tax(layers, window), rel=1e-12)


@pytest.mark.spec("COST-4")
def test_windows_of_the_reference_cost_what_it_gives() -> None:
    assert [round(window_tax(24, w), 3) for w in (0, 1, 3)] == [1, 1.043, 1.143]
    for layers, window in ((3, 3), (3, 4), (3, -1), (0, 0)):
        with pytest.raises(RequestError, match=f"a window must be shorter than the {layers} layers, not {window}"):
            window_tax(layers, window)


@pytest.mark.spec("COST-5")
@pytest.mark.parametrize("name", list(FORMATS))
def test_the_default_rates_are_those_of_the_committed_figures(name: str) -> None:
    figures = json.loads(FIGURES.read_text())["rows"]
    layout = layout_of(name, 4096, 4096)
    nbytes = sum(chunk.nbytes for chunk in layout.chunks)
    rates = HERE.processor.seconds_per_byte[name]
    assert set(rates) == {1, 8, 64, 256}
    assert {M: rate * 1e9 for M, rate in rates.items()} == pytest.approx(FORMATS[name].nanoseconds_per_byte)
    for M, seconds_a_byte in rates.items():
        (row,) = (r for r in figures if (r["format"], r["m"], r["n"], r["k"]) == (name, M, 4096, 4096))
        by_bytes = 1 / row["gb_per_s"]  # nanoseconds, of a figure with two decimals
        by_work = 2 * M * 4096 * 4096 / row["gflop_per_s"] / nbytes
        assert seconds_a_byte * 1e9 == pytest.approx(by_work, rel=1e-3, abs=0.0006)
        assert 1 / (row["gb_per_s"] + 0.006) - 0.001 <= seconds_a_byte * 1e9 <= 1 / (row["gb_per_s"] - 0.006) + 0.001
        assert by_bytes == pytest.approx(by_work, rel=0.05)


@pytest.mark.spec("COST-5")
def test_the_default_rates_cannot_be_changed() -> None:
    assert isinstance(HERE.processor.seconds_per_byte, MappingProxyType)
    assert all(isinstance(points, MappingProxyType) for points in HERE.processor.seconds_per_byte.values())
