"""Attacks with files: special ones, and structured ones with something wrong in them, at every name that is read.

Each case is a model folder or a cache file that a program might leave behind or a person might plant. Whatever it is,
a command ends with a promised status and one line, in bounded time and memory, and a start after it is as good as new.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cage import Cases, Ran, command
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import RefinferError
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.model.tokenizer import byte_tokenizer_json, character_tokenizer_json
from refinfer.offload.calibration import blas_name, device_number
from refinfer.packing.layout import TileShape
from refinfer.weight_cache.format import Entry, Index, SourceFile, StoredChunk, encode_file
from refinfer.weight_cache.identity import side_path
from refinfer.weight_cache.key import PackKey, WeightId
from refinfer.weight_cache.mapped_file import read_file
from refinfer.weight_cache.packers import record_nbytes

pytestmark = pytest.mark.attack

CACHE: Final = "built/w.packed"
INDEX: Final = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with every kind of buffer in its cache file: an untied table of rows, matrices, vectors."""
    folder = tmp_path / "m"
    config = replace(SHAPES["tiny"], num_hidden_layers=1, vocab_size=256, tie_word_embeddings=False)
    write_checkpoint(folder, config, dtype="f32", seed=1)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in two shards."""
    folder = tmp_path / "m"
    config = replace(SHAPES["tiny"], num_hidden_layers=1, vocab_size=256, tie_word_embeddings=False)
    write_checkpoint(folder, config, dtype="f32", seed=1, shard_nbytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def generate(model: Path, *options: object) -> Ran:
    place = model.parent / CACHE
    prompt = ("--token-ids", "1,2,3") if "--prompt" not in options else ("abc",)
    given = [option for option in options if option != "--prompt"]
    return command(
        model.parent, "generate", "--model", model, "--weight-cache", place, "--max-tokens", 2, *prompt, *given
    )


def plan(model: Path) -> Ran:
    return command(model.parent, "plan", "--model", model, "--json")


def everything(model: Path) -> Iterator[Ran]:
    """Run every command that reads a model, its cache file or the calibration."""
    folder = model.parent
    yield generate(model)
    yield generate(model, "--prompt")
    yield generate(model, "--budget", "400kB", "--json")
    yield command(folder, "pack", model, "-o", folder / CACHE)
    yield command(folder, "plan", "--model", model)
    yield command(folder, "simulate", "--model", model)
    yield command(folder, "cache", "path", model)
    for action in ("list", "info", "verify"):
        yield command(folder, "cache", action, folder / CACHE, "--json")


def require_civil(runs: Iterator[Ran] | tuple[Ran, ...], about: object) -> list[Ran]:
    done = []
    for ran in runs:
        try:
            ran.require_civil()
        except AssertionError as error:
            raise AssertionError(f"{about}: {error}") from None
        done.append(ran)
    return done


# Special files


def plant(kind: str, path: Path) -> None:
    """Put a special file at `path`, in place of what may be there."""
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name may have at most 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 1 << 40)


SPECIAL: Final = ("FIFO", "folder", "socket", "loop", "endless", "sparse")
INPUTS: Final = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors", INDEX, "shard")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", INPUTS)
def test_a_special_file_in_a_model_folder_is_refused_by_name(name: str, kind: str, sharded: Path) -> None:
    place = next(sharded.glob("*.safetensors")) if name == "shard" else sharded / name
    plant(kind, place)
    ran = generate(sharded)
    require_civil((ran,), (name, kind))
    if (name, kind) == ("model.safetensors", "loop"):  # as if it was not there
        assert ran.status == 0
    elif name == "generation_config.json":
        assert (ran.status, ran.err.count(f"warning: {place}")) == (0, 1)
    else:
        assert ran.status == 2
        assert place.name in ran.err
    if kind in {"FIFO", "endless"}:  # what nobody must wait for
        require_civil(everything(sharded), (name, kind))


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_side_file_or_calibration_counts_as_missing(kind: str, model: Path) -> None:
    home = model.parent / "cache-home" / "refinfer"
    assert generate(model).status == 0
    home.mkdir(parents=True)
    plant(kind, home / "calibration.json")
    plant(kind, side_path(model.parent / CACHE))
    for ran in require_civil((generate(model), generate(model, "--budget", "400kB")), kind):
        assert ran.status == 0, ran.err
    require_civil(everything(model), kind)


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "folder"])
def test_a_special_file_at_the_name_of_a_cache_file_ends_civilly(kind: str, model: Path) -> None:
    home = model.parent / "cache-home" / "refinfer"
    path = Path(command(model.parent, "cache", "path", model).out.strip())
    assert path.parent == home
    home.mkdir(parents=True)
    plant(kind, path)
    folder = model.parent
    listing = [
        command(folder, "cache", action, *where) for action in ("list", "info", "verify") for where in [["--all"]]
    ]
    starts = [command(folder, "generate", "--model", model, "--token-ids", "1", *budget, "--max-tokens", 1)
              for budget in ([], ["--budget", "400kB"])]  # fmt: skip
    require_civil((*listing, *starts), kind)


# Values


def strange(rng: Random) -> Any:
    """Return a JSON value that nobody expects anywhere."""
    return rng.choice(
        [
            None, True, False, 0, 1, -1, 2, 3, 7, 255, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, 1 << 63, 1 << 64,
            10**400, -(10**400), 0.0, -0.0, 0.5, 1e-320, 1e-30, 1e30, 1e38, 1e308, float("inf"), float("-inf"),
            float("nan"), "", "a", "0", "٣", "1_0", "full_attention", "default", "llama3", "x" * 70_000, "\ud800",
            "\0", "\n", "a\nb", "../x", "/dev/zero", "é", "😀", [], [[]], [0], [1, 2], ["a"], [None], {}, {"a": 1},
            {"": []}, [{}], list(range(3000)), {"type": "a"}, {str(i): i for i in range(500)},
        ]
    )  # fmt: skip


def deep(rng: Random) -> str:
    n = rng.choice([50, 900, 990, 5000, 100_000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"b":', "}]")])
    return opened * n + "0" + closed * n


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value within a JSON value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for i, (name, part) in enumerate(parts):
        if i < 40:
            yield from places(part, (*path, name))


HOLE: Final = "\x01hole\x01"


def mutate(rng: Random, value: Any, values: Callable[[Random], Any] = strange) -> Any:
    """Return a JSON value with one place changed: another value, no value, a value too many, the value of another."""
    value = json.loads(json.dumps(value))
    path = rng.choice([p for p in places(value) if p] or [()])
    if not path:
        return values(rng)
    parent = value
    for name in path[:-1]:
        parent = parent[name]
    what = rng.randrange(7)
    if what == 0:
        del parent[path[-1]]
    elif what == 1 and isinstance(parent, dict):
        parent[str(values(rng))[:100]] = values(rng)
    elif what == 2:
        parent[path[-1]] = [parent[path[-1]]] * rng.randrange(3)
    elif what == 3 and isinstance(parent, list):
        parent += parent * rng.randrange(1, 4)
    elif what == 4:
        parent[path[-1]] = HOLE
    elif what == 5 and isinstance(parent[path[-1]], int):
        parent[path[-1]] += rng.choice([-1, 1, 1 << 20, 1 << 40, -(1 << 62)])
    else:
        parent[path[-1]] = values(rng)
    return value


def encode(rng: Random, value: Any) -> bytes:
    """Write a JSON value down, sometimes as no JSON; a hole is filled with what `json` does not write."""
    text = json.dumps(value)
    while json.dumps(HOLE) in text:
        filling = rng.choice([deep(rng), "9" * 5000, "1e999", "-1E-999", "NaN", "01", "1.", "'a'", '"\\ud800"', ""])
        text = text.replace(json.dumps(HOLE), filling, 1)
    data = text.encode("utf-8", "surrogatepass")
    what = rng.randrange(20)
    if what == 0:
        return b"\xef\xbb\xbf" + data
    if what == 1:
        return text.encode("utf-16")
    if what == 2:
        return data[: rng.randrange(len(data) + 1)]
    if what == 3:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.randbytes(rng.randrange(1, 4)) + data[at:]
    if what == 4:
        return deep(rng).encode()
    if what == 5 and text.startswith("{"):  # every key twice
        return ("{" + text[1:-1] + "," + text[1:] if len(text) > 2 else text).encode()
    return data


def mutated(rng: Random, value: Any, values: Callable[[Random], Any] = strange) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        value = mutate(rng, value, values)
    return encode(rng, value)


# Models


CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"]},
    "qwen3": {"attention_bias": False, "sliding_window": None, "layer_types": ["full_attention"]},
}
SCALING: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_any_config_gives_a_run_or_one_line(cases: Cases, model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    for rng in cases:
        (model / "generation_config.json").unlink(missing_ok=True)
        family = rng.choice(list(CONFIGS))
        config = raw | {"model_type": family} | CONFIGS[family]
        config |= rng.choice([{}, {"rope_scaling": SCALING}, {"rope_parameters": SCALING | {"rope_theta": 1e4}}])
        if rng.random() < 0.2:
            (model / "config.json").write_text(json.dumps(config))
            about = mutated(rng, {"eos_token_id": rng.choice([1, [1, 2]])})
            (model / "generation_config.json").write_bytes(about)
        else:
            about = mutated(rng, config)
            (model / "config.json").write_bytes(about)
        run = rng.choice([generate, plan])
        require_civil((run(model),), about[:3000])


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def sizes(rng: Random) -> Any:
    return rng.choice(
        [*[strange(rng)] * 3, "F16", "F64", "BOOL", "I64", "F8_E4M3", "F4", [256, 64], [64], [1 << 40, 0], [0, 1 << 62]]
    )


def test_any_safetensors_header_gives_a_run_or_one_line(cases: Cases, model: Path) -> None:
    path = model / "model.safetensors"
    raw, data = header_of(path)
    for rng in cases:
        header = mutated(rng, raw | rng.choice([{}, {"__metadata__": {"format": "pt"}}]), sizes)
        length = rng.choice([len(header)] * 8 + [0, 1, len(header) - 1, len(header) + 1, 1 << 62, 1 << 64])
        rest = rng.choice([data] * 8 + [data[:-1], data + b"\0", b"", data[: len(data) // 2]])
        path.write_bytes(struct.pack("<Q", length % (1 << 64)) + header + rest)
        require_civil(
            (generate(model, *rng.choice([(), ("--budget", "400kB"), ("--weight-cache", "off")])),), header[:3000]
        )


def test_a_safetensors_header_of_any_length_takes_little_memory_and_time(model: Path) -> None:
    path = model / "model.safetensors"
    for n in (7_900_000, 9_000_000, 90_000_000):
        for unit in (b'"%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},', b'"%d":[],', b'"%d":{},'):
            header = bytearray(b"{")
            number = 0
            while len(header) < min(n, 9_000_000):
                header += unit % number
                number += 1
            header[-1:] = b"}"
            header += b" " * (n - len(header))
            path.write_bytes(struct.pack("<Q", len(header)) + header)
            ran = generate(model)
            require_civil((ran,), (n, unit))
            assert ran.status == 2, ran.err


def test_an_index_of_any_length_takes_little_memory_and_time(sharded: Path) -> None:
    for n in (990_000, 15_900_000):
        for unit in (b"[],", b'{"a":[]},'):
            (sharded / INDEX).write_bytes(b'{"x":[' + (unit * (n // len(unit)))[:-1] + b"]}")
            ran = generate(sharded)
            require_civil((ran,), (n, unit))
            assert ran.status == 2, ran.err
            assert INDEX in ran.err


def test_any_index_gives_a_run_or_one_line(cases: Cases, sharded: Path) -> None:
    path = sharded / INDEX
    raw = json.loads(path.read_text())
    names = [file.name for file in sharded.glob("*.safetensors")]

    def value(rng: Random) -> Any:
        return rng.choice([strange(rng), *names, ".", "..", "./" + names[0], "\0", "config.json", "x" * 5000, "~"])

    for rng in cases:
        path.write_bytes(mutated(rng, raw, value))
        require_civil((generate(sharded),), path.read_bytes()[:3000])


# Tokenizers


def tokenizer_files() -> list[dict[str, Any]]:
    """Return a file of every kind that the package reads, with the parts that real models use."""
    letters = {c: i for i, c in enumerate("abcdefgh ▁#")} | {"ab": 11, "##b": 12, "<unk>": 13, "<s>": 14}
    inner = [
        models.BPE(letters, [("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        models.WordPiece(letters, unk_token="<unk>"),
        models.WordLevel(letters, unk_token="<unk>"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5), ("▁", -3.0)], 0, byte_fallback=False),
    ]
    files = []
    for i, of in enumerate(inner):
        made = Tokenizer(of)
        made.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace("x", "a"), normalizers.Prepend("▁"), normalizers.Strip(),
             normalizers.BertNormalizer(), normalizers.Lowercase()]
        )  # fmt: skip
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Digits(), pre_tokenizers.Metaspace(),
             pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)][: i + 2]
        )  # fmt: skip
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
             decoders.WordPiece(), decoders.ByteLevel(), decoders.CTC(), decoders.BPEDecoder()][: i * 2 + 2]
        )  # fmt: skip
        made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 14)])
        made.add_special_tokens(["<s>"])
        made.enable_truncation(5)
        made.enable_padding(length=9)
        files.append(json.loads(made.to_str()))
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$|\\p{L}+"}, "behavior": "Isolated", "invert": False}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}
    files.append(files[0] | {"pre_tokenizer": pattern})
    files.append(files[3] | {"normalizer": charsmap})
    return [*files, byte_tokenizer_json(), character_tokenizer_json("abc \n")]


def test_any_tokenizer_gives_a_run_or_one_line(cases: Cases, model: Path) -> None:
    files = tokenizer_files()

    def value(rng: Random) -> Any:
        texts = ["(", "(a*)*b", "[", "(?<=a+)b", "\\p{Foo}", "a{1,100000}", "<unk>", "▁", "ALQ=", "!!!", "Sequence"]
        return rng.choice([strange(rng), strange(rng), *texts, rng.randbytes(40).hex()])

    for rng in cases:
        (model / "tokenizer.json").write_bytes(mutated(rng, rng.choice(files), value))
        require_civil((generate(model, "--prompt"), generate(model)), (model / "tokenizer.json").read_bytes()[:3000])


# The cache file, its side file, the calibration


def cache_file_of(model: Path) -> tuple[Path, bytes, int, Index]:
    """Build a cache file; return its place, its bytes, where its index begins, and its index."""
    assert generate(model).status == 0
    path = model.parent / CACHE
    header, index = read_file(path)
    return path, path.read_bytes(), header.index_offset, index


def consistent(index: Index, data: bytearray) -> bytes:
    """Return the bytes of a cache file with this index and these contents, every digest and checksum made right."""
    entries = []
    for entry in index.entries:
        chunks = tuple(replace(c, checksum=zlib.crc32(data[c.offset : c.offset + c.nbytes])) for c in entry.chunks)
        digest = hashlib.sha256(data[entry.offset : entry.offset + entry.padded_nbytes]).digest()
        entries.append(replace(entry, chunks=chunks, digest=digest))
    encoded, header = encode_file(replace(index, entries=tuple(entries)), len(data))
    return header + bytes(data[PAGE_BYTES:]) + encoded


def another_number(rng: Random, n: int, most: int = (1 << 64) - 1) -> int:
    return min(most, max(0, rng.choice([0, 1, n - 1, n + 1, n * 2, n // 2, PAGE_BYTES, n + PAGE_BYTES, 1 << 31, most])))


def another_key(rng: Random, key: PackKey, others: list[PackKey]) -> PackKey:
    other = rng.choice(others)
    shape = list(key.shape)
    i = rng.randrange(len(shape))
    shape[i] = another_number(rng, shape[i])
    changes: list[dict[str, Any]] = [
        {"shape": tuple(shape)},
        {"shape": key.shape[::-1]},
        {"shape": other.shape},
        {"format": rng.choice(["f32", "f16", "bf16", "int8", "int4", ""])},
        {"packer": rng.choice(["goi", "rows", "vectors", "x"])},
        {"chunk_nbytes": another_number(rng, key.chunk_nbytes, (1 << 32) - 1)},
        {"tile": TileShape(*(rng.choice([1, 2, 16, 64, 1 << 31]) for _ in range(3)))},
        {"weights": WeightId(rng.choice([bytes(32), other.weights.source]), other.weights.name)},
        {"weights": WeightId(key.weights.source, rng.choice(["", "x" * 60_000, "a\nb", "é"]))},
    ]
    return replace(key, **rng.choice(changes))


def another_entry(rng: Random, entry: Entry, entries: list[Entry]) -> Entry:
    chunks, other = list(entry.chunks), rng.choice(entries)
    i = rng.randrange(len(chunks))
    what = rng.randrange(7)
    if what < 3:
        return replace(entry, key=another_key(rng, entry.key, [e.key for e in entries]))
    if what == 3:
        return replace(entry, chunks=other.chunks, digest=other.digest)
    if what == 4:
        return replace(entry, chunks=entry.chunks * 2)
    name = rng.choice(["offset", "nbytes"])
    number = {name: another_number(rng, getattr(chunks[i], name))}
    chunks[i] = rng.choice([StoredChunk(0, 0, 0), *[replace(chunks[i], **number)] * 4])
    return replace(entry, chunks=tuple(chunks))


def another_cache_file(rng: Random, data: bytearray, index: Index) -> bytes:
    """Return a cache file in which something is wrong that no digest shows."""
    entries = list(index.entries)
    what = rng.randrange(6)
    if what <= 1:  # contents
        entry = rng.choice(entries)
        start, nbytes = entry.offset, entry.chunks[-1].offset + entry.chunks[-1].nbytes - entry.offset
        at = start + rng.randrange(nbytes)
        n = rng.choice([1, 4, 100, nbytes])
        new = rng.choice([bytes(n), b"\xff" * n, b"\x7f\x80\0\0" * n, rng.randbytes(n)])
        data[at : min(at + n, start + nbytes)] = new[: min(n, start + nbytes - at)]
        if entry.key.packer == "rows" and rng.random() < 0.5:  # and the checksums of the rows
            size = record_nbytes(entry.key)
            for row in range(entry.key.shape[0]):
                record = start + row * size
                data[record : record + 4] = struct.pack("<I", zlib.crc32(data[record + 4 : record + size], row))
        return consistent(index, data)
    if what == 2:
        i = rng.randrange(len(entries))
        entries[i] = another_entry(rng, entries[i], entries)
    elif what == 3:
        rng.shuffle(entries)
        del entries[rng.randrange(len(entries)) :]
    elif what == 4:
        entries.insert(rng.randrange(len(entries)), another_entry(rng, rng.choice(entries), entries))
    about = index.provenance
    if what == 5:
        sources = rng.choice([(), about.sources * 2, (SourceFile("x" * 60_000, 1 << 63, bytes(32)),)])
        about = rng.choice(
            [
                replace(about, model="x" * 70_000),
                replace(about, model="\n\x1b[31m"),
                replace(about, format=rng.choice(["", "f64", "int8", "x" * 60_000])),
                replace(about, sources=sources),
                replace(about, packers=bytes(32)),
            ]
        )
    encoded, header = encode_file(Index(about, tuple(entries)), len(data))
    return header + bytes(data[PAGE_BYTES:]) + encoded


def test_any_consistent_cache_file_serves_its_model_or_is_rebuilt_once(cases: Cases, model: Path) -> None:
    path, data, index_offset, index = cache_file_of(model)
    sidecar = side_path(path).read_bytes()
    for rng in cases:
        try:
            bad = another_cache_file(rng, bytearray(data[:index_offset]), index)
        except (RefinferError, struct.error, ValueError, OverflowError):
            continue  # no file can say that
        path.unlink(missing_ok=True)
        path.write_bytes(bad)
        side_path(path).unlink(missing_ok=True)
        side_path(path).write_bytes(sidecar)
        folder, budget = model.parent, rng.choice([(), ("--budget", "400kB")])
        looks = [
            command(folder, "cache", action, path, *rng.choice([(), ("--json",)])) for action in ("info", "verify")
        ]
        first, second = generate(model, *budget), generate(model, *budget)
        seed = cases.seed
        require_civil((*looks, first, second), seed)
        assert second.status == 0, f"{seed}: {first.err} {second.err}"
        if first.status:
            assert budget or "damaged" in first.err, f"{seed}: {first.err}"


def test_any_side_file_costs_one_hashing_at_most(cases: Cases, model: Path) -> None:
    path, *_ = cache_file_of(model)
    side = side_path(path)
    raw = json.loads(side.read_bytes())
    for rng in cases:
        side.unlink(missing_ok=True)
        side.write_bytes(mutated(rng, raw))
        about = side.read_bytes()[:3000]
        show = command(model.parent, "cache", rng.choice(["info", "list"]), path, *rng.choice([(), ("--json",)]))
        run = generate(model, *rng.choice([(), ("--json",)]))
        require_civil((show, run), about)
        assert run.status == 0, (about, run.err)
        if run.out.startswith("{"):
            assert json.loads(run.out)["weight_cache"]["state"] == "loaded", about
        json.loads(show.out, parse_constant=pytest.fail) if show.out.startswith(("{", "[")) else None


def test_any_calibration_is_used_or_ignored(cases: Cases, model: Path) -> None:
    assert generate(model).status == 0
    home = model.parent / "cache-home" / "refinfer"
    home.mkdir(parents=True, exist_ok=True)
    seconds = {name: {"1": 1e-10, "8": 2e-10} for name in ("f32", "bf16", "int8", "int4")}
    raw = {
        "version": 1,
        "devices": {device_number(model): {"bandwidth": {"1": 1e9, "2": 2e9}, "latency_s": 1e-4}},
        "processors": {blas_name(): {"seconds_per_byte": seconds, "call_s": 1e-6}},
    }
    place = ("--weight-cache", model.parent / CACHE)
    runs = [
        ("generate", "--model", model, "--token-ids", "1", "--max-tokens", 2, "--budget", "400kB", *place),
        ("plan", "--model", model),
        ("simulate", "--model", model, "--json"),
        ("plan", "--shape", "stories15m", "--json"),
    ]
    for rng in cases:
        (home / "calibration.json").write_bytes(mutated(rng, raw))
        about = (home / "calibration.json").read_bytes()[:3000]
        run = command(model.parent, *rng.choice(runs))
        require_civil((run,), about)
        assert run.status == 0, (about, run.err)


# Arguments


def test_any_argument_gives_a_run_or_one_line(cases: Cases, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "here").mkdir()
    monkeypatch.chdir(model.parent / "here")  # a cache file may have any of these names
    texts = ["", "0", "-1", "1", "٣", "१", "1_0", "nan", "inf", "-inf", "1e999", "1e-999", "9" * 5000, "x" * 70_000,
             "40%", "٤٠%", "５０MB", "1e3", "0x10", "+5", " 5 ", "5\n", "1.5", ".5", "5.", "1,2", "1,,2", "auto",
             "AUTO", "9" * 400 + "TB", "1" + "0" * 30, "é" * 3000, "\udcff", "--json", "300MB", "NaN%", "1٫5MB", "--",
             "-", "1,2," * 20_000]  # fmt: skip
    options = ["--budget", "--max-tokens", "--seed", "--temperature", "--top-k", "--top-p", "--threads", "--token-ids",
               "--weights", "--plan", "--prefetch-threads", "--prefetch-ring", "--disk-bandwidth", "--weight-cache",
               "--positions", "--shape", "--device", "--nonsense", "--model"]  # fmt: skip
    for rng in cases:
        name = rng.choice(["generate", "generate", "plan", "simulate", "pack", "cache", "doctor", "x" * 70_000])
        given = ["--model", str(model)] if name in {"generate", "plan", "simulate"} else []
        for _ in range(rng.choice([1, 1, 2])):
            given += [rng.choice(options), rng.choice(texts)]
        if name == "generate":
            given += rng.choice([[], ["--max-tokens", "2"], [rng.choice(texts)]])
        require_civil((command(model.parent, name, *given, seconds=40),), (name, [word[:200] for word in given]))


def test_the_cage_of_this_module_lets_a_sound_model_run(model: Path) -> None:
    shutil.copy(model / "config.json", model / "copy.json")
    for ran in require_civil(everything(model), "sound"):
        assert ran.status in (0, 2), ran.err
