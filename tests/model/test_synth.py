"""Specifies `refinfer.model.synth`: what random checkpoints depend on, how little memory they need, what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

import refinfer
from refinfer.errors import RequestError
from refinfer.model.checkpoint import INDEX_NAME, open_checkpoint
from refinfer.model.config import SHAPES
from refinfer.model.config_json import load_config, to_json
from refinfer.model.safetensors import SafetensorsFile
from refinfer.model.synth import DTYPES, checkpoint_nbytes, has_random_weights, write_checkpoint
from refinfer.model.tokenizer import load_tokenizer

SMALL = replace(SHAPES["tiny"], vocab_size=300, num_hidden_layers=2)
SIXTEEN_MIB = 16 << 20


def bits(folder: Path) -> dict[str, bytes]:
    """Return every tensor's bytes by name."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.stored(name, tensor.shape).tobytes() for name, tensor in checkpoint.items()}


@pytest.mark.spec("SYNTH-2")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_nbytes", [1, 50_000, 10**9])
def test_the_same_seed_gives_the_same_weights_whatever_the_sharding(
    tmp_path: Path, dtype: str, shard_nbytes: int
) -> None:
    write_checkpoint(tmp_path / "single", SMALL, dtype=dtype, seed=7)
    write_checkpoint(tmp_path / "sharded", SMALL, dtype=dtype, seed=7, shard_nbytes=shard_nbytes)
    assert bits(tmp_path / "single") == bits(tmp_path / "sharded")
    assert (tmp_path / "sharded" / INDEX_NAME).exists()


@pytest.mark.spec("SYNTH-2")
def test_another_seed_or_another_name_gives_other_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_checkpoint(tmp_path / str(seed), SMALL, seed=seed)
    tensors = [tensor for seed in ("0", "1") for tensor in bits(tmp_path / seed).values()]
    assert len(set(tensors)) == len(tensors)


@pytest.mark.spec("SYNTH-1")
def test_norms_are_around_1_and_biases_around_0_and_neither_are_trivial(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, replace(SMALL, qkv_bias=True), dtype="f32")
    checkpoint = open_checkpoint(tmp_path)
    vectors = {name: checkpoint.float32(name, tensor.shape) for name, tensor in checkpoint.items()}
    for end, middle in (("norm.weight", 1.0), (".bias", 0.0)):
        of_kind = [vector for name, vector in vectors.items() if name.endswith(end)]
        assert of_kind
        assert all(abs(vector.mean() - middle) < 0.1 and 0.05 < vector.std() < 0.2 for vector in of_kind)


@pytest.mark.spec("SYNTH-1")
def test_matrices_are_random_and_keep_the_length_of_what_they_multiply(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL, dtype="f32")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in checkpoint.items():
        if len(tensor.shape) == 2:
            w = checkpoint.float32(name, tensor.shape) * tensor.shape[1] ** 0.5
            assert abs(w.mean()) < 0.1
            assert 0.9 < w.std() < 1.1
            assert len(set(w.flat)) > w.size // 2


@pytest.mark.spec("SYNTH-2")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_has_the_tensors_and_the_bytes_that_its_config_says(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path, SMALL, dtype=dtype)
    assert load_config(tmp_path) == replace(SMALL, dtype=DTYPES[dtype][1])
    assert {name: tensor.shape for name, tensor in open_checkpoint(tmp_path).items()} == SMALL.tensor_shapes()
    assert sum(map(len, bits(tmp_path).values())) == checkpoint_nbytes(SMALL, dtype)


@pytest.mark.spec("SYNTH-2")
def test_a_shard_grows_beyond_its_limit_only_for_a_single_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL, dtype="f32", shard_nbytes=50_000)
    shards = [SafetensorsFile(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    sizes = [[tensor.nbytes for tensor in shard.values()] for shard in shards]
    assert all(sum(of_shard) <= 50_000 or len(of_shard) == 1 for of_shard in sizes)
    assert len(shards) < sum(map(len, sizes))
    assert [shard.path.name for shard in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]


@pytest.mark.spec("SYNTH-3")
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_most_16_mib_of_weights_are_in_memory_at_a_time(tmp_path: Path, dtype: str) -> None:
    config = replace(SMALL, vocab_size=98_304)
    assert config.vocab_size * config.hidden_size * 4 > SIXTEEN_MIB
    made: list[int] = []
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path, config, dtype=dtype, progress=made.append)
        assert tracemalloc.get_traced_memory()[1] <= SIXTEEN_MIB
    finally:
        tracemalloc.stop()
    assert sum(made) == checkpoint_nbytes(config, dtype)


@pytest.mark.spec("SYNTH-3")
def test_a_row_may_be_longer_than_what_is_made_at_a_time(tmp_path: Path) -> None:
    wide = replace(SMALL, vocab_size=3, hidden_size=600_000, intermediate_size=1, num_hidden_layers=1, head_dim=2)
    config = replace(wide, num_attention_heads=1, num_key_value_heads=1)
    made: list[int] = []
    write_checkpoint(tmp_path, config, progress=made.append)
    assert {name: tensor.shape for name, tensor in open_checkpoint(tmp_path).items()} == config.tensor_shapes()
    assert sum(made) == checkpoint_nbytes(config, "bf16")


@pytest.mark.spec("SYNTH-4")
def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious", encoding="utf-8")
    for occupied in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(RequestError, match="exists and is not an empty folder"):
            write_checkpoint(occupied, SMALL)
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.spec("SYNTH-4")
def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.spec("SYNTH-1")
@pytest.mark.parametrize("vocab_size", [255, 256])
def test_a_byte_tokenizer_is_there_if_the_vocabulary_has_an_id_for_each_byte(tmp_path: Path, vocab_size: int) -> None:
    write_checkpoint(tmp_path, replace(SMALL, vocab_size=vocab_size))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer is not None) == (vocab_size == 256)
    assert tokenizer is None or max(tokenizer.encode("".join(map(chr, range(0x800))))) < vocab_size


@pytest.mark.spec("SYNTH-5")
def test_only_a_config_that_says_so_is_that_of_random_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    assert has_random_weights(tmp_path)
    for other in (json.dumps(to_json(SMALL)), "[]", "{"):
        (tmp_path / "config.json").write_text(other, encoding="utf-8")
        assert not has_random_weights(tmp_path)
    assert not has_random_weights(tmp_path / "nowhere")


# Python ignores the signal about a file beyond its limit: writing fails as it does on a full disk.
WRITE_WITH_LITTLE_ROOM = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from refinfer.errors import InputError
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
folder, hidden_size, room = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
try:
    config = replace(SHAPES["tiny"], vocab_size=256, num_hidden_layers=1, intermediate_size=4, head_dim=2)
    write_checkpoint(folder, replace(config, hidden_size=hidden_size))
except InputError as error:
    print(error)
"""
FULL = {"while weights are written": (512, 100_000), "while the tokenizer is written": (2, 3000)}
"""The hidden size of a model, and the largest size that a file may have, in bytes."""


def write_with_little_room(folder: Path, hidden_size: int, room: int) -> str:
    """Try to write a checkpoint where no file may grow beyond `room` bytes; return what is said about it."""
    command = [sys.executable, "-c", WRITE_WITH_LITTLE_ROOM, str(folder), str(hidden_size), str(room)]
    root = Path(refinfer.__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.mark.spec("SYNTH-4", "TENSOR-7")
@pytest.mark.parametrize(("hidden_size", "room"), FULL.values(), ids=FULL)
def test_a_full_disk_is_reported_and_leaves_no_folder_behind(tmp_path: Path, hidden_size: int, room: int) -> None:
    assert "cannot be written: File too large" in write_with_little_room(tmp_path / "new", hidden_size, room)
    assert not any(tmp_path.iterdir())


@pytest.mark.spec("SYNTH-4", "TENSOR-7")
@pytest.mark.parametrize(("hidden_size", "room"), FULL.values(), ids=FULL)
def test_a_full_disk_is_reported_and_leaves_an_empty_folder_empty(tmp_path: Path, hidden_size: int, room: int) -> None:
    assert "cannot be written: File too large" in write_with_little_room(tmp_path, hidden_size, room)
    assert tmp_path.is_dir()
    assert not any(tmp_path.iterdir())


@pytest.mark.spec("SYNTH-4")
@pytest.mark.parametrize("tensors", [0, 1, 10, 19])
def test_an_interrupt_leaves_nothing_behind_whichever_shard_it_hits(tmp_path: Path, tensors: int) -> None:
    made: list[int] = []

    def interrupt(nbytes: int) -> None:
        made.append(nbytes)
        if len(made) > tensors:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "new", SMALL, shard_nbytes=20_000, progress=interrupt)
    assert not any(tmp_path.iterdir())


@pytest.mark.spec("SYNTH-4")
def test_an_interrupt_comes_through_also_if_a_shard_was_removed_meanwhile(tmp_path: Path) -> None:
    def interrupt(nbytes: int) -> None:
        if any((tmp_path / "new").glob("*-00002-of-*")):
            next((tmp_path / "new").glob("*-00001-of-*.safetensors")).unlink()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "new", SMALL, shard_nbytes=20_000, progress=interrupt)
    assert not any(tmp_path.iterdir())


@pytest.mark.spec("SYNTH-4")
def test_a_checkpoint_larger_than_the_disk_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    giant = replace(SMALL, hidden_size=1 << 30, vocab_size=1 << 30)
    with pytest.raises(RequestError, match="but the disk has"):
        write_checkpoint(tmp_path / "new", giant, progress=lambda _: pytest.fail("weights were made"))
    assert not any(tmp_path.iterdir())


@pytest.mark.spec("SYNTH-4")
def test_an_empty_folder_that_exists_is_filled(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    write_checkpoint(tmp_path / "new", SMALL)
    assert open_checkpoint(tmp_path / "new")


@pytest.mark.spec("SYNTH-4")
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be made: Not a directory"):
        write_checkpoint(tmp_path / "file" / "new", SMALL)


@pytest.mark.spec("SYNTH-4")
def test_a_failure_removes_the_folders_it_made_and_nothing_of_anybody_else(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"

    def fail(nbytes: int) -> None:
        (folder / "mine.txt").write_text("not yours")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, SHAPES["tiny"], progress=fail)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]

    def just_fail(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "c" / "d", SHAPES["tiny"], progress=just_fail)
    assert not (tmp_path / "c").exists()
