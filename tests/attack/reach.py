"""Which lines of a module each test runs, and an order of tests in which one that notices a change comes early.

Leaves to others: what is changed (`mutations`), and running the tests (`mutants`).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from types import FrameType
from typing import IO, Any

import hypothesis
import pytest

Reach = dict[str, tuple[float, list[int]]]
"""For each test, by its name: how many seconds it takes, and the lines that it runs."""


class Recorder:
    """A plugin of pytest: writes which lines of `source` each test runs, in its own process, to a file."""

    def __init__(self, source: Path, file: IO[str]) -> None:
        self._source, self._file = str(source), file
        self._reach: Reach = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Listen to the lines while one test runs."""
        lines: set[int] = set()

        def on_line(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
            lines.add(frame.f_lineno)
            return on_line

        def on_call(frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
            return on_line if frame.f_code.co_filename == self._source else None

        began, before = time.monotonic(), sys.gettrace()
        threading.settrace(on_call)
        sys.settrace(on_call)
        try:
            yield
        finally:
            sys.settrace(before)
            threading.settrace(None)  # as before anybody called it
            self._reach[item.nodeid] = (time.monotonic() - began, sorted(lines))

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self._file.write(json.dumps(self._reach))
        self._file.flush()


class Order:
    """A plugin of pytest: first the tests that run a line, or come closest to it, and of those the quickest."""

    def __init__(self, reach: Reach, line: int) -> None:
        self._reach, self._line = reach, line

    def pytest_collection(self) -> None:
        """Have property tests end at the first example that fails: nobody reads it."""
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("first failure", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("first failure")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests; those that nothing is known of come last."""
        items.sort(key=self._rank)

    def _rank(self, item: pytest.Item) -> tuple[float, float]:
        seconds, lines = self._reach.get(item.nodeid, (inf, []))
        return min((abs(line - self._line) for line in lines), default=inf), seconds
