"""Specifies `refinfer.weight_cache.file`: what is inserted is what the file returns, and what was not leaves zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from build_site import on_linux, resident_bytes_of_mapping
from file_contents import ABOUT, SOURCE, fill, flip, floats, gaps, packed, tensors, write
from provider_kinds import A, B, C, D, contents, finalized, insert, loaded, noise
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import (
    CacheFileError,
    DamagedWeightsError,
    PackingError,
    RequestError,
    WeightCacheStateError,
)
from refinfer.packing.formats import PackedMatrix, layout_of, pack_matrix
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import MAGIC
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.mapped_file import read_file
from refinfer.weight_cache.packers import chunks_of, layout_of_key, matrix_key, padded_nbytes_of, vectors_key
from refinfer.weight_cache.provider import WeightCacheProvider
from refinfer.weight_cache.publish import draft_path

PAGE = PAGE_BYTES


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


# What was inserted.


@pytest.mark.spec("FILE-7")
def test_every_chunk_starts_on_a_page_of_the_file_and_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    provider = FileWeightCacheProvider.build(path, ABOUT)
    fill(provider, {**tensors(), **tensors(1600, 101, chunk_nbytes=9000)})
    for entry in provider.entries:
        assert provider.offset_to_addr(entry.offset).ctypes.data % PAGE == 0
    provider.finalize()
    for cache in (provider, FileWeightCacheProvider.load(path)):
        mapped = cache.mapped
        assert {entry.key.format for entry in cache.entries if len(entry.chunks) > 3} == {"f32", "bf16", "int8", "int4"}
        for entry in cache.entries:
            view = cache[entry.key]
            for chunk, placed in zip(entry.chunks, chunks_of(entry.key), strict=True):
                assert chunk.offset % PAGE == 0
                data = mapped.bytes(chunk.offset, chunk.nbytes)
                assert data.ctypes.data % PAGE == 0
                assert data.ctypes.data == view.ctypes.data + placed.offset
                assert mapped.is_sound(chunk)
                with path.open("rb") as file:
                    file.seek(chunk.offset)
                    assert file.read(chunk.nbytes) == data.tobytes()


@pytest.mark.spec("FILE-9")
@pytest.mark.parametrize(
    ("shape", "chunk_nbytes"), [((1, 1), None), ((37, 21), None), ((1600, 101), 9000), ((1600, 1001), None)], ids=str
)
def test_what_was_inserted_is_what_a_loaded_file_gives(
    tmp_path: Path, shape: tuple[int, int], chunk_nbytes: int | None
) -> None:
    path, what = tmp_path / "cache", tensors(*shape, chunk_nbytes)
    write(path, what)
    loaded = FileWeightCacheProvider.load(path)
    assert list(loaded) == list(what)
    assert loaded.provenance == ABOUT
    for key, w in what.items():
        assert_array_equal(loaded[key], packed(w, key))
        if key.packer == "goi":
            layout = layout_of_key(key)
            chunks = [loaded[key][c.offset : c.offset + c.nbytes] for c in layout.chunks]
            assert_array_equal(PackedMatrix(layout, chunks).unpack(), pack_matrix(w, key.format).unpack())


@pytest.mark.spec("FILE-9")
@given(st.lists(st.tuples(st.integers(1, 12_000), st.integers(0, 99), st.booleans()), max_size=12))
def test_any_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, buffers: list[tuple[int, int, bool]]) -> None:
    path = tmp_path_factory.mktemp("any") / "cache"
    provider, expected = FileWeightCacheProvider.build(path), dict[PackKey, bytes]()
    for i, (n, seed, foreign) in enumerate(buffers):
        key = vectors_key(n, WeightId(SOURCE, str(i)))
        data = noise(key, seed)  # pads, too
        buffer = data if foreign else provider.reserve_space(data.size + seed)[: data.size]
        buffer[:] = data
        provider.look_up_or_insert(key, buffer)
        expected[key] = data.tobytes()
    provider.finalize()
    loaded = FileWeightCacheProvider.load(path)
    assert contents(loaded) == expected
    assert list(loaded.mapped.problems()) == []


@pytest.mark.spec("FILE-9")
def test_only_a_complete_file_is_mapped(path: Path) -> None:
    provider = FileWeightCacheProvider.load(path)
    assert provider.mapped.path == path
    provider.delete_cache()
    building = FileWeightCacheProvider.build(path)
    for cache in (provider, building):
        with pytest.raises(WeightCacheStateError, match=r"is not mapped$"):
            cache.mapped  # noqa: B018
    building.delete_cache()


@pytest.mark.spec("FILE-14")
def test_a_file_that_was_just_built_has_not_changed_since(tmp_path: Path) -> None:
    provider = FileWeightCacheProvider.build(tmp_path / "cache", ABOUT)
    fill(provider, tensors())
    provider.finalize()
    assert not provider.mapped.changed()
    assert provider.mapped.is_at(tmp_path / "cache")
    assert provider.mapped.path == provider.path == tmp_path / "cache"


@pytest.mark.spec("FILE-13", "CACHE-7")
def test_checking_a_provider_names_the_first_problem_of_its_file(path: Path) -> None:
    provider = FileWeightCacheProvider.load(path)
    provider.check()
    flip(path, PAGE + 1)
    with pytest.raises(DamagedWeightsError, match="does not agree with its") as damaged:
        provider.check()
    assert damaged.value.reason == f"{path}: f32.weight: chunk 0 does not agree with its checksum"
    assert str(damaged.value) == f"{damaged.value.reason}; start again"
    provider.delete_cache()
    with pytest.raises(WeightCacheStateError, match="is not mapped"):
        provider.check()


# Equal buffers.


@pytest.mark.spec("FILE-10")
def test_equal_buffers_under_different_keys_are_kept_once(tmp_path: Path) -> None:
    path, once = tmp_path / "cache", tensors()
    tied = {vectors_key(777, WeightId(SOURCE, f"tied {i}")): floats(777) for i in range(2)}
    first, second = tied.items()
    assert_array_equal(floats(777), once[vectors_key(777, WeightId(SOURCE, "norms"))])
    thrice = dict([first, *once.items(), second])
    write(path, thrice)
    loaded = FileWeightCacheProvider.load(path)
    assert list(loaded) == list(thrice)
    assert len({loaded.look_up(key) for key in thrice}) == len({entry.chunks for entry in loaded.entries}) == len(once)
    for key, w in thrice.items():
        assert_array_equal(loaded[key], packed(w, key))
    assert list(loaded.mapped.problems()) == []
    assert b"".join(gaps(path)) == bytes(2 * PAGE)  # the places of the second and the third


def multiples(chunk_nbytes: int, name: str) -> PackKey:
    """Return the key of 160 rows in tiles of one page each."""
    key = matrix_key(layout_of("f32", 160, 64, chunk_nbytes), WeightId(SOURCE, name))
    assert padded_nbytes_of(key) == 160 * 64 * 4
    return key


@pytest.mark.spec("FILE-10")
def test_buffers_of_several_chunks_are_kept_once_too(tmp_path: Path) -> None:
    path, w = tmp_path / "cache", floats(160, 64)
    keys = [multiples(2 * PAGE, name) for name in ("embedding", "lm_head")]
    write(path, dict.fromkeys(keys, w))
    loaded = FileWeightCacheProvider.load(path)
    one, other = loaded.entries
    assert one.chunks == other.chunks
    assert len(one.chunks) > 1
    assert_array_equal(loaded[keys[0]], loaded[keys[1]])
    assert_array_equal(loaded[keys[0]], packed(w, keys[0]))


@pytest.mark.spec("FILE-10")
def test_equal_bytes_that_are_cut_into_other_chunks_are_kept_apart(tmp_path: Path) -> None:
    path, w = tmp_path / "cache", floats(160, 64)
    keys = [multiples(chunk_nbytes, "matrix") for chunk_nbytes in (PAGE, 2 * PAGE, 1 << 20)]
    write(path, dict.fromkeys(keys, w))
    loaded = FileWeightCacheProvider.load(path)
    assert [len(entry.chunks) for entry in loaded.entries] == [len(chunks_of(key)) for key in keys]
    assert len({loaded.look_up(key) for key in keys}) == len({loaded[key].tobytes() for key in keys}) + 2 == 3
    assert list(loaded.mapped.problems()) == []


@pytest.mark.spec("FILE-10")
def test_buffers_that_differ_in_a_bit_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    provider = FileWeightCacheProvider.build(path)
    keys = [vectors_key(1000, WeightId(SOURCE, str(at))) for at in range(0, PAGE, 5)]  # 1000 numbers, then a pad
    for at, key in zip(range(0, PAGE, 5), keys, strict=True):
        buffer = np.zeros(PAGE, np.uint8)
        buffer[at] = 1
        provider.look_up_or_insert(key, buffer)
    provider.finalize()
    loaded = FileWeightCacheProvider.load(path)
    for at, key in zip(range(0, PAGE, 5), keys, strict=True):
        assert np.flatnonzero(loaded[key]).tolist() == [at]


# The same calls, and space that was never committed.

Insert = Callable[[FileWeightCacheProvider, PackKey, Bytes, int], None]


def in_space(provider: FileWeightCacheProvider, key: PackKey, data: Bytes, junk: int) -> None:
    insert(provider, key, data)


def from_elsewhere(provider: FileWeightCacheProvider, key: PackKey, data: Bytes, junk: int) -> None:
    provider.look_up_or_insert(key, data)


def after_much_else(provider: FileWeightCacheProvider, key: PackKey, data: Bytes, junk: int) -> None:
    provider.reserve_space(100_000)[:] = junk
    space = provider.reserve_space(50_000)
    space[:] = junk
    space[: data.size] = data
    provider.look_up_or_insert(key, space[: data.size])
    provider.look_up_or_insert(key, space[1 : 1 + data.size])  # dropped
    provider.reserve_space(1)[:] = junk


@pytest.mark.spec("FILE-11")
@pytest.mark.parametrize("how", [in_space, from_elsewhere, after_much_else])
def test_the_same_calls_give_the_same_file(tmp_path: Path, whole: bytes, how: Insert) -> None:
    files = []
    for junk in (0, 0xA5, 0x5A):
        path = tmp_path / f"{junk}" / "cache"
        path.parent.mkdir()
        path.with_name("cache.tmp").write_bytes(MAGIC + bytes([junk]) * 200_000)  # left by a builder that crashed
        provider = FileWeightCacheProvider.build(path, ABOUT)
        for key, w in tensors().items():
            how(provider, key, packed(w, key), junk)
        provider.finalize()
        assert not any(b"".join(gaps(path)))
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]
    assert (files[0] == whole) == (how is not after_much_else)


@pytest.mark.spec("FILE-11")
def test_a_loaded_file_can_be_written_again_byte_by_byte(tmp_path: Path, path: Path, whole: bytes) -> None:
    loaded = FileWeightCacheProvider.load(path)
    again = FileWeightCacheProvider.build(tmp_path / "again", loaded.provenance)
    for key, buffer in loaded.items():
        again.look_up_or_insert(key, buffer)
    again.finalize()
    assert (tmp_path / "again").read_bytes() == whole


def never_committed(provider: FileWeightCacheProvider) -> Bytes:
    return provider.reserve_space(100_000)


def superseded(provider: FileWeightCacheProvider) -> Bytes:
    space = provider.reserve_space(3 * PAGE)
    insert(provider, B, noise(B))
    return space


def committed_shorter(provider: FileWeightCacheProvider) -> Bytes:
    space = provider.reserve_space(4 * PAGE + 7)
    space[: 2 * PAGE] = noise(B)
    provider.look_up_or_insert(B, space[: 2 * PAGE])
    return space[2 * PAGE :]


def an_equal_twin(provider: FileWeightCacheProvider) -> Bytes:
    space = provider.reserve_space(PAGE)
    space[:] = noise(A)
    assert provider.look_up_or_insert(C, space) == provider.look_up(A)
    return space


def an_existing_key(provider: FileWeightCacheProvider) -> Bytes:
    space = provider.reserve_space(PAGE)
    space[:] = noise(A, 1)
    assert provider.look_up_or_insert(A, space) == provider.look_up(A)
    return space


def of_another_size(provider: FileWeightCacheProvider) -> Bytes:
    space = provider.reserve_space(PAGE + 1)
    space[:] = 1
    with pytest.raises(PackingError):
        provider.look_up_or_insert(B, space)
    return space


def copied_from(provider: FileWeightCacheProvider) -> Bytes:
    """Commit an older reservation after a newer one was made."""
    space = provider.reserve_space(2 * PAGE)
    space[:] = noise(B)
    provider.reserve_space(PAGE)
    kept = provider.offset_to_addr(provider.look_up_or_insert(B, space))
    assert not np.shares_memory(kept, space)
    return space


def packing_that_failed(provider: FileWeightCacheProvider) -> Bytes:
    buffers = []

    def fail(buffer: Bytes) -> list[int]:
        buffer[:] = 0xA5
        buffers.append(buffer)
        raise PackingError("a weight is NaN or infinity")

    with pytest.raises(PackingError):
        provider.get_or_pack(B, fail)
    return buffers[0]


UNCOMMITTED = [
    never_committed,
    superseded,
    committed_shorter,
    an_equal_twin,
    an_existing_key,
    of_another_size,
    copied_from,
    packing_that_failed,
]


@pytest.mark.spec("FILE-11", "FILE-9", "FILE-12")
@pytest.mark.parametrize("leave", UNCOMMITTED)
@pytest.mark.parametrize("then", ["nothing", "another buffer"])
def test_space_that_was_never_committed_holds_zeros_and_whoever_still_has_it_changes_no_buffer(
    tmp_path: Path, leave: Callable[[FileWeightCacheProvider], Bytes], then: str
) -> None:
    path = tmp_path / "cache"
    provider = FileWeightCacheProvider.build(path, ABOUT)
    insert(provider, A, noise(A))
    stale = leave(provider)
    stale[:] = 0xA5
    if then == "another buffer":
        insert(provider, D, noise(D))
    expected = {key: noise(A if key == C else key).tobytes() for key in provider}
    assert contents(provider) == expected
    stale[:] = 0x5A  # just before the end, too
    provider.finalize()
    assert sum(map(len, gaps(path))) >= stale.size
    assert not any(b"".join(gaps(path)))
    assert not stale.any()
    before = path.read_bytes()
    stale[:] = 0xA5
    _, index = read_file(path)
    for cache in (provider, FileWeightCacheProvider.load(path)):
        assert cache.entries == index.entries
        assert contents(cache) == expected
        assert list(cache.mapped.problems()) == []
        assert all(cache.mapped.is_sound(chunk) for entry in cache.entries for chunk in entry.chunks)
    stale[:] = 0
    assert path.read_bytes() == before  # nothing else was written


@pytest.mark.spec("FILE-11")
@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, 100_000, 3 << 20])
@pytest.mark.parametrize("held", [True, False])
def test_space_left_at_the_end_lies_before_the_index_whether_anybody_holds_it_or_not(
    tmp_path: Path, whole: bytes, nbytes: int, held: bool
) -> None:
    path = tmp_path / "cache"
    provider = FileWeightCacheProvider.build(path, ABOUT)
    fill(provider, tensors())
    space: Bytes | None = provider.reserve_space(nbytes)
    assert space is not None
    space[nbytes // 2 :] = 0xA5
    if not held:
        del space
    provider.finalize()
    header, index = read_file(path)
    assert header.index_offset == 9 * PAGE + -(-nbytes // PAGE) * PAGE
    assert not any(b"".join(gaps(path)))
    assert path.read_bytes()[PAGE : 9 * PAGE] == whole[PAGE : 9 * PAGE]
    path.with_name("whole").write_bytes(whole)
    assert index == read_file(path.with_name("whole"))[1]


Step = tuple[str, int, int, int]
a_step = st.tuples(st.sampled_from(["reserve", "commit", "foreign", "write"]), *[st.integers(0, 3)] * 3)


class Builder:
    """Makes reservations, commits any of them, writes to stale ones; knows what the file must then hold."""

    def __init__(self, path: Path) -> None:
        self.provider = FileWeightCacheProvider.build(path)
        self.spaces: list[Bytes] = []  # whatever was reserved, but for what was committed in place
        self.newest: int | None = None
        self.expected: dict[PackKey, bytes] = {}

    def take(self, step: Step) -> None:
        what, a, b, c = step
        if what == "reserve":
            self.newest = len(self.spaces)
            self.spaces.append(self.provider.reserve_space((a + 1) * PAGE - b))
            self.spaces[-1][:] = c
        elif what == "write" and self.spaces:
            self.spaces[b % len(self.spaces)][:] = a
        elif what == "foreign":
            self.commit((A, B, C, D)[a], np.full(padded_nbytes_of((A, B, C, D)[a]), c, np.uint8))
        elif what == "commit" and self.spaces:
            at, key = b % len(self.spaces), (A, B, C, D)[a]
            space = self.spaces[at][: padded_nbytes_of(key)]
            if space.size == padded_nbytes_of(key):
                self.commit(key, space, at)

    def commit(self, key: PackKey, buffer: Bytes, at: int | None = None) -> None:
        data, is_new = buffer.tobytes(), key not in self.expected
        kept = self.provider.offset_to_addr(self.provider.look_up_or_insert(key, buffer))
        if not is_new:
            return
        if np.shares_memory(kept, buffer):
            assert at == self.newest
            assert at is not None
            self.spaces[at] = self.spaces[at][buffer.size :]
        self.expected[key], self.newest = data, None

    def check(self) -> None:
        assert contents(self.provider) == self.expected


@pytest.mark.spec("FILE-11", "FILE-9", "CACHE-4")
@given(steps=st.lists(a_step, max_size=25))
def test_whatever_is_reserved_and_committed_in_whichever_order_the_rest_holds_zeros(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    path = tmp_path_factory.mktemp("any order") / "cache"
    builder = Builder(path)
    for step in steps:
        builder.take(step)
        builder.check()
    builder.provider.finalize()
    assert not any(b"".join(gaps(path)))
    assert not any(space.any() for space in builder.spaces)
    for space in builder.spaces:
        space[:] = 0xA5
    builder.check()
    assert contents(FileWeightCacheProvider.load(path)) == builder.expected
    assert list(builder.provider.mapped.problems()) == []
    assert not builder.spaces or sum(map(len, gaps(path))) >= sum(space.size for space in builder.spaces)


# Deleting.


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def is_open(path: Path) -> bool:
    links = Path("/proc/self/fd").iterdir()
    return path in {link.readlink() for link in links if link.is_symlink()}


@pytest.mark.spec("CACHE-11")
@pytest.mark.parametrize("complete", [finalized, loaded])
def test_deleting_a_provider_in_a_file_releases_the_mapping_but_not_the_file(
    tmp_path: Path, complete: Callable[[WeightCacheProvider], WeightCacheProvider]
) -> None:
    path = tmp_path / "cache"
    building = FileWeightCacheProvider.build(path)
    insert(building, A, noise(A))
    provider = complete(building)
    before = path.read_bytes()
    view = provider[A]
    assert is_mapped(path)
    provider.delete_cache()
    assert is_mapped(path)
    assert view.tobytes() == noise(A).tobytes()
    del view
    assert not is_mapped(path)
    assert not is_open(path)
    assert path.read_bytes() == before
    assert contents(FileWeightCacheProvider.load(path)) == {A: noise(A).tobytes()}


@pytest.mark.spec("OPEN-8")
@on_linux
def test_what_was_packed_stays_in_the_file_when_its_pages_are_dropped(tmp_path: Path) -> None:
    path, nbytes = tmp_path / "cache", 1 << 20
    provider = FileWeightCacheProvider.build(path)
    provider.drop_pages()  # nothing has been reserved yet
    space = provider.reserve_space(nbytes)
    space[:] = 7
    assert resident_bytes_of_mapping(draft_path(path)) >= nbytes
    provider.drop_pages()
    assert resident_bytes_of_mapping(draft_path(path)) == 0
    assert (space == 7).all()
    provider.delete_cache()


@pytest.mark.spec("OPEN-9")
def test_a_provider_is_not_built_over_a_persons_file(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_bytes(b"dear")
    with pytest.raises(RequestError, match="is not a weight cache, and stays as it is"):
        FileWeightCacheProvider.build(thesis)
    thesis.rename(tmp_path / "thesis.txt.tmp")
    with pytest.raises(FileExistsError, match="is not a draft of refinfer, and stays as it is"):
        FileWeightCacheProvider.build(thesis)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("thesis.txt.tmp", b"dear")]


@pytest.mark.spec("FILE-3")
def test_what_a_provider_writes_says_from_the_beginning_that_it_was_not_completed(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    provider = FileWeightCacheProvider.build(path, ABOUT)
    for key in (A, B):
        with pytest.raises(CacheFileError, match=r"^it was never completed$"):
            read_file(draft_path(path))
        insert(provider, key, noise(key))
    provider.delete_cache()


@pytest.mark.spec("CACHE-11")
def test_deleting_an_unfinished_provider_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    for before in (None, MAGIC + noise(C).tobytes()):
        if before is not None:
            path.write_bytes(before)
        provider = FileWeightCacheProvider.build(path)
        insert(provider, A, noise(A))
        space = provider.reserve_space(PAGE)
        provider.delete_cache()
        space[:] = 1  # nobody's any more, but still memory
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("cache", before)] if before else [])
