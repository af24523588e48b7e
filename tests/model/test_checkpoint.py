"""Specifies `refinfer.model.checkpoint`: several files as one set of tensors, and how a tensor becomes float32."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_array_equal

from refinfer.errors import SafetensorsError, WeightsError
from refinfer.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.safetensors import TensorSpec, write_safetensors
from refinfer.model.synth import write_checkpoint

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)
TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int32": "I32", "uint16": "BF16", "bool": "BOOL"}

ONES = np.ones((2, 3), np.float32)
ARRAYS: dict[str, npt.NDArray[Any]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1, -2, 0.5], np.float16),
    "c": np.array([0x3F80, 0xC000], np.uint16),
    "d": np.zeros((0, 4), np.float32),
}


def write(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a safetensors file; 16-bit integers go in as the bits of bfloat16."""
    write_safetensors(path, [TensorSpec(n, TYPES[str(a.dtype)], a.shape, [a]) for n, a in arrays.items()])


def single(folder: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> Checkpoint:
    write(folder / SINGLE_NAME, arrays)
    return open_checkpoint(folder)


def sharded(folder: Path, weight_map: Mapping[str, str]) -> Checkpoint:
    """Write those of `ARRAYS` that `weight_map` names into the files it gives them, and the index."""
    for shard in set(weight_map.values()):
        write(folder / shard, {name: ARRAYS[name] for name in weight_map if weight_map[name] == shard})
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return open_checkpoint(folder)


@pytest.mark.spec("TENSOR-8")
def test_a_float32_tensor_is_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    checkpoint = single(tmp_path, ARRAYS)
    view = checkpoint.float32("a", (2, 3))
    assert np.shares_memory(view, checkpoint.stored("a", (2, 3)))
    assert not view.flags.writeable
    assert_array_equal(view, ARRAYS["a"], strict=True)


@pytest.mark.spec("TENSOR-8")
def test_every_float16_becomes_exactly_its_float32(tmp_path: Path) -> None:
    values = single(tmp_path, {"a": ALL_BITS.view(np.float16)}).float32("a", (1 << 16,))
    by_python = struct.unpack("<65536e", ALL_BITS.tobytes())  # Python's floats hold every float16
    assert_array_equal(values, np.array(by_python, np.float32), strict=True)


@pytest.mark.spec("TENSOR-8")
def test_every_bfloat16_becomes_exactly_its_float32(tmp_path: Path) -> None:
    values = single(tmp_path, {"a": ALL_BITS}).float32("a", (1 << 16,))
    by_python = struct.unpack("<65536f", b"".join(b"\0\0" + struct.pack("<H", bits) for bits in range(1 << 16)))
    assert_array_equal(values, np.array(by_python, np.float32), strict=True)


@pytest.mark.spec("TENSOR-8")
def test_a_stored_tensor_is_a_view_in_the_type_it_is_stored_in(tmp_path: Path) -> None:
    checkpoint = single(tmp_path, ARRAYS)
    for name, array in ARRAYS.items():
        stored = checkpoint.stored(name, array.shape)
        assert not stored.flags.writeable
        assert_array_equal(stored, array, strict=True)


@pytest.mark.spec("TENSOR-9")
@pytest.mark.parametrize(
    "shards", [["one"] * 4, ["one", "two", "one", "two"], ["one", "two", "three", "four"]], ids=["1", "2", "4"]
)
def test_shards_give_the_same_tensors_as_a_single_file(tmp_path: Path, shards: list[str]) -> None:
    (tmp_path / "single").mkdir()
    one_file = single(tmp_path / "single", ARRAYS)
    several = sharded(tmp_path, dict(zip(ARRAYS, shards, strict=True)))
    assert set(several) == set(one_file) == set(ARRAYS)
    for name, shard in zip(ARRAYS, shards, strict=True):
        shape = one_file[name].shape
        assert_array_equal(several.stored(name, shape), one_file.stored(name, shape), strict=True)
        assert_array_equal(several.float32(name, shape), one_file.float32(name, shape), strict=True)
        assert several.path_of(name) == tmp_path / shard
        assert one_file.path_of(name) == tmp_path / "single" / SINGLE_NAME


@pytest.mark.spec("TENSOR-9")
def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one"})
    assert_array_equal(single(tmp_path, {"a": ONES}).float32("a", (2, 3)), ONES)


@pytest.mark.spec("TENSOR-9", "TENSOR-10")
def test_a_folder_with_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match=re.escape(f"has neither {SINGLE_NAME} nor {INDEX_NAME}")):
        open_checkpoint(tmp_path)


BAD_INDEXES = {
    "missing shard": ({"weight_map": {"a": "two"}}, "names two, which does not exist; fetch the missing file"),
    "parent": ({"weight_map": {"a": "../outside"}}, "gives 'a' the impossible file name '../outside'"),
    "absolute": ({"weight_map": {"a": "/outside"}}, "gives 'a' the impossible file name '/outside'"),
    "subfolder": ({"weight_map": {"a": "sub/one"}}, "gives 'a' the impossible file name 'sub/one'"),
    "backslash": ({"weight_map": {"a": "..\\one"}}, "gives 'a' the impossible file name '..\\\\one'"),
    "dots": ({"weight_map": {"a": ".."}}, "gives 'a' the impossible file name '..'"),
    "dot": ({"weight_map": {"a": "."}}, "gives 'a' the impossible file name '.'"),
    "empty name": ({"weight_map": {"a": ""}}, "gives 'a' the impossible file name ''"),
    "NUL": ({"weight_map": {"a": "one\0"}}, "gives 'a' the impossible file name 'one\\x00'"),
    "surrogate": ({"weight_map": {"a": "\ud800"}}, "'\\ud800'"),
    "long name": ({"weight_map": {"a": "x" * 300}}, "gives 'a' the impossible file name 'xxx"),
    "number": ({"weight_map": {"a": 1}}, "gives 'a' the impossible file name 1"),
    "null": ({"weight_map": {"a": None}}, "gives 'a' the impossible file name None"),
    "list of shards": ({"weight_map": {"a": ["one"]}}, "gives 'a' the impossible file name ['one']"),
    "map that is a list": ({"weight_map": ["one"]}, "has no weight_map"),
    "empty map": ({"weight_map": {}}, "has no weight_map"),
    "no map": ({}, "has no weight_map"),
    "array": ([], "has no weight_map"),
}


@pytest.mark.spec("TENSOR-10")
@pytest.mark.parametrize(("index", "why"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_an_index_that_does_not_fit_its_folder_is_refused(tmp_path: Path, index: object, why: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for sound in (folder / "one", folder / "sub" / "one", tmp_path / "outside"):
        write(sound, {"a": ONES})
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(SafetensorsError, match=re.escape(why)):
        open_checkpoint(folder)


@pytest.mark.spec("TENSOR-10")
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000], ids=["cut short", "not UTF-8", "too deep"])
def test_an_index_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(SafetensorsError, match=f"{INDEX_NAME} is not valid JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.spec("TENSOR-2", "TENSOR-10")
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one", "b": "two"})
    (tmp_path / "two").write_bytes(b"")
    with pytest.raises(SafetensorsError, match="two is not a valid safetensors file"):
        open_checkpoint(tmp_path)


UNFIT = {
    "missing": ("b", "has no tensor 'b', which its config.json asks for"),
    "other shape": ("turned", "'turned' has the shape [3, 2], but config.json asks for [2, 3]"),
    "fewer dimensions": ("flat", "'flat' has the shape [6], but config.json asks for [2, 3]"),
    "integers": ("int32", "'int32' is stored as I32; supported are F32, F16, BF16"),
    "flags": ("bool", "'bool' is stored as BOOL; supported are F32, F16, BF16"),
    "doubles": ("float64", "'float64' is stored as F64; supported are F32, F16, BF16"),
    "plain 16 bits": ("uint16", "'uint16' is stored as U16; supported are F32, F16, BF16"),
}


@pytest.mark.spec("TENSOR-11")
@pytest.mark.parametrize(("name", "why"), UNFIT.values(), ids=UNFIT)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path: Path, name: str, why: str) -> None:
    arrays = {"turned": ONES.T, "flat": ONES.ravel()} | {t: ONES.astype(t) for t in ("int32", "bool", "float64")}
    specs = [TensorSpec(n, TYPES[str(a.dtype)], a.shape, [a]) for n, a in arrays.items()]
    bits = TensorSpec("uint16", "U16", (2, 3), [ONES.astype(np.uint16)])
    write_safetensors(tmp_path / SINGLE_NAME, [*specs, bits])
    checkpoint = open_checkpoint(tmp_path)
    for read in (checkpoint.stored, checkpoint.float32):
        with pytest.raises(WeightsError, match=re.escape(why)):
            read(name, (2, 3))


@pytest.mark.spec("INPUT-1")
def test_an_index_that_is_no_regular_file_or_too_large_is_refused_by_name(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    os.mkfifo(index)
    with pytest.raises(SafetensorsError, match=r"index\.json cannot be read: it is not a regular file"):
        open_checkpoint(tmp_path)
    index.unlink()
    index.touch()
    os.truncate(index, 1_000_001)
    with pytest.raises(SafetensorsError, match=r"index\.json cannot be read: it is larger than the 1 MB"):
        open_checkpoint(tmp_path)


@pytest.mark.spec("INPUT-3")
def test_only_a_part_of_the_long_names_of_an_index_is_repeated(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x" * 70_000: "y" * 70_000}}))
    with pytest.raises(SafetensorsError, match=r"gives 'x+\.\.\.x+' the impossible file name 'y+\.\.\.y+'"):
        open_checkpoint(tmp_path)


@pytest.mark.spec("TENSOR-13")
def test_layers_beyond_those_of_the_config_are_left_out(tmp_path: Path, tiny_config: ModelConfig) -> None:
    write_checkpoint(tmp_path, tiny_config)
    fewer = replace(tiny_config, num_hidden_layers=tiny_config.num_hidden_layers - 1)
    assert set(open_checkpoint(tmp_path).of(fewer)) == set(fewer.tensor_shapes())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_the_first_tensor_that_holds_a_number_that_is_not_finite_is_found(
    tmp_path: Path, stored: str, value: float
) -> None:
    wrong = ONES.copy()
    wrong[1, 2] = value
    bits = (wrong.view(np.uint32) >> 16).astype(np.uint16) if stored == "bfloat16" else wrong.astype(stored)
    sound = {"whole": ONES.astype(np.int32), "finite": ONES}
    (tmp_path / "sound").mkdir()
    assert single(tmp_path / "sound", sound).first_non_finite() is None
    assert single(tmp_path, sound | {"first": bits, "second": wrong}).first_non_finite() == "first"
