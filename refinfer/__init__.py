"""refinfer: weight caches and weight offloading for language models, explained by code that runs.

The front door. Each name lives in a room of its own and is fetched when it is first asked for, so that a program that
is interrupted while it starts can still say so in one line.

>>> import refinfer
>>> with refinfer.load() as session:
...     text = "".join(session.generate("ROMEO:", max_tokens=40))
>>> len(text)
40
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refinfer.errors import (
        ConfigError,
        GenerationError,
        InputError,
        PackingError,
        RefinferError,
        RequestError,
        SafetensorsError,
        TokenizerError,
        WeightsError,
    )
    from refinfer.generate import STORYTELLER, GenerationStats, Session, load
    from refinfer.model.config import SHAPES, ModelConfig
    from refinfer.model.weights import Matrix, WeightSource

__all__ = [
    "SHAPES",
    "STORYTELLER",
    "ConfigError",
    "GenerationError",
    "GenerationStats",
    "InputError",
    "Matrix",
    "ModelConfig",
    "PackingError",
    "RefinferError",
    "RequestError",
    "SafetensorsError",
    "Session",
    "TokenizerError",
    "WeightSource",
    "WeightsError",
    "__version__",
    "load",
]

__version__ = "0.1.0"

_ROOMS = {
    "refinfer.generate": ("STORYTELLER", "GenerationStats", "Session", "load"),
    "refinfer.model.config": ("SHAPES", "ModelConfig"),
    "refinfer.model.weights": ("Matrix", "WeightSource"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"refinfer has no {name!r}")
    return getattr(import_module(_ROOM_OF.get(name, "refinfer.errors")), name)


def __dir__() -> list[str]:
    return __all__
