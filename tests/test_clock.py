"""Specifies `refinfer.clock`: the machine's own clock, which is passed to code that needs the time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refinfer.clock import Clock, RealClock, wall_time_ns


@pytest.mark.spec("ERR-3")
def test_the_real_clock_never_goes_back_and_sleeps_at_least_as_long_as_asked() -> None:
    clock: Clock = RealClock()
    instants = [clock.now() for _ in range(100)]
    assert instants == sorted(instants)
    before = clock.now()
    clock.sleep(0.002)
    assert clock.now() - before >= 0.002


@pytest.mark.spec("ERR-3")
def test_the_time_of_day_can_be_compared_with_the_times_of_files(tmp_path: Path) -> None:
    before = wall_time_ns()
    (tmp_path / "file").write_bytes(b"")
    os.utime(tmp_path / "file")
    changed, tick = (tmp_path / "file").stat().st_mtime_ns, 2_000_000_000  # the coarsest clock of a file system
    assert before - tick <= changed <= wall_time_ns() + tick
