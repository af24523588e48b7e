"""Noise to pack, and an independent CRC-32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from refinfer.arrays import f32_to_bf16
from refinfer.packing.formats import FORMATS, PackedMatrix
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import DIGEST_BYTES, PackKey, WeightId
from refinfer.weight_cache.packers import (
    STORED_TYPES,
    chunks_of,
    pack_into,
    padded_nbytes_of,
)

Stored = npt.NDArray[Any]


W = WeightId(bytes(DIGEST_BYTES), "w")


every_format = pytest.mark.parametrize("name", list(FORMATS))


def noise(*shape: int, stored: str = "f32", seed: int = 0) -> Stored:
    """Return numbers as they are stored in a checkpoint."""
    w = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return f32_to_bf16(w) if stored == "bf16" else w.astype(STORED_TYPES[stored])


def packed(stored: Stored, key: PackKey, **kwargs: int) -> Bytes:
    buffer = np.zeros(padded_nbytes_of(key), np.uint8)
    done = list(pack_into(stored, key, buffer, **kwargs))
    last = chunks_of(key)[-1]
    assert done == sorted(set(done))
    assert done[-1] == last.offset + last.nbytes
    return buffer


def bytes_of_matrix(matrix: PackedMatrix) -> Bytes:
    """Return the bytes of a packed matrix as they lie in a file: each chunk on a page."""
    buffer = np.zeros(matrix.layout.padded_nbytes, np.uint8)
    for chunk, part in zip(matrix.layout.chunks, matrix.buffers, strict=True):
        buffer[chunk.offset : chunk.offset + chunk.nbytes] = part
    return buffer


def crc_table() -> list[int]:
    table = []
    for byte in range(256):
        register = byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
        table.append(register)
    return table


CRC = crc_table()


def crc32(data: bytes, begun: int = 0) -> int:
    """Compute the CRC-32 of zlib byte by byte, begun with another number than 0 if asked."""
    register = begun ^ 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ CRC[(register ^ byte) & 255]
    return register ^ 0xFFFFFFFF


def pages(nbytes: int) -> int:
    return (nbytes + 4095) // 4096 * 4096
