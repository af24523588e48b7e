"""The weight sources that the suite is for: all of ours, or anybody's own class by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

from refinfer.cli.imported import imported as imported_by_name
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.weights import RowMajorSource, WeightSource

sys.path.insert(0, str(Path(__file__).parents[1] / "offload"))
from packed_model import PackedModel, change

POSITIONS: Final = 64
ROUNDING: Final = {"f32": 0.0, "bf16": 2.0**-8, "int8": 0.51 / 127, "int4": 0.51 / 7}
"""How wrong a weight may be, as a share of the largest of its row."""


@lru_cache(maxsize=32)
def packed(config: ModelConfig, folder: Path, name: str) -> PackedModel:
    return PackedModel(config, folder, name, folder.parent / f"{folder.name} {name}", POSITIONS)


PLACES: Final[dict[str, Callable[[PackedModel], WeightSource]]] = {
    "in memory": PackedModel.in_memory,
    "mapped": PackedModel.packed,
    "streamed": partial(PackedModel.within_a_budget, prefetch_threads=0),
    "streamed by one thread": partial(PackedModel.within_a_budget, prefetch_threads=1),
    "streamed by two threads": partial(PackedModel.within_a_budget, prefetch_threads=2),
    "LRU-paged": partial(PackedModel.within_a_budget, prefetch_threads=0, paged=True),
}


@dataclass(frozen=True)
class Kind:
    """`make` gives a source of the checkpoint in a folder; `rounding` says how wrong its weights may be.

    `damage`, if its sources check their weights, changes one of them where it lies, and again puts it back. An
    embedding table that is not the output table is never rounded by ours.
    """

    make: Callable[[ModelConfig, Path], WeightSource]
    rounding: float = 0.0
    damage: Callable[[WeightSource, Path], None] | None = None
    is_ours: bool = True


def ours(place: str, name: str) -> Kind:
    def damage(source: WeightSource, folder: Path) -> None:
        model = packed(source.config, folder, name)
        change(model.file, model.chunks[0].offset)

    return Kind(
        lambda config, folder: PLACES[place](packed(config, folder, name)),
        ROUNDING[name],
        damage if place == "mapped" else None,
    )


KINDS: Final = {"row-major": Kind(lambda config, folder: RowMajorSource(config, open_checkpoint(folder)))} | {
    f"{place}, {name}": ours(place, name)
    for place, name in [
        ("in memory", "int4"),
        ("mapped", "bf16"),
        ("streamed", "int8"),
        ("streamed by one thread", "f32"),
        ("streamed by two threads", "int4"),
        ("LRU-paged", "int8"),
    ]
}


def imported(name: str) -> Kind:
    """Return the kind of a class `package:Class`, which may be in a file of the current folder."""
    make = imported_by_name(name)
    damage = (lambda source, folder: source.damage()) if hasattr(make, "damage") else None
    return Kind(make, getattr(make, "rounding", 0.0), damage, is_ours=False)
