"""The speed that a run within a budget should reach, and what the run did spend and read.

Leaves to others: the simulator and the bounds (`planning`), what reading and multiplying cost here (`calibration`), the
run itself (`run`).
Read more: tutorial 12; clauses GEN-18, CAL-4 to CAL-6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from refinfer.clock import Clock
from refinfer.inventory import Inventory
from refinfer.offload.calibration import observed_calibration, product_seconds_per_byte
from refinfer.offload.streamed import StreamedSource
from refinfer.planning.account import Account
from refinfer.planning.cost import Calibration, costs_of, ideal_token_s
from refinfer.planning.optimal import locked_array
from refinfer.planning.plan import Plan
from refinfer.planning.report import simulate_plan

__all__ = ["OffloadStats", "Prediction", "observe", "predict"]

_TELLING_BYTES: Final = 32 << 20  # reading less than this shows too little about a disk


@dataclass(frozen=True, slots=True)
class Prediction:
    """The speed that a run should reach, known before its first token.

    `token_s` is the simulator's time for a token with the costs of `calibration`, `ideal_token_s` the bound that no run
    with these locks can beat; `io_bound` means that reading a token's chunks takes longer than its products.
    """

    token_s: float
    ideal_token_s: float
    io_bound: bool
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """What a run under a budget spent and read.

    `peak_bytes` is the most of the budget that was in use at once, `wait_s` how long the computation waited for
    chunks. The predicted and the ideal tokens per second come from the run's `Prediction`.
    """

    plan: str
    account: Account
    peak_bytes: int
    streamed_bytes_per_token: int
    read_bytes_total: int
    predicted_tokens_per_s: float
    ideal_tokens_per_s: float
    wait_s: float
    compute_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the command line's JSON."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "account"}
        return {"plan": fields.pop("plan")} | self.account.to_json() | fields


def observe(
    calibration: Calibration, inventory: Inventory, source: StreamedSource, plan: Plan, clock: Clock, *, quiet: bool
) -> Calibration:
    """Return the calibration with what reading and multiplying the locked chunks has shown, if it was enough.

    `quiet` means that no file was written just before, so that the system is not still writing it to the disk.
    """
    nbytes = sum(inventory.cycle[number].padded_nbytes for number in source.locked)
    enough = quiet and nbytes >= _TELLING_BYTES and source.lock_s > 0
    return observed_calibration(
        calibration,
        inventory.format,
        plan.prefetch_threads,
        nbytes / source.lock_s if enough else None,
        product_seconds_per_byte(inventory, source.locked, source.scratch, clock),
    )


def predict(inventory: Inventory, plan: Plan, calibration: Calibration, *, paged: bool) -> Prediction:
    """Simulate what a run with this plan will do; `paged` means that it locks nothing and reads on demand."""
    if paged:
        plan = replace(plan, locked=frozenset(), prefetch_threads=0)
    costs = costs_of(inventory, calibration, prefetch_threads=plan.prefetch_threads)
    locked = locked_array(inventory, plan.locked)
    run = simulate_plan(inventory, plan, costs)
    reading_s = sum(costs.reads(locked)) / max(plan.prefetch_threads, 1)
    ideal_s = ideal_token_s(costs, locked, plan.prefetch_threads)
    return Prediction(run.token_s, ideal_s, reading_s > sum(costs.compute_s), calibration)
