"""The commands `plan` and `simulate`: what a budget leads to, before a byte is read.

Knows: how people ask for a model and a budget, tables, timelines on a terminal. Does not know: how plans are made.
Spec: CLI-14 to CLI-17. Tutorial: 09, 11.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from refinfer.bench.report import print_table
from refinfer.engine import fixed_of
from refinfer.errors import InputError, RequestError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.folder import open_folder, readable
from refinfer.offload.budget import parse_budget
from refinfer.offload.calibration import calibration_file, known_calibration
from refinfer.offload.cost import Calibration, costs_of
from refinfer.offload.inventory import Inventory
from refinfer.offload.paper import PUBLISHED, paper_rows
from refinfer.offload.plan import PLANS, Fixed, Plan, make_plan, smallest_budget
from refinfer.offload.report import layer_rows, plan_row, plan_svg, simulate_plan, sweep_rows
from refinfer.packing.formats import FORMATS
from refinfer.prepare import choose_format
from refinfer.process import format_nbytes
from refinfer.trace import Trace, to_rows, to_svg

__all__ = ["run_plan", "run_simulate", "write_file"]

_SWEEP: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_DEFAULT_POSITIONS: Final = 512
_STRIP: Final = " ▁▂▃▄▅▆▇█"


def _inventory(args: argparse.Namespace) -> tuple[str, Inventory]:
    """Return the model that the arguments name, and what its file would hold; no weights are needed.

    Raises:
        InputError: both or neither of a model and a shape are given, or one that cannot be used.
    """
    if (args.model is None) == (args.shape is None):
        raise RequestError("give either --model DIR or --shape NAME")
    if args.shape is not None:
        weights = "bf16" if args.weights == "auto" else args.weights  # what such models are published in
        return args.shape, Inventory(SHAPES[args.shape], weights)
    folder = Path(args.model)
    config: ModelConfig = open_folder(folder).config
    if args.weights in FORMATS:
        return str(folder), Inventory(config, args.weights)
    with readable(folder):
        return str(folder), Inventory(config, choose_format(open_checkpoint(folder), "auto"))


def _fixed(args: argparse.Namespace, inventory: Inventory) -> tuple[Fixed, int]:
    longest = inventory.config.longest_request
    positions = args.positions or min(_DEFAULT_POSITIONS, longest)
    if positions > longest:
        raise RequestError(f"positions must be from 1 to this model's {longest}, not {positions}")
    return fixed_of(inventory, positions), positions


def _budget(args: argparse.Namespace, inventory: Inventory, fixed: Fixed) -> int:
    """Return the budget asked for; where none is, half of the weights, or the least that works if that is more."""
    if args.budget is not None:
        return parse_budget(args.budget, inventory.streamable_nbytes)
    return max(inventory.streamable_nbytes // 2, smallest_budget(inventory, fixed))


def _calibration(args: argparse.Namespace) -> Calibration:
    """Return what was measured here, or the table's figures; the disk is that of the model, or of the cache files."""
    file = calibration_file()
    return known_calibration(file, Path(args.model or (file or Path()).parent), args.device)


def write_file(path: str, text: str) -> None:
    """Write a text that was asked for.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def _about(name: str, inventory: Inventory, positions: int, calibration: Calibration, readers: int) -> dict[str, Any]:
    return {
        "model": name,
        "format": inventory.format,
        "positions": positions,
        "prefetch_threads": readers,
        "device": calibration.device.name,
        "device_source": calibration.device.source,
        "processor": calibration.processor.name,
        "processor_source": calibration.processor.source,
        "measured": calibration.measured,
        "streamable_bytes": inventory.streamable_nbytes,
    }


def _assumed(calibration: Calibration) -> str:
    if calibration.measured:
        return f"as {calibration.device.source} has it for this disk and this processor"
    return (
        f"assuming: disk {calibration.device.name} ({calibration.device.source}); "
        f"processor {calibration.processor.name} ({calibration.processor.source})"
    )


def run_plan(args: argparse.Namespace) -> None:
    """Run `refinfer plan`."""
    name, inventory = _inventory(args)
    fixed, positions = _fixed(args, inventory)
    calibration = _calibration(args)
    budget = _budget(args, inventory, fixed)
    options: dict[str, Any] = {"readers": args.prefetch_threads, "ring_nbytes": args.prefetch_ring}
    costs = costs_of(inventory, calibration, readers=args.prefetch_threads)
    plans = {p: make_plan(p, inventory, fixed, budget, costs=costs, **options) for p in PLANS}
    chosen = plans[args.plan]
    if args.svg is not None:
        write_file(args.svg, plan_svg(inventory, chosen))
    rows = [plan_row(inventory, plan) for plan in plans.values()]
    if args.json:
        about = _about(name, inventory, positions, calibration, args.prefetch_threads)
        layers = layer_rows(inventory, chosen)
        smallest = smallest_budget(inventory, fixed)
        print(
            json.dumps(about | {"smallest_budget_bytes": smallest, "plan": args.plan, "plans": rows, "layers": layers})
        )
        return
    _print_account(name, inventory, chosen)
    _print_locks(inventory, chosen)
    print_table(
        "All plans within this budget",
        ["plan", "locked", "ring", "read per token", "unused", "predicted tokens/s", "ideal"],
        [
            [
                row["plan"],
                format_nbytes(row["locked_bytes"]),
                format_nbytes(row["ring_bytes"]),
                format_nbytes(row["streamed_bytes_per_token"]),
                format_nbytes(row["unused_bytes"]),
                _rate(row["predicted_tokens_per_s"]),
                _rate(row["ideal_tokens_per_s"]),
            ]
            for row in rows
        ],
    )
    print(_assumed(calibration))


def _print_account(name: str, inventory: Inventory, plan: Plan) -> None:
    account = plan.account
    parts = {
        "locked chunks": account.locked,
        "ring": account.ring,
        "norms and biases": account.resident,
        "KV cache": account.kv_cache,
        "activations and scratch": account.scratch,
        "unused": account.unused,
    }
    print_table(
        f"{name} in {inventory.format}: {format_nbytes(inventory.streamable_nbytes)} of matrices, "
        f"plan {plan.name} within {format_nbytes(account.budget)}",
        ["what", "bytes", "of the budget"],
        [[what, f"{nbytes:,}", f"{nbytes / account.budget:.1%}"] for what, nbytes in parts.items()],
    )


def _print_locks(inventory: Inventory, plan: Plan) -> None:
    rows = layer_rows(inventory, plan)
    kinds = dict.fromkeys(row["kind"] for row in rows)
    table = []
    for kind in kinds:
        of_kind = [row for row in rows if row["kind"] == kind]
        strip = "".join(_STRIP[round(8 * row["locked_bytes"] / row["bytes"])] for row in of_kind)
        locked = sum(row["locked_bytes"] for row in of_kind) / sum(row["bytes"] for row in of_kind)
        table.append([kind, f"{locked:.0%}", f"|{strip}|"])
    print_table("Locked, by kind, and layer by layer", ["kind", "locked", "layers, first to last"], table)


def _rate(tokens_per_s: float | None) -> str:
    if tokens_per_s is None:
        return ""
    return f"{tokens_per_s:,.1f}" if tokens_per_s >= 10 else f"{tokens_per_s:.3g}"


def run_simulate(args: argparse.Namespace) -> None:
    """Run `refinfer simulate`."""
    if args.paper:
        _run_paper(args)
        return
    name, inventory = _inventory(args)
    fixed, positions = _fixed(args, inventory)
    calibration = _calibration(args)
    readers = args.prefetch_threads
    total = inventory.streamable_nbytes
    budget = _budget(args, inventory, fixed)
    plan = make_plan(
        args.plan, inventory, fixed, budget, readers=readers, ring_nbytes=args.prefetch_ring, calibration=calibration
    )
    costs = costs_of(inventory, calibration, readers=readers)
    run = simulate_plan(inventory, plan, costs, readers, traced=True)
    title = f"{name}, {inventory.format}, {plan.name} within {format_nbytes(budget)}: two tokens"
    if args.svg is not None:
        write_file(args.svg, to_svg(run.trace, title))
    least, most = smallest_budget(inventory, fixed), fixed.total + total
    budgets = [least, *(int(share * total) for share in _SWEEP if least < share * total < most), most]
    sweep = list(sweep_rows(inventory, fixed, budgets, calibration, readers))
    if args.json:
        about = _about(name, inventory, positions, calibration, readers)
        print(
            json.dumps(
                about | plan_row(inventory, plan) | {"token_s": run.token_s, "wait_s": run.wait_s, "sweep": sweep}
            )
        )
        return
    _print_timeline(title, run.trace, run.token_s, run.wait_s)
    _print_sweep(sweep)
    print(_assumed(calibration))


def _print_timeline(title: str, trace: Trace, token_s: float, wait_s: float) -> None:
    colours = {"r": "blue", "c": "green", "w": "red"}
    letters = {"r": "read", "c": "compute", "w": "wait"}
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(Text(title))
    for lane, row in to_rows(trace, console.width - 12):
        text = Text(f"{lane:>9} ")
        for letter in row:
            shown = ("█" if sys.stdout.isatty() else letter) if letter != " " else "·"
            text.append(shown, style=colours.get(letter, "dim"))
        console.print(text)
    legend = Text(" " * 10)
    for letter, what in letters.items():
        legend.append(f"{letter if not sys.stdout.isatty() else '█'} {what}   ", style=colours[letter])
    console.print(legend)
    console.print(
        Text(f"{'':10}{1e3 * token_s:,.1f} ms for each token, of it {1e3 * wait_s:,.1f} ms waiting for the disk")
    )


def _print_sweep(sweep: list[dict[str, Any]]) -> None:
    arms = [*PLANS, "synchronous", "mmap"]
    short = {"attention-first": "attn-first", "synchronous": "sync"}
    print_table(
        "Predicted tokens/s by budget; sync has the locks of optimal; mmap is a page cache of the same size",
        ["budget", "share", *(short.get(arm, arm) for arm in arms), "ideal"],
        [
            [
                format_nbytes(row["budget_bytes"]),
                f"{row['budget_share']:.0%}",
                *(_rate(row["tokens_per_s"][arm]) for arm in arms),
                _rate(row["ideal_tokens_per_s"]),
            ]
            for row in sweep
        ],
    )


def _run_paper(args: argparse.Namespace) -> None:
    if any(option is not None for option in (args.model, args.shape, args.budget, args.svg, args.device)):
        raise RequestError("--paper has models, budgets and devices of its own; give it alone, or with --json")
    rows = list(paper_rows())
    if args.json:
        print(json.dumps({"published": dict(PUBLISHED), "rows": rows}))
        return
    shares = sorted({row["compute_share"] for row in rows})
    for shape in dict.fromkeys(row["shape"] for row in rows):
        table = []
        for gain, published in PUBLISHED.items():
            cells = []
            for share in shares:
                found = [row[gain] for row in rows if (row["shape"], row["compute_share"]) == (shape, share)]
                cells.append(f"{min(found):.2f} - {max(found):.2f}")
            table.append([gain, *cells, published])
        columns = ["gain", *(f"compute {share:.0%}" for share in shares), "published"]
        print_table(f"{shape}, 4.5 bits, budgets from the window alone to 90 % locked", columns, table)
    print(
        "compute: the products of a token beside reading all weights; refinfer/offload/paper.py lists what is assumed"
    )
