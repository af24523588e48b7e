"""Reads and writes cache files; made from the page `docs/file-format.md` alone, without anything of refinfer.

    python outside.py verify FILE                         check every byte
    python outside.py unpack FILE OUT.npz                 write every tensor as plain numbers
    python outside.py write MODEL FILE --format int8      write a file from a folder with a checkpoint, in any format

From top to bottom: keys and chunks, the tiles of each format, the fingerprint, reading a file, writing one.
"""

import hashlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Sources: TypeAlias = list[tuple[str, int, bytes]]  # name, size and digest of each file that weights come from

PAGE, MAGIC = 4096, b"\x89RWC\r\n\x1a\n"
STORED = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
AIMS = {"f32": 4 << 20, "bf16": 2 << 20, "int8": 1 << 20, "int4": 1179648}
FORMATS = {"goi": tuple(AIMS), "rows": tuple(STORED), "vectors": ("f32",)}
NORMS = ["input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"]
PARTS = [NORMS[0], *(f"self_attn.{letter}_proj" for letter in "qkv"), *NORMS[1:3], "self_attn.o_proj", NORMS[3]]
PARTS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def up(n: int, to: int) -> int:
    return -(-n // to) * to


def text(value: str) -> bytes:
    data = os.fsencode(value)[:65535]
    return struct.pack("<H", len(data)) + data


class Key(NamedTuple):
    """What identifies a buffer."""

    packer: str
    format: str
    shape: tuple[int, ...]
    aim: int
    source: bytes = b""
    name: str = ""

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """nr, kr and sr, and the bytes of a tile."""
        N, K = self.shape[0], self.shape[-1]
        if self.packer == "vectors":
            return 1, 1, 1, 4 * N
        if self.packer == "rows":
            return 1, 1, 1, up(4 + K * np.dtype(STORED[self.format]).itemsize, 4)
        if self.format == "int4":
            most = min(512, max(64, AIMS["int4"] // (36 * up(K, 64) // 64) // 16 * 16))
            nr = 16 * -(-N // (16 * -(-N // most)))
            return nr, 1, 1, nr * 36 * up(K, 64) // 64
        kr = K + K % 2 if self.format == "bf16" else K
        return 16, kr, 1, 16 * {"f32": 4 * kr, "bf16": 2 * kr, "int8": K + 4}[self.format]

    def chunks(self) -> list[tuple[int, int, int, int]]:
        """Return the first tile of each chunk, the one after its last, its offset in the buffer, and its size."""
        n = 1 if self.packer == "vectors" else -(-self.shape[0] // self.tile[0])
        many = min(n, max(1, round(n * self.tile[3] / self.aim)))
        ends = [i * n // many for i in range(many + 1)]
        sizes = [(last - first) * self.tile[3] for first, last in pairwise(ends)]
        at = [0, *accumulate(up(size, PAGE) for size in sizes)]
        return list(zip(ends, ends[1:], at, sizes, strict=False))


def to_bf16(w: Array) -> Array:
    bits = np.ascontiguousarray(w).view(np.uint32)
    return np.where(np.isnan(w), bits >> 16 | 0x40, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def widened(stored: Array) -> Array:
    return (stored.astype("<u4") << 16).view("<f4") if stored.dtype == np.uint16 else stored.astype("<f4")


def joined(*parts: Array) -> Array:
    """Return the bytes of each tile, which has something of each part."""
    return np.hstack([np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in parts])


def pack(key: Key, stored: Array) -> Array:
    """Return the tiles of a tensor, as `[tiles, bytes]`; bf16 is stored as u16."""
    (nr, kr, _, nbytes), N, K = key.tile, key.shape[0], key.shape[-1]
    if key.packer == "vectors":
        return joined(stored[None])
    if key.packer == "rows":
        rows = np.pad(joined(stored), ((0, 0), (0, nbytes - 4 - K * stored.itemsize)))
        return joined(np.array([zlib.crc32(row, n) for n, row in enumerate(rows)], "<u4"), rows)
    w = np.pad(widened(stored), ((0, up(N, nr) - N), (0, 0))).reshape(-1, nr, K)
    if key.format in ("f32", "bf16"):
        w = np.pad(w, ((0, 0), (0, 0), (0, kr - K)))
        return joined(w if key.format == "f32" else to_bf16(w))
    if key.format == "int8":
        s = np.abs(w).max(2) / np.float32(127)
        s[s < 2.0**-126] = 1
        q = np.rint(w / s[:, :, None]).astype(np.int8)
        s.reshape(-1)[N:] = 0  # lanes without a row
        return joined(q, s)
    blocks = np.pad(w, ((0, 0), (0, 0), (0, up(K, 64) - K))).reshape(len(w), nr, -1, 32)
    s = widened(to_bf16(np.abs(blocks).max(3) / np.float32(7)))
    s[s < 2.0**-126] = 1
    q = np.rint(blocks / s[:, :, :, None]).astype(np.int8)
    s = np.where(q.any(3), s, np.float32(0))
    low, high = np.split((q + 8).astype(np.uint8).transpose(0, 2, 3, 1), 2, 1)  # tile, block, column, lane
    return joined(low | high << 4, to_bf16(s.transpose(0, 2, 1)))


def unpack(key: Key, tiles: Array) -> Array:
    """Return the numbers of a tensor."""
    (nr, kr, _, _), N, K = key.tile, key.shape[0], key.shape[-1]
    if key.packer == "vectors":
        w = tiles.view("<f4")[0]
    elif key.packer == "rows":
        sums = [zlib.crc32(row, n) for n, row in enumerate(tiles[:, 4:])]
        require(sums == tiles[:, :4].copy().view("<u4")[:, 0].tolist(), f"a row of {key.name} is damaged")
        w = widened(tiles[:, 4:].copy().view(STORED[key.format])[:, :K])
    elif key.format in ("f32", "bf16"):
        w = widened(tiles.view(STORED[key.format]).reshape(-1, kr))[:N, :K]
    elif key.format == "int8":
        q, s = tiles[:, : nr * K].view(np.int8), tiles[:, nr * K :].copy().view("<f4")
        w = (q.reshape(-1, nr, K) * s[:, :, None]).reshape(-1, K)[:N]
    else:
        half = up(K, 64) // 2 * nr
        both, s = tiles[:, :half].reshape(len(tiles), -1, 32, nr), widened(tiles[:, half:].copy().view("<u2"))
        q = np.concatenate([both & 15, both >> 4], 1).astype(np.int8) - 8
        w = (q * s.reshape(len(tiles), -1, 1, nr)).transpose(0, 3, 1, 2).reshape(len(tiles) * nr, -1)[:N, :K]
    return np.asarray(w)


def buffer_of(key: Key, stored: Array) -> bytes:
    """Return a packed tensor: its chunks, each padded to whole pages."""
    tiles = pack(key, stored)
    chunks = [tiles[first:last].tobytes() for first, last, _, _ in key.chunks()]
    return b"".join(chunk.ljust(up(len(chunk), PAGE), b"\0") for chunk in chunks)


def fingerprint(format: str) -> bytes:
    hashed = []
    for N, K in ((1, 1), (37, 65), (64, 96), (529, 40)):
        z = (np.arange(N * K, dtype=np.uint64) + np.uint64(1 + 2**33)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        w = (((z ^ z >> np.uint64(31)) >> np.uint64(40)) / 2**23 - 1).astype("<f4").reshape(N, K)
        for kind, stored in (("f32", w), ("f16", w.astype("<f2")), ("bf16", to_bf16(w))):
            hashed.append(buffer_of(Key("goi", format, (N, K), AIMS[format]), stored))
            hashed.append(buffer_of(Key("rows", kind, (min(N, 3), K), AIMS["f32"]), stored[:3]))
        hashed.append(buffer_of(Key("vectors", "f32", (N,), AIMS["f32"]), w[:, 0]))
    for N, K in ((4096, 4096), (11008, 4096), (4096, 11008), (128256, 2048)):
        key = Key("goi", format, (N, K), AIMS[format])
        nr, kr, sr, _ = key.tile
        hashed.append(f"TileShape(nr={nr}, kr={kr}, sr={sr}) {key.aim}".encode())
        for first, last, at, size in key.chunks():
            hashed.append(struct.pack("<4Q", first * nr, min(N, last * nr) - first * nr, at, size))
    table = Key("rows", "bf16", (200_000, 1024), AIMS["f32"])
    return sha(*hashed, str([(first, at) for first, _, at, _ in table.chunks()]).encode())


def listed(sources: Sources) -> bytes:
    return b"".join(text(name) + struct.pack("<Q", size) + digest for name, size, digest in sources)


def read(file: bytes) -> Iterator[tuple[Key, Array]]:
    """Yield every tensor of a file, after checking what the page asks for."""
    require(len(file) >= PAGE and file[:8] == MAGIC, "this is not a cache file")
    version, state, model, _, at, size, end = struct.unpack_from("<II32s32sQQQ", file, 8)
    require((version, state, file[160:192]) == (2, 1, sha(file[:160])), "the header is damaged, or the file unfinished")
    require(not any(file[104:128]) and not any(file[192:PAGE]), "the header has something where zeros belong")
    require(at >= PAGE and at % PAGE == 0 and at + size == end == len(file) and size <= 1 << 28, "the size is wrong")
    require(sha(file[at:]) == file[128:160], "the index is damaged")
    place, seen = at, dict[Key, tuple[int, int]]()

    def take(kinds: str) -> tuple[Any, ...]:
        nonlocal place
        place += struct.calcsize("<" + kinds)
        return struct.unpack_from("<" + kinds, file, place - struct.calcsize("<" + kinds))

    def name() -> str:
        return os.fsdecode(take(f"{take('H')[0]}s")[0])

    name(), name()  # of the folder, and of the format: for people
    sources = [(name(), *take("Q32s")) for _ in range(take("I")[0])]
    require(sources == sorted(sources) and sha(listed(sources)) == model, "the model's identity is wrong")
    for _ in range(take("I")[0]):
        packer, format, shape, tile = name(), name(), take(f"{take('B')[0]}Q"), take("3I")
        key = Key(packer, format, shape, take("I")[0], take("32s")[0], name())
        require(format in FORMATS.get(packer, ()) and len(shape) == 2 - (packer == "vectors"), "a key is unknown")
        require(all(1 <= n <= 1 << 48 for n in shape) and key.aim > 0 and key.tile[:3] == tile, "a shape is wrong")
        digest, count = take("32sI")
        found, wanted = [take("QQI") for _ in range(count)], key.chunks()
        require(len(found) == len(wanted), f"{key.name} has another number of chunks")
        start, stop = found[0][0], up(found[-1][0] + found[-1][1], PAGE)
        buffer = file[start:stop]
        chunks = [buffer[at : at + size] for _, _, at, size in wanted]
        checked = [(start + c[2], c[3], zlib.crc32(chunk)) for c, chunk in zip(wanted, chunks, strict=True)]
        require(found == checked and sha(buffer) == digest, f"{key.name} is damaged")
        require(start >= PAGE and start % PAGE == 0 and stop <= at and key not in seen, f"{key.name} is out of place")
        seen[key] = start, stop
        yield key, unpack(key, np.frombuffer(b"".join(chunks), np.uint8).reshape(-1, key.tile[3]))
    require(all(a[1] <= b[0] for a, b in pairwise(sorted(set(seen.values())))), "two buffers overlap")
    require(place == len(file), "something follows the index")


def write(folder: Path, format: str) -> bytes:
    """Return the cache file of a model."""
    stored, source, sources, shards = {}, {}, [], folder / "model.safetensors.index.json"
    files = set(json.loads(shards.read_bytes())["weight_map"].values()) if shards.exists() else {"model.safetensors"}
    for file in sorted(files):
        data = (folder / file).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        sources.append((file, len(data), sha(data)))
        for name, about in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                w = np.frombuffer(data[start + begin : start + end], STORED[about["dtype"].lower()])
                stored[name], source[name] = w.reshape(about["shape"]), sources[-1][2]
    layers = range(sum(name.endswith(".up_proj.weight") for name in stored))
    parts = [f"model.layers.{i}.{part}" for i in layers for part in PARTS]
    vectors = [part + (".bias" if part.endswith("_proj") else ".weight") for part in parts]
    vectors = [name for name in [*vectors, "model.norm.weight"] if name in stored]
    hashed = sha("\n".join(f"{name} {stored[name].size}" for name in vectors).encode()).hex()[:16]
    joint, w = f"{len(vectors)} vectors {hashed}", np.concatenate([widened(stored[name]) for name in vectors])
    packed = [(Key("vectors", "f32", w.shape, AIMS["f32"], sha(listed(sources)), joint), w)]
    matrices = [part + ".weight" for part in parts if part.endswith("_proj")]
    head = [] if json.loads((folder / "config.json").read_bytes()).get("tie_word_embeddings") else ["lm_head.weight"]
    for name in ["model.embed_tokens.weight", *matrices, *head]:
        w, packer, kind, aim = stored[name], "goi", format, AIMS[format]
        if head and "embed" in name:
            packer, kind, aim = "rows", {"<f4": "f32", "<f2": "f16", "<u2": "bf16"}[w.dtype.str], AIMS["f32"]
        packed.append((Key(packer, kind, w.shape, aim, source[name], name), w))
    body, known = bytes(PAGE), dict[Any, int]()
    index = text(str(folder)) + text(format) + struct.pack("<I", len(sources)) + listed(sources)
    index += struct.pack("<I", len(packed))
    for key, w in packed:
        buffer, chunks = buffer_of(key, w), key.chunks()
        begin = known.setdefault((buffer, tuple(size for _, _, _, size in chunks)), len(body))
        body += buffer if begin == len(body) else b""
        index += text(key.packer) + text(key.format) + struct.pack(f"<B{len(w.shape)}Q", len(w.shape), *w.shape)
        index += struct.pack("<4I", *key.tile[:3], key.aim) + key.source + text(key.name)
        index += sha(buffer) + struct.pack("<I", len(chunks))
        for _, _, at, size in chunks:
            index += struct.pack("<QQI", begin + at, size, zlib.crc32(buffer[at : at + size]))
    header = MAGIC + struct.pack("<II", 2, 1) + sha(listed(sources)) + fingerprint(format)
    header += struct.pack("<QQQ24x", len(body), len(index), len(body) + len(index)) + sha(index)
    return header + sha(header) + body[192:] + index


def main(arguments: list[str]) -> None:
    match arguments:
        case ["verify", file]:
            sys.stdout.write(f"{len(list(read(Path(file).read_bytes())))} tensors, and every byte is as it should be\n")
        case ["unpack", file, out]:
            numbers: dict[str, Any] = {key.name: w for key, w in read(Path(file).read_bytes())}
            np.savez(out, **numbers)
        case ["write", folder, file, "--format", format] if format in AIMS:
            Path(file).write_bytes(write(Path(folder), format))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, struct.error) as error:
        sys.exit(f"outside: {error}")
