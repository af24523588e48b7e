"""Models and cache files that the tests of `pack` and `cache` share."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from command_line import run


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, also for the programs that are started."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "refinfer"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model, in a folder whose name is not what programs like best."""
    return Path(
        shutil.copytree(Path(__file__).parents[1] / "golden" / "qwen2", tmp_path / "ein Modell f\u00fcr \u4f60")
    )


@pytest.fixture
def packed(directory: Path, model: Path) -> Path:
    """The cache file of that model in the cache directory."""
    status, out, _ = run("pack", model)
    assert status == 0
    return Path(out.rstrip("\n"))


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
