"""The bench of offloading: which runs it makes, and what it compares them with."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from refinfer.bench import offload
from refinfer.bench.arm import POSITIONS, Arm, can_limit_memory
from refinfer.bench.arm import run_arm as run_arm_of_the_bench
from refinfer.bench.calibrate import to_json
from refinfer.bench.offload import MODEL, arms, offload_bench, steps
from refinfer.inventory import Inventory
from refinfer.offload.calibration import CALIBRATION_FILE, known_calibration
from refinfer.packing.formats import FORMATS
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import Device, Processor
from refinfer.planning.plan import PLANS, smallest_budget

TINY: Final = replace(
    MODEL,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    vocab_size=2048,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
)


KEYS: Final = {
    "format", "budget_share", "arm", "prefetch_threads", "tokens_per_s", "ideal_tokens_per_s", "efficiency", "overlap",
    "byte_efficiency", "read_bytes_per_token", "planned_bytes_per_token", "peak_bytes",
}  # fmt: skip


@pytest.mark.spec("BENCH-11")
def test_the_arms_are_every_plan_no_threads_lru_pages_and_mmap_in_every_format() -> None:
    quick, all_arms = arms(quick=True), arms()
    assert {arm.arm for arm in quick} == {*PLANS, "synchronous", "mmap"} - {"none"}
    assert {arm.arm for arm in all_arms} == {*PLANS, "lru-paged", "synchronous", "mmap"}
    assert {(arm.format, arm.budget_share) for arm in quick} == {("f32", 0.5)}
    assert {arm.format for arm in all_arms} == {"f32", "bf16", "int8", "int4"}
    assert set(quick) <= set(all_arms)
    assert len(set(all_arms)) == len(all_arms)
    assert all((arm.prefetch_threads > 0) == (arm.arm in PLANS) for arm in all_arms)
    assert {(arm.arm, arm.prefetch_threads) for arm in all_arms} >= {("optimal", 1), ("optimal", 2)}


@pytest.mark.spec("BENCH-11")
@pytest.mark.parametrize("cores", [1, 2, 8])
def test_no_run_has_more_blas_threads_than_cores_and_some_have_two(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "usable_cores", lambda: cores)
    assert {arm.threads for arm in arms()} == ({1} if cores == 1 else {1, 2})
    assert {arm.threads for arm in arms(quick=True)} == {1}


@pytest.mark.spec("BENCH-12")
def test_compute_heavy_runs_are_the_plans_and_no_threads_at_three_budgets() -> None:
    heavy = arms(compute_heavy=True)
    assert {(arm.arm, arm.budget_share) for arm in heavy} == {
        (name, share) for name in (*PLANS, "synchronous") for share in (0.25, 0.5, 0.75)
    }
    assert {arm.format for arm in heavy} == {"f32"}
    assert steps(compute_heavy=True) == 3 * len(heavy)
    assert steps(quick=True) == 2 * len(arms(quick=True))


@pytest.mark.slow
@pytest.mark.spec("BENCH-11")
def test_bench_offload_runs_every_arm_in_a_fresh_process_and_reports_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = Inventory(TINY, "f32")
    assert smallest_budget(inventory, fixed_of(inventory, POSITIONS)) < inventory.streamable_nbytes // 2
    runs: list[tuple[Arm, int | None]] = []
    real_arm = run_arm_of_the_bench

    def run_arm(
        model: Path, weight_cache: Path, arm: Arm, limit: int | None = None, cache_home: Path | None = None
    ) -> dict[str, Any]:
        runs.append((arm, limit))
        return real_arm(model, weight_cache, arm, limit, cache_home)

    monkeypatch.setattr(offload, "run_arm", run_arm)
    of_half = [arm for arm in arms() if (arm.format, arm.budget_share) == ("f32", 0.5)]
    some = [arm for arm in of_half if arm.arm in ("optimal", "none", "synchronous", "mmap", "lru-paged")]
    monkeypatch.setattr(offload, "arms", lambda **_: some)
    told: list[int] = []
    result = offload_bench(lambda: told.append(1), config=TINY, rounds=1, quick=True)
    measured = list(result["rows"])
    wanted = [arm for arm in some if arm.arm != "mmap" or can_limit_memory()]
    legs = [Arm("f32", 1.0, "resident"), Arm("f32", 1.0, "resident", 0)]
    assert [arm for arm, _ in runs] == [*legs, *wanted]  # builds the file; then a leg, then its arms
    assert len(told) == len(wanted)
    assert [(row["arm"], row["prefetch_threads"]) for row in measured] == [
        (arm.arm, arm.prefetch_threads) for arm in wanted
    ]
    assert all(row.keys() >= KEYS for row in measured)
    streamable = inventory.streamable_nbytes
    for row in measured:
        assert (row["format"], row["budget_share"], row["products"]) == ("f32", 0.5, 1)
        assert row["tokens_per_s"] > 0
        if row["arm"] != "mmap":
            assert 0 < row["planned_bytes_per_token"] <= streamable
            assert 0 < row["peak_bytes"] <= streamable // 2
            assert 0 < row["byte_efficiency"] <= 1
            assert min(row["overlap"], row["ideal_tokens_per_s"], row["read_only_tokens_per_s"]) > 0
            assert row["efficiency"] == pytest.approx(row["tokens_per_s"] / row["ideal_tokens_per_s"])
    rows = {row["arm"]: row for row in measured}
    assert rows["none"]["planned_bytes_per_token"] == rows["lru-paged"]["planned_bytes_per_token"] == streamable
    assert rows["optimal"]["planned_bytes_per_token"] < streamable
    if can_limit_memory():
        own = result["base_bytes"] + streamable // 2
        assert {arm.arm: limit for arm, limit in runs[2:]} == {
            arm.arm: own + (0 if arm.arm == "mmap" else 16_000_000) for arm in wanted
        }
        nothing = ("ideal_tokens_per_s", "efficiency", "overlap", "byte_efficiency", "planned_bytes_per_token")
        assert [rows["mmap"][key] for key in nothing] == [None] * 5
    assert not Path(f"/sys/fs/cgroup/memory/refinfer-bench-{os.getpid()}").exists()


@pytest.mark.slow
@pytest.mark.spec("BENCH-12")
def test_compute_heavy_calibrates_how_often_to_multiply_and_keeps_what_that_costs(tmp_path: Path) -> None:
    inventory = Inventory(MODEL, "f32")
    products = offload._calibrate(tmp_path, inventory, rounds=1, compute_heavy=True)
    found = known_calibration(tmp_path / "refinfer" / CALIBRATION_FILE, tmp_path)
    reading = inventory.streamable_nbytes / 2 / found.device.bandwidth[2]
    computing = inventory.streamable_nbytes * found.processor.seconds_per_byte["f32"][1]
    assert products >= 1
    assert computing == pytest.approx(reading, rel=0.5 / products + 0.01) or products == 1


@pytest.mark.spec("BENCH-11")
def test_bench_offload_compares_each_run_with_the_legs_of_its_own_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs that take what this test says: each round is twice as slow as the one before it."""
    inventory = Inventory(TINY, "f32")
    budget = inventory.streamable_nbytes // 2
    ring, streamed = 2_000_000, 10_000_000
    speed = {"round": 0.5}

    def run_arm(
        model: Path, weight_cache: Path, arm: Arm, limit: int | None = None, cache_home: Path | None = None
    ) -> dict[str, Any]:
        if arm.arm == "resident":
            speed["round"] *= 2
            return {"token_s": 0.25 * speed["round"], "peak_rss_bytes": 1}
        told = {"streamed_bytes_per_token": streamed, "ring_bytes": ring, "peak_bytes": int(7 * speed["round"])}
        return {
            "token_s": 0.75 * speed["round"],
            "offload": told
            | {"predicted_tokens_per_s": 3.0, "predicted_range_tokens_per_s": (0.3, 0.5), "ideal_tokens_per_s": 0.01},
            "estimated_tokens_per_s": 2.5 if arm.arm == "optimal" else None,
            "read_bytes_per_token": streamed,
            "read_s": 0.5 * speed["round"],
            "peak_rss_bytes": 1,
        }

    monkeypatch.setattr(offload, "run_arm", run_arm)
    monkeypatch.setattr(offload, "run_start", lambda *_: {"peak_rss_bytes": 1})
    monkeypatch.setattr(offload, "_calibrate", lambda *_, **__: 1)
    monkeypatch.setattr(offload, "can_limit_memory", lambda: False)
    rows = list(offload_bench(config=TINY, rounds=3, quick=True)["rows"])
    assert "mmap" not in {row["arm"] for row in rows}
    keys = list(offload.BENCH.columns.values())[: offload.BENCH.keys]
    assert len({tuple(show(row) for show in keys) for row in rows}) == len(rows)  # its first columns name a row
    for row in rows:  # the first resident run builds: rounds are slower by 2, 4 and 8
        fixed = fixed_of(inventory, POSITIONS, row["prefetch_threads"]).total
        must = inventory.streamable_nbytes - (budget - fixed - ring)
        assert row["tokens_per_s"] == 1 / (0.75 * 2 * 2)
        assert row["overlap"] == pytest.approx(0.5 / 0.75)
        planned = inventory.streamable_nbytes if row["arm"] == "lru-paged" else streamed
        assert row["byte_efficiency"] == pytest.approx(must / planned)
        ideal = 1 / max(0.25, 0.5 * must / planned)
        assert row["ideal_tokens_per_s"] == pytest.approx(ideal / 2)  # at the best rates, those of the first round
        assert row["efficiency"] == pytest.approx(row["tokens_per_s"] / row["ideal_tokens_per_s"])
        assert row["in_range"] == pytest.approx(1 / 3)
        assert row["estimated_tokens_per_s"] == (2.5 if row["arm"] == "optimal" else None)
        assert row["peak_bytes"] == 7 * 8  # of all rounds
        assert (row["planned_bytes_per_token"], row["read_bytes_per_token"]) == (planned, streamed)
        assert row["compute_only_tokens_per_s"] == 1 / (0.25 * 4)


@pytest.mark.spec("BENCH-14")
def test_every_arm_within_a_budget_has_a_limit_of_its_own_memory_the_budget_and_16_mb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for the runs; that a limit given to a run is a real one is tested with `run_arm`."""
    own, limits = 123_000_000, dict[Arm, int | None]()

    def run_arm(model: Path, weight_cache: Path, arm: Arm, limit: int | None, cache_home: Path) -> dict[str, Any]:
        limits[arm] = limit
        told: dict[str, Any] = dict.fromkeys(("streamed_bytes_per_token", "ring_bytes", "peak_bytes"), 1)
        told |= {"predicted_tokens_per_s": 1, "predicted_range_tokens_per_s": None, "ideal_tokens_per_s": 1}
        found = {"token_s": 1.0, "read_s": 1.0, "read_bytes_per_token": 1, "peak_rss_bytes": 1, "offload": told}
        return found | {"estimated_tokens_per_s": None}

    monkeypatch.setattr(offload, "run_arm", run_arm)
    monkeypatch.setattr(offload, "run_start", lambda *_: {"peak_rss_bytes": own})
    monkeypatch.setattr(offload, "_calibrate", lambda *_, **__: 1)
    dropped: list[str] = []
    monkeypatch.setattr(offload, "drop_page_cache", lambda path: dropped.append(path.name))
    monkeypatch.setattr(offload, "can_limit_memory", lambda: True)
    assert list(offload_bench(config=TINY, rounds=1, quick=True)["rows"])
    budget = Inventory(TINY, "f32").streamable_nbytes // 2
    assert set(arms(quick=True)) < set(limits)
    for arm, limit in limits.items():
        if arm.arm == "resident":
            assert limit is None
        else:
            assert limit == own + budget + (0 if arm.arm == "mmap" else 16_000_000)
    assert dropped == ["f32.packed"] * len(arms(quick=True))  # no arm finds in memory what the one before it has read


@pytest.mark.spec("BENCH-11")
def test_every_run_has_the_calibration_of_this_bench_and_progress_is_told_after_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for the runs: two find all weights locked, and stream none."""
    runs: list[Arm] = []
    told: list[int] = []

    def run_arm(model: Path, weight_cache: Path, arm: Arm, limit: int | None, cache_home: Path) -> dict[str, Any]:
        if arm.arm == "resident":
            return {"token_s": 0.25}
        assert (cache_home / "calibrated").exists()
        assert len(told) == len(runs)
        runs.append(arm)
        offloaded: dict[str, Any] = dict.fromkeys(("streamed_bytes_per_token", "ring_bytes", "peak_bytes"), 0)
        offloaded |= {"predicted_tokens_per_s": 1, "predicted_range_tokens_per_s": None, "ideal_tokens_per_s": 0.5}
        found = {"token_s": 0.5, "read_s": 0.0, "read_bytes_per_token": 0, "peak_rss_bytes": 1}
        return found | {"offload": offloaded, "estimated_tokens_per_s": None}

    def calibrated(cache_home: Path, *_: object, **__: object) -> int:
        cache_home.mkdir(parents=True)
        (cache_home / "calibrated").touch()
        return 1

    wanted = (Arm("f32", 2.0, "optimal"), Arm("f32", 3.0, "optimal"))
    monkeypatch.setattr(offload, "run_arm", run_arm)
    monkeypatch.setattr(offload, "run_start", lambda *_: {"peak_rss_bytes": 1})
    monkeypatch.setattr(offload, "_calibrate", calibrated)
    monkeypatch.setattr(offload, "can_limit_memory", lambda: False)
    monkeypatch.setattr(offload, "arms", lambda **_: wanted)
    rows = list(offload.BENCH.measure(lambda: told.append(1), config=TINY, quick=True)["rows"])
    assert len(told) == steps(quick=True) == len(runs)
    for row in rows:
        assert (row["planned_bytes_per_token"], row["byte_efficiency"], row["read_only_tokens_per_s"]) == (0, 1, None)
        assert (row["ideal_tokens_per_s"], row["efficiency"], row["overlap"]) == (1 / 0.25, 0.5, 0.5)


@pytest.mark.spec("BENCH-11")
def test_budgets_too_small_for_a_format_are_named_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "run_start", lambda *_: {"peak_rss_bytes": 1})
    one_layer = replace(MODEL, num_hidden_layers=1)
    assert offload_bench(config=one_layer)["too_small"] == ["bf16 10%", "int8 10%", "int4 10%", "int4 25%"]
    assert offload_bench(config=one_layer, quick=True)["too_small"] == offload_bench()["too_small"] == []


@pytest.mark.spec("BENCH-12")
@pytest.mark.parametrize(("speed", "products"), [(1.0, 6), (100.0, 1)])
def test_a_compute_heavy_run_multiplies_as_often_as_half_of_the_reads_take_and_is_planned_for_that(
    speed: float, products: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a disk of 1 or 100 GB/s, and a processor that multiplies 12 GB/s."""
    processor = Processor("p", {name: {1: 1 / 12e9, 8: 1e-9} for name in FORMATS}, 0.0, "a test")
    device = Device("d", {1: speed * 1e9, 2: speed * 1e9}, 0.0, "a test")

    def calibrate(folder: Path, rounds: int) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        (folder / CALIBRATION_FILE).write_text(json.dumps(to_json(None, folder, device, processor)))
        return {"calibration_file": str(folder / CALIBRATION_FILE)}

    monkeypatch.setattr(offload, "calibrate", calibrate)
    for heavy in (False, True):
        wanted = products if heavy else 1
        assert offload._calibrate(tmp_path, Inventory(TINY, "f32"), rounds=1, compute_heavy=heavy) == wanted
        found = known_calibration(tmp_path / "refinfer" / CALIBRATION_FILE, tmp_path).processor
        assert found.seconds_per_byte["f32"] == pytest.approx({1: wanted / 12e9, 8: 1e-9})


@pytest.mark.spec("BENCH-11")
def test_an_arm_is_shown_with_its_threads_if_they_are_not_the_usual_ones_and_the_title_names_the_models_size() -> None:
    shown = offload.BENCH.columns["arm"]
    usual = {"arm": "optimal", "prefetch_threads": 2}
    assert [shown(usual | more) for more in ({}, {"threads": 1}, {"threads": 2}, {"prefetch_threads": 1})] == [
        "optimal", "optimal", "optimal, both cores", "optimal, 1 thread",
    ]  # fmt: skip
    assert f"{4 * MODEL.n_parameters / 1e9:.1f} GB of float32" in offload.BENCH.title
