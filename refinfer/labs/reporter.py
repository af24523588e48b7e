"""A plugin of pytest: reports each test in a line of JSON, with what failed in one or two sentences.

Runs inside the process that `check` starts; limits the time and memory of that process. Leaves to others: which
tests are run, what is made of the report (`check`).
Read more: tutorial 00; clause LAB-10.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest

from refinfer.labs.check import MEMORY_LIMIT, REPORT, TIME_LIMIT

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Reporter", "explain"]

_LONGEST: Final = 240
_MOST_PRINTED: Final = 3
_FOUND: Final = "(?:Falsifying example|Failing test case)"  # as hypothesis has called it over the years
_GRACE_S: Final = 1.0
_MARKS: Final = ("spec(*ids)", "slow", "long", "pages", "browser", "attack")


def pytest_configure(config: pytest.Config) -> None:
    """Limit this process's time and memory; a report that is asked for is begun."""
    for mark in _MARKS:
        config.addinivalue_line("markers", f"{mark}: as in the specification")
    if seconds := os.environ.get(TIME_LIMIT):
        faulthandler.dump_traceback_later(float(seconds) + _GRACE_S, exit=True, file=2)
    if resource is not None and (limit := os.environ.get(MEMORY_LIMIT)):
        resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    if path := os.environ.get(REPORT):
        config.pluginmanager.register(Reporter(Path(path)))


def pytest_collection() -> None:
    """Have a property test report its smallest failing example alone."""
    hypothesis.settings.register_profile(
        "labs", hypothesis.settings(), report_multiple_bugs=False, print_blob=False, database=None
    )
    hypothesis.settings.load_profile("labs")


class Reporter:
    """Writes a report: what was collected, when each test began, how it ended, and that the run has ended."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def _write(self, **record: Any) -> None:  # noqa: ANN401  (any JSON value)
        self._file.write(json.dumps(record) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Report a file that cannot be imported."""
        if report.failed:
            lines = str(report.longrepr).strip().splitlines()
            self._write(broken=report.nodeid, why=lines[-1].removeprefix("E").strip()[:_LONGEST] if lines else "")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Report the tests there are."""
        self._write(collected=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Report that a test begins."""
        self._write(began=nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Report how a phase of a test ended."""
        report: pytest.TestReport = yield
        about: dict[str, Any] = {"test": item.nodeid, "when": report.when, "outcome": report.outcome}
        if call.excinfo is not None and not report.passed:
            about["lines"] = explain(call.excinfo.value)
            about["where"] = _where(call.excinfo)
            about["printed"] = [line[:_LONGEST] for line in report.capstdout.splitlines()[-_MOST_PRINTED:]]
            about["clauses"] = [str(i) for mark in item.iter_markers("spec") for i in mark.args]
        self._write(**about)
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Report that every test was run, and end the program: Python would wait for each thread that is left."""
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self._write(ended=True)
            os._exit(0)


def _where(excinfo: pytest.ExceptionInfo[BaseException]) -> list[tuple[str, int]]:
    """Return the modules and lines of the package that an error came through, the deepest first."""
    root = Path(__file__).parents[2]
    frames = [(Path(entry.path), entry.lineno + 1) for entry in reversed(excinfo.traceback)]
    return [(path.relative_to(root).as_posix(), line) for path, line in frames if root / "refinfer" in path.parents]


def explain(error: BaseException) -> list[str]:
    """Return what went wrong in one line, and in another the smallest example, if a property test found one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return [line[:_LONGEST] for line in (_message(error), _example("\n".join(getattr(error, "__notes__", [])))) if line]


def _message(error: BaseException) -> str:
    text = str(error).strip()
    first = text.partition("\n")[0].strip()
    if match := re.match(r"DID NOT RAISE (?:<class ')?(?:.*\.)?(\w+)", text):
        return f"no {match[1]} was raised"
    if match := re.match(
        r"Regex pattern did not match\.\s+(?:Expected r|R)egex: (.+)\n\s*(?:Actual message|Input): (.+)", text
    ):
        return f"the message does not say {match[1]}: {match[2]}"
    if isinstance(error, AssertionError):
        return first.removeprefix("AssertionError: ") or "an assertion of the code failed"
    if isinstance(error, SystemExit):
        return "SystemExit: the code ends the program"
    if isinstance(error, MemoryError):
        return "MemoryError: the code takes more memory than it may"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _example(notes: str) -> str:
    """Return the smallest example of a property test in one line."""
    if match := re.search(rf"{_FOUND}: \w+\(\n(.*?)\n\)", notes, flags=re.DOTALL):
        values = [line.strip().rstrip(",") for line in match[1].splitlines() if not line.strip().startswith("#")]
        values = [value.partition("  # or any")[0].rstrip(", ") for value in values if not value.startswith("self=")]
        return f"smallest example: {', '.join(values)}"
    if match := re.search(rf"{_FOUND}:.*?\n(.*?)state\.teardown\(\)", notes, flags=re.DOTALL):
        steps = re.findall(r"state\.(\w+\(.*\))", match[1])
        return f"smallest example: {', then '.join(steps)}"
    return ""
