"""One run of the bench of offloading: what it does, within which limit, and what it measures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from refinfer.bench import arm as bench_arm
from refinfer.bench.arm import POSITIONS, Arm, can_limit_memory, run_arm
from refinfer.bench.offload import MODEL
from refinfer.bench.start import run_start
from refinfer.errors import GenerationError
from refinfer.generate import STORYTELLER
from refinfer.inventory import Inventory
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.offload.store import FileStore
from refinfer.packing.formats import FORMATS
from refinfer.planning.account import fixed_of
from refinfer.planning.plan import smallest_budget

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


@pytest.mark.slow
@pytest.mark.spec("BENCH-11")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux reports what a process has read from disks")
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
        "import sys; from refinfer.bench.arm import _multiply_often; _multiply_often(int(sys.argv[1]));"
        "from refinfer import load; from refinfer.packing.formats import FORMATS\n"
        "for weights in FORMATS:\n"
        "    for place, budget in ((':memory', None), (sys.argv[2] + weights, '90%')):\n"
        "        with load(weights=weights, weight_cache=place, budget=budget, threads=1, max_positions=20) as s:\n"
        "            print(repr(''.join(s.generate('ROMEO:', max_tokens=12))))"
    )
    with tempfile.TemporaryDirectory() as folder:
        printed = [
            subprocess.run(
                [sys.executable, "-c", code, str(n), f"{folder}/w"], capture_output=True, text=True, check=True
            ).stdout
            for n in (1, 5)
        ]
    assert printed[0] == printed[1]
    assert printed[0].count("\n") == 2 * len(FORMATS)


@pytest.mark.spec("BENCH-12")
@pytest.mark.parametrize("products", [1, 2, 3])
def test_compute_heavy_products_are_repeated_wherever_the_weights_are(products: int, tmp_path: Path) -> None:
    """Resident and streamed: each chunk is multiplied that often, as counted in a process of its own."""
    code = """
import sys
import refinfer.bench.arm as bench
from refinfer import load
from refinfer.packing import bf16
calls, once = 0, bf16.multiply
def counted(*args):
    global calls
    calls += 1
    once(*args)
bf16.multiply = counted
bench._multiply_often(int(sys.argv[2]))
for budget in (None, "90%"):
    with load(weight_cache=sys.argv[1], budget=budget, threads=1, max_positions=8) as session:
        calls = 0
        for _ in session.generate(token_ids=[1], max_tokens=2):
            pass
    print(calls)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w"), str(products)], capture_output=True, text=True, check=True
    ).stdout
    resident, streamed = map(int, done.split())
    chunks = len(Inventory(open_folder(STORYTELLER).config, "bf16").cycle)
    assert resident == streamed == products * 2 * chunks


@pytest.mark.spec("BENCH-11")
@pytest.mark.parametrize("name", ["mmap", "resident", "balanced", "synchronous", "lru-paged"])
def test_an_arm_reports_its_budget_and_its_reads_if_it_has_any_and_its_time_in_any_case(
    name: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "m", replace(TINY, vocab_size=256, num_hidden_layers=1), dtype="f32")
    started = time.perf_counter()
    measured = run_arm(tmp_path / "m", tmp_path / "w", Arm("f32", 0.8, name))
    whole_s = time.perf_counter() - started
    assert 0 < measured["token_s"] < whole_s
    assert (measured["offload"] is None) == (measured["read_s"] is None) == (name in ("mmap", "resident"))
    if measured["offload"] is not None:
        assert 0 < measured["read_s"] < whole_s
        assert measured["offload"]["plan"] == ("balanced" if name == "balanced" else "optimal")


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

    monkeypatch.setattr(bench_arm, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(GenerationError, match=r"a run of .* failed"):
        run_arm(tmp_path / "m", tmp_path / "cache", Arm("f32", 0.5, "mmap", 0), 128 << 20)
    assert limits == [str(128 << 20)]
    assert f"refinfer-bench-{os.getpid()}" in done[0].stdout
    assert done[0].returncode == -signal.SIGKILL
    assert not (groups / f"refinfer-bench-{os.getpid()}").exists()


@pytest.mark.spec("BENCH-11")
@pytest.mark.parametrize(
    ("arm", "expected", "times"),
    [
        (Arm("int8", 0.5, "balanced", 1), ("int8", "50.0%", "balanced", 1, 1), 1),
        (Arm("f32", 0.25, "optimal", 3, products=4, threads=2), ("f32", "25.0%", "optimal", 3, 2), 4),
    ],
)
def test_a_process_loads_the_model_as_its_arm_says(
    arm: Arm, expected: tuple[object, ...], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    products: list[int] = []

    def load(model: str, **options: Any) -> nullcontext[None]:
        asked.update(options, model=model)
        return nullcontext()

    monkeypatch.setattr(bench_arm, "load", load)
    monkeypatch.setattr(bench_arm, "_multiply_often", products.append)
    monkeypatch.setattr(bench_arm, "_measured", lambda session, of: asdict(of))
    bench_arm.child("a model", "a file", json.dumps(asdict(arm)), str(tmp_path / "report"))
    assert json.loads((tmp_path / "report").read_text()) == asdict(arm)
    assert tuple(asked[name] for name in ("weights", "budget", "plan", "prefetch_threads", "threads")) == expected
    assert (asked["model"], asked["weight_cache"]) == ("a model", "a file")
    assert products == [times]


@pytest.mark.spec("BENCH-11")
@pytest.mark.parametrize("name", ["optimal", "mmap"])
def test_the_bytes_read_per_token_are_those_of_the_last_generation_divided_by_its_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a session that reads as many bytes for each token as this test says."""
    read = {"bytes": 7}

    def generate(token_ids: list[int], max_tokens: int = 100) -> Iterator[str]:
        for _ in range(max_tokens):
            read["bytes"] += 1000
            yield "a"

    stats = SimpleNamespace(tokens_per_s=4.0, offload=None, peak_rss_bytes=1)
    monkeypatch.setattr(bench_arm, "_bytes_read", lambda: read["bytes"])
    monkeypatch.setattr(bench_arm, "_read_only_s", lambda *_: 0.5)
    session: Any = SimpleNamespace(generate=generate, stats=stats)
    measured = bench_arm._measured(session, Arm("f32", 0.5, name))
    assert (measured["read_bytes_per_token"], measured["token_s"]) == (1000, 0.25)


@pytest.mark.spec("BENCH-11")
@pytest.mark.parametrize(
    ("written", "why"), [("a warning\nan error\nthe reason\n", "the reason"), ("\n", "exit status 3")]
)
def test_a_run_that_fails_is_named_with_the_last_line_it_wrote_or_with_how_it_ended(
    written: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(returncode=3, stderr=written)
    monkeypatch.setattr(bench_arm, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    with pytest.raises(GenerationError, match=f" failed: {why}$"):
        run_arm(tmp_path / "m", tmp_path / "cache", Arm("f32", 0.5, "optimal"))


@pytest.mark.spec("BENCH-11")
def test_a_run_has_the_users_calibration_unless_it_is_given_another_cache_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment of a run's process says is where it looks."""
    monkeypatch.setenv("REFINFER_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "the user's"))
    looked: list[str] = []
    code = "import pathlib, sys; from refinfer.offload.calibration import calibration_file;"
    code += "pathlib.Path(sys.argv[4]).write_text('{}'); print(calibration_file())"
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        done = real([*command[:2], code, *command[3:]], **options)
        looked.append(done.stdout)
        return done

    monkeypatch.setattr(bench_arm, "subprocess", SimpleNamespace(run=run))
    for home in (None, tmp_path / "another"):
        run_arm(tmp_path / "m", tmp_path / "cache", Arm("f32", 0.5, "optimal"), None, home)
    assert [Path(line.strip()).parents[1].name for line in looked] == ["the user's", "another"]


@pytest.mark.spec("BENCH-11")
def test_an_arm_that_fails_is_one_named_error(tmp_path: Path) -> None:
    arm = Arm("f32", 0.5, "optimal")
    with pytest.raises(GenerationError, match=r"a run of .*optimal.* failed"):
        run_arm(tmp_path / "nothing here", tmp_path / "cache", arm)
    assert asdict(arm)["prefetch_threads"] == 2


@pytest.mark.slow
@pytest.mark.spec("BENCH-14", "BUDGET-1")
@pytest.mark.skipif(not can_limit_memory(), reason="needs control groups, version 1, that can be written")
@pytest.mark.parametrize("name", ["f32", "int4"])
def test_a_first_run_and_a_later_one_survive_a_group_of_the_budget_at_every_budget(name: str, tmp_path: Path) -> None:
    """The first one packs, within the same limit. The model is large enough to be seen: 134 MB of float32."""
    config = replace(MODEL, num_hidden_layers=2, hidden_size=1024, intermediate_size=4096, head_dim=32)
    write_checkpoint(tmp_path / "m", config, dtype="f32")
    base = run_start(STORYTELLER, "auto", ":memory")["peak_rss_bytes"]
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
