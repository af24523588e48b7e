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
from provider_kinds import Kind, finalized, imported
from provider_life import live
from refinfer.weight_cache.memory import MemoryWeightCacheProvider

HERE = Path(__file__).parent


@pytest.mark.spec("CACHE-2", "CACHE-3", "CACHE-4", "CACHE-5", "CACHE-7", "CACHE-8", "CACHE-10")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_provider_that_is_no_such_dictionary_is_found_out(wrong: type[MemoryWeightCacheProvider]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        live(Kind(lambda _: wrong(), finalized), phases=[Phase.generate])


def suite_on(name: str, of: str) -> subprocess.CompletedProcess[str]:
    """Run those tests of the suite in another process on a class of `own_providers`."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--provider", f"own_providers:{name}"]
    return subprocess.run(
        [*command, "-k", of, str(HERE / "test_provider.py")],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.spec("CACHE-1", "CACHE-3", "CACHE-7", "CACHE-8")
def test_somebody_elses_right_provider_passes_and_no_other_is_tested() -> None:
    done = suite_on("Right", "Right or table_of_verbs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is_a_dictionary[own_providers:Right] PASSED" in done.stdout
    assert "existing_key_wins_and_the_data_is_dropped[own_providers:Right] PASSED" in done.stdout
    assert "the_table_of_verbs_and_states_says_the_same PASSED" in done.stdout
    assert done.stdout.count("own_providers:Right") > 100
    assert not re.search(r"\[(memory|file|loaded file)\b", done.stdout)


@pytest.mark.slow
@pytest.mark.spec("CACHE-3")
def test_somebody_elses_provider_that_lets_the_last_one_win_fails() -> None:
    done = suite_on("LastOneWins", "existing_key or reserved_space")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "existing_key_wins_and_the_data_is_dropped[own_providers:LastOneWins] FAILED" in done.stdout
    assert "reserved_space_is_that_many_zeros_on_a_page[own_providers:LastOneWins-1] PASSED" in done.stdout


@pytest.mark.spec("CACHE-1")
@pytest.mark.parametrize("name", ["own_providers", "own_providers:None", "nobody:Own", ":Own"])
def test_somebody_elses_class_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"--provider {name}: "):
        imported(name)
