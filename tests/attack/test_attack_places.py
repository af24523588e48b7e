"""Attacks on the places that are written to: a person's files, links and special files at every name that is used."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from random import Random

import pytest

from cage import Cases, command
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.weight_cache.format import MAGIC

pytestmark = pytest.mark.attack

NAMES = ("thesis.txt", "weights.packed", "picture.svg", "trace.json")
ENDINGS = ("", ".tmp", ".sources.json", ".sources.json.tmp", f".{os.getpid()}.tmp")
DEAR = b"a person's own words\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, private to its user."""
    folder = tmp_path_factory.mktemp("models") / "private"
    write_checkpoint(folder, SHAPES["tiny"], dtype="f32", seed=1)
    for file in folder.iterdir():
        file.chmod(0o600)
    return folder


def plant(rng: Random, folder: Path, dear: Path) -> list[Path]:
    """Put things at random names; return those that are a person's."""
    planted = []
    for name in NAMES:
        for ending in ENDINGS:
            path = folder / f"{name}{ending}"
            kind = rng.choice(["nothing"] * 6 + ["file", "link", "hard link", "pipe", "folder", "link to nothing"])
            if kind == "file":
                path.write_bytes(DEAR)
            elif kind == "link":
                path.symlink_to(dear)
            elif kind == "hard link":
                os.link(dear, path)
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif kind == "link to nothing":
                path.symlink_to(folder / "far" / path.name)
            if kind != "nothing":
                planted.append(path)
    return planted


def seen(path: Path) -> object:
    found = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(found.st_mode) else path.is_symlink() and path.readlink()
    return found.st_mode, content


def commands(rng: Random, folder: Path, model: Path) -> list[object]:
    place, budget = folder / rng.choice(NAMES), ["--budget", rng.choice(["60%", "90%"])]
    generate = ["generate", "--model", model, "--token-ids", "1,2", "--max-tokens", 2]
    return rng.choice(
        [
            ["pack", model, "-o", place],
            [*generate, "--weight-cache", place],
            [*generate, "--weight-cache", place, *budget],
            [*generate, "--weight-cache", folder / "weights.packed", *budget, "--trace", place],
            ["plan", "--model", model, *budget, "--svg", place],
            ["simulate", "--model", model, *budget, "--svg", place],
            ["cache", rng.choice(["verify", "info", "rm"]), place],
        ]
    )


@pytest.mark.spec("OPEN-9", "PUBLISH-8", "PUBLISH-10", "CLI-24", "DIR-4")
def test_no_command_changes_what_a_person_has_at_any_name(cases: Cases, model: Path, tmp_path: Path) -> None:
    for rng in cases:
        folder = tmp_path / str(cases.n)
        folder.mkdir()
        dear = folder / "dear"
        dear.write_bytes(DEAR)
        theirs = {path: seen(path) for path in [dear, *plant(rng, folder, dear)]}
        umask = os.umask(rng.choice([0o000, 0o022, 0o077, 0o777]))
        try:
            for _ in range(3):
                argv = commands(rng, folder, model)
                ran = command(folder, *argv)
                print(argv)
                ran.require_civil()
                assert {path: seen(path) for path in theirs} == theirs, argv
        finally:
            os.umask(umask)
        for path in folder.rglob("*"):
            with_weights = path.is_file() and path not in theirs and path.read_bytes().startswith(MAGIC)
            assert not with_weights or stat.S_IMODE(path.stat().st_mode) == 0o400, path
            assert path in theirs or not path.name.endswith(".tmp"), path
