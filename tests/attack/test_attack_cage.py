"""The cage holds: attacks would prove nothing if they could break out of it, or if a failure were not seen."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cage import ESCAPED, Cases, Ran, caged, command

pytestmark = pytest.mark.attack


def test_a_command_runs_in_a_cage(tmp_path: Path) -> None:
    ran = command(tmp_path, "generate", "--max-tokens", 2)
    assert ran.status == 0, ran.err
    assert ran.out.startswith("ROMEO:")
    ran.require_civil()


def test_a_process_that_writes_outside_its_folder_is_ended(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()

    def write(path: Path) -> int:
        path.write_text("")
        return 0

    assert caged(inside, lambda: write(inside / "file")).status == 0
    assert caged(inside, lambda: write(outside)).status == ESCAPED
    assert not outside.exists()
    assert caged(inside, lambda: write(outside), elsewhere=[tmp_path]).status == 0
    outside.unlink()
    assert caged(inside, lambda: len(str((inside / "file").rename(outside)))).status == ESCAPED


def test_a_process_may_write_to_a_device_and_to_a_pipe_that_it_opens_by_its_number(tmp_path: Path) -> None:
    def write() -> int:
        reader, writer = os.pipe()
        Path("/dev/null").write_text("x")
        Path(f"/dev/fd/{writer}").write_text("x")
        return int(os.read(reader, 9) != b"x")

    assert caged(tmp_path, write).status == 0


def test_a_process_may_not_change_or_remove_a_device(tmp_path: Path) -> None:
    """Tried with its times only, so that nothing is lost if the cage has a hole."""

    def touch() -> int:
        os.utime("/dev/null")
        return 0

    assert caged(tmp_path, touch).status == ESCAPED


def test_a_process_that_takes_too_much_time_or_memory_is_ended(tmp_path: Path) -> None:
    assert caged(tmp_path, lambda: int(signal.sigwait([signal.SIGUSR1])), seconds=1).status == -signal.SIGALRM
    ran = caged(tmp_path, lambda: len(bytes(1 << 30)) and 0, memory=64 << 20)
    assert ran.status == 1
    assert "MemoryError" in ran.err


@pytest.mark.parametrize(
    "ran",
    [
        Ran(1, "", "Traceback (most recent call last)"),
        Ran(2, "", "refinfer: one line\nrefinfer: and another\n"),
        Ran(2, "", ""),
        Ran(-signal.SIGBUS, "", ""),
        Ran(2, "", f"refinfer: {'x' * 70_000}"),
    ],
    ids=["a traceback", "two lines", "no line", "a signal", "a long line"],
)
def test_an_uncivil_end_is_noticed(ran: Ran) -> None:
    with pytest.raises(AssertionError):
        ran.require_civil()


def test_a_case_is_replayed_by_its_seed() -> None:
    drawn = [rng.random() for rng in Cases(7, 3, 60.0)]
    assert len(drawn) == 3
    assert [rng.random() for rng in Cases(8, 1, 0.0)] == drawn[1:2]
