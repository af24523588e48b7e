"""Specifies `refinfer.weight_cache.format`: each byte of header and index, and everything that is refused in them."""

from __future__ import annotations

import hashlib
import re
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refinfer.errors import CacheFileError, PackingError
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.packing.layout import TileShape
from refinfer.weight_cache.format import (
    Entry,
    Header,
    Index,
    Provenance,
    SourceFile,
    StoredChunk,
    decode_header,
    decode_index,
    encode_file,
    encode_header,
    unfinished,
)
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.packers import STORED_TYPES, chunks_of, matrix_key, padded_nbytes_of, rows_key, vectors_key

PAGE = 4096
LARGEST = (1 << 64) - 1
LARGEST_U32 = (1 << 32) - 1
LARGEST_INDEX = 1 << 28
AIM = 4 << 20  # for chunks of rows, and as usual for those of f32
SOURCE, DIGEST, PACKERS = b"\x11" * 32, b"\x22" * 32, b"\x33" * 32


def number(value: int, nbytes: int) -> bytes:
    return value.to_bytes(nbytes, "little")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return number(len(raw), 2) + raw


def weight(name: str | bytes, source: bytes = SOURCE) -> bytes:
    return source + text(name)


def raw_entry(
    packer: str | bytes = "vectors",
    form: str | bytes = "f32",
    shape: Sequence[int] = (1000,),
    tile: Sequence[int] = (1, 1, 1),
    aim: int = AIM,
    weights: bytes = weight("w"),
    digest: bytes = DIGEST,
    chunks: Sequence[tuple[int, int, int]] = ((PAGE, 4000, 7),),
) -> bytes:
    """Write down an entry, whatever it says."""
    key = text(packer) + text(form) + number(len(shape), 1) + b"".join(number(size, 8) for size in shape)
    key += b"".join(number(size, 4) for size in (*tile, aim)) + weights
    table = b"".join(number(start, 8) + number(nbytes, 8) + number(crc, 4) for start, nbytes, crc in chunks)
    return key + digest + number(len(chunks), 4) + table


def raw_index(*entries: bytes, sources: Sequence[bytes] = (), model: str | bytes = "folder") -> bytes:
    """Write down an index, whatever it says."""
    about = text(model) + text("int8") + number(len(sources), 4) + b"".join(sources)
    return about + number(len(entries), 4) + b"".join(entries)


def header_of(data: bytes, index_offset: int = 16 * PAGE, sources: bytes = b"") -> Header:
    """Return a header that agrees with an index in everything that can be computed."""
    model = hashlib.sha256(sources).digest()
    return Header(1, model, PACKERS, index_offset, len(data), hashlib.sha256(data).digest())


def decode(*entries: bytes, index_offset: int = 16 * PAGE) -> Index:
    data = raw_index(*entries)
    return decode_index(header_of(data, index_offset), data)


def raw_header(**changes: Any) -> bytes:
    """Write down the first page of a file of five pages, with its digest, whatever it says."""
    fields: dict[str, bytes] = {
        "magic": b"\x89RWC\r\n\x1a\n",
        "version": number(2, 4),
        "state": number(1, 4),
        "model": SOURCE,
        "packers": PACKERS,
        "index_offset": number(4 * PAGE, 8),
        "index_nbytes": number(PAGE, 8),
        "file_nbytes": number(5 * PAGE, 8),
        "reserved": bytes(24),
        "index_digest": DIGEST,
    }
    for name, value in changes.items():
        fields[name] = value if isinstance(value, bytes) else number(value, len(fields[name]))
    written = b"".join(fields.values())
    return (written + hashlib.sha256(written).digest()).ljust(PAGE, b"\0")


HEADER = Header(1, SOURCE, PACKERS, 4 * PAGE, PAGE, DIGEST)

digests = st.binary(min_size=32, max_size=32)
words = st.integers(0, LARGEST)
checksums = st.integers(0, LARGEST_U32)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # what UTF-8 can express
# Names of files and folders may also be bytes that are no UTF-8, as Python gives them.
paths = texts | st.binary(max_size=10).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
ids = st.builds(WeightId, digests, texts)


@st.composite
def keys(draw: st.DrawFn) -> PackKey:
    """Draw the key of a buffer of one chunk or several."""
    N, K, weights = draw(st.integers(1, 5000)), draw(st.integers(1, 1500)), draw(ids)
    aim = draw(st.just(AIM) | st.integers(100_000, LARGEST_U32))
    packer = draw(st.sampled_from(["goi", "rows", "vectors"]))
    if packer == "goi":
        return matrix_key(layout_of(draw(st.sampled_from(list(FORMATS))), N, K, aim), weights)
    if packer == "rows":
        return rows_key((N, K), draw(st.sampled_from(list(STORED_TYPES))), weights, aim)
    return vectors_key(N * K, weights)


@st.composite
def indices(draw: st.DrawFn) -> tuple[Index, int]:
    """Draw an index and where it lies; some buffers share their bytes, some pages belong to none."""
    entries: list[Entry] = []
    end = PAGE
    for key in draw(st.lists(keys(), max_size=8, unique=True)):
        end += draw(st.sampled_from([0, 0, PAGE]))
        chunks = tuple(StoredChunk(end + c.offset, c.nbytes, draw(checksums)) for c in chunks_of(key))
        entries.append(Entry(key, draw(digests), chunks))
        end += padded_nbytes_of(key)
        twin = replace(key, weights=draw(ids))
        if draw(st.booleans()) and all(entry.key != twin for entry in entries):
            entries.append(replace(entries[-1], key=twin))
    if len({entry.key for entry in entries}) < len(entries):
        entries = []
    order = draw(st.permutations(entries))
    sources = draw(st.lists(st.builds(SourceFile, paths, words, digests), max_size=4))
    about = Provenance(draw(paths), draw(texts), tuple(sources), draw(digests))
    return Index(about, tuple(order)), end


@pytest.mark.spec("FILE-1")
@given(indices())
def test_header_and_index_come_back_equal(made: tuple[Index, int]) -> None:
    index, index_offset = made
    data, page = encode_file(index, index_offset)
    header = decode_header(page, index_offset + len(data))
    assert decode_index(header, data) == index
    assert (header.model, header.packers) == (index.provenance.model_digest, index.provenance.packers)
    assert (header.index_offset, header.index_nbytes) == (index_offset, len(data))


@pytest.mark.spec("FILE-1")
@given(digests, digests, digests, st.integers(1, 1 << 40), st.integers(0, LARGEST_INDEX))
@example(SOURCE, PACKERS, DIGEST, 1 << 40, LARGEST_INDEX)
def test_a_header_comes_back_equal(model: bytes, packers: bytes, digest: bytes, pages: int, nbytes: int) -> None:
    header = Header(1, model, packers, pages * PAGE, nbytes, digest)
    page = encode_header(header)
    assert len(page) == PAGE
    assert decode_header(page, header.file_nbytes) == header
    assert encode_header(decode_header(page, header.file_nbytes)) == page


@pytest.mark.spec("FILE-1")
def test_an_index_of_many_buffers_comes_back_equal() -> None:
    entries = tuple(
        Entry(
            vectors_key(1 + i % 7, WeightId(SOURCE, f"层.{i}.weight")),
            DIGEST,
            (StoredChunk(PAGE * (1 + i), 4 * (1 + i % 7), i),),
        )
        for i in range(5_000)
    )
    index = Index(Provenance("ein Ordner für Modelle 🦆", "f32", (), PACKERS), entries)
    data, page = encode_file(index, PAGE * 5_001)
    assert decode_index(decode_header(page, PAGE * 5_001 + len(data)), data) == index


@pytest.mark.spec("FILE-1")
@pytest.mark.parametrize("name", ["", "é", "a\0b", "\n", "w" * 65_535, "ß" * 32_767], ids=lambda n: repr(n[:4]))
def test_names_come_back_equal(name: str) -> None:
    entry = Entry(vectors_key(1000, WeightId(SOURCE, name)), DIGEST, (StoredChunk(PAGE, 4000, 0),))
    index = Index(Provenance(name, name, (SourceFile(name, 1, SOURCE),), PACKERS), (entry,))
    data, page = encode_file(index, 2 * PAGE)
    assert decode_index(decode_header(page, 2 * PAGE + len(data)), data) == index


def about_again(about: Provenance) -> Provenance:
    """Write provenance to a file of no buffers, and read it."""
    data, page = encode_file(Index(about, ()), PAGE)
    return decode_index(decode_header(page, PAGE + len(data)), data).provenance


@pytest.mark.spec("FILE-1")
@pytest.mark.parametrize("raw", [b"\xff", b"a/\xc3", b"\xed\xa0\x80", b"\xff" * 65_535], ids=lambda raw: repr(raw[:4]))
def test_names_of_files_and_folders_that_are_no_text_come_back_equal(raw: bytes) -> None:
    name = raw.decode("utf-8", "surrogateescape")
    about = Provenance(name, "f32", (SourceFile(name, 1, SOURCE),), PACKERS)
    assert about_again(about) == about


@pytest.mark.spec("FILE-1")
@pytest.mark.parametrize(
    "folder",
    ["w" * 65_536, "/é" * 30_000, "🦆" * 16_384, "\udcff" * 70_000, "x" * 3_000_000],
    ids=lambda folder: repr(folder[:2]),
)
def test_a_folder_of_any_length_comes_back_as_far_as_it_fits(folder: str) -> None:
    about = Provenance(folder, "f32", (SourceFile("a", 5, SOURCE),), PACKERS)
    again = about_again(about)
    assert again.model.encode("utf-8", "surrogateescape") == folder.encode("utf-8", "surrogateescape")[:65_535]
    assert replace(again, model=folder) == about
    assert again.model_digest == about.model_digest
    assert about_again(again) == again


@pytest.mark.spec("FILE-1")
@pytest.mark.parametrize("name", ["\ud800", "layer \udcff", "w" * 65_536, "\udcc3\udca9"], ids=lambda n: repr(n[:4]))
def test_a_key_that_an_index_could_not_give_back_cannot_be_made(name: str) -> None:
    with pytest.raises(PackingError, match=r"^a name must be text"):
        vectors_key(1000, WeightId(SOURCE, name))
    with pytest.raises(PackingError, match=r"^a name must be text"):
        replace(vectors_key(1000, WeightId(SOURCE, "w")), format=name)


@pytest.mark.spec("FILE-2")
def test_every_field_of_the_header_lies_at_its_place() -> None:
    header = Header(1, bytes(range(32)), bytes(range(32, 64)), 0x123456789000, 0xABCDEF, bytes(range(64, 96)))
    page = encode_header(header)
    assert page[0:8] == b"\x89RWC\r\n\x1a\n"
    assert int.from_bytes(page[8:12], "little") == 2  # the version
    assert int.from_bytes(page[12:16], "little") == 1  # complete
    assert page[16:48] == bytes(range(32))
    assert page[48:80] == bytes(range(32, 64))
    assert int.from_bytes(page[80:88], "little") == 0x123456789000
    assert int.from_bytes(page[88:96], "little") == 0xABCDEF
    assert int.from_bytes(page[96:104], "little") == 0x123456789000 + 0xABCDEF
    assert page[104:128] == bytes(24)
    assert page[128:160] == bytes(range(64, 96))
    assert page[160:192] == hashlib.sha256(page[:160]).digest()
    assert page[192:] == bytes(PAGE - 192)
    assert page == raw_header(
        model=header.model,
        packers=header.packers,
        index_offset=header.index_offset,
        index_nbytes=header.index_nbytes,
        file_nbytes=header.file_nbytes,
        index_digest=header.index_digest,
    )


@pytest.mark.spec("FILE-2")
def test_every_field_of_the_index_lies_at_its_place() -> None:
    source = SourceFile("some.safetensors", 0x0102030405060708, SOURCE)
    half = 4 << 20
    aim = 0x00456789  # as usual two chunks
    matrix = matrix_key(layout_of("f32", 2048, 1024, aim), WeightId(SOURCE, "größe"))
    vectors = replace(vectors_key(1000, WeightId(SOURCE, "w")), chunk_nbytes=0x89ABCDEF)
    entries = (
        Entry(matrix, b"\x44" * 32, (StoredChunk(PAGE, half, 1), StoredChunk(PAGE + half, half, LARGEST_U32))),
        Entry(vectors, DIGEST, (StoredChunk(PAGE + 2 * half, 4000, 0x01020304),)),
    )
    data, page = encode_file(Index(Provenance("folder", "int8", (source,), PACKERS), entries), 2 * PAGE + 2 * half)
    raw_source = text("some.safetensors") + bytes([8, 7, 6, 5, 4, 3, 2, 1]) + SOURCE
    assert data == raw_index(
        raw_entry(
            packer="goi",
            shape=(2048, 1024),
            tile=(16, 1024, 1),
            aim=0x00456789,
            weights=weight("größe"),
            digest=b"\x44" * 32,
            chunks=((PAGE, half, 1), (PAGE + half, half, LARGEST_U32)),
        ),
        raw_entry(aim=0x89ABCDEF, chunks=((PAGE + 2 * half, 4000, 0x01020304),)),
        sources=[raw_source],
    )
    assert page == encode_header(header_of(data, 2 * PAGE + 2 * half, sources=raw_source))


@pytest.mark.spec("FILE-2")
def test_what_is_written_down_by_hand_is_read() -> None:
    raw_source = text("a") + number(5, 8) + SOURCE
    data = raw_index(raw_entry(), raw_entry(weights=weight("v"), chunks=[(3 * PAGE, 4000, 9)]), sources=[raw_source])
    index = decode_index(header_of(data, sources=raw_source), data)
    assert index.provenance == Provenance("folder", "int8", (SourceFile("a", 5, SOURCE),), PACKERS)
    assert [entry.key.name for entry in index.entries] == ["w", "v"]
    assert [entry.chunks for entry in index.entries] == [
        (StoredChunk(PAGE, 4000, 7),),
        (StoredChunk(3 * PAGE, 4000, 9),),
    ]
    assert [(entry.offset, entry.padded_nbytes, entry.digest) for entry in index.entries] == [
        (PAGE, PAGE, DIGEST),
        (3 * PAGE, PAGE, DIGEST),
    ]


BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is not a refinfer weight cache"),
    "a few bytes": (b"\x89RWC", "it is not a refinfer weight cache"),
    "only the magic number": (b"\x89RWC\r\n\x1a\n", "it is cut short"),
    "half a page": (raw_header()[:2048], "it is cut short"),
    "a byte less than a page": (raw_header()[:-1], "it is cut short"),
    "zeros": (bytes(PAGE), "it is not a refinfer weight cache"),
    "another kind of file": (raw_header(magic=b"\x89PNG\r\n\x1a\n"), "it is not a refinfer weight cache"),
    "line ends changed": (raw_header().replace(b"\r\n", b"\n") + b"\0", "it is not a refinfer weight cache"),
    "seven bits": (bytes(byte & 127 for byte in raw_header()), "it is not a refinfer weight cache"),
    "version 0": (raw_header(version=0), "it has the format version 0, and this is version 2"),
    "version 1": (raw_header(version=1), "it has the format version 1, and this is version 2"),
    "version 3": (raw_header(version=3), "it has the format version 3, and this is version 2"),
    "version in the other byte order": (raw_header(version=2 << 24), "it has the format version 33554432"),
    "a later version with another header": (
        raw_header(version=3)[:160].ljust(PAGE, b"?"),
        "it has the format version 3, and this is version 2",
    ),
    "being built": (raw_header(state=0), "it was never completed"),
    "in no state": (raw_header(state=2), "it was never completed"),
    "one byte longer than the file": (raw_header(file_nbytes=5 * PAGE + 1), "it has 20480 bytes instead of 20481"),
    "one byte shorter than the file": (raw_header(file_nbytes=5 * PAGE - 1), "it has 20480 bytes instead of 20479"),
    "no size": (raw_header(file_nbytes=0), "it has 20480 bytes instead of 0"),
    "as large as can be": (raw_header(file_nbytes=LARGEST), f"it has 20480 bytes instead of {LARGEST}"),
    "index after the end": (raw_header(index_offset=6 * PAGE), "its header contradicts itself"),
    "index that does not end the file": (raw_header(index_nbytes=PAGE - 1), "its header contradicts itself"),
    "index in the header": (raw_header(index_offset=0, index_nbytes=5 * PAGE), "its header contradicts itself"),
    "index on no page": (
        raw_header(index_offset=4 * PAGE + 8, index_nbytes=PAGE - 8),
        "its header contradicts itself",
    ),
    "index that wraps": (
        raw_header(index_offset=LARGEST - PAGE + 1, index_nbytes=6 * PAGE),
        "its header contradicts itself",
    ),
    "index of negative size": (
        raw_header(index_offset=6 * PAGE, index_nbytes=LARGEST - PAGE + 1),
        "its header contradicts itself",
    ),
}


@pytest.mark.spec("FILE-3")
@pytest.mark.parametrize(("page", "why"), list(BAD_HEADERS.values()), ids=list(BAD_HEADERS))
def test_a_bad_header_is_refused_with_its_reason(page: bytes, why: str) -> None:
    with pytest.raises(CacheFileError, match=f"^{re.escape(why)}"):
        decode_header(page, 5 * PAGE)


@pytest.mark.spec("FILE-3", "FILE-6")
@pytest.mark.parametrize("nbytes", [LARGEST_INDEX + 1, 1 << 40, LARGEST - 4 * PAGE])
def test_an_index_too_large_to_be_read_is_refused(nbytes: int) -> None:
    size = 4 * PAGE + nbytes
    with pytest.raises(CacheFileError, match=r"^its header contradicts itself$"):
        decode_header(raw_header(index_nbytes=nbytes, file_nbytes=size), size)
    largest = decode_header(
        raw_header(index_nbytes=LARGEST_INDEX, file_nbytes=4 * PAGE + LARGEST_INDEX), 4 * PAGE + LARGEST_INDEX
    )
    assert largest.index_nbytes == LARGEST_INDEX


@pytest.mark.spec("FILE-3")
def test_a_good_header_is_not_refused() -> None:
    assert decode_header(raw_header(), 5 * PAGE) == HEADER
    for nbytes in (0, PAGE, 5 * PAGE - 1, 5 * PAGE + 1, 6 * PAGE):
        with pytest.raises(CacheFileError, match=f"it has {nbytes} bytes instead of 20480"):
            decode_header(raw_header(), nbytes)


@pytest.mark.spec("FILE-3")
def test_a_header_with_any_bit_flipped_is_refused() -> None:
    page = bytearray(raw_header())
    for at in range(192):
        for bit in range(8):
            page[at] ^= 1 << bit
            with pytest.raises(CacheFileError):
                decode_header(bytes(page), 5 * PAGE)
            page[at] ^= 1 << bit
    assert bytes(page) == raw_header()


@pytest.mark.spec("FILE-3")
@given(st.binary(max_size=5000), st.booleans(), st.integers(0, 1 << 63))
def test_no_garbage_is_a_header(garbage: bytes, magic: bool, nbytes: int) -> None:
    page = (raw_header()[:12] + garbage if magic else garbage).ljust(PAGE, b"\0")
    with pytest.raises(CacheFileError):
        decode_header(page, nbytes)


@pytest.mark.spec("FILE-3")
def test_a_file_that_is_being_built_says_so() -> None:
    about = Provenance("folder", "int8", (SourceFile("a", 5, SOURCE),), PACKERS)
    header = unfinished(about)
    with pytest.raises(CacheFileError, match=r"^it was never completed$"):
        decode_header(encode_header(header), header.file_nbytes)


@pytest.mark.spec("FILE-3")
def test_a_damaged_index_is_refused() -> None:
    data = raw_index(raw_entry())
    header = header_of(data)
    for at in range(len(data)):
        with pytest.raises(CacheFileError, match=r"^its index is damaged$"):
            decode_index(header, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for other in (data[:-1], data + b"\0", b"", data[1:]):
        with pytest.raises(CacheFileError, match=r"^its index is damaged$"):
            decode_index(header, other)
    with pytest.raises(CacheFileError, match=r"^its index is damaged$"):
        decode_index(replace(header, index_nbytes=len(data) - 1), data)


@pytest.mark.spec("FILE-3")
def test_an_index_of_another_model_is_refused() -> None:
    data = raw_index(raw_entry(), sources=[text("a") + number(5, 8) + SOURCE])
    with pytest.raises(CacheFileError, match=r"^its header and its index name different models$"):
        decode_index(header_of(data), data)


# From here on every digest agrees: the index was written by somebody who means harm.

MIDDLE = 4 << 20  # where the second chunk of a matrix of two chunks begins
TWO: dict[str, Any] = {"packer": "goi", "shape": (2048, 1024), "tile": (16, 1024, 1)}


def two_chunks(first: int = PAGE, second: int = PAGE + MIDDLE, sizes: tuple[int, int] = (MIDDLE, MIDDLE)) -> bytes:
    return raw_entry(chunks=((first, sizes[0], 1), (second, sizes[1], 2)), weights=weight("two"), **TWO)


def at(offset: int, name: str = "w", **changes: Any) -> bytes:
    """Write down an entry of a page at an offset."""
    return raw_entry(weights=weight(name), chunks=((offset, 4000, 7),), **changes)


END = 16 * PAGE
LIE = "does not lie on the pages between header and index"
AFTER = "do not lie one after another"
BIG = PAGE + 2 * MIDDLE

BAD_PLACES: dict[str, tuple[tuple[bytes, ...], int, str]] = {
    "in the header": ((at(0),), END, LIE),
    "in the index": ((at(END),), END, LIE),
    "after the end of the file": ((at(17 * PAGE),), END, LIE),
    "far after the end of the file": ((at(1 << 63),), END, LIE),
    "where offset and size wrap": ((at(LARGEST - PAGE + 1),), END, LIE),
    "at the largest offset": ((at(LARGEST),), END, LIE),
    "between pages": ((at(PAGE + 1),), END, LIE),
    "between pages by a word": ((at(2 * PAGE - 8),), END, LIE),
    "half in the index": ((two_chunks(PAGE, PAGE + MIDDLE),), BIG - PAGE, LIE),
    "where no page is": ((at(PAGE),), PAGE, LIE),
    "chunks with a gap": ((two_chunks(PAGE, 2 * PAGE + MIDDLE),), BIG + PAGE, AFTER),
    "chunks in each other": ((two_chunks(PAGE, MIDDLE),), BIG, AFTER),
    "chunks on each other": ((two_chunks(PAGE, PAGE),), BIG, AFTER),
    "chunks backwards": ((two_chunks(PAGE + MIDDLE, PAGE),), BIG + MIDDLE, AFTER),
    "a chunk after the end of the file": ((two_chunks(PAGE, 1 << 63),), BIG, AFTER),
    "a chunk between pages": ((two_chunks(PAGE, PAGE + MIDDLE + 8),), BIG + PAGE, AFTER),
    "a chunk that is close again once it wraps": ((two_chunks(LARGEST - MIDDLE + 1, 0),), BIG, LIE),
    "the same place, other checksums": (
        (at(PAGE), raw_entry(weights=weight("v"), chunks=((PAGE, 4000, 8),))),
        END,
        "two buffers overlap at byte 4096",
    ),
    "the same place, other digests": (
        (at(PAGE), at(PAGE, "v", digest=SOURCE)),
        END,
        "two buffers overlap at byte 4096",
    ),
    "the same place, other sizes": (
        (at(PAGE), raw_entry(weights=weight("v"), shape=(2000,), chunks=((PAGE, 8000, 7),))),
        END,
        "two buffers overlap at byte 4096",
    ),
    "the same place, another size within the page": (
        (at(PAGE), raw_entry(weights=weight("v"), shape=(999,), chunks=((PAGE, 3996, 7),))),
        END,
        "two buffers overlap at byte 4096",
    ),
    "overlapping by a page": (
        (raw_entry(weights=weight("v"), shape=(2000,), chunks=((PAGE, 8000, 7),)), at(2 * PAGE)),
        END,
        "two buffers overlap at byte 8192",
    ),
    "overlapping by a page, later ones first": (
        (at(2 * PAGE), raw_entry(weights=weight("v"), shape=(2000,), chunks=((PAGE, 8000, 7),))),
        END,
        "two buffers overlap at byte 8192",
    ),
    "one within another": ((two_chunks(), at(PAGE + MIDDLE)), BIG, f"two buffers overlap at byte {PAGE + MIDDLE}"),
    "between two of three": (
        (
            raw_entry(weights=weight("u"), shape=(3000,), chunks=((PAGE, 12_000, 7),)),
            at(4 * PAGE, "v"),
            at(2 * PAGE),
        ),
        END,
        "two buffers overlap at byte 8192",
    ),
    "a key twice": ((at(PAGE), at(2 * PAGE)), END, "a key is there twice"),
    "a key twice at the same place": ((at(PAGE), at(PAGE)), END, "a key is there twice"),
}


@pytest.mark.spec("FILE-4")
@pytest.mark.parametrize(("entries", "end", "why"), list(BAD_PLACES.values()), ids=list(BAD_PLACES))
def test_buffers_at_impossible_places_are_refused(entries: tuple[bytes, ...], end: int, why: str) -> None:
    with pytest.raises(CacheFileError, match=re.escape(why)):
        decode(*entries, index_offset=end)


@pytest.mark.spec("FILE-4")
def test_buffers_at_possible_places_are_not_refused() -> None:
    assert len(decode(two_chunks(), index_offset=BIG).entries) == 1
    places = [5 * PAGE, PAGE, 15 * PAGE, 2 * PAGE, 5 * PAGE]  # the first and the last share all of their bytes
    index = decode(*(at(place, f"tensor {i}") for i, place in enumerate(places)))
    assert [entry.offset for entry in index.entries] == places


NOT_ITS_SIZE = "does not have the size of its shape"
NO_TEXT = "its index is impossible: a name must be text of at most 65535 bytes in UTF-8, not "

BAD_SIZES: dict[str, tuple[bytes, str]] = {
    "a byte less": (raw_entry(chunks=((PAGE, 3999, 7),)), NOT_ITS_SIZE),
    "a byte more": (raw_entry(chunks=((PAGE, 4001, 7),)), NOT_ITS_SIZE),
    "a whole page": (raw_entry(chunks=((PAGE, PAGE, 7),)), NOT_ITS_SIZE),
    "nothing": (raw_entry(chunks=((PAGE, 0, 7),)), NOT_ITS_SIZE),
    "as large as can be": (raw_entry(chunks=((PAGE, LARGEST, 7),)), NOT_ITS_SIZE),
    "a size that is right once it wraps": (raw_entry(shape=(1 << 47,), chunks=((PAGE, 0, 7),)), NOT_ITS_SIZE),
    "no chunks": (raw_entry(chunks=()), NOT_ITS_SIZE),
    "a chunk too many": (raw_entry(chunks=((PAGE, 4000, 7), (2 * PAGE, 4000, 7))), NOT_ITS_SIZE),
    "an empty chunk too many": (raw_entry(chunks=((PAGE, 4000, 7), (2 * PAGE, 0, 7))), NOT_ITS_SIZE),
    "a chunk too few": (raw_entry(chunks=((PAGE, 2 * MIDDLE, 1),), **TWO), NOT_ITS_SIZE),
    "a page from one chunk to the other": (two_chunks(sizes=(MIDDLE - PAGE, MIDDLE + PAGE)), NOT_ITS_SIZE),
    "another shape": (raw_entry(shape=(1001,)), NOT_ITS_SIZE),
    "no dimensions": (raw_entry(shape=()), "its index is impossible: a tensor of shape [] cannot be packed"),
    "no numbers": (raw_entry(shape=(0,)), "its index is impossible: a tensor of shape [0] cannot be packed"),
    "too many dimensions": (raw_entry(shape=(1000, 1)), "its index is impossible: 'w' is not a block of vectors"),
    "255 dimensions": (raw_entry(shape=(1,) * 255), "its index is impossible: 'w' is not a block of vectors"),
    "no such packer": (raw_entry(packer="giu"), "its index is impossible: 'giu' is not a packer"),
    "a packer that is no text": (raw_entry(packer=b"\xff"), NO_TEXT),
    "a format that is no text": (raw_entry(form=b"f\xc3"), NO_TEXT),
    "a tensor whose name is no text": (raw_entry(weights=weight(b"\xed\xa0\x80")), NO_TEXT),
    "no such format": (raw_entry(packer="goi", form="int2", shape=(9, 9)), "its index is impossible: 'int2' is not"),
    "vectors of another type": (raw_entry(form="f16"), "its index is impossible: 'w' is not a block of vectors"),
    "no rows to a tile": (raw_entry(tile=(0, 1, 1)), "its index is impossible: nr, kr and sr must be at least 1"),
    "other tiles": (
        raw_entry(packer="goi", shape=(16, 60), tile=(60, 16, 1), chunks=((PAGE, 3840, 7),)),
        "its index is impossible: 'w' lies in tiles of",
    ),
    "chunks of no size": (
        raw_entry(aim=0),
        "the aim must be a number of 32 bits above zero, not 0",
    ),
    "a matrix in chunks of no size": (raw_entry(aim=0, **TWO), "the aim must be a number of 32 bits above zero, not 0"),
    "another aim": (
        raw_entry(aim=2 * AIM, chunks=((PAGE, MIDDLE, 1), (PAGE + MIDDLE, MIDDLE, 2)), **TWO),
        NOT_ITS_SIZE,
    ),
    "an aim of one byte": (
        raw_entry(aim=1, chunks=((PAGE, MIDDLE, 1), (PAGE + MIDDLE, MIDDLE, 2)), **TWO),
        NOT_ITS_SIZE,
    ),
}


@pytest.mark.spec("FILE-5")
@pytest.mark.parametrize(("entry", "why"), list(BAD_SIZES.values()), ids=list(BAD_SIZES))
def test_a_buffer_whose_size_is_not_that_of_its_shape_is_refused(entry: bytes, why: str) -> None:
    with pytest.raises(CacheFileError, match=re.escape(why)):
        decode(entry, index_offset=BIG)


def decode_in_little_memory(data: bytes, index_offset: int) -> None:
    """Check that an index is refused, and that nearly nothing was allocated for that."""
    header = header_of(data, index_offset)
    tracemalloc.start()
    try:
        with pytest.raises(CacheFileError):
            decode_index(header, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(data) + 100_000


ABSURD = [1 << 20, 1 << 32, (1 << 32) + 1, 1 << 48, 1 << 63, LARGEST]


@pytest.mark.spec("FILE-6")
@pytest.mark.parametrize("size", ABSURD)
@pytest.mark.parametrize("packer", [*FORMATS, "rows", "vectors"])
def test_an_absurd_shape_is_refused_in_no_memory(packer: str, size: int) -> None:
    for shape in ((size,), (size, 1), (1, size), (size, size), (size, 3)):
        tile, name = TileShape(1), packer
        if packer in FORMATS and len(shape) == 2:
            tile = FORMATS[packer].tile_shape(shape[0], min(shape[1], 1 << 31))  # the one that it would have
        elif packer == "rows":
            name = "bf16"
        entry = raw_entry(
            packer="goi" if packer in FORMATS else packer,
            form="f32" if packer == "vectors" else name,
            shape=shape,
            tile=(tile.nr, tile.kr, tile.sr),
        )
        decode_in_little_memory(raw_index(entry), END)


@pytest.mark.spec("FILE-6")
@pytest.mark.parametrize("packer", [*FORMATS, "rows", "vectors"])
@pytest.mark.parametrize("shape", [(1, 1), (4096, 4096), (3, 1 << 20)], ids=str)
def test_a_large_shape_is_not_absurd_in_a_file_that_holds_nothing_else(packer: str, shape: tuple[int, int]) -> None:
    weights = WeightId(SOURCE, "w")
    key = vectors_key(shape[0] * shape[1], weights)
    if packer in FORMATS:
        key = matrix_key(layout_of(packer, *shape), weights)
    elif packer == "rows":
        key = rows_key(shape, "bf16", weights)
    chunks = tuple(StoredChunk(PAGE + chunk.offset, chunk.nbytes, 0) for chunk in chunks_of(key))
    index = Index(Provenance("", "", (), PACKERS), (Entry(key, DIGEST, chunks),))
    data, page = encode_file(index, PAGE + padded_nbytes_of(key))
    assert decode_index(decode_header(page, PAGE + padded_nbytes_of(key) + len(data)), data) == index


MANY = b"\xff\xff\xff\xff"

CLAIMS: dict[str, bytes] = {
    "sources": text("folder") + text("int8") + MANY,
    "entries": text("folder") + text("int8") + number(0, 4) + MANY,
    "chunks": raw_index(raw_entry(chunks=())[:-4] + MANY),
    "chunks, and a few": raw_index(raw_entry()[:-24] + MANY + bytes(20)),
    "dimensions": raw_index(text("vectors") + text("f32") + b"\xff"),
    "letters": b"\xff\xff",
    "letters of a packer": raw_index(b"\xff\xff"),
}


@pytest.mark.spec("FILE-6")
@pytest.mark.parametrize("data", list(CLAIMS.values()), ids=list(CLAIMS))
def test_a_claim_of_more_than_the_index_holds_is_refused_in_no_memory(data: bytes) -> None:
    decode_in_little_memory(data, END)


@pytest.mark.spec("FILE-6")
@pytest.mark.parametrize("rows", [1 << 20, 1 << 31, 1 << 47])
@pytest.mark.parametrize("file_nbytes", [1 << 40, 1 << 63])
@pytest.mark.parametrize("aim", [1, AIM, LARGEST_U32])
def test_an_absurd_shape_in_a_huge_file_of_holes_is_refused_in_no_memory(rows: int, file_nbytes: int, aim: int) -> None:
    for form in STORED_TYPES:
        entry = raw_entry(packer="rows", form=form, shape=(rows, 1), aim=aim)
        decode_in_little_memory(raw_index(entry), file_nbytes)
    for form in FORMATS:
        tile = FORMATS[form].tile_shape(rows, 1)
        entry = raw_entry(packer="goi", form=form, shape=(rows, 1), tile=(tile.nr, tile.kr, tile.sr), aim=aim)
        decode_in_little_memory(raw_index(entry), file_nbytes)


@pytest.mark.spec("FILE-6")
def test_an_absurd_chunk_in_a_huge_file_of_holes_is_refused_in_no_memory() -> None:
    entry = raw_entry(packer="rows", form="bf16", shape=(1 << 31, 1), chunks=((PAGE, 1 << 39, 7),))
    decode_in_little_memory(raw_index(entry), 1 << 40)


@pytest.mark.spec("FILE-4", "FILE-5")
@pytest.mark.parametrize("more", [b"\0", bytes(100), raw_entry()])
def test_bytes_after_the_index_are_refused(more: bytes) -> None:
    data = raw_index(raw_entry()) + more
    with pytest.raises(CacheFileError, match=r"^its index has bytes that mean nothing$"):
        decode_index(header_of(data), data)


def some_index() -> tuple[bytes, bytes, int]:
    """Return an index of buffers of every kind, its sources, and where it lies."""
    about = [text("model.safetensors") + number(1 << 33, 8) + SOURCE, text("größer") + number(7, 8) + DIGEST]
    keys = [matrix_key(layout_of(name, 37, 21), WeightId(SOURCE, f"{name} 层")) for name in FORMATS]
    keys += [rows_key((9, 5), "f16", WeightId(SOURCE, "rows")), vectors_key(2000, WeightId(DIGEST, ""))]
    entries, end = [], PAGE
    for key in keys:
        (chunk,) = chunks_of(key)
        tile, named = (key.tile.nr, key.tile.kr, key.tile.sr), weight(key.name, key.weights.source)
        entries.append(raw_entry(key.packer, key.format, key.shape, tile, AIM, named, DIGEST, [(end, chunk.nbytes, 9)]))
        end += padded_nbytes_of(key)
    entries.append(two_chunks(end, end + MIDDLE))
    return raw_index(*entries, sources=about), b"".join(about), end + 2 * MIDDLE


@pytest.mark.spec("FILE-3")
def test_an_index_that_is_cut_short_anywhere_is_refused() -> None:
    data, sources, end = some_index()
    assert len(decode_index(header_of(data, end, sources), data).entries) == 7
    for length in range(len(data)):
        with pytest.raises(CacheFileError):
            decode_index(header_of(data[:length], end, sources), data[:length])


@pytest.mark.spec("FILE-3")
@settings(max_examples=200)
@given(st.binary(max_size=600), st.integers(0, 1 << 40))
@example(b"", 0)
def test_garbage_is_refused_as_an_index(garbage: bytes, pages: int) -> None:
    for data in (garbage, raw_index()[:-4] + number(1, 4) + garbage, raw_index(raw_entry()[:40] + garbage)):
        with pytest.raises(CacheFileError):
            decode_index(header_of(data, pages * PAGE), data)


def check(index: Index, index_offset: int) -> None:
    """Check what every index that was not refused must keep."""
    taken: dict[int, Entry] = {}
    assert len({entry.key for entry in index.entries}) == len(index.entries)
    for entry in index.entries:
        end = entry.chunks[0].offset
        assert [chunk.nbytes for chunk in entry.chunks] == [chunk.nbytes for chunk in chunks_of(entry.key)]
        for chunk in entry.chunks:
            assert chunk.offset == end
            assert chunk.offset % PAGE == 0
            end += (chunk.nbytes + PAGE - 1) // PAGE * PAGE
        assert entry.chunks[0].offset >= PAGE
        assert end <= index_offset
        for page in range(entry.chunks[0].offset, end, PAGE):
            other = taken.setdefault(page, entry)
            assert (other.digest, other.chunks) == (entry.digest, entry.chunks)


@pytest.mark.spec("FILE-4", "FILE-5")
def test_an_index_changed_anywhere_is_refused_or_keeps_every_rule() -> None:
    data, sources, end = some_index()
    rng = np.random.default_rng(0)
    refused = accepted = 0
    changes: list[Callable[[int], int]] = [
        lambda byte: byte ^ (1 << int(rng.integers(8))),
        lambda byte: int(rng.integers(256)),
        lambda byte: (byte + 1) % 256,
        lambda byte: (byte - 1) % 256,
        lambda byte: 0,
        lambda byte: 255,
    ]
    for _ in range(2500):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
            place = int(rng.integers(len(data)))
            changed[place] = changes[rng.integers(len(changes))](changed[place])
        try:
            index = decode_index(header_of(bytes(changed), end, sources), bytes(changed))
        except CacheFileError:
            refused += 1
        else:
            accepted += 1
            check(index, end)
    assert refused > 600  # numbers that matter
    assert accepted > 100  # names, checksums, digests


FILES = (SourceFile("a", 5, SOURCE), SourceFile("b", 7, DIGEST))

OTHER_FILES: dict[str, tuple[SourceFile, ...]] = {
    "other content": (replace(FILES[0], digest=PACKERS), FILES[1]),
    "another size": (replace(FILES[0], nbytes=6), FILES[1]),
    "a file less": FILES[:1],
    "a file more": (*FILES, SourceFile("c", 0, SOURCE)),
    "contents exchanged": (replace(FILES[0], digest=DIGEST), replace(FILES[1], digest=SOURCE)),
    "none": (),
}


@pytest.mark.spec("FILE-8")
def test_where_a_model_lies_and_what_is_made_of_it_do_not_matter_to_its_identity() -> None:
    here = Provenance("/somewhere", "int8", FILES, PACKERS)
    there = Provenance("/elsewhere", "f32", FILES, bytes(32))
    assert here.model_digest == there.model_digest
    listed = b"".join(text(file.name) + number(file.nbytes, 8) + file.digest for file in FILES)
    assert here.model_digest == hashlib.sha256(listed).digest()


@pytest.mark.spec("FILE-8")
@pytest.mark.parametrize("files", list(OTHER_FILES.values()), ids=list(OTHER_FILES))
def test_a_model_of_other_files_is_another(files: tuple[SourceFile, ...]) -> None:
    assert Provenance("m", "f32", files).model_digest != Provenance("m", "f32", FILES).model_digest


few_files = st.lists(
    st.builds(SourceFile, st.text("ab\0", max_size=3), st.integers(0, 2), st.sampled_from([SOURCE, DIGEST])), max_size=3
)


@pytest.mark.spec("FILE-8")
@settings(max_examples=200)
@given(few_files, few_files)
def test_models_are_the_same_exactly_if_their_files_are(some: list[SourceFile], others: list[SourceFile]) -> None:
    one, other = (Provenance("m", "f32", tuple(files)).model_digest for files in (some, others))
    assert (one == other) == (some == others)
