"""Specifies `refinfer.prepare`: from a checkpoint to a provider that holds all of it, packed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinfer.clock import RealClock
from refinfer.errors import RequestError, WeightsError
from refinfer.inventory import Inventory
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.folder import open_folder
from refinfer.model.safetensors import SafetensorsFile, TensorSpec, write_safetensors
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer, prefill_block
from refinfer.model.weights import WeightSource
from refinfer.offload.packed_file import PackedFile
from refinfer.offload.store import FileStore
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS, pack_matrix
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.plan import Prefetch, make_plan, smallest_budget
from refinfer.prepare import IN_MEMORY, choose_format, prepare
from refinfer.sources.packed import PackedSource
from refinfer.trace import Recorder
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.load_or_build import Listener, Prepared
from refinfer.weight_cache.mapped_file import NO_FILE, MappedFile, read_file
from refinfer.weight_cache.packers import chunks_of, layout_of_key, padded_nbytes_of, record_nbytes
from refinfer.weight_cache.provider import WeightCacheProvider

WATCHDOG_S = 60

every_format = pytest.mark.parametrize("name", list(FORMATS))


def prepared(
    folder: Path, name: str, where: str | os.PathLike[str] | None, chunk_nbytes: int | None = None
) -> Prepared:
    inventory = Inventory(open_folder(folder).config, name, chunk_nbytes)
    place = None if where is None else os.fspath(where)
    return prepare(inventory, open_checkpoint(folder), place, clock=RealClock())


def path_of(found: Prepared) -> Path:
    """Return the path of the file that was mapped."""
    assert found.mapped is not None
    return found.mapped.path


def check_contents(provider: WeightCacheProvider, folder: Path, inventory: Inventory) -> None:
    """Check that a provider holds what packing each tensor by itself gives, in execution order, and nothing else."""
    checkpoint, shapes = open_checkpoint(folder), inventory.config.tensor_shapes()
    tied = inventory.config.tie_word_embeddings
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    # The block of vectors first, then as tokens use them: `tensor_shapes` begins with the embedding table.
    assert [(key.packer, key.name) for key in provider] == [
        ("vectors", inventory.vectors_name),
        *(("rows" if not tied and name == "model.embed_tokens.weight" else "goi", name) for name in matrices),
    ]
    for key in provider:
        check_buffer(provider, key, folder, inventory)
    layouts = {matrix.name: matrix.layout for matrix in inventory.matrices}
    assert {key.name: layout_of_key(key) for key in provider if key.packer == "goi"} == layouts
    norm = checkpoint.float32("model.norm.weight", shapes["model.norm.weight"])
    block = provider[next(iter(provider))].view(np.float32)
    np.testing.assert_array_equal(block[: sum(inventory.vectors.values())][-norm.size :], norm)


def check_buffer(provider: WeightCacheProvider, key: PackKey, folder: Path, inventory: Inventory) -> None:
    checkpoint, buffer = open_checkpoint(folder), provider[key]
    if key.packer == "vectors":
        expected = np.concatenate([checkpoint.float32(name, (n,)) for name, n in inventory.vectors.items()])
        assert key.shape == expected.shape
        np.testing.assert_array_equal(buffer.view(np.float32)[: expected.size], expected)
        assert not buffer[expected.nbytes :].any()
        return
    shape = (key.shape[0], key.shape[1])
    stored = checkpoint.stored(key.name, shape)
    if key.packer == "rows":
        width, used = record_nbytes(key), shape[1] * stored.itemsize
        rows = buffer[: width * shape[0]].reshape(shape[0], width)[:, 4 : 4 + used]
        assert rows.tobytes() == stored.tobytes()
        return
    layout = layout_of_key(key)
    assert layout.format.name == inventory.format
    packed = pack_matrix(stored, inventory.format, inventory.chunk_nbytes)
    for chunk, alone in zip(layout.chunks, packed.buffers, strict=True):
        np.testing.assert_array_equal(buffer[chunk.offset : chunk.offset + chunk.nbytes], alone)


@pytest.fixture(params=["llama", "llama3-rope", "llama-bias", "mistral", "qwen2", "qwen3"])
def family(request: pytest.FixtureRequest) -> Path:
    """The folder of each family's tiny checkpoint."""
    return Path(__file__).parent / "golden" / str(request.param)


@pytest.mark.spec("PREP-1")
@every_format
@pytest.mark.parametrize("where", [IN_MEMORY, "file"])
def test_a_provider_holds_every_tensor_of_a_model_packed(family: Path, name: str, where: str, tmp_path: Path) -> None:
    inventory = Inventory(open_folder(family).config, name)
    found = prepared(family, name, where if where == IN_MEMORY else tmp_path / "cache")
    check_contents(found.provider, family, inventory)
    assert found.provider.is_finalized()
    assert found.keys == {key.name: key for key in found.provider}
    outcome, nbytes = found.outcome, sum(map(padded_nbytes_of, found.provider))
    assert outcome.held_buffers == outcome.packed_buffers == len(found.provider)
    assert outcome.held_bytes == outcome.packed_bytes == nbytes
    if where != IN_MEMORY:
        again = prepared(family, name, tmp_path / "cache")
        check_contents(again.provider, family, inventory)
        assert again.keys == found.keys
        assert (again.outcome.state, again.outcome.packed_buffers, again.outcome.packed_bytes) == ("loaded", 0, 0)
        assert (again.outcome.held_buffers, again.outcome.held_bytes) == (len(found.provider), nbytes)


@pytest.mark.spec("PREP-1", "SOURCE-3")
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shard_nbytes", [None, 20_000])
def test_a_checkpoint_in_shards_of_any_type_is_held_whole(
    dtype: str, shard_nbytes: int | None, tmp_path: Path, tiny_config: ModelConfig
) -> None:
    write_checkpoint(tmp_path / "m", tiny_config, dtype=dtype, shard_nbytes=shard_nbytes)
    config = open_folder(tmp_path / "m").config
    found = prepared(tmp_path / "m", "int8", tmp_path / "cache")
    check_contents(found.provider, tmp_path / "m", Inventory(config, "int8"))


@pytest.mark.spec("PREP-1")
@settings(max_examples=12)
@given(
    tied=st.booleans(), biases=st.booleans(), V=st.integers(1, 70), D=st.integers(1, 40),
    name=st.sampled_from(list(FORMATS)), chunk_nbytes=st.sampled_from([None, 1, 512, 5000]),
)  # fmt: skip
def test_any_model_is_held_whole_in_chunks_of_any_size(
    tied: bool,
    biases: bool,
    V: int,
    D: int,
    name: str,
    chunk_nbytes: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = replace(
        SHAPES["tiny"], vocab_size=V, hidden_size=D, num_hidden_layers=1, tie_word_embeddings=tied, o_bias=biases
    )
    folder = tmp_path_factory.mktemp("drawn") / "m"
    write_checkpoint(folder, config, dtype="f32")
    inventory = Inventory(config, name, chunk_nbytes)
    for where in (IN_MEMORY, str(folder.with_name("cache"))):
        found = prepare(inventory, open_checkpoint(folder), where, clock=RealClock())
        check_contents(found.provider, folder, inventory)


POSITIONS = 16


def logits_of(source: WeightSource) -> list[bytes]:
    """Return the bits of the logits after a prompt and after one more token, and close the source."""
    transformer = Transformer(source, POSITIONS)
    bits = [transformer.decode(token_ids).tobytes() for token_ids in ([7, 1, 5], [2])]
    source.close()
    return bits


def packed_logits(folder: Path, name: str, where: str, chunk_nbytes: int | None, reason: str | None) -> list[bytes]:
    """Return the logits of weights in memory or mapped; check why they were packed, and the sizes of their chunks."""
    inventory = Inventory(open_folder(folder).config, name, chunk_nbytes)
    found = prepare(inventory, open_checkpoint(folder), where, clock=RealClock())
    assert found.outcome.reason == reason
    assert [chunks_of(found.keys[matrix.name]) for matrix in inventory.matrices] == [
        matrix.layout.chunks for matrix in inventory.matrices
    ]
    most_rows = prefill_block(inventory.config, POSITIONS)
    return logits_of(PackedSource(inventory, found.provider, found.keys, most_rows, RealClock(), found.mapped))


def streamed_logits(folder: Path, name: str, file: Path, chunk_nbytes: int | None) -> list[bytes]:
    """Return the logits of weights that are read from the file within the smallest budget."""
    inventory = Inventory(open_folder(folder).config, name, chunk_nbytes)
    found = prepare(inventory, open_checkpoint(folder), str(file), clock=RealClock())
    found.provider.delete_cache()
    fixed, costs = fixed_of(inventory, POSITIONS), costs_of(inventory, HERE, prefetch_threads=0)
    plan = make_plan("leading", inventory, fixed, smallest_budget(inventory, fixed), costs, Prefetch(0))
    packed = PackedFile(file, inventory, found.keys, FileStore(file))
    most_rows = prefill_block(inventory.config, POSITIONS)
    return logits_of(StreamedSource(packed, plan, Recorder(RealClock()), most_rows))


@pytest.mark.spec("OPEN-4", "OFFLOAD-3")
@every_format
@pytest.mark.parametrize("tied", [True, False])
def test_one_file_holds_chunks_of_two_sizes_and_each_source_uses_its_own(name: str, tied: bool, tmp_path: Path) -> None:
    folder, file = tmp_path / "m", tmp_path / "cache"
    config = replace(SHAPES["tiny"], vocab_size=600, num_hidden_layers=1, tie_word_embeddings=tied)
    write_checkpoint(folder, config, dtype="f32", seed=4)
    one, other = (Inventory(config, name, chunk_nbytes) for chunk_nbytes in (None, 512))
    assert len(other.cycle) > len(one.cycle)
    n_matrices, n_buffers = len(one.matrices), len(one.matrices) + (1 if tied else 2)
    reasons = {None: NO_FILE, 512: f"{n_matrices} of {n_buffers} buffers were missing"}
    for chunk_nbytes in (None, 512, None, 512):
        expected = packed_logits(folder, name, IN_MEMORY, chunk_nbytes, reason=None)
        assert packed_logits(folder, name, str(file), chunk_nbytes, reasons.pop(chunk_nbytes, None)) == expected
        assert streamed_logits(folder, name, file, chunk_nbytes) == expected
    assert len(read_file(file)[1].entries) == n_buffers + n_matrices
    assert list(MappedFile(file).problems()) == []


def with_tensors(folder: Path, change: Callable[[dict[str, TensorSpec]], None], target: Path) -> Path:
    """Write a copy of a checkpoint in one file with some of its tensors changed."""
    file = SafetensorsFile(folder / "model.safetensors")
    specs = {name: TensorSpec(name, t.dtype, t.shape, [file.view(name)]) for name, t in file.items()}
    change(specs)
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    write_safetensors(target / "model.safetensors", list(specs.values()))
    return target


def as_f32(*names: str) -> Callable[[dict[str, TensorSpec]], None]:
    """Return what stores some bfloat16 tensors as float32."""

    def change(specs: dict[str, TensorSpec]) -> None:
        for name in names:
            bits = next(iter(specs[name].pieces))
            wide = (bits.astype(np.uint32) << 16).view(np.float32)
            specs[name] = TensorSpec(name, "F32", specs[name].shape, [wide])

    return change


@pytest.mark.spec("PREP-2")
@pytest.mark.parametrize(
    ("changed", "chosen"),
    [
        ((), "bf16"),
        (("model.norm.weight",), "bf16"),
        (("model.layers.1.mlp.up_proj.weight",), "f32"),
        (("model.embed_tokens.weight",), "f32"),
        (("lm_head.weight",), "f32"),
    ],
    ids=lambda value: ", ".join(value) or "none" if isinstance(value, tuple) else value,
)
def test_auto_is_bf16_if_every_matrix_is_stored_as_bfloat16(
    changed: tuple[str, ...], chosen: str, tmp_path: Path
) -> None:
    folder = with_tensors(Path(__file__).parent / "golden" / "llama", as_f32(*changed), tmp_path / "m")
    assert choose_format(open_checkpoint(folder), "auto") == chosen


@pytest.mark.spec("PREP-2")
@pytest.mark.parametrize(("dtype", "chosen"), [("f32", "f32"), ("f16", "f32"), ("bf16", "bf16")])
def test_auto_loses_nothing_of_any_stored_type(dtype: str, chosen: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"], dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert choose_format(checkpoint, "auto") == chosen
    for name in FORMATS:
        assert choose_format(checkpoint, name) == name
    with pytest.raises(RequestError, match="weights must be one of auto, f32, bf16, int8, int4, not 'fp8'"):
        choose_format(checkpoint, "fp8")


def everything_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.spec("PREP-3")
@every_format
def test_memory_holds_the_same_bytes_as_the_file_and_writes_no_file(
    family: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    in_memory = prepared(family, name, IN_MEMORY)
    outcome = in_memory.outcome
    assert (outcome.state, outcome.path, outcome.reason, in_memory.mapped) == ("memory", None, None, None)
    assert outcome.packing_s == outcome.load_or_build_s > 0
    assert everything_in(tmp_path) == set()
    in_file = prepared(family, name, None)
    assert path_of(in_file).parent == tmp_path / "refinfer"
    kept = {(key.packer, key.name): in_file.provider[key].tobytes() for key in in_file.provider}
    packed = {(key.packer, key.name): in_memory.provider[key].tobytes() for key in in_memory.provider}
    assert list(packed.items()) == list(kept.items())


class SteppingClock:
    """A clock on which a second passes whenever it is looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def now(self) -> float:
        self.looks += 1
        return float(self.looks)

    def sleep(self, seconds: float) -> None:
        raise AssertionError("preparing never sleeps")


@pytest.mark.spec("PREP-7")
@pytest.mark.parametrize("where", [IN_MEMORY, "file"])
def test_the_outcome_has_the_seconds_from_the_first_look_at_the_clock_to_the_last(where: str, tmp_path: Path) -> None:
    folder = Path(__file__).parent / "golden" / "qwen2"
    inventory, place = (
        Inventory(open_folder(folder).config, "int8"),
        where if where == IN_MEMORY else tmp_path / "cache",
    )
    packing_s = []
    for state in ("memory",) * 2 if where == IN_MEMORY else ("built", "loaded"):
        clock = SteppingClock()
        outcome = prepare(inventory, open_checkpoint(folder), str(place), clock=clock).outcome
        assert (outcome.state, outcome.load_or_build_s) == (state, clock.looks - 1)
        packing_s.append(outcome.packing_s)
    first, second = packing_s
    assert first == second is not None  # a file that is loaded reports how long it took to build


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of its own, which may be written to."""
    return Path(shutil.copytree(Path(__file__).parent / "golden" / "qwen2", tmp_path / "model"))


def a_folder(model: Path) -> Path:
    return model


def the_weights(model: Path) -> Path:
    return model / "model.safetensors"


def a_link_to_the_weights(model: Path) -> Path:
    link = model.with_name("cache")
    link.symlink_to(model / "model.safetensors")
    return link


def the_config(model: Path) -> Path:
    return model / "config.json"


def the_weights_by_another_way(model: Path) -> Path:
    return model / ".." / model.name / "model.safetensors"


def what_the_weights_link_to(model: Path) -> Path:
    """As in the cache of Hugging Face's hub: a snapshot of links into a folder of blobs."""
    blob = model.with_name("0f1e2d")
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    return blob


def a_config_to_be(model: Path) -> Path:
    return model / "generation_config.json"


def a_shard_to_be(model: Path) -> Path:
    return model / "model-00002-of-00002.safetensors"


def a_pipe(model: Path) -> Path:
    os.mkfifo(model.with_name("pipe"))
    return model.with_name("pipe")


def a_device(_: Path) -> Path:
    return Path(os.devnull)


def a_link_to_a_folder(model: Path) -> Path:
    link = model.with_name("cache")
    link.symlink_to(model)
    return link


@pytest.mark.spec("PREP-4", "ERR-1")
@pytest.mark.parametrize(
    "place_in",
    [a_folder, a_link_to_a_folder, the_weights, a_link_to_the_weights, the_weights_by_another_way,
     the_config, a_config_to_be, a_shard_to_be, a_pipe, a_device,
     what_the_weights_link_to],
)  # fmt: skip
def test_a_cache_file_never_takes_the_place_of(place_in: Callable[[Path], Path], model: Path, tmp_path: Path) -> None:
    place = place_in(model)
    before = {path: path.read_bytes() for path in model.iterdir()}
    there = everything_in(tmp_path)
    with pytest.raises(RequestError, match=r"--weight-cache|is not a weight cache, and stays as it is") as refused:
        prepared(model, "f32", place)
    assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert everything_in(tmp_path) == there


@pytest.mark.spec("PREP-4", "ERR-1")
@pytest.mark.parametrize("place", ["", ":mem", ":memory ", ":"])
def test_a_weight_cache_that_is_not_a_file_is_refused(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = everything_in(tmp_path)
    with pytest.raises(RequestError, match="--weight-cache"):
        prepared(model, "f32", place)
    assert everything_in(tmp_path) == there


@pytest.mark.spec("PREP-4")
@pytest.mark.parametrize("name", ["tokenizer.model", "README.md", "pytorch_model.bin"])
def test_a_cache_file_never_takes_the_place_of_a_models_other_files(name: str, model: Path) -> None:
    (model / name).write_bytes(b"something dear")
    with pytest.raises(RequestError):
        prepared(model, "f32", model / name)


@pytest.mark.spec("PREP-4", "ERR-1")
def test_a_name_that_no_file_can_have_is_one_named_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        prepared(model, "f32", tmp_path / ("m" * 300))


@pytest.mark.spec("OPEN-9", "PREP-4")
@pytest.mark.parametrize("name", ["thesis.txt", "thesis.txt.sources.json"])
@pytest.mark.parametrize("content", [b"weights", bytes(50_000), b"{}", b"\x89PNG\r\n\x1a\n"])
def test_a_persons_file_at_a_place_that_a_person_named_stays_as_it_is(
    name: str, content: bytes, model: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    there = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(RequestError, match=f"{name} is not a .*, and stays as it is; name another file"):
        prepared(model, "f32", tmp_path / "thesis.txt")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == there


@pytest.mark.spec("PREP-4", "DIR-2")
def test_a_link_is_followed_to_the_file_it_names(model: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    link = tmp_path / "cache"
    link.symlink_to(tmp_path / "place" / "real")
    first, second = prepared(model, "f32", link), prepared(model, "f32", tmp_path / "place" / "real")
    assert (first.outcome.state, second.outcome.state) == ("built", "loaded")
    assert link.is_symlink()
    assert path_of(first) == path_of(second) == (tmp_path / "place" / "real").resolve()


def without(name: str) -> Callable[[dict[str, TensorSpec]], None]:
    def change(specs: dict[str, TensorSpec]) -> None:
        del specs[name]

    return change


def transposed(name: str) -> Callable[[dict[str, TensorSpec]], None]:
    def change(specs: dict[str, TensorSpec]) -> None:
        n, k = specs[name].shape
        specs[name] = replace(specs[name], shape=(k, n))

    return change


def as_integers(name: str) -> Callable[[dict[str, TensorSpec]], None]:
    def change(specs: dict[str, TensorSpec]) -> None:
        specs[name] = TensorSpec(name, "I32", specs[name].shape, [np.zeros(specs[name].shape, np.int32)])

    return change


@pytest.mark.spec("PREP-5", "TENSOR-11", "ERR-1")
@pytest.mark.parametrize("change", [without, transposed, as_integers])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("where", [IN_MEMORY, "file"])
def test_missing_and_misshapen_tensors_are_found_before_anything_is_packed(
    change: Callable[[str], Callable[[dict[str, TensorSpec]], None]],
    name: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = with_tensors(Path(__file__).parent / "golden" / "llama", change(name), tmp_path / "m")
    packed = []
    monkeypatch.setattr("refinfer.prepare.pack_into", lambda *arguments: packed.append(arguments))
    place = IN_MEMORY if where == IN_MEMORY else str(tmp_path / "cache")
    with pytest.raises(WeightsError, match=name):
        prepared(folder, "f32", place)
    assert packed == []
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


@pytest.mark.spec("PREP-5")
def test_a_missing_norm_is_found_before_anything_is_packed(tmp_path: Path) -> None:
    folder = with_tensors(Path(__file__).parent / "golden" / "llama", without("model.norm.weight"), tmp_path / "m")
    with pytest.raises(WeightsError, match=r"has no tensor 'model\.norm\.weight'"):
        prepared(folder, "f32", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


MEASURE = """
import json, sys
from pathlib import Path
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.folder import open_folder
from refinfer.inventory import Inventory
from refinfer.prepare import prepare
from refinfer.clock import RealClock
from refinfer.weight_cache.load_or_build import Listener

folder, warm, cache, name = sys.argv[1:]


def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def build(folder, cache):
    inventory = Inventory(open_folder(Path(folder)).config, name)
    look = lambda nbytes: seen.append(private())
    prepared = prepare(inventory, open_checkpoint(Path(folder)), cache, clock=RealClock(), listener=Listener(look))
    look(0)
    return prepared


seen = []
build(warm, cache + ".warm")
before, seen = private(), []
prepared = build(folder, cache)
print(json.dumps({"growth": max(seen) - before, "looks": len(seen), "bytes": prepared.outcome.packed_bytes}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("PREP-6", "OPEN-8")
def test_building_keeps_less_than_64_mb_in_private_memory(tmp_path: Path) -> None:
    """A table alone is 80 MB as float32, the file 150 MB: looked at whenever some of it has been read or packed."""
    config = replace(
        SHAPES["tiny"], vocab_size=40_000, hidden_size=512, intermediate_size=4096, num_hidden_layers=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    write_checkpoint(tmp_path / "m", config, dtype="bf16")
    argv = [sys.executable, "-c", MEASURE, str(tmp_path / "m"), str(Path(__file__).parent / "golden" / "qwen2"),
            str(tmp_path / "cache"), "f32"]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WATCHDOG_S, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["bytes"] > 130_000_000
    assert measured["looks"] > 50
    assert measured["growth"] < 64_000_000


@pytest.mark.spec("PREP-6")
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux reports what of a mapping is in memory")
@pytest.mark.parametrize("shard_nbytes", [None, 3_000_000], ids=["one file", "shards"])
def test_the_pages_of_a_models_files_are_given_back_when_they_are_packed(
    shard_nbytes: int | None, tmp_path: Path
) -> None:
    config = replace(SHAPES["tiny"], vocab_size=3000, hidden_size=512, tie_word_embeddings=False)
    write_checkpoint(tmp_path / "m", config, dtype="f32", shard_nbytes=shard_nbytes)
    checkpoint = open_checkpoint(tmp_path / "m")
    prepare(Inventory(config, "int8"), checkpoint, IN_MEMORY, clock=RealClock())
    maps = Path("/proc/self/smaps").read_text()
    for path in checkpoint.paths:
        (resident_kb,) = re.findall(rf"{re.escape(str(path))}\n(?:.+\n)*?Rss: +(\d+) kB", maps)
        assert int(resident_kb) * 1024 < path.stat().st_size // 4


@pytest.mark.spec("PREP-8", "CLI-36")
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("where", [IN_MEMORY, "file"])
def test_progress_adds_up_to_what_is_hashed_and_packed(name: str, where: str, tmp_path: Path) -> None:
    config = replace(SHAPES["tiny"], vocab_size=3000, hidden_size=512, tie_word_embeddings=False)
    write_checkpoint(tmp_path / "m", config, dtype="f32")
    checkpoint, progress, begun = open_checkpoint(tmp_path / "m"), list[int](), list[tuple[str, int, int]]()
    listener = Listener(
        progress=progress.append, begin=lambda what, nbytes: begun.append((what, nbytes, sum(progress)))
    )
    place = where if where == IN_MEMORY else str(tmp_path / "cache")
    found = prepare(Inventory(config, name), checkpoint, place, clock=RealClock(), listener=listener)
    hashed = 0 if where == IN_MEMORY else sum(path.stat().st_size for path in checkpoint.paths)
    ends = [chunks_of(key)[-1] for key in found.keys.values()]
    assert sum(progress) == hashed + sum(chunk.offset + chunk.nbytes for chunk in ends)
    padded = sum(chunk.offset + chunk.padded_nbytes for chunk in ends)
    reading = [("reading the weights", hashed, 0)] if where == "file" else []
    assert begun == [*reading, ("packing the weights", padded, hashed)]  # what is padding is not reported
    assert min(progress) > 0
    assert max(progress) < 7 << 20
    assert len(progress) > len(found.keys)
