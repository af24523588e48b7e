"""The command `simulate`: its timeline, its sweep over budgets, the paper's experiment, and its JSON."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from refinfer.cli import simulate
from refinfer.cli.main import main
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import DEVICES
from refinfer.planning.paper import PAPER_MODELS, PUBLISHED
from refinfer.planning.plan import PLANS, smallest_budget

sys.path.insert(0, str(Path(__file__).parent))
from command_line import json_of, on_terminal, refused, run
from questions import ABOUT_KEYS, PLAN_KEYS, SHAPE, folder_named, inventory_of, plan_of


@pytest.mark.spec("CLI-15")
@pytest.mark.parametrize("device", list(DEVICES))
def test_simulate_json_has_the_run_and_a_sweep_over_budgets(device: str) -> None:
    got = json_of("simulate", "--shape", SHAPE, "--budget", "60%", "--device", device)
    assert list(got) == [*ABOUT_KEYS, *PLAN_KEYS, "token_s", "wait_s", "sweep"]
    assert got["device"] == device
    inventory = inventory_of(SHAPE)
    fixed = fixed_of(inventory, 256)
    plan = plan_of("optimal", inventory, 256, got["budget_bytes"], device)
    assert got["token_s"] == pytest.approx(plan.token_s)
    assert 0 <= got["wait_s"] < got["token_s"]
    budgets = [row["budget_bytes"] for row in got["sweep"]]
    assert (budgets[0], budgets[-1]) == (smallest_budget(inventory, fixed), fixed.total + inventory.streamable_nbytes)
    assert budgets == sorted(set(budgets))
    assert len(budgets) >= 8
    for row in got["sweep"]:
        assert set(row["tokens_per_s"]) == {*PLANS, "synchronous", "mmap", "belady"}
        assert row["tokens_per_s"]["optimal"] <= row["ideal_tokens_per_s"] * (1 + 1e-9)


@pytest.mark.spec("CLI-15")
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_simulate_shows_a_timeline_of_two_tokens_and_a_sweep(threads: int) -> None:
    argv = ["simulate", "--shape", SHAPE, "--budget", "70%", "--prefetch-threads", threads, "--plan", "leading"]
    status, out, err = run(*argv)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{SHAPE}, bf16, leading within ")
    assert lines[0].endswith(": two tokens")
    lanes = {line[:9].strip(): line[10:] for line in lines[1:4] if line[10:].strip("rcw·") == ""}
    expected = {"compute", *({"disk 1", "disk 2"} if threads == 2 else {"disk"})}
    assert set(lanes) == expected
    assert {len(row) for row in lanes.values()} == {108}
    assert set(lanes["compute"]) <= set("cw·")
    assert set("".join(row for lane, row in lanes.items() if lane != "compute")) <= set("r·")
    assert "r read   c compute   w wait" in out
    match = re.search(r"([\d,.]+) ms for each token, ([\d,.]+) ms of that waiting for the disk", out)
    assert match
    assert float(match[1]) > float(match[2]) > 0
    for arm in (
        "none",
        "leading",
        "balanced",
        "attn-first",
        "ffn-first",
        "flexinfer",
        "optimal",
        "sync",
        "mmap",
        "ideal",
    ):
        assert arm in out
    explained = [line for line in lines if re.match("(attn-first|sync|mmap|ideal) +[a-z]", line)]
    assert len(explained) == 4


@pytest.mark.spec("CLI-21", "CLI-15")
@pytest.mark.parametrize(
    ("terminal", "no_color", "in_colour"),
    [("xterm-256color", "", True), ("xterm-256color", "1", False), ("dumb", "", False), ("xterm", "", True)],
)
def test_a_timeline_has_blocks_where_their_colours_show_and_letters_elsewhere(
    terminal: str, no_color: str, in_colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    shown = on_terminal(partial(run_on, "simulate", "--shape", SHAPE, "--budget", "70%", "--plan", "leading"), 80)
    lanes = {line[10:] for line in shown.splitlines()[1:4]}
    assert {len(lane) for lane in lanes} == {68}
    assert set("".join(lanes)) <= set("█·" if in_colour else "rcw·")
    assert set("".join(lanes)) >= set("█·" if in_colour else "rc·")
    legend = "█ read   █ compute   █ wait" if in_colour else "r read   c compute   w wait"
    assert f"          {legend}\n" in shown


@pytest.mark.spec("CLI-21")
def test_the_blocks_of_each_kind_have_a_colour_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    argv = ("simulate", "--shape", SHAPE, "--budget", "70%", "--plan", "leading")
    shown = on_terminal(partial(run_on, *argv), 80, codes=True)
    blocks = set(re.findall(r"\x1b\[(\d+)m█", shown))
    assert blocks == {"34", "32", "31"}
    legend = dict(re.findall(r"\x1b\[(\d+)m█ (\w+)", shown))
    assert (set(legend), set(legend.values())) == (blocks, {"read", "compute", "wait"})


def run_on(*argv: str) -> None:
    assert main(argv) == 0


@pytest.mark.slow
@pytest.mark.spec("CLI-17")
def test_simulate_paper_shows_published_gains_next_to_simulated_ones() -> None:
    status, out, err = run("simulate", "--paper")
    assert (status, err) == (0, "")
    assert all(len(line) <= 120 for line in out.splitlines())
    for model in PAPER_MODELS:
        assert f"{model}, 4.5 bits" in out
    for gain in PUBLISHED:
        assert out.count(f"\n{gain}  ") == len(PAPER_MODELS)
    assert out.count("  2.6 to 3.0") == len(PAPER_MODELS)
    assert "paper.py lists what is assumed" in out
    got = json_of("simulate", "--paper")
    assert got["published"] == dict(PUBLISHED)
    assert {row["shape"] for row in got["rows"]} == set(PAPER_MODELS)


@pytest.mark.spec("CLI-17")
def test_the_gains_of_the_papers_experiment_stand_in_the_table_of_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"shape": shape, "compute_share": share} | dict.fromkeys(PUBLISHED, gain)
        for shape, gain in (("small", 1.25), ("small", 1.5), ("large", 7.0))
        for share in (0.1, 0.4)
    ]
    monkeypatch.setattr(simulate, "paper_rows", lambda: rows)
    monkeypatch.setenv("COLUMNS", "60")
    status, out, _ = run("simulate", "--paper")
    small, large = out.split("\nlarge, 4.5 bits")
    assert status == 0
    assert small.startswith("small, 4.5 bits")
    assert "┃ published " in small  # what was published is broken into lines before the table loses its frame
    assert (small.count("1.25 - 1.50"), small.count("7.00")) == (2 * len(PUBLISHED), 0)
    assert (large.count("7.00 - 7.00"), large.count("1.50")) == (2 * len(PUBLISHED), 0)
    assert "paper.py lists what is assumed" in large
    assert json_of("simulate", "--paper") == {"published": dict(PUBLISHED), "rows": rows}


@pytest.mark.spec("CLI-15", "TRACE-3")
@pytest.mark.parametrize("name", ["\udcff", "\x01"], ids=ascii)
def test_a_picture_can_be_drawn_for_a_folder_of_any_name(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = folder_named(name, tiny_folder, tmp_path)
    assert run("simulate", "--model", folder, "--budget", "600kB", "--svg", tmp_path / "x.svg")[0] == 0
    ET.parse(tmp_path / "x.svg")


@pytest.mark.spec("CLI-17")
def test_the_papers_experiment_refuses_options_that_it_cannot_use() -> None:
    refused("simulate", "--paper", "--shape", "tiny", "--budget", "nonsense", "--svg", "/no/such/folder/x.svg")
