"""Specifies `refinfer.offload.prediction`: what a run should reach, and on what that rests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
import pytest

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.offload.prediction import OffloadStats, observe, predict
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS, pack_matrix
from refinfer.packing.layout import Tiles
from refinfer.planning.account import Account, Fixed, fixed_of
from refinfer.planning.cost import Calibration, Device, Processor, costs_of, ideal_token_s
from refinfer.planning.optimal import locked_array
from refinfer.planning.plan import Plan, Prefetch, make_plan
from refinfer.planning.report import simulate_plan
from refinfer.sources.matrices import Scratch

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
def test_a_prediction_is_the_simulators_and_never_beats_the_ideal(device: Device, threads: int) -> None:
    calibration = Calibration(device, EVEN, measured=True)
    plan = plan_of(calibration, threads)
    found = predict(INVENTORY, plan, calibration, paged=False)
    costs = costs_of(INVENTORY, calibration, prefetch_threads=threads)
    assert found.token_s == simulate_plan(INVENTORY, plan, costs).token_s
    assert found.ideal_token_s == ideal_token_s(costs, locked_array(INVENTORY, plan.locked), threads)
    assert found.ideal_token_s <= found.token_s * (1 + 1e-9)
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
    assert found.token_s == pytest.approx(found.ideal_token_s)


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
def test_a_disk_is_taken_to_be_as_fast_as_it_gave_the_locked_chunks() -> None:
    found = observed(source_of(32, 4.0)).device
    assert found.bandwidth[2] == pytest.approx((32 << 20) / 4.0)
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
    stats = OffloadStats("none", Account(100, Fixed(1, 2, 3), 4, 5), 15, 80, 800, 2.0, 4.0, 0.5, 1.5)
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
        "ideal_tokens_per_s": 4.0,
        "wait_s": 0.5,
        "compute_s": 1.5,
    }
