"""Attacks on a build: killed at any moment, raced by others, on a disk that is too small."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

import refinfer
from cage import Cases, command
from children import Child, Say, watched
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.weight_cache.directory import remove

pytestmark = pytest.mark.attack

FORMATS = ("f32", "bf16", "int8", "int4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    folder = tmp_path_factory.mktemp("models") / "model"
    write_checkpoint(folder, SHAPES["tiny"], dtype="f32", seed=1)
    return folder


def ids_of(model: Path, cache: str | Path, format: str, budget: str | None = None) -> tuple[int, ...]:
    with refinfer.load(model, weights=format, weight_cache=cache, budget=budget, max_positions=10) as session:
        for _ in session.generate(token_ids=[1, 2], max_tokens=6):
            pass
        assert session.stats is not None
        return session.stats.token_ids


def spoil(rng: Random, cache: Path) -> None:
    """Leave the cache file as it is, or change it in place, or replace it, or remove it, as people do."""
    how = rng.choice(["nothing", "nothing", "flip", "empty", "remove", "rm"])
    if not cache.exists() or how == "nothing":
        return
    if how == "flip":
        data = bytearray(cache.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        cache.unlink()
        cache.write_bytes(data)
    elif how == "empty":
        cache.unlink()
        cache.touch()
    elif how == "remove":
        cache.unlink()
    else:
        remove(cache)


@pytest.mark.spec("PUBLISH-1", "PUBLISH-3", "PUBLISH-4", "FETCH-10", "GEN-16")
def test_after_kills_and_races_the_next_start_is_right_and_nothing_is_left(
    cases: Cases, model: Path, tmp_path: Path
) -> None:
    expected = {format: ids_of(model, ":memory", format) for format in FORMATS}
    for rng in cases:
        format, budget = rng.choice(FORMATS), rng.choice([None, "700kB", "3MB"])
        cache = tmp_path / f"{format}.packed"

        def start(say: Say, format: str = format, budget: str | None = budget, cache: Path = cache) -> None:
            say(str(ids_of(model, cache, format, budget)))

        with watched():
            spoil(rng, cache)
            racing = [Child(start) for _ in range(rng.randint(1, 4))]
            for child in racing:
                if rng.random() < 0.6:
                    time.sleep(rng.uniform(0.0, 0.04))
                    os.kill(child.pid, signal.SIGKILL)
            for child in racing:
                said = child.hear()
                assert said in ("", str(expected[format])), said
                assert child.end() == (0 if said else -signal.SIGKILL)
        assert ids_of(model, cache, format, budget) == expected[format]
        assert {path.name for path in tmp_path.iterdir()} >= {cache.name, f"{cache.name}.sources.json"}
        assert not list(tmp_path.glob("*.tmp"))


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Mount a file system of `nbytes` at `folder`.

    Raises:
        pytest.skip.Exception: this process may not mount one.
    """
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of its own")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "refinfer", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.spec("PUBLISH-6", "GEN-13", "GEN-14", "CLI-24")
def test_on_a_disk_of_any_size_a_command_ends_civilly_and_leaves_nothing_half_written(
    cases: Cases, model: Path, tmp_path: Path
) -> None:
    _ = ids_of(model, whole := tmp_path / "whole.packed", "f32")
    size = whole.stat().st_size
    for rng in cases:
        folder = tmp_path / str(cases.n)
        with small_disk(folder, rng.randrange(1, 2 * size)):
            place = folder / "model.packed"
            within: list[object] = ["--budget", "3MB"]
            budget = rng.choice([[], within, [*within, "--trace", folder / "trace.json"]])
            argv: list[object] = [
                "generate",
                "--model",
                model,
                "--token-ids",
                "1,2",
                "--max-tokens",
                4,
                "--weights",
                "f32",
            ]
            ran = command(folder, *argv, "--weight-cache", place, *budget)
            ran.require_civil()
            assert ran.status == 0 or (ran.status == 2 and budget), ran.err
            assert {path.name for path in folder.iterdir()} <= {place.name, f"{place.name}.sources.json", "trace.json"}
            if place.exists():
                assert place.stat().st_size == size
