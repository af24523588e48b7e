"""`pytest --provider package:Class` holds anybody's weight cache provider to the laws of one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase

from own_providers import WRONG
from provider_kinds import Kind, finalized
from provider_life import live
from refinfer.weight_cache.memory import MemoryWeightCacheProvider

HERE = Path(__file__).parent


@pytest.mark.spec("CACHE-2", "CACHE-3", "CACHE-4", "CACHE-5", "CACHE-7", "CACHE-8", "CACHE-10")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_provider_that_is_no_such_dictionary_is_found_out(wrong: type[MemoryWeightCacheProvider]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        live(Kind(lambda _: wrong(), finalized), phases=[Phase.generate])


def suite_on(name: str, of: str, cwd: Path = HERE.parents[1]) -> subprocess.CompletedProcess[str]:
    """Run those tests of the suite in another process on somebody's class."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--provider", name]
    return subprocess.run(
        [*command, "-k", of, str(HERE / "test_provider.py")],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.spec("CACHE-13", "CACHE-3", "CACHE-7", "CACHE-8")
@pytest.mark.parametrize("name", ["own_providers:Right", "own_providers:InOtherWords"])
def test_somebody_elses_right_provider_passes_and_no_other_is_tested(name: str) -> None:
    done = suite_on(name, f"{name.partition(':')[2]} or table_of_verbs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"is_a_dictionary[{name}] PASSED" in done.stdout
    assert f"existing_key_wins_and_the_data_is_dropped[{name}] PASSED" in done.stdout
    assert "the_table_of_verbs_and_states_says_the_same PASSED" in done.stdout
    assert done.stdout.count(name) > 100
    assert not re.search(r"\[(memory|file|loaded file)\b", done.stdout)


@pytest.mark.slow
@pytest.mark.spec("CACHE-13", "CACHE-3")
def test_somebody_elses_provider_that_lets_the_last_one_win_fails() -> None:
    done = suite_on("own_providers:LastOneWins", "existing_key or reserved_space")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "existing_key_wins_and_the_data_is_dropped[own_providers:LastOneWins] FAILED" in done.stdout
    assert "reserved_space_is_that_many_zeros_on_a_page[own_providers:LastOneWins-1] PASSED" in done.stdout


@pytest.mark.spec("CACHE-13", "CLI-28")
def test_somebody_elses_class_is_found_in_the_current_folder_and_one_that_is_not_there_is_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text("from own_providers import Right\n\nclass Own(Right): ...\n")
    done = suite_on("mine:Own", "existing_key", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "existing_key_wins_and_the_data_is_dropped[mine:Own] PASSED" in done.stdout
    done = suite_on("mine:Missing", "existing_key", cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --provider mine:Missing: mine has no 'Missing'"
