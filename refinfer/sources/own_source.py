"""A weight source of a person's own: made by a class or a function from a config and a folder, and checked before use.

Leaves to others: the laws of sources (`model.weights`), which `pytest --source package:Class` holds anybody's to.
Read more: tutorial 07; clause GEN-23.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from refinfer.errors import RequestError
from refinfer.model.config import ModelConfig
from refinfer.model.weights import WeightSource

__all__ = ["MakeSource", "own_source"]

MakeSource = Callable[[ModelConfig, Path], WeightSource]
"""A class or a function that makes a source of the checkpoint in a folder."""


def own_source(make: MakeSource, config: ModelConfig, folder: Path) -> WeightSource:
    """Return the source that `make` gives; an error that it raises reaches the caller as it is.

    Raises:
        RequestError: `make` cannot be called, or gives something else than a source of this model.
    """
    if not callable(make):
        raise RequestError(f"source must be a class or function of a config and a folder, not {type(make).__name__}")
    source = make(config, folder)
    missing = [name for name in ("config", "forward_pass", "close") if not hasattr(source, name)]
    if missing:
        raise RequestError(
            f"source gave {type(source).__name__}, which is no weight source: it lacks {', '.join(missing)}"
        )
    if source.config != config:
        source.close()
        raise RequestError(f"source gave weights for another model: its config is not that of {folder}")
    return source
