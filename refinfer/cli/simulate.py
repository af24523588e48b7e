"""The command `simulate`: a timeline of two tokens on the virtual clock, a sweep over budgets, the paper's experiment.

Leaves to others: what is asked (`cli.planning`), the simulator (`planning.simulate`), pictures (`trace`).
Read more: tutorial 11; clauses CLI-15 to CLI-17, CLI-21.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

from refinfer.cli.pictures import SVG_BEGINS, to_rows, to_svg
from refinfer.cli.planning import Question, add_question, format_rate, plans_to_show, question_of
from refinfer.cli.show import write_file
from refinfer.cli.table import print_table
from refinfer.cli.terminal import PIPE_COLUMNS, columns_of, say, say_terms, words_of, wrap
from refinfer.errors import RequestError
from refinfer.planning.locks import Lock
from refinfer.planning.paper import PUBLISHED, paper_rows
from refinfer.planning.report import plan_row, simulate_plan, sweep_rows
from refinfer.trace import Trace
from refinfer.units import format_nbytes

__all__ = ["add_simulate", "run_simulate"]

_SWEEP: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_COLOURS: Final = {"read": "blue", "compute": "green", "wait": "red"}
_LEGEND: Final = " " * 10
_ARMS: Final = {
    "attn-first": "the plan attention-first",
    "sync": "the locks of optimal, and each chunk read on demand",
    "mmap": "a page cache of the same size",
    "ideal": "a bound that no run with the locks of optimal can beat",
}


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `refinfer simulate`."""
    parser.set_defaults(run=run_simulate)
    add_question(parser)
    parser.add_argument(
        "--paper", action="store_true", help="show FlexInfer's own experiment, next to the gains that it reports"
    )


def run_simulate(args: argparse.Namespace) -> None:
    """Run `refinfer simulate`."""
    if args.paper:
        _run_paper(args)
        return
    question = question_of(args)
    inventory, plan = question.inventory, question.plan(args.plan)
    run = simulate_plan(inventory, plan, question.costs, traced=True)
    title = f"{question.name}, {inventory.format}, {plan.name} within {format_nbytes(question.budget)}: two tokens"
    if args.svg is not None:
        write_file(args.svg, SVG_BEGINS, to_svg(run.trace, title))
    sweep = _sweep(question, plans_to_show(args.plan))
    if args.json:
        found = {"token_s": run.token_s, "wait_s": run.wait_s, "sweep": sweep}
        print(json.dumps(question.to_json() | plan_row(inventory, plan) | found))
        return
    _print_timeline(title, run.trace)
    spent = f"{1e3 * run.token_s:,.1f} ms for each token, {1e3 * run.wait_s:,.1f} ms of that waiting for the disk"
    print(*wrap(words_of(spent), columns_of(sys.stdout) or PIPE_COLUMNS, _LEGEND, _LEGEND), sep="\n")
    _print_sweep(sweep)
    say(question.assumptions)


def _sweep(question: Question, plans: Sequence[str | Lock]) -> list[dict[str, Any]]:
    """Return what every plan reaches within budgets from the smallest to one that everything fits."""
    total = question.inventory.streamable_nbytes
    least, most = question.smallest_budget, question.fixed.total + total
    budgets = [least, *(int(share * total) for share in _SWEEP if least < share * total < most), most]
    threads = question.prefetch.threads
    return list(sweep_rows(question.inventory, question.fixed, budgets, question.calibration, threads, plans))


def _print_timeline(title: str, trace: Trace) -> None:
    """Print a line for each lane: blocks if the terminal shows their colours, else the first letter of each kind."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=columns_of(sys.stdout) or PIPE_COLUMNS)
    in_colour = console.color_system is not None and not console.no_color
    colour_of = {kind[0]: colour for kind, colour in _COLOURS.items()}
    say(title)
    for lane, row in to_rows(trace, max(console.width - 12, 1)):
        text = Text(f"{lane:>9} ")
        for letter, run in groupby(row):
            shown = ("█" if in_colour else letter) if letter != " " else "·"
            text.append(shown * len(list(run)), style=colour_of.get(letter, "dim"))
        console.print(text)
    legend = Text(_LEGEND)
    for kind, colour in _COLOURS.items():
        legend.append(f"{'█' if in_colour else kind[0]} {kind}   ", style=colour)
    legend.rstrip()
    console.print(legend)


def _print_sweep(sweep: list[dict[str, Any]]) -> None:
    arms = [arm for arm in sweep[0]["tokens_per_s"] if arm != "belady"]
    short = {"attention-first": "attn-first", "synchronous": "sync"}
    print_table(
        "Predicted tokens/s, by budget",
        ["budget", "share", *(short.get(arm, arm) for arm in arms), "ideal"],
        [
            [
                format_nbytes(row["budget_bytes"]),
                f"{row['budget_share']:.0%}",
                *(format_rate(row["tokens_per_s"][arm]) for arm in arms),
                format_rate(row["ideal_tokens_per_s"]),
            ]
            for row in sweep
        ],
        keys=2,
    )
    say_terms(_ARMS)


def _run_paper(args: argparse.Namespace) -> None:
    if any(option is not None for option in (args.model, args.shape, args.budget, args.svg, args.device)):
        raise RequestError("--paper has models, budgets and devices of its own; give it alone or with --json")
    rows = list(paper_rows())
    if args.json:
        print(json.dumps({"published": dict(PUBLISHED), "rows": rows}))
        return
    shares = sorted({row["compute_share"] for row in rows})
    columns = ["gain", *(f"compute {share:.0%}" for share in shares), "published"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        table = []
        for gain, published in PUBLISHED.items():
            found: dict[float, list[float]] = {share: [] for share in shares}
            for row in rows:
                if row["shape"] == shape:
                    found[row["compute_share"]].append(row[gain])
            table.append([gain, *(f"{min(gains):.2f} - {max(gains):.2f}" for gains in found.values()), published])
        title = f"{shape}, 4.5 bits, budgets from the window alone to 90% locked"
        print_table(title, columns, table, prose=["published"])
    say_terms({"compute": "how long the products of a token take, compared with reading all weights once"})
    say("refinfer/planning/paper.py lists what is assumed")
