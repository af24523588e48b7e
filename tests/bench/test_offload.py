"""The bench of offloading: which runs it makes, within which limits, and what it compares them with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from refinfer.bench import offload, report, start
from refinfer.bench.offload import (
    MODEL,
    POSITIONS,
    Arm,
    arms,
    can_limit_memory,
    offload_bench,
    run_arm,
    steps,
)
from refinfer.cli import main
from refinfer.engine import fixed_of
from refinfer.errors import GenerationError
from refinfer.generate import STORYTELLER
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.offload.calibration import CALIBRATION_FILE, known_calibration
from refinfer.offload.inventory import Inventory
from refinfer.offload.plan import PLANS, smallest_budget
from refinfer.offload.store import FileStore

WATCHDOG_S: Final = 30.0

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
    assert {arm.arm for arm in quick} == {*PLANS, "lru-paged", "synchronous", "mmap"}
    assert {(arm.format, arm.budget_share) for arm in quick} == {("f32", 0.5)}
    assert {arm.format for arm in all_arms} == {"f32", "bf16", "int8", "int4"}
    assert set(quick) <= set(all_arms)
    assert len(set(all_arms)) == len(all_arms)
    assert all((arm.prefetch_threads > 0) == (arm.arm in PLANS) for arm in all_arms)
    assert {(arm.arm, arm.prefetch_threads) for arm in quick} >= {("optimal", 1), ("optimal", 2)}


@pytest.mark.spec("BENCH-12")
def test_compute_heavy_runs_are_the_plans_and_no_threads_at_three_budgets() -> None:
    heavy = arms(compute_heavy=True)
    assert {(arm.arm, arm.budget_share) for arm in heavy} == {
        (name, share) for name in (*PLANS, "synchronous") for share in (0.25, 0.5, 0.75)
    }
    assert {arm.format for arm in heavy} == {"f32"}
    assert steps(compute_heavy=True) == 7 * len(heavy)
    assert steps(quick=True) == 2 * len(arms(quick=True))


@pytest.mark.spec("BENCH-11")
def test_bench_offload_runs_every_arm_in_a_fresh_process_and_tells_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = Inventory(TINY, "f32")
    assert smallest_budget(inventory, fixed_of(inventory, POSITIONS)) < inventory.streamable_nbytes // 2
    runs: list[tuple[Arm, int | None]] = []
    real_arm = offload.run_arm

    def run_arm(
        model: Path, weight_cache: Path, arm: Arm, limit: int | None = None, cache_home: Path | None = None
    ) -> dict[str, Any]:
        runs.append((arm, limit))
        return real_arm(model, weight_cache, arm, limit, cache_home)

    monkeypatch.setattr(offload, "run_arm", run_arm)
    some = [arm for arm in arms(quick=True) if arm.arm in ("optimal", "none", "synchronous", "mmap", "lru-paged")]
    monkeypatch.setattr(offload, "arms", lambda **_: some)
    told: list[int] = []
    result = offload_bench(TINY, rounds=1, quick=True, progress=lambda: told.append(1))
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


@pytest.mark.spec("BENCH-11")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux tells what a process has read from disks")
def test_the_bytes_a_token_reads_from_the_disk_are_the_plans(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", TINY, dtype="f32")
    arm = Arm("f32", 0.5, "optimal")
    run_arm(tmp_path / "m", tmp_path / "w", arm)
    with FileStore(tmp_path / "w") as store:
        if not store.direct:
            pytest.skip("this file system has no direct I/O")
    measured = run_arm(tmp_path / "m", tmp_path / "w", arm)
    planned = measured["offload"]["streamed_bytes_per_token"]
    # The untied embedding row of each token is read besides: one or two pages.
    assert 0 <= measured["read_bytes_per_token"] - planned <= 3 * 4096 or measured["read_bytes_per_token"] == 0


@pytest.mark.spec("BENCH-12")
def test_a_chunk_multiplied_many_times_gives_the_same_tokens() -> None:
    code = (
        "import sys; from refinfer.bench.offload import _multiply_often; _multiply_often(int(sys.argv[1]));"
        "from refinfer import load\n"
        "for weight_cache, budget in ((':memory', None), (sys.argv[2], '90%')):\n"
        "    with load(weight_cache=weight_cache, budget=budget, threads=1, max_positions=32) as s:\n"
        "        print(repr(''.join(s.generate('ROMEO:', max_tokens=12))))"
    )
    with tempfile.TemporaryDirectory() as folder:
        printed = [
            subprocess.run(
                [sys.executable, "-c", code, str(n), f"{folder}/w"], capture_output=True, text=True, check=True
            ).stdout
            for n in (1, 5)
        ]
    assert printed[0] == printed[1]
    assert printed[0].count("\n") == 2


@pytest.mark.spec("BENCH-12")
def test_compute_heavy_products_are_repeated_wherever_the_weights_are(tmp_path: Path) -> None:
    """Resident and streamed: what multiplies a chunk is called so often, as counted in a process of its own."""
    code = """
import sys
import refinfer.bench.offload as bench
from refinfer import load
from refinfer.packing import bf16
calls, once = 0, bf16.multiply
def counted(*args):
    global calls
    calls += 1
    once(*args)
bf16.multiply = counted
bench._multiply_often(3)
for budget in (None, "90%"):
    with load(weight_cache=sys.argv[1], budget=budget, threads=1, max_positions=8) as session:
        calls = 0
        for _ in session.generate(token_ids=[1], max_tokens=2):
            pass
    print(calls)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w")], capture_output=True, text=True, check=True
    ).stdout
    resident, streamed = map(int, done.split())
    chunks = len(Inventory(open_folder(STORYTELLER).config, "bf16").cycle)
    assert resident == streamed == 3 * 2 * chunks


@pytest.mark.spec("BENCH-12")
def test_compute_heavy_calibrates_how_often_to_multiply_and_tells_the_plans(tmp_path: Path) -> None:
    inventory = Inventory(MODEL, "f32")
    products = offload._calibrate(tmp_path, inventory, rounds=1, compute_heavy=True)
    found = known_calibration(tmp_path / "refinfer" / CALIBRATION_FILE, tmp_path)
    reading = inventory.streamable_nbytes / 2 / found.device.bandwidth[2]
    computing = inventory.streamable_nbytes * found.processor.seconds_per_byte["f32"][1]
    assert products >= 1
    assert computing == pytest.approx(reading, rel=0.5 / products + 0.01) or products == 1


@pytest.mark.skipif(not can_limit_memory(), reason="needs control groups, version 1, that can be written")
@pytest.mark.spec("BENCH-11")
def test_a_memory_limit_is_real_and_its_group_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of an arm, a program that says which group it is in, and takes more than it may."""
    groups = Path("/sys/fs/cgroup/memory")
    code = "print(open('/proc/self/cgroup').read(), flush=True); bytearray(b'1' * (512 << 20))"
    limits: list[str] = []
    done: list[subprocess.CompletedProcess[str]] = []
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        limits.append((groups / f"refinfer-bench-{os.getpid()}" / "memory.limit_in_bytes").read_text().strip())
        assert command[3] == sys.executable  # the first three join the group
        done.append(real([*command[:4], "-c", code], timeout=WATCHDOG_S, **options))
        return done[-1]

    monkeypatch.setattr(offload, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(GenerationError, match=r"a run of .* failed"):
        offload.run_arm(tmp_path / "m", tmp_path / "cache", Arm("f32", 0.5, "mmap", 0), 128 << 20)
    assert limits == [str(128 << 20)]
    assert f"refinfer-bench-{os.getpid()}" in done[0].stdout
    assert done[0].returncode == -signal.SIGKILL
    assert not (groups / f"refinfer-bench-{os.getpid()}").exists()


@pytest.mark.spec("BENCH-11")
def test_bench_offload_compares_each_run_with_the_legs_of_its_own_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs that take what this test says: each round is twice as slow as the one before it."""
    inventory = Inventory(TINY, "f32")
    fixed, budget = fixed_of(inventory, POSITIONS).total, inventory.streamable_nbytes // 2
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
            "offload": told | {"predicted_tokens_per_s": 3.0},
            "read_bytes_per_token": streamed,
            "read_s": 0.5 * speed["round"],
            "peak_rss_bytes": 1,
        }

    monkeypatch.setattr(offload, "run_arm", run_arm)
    monkeypatch.setattr(offload, "run_start", lambda *_: {"peak_rss_bytes": 1})
    monkeypatch.setattr(offload, "_calibrate", lambda *_, **__: 1)
    monkeypatch.setattr(offload, "can_limit_memory", lambda: False)
    rows = list(offload_bench(TINY, rounds=3, quick=True)["rows"])
    assert "mmap" not in {row["arm"] for row in rows}
    must = inventory.streamable_nbytes - (budget - fixed - ring)
    for row in rows:  # the first resident run builds: rounds are slower by 2, 4 and 8
        assert row["tokens_per_s"] == 1 / (0.75 * 2 * 2)
        assert row["overlap"] == pytest.approx(0.5 / 0.75)
        planned = inventory.streamable_nbytes if row["arm"] == "lru-paged" else streamed
        assert row["byte_efficiency"] == pytest.approx(must / planned)
        ideal = 1 / max(0.25, 0.5 * must / planned)
        assert row["ideal_tokens_per_s"] == pytest.approx(ideal / 4)
        assert row["efficiency"] == pytest.approx(1 / 0.75 / ideal)
        assert row["peak_bytes"] == 7 * 8  # of all rounds
        assert (row["planned_bytes_per_token"], row["read_bytes_per_token"]) == (planned, streamed)
        assert row["compute_only_tokens_per_s"] == 1 / (0.25 * 4)


@pytest.mark.spec("BENCH-11")
def test_an_arm_that_fails_is_one_named_error(tmp_path: Path) -> None:
    arm = Arm("f32", 0.5, "optimal")
    with pytest.raises(GenerationError, match=r"a run of .*optimal.* failed"):
        offload.run_arm(tmp_path / "nothing here", tmp_path / "cache", arm)
    assert asdict(arm)["prefetch_threads"] == 2


@pytest.mark.spec("BENCH-11")
def test_budgets_too_small_for_a_format_are_named_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "run_start", lambda *_: {"peak_rss_bytes": 1})
    one_layer = replace(MODEL, num_hidden_layers=1)
    assert offload_bench(one_layer)["too_small"] == ["bf16 10%", "int8 10%", "int4 10%", "int4 25%"]
    assert offload_bench(one_layer, quick=True)["too_small"] == offload_bench(MODEL)["too_small"] == []


@pytest.mark.spec("BENCH-13")
def test_json_is_one_object_whose_rows_are_written_as_they_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"number": number}
            written.append(capsys.readouterr().out)

    one = replace(report.BENCHES["offload"], measure=lambda progress: {"rounds": 1, "rows": rows()})
    monkeypatch.setattr(report, "bench_of", lambda *_, **__: one)
    assert main(["bench", "offload", "--json"]) == 0
    written.append(capsys.readouterr().out)
    for number, text in enumerate(written[:3]):
        assert f'{{"number": {number}}}' in text
    result = json.loads("".join(written))
    assert list(result) == ["machine", "rounds", "rows"]
    assert result["rows"] == [{"number": 0}, {"number": 1}, {"number": 2}]


@pytest.mark.spec("CLI-4")
@pytest.mark.parametrize("option", ["--quick", "--compute-heavy"])
def test_ways_to_run_one_bench_are_refused_for_another(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "share", option]) == 2
    assert "are for bench offload" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.spec("BENCH-14", "BUDGET-1")
@pytest.mark.skipif(not can_limit_memory(), reason="needs control groups, version 1, that can be written")
@pytest.mark.parametrize("name", ["f32", "int4"])
def test_a_first_run_and_a_later_one_survive_a_group_of_the_budget_at_every_budget(name: str, tmp_path: Path) -> None:
    """The first one packs, within the same limit. The model is large enough to be seen: 134 MB of float32."""
    config = replace(MODEL, num_hidden_layers=2, hidden_size=1024, intermediate_size=4096, head_dim=32)
    write_checkpoint(tmp_path / "m", config, dtype="f32")
    base = start.run_start(STORYTELLER, "auto", ":memory")["peak_rss_bytes"]
    inventory = Inventory(config, name)
    least = smallest_budget(inventory, fixed_of(inventory, POSITIONS)) / inventory.streamable_nbytes
    for share in (0.1, 0.25, 0.5, 0.75, 0.9, 0.95):
        if share < least:
            continue
        limit = base + round(share * inventory.streamable_nbytes) + 16_000_000
        for _ in range(2):
            measured = run_arm(tmp_path / "m", tmp_path / f"{share}", Arm(name, share, "optimal"), limit)
            assert measured["offload"]["peak_bytes"] <= measured["offload"]["budget_bytes"]
        # The first run also had pages of the original mapped, which the kernel takes back when it needs them.
        assert measured["peak_rss_bytes"] <= limit
