"""Text from the code of a workspace: what the student has written, in a clean copy, and ours for the rest.

Matrices are in int8, within a budget, and locked by Algorithm 1, so that nearly every lab takes part. Packed weights
are kept in the workspace: the second run packs nothing, unless the student's code packs in another way. Runs in a
process of its own. Leaves to others: the copy (`check`), generating (`generate`, in that copy).
Read more: tutorial 00; clause LAB-8.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from refinfer.errors import LabError
from refinfer.labs.catalogue import PACKAGE, Lab, labs
from refinfer.labs.check import clean_copy, environment
from refinfer.labs.workspace import Workspace

__all__ = ["generate", "own_labs"]

STORYTELLER: Final = PACKAGE / "storyteller"
"""The model that texts are written with: ours, so that its packed weights are found again."""

_UNUSED: Final = {"05", "09", "10b", "12b"}
"""Labs that take no part: a cache in memory, a page cache, a plan, and the simulator."""

_OPTIONS: Final = ("--weights", "int8", "--budget", "3MB", "--plan", "flexinfer")  # so that some chunks stream
_SAMPLING: Final = ("--temperature", "0.7", "--seed", "1")


def own_labs(workspace: Workspace) -> tuple[list[Lab], list[Lab]]:
    """Return the labs that the student has written: those that a run uses, and the others."""
    own = [lab for lab in labs() if workspace.is_own(lab)]
    return [lab for lab in own if lab.number not in _UNUSED], [lab for lab in own if lab.number in _UNUSED]


def generate(workspace: Workspace, prompt: str) -> str | None:
    """Continue a prompt on the terminal with the code of a workspace; return what went wrong, if anything did."""
    with tempfile.TemporaryDirectory(prefix="refinfer-lab-") as folder:
        copy = Path(folder).resolve()
        try:
            lines = clean_copy(copy, workspace, own_labs(workspace)[0])
        except LabError as error:
            return str(error)
        kept = workspace.folder.resolve() / "weight-cache"
        cache = kept if os.access(workspace.folder, os.W_OK) else copy / "weight-cache"
        command = [sys.executable, "-m", "refinfer", "generate", *_OPTIONS, *_SAMPLING, "--quiet"]
        command += ["--model", str(STORYTELLER), "--", prompt]
        done = subprocess.run(  # noqa: S603  (this very program)
            command,
            cwd=copy,
            env=environment(copy) | {"REFINFER_CACHE_DIR": str(cache)},
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0:
            return None
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        for path, number in reversed(re.findall(r'File "(.+)", line (\d+)', done.stderr)):
            module = os.path.relpath(path, copy)
            if (own := lines.get((module, int(number)))) is not None:
                return f"{said[-1]} ({module}, line {own})"
        return said[-1].removeprefix("refinfer: ")
