"""Specifies `refinfer.weight_cache.key`: which keys are the same, and which there cannot be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.errors import PackingError
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.packing.layout import TileShape
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.identity import SideFile, identify
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey, WeightId
from refinfer.weight_cache.packers import matrix_key, padded_nbytes_of, rows_key, vectors_key

ONE, TWO = b"\1" * DIGEST_BYTES, b"\2" * DIGEST_BYTES
KEY = PackKey("goi", (64, 96), "f32", TileShape(16, 96, 1), 1 << 20, WeightId(ONE, "w"))

# For each field of a key, values that it does not have above.
OTHERS: dict[str, list[Any]] = {
    "packer": ["rows", "vectors", "GOI"],
    "shape": [(96, 64), (64, 95), (64,), (64 * 96,), (64, 96, 1), (1, 64, 96)],
    "format": ["bf16", "int8", "int4", "f16"],
    "tile": [TileShape(96, 16, 1), TileShape(16, 1, 96), TileShape(1, 96, 16), TileShape(16, 95, 1)],
    "weights": [WeightId(TWO, "w"), WeightId(ONE, "W"), WeightId(ONE, "w "), WeightId(ONE, "b"), WeightId(ONE, "")],
    "chunk_nbytes": [1, (1 << 20) - 1, (1 << 20) + 1, 1 << 21, (1 << 32) - 1],
}


@pytest.mark.spec("KEY-1")
def test_a_matrix_and_its_transpose_have_different_keys() -> None:
    weights = WeightId(ONE, "w")
    for name in FORMATS:
        assert matrix_key(layout_of(name, 64, 96), weights) != matrix_key(layout_of(name, 96, 64), weights)
        turned = replace(KEY, shape=KEY.shape[::-1])  # even in the same tiles
        assert turned != KEY
    assert rows_key((3, 5), "f32", weights) != rows_key((5, 3), "f32", weights)


@pytest.mark.spec("KEY-1")
def test_every_field_of_a_key_has_values_to_differ_in() -> None:
    assert set(OTHERS) == {field.name for field in fields(PackKey)}


@pytest.mark.spec("KEY-1")
@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in OTHERS.items() for value in values])
def test_keys_that_differ_in_one_field_differ(field: str, value: object) -> None:
    changed: dict[str, Any] = {field: value}
    other = replace(KEY, **changed)
    assert other != KEY
    assert {KEY: 1, other: 2} == {other: 2, KEY: 1}
    assert len({KEY, other}) == 2


@pytest.mark.spec("KEY-1")
def test_a_matrix_cut_for_two_aims_has_two_keys_even_if_its_chunks_are_the_same() -> None:
    weights = WeightId(ONE, "w")
    for name in FORMATS:
        usual, small, large = (layout_of(name, 64, 96, aim) for aim in (None, 1000, 1 << 30))
        assert len(small.chunks) > 1 or name == "int4"
        assert usual.chunks == large.chunks
        assert len({matrix_key(layout, weights) for layout in (usual, small, large)}) == 3
        assert matrix_key(usual, weights) == matrix_key(layout_of(name, 64, 96), weights)
    assert rows_key((3, 5), "f32", weights, 1000) != rows_key((3, 5), "f32", weights)


few_keys = st.builds(
    PackKey,
    packer=st.sampled_from(["goi", "rows"]),
    shape=st.lists(st.integers(1, 2), min_size=1, max_size=2).map(tuple),
    format=st.sampled_from(["f32", "bf16"]),
    tile=st.builds(TileShape, st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    chunk_nbytes=st.integers(1, 2),
    weights=st.builds(WeightId, st.sampled_from([ONE, TWO]), st.sampled_from(["a", "b"])),
)


@pytest.mark.spec("KEY-1")
@given(few_keys, few_keys, st.sampled_from([field.name for field in fields(PackKey)]))
def test_keys_are_equal_exactly_if_all_their_fields_are(one: PackKey, other: PackKey, field: str) -> None:
    copied: dict[str, Any] = {f.name: getattr(one, f.name) for f in fields(PackKey) if f.name != field}
    for another in (other, replace(other, **copied)):  # the second differs in one field at most
        assert (one == another) == (astuple(one) == astuple(another))
        assert one != another or hash(one) == hash(another)


@pytest.mark.spec("KEY-2")
def test_a_tensor_is_named_by_the_content_of_its_file_wherever_that_lies(tmp_path: Path) -> None:
    contents = {"here": b"weights", "there": b"weights", "other": b"weighty"}
    keys: dict[str, PackKey] = {}
    for folder, content in contents.items():
        path = tmp_path / folder / f"{folder}.safetensors"
        path.parent.mkdir()
        path.write_bytes(content)
        (record,) = identify([path], SideFile(()), 0, lambda _: None)
        assert record.source.digest == hashlib.sha256(content).digest()
        keys[folder] = vectors_key(3, WeightId(record.source.digest, "norm"))
    assert keys["here"] == keys["there"]
    assert keys["here"] != keys["other"]
    assert keys["here"] != replace(keys["here"], weights=WeightId(keys["here"].weights.source, "other norm"))
    assert keys["here"].name == "norm"


@pytest.mark.spec("KEY-2")
def test_a_look_up_reads_no_weight(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    keys = [vectors_key(n, WeightId(ONE, "norm")) for n in (1, 1024, 5000)]
    provider = FileWeightCacheProvider.build(path)
    places = [provider.look_up_or_insert(key, np.full(padded_nbytes_of(key), 7, np.uint8)) for key in keys]
    provider.finalize()
    provider.delete_cache()
    with path.open("r+b") as file:  # all that is packed is gone, and nobody looks
        file.seek(places[0])
        file.write(bytes(places[-1] + padded_nbytes_of(keys[-1]) - places[0]))
    loaded = FileWeightCacheProvider.load(path)
    assert [loaded.look_up(key) for key in keys] == places
    assert loaded.look_up(vectors_key(2, WeightId(ONE, "norm"))) is None


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "no dimensions": {"shape": ()},
    "no rows": {"shape": (0, 96)},
    "no columns": {"shape": (64, 0)},
    "less than nothing": {"shape": (64, -1)},
    "two negative sizes": {"shape": (-64, -96)},
    "beyond any memory": {"shape": ((1 << 48) + 1,)},
    "a size that wraps": {"shape": (1, 1 << 64)},
    "an aim of nothing": {"chunk_nbytes": 0},
    "a negative aim": {"chunk_nbytes": -1},
    "an aim beyond 32 bits": {"chunk_nbytes": 1 << 32},
    "rows of a tile beyond 32 bits": {"tile": TileShape(1 << 32, 1, 1)},
    "columns of a tile beyond 32 bits": {"tile": TileShape(16, 1 << 32, 1)},
    "shuffled groups beyond 32 bits": {"tile": TileShape(16, 1, 1 << 32)},
}


@pytest.mark.spec("KEY-3")
@pytest.mark.parametrize("changes", list(IMPOSSIBLE.values()), ids=list(IMPOSSIBLE))
def test_sizes_that_no_tensor_and_no_chunk_can_have_are_refused(changes: dict[str, Any]) -> None:
    why = r"cannot be packed$" if "shape" in changes else r" must be a number of 32 bits above zero, not -?[0-9]+$"
    with pytest.raises(PackingError, match=why):
        replace(KEY, **changes)


NO_NAMES = {
    "half a character": "\ud800",
    "a byte that is no text": "\udcff",
    "half a character within text": "layer.\udfff.weight",
    "too long": "w" * 65_536,
    "too long in UTF-8": "é" * 32_768,
    "absurdly long": "w" * 10_000_000,
}


@pytest.mark.spec("KEY-3")
@pytest.mark.parametrize("name", list(NO_NAMES.values()), ids=list(NO_NAMES))
def test_names_that_cannot_be_written_are_refused_briefly(name: str) -> None:
    refuse: list[Callable[[], object]] = [
        lambda: WeightId(ONE, name),
        lambda: replace(KEY, packer=name),
        lambda: replace(KEY, format=name),
    ]
    for make in refuse:
        with pytest.raises(
            PackingError, match=r"^a name must be text of at most 65535 bytes in UTF-8, not "
        ) as refused:
            make()
        assert len(str(refused.value)) < 200


@pytest.mark.spec("KEY-3")
@pytest.mark.parametrize(
    "name", ["", "\0", "w" * 65_535, "é" * 32_767 + "e", "🦆" * 16_383 + "abc"], ids=lambda n: n[:4]
)
def test_names_that_just_can_be_written_are_allowed(name: str) -> None:
    assert WeightId(ONE, name).name == name
    other = replace(KEY, packer=name, format=name)
    assert (other.packer, other.format) == (name, name)


@pytest.mark.spec("KEY-3")
@pytest.mark.parametrize("n", [0, 1, 31, 33, 64])
def test_digests_of_another_length_are_refused(n: int) -> None:
    with pytest.raises(PackingError, match=f"a digest of 32 bytes, not {n}$"):
        WeightId(bytes(n), "w")


@pytest.mark.spec("KEY-3")
def test_the_largest_sizes_and_the_smallest_are_allowed() -> None:
    most = (1 << 32) - 1
    largest = replace(KEY, shape=(1 << 48, 1), chunk_nbytes=most, tile=TileShape(most, most, most))
    assert (largest.shape, largest.chunk_nbytes, largest.tile) == ((1 << 48, 1), most, TileShape(most, most, most))
    assert replace(KEY, shape=(1,), chunk_nbytes=1, tile=TileShape(1)).chunk_nbytes == 1


@pytest.mark.spec("KEY-1")
def test_a_key_cannot_be_changed() -> None:
    for field in fields(KEY):
        with pytest.raises(AttributeError, match=f"cannot assign to field '{field.name}'"):
            setattr(KEY, field.name, getattr(KEY, field.name))
