"""Every error refinfer raises on purpose, in one tree.

Defines the kinds of trouble, and the exit status of each on the command line. Leaves to others: how errors are shown;
`cli` prints them as one line on standard error.
Read more: tutorial 07; clauses ERR-1, ERR-2, ERR-4.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
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
]


class RefinferError(Exception):
    """Base of every error raised on purpose; its text says what is wrong and what to do.

    `exit_status` is what the command line ends with: 2 for bad usage or bad input, 1 for a failure while running.
    """

    exit_status: ClassVar[int] = 1


class GenerationError(RefinferError):
    """Something failed while running, after the input had been accepted."""


class WeightCacheError(RefinferError):
    """The weight cache cannot do what was asked: its file cannot be written, or its state does not allow it."""


class WeightCacheStateError(WeightCacheError):
    """The cache's state does not allow this call, or the offset did not come from it."""


class DamagedWeightsError(WeightCacheError):
    """Packed weights do not agree with their checksum, or cannot be read whole; `reason` says what is wrong.

    Most often the next start packs them again; if that does not help, `what_to_do` says what does.
    """

    def __init__(self, reason: str, what_to_do: str = "start again") -> None:
        super().__init__(f"{reason}; {what_to_do}")
        self.reason = reason


class InputError(RefinferError):
    """The input is not usable: a file, a folder, an option or an argument."""

    exit_status: ClassVar[int] = 2


class BudgetError(InputError):
    """A memory budget cannot be kept; the message names the smallest that can."""


class CacheFileError(InputError):
    """A file is not a weight cache that can be used; `reason` says why, without naming the file."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ConfigError(InputError):
    """A `config.json` is missing, malformed, or describes a model that is not supported."""


class LabError(InputError):
    """A lab or a workspace cannot be used: it is missing, damaged, or there already."""


class SafetensorsError(InputError):
    """A safetensors file or its index does not keep the format's rules."""


class TokenizerError(InputError):
    """A tokenizer file is missing or unusable, or a text cannot be encoded."""


class TokenizerPackageMissingError(TokenizerError):
    """A tokenizer file needs the `tokenizers` package, which is not installed; token ids still work."""


class ChatTemplateError(InputError):
    """A model has no chat template, or the one it has cannot be used."""


class WeightsError(InputError):
    """A model's tensors do not fit its config: they are missing, of another shape or type, or not finite."""


class PackingError(InputError):
    """A matrix cannot be packed or multiplied as asked: shapes, types, or values that a format cannot hold."""


class RequestError(InputError):
    """A request cannot be served: token ids, lengths or sampling options out of range."""


class PlanFunctionError(RequestError):
    """A plan of a person's own failed, returned no mask, locked too much, or gave another mask when asked again."""


class SessionInUseError(RequestError):
    """Two threads use a session at once, or a forked child uses one whose weights its parent reads."""
