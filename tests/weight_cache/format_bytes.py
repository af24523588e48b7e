"""Headers and indexes of cache files, written byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from refinfer.packing.formats import FORMATS, layout_of
from refinfer.weight_cache.format import (
    Header,
)
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.packers import STORED_TYPES, matrix_key, rows_key, vectors_key

PAGE = 4096


LARGEST = (1 << 64) - 1


LARGEST_U32 = (1 << 32) - 1


AIM = 4 << 20  # for chunks of rows, and as usual for those of f32


SOURCE, DIGEST, PACKERS = b"\x11" * 32, b"\x22" * 32, b"\x33" * 32


def number(value: int, nbytes: int) -> bytes:
    return value.to_bytes(nbytes, "little")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return number(len(raw), 2) + raw


def weight(name: str | bytes, source: bytes = SOURCE) -> bytes:
    return source + text(name)


def raw_entry(
    packer: str | bytes = "vectors",
    form: str | bytes = "f32",
    shape: Sequence[int] = (1000,),
    tile: Sequence[int] = (1, 1, 1),
    aim: int = AIM,
    weights: bytes = weight("w"),
    digest: bytes = DIGEST,
    chunks: Sequence[tuple[int, int, int]] = ((PAGE, 4000, 7),),
) -> bytes:
    """Write down an entry, whatever it says."""
    key = text(packer) + text(form) + number(len(shape), 1) + b"".join(number(size, 8) for size in shape)
    key += b"".join(number(size, 4) for size in (*tile, aim)) + weights
    table = b"".join(number(start, 8) + number(nbytes, 8) + number(crc, 4) for start, nbytes, crc in chunks)
    return key + digest + number(len(chunks), 4) + table


def raw_index(*entries: bytes, sources: Sequence[bytes] = (), model: str | bytes = "folder") -> bytes:
    """Write down an index, whatever it says."""
    about = text(model) + text("int8") + number(len(sources), 4) + b"".join(sources)
    return about + number(len(entries), 4) + b"".join(entries)


def header_of(data: bytes, index_offset: int = 16 * PAGE, sources: bytes = b"") -> Header:
    """Return a header that agrees with an index in everything that can be computed."""
    model = hashlib.sha256(sources).digest()
    return Header(1, model, PACKERS, index_offset, len(data), hashlib.sha256(data).digest())


digests = st.binary(min_size=32, max_size=32)


checksums = st.integers(0, LARGEST_U32)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # what UTF-8 can express


ids = st.builds(WeightId, digests, texts)


@st.composite
def keys(draw: st.DrawFn) -> PackKey:
    """Draw the key of a buffer of one chunk or several."""
    N, K, weights = draw(st.integers(1, 5000)), draw(st.integers(1, 1500)), draw(ids)
    aim = draw(st.just(AIM) | st.integers(100_000, LARGEST_U32))
    packer = draw(st.sampled_from(["goi", "rows", "vectors"]))
    if packer == "goi":
        return matrix_key(layout_of(draw(st.sampled_from(list(FORMATS))), N, K, aim), weights)
    if packer == "rows":
        return rows_key((N, K), draw(st.sampled_from(list(STORED_TYPES))), weights, aim)
    return vectors_key(N * K, weights)


def at(offset: int, name: str = "w", **changes: Any) -> bytes:
    """Write down an entry of a page at an offset."""
    return raw_entry(weights=weight(name), chunks=((offset, 4000, 7),), **changes)
