"""The labs themselves: their cuts, their tests, and the wrong solutions that their tests must name."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

import lab_table
from lab_trees import WrongSolution, after, failed_of, reach_of, tree, verdict_of, wrong_solutions
from refinfer.labs.catalogue import PACKAGE, Lab, labs, places
from refinfer.labs.check import sentence
from refinfer.labs.regions import blank, regions_of, replaced

ROOT = Path(__file__).parents[2]
each_lab = pytest.mark.parametrize("lab", labs(), ids=lambda lab: lab.number)

# Two wrong solutions of each lab are tried with the slow tests; all others, which take minutes together, are long.
WRONG = [
    pytest.param(
        wrong,
        marks=pytest.mark.slow if n < 2 else pytest.mark.long,
        id=f"{wrong.lab.number} {wrong.name}",
    )
    for _, of_lab in groupby(wrong_solutions(), key=lambda wrong: wrong.lab.number)
    for n, wrong in enumerate(of_lab)
]


@pytest.mark.spec("LAB-1")
@each_lab
def test_a_lab_is_one_to_three_regions_of_five_to_twenty_five_lines_in_all(lab: Lab) -> None:
    assert 1 <= len(lab.places) <= 3
    lines = [line for place in lab.places for line in place.region.text.splitlines()]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert 5 <= len(code) <= 25


@pytest.mark.spec("LAB-1")
def test_every_region_belongs_to_a_lab_and_its_task_is_one_sentence() -> None:
    assert {place.region.lab for place in places()} == {lab.number for lab in labs()}
    for place in places():
        assert not place.region.task.endswith(".")
        assert '"' not in place.region.task


@pytest.mark.spec("LAB-2")
@pytest.mark.parametrize("module", sorted({place.module for place in places()}))
def test_blanking_and_putting_back_gives_the_same_bytes(module: str) -> None:
    source = (PACKAGE.parent / module).read_text()
    found = regions_of(source)
    blanked = replaced(source, {i: blank(region) for i, region in enumerate(found)})
    assert blanked != source
    assert [region.text for region in regions_of(blanked)] == [blank(region) for region in found]
    assert replaced(blanked, {i: region.text for i, region in enumerate(found)}) == source


@pytest.mark.spec("LAB-3")
@each_lab
def test_what_the_catalogue_names_exists(lab: Lab) -> None:
    assert len(list((ROOT / "tutorials").glob(f"{lab.page}-*.md"))) == 1
    assert 20 <= lab.minutes <= 60
    assert len(lab.hints) == 3
    assert len(lab.tests) == len(set(lab.tests)) >= 3
    spec = (ROOT / "docs" / "spec.md").read_text()
    for clause in lab.clauses:
        assert f"**{clause}**" in spec
    for test in lab.tests:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), test


@pytest.mark.spec("LAB-3", "BOOK-10")
def test_the_page_for_teachers_has_every_lab() -> None:
    assert lab_table.table() in lab_table.PAGE.read_text()


@pytest.mark.slow
@pytest.mark.spec("LAB-4")
@each_lab
def test_a_solved_lab_passes_while_all_later_ones_are_blank(lab: Lab, tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, lab, blanks=after(lab))
    assert verdict.passed, verdict


@pytest.mark.slow
@pytest.mark.spec("LAB-4")
@each_lab
def test_no_law_of_a_blank_lab_holds_and_each_failure_names_the_lab(lab: Lab, tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, lab, blanks=[lab.number])
    assert (verdict.held, verdict.problem) == (0, None)
    assert len(verdict.failures) == len(lab.tests)
    for failure in verdict.failures:  # each has come to the region, and says which lab it is
        assert f"lab {lab.number}: " in failure.lines[0], failure


@pytest.mark.slow
@pytest.mark.spec("LAB-2")
def test_a_tree_in_which_every_lab_is_blank_passes_mypy_and_ruff(tmp_path: Path) -> None:
    tree(tmp_path, blanks=[lab.number for lab in labs()])
    settings = str(ROOT / "pyproject.toml")
    for command in (
        ["ruff", "check", "--config", settings, "--no-cache", "refinfer"],
        ["mypy", "--config-file", settings, "--cache-dir", str(tmp_path / "cache"), "refinfer"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.spec("LAB-12")
@each_lab
def test_every_lab_has_five_wrong_solutions_or_more(lab: Lab) -> None:
    wrong = [each for each in wrong_solutions() if each.lab == lab]
    assert len(wrong) >= 5
    assert {each.law for each in wrong} <= {test.rpartition("::")[2] for test in lab.tests}


@pytest.mark.spec("LAB-12", "LAB-13")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_solution_is_named_by_its_law_in_a_line_that_people_can_read(
    wrong: WrongSolution, tmp_path: Path
) -> None:
    verdict = verdict_of(tmp_path, wrong.lab, own=wrong.own)
    assert not verdict.passed
    assert verdict.failure is not None, verdict
    assert verdict.failure.sentence == sentence(f"::{wrong.law}"), verdict
    assert 1 <= len(verdict.failure.lines) <= 4
    first = verdict.failure.lines[0]
    assert len(first) <= 240
    assert not re.match(r"assert |\(|\[|Not equal|Arrays are not", first), first


@pytest.mark.long
@pytest.mark.spec("LAB-4")
@each_lab
def test_of_the_files_of_a_lab_only_tests_that_come_to_its_regions_fail_while_it_is_blank(
    lab: Lab, tmp_path: Path
) -> None:
    files = list(dict.fromkeys(test.partition("::")[0] for test in lab.tests))
    come_to: set[str] = set()
    for place in lab.places:
        region = place.region
        lines = range(region.first + 1, region.end + 1)
        folder = tmp_path / f"reach-{place.module.replace('/', '-')}-{place.order}"
        come_to |= {test for test, (_, seen) in reach_of(folder, place.module, files).items() if set(lines) & set(seen)}
    failed = failed_of(tmp_path / "blank", lab, files)
    assert failed
    starting = {file for file in files if "from children import" in (ROOT / file).read_text()}
    others = {test for test in failed - come_to if test.partition("::")[0] not in starting}  # no builder of its own
    assert not others, sorted(others)
