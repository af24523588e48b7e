"""The commands `doctor` and `bench`: what this machine is, can do, and reaches, for people and as JSON.

Leaves to others: what there is to find out (`bench.machine`, `bench.abilities`), what a bench measures and how its rows
look (each bench).
Read more: tutorial 02; clauses CLI-7, CLI-22, BENCH-3, BENCH-13.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refinfer.bench.abilities import Ability, abilities
from refinfer.bench.entry import Bench
from refinfer.bench.machine import describe_machine
from refinfer.cli.options import add_json
from refinfer.cli.show import progress_bar
from refinfer.cli.table import Cell, print_table
from refinfer.cli.terminal import PIPE_COLUMNS, columns_of, say, say_terms, terms, words_of, wrap
from refinfer.units import format_nbytes

__all__ = ["add_bench", "add_doctor", "benches", "print_bench", "run_bench", "run_doctor"]


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add the options of `refinfer doctor`."""
    parser.set_defaults(run=run_doctor)
    add_json(parser)


def run_doctor(args: argparse.Namespace) -> None:
    """Run `refinfer doctor`."""
    machine = describe_machine(Path.cwd())
    verdicts = list(abilities(machine))
    if args.json:
        print(json.dumps(machine | {"abilities": [asdict(verdict) for verdict in verdicts]}))
        return
    print_table("This machine", ["what", "value"], list(_facts(machine)), keys=0, prose=["value"])
    _print_verdicts(verdicts)


def _facts(machine: Mapping[str, Any]) -> Iterator[list[Cell]]:
    folder, group = machine["folder"], machine["cgroup"]
    yield ["processor", machine["cpu"]]
    yield ["cores for this process", str(machine["cores"])]
    yield ["memory", _size(machine["memory_bytes"])]
    yield ["memory that is left", _size(machine["memory_available_bytes"])]
    yield ["control group", f"version {group['version']}" if group else "none"]
    if group and group["memory_limit_bytes"] is not None:
        yield ["memory limit of the group", _size(group["memory_limit_bytes"])]
        yield ["memory used by the group", _size(group["memory_used_bytes"])]
    yield ["limit on locked memory", _size(machine["memlock_limit_bytes"], "none, or not known")]
    yield ["page of memory", f"{machine['page_bytes']} bytes"]
    yield ["this folder", Path(folder["path"])]
    yield ["its file system", folder["file_system"] or "not known"]
    yield ["direct reads there", {True: "yes", False: "no", None: "cannot be tried"}[folder["direct_io"]]]
    yield ["read-ahead there", "not known" if folder["read_ahead_kb"] is None else f"{folder['read_ahead_kb']} kB"]
    for library in machine["blas"]:
        about = f"{library['name']} {library['version']}, {library['core']}, {library['threads']} threads"
        yield ["BLAS", about]
    yield ["numpy", machine["numpy"]]
    yield ["Python", machine["python"]]
    yield ["system", machine["system"]]


def _size(nbytes: int | None, unknown: str = "not known") -> str:
    return unknown if nbytes is None else format_nbytes(nbytes)


def _print_verdicts(verdicts: Sequence[Ability]) -> None:
    """Print two lines for each ability: whether it is there and why, and what needs it."""
    say("What this machine can do, and which commands need it")
    columns = columns_of(sys.stdout) or PIPE_COLUMNS
    for verdict in verdicts:
        answer = "yes  " if verdict.works else "no   "
        print(*wrap(words_of(f"{verdict.ability}: {verdict.why}"), columns, answer, " " * 5), sep="\n")
        *others, last = verdict.needed_by
        commands = [*(f"{name}," for name in others), last if verdict.works else f"{last}:"]
        without = [] if verdict.works else words_of(verdict.without)
        print(*wrap(["for", *commands, *without], columns, " " * 5, " " * 7), sep="\n")


def benches() -> dict[str, Bench]:
    """Return every bench by its name on the command line."""
    from refinfer.bench import calibrate, decode, matmul, offload, pack, share, start

    return {
        "calibrate": calibrate.BENCH,
        "decode": decode.BENCH,
        "matmul": matmul.BENCH,
        "offload": offload.BENCH,
        "pack": pack.BENCH,
        "start": start.BENCH,
        "share": share.BENCH,
    }


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add the benches of `refinfer bench`, each with its options."""
    parser.set_defaults(run=run_bench)
    names = parser.add_subparsers(metavar="NAME", required=True)
    for name, bench in benches().items():
        about = "\n".join([bench.summary, "", f"{bench.title}.", "", *terms(bench.notes)])
        command = names.add_parser(name, help=bench.summary, description=about)
        command.set_defaults(bench=bench)
        for flag, text in bench.flags.items():
            command.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=text)
        add_json(command, "print one JSON object, row by row")


def run_bench(args: argparse.Namespace) -> None:
    """Run `refinfer bench NAME`."""
    bench: Bench = args.bench
    flags = {flag: getattr(args, flag) for flag in bench.flags}
    machine = describe_machine(Path.cwd())
    with progress_bar("measuring", bench.steps(**flags)) as advance:
        result = bench.measure(lambda: advance(1), **flags)
        if args.json:
            _print_row_by_row({"machine": machine} | result)
        else:
            result["rows"] = list(result["rows"])
    if not args.json:
        print_bench(bench, result, machine)


def _print_row_by_row(result: dict[str, Any]) -> None:
    """Print one JSON object; its `rows` come last, each as soon as it is there."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"})
    sys.stdout.write(f'{head[:-1]}, "rows": [')
    for i, row in enumerate(result["rows"]):
        sys.stdout.write(("," if i else "") + "\n" + json.dumps(row))
        sys.stdout.flush()
    print("\n]}")


def print_bench(bench: Bench, result: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Print the table of one bench, the machine, its limits if they were measured, and the bench's notes."""
    rows = [[show(row) for show in bench.columns.values()] for row in result["rows"]]
    print_table(bench.title, list(bench.columns), rows, keys=bench.keys)
    blas = ", ".join(f"{library['name']} {library['version']}" for library in machine["blas"])
    say(f"on {machine['cpu']}, {machine['cores']} cores; numpy {machine['numpy']}, {blas}")
    for limits in result.get("limits", {}).get("by_threads", ()):
        say(
            f"BLAS threads: {limits['threads']}, which read {limits['read_gb_per_s']:.1f} GB/s, in small pages "
            f"{limits['read_4k_gb_per_s']:.1f} GB/s, and multiply {limits['sgemm_gflop_per_s']:.0f} GFLOP/s"
        )
    say_terms(bench.notes)
