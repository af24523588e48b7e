"""Rows that describe a plan or a sweep of plans, for tables, JSON and pictures.

Turns plans, simulations and bounds into rows. Leaves to others: terminals, files.
Read more: tutorials 09, 11; clauses PLAN-12, SIM-9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from refinfer.errors import BudgetError, PlanFunctionError
from refinfer.inventory import Inventory
from refinfer.planning.account import Fixed
from refinfer.planning.cost import Calibration, Costs, costs_of, units_of
from refinfer.planning.locks import Lock
from refinfer.planning.optimal import locked_array, token_s
from refinfer.planning.page_cache import belady_misses, lru_misses
from refinfer.planning.plan import PLANS, Plan, Prefetch, make_plan
from refinfer.planning.simulate import Ring, Simulation, Synchronous, simulate

__all__ = ["MMAP_SHARE", "layer_rows", "plan_row", "simulate_plan", "sweep_rows"]

MMAP_SHARE: Final = 1 / 2.8
"""The share of the disk's bandwidth that page faults reach: the middle of the paper's 2.6 to 3 (section 5)."""


def plan_row(inventory: Inventory, plan: Plan) -> dict[str, Any]:
    """Return a plan as a row: where the bytes of its budget go, and the speed it is predicted to reach."""
    return (
        {"plan": plan.name}
        | plan.account.to_json()
        | {
            "ring_chunks": plan.ring_slots,
            "unused_bytes": plan.account.unused,
            "streamed_bytes_per_token": inventory.streamable_nbytes - plan.account.locked,
            "locked_chunks": len(plan.locked),
            "chunks": len(inventory.sizes),
            "predicted_tokens_per_s": 1 / plan.token_s,
            "ideal_tokens_per_s": 1 / plan.ideal_token_s,
        }
    )


def layer_rows(inventory: Inventory, plan: Plan) -> list[dict[str, Any]]:
    """Return the bytes of each kind of matrix in each layer, and how many of them are locked."""
    locked_nbytes = inventory.sizes * locked_array(inventory, plan.locked)
    return [
        {
            "layer": matrix.layer,
            "kind": matrix.kind,
            "bytes": matrix.layout.padded_nbytes,
            "locked_bytes": int(locked_nbytes[numbers].sum()),
        }
        for matrix, numbers in zip(inventory.matrices, inventory.chunks_of_matrix, strict=True)
    ]


def simulate_plan(inventory: Inventory, plan: Plan, costs: Costs, *, traced: bool = False) -> Simulation:
    """Run a plan on the virtual clock."""
    units, threads = units_of(inventory, costs, locked_array(inventory, plan.locked)), plan.prefetch_threads
    gate = Ring(max(plan.ring_slots, 1)) if threads else Synchronous()
    return simulate(units, gate, prefetch_threads=max(threads, 1), traced=traced)


def sweep_rows(
    inventory: Inventory,
    fixed: Fixed,
    budgets: Sequence[int],
    calibration: Calibration,
    prefetch_threads: int,
    names: Sequence[str | Lock] = PLANS,
) -> Iterator[dict[str, Any]]:
    """Yield, for each budget, tokens per second of every plan, of reading without threads, and of mmap.

    `mmap` is an LRU page cache with the bytes that the plans have for ring and locks; it reads at `MMAP_SHARE` of the
    bandwidth. `belady` is the best possible page cache; it reads at the whole bandwidth, one read at a time. Budgets
    that are too small are left out. `names` are the plans: the seven, and perhaps a person's own, which has None where
    it fails: it was made for another budget.
    """
    costs = costs_of(inventory, calibration, prefetch_threads=prefetch_threads)
    one_read = costs_of(inventory, calibration, prefetch_threads=1)
    sizes = inventory.sizes.tolist()
    computing, reading = float(costs.compute_s.sum()), float(one_read.read_s.sum())

    def made(name: str | Lock, budget: int) -> Plan | None:
        try:
            return make_plan(name, inventory, fixed, budget, costs, Prefetch(prefetch_threads))
        except PlanFunctionError:
            return None

    for budget in budgets:
        try:
            plans = {str(name): made(name, budget) for name in names}
        except BudgetError:
            continue
        row: dict[str, Any] = {
            "budget_bytes": budget,
            "budget_share": budget / inventory.streamable_nbytes,
            "tokens_per_s": {name: plan and 1 / plan.token_s for name, plan in plans.items()},
            "unused_bytes": {name: plan and plan.account.unused for name, plan in plans.items()},
        }
        best = plans["optimal"]
        assert best is not None
        locked = locked_array(inventory, best.locked)
        cache = min(budget - fixed.total, inventory.streamable_nbytes)
        share = reading / inventory.streamable_nbytes
        row["tokens_per_s"] |= {
            "synchronous": 1 / token_s(one_read, locked, best.ring_slots, 0),
            "mmap": 1 / (computing + lru_misses(sizes, cache) * share / MMAP_SHARE),
            "belady": 1 / (computing + belady_misses(sizes, cache) * share) if len(sizes) <= _LONGEST_BELADY else None,
        }
        row["ideal_tokens_per_s"] = 1 / best.ideal_token_s
        yield row


_LONGEST_BELADY: Final = 400  # chunks; its time grows with their square
