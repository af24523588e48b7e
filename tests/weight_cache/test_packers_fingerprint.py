"""Specifies the fingerprint of `refinfer.weight_cache.packers`: what changes it, and what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from packer_bytes import Stored, W, bytes_of_matrix, crc32, every_format, noise, packed, pages
from refinfer.arrays import Float32Array, f32_to_bf16
from refinfer.packing import formats, int4
from refinfer.packing.formats import FORMATS, layout_of, pack_chunk, pack_matrix
from refinfer.packing.layout import Bytes, Chunk, PackedLayout, TileShape, cut_into_chunks
from refinfer.weight_cache import packers
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey
from refinfer.weight_cache.packers import (
    PACKERS,
    chunks_of,
    matrix_key,
    packer_fingerprint,
    rows_key,
    scrambled,
    vectors_key,
)

MASK = (1 << 64) - 1


def forget() -> None:
    """Forget what was remembered of chunks and fingerprints."""
    chunks_of.cache_clear()
    packer_fingerprint.cache_clear()


@contextmanager
def instead(module: object, **changes: object) -> Iterator[None]:
    """Put other values in the place of names of a module, such as a format's page, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(module, name, value)
        forget()
        yield
    forget()


@pytest.mark.spec("KEY-4")
def test_there_are_three_packers_and_no_more() -> None:
    assert list(PACKERS) == ["goi", "rows", "vectors"]
    assert not hasattr(PACKERS, "__setitem__")


def fingerprints() -> dict[str, bytes]:
    forget()
    return {name: packer_fingerprint(name) for name in FORMATS}


def changed_since(before: Mapping[str, bytes]) -> set[str]:
    return {name for name, fingerprint in fingerprints().items() if fingerprint != before[name]}


def splitmix64(i: int) -> int:
    """Return number i, from 0, of the generator of Steele, Lea and Flood 2014 that starts at 0."""
    z = (i + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


@pytest.mark.spec("KEY-8")
def test_the_words_of_the_operators_are_those_of_splitmix64() -> None:
    # The first numbers of the reference implementation in C, https://prng.di.unimi.it/splitmix64.c, from seed 0.
    assert scrambled(3, 0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for stream in (0, 1, 2, 1000):
        assert scrambled(600, stream).tolist() == [splitmix64(i + (stream << 32)) for i in range(600)]


@pytest.mark.spec("KEY-8")
@every_format
def test_a_fingerprint_is_the_documented_digest(name: str) -> None:
    digest = hashlib.sha256()
    for N, K in ((1, 1), (37, 65), (64, 96), (529, 40)):
        words = [splitmix64(i + (2 << 32)) >> 40 for i in range(N * K)]
        w = (np.array(words) / (1 << 23) - 1).astype(np.float32).reshape(N, K)
        for stored in (w, w.astype(np.float16), f32_to_bf16(w)):
            digest.update(bytes_of_matrix(pack_matrix(stored, name)).data)
            records = b""
            for number, row in enumerate(stored[:3]):
                content = row.tobytes() + bytes(-row.nbytes % 4)
                records += crc32(content, number).to_bytes(4, "little") + content
            digest.update(records.ljust(pages(len(records)), b"\0"))
        digest.update(w[:, 0].tobytes().ljust(pages(4 * N), b"\0"))
    for N, K in ((4096, 4096), (11008, 4096), (4096, 11008), (128256, 2048)):
        layout = layout_of(name, N, K)
        tile = layout.tile
        digest.update(f"TileShape(nr={tile.nr}, kr={tile.kr}, sr={tile.sr}) {layout.chunk_nbytes}".encode())
        for chunk in layout.chunks:
            for place in (chunk.first_row, chunk.n_rows, chunk.offset, chunk.nbytes):
                digest.update(place.to_bytes(8, "little"))
    table = cut_into_chunks(200_000, 1, 2052, 4 << 20)
    digest.update(("[" + ", ".join(f"({chunk.first_row}, {chunk.offset})" for chunk in table) + "]").encode())
    assert packer_fingerprint(name) == digest.digest()
    page = Path(__file__).parents[2] / "docs" / "file-format.md"
    assert f"\n{name:8}{digest.hexdigest()}\n" in page.read_text(encoding="utf-8")


@pytest.mark.spec("KEY-8")
def test_a_fingerprint_is_a_digest_that_does_not_change_by_itself() -> None:
    before = fingerprints()
    assert all(len(fingerprint) == DIGEST_BYTES for fingerprint in before.values())
    assert len(set(before.values())) == len(before)
    assert not changed_since(before)


def packing_otherwise(name: str, flip: Callable[[Stored, Bytes], None]) -> Callable[..., None]:
    """Return `pack_chunk` as it is, but for a bit of the bytes of one format that `flip` flips."""

    def pack(rows: Stored, layout: PackedLayout, chunk: Chunk, buffer: Bytes) -> None:
        pack_chunk(rows, layout, chunk, buffer)
        if layout.format.name == name:
            flip(rows, buffer)

    return pack


@pytest.mark.spec("KEY-8")
@every_format
@pytest.mark.parametrize("at", [0, -1])
def test_packing_a_single_other_bit_changes_the_fingerprint_of_that_format_only(name: str, at: int) -> None:
    before = fingerprints()

    def flip(rows: Stored, buffer: Bytes) -> None:
        buffer[at] ^= 1

    with instead(packers, pack_chunk=packing_otherwise(name, flip)):
        assert changed_since(before) == {name}
    assert not changed_since(before)


@pytest.mark.spec("KEY-8")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16], ids=["f32", "f16", "bf16"])
def test_packing_only_one_stored_type_otherwise_changes_the_fingerprint(dtype: type[np.generic]) -> None:
    before = fingerprints()

    def flip(rows: Stored, buffer: Bytes) -> None:
        buffer[-1] ^= rows.dtype == dtype

    with instead(packers, pack_chunk=packing_otherwise("int8", flip)):
        assert changed_since(before) == {"int8"}


@pytest.mark.spec("KEY-8")
@every_format
def test_cutting_other_chunks_changes_the_fingerprint_of_that_format_only(name: str) -> None:
    before = fingerprints()
    with instead(FORMATS[name], chunk_nbytes=FORMATS[name].chunk_nbytes // 2):
        assert changed_since(before) == {name}


@pytest.mark.spec("KEY-8")
def test_other_tiles_change_the_fingerprint_of_that_format_only() -> None:
    before = fingerprints()
    with instead(int4, tile_shape=lambda N, K: TileShape(16 * -(-min(N, 256) // 16))):
        assert changed_since(before) == {"int4"}


@pytest.mark.spec("KEY-8")
@every_format
def test_the_same_bytes_packed_by_other_code_have_the_same_fingerprint(name: str) -> None:
    before, usual = fingerprints(), FORMATS[name].pack

    def pack(rows: Stored, tiles: Any, first: int) -> None:
        usual(np.asfortranarray(rows), tiles, first)

    with instead(FORMATS[name], pack=pack, unpack_rows=lambda *_: np.zeros((1, 1), np.float32)):
        assert not changed_since(before)


def cut_with_a_tile_moved(N: int, nr: int, tile_nbytes: int, chunk_nbytes: int) -> tuple[Chunk, ...]:
    """Cut as ever, but for a tile that moves from the second of many chunks to the third."""
    chunks = cut_into_chunks(N, nr, tile_nbytes, chunk_nbytes)
    if len(chunks) < 5:
        return chunks
    first, second, third, *rest = chunks
    second = replace(second, n_rows=second.n_rows - nr, nbytes=second.nbytes - tile_nbytes)
    start = second.offset + second.padded_nbytes
    third = Chunk(third.first_row - nr, third.n_rows + nr, start, third.nbytes + tile_nbytes)
    return (first, second, third, *rest)


@pytest.mark.spec("KEY-8")
def test_cutting_only_inner_chunks_otherwise_changes_the_fingerprint() -> None:
    before = fingerprints()
    with instead(formats, cut_into_chunks=cut_with_a_tile_moved):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
def test_cutting_other_chunks_of_rows_changes_the_fingerprint() -> None:
    before = fingerprints()
    for nbytes in (1 << 20, (4 << 20) - (1 << 16), (4 << 20) + (1 << 16), 8 << 20):
        with instead(packers, rows_key=partial(rows_key, chunk_nbytes=nbytes)):
            assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
def test_cutting_only_inner_chunks_of_rows_otherwise_changes_the_fingerprint() -> None:
    before = fingerprints()
    with instead(packers, cut_into_chunks=cut_with_a_tile_moved):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-8")
@pytest.mark.parametrize("first", [0, 1], ids=["of every row", "of all rows but the first"])
def test_another_checksum_of_rows_changes_every_fingerprint(first: int) -> None:
    before, usual = fingerprints(), vars(packers)["_row_checksum"]
    with instead(packers, _row_checksum=lambda record, row: usual(record, row) ^ (row >= first)):
        assert changed_since(before) == set(FORMATS)


@pytest.mark.spec("KEY-7")
def test_packing_only_reads_what_is_stored() -> None:
    tensors: list[tuple[PackKey, Float32Array]] = [
        (matrix_key(layout_of("int4", 20, 7), W), noise(20, 7)),
        (rows_key((20, 7), "f32", W), noise(20, 7)),
        (vectors_key(9, W), noise(9)),
    ]
    for key, w in tensors:
        before = w.copy()
        w.flags.writeable = False
        packed(w, key)[:] = 0
        assert_array_equal(w, before)
