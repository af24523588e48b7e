"""The command `plan`: what it shows, and its JSON."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from refinfer.planning.account import fixed_of
from refinfer.planning.plan import PLANS, smallest_budget

sys.path.insert(0, str(Path(__file__).parent))
from command_line import json_of, run
from questions import ABOUT_KEYS, PLAN_KEYS, SHAPE, folder_named, inventory_of, plan_of


@pytest.mark.spec("CLI-14")
def test_plan_json_says_where_every_byte_goes_and_what_each_plan_leads_to() -> None:
    got = json_of("plan", "--shape", SHAPE, "--weights", "int8", "--budget", "16MB", "--positions", 100)
    assert list(got) == [*ABOUT_KEYS, "smallest_budget_bytes", "plan", "plans", "layers"]
    inventory = inventory_of(SHAPE, "int8")
    assert got["smallest_budget_bytes"] == smallest_budget(inventory, fixed_of(inventory, 100))
    assert (got["model"], got["format"], got["positions"], got["plan"]) == (SHAPE, "int8", 100, "optimal")
    assert [row["plan"] for row in got["plans"]] == list(PLANS)
    for row in got["plans"]:
        assert list(row) == PLAN_KEYS
        parts = ("resident", "kv_cache", "scratch", "threads", "ring", "locked", "unused")
        assert sum(row[f"{part}_bytes"] for part in parts) == row["budget_bytes"] == 16_000_000
        plan = plan_of(row["plan"], inventory, 100, 16_000_000)
        assert (row["locked_bytes"], row["ring_bytes"]) == (plan.account.locked, plan.account.ring)
        assert row["predicted_tokens_per_s"] == pytest.approx(1 / plan.token_s)
    best = got["plans"][-1]
    assert sum(row["locked_bytes"] for row in got["layers"]) == best["locked_bytes"]
    assert sum(row["bytes"] for row in got["layers"]) == got["streamable_bytes"] == inventory.streamable_nbytes


@pytest.mark.spec("CLI-14")
@pytest.mark.parametrize("plan", list(PLANS))
def test_plan_shows_the_account_of_the_plan_asked_for_its_locks_and_all_plans(plan: str) -> None:
    status, out, err = run("plan", "--shape", SHAPE, "--budget", "20MB", "--plan", plan)
    assert (status, err) == (0, "")
    account = plan_of(plan, inventory_of(SHAPE), 256, 20_000_000).account
    shown = {}
    for line in out.splitlines():
        if match := re.match(r"│ ([a-zA-Z ]+?) +│ +([\d,]+) │ +[\d.]+% │", line):
            shown[match[1]] = int(match[2].replace(",", ""))
    assert shown == account.parts | {"unused": account.unused}
    assert sum(shown.values()) == 20_000_000
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"):
        assert re.search(rf"│ {kind} +│ +\d+% │ +\|[ ▁▂▃▄▅▆▇█]+\| │", out)
    table = out[out.index("All plans within this budget") :]
    assert [name for name in PLANS if f"│ {name} " in table] == list(PLANS)


@pytest.mark.spec("CLI-14")
def test_a_budget_may_be_a_size_a_share_or_auto() -> None:
    total = inventory_of(SHAPE).streamable_nbytes

    def budget(text: str) -> int:
        nbytes: int = json_of("plan", "--shape", SHAPE, "--budget", text)["plans"][0]["budget_bytes"]
        return nbytes

    assert budget("20MB") == 20_000_000
    assert budget("18MiB") == 18 << 20
    assert budget("75%") == int(0.75 * total)
    assert budget("auto") > 1_000_000


@pytest.mark.spec("CLI-14", "PLAN-4")
@pytest.mark.parametrize("plan", list(PLANS))
def test_a_budget_larger_than_the_model_locks_everything_and_streams_nothing(plan: str) -> None:
    got = json_of("plan", "--shape", "tiny", "--budget", "1GB", "--plan", plan)
    for row in got["plans"]:
        assert row["locked_bytes"] == got["streamable_bytes"]
        assert (row["ring_bytes"], row["ring_chunks"], row["streamed_bytes_per_token"]) == (0, 0, 0)
        assert row["predicted_tokens_per_s"] == pytest.approx(row["ideal_tokens_per_s"])
    assert all(row["bytes"] == row["locked_bytes"] for row in got["layers"])
    got = json_of("simulate", "--shape", "tiny", "--budget", "1GB", "--plan", plan)
    assert (got["streamed_bytes_per_token"], got["wait_s"]) == (0, 0)


@pytest.mark.spec("CLI-14")
@pytest.mark.parametrize("name", ["m[red]", "[bold]m"])
def test_folders_may_have_brackets_in_their_names(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = folder_named(name, tiny_folder, tmp_path)
    _, out, _ = run("plan", "--model", f"{folder}/", "--budget", "600kB")
    assert f"/{name} in " in out.splitlines()[0]


@pytest.mark.spec("CLI-14")
def test_a_folder_may_look_like_a_closing_tag(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m[").mkdir()
    folder = folder_named("m[/x]", tiny_folder, tmp_path)
    assert run("plan", "--model", folder, "--budget", "600kB")[0] == 0


@pytest.mark.spec("CLI-14", "CLI-20")
def test_more_layers_than_fit_are_shown_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["plan", "--shape", "smollm-135m", "--plan", "leading"]
    monkeypatch.setenv("COLUMNS", "120")
    whole = strips(run(*argv)[1])
    monkeypatch.setenv("COLUMNS", "50")
    _, out, _ = run(*argv)
    assert re.findall("layers [0-9]+ to [0-9]+", out) == ["layers 0 to 14", "layers 15 to 29"]
    assert strips(out) == whole
    beside = re.findall(r"^│ lm_head +│ +[0-9]+% │(.*)│$", out, flags=re.MULTILINE)
    assert [part.strip() for part in beside] == ["", f"|{whole['lm_head']}|"]  # it follows the last layer
    assert {kind: len(strip) for kind, strip in whole.items()} == dict.fromkeys(whole, 30) | {"lm_head": 1}


@pytest.mark.spec("CLI-14")
@pytest.mark.parametrize("plan", ["leading", "balanced", "attention-first"])
def test_the_strip_of_a_kind_shows_how_much_of_it_is_locked_in_each_layer(plan: str) -> None:
    argv = ["plan", "--shape", "smollm-135m", "--plan", plan, "--budget", "40%"]
    shown, layers = strips(run(*argv)[1]), json_of(*argv)["layers"]
    for kind, strip in shown.items():
        shares = [row["locked_bytes"] / row["bytes"] for row in layers if row["kind"] == kind]
        assert [" ▁▂▃▄▅▆▇█".index(block) for block in strip] == [round(8 * share) for share in shares]
    assert len(set("".join(shown.values()))) > 1


def strips(out: str) -> dict[str, str]:
    """Return what is drawn for each kind, layer by layer; parts of it put together."""
    found: dict[str, str] = {}
    for kind, strip in re.findall(r"^│ (\w+) .*?\|([ ▁-█]+)\|", out, flags=re.MULTILINE):
        found[kind] = found.get(kind, "") + strip
    return found
