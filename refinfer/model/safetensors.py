"""The safetensors format: a reader that trusts nothing, and a writer that streams.

Finds the place of each tensor in one file. Leaves to others: models, several files at once.
Read more: tutorial 05; clauses TENSOR-1 to TENSOR-7, TENSOR-12, TENSOR-16.

    0        8                8 + n                            end of file
    +--------+----------------+----------------------------------+
    | n: u64 | JSON, n bytes  | tensors, one right after another |
    +--------+----------------+----------------------------------+
             {"name": {"dtype": "BF16", "shape": [N, K], "data_offsets": [begin, end]}, ...}

Little-endian; offsets count from the end of the JSON. The rules are those of the format's own page
(huggingface.co/docs/safetensors): every byte after the header belongs to exactly one tensor. Offloading needs the
place of each tensor in the file, which is why this reader is our own.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from refinfer.errors import SafetensorsError
from refinfer.units import shown
from refinfer.whole_file import GIT_LFS_POINTER, LFS_PROBLEM, open_regular, parse_json

__all__ = ["BITS", "DTYPES", "SafetensorsFile", "TensorInfo", "TensorSpec", "parse_header", "write_safetensors"]

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: its 16 bits, see `arrays.bf16_to_f32`
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "C64": np.dtype("<c8"),
}
"""The format's element types that numpy can hold, and the numpy type of each."""

BITS: Final[Mapping[str, int]] = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""All element types of the format, and the bits of an element; those of `DTYPES` can be viewed and written."""

LARGEST_HEADER_BYTES: Final = 8_000_000
# The format allows 100 MB, which Python would need gigabytes and a quarter of a minute to read. A tensor takes about
# 100 bytes of header, so 8 MB name 80,000 tensors in one file; the published models have a few thousand in a file.
_LARGEST_ELEMENTS: Final = 1 << 60
_LENGTH: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `offset` in bytes from the start of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse_header(header: bytes, data_bytes: int, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Turn the JSON of a header into tensors, in file order, and the metadata; allocates nothing for the data.

    Args:
        header: the JSON, without the length in front of it.
        data_bytes: number of bytes that follow it in the file.
        where: the file's name, for messages.

    Raises:
        SafetensorsError: invalid JSON, duplicate names, unknown types, impossible shapes, offsets that lie
            outside the data, overlap, leave a hole, or do not fit the shape.
    """

    def refuse(problem: str) -> SafetensorsError:
        return SafetensorsError(f"{where} is not a valid safetensors file: {problem}")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name, value in pairs:
            if name in names:
                raise refuse(f"{shown(name)} is there twice in the header")
            names[name] = value
        return names

    if not header.startswith(b"{"):
        raise refuse("the header does not begin with '{'")
    try:
        raw = parse_json(header, no_duplicates)
    except ValueError as error:
        raise refuse(f"the header is not JSON in UTF-8 ({error})") from None
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("__metadata__ must map names to strings")

    base = _LENGTH.size + len(header)
    tensors = [_parse_tensor(name, entry, base, refuse) for name, entry in raw.items()]
    tensors.sort(key=lambda t: (t.offset, t.offset + t.nbytes))
    _check_no_byte_is_shared_or_spare(tensors, base, base + data_bytes, refuse)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _check_no_byte_is_shared_or_spare(
    tensors: Sequence[TensorInfo], start: int, file_end: int, refuse: Callable[[str], SafetensorsError]
) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise refuse(f"{shown(tensor.name)} {problem}")
        end += tensor.nbytes
    if end != file_end:
        problem = "is cut short" if end > file_end else "has bytes that belong to no tensor"
        raise refuse(f"it {problem}: the tensors take {end - start} bytes, the file has {file_end - start}")


def _parse_tensor(name: str, entry: object, base: int, refuse: Callable[[str], SafetensorsError]) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"{shown(name)} must have exactly dtype, shape and data_offsets")
    if not _is_text(name):
        raise refuse(f"{shown(name)} is not a name that UTF-8 can express")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise refuse(f"{shown(name)} has the unknown type {shown(dtype)}")
    # Zeros are left out of the product, so that an empty tensor of vast dimensions is refused; numpy cannot hold it.
    if not _are_sizes(shape) or math.prod(n for n in shape if n) >= _LARGEST_ELEMENTS:
        raise refuse(f"{shown(name)} has the impossible shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"{shown(name)} has the impossible data_offsets {shown(offsets)}")
    nbytes, spare_bits = divmod(math.prod(shape) * BITS[dtype], 8)
    if spare_bits:
        raise refuse(f"{shown(name)}, {dtype} {shown(shape)}, does not end with a whole byte")
    if nbytes != offsets[1] - offsets[0]:
        raise refuse(f"{shown(name)} takes {offsets[1] - offsets[0]} bytes, but {dtype} {shown(shape)} needs {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), base + offsets[0], nbytes)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and len(values) <= 32 and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class SafetensorsFile(Mapping[str, TensorInfo]):
    """One open safetensors file: a read-only mapping from names to `TensorInfo`, in file order.

    Law: the header has been checked against the file's size before anything is mapped. The file is mapped at the first
    `view`; all views share one read-only mapping, and each tensor is read when it is touched. Views stay valid as long
    as any of them, or this object, is alive.

    Raises:
        SafetensorsError: the file is missing, unreadable or malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                size = file.seek(0, 2)
                file.seek(0)
                header = _read_header(file, size, str(path))
                self._tensors, self.metadata = parse_header(header, size - file.tell(), str(path))
                self._descriptor, self._size = os.dup(file.fileno()), size
        except OSError as error:
            raise SafetensorsError(f"{path} cannot be read: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)

    @cached_property
    def _map(self) -> mmap.mmap:
        try:
            return mmap.mmap(self._descriptor, self._size, access=mmap.ACCESS_READ)
        except ValueError:  # it is shorter than it was
            raise SafetensorsError(f"{self.path} was cut short while it was open") from None
        except OSError as error:
            raise SafetensorsError(f"{self.path} cannot be mapped: {error.strerror}") from None

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def view(self, name: str) -> npt.NDArray[Any]:
        """Return the tensor `name` as a read-only view of the file, in the numpy type of `DTYPES`; copies nothing.

        Raises:
            SafetensorsError: the file cannot be mapped, was cut short, or numpy has no such type.
        """
        tensor = self._tensors[name]
        if tensor.dtype not in DTYPES:
            raise SafetensorsError(f"{self.path}: {shown(name)} is {tensor.dtype}, which numpy cannot hold")
        raw = np.frombuffer(self._map, np.uint8)[tensor.offset : tensor.offset + tensor.nbytes]
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def drop_pages(self) -> None:
        """Let the system drop the pages read so far from memory; views stay valid, and read them again."""
        with contextlib.suppress(AttributeError, OSError):  # a hint
            self._map.madvise(mmap.MADV_DONTNEED)


def _read_header(file: BinaryIO, size: int, where: str) -> bytes:
    """Read the JSON after checking its announced length against the file's `size`."""
    length_bytes = file.read(_LENGTH.size)
    if len(length_bytes) < _LENGTH.size:
        raise SafetensorsError(f"{where} is not a valid safetensors file: it has only {size} bytes")
    (length,) = _LENGTH.unpack(length_bytes)
    if LARGEST_HEADER_BYTES < length <= size - _LENGTH.size:
        raise SafetensorsError(f"{where} has a header of {length} bytes; at most {LARGEST_HEADER_BYTES} are supported")
    if length > size - _LENGTH.size:
        if (length_bytes + file.read(len(GIT_LFS_POINTER))).startswith(GIT_LFS_POINTER):
            raise SafetensorsError(f"{where} cannot be read: {LFS_PROBLEM}")
        raise SafetensorsError(
            f"{where} is not a valid safetensors file: it announces a header of {length} bytes, but has {size} bytes"
        )
    return file.read(length)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What to write: a tensor's name, its type (a key of `DTYPES`), its shape, and its contents piece by piece."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """The bytes the tensor takes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(path: Path, tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` in the given order, one piece in memory at a time; on any failure no file is left.

    Raises:
        SafetensorsError: the file exists already or cannot be written, a name is given twice or cannot be expressed in
            UTF-8, or the pieces of a tensor are of another type or do not add up to its shape.
    """
    text = _header_for(path, tensors, metadata or {})
    taken = path.exists()
    try:
        with path.open("xb") as file:
            file.write(_LENGTH.pack(len(text)) + text)
            for tensor in tensors:
                written = 0
                for piece in tensor.pieces:
                    if piece.dtype != DTYPES[tensor.dtype]:
                        raise SafetensorsError(f"{tensor.name!r} must be {tensor.dtype}, not {piece.dtype}")
                    written += file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                if written != tensor.nbytes:
                    raise SafetensorsError(f"{tensor.name!r} got {written} bytes, but its shape needs {tensor.nbytes}")
    except BaseException as error:
        if not (taken or isinstance(error, FileExistsError)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SafetensorsError(f"{path} cannot be written: {error.strerror}") from None
        raise


def _header_for(path: Path, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for tensor in tensors:
        if tensor.name in header or not _is_text(tensor.name):
            raise SafetensorsError(f"{path} cannot hold {tensor.name!r}: the name is taken, or UTF-8 cannot express it")
        end = begin + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    if not metadata:
        del header["__metadata__"]
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the format asks for tensors that start on 8 bytes
