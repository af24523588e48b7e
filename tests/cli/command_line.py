"""How the tests of the command line run it: in this process, or as a program of its own."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable
from typing import Any

from refinfer.cli.main import main

__all__ = ["WATCHDOG_S", "json_of", "on_terminal", "program", "refused", "run"]

WATCHDOG_S = 60


def run(*argv: object) -> tuple[int, str, str]:
    """Run a command in this process; return its status, standard output and standard error."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main([str(a) for a in argv])
    return status, out.getvalue(), err.getvalue()


def on_terminal(do: Callable[[], object], columns: int, *, codes: bool = False) -> str:
    """Do something while both standard streams are a terminal of 24 rows; return what it shows, with codes or not."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = bytearray()

    def watch() -> None:
        with contextlib.suppress(OSError):  # the other end was closed
            while piece := os.read(ours, 1 << 16):
                shown.extend(piece)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        terminal = open(theirs, "w", encoding="utf-8")  # noqa: PTH123, SIM115  (a descriptor; closed below)
        with terminal, contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            do()
    finally:
        watching.join(WATCHDOG_S)
        os.close(ours)
    text = shown.decode().replace("\r\n", "\n")
    return text if codes else re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def json_of(*argv: object) -> dict[str, Any]:
    """Return the one object that a command prints with `--json`."""
    status, out, err = run(*argv, "--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    result: dict[str, Any] = json.loads(out)
    return result


def refused(*argv: object) -> str:
    """Return the one line that a wrong use gets."""
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("refinfer: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.strip()


def program(*argv: object) -> list[str]:
    """Return the command that starts the program."""
    return [sys.executable, "-m", "refinfer", *map(str, argv)]
