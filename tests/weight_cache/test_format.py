"""Specifies `refinfer.weight_cache.format`: each byte of header and index, and everything that is refused in them."""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from format_bytes import (
    DIGEST,
    LARGEST,
    LARGEST_U32,
    PACKERS,
    PAGE,
    SOURCE,
    checksums,
    digests,
    header_of,
    ids,
    keys,
    number,
    raw_entry,
    raw_index,
    text,
    texts,
    weight,
)
from refinfer.errors import CacheFileError, PackingError
from refinfer.packing.formats import layout_of
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
from refinfer.weight_cache.key import WeightId
from refinfer.weight_cache.packers import chunks_of, matrix_key, padded_nbytes_of, vectors_key
from words import require_equal

LARGEST_INDEX = 1 << 28


def raw_header(**changes: Any) -> bytes:
    """Write down the first page of a file of five pages, with its digest, whatever it says."""
    written: dict[str, bytes] = {
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
        written[name] = value if isinstance(value, bytes) else number(value, len(written[name]))
    joined = b"".join(written.values())
    return (joined + hashlib.sha256(joined).digest()).ljust(PAGE, b"\0")


HEADER = Header(1, SOURCE, PACKERS, 4 * PAGE, PAGE, DIGEST)


def refusal(page: bytes, nbytes: int = 5 * PAGE) -> str | None:
    """Return why a header is refused, or None."""
    try:
        decode_header(page, nbytes)
    except CacheFileError as error:
        return error.reason
    except struct.error as error:  # its class is called `error` only
        what = f"a page of {len(page):,} bytes ends in struct.error: {error}"
        raise AssertionError(what).with_traceback(error.__traceback__) from None
    return None


def require_refusal(found: str | None, why: str | None, what: str) -> None:
    """Require that a header is refused with a reason that begins so, or for None, that it is taken."""
    if (found is None) != (why is None) or (found and why and not found.startswith(why)):
        is_so, should_be = (f"refused with {each!r}" if each is not None else "taken" for each in (found, why))
        raise AssertionError(f"{what} is {is_so} in your code, and should be {should_be}")


words = st.integers(0, LARGEST)


# Names of files and folders may also be bytes that are no UTF-8, as Python gives them.
paths = texts | st.binary(max_size=10).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


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
def test_a_key_that_an_index_cannot_represent_cannot_be_made(name: str) -> None:
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


def flipped(page: bytes, at: int, bit: int) -> bytes:
    return page[:at] + bytes([page[at] ^ 1 << bit]) + page[at + 1 :]


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
    "a bit of the model's digest flipped": (flipped(raw_header(), 20, 3), "its header is damaged"),
    "a bit of the header's digest flipped": (flipped(raw_header(), 160, 7), "its header is damaged"),
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
    require_refusal(refusal(page), why, "this header")


@pytest.mark.spec("FILE-3", "FILE-6")
@pytest.mark.parametrize(
    "nbytes", [LARGEST_INDEX + 1, 1 << 40, LARGEST - 4 * PAGE], ids="an index of {:,} bytes".format
)
def test_an_index_too_large_to_be_read_is_refused(nbytes: int) -> None:
    for taken, why in ((LARGEST_INDEX, None), (nbytes, "its header contradicts itself")):
        size = 4 * PAGE + taken
        found = refusal(raw_header(index_nbytes=taken, file_nbytes=size), size)
        require_refusal(found, why, f"the header of a file with an index of {taken:,} bytes")


@pytest.mark.spec("FILE-1", "FILE-2", "FILE-3")
def test_a_good_header_is_read_field_by_field() -> None:
    header = decode_header(raw_header(), 5 * PAGE)
    for field in fields(Header):
        require_equal(getattr(header, field.name), getattr(HEADER, field.name), f"the field {field.name!r}")
    for nbytes in (0, PAGE, 5 * PAGE - 1, 5 * PAGE + 1, 6 * PAGE):
        why = f"it has {nbytes} bytes instead of 20480"
        require_refusal(refusal(raw_header(), nbytes), why, f"a good header in a file of {nbytes:,} bytes")


# What is wrong with a page, in the order of the checks: changes of fields before the digest is taken, and of the page
# afterwards.
FAULTS: dict[str, tuple[dict[str, int | bytes], Callable[[bytes], bytes], str]] = {
    "another magic number": ({"magic": b"\x89PNG\r\n\x1a\n"}, bytes, "it is not a refinfer weight cache"),
    "half a page": ({}, lambda page: page[: PAGE // 2], "it is cut short"),
    "another version": ({"version": 1}, bytes, "it has the format version 1, and this is version 2"),
    "a wrong digest": ({}, lambda page: flipped(page, 170, 0), "its header is damaged"),
    "another state": ({"state": 0}, bytes, "it was never completed"),
    "another size": ({"file_nbytes": 6 * PAGE}, bytes, "it has 20480 bytes instead of 24576"),
    "an index on no page": ({"index_offset": 4 * PAGE + 8}, bytes, "its header contradicts itself"),
}


@pytest.mark.spec("FILE-18")
def test_of_two_faults_of_a_header_the_first_in_the_table_is_the_reason() -> None:
    for one, other in itertools.combinations(FAULTS, 2):
        (changes, damage, why), (more_changes, more_damage, _) = FAULTS[one], FAULTS[other]
        page = damage(more_damage(raw_header(**changes, **more_changes)))
        require_refusal(refusal(page), why, f"a header with {one} and {other}")


@pytest.mark.spec("FILE-18")
def test_the_table_has_the_reasons_in_the_order_of_the_checks() -> None:
    table = decode_header.__doc__ or ""
    reasons = [re.sub(r"\d+", r"\\d+", why) for _, _, why in FAULTS.values()]
    found = [re.search(reason, table) for reason in reasons]
    places = [match.start() for match in found if match]
    assert len(places) == len(reasons)
    assert places == sorted(places)


NO_HEADER: Final = ("it is not a refinfer weight cache", "it has the format version", "its header is damaged")


@pytest.mark.spec("FILE-3")
def test_a_header_with_any_bit_flipped_is_refused() -> None:
    page = raw_header()
    for at in range(192):
        for bit in range(8):
            found = refusal(flipped(page, at, bit))
            if found is None or not found.startswith(NO_HEADER):
                require_refusal(found, "its header is damaged", f"a header with bit {bit} of byte {at} changed")


@pytest.mark.spec("FILE-17")
def test_bytes_of_the_first_page_that_have_no_meaning_are_ignored() -> None:
    assert encode_header(HEADER)[104:128] == bytes(24)
    assert encode_header(HEADER)[192:] == bytes(PAGE - 192)
    for at in (192, 200, 1000, PAGE - 1):
        found = refusal(flipped(raw_header(), at, 0))
        require_refusal(found, None, f"a header with 1 in byte {at:,}, which comes after the digest,")
    for at in (0, 23):
        found = refusal(raw_header(reserved=flipped(bytes(24), at, 0)))
        what = f"a header with 1 in byte {104 + at:,}, which has no meaning, and with a digest that agrees,"
        require_refusal(found, None, what)


@pytest.mark.spec("FILE-3")
@given(st.binary(max_size=5000), st.booleans(), st.integers(0, 1 << 63))
def test_no_garbage_is_a_header(garbage: bytes, magic: bool, nbytes: int) -> None:
    page = (raw_header()[:12] + garbage if magic else garbage).ljust(PAGE, b"\0")
    assert (refusal(page, nbytes) or "").startswith(NO_HEADER)


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
