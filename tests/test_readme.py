"""The README's links lead to files, and CI runs its commands; its examples run with `pytest -m pages`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.spec("CLI-9")
def test_the_readme_has_two_commands_and_ci_runs_the_second() -> None:
    assert [re.findall(r"^# (\d)", block) for block in fences("bash")] == [["1"], ["2"]]
    assert "/^# 2/" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.spec("CLI-9")
def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)
