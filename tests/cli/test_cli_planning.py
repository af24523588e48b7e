"""What `plan` and `simulate` share: how a model and a budget are named, one line for every wrong use."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from refinfer.cli import planning
from refinfer.cli.planning import format_rate
from refinfer.inventory import Inventory
from refinfer.model.folder import DEFAULT_POSITIONS, open_folder
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import DEVICES, HERE, PREFETCH_THREADS, Calibration, calibration_of, costs_of
from refinfer.planning.plan import MOST_PREFETCH_THREADS, Prefetch, make_plan, smallest_budget
from refinfer.units import format_nbytes

sys.path.insert(0, str(Path(__file__).parent))
from command_line import json_of, refused, run
from questions import SHAPE, folder_named, inventory_of

both = pytest.mark.parametrize("command", ["plan", "simulate"])


@pytest.mark.spec("CLI-14", "CLI-15")
def test_a_rate_has_three_digits_or_if_it_is_large_one_after_the_point() -> None:
    rates = [None, 0.04384, 0.5, 9.996, 38.66, 1234.56]
    assert [format_rate(rate) for rate in rates] == ["", "0.0438", "0.500", "10.0", "38.7", "1,234.6"]


@pytest.mark.spec("CLI-16", "CAL-4")
@both
def test_the_last_line_says_whether_the_figures_were_measured_here_and_by_what(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = replace(HERE.device, source="a bench in a file")
    processor = replace(HERE.processor, source="a bench in a file")
    for measured, line in (
        (True, "disk and processor as measured here: a bench in a file"),
        (False, "assuming: disk virtual-disk (a bench in a file); processor one core of the figures page (a bench"),
    ):
        calibration = Calibration(device, processor, measured)
        monkeypatch.setattr(planning, "known_calibration", lambda *_, found=calibration: found)
        assert line in " ".join(run(command, "--shape", SHAPE, "--budget", "60%")[1].split())


@pytest.mark.spec("CLI-14", "CLI-15")
@both
def test_a_model_folder_is_enough_and_its_weights_are_not_read(command: str, tiny_folder: Path) -> None:
    got = json_of(command, "--model", tiny_folder, "--budget", "600kB")
    assert (got["model"], got["format"]) == (str(tiny_folder), "f32")  # a float32 checkpoint
    assert got["positions"] == 96  # no more than the model has
    config = open_folder(tiny_folder).config
    inventory = Inventory(config, "f32")
    assert got["streamable_bytes"] == inventory.streamable_nbytes
    if command == "plan":
        assert got["smallest_budget_bytes"] == smallest_budget(inventory, fixed_of(inventory, 96))
    assert json_of(command, "--model", tiny_folder, "--budget", "600kB", "--weights", "int8")["format"] == "int8"


@pytest.mark.spec("CLI-14", "CLI-15")
@both
def test_the_config_of_a_folder_is_enough_if_a_format_is_named(command: str, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    assert json_of(command, "--model", tmp_path, "--weights", "int8", "--budget", "600kB")["format"] == "int8"


@pytest.mark.spec("CLI-14", "CLI-15")
@both
def test_a_shape_defaults_to_bf16_and_to_a_budget_of_half_its_weights(command: str) -> None:
    got = json_of(command, "--shape", "smollm-135m")
    assert (got["format"], got["positions"], got["prefetch_threads"]) == ("bf16", DEFAULT_POSITIONS, PREFETCH_THREADS)
    budget = got["plans"][0]["budget_bytes"] if command == "plan" else got["budget_bytes"]
    assert budget == got["streamable_bytes"] // 2


@pytest.mark.spec("CLI-16")
@both
def test_the_last_line_says_what_is_assumed_if_nothing_was_measured(command: str) -> None:
    _, out, _ = run(command, "--shape", SHAPE, "--budget", "60%", "--device", "emmc")
    last = out.splitlines()[-1]
    assert last.startswith("assuming: disk emmc (eMMC 5.1")
    assert "processor" in last
    assert "docs/figures/matmul.json" in last
    got = json_of(command, "--shape", SHAPE, "--budget", "60%", "--device", "emmc")
    assert got["measured"] is False
    assert got["device_source"] == DEVICES["emmc"].source
    assert "matmul.json" in got["processor_source"]


@pytest.mark.spec("CLI-14", "CLI-15", "PLAN-12", "TRACE-3")
@both
def test_a_picture_is_written_and_is_the_same_each_time(command: str, tmp_path: Path) -> None:
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
    json_of(command, "--shape", SHAPE, "--budget", "60%", "--svg", tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_bytes() == pictures[0]


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
    "model as well": (["--model", "somewhere"], "--model and --shape were both given; give one of them"),
    "unknown option": (["--fast"], "unrecognized arguments: --fast"),
    "abbreviated option": (["--pos", "5"], "unrecognized arguments: --pos 5"),
    "svg in no folder": (["--svg", "/no/such/folder/x.svg"], "cannot be written: No such file or directory"),
}


@pytest.mark.spec("CLI-14", "CLI-15", "CLI-3", "ERR-2", "BUDGET-3", "PLAN-3")
@both
@pytest.mark.parametrize("what", WRONG)
def test_every_wrong_use_gets_one_line_and_status_2(command: str, what: str) -> None:
    options, why = WRONG[what]
    budget = [] if any(option.startswith("--budget") for option in options) else ["--budget", "60%"]
    assert why in refused(command, "--shape", SHAPE, *budget, *options)


@pytest.mark.spec("CLI-14", "CLI-15", "ERR-2")
@both
def test_a_model_or_a_shape_must_be_given_and_must_exist(command: str, tmp_path: Path) -> None:
    assert "a model is missing; give --model DIR or --shape NAME" in refused(command)
    assert "a model is missing" in refused(command, "--budget", "60%", "--weights", "f32")
    assert "invalid choice: 'gpt'" in refused(command, "--shape", "gpt")
    assert "is not a folder" in refused(command, "--model", tmp_path / "nowhere")
    assert "config.json does not exist" in refused(command, "--model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refused(command, "--model", tmp_path)


@pytest.mark.spec("PLAN-3", "CLI-14", "CLI-15")
@both
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_a_budget_that_is_too_small_names_the_smallest_and_that_works(command: str, weights: str) -> None:
    inventory = inventory_of(SHAPE, weights)
    smallest = smallest_budget(inventory, fixed_of(inventory, 256))
    options = [command, "--shape", SHAPE, "--weights", weights]
    line = refused(*options, "--budget", smallest - 1)
    assert f"the smallest that works is {smallest} bytes ({format_nbytes(smallest)})" in line
    assert run(*options, "--budget", smallest)[0] == 0


@pytest.mark.spec("CLI-14", "CLI-15", "ERR-2")
@both
def test_a_picture_that_cannot_be_written_is_one_line(command: str, tmp_path: Path) -> None:
    options = [command, "--shape", SHAPE, "--budget", "60%", "--svg"]
    assert "Is a directory" in refused(*options, tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in refused(*options, tmp_path / "file" / "x.svg")
    assert "cannot be written: File name too long" in refused(*options, tmp_path / ("x" * 300))
    if Path("/dev/full").exists():
        assert "cannot be written: No space left on device" in refused(*options, "/dev/full")
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be written: No such device or address" in refused(*options, tmp_path / "pipe")  # nobody reads it


@pytest.mark.spec("CLI-24")
@both
def test_where_no_file_may_be_made_a_picture_still_goes_into_a_pipe(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for anybody but root with /dev/stdout."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    options = [command, "--shape", SHAPE, "--budget", "60%", "--svg"]
    assert "cannot be written: Permission denied" in refused(*options, tmp_path / "x.svg")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run(*options, tmp_path / "pipe")[0] == 0
        assert os.read(reader, 1000).startswith(b"<svg ")
    finally:
        os.close(reader)


@pytest.mark.spec("CLI-24")
@both
def test_a_picture_goes_into_a_pipe_that_has_no_name_of_its_own(command: str) -> None:
    reader, writer = os.pipe()
    try:
        if not Path(f"/dev/fd/{writer}").exists():
            pytest.skip("this system has no /dev/fd")
        assert run(command, "--shape", SHAPE, "--budget", "60%", "--svg", f"/dev/fd/{writer}")[0] == 0
        assert os.read(reader, 60).startswith(b"<svg ")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.spec("CLI-24")
@both
@pytest.mark.parametrize("content", [b"a thesis", b"<svg", b'<svg xmlns="http://www.w3.org/2000/svg">', bytes(100)])
def test_a_picture_takes_the_place_of_a_picture_of_ours_only(command: str, content: bytes, tmp_path: Path) -> None:
    options = [command, "--shape", SHAPE, "--budget", "60%", "--svg", tmp_path / "x.svg"]
    (tmp_path / "x.svg").write_bytes(content)
    assert "x.svg is not what this command writes there, and stays as it is" in refused(*options)
    assert (tmp_path / "x.svg").read_bytes() == content
    (tmp_path / "x.svg").unlink()
    assert run(*options)[0] == 0
    (tmp_path / "x.svg").chmod(0o600)
    assert run(*options)[0] == 0
    assert (tmp_path / "x.svg").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["x.svg"]


@pytest.mark.spec("CLI-24")
@both
def test_a_picture_that_would_replace_another_file_is_refused_before_anything_is_computed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").write_text("dear")
    monkeypatch.setattr(planning, "_inventory", lambda args: pytest.fail("it computes"))
    assert "thesis is not what this command writes there" in refused(
        command, "--shape", "tiny", "--svg", tmp_path / "thesis"
    )
    assert (tmp_path / "thesis").read_text() == "dear"


@pytest.mark.spec("CLI-14", "CLI-15", "ERR-2")
@both
def test_absurdly_many_threads_are_refused(command: str) -> None:
    options = ["--shape", SHAPE, "--budget", "1GB", "--prefetch-threads"]
    assert "must be at most 64" in refused(command, *options, ABSURD)
    assert json_of(command, *options, MOST_PREFETCH_THREADS)["prefetch_threads"] == MOST_PREFETCH_THREADS


@pytest.mark.spec("CAL-4")
@pytest.mark.parametrize("threads", [0, 1, 9])
def test_a_prediction_rests_on_what_reads_cost_with_the_threads_asked_for(threads: int) -> None:
    options = ["--shape", SHAPE, "--weights", "int8", "--budget", "16MB", "--positions", 100]
    got = json_of("plan", *options, "--prefetch-threads", threads)
    inventory = inventory_of(SHAPE, "int8")
    costs = costs_of(inventory, calibration_of(None), prefetch_threads=threads)
    fixed = fixed_of(inventory, 100, threads)
    for row in got["plans"]:
        plan = make_plan(row["plan"], inventory, fixed, 16_000_000, costs, prefetch=Prefetch(threads))
        assert row["predicted_tokens_per_s"] == pytest.approx(1 / plan.token_s)


@pytest.mark.spec("CLI-14", "CLI-15", "BUDGET-3")
@pytest.mark.parametrize("option", ["--budget", "--svg"])
@both
def test_an_empty_budget_or_file_is_refused(command: str, option: str) -> None:
    refused(command, "--shape", "smollm-135m", option, "")


@pytest.mark.spec("CLI-14", "CLI-15", "BUDGET-3")
@both
def test_the_default_budget_works(command: str) -> None:
    assert run(command, "--shape", "tiny")[0] == 0


@pytest.mark.spec("CLI-14", "CLI-15")
@both
@pytest.mark.parametrize("name", ["a b", "größe", "🐍", "<b>&", "-x", "40%"])
def test_folders_may_have_any_name(command: str, name: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = folder_named(name, tiny_folder, tmp_path)
    svg = tmp_path / "x.svg"
    status, _, err = run(command, f"--model={folder}", "--budget", "600kB", "--svg", svg)
    assert (status, err) == (0, "")
    ET.parse(svg)
