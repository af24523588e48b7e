"""Make the golden files of the packing room: packed weights as XNNPACK itself writes them, cut out of its cache files.

    pip install ai-edge-litert==2.3.0 numpy flatbuffers
    python tests/golden/make_xnnpack_goldens.py

Writes `xnnpack/<case>.npz` next to itself, one for each case: `weights` `[N, K]` and `bias` `[N]` as they stood in the
model, `scales` `[N]` when the weights are int8, `packed` (the bytes of the one buffer in the cache file), and `nr`,
`kr`, `sr`. A case is a model of one fully connected layer. LiteRT compiles it with a weight cache, XNNPACK packs the
weights, and the cache file is read here by hand: a header, the buffers, a flatbuffer that lists them.

How wide a tile is depends on the CPU. These files come from an x86 machine with AVX-512 VNNI, without AMX; where
XNNPACK chooses another kernel, the script stops and says so. float32: nr=32, or nr=16 for fewer than 32 rows or where
that wastes fewer. int8 weights with float activations: nr=64, kr=4. Everything is checked before a file is written,
apart from the lanes of missing rows, in which XNNPACK's packers leave what they like.
"""

from __future__ import annotations

import struct
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options
from flatbuffers.number_types import Uint64Flags, UOffsetTFlags
from flatbuffers.table import Table

OUT = Path(__file__).parent / "xnnpack"
LITERT = "2.3.0"
CACHE_VERSION = 4
HEADER = struct.Struct("<QQQB7x")  # version, where the list of buffers starts, its size, stale
BASE = 128  # where the buffers start
NO_ID = 2**64 - 1  # in place of a bias
WEIGHTS, BIAS = 1, 2  # indices of the model's buffers
SR = 1  # no x86 kernel used here shuffles


@dataclass(frozen=True)
class Case:
    """A matrix of `N` outputs and `K` inputs, and the tile that XNNPACK is expected to choose for it."""

    N: int
    K: int
    nr: int
    kr: int = 1
    int8: bool = False

    @property
    def name(self) -> str:
        return f"{'int8' if self.int8 else 'f32'}-{self.N}x{self.K}-nr{self.nr}"

    @property
    def padded_k(self) -> int:
        return -(-self.K // self.kr) * self.kr

    @property
    def tile_nbytes(self) -> int:
        """Per row the weights and a first word; int8 adds a scale and a bias."""
        return self.nr * ((self.padded_k + 12) if self.int8 else 4 * (self.padded_k + 1))

    @property
    def seed(self) -> int:
        """XNNPACK's seed: all the sizes, the extra bytes of a row and the number of the operator, by exclusive or.

        The numbers of the operators are those of this version, as seen in its cache files.
        """
        extra, operator = (8, 83) if self.int8 else (0, 63)
        return self.N ^ self.K ^ self.nr ^ self.kr ^ SR ^ extra ^ operator


CASES = (
    Case(64, 10, nr=32),
    Case(50, 7, nr=32),  # both widths waste 14 rows: the wider one wins
    Case(127, 9, nr=32),  # one row wasted
    Case(5, 3, nr=16),
    Case(20, 7, nr=16),
    Case(40, 5, nr=16),  # wastes 8 rows, where nr=32 would waste 24
    Case(64, 64, nr=64, kr=4, int8=True),
    Case(70, 37, nr=64, kr=4, int8=True),
    Case(5, 3, nr=64, kr=4, int8=True),
)


def require(condition: bool, message: str) -> None:
    """Stop with `message` unless `condition` holds; unlike an assert, always."""
    if not condition:
        raise SystemExit(f"make_xnnpack_goldens: {message}")


def draw_layer(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Draw weights, biases and, for int8, a positive scale for each output; int8 reaches -127 and 127."""
    rng = np.random.default_rng(seed)
    bias = rng.standard_normal(case.N, np.float32)
    if not case.int8:
        return rng.standard_normal((case.N, case.K), np.float32), bias, None
    weights = rng.integers(-127, 128, (case.N, case.K), np.int8)
    weights[0, :2] = -127, 127
    return weights, bias, rng.uniform(0.001, 0.02, case.N).astype(np.float32)


def write_model(weights: np.ndarray, bias: np.ndarray, scales: np.ndarray | None) -> bytes:
    """Return a .tflite model of one fully connected layer, with float inputs and outputs and a batch of one."""
    N, K = weights.shape
    real, code = schema.TensorType.FLOAT32, schema.BuiltinOperator.FULLY_CONNECTED

    def tensor(name: str, shape: tuple[int, ...], kind: int = real, buffer: int = 0, quantization: Any = None) -> Any:
        return schema.TensorT(shape=list(shape), type=kind, buffer=buffer, name=name, quantization=quantization)

    kind, quantization = real, None
    if scales is not None:  # floats in, int8 weights: a "dynamic range" layer
        kind = schema.TensorType.INT8
        quantization = schema.QuantizationParametersT(scale=scales.tolist(), zeroPoint=[0] * N, quantizedDimension=0)
    layer = schema.OperatorT(
        opcodeIndex=0,
        inputs=[0, 1, 2],
        outputs=[3],
        builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions,
        builtinOptions=schema.FullyConnectedOptionsT(),
    )
    graph = schema.SubGraphT(
        name="main",
        tensors=[
            tensor("x", (1, K)),
            tensor("weights", (N, K), kind, WEIGHTS, quantization),
            tensor("bias", (N,), buffer=BIAS),
            tensor("y", (1, N)),
        ],
        inputs=[0],
        outputs=[3],
        operators=[layer],
    )
    model = schema.ModelT(
        version=3,
        operatorCodes=[schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code)],
        subgraphs=[graph],
        buffers=[
            schema.BufferT(data=[]),
            schema.BufferT(data=np.frombuffer(weights.tobytes(), np.uint8)),
            schema.BufferT(data=np.frombuffer(bias.tobytes(), np.uint8)),
        ],
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def build_cache(model: bytes) -> bytes:
    """Let LiteRT compile `model` with a weight cache, and return the cache file."""
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "model.tflite", Path(folder) / "cache"
        path.write_bytes(model)
        options = Options(hardware_accelerators=HardwareAccelerator.CPU)
        options.cpu_options.num_threads = 1
        options.cpu_options.xnnpack_weight_cache_path = str(cache)
        CompiledModel.from_file(str(path), options=options).close()
        require(cache.exists(), "LiteRT wrote no cache file")
        return cache.read_bytes()


def read_number(table: Table, slot: int) -> int:
    """Read field `slot` of a flatbuffer table, a 64-bit number; a field that is not there is 0."""
    return int(table.GetSlot(4 + 2 * slot, 0, Uint64Flags))


def read_vector(table: Table, slot: int) -> tuple[int, int]:
    """Return where the vector in field `slot` starts, and its length."""
    field = table.Offset(4 + 2 * slot)
    require(field != 0, f"the list of buffers has no field {slot}")
    return table.Vector(field), table.VectorLen(field)


def read_cache(cache: bytes, case: Case) -> tuple[bytes, int]:
    """Return the bytes of the one buffer in a cache file, and the fingerprint of the packer; check all the rest."""
    found, start, size, stale = HEADER.unpack_from(cache)
    require(found == CACHE_VERSION and not stale, f"a cache of version {found}, stale {stale}")
    require(start % 128 == 0 and start + size == len(cache), f"a list at {start} of {size}, in {len(cache)} bytes")
    index = cache[start:]
    root = Table(index, UOffsetTFlags.py_type(struct.unpack_from("<I", index)[0]))
    fingerprints, n_fingerprints = read_vector(root, 0)
    buffers, n_buffers = read_vector(root, 1)
    require((n_fingerprints, n_buffers) == (1, 1), f"{n_fingerprints} fingerprints, {n_buffers} buffers")
    require(read_number(root, 2) == BASE, f"buffers start at {read_number(root, 2)}")
    buffer = Table(index, root.Indirect(buffers))
    seed, weights_id, bias_id, offset, nbytes = (read_number(buffer, slot) for slot in range(5))
    require(seed == case.seed, f"{case.name}: a seed of {seed}, not {case.seed}: this CPU has other tiles")
    ids = (WEIGHTS, NO_ID if case.int8 else BIAS)  # the bias of int8 weights comes as extra data
    require((weights_id, bias_id) == ids, f"{case.name}: weights {weights_id}, bias {bias_id}")
    expected = -(-case.N // case.nr) * case.tile_nbytes  # whole 64s, to which XNNPACK would round up
    require((offset, nbytes) == (0, expected), f"{case.name}: {nbytes} bytes at {offset}, not {expected}")
    return cache[BASE : BASE + nbytes], struct.unpack_from("<Q", index, fingerprints)[0]


def check_layout(case: Case, weights: np.ndarray, bias: np.ndarray, scales: np.ndarray | None, packed: bytes) -> None:
    """Look for each number where it belongs, one by one; lanes of missing rows are not looked at."""
    nr, kr, width = case.nr, case.kr, weights.itemsize
    for n in range(case.N):
        tile, j = divmod(n, nr)
        start = tile * case.tile_nbytes
        words = [(start + 4 * j, bias[n] if scales is None else np.int32(-weights[n].sum(dtype=np.int32)))]
        for k in range(case.padded_k):
            step, column = divmod(k, kr)
            value = weights[n, k] if k < case.K else weights.dtype.type(0)
            words.append((start + 4 * nr + ((step * nr + j) * kr + column) * width, value))
        if scales is not None:
            after = start + 4 * nr + nr * case.padded_k
            words += [(after + 4 * j, scales[n]), (after + 4 * nr + 4 * j, bias[n])]
        for at, value in words:
            require(packed[at : at + value.nbytes] == value.tobytes(), f"{case.name}: row {n} is not at byte {at}")


def main() -> None:
    require(version("ai-edge-litert") == LITERT, f"needs ai-edge-litert {LITERT}, not {version('ai-edge-litert')}")
    OUT.mkdir(exist_ok=True)
    total = 0
    for seed, case in enumerate(CASES):
        weights, bias, scales = draw_layer(case, seed)
        packed, fingerprint = read_cache(build_cache(write_model(weights, bias, scales)), case)
        check_layout(case, weights, bias, scales, packed)
        arrays = {"weights": weights, "bias": bias, "packed": np.frombuffer(packed, np.uint8)}
        arrays |= {} if scales is None else {"scales": scales}
        path = OUT / f"{case.name}.npz"
        np.savez_compressed(path, **arrays, nr=np.int64(case.nr), kr=np.int64(case.kr), sr=np.int64(SR))
        total += path.stat().st_size
        print(
            f"{case.name}: {len(packed)} bytes packed, fingerprint {fingerprint:#018x}, {path.stat().st_size} in file"
        )
    require(total < 60_000, f"{total} bytes of golden files are too many")
    print(f"{total} bytes in {len(CASES)} files")


if __name__ == "__main__":
    main()
