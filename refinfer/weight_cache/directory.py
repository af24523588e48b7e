"""Where cache files lie, and how they are named, listed, described and removed.

Finds the user's cache directory and the cache files in it. Leaves to others: what is in a model.
Read more: tutorial 06; clauses DIR-1 to DIR-4.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from refinfer.arrays import PAGE_BYTES
from refinfer.errors import CacheFileError, InputError
from refinfer.packing.formats import FORMATS
from refinfer.weight_cache.format import FORMAT_VERSION, MAGIC
from refinfer.weight_cache.identity import SIDE_FILE_BEGINS, SideFile, side_path
from refinfer.weight_cache.mapped_file import read_file
from refinfer.weight_cache.packers import packer_fingerprint
from refinfer.weight_cache.publish import draft_path, remove_dead_draft
from refinfer.whole_file import open_regular

__all__ = [
    "SUFFIX",
    "cache_directory",
    "cache_files",
    "describe",
    "files_of",
    "is_cache_file",
    "path_for",
    "remove",
]

SUFFIX: Final = ".packed"


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of cache files: `$REFINFER_CACHE_DIR`, or `refinfer` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    if own := environment.get("REFINFER_CACHE_DIR"):
        return Path(os.path.abspath(os.path.expanduser(own)))  # noqa: PTH100, PTH111  (an unknown ~name stays as it is)
    base = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    if Path(base).is_absolute():
        return Path(base) / "refinfer"
    try:
        return Path.home() / ".cache" / "refinfer"
    except RuntimeError:
        raise InputError("there is no home folder for cache files: set REFINFER_CACHE_DIR, or name a file") from None


def path_for(
    model: Path, format: str, packers: bytes, directory: Path | None = None, called: str | None = None
) -> Path:
    """Return the path of a model's cache file; `called` is the model's name, if its folder has another.

    The path depends on where the model lies, the format and the packers, but not on the weights: a changed model
    replaces its file. The file's name begins with the model's, for people, and ends with a hash that distinguishes
    models of one name.
    """
    model = model.resolve()
    identity = hashlib.sha256("\0".join((str(model), format, packers.hex())).encode("utf-8", "surrogateescape"))
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", called or model.name)[:80] or "model"
    return (directory or cache_directory()) / f"{readable}-{format}-{identity.hexdigest()[:16]}{SUFFIX}"


def cache_files(directory: Path) -> Iterator[Path]:
    """Yield the cache files of a folder, by name, including those of which only a side file or a draft is left."""
    if directory.is_dir():
        names = {path.name for path in directory.iterdir()}
        endings = [part.name.removeprefix("x") for part in _parts(Path(f"x{SUFFIX}"))]
        found = {name.removesuffix(ending) for name in names for ending in endings if name.endswith(ending)}
        yield from (directory / f"{name}{SUFFIX}" for name in sorted(found))


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files that exist for a cache file: itself, its side file, drafts of both."""
    return tuple(file for file in _parts(path) if file.exists())


def _parts(path: Path) -> tuple[Path, ...]:
    side = side_path(path)
    return path, side, draft_path(path), draft_path(side)


def describe(path: Path) -> dict[str, Any]:
    """Return what header, index and side file record about a cache file; no weights are read.

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
    """Return whether a file begins like a cache file; it may be damaged further on."""
    return _begins(path, MAGIC)


def _begins(path: Path, begin: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False


def remove(path: Path) -> int:
    """Remove a cache file and all that belongs to it; return the bytes that were freed.

    Processes that have mapped it keep their pages. A draft that is being written stays, and so does a file that has the
    side file's name but is not one, unless it lies in the cache directory.

    Raises:
        OSError: a file cannot be removed from the folder.
    """
    freed = sum(file.lstat().st_size for file in files_of(path))
    side = side_path(path)
    path.unlink(missing_ok=True)
    if side.parent == cache_directory() or _begins(side, SIDE_FILE_BEGINS):
        side.unlink(missing_ok=True)
    remove_dead_draft(path, MAGIC)
    remove_dead_draft(side, SIDE_FILE_BEGINS)
    return freed - sum(file.lstat().st_size for file in files_of(path))
