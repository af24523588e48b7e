"""The bytes of a cache file: header and index, from dataclasses to bytes and back, without reading or writing files.

Covers every byte that is not packed weights; `docs/file-format.md` draws them. Leaves to others: files and mappings
(`mapped_file`), what packed weights mean (`packers`).
Read more: tutorial 05; clauses FILE-1 to FILE-8, FILE-17, FILE-18.

    0          4096                                            index offset        end of file
    +----------+---------+---------+--- ... ---+---------------+-------------------+
    | header   | chunk 0 | chunk 1 |           | last chunk    | index             |
    +----------+---------+---------+--- ... ---+---------------+-------------------+
               each on a page, in the order of use             SHA-256 in the header

The index lists, for each buffer, its key and where its chunks lie. All numbers are little-endian (their lowest byte
comes first); a string is its length in two bytes, then its UTF-8.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from refinfer.arrays import PAGE_BYTES, whole_pages
from refinfer.errors import CacheFileError, PackingError
from refinfer.packing.layout import TileShape
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey, WeightId
from refinfer.weight_cache.packers import chunks_of, count_of

__all__ = [
    "FORMAT_VERSION",
    "Entry",
    "Header",
    "Index",
    "Provenance",
    "SourceFile",
    "StoredChunk",
    "decode_header",
    "decode_index",
    "encode_file",
    "encode_header",
    "unfinished",
]

MAGIC: Final = b"\x89RWC\r\n\x1a\n"
"""The first bytes of a file. As in PNG: one that is not text, a name, line ends that a text transfer changes."""

FORMAT_VERSION: Final = 2
BEING_BUILT: Final = 0
COMPLETE: Final = 1

# the fields as `encode_header` lists them, 24 zeros before the last one
_HEADER: Final = struct.Struct("<8sII32s32sQQQ24x32s")
_CHUNK: Final = np.dtype([("offset", "<u8"), ("nbytes", "<u8"), ("checksum", "<u4")])
_LARGEST_INDEX: Final = 1 << 28
_NO_DIGEST: Final = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Header:
    """The first page of a file: its state, what it was made from, and where its index lies.

    `model` is a digest of the model's files. `packers` is the fingerprint: a digest of what the packing code makes of
    fixed made-up weights, so it changes when the code packs differently.
    """

    state: int
    model: bytes
    packers: bytes
    index_offset: int
    index_nbytes: int
    index_digest: bytes

    @property
    def file_nbytes(self) -> int:
        """The size that the file must have: the index comes last."""
        return self.index_offset + self.index_nbytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that weights come from: its name, size, and the SHA-256 of its content."""

    name: str
    nbytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a cache file was made from: the model's folder (for people to read), format, source files, fingerprint."""

    model: str
    format: str
    sources: tuple[SourceFile, ...]
    packers: bytes = _NO_DIGEST

    @property
    def model_digest(self) -> bytes:
        """A digest of the names, sizes and contents of the model's files, whichever folder they are in."""
        listed = b"".join(_text(s.name) + s.nbytes.to_bytes(8, "little") + s.digest for s in self.sources)
        return hashlib.sha256(listed).digest()


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where a chunk lies in the file, and its checksum: the CRC-32 of its bytes without the padding."""

    offset: int
    nbytes: int
    checksum: int

    @property
    def padded_nbytes(self) -> int:
        """The bytes it takes: `nbytes` rounded up to whole pages."""
        return whole_pages(self.nbytes)


@dataclass(frozen=True, slots=True)
class Entry:
    """A buffer of the file: its key, its chunks, and the SHA-256 of all its bytes, padding included."""

    key: PackKey
    digest: bytes
    chunks: tuple[StoredChunk, ...]

    @property
    def offset(self) -> int:
        """Where its first chunk lies."""
        return self.chunks[0].offset

    @property
    def padded_nbytes(self) -> int:
        """The bytes it takes: all its chunks, each padded to whole pages."""
        return self.chunks[-1].offset + self.chunks[-1].padded_nbytes - self.offset


@dataclass(frozen=True, slots=True)
class Index:
    """What a file contains: what it was made from, and its buffers in the order in which they were inserted."""

    provenance: Provenance
    entries: tuple[Entry, ...]


def encode_header(header: Header) -> bytes:
    """Return the first page: the fields, their SHA-256, zeros."""
    fields = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        header.state,
        header.model,
        header.packers,
        header.index_offset,
        header.index_nbytes,
        header.file_nbytes,
        header.index_digest,
    )
    return (fields + hashlib.sha256(fields).digest()).ljust(PAGE_BYTES, b"\0")


def unfinished(provenance: Provenance) -> Header:
    """Return the header of a file that is being built: no index yet."""
    return Header(BEING_BUILT, provenance.model_digest, provenance.packers, PAGE_BYTES, 0, _NO_DIGEST)


# --8<-- [start:header]
def decode_header(page: bytes, file_nbytes: int) -> Header:
    """Return the header of a file of `file_nbytes` whose first page is `page`.

    The digest covers the fields, zeros among them included, and lies right after them. The rest of the page has no
    meaning and is not looked at. The checks, in their order; the first that fails is the reason:

        what must hold                                         else
        --------------                                         ----
        the page begins with MAGIC                             it is not a refinfer weight cache
        it has PAGE_BYTES                                      it is cut short
        the version is FORMAT_VERSION                          it has the format version 1, and this is version 2
        the digest is that of the fields                       its header is damaged
        the state is COMPLETE                                  it was never completed
        the size is file_nbytes                                it has 8191 bytes instead of 8192
        the index begins on a page after the header, ends      its header contradicts itself
        the file, and has _LARGEST_INDEX bytes or fewer

    Raises:
        CacheFileError: one of them does not hold.
    """
    # lab 06: check the first page in the order of the table, and return its fields
    if page[: len(MAGIC)] != MAGIC:
        raise CacheFileError("it is not a refinfer weight cache")
    if len(page) < PAGE_BYTES:
        raise CacheFileError("it is cut short")
    _, version, state, model, packers, offset, nbytes, size, index_digest = _HEADER.unpack(page[: _HEADER.size])
    if version != FORMAT_VERSION:
        raise CacheFileError(f"it has the format version {version}, and this is version {FORMAT_VERSION}")
    if hashlib.sha256(page[: _HEADER.size]).digest() != page[_HEADER.size : _HEADER.size + DIGEST_BYTES]:
        raise CacheFileError("its header is damaged")
    if state != COMPLETE:
        raise CacheFileError("it was never completed")
    if size != file_nbytes:
        raise CacheFileError(f"it has {file_nbytes} bytes instead of {size}")
    if offset % PAGE_BYTES or offset < PAGE_BYTES or offset + nbytes != size or nbytes > _LARGEST_INDEX:
        raise CacheFileError("its header contradicts itself")
    return Header(state, model, packers, offset, nbytes, index_digest)
    # end lab


# --8<-- [end:header]


def encode_file(index: Index, index_offset: int) -> tuple[bytes, bytes]:
    """Return the index and the header of a file whose chunks end at `index_offset`."""
    encoded = _encode_index(index)
    digest = hashlib.sha256(encoded).digest()
    provenance = index.provenance
    header = Header(COMPLETE, provenance.model_digest, provenance.packers, index_offset, len(encoded), digest)
    return encoded, encode_header(header)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")[:65_535]  # only a folder's name can be longer, or not be UTF-8
    return struct.pack("<H", len(encoded)) + encoded


def _encode_index(index: Index) -> bytes:
    about = index.provenance
    parts = [_text(about.model), _text(about.format), struct.pack("<I", len(about.sources))]
    parts += [_text(s.name) + struct.pack("<Q32s", s.nbytes, s.digest) for s in about.sources]
    parts.append(struct.pack("<I", len(index.entries)))
    for entry in index.entries:
        key = entry.key
        parts += [_text(key.packer), _text(key.format), struct.pack(f"<B{len(key.shape)}Q", len(key.shape), *key.shape)]
        parts.append(struct.pack("<IIII", key.tile.nr, key.tile.kr, key.tile.sr, key.chunk_nbytes))
        parts.append(key.weights.source + _text(key.weights.name))
        parts.append(entry.digest + struct.pack("<I", len(entry.chunks)))
        parts += [struct.pack("<QQI", c.offset, c.nbytes, c.checksum) for c in entry.chunks]
    return b"".join(parts)


class _Cursor:
    """Reads an index from its start to its end; reading beyond the end is an error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def raw(self, n: int) -> bytes:
        if n > len(self._data) - self._at:
            raise CacheFileError("its index ends too early")
        self._at += n
        return self._data[self._at - n : self._at]

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.raw(struct.calcsize("<" + layout)))

    def text(self) -> str:
        return self.raw(self.numbers("H")[0]).decode("utf-8", "surrogateescape")

    def weight(self) -> WeightId:
        return WeightId(self.raw(DIGEST_BYTES), self.text())

    def end(self) -> None:
        if self._at != len(self._data):
            raise CacheFileError("its index has bytes that mean nothing")


def decode_index(header: Header, data: bytes) -> Index:
    """Return the index of a file, after checking every rule of the format.

    Raises:
        CacheFileError: a rule is broken; the text says which.
    """
    if len(data) != header.index_nbytes or hashlib.sha256(data).digest() != header.index_digest:
        raise CacheFileError("its index is damaged")
    cursor = _Cursor(data)
    try:
        model, name = cursor.text(), cursor.text()
        sources = []
        for _ in range(cursor.numbers("I")[0]):
            source = cursor.text()
            sources.append(SourceFile(source, *cursor.numbers("Q32s")))
        about = Provenance(model, name, tuple(sources), header.packers)
        entries = tuple(_decode_entry(cursor, header) for _ in range(cursor.numbers("I")[0]))
    except PackingError as error:
        raise CacheFileError(f"its index is impossible: {error}") from None
    cursor.end()
    if about.model_digest != header.model:
        raise CacheFileError("its header and its index name different models")
    _check_places(entries)
    return Index(about, entries)


def _decode_entry(cursor: _Cursor, header: Header) -> Entry:
    packer, name = cursor.text(), cursor.text()
    shape = cursor.numbers(f"{cursor.numbers('B')[0]}Q")
    nr, kr, sr, chunk_nbytes = cursor.numbers("IIII")
    key = PackKey(packer, shape, name, TileShape(nr, kr, sr), chunk_nbytes, cursor.weight())
    digest = cursor.raw(DIGEST_BYTES)
    (n,) = cursor.numbers("I")
    chunks = tuple(StoredChunk(*row) for row in np.frombuffer(cursor.raw(_CHUNK.itemsize * n), _CHUNK).tolist())
    expected = chunks_of(key) if count_of(key) == n else ()  # count first: an absurd shape would list endless chunks
    if not expected or [c.nbytes for c in expected] != [c.nbytes for c in chunks]:
        raise CacheFileError(f"{key.name!r} does not have the size of its shape")
    start = chunks[0].offset
    if start % PAGE_BYTES or start < PAGE_BYTES or start + sum(c.padded_nbytes for c in chunks) > header.index_offset:
        raise CacheFileError(f"{key.name!r} does not lie on the pages between header and index")
    if [c.offset for c in chunks] != [start + c.offset for c in expected]:
        raise CacheFileError(f"the chunks of {key.name!r} do not lie one after another")
    return Entry(key, digest, chunks)


def _check_places(entries: Sequence[Entry]) -> None:
    """Check that no key is there twice, and that buffers share all of their bytes (equal ones do) or none."""
    if len({entry.key for entry in entries}) != len(entries):
        raise CacheFileError("a key is there twice")
    places = {(entry.offset, entry.padded_nbytes, entry.digest, entry.chunks) for entry in entries}
    end = 0
    for offset, nbytes, *_ in sorted(places, key=lambda place: place[0]):
        if offset < end:
            raise CacheFileError(f"two buffers overlap at byte {offset}")
        end = offset + nbytes
