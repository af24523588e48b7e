"""Checks a lab: puts a student's regions into a clean copy of the package, and runs the lab's tests on it.

Each check is a process of its own, with limits on time and memory. A lab is passed if the report names every test of
it as passed, so silence is failure. This is not a sandbox: the code runs with the rights of whoever checks it.
Leaves to others: what the tests are (`catalogue`), their report (`reporter`), what is printed (`cli.lab`).
Read more: tutorial 00; clauses LAB-9 to LAB-14.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from refinfer import __version__
from refinfer.errors import LabError
from refinfer.labs.catalogue import PACKAGE, Lab, Place, course, lab_of
from refinfer.labs.regions import blank, is_blank, regions_of, replaced
from refinfer.labs.workspace import Workspace, copy_folder, copy_package

__all__ = [
    "MEMORY_LIMIT",
    "REPORT",
    "TIME_LIMIT",
    "Failure",
    "Limits",
    "Verdict",
    "check",
    "clean_copy",
    "environment",
    "require_pytest",
    "run_tests",
    "sentence",
]

REPORT: Final = "REFINFER_LAB_REPORT"
"""The environment variable with the file that the report is written to."""

MEMORY_LIMIT: Final = "REFINFER_LAB_BYTES"
"""The environment variable with the largest number of bytes that the tests may take."""

TIME_LIMIT: Final = "REFINFER_LAB_SECONDS"
"""The environment variable with the number of seconds after which the tests end by themselves."""

_DYING_S: Final = 2.0
_UNWANTED: Final = ("PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "COVERAGE_PROCESS_START")

_SETTINGS: Final = """\
[pytest]
addopts = --import-mode=importlib -p no:cacheprovider -p refinfer.labs.reporter -q --tb=no
pythonpath = . {paths}
filterwarnings = error
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a check may take."""

    seconds: float = 60
    nbytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class Failure:
    """A law that does not hold: its sentence, its clauses with their text, what was seen, what was printed."""

    sentence: str
    clauses: tuple[str, ...]
    lines: tuple[str, ...]
    printed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found: how many of the lab's laws hold, and what to do about the first that does not.

    `problem` says why there is nothing to count, such as a syntax error; `notes` are about changes outside the lab.
    `failures` are the laws that do not hold, in the lab's order.
    """

    lab: Lab
    held: int
    problem: str | None = None
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def failure(self) -> Failure | None:
        """The first law that does not hold."""
        return self.failures[0] if self.failures else None

    @property
    def passed(self) -> bool:
        """Whether every law of the lab holds."""
        return self.problem is None and self.held == len(self.lab.tests)


def require_pytest() -> None:
    """Require what tests are run with.

    Raises:
        LabError: it is not installed.
    """
    if missing := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
        raise LabError(f"the labs need {' and '.join(missing)}; install them with: pip install 'refinfer[labs]'")


def check(
    workspace: Workspace,
    lab: Lab,
    *,
    reference_before: bool = False,
    tests: Path | None = None,
    limits: Limits = Limits(),
) -> Verdict:
    """Check a lab of a workspace.

    Args:
        workspace: the student's folder.
        lab: which lab.
        reference_before: whether earlier labs are ours; otherwise those that were passed are the student's own.
        tests: a folder of tests to run instead of those of the course.
        limits: what the check may take.

    Raises:
        LabError: pytest or the tests are not there.
    """
    require_pytest()
    try:
        for place in lab.places:
            region = workspace.region(place)
            at = f"({place.module}, line {region.first})"
            if is_blank(region):
                return Verdict(lab, 0, f"not written yet: {place.region.task} {at}")
            if blank(region).strip() in region.text:
                return Verdict(lab, 0, f"the line that raises NotImplementedError is still there; remove it {at}")
        if not workspace.is_begun(lab):
            return Verdict(lab, 0, f"not begun, this is our code; refinfer lab reset {lab.number} makes it blank")
        notes = tuple(workspace.strays(lab))
        if notes and (version := workspace.state.version) != __version__:
            notes = (f"the workspace is from refinfer {version}; what is outside the lab is that of {__version__}",)
    except LabError as error:
        return Verdict(lab, 0, str(error))
    before = [] if reference_before else [lab_of(n) for n in workspace.state.passed if n < lab.number]
    with tempfile.TemporaryDirectory(prefix="refinfer-lab-") as folder:
        copy = Path(folder)
        try:
            lines = clean_copy(copy, workspace, [*before, lab])
        except LabError as error:
            return Verdict(lab, 0, str(error), notes=notes)
        return replace(run_tests(copy, lab, lines, tests=tests, limits=limits), notes=notes)


Lines = dict[tuple[str, int], int]
"""For a module and a line of the clean copy, the line of the student's file."""


def clean_copy(folder: Path, workspace: Workspace, taken: Sequence[Lab]) -> Lines:
    """Write a copy of the package in which some labs are a student's; return where its lines came from.

    Raises:
        LabError: a region cannot be found, or the module would not be Python.
    """
    copy_package(folder)
    lines: Lines = {}
    by_module: dict[str, list[Place]] = {}
    for place in (place for lab in taken for place in lab.places):
        by_module.setdefault(place.module, []).append(place)
    for module, found in by_module.items():
        own = {place.order: workspace.region(place) for place in found}
        ours = (PACKAGE.parent / module).read_text(encoding="utf-8")
        source = replaced(ours, {order: region.text for order, region in own.items()})
        for order, region in enumerate(regions_of(source)):
            if order in own:
                shift = own[order].first - region.first
                lines |= {(module, n): n + shift for n in range(region.first + 1, region.end + 1)}
        try:
            with warnings.catch_warnings(action="error"):
                compile(source, module, "exec")
        except SyntaxError as error:
            line = lines.get((module, error.lineno or 0))
            place_of = f"{module}, line {line}" if line else f"{module}, in lab {taken[-1].number}"
            raise LabError(f"{place_of}: {error.msg}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise LabError(f"{module}: {str(error) or 'it is nested too deeply'}") from None
        (folder / module).write_text(source, encoding="utf-8")
    return lines


def run_tests(
    copy: Path, lab: Lab, lines: Lines | None = None, *, tests: Path | None = None, limits: Limits = Limits()
) -> Verdict:
    """Run the tests of a lab on a copy of the package, in a process of its own; `lines` are those of `clean_copy`.

    Raises:
        LabError: the tests are not there.
    """
    home = course()
    copy_folder(tests or home / "tests", copy / "tests", without="wrong")
    (copy / "docs").mkdir()
    shutil.copy(home / "docs" / "spec.md", copy / "docs" / "spec.md")
    folders = [f"tests/{path.name}" for path in sorted((copy / "tests").iterdir()) if path.is_dir()]
    (copy / "pytest.ini").write_text(_SETTINGS.format(paths=" ".join(folders)), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="refinfer-lab-") as scratch:  # out of reach of what empties its own folder
        records, said, is_late = _run(copy, lab, limits, Path(scratch))
    verdict = _judge(lab, records, _clauses(home / "docs" / "spec.md"), lines or {})
    if verdict.problem is not None or any("ended" in record for record in records):
        return verdict
    if is_late:
        after = f"not over after {limits.seconds:g} seconds"
        at = _at(re.findall(r'File "(.+)", line (\d+)', said), copy, lines or {})
        problem = f"{after}, in: {_latest(records)} Is there a loop that does not end?{at and f' ({at})'}"
    elif any(record.get("collected") for record in records):
        problem = f"the program ended in the middle of: {_latest(records)}"
    else:
        problem = f"the tests cannot be run: {said.splitlines()[-1]}"
    return Verdict(lab, verdict.held, problem)


def _run(copy: Path, lab: Lab, limits: Limits, scratch: Path) -> tuple[list[dict[str, Any]], str, bool]:
    """Run the tests of a lab; return their report, what was printed, and whether they were ended.

    A program that is ended prints where it was, as pytest has it.
    """
    report, output = scratch / "report.jsonl", scratch / "output"
    added = {
        "OPENBLAS_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TMPDIR": str(scratch),
        REPORT: str(report),
        MEMORY_LIMIT: str(limits.nbytes),
        TIME_LIMIT: str(limits.seconds),
    }
    with output.open("w+b") as file:
        running = subprocess.Popen(  # noqa: S603  (the tests of this package)
            [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--rootdir", str(copy), *lab.tests],
            cwd=copy,
            env=environment(copy) | added,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            running.wait(limits.seconds)
            is_late = False
        except subprocess.TimeoutExpired:
            is_late = True
            running.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(_DYING_S)
        finally:
            _kill(running)
        file.seek(0)
        said = file.read().decode(errors="replace").strip() or "nothing was printed"
    records = []
    with contextlib.suppress(OSError):  # the code has removed it
        for line in report.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the program ended within a line
                records.append(json.loads(line))
    return records, said, is_late


def environment(copy: Path) -> dict[str, str]:
    """Return the environment of a program that runs a clean copy, whatever this one has for other programs."""
    kept = {name: text for name, text in os.environ.items() if name not in _UNWANTED and not name.startswith("PYTEST_")}
    path = os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def _kill(running: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    else:
        running.kill()
    running.wait()


def _judge(lab: Lab, records: list[dict[str, Any]], clauses: dict[str, str], lines: Lines) -> Verdict:
    """Count the laws that hold: those of which every test was collected, and reported as passed."""
    if broken := next((record for record in records if "broken" in record), None):
        return Verdict(lab, 0, f"{broken['broken']} cannot be imported: {broken['why']}")
    collected = [test for record in records for test in record.get("collected", [])]
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "test" in record:
            outcomes.setdefault(record["test"], []).append(record)
    held, failures = 0, list[Failure]()
    for law in lab.tests:
        tests = [test for test in collected if test == law or test.startswith(f"{law}[")]
        failed = next((r for test in tests for r in outcomes.get(test, []) if r["outcome"] != "passed"), None)
        done = [any(r["when"] == "call" and r["outcome"] == "passed" for r in outcomes.get(t, [])) for t in tests]
        if tests and all(done) and failed is None:
            held += 1
        elif failed is not None:
            failures.append(_failure(failed, clauses, lines))
    return Verdict(lab, held, None, tuple(failures))


def _failure(record: dict[str, Any], clauses: dict[str, str], lines: Lines) -> Failure:
    seen = list(record.get("lines", []))
    if case := re.search(r"\[(.+)\]$", record["test"]):
        seen.append(f"case: {case[1]}")
    if at := _at(record.get("where", []), Path(), lines):
        seen.append(f"at {at}")
    marks = [f"{mark}: {clauses[mark]}" for mark in record.get("clauses", []) if mark in clauses]
    return Failure(sentence(record["test"]), tuple(marks), tuple(seen), tuple(record.get("printed", [])))


def _at(frames: Sequence[tuple[str, Any]], copy: Path, lines: Lines) -> str:
    """Return the place in a student's file that the first of some frames of a copy is in; empty if none is."""
    places = ((os.path.relpath(path, copy), int(number)) for path, number in frames)
    return next((f"{module}, line {lines[module, n]}" for module, n in places if (module, n) in lines), "")


def _latest(records: list[dict[str, Any]]) -> str:
    """Return the sentence of the test that had begun last."""
    return next((sentence(record["began"]) for record in reversed(records) if "began" in record), "the first test.")


def sentence(test: str) -> str:
    """Return the sentence that the name of a test is.

    Examples:
        >>> sentence("tests/model/test_layers.py::test_attention_equals_its_formula[2-3]")
        'Attention equals its formula.'
    """
    words = re.sub(r"\[.*", "", test).rpartition("::")[2].removeprefix("test_").replace("_", " ")
    return f"{words[:1].upper()}{words[1:]}."


def _clauses(page: Path) -> dict[str, str]:
    """Return the sentence of each clause."""
    pattern = r"^- <a .+?</a>\*\*([A-Z]+-\d+)\*\* (.+?) \*Source: "
    return dict(re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.MULTILINE))
