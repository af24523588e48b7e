"""Reads and writes cache files; made from the page `docs/file-format.md` alone, without anything of refinfer.

python outside.py verify FILE                         check every byte
python outside.py unpack FILE OUT.npz                 write every tensor as plain numbers
python outside.py write MODEL FILE --format int8      write a file from a folder with a checkpoint, in any format
"""

import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

PAGE, MAGIC = 4096, b"\x89RWC\r\n\x1a\n"
STORED = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
AIMS = {"f32": 4 << 20, "bf16": 2 << 20, "int8": 1 << 20, "int4": 1179648}
FORMATS = {"goi": tuple(AIMS), "rows": tuple(STORED), "vectors": ("f32",)}
ATTENTION = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")]
PARTS = ["input_layernorm", *ATTENTION, "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def up(n: int, to: int) -> int:
    return -(-n // to) * to


def text(value: str) -> bytes:
    data = os.fsencode(value)[:65535]
    return struct.pack("<H", len(data)) + data


def to_bf16(w: Array) -> Array:
    bits = np.ascontiguousarray(w).view(np.uint32)
    return np.where(np.isnan(w), bits >> 16 | 0x40, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def widened(stored: Array) -> Array:
    return (stored.astype("<u4") << 16).view("<f4") if stored.dtype == np.uint16 else stored.astype("<f4")


class Key(NamedTuple):  # what identifies a buffer
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
        if self.packer != "goi":
            return 1, 1, 1, 4 * N if self.packer == "vectors" else 4 + up(K * np.dtype(STORED[self.format]).itemsize, 4)
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

    def pack(self, stored: Array) -> bytes:
        """Return the buffer of a tensor: its chunks, each padded to whole pages; bf16 is stored as u16."""
        (nr, kr, _, nbytes), N, K = self.tile, self.shape[0], self.shape[-1]
        columns = up(K, 64) if self.format == "int4" else kr
        parts: list[Any] = [[stored]]  # what each tile has something of
        if self.packer == "rows":
            rows = [row.tobytes().ljust(nbytes - 4, b"\0") for row in stored]
            parts = [[struct.pack("<I", zlib.crc32(row, n)) for n, row in enumerate(rows)], rows]
        elif self.packer == "goi":
            w = np.pad(widened(stored), ((0, -N % nr), (0, columns - K))).reshape(-1, nr, columns)
            parts = [to_bf16(w) if self.format == "bf16" else w]
            if self.format == "int8":
                s = np.abs(w).max(2) / np.float32(127)
                s[s < 2.0**-126] = 1
                parts = [np.rint(w / s[:, :, None]).astype(np.int8), s]
                s.reshape(-1)[N:] = 0  # lanes without a row
            if self.format == "int4":
                blocks = w.reshape(len(w), nr, -1, 32)
                s = widened(to_bf16(np.abs(blocks).max(3) / np.float32(7)))
                s[s < 2.0**-126] = 1
                q = np.rint(blocks / s[:, :, :, None]).astype(np.int8)
                low, high = np.split((q + 8).astype(np.uint8).transpose(0, 2, 3, 1), 2, 1)  # tile, block, column, lane
                parts = [low | high << 4, to_bf16((s * q.any(3)).transpose(0, 2, 1))]
        tiles = [b"".join(map(bytes, tile)) for tile in zip(*parts, strict=True)]
        return b"".join(b"".join(tiles[a:b]).ljust(up(size, PAGE), b"\0") for a, b, _, size in self.chunks())

    def unpack(self, buffer: bytes) -> Any:
        """Return the numbers of a tensor."""
        chunks = [buffer[at : at + size] for _, _, at, size in self.chunks()]
        tiles = np.frombuffer(b"".join(chunks), np.uint8).reshape(-1, self.tile[3])
        (nr, kr, _, _), N, K = self.tile, self.shape[0], self.shape[-1]
        if self.packer == "vectors":
            return tiles[0].view("<f4")
        if self.packer == "rows":
            sums = [zlib.crc32(row, n) for n, row in enumerate(tiles[:, 4:])]
            require(sums == tiles[:, :4].copy().view("<u4")[:, 0].tolist(), f"a row of {self.name} is damaged")
            return widened(tiles[:, 4:].copy().view(STORED[self.format])[:, :K])
        if self.format == "int8":
            q, s = tiles[:, : nr * K].view(np.int8), tiles[:, nr * K :].copy().view("<f4")
            return (q.reshape(-1, nr, K) * s[:, :, None]).reshape(-1, K)[:N]
        if self.format == "int4":
            both, s = np.split(tiles, [up(K, 64) // 2 * nr], axis=1)
            q = np.concatenate([both & 15, both >> 4], 1).reshape(len(tiles), -1, 32, nr).astype(np.int8) - 8
            s = widened(s.copy().view("<u2")).reshape(len(tiles), -1, 1, nr)
            return (q * s).transpose(0, 3, 1, 2).reshape(len(tiles) * nr, -1)[:N, :K]
        return widened(tiles.view(STORED[self.format]).reshape(-1, kr))[:N, :K]


def fingerprint(format: str) -> bytes:
    hashed = []
    for N, K in ((1, 1), (37, 65), (64, 96), (529, 40)):
        z = (np.arange(N * K, dtype=np.uint64) + np.uint64(1 + 2**33)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        w = (((z ^ z >> np.uint64(31)) >> np.uint64(40)) / 2**23 - 1).astype("<f4").reshape(N, K)
        for kind, stored in (("f32", w), ("f16", w.astype("<f2")), ("bf16", to_bf16(w))):
            hashed.append(Key("goi", format, (N, K), AIMS[format]).pack(stored))
            hashed.append(Key("rows", kind, (min(N, 3), K), AIMS["f32"]).pack(stored[:3]))
        hashed.append(Key("vectors", "f32", (N,), AIMS["f32"]).pack(w[:, 0]))
    for N, K in ((4096, 4096), (11008, 4096), (4096, 11008), (128256, 2048)):
        key = Key("goi", format, (N, K), AIMS[format])
        nr, kr, sr, _ = key.tile
        hashed.append(f"TileShape(nr={nr}, kr={kr}, sr={sr}) {key.aim}".encode())
        hashed += [struct.pack("<4Q", a * nr, min(N, b * nr) - a * nr, at, size) for a, b, at, size in key.chunks()]
    table = Key("rows", "bf16", (200_000, 1024), AIMS["f32"])
    return sha256(b"".join([*hashed, str([(first, at) for first, _, at, _ in table.chunks()]).encode()])).digest()


def read(file: bytes) -> Iterator[tuple[Key, Any]]:
    """Yield every tensor of a file, after checking what the page asks for."""
    require(len(file) >= PAGE and file[:8] == MAGIC, "this is not a cache file")
    version, state, model, _, at, size, end = struct.unpack_from("<II32s32sQQQ", file, 8)
    require(file[160:192] == sha256(file[:160]).digest() and not any(file[192:PAGE]), "the header is damaged")
    require((version, state, any(file[104:128])) == (2, 1, False), "the header is of another version, or unfinished")
    require(at >= PAGE and at % PAGE == 0 and at + size == end == len(file) and size <= 1 << 28, "the size is wrong")
    require(file[128:160] == sha256(file[at:]).digest(), "the index is damaged")
    index, seen = io.BytesIO(file[at:]), dict[Key, tuple[int, int]]()

    def take(kinds: str) -> tuple[Any, ...]:
        return struct.unpack("<" + kinds, index.read(struct.calcsize("<" + kinds)))

    def name() -> str:
        return os.fsdecode(take(f"{take('H')[0]}s")[0])

    name(), name()  # of the folder, and of the format: for people
    many, first = *take("I"), at + index.tell()
    sources = [(name(), *take("Q32s")) for _ in range(many)]
    identity = sha256(file[first : at + index.tell()]).digest()
    require(sources == sorted(sources) and identity == model, "the model's identity is wrong")
    for _ in range(take("I")[0]):
        packer, format, shape, tile = name(), name(), take(f"{take('B')[0]}Q"), take("3I")
        key = Key(packer, format, shape, take("I")[0], take("32s")[0], name())
        require(format in FORMATS.get(packer, ()) and len(shape) == 2 - (packer == "vectors"), "a key is unknown")
        require(all(1 <= n <= 1 << 48 for n in shape) and key.aim > 0 and key.tile[:3] == tile, "a shape is wrong")
        digest, count = take("32sI")
        found = [take("QQI") for _ in key.chunks()]
        start, stop = found[0][0], up(found[-1][0] + found[-1][1], PAGE)
        buffer = file[start:stop]
        checked = [(start + at, size, zlib.crc32(buffer[at : at + size])) for _, _, at, size in key.chunks()]
        require((count, found, digest) == (len(found), checked, sha256(buffer).digest()), f"{key.name} is damaged")
        require(start >= PAGE and start % PAGE == 0 and stop <= at and key not in seen, f"{key.name} is out of place")
        seen[key] = start, stop
        yield key, key.unpack(buffer)
    require(all(a[1] <= b[0] for a, b in pairwise(sorted(set(seen.values())))), "two buffers overlap")
    require(not index.read(), "something follows the index")


def write(folder: Path, format: str) -> bytes:
    """Return the cache file of a model."""
    stored, source, listed, shards = {}, {}, b"", folder / "model.safetensors.index.json"
    files = set(json.loads(shards.read_bytes())["weight_map"].values()) if shards.exists() else {"model.safetensors"}
    for file in sorted(files):
        data = (folder / file).read_bytes()
        start, digest = 8 + int.from_bytes(data[:8], "little"), sha256(data).digest()
        listed += text(file) + struct.pack("<Q", len(data)) + digest
        for name, about in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                w = np.frombuffer(data[start + begin : start + end], STORED[about["dtype"].lower()])
                stored[name], source[name] = w.reshape(about["shape"]), digest
    layers = range(sum(name.endswith(".up_proj.weight") for name in stored))
    parts = [*(f"model.layers.{i}.{part}" for i in layers for part in PARTS), "model.norm"]
    vectors = [part + end for part in parts for end in (".weight", ".bias") if np.ndim(stored.get(part + end, 0)) == 1]
    hashed = sha256("\n".join(f"{name} {stored[name].size}" for name in vectors).encode()).hexdigest()[:16]
    identity, joint = sha256(listed).digest(), f"{len(vectors)} vectors {hashed}"
    w = np.concatenate([widened(stored[name]) for name in vectors])
    packed = [(Key("vectors", "f32", w.shape, AIMS["f32"], identity, joint), w)]
    head = [] if json.loads((folder / "config.json").read_bytes()).get("tie_word_embeddings") else ["lm_head.weight"]
    for name in ["model.embed_tokens.weight", *(part + ".weight" for part in parts if "_proj" in part), *head]:
        w, packer, kind, aim = stored[name], "goi", format, AIMS[format]
        if head and "embed" in name:
            packer, kind, aim = "rows", {"<f4": "f32", "<f2": "f16", "<u2": "bf16"}[w.dtype.str], AIMS["f32"]
        packed.append((Key(packer, kind, w.shape, aim, source[name], name), w))
    body, known = bytes(PAGE), dict[Any, int]()
    index = text(str(folder)) + text(format) + struct.pack("<I", len(files)) + listed + struct.pack("<I", len(packed))
    for key, w in packed:
        buffer, chunks = key.pack(w), key.chunks()
        begin = known.setdefault((buffer, tuple(size for _, _, _, size in chunks)), len(body))
        body += buffer if begin == len(body) else b""
        shape = struct.pack(f"<B{w.ndim}Q4I", w.ndim, *w.shape, *key.tile[:3], key.aim)
        index += text(key.packer) + text(key.format) + shape + key.source + text(key.name)
        index += sha256(buffer).digest() + struct.pack("<I", len(chunks))
        for _, _, at, size in chunks:
            index += struct.pack("<QQI", begin + at, size, zlib.crc32(buffer[at : at + size]))
    header = MAGIC + struct.pack("<II", 2, 1) + identity + fingerprint(format)
    header += struct.pack("<QQQ24x", len(body), len(index), len(body) + len(index)) + sha256(index).digest()
    return header + sha256(header).digest() + body[192:] + index


def main(arguments: list[str]) -> None:
    match arguments:
        case ["verify", file]:
            sys.stdout.write(f"{len(list(read(Path(file).read_bytes())))} tensors, and every byte is as it should be\n")
        case ["unpack", file, out]:
            np.savez(out, **{key.name: w for key, w in read(Path(file).read_bytes())})
        case ["write", folder, file, "--format", format] if format in AIMS:
            Path(file).write_bytes(write(Path(folder), format))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, struct.error) as error:
        sys.exit(f"outside: {error}")
