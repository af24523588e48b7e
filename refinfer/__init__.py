"""refinfer: weight caches and weight offloading for language models, explained by code that runs.

Each name is imported from its own module when it is first used, so that a program that is interrupted while it starts
can still report that in one line.

>>> import refinfer
>>> with refinfer.load() as session:
...     text = "".join(session.generate("ROMEO:", max_tokens=40))
>>> len(text)
40
"""

from importlib import import_module

TYPE_CHECKING = False  # importing it would take longer than all else before the first line of the program
if TYPE_CHECKING:  # the names in `_NAMES`, for type checkers; a test compares the two
    from refinfer.errors import BudgetError as BudgetError
    from refinfer.errors import CacheFileError as CacheFileError
    from refinfer.errors import ChatTemplateError as ChatTemplateError
    from refinfer.errors import ConfigError as ConfigError
    from refinfer.errors import DamagedWeightsError as DamagedWeightsError
    from refinfer.errors import GenerationError as GenerationError
    from refinfer.errors import InputError as InputError
    from refinfer.errors import LabError as LabError
    from refinfer.errors import PackingError as PackingError
    from refinfer.errors import PlanFunctionError as PlanFunctionError
    from refinfer.errors import RefinferError as RefinferError
    from refinfer.errors import RequestError as RequestError
    from refinfer.errors import SafetensorsError as SafetensorsError
    from refinfer.errors import SessionInUseError as SessionInUseError
    from refinfer.errors import TokenizerError as TokenizerError
    from refinfer.errors import TokenizerPackageMissingError as TokenizerPackageMissingError
    from refinfer.errors import WeightCacheError as WeightCacheError
    from refinfer.errors import WeightCacheStateError as WeightCacheStateError
    from refinfer.errors import WeightsError as WeightsError
    from refinfer.generate import STORYTELLER as STORYTELLER
    from refinfer.generate import GenerationStats as GenerationStats
    from refinfer.generate import Session as Session
    from refinfer.generate import load as load
    from refinfer.model.config import SHAPES as SHAPES
    from refinfer.model.config import ModelConfig as ModelConfig
    from refinfer.model.weights import Matrix as Matrix
    from refinfer.model.weights import WeightSource as WeightSource
    from refinfer.weight_cache.file import FileWeightCacheProvider as FileWeightCacheProvider
    from refinfer.weight_cache.memory import MemoryWeightCacheProvider as MemoryWeightCacheProvider

__version__ = "0.2.0"

_NAMES = {
    "refinfer.errors": (
        "BudgetError",
        "CacheFileError",
        "ChatTemplateError",
        "ConfigError",
        "DamagedWeightsError",
        "GenerationError",
        "InputError",
        "LabError",
        "PackingError",
        "PlanFunctionError",
        "RefinferError",
        "RequestError",
        "SafetensorsError",
        "SessionInUseError",
        "TokenizerError",
        "TokenizerPackageMissingError",
        "WeightCacheError",
        "WeightCacheStateError",
        "WeightsError",
    ),
    "refinfer.generate": ("STORYTELLER", "GenerationStats", "Session", "load"),
    "refinfer.model.config": ("SHAPES", "ModelConfig"),
    "refinfer.model.weights": ("Matrix", "WeightSource"),
    "refinfer.weight_cache.file": ("FileWeightCacheProvider",),
    "refinfer.weight_cache.memory": ("MemoryWeightCacheProvider",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_HOME)
__all__ += ["__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"refinfer has no {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
