"""How the program ends when a signal asks it to: it cleans up once, says at most one line, and Python says nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from refinfer.cli.ending import _SHORT_STEPS, _WHOLE_CALLS, INTERRUPTED, Stopped, drop_unwritable_output, ends_well
from refinfer.cli.main import main

sys.path.insert(0, str(Path(__file__).parent))
from command_line import WATCHDOG_S, program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals as POSIX has them")

SCRIPT = """
import os, signal, sys, threading
from refinfer.cli.ending import ends_well

def send(*names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))

def reach(word):
    os.write(1, word.encode() + b"\\n")

{run}

sys.exit(ends_well(run))
"""


def ends(run: str, *, ignored: str | None = None) -> tuple[int, str, str]:
    """Run a program whose `run` is given; return its status, and what it wrote to its streams."""

    def ignore() -> None:
        signal.signal(signal.Signals[str(ignored)], signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(run=run)],
        capture_output=True,
        text=True,
        check=False,
        timeout=WATCHDOG_S,
        preexec_fn=ignore if ignored else None,
    )
    return done.returncode, done.stdout, done.stderr


CLEANING_UP = """
def run():
    try:
        send(*{first})
        reach("goes on")
    finally:
        send(*{then})
        reach("cleaned up")
    return 0
"""


@pytest.mark.spec("CLI-5", "CLI-26")
@pytest.mark.parametrize(
    ("first", "then", "status"),
    [
        (["SIGINT"], [], 130),
        (["SIGINT"], ["SIGINT"] * 3, 130),
        (["SIGINT"], ["SIGTERM", "SIGINT"], -signal.SIGTERM),
        (["SIGTERM"], [], -signal.SIGTERM),
        (["SIGTERM"], ["SIGTERM", "SIGINT"], -signal.SIGTERM),
        (["SIGHUP"], ["SIGHUP", "SIGTERM"], -signal.SIGHUP),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_a_signal_is_answered_once_and_the_cleaning_up_is_not_broken_off(
    first: list[str], then: list[str], status: int
) -> None:
    line = "refinfer: interrupted\n" if status == INTERRUPTED else ""
    assert ends(CLEANING_UP.format(first=first, then=then)) == (status, "cleaned up\n", line)


@pytest.mark.spec("CLI-5")
@pytest.mark.parametrize("then", ["pass", "raise ImportError('made of it')", "raise SystemExit(3)"])
def test_whatever_becomes_of_the_error_the_program_ends_as_interrupted(then: str) -> None:
    run = f"""
def run():
    try:
        send("SIGINT")
    except KeyboardInterrupt:
        {then}
    return 0
"""
    assert ends(run) == (130, "", "refinfer: interrupted\n")


@pytest.mark.spec("CLI-5")
def test_an_error_that_python_drops_is_raised_again_and_not_shown() -> None:
    run = """
class Dropping:
    def __del__(self):
        send("SIGINT")

def run():
    try:
        Dropping()
        threading.Event().wait()
    finally:
        reach("cleaned up")
"""
    assert ends(run) == (130, "cleaned up\n", "refinfer: interrupted\n")


@pytest.mark.spec("CLI-5")
def test_another_error_that_python_drops_is_still_shown() -> None:
    run = """
class Failing:
    def __del__(self):
        raise ValueError("shown")

def run():
    Failing()
    return 0
"""
    status, out, err = ends(run)
    assert (status, out) == (0, "")
    assert "ValueError: shown" in err


@pytest.mark.spec("CLI-5")
def test_a_lock_is_not_left_halfway_and_a_wait_is_broken_off() -> None:
    run = """
class Lock:  # a signal comes when it has just been taken
    def __init__(self):
        self.real = threading.Lock()
        self.acquire, self.release = self.real.acquire, self.real.release

    def __enter__(self):
        self.real.acquire()
        return taken()

    def __exit__(self, *error):
        self.real.release()

def send_here():
    os.kill(os.getpid(), signal.SIGINT)

taken = type(send_here)(send_here.__code__, {"os": os, "signal": signal, "__name__": "threading"})

def run():
    condition = threading.Condition(Lock())
    try:
        with condition:
            condition.wait()
    finally:
        reach(f"free: {condition._lock.real.acquire(blocking=False)}")
"""
    assert ends(run) == (130, "free: True\n", "refinfer: interrupted\n")


@pytest.mark.spec("CLI-5")
def test_output_that_nobody_takes_does_not_keep_an_interrupted_program() -> None:
    run = """
def run():
    sys.stdout.write("x")
    send("SIGINT")
"""
    reader, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(full, bytes(4096)):
            pass
    os.set_blocking(full, True)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(run=run)], stdout=full, stderr=subprocess.PIPE
    ) as process:
        watchdog = threading.Timer(WATCHDOG_S, process.kill)
        watchdog.start()
        assert process.stderr is not None
        said = process.stderr.readline()  # soon it waits until its output is taken
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
        watchdog.cancel()
    os.close(reader)
    os.close(full)
    assert (said, process.returncode) == (b"refinfer: interrupted\n", -signal.SIGINT)


@pytest.mark.spec("CLI-5")
def test_an_interrupt_before_signals_are_listened_to_is_answered_the_same() -> None:
    code = (
        "import sys, refinfer.cli.ending\n"
        "def interrupted(): raise KeyboardInterrupt\n"
        "refinfer.cli.ending._Signals = interrupted\n"
        "from refinfer.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"refinfer: interrupted\n")


@pytest.mark.spec("CLI-5")
def test_the_modules_that_are_not_left_halfway_exist() -> None:
    assert all(find_spec(name) for name in (*_SHORT_STEPS, *_WHOLE_CALLS))


@pytest.mark.spec("CLI-27")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_the_program_was_started_to_ignore_stays_ignored(name: str) -> None:
    run = f"""
def run():
    send("{name}")
    reach("goes on")
    return 0
"""
    assert ends(run, ignored=name) == (0, "goes on\n", "")


@pytest.mark.spec("CLI-5")
def test_a_signal_after_the_last_line_is_not_lost_and_python_says_nothing_while_it_shuts_down() -> None:
    run = """
import atexit

def run():
    atexit.register(send, "SIGINT")
    return 0
"""
    assert ends(run) == (0, "", "")


@pytest.mark.spec("CLI-5")
def test_a_signal_that_comes_when_the_program_has_its_status_changes_nothing() -> None:
    run = """
from refinfer.cli import ending

leave = ending._Signals.leave

def interrupted(signals, interrupt):
    send("SIGINT")
    leave(signals, interrupt)

ending._Signals.leave = interrupted

def run():
    return 4
"""
    assert ends(run) == (4, "", "")


@pytest.mark.spec("CLI-27")
def test_the_library_changes_no_answer_to_a_signal() -> None:
    code = (
        "import signal, refinfer\n"
        "with refinfer.load(weight_cache=':memory') as session: ''.join(session.generate('A', max_tokens=2))\n"
        "print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]\n"
        "      == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.spec("CLI-27")
def test_another_thread_may_run_the_program() -> None:
    run = """
def run():
    with_thread = threading.Thread(target=lambda: reach(str(ends_well(lambda: 4))))
    with_thread.start()
    with_thread.join()
    return 0
"""
    assert ends(run) == (0, "4\n", "")


@pytest.mark.spec("CLI-26", "CLI-5")
def test_a_draft_that_was_just_made_is_removed(tmp_path: Path) -> None:
    run = f"""
from pathlib import Path
from refinfer.weight_cache.publish import Draft

def open_file(path, *how, **where):
    descriptor = real_open(path, *how, **where)
    if str(path).endswith(".tmp"):
        send("SIGTERM")  # inside a function that publishing calls
    return descriptor

real_open, os.open = os.open, open_file

def run():
    draft = Draft(Path({str(tmp_path / "file")!r}))
    try:
        threading.Event().wait()
    finally:
        draft.abandon()
"""
    assert ends(run) == (-signal.SIGTERM, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("CLI-26", "LAB-14")
@pytest.mark.parametrize("step", ["mkdir", "rmdir"])
def test_a_temporary_folder_that_is_just_made_or_removed_is_not_left(tmp_path: Path, step: str) -> None:
    run = f"""
import tempfile

def send_within(path, *how, **where):
    if {step!r} == "rmdir":
        send("SIGTERM")
    real_step(path, *how, **where)
    if {step!r} == "mkdir":
        send("SIGTERM")

real_step, os.{step} = os.{step}, send_within

def run():
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        pass
    return 0
"""
    assert ends(run) == (-signal.SIGTERM, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("CLI-26", "PUBLISH-4")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_packing_leaves_no_draft(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["synth", str(tmp_path / "m"), "--shape", "stories15m"]) == 0
    folder = tmp_path / "refinfer"
    with subprocess.Popen(program("pack", tmp_path / "m", "--weights", "int4"), stderr=subprocess.PIPE) as process:
        while not list(folder.glob("*.tmp")):  # it is packing from here on
            assert process.poll() is None
        process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=WATCHDOG_S)
    assert (process.returncode, err) == (-signal.Signals[name], b"")
    assert list(folder.iterdir()) == []


@pytest.mark.spec("CLI-5")
@pytest.mark.parametrize("error", [KeyboardInterrupt, lambda: Stopped(lambda: None)], ids=["Python's", "ours"])
def test_an_interrupt_without_a_signal_is_answered_the_same(
    error: Callable[[], BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise error()

    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    try:
        assert ends_well(run) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before[0])
        sys.unraisablehook = before[1]
    assert capsys.readouterr().err == "refinfer: interrupted\n"


@pytest.mark.spec("CLI-8")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_program_without_a_stream_has_nothing_to_drop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, name, None)
    drop_unwritable_output()
