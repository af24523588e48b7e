"""Whether a model is still the one that was packed, without reading its weights.

Takes digests of the source files, the files that weights come from, and decides when one that was taken before may be
believed. Leaves to others: what is in the files.
Read more: tutorial 05; clauses IDENT-1 to IDENT-7.

The identity of a source file is the SHA-256 of its content, which takes half a second for each gigabyte. What the
file system records (size, times, and inode, the file's number) and the first 64 KiB only decide whether a digest that
was taken before may be believed, as in git's index. All of it is kept in a side file, `name.sources.json`.

A file system's clock moves in ticks. A file that changes in the same tick in which it was looked at would look
unchanged. So a record is believed only if the file had not been written to for a while when its digest was begun; git
calls the other files racily clean. Two kinds of change go unnoticed: bytes changed through a shared mapping before the
system has written them, and bytes changed with the clock turned back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from refinfer.errors import WeightsError
from refinfer.weight_cache.format import SourceFile
from refinfer.whole_file import open_regular, read_json

__all__ = ["SIDE_FILE_BEGINS", "Record", "SideFile", "believed", "identify", "side_path", "tick_ns", "unchanged"]

SIDE_FILE_BEGINS: Final = b'{\n "records": ['
"""How every side file begins."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_HEAD_BYTES: Final = 64 << 10
_BLOCK_BYTES: Final = 1 << 20
_LARGEST_SIDE_FILE_BYTES: Final = 1_000_000  # a record takes about 400
_LONGEST_S: Final = 1e9
_TICK_NS: Final = 100_000_000
_COARSE_TICK_NS: Final = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Stat:
    """What the file system records about a file, and the SHA-256 of its first 64 KiB."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    head: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Look at a file.

        Raises:
            WeightsError: it cannot be read.
        """
        try:
            with open_regular(path, buffering=0) as file:
                head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
            stat = path.stat()
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, head)


@dataclass(frozen=True, slots=True)
class Record:
    """What was found about a source file when its digest was taken; `at_rest` is false if it had just been written."""

    name: str
    stat: Stat
    digest: str
    at_rest: bool

    @property
    def source(self) -> SourceFile:
        """The identity that was found."""
        return SourceFile(self.name, self.stat.size, bytes.fromhex(self.digest))


@dataclass(frozen=True, slots=True)
class SideFile:
    """The content of `name.sources.json`: a record for each source file, and how long packing took."""

    records: tuple[Record, ...]
    packing_s: float | None = None

    def encode(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it; a side file that is missing or malformed counts as empty."""
        try:
            raw: dict[str, Any] = read_json(path, _LARGEST_SIDE_FILE_BYTES)
            records = tuple(Record(**{**r, "stat": Stat(**r["stat"])}) for r in raw["records"])
            side = cls(records, raw["packing_s"])
        except (OSError, ValueError, TypeError, KeyError):
            return cls(())
        return side if side._is_sound() else cls(())

    def _is_sound(self) -> bool:
        """Return whether every field has its type."""
        stats = [record.stat for record in self.records]
        return (
            (self.packing_s is None or (type(self.packing_s) in (int, float) and 0 <= self.packing_s < _LONGEST_S))
            and all(type(n) is int for stat in stats for n in (stat.size, stat.mtime_ns, stat.ctime_ns, stat.inode))
            and all(isinstance(text, str) for r in self.records for text in (r.name, r.digest, r.stat.head))
            and all(_DIGEST.fullmatch(r.digest) and isinstance(r.at_rest, bool) for r in self.records)
        )


def side_path(path: Path) -> Path:
    """Return where the side file of a cache file lies."""
    return path.with_name(f"{path.name}.sources.json")


# --8<-- [start:believed]
def believed(sources: Sequence[Path], side: SideFile) -> tuple[SourceFile, ...] | None:
    """Return the identities of `sources` if all records may be believed, else None; reads 64 KiB of each.

    Raises:
        WeightsError: a source file cannot be read.
    """
    found = [_believed(path, {r.name: r for r in side.records}) for path in sources]
    return tuple(record.source for record in found if record) if all(found) else None


def _believed(path: Path, records: Mapping[str, Record]) -> Record | None:
    """Return the record of a file if its digest may be believed, else None; reads at most 64 KiB of the file.

    It may be believed if the record has the file's name, the file was at rest when its digest was begun, and everything
    that `Stat.of` sees is still the same.
    """
    # lab 07: return the record of the file if its digest may be believed, else None
    record = records.get(path.name)
    return record if record and record.at_rest and record.stat == Stat.of(path) else None
    # end lab


# --8<-- [end:believed]


def unchanged(sources: Sequence[Path], records: Sequence[Record]) -> bool:
    """Return whether the files are still what they were when their digests were taken.

    There is one record for each file, in the order of `sources`. Everything that `Stat.of` sees must be the same. A
    file that had just been written then, and might have changed since without showing it, is read again; a file that
    was at rest is not.
    """
    # lab 07: compare each file with its record; read again only what was not at rest
    return all(
        Stat.of(path) == record.stat and (record.at_rest or _digest(path, lambda nbytes: None) == record.digest)
        for path, record in zip(sources, records, strict=True)
    )
    # end lab


def identify(
    sources: Sequence[Path], side: SideFile, now_ns: int, progress: Callable[[int], None]
) -> tuple[Record, ...]:
    """Return a record for each source file, taking the digest of those whose record may not be believed.

    Args:
        sources: the files; only their names tell them apart, so all must be in one folder.
        side: what was found before.
        now_ns: the time, by the file system's clock.
        progress: called with the number of bytes after each block that was read.

    Raises:
        WeightsError: a source file cannot be read, or changed meanwhile.
    """
    known = {record.name: record for record in side.records}
    return tuple(_believed(path, known) or _take_digest(path, now_ns, progress) for path in sources)


def _take_digest(path: Path, now_ns: int, progress: Callable[[int], None]) -> Record:
    """Read a file and return its record, with what was seen of it before it was read.

    The file was at rest if it had changed last (`ctime_ns`) more than a tick before `now_ns`.

    Raises:
        WeightsError: the file cannot be read, or does not look the same afterwards
            (`/models/w changed while it was read; try again`, with the path of the file).
    """
    # lab 07: record the digest, what was seen of the file, and whether it was at rest
    before = Stat.of(path)
    digest = _digest(path, progress)
    if Stat.of(path) != before:
        raise WeightsError(f"{path} changed while it was read; try again")
    return Record(path.name, before, digest, before.ctime_ns + tick_ns(before.ctime_ns) < now_ns)
    # end lab


def tick_ns(time_ns: int) -> int:
    """Return the tick of a file's clock: a time of whole seconds may come from a file system that counts only those."""
    return _TICK_NS if time_ns % 1_000_000_000 else _COARSE_TICK_NS


def _digest(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(path, buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                progress(len(block))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
