"""Signals at random instants: every start after its first line ends as it should, cleans up, and can be repeated."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final

import pytest

from cage import Cases
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint

pytestmark = [pytest.mark.attack, pytest.mark.skipif(os.name != "posix", reason="sends signals as POSIX has them")]

WATCHDOG_S: Final = 60

PROGRAM: Final = """
import os, sys
from refinfer.__main__ import main
os.write(int(sys.argv.pop(1)), b"m")
sys.exit(main())
"""
"""Writes a byte right before the first line of `main`: a signal that comes earlier is Python's own."""

SIGNALS: Final = [
    [signal.SIGINT],
    [signal.SIGINT],
    [signal.SIGTERM],
    [signal.SIGHUP],
    [signal.SIGINT] * 2,
    [signal.SIGINT] * 3,
    [signal.SIGINT, signal.SIGTERM],
    [signal.SIGTERM, signal.SIGINT],
    [signal.SIGTERM] * 2,
    [signal.SIGINT, signal.SIGKILL],
    [signal.SIGKILL],
]


@dataclass(frozen=True)
class Ended:
    """How a program ended, what it wrote on standard error, and how long it took from the first line of `main` on."""

    status: int
    err: str
    seconds: float


def start(argv: list[str], home: Path, signals: list[signal.Signals], rng: Random, longest: float) -> Ended:
    """Start a command, send it signals from a random instant on, and wait until it has ended."""
    ready, theirs = os.pipe()
    shown, screen = os.openpty() if rng.random() < 0.3 else os.pipe()
    command = [sys.executable, "-c", PROGRAM, str(theirs), *argv]
    environment = os.environ | {"XDG_CACHE_HOME": str(home)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=screen, env=environment, pass_fds=[theirs]
    ) as program:
        os.close(theirs)
        os.close(screen)
        err = bytearray()
        reader = threading.Thread(target=_read_all, args=(shown, err))
        reader.start()
        ended = os.pidfd_open(program.pid)
        try:
            assert os.read(ready, 1) == b"m", err.decode()
            begun = time.monotonic()
            for i, number in enumerate(signals):
                select.select([ended], [], [], rng.uniform(0, longest if i == 0 else rng.choice([0, 0.002, 0.03])))
                program.send_signal(number)
            assert select.select([ended], [], [], WATCHDOG_S)[0], f"it hangs: {err.decode()}"
            seconds = time.monotonic() - begun
        finally:
            program.kill()
            reader.join(WATCHDOG_S)
            for descriptor in (ended, ready, shown):
                os.close(descriptor)
    return Ended(program.returncode, err.decode(errors="replace"), seconds)


def _read_all(source: int, into: bytearray) -> None:
    with contextlib.suppress(OSError):  # a terminal whose other end was closed
        while piece := os.read(source, 1 << 16):
            into.extend(piece)


def require_promised_end(ended: Ended, signals: list[signal.Signals]) -> None:
    """Require what the specification promises: the right status, one line or nothing, and nothing from Python."""
    assert "Traceback" not in ended.err, ended.err
    assert "ignored" not in ended.err, ended.err
    promised = {0, *(-number for number in signals)}  # 0: it had ended before
    assert ended.status in (promised | {130} if signal.SIGINT in signals else promised), ended
    # A second Ctrl-C after the line, which a shell shows as 130 too. After another signal there is no line.
    if ended.status == -signal.SIGINT and signals[0] == signal.SIGINT:
        assert "refinfer: interrupted" in ended.err, ended
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", ended.err)
    lines = shown.count("refinfer: interrupted")
    assert lines == 1 if ended.status == 130 else lines <= (signal.SIGINT in signals), ended
    if signal.SIGKILL not in signals:
        assert ended.err.rfind("\x1b[?25l") <= ended.err.rfind("\x1b[?25h"), f"the cursor is gone: {ended}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a while to pack."""
    folder = tmp_path_factory.mktemp("models") / "m"
    config = replace(SHAPES["tiny"], vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    write_checkpoint(folder, config, dtype="bf16")
    return folder


COMMANDS: Final = {
    "start": ["generate", "--model", "MODEL", "--token-ids", "1", "--max-tokens", "2", "--weight-cache", "off"],
    "pack": ["pack", "MODEL", "--weights", "int4"],
    "generate": ["generate", "--model", "MODEL", "--token-ids", "1", "--max-tokens", "20", "--weights", "int8"],
    "budget": [
        *("generate", "--model", "MODEL", "--token-ids", "1", "--max-tokens", "40", "--weights", "int8"),
        *("--budget", "90%", "--plan", "none", "--prefetch-threads", "2"),
    ],
    "verify": ["cache", "verify", "--all"],
    "plan": ["plan", "--shape", "llama-1b", "--budget", "50%"],
    "synth": ["synth", "NEW", "--shape", "stories15m"],
    "bench": ["bench", "calibrate"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_signals_at_random_instants_end_a_program_as_promised(
    name: str, model: Path, tmp_path: Path, cases: Cases
) -> None:
    home, new = tmp_path / "home", tmp_path / "new"
    argv = [{"MODEL": str(model), "NEW": str(new)}.get(word, word) for word in COMMANDS[name]]
    prepared = ["pack", str(model), "--weights", "int8"]
    if name in ("verify", "budget"):
        assert start(prepared, home, [], Random(0), 0).status == 0
    longest: float | None = None
    for rng in cases:
        if longest is None:
            longest = 1.2 * start(argv, home, [], Random(0), 0).seconds
        signals = rng.choice(SIGNALS)
        if name not in ("verify", "budget") and rng.random() < 0.8:
            shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
        ended = start(argv, home, signals, rng, longest)
        require_promised_end(ended, signals)
        if signal.SIGKILL not in signals:
            assert not list(home.rglob("*.tmp")), ended
            assert not new.exists() or "parameters, " in ended.err, ended
        if signal.SIGKILL in signals or rng.random() < 0.1:
            shutil.rmtree(new, ignore_errors=True)
            again = start(argv, home, [], rng, 0)
            assert again.status == 0, again
            assert not list(home.rglob("*.tmp"))
