"""Where cache files lie, and how people look after their disk.

Knows: the user's cache directory, file names, which files are cache files. Does not know: what is in a model.
Spec: DIR-1 to DIR-4. Tutorial: 06.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from refinfer.weight_cache.publish import draft_path
from refinfer.weight_cache.sources import side_path

__all__ = ["SUFFIX", "cache_directory", "cache_files", "files_of", "path_for", "remove"]

SUFFIX: Final = ".packed"


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of cache files: `refinfer` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    base = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "refinfer"


def path_for(model: Path, name: str, packers: bytes, directory: Path | None = None) -> Path:
    """Return where the cache file of a model in the format `name` lies.

    It follows from where the model lies, the format and the packers, not from the weights: a changed model replaces
    its file. The beginning is for people, the end tells models of one name apart.
    """
    model = model.resolve()
    identity = hashlib.sha256("\0".join((str(model), name, packers.hex())).encode("utf-8", "surrogateescape"))
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", model.name)[:80] or "model"
    return (directory or cache_directory()) / f"{readable}-{name}-{identity.hexdigest()[:16]}{SUFFIX}"


def cache_files(directory: Path) -> Iterator[Path]:
    """Walk over the cache files of a folder by name, also those whose file is gone and something else is left."""
    if directory.is_dir():
        names = {path.name.partition(SUFFIX)[0] for path in directory.iterdir() if SUFFIX in path.name}
        yield from (directory / f"{name}{SUFFIX}" for name in sorted(names))


def files_of(path: Path) -> tuple[Path, ...]:
    """Return what lies on the disk for a cache file: itself, its side file, drafts of both."""
    side = side_path(path)
    return tuple(file for file in (path, side, draft_path(path), draft_path(side)) if file.exists())


def remove(path: Path) -> int:
    """Remove a cache file and all that belongs to it; return the bytes that were freed.

    Processes that have mapped it keep their pages.

    Raises:
        OSError: the folder does not let files be removed.
    """
    freed = 0
    for file in files_of(path):
        freed += file.stat().st_size
        file.unlink(missing_ok=True)
    return freed
