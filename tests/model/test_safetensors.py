"""Specifies `refinfer.model.safetensors`: the bytes of a file, what is refused in them, and how they are written."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import struct
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from numpy.testing import assert_array_equal

from refinfer.errors import SafetensorsError
from refinfer.model.safetensors import BITS, DTYPES, SafetensorsFile, TensorSpec, parse_header, write_safetensors

HUGE = 1 << 62
TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # what UTF-8 can express


def entry(dtype: object = "U8", shape: object = (3,), offsets: object = (0, 3)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """Put a file together by hand; `header` is its JSON, or what should be there instead."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def open_bytes(folder: Path, raw: bytes) -> SafetensorsFile:
    path = folder / "some.safetensors"
    path.write_bytes(raw)
    return SafetensorsFile(path)


def contents(file: SafetensorsFile) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read every tensor of `file`: its type, the shape of its view, its bytes."""
    views = {name: file.view(name) for name in file}
    return {name: (file[name].dtype, view.shape, view.tobytes()) for name, view in views.items()}


def whole(name: str, array: npt.NDArray[Any], dtype: str) -> TensorSpec:
    return TensorSpec(name, dtype, array.shape, [array])


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, str, npt.NDArray[Any]]:
    """Draw a name, a type and an array of any bits and shape."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    bits = rng.integers(0, 2 if dtype == "BOOL" else 256, (*shape, DTYPES[dtype].itemsize), np.uint8)
    return draw(TEXT), dtype, bits.view(DTYPES[dtype]).reshape(shape)


@pytest.mark.spec("TENSOR-1")
@given(
    st.lists(tensors(), unique_by=lambda tensor: tensor[0], max_size=6),
    st.dictionaries(TEXT, TEXT),
)
def test_what_is_written_reads_back_bit_for_bit_in_the_same_order(
    drawn: list[tuple[str, str, npt.NDArray[Any]]], metadata: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.safetensors"
        write_safetensors(path, [whole(name, array, dtype) for name, dtype, array in drawn], metadata)
        file = SafetensorsFile(path)
        assert file.metadata == metadata
        assert list(contents(file).items()) == [
            (name, (dtype, array.shape, array.tobytes())) for name, dtype, array in drawn
        ]


@pytest.mark.spec("TENSOR-1")
def test_the_writer_puts_down_the_bytes_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_safetensors(
        path, [whole("a", np.array([[1], [258]], np.uint16), "U16"), whole("b", np.array(-1.0, "f4"), "F32")]
    )
    header = (
        b'{"a":{"dtype":"U16","shape":[2,1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}'
    )
    assert path.read_bytes() == struct.pack("<Q", 112) + header.ljust(112) + b"\x01\x00\x02\x01" + b"\x00\x00\x80\xbf"


@pytest.mark.spec("TENSOR-1")
def test_the_pieces_of_a_tensor_may_have_any_size_and_layout(tmp_path: Path) -> None:
    matrix = np.arange(24, dtype=np.float32).reshape(6, 4)
    pieces = [matrix[:1], matrix[1:1], np.asfortranarray(matrix[1:4]), np.repeat(matrix, 2, axis=0)[8::2]]
    write_safetensors(tmp_path / "some.safetensors", [TensorSpec("a", "F32", (6, 4), pieces)])
    assert_array_equal(SafetensorsFile(tmp_path / "some.safetensors").view("a"), matrix, strict=True)


@pytest.mark.spec("TENSOR-1")
@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"], ["\ud800"]], ids=["twice", "reserved", "surrogate"])
def test_the_writer_refuses_names_that_the_reader_would_refuse(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(SafetensorsError, match=re.escape(repr(names[-1]))):
        write_safetensors(tmp_path / "some.safetensors", [whole(name, np.zeros(1, "u1"), "U8") for name in names])
    assert not any(tmp_path.iterdir())


@pytest.mark.spec("TENSOR-1")
def test_the_order_of_the_header_does_not_matter_and_empty_tensors_take_no_room(tmp_path: Path) -> None:
    header = {"b": entry(offsets=[3, 6]), "none": entry(shape=[2, 0], offsets=[3, 3]), "a": entry(), "__metadata__": {}}
    file = open_bytes(tmp_path, file_bytes(header, b"abcdef"))
    assert contents(file) == {
        "a": ("U8", (3,), b"abc"),
        "none": ("U8", (2, 0), b""),
        "b": ("U8", (3,), b"def"),
    }


def resident_nbytes(path: Path) -> int:
    """Return how many bytes of a mapped file are in this process's memory."""
    _, _, mapping = Path("/proc/self/smaps").read_text().partition(str(path))
    return 1024 * int(re.findall(r"^Rss: +([0-9]+) kB$", mapping, flags=re.MULTILINE)[0])


@pytest.mark.spec("TENSOR-8")
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux reports what of a mapping is in memory")
def test_pages_that_are_dropped_leave_memory_and_are_read_again_when_they_are_used(tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype=np.float32)
    write_safetensors(tmp_path / "some.safetensors", [whole("a", values, "F32")])
    file = SafetensorsFile(tmp_path / "some.safetensors")
    assert_array_equal(file.view("a"), values)
    assert resident_nbytes(tmp_path / "some.safetensors") >= values.nbytes
    file.drop_pages()
    assert resident_nbytes(tmp_path / "some.safetensors") < values.nbytes // 4
    assert_array_equal(file.view("a"), values)


@pytest.mark.spec("TENSOR-1")
def test_views_are_read_only_and_outlive_the_file_object(tmp_path: Path) -> None:
    view = open_bytes(tmp_path, file_bytes({"a": entry()}, b"abc")).view("a")
    assert view.tobytes() == b"abc"
    assert not view.flags.writeable


@pytest.mark.spec("GEN-8")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
def test_a_file_that_nobody_uses_any_more_is_neither_open_nor_mapped(tmp_path: Path) -> None:
    def held() -> tuple[bool, bool]:
        links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return path in links, str(path) in Path("/proc/self/maps").read_text()

    file = open_bytes(tmp_path, file_bytes({"a": entry()}, b"abc"))
    path, view = file.path, file.view("a")
    assert held() == (True, True)
    del file, view
    assert held() == (False, False)


BAD_HEADERS = {
    "empty file": (b"", "it has only 0 bytes"),
    "cut length": (b"\x02\0\0\0\0\0\0", "it has only 7 bytes"),
    "cut header": (file_bytes(b"{}")[:-1], "announces a header of 2 bytes, but has 9 bytes"),
    "huge header": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "announces a header of 18446744073709551615 bytes"),
    "no header": (file_bytes(b""), "does not begin with '{'"),
    "leading space": (file_bytes(b" {}"), "does not begin with '{'"),
    "array": (file_bytes([]), "does not begin with '{'"),
    "string": (file_bytes("{}"), "does not begin with '{'"),
    "null": (file_bytes(None), "does not begin with '{'"),
    "unclosed": (file_bytes(b'{"a":'), "the header is not JSON"),
    "two objects": (file_bytes(b"{}{}"), "the header is not JSON"),
    "quotes": (file_bytes(b"{'a': 1}"), "the header is not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": {}}'), "the header is not JSON"),
    "surrogate": (file_bytes(b'{"__metadata__": {"\xed\xa0\x80": ""}}'), "the header is not JSON"),
    "UTF-16": (file_bytes('{"__metadata__": {}}'.encode("utf-16-le")), "the header is not JSON"),
    "too deep": (file_bytes(b'{"a":' * 100_000), "the header is not JSON"),
    "long number": (file_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "the header is not JSON"),
    "name twice": (file_bytes(b'{"a": {}, "b": {}, "a": {}}'), "'a' is there twice"),
    "metadata twice": (file_bytes(b'{"__metadata__": {}, "__metadata__": {}}'), "'__metadata__' is there twice"),
    "key twice": (file_bytes(b'{"a": {"dtype": "U8", "dtype": "I8"}}'), "'dtype' is there twice"),
    "surrogate name": (file_bytes({"\ud800": entry(shape=[0], offsets=[0, 0])}), "'\\ud800' is not a name"),
    "metadata list": (file_bytes({"__metadata__": []}), "__metadata__ must map names to strings"),
    "metadata number": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__ must map names to strings"),
}


@pytest.mark.spec("TENSOR-2")
@pytest.mark.parametrize(("raw", "why"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_broken_header_is_refused(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(SafetensorsError, match=re.escape(why)) as refusal:
        open_bytes(tmp_path, raw)
    assert "some.safetensors" in str(refusal.value)


@pytest.mark.spec("TENSOR-2")
def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match="nowhere cannot be read: No such file"):
        SafetensorsFile(tmp_path / "nowhere")
    with pytest.raises(SafetensorsError, match="cannot be read: Is a directory"):
        SafetensorsFile(tmp_path)


BAD_TENSORS = {
    "unknown type": (entry("F8_E3M4"), "unknown type 'F8_E3M4'"),
    "lower case": (entry("u8"), "unknown type 'u8'"),
    "type number": (entry(8), "unknown type 8"),
    "type list": (entry(["U8"]), "unknown type ['U8']"),
    "no type": (entry(None), "unknown type None"),
    "no shape": (entry(shape=None), "impossible shape None"),
    "bare shape": (entry(shape=3), "impossible shape 3"),
    "negative shape": (entry(shape=[-3, -1]), "impossible shape [-3, -1]"),
    "fractional shape": (entry(shape=[3.0]), "impossible shape [3.0]"),
    "flag in shape": (entry(shape=[3, True]), "impossible shape [3, True]"),
    "text in shape": (entry(shape=["3"]), "impossible shape ['3']"),
    "long shape": (entry(shape=[3] + [1] * 32), "impossible shape"),
    "vast shape": (entry(shape=[0, 1 << 63], offsets=[0, 0]), "impossible shape"),
    "no offsets": (entry(offsets=None), "impossible data_offsets None"),
    "one offset": (entry(offsets=[3]), "impossible data_offsets [3]"),
    "three offsets": (entry(offsets=[0, 1, 3]), "impossible data_offsets [0, 1, 3]"),
    "reversed offsets": (entry(offsets=[3, 0]), "impossible data_offsets [3, 0]"),
    "negative offset": (entry(offsets=[-3, 0]), "impossible data_offsets [-3, 0]"),
    "fractional offset": (entry(offsets=[0, 3.0]), "impossible data_offsets [0, 3.0]"),
    "flag offset": (entry(offsets=[False, 3]), "impossible data_offsets [False, 3]"),
    "too few bytes": (entry(shape=[4]), "3 bytes, but U8 [4] needs 4"),
    "too many bytes": (entry(shape=[2]), "3 bytes, but U8 [2] needs 2"),
    "bytes of a wide type": (entry("F32"), "3 bytes, but F32 [3] needs 12"),
    "bytes of nothing": (entry(shape=[3, 0]), "3 bytes, but U8 [3, 0] needs 0"),
    "no object": ([0, 3], "exactly dtype, shape and data_offsets"),
    "missing key": ({"dtype": "U8", "shape": [3]}, "exactly dtype, shape and data_offsets"),
    "extra key": (entry() | {"strides": [1]}, "exactly dtype, shape and data_offsets"),
}


@pytest.mark.spec("TENSOR-3")
@pytest.mark.parametrize(("tensor", "why"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_an_impossible_tensor_is_refused_by_name(tmp_path: Path, tensor: object, why: str) -> None:
    with pytest.raises(SafetensorsError, match=f"'odd' .*{re.escape(why)}"):
        open_bytes(tmp_path, file_bytes({"odd": tensor}, b"abc"))


@pytest.mark.spec("TENSOR-3")
@pytest.mark.parametrize("name", sorted(set(BITS) - {"BOOL"}))
def test_a_type_has_as_many_bits_as_its_name_says(name: str) -> None:
    assert re.findall("[0-9]+", name)[0] == str(BITS[name])


BAD_LAYOUTS = {
    "overlap": ({"a": entry(), "b": entry(offsets=[2, 5])}, b"abcde", "'b' overlaps the tensor before it"),
    "same bytes": ({"a": entry(), "b": entry()}, b"abc", "'b' overlaps the tensor before it"),
    "empty inside": ({"a": entry(), "b": entry(shape=[0], offsets=[1, 1])}, b"abc", "'b' overlaps"),
    "hole in front": ({"a": entry(offsets=[1, 4])}, b"abcd", "'a' leaves a hole before it"),
    "hole between": ({"a": entry(), "b": entry(offsets=[4, 7])}, b"abcdefg", "'b' leaves a hole before it"),
    "empty behind": ({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, b"abc", "'b' leaves a hole before it"),
    "bytes behind": ({"a": entry()}, b"abcd", "has bytes that belong to no tensor"),
    "bytes of nobody": ({}, b"a", "has bytes that belong to no tensor"),
    "cut short": ({"a": entry()}, b"ab", "is cut short"),
}


@pytest.mark.spec("TENSOR-4")
@pytest.mark.parametrize(("header", "data", "why"), BAD_LAYOUTS.values(), ids=BAD_LAYOUTS)
def test_tensors_that_do_not_tile_the_file_are_refused(tmp_path: Path, header: object, data: bytes, why: str) -> None:
    with pytest.raises(SafetensorsError, match=re.escape(why)):
        open_bytes(tmp_path, file_bytes(header, data))


@contextmanager
def less_than_a_megabyte_allocated() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


GREEDY_FILES = {
    "header of 4 EB": struct.pack("<Q", HUGE) + b"{}",
    "tensor of 4 EB": file_bytes({"a": entry(shape=[HUGE], offsets=[0, HUGE])}),
    "tensor of many dimensions": file_bytes({"a": entry(shape=[HUGE] * 32, offsets=[0, HUGE])}),
    "tensor of 4 GB": file_bytes({"a": entry("F32", [1 << 30], [0, 1 << 32])}, b"abc"),
}


REFUSALS: Final = "announces a header of|has the impossible shape|is cut short: the tensors take 4294967296 bytes"


@pytest.mark.spec("TENSOR-5")
@pytest.mark.parametrize("raw", GREEDY_FILES.values(), ids=GREEDY_FILES)
def test_a_file_that_announces_too_much_is_refused_before_anything_is_allocated_or_mapped(
    tmp_path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("a refused file was mapped"))
    with less_than_a_megabyte_allocated(), pytest.raises(SafetensorsError, match=REFUSALS):
        open_bytes(tmp_path, raw)


@pytest.mark.spec("TENSOR-5", "TENSOR-12")
def test_a_header_beyond_8_megabytes_is_refused_unread_even_if_the_file_is_that_long(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 8_000_001) + b"{")
        file.truncate(8 + 8_000_001)
    announced = pytest.raises(SafetensorsError, match="has a header of 8000001 bytes; at most 8000000 are supported")
    with less_than_a_megabyte_allocated(), announced:
        SafetensorsFile(path)


SOUND = file_bytes(
    {"a": entry("F32", [2, 2], [0, 16]), "none": entry("I64", [0, 3], [16, 16]), "b": entry("BOOL", [3], [16, 19])},
    bytes(range(16)) + b"\0\1\0",
)


def opens_whole_or_is_refused(raw: bytes) -> bool:
    """Return whether `raw` opens; then every tensor in it can be viewed and read."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = open_bytes(Path(folder), raw)
        except SafetensorsError:
            return False
        assert all(shape == file[name].shape for name, (_, shape, _) in contents(file).items())
        return True


@pytest.mark.spec("TENSOR-4", "TENSOR-6")
def test_a_file_cut_anywhere_is_refused_and_so_is_one_with_a_byte_too_many() -> None:
    assert opens_whole_or_is_refused(SOUND)
    assert not any(opens_whole_or_is_refused(SOUND[:n]) for n in range(len(SOUND)))
    assert not opens_whole_or_is_refused(SOUND + b"\0")


@pytest.mark.spec("TENSOR-6")
@settings(max_examples=500)
@given(st.dictionaries(st.integers(0, len(SOUND) - 1), st.integers(0, 255), min_size=1, max_size=4))
def test_a_file_with_damaged_bytes_opens_whole_or_is_refused(damage: dict[int, int]) -> None:
    raw = bytearray(SOUND)
    for position, byte in damage.items():
        raw[position] = byte
    opens_whole_or_is_refused(bytes(raw))


@pytest.mark.spec("TENSOR-6")
@given(st.binary(max_size=200), st.binary(max_size=20))
def test_a_file_of_noise_opens_whole_or_is_refused(noise: bytes, data: bytes) -> None:
    opens_whole_or_is_refused(noise)
    opens_whole_or_is_refused(file_bytes(b"{" + noise, data))


@pytest.mark.spec("TENSOR-3", "TENSOR-6")
@given(st.lists(st.sampled_from([0, 1, 3, 1 << 31, 1 << 32, HUGE, (1 << 63) - 1]), max_size=6))
def test_an_empty_tensor_of_vast_dimensions_opens_whole_or_is_refused(dimensions: list[int]) -> None:
    opens_whole_or_is_refused(file_bytes({"a": entry(shape=[0, *dimensions], offsets=[0, 0])}))


def pieces_that_fail(error: BaseException) -> Iterator[npt.NDArray[Any]]:
    yield np.zeros(2, np.uint8)
    raise error


@pytest.mark.spec("TENSOR-7")
def test_the_writer_leaves_a_file_that_is_there_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(SafetensorsError, match="cannot be written: File exists"):
        write_safetensors(path, [whole("a", np.zeros(3, "u1"), "U8")])
    assert path.read_bytes() == b"precious"


@pytest.mark.spec("TENSOR-7")
@pytest.mark.parametrize("size", [1, 5], ids=["too few", "too many"])
def test_pieces_that_do_not_add_up_are_refused_and_leave_no_file(tmp_path: Path, size: int) -> None:
    with pytest.raises(SafetensorsError, match=f"'a' got {size} bytes, but its shape needs 3"):
        write_safetensors(tmp_path / "some.safetensors", [TensorSpec("a", "U8", (3,), [np.zeros(size, "u1")])])
    assert not any(tmp_path.iterdir())


@pytest.mark.spec("TENSOR-7")
@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_pieces_that_fail_leave_no_file_and_their_error_comes_through(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        write_safetensors(tmp_path / "some.safetensors", [TensorSpec("a", "U8", (3,), pieces_that_fail(error))])
    assert raised.value is error
    assert not any(tmp_path.iterdir())


@pytest.mark.spec("TENSOR-7")
def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match="cannot be written: No such file or directory"):
        write_safetensors(tmp_path / "nowhere" / "some.safetensors", [])


@pytest.mark.spec("TENSOR-7")
def test_a_piece_of_another_type_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(SafetensorsError, match="'t' must be BF16, not float32"):
        write_safetensors(path, [TensorSpec("t", "BF16", (2,), [np.ones(2, np.float32)])])
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.spec("TENSOR-2")
def test_a_name_given_twice_among_very_many_is_found_at_once() -> None:
    """Comparing each name with all before it would take hours here."""
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = [*(f"t{i}" for i in range(200_000)), "t7"]
    header = "{" + ",".join(f'"{name}":{entry}' for name in names) + "}"
    with pytest.raises(SafetensorsError, match="'t7' is there twice"):
        parse_header(header.encode(), 0, "m.safetensors")


@pytest.mark.spec("INPUT-1")
@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_weights_that_are_no_regular_file_are_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.safetensors"
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(SafetensorsError, match=r"w\.safetensors cannot be read: it is not a regular file"):
        SafetensorsFile(path)


@pytest.mark.spec("TENSOR-6")
def test_a_file_that_is_cut_short_before_it_is_mapped_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(SOUND)
    file = SafetensorsFile(path)
    os.truncate(path, 20)
    with pytest.raises(SafetensorsError, match=r"w\.safetensors was cut short while it was open"):
        file.view(next(iter(file)))


@pytest.mark.spec("TENSOR-6")
def test_a_file_that_cannot_be_mapped_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(SOUND)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    file = SafetensorsFile(path)  # nothing is mapped yet
    with pytest.raises(SafetensorsError, match=r"w\.safetensors cannot be mapped: Cannot allocate memory"):
        file.view(next(iter(file)))


@pytest.mark.spec("INPUT-3")
@pytest.mark.parametrize(
    "header",
    [
        {"x" * 70_000: 1},
        {"x" * 70_000: entry("F32", [2], [0, 4])},
        {"a": entry("x" * 70_000, [1], [0, 4])},
        {"a": entry("F32", list(range(70_000)), [0, 4])},
        {"a": entry("F32", [1], list(range(70_000)))},
        {"a": entry("F32", [1], [0, 4]), "x" * 70_000: entry("F32", [1], [0, 4])},
    ],
    ids=["entry", "size", "type", "shape", "offsets", "place"],
)
def test_only_a_part_of_a_long_name_or_value_is_repeated(tmp_path: Path, header: dict[str, Any]) -> None:
    with pytest.raises(SafetensorsError) as refused:
        open_bytes(tmp_path, file_bytes(header, bytes(4)))
    assert len(str(refused.value).removeprefix(str(tmp_path))) < 300
