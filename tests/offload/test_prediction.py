"""Specifies `refinfer.offload.prediction`: what a run should reach, and on what that rests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.offload import prediction
from refinfer.offload.prediction import Meter, OffloadStats, Prediction, observe, predict
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS, pack_matrix
from refinfer.packing.layout import Tiles
from refinfer.planning.account import Account, Fixed, fixed_of
from refinfer.planning.cost import DEVICES, HERE, Calibration, Costs, Device, Processor, costs_of, ideal_token_s
from refinfer.planning.optimal import locked_array, token_s
from refinfer.planning.plan import Plan, Prefetch, make_plan
from refinfer.planning.report import simulate_plan
from refinfer.sources.matrices import Scratch
from refinfer.trace import Recorder

FAST: Final = Device("fast", {1: 8e9, 2: 9e9}, 1e-5, "a test")
SLOW: Final = Device("slow", {1: 1e6, 2: 2e6}, 1e-3, "a test")
EVEN: Final = Processor("p", {name: {1: 1e-9, 256: 2e-9} for name in FORMATS}, 5e-6, "a test")
INVENTORY: Final = Inventory(SHAPES["tiny"], "int8", 2048)


def plan_of(calibration: Calibration, threads: int = 2, share: float = 0.5, name: str = "balanced") -> Plan:
    fixed = fixed_of(INVENTORY, 8)
    budget = fixed.total + int(share * INVENTORY.streamable_nbytes)
    costs = costs_of(INVENTORY, calibration, prefetch_threads=threads)
    return make_plan(name, INVENTORY, fixed, budget, costs, Prefetch(threads))


@pytest.mark.spec("GEN-18", "COST-3")
@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("device", [FAST, SLOW], ids=lambda device: device.name)
def test_a_prediction_is_the_simulators_and_never_beats_the_bound(device: Device, threads: int) -> None:
    calibration = Calibration(device, EVEN, measured=True)
    plan = plan_of(calibration, threads)
    found = predict(INVENTORY, plan, calibration, paged=False)
    costs = costs_of(INVENTORY, calibration, prefetch_threads=threads)
    assert found.token_s == simulate_plan(INVENTORY, plan, costs).token_s
    assert ideal_token_s(costs, locked_array(INVENTORY, plan.locked), threads) <= found.token_s * (1 + 1e-9)
    assert found.io_bound == (device is SLOW)
    assert found.calibration is calibration


@pytest.mark.spec("CAL-6", "GEN-18")
def test_threads_that_read_at_once_can_keep_up_with_products_that_one_cannot() -> None:
    """Reads have nothing but latency here: with one thread those of a token take 1.5 times as long as its products."""
    plan = plan_of(Calibration(FAST, EVEN))
    product_s = sum(costs_of(INVENTORY, Calibration(FAST, EVEN)).compute_s)
    n_streamed = len(INVENTORY.cycle) - len(plan.locked)
    device = Device("waits", {1: 1e15, 2: 2e15}, 1.5 * product_s / n_streamed, "a test")
    for threads, io_bound in ((0, True), (1, True), (2, False)):
        found = predict(INVENTORY, replace(plan, prefetch_threads=threads), Calibration(device, EVEN), paged=False)
        assert found.io_bound == io_bound


@pytest.mark.spec("GEN-18", "READ-2")
def test_a_paged_run_is_predicted_to_lock_nothing_and_to_read_on_demand() -> None:
    calibration = Calibration(SLOW, EVEN)
    plan = plan_of(calibration)
    found = predict(INVENTORY, plan, calibration, paged=True)
    nothing_locked = replace(plan, locked=frozenset(), prefetch_threads=0)
    assert found == predict(INVENTORY, nothing_locked, calibration, paged=False)
    assert found.token_s > predict(INVENTORY, plan, calibration, paged=False).token_s


@pytest.mark.spec("PLAN-4", "GEN-18")
def test_a_run_that_locks_everything_is_bound_by_its_products() -> None:
    calibration = Calibration(SLOW, EVEN)
    found = predict(INVENTORY, plan_of(calibration, share=1.0), calibration, paged=False)
    assert not found.io_bound
    assert found.token_s == pytest.approx(sum(costs_of(INVENTORY, calibration).compute_s))


@pytest.mark.spec("CAL-10")
def test_on_one_core_products_and_checks_take_their_time_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(FAST, EVEN)
    plan = plan_of(calibration)
    streamed = sum(int(INVENTORY.sizes[n]) for n in range(len(INVENTORY.cycle)) if n not in plan.locked)
    products_s = sum(costs_of(INVENTORY, calibration).compute_s)
    monkeypatch.setattr(prediction, "usable_cores", lambda: 1)
    alone = predict(INVENTORY, plan, calibration, paged=False).token_s
    assert alone == pytest.approx(products_s + streamed * prediction.CHECK_S_PER_BYTE)
    monkeypatch.setattr(prediction, "usable_cores", lambda: 64)
    assert predict(INVENTORY, plan, calibration, paged=False).token_s < alone


@pytest.mark.spec("CAL-7")
def test_only_what_was_measured_has_a_range_of_a_factor_to_both_sides() -> None:
    def found(device: Device, processor: Processor) -> Prediction:
        calibration = Calibration(device, processor)
        return predict(INVENTORY, plan_of(calibration), calibration, paged=False)

    measured = found(FAST, EVEN)
    assert measured.range_tokens_per_s == pytest.approx((1 / 1.5 / measured.token_s, 1.5 / measured.token_s))
    assert measured.calibration.assumed == ()
    for device, processor, assumed in (
        (DEVICES["nvme"], EVEN, ("disk",)),
        (FAST, HERE.processor, ("processor",)),
        (HERE.device, HERE.processor, ("disk", "processor")),
    ):
        assert found(device, processor).range_tokens_per_s is None
        assert found(device, processor).calibration.assumed == assumed


# What the tokens of a run show.


class Tokens:
    """Tokens that take, on a clock of their own, what a test says: waiting, computing, and reading by each thread."""

    def __init__(self, threads: int) -> None:
        self.time, self.threads = 0.0, threads
        self.recorder = Recorder(self)
        self.meter = Meter(self.recorder, threads)
        self.seconds: list[float] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        raise AssertionError

    def token(self, waiting: float, computing: float, reading: float) -> None:
        """Let a token pass in which each thread reads for `reading` seconds, at most as long as the token takes."""
        reading = min(reading, waiting + computing)
        with self.meter.token(first=not self.seconds), ExitStack() as reads:
            for thread in range(self.threads):
                reads.enter_context(self.recorder.reading(thread, "q_proj"))
            started, ends = self.time, self.time + waiting + computing
            self.time += reading
            reads.close()
            self.time = started + waiting
            self.recorder.waited("q_proj", started)
            self.time = ends
        self.seconds.append(waiting + computing)


seconds = st.floats(0.001, 10)


@pytest.mark.spec("CAL-8")
@given(tokens=st.lists(st.tuples(st.just(0.0) | seconds, seconds, seconds), max_size=12), threads=st.integers(1, 3))
def test_no_generation_is_faster_than_its_ideal(tokens: list[tuple[float, float, float]], threads: int) -> None:
    run = Tokens(threads)
    for spent in tokens:
        run.token(*spent)
    if len(tokens) < 2:
        assert run.meter.ideal_token_s is None
        return
    ideal = run.meter.ideal_token_s
    assert ideal is not None
    assert ideal <= sum(run.seconds[1:]) / len(run.seconds[1:]) * (1 + 1e-9)
    computing = min(computing for _, computing, _ in tokens[1:])
    reading = min(min(reading, waiting + computing) for waiting, computing, reading in tokens[1:])
    assert ideal == pytest.approx(max(computing, reading), abs=1e-9)


@pytest.mark.spec("CAL-9")
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_eight_tokens_after_the_prompt_the_simulator_is_asked_again_at_their_rates(threads: int) -> None:
    plan = replace(plan_of(Calibration(FAST, EVEN), max(threads, 1)), prefetch_threads=threads)
    run = Tokens(max(threads, 1))
    run.token(0, 100, 100)  # the prompt
    for token in range(8):
        assert run.meter.estimate_s(INVENTORY, plan) is None
        run.token(1, 2 + token % 2, 2)
    estimated = run.meter.estimate_s(INVENTORY, plan)
    run.token(0, 100, 100)
    assert run.meter.estimate_s(INVENTORY, plan) == estimated
    locked = locked_array(INVENTORY, plan.locked)
    streamed = INVENTORY.sizes * ~locked
    costs = Costs(2 * max(threads, 1) * streamed / streamed.sum(), 2.5 * INVENTORY.sizes / INVENTORY.sizes.sum())
    assert estimated == pytest.approx(token_s(costs, locked, plan.ring_slots, threads))
    run.meter = Meter(run.recorder, threads)
    assert run.meter.estimate_s(INVENTORY, plan) is None


@pytest.mark.spec("CAL-8")
def test_reads_on_demand_are_those_of_the_one_thread_that_generates() -> None:
    run = Tokens(1)
    run.meter = Meter(run.recorder, 0)
    for _ in range(2):
        run.token(2, 1, 2)
    assert run.meter.ideal_token_s == pytest.approx(2)


@pytest.mark.spec("CAL-8", "CAL-9")
def test_a_new_generation_forgets_the_tokens_of_the_one_before() -> None:
    run = Tokens(1)
    for _ in range(9):
        run.token(0, 1, 1)
    assert run.meter.ideal_token_s == pytest.approx(1)
    run.seconds.clear()
    run.token(0, 5, 5)
    assert run.meter.ideal_token_s is None
    run.token(0, 3, 3)
    assert run.meter.ideal_token_s == pytest.approx(3)
    assert run.meter.estimate_s(INVENTORY, plan_of(Calibration(FAST, EVEN))) is None


# What a start shows.


@dataclass
class Opened:
    """As much of a streamed source as a prediction looks at."""

    locked: Mapping[int, Tiles]
    lock_s: float
    scratch: Scratch


class Ticking:
    """A clock that moves by a tick at each look at it."""

    def __init__(self, tick: float) -> None:
        self.t, self.tick = 0.0, tick

    def now(self) -> float:
        self.t += self.tick
        return self.t

    def sleep(self, seconds: float) -> None:
        raise AssertionError


LARGE: Final = Inventory(replace(SHAPES["tiny"], hidden_size=1024, intermediate_size=2048), "f32")
"""A model whose chunks are large enough to show how fast a disk is."""


def source_of(mebibytes: int, lock_s: float) -> StreamedSource:
    """Return a source that has locked chunks of 4 MiB, all with the same weights."""
    layout = next(m.layout for m in LARGE.matrices if m.kind == "up_proj" and len(m.layout.chunks) == 2)
    tiles = pack_matrix(np.ones((layout.N, layout.K), np.float32), "f32").tiles
    alike = [n for n, chunk in enumerate(LARGE.cycle) if LARGE.matrices[chunk.matrix].layout == layout]
    locked: dict[int, Any] = {}
    for number in alike[: mebibytes // 4]:
        assert LARGE.cycle[number].padded_nbytes == 4 << 20
        locked[number] = tiles[LARGE.cycle[number].index]
    return cast("StreamedSource", Opened(locked, lock_s, Scratch(LARGE, 1)))


def observed(source: StreamedSource, *, quiet: bool = True, tick: float = 0.0) -> Calibration:
    calibration = Calibration(FAST, EVEN)
    plan = replace(plan_of(calibration), prefetch_threads=2)
    return observe(calibration, LARGE, source, plan, Ticking(tick), quiet=quiet)


@pytest.mark.spec("CAL-5")
@pytest.mark.parametrize("lock_s", [4.0, 0.01], ids=["slow", "fast"])
def test_a_disk_is_taken_to_be_as_fast_as_it_gave_the_locked_chunks(lock_s: float) -> None:
    found = observed(source_of(32, lock_s)).device
    assert found.bandwidth[2] == pytest.approx((32 << 20) / lock_s)
    assert found.bandwidth[1] / found.bandwidth[2] == pytest.approx(8 / 9)  # as assumed


@pytest.mark.spec("CAL-5")
def test_too_few_bytes_or_a_disk_that_is_still_written_to_show_nothing() -> None:
    assert observed(source_of(28, 4.0)).device is FAST
    assert observed(source_of(32, 4.0), quiet=False).device is FAST
    assert observed(source_of(32, 0.0)).device is FAST
    assert observed(source_of(0, 0.0)) == Calibration(FAST, EVEN)


@pytest.mark.spec("CAL-5")
def test_products_with_locked_chunks_show_what_a_byte_costs() -> None:
    source = source_of(32, 4.0)
    tick = 0.03
    found = observed(source, tick=tick)
    some = [LARGE.cycle[n] for n in list(source.locked)[:4]]  # until 0.1 s are over
    nbytes = sum(LARGE.matrices[chunk.matrix].layout.chunks[chunk.index].nbytes for chunk in some)
    assert found.processor.seconds_per_byte["f32"][1] == pytest.approx(4 * tick / nbytes)
    assert found.processor.seconds_per_byte["int8"] == EVEN.seconds_per_byte["int8"]
    assert found.measured
    assert not observed(source, quiet=False, tick=tick).measured


@pytest.mark.spec("GEN-18", "PLAN-1")
def test_the_figures_of_a_run_are_its_plan_its_account_and_what_was_measured() -> None:
    account = Account(100, Fixed(1, 2, 3), 4, 5)
    stats = OffloadStats("none", account, 15, 80, 800, 2.0, (1.0, 4.0), (), 3.0, 4.0, 0.5, 1.5)
    rest = [field.name for field in dataclasses.fields(stats) if field.name not in ("plan", "account")]
    assert list(stats.to_json()) == ["plan", *stats.account.to_json(), *rest]
    assert stats.to_json() == {
        "plan": "none",
        "budget_bytes": 100,
        "locked_bytes": 5,
        "resident_bytes": 1,
        "ring_bytes": 4,
        "kv_cache_bytes": 2,
        "scratch_bytes": 3,
        "threads_bytes": 0,
        "peak_bytes": 15,
        "streamed_bytes_per_token": 80,
        "read_bytes_total": 800,
        "predicted_tokens_per_s": 2.0,
        "predicted_range_tokens_per_s": (1.0, 4.0),
        "assumed": (),
        "estimated_tokens_per_s": 3.0,
        "ideal_tokens_per_s": 4.0,
        "wait_s": 0.5,
        "compute_s": 1.5,
    }
