"""The suite for weight sources accepts a correct source and fails each of the wrong ones in `own_sources`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

sys.path.insert(0, str(Path(__file__).parent))

SUITE: Final = Path(__file__).with_name("test_any_source.py")
ROOT: Final = SUITE.parents[2]

FOUND_BY: Final = {
    "SilentlyRounded": "execution_order",
    "ForgetsBiases": "execution_order",
    "AddsToOut": "written_to_out",
    "LeavesOutAlone": "written_to_out",
    "GivesTheSameResultAgain": "callers_own",
    "ScalesX": "x_stays_as_it_was",
    "MultipliesNoMoreThan64Rows": "for_many",
    "RoundsX": "rounding_of_a_sum",
    "CountsRowsFromTheEnd": "row_that_does_not_exist",
    "ReadsEachRowOnce": "also_repeated",
    "GivesViewsOfRows": "rows_are_the_callers_own",
    "SwapsGateAndUp": "execution_order",
    "SwapsNorms": "norms_are",
    "BeginsWithTheLastLayer": "execution_order",
    "LeavesOutALayer": "shape_that_the_config_says",
    "WalksOnce": "again_and_again",
    "GivesTheLayersThatTheFirstPassSaw": "left_anywhere",
    "StaysInAPassThatWasLeft": "left_anywhere",
    "SwallowsWhatIsRaised": "as_it_is",
    "RaisesAnotherError": "as_it_is",
    "WantsTheOutputTableUsed": "before_the_output_table",
    "ChecksAPassThatIsLeft": "damage_during",
    "ChecksBeforeAPassAlone": "damage_during",
    "GoesOnWhereAPassWasLeft": "left_anywhere",
    "SharesLayersWithEveryOther": "disturb_each_other",
    "IsEmptyOnceClosed": "does_not_begin",
    "WorksOnceClosed": "does_not_begin",
    "IsClosedFromTheFirstLayerOn": "does_not_begin",
    "ClosesOnce": "closing_again",
    "LeavesAThread": "no_thread",
    "LeavesADescriptor": "no_descriptor",
}
"""The wrong sources of `own_sources`, and a word of a test that finds each."""


def suite_on(
    classes: Sequence[str], of: str, module: str = "own_sources", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run those tests of the suite in another process on classes of `own_sources`."""
    options = [option for name in classes for option in ("--source", f"{module}:{name}")]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "--tb=no", "-p", "no:cacheprovider", *options, "-k", of, str(SUITE)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.spec("OFFLOAD-12")
def test_somebody_elses_right_sources_pass_and_each_wrong_one_is_found_out() -> None:
    """In one run: all tests of those that are right, of each other one only what must find it."""
    right = ["Right", "Rounded", "Checked"]
    wanted = [f":{name}-" for name in right] + [f"(:{name}- and {test})" for name, test in FOUND_BY.items()]
    done = suite_on([*right, *FOUND_BY], " or ".join(wanted))
    assert done.returncode == 1, done.stdout + done.stderr
    told = re.findall(r"::(\w+)\[own_sources:(\w+)-.*\] (\w+)", done.stdout)
    assert {name for _, name, _ in told} == {*right, *FOUND_BY}
    assert {name for _, name, how in told if how == "FAILED"} == set(FOUND_BY)
    assert sum(name == "Right" for _, name, _ in told) > 40
    assert not re.search(r"\[(row-major|mapped)", done.stdout)


@pytest.mark.spec("OFFLOAD-12", "CLI-28")
def test_somebody_elses_class_is_found_in_the_current_folder_and_one_that_is_not_there_is_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text("from own_sources import Right\n\nclass Own(Right): ...\n")
    done = suite_on(["Own"], "execution_order", module="mine", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[mine:Own-two tables] PASSED" in done.stdout
    done = suite_on(["Missing"], "execution_order", module="mine", cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --source mine:Missing: mine has no 'Missing'"
