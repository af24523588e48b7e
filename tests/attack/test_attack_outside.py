"""The page of the file format holds: a program made from it alone reads what refinfer packs, and writes the same."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import outside
from cage import Cases
from refinfer import STORYTELLER, FileWeightCacheProvider, load
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.config_json import load_config
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS, PackedMatrix
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.packers import chunks_of, layout_of_key, packer_fingerprint

pytestmark = pytest.mark.attack

MODELS = ["storyteller", "tiny", "in shards"]


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest,
    tiny_folder: Path,
    tiny_config: ModelConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """bf16, tied; f32, untied, with biases and norms of queries and keys; f16, several files, chunks and odd sizes."""
    if request.param == "storyteller":
        return Path(STORYTELLER)
    if request.param == "tiny":
        return tiny_folder
    folder = tmp_path_factory.mktemp("models") / "in shards"
    config = replace(tiny_config, vocab_size=3001, hidden_size=1001, intermediate_size=530, num_hidden_layers=1)
    write_checkpoint(folder, config, dtype="f16", shard_nbytes=3_000_000)
    return folder


def pack(model: Path, format: str, folder: Path) -> Path:
    """Pack a model with refinfer; return the file."""
    path = folder / f"{format}.packed"
    with load(model, weights=format, weight_cache=str(path)):
        return path


def numbers_of(provider: FileWeightCacheProvider, key: PackKey, model: Path) -> npt.NDArray[Any]:
    """Return what a buffer stands for: a matrix as refinfer unpacks it, anything else as the checkpoint has it."""
    checkpoint = open_checkpoint(model)
    if key.packer == "goi":
        offset = provider.look_up(key)
        assert offset is not None
        memory = provider.offset_to_addr(offset)
        return PackedMatrix(
            layout_of_key(key), [memory[c.offset : c.offset + c.nbytes] for c in chunks_of(key)]
        ).unpack()
    if key.packer == "rows":
        return checkpoint.float32(key.name, checkpoint[key.name].shape)
    names = [name for name, shape in load_config(model).tensor_shapes().items() if len(shape) == 1]
    return np.concatenate([checkpoint.float32(name, checkpoint[name].shape) for name in names])


@pytest.mark.spec("FILE-16")
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_verified_and_unpacked(
    format: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pack(model, format, tmp_path)
    outside.main(["verify", str(path)])
    provider = FileWeightCacheProvider.load(path)
    assert capsys.readouterr().out == f"{len(provider)} tensors, and every byte is as it should be\n"
    outside.main(["unpack", str(path), str(tmp_path / "out.npz")])
    with np.load(tmp_path / "out.npz") as unpacked:
        assert set(unpacked) == {key.name for key in provider}
        for key in provider:
            assert np.array_equal(unpacked[key.name], numbers_of(provider, key, model)), key.name


@pytest.mark.spec("FILE-16")
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_it_writes_is_the_same_and_nothing_is_packed_again(
    format: str, model: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs.packed"
    outside.main(["write", str(model), str(theirs), "--format", format])
    assert theirs.read_bytes() == pack(model, format, tmp_path).read_bytes()
    with load(model, weights=format, weight_cache=str(theirs)) as session:
        assert len(list(session.generate(token_ids=[1], max_tokens=3))) <= 3
        assert session.stats is not None
        assert (session.weight_cache.state, session.weight_cache.packed_buffers) == ("loaded", 0)


@pytest.mark.spec("FILE-16")
@pytest.mark.parametrize("format", FORMATS)
def test_the_fingerprint_follows_from_the_page(format: str) -> None:
    assert outside.fingerprint(format) == packer_fingerprint(format)


@pytest.mark.spec("FILE-16")
def test_a_change_of_any_byte_is_found(model: Path, tmp_path: Path, cases: Cases) -> None:
    files = [pack(model, format, tmp_path).read_bytes() for format in FORMATS]
    for rng in cases:
        require_found(bytearray(rng.choice(files)), rng)


def require_found(data: bytearray, rng: Random) -> None:
    """Change one byte, anywhere or where every byte has a meaning of its own, and require that it is found."""
    index = int.from_bytes(data[80:88], "little")
    at = rng.choice(
        [rng.randrange(len(data)), rng.randrange(4096), rng.randrange(192), rng.randrange(index, len(data))]
    )
    data[at] ^= rng.randrange(1, 256)
    with pytest.raises(ValueError, match=r"damaged|header|size|not a cache file"):
        list(outside.read(bytes(data)))


@pytest.mark.spec("FILE-16")
@pytest.mark.parametrize("cut", [0, 1, 4095, 4096, -1])
def test_a_file_that_is_cut_short_or_extended_is_refused(cut: int, tiny_folder: Path, tmp_path: Path) -> None:
    data = pack(tiny_folder, "f32", tmp_path).read_bytes()
    for changed in (data[:cut], data + data[: max(1, cut)]):
        with pytest.raises(ValueError, match=r"not a cache file|size is wrong"):
            list(outside.read(changed))


@pytest.mark.spec("FILE-16")
def test_it_imports_nothing_of_refinfer_and_is_short() -> None:
    path = Path(outside.__file__)
    text = path.read_text()
    tree = ast.parse(text)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in imported} <= {"numpy", *sys.stdlib_module_names}
    assert len(text.splitlines()) <= 250
