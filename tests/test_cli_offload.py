"""The commands `plan` and `simulate`: what they show, their JSON, their pictures, one line for every wrong use."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from refinfer.cli import main
from refinfer.engine import fixed_of
from refinfer.model.config import SHAPES
from refinfer.model.folder import open_folder
from refinfer.offload.cost import DEVICES, calibration_of
from refinfer.offload.inventory import Inventory
from refinfer.offload.paper import PAPER_MODELS, PUBLISHED
from refinfer.offload.plan import PLANS, make_plan, smallest_budget
from refinfer.process import format_nbytes

Run = Callable[..., tuple[int, str, str]]

SHAPE = "stories15m"  # a model whose matrices are large beside everything else

PLAN_KEYS = ["plan", "budget_bytes", "locked_bytes", "resident_bytes", "kv_cache_bytes", "scratch_bytes", "ring_bytes",
             "ring_chunks", "unused_bytes", "streamed_bytes_per_token", "locked_chunks", "chunks",
             "predicted_tokens_per_s", "ideal_tokens_per_s"]  # fmt: skip
ABOUT_KEYS = ["model", "format", "positions", "prefetch_threads", "device", "device_source", "processor",
              "processor_source", "measured", "streamable_bytes"]  # fmt: skip

both = pytest.mark.parametrize("command", ["plan", "simulate"])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns its status, standard output and standard error."""

    def run_command(*argv: object) -> tuple[int, str, str]:
        status = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


def json_of(run: Run, *argv: object) -> dict[str, Any]:
    status, out, err = run(*argv, "--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    result: dict[str, Any] = json.loads(out)
    return result


def inventory_of(shape: str, weights: str = "bf16") -> Inventory:
    return Inventory(SHAPES[shape], weights)


@pytest.mark.spec("CLI-14")
def test_plan_json_says_where_every_byte_goes_and_what_each_plan_leads_to(run: Run) -> None:
    got = json_of(run, "plan", "--shape", SHAPE, "--weights", "int8", "--budget", "16MB", "--positions", 100)
    assert list(got) == [*ABOUT_KEYS, "smallest_budget_bytes", "plan", "plans", "layers"]
    inventory = inventory_of(SHAPE, "int8")
    fixed = fixed_of(inventory, 100)
    assert got["smallest_budget_bytes"] == smallest_budget(inventory, fixed)
    assert (got["model"], got["format"], got["positions"], got["plan"]) == (SHAPE, "int8", 100, "optimal")
    assert [row["plan"] for row in got["plans"]] == list(PLANS)
    for row in got["plans"]:
        assert list(row) == PLAN_KEYS
        parts = ("resident", "kv_cache", "scratch", "ring", "locked", "unused")
        assert sum(row[f"{part}_bytes"] for part in parts) == row["budget_bytes"] == 16_000_000
        plan = make_plan(row["plan"], inventory, fixed, 16_000_000)
        assert (row["locked_bytes"], row["ring_bytes"]) == (plan.account.locked, plan.account.ring)
        assert row["predicted_tokens_per_s"] == pytest.approx(1 / plan.token_s)
    best = got["plans"][-1]
    assert sum(row["locked_bytes"] for row in got["layers"]) == best["locked_bytes"]
    assert sum(row["bytes"] for row in got["layers"]) == got["streamable_bytes"] == inventory.streamable_nbytes


@pytest.mark.spec("CLI-14")
@pytest.mark.parametrize("plan", list(PLANS))
def test_plan_shows_the_account_of_the_plan_asked_for_its_locks_and_all_plans(run: Run, plan: str) -> None:
    status, out, err = run("plan", "--shape", SHAPE, "--budget", "20MB", "--plan", plan)
    assert (status, err) == (0, "")
    chosen = make_plan(plan, inventory_of(SHAPE), fixed_of(inventory_of(SHAPE), 256), 20_000_000)
    account = chosen.account
    shown = {}
    for line in out.splitlines():
        if match := re.match(r"│ ([a-zA-Z ]+?) +│ +([\d,]+) │ +[\d.]+% │", line):
            shown[match[1]] = int(match[2].replace(",", ""))
    assert shown == {
        "locked chunks": account.locked,
        "ring": account.ring,
        "norms and biases": account.resident,
        "KV cache": account.kv_cache,
        "activations and scratch": account.scratch,
        "unused": account.unused,
    }
    assert sum(shown.values()) == 20_000_000
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"):
        assert re.search(rf"│ {kind} +│ +\d+% │ +\|[ ▁▂▃▄▅▆▇█]+\| │", out)
    table = out[out.index("All plans within this budget") :]
    assert [name for name in PLANS if f"│ {name} " in table] == list(PLANS)


@pytest.mark.spec("CLI-14", "CLI-15")
@both
def test_a_model_folder_is_enough_and_its_weights_are_not_read(run: Run, command: str, tiny_folder: Path) -> None:
    got = json_of(run, command, "--model", tiny_folder, "--budget", "600kB")
    assert (got["model"], got["format"]) == (str(tiny_folder), "f32")  # a float32 checkpoint
    assert got["positions"] == 96  # no more than the model has
    config = open_folder(tiny_folder).config
    inventory = Inventory(config, "f32")
    assert got["streamable_bytes"] == inventory.streamable_nbytes
    if command == "plan":
        assert got["smallest_budget_bytes"] == smallest_budget(inventory, fixed_of(inventory, 96))
    assert json_of(run, command, "--model", tiny_folder, "--budget", "600kB", "--weights", "int8")["format"] == "int8"


@pytest.mark.spec("CLI-14", "CLI-15")
@both
def test_with_a_format_named_the_config_of_a_folder_is_enough(
    run: Run, command: str, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    assert json_of(run, command, "--model", tmp_path, "--weights", "int8", "--budget", "600kB")["format"] == "int8"


@pytest.mark.spec("CLI-14", "CLI-15")
@both
def test_a_shape_is_in_bf16_unless_told_and_its_budget_is_half_of_its_weights(run: Run, command: str) -> None:
    got = json_of(run, command, "--shape", "smollm-135m")
    assert (got["format"], got["positions"], got["prefetch_threads"]) == ("bf16", 512, 1)
    budget = got["plans"][0]["budget_bytes"] if command == "plan" else got["budget_bytes"]
    assert budget == got["streamable_bytes"] // 2


@pytest.mark.spec("CLI-14")
def test_a_budget_may_be_a_size_a_share_or_auto(run: Run) -> None:
    total = inventory_of(SHAPE).streamable_nbytes

    def budget(text: str) -> int:
        nbytes: int = json_of(run, "plan", "--shape", SHAPE, "--budget", text)["plans"][0]["budget_bytes"]
        return nbytes

    assert budget("20MB") == 20_000_000
    assert budget("16MiB") == 16 << 20
    assert budget("75%") == int(0.75 * total)
    assert budget("auto") > 1_000_000


@pytest.mark.spec("CLI-14", "PLAN-4")
@pytest.mark.parametrize("plan", list(PLANS))
def test_a_budget_larger_than_the_model_locks_everything_and_streams_nothing(run: Run, plan: str) -> None:
    got = json_of(run, "plan", "--shape", "tiny", "--budget", "1GB", "--plan", plan)
    for row in got["plans"]:
        assert row["locked_bytes"] == got["streamable_bytes"]
        assert (row["ring_bytes"], row["ring_chunks"], row["streamed_bytes_per_token"]) == (0, 0, 0)
        assert row["predicted_tokens_per_s"] == pytest.approx(row["ideal_tokens_per_s"])
    assert all(row["bytes"] == row["locked_bytes"] for row in got["layers"])
    got = json_of(run, "simulate", "--shape", "tiny", "--budget", "1GB", "--plan", plan)
    assert (got["streamed_bytes_per_token"], got["wait_s"]) == (0, 0)


@pytest.mark.spec("CLI-15")
@pytest.mark.parametrize("device", list(DEVICES))
def test_simulate_json_tells_the_run_and_a_sweep_over_budgets(run: Run, device: str) -> None:
    got = json_of(run, "simulate", "--shape", SHAPE, "--budget", "60%", "--device", device)
    assert list(got) == [*ABOUT_KEYS, *PLAN_KEYS, "token_s", "wait_s", "sweep"]
    assert got["device"] == device
    inventory = inventory_of(SHAPE)
    fixed = fixed_of(inventory, 256)
    plan = make_plan("optimal", inventory, fixed, got["budget_bytes"], calibration=calibration_of(device))
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
def test_simulate_shows_a_timeline_of_two_tokens_and_a_sweep(run: Run, threads: int) -> None:
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
    match = re.search(r"([\d,.]+) ms for each token, of it ([\d,.]+) ms waiting for the disk", out)
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


@pytest.mark.spec("CLI-16")
@both
def test_what_is_assumed_is_said_where_nothing_was_measured(run: Run, command: str) -> None:
    _, out, _ = run(command, "--shape", SHAPE, "--budget", "60%", "--device", "emmc")
    last = out.splitlines()[-1]
    assert last.startswith("assuming: disk emmc (eMMC 5.1")
    assert "processor" in last
    assert "docs/figures/matmul.json" in last
    got = json_of(run, command, "--shape", SHAPE, "--budget", "60%", "--device", "emmc")
    assert got["measured"] is False
    assert got["device_source"] == DEVICES["emmc"].source
    assert "matmul.json" in got["processor_source"]


@pytest.mark.spec("CLI-17")
def test_simulate_paper_shows_published_gains_beside_simulated_ones(run: Run) -> None:
    status, out, err = run("simulate", "--paper")
    assert (status, err) == (0, "")
    flat = re.sub(r"[│\s]+", " ", out)
    assert all(len(line) <= 120 for line in out.splitlines())
    for model in PAPER_MODELS:
        assert f"{model}, 4.5 bits" in flat
    for gain in PUBLISHED:
        first_word = gain.split()[0]
        assert out.count(f"│ {first_word} ") >= len(PAPER_MODELS)  # a long name goes on in the next line
    assert "2.6 to 3.0" in flat
    assert "paper.py lists what is assumed" in out
    got = json_of(run, "simulate", "--paper")
    assert got["published"] == dict(PUBLISHED)
    assert {row["shape"] for row in got["rows"]} == set(PAPER_MODELS)


@pytest.mark.spec("CLI-14", "CLI-15", "PLAN-12", "TRACE-3")
@both
def test_a_picture_is_written_and_is_the_same_each_time(run: Run, command: str, tmp_path: Path) -> None:
    pictures = []
    for name in ("a.svg", "b <&>.svg"):
        status, out, err = run(command, "--shape", SHAPE, "--budget", "60%", "--svg", tmp_path / name)
        assert (status, err) == (0, "")
        assert out
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    root = ET.fromstring(pictures[0])
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert ("optimal, layer by layer" if command == "plan" else "compute") in texts
    json_of(run, command, "--shape", SHAPE, "--budget", "60%", "--svg", tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_bytes() == pictures[0]


def refused(run: Run, *argv: object) -> str:
    """Return the one line that a wrong use gets."""
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("refinfer: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.strip()


ABSURD = "9" * 400

WRONG: dict[str, tuple[list[str], str]] = {
    "budget 0": (["--budget", "0"], "must be at least one byte"),
    "budget 0%": (["--budget", "0%"], "must be at least one byte"),
    "negative budget": (["--budget=-5MB"], "'-5MB' is not a size"),
    "negative share": (["--budget=-5%"], "'-5%' is not a size"),
    "nonsense": (["--budget", "lots"], "'lots' is not a size such as 300MB"),
    "several lines of nonsense": (["--budget", "1\n2"], "is not a size such as 300MB"),
    "not a number": (["--budget", "nan"], "'nan' is not a size"),
    "absurd budget": (["--budget", ABSURD], "less than 2^63"),
    "absurd share": (["--budget", "9" * 30 + "%"], "less than 2^63"),
    "too small": (["--budget", "1MB"], "is too small for this model and request; the smallest that works is"),
    "no such plan": (["--plan", "best"], "invalid choice: 'best'"),
    "no such format": (["--weights", "fp8"], "invalid choice: 'fp8'"),
    "no such device": (["--device", "floppy"], "invalid choice: 'floppy'"),
    "negative threads": (["--prefetch-threads=-1"], "must be at least 0, not -1"),
    "many threads": (["--prefetch-threads", "65"], "must be at most 64, not 65"),
    "threads that are no number": (["--prefetch-threads", "two"], "'two' is not a whole number"),
    "threads beyond what int reads": (["--prefetch-threads", "9" * 5000], "is not a whole number"),
    "ring 0": (["--prefetch-ring", "0"], "must be at least one byte"),
    "ring of one byte": (["--prefetch-ring", "1"], "a ring must hold 2 to 4096 chunks"),
    "ring larger than the budget": (["--prefetch-ring", "1TB"], "and fit the budget"),
    "nonsense ring": (["--prefetch-ring", "round"], "'round' is not a size"),
    "positions 0": (["--positions", "0"], "must be at least 1, not 0"),
    "positions beyond the model": (["--positions", "257"], "positions must be from 1 to this model's 256, not 257"),
    "absurd positions": (["--positions", ABSURD], "positions must be from 1 to this model's 256"),
    "model as well": (["--model", "somewhere"], "give either --model DIR or --shape NAME"),
    "unknown option": (["--fast"], "unrecognized arguments: --fast"),
    "abbreviated option": (["--pos", "5"], "unrecognized arguments: --pos 5"),
    "svg in no folder": (["--svg", "/no/such/folder/x.svg"], "cannot be written: No such file or directory"),
}


@pytest.mark.spec("CLI-14", "CLI-15", "CLI-3", "ERR-2", "BUDGET-3", "PLAN-3")
@both
@pytest.mark.parametrize("what", WRONG)
def test_every_wrong_use_gets_one_line_and_status_2(run: Run, command: str, what: str) -> None:
    options, why = WRONG[what]
    budget = [] if any(option.startswith("--budget") for option in options) else ["--budget", "60%"]
    assert why in refused(run, command, "--shape", SHAPE, *budget, *options)


@pytest.mark.spec("CLI-14", "CLI-15", "ERR-2")
@both
def test_a_model_or_a_shape_must_be_given_and_must_exist(run: Run, command: str, tmp_path: Path) -> None:
    assert "give either --model DIR or --shape NAME" in refused(run, command)
    assert "give either --model DIR or --shape NAME" in refused(run, command, "--budget", "60%", "--weights", "f32")
    assert "invalid choice: 'gpt'" in refused(run, command, "--shape", "gpt")
    assert "is not a folder" in refused(run, command, "--model", tmp_path / "nowhere")
    assert "config.json does not exist" in refused(run, command, "--model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refused(run, command, "--model", tmp_path)


@pytest.mark.spec("PLAN-3", "CLI-14", "CLI-15")
@both
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_a_budget_that_is_too_small_names_the_smallest_and_that_works(run: Run, command: str, weights: str) -> None:
    inventory = inventory_of(SHAPE, weights)
    smallest = smallest_budget(inventory, fixed_of(inventory, 256))
    options = [command, "--shape", SHAPE, "--weights", weights]
    line = refused(run, *options, "--budget", smallest - 1)
    assert f"the smallest that works is {smallest} bytes ({format_nbytes(smallest)})" in line
    assert run(*options, "--budget", smallest)[0] == 0


@pytest.mark.spec("CLI-14", "CLI-15", "ERR-2")
@both
def test_a_picture_that_cannot_be_written_is_one_line(run: Run, command: str, tmp_path: Path) -> None:
    options = [command, "--shape", SHAPE, "--budget", "60%", "--svg"]
    assert "Is a directory" in refused(run, *options, tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in refused(run, *options, tmp_path / "file" / "x.svg")
    assert "cannot be written: File name too long" in refused(run, *options, tmp_path / ("x" * 300))
    if Path("/dev/full").exists():
        assert "cannot be written: No space left on device" in refused(run, *options, "/dev/full")


@pytest.mark.spec("CLI-14", "ERR-2")
def test_absurdly_many_threads_are_refused_by_plan_too(run: Run) -> None:
    refused(run, "plan", "--shape", SHAPE, "--budget", "60%", "--prefetch-threads", ABSURD)


@pytest.mark.spec("CLI-15", "ERR-2")
def test_absurdly_many_threads_are_refused(run: Run) -> None:
    options = ["--shape", SHAPE, "--budget", "60%", "--prefetch-threads", ABSURD]
    assert "must be at most 64" in refused(run, "simulate", *options)


@pytest.mark.spec("CLI-14", "CLI-15", "BUDGET-3")
@pytest.mark.parametrize("option", ["--budget", "--svg"])
@both
def test_an_empty_budget_or_file_is_refused(run: Run, command: str, option: str) -> None:
    refused(run, command, "--shape", "smollm-135m", option, "")


@pytest.mark.spec("CLI-14", "CLI-15", "BUDGET-3")
@both
def test_without_a_budget_there_is_one_that_works(run: Run, command: str) -> None:
    assert run(command, "--shape", "tiny")[0] == 0


def folder_named(name: str, tiny_folder: Path, tmp_path: Path) -> Path:
    try:
        shutil.copytree(tiny_folder, tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    return tmp_path / name


@pytest.mark.spec("CLI-14", "CLI-15")
@both
@pytest.mark.parametrize("name", ["a b", "größe", "🐍", "<b>&", "-x", "40%"])
def test_folders_may_have_any_name(run: Run, command: str, name: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = folder_named(name, tiny_folder, tmp_path)
    svg = tmp_path / "x.svg"
    status, _, err = run(command, f"--model={folder}", "--budget", "600kB", "--svg", svg)
    assert (status, err) == (0, "")
    ET.parse(svg)


@pytest.mark.spec("CLI-14")
@pytest.mark.parametrize("name", ["m[red]", "[bold]m"])
def test_folders_may_have_brackets_in_their_names(run: Run, name: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = folder_named(name, tiny_folder, tmp_path)
    _, out, _ = run("plan", "--model", f"{folder}/", "--budget", "600kB")
    title = re.sub(r"\s+", "", out[: out.index("┏")])
    assert f"/{name}in" in title


@pytest.mark.spec("CLI-14")
def test_a_folder_may_look_like_a_closing_tag(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m[").mkdir()
    folder = folder_named("m[/x]", tiny_folder, tmp_path)
    assert run("plan", "--model", folder, "--budget", "600kB")[0] == 0


@pytest.mark.spec("CLI-15", "TRACE-3")
@pytest.mark.parametrize("name", ["\udcff", "\x01"], ids=ascii)
def test_a_picture_can_be_drawn_for_a_folder_of_any_name(
    run: Run, name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = folder_named(name, tiny_folder, tmp_path)
    assert run("simulate", "--model", folder, "--budget", "600kB", "--svg", tmp_path / "x.svg")[0] == 0
    ET.parse(tmp_path / "x.svg")


@pytest.mark.spec("CLI-17")
def test_what_the_papers_experiment_cannot_use_is_refused_beside_it(run: Run) -> None:
    refused(run, "simulate", "--paper", "--shape", "tiny", "--budget", "nonsense", "--svg", "/no/such/folder/x.svg")
