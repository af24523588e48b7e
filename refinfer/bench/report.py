"""What people read of a bench or of the machine: tables on a terminal.

Knows: the rows of each bench, rich. Does not know: how anything is measured, JSON text.
Spec: CLI-7, BENCH-3. Tutorial: 02.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from refinfer.bench.calibrate import CALIBRATE_STEPS, calibrate
from refinfer.bench.decode import DECODE_SHAPES, decode_rows
from refinfer.bench.matmul import ROWS_OF_X, SHAPES, machine_limits, matmul_rows
from refinfer.bench.offload import offload_bench, steps
from refinfer.bench.pack import PACK_ROUNDS, pack_bench_rows
from refinfer.bench.share import SHARE_STEPS, share_rows
from refinfer.bench.start import START_ROUNDS, start_bench
from refinfer.errors import RequestError
from refinfer.packing.formats import FORMATS
from refinfer.process import format_nbytes

__all__ = ["BENCHES", "Bench", "bench_of", "print_bench", "print_machine", "print_table"]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bench:
    """One bench: how it measures (told after each of its `steps`), and how a row of it is shown."""

    title: str
    steps: int
    measure: Callable[[Callable[[], None]], dict[str, Any]]
    columns: Mapping[str, Callable[[Row], str]]
    notes: str = ""


def _quartiles(row: Row) -> str:
    return " - ".join(f"{quartile:.2f}" for quartile in row["ratio_quartiles"])


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def bench_of(name: str, *, quick: bool = False, compute_heavy: bool = False) -> Bench:
    """Return a bench by its name; `quick` and `compute_heavy` are ways to run `offload`.

    Raises:
        RequestError: another bench has no such ways.
    """
    bench = BENCHES[name]
    if not (quick or compute_heavy):
        return bench
    if name != "offload":
        raise RequestError("--quick and --compute-heavy are for bench offload")
    return replace(
        bench,
        steps=steps(quick=quick, compute_heavy=compute_heavy),
        measure=lambda progress: offload_bench(quick=quick, compute_heavy=compute_heavy, progress=progress),
    )


def _matmul(progress: Callable[[], None]) -> dict[str, Any]:
    limits = machine_limits()
    return {"limits": limits, "rows": list(matmul_rows(limits=limits, progress=progress))}


BENCHES: Final[Mapping[str, Bench]] = MappingProxyType(
    {
        "calibrate": Bench(
            title="What reads and products cost here; refinfer plan, simulate and generate --budget use it from now on",
            steps=CALIBRATE_STEPS,
            measure=calibrate,
            columns={
                "what": lambda row: f"{row['what']} {row.get('format', '')}",
                "chunk": lambda row: format_nbytes(row["chunk_bytes"]),
                "threads or rows of x": lambda row: str(row.get("prefetch_threads", row.get("m"))),
                "GB/s": lambda row: f"{row['gb_per_s'] if 'gb_per_s' in row else 1 / row['ns_per_byte']:.2f}",
            },
            notes="""\
read     with checksums, as the prefetch threads read: a file of 256 MiB in the cache directory
product  of packed weights that come from memory, with one BLAS thread""",
        ),
        "decode": Bench(
            title="Decode, one BLAS thread, against a clean naive numpy decode",
            steps=len(DECODE_SHAPES),
            measure=lambda progress: {"rows": list(decode_rows(progress=progress))},
            columns={
                "hidden size x layers": lambda row: f"{row['hidden_size']} x {row['num_hidden_layers']}",
                "times as fast": lambda row: f"{row['ratio_to_naive']:.2f}",
                "quartiles": _quartiles,
                "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
                "naive tokens/s": lambda row: f"{row['naive_tokens_per_s']:,.0f}",
            },
        ),
        "matmul": Bench(
            title="x @ W.T, one BLAS thread, against the same on row-major float32 weights",
            steps=len(SHAPES) * len(ROWS_OF_X),
            measure=_matmul,
            columns={
                "format": lambda row: str(row["format"]),
                "M": lambda row: str(row["m"]),
                "N x K": lambda row: f"{row['n']} x {row['k']}",
                "times as fast": lambda row: f"{row['ratio_to_naive']:.2f}",
                "quartiles": _quartiles,
                "GB/s": lambda row: f"{row['gb_per_s']:.1f}",
                "GFLOP/s": lambda row: f"{row['gflop_per_s']:.1f}",
                "of the limit": lambda row: f"{row['fraction_of_limit']:.0%}",
            },
            notes="""\
f32-by-tiles  row-major weights, nothing packed: at M = 2 to 16 the gain comes from the call, not from the layout
f32-nr16/32   XNNPACK's own tile shapes (nr128: the same order, wider): their kernels want 16 or 32 outputs at once,
              BLAS wants long rows; from M = 64 on it repacks each narrow tile for itself, and loses up to half
int8-naive    q widened and scaled as a whole, then multiplied: it writes and reads four bytes for each one it has
4k-pages      both sides in small pages, as in a mapped file; all other rows in huge ones""",
        ),
        "offload": Bench(
            title="Tokens per second within a memory budget, 1.2 GB of float32 and its smaller formats",
            steps=steps(),
            measure=lambda progress: offload_bench(progress=progress),
            columns={
                "format": lambda row: str(row["format"]),
                "budget": lambda row: f"{row['budget_share']:.0%}",
                "arm": lambda row: str(row["arm"]) + (", 1 thread" if row["prefetch_threads"] == 1 else ""),
                "tokens/s": lambda row: f"{row['tokens_per_s']:.2f}",
                "predicted": lambda row: _maybe(row.get("predicted_tokens_per_s"), ".2f"),
                "ideal": lambda row: _maybe(row["ideal_tokens_per_s"], ".2f"),
                "of ideal": lambda row: _maybe(row["efficiency"], ".0%"),
                "overlap": lambda row: _maybe(row["overlap"], ".2f"),
                "bytes": lambda row: _maybe(row["byte_efficiency"], ".3f"),
                "read per token": lambda row: format_nbytes(row["read_bytes_per_token"]),
                "GB/s": lambda row: f"{row['read_bytes_per_s'] / 1e9:.2f}",
            },
            notes="""\
ideal    the longer of all products and the bytes that must stream, at the bandwidth of the read-only leg
overlap  the longer of the read-only and the compute-only leg, over the run
bytes    bytes that must stream over bytes that the plan streams
mmap     the same file mapped, in a control group with a real memory limit""",
        ),
        "pack": Bench(
            title="Packing, against a plain copy of the same rows",
            steps=PACK_ROUNDS,
            measure=lambda progress: {"rows": list(pack_bench_rows(progress=progress))},
            columns={
                "format": lambda row: str(row["format"]),
                "N x K": lambda row: f"{row['n']} x {row['k']}",
                "of a copy's speed": lambda row: f"{row['ratio_to_copy']:.2f}",
                "quartiles": _quartiles,
                "GB/s read": lambda row: f"{row['gb_per_s']:.1f}",
            },
        ),
        "start": Bench(
            title="From the start of loading to the first token: 0.95 GB of float32, one BLAS thread",
            steps=START_ROUNDS * len(FORMATS),
            measure=lambda progress: start_bench(progress=progress),
            columns={
                "format": lambda row: str(row["format"]),
                "mode": lambda row: str(row["mode"]) + ("" if row["verify"] else ", unchecked"),
                "page cache": lambda row: str(row["page_cache"]),
                "open": lambda row: f"{row['open_s'] * 1e3:,.1f} ms",
                "first token": lambda row: f"{row['time_to_first_token_s'] * 1e3:,.0f} ms",
                "times as soon": lambda row: f"{row['ratio_to_none']:.1f}",
                "peak memory": lambda row: format_nbytes(row["peak_rss_bytes"]),
            },
            notes="""\
none   packs into memory at each start
build  packs into the file: the first start; the digest of the original is known
load   maps the file: every later start; unchecked: without comparing checksums
cold   the original and the cache file taken out of the page cache (the host may still have them in its own)""",
        ),
        "share": Bench(
            title="Proportional set size of each of several processes with one model, 0.95 GB of float32",
            steps=SHARE_STEPS,
            measure=lambda progress: {"rows": list(share_rows(progress=progress))},
            columns={
                "format": lambda row: str(row["format"]),
                "processes": lambda row: str(row["processes"]),
                "weights": lambda row: "mapped" if row["mapped"] else "packed by each",
                "memory of each": lambda row: format_nbytes(row["pss_bytes"]),
            },
        ),
    }
)
"""Every bench by its name on the command line."""


def print_bench(bench: Bench, result: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Print the table of one bench, the machine, its limits where they were measured, and the bench's notes."""
    rows = [[show(row) for show in bench.columns.values()] for row in result["rows"]]
    print_table(bench.title, list(bench.columns), rows)
    blas = ", ".join(f"{library['name']} {library['version']}" for library in machine["blas"])
    print(f"on {machine['cpu']}, {machine['cores']} cores; numpy {machine['numpy']}, {blas}")
    if "limits" in result:
        limits = result["limits"]
        print(
            f"this core reads {limits['read_gb_per_s']:.1f} GB/s and multiplies "
            f"{limits['sgemm_gflop_per_s']:.0f} GFLOP/s"
        )
    if bench.notes:
        print(bench.notes)


def print_machine(machine: dict[str, Any]) -> None:
    """Print what `describe_machine` found, a line for each fact."""
    print_table("This machine", ["what", "value"], _flatten(machine))


def _flatten(value: dict[str, Any], prefix: str = "") -> list[list[str]]:
    rows: list[list[str]] = []
    for key, item in value.items():
        name = f"{prefix}{key.removesuffix('_bytes').replace('_', ' ')}"
        if isinstance(item, dict):
            rows += _flatten(item, f"{name}: ")
        elif isinstance(item, list):
            for part in item:
                rows += _flatten(part, f"{name}: ")
        else:
            rows.append([name, format_nbytes(item) if key.endswith("_bytes") and item is not None else _word(item)])
    return rows


def _word(item: object) -> str:
    if item is None:
        return "none or not known"
    return {True: "yes", False: "no"}[item] if isinstance(item, bool) else str(item)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; as wide as the terminal, or 120 columns in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
