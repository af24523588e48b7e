"""The speed that a run within a budget should reach, and what the run did spend and read.

Leaves to others: the simulator and the bounds (`planning`), what reading and multiplying cost here (`calibration`), the
run itself (`run`).
Read more: tutorial 12; clauses GEN-18, CAL-4 to CAL-10.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from refinfer.clock import Clock
from refinfer.inventory import Inventory
from refinfer.offload.calibration import observed_calibration, product_seconds_per_byte
from refinfer.offload.streamed import StreamedSource
from refinfer.planning.account import Account
from refinfer.planning.cost import Calibration, Costs, costs_of
from refinfer.planning.optimal import locked_array, token_s
from refinfer.planning.plan import Plan
from refinfer.planning.report import simulate_plan
from refinfer.process import usable_cores
from refinfer.trace import Recorder

__all__ = ["CHECK_S_PER_BYTE", "Meter", "OffloadStats", "Prediction", "observe", "predict"]

_TELLING_BYTES: Final = 32 << 20  # reading less than this shows too little about a disk
_TELLING_TOKENS: Final = 8  # from the rates of this many tokens, the rest is estimated
_SPREAD: Final = 1.5  # a range is this factor to both sides; `bench offload` counts the runs that are in it
CHECK_S_PER_BYTE: Final = 0.5e-9
"""What checking costs: the CRC-32 of zlib takes in about 2 GB/s (`refinfer bench start --json`, `check_alone_s`)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The speed that a run should reach, known before its first token.

    `token_s` is the simulator's time for a token with the costs of `calibration`; `io_bound` means that reading a
    token's chunks takes longer than its products.
    """

    token_s: float
    io_bound: bool
    calibration: Calibration

    @property
    def range_tokens_per_s(self) -> tuple[float, float] | None:
        """The speeds between which most runs end; None if costs are assumed, which says nothing about this machine."""
        return None if self.calibration.assumed else (1 / self.token_s / _SPREAD, _SPREAD / self.token_s)


class Meter:
    """What the tokens of a generation took, but for the first, which reads the prompt.

    A token's time is split into waiting for chunks and computing. Beside it, threads read: a token's reading is the
    time that each of `threads` spent on it. `best_compute_s` and `best_read_s` are the shortest of any token.
    """

    def __init__(self, recorder: Recorder, threads: int) -> None:
        self._recorder = recorder
        self._threads = max(threads, 1)
        self._first: list[tuple[float, float]] = []  # computing and reading, for as many tokens as an estimate takes
        self.best_compute_s = self.best_read_s = math.inf

    @contextmanager
    def token(self, *, first: bool) -> Iterator[None]:
        """Measure a token; the first one begins a generation, and forgets what was measured before."""
        if first:
            self._first, self.best_compute_s, self.best_read_s = [], math.inf, math.inf
        recorder = self._recorder
        started, waited = recorder.clock.now(), recorder.wait_s
        read = recorder.read_s(started)
        yield
        if not first:
            ended = recorder.clock.now()
            compute_s = ended - started - (recorder.wait_s - waited)
            read_s = (recorder.read_s(ended) - read) / self._threads
            self.best_compute_s, self.best_read_s = min(self.best_compute_s, compute_s), min(self.best_read_s, read_s)
            if len(self._first) < _TELLING_TOKENS:
                self._first.append((compute_s, read_s))

    @property
    def ideal_token_s(self) -> float | None:
        """The seconds that no run at these rates can beat: the best computing or the best reading, the longer."""
        return max(self.best_compute_s, self.best_read_s) if self._first else None

    def estimate_s(self, inventory: Inventory, plan: Plan) -> float | None:
        """Return the seconds of a token by the simulator, at the rates of the first tokens; None if they are too few.

        These rates were seen while threads read and products were computed side by side, so what both share, cores,
        memory and Python's lock, is in them.
        """
        if len(self._first) < _TELLING_TOKENS:
            return None
        locked = locked_array(inventory, plan.locked)
        compute_s, read_s = (sum(seconds) / _TELLING_TOKENS for seconds in zip(*self._first, strict=True))
        streamed = np.where(locked, 0, inventory.sizes)
        reads = self._threads * read_s * streamed / max(streamed.sum(), 1)
        costs = Costs(reads, compute_s * inventory.sizes / inventory.sizes.sum())
        return token_s(costs, locked, max(plan.ring_slots, 1), plan.prefetch_threads)


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """What a run under a budget spent and read, and the speeds, in tokens per second, to compare its own with.

    `peak_bytes` is the most of the budget that was in use at once, `wait_s` how long the computation waited for
    chunks. `predicted_tokens_per_s` was known before the first token, and most runs end within
    `predicted_range_tokens_per_s`; `assumed` names what it took from a table, and then there is no range.
    `estimated_tokens_per_s` comes from the rates of the first eight tokens after the prompt. No run at the best rates
    that this one saw beats `ideal_tokens_per_s`. What a generation is too short for is None.
    """

    plan: str
    account: Account
    peak_bytes: int
    streamed_bytes_per_token: int
    read_bytes_total: int
    predicted_tokens_per_s: float
    predicted_range_tokens_per_s: tuple[float, float] | None
    assumed: tuple[str, ...]
    estimated_tokens_per_s: float | None
    ideal_tokens_per_s: float | None
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
    computing_s = sum(costs.compute_s)
    checking_s = CHECK_S_PER_BYTE * float(inventory.sizes[~locked].sum())
    shared_s = (computing_s + checking_s) / usable_cores()  # products and checks share the cores
    return Prediction(max(run.token_s, shared_s), reading_s > computing_s, calibration)
