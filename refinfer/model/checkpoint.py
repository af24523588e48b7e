"""A checkpoint: all the safetensors files of a model folder, seen as one set of tensors.

Opens single files, and the shards that an index names, and gives each tensor the name that the config asks for. Leaves
to others: what the tensors are for; the caller gives the shape that it expects.
Read more: tutorial 05; clauses TENSOR-8 to TENSOR-11, TENSOR-13 to TENSOR-15.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from refinfer.arrays import Float32Array, stored_to_f32
from refinfer.errors import SafetensorsError, WeightsError
from refinfer.model.config import ModelConfig
from refinfer.model.other_forms import what_to_do
from refinfer.model.safetensors import SafetensorsFile, TensorInfo
from refinfer.units import shown
from refinfer.whole_file import read_json

__all__ = ["FLOAT_DTYPES", "INDEX_NAME", "SINGLE_NAME", "Checkpoint", "open_checkpoint"]

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
FLOAT_DTYPES: Final = ("F32", "F16", "BF16")
LARGEST_INDEX_BYTES: Final = 1_000_000  # a tensor takes about 100 bytes; a model of 126 layers has 1,137
_EMBEDDING: Final = "model.embed_tokens.weight"
_OUTPUT: Final = "lm_head.weight"
_IN_LAYER: Final = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,9})\.(.+)")
_QUANTISED: Final = {"F8": "fp8", "F6": "fp6", "F4": "fp4", "U8": "8-bit integers", "I8": "8-bit integers"}
_INSTEAD: Final = "give the model's unquantised checkpoint instead"
_PLAIN_NAME: Final = re.compile(r"[^/\\\x00\ud800-\udfff]{1,255}")


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of one or several files: a read-only mapping from names to `TensorInfo`.

    A name is the one that the config asks for; `TensorInfo.name` is the one in the file. `left_out` has the names of
    tensors in the files that are not in the mapping.
    """

    def __init__(
        self, folder: Path, place_of: Mapping[str, tuple[SafetensorsFile, str]], left_out: Iterable[str] = ()
    ) -> None:
        self.folder = folder
        self._place_of = dict(place_of)
        self._left_out = frozenset(left_out)

    def __getitem__(self, name: str) -> TensorInfo:
        file, stored_name = self._place_of[name]
        return file[stored_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._place_of)

    def __len__(self) -> int:
        return len(self._place_of)

    def of(self, config: ModelConfig) -> Checkpoint:
        """Return those tensors that a model of this config has.

        If a tied model has only its output table stored, that table is its embedding table.
        """
        places = dict(self._place_of)
        if config.tie_word_embeddings and _OUTPUT in places:
            places.setdefault(_EMBEDDING, places.pop(_OUTPUT))
        shapes, others = config.layer_shapes(), {_EMBEDDING, "model.norm.weight"}
        others |= set() if config.tie_word_embeddings else {_OUTPUT}

        def is_needed(name: str) -> bool:
            in_layer = _IN_LAYER.fullmatch(name)
            if in_layer is None:
                return name in others
            return int(in_layer[1]) < config.num_hidden_layers and in_layer[2] in shapes

        needed = {name: place for name, place in places.items() if is_needed(name)}
        return Checkpoint(self.folder, needed, self._place_of.keys() - needed.keys())

    @property
    def has_both_tables(self) -> bool:
        """Whether an embedding table and an output table are stored."""
        return {_EMBEDDING, _OUTPUT} <= self.keys()

    def path_of(self, name: str) -> Path:
        """Return the file that holds the tensor `name`."""
        return self._place_of[name][0].path

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, each once, by name."""
        return tuple(sorted({file.path for file, _ in self._place_of.values()}))

    def drop_pages(self) -> None:
        """Let the system drop the weights read so far from memory; views stay valid, and read them again."""
        for file in {file.path: file for file, _ in self._place_of.values()}.values():
            file.drop_pages()

    def stored(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return a floating-point tensor as it is stored: a read-only view, bfloat16 as its 16 bits.

        Raises:
            WeightsError: as `require`.
            SafetensorsError: its file cannot be mapped.
        """
        self.require(name, shape)
        file, stored_name = self._place_of[name]
        return file.view(stored_name)

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Require that there is a tensor of this name and shape, of a floating-point type; reads no weight.

        Raises:
            WeightsError: the tensor is missing, does not have the shape `shape`, or is not of a floating-point type.
        """
        if name not in self._place_of:
            raise WeightsError(f"{self.folder} has no tensor {shown(name)}, {self._why_missing(name)}")
        tensor = self[name]
        if tensor.dtype not in FLOAT_DTYPES:
            quantised = _QUANTISED.get(tensor.dtype.partition("_")[0])
            raise WeightsError(
                f"{self.path_of(name)}: {shown(name)} is stored as {tensor.dtype}; "
                f"supported are {', '.join(FLOAT_DTYPES)}"
                + (f": the weights are quantised to {quantised}; {_INSTEAD}" if quantised else "")
            )
        if tensor.shape != shape:
            raise WeightsError(
                f"{self.path_of(name)}: {shown(name)} has the shape {shown(list(tensor.shape))}, "
                f"but config.json asks for {list(shape)}"
            )

    def _why_missing(self, name: str) -> str:
        packed = name.removesuffix("weight") + "qweight"
        if packed not in self._left_out:
            return "which its config.json asks for"
        by = "GPTQ" if name.removesuffix("weight") + "g_idx" in self._left_out else "AWQ"
        return f"but {shown(packed)}: the weights are quantised with {by}; {_INSTEAD}"

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

    Reads headers only. A single file is preferred if both exist; of an index only the names of the files count. Both
    are as in Hugging Face's own loader.

    Raises:
        SafetensorsError: neither exists, or a file or the index is malformed.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists():
        files = [SafetensorsFile(single)]
    elif index.exists():
        files = [SafetensorsFile(path) for path in _shards(index)]
    else:
        raise SafetensorsError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}; {what_to_do(folder)}")
    places = {name: (file, name) for file in files for name in file}
    # A tensor under the very name that is asked for goes before one whose name has to be mended.
    in_turn = sorted(places, key=lambda name: _full_name(name) == name)
    return Checkpoint(folder, {_full_name(name): places[name] for name in in_turn})


def _full_name(name: str) -> str:
    """Return a name as the whole model has it: a part saved alone lacks `model.`, a wrapped model has it once more."""
    if name.startswith(("embed_tokens.", "layers.", "norm.")):
        return f"model.{name}"
    inner = name.removeprefix("model.")
    return inner if inner.startswith(("model.", "lm_head.")) else name


def _shards(index: Path) -> Iterator[Path]:
    """Yield the files that an index names, by name."""
    for name in sorted(set(_read_weight_map(index).values())):
        shard = index.with_name(name)
        if not os.path.exists(shard):  # noqa: PTH110  (false, and no error, for a name that no file can have)
            missing = what_to_do(index.parent, "fetch the missing file")
            raise SafetensorsError(f"{index} names {name}, which does not exist; {missing}")
        yield shard


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
