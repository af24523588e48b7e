"""In the wild: what people try with plans, providers and sources of their own, without touching the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import refinfer
from refinfer.planning.plan import PLANS

MINE = """
import numpy as np

calls = []

def largest(inventory, room):
    mask = np.zeros(len(inventory.cycle), bool)
    for n in np.argsort(-inventory.sizes, kind="stable"):
        mask[n] = inventory.sizes[mask].sum() + inventory.sizes[n] <= room
    return mask

def listed(inventory, room):
    return [False] * len(inventory.cycle)

def first(inventory, room):
    return np.arange(len(inventory.cycle)) == 0

def heavy(inventory, room):
    return np.ones(len(inventory.cycle), bool)

def short(inventory, room):
    return np.ones(3, bool)

def numbers(inventory, room):
    return [0, 1, 2]

def broken(inventory, room):
    return inventory.chunks["q_proj"]

def fickle(inventory, room):
    calls.append(room)
    return np.arange(len(inventory.cycle)) == len(calls)

number = 3
"""
QUESTION = ["--model", str(refinfer.STORYTELLER), "--weights", "int8", "--budget", "1500kB", "--positions", "24"]
PROMPT = ["--token-ids", "1,2,3,4", "--max-tokens", "20"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a file of somebody's own."""
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def refinfer_in(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a program that does not have the current folder on its path by itself."""
    program = [sys.executable, "-P", "-c", "import sys; from refinfer.cli.main import main; sys.exit(main())", *argv]
    env = {**os.environ, "PYTHONPATH": str(Path(refinfer.__file__).parents[1])}
    return subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.spec("PLAN-16", "CLI-14", "CLI-28")
def test_plan_shows_somebodys_plan_next_to_the_seven(here: Path) -> None:
    done = refinfer_in(here, "plan", *QUESTION, "--plan", "mine:largest", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["plan"] == "mine:largest"
    assert [row["plan"] for row in found["plans"]] == [*PLANS, "mine:largest"]
    own = found["plans"][-1]
    assert 0 < own["locked_bytes"] == sum(row["locked_bytes"] for row in found["layers"])
    shown = refinfer_in(here, "plan", *QUESTION, "--plan", "mine:largest").stdout
    assert "plan mine:largest within 1.5 MB" in shown
    assert any(line.split()[1] == "mine:largest" for line in shown.splitlines() if line.startswith("│"))


@pytest.mark.spec("PLAN-16", "CLI-15", "CLI-28")
def test_simulate_runs_somebodys_plan_and_sweeps_it_next_to_the_seven(here: Path) -> None:
    done = refinfer_in(here, "simulate", *QUESTION, "--plan", "mine:largest", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["plan"] == "mine:largest"
    assert all(list(row["tokens_per_s"])[:8] == [*PLANS, "mine:largest"] for row in found["sweep"])
    shown = refinfer_in(here, "simulate", *QUESTION, "--plan", "mine:listed").stdout
    assert "mine:listed" in shown.split("Predicted tokens/s")[1]


@pytest.mark.spec("PLAN-16", "SIM-9")
def test_a_plan_that_fits_the_budget_asked_for_may_fail_at_others_of_the_sweep(here: Path) -> None:
    done = refinfer_in(here, "simulate", *QUESTION, "--plan", "mine:first", "--json")
    assert done.returncode == 0, done.stderr
    speeds = [row["tokens_per_s"]["mine:first"] for row in json.loads(done.stdout)["sweep"]]
    assert speeds[0] is None
    assert all(speed > 0 for speed in speeds[1:])
    assert refinfer_in(here, "simulate", *QUESTION, "--plan", "mine:first").returncode == 0


@pytest.mark.spec("PLAN-16", "OFFLOAD-3", "CLI-28")
def test_generate_runs_somebodys_plan_and_gives_the_same_text(here: Path) -> None:
    common = ["generate", *PROMPT, "--weights", "int8", "--temperature", "0", "--json"]
    planned = json.loads(refinfer_in(here, "plan", *QUESTION, "--plan", "mine:largest", "--json").stdout)["plans"][-1]
    done = refinfer_in(here, *common, "--budget", "1500kB", "--plan", "mine:largest")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["offload"]["plan"] == "mine:largest"
    assert found["offload"]["locked_bytes"] == planned["locked_bytes"]
    assert found["text"] == json.loads(refinfer_in(here, *common).stdout)["text"]


REFUSED = {
    "mine:heavy": "the plan mine:heavy locks ",
    "mine:short": "the plan mine:short returned an array of bool [3]; it must return one truth value for each",
    "mine:numbers": "the plan mine:numbers returned an array of int64 [3]; it must return one truth value",
    "mine:broken": "the plan mine:broken raised AttributeError: ",
    "mine:fickle": "the plan mine:fickle gave another mask when it was asked again",
    "mine:number": "argument --plan: mine:number is 3, not a function of an inventory and a room (see refinfer ",
    "mine:missing": "argument --plan: mine:missing: mine has no 'missing' (see refinfer ",
    "nobody:plan": "argument --plan: nobody:plan: there is no module 'nobody'; neither in ",
    "mine.py:largest": "argument --plan: mine.py:largest: there is no module 'mine.py'; write mine, without .py",
    ":largest": "argument --plan: ':largest' is not of the form package:name",
    "largest": "argument --plan: invalid choice: 'largest' (choose from 'none', ",
}


@pytest.mark.spec("PLAN-17", "PLAN-18", "CLI-28", "CLI-4")
@pytest.mark.parametrize("plan", REFUSED)
@pytest.mark.parametrize("command", ["plan", "generate"])
def test_a_mistake_in_somebodys_plan_is_one_line_and_status_2(plan: str, command: str, here: Path) -> None:
    given = QUESTION if command == "plan" else [*PROMPT, "--weights", "int8", "--budget", "1500kB"]
    done = refinfer_in(here, command, *given, "--plan", plan)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"refinfer: {REFUSED[plan]}")
    assert done.stderr.count("\n") == 1


@pytest.mark.spec("PLAN-16", "PLAN-17")
def test_load_takes_a_function_and_names_it_when_it_is_wrong() -> None:
    def none(inventory: object, room: int) -> list[bool]:
        return [False] * 43

    given = {"weights": "int8", "budget": "1500kB", "max_positions": 24}
    with refinfer.load(plan=none, **given) as session:  # type: ignore[arg-type]
        list(session.generate("ROMEO:", max_tokens=3))
        assert session.stats is not None
        assert session.stats.offload is not None
        assert session.stats.offload.account.locked == 0
        assert session.stats.offload.plan.endswith("<locals>.none")
    with pytest.raises(refinfer.errors.RequestError, match=r"the plan .*<lambda> returned an array of object"):
        refinfer.load(plan=lambda *_: None, **given)  # type: ignore[arg-type]


@pytest.mark.spec("PLAN-16")
def test_a_plan_without_a_budget_is_refused() -> None:
    with pytest.raises(refinfer.RequestError, match="a plan can be used only within a budget"):
        refinfer.load(plan=lambda inventory, room: np.zeros(len(inventory.cycle), np.bool_))
