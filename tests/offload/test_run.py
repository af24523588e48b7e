"""Specifies `refinfer.offload.run`: a run acquires its account, opens its file, and adds up what it spent."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from refinfer.arrays import Float32Array
from refinfer.clock import RealClock
from refinfer.errors import BudgetError, CacheFileError, DamagedWeightsError, GenerationError, RequestError
from refinfer.generate import load
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.sampler import Sampling, sample
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer
from refinfer.offload import run as run_module
from refinfer.offload.budget import Budget
from refinfer.offload.prediction import Prediction
from refinfer.offload.run import BudgetedRun, PlannedRun, Within, open_run, plan_run
from refinfer.offload.store import FileStore
from refinfer.packing.formats import FORMATS
from refinfer.packing.layout import Bytes
from refinfer.packing.product import GemmScratch
from refinfer.planning.account import THREAD_BYTES, staged_chunk_nbytes
from refinfer.planning.cost import HERE, Calibration, costs_of
from refinfer.planning.plan import Prefetch
from refinfer.trace import KINDS

sys.path.insert(0, str(Path(__file__).parent))
from packed_model import PackedModel, change, threads_and_descriptors

POSITIONS: Final = 24
PYTHON_BYTES: Final = 50_000
"""Room for the objects of Python's own, which tracemalloc counts with the arrays."""

every_number_of_threads = pytest.mark.parametrize("threads", [0, 2])


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = threads_and_descriptors()
    yield
    if threads_and_descriptors() - before:
        gc.collect()  # slow
    assert not threads_and_descriptors() - before


@pytest.fixture
def model(tiny_folder: Path, tiny_config: ModelConfig, tmp_path: Path) -> PackedModel:
    """A model, and a cache file of its own."""
    model = PackedModel(tiny_config, tiny_folder, "int8", tmp_path / "cache", POSITIONS)
    assert model.chunks
    return model


def planned(model: PackedModel, threads: int = 0, plan: str = "leading", **options: Any) -> PlannedRun:
    """Return a run that locks about half of the weights."""
    budget = (model.smallest + model.most) // 2 + threads * THREAD_BYTES
    within = Within(budget, plan, Prefetch(threads), **options)
    return plan_run(within, model.inventory, POSITIONS, model.built)


def opened(model: PackedModel, run: PlannedRun) -> BudgetedRun:
    return open_run(run, model.keys, RealClock(), quiet=True)


# Acquired before it is made.


@pytest.mark.spec("BUDGET-1", "OFFLOAD-8", "PLAN-1")
@every_number_of_threads
def test_every_part_of_the_account_is_acquired_before_any_of_it_is_made(
    threads: int, model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked chunks, vectors and ring are the source's; the KV cache and the activations are the transformer's."""
    events: list[object] = []

    class Noted(Budget):
        def acquire_all(self, parts: Mapping[str, int]) -> None:
            super().acquire_all(parts)
            events.append(dict(parts))

    def noting(make: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            events.append(make.__name__)
            return make(*arguments, **options)

        return noted

    usual = replace(model, chunk_nbytes=None)  # as `load` cuts chunks
    budget, path = usual.smallest + 3 * int(usual.inventory.sizes.max()) + threads * THREAD_BYTES, str(model.file)
    folder, options = model.folder, {"max_positions": POSITIONS, "prefetch_threads": threads, "weights": "int8"}
    load(folder, weight_cache=path, **options).close()  # type: ignore[arg-type]
    monkeypatch.setattr(run_module, "Budget", Noted)
    for name in ("FileStore", "PackedFile", "StreamedSource"):
        monkeypatch.setattr(run_module, name, noting(getattr(run_module, name)))
    monkeypatch.setattr("refinfer.engine.Transformer", noting(Transformer))
    with load(folder, weight_cache=path, budget=budget, plan="balanced", **options) as session:  # type: ignore[arg-type]
        list(session.generate(token_ids=[1, 2, 3], max_tokens=2))
        stats = session.stats
    assert stats is not None
    assert stats.offload is not None
    parts = stats.offload.account.parts
    packing = {"packing": stats.offload.account.fixed.packing}
    assert events == [packing, parts, "FileStore", "PackedFile", "StreamedSource", "Transformer"]
    assert set(parts) == {"locked", "resident", "ring", "KV cache", "scratch", "threads"}
    assert [part for part, nbytes in parts.items() if not nbytes] == ([] if threads else ["threads"])
    assert stats.offload.peak_bytes == sum(parts.values()) <= budget


@pytest.mark.spec("BUDGET-1", "OFFLOAD-8")
def test_a_run_that_cannot_acquire_its_account_opens_no_file_and_counts_nothing(model: PackedModel) -> None:
    run = planned(model)
    run = replace(run, path=model.file.with_name("missing"), budget=Budget(run.plan.account.fixed.total))
    with pytest.raises(BudgetError, match="of the budget of"):
        opened(model, run)
    assert (run.budget.in_use, run.budget.peak) == (0, 0)


# Damage that is found while it is opened.


def damage(model: PackedModel, run: PlannedRun, what: str) -> None:
    change(model.file, model.vectors.offset if what == "vectors" else model.chunks[max(run.plan.locked)].offset)


@pytest.mark.spec("OFFLOAD-9", "OPEN-7")
@pytest.mark.parametrize("what", ["locked", "vectors"])
@every_number_of_threads
def test_damage_in_what_is_read_at_the_start_removes_the_file(threads: int, what: str, model: PackedModel) -> None:
    run = planned(model, threads)
    damage(model, run, what)
    with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
        opened(model, run)
    assert not model.file.exists()


@pytest.mark.spec("OFFLOAD-9", "OPEN-7")
@pytest.mark.parametrize("what", ["locked", "vectors"])
@every_number_of_threads
def test_a_file_that_takes_the_place_of_the_damaged_one_meanwhile_is_not_removed(
    threads: int, what: str, model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, real = model.file.with_name("good"), FileStore.read
    shutil.copy(model.built, good)
    content = good.read_bytes()
    run = planned(model, threads)
    damage(model, run, what)

    def read(store: FileStore, offset: int, into: Bytes) -> None:
        if good.exists():
            good.replace(model.file)
        real(store, offset, into)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "read", read)
        with pytest.raises(DamagedWeightsError, match="does not agree with its checksum"):
            opened(model, run)
    assert model.file.read_bytes() == content
    opened(model, planned(model, threads)).source.close()


@pytest.mark.spec("GEN-18", "CAL-8", "CAL-9")
@every_number_of_threads
def test_the_speeds_of_a_run_are_tokens_per_second_and_the_ideal_is_the_fastest(
    threads: int, model: PackedModel
) -> None:
    run = opened(model, planned(model, threads))
    stats = run.stats(2.0, 0.0)
    assert stats.predicted_tokens_per_s * run.prediction.token_s == pytest.approx(1)
    assert (stats.ideal_tokens_per_s, stats.estimated_tokens_per_s) == (None, None)
    assert (stats.wait_s, stats.compute_s) == (0.0, 2.0)
    started = run.recorder.clock.now()
    for token in range(9):
        with run.meter.token(first=token == 0):
            for _ in run.source.chunks(0, len(model.inventory.cycle)):
                pass
        started = run.recorder.clock.now() if token == 0 else started
    token_s = (run.recorder.clock.now() - started) / 8
    stats = run.stats(2.0, 0.0)
    run.source.close()
    assert stats.ideal_tokens_per_s is not None
    assert stats.ideal_tokens_per_s >= 1 / token_s
    assert stats.estimated_tokens_per_s is not None
    assert stats.estimated_tokens_per_s * run.meter.estimate_s(model.inventory, run.planned.plan) == pytest.approx(1)  # type: ignore[operator]


@pytest.mark.spec("OFFLOAD-9", "OPEN-7")
def test_a_file_of_another_format_that_is_put_there_while_it_is_opened_is_not_removed(
    model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(model, format="bf16", file=model.file.with_name("other"))
    content = other.built.read_bytes()

    class Replaced(FileStore):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            other.file.replace(path)

    monkeypatch.setattr(run_module, "FileStore", Replaced)
    with pytest.raises(DamagedWeightsError, match="was replaced while it was opened"):
        opened(model, planned(model))
    assert model.file.read_bytes() == content


@pytest.mark.spec("OFFLOAD-9", "ERR-1")
def test_a_file_that_is_cut_short_before_it_is_opened_is_one_named_error(model: PackedModel) -> None:
    run, size = planned(model), model.file.stat().st_size
    os.truncate(model.file, size // 2)
    with pytest.raises(DamagedWeightsError, match=f"it has {size // 2} bytes instead of {size}; start again") as caught:
        opened(model, run)
    assert str(model.file) in str(caught.value)


@pytest.mark.spec("OFFLOAD-9", "STORE-3")
@every_number_of_threads
def test_a_disk_that_fails_at_the_start_is_one_named_error(
    threads: int, model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    run = planned(model, threads)
    with FileStore(model.file) as store:
        monkeypatch.setattr(FileStore, "_read", fails)
        monkeypatch.setattr(run_module, "FileStore", lambda _: store)
        with pytest.raises(GenerationError, match="cannot be read: Input/output error; if that lasts, remove it"):
            opened(model, run)


@pytest.mark.spec("GEN-16")
def test_a_file_that_another_process_removes_between_preparing_and_opening_is_rebuilt(
    model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = run_module.open_run, list[Path]()

    def removing(run: PlannedRun, *arguments: Any, **options: Any) -> BudgetedRun:
        if not removed:
            removed.append(run.path)
            run.path.unlink()
        return real(run, *arguments, **options)

    monkeypatch.setattr("refinfer.engine.open_run", removing)
    with load(model.folder, weights="int8", weight_cache=model.file, budget="400%", max_positions=4) as session:
        assert removed == [model.file]
        assert session.weight_cache.state == "built"
        assert "was removed while it was opened" in str(session.weight_cache.reason)


@pytest.mark.spec("STORE-3")
def test_a_file_that_is_there_but_cannot_be_opened_is_not_called_removed(
    model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> FileStore:
        raise CacheFileError(f"{path} cannot be read: Too many open files")

    run = planned(model, 0)
    monkeypatch.setattr(run_module, "FileStore", refuse)
    with pytest.raises(CacheFileError, match="cannot be read: Too many open files"):
        opened(model, run)


@pytest.mark.spec("GEN-16")
def test_a_file_that_is_cut_short_between_preparing_and_opening_is_rebuilt(
    model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, cut = run_module.open_run, list[Path]()

    def cutting(run: PlannedRun, *arguments: Any, **options: Any) -> BudgetedRun:
        if not cut:
            cut.append(run.path)
            os.truncate(run.path, 3 * 4096)
        return real(run, *arguments, **options)

    monkeypatch.setattr("refinfer.engine.open_run", cutting)
    with load(model.folder, weights="int8", weight_cache=model.file, budget="400%", max_positions=4) as session:
        assert cut == [model.file]
        assert session.weight_cache.state == "built"
        assert "bytes instead of" in str(session.weight_cache.reason)


@pytest.mark.spec("OFFLOAD-11", "FETCH-8")
@every_number_of_threads
def test_a_run_whose_prediction_fails_leaves_no_thread_and_no_descriptor(
    threads: int, model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    run, before = planned(model, threads), threads_and_descriptors()
    monkeypatch.setattr(run_module, "predict", fails)
    with pytest.raises(MemoryError):
        opened(model, run)
    assert not threads_and_descriptors() - before
    assert model.file.exists()


# What a run is and spends.


@pytest.mark.spec("GEN-15", "BUDGET-3")
def test_a_budget_is_a_number_of_bytes_a_size_or_a_share(model: PackedModel) -> None:
    nbytes = (model.smallest + model.most) // 2
    for budget in (nbytes, f"{nbytes}", f"{100 * nbytes / model.inventory.streamable_nbytes:.9f}%"):
        run = plan_run(Within(budget, prefetch=Prefetch(0)), model.inventory, POSITIONS, model.built)
        assert abs(run.budget.limit - nbytes) <= 1
        assert run.plan.account.budget == run.budget.limit
        assert run.budget.in_use == 0
    for too_small in (model.smallest - 1, 1, 0, -1):
        with pytest.raises(BudgetError, match="the smallest that works"):
            plan_run(Within(too_small, prefetch=Prefetch(0)), model.inventory, POSITIONS, model.built)
    with pytest.raises(BudgetError, match="a budget is a size"):
        plan_run(Within("much"), model.inventory, POSITIONS, model.built)
    with pytest.raises(RequestError, match="the plan must be one of"):
        plan_run(Within(nbytes, "best"), model.inventory, POSITIONS, model.built)


@pytest.mark.spec("CAL-4")
def test_a_run_with_a_limited_disk_is_planned_for_that_disk(model: PackedModel) -> None:
    rate = 1e6
    run = planned(model, disk_bandwidth=rate)
    assert set(run.calibration.device.bandwidth.values()) == {rate}
    assert run.plan.token_s > planned(model).plan.token_s


@pytest.mark.spec("CAL-5")
@pytest.mark.parametrize("measured", [False, True])
def test_a_run_learns_from_its_locked_chunks_what_products_cost_unless_that_was_measured(
    measured: bool, model: PackedModel
) -> None:
    known = Calibration(HERE.device, HERE.processor, measured=measured)
    run = opened(model, replace(planned(model), calibration=known))
    run.source.close()
    assert run.source.lock_s > 0
    assert ("processor" in run.stats(1.0, 0.0).assumed) == measured
    assert (run.prediction.calibration == known) == measured


@pytest.mark.spec("TRACE-5")
@pytest.mark.parametrize("traced", [False, True])
def test_a_run_keeps_its_reads_and_products_if_it_is_traced(traced: bool, model: PackedModel) -> None:
    run = opened(model, planned(model, traced=traced))
    Transformer(run.source, POSITIONS).decode([9])
    run.source.close()
    assert {span.kind for span in run.recorder.trace.spans} == (set(KINDS) if traced else set())


@pytest.mark.spec("GEN-18", "OFFLOAD-7")
@pytest.mark.parametrize("paged", [False, True])
def test_a_run_reports_what_it_read_waited_for_and_computed(paged: bool, model: PackedModel) -> None:
    run = opened(model, planned(model, paged=paged))
    try:
        account = run.planned.plan.account
        transformer = Transformer(run.source, POSITIONS)
        transformer.decode([9])
        before, waited = run.store.bytes_read, run.recorder.wait_s
        for n in range(3):
            transformer.decode([n])
        stats = run.stats(seconds=9.0, waited_before=waited)
        streamed = model.inventory.streamable_nbytes - account.locked
        assert stats.streamed_bytes_per_token == streamed
        rows = 3 * 2 * 4096
        a_token = model.inventory.streamable_nbytes if paged else streamed
        assert 3 * a_token < stats.read_bytes_total - before <= 3 * a_token + rows
        assert stats.read_bytes_total == run.store.bytes_read
        assert stats.peak_bytes == sum(account.parts.values()) == run.planned.budget.peak
        assert waited > 0
        assert 0 < stats.wait_s == run.recorder.wait_s - waited < 9
        assert stats.compute_s == pytest.approx(9 - stats.wait_s)
        assert run.stats(seconds=0.0, waited_before=0.0).compute_s == 0
        assert stats.predicted_tokens_per_s == 1 / run.prediction.token_s
        assert stats.predicted_range_tokens_per_s == run.prediction.range_tokens_per_s
        assert stats.assumed == run.prediction.calibration.assumed
        assert len(run.source.locked) == (0 if paged else len(run.planned.plan.locked))
    finally:
        run.source.close()


# What is counted for scratch, and what is taken.


SAMPLING: Final = Sampling(1.0, top_p=0.999)


@dataclass
class Taken:
    """The bytes that parts of a run took: those that stay, and the most that was in use for a while."""

    stays: int = 0
    passing: int = 0

    def measure(self, work: Callable[[], Any], *, less: int = 0) -> Any:
        """Do `work`, and count what it leaves allocated, except for `less` bytes, and what it freed again."""
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = work()
        now, peak = tracemalloc.get_traced_memory()
        self.stays += now - before - less
        self.passing = max(self.passing, peak - now)
        return result


@pytest.mark.spec("PLAN-15", "PACK-26")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", [40, 300])
@pytest.mark.parametrize("name", list(FORMATS))
def test_scratch_is_at_least_what_a_run_takes_and_at_most_a_tenth_more(
    name: str, positions: int, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        SHAPES["smollm-135m"], num_hidden_layers=1, vocab_size=3000, tie_word_embeddings=tied,
        max_position_embeddings=512,
    )  # fmt: skip
    write_checkpoint(tmp_path / "m", config, dtype="f32")
    model = PackedModel(config, tmp_path / "m", name, tmp_path / "cache", positions, None)
    within = Within(model.smallest, "none", Prefetch(0))
    run = opened(model, plan_run(within, model.inventory, positions, model.built))
    sample(Transformer(run.source, positions).prefill([7]), SAMPLING, np.random.default_rng(0))  # imports what it needs
    most, real = [0], GemmScratch.take

    def take(scratch: GemmScratch, *shape: int) -> Float32Array:
        taken = real(scratch, *shape)
        most[0] = max(most[0], scratch.used)
        return taken

    monkeypatch.setattr(GemmScratch, "take", take)
    kept, drawn = Taken(), Taken()
    tracemalloc.start()
    try:
        kv_cache = run.planned.plan.account.fixed.kv_cache
        transformer = kept.measure(lambda: Transformer(run.source, positions), less=kv_cache)
        logits = kept.measure(lambda: transformer.prefill([7] * (positions - 1)))
        kept.measure(lambda: transformer.decode([7]), less=4 * config.vocab_size)
        drawn.measure(lambda: sample(logits, SAMPLING, np.random.default_rng(0)))
    finally:
        tracemalloc.stop()
        run.source.close()
    staged = staged_chunk_nbytes(model.inventory)
    taken = 4 * most[0] + staged + kept.stays + kept.passing + drawn.passing
    counted = run.planned.plan.account.fixed.scratch
    assert taken <= counted + PYTHON_BYTES
    assert counted <= 1.1 * taken


# Bounds.


@pytest.mark.spec("PLAN-1", "ERR-1")
def test_a_session_has_0_to_64_threads_and_a_ring_of_at_least_two_chunks(model: PackedModel) -> None:
    usual = replace(model, chunk_nbytes=None)
    slot = int(usual.inventory.sizes.max())

    def opened_with(threads: int, ring: int | None) -> None:
        budget = usual.smallest + 3 * slot + max(0, threads) * THREAD_BYTES
        load(
            usual.folder, weights="int8", weight_cache=usual.file, budget=budget, max_positions=POSITIONS, plan="none",
            prefetch_threads=threads, prefetch_ring=ring,
        ).close()  # fmt: skip

    for threads in (0, 1, 64):
        for ring in (None, 2 * slot, 5 * slot):
            opened_with(threads, ring)
    for threads in (-1, 65):
        with pytest.raises(RequestError, match=f"there can be 0 to 64 prefetch threads, not {threads}"):
            opened_with(threads, None)
    for ring in (0, 2 * slot - 1, 6 * slot):
        with pytest.raises(RequestError, match="a ring must hold 2 to 4096 chunks"):
            opened_with(2, ring)


@pytest.mark.spec("STORE-5")
def test_a_run_with_a_disk_bandwidth_waits_on_its_clock_and_one_without_does_not(model: PackedModel) -> None:
    class Noted(RealClock):
        def __init__(self) -> None:
            self.slept = 0.0

        def sleep(self, seconds: float) -> None:
            self.slept += seconds

    for rate, waits in ((None, False), (1e6, True)):
        clock = Noted()
        run = open_run(planned(model, disk_bandwidth=rate), model.keys, clock, quiet=True)
        run.source.close()
        assert (clock.slept > 0) == waits


@pytest.mark.spec("CAL-4")
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_plan_rests_on_what_reads_cost_with_its_own_number_of_threads(
    threads: int, model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    right = costs_of

    def noted(inventory: Any, calibration: Any, prefetch_threads: int = 2) -> Any:
        seen.append(prefetch_threads)
        return right(inventory, calibration, prefetch_threads=prefetch_threads)

    monkeypatch.setattr("refinfer.offload.run.costs_of", noted)
    planned(model, threads)
    assert seen == [threads]


@pytest.mark.spec("CAL-11")
@pytest.mark.parametrize(
    ("many", "io_bound", "same", "locks", "expected"),
    [
        (2, False, True, True, True),
        (1, False, True, True, False),
        (2, True, True, True, False),
        (2, False, False, True, False),
        (2, False, True, False, False),
    ],
)
def test_threads_are_tried_if_there_are_several_products_are_the_limit_and_locked_chunks_show_the_same_bits(
    many: int, io_bound: bool, same: bool, locks: bool, expected: bool, model: PackedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(run_module, "same_bits", lambda *_: same)
    run = opened(model, planned(model, plan="leading" if locks else "none"))
    assert bool(run.source.locked) == locks
    run = replace(run, prediction=Prediction(1.0, io_bound, run.prediction.calibration))
    assert run.may_try_threads(many) == expected
    run.source.close()
