"""Specifies `refinfer.weight_cache.load_or_build`: a good file is mapped, any other is built or completed."""

from __future__ import annotations

import os
import re
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_site import (
    NAMES,
    Site,
    bytes_read,
    come_to_rest,
    drop_from_memory,
    entries_of,
    mapped_of,
    on_linux,
    resident_bytes,
    resident_bytes_of_mapping,
)
from file_contents import flip, make_version
from refinfer.arrays import PAGE_BYTES, Float32Array
from refinfer.clock import RealClock
from refinfer.errors import RequestError
from refinfer.packing.formats import layout_of
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.format import Provenance, SourceFile
from refinfer.weight_cache.identity import side_path
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.load_or_build import CacheOutcome, Contents, Listener, load_or_build
from refinfer.weight_cache.mapped_file import NO_FILE
from refinfer.weight_cache.packers import chunks_of, matrix_key, pack_into, packer_fingerprint
from refinfer.weight_cache.publish import draft_path

N, K = 300, 96
NBYTES = 4 * N * K
OTHER_WEIGHTS = "the model's weights changed"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


@pytest.fixture
def built(site: Site) -> Site:
    """A site with a good file."""
    assert site.open().outcome.reason == NO_FILE
    return site


# Mapped, or built, and why.


@pytest.mark.spec("OPEN-1")
def test_a_missing_file_is_built_and_then_mapped(site: Site) -> None:
    clock = RealClock()
    started = clock.now()
    prepared = site.open()
    site.check_alone(prepared)
    assert prepared.outcome.reason == NO_FILE
    assert site.packed == list(NAMES)
    assert prepared.provider.is_finalized()
    assert [key.name for key in prepared.provider] == list(NAMES)  # in execution order
    again = site.open()
    site.check_alone(again)
    assert (again.outcome.reason, again.outcome.packed_buffers, again.outcome.packed_bytes) == (None, 0, 0)
    assert again.outcome.packing_s == prepared.outcome.packing_s is not None
    assert 0 < prepared.outcome.packing_s <= prepared.outcome.load_or_build_s
    assert again.outcome.load_or_build_s > 0
    assert prepared.outcome.load_or_build_s + again.outcome.load_or_build_s < clock.now() - started
    assert mapped_of(again).index.provenance == mapped_of(prepared).index.provenance


def damage_at(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)

    return damage


def cut_to(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def fill_with(data: bytes) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        path.write_bytes(data)

    return fill


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, NO_FILE),
    "empty": (lambda path: os.truncate(path, 0), "it is not a refinfer weight cache"),
    "one page": (lambda path: os.truncate(path, PAGE_BYTES), "it has 4096 bytes instead of "),
    "cut short": (cut_to(0.6), "bytes instead of "),
    "cut to half a header": (lambda path: os.truncate(path, 100), "it is cut short"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 1), "bytes instead of "),
    "garbage": (fill_with(os.urandom(50_000)), "it is not a refinfer weight cache"),
    "zeros": (fill_with(bytes(50_000)), "it is not a refinfer weight cache"),
    "a text": (fill_with(b"weights"), "it is not a refinfer weight cache"),
    "magic damaged": (damage_at(0), "it is not a refinfer weight cache"),
    "header damaged": (damage_at(20), "its header is damaged"),
    "index damaged": (damage_at(-1), "its index is damaged"),
    "of version 0": (partial(make_version, version=0), "it has the format version 0, and this is version 2"),
    "of version 1": (partial(make_version, version=1), "it has the format version 1, and this is version 2"),
    "of version 3": (partial(make_version, version=3), "it has the format version 3, and this is version 2"),
}


@pytest.mark.spec("OPEN-1", "OPEN-3")
@pytest.mark.parametrize(("damage", "why"), list(DAMAGED.values()), ids=list(DAMAGED))
@pytest.mark.parametrize("believed", [True, False], ids=["side file believed", "hashed"])
def test_a_file_that_cannot_be_used_is_rebuilt_with_the_reason(
    built: Site, damage: Callable[[Path], None], why: str, believed: bool
) -> None:
    if believed:
        come_to_rest(built.source)
        built.open()
    before = built.cache.read_bytes()
    damage(built.cache)
    prepared = built.open()
    built.check_alone(prepared)
    assert prepared.outcome.reason is not None
    assert why in prepared.outcome.reason
    assert built.packed == list(NAMES)
    assert built.cache.read_bytes() == before
    assert built.open().outcome.reason is None


FOREIGN = ("garbage", "zeros", "a text", "magic damaged")


@pytest.mark.spec("OPEN-9")
@pytest.mark.parametrize("what", DAMAGED)
def test_at_a_place_that_a_person_named_only_a_file_that_begins_as_ours_is_rebuilt(built: Site, what: str) -> None:
    damage, why = DAMAGED[what]
    damage(built.cache)
    before = built.files
    built.named = True
    if what in FOREIGN:
        with pytest.raises(RequestError, match=r"model\.rwc is not a weight cache, and stays as it is"):
            built.open()
        assert built.files == before
    else:
        assert why in str(built.open_checked().outcome.reason)


@pytest.mark.spec("OPEN-9")
@pytest.mark.parametrize("side", [False, True], ids=["the file", "the side file"])
def test_a_persons_file_that_appears_while_ours_is_built_stays_as_it_is(site: Site, side: bool) -> None:
    site.named = True
    place = side_path(site.cache) if side else site.cache

    def appear(_: str) -> None:
        place.write_bytes(b"a thesis")

    site.step = appear
    with pytest.raises(RequestError, match=f"{place.name} is not a .*, and stays as it is"):
        site.open()
    assert site.files == {place.name: b"a thesis"}


@pytest.mark.spec("OPEN-9")
def test_a_link_at_the_name_of_the_side_file_stays_where_a_person_named_the_place(built: Site) -> None:
    built.named = True
    thesis, side = built.source.with_name("thesis"), side_path(built.cache)
    thesis.write_bytes(b"dear")
    side.unlink()
    side.symlink_to(thesis)
    assert built.open_checked().outcome.reason is None
    assert side.is_symlink()
    assert thesis.read_bytes() == b"dear"


@pytest.mark.spec("OPEN-9", "IDENT-6")
def test_a_malformed_side_file_next_to_a_cache_file_of_ours_is_replaced_wherever_that_lies(built: Site) -> None:
    built.named = True
    come_to_rest(built.source)
    side_path(built.cache).write_bytes(b"nonsense")
    assert built.open_checked().outcome.reason is None
    assert built.hashed == NBYTES
    assert built.open_checked().outcome.reason is None
    assert built.hashed == 0


@pytest.mark.spec("OPEN-1")
def test_what_packs_nothing_counts_nothing() -> None:
    assert {name for name, value in asdict(CacheOutcome("off")).items() if value} == {"state"}


@pytest.mark.spec("OPEN-1")
def test_folders_are_made_where_the_cache_belongs(site: Site) -> None:
    site.cache = site.cache.parent / "far" / "away" / "model.rwc"
    site.check(site.open())


# A second start.


@pytest.mark.spec("OPEN-2")
@on_linux
def test_a_second_start_packs_nothing_and_reads_no_weight(tmp_path: Path) -> None:
    source, cache = tmp_path / "model.safetensors", tmp_path / "model.rwc"
    w = np.random.default_rng(0).standard_normal((8192, 512), np.float32)
    source.write_bytes(w.tobytes())

    def contents(pack: Callable[[Float32Array, PackKey, Bytes], Iterator[int]]) -> Any:
        def contents_of(sources: tuple[SourceFile, ...]) -> Contents:
            keys = [matrix_key(layout_of("f32", *w.shape), WeightId(sources[0].digest, name)) for name in "abc"]
            packs = {key: partial(pack, w * np.float32(n + 1), key) for n, key in enumerate(keys)}
            return Contents(Provenance("model", "f32", sources, packer_fingerprint("f32")), dict(packs))

        return contents_of

    def refuse(*_: object) -> Iterator[int]:
        raise AssertionError("a second start packs nothing")

    come_to_rest(source)
    built = load_or_build(cache, [source], contents(pack_into), clock=RealClock())
    assert built.outcome.packed_buffers == 3
    drop_from_memory(source)
    drop_from_memory(cache)
    again = contents(refuse)
    refused = Listener(progress=lambda nbytes: pytest.fail(f"{nbytes} bytes were read"))
    bytes_read()
    before = bytes_read()
    prepared = load_or_build(cache, [source], again, clock=RealClock(), listener=refused)
    assert bytes_read() - before < (64 << 10) + 16_384  # the head of the source; header, index and side file
    assert (prepared.outcome.reason, prepared.outcome.packed_buffers, prepared.outcome.packed_bytes) == (None, 0, 0)
    for path in (source, cache):  # what is read through a mapping; the system may read ahead at the ends
        assert resident_bytes(path) <= 1 << 20 < path.stat().st_size / 8


# Outdated.


@pytest.mark.spec("OPEN-3")
def test_other_weights_of_the_same_size_rebuild_the_file(built: Site) -> None:
    old = built.open()
    sums = [old.provider[key].tobytes() for key in old.provider]
    built.fill(1)
    prepared = built.open()
    built.check_alone(prepared)
    assert prepared.outcome.reason == OTHER_WEIGHTS
    assert built.packed == list(NAMES)  # nothing of another model is copied
    assert [key.name for key in prepared.provider] == list(NAMES)
    assert [old.provider[key].tobytes() for key in old.provider] == sums  # who has the old one keeps it


@pytest.mark.spec("OPEN-3")
def test_a_source_file_of_another_name_rebuilds_the_file(built: Site) -> None:
    built.source = built.source.rename(built.source.with_name("other.safetensors"))
    prepared = built.open()
    built.check_alone(prepared)
    assert prepared.outcome.reason == OTHER_WEIGHTS


@pytest.mark.spec("OPEN-3")
@pytest.mark.parametrize("believed", [True, False], ids=["side file believed", "hashed"])
def test_another_packer_fingerprint_rebuilds_the_file(built: Site, believed: bool) -> None:
    if believed:
        come_to_rest(built.source)
        built.open()
    for fingerprint in (bytes(32), built.fingerprint):
        built.fingerprint = fingerprint
        prepared = built.open()
        built.check_alone(prepared)
        assert prepared.outcome.reason == "the packing code changed"
        assert built.packed == list(NAMES)
        assert mapped_of(prepared).index.provenance.packers == fingerprint


@pytest.mark.spec("OPEN-3")
def test_a_copy_of_the_model_in_another_folder_is_the_same_model(built: Site) -> None:
    shutil.copytree(built.source.parent, built.source.parent.with_name("copy"))
    shutil.rmtree(built.source.parent)
    built.source = built.source.parent.with_name("copy") / built.source.name
    prepared = built.open()
    built.check_alone(prepared)
    assert (prepared.outcome.reason, built.packed, built.hashed) == (None, [], NBYTES)


@pytest.mark.spec("OPEN-3", "OPEN-4")
def test_the_same_bytes_in_another_shape_are_other_buffers(built: Site) -> None:
    built.shape = (K, N)
    prepared = built.open()
    assert not list(mapped_of(prepared).problems())
    assert prepared.outcome.reason == "4 of 4 buffers were missing"
    assert built.packed == list(NAMES)
    both = [prepared.provider[key].tobytes() for key in prepared.provider]
    assert len(both) == 8
    built.open()
    for shape in [(K, N), (N, K)]:
        built.shape = shape
        again = built.open()
        built.check(again)
        assert again.outcome.reason is None


# Incomplete.


several_chunks = pytest.mark.parametrize("chunk_nbytes", [None, 4000], ids=["one chunk", "several chunks"])


@pytest.mark.spec("OPEN-4")
@pytest.mark.parametrize("there", [("a",), ("b", "norm"), ("table", "b", "a")])
@several_chunks
def test_a_file_that_lacks_buffers_is_completed(site: Site, there: tuple[str, ...], chunk_nbytes: int | None) -> None:
    site.names, site.chunk_nbytes = there, chunk_nbytes
    first = site.open()
    site.names = NAMES
    prepared = site.open()
    site.check_alone(prepared)
    missing = [name for name in NAMES if name not in there]
    assert prepared.outcome.reason == f"{len(missing)} of 4 buffers were missing"
    assert site.packed == missing
    assert [key.name for key in prepared.provider] == list(NAMES)  # in execution order all the same
    for key in first.provider:
        assert prepared.provider[key].tobytes() == first.provider[key].tobytes()
    again = site.open()
    site.check(again)
    assert (again.outcome.reason, site.packed) == (None, [])


@pytest.mark.spec("OPEN-4")
def test_buffers_that_are_not_asked_for_are_kept(site: Site) -> None:
    for names, packed in [(("a", "b"), ["a", "b"]), (("c", "b"), ["c"]), (("table",), ["table"]), (("b",), [])]:
        site.names = names
        prepared = site.open()
        site.check_alone(prepared)
        assert site.packed == packed
    assert [key.name for key in prepared.provider] == ["table", "c", "b", "a"]
    site.names = ("a", "b", "c", "table")
    assert site.open().outcome.reason is None


@pytest.mark.spec("OPEN-4")
@pytest.mark.parametrize("damaged", ["a", "b", "table"])
@several_chunks
def test_a_damaged_buffer_is_not_copied_but_packed_again(site: Site, damaged: str, chunk_nbytes: int | None) -> None:
    site.names, site.chunk_nbytes = ("a", "b", "table"), chunk_nbytes
    first = site.open()
    (entry,) = (entry for entry in entries_of(first) if entry.key.name == damaged)
    flip(site.cache, entry.chunks[-1].offset + 5)
    site.names = NAMES
    prepared = site.open()
    site.check_alone(prepared)
    assert prepared.outcome.reason == "1 of 4 buffers were missing"
    assert sorted(site.packed) == sorted([damaged, "norm"])


@pytest.mark.spec("OPEN-4")
def test_a_damaged_buffer_that_is_not_asked_for_is_dropped(site: Site) -> None:
    site.names = ("a", "b")
    entry = entries_of(site.open())[0]
    flip(site.cache, entry.offset)
    site.names = ("b", "norm")
    prepared = site.open()
    site.check_alone(prepared)
    assert [key.name for key in prepared.provider] == ["b", "norm"]
    assert site.packed == ["norm"]


@pytest.mark.spec("OPEN-4")
def test_a_file_holds_the_same_matrices_in_chunks_of_two_sizes(site: Site) -> None:
    first = site.open()
    before = {key: first.provider[key].tobytes() for key in first.provider}
    site.chunk_nbytes = 4000
    prepared = site.open()
    site.check_alone(prepared)
    assert prepared.outcome.reason == "2 of 4 buffers were missing"
    assert site.packed == ["a", "b"]
    assert [key.name for key in prepared.provider] == [*NAMES, "a", "b"]  # those that are asked for come first
    assert {key: prepared.provider[key].tobytes() for key in before} == before
    for chunk_nbytes in (None, 4000, None):
        site.chunk_nbytes = chunk_nbytes
        again = site.open()
        site.check_alone(again)
        assert (again.outcome.reason, again.outcome.packed_buffers, len(again.provider)) == (None, 0, 6)
        for name in ("a", "b"):
            assert (len(chunks_of(again.keys[name])) > 5) == (chunk_nbytes == 4000)


@pytest.mark.spec("OPEN-4", "OPEN-3")
@pytest.mark.parametrize("change", ["weights", "fingerprint"])
def test_nothing_outdated_is_copied(site: Site, change: str) -> None:
    site.names = ("a", "b")
    site.open()
    site.names = NAMES
    if change == "weights":
        site.fill(1)
    else:
        site.fingerprint = bytes(32)
    prepared = site.open()
    site.check_alone(prepared)
    assert site.packed == list(NAMES)
    assert [key.name for key in prepared.provider] == list(NAMES)


# Memory.


def anonymous_bytes() -> int:
    """Return the private memory of this process, files aside."""
    return 1024 * int(re.findall(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.mark.spec("OPEN-8")
@on_linux
def test_packing_holds_neither_the_packed_weights_nor_a_second_copy_of_a_tensor(tmp_path: Path) -> None:
    source, cache = tmp_path / "model.safetensors", tmp_path / "model.rwc"
    N, K, limit = 8192, 2560, 64 << 20
    nbytes = 4 * N * K  # 80 MiB
    with source.open("wb") as file:
        for n in range(2):
            file.seek(n * nbytes)
            file.write(bytes([n + 1]))  # so that the tensors are not one; of the rest the disk keeps nothing
        file.truncate(2 * nbytes)
    tensors = np.memmap(source, np.float32, "r").reshape(2, N, K)
    grown: list[int] = []
    drafted: list[int] = []

    def contents(sources: tuple[SourceFile, ...]) -> Contents:
        keys = [matrix_key(layout_of("f32", N, K), WeightId(sources[0].digest, name)) for name in "ab"]
        packs = {key: partial(pack, w, key) for w, key in zip(tensors, keys, strict=True)}
        return Contents(Provenance("model", "f32", sources, packer_fingerprint("f32")), dict(packs))

    def pack(w: Float32Array, key: PackKey, buffer: Bytes) -> Iterator[int]:
        for done in pack_into(w, key, buffer):
            grown.append(anonymous_bytes() - before)
            drafted.append(resident_bytes_of_mapping(draft_path(cache)))
            yield done

    packer_fingerprint("f32")
    tracemalloc.start()
    try:
        before = anonymous_bytes()
        prepared = load_or_build(cache, [source], contents, clock=RealClock())
        grown.append(anonymous_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.stat().st_size > prepared.outcome.packed_bytes == 2 * nbytes
    assert len(grown) > 9
    assert max(grown) < limit  # between the steps of packing
    assert peak < limit  # and within them
    assert 0 < max(drafted) < limit / 2  # nor does what was packed stay in this process, to be counted as its own
