"""In the wild: what people type out of habit, and what they expect to see."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from command_line import on_terminal, refused, run
from refinfer.cli.main import main
from refinfer.generate import load
from refinfer.model.synth import has_random_weights


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model with random weights."""
    run("synth", tmp_path / "m", "--shape", "tiny")
    return tmp_path / "m"


@pytest.mark.spec("CLI-34")
def test_the_name_of_the_program_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run()
    with pytest.raises(SystemExit):
        run("--help")
    assert (status, out, err) == (0, capsys.readouterr().out or out, "")
    assert out.startswith("usage: refinfer")
    assert "Continue a prompt." in out


@pytest.mark.spec("CLI-34")
def test_a_capital_v_prints_the_version() -> None:
    def ask() -> None:
        with pytest.raises(SystemExit):
            run_plain("-V")

    assert re.fullmatch(r"refinfer \d+\.\d+\.\d+\n", on_terminal(ask, 80))


def run_plain(*argv: str) -> None:
    main(argv)


@pytest.mark.spec("CLI-35", "CLI-23")
@pytest.mark.parametrize("prompt", ["-Hello", "--hello", "-quick brown fox"])
def test_a_prompt_with_a_dash_goes_after_two_dashes(prompt: str) -> None:
    line = refused("generate", prompt)
    hint = "; an argument that begins with a dash, such as a prompt, goes last, after -- (see refinfer generate --help)"
    assert line.endswith(hint)
    status, out, _ = run("generate", "--max-tokens", "2", "-q", "--", prompt)
    assert (status, out[:4]) == (0, prompt[:4])


@pytest.mark.spec("CLI-35")
@pytest.mark.parametrize("argv", [["generate", "a", "b"], ["doctor", "--fast"], ["--fast"], ["cache", "--all"]])
def test_other_errors_have_no_such_hint(argv: list[str]) -> None:
    assert "dash" not in refused(*argv)


@pytest.mark.spec("CLI-33")
def test_quiet_prints_the_text_alone(model: Path, tmp_path: Path) -> None:
    status, out, err = run("generate", "a", "--model", model, "--max-tokens", 3, "--quiet")
    assert (status, err) == (0, "")
    assert out.startswith("a")
    status, out, err = run("pack", model, "-q", "-o", tmp_path / "packed")
    assert (status, out, err) == (0, f"{tmp_path / 'packed'}\n", "")
    assert run("synth", tmp_path / "other", "--shape", "tiny", "-q") == (0, "", "")


@pytest.mark.spec("CLI-33", "CLI-36")
def test_the_bar_has_a_share_and_quiet_shows_none(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(lambda: run_plain("pack", str(model), "-o", str(tmp_path / "one")), 80)
    assert re.search(r"packing the weights .*\d+%", shown)
    assert re.search(r"reading the weights .*\d+%", shown)
    shown = on_terminal(lambda: run_plain("pack", str(model), "-q", "-o", str(tmp_path / "two")), 80)
    assert shown == f"{tmp_path / 'two'}\n"
    shown = on_terminal(lambda: run_plain("synth", str(tmp_path / "other"), "--shape", "tiny", "-q"), 80)
    assert shown == ""
    monkeypatch.chdir(tmp_path)  # a short name leaves room for the bar
    shown = on_terminal(lambda: run_plain("synth", "third", "--shape", "tiny"), 80)
    assert re.search(r"third .*100%", shown)


@pytest.mark.spec("CLI-37", "SYNTH-5")
def test_a_text_of_random_weights_is_called_noise(model: Path, tmp_path: Path) -> None:
    noise = "this model has random weights, so its text is noise"
    assert json.loads((model / "config.json").read_text())["refinfer_random_weights"] is True
    assert has_random_weights(model)
    assert noise in run("generate", "a", "--model", model, "--max-tokens", 3)[2].splitlines()
    assert noise not in run("generate", "ROMEO:", "--max-tokens", 3)[2]
    assert not has_random_weights(tmp_path)
    (tmp_path / "config.json").write_text("[")
    assert not has_random_weights(tmp_path)


@pytest.mark.spec("UNIT-2", "SYNTH-4")
def test_a_large_size_has_a_large_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 123_456_789))
    line = refused("synth", tmp_path / "m", "--shape", "llama2-70b", "--dtype", "f32")
    assert line.endswith("needs 276 GB, but the disk has 123 MB left")


@pytest.mark.spec("DIR-1")
def test_the_cache_directory_has_a_variable_of_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINFER_CACHE_DIR", str(tmp_path / "own"))
    _, out, _ = run("pack", model)
    assert Path(out.strip()).parent == tmp_path / "own"
    assert run("cache", "path")[1] == f"{tmp_path / 'own'}\n"
    assert len(json.loads(run("cache", "list", "--json")[1])["files"]) == 1


@pytest.mark.spec("DIR-2")
def test_one_model_in_two_places_has_two_files_in_the_cache_directory(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy" / "m")
    first, second = (run("pack", folder)[1] for folder in (model, copy))
    assert first != second
    with load(model, weight_cache=tmp_path / "named") as session:
        assert session.weight_cache.state == "built"
    with load(copy, weight_cache=tmp_path / "named") as session:
        assert session.weight_cache.state == "loaded"


@pytest.mark.spec("CLI-24")
@pytest.mark.parametrize(
    ("where", "why"),
    [("thesis.txt", "is not"), ("missing/t.json", "No such"), (".", "Is a d"), ("thesis.txt/t.json", "Not a d")],
)
def test_a_trace_that_cannot_be_written_is_refused_before_the_run(
    where: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinfer.cli.generate.open_folder", lambda path: pytest.fail("the run has begun"))
    (tmp_path / "thesis.txt").write_text("mine")
    line = refused("generate", "--budget", "60%", "--max-tokens", 2, "--trace", tmp_path / where)
    assert str(tmp_path / where) in line
    assert why in line
    assert (tmp_path / "thesis.txt").read_text() == "mine"
