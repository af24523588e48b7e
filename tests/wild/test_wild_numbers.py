"""In the wild: numbers that people compare. The three commands that speak of a budget agree with one another."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import refinfer
from refinfer.errors import BudgetError, InputError
from refinfer.model.folder import DEFAULT_MAX_TOKENS, DEFAULT_POSITIONS, open_folder
from refinfer.offload.budget import parse_budget
from refinfer.offload.calibration import calibration_file

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from command_line import json_of, refused

STORYTELLER = str(refinfer.STORYTELLER)
PARTS = ["budget", "locked", "resident", "ring", "kv_cache", "scratch", "threads"]


def account_of(row: dict[str, Any]) -> dict[str, int]:
    return {part: row[f"{part}_bytes"] for part in PARTS}


@pytest.mark.spec("PLAN-20", "PLAN-13", "CAL-4")
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_without_options_plan_simulate_generate_and_load_spend_a_budget_alike(weights: str) -> None:
    how = ["--weights", weights, "--budget", "2800kB"]
    planned = json_of("plan", "--model", STORYTELLER, *how)
    simulated = json_of("simulate", "--model", STORYTELLER, *how)
    expected = account_of(next(row for row in planned["plans"] if row["plan"] == "optimal"))
    assert account_of(simulated) == expected
    for prompt in (["ROMEO:"], ["--token-ids", ",".join(["1"] * (DEFAULT_POSITIONS - DEFAULT_MAX_TOKENS))]):
        assert account_of(json_of("generate", *prompt, *how)["offload"]) == expected
    with refinfer.load(weights=weights, budget="2800kB") as session:
        list(session.generate("ROMEO:", max_tokens=1))
        assert session.stats is not None
        assert session.stats.offload is not None
        assert account_of(session.stats.offload.to_json()) == expected
        assert planned["positions"] == simulated["positions"] == session.max_positions == DEFAULT_POSITIONS == 256


@pytest.mark.spec("PLAN-20")
def test_the_positions_that_are_asked_for_are_those_that_are_planned_for() -> None:
    how = ["--budget", "2800kB"]
    planned = json_of("plan", "--model", STORYTELLER, *how, "--positions", "40")
    expected = account_of(next(row for row in planned["plans"] if row["plan"] == "optimal"))
    assert account_of(json_of("generate", "--token-ids", "1,2", "--max-tokens", "38", *how)["offload"]) == expected


@pytest.mark.spec("PLAN-20", "CAL-4")
def test_a_plan_takes_the_disk_of_the_cache_file_wherever_the_model_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is on a disk that has another number; what streams is read from the disk of the cache directory."""
    file = calibration_file()
    assert file is not None
    disks = {str(file.parent): "1:1", str(tmp_path / "model"): "2:2"}

    def number_of(place: Path) -> str:
        return next((number for disk, number in disks.items() if str(place).startswith(disk)), "3:3")

    monkeypatch.setattr("refinfer.offload.calibration.device_number", number_of)
    devices = {number: {"bandwidth": {"1": 1e9 * int(number[0])}, "latency_s": 0.0} for number in disks.values()}
    monkeypatch.setattr("refinfer.offload.calibration.read_json", lambda _: {"version": 1, "devices": devices})
    shutil.copytree(STORYTELLER, tmp_path / "model")
    planned = json_of("plan", "--model", tmp_path / "model", "--budget", "2800kB")
    assert planned["device"] == "device 1:1"
    with refinfer.load(tmp_path / "model", budget="2800kB") as session:
        assert session.prediction is not None
        assert session.prediction.calibration.device.name == "device 1:1"


# What somebody writes, and the share that the message proposes.
MEANT = {
    "40": "40%", "0.4": "40%", "100": "100%", "1": "1%", "0.05": "5%", "0.125": "12.5%", " 40 ": "40%",
}  # fmt: skip


@pytest.mark.spec("BUDGET-5")
@pytest.mark.parametrize("written", MEANT)
def test_a_number_that_looks_like_a_share_is_refused_with_the_share(written: str) -> None:
    said = refused("generate", "ROMEO:", "--budget", written)
    assert said.endswith(f"; for a share of the weights write {MEANT[written]}")
    given: list[Any] = [written, float(written)] if float(written) < 1 else [written, int(written)]
    for budget in given:
        with pytest.raises(BudgetError, match=f"; for a share of the weights write {MEANT[written]}$"):
            refinfer.load(budget=budget)


@pytest.mark.spec("BUDGET-5", "BUDGET-3")
def test_a_number_of_bytes_needs_no_unit_and_may_be_a_float() -> None:
    assert parse_budget(3e6, 10) == parse_budget("3000000", 10) == parse_budget(3_000_000, 10) == 3_000_000
    assert parse_budget("101", 10) == 101
    with refinfer.load(budget=2.8e6) as session:
        assert session.max_positions == DEFAULT_POSITIONS


@pytest.mark.spec("BUDGET-3", "ERR-1")
@pytest.mark.parametrize("budget", [True, False, float("nan"), float("inf"), -0.4, [40], b"40%"], ids=repr)
def test_what_is_no_budget_at_all_is_refused_by_name(budget: Any) -> None:
    with pytest.raises(InputError) as error:
        refinfer.load(budget=budget)
    assert "\n" not in str(error.value)


@pytest.mark.spec("PLAN-19", "PLAN-3")
@pytest.mark.parametrize(("weights", "budget"), [("bf16", "40%"), ("int8", "60%"), ("f32", "25%")])
def test_a_share_that_is_too_small_for_the_usual_positions_names_how_many_it_is_enough_for(
    weights: str, budget: str
) -> None:
    with pytest.raises(BudgetError, match=r"\(max_positions, --positions, --max-tokens\)$") as error:
        refinfer.load(weights=weights, budget=budget)
    most = int(str(error.value).partition("or ask for at most ")[2].split()[0])
    with refinfer.load(weights=weights, budget=budget, max_positions=most) as session:
        assert session.max_positions == most
    with pytest.raises(BudgetError, match=f"at most {most} positions"):
        refinfer.load(weights=weights, budget=budget, max_positions=most + 1)


@pytest.mark.spec("PLAN-19")
def test_no_number_of_positions_is_named_if_none_would_do() -> None:
    assert "positions" not in refused("generate", "ROMEO:", "--budget", "100kB")
    assert open_folder(refinfer.STORYTELLER).config.longest_request > DEFAULT_POSITIONS


@pytest.mark.spec("PLAN-21", "GEN-18")
def test_the_text_names_the_parts_of_a_budget_as_the_json_does(capsys: pytest.CaptureFixture[str]) -> None:
    from refinfer.cli.main import main

    named = {f"{part}_bytes" for part in [*PARTS, "unused"]}
    assert main(["plan", "--shape", "tiny", "--budget", "1500kB"]) == 0
    lines = capsys.readouterr().out.split("Locked, by kind")[0].splitlines()
    parts = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert {f"{part.lower().replace(' ', '_')}_bytes" for part in parts} == named - {"budget_bytes"}
    assert main(["generate", "ROMEO:", "--max-tokens", "2", "--budget", "2800kB"]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("budget: "))
    parts = [part.rpartition(" ")[0].rpartition(" ")[0] for part in line.partition(": locked")[2].split(", ")[1:]]
    assert {f"{part.lower().replace(' ', '_')}_bytes" for part in ["locked", *parts]} == named - {
        "budget_bytes", "unused_bytes",
    }  # fmt: skip
    assert json.loads(json.dumps(json_of("plan", "--shape", "tiny", "--budget", "1500kB")))["plans"][0].keys() > named
