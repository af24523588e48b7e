"""Specifies `refinfer.planning.report`: plans and sweeps as rows, and a plan as a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from refinfer.cli.pictures import plan_svg
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.packing.formats import FORMATS
from refinfer.planning import report
from refinfer.planning.account import Fixed
from refinfer.planning.cost import DEVICES, HERE, PREFETCH_THREADS, Calibration, calibration_of, costs_of
from refinfer.planning.page_cache import belady_misses
from refinfer.planning.plan import PLANS, Plan, Prefetch, make_plan, smallest_budget
from refinfer.planning.report import MMAP_SHARE, layer_rows, plan_row, simulate_plan, sweep_rows

SVG = "{http://www.w3.org/2000/svg}"
FIXED = Fixed(resident=8192, kv_cache=70_000, scratch=12_345)
STORYTELLER = Inventory(SHAPES["storyteller"], "int8")
LEAST = smallest_budget(STORYTELLER, FIXED)
MOST = FIXED.total + STORYTELLER.streamable_nbytes
HALF = (LEAST + MOST) // 2


def plan_of(
    name: str,
    budget: int,
    calibration: Calibration = HERE,
    threads: int = PREFETCH_THREADS,
    inventory: Inventory = STORYTELLER,
) -> Plan:
    costs = costs_of(inventory, calibration, prefetch_threads=threads)
    return make_plan(name, inventory, FIXED, budget, costs, Prefetch(threads))


every_plan = pytest.mark.parametrize("name", list(PLANS))


@pytest.mark.spec("PLAN-12")
@every_plan
@pytest.mark.parametrize("budget", [LEAST, HALF, MOST, 2 * MOST])
def test_a_row_shows_where_every_byte_of_the_budget_goes(name: str, budget: int) -> None:
    plan = plan_of(name, budget)
    row = plan_row(STORYTELLER, plan)
    json.dumps(row)
    parts = ("resident", "kv_cache", "scratch", "threads", "ring", "locked", "unused")
    assert sum(row[f"{part}_bytes"] for part in parts) == row["budget_bytes"] == budget
    assert [row[f"{part}_bytes"] for part in parts[:3]] == [8192, 70_000, 12_345]
    assert row["locked_bytes"] + row["streamed_bytes_per_token"] == STORYTELLER.streamable_nbytes
    assert row["locked_bytes"] == sum(STORYTELLER.cycle[number].padded_nbytes for number in plan.locked)
    assert (row["plan"], row["locked_chunks"], row["chunks"]) == (name, len(plan.locked), 43)
    assert row["ring_chunks"] == plan.ring_slots
    assert row["predicted_tokens_per_s"] == pytest.approx(1 / plan.token_s)
    assert row["ideal_tokens_per_s"] == pytest.approx(1 / plan.ideal_token_s)


@pytest.mark.spec("PLAN-12")
@every_plan
def test_rows_by_layer_show_what_is_locked_of_each_kind_in_each_layer(name: str) -> None:
    plan = plan_of(name, HALF)
    rows = layer_rows(STORYTELLER, plan)
    whole: dict[tuple[int, str], int] = defaultdict(int)
    locked: dict[tuple[int, str], int] = defaultdict(int)
    for number, chunk in enumerate(STORYTELLER.cycle):
        whole[chunk.layer, chunk.kind] += chunk.padded_nbytes
        locked[chunk.layer, chunk.kind] += chunk.padded_nbytes if number in plan.locked else 0
    assert [(row["layer"], row["kind"]) for row in rows] == list(whole)
    assert [(row["bytes"], row["locked_bytes"]) for row in rows] == [(whole[key], locked[key]) for key in whole]
    assert len(rows) == 6 * 7 + 1


def cells(picture: str) -> dict[str, tuple[float, float]]:
    """Return the height of each cell, by its title, and of what is filled of it: the rectangle drawn upon it."""
    found, last = {}, ""
    for rect in ET.fromstring(picture).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            last = title.text or ""
            frame = rect.attrib
            found[last] = (float(frame["height"]), 0.0)
        elif last:
            assert rect.attrib["x"] == frame["x"]
            bottom = float(frame["y"]) + float(frame["height"])
            assert float(rect.attrib["y"]) + float(rect.attrib["height"]) == pytest.approx(bottom, abs=0.02)
            found[last] = (found[last][0], float(rect.attrib["height"]))
    return found


@pytest.mark.spec("PLAN-12")
@every_plan
def test_a_picture_has_a_cell_for_each_row_filled_as_far_as_it_is_locked(name: str) -> None:
    inventory = Inventory(replace(SHAPES["smollm-135m"], num_hidden_layers=4), "f32")
    least, most = smallest_budget(inventory, FIXED), FIXED.total + inventory.streamable_nbytes
    plan = plan_of(name, (least + most) // 2, inventory=inventory)
    picture = plan_svg(inventory, plan)
    assert picture == plan_svg(inventory, plan)
    found = cells(picture)
    rows = layer_rows(inventory, plan)
    texts = [text.text for text in ET.fromstring(picture).iter(f"{SVG}text")]
    assert {row["kind"] for row in rows} <= set(texts)
    assert len(found) == len(rows)
    for row in rows:
        about = f"layer {row['layer']}, {row['kind']}: {row['locked_bytes']:,} of {row['bytes']:,} bytes locked"
        height, filled = found[about]
        assert filled == pytest.approx(height * row["locked_bytes"] / row["bytes"], abs=0.02)


@pytest.mark.spec("PLAN-12")
@pytest.mark.parametrize("shape", ["tiny", "smollm-135m", "llama2-70b"])
def test_a_picture_stays_inside_its_frame_and_names_its_plan(shape: str) -> None:
    inventory = Inventory(SHAPES[shape], "int4")
    locked = plan_of("leading", FIXED.total + inventory.streamable_nbytes, inventory=inventory)
    root = ET.fromstring(plan_svg(inventory, replace(locked, name="<b> & co")))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.attrib.get("x", 0)) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib.get("y", 0)) + float(rect.attrib["height"]) <= height
    assert "<b> & co, layer by layer" in [text.text for text in root.iter(f"{SVG}text")]


@pytest.mark.spec("PLAN-12")
@pytest.mark.parametrize(("shape", "step"), [("smollm-135m", 5), ("qwen2-0.5b", 5), ("llama2-70b", 10)])
def test_a_picture_numbers_every_fifth_layer_and_of_more_than_60_every_tenth(shape: str, step: int) -> None:
    inventory = Inventory(SHAPES[shape], "int4")
    plan = plan_of("leading", FIXED.total + inventory.streamable_nbytes, inventory=inventory)
    texts = [text.text or "" for text in ET.fromstring(plan_svg(inventory, plan)).iter(f"{SVG}text")]
    numbers = [int(text) for text in texts if text.isdecimal()]
    assert numbers == list(range(0, SHAPES[shape].num_hidden_layers + 1, step))


@pytest.mark.spec("SIM-9")
@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("device", list(DEVICES))
def test_a_sweep_reports_every_plan_synchronous_mmap_and_the_bound_for_each_budget(device: str, threads: int) -> None:
    calibration = calibration_of(device)
    budgets = [LEAST, HALF, MOST - 1, MOST, 3 * MOST]
    rows = list(sweep_rows(STORYTELLER, FIXED, budgets, calibration, threads))
    json.dumps(rows)
    assert [row["budget_bytes"] for row in rows] == budgets
    computing = sum(costs_of(STORYTELLER, calibration).compute_s)
    for row, budget in zip(rows, budgets, strict=True):
        rates = row["tokens_per_s"]
        assert set(rates) == {*PLANS, "synchronous", "mmap", "belady"}
        assert row["budget_share"] == pytest.approx(budget / STORYTELLER.streamable_nbytes)
        for name in PLANS:
            plan = plan_of(name, budget, calibration, threads)
            assert rates[name] == pytest.approx(1 / plan.token_s)
            assert row["unused_bytes"][name] == plan.account.unused
            assert rates[name] <= rates["optimal"] * (1 + 1e-8)
        best = plan_of("optimal", budget, calibration, threads)
        assert row["ideal_tokens_per_s"] == pytest.approx(1 / best.ideal_token_s)
        reading = sum(
            calibration.device.read_s(chunk.padded_nbytes, 1)
            for number, chunk in enumerate(STORYTELLER.cycle)
            if number not in best.locked
        )
        assert rates["synchronous"] == pytest.approx(1 / (computing + reading))
        everything = sum(calibration.device.read_s(chunk.padded_nbytes, 1) for chunk in STORYTELLER.cycle)
        faults = everything / MMAP_SHARE if budget < MOST else 0
        assert rates["mmap"] == pytest.approx(1 / (computing + faults), rel=1e-6)
        missed = belady_misses(STORYTELLER.sizes.tolist(), budget - FIXED.total) / STORYTELLER.streamable_nbytes
        assert rates["belady"] == pytest.approx(1 / (computing + missed * everything))
        assert rates["mmap"] <= rates["belady"] * (1 + 1e-9)


@pytest.mark.spec("SIM-9")
def test_page_faults_reach_a_share_of_the_bandwidth_that_the_paper_measured() -> None:
    assert 1 / 3 < MMAP_SHARE < 1 / 2.6


@pytest.mark.spec("SIM-9")
def test_a_sweep_leaves_out_budgets_that_are_too_small_and_a_belady_of_many_chunks() -> None:
    rows = list(sweep_rows(STORYTELLER, FIXED, [1, LEAST - 1, LEAST, -3], HERE, 1))
    assert [row["budget_bytes"] for row in rows] == [LEAST]
    assert list(sweep_rows(STORYTELLER, FIXED, [], HERE, 1)) == []
    large = Inventory(SHAPES["qwen2-0.5b"], "f32")
    (row,) = sweep_rows(large, FIXED, [FIXED.total + large.streamable_nbytes // 2], HERE, 1)
    assert row["tokens_per_s"]["belady"] is None


@pytest.mark.spec("SIM-9")
def test_a_belady_of_as_many_chunks_as_it_may_have_is_in_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    for longest in (len(STORYTELLER.cycle), len(STORYTELLER.cycle) - 1):
        monkeypatch.setattr(report, "_LONGEST_BELADY", longest)
        (row,) = sweep_rows(STORYTELLER, FIXED, [HALF], HERE, 1)
        assert (row["tokens_per_s"]["belady"] is not None) == (longest == len(STORYTELLER.cycle))


@pytest.mark.spec("SIM-9")
def test_spans_are_kept_only_if_they_are_asked_for() -> None:
    costs = costs_of(STORYTELLER, HERE, prefetch_threads=PREFETCH_THREADS)
    plan = plan_of("optimal", HALF)
    assert not simulate_plan(STORYTELLER, plan, costs).trace.spans
    assert simulate_plan(STORYTELLER, plan, costs, traced=True).trace.spans


@pytest.mark.spec("SIM-9", "SIM-7")
@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("budget", [LEAST, HALF, MOST])
def test_a_plan_runs_on_the_virtual_clock_as_it_was_predicted(threads: int, budget: int) -> None:
    for format_name in FORMATS:
        inventory = Inventory(SHAPES["storyteller"], format_name)
        costs = costs_of(inventory, HERE, prefetch_threads=threads)
        least = smallest_budget(inventory, FIXED)
        plan = plan_of("optimal", max(budget, least), threads=threads, inventory=inventory)
        run = simulate_plan(inventory, plan, costs, traced=True)
        assert run.token_s == pytest.approx(plan.token_s)
        assert run.wait_s == pytest.approx(run.token_s - sum(costs.compute_s), abs=1e-12)
        assert {span.kind for span in run.trace.spans} >= {"compute"}
        assert plan.streams or {span.kind for span in run.trace.spans} == {"compute"}
