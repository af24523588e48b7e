"""Text from the code of a workspace: chooses what of it can run, and runs it in a process of its own.

Every lab that is written takes part if there is a way to have it take part: the matrices are in int8, within a budget,
and planned by Algorithm 1. A lab that is still blank is gone around, if there is a way around it.
Leaves to others: generating (`generate`, in the student's copy).
Read more: tutorial 00; clause LAB-8.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

from refinfer.labs.catalogue import Lab, labs
from refinfer.labs.workspace import Workspace

__all__ = ["Parts", "generate", "parts_of"]

_INT8: Final = {"03", "04"}
_FILE: Final = {"06", "07", "08"}
_BUDGET: Final = {"10", "11", "12"}
_UNUSED: Final = {"05", "09", "10b", "12b"}
"""Labs that no generation from a file uses."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What takes part in a run: `own` are the student's labs, `around` the blank ones that are gone around.

    `missing` is a blank lab that no run can do without.
    """

    own: tuple[Lab, ...]
    around: tuple[Lab, ...]
    missing: Lab | None
    options: tuple[str, ...]


def parts_of(workspace: Workspace) -> Parts:
    """Choose what takes part in a run."""
    blank = {lab.number for lab in labs() if workspace.is_blank(lab)}
    own = {lab.number for lab in labs() if workspace.is_own(lab)}
    used = {lab.number for lab in labs()} - _UNUSED
    options = ["--seed", "1", "--temperature", "0.7"]
    if not blank & _INT8:
        options += ["--weights", "int8"]
    else:
        used -= _INT8
    if blank & _FILE:
        used = used - _FILE - _BUDGET | {"05"}
        options += ["--weight-cache", ":memory"]
    elif blank & _BUDGET:
        used -= _BUDGET
    else:
        options += ["--budget", "6MB" if blank & _INT8 else "3MB", "--plan", "flexinfer"]  # some chunks must stream
    missing = sorted(used & blank)
    return Parts(
        own=tuple(lab for lab in labs() if lab.number in used & own),
        around=tuple(lab for lab in labs() if lab.number in blank - used),
        missing=next((lab for lab in labs() if lab.number in missing), None),
        options=tuple(options),
    )


def generate(workspace: Workspace, parts: Parts, prompt: str) -> str | None:
    """Continue a prompt with the code of a workspace, on the terminal; return what went wrong, if anything did."""
    command = [sys.executable, "-m", "refinfer", "generate", *parts.options, "--quiet", "--", prompt]
    environment = os.environ | {
        "PYTHONPATH": str(workspace.folder.resolve()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "REFINFER_CACHE_DIR": str(workspace.folder.resolve() / "weight-cache"),
    }
    done = subprocess.run(  # noqa: S603  (this very program)
        command, cwd=workspace.folder, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    places = re.findall(r'File "(.+)", line (\d+)', done.stderr)
    home = str(workspace.folder.resolve())
    at = next((f" ({os.path.relpath(p, home)}, line {n})" for p, n in reversed(places) if p.startswith(home)), "")
    return lines[-1].removeprefix("refinfer: ") + at
