"""Specifies `refinfer.weight_cache.mapped_file`: damage to a file is noticed, and so are changes while it is mapped."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from file_contents import ABOUT, SOURCE, Stored, fill, floats, make_version, tensors, write
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import CacheFileError, DamagedWeightsError
from refinfer.model.config import ModelConfig
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.packing.layout import Bytes
from refinfer.weight_cache import mapped_file
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import Entry, encode_file
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.mapped_file import NO_FILE, MappedFile, read_file
from refinfer.weight_cache.packers import (
    chunks_of,
    matrix_key,
    record_nbytes,
    row_of_record,
    rows_key,
    vectors_key,
)

PAGE = PAGE_BYTES


@contextmanager
def flipped(path: Path, places: range) -> Iterator[Iterator[int]]:
    """Change one byte after another, and put each back when the next is asked for."""
    descriptor = os.open(path, os.O_RDWR)

    def each() -> Iterator[int]:
        for place in places:
            byte = os.pread(descriptor, 1, place)
            os.pwrite(descriptor, bytes([byte[0] ^ (1 << place % 8)]), place)
            yield place
            os.pwrite(descriptor, byte, place)

    try:
        yield each()
    finally:
        os.close(descriptor)


def entry_at(entries: tuple[Entry, ...], place: int) -> Entry:
    (entry,) = [e for e in entries if e.offset <= place < e.offset + e.padded_nbytes]
    return entry


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small file with a buffer of each kind."""
    return write(tmp_path_factory.mktemp("whole") / "cache", tensors())


@pytest.fixture
def path(tmp_path: Path, whole: bytes) -> Path:
    """A fresh copy of that file."""
    path = tmp_path / "cache"
    path.write_bytes(whole)
    return path


@pytest.mark.spec("FILE-9")
def test_header_and_index_are_read_without_the_weights(path: Path, whole: bytes) -> None:
    header, index = read_file(path)
    assert (header.packers, header.model) == (ABOUT.packers, ABOUT.model_digest)
    assert header.index_offset == 9 * PAGE
    assert header.file_nbytes == len(whole)
    assert index.provenance == ABOUT
    assert [entry.key for entry in index.entries] == list(tensors())
    assert index.entries == FileWeightCacheProvider.load(path).entries


def is_refused(path: Path) -> bool:
    try:
        MappedFile(path)
    except CacheFileError:
        return True
    return False


@pytest.mark.spec("FILE-12")
def test_a_change_of_any_byte_of_header_or_index_is_refused_or_without_effect(path: Path, whole: bytes) -> None:
    header, index = read_file(path)
    with flipped(path, range(header.index_offset, len(whole))) as places:
        assert all(is_refused(path) for _ in places)
    with flipped(path, range(PAGE)) as places:
        for place in places:
            if not is_refused(path):
                assert place >= 192  # after the header's own digest
                if place % 16 == 0:
                    mapped = MappedFile(path)
                    assert (mapped.header, mapped.index) == (header, index)
                    assert all(mapped.is_sound(chunk) for entry in index.entries for chunk in entry.chunks)
    assert path.read_bytes() == whole


@pytest.mark.spec("FILE-12", "KEY-6")
def test_a_change_of_any_byte_of_a_buffer_is_found_in_its_chunk_and_row_or_is_in_a_pad(path: Path) -> None:
    mapped = MappedFile(path)
    entries, intact = mapped.index.entries, mapped.bytes(0, mapped.header.file_nbytes).copy()
    with flipped(path, range(PAGE, mapped.header.index_offset)) as places:
        for place in places:
            entry = entry_at(entries, place)
            (chunk,) = entry.chunks
            data = mapped.bytes(chunk.offset, chunk.nbytes)
            if place >= chunk.offset + chunk.nbytes:
                assert mapped.is_sound(chunk)
                assert_array_equal(data, intact[chunk.offset : chunk.offset + chunk.nbytes])
                continue
            assert not mapped.is_sound(chunk)
            if entry.key.packer == "rows":
                records = data.reshape(-1, record_nbytes(entry.key))
                damaged = (place - chunk.offset) // record_nbytes(entry.key)
                assert row_of_record(records[damaged], entry.key, damaged) is None
                if place % 8 == 0:
                    rows = [row_of_record(record, entry.key, row) for row, record in enumerate(records)]
                    assert [row for row, stored in enumerate(rows) if stored is None] == [damaged]
            if place % 64 == 0:
                assert MappedFile(path).index == mapped.index  # a file with a damaged chunk can still be opened
                assert all(e is entry or mapped.is_sound(e.chunks[0]) for e in entries)


@pytest.mark.spec("FILE-12")
def test_a_file_of_any_other_length_is_refused(path: Path, whole: bytes) -> None:
    for more in (b"\0", b"\1", bytes(7), bytes(PAGE), bytes(1 << 20), whole, whole[-100:]):
        path.write_bytes(whole + more)
        assert is_refused(path)
    path.write_bytes(whole)
    assert not is_refused(path)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        assert is_refused(path)


@pytest.mark.spec("FILE-12")
def test_a_file_cut_short_and_filled_up_again_is_refused(path: Path, whole: bytes) -> None:
    for length in (0, 1, 100, PAGE, len(whole) - PAGE, len(whole) - 1):
        path.write_bytes(whole)
        os.truncate(path, length)
        os.truncate(path, len(whole))
        assert is_refused(path)


@pytest.mark.spec("FILE-12")
@given(st.binary(max_size=9000), st.integers(0, 300))
def test_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, whole: bytes, garbage: bytes, kept: int) -> None:
    path = tmp_path_factory.mktemp("garbage") / "cache"
    path.write_bytes(whole[:kept] + garbage)
    with pytest.raises(CacheFileError):
        MappedFile(path)


def of_version(version: int) -> Callable[[Path], None]:
    """Return what writes a file that is right but for its version."""

    def make(path: Path) -> None:
        write(path, tensors())
        make_version(path, version)

    return make


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, NO_FILE),
    "folder": (lambda path: path.mkdir(), "it cannot be read: Is a directory"),
    "link to nowhere": (lambda path: path.symlink_to("nowhere"), NO_FILE),
    "link to itself": (lambda path: path.symlink_to(path), "it cannot be read: Too many levels"),
    "empty": (lambda path: path.touch(), "it is not a refinfer weight cache"),
    "text": (lambda path: path.write_text("weights" * 1000), "it is not a refinfer weight cache"),
    "version 1": (of_version(1), "it has the format version 1, and this is version 2"),
    "version 3": (of_version(3), "it has the format version 3, and this is version 2"),
}


@pytest.mark.spec("FILE-12", "FILE-3")
@pytest.mark.parametrize(("make", "why"), list(UNUSABLE.values()), ids=list(UNUSABLE))
def test_a_file_that_cannot_be_used_is_refused_by_every_door_with_its_reason(
    tmp_path: Path, make: Callable[[Path], object], why: str
) -> None:
    path = tmp_path / "cache"
    make(path)
    for door in (read_file, MappedFile, FileWeightCacheProvider.load):
        with pytest.raises(CacheFileError, match=f"^{why}") as refused:
            door(path)
        assert refused.value.reason == str(refused.value)


@pytest.mark.spec("FILE-12")
def test_a_file_that_is_being_built_is_refused(tmp_path: Path) -> None:
    provider = FileWeightCacheProvider.build(tmp_path / "cache", ABOUT)
    for key, w in tensors().items():
        fill(provider, {key: w})
        (draft,) = tmp_path.iterdir()
        with pytest.raises(CacheFileError):
            MappedFile(draft)
    provider.delete_cache()


def model_tensors(config: ModelConfig) -> dict[PackKey, Stored]:
    """Return random weights of a model: its embedding as rows, its matrices in formats in turn, the rest as vectors."""
    made: dict[PackKey, Stored] = {}
    for i, (name, shape) in enumerate(config.tensor_shapes().items()):
        w, weights = floats(*shape, seed=i), WeightId(SOURCE, name)
        if len(shape) == 1:
            made[vectors_key(shape[0], weights)] = w
        elif "embed" in name:
            made[rows_key((shape[0], shape[1]), "f32", weights)] = w
        else:
            made[matrix_key(layout_of(list(FORMATS)[i % 4], *shape), weights)] = w
    return made


def flip_bits(data: Bytes, rng: np.random.Generator) -> Bytes:
    np.bitwise_xor.at(data, rng.integers(0, data.size, rng.integers(1, 65)), 1 << rng.integers(0, 8, dtype=np.uint8))
    return data


def change_bytes(data: Bytes, rng: np.random.Generator) -> Bytes:
    places = rng.integers(0, data.size, rng.integers(1, 65))
    data[places] = rng.integers(0, 256, places.size, np.uint8)
    return data


def overwrite_a_block(data: Bytes, rng: np.random.Generator) -> Bytes:
    block = data[int(rng.integers(data.size)) :][: int(rng.integers(1, 9000))]
    block[:] = rng.integers(0, 256, block.size, np.uint8)
    return data


def zero_pages(data: Bytes, rng: np.random.Generator) -> Bytes:
    start = int(rng.integers(data.size // PAGE)) * PAGE
    data[start : start + PAGE * int(rng.integers(1, 5))] = 0
    return data


def misplace_a_page(data: Bytes, rng: np.random.Generator) -> Bytes:
    here, there = rng.integers(0, data.size // PAGE, 2) * PAGE
    data[there : there + PAGE] = data[here : here + PAGE]
    return data


def cut_short(data: Bytes, rng: np.random.Generator) -> Bytes:
    return data[: int(rng.integers(data.size))]


CORRUPTIONS = [flip_bits, change_bytes, overwrite_a_block, zero_pages, misplace_a_page, cut_short]


def missed_in_chunks(mapped: MappedFile, whole: bytes) -> Iterator[str]:
    """Yield "found" for each damaged chunk that is known to be damaged, or what is wrong with that."""
    for entry in mapped.index.entries:
        for chunk in entry.chunks:
            data = mapped.bytes(chunk.offset, chunk.nbytes).tobytes()
            same = data == whole[chunk.offset : chunk.offset + chunk.nbytes]
            if mapped.is_sound(chunk) != same:
                yield f"{entry.key.name} is thought {'damaged' if same else 'sound'}"
            elif not same:
                yield "found"


def missed_in_rows(mapped: MappedFile, whole: bytes) -> Iterator[str]:
    """Yield the same for each damaged row of a table."""
    for entry in mapped.index.entries:
        for chunk, placed in zip(entry.chunks, chunks_of(entry.key), strict=True):
            if entry.key.packer != "rows":
                continue
            data = mapped.bytes(chunk.offset, chunk.nbytes)
            before = np.frombuffer(whole, np.uint8, chunk.nbytes, chunk.offset)
            records, good = (raw.reshape(-1, record_nbytes(entry.key)) for raw in (data, before))
            for i in np.flatnonzero((records != good).any(axis=1)).tolist():
                number = placed.first_row + i
                known = row_of_record(records[i], entry.key, number) is None
                yield "found" if known else f"row {number} of {entry.key.name} is thought sound"


def missed_in_chunks_and_rows(mapped: MappedFile, whole: bytes) -> Iterator[str]:
    """Yield both."""
    yield from missed_in_chunks(mapped, whole)
    yield from missed_in_rows(mapped, whole)


Corrupt = Callable[[Bytes, np.random.Generator], Bytes]
Missed = Callable[[MappedFile, bytes], Iterator[str]]


def require_noticed(path: Path, corrupt: Corrupt, missed: Missed, times: int) -> None:
    """Corrupt a file again and again; check that it is refused, or all damage found wherever there is some."""
    whole, index, rng = path.read_bytes(), read_file(path)[1], np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    for _ in range(times):
        data = corrupt(np.frombuffer(whole, np.uint8).copy(), rng).tobytes()
        path.write_bytes(data)
        try:
            mapped = MappedFile(path)
        except CacheFileError:
            outcomes["refused"] += 1
            continue
        assert mapped.index == index
        assert (data == whole) == (next(mapped.problems(), None) is None)
        outcomes.update(set(missed(mapped, whole)))
    assert set(outcomes) <= {"refused", "found"}
    assert outcomes["refused"]
    assert outcomes["found"] or corrupt is cut_short


@pytest.mark.spec("FILE-12", "FILE-13")
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_corruptions_at_random_are_refused_found_or_without_effect(path: Path, corrupt: Corrupt) -> None:
    require_noticed(path, corrupt, missed_in_chunks, 60)


@pytest.mark.spec("FILE-12", "KEY-6")
@pytest.mark.parametrize(
    "corrupt",
    [
        flip_bits,
        change_bytes,
        overwrite_a_block,
        cut_short,
        zero_pages,
    ],
)
def test_corruptions_at_random_are_found_by_the_rows_themselves(path: Path, corrupt: Corrupt) -> None:
    require_noticed(path, corrupt, missed_in_rows, 60)


@pytest.mark.spec("FILE-12", "KEY-6")
@pytest.mark.parametrize("K", [3, 7, 31, 63], ids=lambda K: f"records of {4 * K + 4} bytes")
def test_pages_of_a_table_in_the_place_of_others_are_found_by_the_rows_themselves(tmp_path: Path, K: int) -> None:
    N = 8 * PAGE // (4 * K + 4)
    path = tmp_path / "cache"
    same_rows = np.tile(floats(1, K), (N, 1))  # which differ in nothing but their numbers
    for w in (floats(N, K), same_rows):
        whole = write(path, {rows_key((N, K), "f32", WeightId(SOURCE, "rows")): w})
        mapped = MappedFile(path)
        assert mapped.header.index_offset == 9 * PAGE
        with path.open("r+b", buffering=0) as file:
            for there in range(1, 9):
                for here in {*range(9)} - {there}:
                    file.seek(there * PAGE)
                    file.write(whole[here * PAGE : (here + 1) * PAGE])
                    assert set(missed_in_rows(mapped, whole)) == {"found"}
                file.seek(there * PAGE)
                file.write(whole[there * PAGE : (there + 1) * PAGE])
        assert list(mapped.problems()) == []


@pytest.mark.spec("FILE-12")
@pytest.mark.parametrize("K", [5, 21, 64])
def test_a_row_of_another_table_under_the_same_number_is_found_by_its_chunk(tmp_path: Path, K: int) -> None:
    path = tmp_path / "cache"
    keys = [rows_key((37, K), "f32", WeightId(SOURCE, name)) for name in "ab"]
    write(path, {key: floats(37, K, seed=seed) for seed, key in enumerate(keys)})
    mapped = MappedFile(path)
    (one,), (other,) = (entry.chunks for entry in mapped.index.entries)
    nbytes = record_nbytes(keys[0])
    for row in range(37):
        at = row * nbytes
        record = mapped.bytes(other.offset + at, nbytes).tobytes()
        before = mapped.bytes(one.offset + at, nbytes).tobytes()
        assert row_of_record(np.frombuffer(record, np.uint8), keys[0], row) is not None  # by itself it is good
        with path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), record, one.offset + at)
            assert not mapped.is_sound(one)
            os.pwrite(file.fileno(), before, one.offset + at)
        assert mapped.is_sound(one)


@pytest.mark.long
@pytest.mark.spec("FILE-12", "FILE-13", "KEY-6")
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_ten_thousand_corruptions_of_a_model_are_refused_found_or_without_effect(
    tmp_path: Path, tiny_config: ModelConfig, corrupt: Corrupt
) -> None:
    path = tmp_path / "cache"
    write(path, model_tensors(tiny_config))
    require_noticed(path, corrupt, missed_in_chunks_and_rows, 10_000 // len(CORRUPTIONS) + 1)


@pytest.mark.spec("FILE-13")
def test_problems_finds_a_change_of_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    what = {rows_key((90, 5), "f32", WeightId(SOURCE, "rows")): floats(90, 5)}
    whole = write(path, what)
    assert len(whole) < 3 * PAGE
    assert list(MappedFile(path).problems()) == []
    with flipped(path, range(len(whole))) as places:
        for _ in places:
            try:
                mapped = MappedFile(path)
            except CacheFileError:
                continue
            assert next(mapped.problems(), None) is not None
    assert list(MappedFile(path).problems()) == []


@pytest.mark.spec("FILE-13")
def test_problems_finds_changes_in_buffers_of_every_kind_and_names_them(path: Path) -> None:
    mapped = MappedFile(path)
    with flipped(path, range(PAGE, mapped.header.index_offset, 97)) as places:
        for place in places:
            entry = entry_at(mapped.index.entries, place)
            problems = list(mapped.problems())
            assert problems[-1] == f"{entry.key.name}: the buffer does not agree with its SHA-256"
            in_pad = place >= entry.offset + entry.chunks[0].nbytes
            assert problems[:-1] == ([] if in_pad else [f"{entry.key.name}: chunk 0 does not agree with its checksum"])


@pytest.mark.spec("FILE-13")
@pytest.mark.parametrize("row", [0, 17, 36])
def test_problems_finds_a_row_that_is_wrong_although_its_chunk_and_its_buffer_agree(
    path: Path, whole: bytes, row: int
) -> None:
    header, index = read_file(path)
    data, entries = bytearray(whole), []
    for entry in index.entries:
        if entry.key.packer == "rows":
            data[entry.offset + row * record_nbytes(entry.key)] ^= 1
        (chunk,) = entry.chunks
        checksum = zlib.crc32(data[chunk.offset : chunk.offset + chunk.nbytes])
        digest = hashlib.sha256(data[entry.offset : entry.offset + entry.padded_nbytes]).digest()
        entries.append(replace(entry, chunks=(replace(chunk, checksum=checksum),), digest=digest))
    encoded, page = encode_file(replace(index, entries=tuple(entries)), header.index_offset)
    path.write_bytes(page + data[PAGE : header.index_offset] + encoded)
    tables = [entry.key.name for entry in entries if entry.key.packer == "rows"]
    assert list(MappedFile(path).problems()) == [
        f"{name}: row {row} does not agree with its checksum" for name in tables
    ]
    assert len(tables) == 3


@pytest.mark.spec("FILE-13")
def test_pages_that_belong_to_no_buffer_are_no_problem_whatever_they_hold(path: Path, whole: bytes) -> None:
    header, index = read_file(path)
    packed_bytes = bytearray(whole[PAGE : header.index_offset])
    for left_out in range(len(index.entries)):
        entries = index.entries[:left_out] + index.entries[left_out + 1 :]
        data, page = encode_file(replace(index, entries=entries), header.index_offset)
        gone, changed = index.entries[left_out], packed_bytes.copy()
        changed[gone.offset - PAGE : gone.offset - PAGE + gone.padded_nbytes] = b"\xa5" * gone.padded_nbytes
        for content in (packed_bytes, changed):
            path.write_bytes(page + content + data)
            mapped = MappedFile(path)
            assert mapped.index.entries == entries
            assert list(mapped.problems()) == []


@pytest.mark.spec("FILE-13")
def test_problems_finds_bytes_in_the_reserved_part_of_the_header(path: Path, whole: bytes) -> None:
    for place in range(104, 128):
        fields = whole[:place] + b"\1" + whole[place + 1 : 160]
        path.write_bytes(fields + hashlib.sha256(fields).digest() + whole[192:])
        assert list(MappedFile(path).problems()) == ["the header is not followed by zeros"]


@pytest.mark.spec("FILE-13")
def test_problems_finds_a_change_in_the_first_page_of_a_mapped_file(path: Path) -> None:
    mapped = MappedFile(path)
    with flipped(path, range(0, PAGE, 7)) as places:
        assert all(list(mapped.problems()) == ["the header is not followed by zeros"] for _ in places)


@pytest.mark.spec("FILE-13")
def test_problems_finds_a_change_in_the_index_of_a_mapped_file(path: Path, whole: bytes) -> None:
    mapped = MappedFile(path)
    with flipped(path, range(mapped.header.index_offset, len(whole), 7)) as places:
        assert all(list(mapped.problems()) == ["the index is damaged"] for _ in places)
    assert list(mapped.problems()) == []


@pytest.mark.spec("FILE-14")
@pytest.mark.parametrize("length", [0, 1, 100, PAGE, 9 * PAGE - 1, 9 * PAGE, -1])
def test_a_file_cut_short_while_it_is_mapped_is_found(path: Path, whole: bytes, length: int) -> None:
    mapped = MappedFile(path)
    assert not mapped.changed()
    os.truncate(path, length % len(whole))
    for _ in range(2):
        with pytest.raises(DamagedWeightsError) as damaged:
            mapped.changed()
        assert damaged.value.reason == f"{path} was cut short while it was in use"
        assert str(damaged.value) == f"{damaged.value.reason}; start again"


@pytest.mark.spec("FILE-14")
def test_a_file_cut_short_and_filled_up_again_has_changed(path: Path, whole: bytes) -> None:
    provider = FileWeightCacheProvider.load(path)
    os.truncate(path, PAGE)
    with pytest.raises(DamagedWeightsError):
        provider.mapped.changed()
    os.truncate(path, len(whole))
    assert provider.mapped.changed()
    assert not any(provider.mapped.is_sound(chunk) for entry in provider.entries for chunk in entry.chunks)


@pytest.mark.spec("FILE-14")
def test_a_file_that_was_written_to_has_changed_once(path: Path, whole: bytes) -> None:
    mapped = MappedFile(path)
    assert [mapped.changed() for _ in range(3)] == [False, False, False]
    os.utime(path, ns=(0, 0))
    assert [mapped.changed() for _ in range(3)] == [True, False, False]
    with path.open("ab") as file:
        file.write(b"more")
    assert [mapped.changed() for _ in range(2)] == [True, False]
    assert mapped.bytes(0, len(whole)).tobytes() == whole


@pytest.mark.spec("FILE-14")
@pytest.mark.parametrize(("mtime_ns", "age_s"), [(-7_500_000_000, 7.5), (2_000_000_000, -2.0)])
def test_the_age_of_a_file_is_the_seconds_since_its_latest_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, mtime_ns: int, age_s: float
) -> None:
    now_ns = path.stat().st_ctime_ns + 3600 * 10**9
    monkeypatch.setattr(mapped_file, "wall_time_ns", lambda: now_ns)
    os.utime(path, ns=(0, now_ns + mtime_ns))
    assert MappedFile(path).age_s == pytest.approx(age_s)
    os.utime(path, ns=(0, 0))  # the time of the change cannot be set, and is the later one now
    assert MappedFile(path).age_s == pytest.approx((now_ns - path.stat().st_ctime_ns) * 1e-9)


@pytest.mark.spec("FILE-14", "IDENT-4")
@pytest.mark.parametrize(("ctime_ns", "tick_s"), [(5_000_000_001, 0.1), (5_000_000_000, 2.0)])
def test_the_tick_of_a_file_is_in_seconds(path: Path, ctime_ns: int, tick_s: float) -> None:
    mapped = MappedFile(path)
    mapped._seen = (1, 5_000_000_003, ctime_ns)
    assert mapped.tick_s == pytest.approx(tick_s)


@pytest.mark.spec("FILE-14")
def test_another_file_in_its_place_does_not_concern_a_mapped_one(path: Path, whole: bytes) -> None:
    mapped = MappedFile(path)
    assert mapped.is_at(path)
    other = path.with_name("other")
    other.write_bytes(b"short")
    other.replace(path)
    assert not mapped.is_at(path)
    mapped.changed()  # nothing is missing
    assert mapped.bytes(0, len(whole)).tobytes() == whole
    path.unlink()
    assert not mapped.is_at(path)


def run(code: str, path: Path) -> str:
    """Run some lines in another process, which has `path` mapped as `mapped`, and return what they print."""
    head = "import os, re, resource, sys\nfrom pathlib import Path\nfrom refinfer.errors import WeightCacheError\n"
    head += "from refinfer.weight_cache.mapped_file import MappedFile\nmapped = MappedFile(Path(sys.argv[1]))\n"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", head + code, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


LOCK_UNDER_A_LIMIT = """
resource.setrlimit(resource.RLIMIT_MEMLOCK, (LIMIT, LIMIT))
if os.geteuid() == 0:  # for whom there is no limit
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    mapped.lock_memory()
except WeightCacheError as error:
    print(error)
"""

LOCK = """
def locked():
    return int(re.search(r"VmLck:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = locked()
mapped.lock_memory()
mapped.lock_memory()
print(before, locked())
"""


@pytest.mark.spec("FILE-15")
@pytest.mark.parametrize(("limit", "why"), [(0, "Operation not permitted"), (PAGE, "Cannot allocate memory")])
def test_a_file_that_cannot_be_locked_in_memory_says_why(path: Path, limit: int, why: str) -> None:
    said = run(f"LIMIT = {limit}" + LOCK_UNDER_A_LIMIT, path)
    assert said == f"{path} cannot be locked in memory: {why}\n"


@pytest.mark.spec("FILE-15")
def test_a_mapped_file_is_locked_in_memory_as_a_whole(path: Path, whole: bytes) -> None:
    before, after = map(int, run(LOCK, path).split())
    assert (before, after) == (0, -(-len(whole) // PAGE) * PAGE)
