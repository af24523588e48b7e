"""Random-weight checkpoints in Hugging Face's form: a model of any published shape, without a download.

Writes a config, weights and a byte tokenizer. The weights are noise, and the config says so. Leaves to others: using
them.
Read more: tutorial 12; clauses SYNTH-1 to SYNTH-5.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numpy.random import default_rng  # imported here, because an import while a file is written can swallow a Ctrl-C

from refinfer.arrays import f32_to_bf16
from refinfer.errors import RequestError, SafetensorsError
from refinfer.model.checkpoint import INDEX_NAME, SINGLE_NAME
from refinfer.model.config import ModelConfig
from refinfer.model.config_json import to_json
from refinfer.model.safetensors import DTYPES as STORED_DTYPES
from refinfer.model.safetensors import TensorSpec, write_safetensors
from refinfer.model.tokenizer import TOKENIZER_NAME, byte_tokenizer_json
from refinfer.units import format_nbytes
from refinfer.whole_file import read_json

__all__ = ["DTYPES", "checkpoint_nbytes", "has_random_weights", "write_checkpoint"]

DTYPES: Final = {"f32": ("F32", "float32"), "f16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}
"""The stored types by short name: their names in safetensors and in `config.json`."""

_MARK: Final = "refinfer_random_weights"
"""The key in `config.json` that says so."""

_LARGEST_CONFIG_BYTES: Final = 1_000_000
_PIECE_BYTES: Final = 2 << 20  # in float32; rounding to bfloat16 takes a few copies more


def checkpoint_nbytes(config: ModelConfig, dtype: str) -> int:
    """Return the bytes of all tensors of a checkpoint stored as `dtype`."""
    return config.n_parameters * (4 if dtype == "f32" else 2)


def has_random_weights(folder: Path) -> bool:
    """Return whether `write_checkpoint` has written the model in `folder`."""
    try:
        raw = read_json(folder / "config.json", _LARGEST_CONFIG_BYTES)
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and raw.get(_MARK) is True


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    shard_nbytes: int | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write a checkpoint with random weights: config, weights, and a byte tokenizer if the vocabulary has room.

    Matrices are normal with a standard deviation of `1 / sqrt(K)`, norms lie around one and biases around zero, none
    of them trivial, so that a forgotten norm or bias shows. A tensor depends on `seed` and its name only. At most 16
    MiB of weights are in memory at a time. On any failure the folder is left as it was.

    Args:
        folder: a folder that does not exist yet, or an empty one.
        config: the model's sizes.
        dtype: a key of `DTYPES`.
        seed: random seed for the weights.
        shard_nbytes: start a new file when one would grow beyond this; None writes a single file.
        progress: called with the bytes of each piece as it is made.

    Raises:
        RequestError: the folder is not empty, cannot be made, or the disk has too little room.
        SafetensorsError: writing failed.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"{folder} exists and is not an empty folder; name a new one")
        made = [path for path in (folder, *folder.parents) if not path.exists()]  # deepest first
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be made: {error.strerror}") from None
    written: list[Path] = []
    try:
        need, free = checkpoint_nbytes(config, dtype), shutil.disk_usage(folder).free
        if need > free:
            raise RequestError(f"{folder} needs {format_nbytes(need)}, but the disk has {format_nbytes(free)} left")
        specs = [
            TensorSpec(name, DTYPES[dtype][0], shape, _pieces(name, shape, dtype, seed, progress))
            for name, shape in config.tensor_shapes().items()
        ]
        _write_weights(folder, specs, shard_nbytes, written)
        if config.vocab_size >= 256:
            _write_json(folder / TOKENIZER_NAME, byte_tokenizer_json(), written)
        about = to_json(replace(config, dtype=DTYPES[dtype][1])) | {_MARK: True}
        _write_json(folder / "config.json", about, written)
    except BaseException as error:
        # Only what was made here: somebody else may have put something into the folder meanwhile.
        for file in written:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        if isinstance(error, OSError):
            raise RequestError(f"{folder} cannot be written: {error.strerror}") from None
        raise


def _pieces(
    name: str, shape: tuple[int, ...], dtype: str, seed: int, progress: Callable[[int], None]
) -> Iterator[npt.NDArray[Any]]:
    """Make one tensor's values in blocks of rows."""
    rng = default_rng([seed, *name.encode()])
    row_length = shape[1] if len(shape) == 2 else 1
    rows_at_once = max(1, _PIECE_BYTES // (4 * row_length))
    for start in range(0, shape[0], rows_at_once):
        rows = min(rows_at_once, shape[0] - start)
        values = rng.standard_normal((rows, *shape[1:]), dtype=np.float32)
        if len(shape) == 2:
            values *= np.float32(1 / math.sqrt(row_length))
        else:
            values *= np.float32(0.1)
            values += np.float32(0.0 if name.endswith(".bias") else 1.0)
        stored = STORED_DTYPES[DTYPES[dtype][0]]
        piece = f32_to_bf16(values) if dtype == "bf16" else values.astype(stored, copy=False)
        progress(piece.nbytes)
        yield piece


def _write_weights(folder: Path, specs: Sequence[TensorSpec], shard_nbytes: int | None, written: list[Path]) -> None:
    metadata = {"format": "pt"}  # what `transformers` writes and asks for
    if shard_nbytes is None:
        write_safetensors(folder / SINGLE_NAME, specs, metadata)
        written.append(folder / SINGLE_NAME)
        return
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + spec.nbytes > shard_nbytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) > 99_999:
        raise SafetensorsError(f"{len(shards)} shards are too many; give a larger shard size")
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, metadata)
        written.append(folder / name)
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    total = sum(spec.nbytes for spec in specs)
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}, written)


def _write_json(path: Path, value: object, written: list[Path]) -> None:
    with path.open("x", encoding="utf-8") as file:
        written.append(path)
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
