"""Where cache files lie, and how people look after their disk.

Knows: the user's cache directory, file names, which files are cache files. Does not know: what is in a model.
Spec: DIR-1 to DIR-4. Tutorial: 06.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import CacheFileError, InputError
from refinfer.packing.formats import FORMATS
from refinfer.weight_cache.format import FORMAT_VERSION, MAGIC
from refinfer.weight_cache.identity import SideFile, side_path
from refinfer.weight_cache.mapped_file import read_file
from refinfer.weight_cache.packers import packer_fingerprint
from refinfer.weight_cache.publish import Draft, draft_path, remove_dead_draft

__all__ = [
    "SUFFIX",
    "cache_directory",
    "cache_files",
    "describe",
    "discard",
    "files_of",
    "is_cache_file",
    "path_for",
    "remove",
]

SUFFIX: Final = ".packed"


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of cache files: `refinfer` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    base = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    if Path(base).is_absolute():
        return Path(base) / "refinfer"
    try:
        return Path.home() / ".cache" / "refinfer"
    except RuntimeError:
        raise InputError("there is no home folder for cache files: set XDG_CACHE_HOME, or name a file") from None


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
        names = {path.name for path in directory.iterdir()}
        endings = [part.name.removeprefix("x") for part in _parts(Path(f"x{SUFFIX}"))]
        found = {name.removesuffix(ending) for name in names for ending in endings if name.endswith(ending)}
        yield from (directory / f"{name}{SUFFIX}" for name in sorted(found))


def files_of(path: Path) -> tuple[Path, ...]:
    """Return what lies on the disk for a cache file: itself, its side file, drafts of both."""
    return tuple(file for file in _parts(path) if file.exists())


def _parts(path: Path) -> tuple[Path, ...]:
    side = side_path(path)
    return path, side, draft_path(path), draft_path(side)


def describe(path: Path) -> dict[str, Any]:
    """Return what header, index and side file say of a cache file; no weights are read.

    `reason` says why it cannot be used, or None.
    """
    row: dict[str, Any] = {"path": str(path), "bytes": sum(file.stat().st_size for file in files_of(path))}
    try:
        header, index = read_file(path)
    except CacheFileError as error:
        return row | {"reason": error.reason, "model": None, "format": None, "buffers": None, "packed_bytes": None}
    about = index.provenance
    current = about.format in FORMATS and packer_fingerprint(about.format) == about.packers
    return row | {
        "reason": None if current else "the packing code changed",
        "model": about.model,
        "format": about.format,
        "buffers": len(index.entries),
        "packed_bytes": header.index_offset - PAGE_BYTES,
        "chunks": sum(len(entry.chunks) for entry in index.entries),
        "format_version": FORMAT_VERSION,
        "packers": about.packers.hex(),
        "model_digest": header.model.hex(),
        "packing_s": SideFile.read(side_path(path)).packing_s,
        "sources": [{"name": s.name, "bytes": s.nbytes, "sha256": s.digest.hex()} for s in about.sources],
    }


def is_cache_file(path: Path) -> bool:
    """Tell whether a file begins as cache files do, whatever else is wrong with it."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def remove(path: Path) -> int:
    """Remove a cache file and all that belongs to it; return the bytes that were freed.

    Processes that have mapped it keep their pages; a draft that is being written stays.

    Raises:
        OSError: the folder does not let files be removed.
    """
    freed = sum(file.stat().st_size for file in files_of(path))
    for file in (path, side_path(path)):
        file.unlink(missing_ok=True)
        remove_dead_draft(file)
    return freed - sum(file.stat().st_size for file in files_of(path))


def discard(path: Path, is_at: Callable[[Path], bool]) -> bool:
    """Remove a damaged file, unless another process has replaced it meanwhile; tell whether it is gone.

    `is_at` tells whether a path is still the file that was found damaged.
    """
    try:
        draft = Draft(path)
    except OSError:
        return False
    try:
        if is_at(path):
            path.unlink()
    except OSError:
        return False
    else:
        return True
    finally:
        draft.abandon()
