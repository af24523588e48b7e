"""Specifies the side file of `refinfer.weight_cache.identity`: it saves hashing, and is believed or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_site import Site, come_to_rest, noted
from refinfer.weight_cache.format import Provenance, SourceFile
from refinfer.weight_cache.identity import SIDE_FILE_BEGINS, Record, SideFile, Stat, believed, side_path
from refinfer.weight_cache.ownership import require_replaceable

SHAPE = (257, 192)  # reaches beyond the first 64 KiB
NBYTES = 4 * SHAPE[0] * SHAPE[1]


@pytest.fixture
def model(tmp_path: Path) -> Site:
    """A model of two buffers in one file, without a cache file yet."""
    return Site.make(tmp_path, SHAPE, ("a", "norm"))


@pytest.fixture
def model_at_rest(model: Site) -> Site:
    """A model with a cache file, whose side file is believed."""
    come_to_rest(model.source)
    assert model.open_checked().outcome.reason is not None
    return model


def edited(data: bytes, change: Callable[[Any], object]) -> bytes:
    raw = json.loads(data)
    change(raw)
    return json.dumps(raw).encode()


def in_record(what: str, value: object) -> Callable[[bytes], bytes]:
    """Return what changes a field of a side file's record; those of `Stat` too."""

    def change(raw: Any) -> None:
        record = raw["records"][0]
        (record if what in record else record["stat"])[what] = value

    return lambda data: edited(data, change)


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "cut short": lambda data: data[:-10],
    "half": lambda data: data[: len(data) // 2],
    "no text": lambda data: b"\xff\xfe" + data,
    "two of it": lambda data: data + data,
    "a list": lambda data: b"[]",
    "a number": lambda data: b"1",
    "a string": lambda data: b'"records"',
    "null": lambda data: b"null",
    "an empty object": lambda data: b"{}",
    "nested deeply": lambda data: b"[" * 200_000 + b"]" * 200_000,
    "a number of many digits": lambda data: b'{"records": [], "packing_s": ' + b"1" * 10_000 + b"}",
    "no packing time": lambda data: edited(data, lambda raw: raw.pop("packing_s")),
    "no records": lambda data: edited(data, lambda raw: raw.pop("records")),
    "records are a number": lambda data: edited(data, lambda raw: raw.update(records=1)),
    "records are an object": lambda data: edited(data, lambda raw: raw.update(records={"a": 1})),
    "records are numbers": lambda data: edited(data, lambda raw: raw.update(records=[1, 2])),
    "records are strings": lambda data: edited(data, lambda raw: raw.update(records=["a", "b"])),
    "an empty record": lambda data: edited(data, lambda raw: raw.update(records=[{}])),
    "a record too much": lambda data: edited(data, lambda raw: raw["records"].append({})),
    "a field too few": lambda data: edited(data, lambda raw: raw["records"][0].pop("name")),
    "a field too many": lambda data: edited(data, lambda raw: raw["records"][0].update(more=1)),
    "a field of stat too few": lambda data: edited(data, lambda raw: raw["records"][0]["stat"].pop("head")),
    "a field of stat too many": lambda data: edited(data, lambda raw: raw["records"][0]["stat"].update(more=1)),
    "stat is a list": lambda data: edited(data, lambda raw: raw["records"][0].update(stat=[1, 2, 3, 4, 5])),
    "digest cut short": lambda data: edited(data, lambda raw: raw["records"][0].update(digest="ab" * 31)),
    "digest is no digest": in_record("digest", "xy" * 32),
    "digest is a number": in_record("digest", 1),
    "digest is null": in_record("digest", None),
    "at rest is a string": in_record("at_rest", "yes"),
    "at rest is null": in_record("at_rest", None),
    "at rest is a list": in_record("at_rest", [True]),
    "not at rest": in_record("at_rest", value=False),
    "another name": in_record("name", "other.safetensors"),
    "name is null": in_record("name", None),
    "another size": in_record("size", 1),
    "size is a string": in_record("size", str(NBYTES)),
    "another inode": in_record("inode", 0),
    "another head": in_record("head", "00" * 32),
    "modified never": in_record("mtime_ns", 0),
    "changed never": in_record("ctime_ns", 0),
    "changed at infinity": in_record("ctime_ns", float("inf")),
    "name is a list": in_record("name", ["model.safetensors"]),
    "name is an object": in_record("name", {"a": 1}),
    "size is a fraction": in_record("size", float(NBYTES)),
    "packing time is a string": lambda data: edited(data, lambda raw: raw.update(packing_s="long")),
    "packing time is endless": lambda data: edited(data, lambda raw: raw.update(packing_s=float("inf"))),
    "packing time is no number": lambda data: edited(data, lambda raw: raw.update(packing_s=float("nan"))),
    "packing time is negative": lambda data: edited(data, lambda raw: raw.update(packing_s=-1)),
    "packing time is vast": lambda data: edited(data, lambda raw: raw.update(packing_s=10**400)),
    "too large": lambda data: data + b" " * 1_000_000,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "packing time is a list": lambda data: edited(data, lambda raw: raw.update(packing_s=[1.0], records=[])),
}


@pytest.mark.spec("IDENT-6")
@pytest.mark.parametrize("malform", list(MALFORMED.values()), ids=list(MALFORMED))
def test_a_malformed_side_file_costs_one_hashing_and_nothing_else(
    model: Site, malform: Callable[[bytes], bytes]
) -> None:
    model.open_checked()
    good = noted(model.source).encode()
    side_path(model.cache).write_bytes(good)
    model.open_checked()
    assert model.hashed == 0
    side_path(model.cache).write_bytes(malform(good))
    prepared = model.open_checked()
    assert (prepared.outcome.reason, prepared.outcome.packed_buffers, model.packed) == (None, 0, [])
    assert prepared.outcome.packing_s is None
    assert model.hashed == NBYTES
    (record,) = SideFile.read(side_path(model.cache)).records
    assert record.source == SourceFile("model.safetensors", NBYTES, record.source.digest)


@pytest.mark.spec("IDENT-6")
def test_a_missing_side_file_costs_one_hashing_and_nothing_else(model_at_rest: Site) -> None:
    model = model_at_rest
    side_path(model.cache).unlink()
    for hashed in [NBYTES, 0]:
        prepared = model.open_checked()
        assert (prepared.outcome.reason, prepared.outcome.packed_buffers, model.packed) == (None, 0, [])
        assert model.hashed == hashed


@pytest.mark.spec("IDENT-6", "INPUT-1")
@pytest.mark.parametrize("kind", ["FIFO", "endless"])
def test_a_side_file_that_is_no_regular_file_counts_as_missing(model_at_rest: Site, kind: str) -> None:
    side = side_path(model_at_rest.cache)
    side.unlink()
    if kind == "FIFO":
        os.mkfifo(side)
    else:
        side.symlink_to("/dev/zero")
    prepared = model_at_rest.open_checked()
    assert (prepared.outcome.reason, prepared.outcome.packed_buffers, prepared.outcome.packing_s) == (None, 0, None)
    assert model_at_rest.hashed == NBYTES


@pytest.mark.spec("IDENT-6")
def test_if_the_side_file_cannot_be_written_each_start_hashes_and_loads(model_at_rest: Site) -> None:
    model = model_at_rest
    side_path(model.cache).unlink()
    side_path(model.cache).mkdir()  # what is in its place cannot be replaced
    for _ in range(2):
        prepared = model.open_checked()
        assert (prepared.outcome.reason, prepared.outcome.packed_buffers, prepared.outcome.packing_s) == (None, 0, None)
        assert model.hashed == NBYTES
    assert {path.name for path in model.cache.parent.iterdir()} == {model.cache.name, side_path(model.cache).name}


names = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["\udcff.bin", "a\nb", "model.safetensors"]
)
sizes = st.integers(0, 1 << 63)


@st.composite
def side_files(draw: st.DrawFn) -> SideFile:
    def record() -> Record:
        numbers = [draw(sizes) for _ in range(4)]
        stat = Stat(numbers[0], numbers[1], numbers[2], numbers[3], draw(st.binary(min_size=32, max_size=32)).hex())
        return Record(draw(names), stat, draw(st.binary(min_size=32, max_size=32)).hex(), draw(st.booleans()))

    packing_s = draw(st.none() | st.floats(0, 1e6))
    return SideFile(tuple(record() for _ in range(draw(st.integers(0, 3)))), packing_s)


@pytest.mark.spec("IDENT-6", "OPEN-9")
@given(side=side_files())
def test_a_side_file_is_read_as_it_was_written_and_known_by_how_it_begins(
    side: SideFile, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "side.json"
    path.write_bytes(side.encode())
    assert SideFile.read(path) == side
    require_replaceable(path, SIDE_FILE_BEGINS, "a side file")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
WHERE: Sequence[tuple[str | int, ...]] = [
    (),
    ("packing_s",),
    ("records",),
    ("records", 0),
    *(("records", 0, name) for name in ("name", "stat", "digest", "at_rest")),
    *(("records", 0, "stat", name) for name in ("size", "mtime_ns", "ctime_ns", "inode", "head")),
]


@pytest.mark.spec("IDENT-6")
@given(where=st.sampled_from(WHERE), value=json_values)
def test_whatever_a_side_file_says_it_is_believed_as_it_was_written_or_not_at_all(
    where: tuple[str | int, ...], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    source, path = folder / "believed.bin", folder / "believed.json"
    if not source.exists():
        source.write_bytes(bytes(range(250)) * 4)
    good = noted(source)
    raw = {"": json.loads(good.encode())}
    inside: Any = raw
    for step in ("", *where)[:-1]:
        inside = inside[step]
    inside[("", *where)[-1]] = value
    path.write_text(json.dumps(raw[""]))
    side = SideFile.read(path)
    assert side.packing_s is None or isinstance(side.packing_s, int | float)
    found = believed([source], side)
    known = good.records[0].source
    assert found is None or where == ("packing_s",) or (found[0].name, found[0].nbytes) == (known.name, known.nbytes)
    for identity in found or ():
        assert isinstance(identity.nbytes, int)
        Provenance("model", "int8", (identity,)).model_digest  # noqa: B018 -- it can be taken


@pytest.mark.spec("IDENT-6")
def test_the_side_file_lies_next_to_its_cache_file() -> None:
    assert side_path(Path("folder") / "model-int8.rwc") == Path("folder") / "model-int8.rwc.sources.json"
