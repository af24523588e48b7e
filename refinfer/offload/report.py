"""What a plan and a sweep of plans look like as rows: for tables, for JSON, for a picture.

Knows: plans, simulations, the bounds beside them. Does not know: terminals, files.
Spec: PLAN-12, SIM-9. Tutorial: 09, 11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

from refinfer.errors import BudgetError
from refinfer.offload.cost import Calibration, Costs, costs_of, ideal_token_s, units_of
from refinfer.offload.inventory import Inventory
from refinfer.offload.optimal import locked_array
from refinfer.offload.plan import PLANS, Fixed, Plan, make_plan
from refinfer.offload.simulate import Ring, Simulation, Synchronous, belady_misses, lru_misses, simulate

__all__ = ["MMAP_SHARE", "layer_rows", "plan_row", "plan_svg", "simulate_plan", "sweep_rows"]

MMAP_SHARE: Final = 1 / 2.8
"""How much of the disk's bandwidth page faults reach: the middle of the paper's 2.6 to 3 (FlexInfer, section 5)."""


def plan_row(inventory: Inventory, plan: Plan) -> dict[str, Any]:
    """Return where the bytes of a plan's budget go, and what it leads to."""
    account = plan.account
    return {
        "plan": plan.name,
        "budget_bytes": account.budget,
        "locked_bytes": account.locked,
        "resident_bytes": account.resident,
        "kv_cache_bytes": account.kv_cache,
        "scratch_bytes": account.scratch,
        "ring_bytes": account.ring,
        "ring_chunks": plan.ring_slots,
        "unused_bytes": account.unused,
        "streamed_bytes_per_token": inventory.streamable_nbytes - account.locked,
        "locked_chunks": len(plan.locked),
        "chunks": len(inventory.cycle),
        "predicted_tokens_per_s": 1 / plan.token_s,
        "ideal_tokens_per_s": 1 / plan.ideal_token_s,
    }


def layer_rows(inventory: Inventory, plan: Plan) -> list[dict[str, Any]]:
    """Return the bytes of each kind of matrix in each layer, and how many of them are locked."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for number, chunk in enumerate(inventory.cycle):
        empty = {"layer": chunk.layer, "kind": chunk.kind, "bytes": 0, "locked_bytes": 0}
        row = rows.setdefault((chunk.layer, chunk.kind), empty)
        row["bytes"] += chunk.padded_nbytes
        row["locked_bytes"] += chunk.padded_nbytes * (number in plan.locked)
    return list(rows.values())


def simulate_plan(inventory: Inventory, plan: Plan, costs: Costs, readers: int, *, traced: bool = False) -> Simulation:
    """Run a plan on the virtual clock."""
    units = units_of(inventory, costs, locked_array(inventory, plan.locked))
    gate = Ring(max(plan.ring_slots, 1)) if readers else Synchronous()
    return simulate(units, gate, readers=max(readers, 1), traced=traced)


def sweep_rows(
    inventory: Inventory, fixed: Fixed, budgets: Sequence[int], calibration: Calibration, readers: int
) -> Iterator[dict[str, Any]]:
    """Yield, for each budget, tokens per second of every plan, of reading without threads, and of mmap.

    mmap is an LRU page cache of what the plans have for ring and locks, read at `MMAP_SHARE` of the bandwidth;
    `belady` the best page cache possible, at all of it, one read at a time. A budget too small is left out.
    """
    costs = costs_of(inventory, calibration, readers=readers)
    sizes = inventory.sizes.tolist()
    computing, reading = sum(costs.compute_s), sum(costs_of(inventory, calibration).read_s)
    for budget in budgets:
        try:
            plans = [make_plan(name, inventory, fixed, budget, readers=readers, costs=costs) for name in PLANS]
        except BudgetError:
            continue
        row: dict[str, Any] = {
            "budget_bytes": budget,
            "budget_share": budget / inventory.streamable_nbytes,
            "tokens_per_s": {plan.name: 1 / plan.token_s for plan in plans},
            "unused_bytes": {plan.name: plan.account.unused for plan in plans},
        }
        best = next(plan for plan in plans if plan.name == "optimal")
        cache = min(budget - fixed.total, inventory.streamable_nbytes)
        share = reading / inventory.streamable_nbytes
        row["tokens_per_s"] |= {
            "synchronous": 1 / simulate_plan(inventory, best, costs_of(inventory, calibration), 0).token_s,
            "mmap": 1 / (computing + lru_misses(sizes, cache) * share / MMAP_SHARE),
            "belady": 1 / (computing + belady_misses(sizes, cache) * share) if len(sizes) <= _LONGEST_BELADY else None,
        }
        row["ideal_tokens_per_s"] = 1 / ideal_token_s(costs, locked_array(inventory, best.locked), readers)
        yield row


_LONGEST_BELADY: Final = 400  # chunks; its time grows with their square
_CELL: Final = 14
_LEFT: Final = 96


def plan_svg(inventory: Inventory, plan: Plan) -> str:
    """Return a picture of a plan: a column for each layer, a row for each kind, the locked part of each cell filled.

    The same plan gives the same bytes.
    """
    rows = layer_rows(inventory, plan)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    layers = max(row["layer"] for row in rows) + 1
    width, height = max(_LEFT + _CELL * layers + 20, 420), 84 + 22 * len(kinds)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20" font-size="14" font-weight="bold">{escape(plan.name)}, layer by layer</text>',
        f'<rect x="{_LEFT}" y="30" width="12" height="12" fill="#59a14f"/>',
        f'<text x="{_LEFT + 17}" y="40">locked</text>',
        f'<rect x="{_LEFT + 80}" y="30" width="12" height="12" fill="#4c78a8" fill-opacity="0.35"/>',
        f'<text x="{_LEFT + 97}" y="40">read for each token</text>',
    ]
    for i, kind in enumerate(kinds):
        lines.append(f'<text x="{_LEFT - 8}" y="{68 + 22 * i}" text-anchor="end">{kind}</text>')
    for row in rows:
        x, y = _LEFT + _CELL * row["layer"], 54 + 22 * kinds.index(row["kind"])
        filled = 18 * row["locked_bytes"] / row["bytes"]
        about = f"layer {row['layer']}, {row['kind']}: {row['locked_bytes']:,} of {row['bytes']:,} bytes locked"
        lines.append(
            f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="18" fill="#4c78a8" fill-opacity="0.35">'
            f"<title>{about}</title></rect>"
        )
        if filled:
            top = y + 18 - filled
            lines.append(f'<rect x="{x}" y="{top:.2f}" width="{_CELL - 2}" height="{filled:.2f}" fill="#59a14f"/>')
    bottom = 66 + 22 * len(kinds)
    lines += [
        f'<text x="{_LEFT + _CELL * layer + 6}" y="{bottom}" text-anchor="middle">{layer}</text>'
        for layer in range(0, layers, 5 if layers <= 60 else 10)
    ]
    lines.append(f'<text x="{_LEFT - 8}" y="{bottom}" text-anchor="end">layer</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"
