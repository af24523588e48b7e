"""Specifies `refinfer.weight_cache.format` for indexes whose digests agree and whose contents are impossible."""

from __future__ import annotations

import hashlib
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from format_bytes import (
    AIM,
    DIGEST,
    LARGEST,
    LARGEST_U32,
    PACKERS,
    PAGE,
    SOURCE,
    at,
    header_of,
    number,
    raw_entry,
    raw_index,
    text,
    weight,
)
from refinfer.errors import CacheFileError
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.packing.layout import TileShape
from refinfer.weight_cache.format import (
    Entry,
    Index,
    Provenance,
    SourceFile,
    StoredChunk,
    decode_header,
    decode_index,
    encode_file,
)
from refinfer.weight_cache.key import WeightId
from refinfer.weight_cache.packers import STORED_TYPES, chunks_of, matrix_key, padded_nbytes_of, rows_key, vectors_key


def decode(*entries: bytes, index_offset: int = 16 * PAGE) -> Index:
    data = raw_index(*entries)
    return decode_index(header_of(data, index_offset), data)


MIDDLE = 4 << 20  # where the second chunk of a matrix of two chunks begins


TWO: dict[str, Any] = {"packer": "goi", "shape": (2048, 1024), "tile": (16, 1024, 1)}


def two_chunks(first: int = PAGE, second: int = PAGE + MIDDLE, sizes: tuple[int, int] = (MIDDLE, MIDDLE)) -> bytes:
    return raw_entry(chunks=((first, sizes[0], 1), (second, sizes[1], 2)), weights=weight("two"), **TWO)


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
        with pytest.raises(CacheFileError, match=r"its index |does not have the size of its shape"):
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
        with pytest.raises(CacheFileError, match="its index ends too early"):
            decode_index(header_of(data[:length], end, sources), data[:length])


@pytest.mark.spec("FILE-3")
@settings(max_examples=200)
@given(st.binary(max_size=600), st.integers(0, 1 << 40))
@example(b"", 0)
def test_garbage_is_refused_as_an_index(garbage: bytes, pages: int) -> None:
    for data in (garbage, raw_index()[:-4] + number(1, 4) + garbage, raw_index(raw_entry()[:40] + garbage)):
        with pytest.raises(CacheFileError, match="its index "):
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
