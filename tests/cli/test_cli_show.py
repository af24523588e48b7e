"""Specifies `refinfer.cli.show`: the line about the weight cache, durations, and messages while a model is prepared."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from command_line import WATCHDOG_S, program
from refinfer.cli import show
from refinfer.cli.show import cache_line, format_seconds, listening, require_writable
from refinfer.errors import InputError
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.weight_cache.load_or_build import CacheOutcome
from refinfer.weight_cache.mapped_file import NO_FILE

BUILT = CacheOutcome("built", "/here", NO_FILE, 3, 3_000_000, 2.0, 3, 3_000_000, 1.5)
LINES = {
    "off: nothing was packed": CacheOutcome("off"),
    "packed 3 buffers, 3.0 MB, into memory in 2.0 s": CacheOutcome("memory", None, None, 3, 3_000_000, 2.0),
    "packed 1 buffer, 3.0 MB, into memory in 2.0 s: no room": CacheOutcome("memory", None, "no room", 1, 3_000_000, 2),
    "packed 3 buffers, 3.0 MB, in 2.0 s; the next start will map them": BUILT,
    "rebuilt: it is damaged; packed 2 buffers, 1.0 MB, found 1 buffer, in 999 ms; the next start will map them": (
        CacheOutcome("built", "/here", "it is damaged", 2, 1_000_000, 0.999, 3, 3_000_000)
    ),
    "mapped 3 buffers, 3.0 MB, in 4 ms": CacheOutcome("loaded", "/here", None, 0, 0, 0.004, 3, 3_000_000),
    "mapped 1 buffer, 3.0 MB, in 4 ms; packing took 0 ms": (
        CacheOutcome("loaded", "/here", None, 0, 0, 0.004, 1, 3_000_000, 0.0)
    ),
}


@pytest.mark.spec("GEN-18", "CLI-1")
@pytest.mark.parametrize(("line", "outcome"), LINES.items())
def test_one_line_says_what_the_weight_cache_did_and_why(line: str, outcome: CacheOutcome) -> None:
    assert cache_line(outcome) == f"weight cache: {line}"
    within_a_budget = line.replace("mapped", "found").replace("will map", "will find")
    assert cache_line(outcome, mapped=False) == f"weight cache: {within_a_budget}"


@pytest.mark.spec("CLI-1")
@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 ms"), (0.0126, "13 ms"), (0.99, "990 ms"), (1, "1.0 s"), (61.26, "61.3 s")]
)
def test_a_duration_is_in_milliseconds_below_a_second(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.spec("PREP-8")
def test_one_progress_bar_shows_all_that_is_packed_and_none_is_shown_if_nothing_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []

    @contextmanager
    def bar(title: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
        assert not quiet
        seen.append((title, total))
        yield seen.append
        seen.append("ends")

    monkeypatch.setattr(show, "progress_bar", bar)
    with listening() as listener:
        listener.begin("packing the weights", 15)
        assert seen == []
        for nbytes in (3, 5, 7):
            listener.progress(nbytes)
    assert seen == [("packing the weights", 15), 3, 5, 7, "ends"]
    seen.clear()
    with listening():
        pass
    assert seen == []


@pytest.mark.spec("PUBLISH-12", "GEN-13")
def test_waiting_and_warnings_are_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with listening() as listener:
        listener.on_wait()
        listener.on_long_wait(Path("/draft"))
        listener.warn("it is slow")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "refinfer: waiting for another process that is packing the same weights",
        "refinfer: still waiting: another process has /draft locked",
        "refinfer: warning: it is slow",
    ]


@pytest.mark.spec("CONFIG-9", "CLI-14", "CLI-15", "CLI-10")
@pytest.mark.parametrize("command", ["plan", "simulate", "pack", "generate"])
def test_a_warning_about_a_model_reaches_standard_error_once(command: str, tmp_path: Path) -> None:
    """In a program of its own: while a folder is read, native code writes to another descriptor."""
    write_checkpoint(tmp_path / "model", SHAPES["tiny"], dtype="f32", seed=1)
    (tmp_path / "model" / "generation_config.json").write_text("{")
    named = [str(tmp_path / "model")] if command == "pack" else ["--model", str(tmp_path / "model")]
    place = ["-o", str(tmp_path / "packed")] if command == "pack" else []
    asked = ["--token-ids", "1", "--max-tokens", "1"] if command == "generate" else []
    done = subprocess.run(
        program(command, *named, *place, *asked), capture_output=True, text=True, timeout=WATCHDOG_S, check=False
    )
    assert (done.returncode, done.stderr.count("warning: ")) == (0, 1), done.stderr
    assert "generation_config.json" in done.stderr


@pytest.mark.spec("CLI-24")
def test_a_folder_is_no_place_for_a_file_which_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))} cannot be written: Is a directory$"):
        require_writable(str(tmp_path), "<svg")
    require_writable(str(tmp_path / "x.svg"), "<svg")
    assert not list(tmp_path.iterdir())
