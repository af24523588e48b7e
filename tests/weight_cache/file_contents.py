"""Small cache files with a buffer of every kind, and ways to look at their bytes and to damage them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refinfer.arrays import PAGE_BYTES, Float32Array, f32_to_bf16
from refinfer.packing.formats import FORMATS, layout_of
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.file import FileWeightCacheProvider
from refinfer.weight_cache.format import Provenance, SourceFile
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.mapped_file import read_file
from refinfer.weight_cache.packers import matrix_key, pack_into, padded_nbytes_of, rows_key, vectors_key

Stored = npt.NDArray[Any]

SOURCE = b"\x11" * 32
ABOUT = Provenance("größe", "int8", (SourceFile("model.safetensors", 5, SOURCE),), b"\x22" * 32)


def floats(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tensors(N: int = 37, K: int = 21, chunk_nbytes: int | None = None) -> dict[PackKey, Stored]:
    """Return a tensor for each packer, each format, each stored type; by default, each packs into one page."""
    w = floats(N, K)
    made: dict[PackKey, Stored] = {}
    for name in FORMATS:
        made[matrix_key(layout_of(name, N, K, chunk_nbytes), WeightId(SOURCE, f"{name}.weight"))] = w
    as_stored: dict[str, Stored] = {"f32": w, "f16": w.astype(np.float16), "bf16": f32_to_bf16(w)}
    for stored, rows in as_stored.items():
        made[rows_key((N, K), stored, WeightId(SOURCE, f"{stored}.rows"))] = rows
    made[vectors_key(N * K, WeightId(SOURCE, "norms"))] = w.reshape(-1)
    return made


def packed(w: Stored, key: PackKey) -> Bytes:
    buffer = np.zeros(padded_nbytes_of(key), np.uint8)
    list(pack_into(w, key, buffer))
    return buffer


def fill(provider: FileWeightCacheProvider, what: Mapping[PackKey, Stored]) -> None:
    for key, w in what.items():
        provider.get_or_pack(key, partial(pack_into, w, key))


def write(path: Path, what: Mapping[PackKey, Stored]) -> bytes:
    """Write a cache file and return its bytes."""
    provider = FileWeightCacheProvider.build(path, ABOUT)
    fill(provider, what)
    provider.finalize()
    provider.delete_cache()
    return path.read_bytes()


def gaps(path: Path) -> Iterator[bytes]:
    """Yield what lies between header and index of a cache file and belongs to no buffer."""
    data, (header, index) = path.read_bytes(), read_file(path)
    end = PAGE_BYTES
    for start, nbytes in sorted({(entry.offset, entry.padded_nbytes) for entry in index.entries}):
        yield data[end:start]
        end = start + nbytes
    yield data[end : header.index_offset]


def flip(path: Path, at: int) -> None:
    """Change a byte of a file, as a failing disk does."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def make_version(path: Path, version: int) -> None:
    """Change the format version of a cache file, and make the header's digest agree with it."""
    data = bytearray(path.read_bytes())
    assert hashlib.sha256(data[:160]).digest() == data[160:192]
    data[8:12] = version.to_bytes(4, "little")
    data[160:192] = hashlib.sha256(data[:160]).digest()
    path.write_bytes(data)
