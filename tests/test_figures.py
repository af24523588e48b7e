"""The figures page says what was measured: its tables are recomputed from the committed output of their commands."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from refinfer.offload.paper import paper_rows

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "figures.md").read_text()
ROWS: list[dict[str, Any]] = json.loads((DOCS / "figures" / "matmul.json").read_text())["rows"]
ROWS_OF_X = (1, 2, 4, 8, 16, 64, 256, 512)


def ratios(name: str, m: int) -> dict[int, float]:
    """Ratio to naive by matrix size, from 1024 square on."""
    return {r["n"]: r["ratio_to_naive"] for r in ROWS if (r["format"], r["m"]) == (name, m) and r["n"] >= 1024}


@pytest.mark.spec("BENCH-8")
def test_the_matmul_table_is_what_the_bench_printed() -> None:
    section = PAGE[: PAGE.index("## The first token")]
    table = re.findall(r"^\| ((?:f32|bf16|int)[\w-]*) \| (.*) \|$", section, flags=re.MULTILINE)
    assert len(table) == 9
    for name, cells in table:
        medians = [f"{statistics.median(found.values()):.2f}" if (found := ratios(name, m)) else "" for m in ROWS_OF_X]
        assert [cell.strip() for cell in cells.split("|")] == medians, name


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
