"""Goes through all labs as somebody who has installed refinfer and no clone: `python tests/labs/from_wheel.py FOLDER`.

Runs the command line only. Ends with status 1 at the first thing that is not as it should be.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from refinfer.labs.catalogue import lab_of
from refinfer.labs.regions import replaced


def lab(folder: Path, *argv: str, status: int = 0) -> str:
    """Run `refinfer lab`, require its exit status, and return what it printed."""
    command = [sys.executable, "-m", "refinfer", "lab", *argv]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != status:
        sys.exit(f"refinfer lab {' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def require(text: str, part: str) -> None:
    """Require that a text has a part."""
    if part not in text:
        sys.exit(f"{part!r} is missing in:\n{text}")


def write_wrong(workspace: Path, number: str) -> None:
    """Write the first wrong solution of a lab into a workspace, as a student with an editor does."""
    lab_ = lab_of(number)
    path = min((Path(__file__).parent / "wrong" / number).glob("*.toml"))
    for place, text in zip(lab_.places, tomllib.loads(path.read_text())["regions"], strict=True):
        module = workspace / place.module
        own = place.region.with_margin(text) if text.strip() else place.region.text
        module.write_text(replaced(module.read_text(), {place.order: own}))


def main(folder: Path) -> None:
    """Go through all labs, and write a text at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    require(lab(folder, "start"), "then: refinfer lab check")
    rows: list[dict[str, Any]] = json.loads(lab(folder, "list", "--json"))
    for number in (row["number"] for row in rows if row["number"].isdecimal()):
        require(lab(folder), f"lab {number}, ")
        require(lab(folder, "check", status=1), "not written yet")
        require(lab(folder, "hint"), "hint 1 of 3")
        lab(folder, "solution", status=2)
        write_wrong(folder / "refinfer-labs", number)
        wrong = json.loads(lab(folder, "check", "--json", status=1))
        if wrong["problem"] or not wrong["first"] or wrong["passed"]:
            sys.exit(f"a wrong solution is not named: {wrong}")
        require(lab(folder, "solution", "--give-up", "--apply"), "is ours now")
        checked = json.loads(lab(folder, "check", number, "--json"))
        if not checked["passed"]:
            sys.exit(f"our own solution does not pass: {checked}")
        print(f"lab {number}: {checked['held']} of {checked['laws']} laws hold", flush=True)
    require(lab(folder, "run", "ROMEO:"), "ROMEO:")
    states = [row["state"] for row in json.loads(lab(folder, "grade", "refinfer-labs", "--json"))]
    if set(states) != {"given up"}:
        sys.exit(f"states of labs that were all given up: {states}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
