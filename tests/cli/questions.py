"""What the tests ask `plan` and `simulate`, and what the answers must be made of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import calibration_of, costs_of
from refinfer.planning.plan import Plan, make_plan

__all__ = ["ABOUT_KEYS", "PLAN_KEYS", "SHAPE", "folder_named", "inventory_of", "plan_of"]

SHAPE = "stories15m"  # a model whose matrices are large compared with everything else

PLAN_KEYS = ["plan", "budget_bytes", "locked_bytes", "resident_bytes", "ring_bytes", "kv_cache_bytes", "scratch_bytes",
             "threads_bytes", "ring_chunks", "unused_bytes", "streamed_bytes_per_token", "locked_chunks", "chunks",
             "predicted_tokens_per_s", "ideal_tokens_per_s"]  # fmt: skip
ABOUT_KEYS = ["model", "format", "positions", "prefetch_threads", "device", "device_source", "processor",
              "processor_source", "measured", "streamable_bytes"]  # fmt: skip


def inventory_of(shape: str, weights: str = "bf16") -> Inventory:
    """Return what the file of a published shape holds."""
    return Inventory(SHAPES[shape], weights)


def plan_of(name: str, inventory: Inventory, positions: int, budget: int, device: str | None = None) -> Plan:
    """Return a plan with the costs that are assumed when nothing was measured."""
    costs = costs_of(inventory, calibration_of(device))
    return make_plan(name, inventory, fixed_of(inventory, positions), budget, costs)


def folder_named(name: str, tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a model folder under another name, if the file system takes it."""
    try:
        shutil.copytree(tiny_folder, tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    return tmp_path / name
