"""The command `plan`: where every byte of a budget goes, what is locked, and all plans next to each other.

Leaves to others: what is asked (`cli.planning`), how plans are made (`planning.plan`).
Read more: tutorial 09; clauses CLI-14, CLI-16.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Final

from refinfer.cli.pictures import SVG_BEGINS, plan_svg
from refinfer.cli.planning import Question, add_question, format_rate, plans_to_show, question_of
from refinfer.cli.show import write_file
from refinfer.cli.table import print_table
from refinfer.cli.terminal import PIPE_COLUMNS, columns_of, say, words_of
from refinfer.planning.plan import Plan
from refinfer.planning.report import layer_rows, plan_row
from refinfer.units import format_nbytes

__all__ = ["add_plan", "run_plan"]

_STRIP: Final = " ▁▂▃▄▅▆▇█"
_BESIDE_LAYERS: Final = 27  # columns for the kind, its locked share, and the frame
_FEWEST_LAYERS: Final = 16


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the options of `refinfer plan`."""
    parser.set_defaults(run=run_plan)
    add_question(parser)


def run_plan(args: argparse.Namespace) -> None:
    """Run `refinfer plan`."""
    question = question_of(args)
    inventory = question.inventory
    plans = {str(name): question.plan(name) for name in plans_to_show(args.plan)}
    chosen = plans[str(args.plan)]
    if args.svg is not None:
        write_file(args.svg, SVG_BEGINS, plan_svg(inventory, chosen))
    rows = [plan_row(inventory, plan) for plan in plans.values()]
    layers = layer_rows(inventory, chosen)
    if args.json:
        found = {
            "smallest_budget_bytes": question.smallest_budget,
            "plan": chosen.name,
            "plans": rows,
            "layers": layers,
        }
        print(json.dumps(question.to_json() | found))
        return
    _print_account(question, chosen)
    _print_locks(layers)
    _print_plans(rows)
    say(question.assumptions)


def _print_account(question: Question, plan: Plan) -> None:
    account, inventory = plan.account, question.inventory
    about = (
        f"in {inventory.format}: {format_nbytes(inventory.streamable_nbytes)} of matrices, "
        f"plan {plan.name} within {format_nbytes(account.budget)}"
    )
    print_table(
        [question.name, *words_of(about)],
        ["what", "bytes", "of the budget"],
        [
            [what, f"{nbytes:,}", f"{nbytes / account.budget:.1%}"]
            for what, nbytes in (account.parts | {"unused": account.unused}).items()
        ],
    )


def _print_locks(layers: list[dict[str, Any]]) -> None:
    """Print how much of each layer is locked: in equal parts if there are too many for the columns of the terminal."""
    n_layers = max(row["layer"] for row in layers)  # the last one is the output table, which counts as a layer
    room = max((columns_of(sys.stdout) or PIPE_COLUMNS) - _BESIDE_LAYERS, _FEWEST_LAYERS)
    step = -(-n_layers // -(-n_layers // room))
    starts = range(0, n_layers, step)
    table = []
    for kind in dict.fromkeys(row["kind"] for row in layers):
        rows = [row for row in layers if row["kind"] == kind]
        strip = "".join(_STRIP[round(8 * row["locked_bytes"] / row["bytes"])] for row in rows)
        locked = sum(row["locked_bytes"] for row in rows) / sum(row["bytes"] for row in rows)
        parts = [strip[i : i + step] for i in starts] if len(rows) > 1 else [""] * (len(starts) - 1) + [strip]
        table.append([kind, f"{locked:.0%}", *(f"|{part}|" if part else "" for part in parts)])
    names = [f"layers {i} to {min(i + step, n_layers) - 1}" for i in starts]
    names = names if len(names) > 1 else ["layers, first to last"]
    print_table("Locked, by kind, and layer by layer", ["kind", "locked", *names], table, keys=2)


def _print_plans(rows: list[dict[str, Any]]) -> None:
    print_table(
        "All plans within this budget",
        ["plan", "locked", "ring", "streamed per token", "unused", "predicted tokens/s", "ideal"],
        [
            [
                row["plan"],
                format_nbytes(row["locked_bytes"]),
                format_nbytes(row["ring_bytes"]),
                format_nbytes(row["streamed_bytes_per_token"]),
                format_nbytes(row["unused_bytes"]),
                format_rate(row["predicted_tokens_per_s"]),
                format_rate(row["ideal_tokens_per_s"]),
            ]
            for row in rows
        ],
    )
