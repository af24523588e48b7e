"""A run within a memory budget: plans it, opens it, predicts its speed, and adds up what it spent.

Puts the pieces of this room together. Leaves to others: the cache file (`prepare`), which must exist already, and the
transformer (`engine`).
Read more: tutorial 12; clauses GEN-15, GEN-18, OFFLOAD-8, OPEN-7, CAL-11.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from refinfer.clock import Clock
from refinfer.errors import CacheFileError, DamagedWeightsError
from refinfer.inventory import Inventory
from refinfer.model.transformer import prefill_block
from refinfer.offload.budget import Budget, parse_budget
from refinfer.offload.calibration import calibration_file, known_calibration, same_bits, slower
from refinfer.offload.packed_file import PackedFile
from refinfer.offload.prediction import Meter, OffloadStats, Prediction, observe, predict
from refinfer.offload.store import FileStore, ThrottledStore
from refinfer.offload.streamed import StreamedSource
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import Calibration, costs_of
from refinfer.planning.locks import Lock
from refinfer.planning.plan import Plan, Prefetch, make_plan
from refinfer.trace import Recorder
from refinfer.weight_cache.format import MAGIC
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.publish import discard

__all__ = ["BudgetedRun", "PlannedRun", "Within", "open_run", "plan_run"]


@dataclass(frozen=True, slots=True)
class Within:
    """A memory budget, and how a run keeps it.

    `budget` is a number of bytes, a size such as `300MB`, a share of the matrices such as `60%`, or `auto`.
    `disk_bandwidth` limits the bytes read per second. `paged` replaces locked chunks and ring by a page cache, for
    comparison. `traced` records when each chunk was read, computed and waited for.
    """

    budget: float | str
    plan: str | Lock = "optimal"
    prefetch: Prefetch = field(default_factory=Prefetch)
    disk_bandwidth: float | None = None
    paged: bool = False
    traced: bool = False


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run before any byte is read: what was asked for, the model and its file, and what was decided.

    `calibration` is what reading and multiplying cost on this machine; `budget` counts the bytes in use.
    """

    within: Within
    inventory: Inventory
    max_positions: int
    path: Path
    calibration: Calibration
    plan: Plan
    budget: Budget


@dataclass(frozen=True, slots=True)
class BudgetedRun:
    """A run that has begun: its weights, the speed it should reach, and what it has read and waited for."""

    planned: PlannedRun
    source: StreamedSource
    prediction: Prediction
    store: FileStore
    recorder: Recorder
    meter: Meter

    def may_try_threads(self, many: int) -> bool:
        """Return whether products are the limit, and have the same bits with one BLAS thread and with `many`."""
        source = self.source
        is_limit = many > 1 and not self.prediction.io_bound and bool(source.locked)
        return is_limit and same_bits(self.planned.inventory, source.locked, source.scratch, many)

    def stats(self, seconds: float, waited_before: float) -> OffloadStats:
        """Return what a generation of `seconds` spent; `waited_before` is how long the run had waited before it."""
        plan, waited = self.planned.plan, self.recorder.wait_s - waited_before
        return OffloadStats(
            plan=plan.name,
            account=plan.account,
            peak_bytes=self.planned.budget.peak,
            streamed_bytes_per_token=self.planned.inventory.streamable_nbytes - plan.account.locked,
            read_bytes_total=self.store.bytes_read,
            predicted_tokens_per_s=1 / self.prediction.token_s,
            predicted_range_tokens_per_s=self.prediction.range_tokens_per_s,
            assumed=self.prediction.calibration.assumed,
            estimated_tokens_per_s=_rate(self.meter.estimate_s(self.planned.inventory, plan)),
            ideal_tokens_per_s=_rate(self.meter.ideal_token_s),
            wait_s=waited,
            compute_s=max(0.0, seconds - waited),
        )


def _rate(token_s: float | None) -> float | None:
    return 1 / token_s if token_s else None


def plan_run(within: Within, inventory: Inventory, max_positions: int, path: Path) -> PlannedRun:
    """Decide what a run with the cache file at `path` spends its budget on.

    Raises:
        BudgetError: the budget is not a size or a share, or too small.
        RequestError: there is no such plan, or an impossible ring.
    """
    limit, prefetch = within.budget, within.prefetch
    nbytes = limit if type(limit) is int else parse_budget(limit, inventory.streamable_nbytes)
    calibration = slower(known_calibration(calibration_file(), path), within.disk_bandwidth)
    costs = costs_of(inventory, calibration, prefetch_threads=prefetch.threads)
    fixed = fixed_of(inventory, max_positions, prefetch.threads)
    plan = make_plan(within.plan, inventory, fixed, nbytes, costs, prefetch)
    return PlannedRun(within, inventory, max_positions, path, calibration, plan, Budget(nbytes))


# --8<-- [start:open]
def open_run(planned: PlannedRun, keys: Mapping[str, PackKey], clock: Clock, *, quiet: bool) -> BudgetedRun:
    """Count the account's parts against the budget, read what is locked, begin to prefetch, and predict the speed.

    `quiet` means that no file was written just before. If one was, the system may still be writing it to the disk, and
    how fast chunks are read shows nothing.

    Raises:
        BudgetError: the account does not fit the budget.
        CacheFileError: the file cannot be opened.
        DamagedWeightsError: what was read is damaged, and the file is removed unless another has replaced it; or the
            file is gone.
    """
    within, inventory, plan = planned.within, planned.inventory, planned.plan
    planned.budget.acquire_all(plan.account.parts)
    with ExitStack() as undo:
        try:
            store = FileStore(planned.path)
        except CacheFileError:
            if planned.path.exists():
                raise
            # Another process found it damaged, and has removed it.
            raise DamagedWeightsError(f"{planned.path} was removed while it was opened") from None
        undo.callback(store.close)
        rate = within.disk_bandwidth
        file = PackedFile(planned.path, inventory, keys, store if rate is None else ThrottledStore(store, rate, clock))
        recorder = Recorder(clock, traced=within.traced)
        most_rows = prefill_block(inventory.config, planned.max_positions)
        try:
            source = StreamedSource(file, plan, recorder, most_rows, paged=within.paged)
        except DamagedWeightsError:
            discard(planned.path, MAGIC, store.is_at)  # the file, if it still is the one that was read
            raise
        undo.callback(source.close)
        calibration = planned.calibration
        if not calibration.measured:  # learn from how the locked chunks were read, and multiply them for a moment
            calibration = observe(calibration, inventory, source, plan, clock, quiet=quiet)
        prediction = predict(inventory, plan, calibration, paged=within.paged)
        undo.pop_all()
    return BudgetedRun(planned, source, prediction, store, recorder, Meter(recorder, plan.prefetch_threads))


# --8<-- [end:open]
