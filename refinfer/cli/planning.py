"""The options that `plan` and `simulate` share, as one value: a question about a run within a memory budget.

Combines a model, a budget and a disk. Leaves to others: plans (`planning`), what is shown (`plan`, `simulate`).
Read more: tutorials 09, 11; clauses CLI-14 to CLI-16.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refinfer.cli.options import MODEL, add_json, add_plan_choice, add_prefetch, add_weights, integer
from refinfer.cli.pictures import SVG_BEGINS
from refinfer.cli.show import open_model, require_writable
from refinfer.errors import RequestError
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.model.folder import DEFAULT_POSITIONS
from refinfer.offload.budget import parse_budget
from refinfer.offload.calibration import calibration_file, known_calibration
from refinfer.packing.formats import FORMATS
from refinfer.planning.account import Fixed, fixed_of
from refinfer.planning.cost import DEVICES, PREFETCH_THREADS, Calibration, Costs, costs_of
from refinfer.planning.locks import Lock
from refinfer.planning.plan import PLANS, Plan, Prefetch, make_plan, smallest_budget
from refinfer.prepare import choose_format

__all__ = ["Question", "add_question", "format_rate", "plans_to_show", "question_of"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about the model called `name`: the plan, the budget, how chunks are read, and at what cost."""

    name: str
    inventory: Inventory
    positions: int
    fixed: Fixed
    budget: int
    prefetch: Prefetch
    calibration: Calibration
    costs: Costs

    @property
    def smallest_budget(self) -> int:
        """The smallest budget that works."""
        return smallest_budget(self.inventory, self.fixed)

    def plan(self, name: str | Lock) -> Plan:
        """Return one of the seven plans, or a person's own.

        Raises:
            BudgetError: the budget is too small.
            PlanFunctionError: a person's own function gives no mask that fits.
        """
        return make_plan(name, self.inventory, self.fixed, self.budget, self.costs, self.prefetch)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that `plan` and `simulate` print about the model and the machine."""
        return {
            "model": self.name,
            "format": self.inventory.format,
            "positions": self.positions,
            "prefetch_threads": self.prefetch.threads,
            "device": self.calibration.device.name,
            "device_source": self.calibration.device.source,
            "processor": self.calibration.processor.name,
            "processor_source": self.calibration.processor.source,
            "measured": self.calibration.measured,
            "streamable_bytes": self.inventory.streamable_nbytes,
        }

    @property
    def assumptions(self) -> str:
        """A line that says where the figures of disk and processor come from."""
        device, processor = self.calibration.device, self.calibration.processor
        if self.calibration.measured:
            return f"disk and processor as measured here: {device.source}"
        return f"assuming: disk {device.name} ({device.source}); processor {processor.name} ({processor.source})"


def plans_to_show(chosen: str | Lock) -> tuple[str | Lock, ...]:
    """Return the seven plans, and after them the chosen one if it is a person's own."""
    return PLANS if chosen in PLANS else (*PLANS, chosen)


def add_question(parser: argparse.ArgumentParser) -> None:
    """Add the options that `plan` and `simulate` share."""
    parser.add_argument("--model", metavar="DIR", help=f"{MODEL}; give this or --shape")
    parser.add_argument("--shape", metavar="NAME", choices=SHAPES, help=f"a published shape: {', '.join(SHAPES)}")
    add_weights(parser, "auto, which is bf16 for bfloat16 checkpoints and for shapes, and f32 for others")
    parser.add_argument(
        "--budget",
        metavar="B",
        help="memory to run in: 300MB, 1.5GiB, 40%% of the packed weights, or auto, which is nine tenths of what is "
        "left (default: 50%%, or the smallest that works if that is more)",
    )
    parser.add_argument(
        "--positions",
        metavar="N",
        type=integer(1),
        help=f"number of positions in the KV cache (default: {DEFAULT_POSITIONS}, or the model's limit if smaller)",
    )
    add_plan_choice(parser, "plan to show", default="optimal")
    add_prefetch(parser, default=PREFETCH_THREADS)
    parser.add_argument(
        "--device",
        metavar="NAME",
        choices=DEVICES,
        help=f"disk to assume: {', '.join(DEVICES)} (default: the one that refinfer bench calibrate measured here, or "
        "virtual-disk)",
    )
    parser.add_argument("--svg", metavar="FILE", help="draw a picture, in SVG, into this file")
    add_json(parser)


def question_of(args: argparse.Namespace) -> Question:
    """Return what the arguments ask.

    Raises:
        InputError: both or neither of a model and a shape are given, a value cannot be used, or a picture would replace
            another file.
    """
    if args.svg is not None:
        require_writable(args.svg, SVG_BEGINS)
    name, inventory = _inventory(args)
    longest = inventory.config.longest_request
    positions = args.positions or min(DEFAULT_POSITIONS, longest)
    if positions > longest:
        raise RequestError(f"--positions must be from 1 to this model's {longest}, not {positions}")
    fixed = fixed_of(inventory, positions, args.prefetch_threads)
    file = calibration_file()
    calibration = known_calibration(file, (file or Path()).parent, args.device)  # of the disk that has the cache files
    return Question(
        name=name,
        inventory=inventory,
        positions=positions,
        fixed=fixed,
        budget=_budget(args.budget, inventory, fixed),
        prefetch=Prefetch(args.prefetch_threads, args.prefetch_ring),
        calibration=calibration,
        costs=costs_of(inventory, calibration, prefetch_threads=args.prefetch_threads),
    )


def _inventory(args: argparse.Namespace) -> tuple[str, Inventory]:
    """Return the model that the arguments name, and what its file would hold; no weights are needed."""
    if args.model is None and args.shape is None:
        raise RequestError("a model is missing; give --model DIR or --shape NAME")
    if args.model is not None and args.shape is not None:
        raise RequestError("--model and --shape were both given; give one of them")
    if args.shape is not None:
        weights = "bf16" if args.weights == "auto" else args.weights  # what such models are published in
        return args.shape, Inventory(SHAPES[args.shape], weights)
    model = open_model(args.model)
    weights = args.weights if args.weights in FORMATS else choose_format(model.checkpoint(), "auto")
    return str(Path(args.model)), Inventory(model.config, weights)


def _budget(text: str | None, inventory: Inventory, fixed: Fixed) -> int:
    """Return the budget asked for; if none is, half of the weights, or the least that works if that is more."""
    if text is not None:
        return parse_budget(text, inventory.streamable_nbytes)
    return max(inventory.streamable_nbytes // 2, smallest_budget(inventory, fixed))


def format_rate(tokens_per_s: float | None) -> str:
    """Return tokens per second as a table shows them; nothing for None."""
    if tokens_per_s is None:
        return ""
    return f"{tokens_per_s:,.1f}" if tokens_per_s >= 10 else f"{tokens_per_s:#.3g}"
