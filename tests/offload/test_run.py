"""Specifies `refinfer.offload.run`: a run acquires its account, opens its file, and adds up what it spent."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from refinfer.clock import RealClock
from refinfer.errors import BudgetError, DamagedWeightsError, GenerationError, RequestError
from refinfer.generate import load
from refinfer.model.config import ModelConfig
from refinfer.model.transformer import Transformer
from refinfer.offload import run as run_module
from refinfer.offload.budget import Budget
from refinfer.offload.run import BudgetedRun, PlannedRun, Within, open_run, plan_run
from refinfer.offload.store import FileStore
from refinfer.packing.layout import Bytes
from refinfer.planning.plan import Prefetch

sys.path.insert(0, str(Path(__file__).parent))
from packed_model import PackedModel, change, threads_and_descriptors

POSITIONS: Final = 24

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
    budget = (model.smallest + model.most) // 2
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
    budget, path = usual.smallest + 3 * int(usual.inventory.sizes.max()), str(model.file)
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
    assert events == [parts, "FileStore", "PackedFile", "StreamedSource", "Transformer"]
    assert set(parts) == {"locked chunks", "norms and biases", "ring", "KV cache", "scratch"}
    assert all(parts.values())
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


@pytest.mark.spec("GEN-18", "COST-3")
@every_number_of_threads
def test_the_speeds_of_a_run_are_tokens_per_second_and_the_ideal_is_the_fastest(
    threads: int, model: PackedModel
) -> None:
    run = opened(model, planned(model, threads))
    stats, prediction = run.stats(2.0, 0.0), run.prediction
    run.source.close()
    assert stats.predicted_tokens_per_s * prediction.token_s == pytest.approx(1)
    assert stats.ideal_tokens_per_s * prediction.ideal_token_s == pytest.approx(1)
    assert stats.ideal_tokens_per_s >= stats.predicted_tokens_per_s
    assert (stats.wait_s, stats.compute_s) == (0.0, 2.0)


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
    with load(model.folder, weights="int8", weight_cache=model.file, budget="150%", max_positions=4) as session:
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
        run = plan_run(Within(budget), model.inventory, POSITIONS, model.built)
        assert abs(run.budget.limit - nbytes) <= 1
        assert run.plan.account.budget == run.budget.limit
        assert run.budget.in_use == 0
    with pytest.raises(BudgetError, match="the smallest that works"):
        plan_run(Within(model.smallest - 1), model.inventory, POSITIONS, model.built)
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
        assert stats.ideal_tokens_per_s == 1 / run.prediction.ideal_token_s
        assert len(run.source.locked) == (0 if paged else len(run.planned.plan.locked))
    finally:
        run.source.close()
