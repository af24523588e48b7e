"""The README says what is true: its examples are run, its links lead somewhere, its commands are what CI runs."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from refinfer.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.spec("CLI-9")
def test_the_console_example_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = fences("console")
    command, _, output = example.partition("\n")
    argv = shlex.split(command.removeprefix("$ "))
    assert argv[0] == "refinfer"
    assert main(argv[1:]) == 0
    assert capsys.readouterr().out == output


@pytest.mark.spec("CLI-9")
def test_the_python_example_prints_what_the_readme_shows() -> None:
    (code,), (output,) = fences("python"), fences("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == output


@pytest.mark.spec("CLI-9")
def test_the_readme_has_two_commands_and_ci_runs_the_second() -> None:
    assert [re.findall(r"^# (\d)", block) for block in fences("bash")] == [["1"], ["2"]]
    assert "/^# 2/" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.spec("CLI-9")
def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)
