"""The tables of the figures page are recomputed from the committed output of their commands."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refinfer.planning.paper import paper_rows

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "figures.md").read_text()
ROWS: list[dict[str, Any]] = json.loads((DOCS / "figures" / "matmul.json").read_text())["rows"]
HASWELL: list[dict[str, Any]] = json.loads((DOCS / "figures" / "matmul_haswell.json").read_text())["rows"]
ROWS_OF_X = (1, 2, 4, 8, 16, 64, 256, 512)


def ratios(name: str, m: int, rows: list[dict[str, Any]] = ROWS) -> dict[int, float]:
    """Ratio to naive by matrix size, from 1024 square on."""
    return {r["n"]: r["ratio_to_naive"] for r in rows if (r["format"], r["m"]) == (name, m) and r["n"] >= 1024}


@pytest.mark.spec("BENCH-8")
def test_the_matmul_table_is_what_the_bench_printed() -> None:
    section = PAGE[: PAGE.index("On the second machine OpenBLAS")]
    table = re.findall(r"^\| ((?:f32|bf16|int)[\w-]*) \| (.*) \|$", section, flags=re.MULTILINE)
    assert len(table) == 9
    for name, cells in table:
        medians = [f"{statistics.median(found.values()):.2f}" if (found := ratios(name, m)) else "" for m in ROWS_OF_X]
        assert [cell.strip() for cell in cells.split("|")] == medians, name


@pytest.mark.spec("BENCH-8", "BENCH-15", "BENCH-16")
def test_the_table_of_the_other_machine_is_what_the_bench_printed_there() -> None:
    for name in ("f32", "f32-by-tiles", "bf16", "int8", "int4"):
        medians = [
            f"{statistics.median(found.values()):.2f}" if (found := ratios(name, m, HASWELL)) else ""
            for m in (1, 2, 8, 64, 512)
        ]
        assert f"| {name} | {' | '.join(medians)} |" in PAGE
    for rows, most in ((ROWS, 1.05), (HASWELL, 1)):
        assert max(row["fraction_of_limit"] for row in rows) <= most, "a row is above what its limit says is possible"


@pytest.mark.spec("BENCH-8")
def test_the_gain_over_naive_int8_is_what_the_bench_printed() -> None:
    packed, naive = ratios("int8", 1), ratios("int8-naive", 1)
    gains = {n: f"{packed[n] / naive[n]:.1f}" for n in packed}
    assert f"is {gains[4096]} times as fast; at 1024 and 2048 only {gains[1024]} and {gains[2048]} times" in PAGE


START: dict[str, Any] = json.loads((DOCS / "figures" / "start.json").read_text())
SHARE: dict[str, Any] = json.loads((DOCS / "figures" / "share.json").read_text())


@pytest.mark.spec("BENCH-8")
def test_the_table_of_starts_is_what_the_bench_printed() -> None:
    for row in START["rows"]:
        cells = (
            row["format"],
            row["mode"],
            row["page_cache"],
            "yes" if row["verify"] else "no",
            f"{row['open_s'] * 1e3:,.1f} ms",
            f"{row['time_to_first_token_s'] * 1e3:,.0f} ms",
            f"{row['ratio_to_none']:.1f}",
            f"{row['peak_rss_bytes'] / 1e6:,.0f} MB",
        )
        assert f"| {' | '.join(cells)} |" in PAGE
    assert f"peaks at {START['base_rss_bytes'] / 1e6:.0f} MB" in PAGE


@pytest.mark.spec("BENCH-8")
def test_the_table_of_shared_memory_is_what_the_bench_printed() -> None:
    pss = {(row["format"], row["mapped"], row["processes"]): row["pss_bytes"] for row in SHARE["rows"]}
    for name, mapped, n in pss:
        if mapped:
            own = pss[name, False, n]
            shared = pss[name, True, n]
            cells = (name, str(n), f"{shared / 1e6:,.0f} MB", f"{own / 1e6:,.0f} MB", f"{shared / own:.2f}")
            assert f"| {' | '.join(cells)} |" in PAGE


@pytest.mark.spec("BENCH-8", "PAPER-2")
def test_the_table_of_the_papers_gains_is_what_the_simulation_printed() -> None:
    paper = json.loads((DOCS / "figures" / "paper.json").read_text())
    shares = sorted({row["compute_share"] for row in paper["rows"]})
    for shape in {row["shape"] for row in paper["rows"]}:
        for gain, published in paper["published"].items():
            cells = [shape, gain]
            for share in shares:
                of_cell = [r[gain] for r in paper["rows"] if (r["shape"], r["compute_share"]) == (shape, share)]
                cells.append(f"{min(of_cell):.2f} to {max(of_cell):.2f}")
            assert f"| {' | '.join([*cells, published])} |" in PAGE


@pytest.mark.spec("BENCH-8")
def test_the_papers_experiment_still_gives_the_committed_figures() -> None:
    committed = json.loads((DOCS / "figures" / "paper.json").read_text())["rows"]
    again = list(paper_rows(compute_shares=(0.25,)))
    assert again == [row for row in committed if row["compute_share"] == 0.25]


OFFLOAD: dict[str, Any] = json.loads((DOCS / "figures" / "offload.json").read_text())
HEAVY: dict[str, Any] = json.loads((DOCS / "figures" / "heavy.json").read_text())
SECOND: dict[str, Any] = json.loads((DOCS / "figures" / "offload_haswell.json").read_text())


def arm(of: dict[str, Any], share: float, name: str, weights: str = "f32", threads: int | None = None) -> Any:
    """The row of an arm; without a number of threads, of as many as it usually has."""
    usual = 0 if name in ("synchronous", "mmap", "lru-paged") else 2
    wanted = (weights, share, name, usual if threads is None else threads)
    keys = ("format", "budget_share", "arm", "prefetch_threads")
    rows = [row for row in of["rows"] if row.get("threads", 1) == 1]
    (row,) = [row for row in rows if tuple(row[key] for key in keys) == wanted]
    return row


def shares_of(of: dict[str, Any]) -> list[float]:
    return sorted({row["budget_share"] for row in of["rows"]})


def mmap_table() -> list[str]:
    """Beside real mmap: the gain, and how much of it is bytes not read, how much a quicker disk."""
    lines = []
    for share in shares_of(OFFLOAD):
        best, mmap = arm(OFFLOAD, share, "optimal"), arm(OFFLOAD, share, "mmap")
        fewer = mmap["read_bytes_per_token"] / best["read_bytes_per_token"]
        quicker = best["read_bytes_per_s"] / mmap["read_bytes_per_s"]
        cells = (
            f"{share:.0%}",
            f"{best['tokens_per_s']:.2f}",
            f"{arm(OFFLOAD, share, 'synchronous')['tokens_per_s']:.2f}",
            f"{mmap['tokens_per_s']:.2f}",
            f"{best['tokens_per_s'] / mmap['tokens_per_s']:.1f}",
            f"{fewer:.2f}",
            f"{quicker:.2f}",
            f"{mmap['read_bytes_per_s'] / 1e9:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def limit_table() -> list[str]:
    """How near `optimal` comes to what disk and processor allow, in every format."""
    lines = []
    for row in OFFLOAD["rows"]:
        if (row["arm"], row["prefetch_threads"], row.get("threads", 1)) == ("optimal", 2, 1):
            cells = (
                row["format"],
                f"{row['budget_share']:.0%}",
                f"{row['tokens_per_s']:.2f}",
                f"{row['predicted_tokens_per_s']:.2f}",
                "" if row["in_range"] is None else f"{row['in_range']:.0%}",
                f"{row['estimated_tokens_per_s']:.2f}",
                f"{row['ideal_tokens_per_s']:.2f}",
                f"{row['read_only_tokens_per_s']:.2f}",
                f"{row['compute_only_tokens_per_s']:.2f}",
                f"{row['overlap']:.2f}",
                f"{row['byte_efficiency']:.3f}",
                f"{row['tokens_per_s'] / arm(OFFLOAD, row['budget_share'], 'optimal')['tokens_per_s']:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def threads_table() -> list[str]:
    """With one BLAS thread and with one for each core, where products are nearly the limit."""
    lines = []
    for row in OFFLOAD["rows"]:
        if row.get("threads", 1) > 1:
            share = row["budget_share"]
            one, mmap = arm(OFFLOAD, share, "optimal"), arm(OFFLOAD, share, "mmap")
            cells = [f"{share:.0%}", f"{one['tokens_per_s']:.2f}", f"{row['tokens_per_s']:.2f}"]
            cells += [f"{each['tokens_per_s'] / mmap['tokens_per_s']:.1f}" for each in (one, row)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def plan_table(of: dict[str, Any]) -> list[str]:
    """Tokens per second of every arm that was run at a quarter, a half and three quarters."""
    shares = [0.25, 0.5, 0.75]
    names = dict.fromkeys((r["arm"], r["prefetch_threads"]) for r in of["rows"] if r["budget_share"] == 0.5)
    lines = []
    for name, threads in names:
        cells = [f"{arm(of, share, name, threads=threads)['tokens_per_s']:.2f}" for share in shares]
        lines.append(f"| {name}{', one thread' if threads == 1 else ''} | {' | '.join(cells)} |")
    return lines


def second_table() -> list[str]:
    """The second machine, whose products are quicker: overlap in each format, and f32 beside mmap."""
    lines = []
    for share in shares_of(SECOND):
        mmap = arm(SECOND, share, "mmap")["tokens_per_s"]
        rows = {name: arm(SECOND, share, "optimal", name) for name in ("f32", "bf16", "int8", "int4")}
        cells = [f"{share:.0%}", f"{rows['f32']['tokens_per_s'] / mmap:.1f}"]
        cells += [f"{rows['f32']['compute_only_tokens_per_s'] / mmap:.1f}"]
        cells += [f"{row['overlap']:.2f}" for row in rows.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@pytest.mark.spec("BENCH-8")
@pytest.mark.parametrize(
    "table",
    [mmap_table, limit_table, threads_table, lambda: plan_table(OFFLOAD), lambda: plan_table(HEAVY), second_table],
    ids=["beside mmap", "beside the limits", "threads", "all arms", "compute-heavy", "the second machine"],
)
def test_the_tables_of_runs_within_a_budget_are_what_the_bench_printed(table: Callable[[], list[str]]) -> None:
    lines = table()
    assert lines
    assert "\n".join(lines) in PAGE


@pytest.mark.spec("BENCH-8")
def test_no_committed_figure_names_the_folder_that_its_bench_ran_in() -> None:
    for path in (DOCS / "figures").glob("*.json"):
        machine = json.loads(path.read_text()).get("machine", {})
        assert machine.get("folder", {}).get("path", ".") == ".", path.name
