"""refinfer: weight caches and weight offloading for language models, explained by code that runs.

The front door. Each name lives in a room of its own; see the architecture page for the rooms.

>>> import refinfer
>>> with refinfer.load() as session:
...     text = "".join(session.generate("ROMEO:", max_tokens=40))
>>> len(text)
40
"""

from refinfer.errors import (
    ConfigError,
    GenerationError,
    InputError,
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
