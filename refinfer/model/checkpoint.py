"""A checkpoint: all the safetensors files of a model folder, seen as one set of tensors.

Opens single files, and sharded checkpoints through their index. Leaves to others: what the tensors are for; the caller
gives the shape that it expects.
Read more: tutorial 05; clauses TENSOR-8 to TENSOR-11.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, stored_to_f32
from refinfer.errors import SafetensorsError, WeightsError
from refinfer.model.safetensors import SafetensorsFile, TensorInfo
from refinfer.units import shown
from refinfer.whole_file import read_json

__all__ = ["FLOAT_DTYPES", "INDEX_NAME", "SINGLE_NAME", "Checkpoint", "open_checkpoint"]

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
FLOAT_DTYPES: Final = ("F32", "F16", "BF16")
LARGEST_INDEX_BYTES: Final = 1_000_000  # a tensor takes about 100 bytes; a model of 126 layers has 1,137
_PLAIN_NAME: Final = re.compile(r"[^/\\\x00\ud800-\udfff]{1,255}")


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of one or several files: a read-only mapping from names to `TensorInfo`.

    Law: before any weight is read, every tensor has been found in the file that the index names for it.
    """

    def __init__(self, folder: Path, file_of: Mapping[str, SafetensorsFile]) -> None:
        self.folder = folder
        self._file_of = dict(file_of)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def path_of(self, name: str) -> Path:
        """Return the file that holds the tensor `name`."""
        return self._file_of[name].path

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, each once, by name."""
        return tuple(sorted({file.path for file in self._file_of.values()}))

    def drop_pages(self) -> None:
        """Let the system drop the weights read so far from memory; views stay valid, and read them again."""
        for file in {file.path: file for file in self._file_of.values()}.values():
            file.drop_pages()

    def stored(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return a floating-point tensor as it is stored: a read-only view, bfloat16 as its 16 bits.

        Raises:
            WeightsError: as `require`.
            SafetensorsError: its file cannot be mapped.
        """
        self.require(name, shape)
        return self._file_of[name].view(name)

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Require that there is a tensor of this name and shape, of a floating-point type; reads no weight.

        Raises:
            WeightsError: the tensor is missing, does not have the shape `shape`, or is not of a floating-point type.
        """
        if name not in self._file_of:
            raise WeightsError(f"{self.folder} has no tensor {shown(name)}, which its config.json asks for")
        tensor = self[name]
        if tensor.shape != shape:
            raise WeightsError(
                f"{self.path_of(name)}: {shown(name)} has the shape {shown(list(tensor.shape))}, "
                f"but config.json asks for {list(shape)}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise WeightsError(
                f"{self.path_of(name)}: {shown(name)} is stored as {tensor.dtype}; "
                f"supported are {', '.join(FLOAT_DTYPES)}"
            )

    def float32(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """Return a tensor as float32: a view if it is stored as float32, else a converted copy.

        Raises:
            WeightsError: as `stored`.
        """
        return stored_to_f32(self.stored(name, shape))

    def first_non_finite(self) -> str | None:
        """Return the name of the first tensor that holds a NaN or an infinity; reads every weight."""
        for name, tensor in self.items():
            if tensor.dtype in FLOAT_DTYPES and not np.isfinite(self.float32(name, tensor.shape)).all():
                return name
        return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open `model.safetensors`, or the files that `model.safetensors.index.json` names, in `folder`.

    Reads headers only. A single file is preferred if both exist, as in Hugging Face's own loader.

    Raises:
        SafetensorsError: neither exists, or a file or the index is malformed.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists():
        file = SafetensorsFile(single)
        return Checkpoint(folder, dict.fromkeys(file, file))
    if not index.exists():
        raise SafetensorsError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}")
    weight_map = _read_weight_map(index)
    shards = {name: SafetensorsFile(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise SafetensorsError(f"{index} says that {shown(tensor)} is in {shard}, but it is not")
    return Checkpoint(folder, {tensor: shards[shard] for tensor, shard in weight_map.items()})


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        raw = read_json(index, LARGEST_INDEX_BYTES)
    except OSError as error:
        raise SafetensorsError(f"{index} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SafetensorsError(f"{index} is not valid JSON: {error}") from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SafetensorsError(f"{index} has no weight_map")
    for tensor, shard in weight_map.items():
        # A plain file name only: an index must not be able to point outside its folder.
        if not isinstance(shard, str) or shard in {".", ".."} or not _PLAIN_NAME.fullmatch(shard):
            raise SafetensorsError(f"{index} gives {shown(tensor)} the impossible file name {shown(shard)}")
    return weight_map
